"""The optimality system: by hand on a scalar problem, its order in the grid, what makes it fail, and what it leaves
alone; the comparison of gradients, its command, and the penalties on the path of the weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import cli, kkt
from neuralode_coupled.kkt import comparison
from tests.helpers import oracle
from tests.helpers.cli import run

RUNGE_KUTTA = ["euler", "midpoint", "heun3", "rk4"]
ORDER = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}


def energy(z):
    return z.square().sum() / 2


def smooth_layer(steps=4, method="euler", operator=None, **options):
    """tanh dynamics whose weights evolve by a gentle flow."""
    torch.manual_seed(1)
    dynamics = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    operator = nc.ReactionDiffusionAdvection(form="ode") if operator is None else operator
    return oracle.randomize(nc.CoupledODE(dynamics, operator, steps=steps, method=method, **options), 0.05).double()


@pytest.fixture
def z0():
    torch.manual_seed(2)
    return torch.randn(3, 4, dtype=torch.float64)


class Product(nn.Module):
    """f(z) = w z for a scalar w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.8]], dtype=torch.float64))

    def forward(self, z):
        return self.w[0, 0] * z


class Growth(nn.Module):
    """q(w) = p w^2."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, t, w):
        return self.p * w.square()


def test_eulers_method_by_the_formulas_of_the_paper():
    """f = w z, q = p w^2, J = z^2 / 2: every multiplier written out in numbers."""
    steps, h, w, z, p = 3, 1 / 3, [0.8], [1.5], 0.3
    for n in range(steps):
        z.append(z[n] + h * w[n] * z[n])
        w.append(w[n] + h * p * w[n] ** 2)
    alpha, beta, gamma, g_p = [-z[-1]], [0.0], [], 0.0
    for n in reversed(range(steps)):
        gamma.insert(0, h * z[n] * alpha[0])
        alpha.insert(0, alpha[0] + h * w[n] * alpha[0])
        g_p -= h * w[n] ** 2 * beta[0]
        beta.insert(0, beta[0] + h * 2 * p * w[n] * beta[0] + gamma[0])
    layer = nc.CoupledODE(Product(), Growth(), steps=steps)
    found = kkt.multipliers(layer, torch.tensor([[1.5]], dtype=torch.float64), energy)
    assert found.t == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert found.alpha.flatten().tolist() == pytest.approx(alpha, rel=1e-14)
    assert found.gamma["w"].flatten().tolist() == pytest.approx(gamma, rel=1e-14)
    assert found.beta["w"].flatten().tolist() == pytest.approx(beta, rel=1e-14)
    gradients = found.gradients()
    assert float(gradients["field.evolution.w.p"]) == pytest.approx(g_p, rel=1e-14)
    assert float(gradients["field.dynamics.w"]) == pytest.approx(-beta[0], rel=1e-14)


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_interior_multipliers_are_what_autograd_says_of_the_interior(method, z0):
    """alpha_n = -dJ/dz_n, gamma_ni = -dJ/dtheta_ni, beta_m = -dJ/dw_m, of the tensors inside an unrolled solve."""
    layer = smooth_layer(3, method)
    layer.adjoint = nc.Backprop()
    z, w, theta = [], [], []

    def dynamics_called(module, given):
        z.append(given[0])
        theta.append(dict(module.named_parameters())["0.weight"])

    layer.field.dynamics.register_forward_pre_hook(dynamics_called)
    layer.field.operator("0.weight").register_forward_pre_hook(lambda module, given: w.append(given[1]))
    loss = energy(layer(z0.clone().requires_grad_()))
    stages = len(z) // 3
    inside = [*z[::stages], *w[::stages], *theta]
    expected = [-g for g in torch.autograd.grad(loss, inside, allow_unused=True, materialize_grads=True)]
    found = kkt.multipliers(layer, z0, energy)
    assert found.gamma["0.weight"].shape == (3, stages, 5, 4)
    assert torch.allclose(found.alpha[:-1], torch.stack(expected[:3]), rtol=1e-11, atol=1e-14)
    assert torch.allclose(found.beta["0.weight"][:-1], torch.stack(expected[3:6]), rtol=1e-11, atol=1e-14)
    assert torch.allclose(found.gamma["0.weight"].flatten(0, 1), torch.stack(expected[6:]), rtol=1e-11, atol=1e-14)
    assert torch.equal(found.alpha[-1], -layer(z0))


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_the_differential_equations_hold_at_the_methods_order(method, z0):
    """(7a) to (7e) in continuous form: a regression of the residuals over the grids, and no rounding at its start."""
    shrinks_at_order(ORDER[method], lambda steps: smooth_layer(steps, method), z0)


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_they_hold_for_weights_on_a_finer_grid_of_their_own_too(method, z0):
    """The last stage of a step then is the same point of the weights' grid as the first of the next one."""
    shrinks_at_order(ORDER[method], lambda steps: smooth_layer(steps, method, weight_steps=6 * steps), z0)


def shrinks_at_order(order, make, z0):
    """By a regression over three grids, in every one of the five equations; ``make(steps)`` is the layer."""
    grids = (12, 24, 48) if order == 1 else (8, 16, 32)  # Euler's method comes to its order late
    found = [kkt.residuals(make(steps), z0, energy).continuous for steps in grids]
    assert set(found[0]) == {"7a", "7b", "7c", "7d", "7e"}
    for equation in found[0]:
        residual = [by_equation[equation] for by_equation in found]
        assert residual[0] > 1e-10
        slope = sum(math.log2(a / b) for a, b in pairwise(residual)) / 2
        assert slope > order - 0.35, (equation, residual)


class Triangle(nc.DensityKernel):
    """A user's own density, K(s) = 2 (1 - s / width) / width up to the width."""

    def cumulative(self, s):
        return 1 - (1 - s / 0.4).clamp(min=0) ** 2

    def cumulative_integral(self, s):
        return s - 0.4 / 3 * (1 - (1 - s / 0.4).clamp(min=0) ** 3)


DENSITIES = {
    "exponential": lambda: nc.Exponential(3.0, learnable=True),
    "exponential, zero history": lambda: nc.Exponential(2.0, learnable=True, history="zero"),
    "Erlang": lambda: nc.Erlang(2, 5.0, learnable=True),
    "Erlang, zero history": lambda: nc.Erlang(3, 8.0, learnable=True, history="zero"),
    "box": lambda: nc.Box(0.5, learnable=True),
    "one's own": Triangle,
}


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("kernel", DENSITIES)
def test_they_hold_under_kernels_that_average_over_the_past(kernel, method, z0):
    """At the method's order up to the second, which is kappa's in the step of the weights; rates and widths are part
    of (7e). The weight grid is another one than the activations'."""
    shrinks_at_order(
        min(ORDER[method], 2),
        lambda steps: smooth_layer(steps, method, kernel=DENSITIES[kernel](), weight_steps=steps * 3 // 2),
        z0,
    )


def test_a_learned_rate_alone_has_its_equation(z0):
    """q = 0 and a zero history: of p there is only the kernel's rate, and theta moves all the same."""
    shrinks_at_order(
        2,
        lambda steps: smooth_layer(
            steps, "rk4", nc.Static(), kernel=nc.Exponential(2.0, learnable=True, history="zero")
        ),
        z0,
    )


@pytest.mark.parametrize("kernel", ["exponential", "Erlang, zero history", "box"])
def test_the_continuous_equations_notice_what_is_wrong_in_them(kernel, z0):
    layer = smooth_layer(24, "rk4", kernel=DENSITIES[kernel]())
    right = kkt.multipliers(layer, z0, energy)
    wrong = {
        ("7a", "7b", "7c", "7d", "7e"): replace(right, alpha=right.alpha * torch.linspace(1, 2, 25)[:, None, None]),
        ("7b",): replace(right, gamma={name: 1.5 * gamma for name, gamma in right.gamma.items()}),
        ("7c", "7d", "7e"): replace(right, beta={name: 1.5 * beta for name, beta in right.beta.items()}),
    }
    base = kkt.residuals(layer, z0, energy).continuous
    for equations, multipliers in wrong.items():
        found = kkt.residuals(layer, z0, energy, inserted=multipliers).continuous
        for equation in found:
            if equation in equations:
                assert found[equation] > max(5 * base[equation], 0.003), (equations, equation, base, found)
            else:
                assert found[equation] == pytest.approx(base[equation], rel=1e-6)


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_otd_and_dto_converge_to_each_other_in_every_group(method, z0):
    grids = (8, 16, 32)
    results = [kkt.check(smooth_layer(steps, method), z0, energy, show=False) for steps in grids]
    for group in ("z0", "w0", "p", "static"):
        errors = [result.groups[group].errors["continuous"] for result in results]
        assert errors[0] > 1e-9
        assert min(math.log2(a / b) for a, b in pairwise(errors)) > ORDER[method] - 0.35, (group, errors)


def test_each_equation_notices_what_is_wrong_in_it(z0):
    layer = smooth_layer(3)
    right = kkt.multipliers(layer, z0, energy)
    name = "2.weight"

    def nudged(tensor, n):
        tensor = tensor.clone()
        tensor[n] += 0.01 * tensor.abs().mean() + 1e-3
        return tensor

    wrong = {
        ("7a", "7b"): replace(right, alpha=nudged(right.alpha, 1)),
        ("7b", "7c"): replace(right, gamma={**right.gamma, name: nudged(right.gamma[name], 1)}),
        ("7c", "7e"): replace(right, beta={**right.beta, name: nudged(right.beta[name], 1)}),
        ("7c", "7d"): replace(right, beta={**right.beta, name: nudged(right.beta[name], 0)}),
    }
    assert max(kkt.residuals(layer, z0, energy, inserted=right).discrete.values()) < 1e-13
    for equations, multipliers in wrong.items():
        found = kkt.residuals(layer, z0, energy, inserted=multipliers).discrete
        assert {equation for equation, residual in found.items() if residual > 1e-6} == set(equations)


def test_the_continuous_adjoint_does_not_solve_the_discrete_equations(z0):
    """The gradients that a layer delivers are those of its own gradient method."""
    layer = smooth_layer(3, adjoint=nc.ContinuousAdjoint())
    found = kkt.residuals(layer, z0, energy).discrete
    assert found["7b"] < 1e-13
    assert all(found[equation] > 1e-4 for equation in ("7a", "7d", "7e"))


def test_a_regulariser_enters_its_two_equations(z0):
    """g = dR - beta_0 and g = dR - int q_p^T beta: the gradient of J + R by autograd, from its parts."""
    layer = smooth_layer(3)

    def regularizer():
        return layer.regularization(w0=0.3, kinetic=2.0)

    assert max(kkt.residuals(layer, z0, energy, regularizer).discrete.values()) < 1e-13
    parameters = dict(layer.named_parameters())
    total = oracle.gradients(energy(layer(z0)) + regularizer(), parameters)
    regular = oracle.gradients(regularizer(), parameters)
    by_hand = kkt.multipliers(layer, z0, energy).gradients()
    assert oracle.largest_error({name: by_hand[name] + regular[name] for name in total}, total) < 1e-12
    assert float(regular["field.evolution.0/weight.diffusion"].norm()) > 1e-3


EYE = torch.eye(4, 5)


class OnTheGrid(nc.TimeKernel):
    """A user's own kernel that is a matrix and nothing else."""

    def kappa(self, steps, c, weight_steps, span=1.0, device=None):
        return EYE[:, None].expand(-1, len(c), -1)


class OnlyPropagated(nn.Module):
    """A user's own operator that has a closed form alone."""

    def propagate(self, w, dt):
        return w / (1 + dt)


def test_without_a_continuous_form_it_says_why(z0):
    cases = {
        r"SampleAndHold\(samples=2\) is not a convolution .* jumps": smooth_layer(4, kernel=nc.SampleAndHold(2)),
        r"MatrixKernel\(4 steps .* is a matrix between two grids": smooth_layer(4, kernel=nc.MatrixKernel(EYE)),
        r"OnTheGrid\(\) is neither K = delta nor a DensityKernel": smooth_layer(4, kernel=OnTheGrid()),
        "missing the required .forward. function": smooth_layer(4, operator=OnlyPropagated()),
        "integrals of order 4 need as many steps, got steps=2": smooth_layer(2, "rk4"),
        "is a map, not a vector field": smooth_layer(4, operator=nc.ReactionDiffusionAdvection(activation="tanh")),
    }
    for reason, layer in cases.items():
        found = kkt.residuals(layer, z0, energy)
        assert found.continuous == {}
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found.reason)
    dynamics = nn.Sequential(nn.Linear(4, 4), nc.PerStep(nn.LayerNorm(4), 2)).double()
    assert "PerStep" in kkt.residuals(nc.CoupledODE(dynamics, steps=2), z0, energy).reason


def test_the_layer_and_the_random_numbers_are_left_alone(z0):
    """Dropout, running statistics, per-step normalisations: nothing moves, and all computations see the same noise."""
    dynamics = nn.Sequential(nn.Linear(4, 4), nc.PerStep(nn.BatchNorm1d(4), 3), nn.Dropout(0.4), nn.Linear(4, 4))
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=3, method="midpoint").double()
    layer(z0).sum().backward()
    before = copy.deepcopy(layer.state_dict()), [p.grad.clone() for p in layer.parameters()], layer.stats
    state, adjoint = torch.get_rng_state(), layer.adjoint
    found = kkt.multipliers(layer, z0, energy).gradients()
    assert max(kkt.residuals(layer, z0, energy, layer.regularization).discrete.values()) < 1e-12
    assert kkt.check(layer, z0, energy, show=False).exact
    assert torch.equal(state, torch.get_rng_state())
    assert layer.adjoint is adjoint
    assert layer.stats is before[2]
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), layer.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(before[1], layer.parameters(), strict=True))
    exact = oracle.gradients(energy(layer(z0)), dict(layer.named_parameters()))
    assert oracle.largest_error({name: found[name] for name in exact}, exact) < 1e-11


def test_frozen_parameters_have_multipliers_all_the_same(z0):
    layer = smooth_layer(3)
    expected = kkt.multipliers(layer, z0, energy).gradients()
    layer.requires_grad_(False)
    with torch.no_grad():
        found = kkt.multipliers(layer, z0, energy).gradients()
    assert oracle.largest_error(found, expected) < 1e-13
    assert not any(p.requires_grad for p in layer.parameters())


def test_check_compares_and_prints(z0, capsys):
    layer = smooth_layer(4, "rk4")
    result = kkt.check(layer, z0)
    printed = capsys.readouterr().out
    assert printed == f"{result.table}\n"
    # What print(nc.kkt.check(layer, z0)), or a notebook, shows after that.
    assert str(result) == repr(result) == result.verdict == printed.splitlines()[-1]
    for word in ("z0", "w0", "static", *kkt.METHODS, "DTO equals autograd up to rounding"):
        assert word in printed
    assert result.exact
    assert {name: group.size for name, group in result.groups.items()} == {"z0": 12, "w0": 40, "p": 8, "static": 9}
    exact = kkt.multipliers(layer, z0, comparison.probe(z0)).gradients()
    assert result.groups["z0"].norm == pytest.approx(float(exact["z0"].norm()), rel=1e-12)
    for group in result.groups.values():
        assert group.errors["DTO"] < 1e-13
        assert 1e-10 < group.errors["continuous"] < 1e-2
        assert group.errors["differences"] < 1e-4
    assert str(kkt.check(layer, z0, show=False)) == result.table
    assert capsys.readouterr().out == ""


def test_check_says_where_the_continuous_adjoint_is_not_defined(z0):
    result = kkt.check(smooth_layer(operator=nc.ReactionDiffusionAdvection(activation="tanh")), z0, show=False)
    assert result.exact
    assert result.groups["w0"].errors["continuous"] is None
    assert "not defined" in str(result)
    assert "is a map, not a vector field" in result.reason
    static = kkt.check(smooth_layer(operator=nc.Static()), z0, show=False)
    assert list(static.groups) == ["z0", "w0", "static"]


@dataclass(frozen=True)
class Inexact(nc.DiscreteAdjoint):
    """A discrete adjoint that is wrong by a relative error."""

    error: float = 1e-6

    def integrate(self, problem):
        states, stats = super().integrate(problem)
        return [tuple(part + self.error * (part - part.detach()) for part in state) for state in states], stats


@pytest.mark.parametrize("error", [1e-6, math.nan])
def test_check_notices_an_adjoint_that_is_not_exact(error, z0):
    layer = smooth_layer(adjoint=Inexact(error=error))
    result = kkt.check(layer, z0, show=False)
    assert not result.exact
    assert "DTO DIFFERS from autograd" in str(result)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer, z0: kkt.multipliers(layer, z0, lambda z: z), ValueError, r"loss .* scalar, got shape \(3, 4\)"),
        (lambda layer, z0: kkt.check(layer, z0, lambda z: 1.0), TypeError, "loss must return a scalar tensor"),
        (lambda layer, z0: kkt.residuals(layer, z0, energy, lambda: 0), TypeError, "regularizer must return"),
        (lambda layer, z0: kkt.multipliers(layer, z0.long(), energy), TypeError, "z0 must be a floating-point tensor"),
        (lambda layer, z0: kkt.check(layer, z0.float()), ValueError, "z0 is torch.float32, the weights"),
        (
            lambda layer, z0: kkt.residuals(layer, z0, energy, inserted=kkt.multipliers(layer, z0[:1], energy)),
            ValueError,
            "inserted multipliers must have the shapes",
        ),
    ],
)
def test_bad_input_is_named(call, error, message, z0):
    with pytest.raises(error, match=message):
        call(smooth_layer(), z0)


def growing(steps=200, t=(0.0, 1.0)) -> nc.CoupledODE:
    """w(t) = w0 exp(t / 2)."""
    layer = nc.CoupledODE(
        nn.Linear(3, 3), nc.ReactionDiffusionAdvection(diffusion=False, advection=False), steps=steps, t=t
    ).double()
    nn.init.constant_(layer.field.operator("weight").reaction, 0.5)
    return layer


def test_the_penalties_on_the_path_are_the_integrals_that_they_say():
    """Against the closed form: the displacement exactly, the kinetic energy at second order in the weight step."""
    layer = growing()
    size = float(layer.field.dynamics.weight.detach().square().sum())
    displacement = layer.regularization(0.0, 0.0, displacement=3.0).item()
    assert displacement == pytest.approx(1.5 * size * (math.exp(0.5) - 1) ** 2, rel=1e-12)
    errors = []
    for steps in (10, 20):
        layer = growing(steps)
        size = float(layer.field.dynamics.weight.detach().square().sum())
        kinetic = layer.regularization(0.0, 0.0, kinetic=2.0).item()
        errors.append(abs(kinetic / size - 0.25 * (math.exp(1.0) - 1)))
    assert math.log2(errors[0] / errors[1]) > 1.9


def test_the_penalties_are_differentiable_and_vanish_where_nothing_moves():
    layer = growing(4)
    tensors = dict(layer.named_parameters())
    names = ["field.dynamics.weight", "field.evolution.weight.reaction"]

    def penalty(*given):
        values = dict(zip(names, given, strict=True))
        return torch.func.functional_call(_Penalty(layer), {f"layer.{name}": v for name, v in values.items()}, ())

    torch.autograd.gradcheck(penalty, [tensors[name].detach().clone().requires_grad_() for name in names])
    assert growing(4, t=(1.0, 0.0)).regularization(0.0, 0.0, kinetic=1.0).item() > 0
    still = nc.CoupledODE(nn.Linear(3, 3), steps=4)
    assert still.regularization(0.0, 0.0, kinetic=1.0, displacement=1.0).item() == 0.0


class _Penalty(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.regularization(0.5, 2.0, kinetic=1.5, displacement=0.7)


@pytest.mark.parametrize("name", ["w0", "p", "kinetic", "displacement"])
def test_weights_of_the_regulariser_are_not_negative(name):
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be zero or a positive finite number, got {name}={value}"):
            growing(2).regularization(**{name: value})


def test_the_command_checks_every_coupled_layer():
    done = run("check", "--model", "resnet10", "--variant", "anodev2-2", "--method", "midpoint")
    assert done.exit_code == 0, done.output
    assert "layer 5 of resnet10 anodev2-2, z0 of shape (4, 16, 32, 32), float64" in done.stdout
    assert done.stdout.count("DTO equals autograd up to rounding") == 2


def test_the_command_fails_where_dto_is_not_exact(monkeypatch):
    monkeypatch.setattr(comparison, "DiscreteAdjoint", Inexact)
    done = run("check", "--variant", "node", "--steps", "1")
    assert done.exit_code == cli.FAILED
    assert "DTO DIFFERS" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vgg"], "unknown model 'vgg'"),
        (["--variant", "baseline"], "variant 'baseline' has no coupled layers to check: choose anode"),
        (["--dtype", "half"], "unknown dtype 'half': choose one of float64, float32"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
    ],
)
def test_the_command_names_bad_input(options, message):
    done = run("check", *options)
    assert done.exit_code == cli.BAD_INPUT
    assert message in done.stderr


@pytest.mark.parametrize(
    "call",
    [
        kkt.check,
        lambda layer, z0: kkt.multipliers(layer, z0, torch.sum),
        lambda layer, z0: kkt.residuals(layer, z0, torch.sum),
    ],
)
def test_what_is_no_coupled_layer_is_refused(call):
    with pytest.raises(TypeError, match=r"layer must be a CoupledODE, got Linear: of a model give one of nc.models"):
        call(nn.Linear(2, 2), torch.ones(1, 2))
