"""The page about looped layers: its table, its figure and a sentence for each mechanism, from the records.

    python -m benchmarks.language.page

Numbers and verdicts are computed. What must be written by hand, once there are records, stands in `SUMMARY` and
`INSTEAD`; while it is empty, the page has no such paragraph.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.language import depth, step_time
from benchmarks.language.mechanisms import BUDGET, MECHANISMS, SHARED, parameters
from benchmarks.language.options import loops_of
from benchmarks.language.records import DEPTH, TABLE, TUNING, of_one_text, read
from benchmarks.language.table import Row, gap, rows, table
from benchmarks.language.train import Settings
from benchmarks.language.tune import SEED, cell, chosen, losses, settings_of
from benchmarks.lib.jsonl import Record
from benchmarks.lib.pages import DOCS

PAGE = DOCS / "looped-layers.md"
FIGURE = DOCS / "figures" / "looped_layers.png"

SUMMARY = (
    "**In short.** If you loop a layer to save parameters, loop it with the same weights. Loops are worth it: they "
    "take 0.15 bits per byte off a single pass. To tell the passes apart adds next to nothing: no mechanism of at most "
    "1% more parameters beat the plain loop with its own best number of loops. The one to try is a scale for each pass "
    "and matrix: 24 numbers gain 0.015 ± 0.012 on a plain loop of as many passes. LoRA with 10% more parameters gains "
    "0.009, layers of their own, with four times the parameters, 0.155. What a looped layer lacks is parameters, not a "
    "way to know which pass it is in. And fix the number of passes before you train: half or double of it afterwards "
    "costs 0.18 bits or more with every mechanism."
)
"""By hand: what the table says in three sentences, in front of everything."""

INSTEAD = (
    "**What evolving weights are good for instead.** To make one block of trained ones, without data or with little: "
    "[When evolving weights pay](when-evolving-weights-pay.md). To learn a law that itself moves in time, which "
    "constant weights cannot: [Transport](transport.md). Whether they help the paper's networks for images: "
    "[Reproduction](reproduction.md)."
)
"""By hand, if evolving weights lose: what they are good for instead, with the pages that have measured it."""

LINES = ("-", "--", ":")
WIDTH = 120


@dataclass(frozen=True)
class Found:
    """All that the page is made of.

    Attributes:
        rows: of the table, see `rows`.
        tuning: validation bits by mechanism and loops, at a quarter of the steps.
        depth: the same of the shared loop and independent layers, at all steps.
        settings: of the table.
        record: one of the table, for the text and the versions.
        seeds: how many.
    """

    rows: Sequence[Row]
    tuning: Mapping[str, Mapping[int, float]]
    depth: Mapping[str, Mapping[int, float]]
    settings: Settings
    record: Record
    seeds: int


def gather(paths: Mapping[str, Path], given: str, settings: Settings) -> Found:
    """Read the records.

    Args:
        paths: of ``"results"``, ``"tuning"``, ``"depth"`` and ``"steps"``.
        given: loops in place of the tuned ones, see `loops_of`.
        settings: of the table.

    Raises:
        ValueError: if there are no results, if the files are of several texts, and as `loops_of`.
    """
    results = read(paths["results"], settings)
    if not results:
        raise ValueError(f"{paths['results']} has no records of these settings: run `python -m benchmarks.language`")
    tuning, by_depth = read(paths["tuning"], settings_of(settings)), read(paths["depth"], settings)
    of_one_text([*results, *tuning, *by_depth])
    tuned = losses(tuning)
    loops = loops_of(given, chosen(tuned))
    times = step_time.read(settings, paths["steps"])
    found = rows(results, loops, settings, times)
    if not found or (found[0].mechanism, found[0].loops) != (SHARED, loops[SHARED]):
        raise ValueError(f"{paths['results']} has no runs of the shared loop with {loops[SHARED]} loops")
    seeds = len({record["seed"] for record in results})
    return Found(found, tuned, losses(by_depth), settings, results[0], seeds)


def sentence(row: Row, base: Row) -> str:
    """What came out for one mechanism, in plain words."""
    start = f"- **{row.title}** ({row.kind.what}), {_passes(row.loops)}: "
    if row is base:
        return f"{start}{statistics.mean(row.losses):.3f} bits per byte, what the others are measured by."
    if row.mechanism == SHARED:
        start = f"- **the shared loop with fewer loops**, {_passes(row.loops)}: "
    cost = "the same parameters" if row.extra == 0 else f"{row.extra:,} more parameters (+{row.share:.2%})"
    if row.time is not None:
        cost += f" and {row.time:.2f} of the time of a step"
    verdict = {
        "better": f"better than the shared loop, {gap(row.against)} bits per byte",
        "worse": f"worse than the shared loop, {gap(row.against)} bits per byte",
        "not told apart": f"not to be told apart from the shared loop, {gap(row.against)} bits per byte",
        "not known": f"{row.diverged} of {row.diverged + len(row.losses)} runs diverged"
        if row.diverged
        else "too few seeds to say",
    }[row.verdict]
    if row.alike is not None and row.loops != base.loops:
        verdict += f" ({gap(row.alike)} against {row.loops} shared loops)"
    return f"{start}{verdict}, for {cost}."


def _passes(count: int) -> str:
    return "one loop" if count == 1 else f"{count} loops"


def verdict(found: Sequence[Row]) -> str:
    """Whether evolving weights win, within the budget."""
    evolving = [row for row in found if row.kind.evolving]
    better = [row for row in evolving if row.verdict == "better"]
    others = [row for row in found if not row.kind.evolving and row.kind.within_budget and row.mechanism != SHARED]
    if not better:
        worse = sum(row.verdict == "worse" for row in evolving)
        return (
            f"**Evolving weights do not win here.** None of {len(evolving)} ways beats the shared loop with its own "
            f"best number of loops; {worse or 'none'} {'is' if worse == 1 else 'are'} worse."
        )
    best = min(better, key=lambda row: statistics.mean(row.losses))
    text = (
        f"**Evolving weights beat the shared loop** in {len(better)} of {len(evolving)} ways, at most by "
        f"{gap(best.against)} bits per byte ({best.title})."
    )
    for row in others:
        if row.losses and statistics.mean(row.losses) < statistics.mean(best.losses):
            text += f" But {row.title} is better still, {gap(row.against)}."
    return text


def text_of(found: Found, figure: str) -> str:
    """The page in Markdown."""
    base, settings = found.rows[0], found.settings
    size, python = settings.size, found.record["environment"]["python"]
    count = parameters(SHARED, base.loops, size)
    paragraphs = [
        "# Looped layers: how passes may differ",
        "Many models repeat layers to save parameters. Is it worth it to tell pass 1 from pass 3, and how? Evolving "
        "weights are one way. Here they stand beside others, at equal parameters.",
        SUMMARY,
        verdict(found.rows),
        table(found.rows).rstrip(),
        f"![Validation loss by loops, and differences to the shared loop]({figure})",
        "## Mechanism by mechanism",
        "\n".join(sentence(row, base) for row in found.rows),
        INSTEAD,
        "## What was compared",
        f"A byte-level transformer: width {size.width}, {size.heads} heads, {size.context} bytes of context, one block "
        f"that is applied R times, {count:,} parameters. Norms have no parameters and linear layers no biases, in all "
        "mechanisms: passes differ in the four matrices alone. Evolving weights run through the package: "
        "`nc.CoupledODE(nc.Block(block), ..., t=(0, R), steps=R)`. The text is Python's standard library, "
        f"split by file (Python {python}, hash `{found.record['text']}`). All numbers of the table are bits per byte "
        "on test files.",
        f"{settings.steps:,} steps of {settings.batch} windows under a one-cycle schedule, {found.seeds} seeds; Muon "
        "trains the block's matrices, Adam the rest. The same seed has the same first block and the same batches in "
        "all mechanisms, and all but independent layers begin as the shared loop. A mechanism may have "
        f"{BUDGET:.0%} more parameters than it; independent layers and LoRA have more. Intervals are Student's, 95%, "
        "of differences seed by seed.",
        "Loops were tuned for each mechanism on another seed, on validation files, at a quarter of the steps: see the "
        "figure. With one loop all mechanisms are the shared loop.",
        "Other loops at test time. *Coarser* and *finer*: half or double the steps over the same time, where a step of "
        "length h moves by h times what the block changes. *Stopped* and *longer*: half or double the passes of length "
        "1. Half of an odd number is rounded up. A dash: the mechanism has no weights there, or half of its loops is "
        "no fewer.",
        _depth(found),
    ]
    return "\n\n".join(map(_wrapped, filter(None, paragraphs))) + "\n"


def _wrapped(paragraph: str) -> str:
    """In lines of the width of the other pages; tables and pictures as they are, items each for itself."""
    if paragraph[0] in "|!#":
        return paragraph
    lines = paragraph.split("\n")
    return "\n".join(
        fill(
            line, WIDTH, subsequent_indent="  " * line.startswith("- "), break_long_words=False, break_on_hyphens=False
        )
        for line in lines
    )


def _depth(found: Found) -> str:
    """Whether loops pay at the schedule; nothing where there are no records."""
    parts = []
    for name in depth.KINDS:
        row = found.depth.get(name)
        if row:
            values = ", ".join(f"{cell(loss)} with {_passes(count)}" for count, loss in row.items())
            parts.append(f"{MECHANISMS[name].title} {values}")
    if not parts:
        return ""
    return (
        f"At the table's steps, one seed ({SEED}) and validation files, other numbers of loops come to: "
        f"{'; '.join(parts)}."
    )


def draw(found: Found) -> Figure:
    """Left the tuning, right the differences to the shared loop with their intervals."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    _draw_tuning(left, found)
    _draw_differences(right, found.rows[1:])
    return figure


def _draw_tuning(axes: Axes, found: Found) -> None:
    for number, (name, row) in enumerate(found.tuning.items()):
        there = {count: loss for count, loss in row.items() if math.isfinite(loss)}
        axes.plot(
            [*there], [*there.values()], LINES[number // 6], marker="o", markersize=4, label=MECHANISMS[name].title
        )
    axes.set(
        xlabel="loops", ylabel="validation bits per byte", title=f"tuning, {settings_of(found.settings).steps:,} steps"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_differences(axes: Axes, found: Sequence[Row]) -> None:
    there = [(row, row.against) for row in found if row.against is not None]
    for place, (_, against) in enumerate(there):
        width = against.half_width if math.isfinite(against.half_width) else 0.0
        axes.errorbar(against.mean, -place, xerr=width, fmt="o", color="#0072b2", capsize=3)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(there))], [f"{row.title}, R = {row.loops}" for row, _ in there])
    axes.set(xlabel="bits per byte against the shared loop (95%)", title="test files; left is better")
    axes.grid(alpha=0.3, axis="x")


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, path in (("results", TABLE), ("tuning", TUNING), ("depth", DEPTH), ("steps", step_time.PATH)):
        parser.add_argument(f"--{name}", type=Path, default=path)
    parser.add_argument("--loops", default="", help="mechanism=R,...; by default the tuned ones")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    asked = vars(parser.parse_args(arguments))
    page, figure = asked.pop("page"), asked.pop("figure")
    try:
        found = gather(asked, asked.pop("loops"), settings or Settings())
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(found).savefig(figure, dpi=120)
        page.write_text(text_of(found, figure.relative_to(page.parent).as_posix()))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{page}, {figure}\n")


if __name__ == "__main__":
    main()
