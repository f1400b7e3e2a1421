"""What ``train --fast`` gives: training steps and inference at its choices, by those at the defaults.

    python -m benchmarks.step.fast

ResNet-4 and ResNet-10 of configuration one, batches of 256, one thread. Each candidate is timed in a process of its
own, because the allocator is a process's; the candidates take turns in shuffled rounds. The numbers are ratios of
process time to the defaults of the same round: median and quartiles. Beside inference stands what the network's
convolutions alone take. Writes results/fast.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import neuralode_coupled as nc
from benchmarks.lib.clock import quartiles
from benchmarks.lib.results import write
from neuralode_coupled.train.allocator import LEFT_ALONE
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.fast import CHOSEN, fastest, training_step

DEFAULTS, ALLOCATOR, FAST = "defaults", "allocator", "fast"
TRAINING, INFERENCE, BAKED = "training step", "inference", "baked, bfloat16"
CONVOLUTIONS, CONVOLUTIONS_HALF = "convolutions alone", "convolutions alone, bfloat16"
CLASSES = 10
SIZE = 256


def experiment(model: str, **choices: Any) -> Experiment:
    """What is timed."""
    return Experiment(model=model, variant="anodev2-1", batch_size=SIZE, accelerator="cpu", **choices)


def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(SIZE, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def training(model: str, choices: dict[str, Any]) -> Callable[[], object]:
    """A training step, as the command line takes it."""
    return training_step(experiment(model, **choices), torch.device("cpu"), CLASSES, SIZE)


def inference(model: str, what: str) -> Callable[[], object]:
    """The logits of a batch, of a layer or of plain blocks in bfloat16; or no more than the blocks' convolutions."""
    network = nc.models.build(model, "anodev2-1").eval()
    batch = images()
    if what != INFERENCE:
        network = nc.bake(network).to(memory_format=torch.channels_last)
    if what in (BAKED, CONVOLUTIONS_HALF):
        network, batch = network.to(torch.bfloat16), batch.bfloat16()
    if what in (INFERENCE, BAKED):
        return torch.inference_mode()(lambda: network(batch))
    given = convolved(network, batch)
    return torch.inference_mode()(lambda: [convolution(x) for convolution, x in given])


def convolved(network: nn.Module, batch: torch.Tensor) -> list[tuple[nn.Conv2d, torch.Tensor]]:
    """The network's convolutions, each with what it is given."""
    given: list[tuple[nn.Conv2d, torch.Tensor]] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        given.append((module, args[0]))

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(batch)
    for hook in hooks:
        hook.remove()
    return given


def seconds(what: str, model: str, choices: dict[str, Any], repeats: int) -> float:
    """Process time of one, the best of some, in this process."""
    torch.set_num_threads(1)
    run = training(model, choices) if what == TRAINING else inference(model, what)
    taken = []
    for _ in range(repeats + 1):  # one to warm up
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
    return min(taken[1:])


def in_a_process(what: str, model: str, choices: dict[str, Any], allocator: bool, repeats: int) -> float:
    """The same in a fresh one, with glibc's own allocation or with freed memory kept."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    given = [what, model, json.dumps(choices), str(repeats)]
    line = [sys.executable, "-W", "ignore", "-m", "benchmarks.step.fast", "--one", *given]
    environment = clean | {"OMP_NUM_THREADS": "1", LEFT_ALONE: "1" if allocator else "0"}
    return float(subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def choices_of(model: str) -> dict[str, Any]:
    """What ``--fast`` takes here."""
    torch.set_num_threads(1)
    found = fastest(experiment(model), torch.device("cpu"), CLASSES).experiment
    return {name: getattr(found, name) for name in CHOSEN}


def measure(what: str, model: str, choices: dict[str, Any], rounds: int, repeats: int) -> dict[str, Any]:
    """Ratios to the defaults of the same round."""
    candidates = {DEFAULTS: (what, model, {}, False), ALLOCATOR: (what, model, {}, True)}
    if what == TRAINING:
        candidates[FAST] = (what, model, choices, True)
    else:
        # What is left when all else costs nothing bounds every other way to compute the network.
        for name in (BAKED, CONVOLUTIONS, CONVOLUTIONS_HALF):
            candidates[name] = (name, model, {}, True)
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        taken = {
            name: in_a_process(*candidates[name], repeats) for name in random.sample(list(candidates), len(candidates))
        }
        for name, value in taken.items():
            ratios[name].append(value / taken[DEFAULTS])
    return {name: quartiles(values) for name, values in ratios.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "MODEL", "CHOICES", "REPEATS"), help="in this process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.one:
        what, model, choices, repeats = options.one
        sys.stdout.write(str(seconds(what, model, json.loads(choices), int(repeats))))
        return
    rows = {}
    for model in ("resnet4", "resnet10"):
        choices = choices_of(model)
        for what in (TRAINING, INFERENCE):
            rows[f"{what}, {model}"] = {
                "choices": choices if what == TRAINING else {},
                "ratios": measure(what, model, choices, options.rounds, options.repeats),
            }
            sys.stdout.write(f"{what}, {model}: {json.dumps(rows[f'{what}, {model}'])}\n")
    capability = torch.backends.cpu.get_cpu_capability()
    write("fast", {"batch": SIZE, "rounds": options.rounds, "capability": capability, "rows": rows}, "cpu")


if __name__ == "__main__":
    main()
