"""Peak memory of a training step against the number of steps, for every gradient method.

    python -m benchmarks.step.memory

Each measurement is a process of its own, in which glibc gives freed tensors back at once (large allocations by mmap),
so that the peak resident memory is what was live and not what the allocator kept; small steps beforehand make the
libraries allocate what they keep. Writes results/memory.json, docs/figures/memory.png and the table
of docs/gradients.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.lib.block import METHODS, SHAPE
from benchmarks.lib.candidates import HAND, OURS
from benchmarks.lib.memory import peak_of_block, printed
from benchmarks.lib.pages import DOCS, put
from benchmarks.lib.results import environment, read, write
from neuralode_coupled.figures import plotting

STATE = int(np.prod(SHAPE)) * 4
FIGURE, PAGE = DOCS / "figures" / "memory.png", DOCS / "gradients.md"


def in_a_process(name: str, method: str, steps: int) -> int:
    """Peak bytes of a training step above the level before it, in a fresh process."""
    return int(printed("benchmarks.step.memory", "--one", name, method, str(steps)))


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
        sys.stdout.write(str(peak_of_block(OURS[name], method, int(steps))))
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
