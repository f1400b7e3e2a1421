"""Where the time of a training step goes: by operation, and what does not depend on the size of the state.

    python -m benchmarks.step.anatomy

The coupled block by Euler's method, five steps. *Operations*: what torch's profiler gives each, as shares of all
operations of the hand-written loop's step, medians over shuffled rounds. *Forward pass*: the hand-written loop without
a graph, by its whole step, on the clock. *Small state*: the same step for one image of 4x4 pixels, by the hand-written
loop's step on the whole state: Python, autograd and the launching of operations. Writes results/anatomy.json and its
table into docs/dev/engine.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.lib.block import SHAPE, start
from benchmarks.lib.candidates import HAND, OURS, Run, made
from benchmarks.lib.clock import Step, clocked, in_rounds, once, rounded_median
from benchmarks.lib.pages import DOCS, machine, put
from benchmarks.lib.results import read, write

KINDS = {
    "convolutions, forward": r"convolution(_overrideable)?$",
    "convolutions, backward": r"convolution_backward",
    "GroupNorm": r"native_group_norm",
    "ReLU": r"clamp_min|threshold_backward",
    "the rest": r"",
}
"""Operations by a pattern of their names; the first that fits counts."""
NAMES = (HAND, "Backprop", "DiscreteAdjoint", "ReversibleAdjoint")
FORWARD = "forward pass"
SMALL = (1, SHAPE[1], 4, 4)


def without_graph(run: Run) -> Step:
    """The forward pass alone."""
    z0 = start().detach()

    def once() -> None:
        with torch.no_grad():
            run(z0)

    return once


def operations(step: Step) -> dict[str, float]:
    """Seconds by kind of operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.key))
            found[kind] += event.self_cpu_time_total / 1e6
    return found


def measured(steps: int, rounds: int) -> dict[str, Any]:
    """All three, by candidate; see the module's docstring."""
    built = {name: made(OURS[name], steps, "euler") for name in NAMES}
    whole = {name: once(*built[name]) for name in NAMES}
    by_kind = in_rounds(whole, operations, rounds)
    small = {f"small {name}": once(*built[name], shape=SMALL) for name in NAMES}
    clock = in_rounds({HAND: whole[HAND], FORWARD: without_graph(built[HAND][1])} | small, clocked, 2 * rounds)
    shares = [
        {name: {kind: row[name][kind] / sum(row[HAND].values()) for kind in KINDS} for name in NAMES} for row in by_kind
    ]
    return {
        "operations": {
            name: {kind: rounded_median([row[name][kind] for row in shares]) for kind in KINDS} for name in NAMES
        },
        "small": {name: rounded_median([row[f"small {name}"] / row[HAND] for row in clock]) for name in NAMES},
        FORWARD: rounded_median([row[FORWARD] / row[HAND] for row in clock]),
    }


def table(results: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines = [f"| | {' | '.join(KINDS)} | all operations | small state |", "|---" + "|---:" * (len(KINDS) + 2) + "|"]
    for name, row in results["operations"].items():
        cells = [*(row[kind] for kind in KINDS), sum(row.values()), results["small"][name]]
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.0f}%' for value in cells)} |")
    forward = f"The forward pass without a graph takes {results[FORWARD]:.2f} of the hand-written loop's step."
    return "\n".join([*lines, "", f"{forward} {machine(results['environment'])}"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(arguments)
    write("anatomy", measured(options.steps, options.rounds), "cpu")
    shown = table(read("anatomy"))
    put(DOCS / "dev" / "engine.md", "anatomy", shown)
    sys.stdout.write(shown)


if __name__ == "__main__":
    main()
