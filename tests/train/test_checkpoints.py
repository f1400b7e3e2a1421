"""Checkpoints that fit, that do not, and those of earlier versions.

    python -m tests.train.test_checkpoints

adds to tests/train/data/state_dicts.pt what the current version makes of models that are not in it; what is there
stays.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.train import Experiment, RunFolder, load_model, train, weights_file
from neuralode_coupled.train.callbacks import AtomicCheckpoints
from neuralode_coupled.train.run import prepare
from tests.helpers import oracle

STATE_DICTS = Path(__file__).parent / "data" / "state_dicts.pt"


def branch(steps: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, bias=False), nc.PerStep(nn.BatchNorm2d(3), steps), nn.ReLU(), nn.Conv2d(3, 3, 1)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "configuration one": lambda: nc.CoupledODE(branch(3), nc.ReactionDiffusionAdvection(), steps=3),
    "configuration two": lambda: nc.CoupledODE(
        branch(2), nc.ReactionDiffusionAdvection(), nc.SampleAndHold(2), steps=2, weight_steps=4
    ),
    "linear, exponential kernel": lambda: nc.CoupledODE(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nc.LinearEvolution(), nc.Exponential(2.0), steps=2
    ),
    "coefficients without axes": lambda: nc.CoupledODE(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        nc.ReactionDiffusionAdvection(),
        nc.Exponential(2.0, learnable=True),
        steps=2,
    ),
}


def images(model: nn.Module) -> torch.Tensor:
    shape = (2, 3, 6, 6) if any(isinstance(part, nn.Conv2d) for part in model.modules()) else (2, 6)
    count = torch.tensor(shape).prod().item()
    return torch.linspace(0, 20, count, dtype=torch.float64).sin().float().reshape(shape)


def write() -> None:
    """Add the models that are not there."""
    content = torch.load(STATE_DICTS, weights_only=True) if STATE_DICTS.exists() else {}
    for name, make in MODELS.items():
        if name not in content:
            torch.manual_seed(0)
            model = oracle.randomize(make())
            model.train()(images(model))  # running statistics that are not those of the start
            with torch.no_grad():
                outputs = model.eval()(images(model))
            content[name] = {"version": nc.__version__, "state_dict": dict(model.state_dict()), "outputs": outputs}
    STATE_DICTS.parent.mkdir(exist_ok=True)
    torch.save(content, STATE_DICTS)


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_of_earlier_versions_give_their_outputs(name):
    """If this fails, a name, a shape or a meaning has changed: translate it where it is read, and keep the file."""
    kept = torch.load(STATE_DICTS, weights_only=True)[name]
    model = MODELS[name]()
    model.load_state_dict(kept["state_dict"])
    with torch.no_grad():
        outputs = model.eval()(images(model))
    assert torch.allclose(outputs, kept["outputs"], rtol=1e-5, atol=1e-6)
    assert float(outputs.std()) > 0.1


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Coefficients of a whole layer had no axis, nor had their momentum."""
    experiment = Experiment(
        variant="anodev2-1", evolution="rda-layer", epochs=1, limit=32, batch_size=16, accelerator="cpu", threads=1
    )
    folder = RunFolder(tmp_path / "run")
    train(experiment, folder)
    content = torch.load(folder.last, weights_only=True)
    weights, momenta = content["state_dict"], content["optimizer_states"][0]["state"].values()
    for name in [name for name in weights if name.endswith(("diffusion", "reaction"))]:
        assert weights[name].shape == (1,)
        weights[name] = weights[name].reshape(())
    for state in momenta:
        if state["momentum_buffer"].shape == (1,):
            state["momentum_buffer"] = state["momentum_buffer"].reshape(())
    assert any(state["momentum_buffer"].ndim == 0 for state in momenta)
    for path in (folder.last, folder.best):
        torch.save(content, path)
    load_model(folder)
    (folder.path / "result.json").unlink()
    learner = prepare(experiment, folder, resume=True).classifier
    learner.on_load_checkpoint(content)
    learner.load_state_dict(weights)
    optimizer = learner.configure_optimizers()
    optimizer.load_state_dict(content["optimizer_states"][0])
    learner(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())


EXPERIMENT = Experiment(variant="anodev2-2", epochs=1, limit=32, batch_size=16, accelerator="cpu", threads=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with two finished runs of one epoch: of `EXPERIMENT`, and of a larger model."""
    folder = tmp_path_factory.mktemp("runs")
    train(EXPERIMENT, folder / "ours")
    train(replace(EXPERIMENT, model="resnet10", variant="anodev2-1"), folder / "other")
    return folder


@pytest.fixture
def runs(trained, tmp_path) -> tuple[Experiment, RunFolder, RunFolder]:
    """The experiment and copies of the two runs, to be damaged."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return EXPERIMENT, RunFolder(tmp_path / "ours"), RunFolder(tmp_path / "other")


def test_a_checkpoint_says_whose_weights_it_holds(runs):
    _, ours, other = runs
    told = {"model": "resnet4", "variant": "anodev2-2", "steps": None, "dynamics": None, "evolution": None}
    told |= {"kernel": None, "version": nc.__version__}
    assert weights_file.read(ours.best)[weights_file.ORIGIN] == told
    assert weights_file.read(other.last)[weights_file.ORIGIN]["model"] == "resnet10"


def test_checkpoints_of_another_model_are_refused_in_a_line(runs):
    experiment, ours, other = runs
    for mine, theirs in ((ours.best, other.best), (ours.last, other.last)):
        shutil.copy(theirs, mine)
    (ours.path / "result.json").unlink()
    message = (
        r"is of model 'resnet10', not 'resnet4', variant 'anodev2-1', not 'anodev2-2' \(missing: .* and \d+ more; "
    )
    with pytest.raises(ValueError, match=message) as loading:
        load_model(ours)
    with pytest.raises(ValueError, match=message):
        prepare(experiment, ours, resume=True)
    assert "\n" not in str(loading.value)
    assert str(loading.value).endswith("or train again in another folder")


def test_a_checkpoint_of_another_version_is_refused_only_if_its_weights_differ(runs):
    _, ours, _ = runs
    content = torch.load(ours.best, weights_only=True)
    content[weights_file.ORIGIN]["version"] = "0.0.9"
    torch.save(content, ours.best)
    load_model(ours)
    name = "model.0.weight"
    content["state_dict"][name] = content["state_dict"][name][:8]
    torch.save(content, ours.best)
    with pytest.raises(
        ValueError,
        match=r"is of version '0.0.9', not '.*' \(of another shape: model.0.weight \(8, 3, 3, 3\), not \(16, 3, 3, 3\)",
    ):
        load_model(ours)
    # Of a version that did not say so yet.
    del content[weights_file.ORIGIN]
    torch.save(content, ours.best)
    with pytest.raises(ValueError, match="is of another model"):
        load_model(ours)


def test_what_is_no_checkpoint_is_refused(runs):
    experiment, ours, _ = runs
    whole = ours.last.read_bytes()
    ours.last.write_bytes(whole[: len(whole) // 2])
    (ours.path / "result.json").unlink()
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
        prepare(experiment, ours, resume=True)
    torch.save([1], ours.last)
    with pytest.raises(ValueError, match="has no 'state_dict'"):
        prepare(experiment, ours, resume=True)


def test_a_byte_that_has_changed_is_noticed_wherever_it_is(tmp_path):
    """Or makes no difference: zip files have some of those."""
    path, tensors = tmp_path / "last.ckpt", {"weight": torch.arange(40.0), "bias": torch.ones(3)}
    AtomicCheckpoints().save_checkpoint({"state_dict": tensors, "epoch": 3}, path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            content = weights_file.read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is damaged, or no checkpoint (")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            noticed += 1
        else:
            assert content["epoch"] == 3
            assert all(torch.equal(content["state_dict"][name], tensor) for name, tensor in tensors.items())
    assert noticed > 100


def test_a_checkpoint_has_its_checksums_whatever_is_chosen_for_torch(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        AtomicCheckpoints().save_checkpoint({"state_dict": {"weight": torch.ones(3)}}, tmp_path / "last.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(weights_file.read(tmp_path / "last.ckpt")["state_dict"]["weight"], torch.ones(3))


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_that_is_damaged_in_its_middle_is_refused(runs, which):
    experiment, ours, _ = runs
    path = getattr(ours, which)
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 20] = bytes(byte ^ 0xFF for byte in whole[middle : middle + 20])
    path.write_bytes(whole)
    (ours.path / "result.json").unlink()
    with pytest.raises(
        ValueError, match=rf"{which}.ckpt is damaged, or no checkpoint \(.*\): delete it, and train again"
    ):
        prepare(experiment, ours, resume=True) if which == "last" else load_model(ours)


def test_a_checkpoint_is_drafted_beside_its_place(tmp_path, monkeypatch):
    """The system's folder of temporary files may be on another disk, from which a file comes piece by piece."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    folder = RunFolder(tmp_path / "run")
    train(Experiment(variant="baseline", epochs=1, limit=20, accelerator="cpu"), folder)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_save_that_fails_keeps_the_checkpoint_that_is_there(tmp_path):
    class Unfinished:
        def __reduce__(self):
            seen.extend(path.name for path in tmp_path.iterdir())
            raise OSError(errno.ENOSPC, "no space left on device")

    seen: list[str] = []
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"epoch": 1}, path)
    whole = path.read_bytes()
    with pytest.raises(OSError, match=rf"no space left on device: '{path}'$"):
        AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(9), "last": Unfinished()}, path)
    assert sorted(seen) == [f".last.ckpt.{os.getpid()}", "last.ckpt"]
    assert path.read_bytes() == whole
    assert [left.name for left in tmp_path.iterdir()] == ["last.ckpt"]


if __name__ == "__main__":
    write()
