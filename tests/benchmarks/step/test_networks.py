"""The benchmark of whole networks: the same step by every method, and a table of what was found."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.lib.block import METHODS
from benchmarks.step import networks


@pytest.mark.parametrize("variant", networks.VARIANTS)
def test_all_methods_take_the_same_step(variant):
    """The gradients that the measured step leaves behind."""
    models = [networks.network("resnet4", variant, name) for name in networks.NAMES]
    for model in models:
        networks.classifier_step(model, networks.images(2))
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in models]
    assert len(gradients) == 3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-5)


def test_findings_are_saved_as_they_come_and_stand_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- networks -->\n<!-- end of networks -->\n")
    monkeypatch.setattr(networks, "PAGE", page)
    times = {"median": 1.25, "lower_quartile": 1.2, "upper_quartile": 1.3, "seconds": 0.1}
    monkeypatch.setattr(networks, "ratios", lambda made, rounds, against: dict.fromkeys(made, times))
    peaks = []

    def in_a_process(*arguments):
        peaks.append(arguments)
        if len(peaks) == 4:
            raise KeyboardInterrupt
        return 3 * 2**20

    monkeypatch.setattr(networks, "in_a_process", in_a_process)
    line = ["--networks", "resnet4", "--batch-size", "2"]
    with pytest.raises(KeyboardInterrupt):
        networks.main(line)
    assert list(json.loads((tmp_path / "networks.json").read_text())["networks"]) == ["resnet4, anode"]
    networks.main(line)
    assert list(json.loads((tmp_path / "networks.json").read_text())["networks"]) == [
        f"resnet4, {variant}" for variant in networks.VARIANTS
    ]
    cells = "1.25 (1.20 to 1.30) | 3"
    assert f"| resnet4, anodev2-1 | 1, 5 | {cells} | {cells} | {cells} |" in page.read_text()


def test_too_few_rounds_and_unknown_networks_are_refused(capsys):
    for line, words in ((["--rounds", "1"], "at least 2 rounds, got --rounds 1"), (["--networks", "vgg"], "vgg")):
        with pytest.raises(SystemExit) as stop:
            networks.main(line)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_every_method_is_one_of_those_that_are_measured_elsewhere():
    assert set(networks.NAMES) <= set(METHODS)
