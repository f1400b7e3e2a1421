"""diffrax as a peer: the coupled field in JAX is the one in torch, and its solves have gradients in torch.

That recursive checkpointing is exact is among the tests of all candidates, in `tests.benchmarks.peers.test_peers`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from benchmarks.lib.block import block, start, training_step
from benchmarks.lib.candidates import ADAPTIVE, HAND
from benchmarks.lib.gradients import errors, gradients
from benchmarks.peers.candidates import CANDIDATES, TOLERANCE, build

pytest.importorskip("diffrax")

import jax

from benchmarks.peers import diffrax_peer, jax_block

SMALL = (2, 16, 6, 6)


def found(name: str, solver: str, steps: int = 3):
    layer, run = build(name, steps, solver, form="ode")
    layer.double()
    return gradients(layer, run, start(torch.float64, SMALL))


def test_the_field_is_that_of_torch():
    """At a random state: z with channels last, weights as torch has them."""
    layer = block(2, "euler").double()
    torch.manual_seed(2)
    state = tuple(torch.randn_like(part) for part in layer.field.initial_state(start(torch.float64, SMALL)))
    evolving = {f"dynamics.{name}" for name in layer.field.names}
    with jax.enable_x64(True), torch.no_grad():
        z, *w = map(diffrax_peer._to_jax, state)
        static = {n: diffrax_peer._to_jax(p) for n, p in layer.field.named_parameters() if n not in evolving}
        dz, *dw = jax_block.vector_field(layer)(0.0, (z.transpose(0, 2, 3, 1), *w), static)
        slopes = [torch.from_dlpack(part) for part in (dz.transpose(0, 3, 1, 2), *dw)]
        for slope, expected in zip(slopes, layer.field(torch.zeros(()), state), strict=True):
            torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-12)


def test_the_backsolve_adjoint_has_the_gradient_of_torchdiffeqs_adjoint():
    """Both solve the adjoint equation by Euler's method on the same grid: what they find is wrong in the same way."""
    backsolve, adjoint = found("diffrax backsolve", "euler"), found("torchdiffeq odeint_adjoint", "euler")
    assert max(errors(backsolve, adjoint).values()) < 1e-10
    assert max(errors(backsolve, found(HAND, "euler")).values()) > 0.1


def test_by_tolerance_it_comes_near():
    expected = found(HAND, "rk4", steps=20)
    for name in ("diffrax recursive", "diffrax backsolve"):
        assert max(errors(found(name, ADAPTIVE), expected).values()) < 0.1, name


def test_a_second_step_compiles_nothing(monkeypatch):
    """The field is a Python function: it is called where a solve is traced, and not where it is repeated."""
    calls = []
    field = jax_block.vector_field

    def counted(layer):
        derivatives = field(layer)
        return lambda *arguments: calls.append(0) or derivatives(*arguments)

    monkeypatch.setattr(diffrax_peer, "vector_field", counted)
    _, run = build("diffrax recursive", 2, "euler")
    training_step(run, start(shape=SMALL))
    traced = len(calls)
    training_step(run, start(shape=SMALL))
    assert len(calls) == traced > 0


def test_parameters_that_change_between_steps_are_seen():
    layer, run = build("diffrax recursive", 2, "euler")
    first = run(start(shape=SMALL)).clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(first, run(start(shape=SMALL)))


def test_there_are_the_parts_of_the_block_only():
    with pytest.raises(ValueError, match="in JAX there is no Linear yet"):
        diffrax_peer.run("recursive", None, nc.CoupledODE(nn.Sequential(nn.Linear(4, 4)), steps=2))
    with_bias = nc.CoupledODE(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), steps=2)
    with pytest.raises(ValueError, match="padding=1 and bias=False only"):
        diffrax_peer.run("recursive", TOLERANCE, with_bias)
    resting = nc.CoupledODE(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False)), nc.Static(), steps=2)
    with pytest.raises(ValueError, match="ReactionDiffusionAdvection without activation only"):
        diffrax_peer.run("recursive", None, resting)


def test_an_unknown_adjoint_is_refused():
    with pytest.raises(ValueError, match="unknown adjoint 'none': choose one of recursive"):
        diffrax_peer.run("none", None, block(2, "euler"))


def test_it_is_for_the_cpu():
    _, run = build("diffrax recursive", 2, "euler")
    with pytest.raises(ValueError, match="on the CPU only, got a tensor on meta: use --device cpu"):
        run(torch.empty(SMALL, device="meta", requires_grad=True))


@pytest.mark.skipif(bool(CANDIDATES["diffrax reversible"].lacks), reason="this diffrax has no ReversibleAdjoint")
def test_the_reversible_adjoint_has_the_gradient_of_its_own_scheme(monkeypatch):
    reversible = found("diffrax reversible", "euler")
    monkeypatch.setitem(diffrax_peer.ADJOINTS, "reversible", diffrax_peer.ADJOINTS["recursive"])
    assert max(errors(reversible, found("diffrax reversible", "euler")).values()) < 1e-10
