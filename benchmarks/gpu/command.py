"""A training step on a GPU, and what else a GPU is to answer.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --formats float32 --modes eager graph
    python -m benchmarks.gpu --minutes 9 --out DIR --data folder --data-root IMAGES --kind "JPEG copy"

Without --minutes: the training step by every method, see benchmarks/gpu/measure.py. Everything is added to
results/gpu.json as it comes; without a GPU there is nothing to do. With --minutes: the tests that need a GPU, the
training step, and ResNet-4 by the paper's recipe with all seeds side by side, into a folder of its own, from which the
next call goes on: see benchmarks/gpu/stages.py. --device cpu does the same in small.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.measure import Measured, measure
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.stages import prepare
from benchmarks.gpu.steps import FORMATS, MODES, SOLVERS
from benchmarks.lib.jsonl import say

STAGED = ("out", "data", "data_root", "kind", "epochs", "seeds")
"""Options that go with --minutes alone."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", choices=tuple(SIZES), default="cuda")
    step = made.add_argument_group("the training step", "by default all of it, on a CPU a part")
    step.add_argument("--batch-size", type=int, help="256 by default")
    step.add_argument("--rounds", type=int, help="at least 2; 30 by default")
    step.add_argument("--formats", nargs="+", choices=FORMATS)
    step.add_argument("--solvers", nargs="+", choices=SOLVERS)
    step.add_argument("--modes", nargs="+", choices=MODES, help="compiled takes minutes a format")
    staged = made.add_argument_group("everything, in some minutes")
    staged.add_argument("--minutes", type=float, help="what fits into them; the next call goes on")
    staged.add_argument("--out", type=Path, help="the folder of all records")
    staged.add_argument("--data", choices=("cifar10", "folder"), help="cifar10 is downloaded, and the default")
    staged.add_argument("--data-root")
    staged.add_argument("--kind", help="what the images of a folder are; kept in the records")
    staged.add_argument("--epochs", type=int, help="of ResNet-4; 350 by default, the paper's")
    staged.add_argument("--seeds", type=int, help="of each of its variants, side by side; 5 by default")
    return made


def check(asked: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot be used, or not together."""
    least = {"batch_size": 2, "rounds": 2, "epochs": 1, "seeds": 1}
    for name, value in ((name, getattr(asked, name)) for name in least):
        if value is not None and value < least[name]:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least[name]}, got {value}")
    if asked.minutes is None:
        given = [name for name in STAGED if getattr(asked, name) is not None]
        if asked.device != "cuda" or given:
            named = f"--{given[0].replace('_', '-')}" if given else f"--device {asked.device}"
            raise ValueError(f"{named} goes with --minutes: --minutes 9 --out DIR")
        return
    if asked.out is None:
        raise ValueError("--minutes needs --out, the folder of the records, from which the next call goes on")
    if asked.data == "folder" and not asked.kind:
        raise ValueError('--data folder needs --kind, what the images are: --kind "JPEG copy"')
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; --device cpu does the same in small")


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    made = parser()
    asked = made.parse_args(arguments)
    command = typed(sys.argv[1:] if arguments is None else arguments, asked)
    sizes = SIZES[asked.device].changed(asked)
    try:
        check(asked)
        prepared = None if asked.minutes is None else prepare(asked, sizes, command, say)
    except (ValueError, OSError) as error:
        made.error(str(error))
    if prepared is not None:
        failures = prepared.run()
        if failures:
            raise SystemExit("failed:\n" + "\n".join(failures))
    elif not torch.cuda.is_available():
        say("torch finds no CUDA device here: nothing is measured")
    else:
        measure(Measured(sizes.batch_size, "cuda", command), sizes.rounds, sizes.formats, sizes.solvers, sizes.modes)


def typed(arguments: Sequence[str], asked: argparse.Namespace) -> str:
    """The command for the records, without paths of this machine."""
    names = {str(asked.out): "DIR", str(asked.data_root): "IMAGES"}
    return " ".join(["python -m benchmarks.gpu", *(names.get(word, word) for word in arguments)])
