"""A training step never waits for the device: no number is read back, and none is copied there on the way.

Without a GPU this is looked for in two ways. A real training step on the CPU may run no operation that needs to see
numbers, but for the looks that are for the CPU alone, which are left out here. And a forward pass on tensors that claim
to be on CUDA, and hold nothing, takes the very branches that a GPU takes; there copies show too. So does the package's
own backward pass, without what autograd does in it, which has none for such tensors. With a GPU, torch itself is
asked.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import neuralode_coupled as nc
from benchmarks.gpu.images import Images, drawn
from benchmarks.gpu.stacked import Stack
from benchmarks.gpu.training import ORDER, Plan, fresh
from neuralode_coupled.adjoint import generators, reversible, sweep
from neuralode_coupled.train import Experiment, ImageData, RunFolder, callbacks, learner, train
from neuralode_coupled.train.data import EvenBatches, augment
from neuralode_coupled.train.image_sources import ImageSet
from tests.helpers.problems import KERNELS, OPERATORS

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
VARIANTS = ("anodev2-1", "anodev2-2")
ADJOINTS = (
    nc.Backprop(),
    nc.DiscreteAdjoint(),
    nc.DiscreteAdjoint(None),
    nc.DiscreteAdjoint(2),
    nc.DiscreteAdjoint(2, weights="recomputed"),
    nc.DiscreteAdjoint(keep_last=2),
    nc.ReversibleAdjoint(),
)


class Waits(AssertionError):
    """The host would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Raises `Waits` for an operation that reads numbers, or copies between host and device and waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._reads(func, args) or self._copies(func, args, kwargs, result):
            ours = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "neuralode_coupled" in f.filename]
            raise Waits(f"{func} at {ours[-1:]}")
        return result

    @staticmethod
    def _reads(func, args) -> bool:
        if func is torch.ops.aten.index.Tensor:  # whole numbers say nothing about the shape of the result
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return bool(READS & set(func.tags))

    @staticmethod
    def _copies(func, args, kwargs, result) -> bool:
        into = func is torch.ops.aten.copy_.default
        unwaited = args[2:3] == (True,) if into else (kwargs or {}).get("non_blocking", False)
        return NoWaiting._moves(func, args, kwargs, result) and not unwaited

    @staticmethod
    def _moves(func, args, kwargs, result) -> bool:
        """Between host and device. A number in a tensor of the host may stand in an operation of the device: it goes
        along as an argument."""
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            return False
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        return len({t.device.type for t in tensors}) > 1


class NoCopies(NoWaiting):
    """Raises `Waits` for any copy between host and device: a CUDA graph cannot capture one from memory that is not
    pinned, whether anybody waits for it or not."""

    _copies = staticmethod(NoWaiting._moves)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Leave out what is looked at on the CPU alone, and the comparisons of random states, which the host holds, and of
    repeated steps, which CUDA devices hand over when they come to it."""
    for module in ("coupled.on_grid", "coupled.own_weights", "coupled.flows", "evolution.base"):
        monkeypatch.setattr(f"neuralode_coupled.{module}.check_finite", lambda *arguments: None)
    monkeypatch.setattr(nc.ReactionDiffusionAdvection, "_check_overflow", lambda *arguments: None)
    monkeypatch.setattr(generators, "of_torch", lambda device: [])
    monkeypatch.setattr(sweep, "check_repeated", lambda *arguments: None)
    monkeypatch.setattr(reversible, "check_traced_back", lambda *arguments: None)
    looks = learner._looks
    monkeypatch.setattr(learner, "_looks", lambda kind, step: looks("cuda", step))


@pytest.fixture
def claimed(monkeypatch) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Everything made in the test claims to be on CUDA if asked to be; gives what moves modules there."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this build of torch does not know CUDA")
    # The state of the device's generator is on the host; as in a capture, it is not asked for.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    def move(module: nn.Module) -> nn.Module:
        return module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))

    yield move
    torch.__future__.set_overwrite_module_params_on_conversion(before)


STEPS = {"euler": 4, "rk4": 2}
"""Steps of a small layer: its checkpoints are looked at by Euler's method, its stages by the other."""


def small_layer(adjoint, operator=None, kernel=None, method: str = "euler") -> nc.CoupledODE:
    dynamics = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4), nn.ReLU())
    operator = nc.ReactionDiffusionAdvection() if operator is None else operator
    return nc.CoupledODE(dynamics, operator, kernel, steps=STEPS[method], method=method, adjoint=adjoint)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> Tensor:
    images = augment(pixels, flip=True).float()
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    "looks",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t[0] > 0),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.equal(t, t),
        lambda t: t.unique(),
    ],
)
def test_looks_are_noticed(looks):
    with NoWaiting(), pytest.raises(Waits, match="aten"):
        looks(torch.ones(3))
    with NoWaiting():
        torch.ones(3)[torch.tensor([2, 0])].where(torch.zeros(2) > 0, torch.ones(2))


@pytest.mark.parametrize("copies", [lambda: torch.tensor([1.0], device="cuda"), lambda: torch.ones(2).to("cuda")])
def test_copies_are_noticed(claimed, copies):
    with FakeTensorMode(), NoWaiting():
        torch.ones(2).to("cuda", non_blocking=True)
        torch.full((2,), 3.0, device="cuda") * torch.tensor(2.0)
        with pytest.raises(Waits, match="_to_copy"):
            copies()
        with pytest.raises(DataDependentOutputException):
            torch.ones(2, device="cuda").sum().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_reads_no_number(as_on_a_device, variant):
    model = nc.models.build("resnet4", variant).train()
    optimizer = learner.Classifier(model, epochs=1).configure_optimizers()
    pixels, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (4,))
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for _ in range(2):  # the first step makes the optimizer's buffers
        with NoWaiting():
            training_step(model, optimizer, pixels, labels)
    assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_coupled_layer_reads_no_number(as_on_a_device, adjoint, method):
    layer, z0 = small_layer(adjoint, method=method), torch.randn(2, 4, 6, 6, requires_grad=True)
    with NoWaiting():
        layer(z0).square().sum().backward()
    assert z0.grad is not None


@pytest.mark.parametrize("choice", ORDER)
def test_models_that_train_side_by_side_copy_and_read_nothing(as_on_a_device, tmp_path, choice):
    """Which is what a CUDA graph of their steps asks for; the continuous adjoint does not give it."""
    plan = Plan(Experiment(adjoint="backprop"), "random", seeds=2, every=1, folder=tmp_path)
    pixels, labels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (6,))
    images = Images(ImageSet(pixels, labels), ImageSet(pixels, labels), flips=True)
    stack = Stack([fresh(plan.experiment(choice, seed)) for seed in range(2)], images, 4, capture=False)
    stack.epoch([drawn(seed, 0, 6) for seed in range(2)], [0.1, 0.1])
    with NoCopies(), pytest.raises(Waits) if choice.startswith("node") else nullcontext():
        stack.steps[2]()
        stack.position.zero_()
        stack.steps[4]()


class WithoutWaiting(pl.Callback):
    """From the end of one batch to that of a later one, with all that Lightning does between, nobody may wait."""

    def __init__(self, forbidden: Callable[[], AbstractContextManager], first: int = 1, last: int = 3) -> None:
        self.forbidden, self.first, self.last, self.passed = forbidden, first, last, 0
        self.watch = ExitStack()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # In the second epoch there is an accuracy to show.
        if trainer.current_epoch == 1 and batch_idx == self.first:
            self.watch.enter_context(self.forbidden())
        elif trainer.current_epoch == 1 and batch_idx == self.last:
            self.watch.close()
            self.passed = self.last - self.first

    def on_exception(self, trainer, pl_module, exception):
        self.watch.close()


def run_without_waiting(monkeypatch, tmp_path, forbidden: Callable, **options) -> int:
    """Train two epochs with a progress bar; gives how many batches passed under watch."""
    watch, trainer = WithoutWaiting(forbidden), pl.Trainer
    monkeypatch.setattr(pl, "Trainer", lambda callbacks, **given: trainer(callbacks=[watch, *callbacks], **given))
    experiment = Experiment(epochs=2, limit=100, batch_size=16, threads=1, **options)
    train(experiment, RunFolder(tmp_path / "run"), progress=True)
    return watch.passed


@pytest.mark.parametrize("variant", VARIANTS)
def test_between_two_batches_lightning_reads_no_number(as_on_a_device, monkeypatch, tmp_path, variant):
    assert run_without_waiting(monkeypatch, tmp_path, NoWaiting, variant=variant, accelerator="cpu") == 2


def test_the_progress_bar_shows_the_last_accuracy():
    class Reader(dict):
        reads = 0

        def __getitem__(self, name):
            self.reads += 1
            return super().__getitem__(name)

    measured = Reader({"test/accuracy": torch.tensor(0.5)})
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    bar, module = callbacks.ProgressBar(), nn.Identity()
    trainer = type("T", (), {"callback_metrics": measured, "state": trainer.state})()
    assert bar.get_metrics(trainer, module) == {}
    bar.on_validation_end(trainer, module)
    assert [bar.get_metrics(trainer, module) for _ in range(3)] == [{"test accuracy": "50.00%"}] * 3
    assert measured.reads == 1


def test_the_progress_bar_counts_epochs_as_the_log_does():
    bar = callbacks.ProgressBar()
    bar._trainer = pl.Trainer(max_epochs=3, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert [bar._get_train_description(epoch).strip() for epoch in range(3)] == ["Epoch 1/3", "Epoch 2/3", "Epoch 3/3"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_models_forward_pass_on_claimed_cuda_copies_nothing(claimed, variant):
    model = nc.models.build("resnet4", variant).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        claimed(model)
        pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        with NoWaiting():
            loss = functional.cross_entropy(model(augment(pixels, flip=True).float()), labels)
    assert loss.device.type == "cuda"
    assert loss.requires_grad


def test_batches_on_claimed_cuda_are_fetched_without_a_copy(claimed):
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = ImageSet(
            torch.zeros(20, 3, 32, 32, dtype=torch.uint8, device="cuda"),
            torch.zeros(20, dtype=torch.int64, device="cuda"),
        )
        batches = iter(EvenBatches(len(images), 8, 1, 0, "cuda"))
        with NoWaiting():
            fetched = [images.__getitems__(batch) for batch in batches]
    assert [(len(labels), labels.device.type) for _, labels in fetched] == [(7, "cuda"), (7, "cuda"), (6, "cuda")]


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_coupled_layer_on_claimed_cuda_copies_nothing(claimed, adjoint, kernel, method):
    """Any two of a gradient method, a kernel and an operator meet, under each method."""
    operators = list(OPERATORS.values())
    if getattr(adjoint, "weights", "") != "recomputed":
        operators = operators[(ADJOINTS.index(adjoint) + list(KERNELS).index(kernel)) % 3 :: 3]
    elif kernel != "Dirac":
        return  # refused
    for make in operators:
        layer = small_layer(adjoint, make(), KERNELS[kernel](STEPS[method]), method)
        with FakeTensorMode(allow_non_fake_inputs=True):
            claimed(layer)
            with NoCopies():
                end = layer(torch.zeros(2, 4, 6, 6, device="cuda"))
        assert end.device.type == "cuda"


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("adjoint", [a for a in ADJOINTS if not isinstance(a, nc.Backprop)], ids=str)
def test_the_backward_pass_of_a_layer_on_claimed_cuda_copies_nothing(claimed, monkeypatch, adjoint, operator, method):
    layer = small_layer(adjoint, OPERATORS[operator](), method=method)
    with FakeTensorMode(allow_non_fake_inputs=True):
        claimed(layer)
        end = layer(torch.zeros(2, 4, 6, 6, device="cuda", requires_grad=True))
        with NoCopies():
            # Kept steps are one graph.
            assert claimed_backward(end, monkeypatch) >= STEPS[method] - max(layer.stats.kept - 1, 0)


def claimed_backward(end: Tensor, monkeypatch) -> int:
    """The backward pass of a layer with this output, in fake mode, without what autograd itself does there: it has
    nothing to compute with. Gives how often it was asked."""
    asked = []

    def claim(ends, grads, leaves, create_graph=False):
        asked.append(len(leaves))
        return [torch.empty_like(leaf) for leaf in leaves]

    monkeypatch.setattr("neuralode_coupled.adjoint.step_graph.vjp", claim)
    node = end.grad_fn
    with torch.no_grad():
        found = node._forward_cls.backward(node, torch.ones_like(end))
    assert all(grad is None or grad.device.type == "cuda" for grad in found)
    assert any(grad is not None and grad.shape == end.shape for grad in found)
    return len(asked)


class OnTheHost(TorchDispatchMode):
    """Notes which memory of the host is asked for: whether it is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and given.get("device", torch.device("cpu")).type == "cpu":
            self.pinned.append(given.get("pin_memory", False))
        return func(*args, **given)


@pytest.mark.parametrize(("checkpoints", "states"), [(None, 3), (2, 1)])
def test_states_go_to_pinned_memory_and_back_and_nobody_waits(claimed, monkeypatch, checkpoints, states):
    layer = small_layer(nc.DiscreteAdjoint(checkpoints, "cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        claimed(layer)
        with NoWaiting(), OnTheHost() as host:
            end = layer(torch.zeros(2, 4, 6, 6, device="cuda", requires_grad=True))
            assert claimed_backward(end, monkeypatch) == 4
    assert host.pinned == [True] * states


class DeviceMemory(TorchDispatchMode):
    """Counts the bytes of what lives on the device, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage) -> None:
        if storage not in self.known:
            self.known[storage] = True
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, storage.nbytes())

    def _leave(self, size: int) -> None:
        self.live -= size


def peak_on_claimed_cuda(claimed, monkeypatch, adjoint, steps: int) -> float:
    """Of a training step of a layer with a large state, in states."""
    layer = small_layer(adjoint)
    layer.steps = steps
    with FakeTensorMode(allow_non_fake_inputs=True):
        claimed(layer)
        z0 = torch.zeros(8, 4, 64, 64, device="cuda", requires_grad=True)
        with DeviceMemory() as memory:
            claimed_backward(layer(z0), monkeypatch)
    return memory.peak / (z0.numel() * z0.element_size())


def test_memory_on_claimed_cuda_grows_by_a_state_a_step_or_not_at_all_with_states_on_the_host(claimed, monkeypatch):
    def peaks(**storage) -> list[float]:
        adjoint = nc.DiscreteAdjoint(None, weights="recomputed", **storage)
        return [peak_on_claimed_cuda(claimed, monkeypatch, adjoint, steps) for steps in (5, 45)]

    few, many = peaks()
    assert (many - few) / 40 == pytest.approx(1.0, rel=0.05)
    few, many = peaks(storage="cpu")
    assert many == pytest.approx(few, rel=0.05)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_on_cuda_does_not_synchronise(variant):
    model = nc.models.build("resnet4", variant).cuda().train()
    classifier = learner.Classifier(model, epochs=1).cuda()
    optimizer, data = classifier.configure_optimizers(), ImageData("digits", batch_size=16)
    data.setup()
    images, indices = data.train.to(torch.device("cuda", 0)), torch.arange(16, device="cuda")

    def step() -> Tensor:
        pixels, targets = images.__getitems__(indices)
        normalised = data.normalise(augment(pixels, flip=True))
        optimizer.zero_grad()
        loss = functional.cross_entropy(classifier(normalised), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [step() for _ in range(2)]  # the statistics of the channels go to the device once
    with no_synchronisation():
        losses += [step() for _ in range(3)]
    assert all(map(torch.isfinite, losses))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_coupled_layer_on_cuda_does_not_synchronise(adjoint, method):
    layer = small_layer(adjoint, method=method).cuda()
    z0 = torch.randn(2, 4, 6, 6, device="cuda", requires_grad=True)
    layer(z0).square().sum().backward()
    with no_synchronisation():
        layer(z0).square().sum().backward()
    assert torch.isfinite(z0.grad).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "adjoint",
    [
        nc.Backprop(),
        nc.DiscreteAdjoint(),
        nc.DiscreteAdjoint(None),
        nc.DiscreteAdjoint(keep_last=1),
        nc.DiscreteAdjoint(storage="cpu"),
        nc.ReversibleAdjoint(),
    ],
    ids=str,
)
def test_a_coupled_layer_is_captured_as_a_graph(adjoint):
    """A replay on other activations gives what the layer gives, and the same gradients."""
    layer = small_layer(adjoint).cuda()
    sample, z0 = (torch.randn(2, 4, 6, 6, device="cuda", requires_grad=True) for _ in range(2))
    expected = layer(z0)
    wanted = torch.autograd.grad(expected.square().sum(), [z0, *layer.parameters()])
    captured = torch.cuda.make_graphed_callables(layer, (sample,))
    found = captured(z0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), [z0, *layer.parameters()]), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_between_two_batches_lightning_on_cuda_does_not_synchronise(monkeypatch, tmp_path, precision):
    options = {"variant": "anodev2-2", "accelerator": "gpu", "precision": precision}
    assert run_without_waiting(monkeypatch, tmp_path, no_synchronisation, **options) == 2
