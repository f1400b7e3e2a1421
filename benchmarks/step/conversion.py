"""What `nc.couple` costs: models before and after their conversion.

    OMP_NUM_THREADS=1 python -m benchmarks.step.conversion

ResNet-18 on 8 images of 64x64, a transformer encoder of four layers on 8 sequences of 64, and a network of three
residual layers on 512 points; random weights and inputs, float32, on the CPU, in training mode. *Training step*:
process time of forward and backward pass. *Inference*: of the forward pass in evaluation mode without gradients, of the
converted model and of the baked one. All models take turns in shuffled rounds; the ratio to the original is taken
within a round. *Difference*: the largest of the outputs after a conversion with one step, in evaluation mode. Writes
results/conversion.json and the table of docs/convert.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import neuralode_coupled as nc
from benchmarks.lib.clock import in_rounds, process_seconds, quartiles
from benchmarks.lib.pages import DOCS, machine, put, ratio
from benchmarks.lib.results import read, write

PAGE = DOCS / "convert.md"
ORIGINAL = "original"
STEPS = (1, 2, 4)


class Residuals(nn.Module):
    """Three residual layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x, of shape (batch, width)."""
        for branch in self.branches:
            x = x + branch(x)
        return x


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


Model = tuple[Callable[[], nn.Module], tuple[int, ...], str, Callable[[], nn.Module]]
"""How it is made, the shape of its input, what is converted, and the operator."""

MODELS: dict[str, Model] = {
    "ResNet-18": (lambda: resnet18(num_classes=10), (8, 3, 64, 64), "layer*.1", nc.ReactionDiffusionAdvection),
    "transformer encoder": (_encoder, (8, 64, 64), "layers.*", lambda: nc.LinearEvolution("channels", rank=2)),
    "residual MLP": (Residuals, (512, 64), "branches.*", nc.ReactionDiffusionAdvection),
}


def made(name: str) -> tuple[dict[str, nn.Module], Tensor]:
    """The original and its conversions, with the same weights, and an input."""
    torch.manual_seed(0)
    make, shape, targets, operator = MODELS[name]
    models = {ORIGINAL: make()}
    for steps in STEPS:
        models[f"{steps}"] = nc.couple(copy.deepcopy(models[ORIGINAL]), targets, operator(), steps=steps)
    return models, torch.randn(shape)


def training_step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward pass, from no gradients."""
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()


def inference(model: nn.Module, x: Tensor) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        model(x)


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Ratios to the original, parameters, and the difference of the outputs with one step."""
    models, x = made(name)
    steps = {key: partial(training_step, model.train(), x) for key, model in models.items()}
    training = _ratios(steps, rounds)
    for model in models.values():
        model.eval()
    with torch.no_grad():
        difference = float((models["1"](x) - models[ORIGINAL](x)).abs().max())
    forward = {ORIGINAL: models[ORIGINAL], "1": models["1"], "1, baked": nc.bake(models["1"])}
    found = _ratios({key: partial(inference, model, x) for key, model in forward.items()}, rounds)
    parameters = {key: sum(p.numel() for p in model.parameters()) for key, model in models.items()}
    return {
        "difference": difference,
        "parameters": parameters,
        "training": training,
        "inference": found,
        "rounds": rounds,
    }


def _ratios(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    rows = in_rounds(steps, partial(process_seconds, repeats=1), rounds)
    return {name: quartiles([row[name] / row[ORIGINAL] for row in rows]) for name in steps if name != ORIGINAL}


def table(found: dict[str, dict[str, Any]]) -> str:
    """In Markdown, a row per model."""
    titles = [f"training, {n} step{'s' * (n > 1)}" for n in STEPS] + ["inference, 1 step", "baked", "parameters"]
    lines = [f"| | {' | '.join(titles)} | difference |", f"|---|{'---:|' * (len(titles) + 1)}"]
    for name, row in found.items():
        cells = [ratio(row["training"][f"{n}"]) for n in STEPS]
        cells += [ratio(row["inference"][key]) for key in ("1", "1, baked")]
        more = row["parameters"]["1"] / row["parameters"][ORIGINAL] - 1
        lines.append(f"| {name} | {' | '.join(cells)} | +{100 * more:.2f}% | {row['difference']:.0e} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=11, help="at least 2")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"a spread needs at least 2 rounds, got --rounds {options.rounds}")
    for name in options.models:
        found = read("conversion").get("models", {})
        found[name] = measured(name, options.rounds)
        write("conversion", {"models": found}, "cpu")
        sys.stdout.write(f"{table({name: found[name]}).splitlines()[-1]}\n")
        sys.stdout.flush()
    content = read("conversion")
    put(PAGE, "conversion", f"{table(content['models'])}\n\n{machine(content['environment'])}\n")


if __name__ == "__main__":
    main()
