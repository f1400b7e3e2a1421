"""Peak memory of a training step against the number of steps, for every gradient method.

    python -m benchmarks.memory

Each measurement is a process of its own, in which glibc gives freed tensors back at once (large allocations by mmap),
so that the peak resident memory is what was live and not what the allocator kept; small steps beforehand make the
libraries allocate what they keep. Writes results/memory.json, docs/figures/memory.png and the table
of docs/gradients.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.candidates import CANDIDATES, HAND, build
from benchmarks.common import METHODS, SHAPE, block, by_hand, environment, printed, read, start, training_step, write
from benchmarks.pages import DOCS, put
from neuralode_coupled.figures import plotting
from neuralode_coupled.train.runs import PeakMemory

STATE = int(np.prod(SHAPE)) * 4
FIGURE, PAGE = DOCS / "figures" / "memory.png", DOCS / "gradients.md"


def measure(name: str, method: str, steps: int) -> int:
    """Peak bytes above the level before the step; in this process."""
    torch.set_num_threads(1)
    _, run = build(name, steps, method)
    z0 = start()
    # What libraries allocate once and keep: scratch memory of this shape, and modules imported when first used (torch
    # imports sympy, 35 MiB, in the first backward of any autograd.Function).
    training_step(by_hand(block(1, "euler")), z0)
    for _ in range(2):
        training_step(build(name, 2, method)[1], start(shape=(1, *SHAPE[1:])))
    if CANDIDATES[name].jitted:
        training_step(run, z0)  # the compiler's memory is not the step's
    z0.grad = None
    gc.collect()
    peak = PeakMemory(torch.device("cpu"))
    training_step(run, z0)
    return peak.read()


def on_cuda(name: str, method: str, steps: int) -> int:
    """The same on a GPU, of what torch allocates there, libraries' scratch memory included; in this process."""
    layer, run = build(name, steps, method, device="cuda")
    z0 = start(device="cuda")
    for _ in range(2):
        training_step(run, z0)
        z0.grad = None
        layer.zero_grad(set_to_none=True)
    gc.collect()
    before = torch.cuda.memory_allocated()
    peak = PeakMemory(torch.device("cuda"))
    training_step(run, z0)
    return peak.read() - before


def in_a_process(name: str, method: str, steps: int) -> int:
    """The same in a fresh process."""
    return int(printed("benchmarks.memory", "--one", name, method, str(steps)))


def others(solver: str) -> dict[str, dict[int, int]]:
    """What was measured before, if anything was. Raises ValueError if that was another solver, or elsewhere."""
    before = read("memory")
    if not before:
        return {}
    here = {"solver": solver} | {key: value for key, value in environment().items() if key != "load_average"}
    there = {"solver": before["solver"]} | {key: before["environment"].get(key) for key in here if key != "solver"}
    if here != there:
        raise ValueError(f"the other methods were measured with {there}, and this is {here}: leave --only out")
    return {name: {int(n): size for n, size in peaks.items()} for name, peaks in before["peak_bytes"].items()}


def slope(peaks: dict[int, int]) -> float:
    """States a step, by a line through the peaks."""
    steps = sorted(peaks)
    return float(np.polyfit(steps, [peaks[n] for n in steps], 1)[0] / STATE)


def table(results: dict[str, dict[int, int]], slopes: dict[str, float]) -> str:
    """In Markdown, MiB by number of steps, and states a step."""
    steps = sorted({n for peaks in results.values() for n in peaks})
    lines = [f"| steps | {' | '.join(map(str, steps))} | states a step |", f"|---|{'---:|' * (len(steps) + 1)}"]
    for name, peaks in results.items():
        cells = (f"{peaks[n] / 2**20:.0f}" if n in peaks else "" for n in steps)
        lines.append(f"| {name} | {' | '.join(cells)} | {slopes[name]:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--one", nargs=3, metavar=("METHOD", "SOLVER", "STEPS"), help="one measurement, in this process"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100, 200])
    parser.add_argument("--solver", default="euler")
    parser.add_argument("--only", default="", metavar="NAME", help="these methods alone; the others stay as they are")
    options = parser.parse_args(arguments)
    if options.one:
        name, method, steps = options.one
        sys.stdout.write(str(measure(name, method, int(steps))))
        return
    names = [name for name in (HAND, *METHODS) if options.only in name]
    if not names:
        parser.error(f"--only {options.only}: no method has this in its name; they are {', '.join((HAND, *METHODS))}")
    results = others(options.solver) if options.only else {}
    for name in names:
        steps = [n for n in options.steps if not (n > 50 and "1 state" in name)]
        results[name] = {n: in_a_process(name, options.solver, n) for n in steps}
    results = {name: results[name] for name in (HAND, *METHODS) if name in results}
    slopes = {name: slope(peaks) for name, peaks in results.items()}
    path = write(
        "memory", {"state_bytes": STATE, "solver": options.solver, "peak_bytes": results, "states_a_step": slopes}
    )
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    plotting.memory_against_steps(results, "Euler, one state is 2 MiB").savefig(FIGURE, dpi=150)
    put(PAGE, "memory", table(results, slopes) + "\n")
    sys.stdout.write(
        json.dumps(
            {
                "states a step": slopes,
                "MiB": {k: {n: round(b / 2**20, 1) for n, b in v.items()} for k, v in results.items()},
            },
            indent=1,
        )
    )
    sys.stdout.write(f"\n{path}\n{FIGURE}\n")


if __name__ == "__main__":
    main()
