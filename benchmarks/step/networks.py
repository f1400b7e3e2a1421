"""A training step of the paper's networks by each gradient method that recomputes: time and memory against storing all.

    python -m benchmarks.step.networks

Images are random, and channels-last, as training on a CPU has them; forward and backward are measured. *Time*: all
methods take turns in shuffled rounds; the ratio to `nc.Backprop()` is taken within each round, and its median and
quartiles are reported. *Memory*: the peak above the level before the step, in a process of its own with one thread.
Each finding is added to results/networks.json as it comes; writes the table of docs/gradients.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import neuralode_coupled as nc
from benchmarks.lib.block import METHODS
from benchmarks.lib.clock import ratios
from benchmarks.lib.images import Batch, classifier_step, random_batch
from benchmarks.lib.memory import peak_of_network, printed
from benchmarks.lib.pages import DOCS, machine, put, ratio
from benchmarks.lib.results import read, write
from neuralode_coupled.models import NETWORKS, coupled_layers

STORED = "Backprop"
NAMES = (STORED, "DiscreteAdjoint", "DiscreteAdjoint, last step kept")
VARIANTS = ("anode", "anodev2-1", "anodev2-2")
PAGE = DOCS / "gradients.md"


def network(name: str, variant: str, method: str) -> nn.Module:
    """The same weights for every method."""
    torch.manual_seed(0)
    return nc.models.build(name, variant, adjoint=METHODS[method]).train()


def images(batch_size: int) -> Batch:
    """A batch as training has it."""
    return random_batch(batch_size, memory_format=torch.channels_last)


def in_a_process(name: str, variant: str, method: str, batch_size: int) -> int:
    """Peak bytes of a step above the level before it, in a fresh process."""
    size = "--batch-size", str(batch_size)
    return int(printed("benchmarks.step.networks", *size, "--one", name, variant, method))


def table(found: dict[str, dict[str, Any]]) -> str:
    """In Markdown: time as a ratio, and MiB, by network and variant."""
    titles = [f"{name}: {what}" for name in NAMES for what in ("time", "MiB")]
    lines = [f"| | coupled layers, steps | {' | '.join(titles)} |", f"|---|---:|{'---:|' * len(titles)}"]
    for problem, row in found.items():
        cells = []
        for name in NAMES:
            cells += [ratio(row[name]["time"]), f"{row[name]['peak_bytes'] / 2**20:.0f}"]
        lines.append(f"| {problem} | {row['layers']}, {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(name: str, variant: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time and memory by every method, and how many coupled layers of how many steps the network has."""
    models, batch = {method: network(name, variant, method) for method in NAMES}, images(batch_size)
    steps = {method: partial(classifier_step, model, batch) for method, model in models.items()}
    times = ratios(steps, rounds, STORED)
    layers = list(coupled_layers(models[STORED]).values())
    row: dict[str, Any] = {"layers": len(layers), "steps": layers[0].steps, "batch_size": batch_size, "rounds": rounds}
    for method in NAMES:
        row[method] = {"time": times[method], "peak_bytes": in_a_process(name, variant, method, batch_size)}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11, help="at least 2")
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "VARIANT", "METHOD"), help="one peak, in this process")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"a spread needs at least 2 rounds, got --rounds {options.rounds}")
    if options.one:
        name, variant, method = options.one
        sys.stdout.write(str(peak_of_network(network(name, variant, method), images(options.batch_size))))
        return
    for name in options.networks:
        for variant in VARIANTS:
            problem, found = f"{name}, {variant}", read("networks").get("networks", {})
            found[problem] = measured(name, variant, options.batch_size, options.rounds)
            write("networks", {"networks": found}, "cpu")
            sys.stdout.write(f"{table({problem: found[problem]}).splitlines()[-1]}\n")
            sys.stdout.flush()
    content = read("networks")
    put(PAGE, "networks", f"{table(content['networks'])}\n\n{machine(content['environment'])}\n")


if __name__ == "__main__":
    main()
