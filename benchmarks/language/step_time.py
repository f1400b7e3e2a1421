"""The time of a training step of every row of the table, as a ratio to that of the shared loop."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.language.mechanisms import build
from benchmarks.language.model import BYTES, bits
from benchmarks.language.table import Cell
from benchmarks.language.train import Settings, optimizers_of
from benchmarks.lib.clock import Step, in_rounds, process_seconds, rounded_median
from benchmarks.lib.results import RESULTS, compact, environment

PATH = RESULTS / "language_steps.json"
ROUNDS = 7


def training_step(cell: Cell, settings: Settings) -> Step:
    """One step of training on random bytes, the update among it."""
    torch.manual_seed(0)
    model = build(*cell, settings.size)
    optimizers = optimizers_of(model, settings)
    windows = torch.randint(BYTES, (settings.batch, settings.size.context + 1))

    def step() -> None:
        model.zero_grad()
        bits(model, windows).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def measure(cells: Sequence[Cell], settings: Settings, path: Path = PATH, rounds: int = ROUNDS) -> dict[Cell, float]:
    """Ratios of process time to the first of the cells, of one thread in shuffled rounds; kept in a file."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = {str(number): training_step(cell, settings) for number, cell in enumerate(cells)}
        found = in_rounds(steps, partial(process_seconds, repeats=2), rounds)
    finally:
        torch.set_num_threads(before)
    kept = [
        {
            "mechanism": name,
            "loops": loops,
            "ratio": rounded_median([row[str(number)] / row["0"] for row in found]),
            "seconds": round(statistics.median(row[str(number)] for row in found), 5),
        }
        for number, (name, loops) in enumerate(cells)
    ]
    content = {"environment": environment("cpu"), "settings": asdict(settings), "rounds": rounds, "steps": kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compact(content) + "\n")
    return read(settings, path)


def read(settings: Settings, path: Path = PATH) -> dict[Cell, float]:
    """The ratios of a file; none where it is not there, or of other settings."""
    content: Mapping = json.loads(path.read_text()) if path.exists() else {}
    if content.get("settings") != asdict(settings):
        return {}
    return {(row["mechanism"], row["loops"]): row["ratio"] for row in content["steps"]}
