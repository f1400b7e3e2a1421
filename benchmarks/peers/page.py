"""The tables and the figure of what `benchmarks.peers`, `step.inference` and `step.scaling` measured.

    python -m benchmarks.peers.page

Each table goes between its markers: a summary to docs/benchmarks.md, all else to docs/dev/benchmark-tables.md. What was
not measured is left out of the tables, and said to be missing among the targets. Writes docs/figures/peers.png, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.lib.candidates import HAND
from benchmarks.lib.pages import DOCS, machine, put, ratio
from benchmarks.lib.results import read
from benchmarks.peers.candidates import CANDIDATES

PAGE = DOCS / "dev" / "benchmark-tables.md"
SUMMARY = DOCS / "benchmarks.md"
FIGURE = DOCS / "figures" / "peers.png"
GROUPS = ("z0", "w0", "p", "static")
PARTS = ("time", "memory", "gradients")
KEPT = "DiscreteAdjoint, products kept, compiled"

Results = dict[str, dict[str, dict[str, Any]]]
"""By part, by solver, by number of steps, by candidate."""


@dataclass(frozen=True)
class Target:
    """One line of the table of targets.

    Args:
        what: in words.
        limit: the largest number that reaches it.
        value: the number reached out of the results; a KeyError where it was not measured.
        unit: of both.
    """

    what: str
    limit: float
    value: Callable[[Results], float]
    unit: str = ""

    def row(self, results: Results) -> str:
        """The line in Markdown."""
        limit = f"{self.limit:g}{self.unit}"
        try:
            value = self.value(results)
        except KeyError:
            return f"| {self.what} | {limit} | not measured | |"
        return f"| {self.what} | {limit} | {value:.3g}{self.unit} | {'yes' if value <= self.limit else 'no'} |"


def _time(name: str, solver: str = "euler", steps: int = 5) -> Callable[[Results], float]:
    return lambda results: results["time"][solver][str(steps)][name]["median"]


def _quotient(name: str, by: str, part: str, solver: str, steps: int) -> Callable[[Results], float]:
    def value(results: Results) -> float:
        found = results[part][solver][str(steps)]
        a, b = (found[key]["median"] if part == "time" else found[key] for key in (name, by))
        return a / b

    return value


def _mebibytes(name: str, steps: int) -> Callable[[Results], float]:
    return lambda results: results["memory"]["euler"][str(steps)][name] / 2**20


def _growth(name: str, few: int, many: int) -> Callable[[Results], float]:
    return lambda results: _mebibytes(name, many)(results) / _mebibytes(name, few)(results)


def _error(name: str, solver: str, steps: int) -> Callable[[Results], float]:
    """The largest error of any group, as a multiple of the hand-written loop's."""

    def value(results: Results) -> float:
        found = results["gradients"][solver][str(steps)]
        return max(found[name].values()) / max(found[HAND].values())

    return value


def _inference(name: str) -> Callable[[Results], float]:
    return lambda results: results["inference"]["euler"]["5"][name]["median"]


def _evolution(results: Results) -> float:
    """In percent of the coupled block's forward pass, so of a training step a smaller share."""
    return 100 * results["evolution"]["propagator"]["median"]


DTO, LAST, FOUR = "DiscreteAdjoint", "DiscreteAdjoint, last step kept", "DiscreteAdjoint, 4 states"
TARGETS = (
    Target("time: `DiscreteAdjoint(None)`, Euler, 5 steps", 1.25, _time(DTO)),
    Target("time: the same, compiled", 0.90, _time(f"{DTO}, compiled")),
    Target("time: `DiscreteAdjoint(keep_last=1)`, Euler, 5 steps", 1.25, _time(LAST)),
    Target("time: the same, compiled", 0.90, _time(f"{LAST}, compiled")),
    Target("time: `Backprop()`, Euler, 5 steps", 1.00, _time("Backprop")),
    Target("time: the same, compiled", 0.75, _time("Backprop, compiled")),
    Target('time: compiled `DiscreteAdjoint(keep="products")`, Euler, 5 steps', 1.08, _time(KEPT)),
    Target("time: `ReversibleAdjoint()`, Euler, 5 steps", 2.0, _time("ReversibleAdjoint")),
    *(
        Target(
            f"time: {'compiled ' if 'compiled' in name else ''}`DiscreteAdjoint(None)` against `odeint_adjoint`, "
            f"{solver}, 20 steps",
            limit,
            _quotient(name, "torchdiffeq odeint_adjoint", "time", solver, 20),
        )
        for name, limit in ((DTO, 0.80), (f"{DTO}, compiled", 0.60))
        for solver in ("euler", "rk4")
    ),
    Target("memory: `DiscreteAdjoint(None)`, Euler, 50 steps", 112, _mebibytes(DTO, 50), " MiB"),
    Target("memory: `DiscreteAdjoint(4)`, Euler, 50 steps", 28, _mebibytes(FOUR, 50), " MiB"),
    Target(
        'memory: `DiscreteAdjoint(4, weights="recomputed")`, Euler, 50 steps',
        28,
        _mebibytes(f"{FOUR}, own weights", 50),
        " MiB",
    ),
    Target("memory: `ReversibleAdjoint()`, Euler, 50 steps", 28, _mebibytes("ReversibleAdjoint", 50), " MiB"),
    Target(
        'memory: `ReversibleAdjoint(weights="recomputed")`, Euler, 50 steps',
        28,
        _mebibytes("ReversibleAdjoint, own weights", 50),
        " MiB",
    ),
    Target("memory: `DiscreteAdjoint(4)`, 50 steps against 20", 1.05, _growth(FOUR, 20, 50)),
    Target(
        'memory: `DiscreteAdjoint(4, weights="recomputed")`, 50 steps against 20',
        1.05,
        _growth(f"{FOUR}, own weights", 20, 50),
    ),
    Target(
        'memory: `DiscreteAdjoint(4, weights="recomputed", keep_last=1)`, 50 steps against 5',
        1.05,
        _growth(f"{FOUR}, own weights, last step kept", 5, 50),
    ),
    Target(
        'memory: `DiscreteAdjoint(storage="disk", weights="recomputed")`, 50 steps against 5',
        1.05,
        _growth(f"{DTO}, disk, own weights", 5, 50),
    ),
    Target(
        'memory: `ReversibleAdjoint(weights="recomputed")`, 50 steps against 5',
        1.05,
        _growth("ReversibleAdjoint, own weights", 5, 50),
    ),
    *(
        Target(
            f"error: `DiscreteAdjoint(None)` against the hand-written loop's rounding, {solver}, 20 steps",
            1.0,
            _error(DTO, solver, 20),
        )
        for solver in ("euler", "rk4")
    ),
    Target(
        "time: `odeint_dto` against torchdiffeq `odeint`, dopri5", 0.85, _time("odeint_dto", solver="dopri5", steps=0)
    ),
    Target("memory: the same", 0.25, _quotient("odeint_dto", "torchdiffeq odeint", "memory", "dopri5", 0)),
    Target("inference: layer against the stack, Euler, 5 steps", 1.02, _inference("coupled layer")),
    Target("inference: baked layer against the stack, Euler, 5 steps", 1.00, _inference("baked layer")),
    Target("weight evolution (propagator): share of a forward pass, Euler, 5 steps", 3, _evolution, "%"),
)


def table(columns: Sequence[tuple[str, dict[str, Any]]], cell: Callable[[Any], str]) -> list[str]:
    """Candidates against columns of (title, value by candidate); those that no column has are left out."""
    lines = [f"| | {' | '.join(title for title, _ in columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in CANDIDATES:
        if any(name in found for _, found in columns):
            cells = (cell(found[name]) if name in found else "" for _, found in columns)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


SHORT = {
    "Backprop": "`nc.Backprop()`",
    "DiscreteAdjoint": "`nc.DiscreteAdjoint(None)`",
    "DiscreteAdjoint, 4 states": "`nc.DiscreteAdjoint(4)`",
    "ReversibleAdjoint, own weights": '`nc.ReversibleAdjoint(weights="recomputed")`',
    KEPT: '`nc.DiscreteAdjoint(keep="products")`, compiled',
    "torchdiffeq odeint_adjoint": "torchdiffeq `odeint_adjoint`",
    "torchdyn adjoint": "torchdyn `adjoint`",
    "diffrax recursive": "diffrax `RecursiveCheckpointAdjoint`",
}
"""The rows of the summary."""


def summary(parts: Results, solver: str = "euler", steps: int = 20) -> list[str]:
    """Time, memory and the largest error of some candidates, at one number of steps."""
    time, memory, errors = (parts.get(part, {}).get(solver, {}).get(str(steps), {}) for part in PARTS)
    lines = ["| | time | MiB | gradient error |", "|---|---:|---:|---:|"]
    for name, shown in SHORT.items():
        cells = [
            f"{time[name]['median']:.2f}" if name in time else "",
            f"{memory[name] / 2**20:.0f}" if name in memory else "",
            f"{max(errors[name].values()):.0e}" if name in errors else "",
        ]
        if any(cells):
            lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def _columns(part: dict[str, dict[str, Any]], solvers: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{solver}, {steps} steps" if solver != "dopri5" else solver, part[solver][steps])
        for solver in solvers
        for steps in sorted(part.get(solver, {}), key=int)
    ]


def _errors(value: dict[str, float]) -> str:
    return ", ".join(f"{value[group]:.0e}" for group in GROUPS)


def adaptive(parts: Results) -> list[str]:
    """Time, memory and errors of the adaptive solves."""
    columns, cells = [], []
    for title, part, cell in (
        ("time against `odeint`", "time", ratio),
        ("MiB", "memory", lambda value: f"{value / 2**20:.0f}"),
        (f"error ({', '.join(GROUPS)})", "gradients", _errors),
    ):
        found = parts.get(part, {}).get("dopri5", {}).get("0", {})
        columns.append((title, {name: cell(value) for name, value in found.items()}))
        cells += found
    return table(columns, str) if cells else []


def inference(results: dict[str, dict[str, Any]]) -> list[str]:
    """Ratios to the hand-written stack."""
    columns = [(f"{solver}, {n} steps", found) for solver, by_steps in results.items() for n, found in by_steps.items()]
    names = list(dict.fromkeys(name for _, found in columns for name in found))
    lines = [f"| | {' | '.join(title for title, _ in columns)} |", f"|---|{'---:|' * len(columns)}"]
    return lines + [f"| {n} | {' | '.join(ratio(f[n]) if n in f else '' for _, f in columns)} |" for n in names]


def scaling(sweeps: dict[str, dict[str, Any]]) -> list[str]:
    """Peaks, seconds and slopes of each sweep."""
    units = {"steps": "bytes a step", "channels": "bytes a byte of weights"}
    lines = [
        "| varied | method | values | MiB | seconds | slope | by the formula | |",
        "|---|---|---|---|---|---:|---:|---|",
    ]
    for sweep, methods in sweeps.items():
        for name, found in methods.items():
            rows, formula = found["rows"], found["peak_bytes_slope_by_formula"]
            peaks = ", ".join(f"{row['peak_bytes'] / 2**20:.0f}" for row in rows.values())
            seconds = ", ".join(f"{row['seconds']:.2g}" for row in rows.values())
            slope, formula = f"{found['peak_bytes_slope']:.4g}", "" if formula is None else f"{formula:.4g}"
            unit = units.get(sweep, "bytes a byte of state")
            lines.append(
                f"| {sweep} | {name} | {', '.join(rows)} | {peaks} | {seconds} | {slope} | {formula} | {unit} |"
            )
    return lines


def draw(parts: Results, steps: int) -> Figure:
    """Time with its quartiles, and peak memory, of every candidate at one number of steps."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_solver = {solver: parts.get("time", {}).get(solver, {}).get(str(steps), {}) for solver in ("euler", "rk4")}
    memory = parts.get("memory", {}).get("euler", {}).get(str(steps), {})
    names = [name for name in CANDIDATES if name in memory or any(name in found for found in by_solver.values())]
    places = {name: -i for i, name in enumerate(names)}
    for (solver, found), marker, shift in zip(by_solver.items(), "os", (0.12, -0.12), strict=True):
        middle = [value["median"] for value in found.values()]
        below = [value["median"] - value["lower_quartile"] for value in found.values()]
        above = [value["upper_quartile"] - value["median"] for value in found.values()]
        left.errorbar(
            middle,
            [places[name] + shift for name in found],
            xerr=[below, above],
            fmt=marker,
            color="black",
            markerfacecolor="black" if marker == "o" else "white",
            markersize=5,
            capsize=2,
            label=solver,
        )
    left.axvline(1.0, color="0.6", linewidth=1)
    left.set(xlabel="time of a training step / hand-written loop", title=f"Time, {steps} steps")
    left.set_yticks(list(places.values()), names, fontsize=8)
    left.legend()
    right.plot([v / 2**20 for v in memory.values()], [places[n] for n in memory], "D", color="black", markersize=5)
    for name, value in memory.items():
        right.annotate(
            f"{value / 2**20:.0f}", (value / 2**20, places[name]), (6, -3), textcoords="offset points", size=8
        )
    right.set(xlabel="peak memory of a training step (MiB)", title=f"Memory, Euler, {steps} steps", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.xaxis.set_minor_formatter(NullFormatter())
    right.margins(x=0.12)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3, which="both")
    return figure


def commands(peers: dict[str, Any]) -> list[str]:
    """The commands behind the findings, by what they ran on; not those all of whose findings were measured again."""
    found: dict[str, list[str]] = {}
    for index in sorted(set(peers["made_by"].values())):
        run = peers["runs"][index]
        found.setdefault(machine(run["environment"]), []).append(f"`{run['command']}`")
    return [f"{where} By {', '.join(dict.fromkeys(commands))}." for where, commands in found.items()]


def sections() -> dict[str, list[str]]:
    """What goes between which markers."""
    peers, others, sizes = read("peers"), read("inference"), read("scaling")
    parts: Results = peers.get("parts", {})
    fixed = ("euler", "rk4")
    made: dict[str, list[str]] = {}
    if peers:
        results = parts | {
            "inference": others.get("ratio_to_stack", {}),
            "evolution": read("evolution_cost").get("share_of_forward", {}),
        }
        made["targets"] = [
            "| | target | reached | |",
            "|---|---:|---:|---|",
            *(target.row(results) for target in TARGETS),
            "",
            *(f"- {line}" for line in commands(peers)),
        ]
        made["time"] = table(_columns(parts.get("time", {}), fixed), ratio)
        made["memory"] = table(_columns(parts.get("memory", {}), fixed), lambda value: f"{value / 2**20:.0f}")
        made["accuracy"] = table(_columns(parts.get("gradients", {}), fixed), _errors)
        made["adaptive"] = adaptive(parts)
    if others:
        made["inference"] = [*inference(others["ratio_to_stack"]), "", machine(others["environment"])]
    if sizes:
        made["scaling"] = [*scaling(sizes["sweeps"]), "", machine(sizes["environment"])]
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--summary", type=Path, default=SUMMARY, help="the page of the short table")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--steps", type=int, default=20, help="the number of steps of the figure")
    options = parser.parse_args(arguments)
    made = sections()
    if not made:
        parser.error("there are no results yet: run python -m benchmarks.peers")
    for name, lines in made.items():
        put(options.page, name, "\n".join([*lines, ""]))
    parts: Results = read("peers").get("parts", {})
    if parts:
        put(options.summary, "summary", "\n".join([*summary(parts), ""]))
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(parts, options.steps).savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
