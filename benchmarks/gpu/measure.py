"""A training step on a GPU: its time, what the host does for it, and how much of the memory's bandwidth it uses.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --formats float32 --modes eager graph

ResNet-10 of configuration one at batch 256, with the optimizer that training has: eager, compiled by torch.compile, and
as one CUDA graph of the whole step, optimizer included. Whole, rather than forward and backward of the modules
(torch.cuda.make_graphed_callables): one launch is then all that is left on the host, and autograd, in whose backward
pass the package's own nodes run Python, is not there at all. Beside it stands the same model whose ODE blocks are
solved by torchdiffeq's odeint on the coupled field; it reads times back, and so cannot be captured.

*Time*: all candidates of a format and the eager float32 step take turns in shuffled rounds, see `benchmarks.peers`.
*Kernels, copies, launches and synchronisations* a step: in torch.profiler's trace of three steps, less that of one,
halved. *Bytes* a step: the sum over the operations of the eager step, optimizer included, of the bytes of every tensor
that goes in and of every tensor that comes out, each once; views move nothing. Kernels may read an operand twice
(a convolution's backward pass and a normalisation do), so that this is less than what is moved. Divided by the step's
time and by the bandwidth of a copy within the device's memory, which counts what is read and what is written, it is
the *share of the bandwidth*. A graph has the bytes of the eager step; a compiled step fuses operations, and has no such
number. *Memory*: the peak that torch allocates above the level before the step; not of a graph, which has its own.

Everything is added to results/gpu.json as it comes. Without a GPU there is nothing to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.costs import copy_bandwidth, counts, peak, traffic
from benchmarks.gpu.steps import FORMATS, MODES, SOLVERS, build, candidates
from benchmarks.lib.clock import ratios
from benchmarks.lib.device import Device, possible
from benchmarks.lib.images import Batch, random_batch
from benchmarks.lib.results import read, write

REFERENCE = "float32, recomputed, eager"


def save(batch_size: int, name: str, found: dict[str, Any], command: str, device: Device) -> None:
    """Add to what is known of a candidate, or of the device, at this batch size; and show it."""
    content = read("gpu")
    content.setdefault("commands", {})[f"batch {batch_size}, {name}"] = command
    content.setdefault("batches", {}).setdefault(str(batch_size), {}).setdefault(name, {}).update(found)
    write("gpu", {key: content[key] for key in ("commands", "batches")}, device)
    sys.stdout.write(f"{name}: {json.dumps(found)}\n")
    sys.stdout.flush()


def measured(
    form: str,
    chosen: Sequence[tuple[str, str]],
    batch: Batch,
    bandwidth: float,
    rounds: int,
    keep: Callable[[str, dict[str, Any]], None],
) -> None:
    """Measure candidates of one format, and hand each finding to ``keep(name, found)`` as it comes.

    Args:
        form: a name in `FORMATS`.
        chosen: solvers and modes, see `candidates`.
        batch: on the device to measure.
        bandwidth: bytes a second, from `copy_bandwidth`.
        rounds: of the clock, at least 2.
        keep: what to do with findings.
    """
    device = batch[0].device.type
    made: dict[str, Callable[[], None]] = {}
    moved: dict[str, int] = {}
    for solver, mode in chosen:
        name = f"{form}, {solver}, {mode}"
        step = possible(name, device, partial(build, form, solver, mode, batch))
        if step is None:
            continue
        made[name] = step
        found = costs(step, mode, device)
        if mode == "graph" and f"{form}, {solver}, eager" in moved:
            found["bytes"] = moved[f"{form}, {solver}, eager"]
        if "bytes" in found:
            moved[name] = found["bytes"]
        keep(name, found)
    reference = {} if REFERENCE in made else {REFERENCE: build("float32", "recomputed", "eager", batch)}
    times = ratios(made | reference, rounds, REFERENCE, device)
    for name in made:
        share = {"share_of_bandwidth": moved[name] / times[name]["seconds"] / bandwidth} if name in moved else {}
        keep(name, {"time": times[name], "rounds": rounds} | share)


def costs(step: Callable[[], None], mode: str, device: Device) -> dict[str, Any]:
    """What a step costs beside its time."""
    found: dict[str, Any] = dict(counts(step, device))
    if mode != "graph":
        found["peak_bytes"] = peak(step, device)
    if mode == "eager":
        found["bytes"] = traffic(step)
    return found


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30, help="at least 2")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="compiled takes minutes a format")
    asked = parser.parse_args(arguments)
    for name, least in (("batch_size", 2), ("rounds", 2)):
        if getattr(asked, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(asked, name)}")
    return asked


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    asked = options(arguments)
    if not torch.cuda.is_available():
        sys.stdout.write("torch finds no CUDA device here: nothing is measured\n")
        return
    device, size = "cuda", asked.batch_size
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    bandwidth = copy_bandwidth(device)
    save(size, "device", {"copy_bytes_per_second": bandwidth}, command, device)
    chosen = list(candidates(asked.solvers, asked.modes))
    batch = random_batch(size, device)
    for form in asked.formats:
        torch._dynamo.reset()  # models of the last format would count as versions of this one's
        measured(
            form, chosen, batch, bandwidth, asked.rounds, lambda name, found: save(size, name, found, command, device)
        )
