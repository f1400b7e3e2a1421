"""The command line of the benchmarks that train on CIFAR-10."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.results import RESULTS
from neuralode_coupled.train.experiment import Experiment


def add_options(parser: argparse.ArgumentParser, name: str, plain: Experiment) -> None:
    """The options of every benchmark that trains on CIFAR-10: the schedule (``plain`` has the defaults), and places."""
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--data", default="cifar10", help="cifar10 (downloaded) or folder")
    parser.add_argument("--data-root")
    parser.add_argument("--kind", help="what the images of a folder are; kept in the records")
    parser.add_argument("--epochs", type=int, default=plain.epochs)
    parser.add_argument("--limit", type=int, default=plain.limit)
    parser.add_argument("--validation", type=int, default=plain.validation)
    parser.add_argument("--lr", type=float, default=plain.lr)
    parser.add_argument("--schedule", default=plain.schedule)
    parser.add_argument("--batch-size", type=int, default=plain.batch_size)
    parser.add_argument("--dynamics")
    parser.add_argument("--evolution")
    parser.add_argument("--evolution-lr", type=float, default=plain.evolution_lr)
    parser.add_argument("--precision", default=plain.precision)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, help="of a run; by default all cores")
    parser.add_argument(
        "--at-once",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="runs side by side, each in its process; on a CPU they want --threads of the cores divided by N",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="run folders")
    parser.add_argument("--results", type=_lines, default=RESULTS / f"{name}.jsonl", help="records, a .jsonl file")
    parser.add_argument("--budget", type=float, help="minutes")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _lines(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".jsonl" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file of JSON Lines, such as {path.stem}.jsonl, got {text!r}")
    return path


def split(names: str) -> list[str]:
    """Names by commas."""
    return [part.strip() for part in names.split(",")]


def experiment_of(chosen: dict[str, Any]) -> tuple[str, float | None, Experiment]:
    """The kind of the data, the budget and what all runs share, of `add_options`' options; raises ValueError."""
    budget, kind, device = (chosen.pop(name) for name in ("budget", "kind", "device"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; leave it out, or use --device cpu")
    if chosen["data"] == "folder" and not kind:
        raise ValueError('--data folder needs --kind, what the images are: --kind "JPEG copy"')
    if budget is not None and budget <= 0:
        raise ValueError(f"--budget must be a positive number of minutes, got {budget}")
    return kind or "original", budget, Experiment(**chosen, accelerator={"cuda": "gpu"}.get(device, device))
