"""Tables 1 to 4 of the paper beside what `benchmarks.paper.cifar10` measured, and what becomes of the paper's claims.

python -m benchmarks.paper.tables epochs20-images10000 --page docs/dev/reproduction-tables.md
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.jsonl import Report
from benchmarks.lib.paired import FEWEST, Difference, mean_difference
from benchmarks.lib.results import RESULTS
from benchmarks.paper.records import read_as
from benchmarks.paper.show import show

RECORDS, WHOLE = RESULTS / "cifar10.jsonl", RESULTS / "cifar10_whole.jsonl"
NAMES = {"alexnet": "AlexNet", "resnet4": "ResNet-4", "resnet10": "ResNet-10"}
VARIANTS = {
    "baseline": "Baseline",
    "node": "Neural ODE, continuous adjoint",
    "anode": "ANODE (q = 0, DTO)",
    "anodev2-1": "ANODEV2, configuration one",
    "anodev2-2": "ANODEV2, configuration two",
}
TABLES = {
    "Table 1: configuration one, 5 steps": (("baseline", None), ("node", 5), ("anode", 5), ("anodev2-1", 5)),
    "Table 2: configuration two, 2 activation steps, 10 of the weights": (
        ("baseline", None),
        ("node", 2),
        ("anode", 2),
        ("anodev2-2", 2),
    ),
    "Table 4: the ablation at 2 steps": (("baseline", None), ("node", 2), ("anode", 2), ("anodev2-2", 2)),
}
PAPER = {  # min, max, average test accuracy in %
    "baseline": {"alexnet": (86.84, 87.15, 87.03), "resnet4": (76.47, 77.35, 76.95), "resnet10": (87.79, 88.52, 88.10)},
    "node": {"alexnet": (74.54, 76.78, 75.67), "resnet4": (44.73, 49.91, 47.37), "resnet10": (64.70, 70.06, 67.94)},
    "anode": {"alexnet": (87.86, 88.14, 88.02), "resnet4": (76.92, 77.45, 77.30), "resnet10": (88.48, 88.75, 88.60)},
    "anodev2-1": {
        "alexnet": (88.59, 88.96, 88.78),
        "resnet4": (77.27, 78.58, 78.11),
        "resnet10": (88.67, 89.39, 89.04),
    },
    "anodev2-2": {
        "alexnet": (88.10, 88.33, 88.26),
        "resnet4": (77.23, 78.28, 77.73),
        "resnet10": (88.65, 89.19, 88.93),
    },
}
PAPER_PARAMETERS = {  # thousands; one count for the Neural ODE and ANODE
    "baseline": {"alexnet": 1756.68, "resnet4": 7.71, "resnet10": 44.19},
    "node": {"alexnet": 1757.13, "resnet4": 7.96, "resnet10": 44.95},
    "anode": {"alexnet": 1757.13, "resnet4": 7.96, "resnet10": 44.95},
    "anodev2-1": {"alexnet": 1757.51, "resnet4": 8.23, "resnet10": 45.77},
    "anodev2-2": {"alexnet": 1757.13, "resnet4": 7.99, "resnet10": 45.05},
}
DEFAULT_STEPS = {"baseline": None, "untied": 5, "node": 2, "anode": 2, "anodev2-1": 5, "anodev2-2": 2}
Cell = tuple[str, str, int | None]
"""A network, a variant and its activation steps."""


@dataclass(frozen=True)
class Run:
    """One record: where it stands in the tables, and what it came to.

    Attributes:
        network: a key of `NAMES`.
        variant: a key of `DEFAULT_STEPS`.
        steps: of the activations; None where there are none.
        seed: of the run.
        accuracy: on the test images after the last epoch, in %.
        parameters: how many.
        schedule: its name.
    """

    network: str
    variant: str
    steps: int | None
    seed: int
    accuracy: float
    parameters: int
    schedule: str


def read(path: Path, schedule: str | None = None, report: Report | None = None) -> list[Run]:
    """The runs of a schedule, see `read_as`."""
    return read_as(_run, path, "benchmarks.paper.cifar10", schedule, report)


def _run(content: Mapping[str, Any]) -> Run:
    experiment, result = content["experiment"], content["result"]
    variant = experiment["variant"]
    return Run(
        experiment["model"],
        variant,
        DEFAULT_STEPS[variant] if experiment["steps"] is None else experiment["steps"],
        experiment["seed"],
        100 * result["final_accuracy"],
        result["parameters"],
        content["schedule"],
    )


def by_cell(runs: Sequence[Run]) -> dict[Cell, dict[int, Run]]:
    """The runs of each network, variant and number of steps, by seed."""
    cells: dict[Cell, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        cells[run.network, run.variant, run.steps][run.seed] = run
    return dict(cells)


def difference(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> Difference | None:
    """How much more accurate the first are, over the seeds that both have; None if they share none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return mean_difference([ours[seed].accuracy - theirs[seed].accuracy for seed in seeds])


def accuracy_table(cells: Mapping[Cell, Mapping[int, Run]], rows: Sequence[tuple[str, int | None]]) -> list[str]:
    """One of Tables 1, 2 and 4 in Markdown: what is there, network by network."""
    lines = [
        "| network | variant | seeds | min | max | mean | against the baseline | paper's mean |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for network in ("alexnet", "resnet4", "resnet10"):
        base = cells.get((network, "baseline", None), {})
        for variant, steps in rows:
            runs = cells.get((network, variant, steps))
            if not runs:
                continue
            values = [run.accuracy for run in runs.values()]
            gap = None if variant == "baseline" else difference(runs, base)
            figures = (f"{value:.2f}" for value in (min(values), max(values), statistics.mean(values)))
            lines.append(
                f"| {NAMES[network]} | {VARIANTS[variant]} | {len(values)} | {' | '.join(figures)} | "
                f"{'' if gap is None else gap} | {PAPER[variant][network][2]:.2f} |"
            )
    return lines


def parameter_table(cells: Mapping[Cell, Mapping[int, Run]]) -> list[str]:
    """Table 3 in Markdown, in thousands; its last column says whether the paper's count is kept to."""
    lines = ["| network | variant | here | paper | within |", "|---|---|---:|---:|---|"]
    for network in ("alexnet", "resnet4", "resnet10"):
        for variant, papers in PAPER_PARAMETERS.items():
            runs = cells.get((network, variant, DEFAULT_STEPS[variant]))
            if runs:
                count, paper = next(iter(runs.values())).parameters / 1000, papers[network]
                within = "yes" if round(count, 2) <= paper else "no"
                lines.append(f"| {NAMES[network]} | {VARIANTS[variant]} | {count:.2f} | {paper:.2f} | {within} |")
    return lines


def claims(cells: Mapping[Cell, Mapping[int, Run]]) -> list[str]:
    """A sentence on each of the paper's claims about accuracy and parameters, for each network that has runs."""
    lines = []
    for network in ("alexnet", "resnet4", "resnet10"):
        own = {(variant, steps): runs for (net, variant, steps), runs in cells.items() if net == network}
        if not own:
            continue
        for better, others in (
            (("anode", 2), [("baseline", None), ("node", 2)]),
            (("anode", 5), [("baseline", None), ("node", 5)]),
            (("anodev2-1", 5), [("baseline", None), ("node", 5), ("node", 2), ("anode", 5), ("anode", 2)]),
            (("anodev2-2", 2), [("baseline", None), ("node", 2), ("anode", 2)]),
        ):
            for other in others:
                gap = difference(own.get(better, {}), own.get(other, {}))
                if gap is not None:
                    lines.append(
                        f"- {NAMES[network]}: {_called(better)} beats {_called(other)}: **{gap.verdict()}** ({gap})."
                    )
        lines += _worst_against_best(network, own) + _more_parameters(network, own)
    return lines


def _worst_against_best(network: str, own: Mapping[tuple[str, int | None], Mapping[int, Run]]) -> list[str]:
    base = [run.accuracy for run in own.get(("baseline", None), {}).values()]
    lines = []
    for cell in (("anodev2-1", 5), ("anodev2-2", 2)):
        values = [run.accuracy for run in own.get(cell, {}).values()]
        if values and base:
            enough = min(len(values), len(base)) >= FEWEST
            # "Comparable" is no number: here it is at most half a point below.
            verdict = (
                "not enough runs" if not enough else "holds" if min(values) >= max(base) - 0.5 else "does not hold"
            )
            lines.append(
                f"- {NAMES[network]}: the worst seed of {_called(cell)} is comparable to the baseline's best: "
                f"**{verdict}** ({min(values):.2f} and {max(base):.2f})."
            )
    return lines


def _more_parameters(network: str, own: Mapping[tuple[str, int | None], Mapping[int, Run]]) -> list[str]:
    lines = []
    for cell, most in ((("anodev2-1", 5), 6.7), (("anodev2-2", 2), 3.6)):
        if own.get(cell) and own.get(("baseline", None)):
            count, base = (next(iter(own[key].values())).parameters for key in (cell, ("baseline", None)))
            more = 100 * (count / base - 1)
            verdict = "holds" if more <= most else "does not hold"
            lines.append(
                f"- {NAMES[network]}: {_called(cell)} has at most {most}% more parameters than the baseline: "
                f"**{verdict}** ({more:.2f}%)."
            )
    return lines


def _called(cell: tuple[str, int | None]) -> str:
    variant, steps = cell
    name = VARIANTS[variant].partition(" (")[0].partition(", continuous")[0]
    return name if steps is None or variant.startswith("anodev2") else f"{name} at {steps} steps"


def heading(schedule: str) -> str:
    """What the numbers of a schedule's tables are."""
    return (
        f"Schedule: `{schedule}`. Test accuracy in % after the last epoch; differences in points, over the seeds that "
        "both variants have, with a 95% confidence interval."
    )


def report(runs: Sequence[Run]) -> str:
    """All tables and sentences in Markdown."""
    cells = by_cell(runs)
    lines = [heading(runs[0].schedule), ""]
    for title, rows in TABLES.items():
        lines += [f"**{title}**", "", *accuracy_table(cells, rows), ""]
    lines += ["**Table 3: parameters, in thousands**", "", *parameter_table(cells), ""]
    lines += ["**The paper's claims at this schedule**", "", *claims(cells), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    show(__doc__, RECORDS, lambda path, schedule: report(read(path, schedule)), "tables of", arguments=arguments)


if __name__ == "__main__":
    main()
