"""Time, memory and accuracy of a training step: every gradient method here, and other packages, on the same block.

    python -m benchmarks.peers --compiled 80
    python -m benchmarks.peers --parts memory --steps 50
    python -m benchmarks.peers --device cuda

*Time*: all candidates take turns in shuffled rounds of one process, so that a machine's other work falls on all of
them; the ratio to a hand-written loop that stores everything is taken within each round, and its median and quartiles
are reported. *Memory*: the peak above the level before, each in a process of its own, see `benchmarks.step.memory`.
*Gradients*: errors of float32 by group of tensors, see `benchmarks.step.gradients`; what solves another scheme is left
out. *Adaptive*: all three for dopri5, against torchdiffeq's odeint.

On a GPU the clock is read when the device is done, memory is what torch allocates there, float32 is not rounded to
TF32, and a candidate that cannot run there is left out with its words.

Packages that are not installed are skipped with a word. Every finding is added to results/peers.json (peers_cuda.json)
as it comes; parts can be run one by one. ``python -m benchmarks.peers.page`` then writes tables and figures into
docs/dev/benchmark-tables.md, of the CPU's.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.lib.block import start
from benchmarks.lib.candidates import ADAPTIVE, HAND
from benchmarks.lib.clock import once, ratios
from benchmarks.lib.device import Device, possible, tf32
from benchmarks.lib.gradients import errors, exact, gradients
from benchmarks.lib.memory import peak_of_block, peak_of_block_on_cuda, printed
from benchmarks.lib.results import environment, read, write
from benchmarks.peers.candidates import CANDIDATES, build, chosen, missing
from neuralode_coupled.runge_kutta import tableau

PARTS = ("time", "memory", "gradients", "adaptive")
SKIPPED = {"DiscreteAdjoint, 1 state", "DiscreteAdjoint, disk", "DiscreteAdjoint, disk, own weights"}
"""Not timed: the first recomputes with the square of the steps, the others measure the disk."""
REFERENCE = "torchdiffeq odeint"
"""What adaptive solves are measured against."""
OTHER_SCHEMES = {
    "TorchDiffEqPack MALI": ("euler",),  # an asynchronous leapfrog
    "diffrax reversible": ("euler",),  # a reversible form of Heun's method
    **{f"torchdyn {name}": ("rk4",) for name in ("autograd", "adjoint", "interpolated_adjoint")},  # other stage times
}
"""Who computes something else forward by which method, so that its gradient's error against ours would say nothing."""


def in_a_process(name: str, solver: str, steps: int) -> int:
    """Peak bytes of a candidate's training step above the level before it, in a fresh process."""
    return int(printed("benchmarks.peers", "--one", name, solver, str(steps)))


def time_part(
    solver: str, steps: int, rounds: int, compiled: bool, device: Device = "cpu", only: str = ""
) -> dict[str, Any]:
    """Ratios to the hand-written loop, or for adaptive solves to `REFERENCE`, of each candidate whose name has ``only``
    in it."""
    against = REFERENCE if solver == ADAPTIVE else HAND

    def tried(name: str) -> Callable[[], None]:
        step = once(*build(name, steps, solver, device=device), device)
        if device != "cpu":
            step()
        return step

    names = [n for n in chosen(solver, compiled) if n not in SKIPPED and (only in n or n == against)]
    made = {name: possible(name, device, partial(tried, name)) for name in names}
    able = {name: step for name, step in made.items() if step is not None}
    return ratios(able, rounds, against, device)


def memory_part(solver: str, steps: int, device: Device = "cpu", only: str = "") -> Iterator[dict[str, int]]:
    """Peak bytes of each candidate whose name has ``only`` in it, one by one."""
    for name in filter(lambda name: only in name, chosen(solver)):
        on_cuda = partial(peak_of_block_on_cuda, CANDIDATES[name], solver, steps) if device != "cpu" else None
        peak = possible(name, device, on_cuda or partial(in_a_process, name, solver, steps))
        if peak is not None:
            yield {name: peak}


def gradient_part(
    solver: str, steps: int, device: Device = "cpu", only: str = ""
) -> Iterator[dict[str, dict[str, float]]]:
    """Relative errors by group of the gradient of each candidate whose name has ``only`` in it, one by one, against
    float64 of the same scheme.

    The ODE form: all then integrate the weights on the same grid.
    """
    for name in filter(lambda name: only in name, chosen(solver, form="ode")):
        if solver in OTHER_SCHEMES.get(name, ()):
            continue
        found = possible(name, device, partial(_errors, name, steps, solver, device))
        if found is not None:
            yield {name: found}


def _errors(name: str, steps: int, solver: str, device: Device) -> dict[str, float]:
    layer, run = build(name, steps, solver, form="ode", device=device)
    return errors(gradients(layer, run, start(device=device)), _exact(layer, solver))


def _exact(layer: Any, solver: str) -> Any:
    z0 = start(torch.float64, device=next(layer.parameters()).device)
    if solver != ADAPTIVE:
        return exact(layer, z0)
    # Nearly the same steps: their lengths are chosen from rounded numbers. They are held fixed here; the gradient of
    # torchdiffeq's odeint goes through its choice of the first step as well.
    layer = copy.deepcopy(layer).double()
    layer.zero_grad(set_to_none=True)
    return gradients(layer, CANDIDATES["odeint_dto"].run(layer), z0)


def results_of(device: Device) -> str:
    """The name of the results."""
    return "peers" if device == "cpu" else f"peers_{device}"


def save(part: str, solver: str, steps: int, found: dict[str, Any], command: str, device: Device = "cpu") -> None:
    """Add to what the device's results hold, and show it.

    ``runs`` has the commands and what they ran on, ``made_by`` which of them each finding is of: another may measure
    some anew, on another day.
    """
    content = read(results_of(device))
    content.setdefault("parts", {}).setdefault(part, {}).setdefault(solver, {}).setdefault(str(steps), {}).update(found)
    run = {"command": command, "environment": environment(device) | {"load_average": None}}
    runs, made_by = content.setdefault("runs", []), content.setdefault("made_by", {})
    if run not in runs:
        runs.append(run)
    made_by |= {f"{part}, {solver}, {steps} steps, {name}": runs.index(run) for name in found}
    write(results_of(device), {key: content[key] for key in ("runs", "made_by", "parts")}, device)
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
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--solvers", nargs="+", choices=("euler", "rk4"), default=["euler", "rk4"])
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--compiled",
        type=int,
        default=0,
        metavar="N",
        help="compiled layers too, where a solve has at most N evaluations (80 take minutes to compile)",
    )
    parser.add_argument("--only", default="", metavar="NAME", help="these candidates alone")
    parser.add_argument(
        "--one", nargs=3, metavar=("NAME", "SOLVER", "STEPS"), help="the peak memory of one, in this process"
    )
    options = parser.parse_args(arguments)
    if options.one:
        name, solver, steps = options.one
        sys.stdout.write(str(peak_of_block(CANDIDATES[name], solver, int(steps))))
        return
    if options.rounds < 2:
        parser.error(f"a spread needs at least 2 rounds, got --rounds {options.rounds}")
    if not any(options.only in name for name in CANDIDATES):
        parser.error(f"--only {options.only}: no candidate has this in its name; they are {', '.join(CANDIDATES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; leave it out, or use --device cpu")
    for package in missing():
        sys.stdout.write(f"{package} is not installed: left out\n")
    command = f"python -m benchmarks.peers {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    with tf32(False):
        for part in options.parts:
            _measured(part, options, command)


def _measured(part: str, options: argparse.Namespace, command: str) -> None:
    """One part, for all solvers and steps that were asked for."""
    device, only, rounds = options.device, options.only, options.rounds
    if part == "adaptive":
        save("time", ADAPTIVE, 0, time_part(ADAPTIVE, 0, rounds, False, device, only), command, device)
        _one_by_one("memory", ADAPTIVE, 0, command, device, only)
        _one_by_one("gradients", ADAPTIVE, 0, command, device, only)
        return
    for solver in options.solvers:
        for steps in options.steps:
            if part == "time":
                compiled = steps * tableau(solver).stages <= options.compiled
                save(part, solver, steps, time_part(solver, steps, rounds, compiled, device, only), command, device)
            else:
                _one_by_one(part, solver, steps, command, device, only)


def _one_by_one(part: str, solver: str, steps: int, command: str, device: Device, only: str) -> None:
    for found in (memory_part if part == "memory" else gradient_part)(solver, steps, device, only):
        save(part, solver, steps, found, command, device)
