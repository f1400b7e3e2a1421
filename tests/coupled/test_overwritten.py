"""Dynamics that overwrite what their backward pass needs: right, or an error, whoever has set hooks on saved tensors.

PyTorch itself notices it without hooks alone.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import neuralode_coupled as nc
from neuralode_coupled._torch import noticing_changes
from tests.helpers import oracle

FLOAT64 = {"dtype": torch.float64}
T = torch.tensor([0.0, 0.5, 1.0], **FLOAT64)


class Overwriting(nn.Module):
    """f that overwrites the output of an operation, in one of several ways, or an equal one that does not."""

    def __init__(self, way: str, harmless: bool = False):
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.way, self.harmless = way, harmless
        self.register_buffer("scale", torch.full((3,), 0.9))
        self.last = torch.zeros(3, **FLOAT64)

    def forward(self, z):
        h = self.net(z).exp()
        if self.harmless and self.way != "nothing needed":
            return -2 * h * self.scale
        if self.way == "itself":
            h.mul_(2)
        elif self.way == "a view":
            h = h.view(-1)
            h.mul_(2)
            h = h.view(z.shape)
        elif self.way == "an alias":
            alias = h.detach()
            k = h + h  # does not save h
            del h
            alias.mul_(7)
            return -k * self.scale
        elif self.way == "a part":
            h[:, 0].mul_(2)
            h = torch.cat([h[:, :1], 2 * h[:, 1:]], 1)
        elif self.way == "a buffer":
            k = -2 * h * self.scale
            with torch.no_grad():
                self.scale.mul_(3).div_(3)
            return k
        elif self.way == "nothing needed":
            h = self.net(z) + 0  # saves nothing
            h.mul_(2)
            return -h * self.scale
        return -h * self.scale


WRONG = ["itself", "a view", "an alias", "a part", "a buffer"]
ADJOINTS = [
    nc.Backprop(),
    nc.DiscreteAdjoint(),
    nc.DiscreteAdjoint(None),
    nc.DiscreteAdjoint(2, "cpu"),
    nc.DiscreteAdjoint(keep_last=2),
    nc.DiscreteAdjoint(None, weights="recomputed"),
    nc.ReversibleAdjoint(),
    nc.ContinuousAdjoint(),
]


def on_cpu(solve, z):
    with torch.autograd.graph.save_on_cpu():
        return solve(z)


def with_own(pack, unpack, solve, z):
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return solve(z)


class Packing:
    """A hook that is an object."""

    def __call__(self, tensor):
        return tensor.detach()


SURROUNDINGS = {
    "nothing": lambda solve, z: solve(z),
    "save_on_cpu": on_cpu,
    "own": lambda solve, z: with_own(lambda x: (x.detach(),), lambda x: x[0], solve, z),
    "objects": lambda solve, z: with_own(Packing(), lambda x: x, solve, z),
    "checkpoint": lambda solve, z: checkpoint(solve, z, use_reentrant=False),
    "checkpoint, save_on_cpu": lambda solve, z: on_cpu(lambda z: checkpoint(solve, z, use_reentrant=False), z),
    "save_on_cpu, checkpoint": lambda solve, z: checkpoint(lambda z: on_cpu(solve, z), z, use_reentrant=False),
}


def layer(adjoint, way, harmless=False, **options):
    torch.manual_seed(0)
    made = nc.CoupledODE(Overwriting(way, harmless), nc.LinearEvolution(), adjoint=adjoint, **options).double()
    return oracle.randomize(made)


def gradients(solve, module, around, backward_inside=False, create_graph=False):
    z0 = torch.randn(2, 3, **FLOAT64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    names = {"z0": z0, **dict(module.named_parameters())}

    def loss(z):
        value = SURROUNDINGS[around](solve, z).square().sum()
        if create_graph:
            slopes = torch.autograd.grad(value, list(names.values()), create_graph=True)
            value = sum(slope.square().sum() for slope in slopes)
        return value

    if backward_inside:
        with torch.autograd.graph.save_on_cpu():
            return oracle.gradients(loss(z0), names)
    return oracle.gradients(loss(z0), names)


@given(st.sampled_from(ADJOINTS), st.sampled_from(sorted(SURROUNDINGS)), st.sampled_from(WRONG))
@settings(max_examples=60)
def test_what_is_overwritten_is_right_or_an_error(adjoint, around, way):
    grid = {"steps": 40 if isinstance(adjoint, nc.ContinuousAdjoint) else 3, "method": "midpoint"}
    made = layer(adjoint, way, **grid)
    reference = layer(adjoint, way, harmless=True, **grid)
    exact = gradients(reference, reference, around)
    try:
        found = gradients(made, made, around)
    except RuntimeError as error:
        assert "inplace operation" in str(error)  # noqa: PT017
        return
    assert oracle.largest_error(found, exact) < 1e-12


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_it_is_an_error_without_copies(around, method):
    """As it is without hooks."""
    grid = {"steps": 3} if method == "midpoint" else {"rtol": 1e-2, "atol": 1e-2}
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None)):
        made = layer(adjoint, "itself", method=method, **grid)
        with pytest.raises(RuntimeError, match="inplace operation"):
            gradients(made, made, around)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_what_is_not_needed_may_be_overwritten(adjoint, around):
    made = layer(adjoint, "nothing needed", steps=3)
    exact = gradients(made, made, "nothing")
    assert oracle.largest_error(gradients(made, made, around), exact) < 1e-12
    if not isinstance(adjoint, nc.ContinuousAdjoint) and "checkpoint" not in around:
        exact = gradients(made, made, "nothing", create_graph=True)
        assert oracle.largest_error(gradients(made, made, around, create_graph=True), exact) < 1e-11
        assert oracle.largest_error(gradients(made, made, around, True, True), exact) < 1e-11


@pytest.mark.parametrize("adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None)], ids=str)
@pytest.mark.parametrize("kind", ["clone", "file"])
def test_copies_are_right(adjoint, kind, tmp_path):
    """Hooks that keep the numbers as they were: no error where PyTorch has none."""

    def to_file(x):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save(x.detach(), path)
        return path

    pack, unpack = (lambda x: x.detach().clone(), lambda x: x) if kind == "clone" else (to_file, torch.load)
    results = []
    for harmless in (False, True):
        made = layer(adjoint, "itself", harmless, steps=3)
        z0 = torch.ones(2, 3, **FLOAT64, requires_grad=True)
        z = with_own(pack, unpack, made, z0)
        if not harmless and adjoint != nc.Backprop():  # the steps are computed again, with no hooks around them
            with pytest.raises(RuntimeError, match="inplace operation"):
                z.sum().backward()
            return
        results.append(oracle.gradients(z.square().sum(), dict(made.named_parameters())))
    assert oracle.largest_error(*results) < 1e-12


def test_a_copy_where_the_original_has_been_is_one():
    """Memory that is free again is given to others: to what hooks have read from a file, in the same place."""
    memory = bytearray(8 * 1000)

    def at_the_place(numbers):
        tensor = torch.frombuffer(memory, **FLOAT64)
        return tensor.copy_(numbers)

    x = torch.ones(1000, **FLOAT64, requires_grad=True)
    square = at_the_place(torch.full((1000,), 4.0, **FLOAT64))
    hooks = (lambda tensor: tensor.tolist(), lambda numbers: at_the_place(torch.tensor(numbers, **FLOAT64)))
    with torch.autograd.graph.saved_tensors_hooks(*hooks), noticing_changes("overwritten"):
        y = x * square  # saves square
    square.mul_(2)  # of no matter: the hooks have a copy
    del square
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.full_like(x, 4.0))


class Later(nn.Module):
    """f that overwrites, at each evaluation, what the one before has used."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.register_buffer("scale", torch.full((3,), 0.875))

    def forward(self, z):
        with torch.no_grad():
            self.scale.mul_(1.5)
        return torch.tanh(self.net(z)) * self.scale


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None)], ids=str)
def test_what_a_later_evaluation_overwrites(adjoint, around):
    torch.manual_seed(0)
    made = nc.CoupledODE(Later(), steps=3, adjoint=adjoint).double()

    def loop(z):
        scale = torch.full((3,), 0.875, **FLOAT64)
        for _ in range(3):
            scale = 1.5 * scale
            z = z + torch.tanh(made.field.dynamics.net(z)) * scale / 3
        return z

    exact = gradients(loop, made, "nothing")
    try:
        found = gradients(made, made, around)
    except RuntimeError as error:
        assert isinstance(adjoint, nc.Backprop) or "checkpoint" in around
        assert "inplace operation" in str(error) or "gave another state" in str(error)  # noqa: PT017
        return
    assert oracle.largest_error(found, exact) < 1e-12


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("more", [{}, {"checkpoints": None}, {"checkpoints": 1}, {"memory": 300}], ids=str)
@pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun"])
def test_solves_of_functions(method, more, around):
    net = Overwriting("itself").double()
    if method != "rk4":
        more = {"rtol": 1e-2, "atol": 1e-2, **more}
    with pytest.raises(RuntimeError, match="inplace operation"):
        gradients(lambda z: nc.odeint_dto(lambda t, y: net(y), z, T, method=method, **more), net, around)


class Outer(nn.Module):
    """A layer inside of f, whose output f overwrites or not."""

    def __init__(self, inner, overwrites):
        super().__init__()
        self.inner, self.overwrites = inner, overwrites

    def forward(self, z):
        h = torch.sigmoid(self.inner(z))
        return h.mul_(2) if self.overwrites else 2 * h


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("inner", [nc.Backprop(), nc.DiscreteAdjoint()], ids=str)
@pytest.mark.parametrize("where", ["inside", "outside", "nowhere"])
def test_layers_inside_of_layers(where, inner, around):
    """They see through to the hooks outside, such as those of torch's checkpoint."""
    torch.manual_seed(0)
    inside = nc.CoupledODE(Overwriting("itself", harmless=where != "inside"), steps=2, adjoint=inner)
    made = nc.CoupledODE(Outer(inside, where == "outside"), steps=2, adjoint=nc.Backprop()).double()
    if where == "nowhere":
        exact = gradients(made, made, "nothing")
        assert oracle.largest_error(gradients(made, made, around), exact) < 1e-12
        return
    with pytest.raises(RuntimeError, match="inplace operation"):
        gradients(made, made, around)


def test_replaced_tensors_are_seen_inside_of_other_hooks():
    """`check_surroundings` looks for torch's checkpoint through the hooks of an evaluation."""
    inside = nc.CoupledODE(nn.Linear(3, 3), steps=2)

    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def forward(self, z):
            others = {name: (2 * p).detach().requires_grad_() for name, p in inside.named_parameters()}
            return torch.func.functional_call(inside, others, (self.net(z),))

    made = nc.CoupledODE(Replacing(), steps=2, adjoint=nc.Backprop())
    z0 = torch.ones(2, 3, requires_grad=True)
    made(z0)
    with pytest.raises(ValueError, match="replaced for this call"):
        checkpoint(made, z0, use_reentrant=False)


class Slope(nn.Module):
    """f that differentiates its input, through something that it overwrites."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, z):
        with torch.enable_grad():
            q = z if z.requires_grad else z.detach().requires_grad_()
            h = self.net(q).exp()
            energy = h.mul_(2).sum()
            return -torch.autograd.grad(energy, q, create_graph=True)[0]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_fields_that_differentiate_their_input(adjoint, around):
    made = nc.CoupledODE(Slope(), steps=3, adjoint=adjoint).double()
    with pytest.raises((RuntimeError, ValueError), match=r"inplace operation|inside of its own evaluation"):
        gradients(made, made, around)


class Growing(nn.Module):
    """A user's own q that overwrites what its backward needs."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7))

    def forward(self, t, w):
        return torch.sigmoid(self.rate * w).mul_(2)


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_operators(method, adjoint, around):
    grid = {"steps": 3} if method == "midpoint" else {"rtol": 1e-2, "atol": 1e-2}
    if method == "dopri5" and adjoint in (nc.DiscreteAdjoint(None, weights="recomputed"), nc.ReversibleAdjoint()):
        return
    made = nc.CoupledODE(nn.Linear(3, 3), Growing(), adjoint=adjoint, method=method, **grid).double()
    with pytest.raises(RuntimeError, match="inplace operation"):
        gradients(made, made, around)
