"""A training step on a GPU: its time, what the host does for it, and how much of the memory's bandwidth it uses.

ResNet-10 of configuration one at batch 256, with the optimizer that training has: eager, compiled by torch.compile, and
as one CUDA graph of the whole step, optimizer included. Whole, rather than forward and backward of the modules
(torch.cuda.make_graphed_callables): one launch is then all that is left on the host, and autograd, in whose backward
pass the package's own nodes run Python, is not there at all. Beside it stands the same model whose ODE blocks are
solved by torchdiffeq's odeint on the coupled field; it reads times back, and so cannot be captured.

*Time*: candidates and the eager float32 step take turns in shuffled rounds, see `benchmarks.peers`: all of a format
together, or with ``--minutes`` one by one.
*Kernels, copies, launches and synchronisations* a step: in torch.profiler's trace of three steps, less that of one,
halved. *Bytes* a step: the sum over the operations of the eager step, optimizer included, of the bytes of every tensor
that goes in and of every tensor that comes out, each once; views move nothing. Kernels may read an operand twice
(a convolution's backward pass and a normalisation do), so that this is less than what is moved. Divided by the step's
time and by the bandwidth of a copy within the device's memory, which counts what is read and what is written, it is
the *share of the bandwidth*. A graph has the bytes of the eager step; a compiled step fuses operations, and has no such
number. *Memory*: the peak that torch allocates above the level before the step; not of a graph, which has its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.costs import copy_bandwidth, counts, peak, traffic
from benchmarks.gpu.steps import build, candidates
from benchmarks.lib.clock import ratios
from benchmarks.lib.device import Device, possible
from benchmarks.lib.images import Batch, random_batch
from benchmarks.lib.results import read, write

REFERENCE = "float32, recomputed, eager"


@dataclass(frozen=True)
class Measured:
    """What is known of the candidates at a batch size, in a file.

    Attributes:
        batch_size: images a batch.
        device: what is measured.
        command: how.
        folder: of gpu.json; that of the results by default.
    """

    batch_size: int
    device: Device
    command: str
    folder: Path | None = None

    def known(self) -> dict[str, dict[str, Any]]:
        """All of it, by the names of the candidates."""
        return read("gpu", self.folder).get("batches", {}).get(str(self.batch_size), {})

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Add to what is known of a candidate, or of the device; and show it."""
        content = read("gpu", self.folder)
        content.setdefault("commands", {})[f"batch {self.batch_size}, {name}"] = self.command
        content.setdefault("batches", {}).setdefault(str(self.batch_size), {}).setdefault(name, {}).update(found)
        write("gpu", {key: content[key] for key in ("commands", "batches")}, self.device, self.folder)
        sys.stdout.write(f"{name}: {json.dumps(found)}\n")
        sys.stdout.flush()


def measured(
    form: str, chosen: Sequence[tuple[str, str]], batch: Batch, bandwidth: float, rounds: int, results: Measured
) -> None:
    """Measure candidates of one format, and keep each finding as it comes.

    Args:
        form: a name in `FORMATS`.
        chosen: solvers and modes, see `candidates`.
        batch: on the device to measure.
        bandwidth: bytes a second, from `copy_bandwidth`.
        rounds: of the clock, at least 2.
        results: where findings are kept.
    """
    device = batch[0].device.type
    made: dict[str, Callable[[], None]] = {}
    moved = {name: found["bytes"] for name, found in results.known().items() if "bytes" in found}
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
        results.keep(name, found)
    if not made:
        return
    reference = {} if REFERENCE in made else {REFERENCE: build("float32", "recomputed", "eager", batch)}
    times = ratios(made | reference, rounds, REFERENCE, device)
    for name in made:
        share = {"share_of_bandwidth": moved[name] / times[name]["seconds"] / bandwidth} if name in moved else {}
        results.keep(name, {"time": times[name], "rounds": rounds} | share)


def costs(step: Callable[[], None], mode: str, device: Device) -> dict[str, Any]:
    """What a step costs beside its time."""
    found: dict[str, Any] = dict(counts(step, device))
    if mode != "graph":
        found["peak_bytes"] = peak(step, device)
    if mode == "eager":
        found["bytes"] = traffic(step)
    return found


def measure(
    results: Measured, rounds: int, formats: Sequence[str], solvers: Sequence[str], modes: Sequence[str]
) -> None:
    """Measure all candidates, format by format."""
    batch, chosen = random_batch(results.batch_size, results.device), list(candidates(solvers, modes))
    bandwidth = copy_bandwidth(results.device)
    results.keep("device", {"copy_bytes_per_second": bandwidth})
    for form in formats:
        torch._dynamo.reset()  # models of the last format would count as versions of this one's
        measured(form, chosen, batch, bandwidth, rounds, results)
