"""One run: a mechanism, a number of loops and a seed, trained and evaluated."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language.mechanisms import build
from benchmarks.language.model import Block, Size, Transformer, bits
from benchmarks.language.texts import Text
from benchmarks.lib.results import environment
from neuralode_coupled.evolution import NonFiniteWeights

CHANGES = ("half, coarser", "half, stopped", "double, finer", "double, longer")
"""Other numbers of loops at test time: the same time in fewer or more steps, or another time in steps of 1."""


@dataclass(frozen=True)
class Settings:
    """What all runs of one table share.

    Attributes:
        steps: of training, under a one-cycle schedule.
        batch: windows in each.
        lr: the peak of Adam's learning rate for embedding and head.
        own: the peak of Adam's for what passes have of their own: coefficients, updates of rank 1, scales.
        muon: the peak of Muon's, for the matrices of blocks.
        warmup: the share of the steps until then.
        clip: the largest norm of a gradient.
        windows: on so many of each held-out part the loss is evaluated.
        size: of the model.
    """

    steps: int = 1600
    batch: int = 8
    lr: float = 3e-2
    own: float = 5e-3
    muon: float = 0.02
    warmup: float = 0.1
    clip: float = 1.0
    windows: int = 256
    size: Size = field(default_factory=Size)


@dataclass(frozen=True)
class Run:
    """One run of a plan."""

    mechanism: str
    loops: int
    seed: int
    settings: Settings = field(default_factory=Settings)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.mechanism}, {self.loops} loops, seed {self.seed}"

    def described(self, digest: str) -> dict[str, Any]:
        """What makes its record the record of this run, on the text of this hash."""
        return asdict(self) | {"text": digest}


class Diverged(Exception):
    """A loss or an evolving weight that is not finite; its message says at which step."""


def run(asked: Run, text: Text) -> dict[str, Any]:
    """Train and evaluate: the run's record. One that diverges has the step in place of its losses."""
    settings = asked.settings
    torch.manual_seed(asked.seed)
    model = build(asked.mechanism, asked.loops, settings.size)
    begin = time.process_time()
    measured: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        measured["curve"] = train(model, text, settings, asked.seed)
        measured["seconds"] = round(time.process_time() - begin, 1)
        measured |= evaluate(model, text, settings)
    except Diverged as error:
        measured["diverged"] = str(error)
    return asked.described(text.digest) | measured | {"environment": environment("cpu")}


def optimizers_of(model: Transformer, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, Adam for embedding, head and what passes have of their own."""
    matrices = [p for block in model.body.modules() if isinstance(block, Block) for p in block.parameters()]
    held = set(map(id, matrices))
    own = [p for p in model.body.parameters() if id(p) not in held]
    groups = [
        {"params": [model.embedding.weight, model.head.weight], "lr": settings.lr},
        {"params": own, "lr": settings.own},
    ]
    return [
        torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, lr=settings.muon, weight_decay=0.0),
    ]


def train(model: Transformer, text: Text, settings: Settings, seed: int) -> list[list[float]]:
    """Train, the same batches for the same seed; gives [step, mean bits since the last] at twenty steps.

    Raises Diverged.
    """
    optimizers = optimizers_of(model, settings)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            settings.steps,
            pct_start=settings.warmup,
            cycle_momentum=False,
        )
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(seed)
    every, curve, losses = max(1, settings.steps // 20), [], []
    for step in range(1, settings.steps + 1):
        windows = text.batch(settings.size.context, settings.batch, generator)
        loss = _loss(model, windows, step)
        model.zero_grad()
        (loss * math.log(2)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for part in (*optimizers, *schedules):
            part.step()
        losses.append(float(loss.detach()))
        if step % every == 0:
            curve.append([step, round(sum(losses) / len(losses), 4)])
            losses = []
    return curve


def _loss(model: Transformer, windows: Tensor, step: int) -> Tensor:
    """Bits per byte; raises Diverged."""
    try:
        loss = bits(model, windows)
    except NonFiniteWeights as error:
        raise Diverged(f"step {step}: {error}") from error
    if not loss.isfinite():
        raise Diverged(f"step {step}: the loss is {loss.item()}")
    return loss


@torch.no_grad()
def evaluate(model: Transformer, text: Text, settings: Settings) -> dict[str, Any]:
    """Bits per byte on held-out files, also with other numbers of loops, on windows that are always the same.

    Of those numbers None stands for what the mechanism has no weights for, or what is no number of loops.
    """
    validation, test = (text.windows(part, settings.size.context, settings.windows) for part in ("validation", "test"))
    found: dict[str, Any] = {}
    for part, windows in (("validation", validation), ("test", test)):
        found[part] = mean_bits(model, windows)
        if not math.isfinite(found[part]):
            raise Diverged(f"the {part} loss is {found[part]}")
    found["changed"] = {change: _changed(model, change, test) for change in CHANGES}
    return found


def grid(change: str, loops: int) -> tuple[int, int] | None:
    """Steps and end of a change; None where half of a number of loops is the number itself. Halves are rounded up."""
    half = (loops + 1) // 2
    if change.startswith("half") and half == loops:
        return None
    return {
        "half, coarser": (half, loops),
        "half, stopped": (half, half),
        "double, finer": (2 * loops, loops),
        "double, longer": (2 * loops, 2 * loops),
    }[change]


def _changed(model: Transformer, change: str, windows: Tensor) -> float | None:
    """Bits per byte with another number of loops; None where there are no such weights."""
    steps_and_end = grid(change, model.body.loops)
    if steps_and_end is None:
        return None
    steps, end = steps_and_end
    if end > model.body.last:
        return None
    try:
        return mean_bits(partial(model, steps=steps, end=end), windows)
    except NonFiniteWeights:
        return math.inf


def mean_bits(model: Any, windows: Tensor, size: int = 50) -> float:
    """The mean over windows, some at a time."""
    return sum(len(part) * float(bits(model, part)) for part in windows.split(size)) / len(windows)
