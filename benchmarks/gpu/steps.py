"""The training step that is measured on a GPU, in every format, by every solver, eager, compiled and as a graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import neuralode_coupled as nc
from benchmarks.lib.device import Device, tf32
from benchmarks.lib.images import Batch
from neuralode_coupled.models import ADJOINTS, by_name, coupled_layers
from neuralode_coupled.train.learner import Classifier

MODEL, VARIANT, CLASSES = "resnet10", "anodev2-1", 10
PEER = "torchdiffeq odeint"
SOLVERS = ("recomputed", "backprop", PEER)
"""Gradient methods here, by their names in `nc.models.ADJOINTS`, and the peer."""
MODES = ("eager", "compiled", "graph")


@dataclass(frozen=True)
class Format:
    """How activations are computed: whether float32 may be rounded to TF32, and the dtype of autocast."""

    tf32: bool
    autocast: torch.dtype | None = None


FORMATS = {"float32": Format(False), "TF32": Format(True), "bfloat16": Format(False, torch.bfloat16)}


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
