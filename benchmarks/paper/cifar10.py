"""The paper's networks and variants on CIFAR-10: the runs behind Tables 1 to 4.

    python -m benchmarks.paper.cifar10 --data folder --data-root DIR --kind "JPEG copy" --limit 10000 --epochs 20

Every run has a process of its own and a folder under --runs, where a broken run is taken up again; a finished one is
not repeated, nor is one that has a record. With --at-once N up to N of them go on side by side. Each finished run is a
line of benchmarks/results/cifar10.jsonl, for `python -m benchmarks.paper.tables`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import jsonl
from benchmarks.paper import campaign
from benchmarks.paper.experiments import CHOICES, plan
from benchmarks.paper.options import add_options, experiment_of, split
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet4", help="some of resnet4, resnet10, alexnet, by commas")
    parser.add_argument("--variants", default=",".join(CHOICES[:5]), help=f"some of {', '.join(CHOICES)}")
    add_options(parser, "cifar10", Experiment(epochs=350))
    parser.add_argument("--adjoint", help="of anode and anodev2; backprop gives the same gradient, faster")
    chosen = vars(parser.parse_args(arguments))
    at_once = chosen.pop("at_once")
    try:
        kind, results, budget, planned = _choices(chosen)
        jsonl.read(results)  # says what is wrong with it, before anything is trained
    except (ValueError, OSError) as error:
        parser.error(str(error))
    failures = campaign.run(planned, kind, results, budget=budget, at_once=at_once)
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


def _choices(chosen: dict[str, Any]) -> tuple[str, Path, float | None, list[Planned]]:
    """The kind of the data, where results go, the budget and the runs; raises ValueError."""
    lists = {name: split(chosen.pop(name)) for name in ("models", "variants", "seeds")}
    runs, results = (chosen.pop(name) for name in ("runs", "results"))
    kind, budget, shared = experiment_of(chosen)
    planned = plan(runs, shared, lists["models"], lists["variants"], [int(seed) for seed in lists["seeds"]])
    return kind, results, budget, planned


if __name__ == "__main__":
    main()
