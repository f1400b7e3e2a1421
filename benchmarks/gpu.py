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
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neuralode_coupled as nc
from benchmarks.common import Device, read, tf32, wait, write
from benchmarks.peers import measure, possible
from neuralode_coupled.models import ADJOINTS, by_name, coupled_layers
from neuralode_coupled.runs import PeakMemory
from neuralode_coupled.training import Classifier

MODEL, VARIANT, CLASSES = "resnet10", "anodev2-1", 10
PEER = "torchdiffeq odeint"
SOLVERS = ("discrete", "backprop", PEER)
"""Gradient methods here, by their names in `nc.models.ADJOINTS`, and the peer."""
MODES = ("eager", "compiled", "graph")
REFERENCE = "float32, discrete, eager"

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Format:
    """How activations are computed: whether float32 may be rounded to TF32, and the dtype of autocast."""

    tf32: bool
    autocast: torch.dtype | None = None


FORMATS = {"float32": Format(False), "TF32": Format(True), "bfloat16": Format(False, torch.bfloat16)}


# The model


class ByTorchdiffeq(nn.Module):
    """A coupled layer's field solved by torchdiffeq's odeint, by Euler's method on the layer's grid.

    Args:
        layer: whose parameters it shares.

    Raises:
        ValueError: for a layer by another method: what belongs to a step is found by counting evaluations.
    """

    def __init__(self, layer: nc.CoupledODE) -> None:
        super().__init__()
        if layer.method != "euler":
            raise ValueError(f"one evaluation a step is needed, as by 'euler', got a layer by {layer.method!r}")
        self.layer = layer

    def forward(self, z0: Tensor) -> Tensor:
        from torchdiffeq import odeint

        steps, field = self.layer.grid.steps, self.layer.field
        dtype = torch.promote_types(z0.dtype, torch.float32)  # under autocast z0 may have less
        grid = torch.linspace(0, 1, steps + 1, dtype=dtype, device=z0.device)
        on_grid = {"grid_constructor": lambda func, y0, t: grid}
        slope, state = step_by_step(field, steps), field.initial_state(z0)
        # Every steps-th point, which is the first and the last: a list of indices would be copied to the device.
        return odeint(slope, state, grid[::steps], method="euler", options=on_grid)[0][-1]


def step_by_step(field: nc.CoupledField, steps: int) -> Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The field for one solve that evaluates it once a step, in order, with the modules of each step (`nc.PerStep`)."""
    rows: list[dict[str, Tensor]] = [{} for _ in range(steps)]
    for prefix, module in field.per_step:
        for row, own in zip(rows, module.copies, strict=True):
            members = (*own.named_parameters(), *own.named_buffers())
            row.update({f"{prefix}copies.0.{name}": tensor for name, tensor in members})
    ahead = iter(rows)

    def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        theta, derivatives = field.weight_side(t, field.names, state[1:])
        return (field.evaluate(t, state[0], theta | next(ahead)), *derivatives)

    return slope


def by_torchdiffeq(model: nn.Module) -> nn.Module:
    """The model with every coupled layer solved by torchdiffeq; in place."""
    for name, layer in coupled_layers(model).items():
        model.set_submodule(name, ByTorchdiffeq(layer))
    return model


def network(solver: str, device: Device) -> nn.Module:
    """The same weights for every solver, with an evolution under way."""
    torch.manual_seed(0)
    adjoint = None if solver == PEER else by_name("adjoint", solver, ADJOINTS)
    model = nc.models.build(MODEL, VARIANT, adjoint=adjoint, classes=CLASSES)
    for layer in coupled_layers(model).values():
        for coefficient in layer.field.evolution.parameters():
            nn.init.normal_(coefficient, std=0.05)
    return (by_torchdiffeq(model) if solver == PEER else model).to(device).train()


def random_batch(size: int, device: Device) -> Batch:
    """Images and labels: what a step costs does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images.to(device), torch.randint(CLASSES, (size,), generator=generator).to(device)


# The step


class Step:
    """One training step: forward, backward and the optimizer's step.

    Attributes:
        loss: of the last step, on the device.
    """

    def __init__(self, model: nn.Module, form: Format, batch: Batch) -> None:
        self.model, self.form, self.batch = model, form, batch
        self.optimizer = Classifier(model, epochs=1, lr=1e-3).configure_optimizers()
        self.run: Callable[[Tensor], Tensor] = model
        self.loss: Tensor | None = None

    def __call__(self) -> None:
        images, labels = self.batch
        dtype = self.form.autocast
        self.optimizer.zero_grad(set_to_none=True)
        with tf32(self.form.tf32):
            with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
                loss = functional.cross_entropy(self.run(images), labels)
            loss.backward()
            self.optimizer.step()
        self.loss = loss.detach()


class Graph:
    """The whole step as one CUDA graph.

    Replayed, it trains the model of the step that it is made of, on the very tensors of its batch.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        # The optimizer's buffers, and what libraries choose and allocate when first used, come before the capture; on
        # a stream beside the usual one, as PyTorch asks.
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(self.graph):
            step()

    def __call__(self) -> None:
        self.graph.replay()


def compiled(step: Step, backend: str = "inductor") -> Step:
    """The step with its model compiled."""
    step.run = torch.compile(step.model, fullgraph=True, backend=backend)
    return step


def candidates(solvers: Sequence[str], modes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The solvers and modes that go together."""
    return ((s, m) for s, m in itertools.product(solvers, modes) if s != PEER or m == "eager")


def build(form: str, solver: str, mode: str, batch: Batch) -> Callable[[], None]:
    """A candidate that has taken its first step."""
    step = Step(network(solver, batch[0].device), FORMATS[form], batch)
    made = {"eager": lambda: step, "compiled": lambda: compiled(step), "graph": lambda: Graph(step)}[mode]()
    made()
    return made


# What it costs


class Traffic(TorchDispatchMode):
    """Counts the bytes of what goes into and comes out of operations, see the module's docstring."""

    ALLOCATIONS = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in {*self.ALLOCATIONS, "aten::_unsafe_view"}:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            # An expanded tensor is no larger than what it expands.
            self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return result


def traffic(step: Callable[[], None]) -> int:
    """Bytes a step, see the module's docstring."""
    with Traffic() as counted:
        step()
    return counted.bytes


def copy_bandwidth(device: Device, size: int = 2**30, rounds: int = 20) -> float:
    """Bytes a second, read and written, of a copy of ``size`` bytes within the device's memory; the median."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    wait(device)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(seconds)


WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"})
ON_HOST = ("cuda_runtime", "cuda_driver")


def counted(events: Sequence[dict[str, Any]]) -> Counter[str]:
    """Kernels and copies on the device, launches and synchronisations by the host, in the events of a trace."""
    found: Counter[str] = Counter()
    for event in events:
        kind, name = event.get("cat", ""), event.get("name", "")
        found["kernels"] += kind == "kernel"
        found["copies"] += kind in ("gpu_memcpy", "gpu_memset")
        found["launches"] += kind in ON_HOST and "Launch" in name
        found["synchronisations"] += kind in ON_HOST and name in WAITS
    return found


def trace(step: Callable[[], None], count: int, device: Device) -> list[dict[str, Any]]:
    """The events of so many steps, by torch.profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.device(device).type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(count):
            step()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def counts(step: Callable[[], None], device: Device) -> dict[str, float]:
    """`counted` a step; what the profiler does at its beginning and its end falls out of the difference."""
    one, three = (counted(trace(step, count, device)) for count in (1, 3))
    return {name: (three[name] - one[name]) / 2 for name in ("kernels", "copies", "launches", "synchronisations")}


def peak(step: Callable[[], None], device: Device) -> int:
    """Peak bytes above the level before the step, gradients included."""
    if isinstance(step, Step):
        step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    before = torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else 0
    memory = PeakMemory(torch.device(device))
    step()
    wait(device)
    return memory.read() - before


# What is measured and kept


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
    reference = {} if REFERENCE in made else {REFERENCE: build("float32", "discrete", "eager", batch)}
    ratios = measure(made | reference, rounds, REFERENCE, device)
    for name in made:
        share = {"share_of_bandwidth": moved[name] / ratios[name]["seconds"] / bandwidth} if name in moved else {}
        keep(name, {"time": ratios[name], "rounds": rounds} | share)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


if __name__ == "__main__":
    main()
