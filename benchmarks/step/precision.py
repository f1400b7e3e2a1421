"""What a format costs and gives: time, memory and gradient error of a training step, and the loss of a short training.

    python -m benchmarks.step.precision

ResNet-4 of configuration two. The formats take turns in shuffled rounds of one process; the time is the ratio to
float32 within each round, its median and quartiles are reported. Memory is the peak of one step in a process of its
own on the CPU. The gradient error is relative to float64, over all parameters. Writes results/precision.json and
results/precision.md.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import neuralode_coupled as nc
from benchmarks.lib.clock import clocked, quartiles
from benchmarks.lib.memory import peak
from benchmarks.lib.results import write
from neuralode_coupled.train.data import ImageData

FULL = "float32"
FORMATS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float64": (torch.float64, None),
    FULL: (torch.float32, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
}
"""The dtype of the weights, and that of autocast."""

ON_CUDA = {"float16 autocast, scaled": (torch.float32, torch.float16)}
COMPILED = ", compiled"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def formats() -> dict[str, tuple[torch.dtype, torch.dtype | None]]:
    """Those that the device has."""
    return FORMATS | (ON_CUDA if DEVICE.type == "cuda" else {})


def network(dtype: torch.dtype) -> nn.Module:
    """The same weights in every format, with an evolution under way."""
    torch.manual_seed(0)
    model = nc.models.build("resnet4", "anodev2-2")
    for layer in nc.models.coupled_layers(model).values():
        for coefficient in layer.field.evolution.parameters():
            nn.init.normal_(coefficient, std=0.05)
    return model.to(DEVICE, dtype)


class Step:
    """Training steps of one format."""

    def __init__(self, name: str, compiled: bool = False, lr: float = 0.05) -> None:
        self.dtype, self.autocast = formats()[name]
        self.model = network(self.dtype)
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.9)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=self.autocast == torch.float16)

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward; gives the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, self.autocast, enabled=self.autocast is not None):
            loss = functional.cross_entropy(self.run(images.to(self.dtype)), labels)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The same, and the step of the optimiser."""
        loss = self.gradients(images, labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


def batches(size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first batches of digits, normalised, in float32."""
    data = ImageData("digits")
    data.setup()
    assert data.train is not None
    pixels, labels = data.train.pixels, data.train.labels
    chosen = [torch.arange(n * size, (n + 1) * size) % len(labels) for n in range(count)]
    return [(data.normalise(pixels[rows]).to(DEVICE), labels[rows].to(DEVICE)) for rows in chosen]


def times(steps: dict[str, Step], batch: tuple[Tensor, Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of each format's ratio to float32 in the same round."""
    for step in steps.values():
        for _ in range(2):
            step(*batch)
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        taken = {name: clocked(partial(steps[name], *batch), DEVICE) for name in random.sample(list(steps), len(steps))}
        for name, value in taken.items():
            ratios[name].append(value / taken[FULL])
    return {name: quartiles(values) for name, values in ratios.items()}


def memory(name: str, size: int) -> int:
    """Peak bytes of one step above the level before it; in this process."""
    torch.set_num_threads(1)
    step, (batch,) = Step(name), batches(size, 1)
    step(*(part[:2] for part in batch))  # what libraries allocate once and keep
    return peak(lambda: step(*batch), DEVICE)


def in_a_process(name: str, size: int) -> int:
    """The same in a fresh process."""
    arguments = [sys.executable, "-m", "benchmarks.step.precision", "--one", name, "--batch-size", str(size)]
    return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)


def gradient_errors(batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Of every format, relative to float64."""
    found = {}
    for name in formats():
        step = Step(name)
        step.gradients(*batch)
        scale = step.scaler.get_scale()
        found[name] = torch.cat(
            [p.grad.double().flatten() / scale for p in step.model.parameters() if p.grad is not None]
        )
    exact = found["float64"]
    return {name: float((gradient - exact).norm() / exact.norm()) for name, gradient in found.items()}


def final_loss(name: str, size: int, length: int) -> float:
    """The mean loss of the last tenth of a training."""
    step = Step(name)
    losses = [float(step(*batch)) for batch in batches(size, length)]
    last = losses[-max(length // 10, 1) :]
    return sum(last) / len(last)


def as_markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| format | time of a step, ratio to float32 (quartiles) | peak memory (MiB) | gradient error | final loss |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results.items():
        ratio = row["time"]
        spread = f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} .. {ratio['upper_quartile']:.2f})"
        if "memory" not in row:
            lines.append(f"| {name} | {spread} | | | |")
            continue
        cells = f"{row['memory'] / 2**20:.1f} | {row['gradient_error']:.1e} | {row['final_loss']:.3f}"
        lines.append(f"| {name} | {spread} | {cells} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="FORMAT", help="the memory of one format, in this process")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--length", type=int, default=200, help="steps of the short training")
    parser.add_argument("--compiled", action="store_true", help="compiled models too (takes minutes to compile)")
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(str(memory(options.one, options.batch_size)))
        return
    (batch,) = batches(options.batch_size, 1)
    steps = {name: Step(name) for name in formats()}
    if options.compiled:
        steps |= {name + COMPILED: Step(name, compiled=True) for name in formats()}
    results: dict[str, dict[str, Any]] = {
        name: {"time": ratio} for name, ratio in times(steps, batch, options.rounds).items()
    }
    errors = gradient_errors(batch)
    for name in formats():
        results[name] |= {
            "memory": in_a_process(name, options.batch_size),
            "gradient_error": errors[name],
            "final_loss": final_loss(name, options.batch_size, options.length),
        }
    settings = {name: getattr(options, name) for name in ("batch_size", "rounds", "length")}
    path = write("precision", {"device_type": DEVICE.type, **settings, "formats": results})
    table = path.with_suffix(".md")
    table.write_text(as_markdown(results))
    sys.stdout.write(f"{as_markdown(results)}{json.dumps(settings)}\n{path}\n{table}\n")


if __name__ == "__main__":
    main()
