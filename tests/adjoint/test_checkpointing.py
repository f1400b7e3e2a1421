"""Schedules of stored states: exact whatever is stored and wherever, and never more work than the optimum."""

from __future__ import annotations

import gc
import tempfile
import weakref
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.adjoint import Memory, Operands, Plan, Stats
from neuralode_coupled.adjoint.engine import checkpointed
from neuralode_coupled.adjoint.schedules import Advance, Load, Reverse, schedule
from neuralode_coupled.adjoint.stores import DeviceStore
from neuralode_coupled.adjoint.sweep import Stored
from tests.helpers import oracle
from tests.helpers.problems import noisy_layer


@given(st.integers(1, 9), st.integers(1, 10), st.sampled_from(["device", "cpu", "disk"]), st.integers(0, 2**20))
def test_gradients_do_not_depend_on_what_is_stored_or_where(steps, checkpoints, storage, seed):
    """The same numbers, to the last bit, as with every state stored."""
    found = []
    for adjoint in (nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(checkpoints, storage)):
        layer, z0 = noisy_layer(steps, adjoint, seed)
        loss = (layer.trajectory(z0, [0.0, 1.0]) ** 2).sum()
        random_state = torch.get_rng_state()
        found.append(oracle.gradients(loss, {"z0": z0, **dict(layer.named_parameters())}))
        assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("checkpoints", [1, 2, 3, 4, 7, 50, None])
def test_recomputation_is_the_optimum(steps, checkpoints):
    """Counted by the solve, predicted by the schedule, and bounded from below by dynamic programming."""
    layer = nc.CoupledODE(nn.Linear(2, 2), steps=steps, method="midpoint", adjoint=nc.DiscreteAdjoint(checkpoints))
    layer(torch.randn(1, 2)).sum().backward()
    stored = steps if checkpoints is None else min(checkpoints, steps)
    assert layer.stats.recomputed == 2 * schedule(steps, checkpoints).recomputed == 2 * _fewest(steps, stored)
    assert len(schedule(steps, checkpoints).stored) <= stored


@given(st.integers(1, 12), st.one_of(st.none(), st.integers(1, 13)), st.integers(1, 4))
def test_schedules_of_steps_in_parts_reach_every_part_from_what_is_stored(steps, checkpoints, parts):
    """Carried out on the numbers of the steps: backwards through all, and nothing is loaded that was not stored."""
    chosen = schedule(steps, checkpoints, parts)
    assert all(n % parts == 0 for n in chosen.stored)
    stored, at, reversed_ = set(chosen.stored), None, []
    for action in chosen.program:
        match action:
            case Load(n, last):
                assert n in stored
                at = n
                stored -= {n} if last else set()
            case Advance(first, end, keep):
                assert at == first
                stored |= {first} if keep else set()
                assert sum(n % parts == 0 for n in stored) <= (checkpoints or steps) + 1  # the step gone back through
                at = end
            case Reverse(n):
                assert at == n
                reversed_.append(n)
    assert reversed_ == [*reversed(range(steps * parts))]
    assert chosen.recomputed == parts * schedule(steps, checkpoints).recomputed + (parts - 1) * steps


class Seen(torch.autograd.Function):
    """The identity, which asks in its backward pass whether what it gave is still held by anybody."""

    given: ClassVar[list] = []
    held: ClassVar[list] = []

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        Seen.held.append(Seen.given.pop()() is not None)
        return grad


@pytest.mark.parametrize("checkpoints", [None, 1, 2])
def test_the_end_of_a_recomputed_step_is_not_held_while_its_gradient_is_taken(checkpoints):
    def step(n, y, inputs, shared, buffers):
        end = Seen.apply(y[0] * shared[0])
        if torch.is_grad_enabled():
            Seen.given.append(weakref.ref(end))
        return (end,), (((end,),) if n == 3 else ())

    plan = Plan(step, (0, 0, 0, 1), ((),) * 4, nn.Module(), (1,) * 4, Stats())
    y0, w = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    ((end,),) = checkpointed(plan, Operands((y0,), ((),) * 4, (w,)), Memory(checkpoints))
    Seen.given, Seen.held = [], []
    end.sum().backward()
    assert Seen.held == [False] * 4
    assert w.grad == 3 * 4 * 2.0**3


def test_a_second_backward_finds_the_stored_states_again():
    for storage in ("device", "cpu", "disk"):
        layer = nc.CoupledODE(nn.Linear(4, 4), steps=7, adjoint=nc.DiscreteAdjoint(3, storage))
        z = layer(torch.randn(2, 4)).sum()
        first = torch.autograd.grad(z, list(layer.parameters()), retain_graph=True)
        second = torch.autograd.grad(z, list(layer.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_files_go_with_the_graph_and_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.calls = nn.Parameter(torch.ones(())), 0

        def forward(self, z):
            self.calls += 1
            if self.calls == 8:
                raise RuntimeError("broken")
            return self.scale * z

    dynamics = Breaks()
    layer = nc.CoupledODE(dynamics, steps=6, adjoint=nc.DiscreteAdjoint(None, storage="disk"))
    z = layer(torch.randn(2, 4))
    assert len(list(tmp_path.glob("*/*.pt"))) == 5  # the initial state is the caller's
    with pytest.raises(RuntimeError, match="broken"):
        z.sum().backward()
    dynamics.calls = 3
    with pytest.raises(RuntimeError, match="broken"):
        layer(torch.randn(2, 4))
    del z
    gc.collect()
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("memory", [0, 2**25])
def test_states_of_the_backward_pass_are_stored_in_the_same_place(tmp_path, monkeypatch, memory):
    """Never more than the schedule allows, neither on the disk nor, in their place, on the device."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files, kept = [], []

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, z):
            files.append({path.name for path in tmp_path.glob("*/*.pt")})
            return (self.scale * z).sin()

    put = Stored.put
    monkeypatch.setattr(Stored, "put", lambda self, *args: (put(self, *args), kept.append(len(self._states)))[0])
    adjoint = nc.DiscreteAdjoint(4, storage="disk", memory=memory)
    layer = nc.CoupledODE(Looks(), steps=12, adjoint=adjoint).double()
    z0 = torch.randn(2, 4, dtype=torch.float64)
    loss = layer(z0).square().sum()
    first, forward = set(files[-1]), len(files)
    found = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    seen = files[forward:]
    assert max(map(len, seen)) == 3  # the initial state is the caller's
    assert set().union(*seen) > first
    assert max(kept) == 1
    assert not seen[-1]
    again = torch.autograd.grad(loss, list(layer.parameters()))
    layer.adjoint = nc.Backprop()
    exact = torch.autograd.grad(layer(z0).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again, exact, rtol=1e-12, atol=1e-12)


def test_a_full_disk_is_noticed_before_the_solve(monkeypatch):
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    layer = nc.CoupledODE(nn.Linear(4, 4), steps=3, adjoint=nc.DiscreteAdjoint(storage="disk"))
    with pytest.raises(OSError, match=r"needs 3 states of 32 bytes, and .* has 10 bytes free: use fewer checkpoints"):
        layer(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoints": 0}, ValueError, r"at least 1 \(the initial state\), 'auto' or None .* got 0"),
        ({"checkpoints": 2.0}, TypeError, r"a whole number or None .* got 2\.0"),
        ({"storage": "tape"}, ValueError, "unknown storage 'tape': choose one of device, cpu, disk"),
    ],
)
def test_choices_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        nc.DiscreteAdjoint(**options)


@cache
def _fewest(steps: int, stored: int, free_descent: bool = True) -> int:
    """The fewest steps a backward pass must repeat, by dynamic programming over where to store the next state.

    ``free_descent``: the steps to the first stored states were the forward pass's.
    """
    if steps == 1:
        return 1
    if stored == 1:
        return steps * (steps + 1) // 2
    return min(
        (0 if free_descent else k) + _fewest(steps - k, stored - 1, free_descent) + _fewest(k, stored, False)
        for k in range(1, steps)
    )


@pytest.mark.parametrize("checkpoints", [2, 3, 5])
def test_a_second_backward_stores_again_what_the_first_has_used_up(checkpoints):
    layer = nc.CoupledODE(nn.Linear(3, 3), steps=7, adjoint=nc.DiscreteAdjoint(checkpoints))
    loss = layer(torch.randn(2, 3)).square().sum()
    tensors, found, counts = list(layer.parameters()), [], [0]
    for _ in range(3):
        found.append(torch.autograd.grad(loss, tensors, retain_graph=True))
        counts.append(layer.stats.recomputed)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
    chosen = schedule(7, checkpoints)
    first, second, third = (after - before for before, after in pairwise(counts))
    assert first == chosen.recomputed
    assert second == third == chosen.recomputed + chosen.stored[-1]


@pytest.mark.parametrize("checkpoints", [None, 3])
def test_dynamics_that_overwrite_a_stored_state_are_noticed(checkpoints):
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, z):
            with torch.no_grad():
                z.mul_(0.5)
            return self.linear(z)

    layer = nc.CoupledODE(Overwrites(), steps=6, adjoint=nc.DiscreteAdjoint(checkpoints))
    with pytest.raises(ValueError, match=r"Overwrites changes its input in place.*inplace=False"):
        layer(torch.randn(2, 3))


def test_a_stored_state_that_was_overwritten_is_not_used():
    kept = DeviceStore()
    state = (torch.ones(2),)
    kept.put(3, state)
    state[0].add_(1.0)
    with pytest.raises(RuntimeError, match=r"before step 3.*modified by an inplace operation"):
        kept.get(3)
