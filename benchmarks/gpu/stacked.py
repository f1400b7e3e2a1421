"""Models of several seeds that train side by side: on a GPU their steps are one CUDA graph, and overlap.

All steps of a stack are captured together, each on a stream of its own that is forked from the capture's and joined at
its end: a replay is one launch, and kernels of different models may run at the same time. What that gives
`side_by_side` measures. Nothing is drawn at random within the graph: the images of a step are those
at a position in what was drawn for the epoch, and the position and the learning rate are numbers on the device that
are filled in between replays. So every model gets what it would get alone. On a CPU the same steps run one by one.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.images import Drawn, Images
from benchmarks.lib.clock import ratios
from neuralode_coupled.train.data import channel_statistics, cropped
from neuralode_coupled.train.image_sources import ImageSet
from neuralode_coupled.train.layouts import memory_format
from neuralode_coupled.train.learner import Classifier

WARM_UP = 3
"""Steps before a capture: libraries choose and allocate what they keep when they are first used."""

TESTED = 1000
"""Test images a batch."""

State = dict[str, Any]


def optimizer_of(model: nn.Module, rate: Float[Tensor, ""]) -> torch.optim.SGD:
    """The optimizer of `Classifier`, whose learning rate is read where the model is.

    Its momentum is there from the beginning, as zeros: the first step then is like all others.
    """
    plain = Classifier(model, epochs=1).configure_optimizers()
    groups = [{"params": group["params"]} for group in plain.param_groups]
    same = {name: plain.defaults[name] for name in ("momentum", "weight_decay", "dampening", "nesterov")}
    made = torch.optim.SGD(groups, rate, fused=True, **same)
    for group in groups:
        for parameter in group["params"]:
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


class Trainee:
    """One model of a stack.

    Attributes:
        loss: the sum over the images of an epoch so far.
    """

    def __init__(self, model: nn.Module, rate: Float[Tensor, ""]) -> None:
        self.model = model.to(rate.device).train()
        self.optimizer = optimizer_of(self.model, rate)
        self.loss = torch.zeros((), device=rate.device)

    def step(self, images: Float[Tensor, "batch 3 32 32"], labels: Int[Tensor, " batch"]) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)  # within a capture gradients then are in the memory of the graph
        loss = functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.loss.add_(loss.detach(), alpha=len(labels))

    def momentum(self) -> list[Tensor]:
        """The optimizer's, parameter by parameter."""
        groups = self.optimizer.param_groups
        return [self.optimizer.state[parameter]["momentum_buffer"] for group in groups for parameter in group["params"]]


class Stack:
    """Models that train side by side, each on batches of its own.

    Args:
        models: of one kind; they move to the device of the images.
        images: where training goes on.
        batch_size: images a step of each model. The last step of an epoch may have fewer.
        capture: whether the steps become CUDA graphs, which needs a GPU.

    Attributes:
        steps: a step of all models at the position, by the number of images.
        largest: of these numbers.
    """

    def __init__(self, models: Sequence[nn.Module], images: Images, batch_size: int, capture: bool) -> None:
        device, count = images.train.pixels.device, len(images.train)
        self.images, self.batch_size, self.count, self.device = images, batch_size, count, device
        self.statistics = [t.to(device) for t in channel_statistics(images.train.pixels.cpu())]
        self.layout = memory_format(None, device, models[0])
        self.rate = torch.zeros((), device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.trainees = [Trainee(model, self.rate) for model in models]
        shape = (len(models), count)
        self.order = torch.zeros(shape, dtype=torch.int64, device=device)
        self.corner = torch.zeros((2, *shape), dtype=torch.int64, device=device)
        self.mirrored = torch.zeros(shape, dtype=torch.bool, device=device)
        self.largest = min(batch_size, count)
        self.steps: dict[int, Callable[[], None]] = {
            size: partial(self._step, size) for size in {self.largest, self._size_at(self.batches - 1)}
        }
        self._sides: list[Any] = [None] * len(models)
        if capture:
            self._capture()

    @property
    def batches(self) -> int:
        """Steps an epoch."""
        return -(-self.count // self.batch_size)

    def epoch(self, drawn: Sequence[Drawn], rates: Sequence[float]) -> None:
        """Train all models for an epoch; on a GPU this returns before it is done.

        Args:
            drawn: for each model.
            rates: the learning rate of each step.
        """
        self.order.copy_(torch.stack([own.order for own in drawn]))
        self.corner.copy_(torch.stack([own.corner for own in drawn], dim=1))
        self.mirrored.copy_(torch.stack([own.mirrored for own in drawn]))
        for trainee in self.trainees:
            trainee.loss.zero_()
        before = None
        for i, rate in enumerate(rates):
            if rate != before:
                self.rate.fill_(rate)
            self.position.fill_(i * self.batch_size)
            self.steps[self._size_at(i)]()
            before = rate

    def losses(self) -> list[float]:
        """The mean training loss of each model in the last epoch. Waits for the device."""
        return (torch.stack([trainee.loss for trainee in self.trainees]) / self.count).tolist()

    @torch.no_grad()
    def tested(self) -> list[tuple[float, float]]:
        """Loss and accuracy of each model on the test images. Waits for the device."""
        return [self._tested(trainee.model) for trainee in self.trainees]

    def state(self) -> list[State]:
        """Of each model the weights and the momentum; they go on changing with the training."""
        return [{"model": one.model.state_dict(), "momentum": one.momentum()} for one in self.trainees]

    @torch.no_grad()
    def load(self, states: Sequence[State]) -> None:
        """Go on from a `state`. In place: graphs know tensors by their addresses."""
        for trainee, state in zip(self.trainees, states, strict=True):
            trainee.model.load_state_dict(state["model"])
            for own, other in zip(trainee.momentum(), state["momentum"], strict=True):
                own.copy_(other)

    def _size_at(self, i: int) -> int:
        return min(self.batch_size, self.count - i * self.batch_size)

    def _batches(self, size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of all models at the position, made at once."""
        at = self.position + torch.arange(size, device=self.device)
        chosen = self.order[:, at].flatten()
        mirrored = self.mirrored[:, at].flatten() if self.images.flips else None
        pixels = cropped(self.images.train.pixels[chosen], self.corner[:, :, at].flatten(1), mirrored)
        images = self._normalised(pixels)
        return zip(images.split(size), self.images.train.labels[chosen].split(size), strict=True)

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, deviation = self.statistics
        return ((pixels.float() - mean) / deviation).contiguous(memory_format=self.layout)

    def _step(self, size: int) -> None:
        """A step of every model, on streams of their own where there are such."""
        batches = list(self._batches(size))
        for side, trainee, batch in zip(self._sides, self.trainees, batches, strict=True):
            with _forked(side):
                trainee.step(*batch)
        for side in self._sides:
            if side is not None:
                torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        """Make graphs of the steps. The models are then what they were before."""
        gc.collect()  # graphs and tensors of stacks before this one are not to go while it is captured
        self._sides = [torch.cuda.Stream(self.device) for _ in self.trainees]
        before = copy.deepcopy(self.state())
        # On the streams of the capture: autograd's nodes, and what libraries allocate, belong to a stream.
        capturing = torch.cuda.Stream(self.device)
        for size, step in self.steps.items():
            capturing.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(capturing):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(capturing)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=capturing):
                step()
            self.steps[size] = graph.replay
        self.load(before)

    def _tested(self, model: nn.Module) -> tuple[float, float]:
        images: ImageSet = self.images.test
        found = torch.zeros(2, device=self.device)
        model.eval()
        for pixels, labels in zip(images.pixels.split(TESTED), images.labels.split(TESTED), strict=True):
            logits = model(self._normalised(pixels))
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            found += torch.stack([loss, (logits.argmax(1) == labels).sum().float()])
        model.train()
        loss, right = (found / len(images)).tolist()
        return loss, right


def side_by_side(
    models: Sequence[nn.Module], images: Images, batch_size: int, rounds: int, capture: bool
) -> dict[str, float]:
    """How much longer a step of all these models takes than one of the first: `ratios`. The models are trained."""
    first = copy.deepcopy(models[0])
    alone, together = (Stack(own, images, batch_size, capture) for own in ([first], models))
    steps = {name: stack.steps[stack.largest] for name, stack in (("one", alone), ("all", together))}
    return ratios(steps, rounds, "one", images.train.pixels.device)["all"]


def _forked(side: Any) -> AbstractContextManager:
    """Work on a stream that begins when what is before it is done; without one, work on as before."""
    if side is None:
        return nullcontext()
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)
