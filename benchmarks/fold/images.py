"""CIFAR-10 by a residual network: three stages of nine of torchvision's basic blocks, 16, 32 and 64 channels wide.

The first block of a stage, which changes the shape or follows the stem, stays as it is; the eight behind it are a row
that is folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock

from benchmarks.fold.task import Batch, Schedule, groups_of

MARGIN = 4
"""Pixels around an image, of which crops are taken."""
SIDE = 32


class ResNet(nn.Module):
    """Residual stages in a row behind a stem that halves or quarters the image.

    Args:
        widths: channels of each stage.
        blocks: for each stage how many blocks follow its first one.
        stem: by how much the stem divides each side of the image: 1, 2 or 4.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], stem: int) -> None:
        super().__init__()
        strides = {1: [1], 2: [2], 4: [2, 2]}[stem]
        channels = [3, *[widths[0]] * len(strides)]
        self.stem = nn.Sequential(
            *(_normalised(i, o, 3, s) for i, o, s in zip(channels, channels[1:], strides, strict=False))
        )
        before = [widths[0], *widths]
        self.stages = nn.ModuleList(
            _stage(before[k], width, count, 1 if k == 0 else 2)
            for k, (width, count) in enumerate(zip(widths, blocks, strict=True))
        )
        self.head = nn.Linear(widths[-1], 10)
        for module in self.modules():
            if isinstance(module, BasicBlock):  # blocks begin as the identity: 49% in place of 39% after 300 steps
                nn.init.zeros_(module.get_parameter("bn2.weight"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (batch, 3, height, width): (batch, 10)."""
        z = self.stem(images)
        for stage in self.stages:
            z = stage(z)
        return self.head(z.mean((2, 3)))


def _normalised(inputs: int, outputs: int, size: int, stride: int, active: bool = True) -> nn.Sequential:
    parts = [
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*parts, *([nn.ReLU(inplace=True)] if active else []))


def _stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    shortcut = None if stride == 1 and inputs == outputs else _normalised(inputs, outputs, 1, stride, active=False)
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut), *(BasicBlock(outputs, outputs) for _ in range(count))
    )


class Images:
    """The task; see `Task`.

    Args:
        train: images with a margin, uint8 (n, 40, 40, 3), and labels.
        test: images without, uint8 (n, 32, 32, 3), and labels.
        schedule: of training.
        widths: channels of each stage.
        blocks: of each row.
        stem: see `ResNet`.
    """

    name = "images"
    better = 1

    def __init__(
        self,
        train: Batch,
        test: Batch,
        schedule: Schedule,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (8, 8, 8),
        stem: int = 4,
    ) -> None:
        self.train, self.test, self.schedule = train, test, schedule
        self.widths, self.blocks, self.stem = tuple(widths), tuple(blocks), stem

    def settings(self) -> dict[str, Any]:
        """Sizes, and what training has."""
        sizes = {"widths": [*self.widths], "blocks": [*self.blocks], "stem": self.stem}
        return {"task": self.name, **sizes, "images": len(self.train[1]), **asdict(self.schedule)}

    def network(self, blocks: Sequence[int] | None = None) -> nn.Module:
        """A new network in channels-last."""
        made = ResNet(self.widths, self.blocks if blocks is None else blocks, self.stem)
        return made.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def rows(self, network: nn.Module) -> list[list[str]]:
        """All blocks of a stage but its first."""
        stages = list(network.get_submodule("stages").children())
        counts = [len(list(stage.children())) for stage in stages]
        return [[f"stages.{k}.{i}" for i in range(1, count)] for k, count in enumerate(counts)]

    def batch(self, generator: torch.Generator, size: int | None = None) -> Batch:
        """Random images, randomly cropped and flipped."""
        pixels, labels = self.train
        size = self.schedule.batch if size is None else size
        chosen = torch.randint(len(labels), (size,), generator=generator)
        corner = torch.randint(2 * MARGIN + 1, (2, size, 1), generator=generator)
        down, right = corner + torch.arange(SIDE)
        flipped = torch.rand(size, 1, generator=generator) < 0.5
        right = torch.where(flipped, right.flip(1), right)
        found = pixels[chosen[:, None, None], down[:, :, None], right[:, None, :]]
        return scaled(found), labels[chosen]

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The cross-entropy, in bfloat16 with channels-last: 1.4 times as fast as float32."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(batch[0])
        return functional.cross_entropy(logits.float(), batch[1])

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """SGD with Nesterov's momentum; no decay of norms and biases."""
        groups = groups_of(network)
        return torch.optim.SGD(groups, lr=self.schedule.peak, momentum=0.9, nesterov=True, weight_decay=5e-4)

    @torch.no_grad()
    def quality(self, network: nn.Module) -> float:
        """Test accuracy in percent, in float32."""
        network.eval()
        pixels, labels = self.test
        right = 0
        for some, wanted in zip(pixels.split(250), labels.split(250), strict=True):
            right += int((network(scaled(some)).argmax(1) == wanted).sum())
        return 100 * right / len(labels)


def scaled(pixels: Tensor) -> Tensor:
    """uint8 (n, height, width, 3) as numbers about zero, (n, 3, height, width) in channels-last."""
    return (pixels.float() / 255 - 0.47).div_(0.25).permute(0, 3, 1, 2)


def cifar10(root: Path, cache: Path) -> tuple[Batch, Batch]:
    """Training images with a margin of zeros, and test images, of ``root/{train,test}/<class>/*.jpg``.

    Args:
        root: the folder.
        cache: a file that keeps the decoded pixels; made if need be.

    Raises:
        ValueError: if the folder has no such images.
    """
    if cache.exists():
        found = torch.load(cache, weights_only=True)
    else:
        found = {part: _decoded(root / part) for part in ("train", "test")}
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cache)
    pixels, labels = found["train"]
    padded = functional.pad(pixels, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
    return (padded, labels), found["test"]


def _decoded(folder: Path) -> Batch:
    files = [(path, k) for k, part in enumerate(sorted(folder.glob("*/"))) for path in sorted(part.glob("*.jpg"))]
    if not files:
        raise ValueError(f"{folder} has no images: give a folder that has train/<class>/*.jpg and test/<class>/*.jpg")
    pixels = numpy.stack([numpy.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return torch.from_numpy(pixels), torch.tensor([k for _, k in files])
