"""The benchmark of fast training: it times what it says, under the allocator that it says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.step import fast


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fast, "SIZE", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_choices_are_taken():
    choices = {"precision": "bf16-mixed", "adjoint": "backprop", "layout": "contiguous"}
    step = fast.training("resnet4", choices)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, out: seen.append((type(module).__name__, given[0].is_contiguous(), out.dtype))
    )
    step()
    hook.remove()
    assert ("Conv2d", True, torch.bfloat16) in seen
    assert fast.seconds(fast.TRAINING, "resnet4", {}, 1) > 0


def test_the_baked_network_is_plain_and_in_bfloat16():
    out = fast.inference("resnet4", fast.BAKED)()
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, 10)


def test_the_convolutions_are_those_of_the_network():
    maps = fast.inference("resnet4", fast.CONVOLUTIONS_HALF)()
    assert {out.dtype for out in maps} == {torch.bfloat16}
    # The stem, and two of the branch in each of five steps.
    assert [tuple(out.shape[1:]) for out in maps] == [(16, 32, 32)] * len(maps)
    assert len(maps) == 1 + 2 * 5


def test_ratios_are_to_the_defaults_of_the_round(monkeypatch):
    asked = []

    def taken(what, model, choices, allocator, repeats):
        asked.append((what, choices, allocator))
        return (
            {fast.BAKED: 0.5, fast.TRAINING: 3.0}.get(what, 2.0) * (0.5 if allocator else 1) * (0.5 if choices else 1)
        )

    monkeypatch.setattr(fast, "in_a_process", taken)
    found = fast.measure(fast.TRAINING, "resnet4", {"adjoint": "backprop"}, 2, 1)
    assert {name: row["median"] for name, row in found.items()} == {"defaults": 1, "allocator": 0.5, "fast": 0.25}
    assert (fast.TRAINING, {}, False) in asked
    found = fast.measure(fast.INFERENCE, "resnet4", {}, 2, 1)
    assert found[fast.BAKED]["median"] == 0.125


def test_a_process_has_the_allocator_that_is_asked_for(monkeypatch):
    seen = []

    def run(line, **more):
        seen.append((line, more["env"]))
        return type("Done", (), {"stdout": "0.5"})

    monkeypatch.setattr(fast.subprocess, "run", run)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    for allocator in (True, False):
        assert fast.in_a_process(fast.TRAINING, "resnet4", {"adjoint": "backprop"}, allocator, 2) == 0.5
        line, environment = seen[-1]
        assert json.loads(line[-2]) == {"adjoint": "backprop"}
        assert environment["NEURALODE_COUPLED_ALLOCATOR"] == str(int(allocator))
        assert not any(name.startswith("MALLOC_") for name in environment)
