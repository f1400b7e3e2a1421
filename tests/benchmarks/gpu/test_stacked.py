"""Models that train side by side: each gets what it would get alone, by the learner's recipe."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional
from torchvision.transforms import functional as pictures

from benchmarks.gpu import stacked
from benchmarks.gpu.images import Images, drawn
from benchmarks.gpu.stacked import Stack
from benchmarks.gpu.training import Plan, fresh
from neuralode_coupled.train.data import channel_statistics, cropped
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.image_sources import ImageSet
from neuralode_coupled.train.learner import Classifier

RATES = [0.1, 0.02]
"""20 images in batches of 16 make two steps, the second of 4 images."""


def random_images(count: int) -> ImageSet:
    return ImageSet(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,)))


@pytest.fixture
def images():
    return Images(random_images(20), random_images(8), flips=True)


def models(choice: str, seeds: range, folder):
    plan = Plan(Experiment(adjoint="backprop"), "random", len(seeds), 1, folder)
    return [fresh(plan.experiment(choice, seed)) for seed in seeds]


def trained(stack: Stack, seeds: range, epochs: range, rates=RATES) -> Stack:
    for epoch in epochs:
        stack.epoch([drawn(seed, epoch, stack.count) for seed in seeds], rates)
    return stack


def flat(state) -> list[torch.Tensor]:
    return [*state["model"].values(), *state["momentum"]]


@pytest.mark.parametrize("choice", ["baseline", "anodev2-2"])
def test_side_by_side_is_as_alone(images, tmp_path, choice):
    seeds, epochs = range(3), range(2)
    together = trained(Stack(models(choice, seeds, tmp_path), images, 16, capture=False), seeds, epochs)
    losses, tests = together.losses(), together.tested()
    for seed in seeds:
        one = range(seed, seed + 1)
        alone = trained(Stack(models(choice, one, tmp_path), images, 16, capture=False), one, epochs)
        for a, b in zip(flat(together.state()[seed]), flat(alone.state()[0]), strict=True):
            assert torch.equal(a, b)
        assert (losses[seed], tests[seed]) == (alone.losses()[0], alone.tested()[0])
    assert len(set(losses)) == 3


def test_a_step_is_the_learners(images, tmp_path):
    """On the images that were drawn, with plain SGD and the learning rate of each step."""
    (model,) = models("anodev2-1", range(1), tmp_path)
    plain = copy.deepcopy(model).train()
    stack = trained(Stack([model], images, 16, capture=False), range(1), range(2))
    optimizer = Classifier(plain, epochs=1).configure_optimizers()
    mean, deviation = channel_statistics(images.train.pixels)
    sums = []
    for epoch in range(2):
        own, total = drawn(0, epoch, 20), 0.0
        for rate, at in zip(RATES, torch.arange(20).split(16), strict=True):
            chosen = own.order[at]
            pixels = cropped(images.train.pixels[chosen], own.corner[:, at], own.mirrored[at])
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            batch = ((pixels.float() - mean) / deviation).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(plain(batch), images.train.labels[chosen])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(at)
        sums.append(total / 20)
    assert stack.losses() == pytest.approx(sums[-1:], rel=1e-4)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(stack.trainees[0].model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_every_step_has_its_learning_rate(images, tmp_path, monkeypatch):
    stack, seen = Stack(models("baseline", range(2), tmp_path), images, 16, capture=False), []
    for trainee in stack.trainees:
        monkeypatch.setattr(trainee, "step", lambda x, y: seen.append((round(float(stack.rate), 6), len(y))))
    trained(stack, range(2), range(1))
    assert seen == [(0.1, 16), (0.1, 16), (0.02, 4), (0.02, 4)]
    trained(stack, range(2), range(1), [0.02, 0.02])
    assert {rate for rate, _ in seen[4:]} == {0.02}


def test_a_state_is_gone_on_from(images, tmp_path):
    seeds = range(2)
    whole = trained(Stack(models("anodev2-2", seeds, tmp_path), images, 16, capture=False), seeds, range(3))
    first = trained(Stack(models("anodev2-2", seeds, tmp_path), images, 16, capture=False), seeds, range(1))
    second = Stack(models("anodev2-2", range(5, 7), tmp_path), images, 16, capture=False)
    addresses = [tensor.data_ptr() for state in second.state() for tensor in flat(state)]
    second.load(copy.deepcopy(first.state()))
    assert addresses == [tensor.data_ptr() for state in second.state() for tensor in flat(state)]
    trained(second, seeds, range(1, 3))
    for a, b in zip(whole.state(), second.state(), strict=True):
        assert all(map(torch.equal, flat(a), flat(b)))


def test_crops_are_torchvisions():
    pixels = torch.randint(1, 256, (81, 3, 32, 32), dtype=torch.uint8)
    corner = torch.cartesian_prod(torch.arange(9), torch.arange(9)).T
    mirrored = torch.arange(81) % 2 == 0
    found = cropped(pixels, corner, mirrored)
    for image, (top, left), flip, own in zip(pixels, corner.T.tolist(), mirrored, found, strict=True):
        expected = pictures.crop(pictures.pad(image, [4]), top, left, 32, 32)
        assert torch.equal(own, pictures.hflip(expected) if flip else expected)


def test_what_is_drawn_is_uniform_and_of_the_seed_and_epoch_alone():
    found = drawn(3, 7, 20_000)
    assert torch.equal(found.order.sort().values, torch.arange(20_000))
    counts = torch.stack([row.bincount(minlength=9) for row in found.corner])
    assert counts.shape == (2, 9)
    assert (counts / 20_000 - 1 / 9).abs().max() < 0.01  # five standard deviations
    assert float(found.mirrored.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(found.corner, drawn(3, 7, 20_000).corner)
    assert not torch.equal(found.order, drawn(3, 8, 20_000).order)
    assert not torch.equal(found.order, drawn(4, 7, 20_000).order)


def test_digits_are_not_mirrored(images, tmp_path):
    plain = Images(images.train, images.test, flips=False)
    stack = Stack(models("baseline", range(1), tmp_path), plain, 20, capture=False)
    own = drawn(0, 0, 20)
    stack.order.copy_(own.order[None])
    stack.corner.fill_(4)
    stack.mirrored.fill_(True)
    ((found, labels),) = stack._batches(20)
    torch.testing.assert_close(found, stack._normalised(images.train.pixels[own.order]))
    assert torch.equal(labels, images.train.labels[own.order])


class Stream:
    """Of no device: it knows what it waits for."""

    def __init__(self, device=None):
        self.waits = []

    def wait_stream(self, other):
        self.waits.append(other)


class Capture:
    """A graph whose replay repeats what was done when it was captured."""

    open: Capture | None = None

    def __init__(self):
        self.done = []

    def replay(self):
        for repeat in self.done:
            repeat()


def test_a_capture_forks_and_joins_and_leaves_the_models_as_they_were(images, tmp_path, monkeypatch):
    """With streams and graphs that only keep accounts: there is no GPU here."""
    streams, current = [], [Stream()]

    def stream(device=None):
        streams.append(Stream())
        return streams[-1]

    @contextmanager
    def on(chosen):
        current.append(chosen)
        yield
        current.pop()

    @contextmanager
    def capture(graph, stream):
        Capture.open = graph
        with on(stream):
            yield
        Capture.open = None

    step = Stack._step

    def kept(self, size):
        if Capture.open is not None:
            Capture.open.done.append(lambda: step(self, size))
        step(self, size)

    for name, fake in {"Stream": stream, "stream": on, "CUDAGraph": Capture, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(Stack, "_step", kept)
    seeds = range(2)
    stack = Stack(models("baseline", seeds, tmp_path), images, 16, capture=True)
    *sides, capturing = streams
    assert stack._sides == sides
    assert all(set(side.waits) == {capturing} for side in sides)  # forked from the capture, and joined to it
    assert set(capturing.waits) == {current[0], *sides}
    plain = Stack(models("baseline", seeds, tmp_path), images, 16, capture=False)
    for _ in range(2):
        for a, b in zip(stack.state(), plain.state(), strict=True):
            assert all(map(torch.equal, flat(a), flat(b)))
        trained(stack, seeds, range(1))
        trained(plain, seeds, range(1))
    assert stacked.WARM_UP == 3


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["baseline", "anode", "anodev2-2", "anode@5", "anodev2-1"])
def test_a_captured_stack_trains_as_an_eager_one(images, tmp_path, choice):
    seeds, there = range(3), images.to(torch.device("cuda", 0))
    stacks = [Stack(models(choice, seeds, tmp_path), there, 16, capture) for capture in (True, False)]
    rates = [0.01, 0.005]  # small: the steps' round-off is not blown up
    for stack in stacks:
        trained(stack, seeds, range(2), rates)
    captured, eager = stacks
    assert captured.losses() == pytest.approx(eager.losses(), rel=1e-2)
    for a, b in zip(captured.state(), eager.state(), strict=True):
        for own, other in zip(flat(a), flat(b), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-2)
