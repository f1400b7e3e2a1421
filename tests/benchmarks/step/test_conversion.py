"""The benchmark of conversions: the same function with one step, and the page has the record."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lib.results import read
from benchmarks.step import conversion


@pytest.mark.parametrize("name", ["residual MLP", "transformer encoder"])
def test_one_step_computes_what_the_original_does(name):
    models, x = conversion.made(name)
    outputs = {key: model.eval()(x[:2]) for key, model in models.items()}
    torch.testing.assert_close(outputs["1"], outputs[conversion.ORIGINAL], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs["4"], outputs[conversion.ORIGINAL], rtol=1e-3)
    conversion.training_step(models["4"].train(), x[:2])
    assert all(p.grad is not None for p in models["4"].parameters())


def test_the_page_has_the_record():
    record = read("conversion")["models"]
    assert set(record) == set(conversion.MODELS)
    assert conversion.table(record) in conversion.PAGE.read_text()
