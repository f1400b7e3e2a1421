"""The augmented vector field under torchdiffeq and torchdyn, and which parameters evolve by which operator."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
import torchdiffeq
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle


class Timed(nn.Module):
    """f(t, z) with an evolving matrix and a static one."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, t, z):
        return self.outer(torch.tanh(self.inner(z) + t))


@pytest.fixture
def field():
    field = nc.CoupledField(Timed(), nc.ReactionDiffusionAdvection(), evolve="inner.weight").double()
    return oracle.randomize(field, 0.3)


@pytest.fixture
def z0():
    return torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


def test_the_state_is_z_and_the_parameters_themselves(field, z0):
    state = field.initial_state(z0)
    assert state[0] is z0
    assert state[1] is field.dynamics.inner.weight
    assert field.activation(state) is z0
    assert list(field.weights(state)) == ["inner.weight"]
    dz, dw = field(torch.tensor(0.5, dtype=z0.dtype), state)
    assert torch.allclose(dz, field.dynamics(0.5, z0))
    assert torch.equal(dw, field.operator("inner.weight")(None, state[1]))


@pytest.mark.parametrize("solver", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint])
@pytest.mark.parametrize(("method", "rtol"), [("rk4", None), ("dopri5", 1e-8), ("bosh3", 1e-7)])
def test_torchdiffeq_integrates_the_field(field, z0, solver, method, rtol):
    """Fixed-grid and adaptive methods reach our own fine solve, and so do their gradients."""
    exact = nc.solve(field, z0, steps=64, method="rk4").z
    t = torch.linspace(0, 1, 2 if rtol else 65, dtype=torch.float64)
    tolerances = {"rtol": rtol, "atol": rtol / 100} if rtol else {}
    z = solver(field, field.initial_state(z0), t, method=method, **tolerances)[0][-1]
    assert torch.allclose(z, exact, rtol=1e-6, atol=1e-6)
    tensors = {"z0": z0, **dict(field.named_parameters())}
    error = oracle.largest_error(
        oracle.gradients(z.square().sum(), tensors), oracle.gradients(exact.square().sum(), tensors)
    )
    assert error < 2e-5


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
def test_torchdyn_integrates_the_flat_field(z0, sensitivity):
    """NeuralODE and ODEProblem, each with every sensitivity that torchdyn has.

    The dynamics are autonomous: torchdyn 1.0.6 evaluates the stages of its rk4 at the wrong times.
    """
    from torchdyn.core import NeuralODE, ODEProblem

    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    field = oracle.randomize(nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection()).double(), 0.3)
    flat = nc.FlatField(field, z0)
    exact = nc.solve(field, z0, steps=64, method="rk4").z
    reference = oracle.gradients(exact.square().sum(), dict(field.named_parameters()))
    span = torch.linspace(0, 1, 65, dtype=torch.float64)
    for kind in (NeuralODE, ODEProblem):
        with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints advice about signatures
            problem = kind(
                flat, "rk4", sensitivity=sensitivity, interpolator="4th" if "interp" in sensitivity else None
            )
        x0 = flat.initial_state(z0)
        _, path = problem(x0[None] if "interp" in sensitivity else x0, span)
        z = field.activation(flat.unpack(path))[-1].reshape(z0.shape)
        assert torch.allclose(z, exact, rtol=1e-4, atol=1e-4)
        problem.zero_grad()
        z.square().sum().backward()
        assert oracle.largest_error({k: p.grad for k, p in field.named_parameters()}, reference) < 1e-2


def test_flat_states_pack_and_unpack(field, z0):
    flat = nc.FlatField(field, z0)
    state = field.initial_state(z0)
    assert all(torch.equal(a, b) for a, b in zip(flat.unpack(flat.pack(state)), state, strict=True))
    path = torch.stack([flat.pack(state)] * 3)
    assert [part.shape for part in flat.unpack(path)] == [(3, 4, 3), (3, 3, 3)]
    with pytest.raises(ValueError, match=r"one state, \(n,\) or \(1, n\), got shape \(3, 21\)"):
        flat(torch.zeros(()), path)
    with pytest.raises(ValueError, match="this field packs parts of shapes"):
        flat.pack((z0[:2], state[1]))


def test_by_default_every_matrix_evolves_with_an_operator_of_its_own():
    dynamics = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection())
    assert field.names == ("0.weight", "2.weight")
    assert field.operator("0.weight") is not field.operator("2.weight")


def test_operators_by_pattern_are_shared_where_the_object_is():
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    shared, own = nc.ReactionDiffusionAdvection(scope="layer"), nc.Static()
    field = nc.CoupledField(dynamics, {"1.weight": own, "*": shared})
    assert field.operator("0.weight") is field.operator("2.weight") is shared
    assert field.operator("1.weight") is own
    assert len(list(field.evolution.parameters())) == 3


def test_operators_by_callable_and_of_ones_own():
    class Decay(nn.Module):
        def forward(self, t, w):
            return -w

    dynamics = nn.Sequential(nn.Linear(3, 3, bias=False))
    seen = []
    field = nc.CoupledField(dynamics, lambda name, weight: seen.append((name, weight.shape)) or Decay())
    assert seen == [("0.weight", (3, 3))]
    w1 = torchdiffeq.odeint(field, field.initial_state(torch.zeros(1, 3)), torch.tensor([0.0, 1.0]))[1][-1]
    assert torch.allclose(w1, dynamics[0].weight * torch.exp(torch.tensor(-1.0)), atol=1e-5)


@pytest.mark.parametrize(
    ("evolve", "names"),
    [
        ("0.*", ("0.weight", "0.bias")),
        (["0.weight", "1.bias"], ("0.weight", "1.bias")),
        (lambda name, weight: weight.ndim == 1, ("0.bias", "1.bias")),
    ],
)
def test_evolve_by_name_pattern_or_predicate(evolve, names):
    field = nc.CoupledField(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nc.Static(), evolve=evolve)
    assert field.names == names


@pytest.mark.parametrize("name", ["keys", "values", "items", "pop", "update", "clear"])
def test_parameters_may_have_any_name(name):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("weight", nn.Parameter(torch.eye(3)))
            setattr(self, name, nn.Parameter(torch.randn(3, 3)))

        def forward(self, z):
            return z @ self.weight + z @ self._parameters[name]

    def make():
        return nc.CoupledODE(Named(), nc.ReactionDiffusionAdvection(), steps=2)

    layer, other = make(), make()
    assert set(layer.field.names) == {"weight", name}
    assert "field.evolution.weight.reaction" in layer.state_dict()  # as ever
    layer.field.operator(name).reaction.data.fill_(1.0)
    other.load_state_dict(layer.state_dict())
    z0 = torch.randn(2, 3)
    assert torch.equal(other(z0), layer(z0))
    layer(z0).sum().backward()
    assert layer.field.operator(name).reaction.grad != 0
    assert len(layer.regularization().reshape(-1)) == 1
    torch.testing.assert_close(layer.bake()(z0), layer(z0))


@pytest.mark.parametrize(
    ("evolution", "message"),
    [
        ({"0.weigth": nc.ReactionDiffusionAdvection(), "*": nc.Static()}, r"'0\.weigth' matches none of .* 0\.weight"),
        ({"0.bias": nc.LinearEvolution(), "*": nc.Static()}, r"'0\.bias' matches none of the evolving parameters"),
        ({"2.weight": nc.Static(), "0.weight": nc.Static()}, r"'2\.weight' matches none .*0\.weight"),  # tied
        ({"*": nc.Static(), "0.w*": nc.ReactionDiffusionAdvection()}, r"'0\.w\*' comes after '\*', .* put '\*' last"),
    ],
)
def test_operators_for_parameters_that_there_are_not(evolution, message):
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    dynamics[2].weight = dynamics[0].weight
    with pytest.raises(ValueError, match=message):
        nc.CoupledField(dynamics, evolution)


def test_a_star_is_for_the_rest_which_may_be_none():
    rda = nc.ReactionDiffusionAdvection()
    field = nc.CoupledField(nn.Linear(3, 3), {"weight": rda, "*": nc.Static()})
    assert field.operator("weight") is rda
    # A name comes before every pattern, wherever it stands.
    assert nc.CoupledField(nn.Linear(3, 3), {"*": nc.Static(), "weight": rda}).operator("weight") is rda
    assert nc.CoupledField(nn.Tanh(), {"*": nc.Static()}).names == ()


def test_a_tied_parameter_evolves_everywhere_it_is_used():
    dynamics = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    dynamics[2].weight = dynamics[0].weight
    field = oracle.randomize(nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection()).double())
    assert field.names == ("0.weight",)
    z0 = torch.randn(2, 3, dtype=torch.float64)
    w = 2 * dynamics[0].weight
    dz, _ = field(torch.zeros(()), (z0, w))
    assert torch.allclose(dz, torch.tanh(z0 @ w.T) @ w.T)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nc.CoupledField(torch.tanh, nc.Static()), TypeError, "dynamics must be an nn.Module"),
        (lambda: nc.CoupledField(nn.Bilinear(2, 2, 2), "rda"), TypeError, "evolution must be an operator .*got 'rda'"),
        (
            lambda: nc.CoupledField(nn.Linear(2, 2), nc.Static(), evolve="conv*"),
            ValueError,
            r"evolve='conv\*' matches no",
        ),
        (lambda: nc.CoupledField(nn.Linear(2, 2), nc.Static(), "dirac"), TypeError, "kernel must be a time kernel"),
        (lambda: nc.CoupledField(nn.Module(), nc.Static()), TypeError, r"must be f\(z\) or f\(t, z\)"),
        (
            lambda: nc.CoupledField(nn.Linear(2, 2), {"x": nc.Static()}),
            ValueError,
            "no operator for parameter 'weight'",
        ),
        (lambda: nc.CoupledField(nn.Linear(2, 2), lambda name, w: None), TypeError, "returned None: write q as"),
        (
            lambda: nc.CoupledField(nn.Linear(2, 2), nc.ReactionDiffusionAdvection(), evolve="bias"),
            ValueError,
            "parameter 'bias': .* at least 2 axes",
        ),
    ],
)
def test_fields_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_states_that_the_field_cannot_take(field, z0):
    weight = field.dynamics.inner.weight
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.int64: convert it with .float\(\)"):
        field.initial_state(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"z0 is torch\.float32, the weights are torch\.float64"):
        field.initial_state(z0.float())
    with pytest.raises(ValueError, match="z0 is on meta, the weights are on cpu"):
        field.initial_state(z0.to("meta"))
    with pytest.raises(ValueError, match=r"must have a batch axis, got shape \(\)"):
        field.initial_state(z0[0, 0])
    with pytest.raises(ValueError, match=r"weights of shapes \[\(3, 3\)\], got \[\(2, 3\)\]"):
        field(torch.zeros(()), (z0, weight[:2]))


def test_flat_states_of_another_length(field, z0):
    flat = nc.FlatField(field, z0)
    x = flat.initial_state(z0)
    for wrong in (x[:-1], x.repeat(2), x[0]):
        with pytest.raises(ValueError, match=f"has {len(x)} numbers, got shape"):
            flat.unpack(wrong)
    with pytest.raises(ValueError, match=f"has {len(x)} numbers, got shape"):
        flat(torch.zeros(()), x[:-1])


def test_dynamics_that_return_no_tensor():
    class Pair(nn.Linear):
        def forward(self, z):
            return super().forward(z), z

    for options in ({"steps": 2}, {"method": "dopri5"}):
        with pytest.raises(TypeError, match="must return a tensor, got tuple"):
            nc.CoupledODE(Pair(3, 3), **options)(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"no named argument .*compile the layer"):
        nc.CoupledODE(torch.compile(nn.Linear(3, 3)), steps=2)


def test_general_purpose_solvers_are_told_what_they_cannot_integrate():
    z0 = torch.randn(2, 3, 4, 4)
    held = nc.CoupledField(nn.Conv2d(3, 3, 1), nc.Static(), nc.SampleAndHold(2))
    with pytest.raises(ValueError, match=r"no finite memory.*Dirac has.*use nc.solve"):
        held.initial_state(z0)
    by_step = nc.CoupledField(nn.Sequential(nn.Conv2d(3, 3, 1), nc.PerStep(nn.BatchNorm2d(3), 2)), nc.Static())
    with pytest.raises(ValueError, match=r"does not say which step it is in: use nc\.solve"):
        by_step(torch.zeros(()), by_step.initial_state(z0))


@pytest.mark.parametrize(
    ("q", "got"),
    [
        (lambda t, w: -w, r"returned a Tensor of shape \(16, 16, 3, 3\): "),
        (lambda t, w: torch.cos(t) * w, r"raised TypeError\(.*\): "),
        (lambda t, w: t.cos() * w, r"raised AttributeError\(.*\): "),
        (lambda w: -w, r"raised TypeError\(.*positional argument.*\): "),
        (lambda name, w: list(range(10**5)), r"returned \[0, 1, 2, .{,100}: "),
    ],
)
def test_a_function_in_place_of_an_operator_is_told_in_one_line(q, got):
    """A q of (t, w) has to be a module, with parameters of its own; what it gave was printed, all of its numbers."""
    advice = r"write q as an nn\.Module with forward\(t, w\); a function must be \(name, weight\) -> such a module$"
    with pytest.raises(TypeError, match=rf"^evolution, called as a function \('0\.weight', weight\), {got}{advice}"):
        nc.models.build("resnet4", "anodev2-1", evolution=q)


def test_other_values_are_told_in_one_line():
    with pytest.raises(TypeError, match=r"'weight' must be an nn\.Module with forward\(t, w\), got <function "):
        nc.CoupledField(nn.Linear(2, 2), {"weight": lambda t, w: -w})
    with pytest.raises(TypeError, match=r"got a Tensor of shape \(200,\)$"):
        nc.CoupledField(nn.Linear(2, 2), torch.zeros(200))
    with pytest.raises(TypeError, match=r"kernel must be a time kernel .*, got a Tensor of shape \(200, 9\)$"):
        nc.CoupledField(nn.Linear(2, 2), nc.Static(), torch.zeros(200, 9))
    with pytest.raises(ValueError, match=r"steps must be a whole number.*, got a Tensor of shape \(200,\)$"):
        nc.CoupledODE(nn.Linear(2, 2), steps=torch.ones(200))
    with pytest.raises(TypeError, match=r"t must be a row of numbers.*, got a Tensor of shape \(99, 2\)$"):
        nc.CoupledODE(nn.Linear(2, 2), steps=2, t=torch.ones(99, 2))


def test_a_slope_is_real_where_the_state_is():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, z):
            return self.linear(z) * 1j

    with pytest.raises(TypeError, match=r"must return real numbers, as the state is .*float32.*, got torch.complex64"):
        nc.CoupledODE(Turns(), nc.Static(), steps=2)(torch.randn(3, 4))


def test_names_that_would_share_an_operator_are_refused():
    dynamics = nn.Sequential(nn.Linear(4, 4))
    dynamics.add_module("a/b", nn.Linear(4, 4))
    dynamics.add_module("a", nn.Sequential())
    dynamics.a.add_module("b", nn.Linear(4, 4))
    with pytest.raises(ValueError, match="differs in dots and slashes alone"):
        nc.CoupledField(dynamics, nc.Static())
