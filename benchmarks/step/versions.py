"""What a change of the package costs: training steps of two checkouts, in turns in one process.

    git worktree add --detach /tmp/before <commit>
    python -m benchmarks.step.versions /tmp/before               # ratios of process time to the other checkout
    python -m benchmarks.step.versions /tmp/before --only small
    python -m benchmarks.step.versions --observation             # microseconds that the look for captured tensors takes

One thread, process time, shuffled rounds: ratios of the same round, their median and quartiles.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import neuralode_coupled as nc
from benchmarks.lib.clock import in_rounds, process_seconds, quartiles
from neuralode_coupled.adjoint import generators, recording

Step = Callable[[], Any]


def other(checkout: Path) -> ModuleType:
    """The package of another checkout, beside this one."""
    mine = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == nc.__name__}
    for name in mine:
        del sys.modules[name]
    sys.path.insert(0, str(checkout.resolve()))
    try:
        found = importlib.import_module(nc.__name__)
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.partition(".")[0] == nc.__name__]:
            del sys.modules[name]
        sys.modules.update(mine)
    if Path(str(found.__file__)).is_relative_to(Path(nc.__file__).parent):
        raise SystemExit(f"{checkout} has no package {nc.__name__!r} of its own")
    return found


def mlp(width: int) -> nn.Module:
    """Dynamics of small states."""
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))


def solve(package: Any, method: str, steps: int) -> Step:
    """``odeint_dto`` of a small state."""
    torch.manual_seed(0)
    net, y0, t = mlp(16), torch.randn(8, 4, requires_grad=True), torch.linspace(0, 1, steps + 1)
    return lambda: package.odeint_dto(lambda t, y: net(y), y0, t, method=method)[-1].square().sum().backward()


def layer(package: Any, dynamics: Callable[[], nn.Module], shape: tuple[int, ...], method: str, steps: int) -> Step:
    """A coupled layer."""
    torch.manual_seed(0)
    made = package.CoupledODE(dynamics(), package.ReactionDiffusionAdvection(), steps=steps, method=method)
    z0 = torch.randn(shape, requires_grad=True)
    return lambda: made(z0).square().sum().backward()


def convolutions() -> nn.Module:
    """Those of the block that most benchmarks solve."""
    parts = [(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*(module for part in parts for module in part))


CASES: dict[str, Callable[[Any], Step]] = {
    "block, euler, 5 steps": lambda package: layer(package, convolutions, (32, 16, 32, 32), "euler", 5),
    "block, rk4, 2 steps": lambda package: layer(package, convolutions, (32, 16, 32, 32), "rk4", 2),
    "small layer, euler, 20 steps": lambda package: layer(package, lambda: mlp(16), (8, 4), "euler", 20),
    "small layer, rk4, 20 steps": lambda package: layer(package, lambda: mlp(16), (8, 4), "rk4", 20),
    "small solve, euler, 20 steps": lambda package: solve(package, "euler", 20),
    "small solve, rk4, 20 steps": lambda package: solve(package, "rk4", 20),
    "small solve, dopri5": lambda package: solve(package, "dopri5", 1),
}


def compare(checkout: Path, only: str, rounds: int) -> None:
    """Print the ratio of each case."""
    before = other(checkout)
    for name, make in CASES.items():
        if not name.startswith(only):
            continue
        steps = {"before": make(before), "now": make(nc)}
        repeats = 1 if name.startswith("block") else 10
        rows = in_rounds(steps, lambda step, repeats=repeats: process_seconds(step, repeats), rounds)
        found = quartiles([row["now"] / row["before"] for row in rows])
        seconds = statistics.median(row["now"] for row in rows)
        shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        sys.stdout.write(f"{name:32} {shown}; now {1e3 * seconds:.3f} ms\n")


class Operations(TorchFunctionMode):
    """Counts the calls that an observer sees."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def observation(rounds: int) -> None:
    """Print how much longer a solve takes because its first step is looked at and its generators are read."""
    for method in ("euler", "rk4"):
        watched = solve(nc, method, 1)
        looked: Any = recording.Recording
        originals = looked.looks, generators.others

        def unwatched(step: Step = watched, originals: Any = originals, looked: Any = looked) -> None:
            looked.looks = property(lambda self: False)
            generators.others = list
            try:
                step()
            finally:
                looked.looks, generators.others = originals

        rows = in_rounds({"watched": watched, "unwatched": unwatched}, lambda step: process_seconds(step, 50), rounds)
        extra = 1e6 * statistics.median(row["watched"] - row["unwatched"] for row in rows)
        net, y = mlp(16), torch.randn(8, 4)
        with torch.no_grad(), Operations() as operations:
            net(y)
        sys.stdout.write(f"{method}: {extra:.0f} microseconds a solve; {operations.count} operations an evaluation\n")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", help="a folder with the other version")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--observation", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.observation:
        observation(arguments.rounds)
    elif arguments.checkout is None:
        parser.error("give a checkout to compare with, or --observation")
    else:
        compare(arguments.checkout, arguments.only, arguments.rounds)


if __name__ == "__main__":
    main()
