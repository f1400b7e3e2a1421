"""A training step of the paper's networks by each gradient method that recomputes: time and memory against storing all.

    python -m benchmarks.networks

The networks are channels-last, as training on a CPU has them, on random images; forward and backward are measured.
*Time*: all methods take turns in shuffled rounds; the ratio to `nc.Backprop()` is taken within each round, and its
median and quartiles are reported. *Memory*: the peak above the level before the step, in a process of its own, see
`benchmarks.memory`. Each finding is added to results/networks.json as it comes; writes the table of docs/gradients.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

import neuralode_coupled as nc
from benchmarks.common import METHODS, read, write
from benchmarks.memory import ALLOCATOR
from benchmarks.pages import DOCS, machine, put
from benchmarks.peers import measure
from neuralode_coupled.models import NETWORKS, coupled_layers
from neuralode_coupled.runs import PeakMemory

STORED = "Backprop"
NAMES = (STORED, "DiscreteAdjoint", "DiscreteAdjoint, last step kept")
VARIANTS = ("anode", "anodev2-1", "anodev2-2")
PAGE = DOCS / "gradients.md"


def step(network: str, variant: str, method: str, batch_size: int) -> Callable[[], None]:
    """One training step from scratch, without the optimizer's."""
    torch.manual_seed(0)
    model = nc.models.build(network, variant, adjoint=METHODS[method])
    model.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (a missing overload)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))

    def once() -> None:
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()

    return once


def peak(network: str, variant: str, method: str, batch_size: int) -> int:
    """Peak bytes of a step above the level before it; in this process."""
    torch.set_num_threads(1)
    step(network, variant, method, 2)()  # what libraries allocate once and keep
    measured = step(network, variant, method, batch_size)
    measured()
    gc.collect()
    memory = PeakMemory(torch.device("cpu"))
    measured()
    return memory.read()


def in_a_process(network: str, variant: str, method: str, batch_size: int) -> int:
    """The same in a fresh process."""
    arguments = [sys.executable, "-m", "benchmarks.networks", "--batch-size", str(batch_size)]
    line = [*arguments, "--one", network, variant, method]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ALLOCATOR)
    return int(done.stdout)


def table(found: dict[str, dict[str, Any]]) -> str:
    """In Markdown: time as a ratio, and MiB, by network and variant."""
    titles = [f"{name}: {what}" for name in NAMES for what in ("time", "MiB")]
    lines = [f"| | coupled layers, steps | {' | '.join(titles)} |", f"|---|---:|{'---:|' * len(titles)}"]
    for problem, row in found.items():
        cells = []
        for name in NAMES:
            time = row[name]["time"]
            spread = f"{time['lower_quartile']:.2f} to {time['upper_quartile']:.2f}"
            cells += [f"{time['median']:.2f} ({spread})", f"{row[name]['peak_bytes'] / 2**20:.0f}"]
        lines.append(f"| {problem} | {row['layers']}, {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(network: str, variant: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time and memory by every method, and how many coupled layers of how many steps the network has."""
    times = measure({name: step(network, variant, name, batch_size) for name in NAMES}, rounds, STORED)
    layers = list(coupled_layers(nc.models.build(network, variant)).values())
    row: dict[str, Any] = {"layers": len(layers), "steps": layers[0].steps, "batch_size": batch_size, "rounds": rounds}
    for name in NAMES:
        row[name] = {"time": times[name], "peak_bytes": in_a_process(network, variant, name, batch_size)}
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
        network, variant, method = options.one
        sys.stdout.write(str(peak(network, variant, method, options.batch_size)))
        return
    for network in options.networks:
        for variant in VARIANTS:
            found = read("networks").get("networks", {})
            found[f"{network}, {variant}"] = measured(network, variant, options.batch_size, options.rounds)
            write("networks", {"networks": found}, "cpu")
            sys.stdout.write(f"{table({network: found[f'{network}, {variant}']}).splitlines()[-1]}\n")
            sys.stdout.flush()
    content = read("networks")
    put(PAGE, "networks", f"{table(content['networks'])}\n\n{machine(content['environment'])}\n")


if __name__ == "__main__":
    main()
