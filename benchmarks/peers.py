"""Time, memory and accuracy of a training step: every gradient method here, and other packages, on the same block.

    python -m benchmarks.peers --compiled 80
    python -m benchmarks.peers --parts memory --steps 50

*Time*: all candidates take turns in shuffled rounds of one process, so that a machine's other work falls on all of
them; the ratio to a hand-written loop that stores everything is taken within each round, and its median and quartiles
are reported. *Memory*: the peak above the level before, each in a process of its own, see `benchmarks.memory`.
*Gradients*: errors of float32 by group of tensors, see `benchmarks.gradients`; what solves another scheme is left out.
*Adaptive*: all three for dopri5, against torchdiffeq's odeint.

Packages that are not installed are skipped with a word. Every finding is added to results/peers.json as it comes; parts
can be run one by one. ``python -m benchmarks.peers_page`` then writes tables and figures into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.candidates import ADAPTIVE, CANDIDATES, HAND, Run, build, chosen, missing
from benchmarks.common import read, start, training_step, write
from benchmarks.gradients import errors, exact, gradients
from benchmarks.memory import in_a_process
from neuralode_coupled.runge_kutta import tableau

PARTS = ("time", "memory", "gradients", "adaptive")
SKIPPED = {"DiscreteAdjoint, 1 state", "DiscreteAdjoint, disk"}
"""Not timed: the one recomputes with the square of the steps, the other measures the disk."""
REFERENCE = "torchdiffeq odeint"
"""What adaptive solves are measured against."""
OTHER_SCHEMES = {
    "TorchDiffEqPack MALI": "its own scheme, an asynchronous leapfrog",
    "torchdyn autograd": "torchdyn's rk4 takes its stages at other times",
    "torchdyn adjoint": "torchdyn's rk4 takes its stages at other times",
    "torchdyn interpolated_adjoint": "torchdyn's rk4 takes its stages at other times",
}
"""By RK4 these compute something else forward, so that the error of their gradient against ours would say nothing."""

Candidates = dict[str, Callable[[], None]]


def once(layer: torch.nn.Module, run: Run) -> Callable[[], None]:
    """One training step from scratch."""
    z0 = start()

    def step() -> None:
        z0.grad = None
        layer.zero_grad(set_to_none=True)
        training_step(run, z0)

    return step


def measure(made: Candidates, rounds: int, against: str) -> dict[str, dict[str, float]]:
    """Median and quartiles of each candidate's ratio to the one ``against`` of the same round, and median seconds."""
    for step in made.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name in random.sample(list(made), len(made)):
            begin = time.perf_counter()
            made[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: _summary([a / b for a, b in zip(values, seconds[against], strict=True)])
        | {"seconds": statistics.median(values)}
        for name, values in seconds.items()
    }


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def time_part(solver: str, steps: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Ratios to the hand-written loop, or for adaptive solves to `REFERENCE`."""
    made = {name: once(*build(name, steps, solver)) for name in chosen(solver, compiled) if name not in SKIPPED}
    return measure(made, rounds, REFERENCE if solver == ADAPTIVE else HAND)


def memory_part(solver: str, steps: int) -> Iterator[dict[str, int]]:
    """Peak bytes of each candidate, one by one."""
    for name in chosen(solver):
        yield {name: in_a_process(name, solver, steps)}


def gradient_part(solver: str, steps: int) -> Iterator[dict[str, dict[str, float]]]:
    """Relative errors of each candidate's gradient by group, one by one, against float64 of the same scheme.

    The ODE form: all then integrate the weights on the same grid.
    """
    for name in chosen(solver, form="ode"):
        if solver != ADAPTIVE and name in OTHER_SCHEMES and (solver == "rk4" or "MALI" in name):
            continue
        layer, run = build(name, steps, solver, form="ode")
        yield {name: errors(gradients(layer, run, start()), _exact(layer, solver))}


def _exact(layer: Any, solver: str) -> Any:
    if solver != ADAPTIVE:
        return exact(layer)
    # Nearly the same steps: their lengths are chosen from rounded numbers. They are held fixed here; the gradient of
    # torchdiffeq's odeint goes through its choice of the first step as well.
    layer = copy.deepcopy(layer).double()
    layer.zero_grad(set_to_none=True)
    return gradients(layer, CANDIDATES["odeint_dto"].run(layer), start(torch.float64))


def save(part: str, solver: str, steps: int, found: dict[str, Any], command: str) -> None:
    """Add to what results/peers.json holds, and show it."""
    content = read("peers")
    content.setdefault("parts", {}).setdefault(part, {}).setdefault(solver, {}).setdefault(str(steps), {}).update(found)
    content.setdefault("commands", {})[f"{part}, {solver}, {steps} steps"] = command
    write("peers", {key: content[key] for key in ("commands", "parts")})
    for name, value in found.items():
        sys.stdout.write(f"{part:9} {solver:6} {steps:3} steps  {name:42} {_shown(value)}\n")
    sys.stdout.flush()


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value / 2**20:.1f} MiB"
    if "median" in value:
        return f"{value['median']:.2f}  ({value['lower_quartile']:.2f} .. {value['upper_quartile']:.2f})"
    return "  ".join(f"{group} {error:.0e}" for group, error in value.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--solvers", nargs="+", choices=("euler", "rk4"), default=["euler", "rk4"])
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument(
        "--compiled",
        type=int,
        default=0,
        metavar="N",
        help="compiled layers too, where a solve has at most N evaluations (80 take minutes to compile)",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"a spread needs at least 2 rounds, got --rounds {options.rounds}")
    for package in missing():
        sys.stdout.write(f"{package} is not installed: left out\n")
    command = " ".join(["python -m benchmarks.peers", *(sys.argv[1:] if arguments is None else arguments)])
    for part in options.parts:
        if part == "adaptive":
            save("time", ADAPTIVE, 0, time_part(ADAPTIVE, 0, options.rounds, compiled=False), command)
            _one_by_one("memory", ADAPTIVE, 0, command)
            _one_by_one("gradients", ADAPTIVE, 0, command)
            continue
        for solver in options.solvers:
            for steps in options.steps:
                if part == "time":
                    compiled = steps * tableau(solver).stages <= options.compiled
                    save(part, solver, steps, time_part(solver, steps, options.rounds, compiled), command)
                else:
                    _one_by_one(part, solver, steps, command)


def _one_by_one(part: str, solver: str, steps: int, command: str) -> None:
    for found in (memory_part if part == "memory" else gradient_part)(solver, steps):
        save(part, solver, steps, found, command)


if __name__ == "__main__":
    main()
