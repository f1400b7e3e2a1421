"""Precision and compilation: what is computed in which format, and that it stays the same training."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import neuralode_coupled as nc
from neuralode_coupled.coupled.on_grid import GridProblem
from neuralode_coupled.train import Experiment, RunFolder, building, load_model, train
from neuralode_coupled.train.run import prepare
from tests.helpers import oracle

DIGITS = Experiment(variant="anodev2-2", epochs=1, limit=64, batch_size=16, lr=0.05, accelerator="cpu", threads=1)


@pytest.fixture
def formats(monkeypatch) -> dict[str, set[torch.dtype]]:
    """The formats of stage weights, and of what the layers' convolutions compute, in all solves of the test."""
    seen: dict[str, set[torch.dtype]] = {"stage weights": set(), "convolutions": set()}
    stage_weights = GridProblem.stage_weights

    def watched(self, *arguments):
        found = stage_weights(self, *arguments)
        seen["stage weights"] |= {theta.dtype for theta in found.values()}
        return found

    convolve = functional.conv2d

    def convolution(*arguments, **options):
        result = convolve(*arguments, **options)
        seen["convolutions"].add(result.dtype)
        return result

    # It takes a step of its own in float32.
    monkeypatch.setattr(building, "_try", lambda probe, images, backward=False: None)
    monkeypatch.setattr(GridProblem, "stage_weights", watched)
    monkeypatch.setattr(functional, "conv2d", convolution)
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda self, z, w, b: functional.conv2d(z, w, b, self.stride, self.padding)
    )
    return seen


def trained(experiment: Experiment, path) -> tuple[RunFolder, dict[str, torch.Tensor]]:
    folder = RunFolder(path)
    train(experiment, folder)
    return folder, torch.load(folder.last, weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("precision", "weights", "activations"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_weights_evolve_in_full_precision_whatever_the_activations_have(
    formats, tmp_path, precision, weights, activations
):
    folder, state = trained(replace(DIGITS, precision=precision), tmp_path / "run")
    assert formats == {"stage weights": {weights}, "convolutions": {activations}}
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {weights}
    assert folder.result().precision == precision
    assert 0 < folder.rows()[0]["train/loss"] < 3


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "activations"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_on_cuda(formats, tmp_path, precision, activations):
    """16-mixed scales the gradients; a scale that is too large skips steps, and none is written into the weights."""
    folder, state = trained(replace(DIGITS, precision=precision, accelerator="gpu"), tmp_path / "run")
    assert formats == {"stage weights": {torch.float32}, "convolutions": {activations}}
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert 0 < folder.rows()[0]["train/loss"] < 3


def test_float16_on_a_cpu_and_unknown_precisions_are_refused(tmp_path):
    for precision, message in (
        ("16-mixed", "use bf16-mixed on a CPU"),
        ("bf16-true", "choose one of 32-true, 64-true"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(replace(DIGITS, precision=precision), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def model_and_images() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nc.models.build("resnet4", "anodev2-2")
    for layer in nc.models.coupled_layers(model).values():
        oracle.randomize(layer)
    return model, torch.randn(16, 3, 32, 32), torch.randint(10, (16,))


@pytest.mark.parametrize(
    "adjoint",
    [
        nc.Backprop(),
        nc.DiscreteAdjoint(),
        nc.DiscreteAdjoint(None),
        nc.DiscreteAdjoint(1),
        nc.DiscreteAdjoint(keep_last=2),
    ],
    ids=str,
)
def test_gradients_under_bfloat16_are_those_of_float32_to_its_rounding(adjoint):
    """Its unit round-off is 2^-8; a wrong gradient is not within ten of them."""
    model, images, labels = model_and_images()
    for layer in nc.models.coupled_layers(model).values():
        layer.adjoint = adjoint
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    full, half = found
    assert {gradient.dtype for gradient in half.values()} == {torch.float32}
    difference = sum(float((full[n] - half[n]).square().sum()) for n in full) ** 0.5
    assert 0 < difference < 10 * 2**-8 * sum(float(g.square().sum()) for g in full.values()) ** 0.5


@pytest.mark.parametrize(
    "adjoint",
    [
        nc.Backprop(),
        nc.DiscreteAdjoint(),
        nc.DiscreteAdjoint(None),
        nc.DiscreteAdjoint(keep_last=2),
        nc.ReversibleAdjoint(),
    ],
    ids=str,
)
def test_scaled_gradients_come_back_unscaled_and_a_scale_that_overflows_skips_the_step(adjoint):
    layer = oracle.randomize(
        nc.CoupledODE(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=3, adjoint=adjoint
        )
    )
    z0 = torch.randn(8, 4)
    parameters = dict(layer.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(layer(z0).square().sum(), parameters.values()), strict=True))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(layer(z0).square().sum()).backward()
    scaler.unscale_(optimizer)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-6), name
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = copy.deepcopy(layer.state_dict())
    scaler.scale(layer(z0).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def compiled_and_eager(tmp_path, monkeypatch, backend: str, **options) -> None:
    torch._dynamo.reset()
    # As many images to train on as to test on: batches of other sizes are compiled anew.
    options = {"validation": DIGITS.limit, **options}
    monkeypatch.setattr(building, "compile_model", partial(building.compile_model, backend=backend))
    eager, weights = trained(replace(DIGITS, **options), tmp_path / "eager")
    compiled, others = trained(replace(DIGITS, compile=True, **options), tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for ours, theirs in zip(eager.rows(), compiled.rows(), strict=True):
        assert theirs["train/loss"] == pytest.approx(ours["train/loss"], rel=1e-4)
    assert weights.keys() == others.keys()
    # A compiled run is loaded as any other, and resumed without compilation too.
    load_model(compiled)
    compiled.check(building.resolve(replace(DIGITS, **options)), resume=True)


@pytest.mark.parametrize("adjoint", [None, "discrete-last"])
def test_a_compiled_model_trains_as_the_eager_one(tmp_path, monkeypatch, adjoint):
    compiled_and_eager(tmp_path, monkeypatch, "aot_eager", adjoint=adjoint)


@pytest.mark.gpu
def test_compiled_on_cuda(tmp_path, monkeypatch):
    compiled_and_eager(tmp_path, monkeypatch, "inductor", accelerator="gpu")


def test_what_cannot_be_compiled_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"ContinuousAdjoint.*cannot be compiled: use the adjoint discrete"):
        prepare(replace(DIGITS, variant="node", compile=True), RunFolder(tmp_path / "run"))
    message = (
        r"^layer 3 is solved by 'dopri5', which chooses its steps anew each time and cannot be compiled: "
        r"leave compile out \(--compile\), or choose a method of fixed steps, as in method='rk4', steps=4 "
        r"\(--method rk4 --steps 4\)$"
    )
    for adjoint in (None, "backprop"):
        with pytest.raises(ValueError, match=message):
            prepare(replace(DIGITS, method="dopri5", adjoint=adjoint, compile=True), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_method_that_the_baseline_has_no_use_for_is_no_hindrance(tmp_path):
    ready = prepare(replace(DIGITS, variant="baseline", method="dopri5", compile=True), RunFolder(tmp_path / "run"))
    ready.lock.release()


@pytest.mark.parametrize("options", [{"steps": 4}, {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}], ids=str)
@pytest.mark.parametrize("kernel", [nc.Dirac(), nc.SampleAndHold(2)], ids=str)
def test_weights_evolve_in_their_own_precision_wherever_they_are_asked_for(options, kernel):
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nc.MLPEvolution(8), kernel, **options)
    oracle.randomize(layer)
    z0, t = torch.randn(3, 8), [0.0, 0.3, 1.0]

    def read():
        found = [*layer.weight_trajectory(t).values(), *nc.solve(layer.field, z0, t, **options).weights(t).values()]
        return [*found, layer.regularization(kinetic=1.0, displacement=1.0)] if "steps" in options else found

    expected = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
