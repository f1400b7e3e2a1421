"""Whether training in bfloat16 ends where training in float32 does.

    python -m benchmarks.paper.formats --data folder --data-root DIR --limit 10000

ResNet-4 of configuration two on 10,000 images of CIFAR-10, or on the digits if no data are named; one-cycle, every
graph stored (autocast's cache is off in a solve: each use of a weight has a cast of its own). Both formats train from
the same seeds, three of them; the table has the paired differences with their 95% intervals. A seed that has a line in
results/formats.jsonl is not trained again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import jsonl
from benchmarks.lib.paired import Difference, mean_difference
from benchmarks.lib.results import RESULTS, environment
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.run import train

FORMATS = ("32-true", "bf16-mixed")
PLAIN = Experiment(
    variant="anodev2-2", epochs=10, schedule="one-cycle", lr=0.1, adjoint="backprop", accelerator="cpu", threads=1
)


def described(experiment: Experiment) -> dict[str, Any]:
    """What a record says of it; paths of this machine are not kept."""
    return {name: value for name, value in asdict(experiment).items() if name != "data_root"}


def one(experiment: Experiment) -> dict[str, Any]:
    """Train it, and give its record."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(experiment, Path(folder) / "run")
        last = RunFolder(Path(folder) / "run").rows()[-1]
    measured = {"accuracy": result.final_accuracy, "loss": last["train/loss"], "test loss": last["test/loss"]}
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "experiment": described(experiment),
        **measured,
        "capability": capability,
        "environment": environment("cpu"),
    }


def difference(records: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> Difference | None:
    """bfloat16 less float32, over the seeds that both have."""
    found = {(r["experiment"]["precision"], r["experiment"]["seed"]): scale * r[name] for r in records}
    seeds = sorted({seed for _, seed in found})
    pairs = [[found.get((format, seed)) for format in FORMATS] for seed in seeds]
    return mean_difference([half - full for full, half in pairs if full is not None and half is not None])


def table(records: Sequence[dict[str, Any]]) -> str:
    """What came out, in Markdown."""
    lines = ["| | bfloat16 less float32 |", "|---|---:|"]
    for title, name, scale in (("test accuracy, points", "accuracy", 100.0), ("training loss", "loss", 1.0)):
        lines.append(f"| {title} | {difference(records, name, scale)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=PLAIN.epochs)
    parser.add_argument("--data", default=PLAIN.data, help="digits, cifar10 (downloaded) or folder")
    parser.add_argument("--data-root")
    parser.add_argument("--limit", type=int, help="so many training images")
    parser.add_argument("--results", type=Path, default=RESULTS / "formats.jsonl")
    chosen = vars(parser.parse_args(arguments))
    results, seeds = chosen.pop("results"), range(chosen.pop("seeds"))
    planned = [replace(PLAIN, **chosen, seed=seed, precision=precision) for seed in seeds for precision in FORMATS]
    for asked in planned:
        if not any(record["experiment"] == described(asked) for record in jsonl.read(results)):
            jsonl.append(results, one(asked))
    wanted = [described(asked) for asked in planned]
    sys.stdout.write(table([record for record in jsonl.read(results) if record["experiment"] in wanted]))


if __name__ == "__main__":
    main()
