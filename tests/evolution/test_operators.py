"""Every evolution operator beside reaction-diffusion-advection: closed forms against integration, how they start, and
how they work inside of a coupled solve; and what is said where weights leave the range of their dtype."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import neuralode_coupled as nc
from neuralode_coupled.evolution import (
    ConvEvolution,
    HyperNetwork,
    LinearEvolution,
    MLPEvolution,
    NonFiniteWeights,
    check_finite,
)
from tests.helpers import oracle

SHAPES = st.sampled_from([(4, 3, 5), (3, 2, 3, 3), (2, 3, 2, 4), (3, 1, 2, 3, 2), (3, 4)])
SEEDS = st.integers(0, 2**20)
TIMES = st.floats(-1.0, 1.0)


class Spinning(nn.Module):
    """A user's own time-dependent q, with a parameter."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7))

    def forward(self, t, w):
        return self.rate * torch.cos(3 * t) * w


LINEAR = {
    "pixels": lambda: LinearEvolution("pixels"),
    "pixels of each filter": lambda: LinearEvolution("pixels", per="filter"),
    "channels": lambda: LinearEvolution("channels", rank=2),
}
NETWORKS = {
    "convolution": lambda: ConvEvolution(4),
    "convolution, zeros": lambda: ConvEvolution(2, 5, padding="zeros"),
    "perceptron": lambda: MLPEvolution(5),
    "perceptron of t": lambda: MLPEvolution(5, time=True),
    "perceptron on filters": lambda: MLPEvolution(3, time=True, scope="filter"),
}
OPERATORS = LINEAR | NETWORKS | {"hypernetwork": lambda: HyperNetwork(3, 4), "of one's own": Spinning}


def randomized(module, scale=0.3):
    """Random parameters everywhere: at their initial zeros half of the mathematics is invisible."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module


def linear(kind, shape, seed, scale=0.2):
    torch.manual_seed(seed)
    w = torch.randn(shape, dtype=torch.float64)
    return randomized(LINEAR[kind]().bind(w), scale), w


def integrated(operator, w, t):
    """dw/dt = q(t, w) from 0 to t, by torchdiffeq."""
    span = torch.tensor([0.0, t], dtype=w.dtype)
    return torchdiffeq.odeint(operator, w, span, method="dopri5", rtol=1e-11, atol=1e-12)[-1]


def layer(operator, **options):
    """A small coupled layer in float64 with evolving convolutions of one shape."""
    dynamics = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1, bias=False)
    ).double()
    return nc.CoupledODE(dynamics, operator, **({"steps": 3, "method": "midpoint"} | options)).double()


def small_state():
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)


# Linear operators


@pytest.mark.parametrize("kind", LINEAR)
@settings(max_examples=10)
@given(shape=SHAPES, seed=SEEDS, t=st.floats(0.1, 1.0))
def test_closed_forms_solve_the_equation(kind, shape, seed, t):
    operator, w = linear(kind, shape, seed)
    assert torch.allclose(operator.propagate(w, t), integrated(operator, w, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", LINEAR)
@given(shape=SHAPES, seed=SEEDS, s=TIMES, t=TIMES)
def test_linear_flows_are_semigroups_and_reach_all_times_at_once(kind, shape, seed, s, t):
    operator, w = linear(kind, shape, seed)
    path = operator.trajectory(w, torch.tensor([0.0, s, s + t], dtype=w.dtype))
    assert path.shape == (3, *shape)
    for time, at in zip((0.0, s, s + t), path, strict=True):
        # torch's exponential of one matrix alone is off by 3e-12 at some sizes, where that of a batch is exact.
        assert torch.allclose(at, operator.propagate(w, time), rtol=1e-10, atol=1e-10)
    assert torch.allclose(path[2], operator.propagate(path[1], t), rtol=1e-9, atol=1e-10)


def test_a_rotation_of_the_pixels():
    """A = [[0, -a], [a, 0]] turns the plane of two pixels by the angle a t."""
    operator = LinearEvolution().bind(torch.zeros(1, 1, 2, dtype=torch.float64))
    with torch.no_grad():
        operator.matrix.copy_(torch.tensor([[0.0, -math.pi / 2], [math.pi / 2, 0.0]], dtype=torch.float64))
    w = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    path = operator.trajectory(w, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert torch.allclose(path[:, 0, 0], torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).double(), atol=1e-12)


@given(seed=SEEDS)
def test_a_low_rank_matrix_is_the_dense_one(seed):
    """exp(U V^T t) by the r x r formula and by the series of the whole matrix; also where V^T U is singular."""
    operator, w = linear("channels", (4, 2, 3, 3), seed)
    if seed % 2:
        with torch.no_grad():
            operator.right[:, 0] = 0
    # By its series: torch.linalg.matrix_exp is off by up to 1e-10 where the matrix is small.
    term = whole = torch.eye(4, dtype=torch.float64)
    for k in range(1, 80):
        term = term @ (0.8 * operator.left @ operator.right.mT) / k
        whole = whole + term
    assert torch.allclose(operator.propagate(w, 0.8), torch.tensordot(whole, w, dims=1), rtol=1e-11, atol=1e-12)


def test_reaction_diffusion_advection_is_a_linear_operator():
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    special = oracle.randomize(nc.ReactionDiffusionAdvection(scope="layer").bind(w), 0.3)
    general = LinearEvolution().bind(w)
    pixels = torch.eye(9, dtype=w.dtype).reshape(9, 1, 3, 3)
    with torch.no_grad():
        general.matrix.copy_(special(torch.zeros(()), pixels).reshape(9, 9).mT)
    assert torch.allclose(general.propagate(w, 0.9), special.propagate(w, 0.9), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_the_gradient_of_a_linear_flow_is_linear_in_what_arrives(kind, size):
    """Whatever gradient scaling makes of the loss: torch's own derivative of the exponential was 11% off at 2^16."""
    operator, w = linear(kind, (4, 3, 3, 3), 0, size)
    exact = copy.deepcopy(operator)
    operator, w32, arriving = operator.float(), w.float(), torch.randn(4, 3, 3, 3)

    def gradients(operator, w, scale):
        path = operator.trajectory(w, torch.tensor([0.3, 1.0], dtype=w.dtype))
        found = torch.autograd.grad((path * arriving.to(w)).sum() * scale, list(operator.parameters()))
        return torch.cat([gradient.flatten() for gradient in found]) / scale

    at_one, wanted = gradients(operator, w32, 1.0), gradients(exact, w, 1.0)
    for scale in (2.0**-30, 2.0**10, 2.0**16, 2.0**24):
        assert torch.equal(gradients(operator, w32, scale), at_one)
    assert (at_one - wanted).norm() <= 2e-6 * wanted.norm()


def test_one_matrix_for_every_filter_moves_it_alone():
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    operator = LinearEvolution(per="filter").bind(w)
    with torch.no_grad():
        operator.matrix[1].fill_diagonal_(math.log(2))
    moved = operator.propagate(w, 1.0)
    assert torch.allclose(moved[1], 2 * w[1])
    assert torch.equal(moved[[0, 2]], w[[0, 2]])


# How operators start, and what they are made of


@pytest.mark.parametrize("kind", LINEAR | NETWORKS)
@given(shape=SHAPES)
@settings(max_examples=10)
def test_training_starts_from_the_neural_ode(kind, shape):
    """q = 0 to the last bit, and yet some gradient of a parameter is not."""
    if "convolution" in kind:
        shape = tuple(max(n, 3) for n in shape)
    w = torch.randn(shape)
    operator = OPERATORS[kind]().bind(w)
    dw = operator(torch.tensor(0.3), w)
    assert torch.equal(dw, torch.zeros_like(w))
    if kind in LINEAR:
        assert torch.equal(operator.propagate(w, 0.8), w)
    slopes = torch.autograd.grad((dw * torch.randn_like(w)).sum(), list(operator.parameters()), allow_unused=True)
    assert any(slope is not None and slope.abs().max() > 0 for slope in slopes)


@pytest.mark.parametrize(
    ("operator", "shape", "count"),
    [
        (LinearEvolution(), (4, 3, 3, 3), 9**2),
        (LinearEvolution(per="filter"), (4, 3, 3, 3), 4 * 9**2),
        (LinearEvolution(), (4, 3), 12**2),
        (LinearEvolution("channels", rank=2), (4, 3, 3, 3), 2 * 4 * 2),
        (LinearEvolution("channels", rank=1), (4,), 8),
        (ConvEvolution(2), (4, 3, 3, 3), (3 * 9 * 2 + 2) + (2 * 9 * 3 + 3)),
        (ConvEvolution(2), (4, 5), (9 * 2 + 2) + (2 * 9 + 1)),
        (ConvEvolution(2, 1), (4, 3, 7), (3 * 2 + 2) + (2 * 3 + 3)),
        (MLPEvolution(5), (4, 3, 3, 3), (9 * 5 + 5) + (5 * 9 + 9)),
        (MLPEvolution(5, time=True), (4, 3, 3, 3), (10 * 5 + 5) + (5 * 9 + 9)),
        (MLPEvolution(5, scope="filter"), (4, 3, 3, 3), (27 * 5 + 5) + (5 * 27 + 27)),
        (MLPEvolution(5), (4, 3), (3 * 5 + 5) + (5 * 3 + 3)),
        (HyperNetwork(2, 5), (4, 3, 3, 3), 2 + 3 * 5 * (2 + 1) + 4 * 9 * (5 + 1)),
    ],
)
def test_parameters_are_as_many_as_documented(operator, shape, count):
    assert sum(p.numel() for p in operator.bind(torch.randn(shape)).parameters()) == count


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_take_shape_and_dtype_from_the_weight(kind, dtype):
    w = torch.randn(3, 4, 3, 3, dtype=dtype)
    operator = OPERATORS[kind]()
    bound = operator.bind(w) if isinstance(operator, nc.EvolutionOperator) else operator.to(dtype)
    dw = bound(torch.tensor(0.5, dtype=dtype), w)
    assert dw.shape == w.shape
    assert dw.dtype == dtype
    assert {p.dtype for p in bound.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("operator", "text"),
    [
        (LinearEvolution(per="filter"), "scope='pixels', per='filter'"),
        (LinearEvolution("channels", rank=2), "scope='channels', rank=2"),
        (nc.ReactionDiffusionAdvection(), "form='propagator', activation='identity', scope='filter', diffusion, adv"),
        (nc.ReactionDiffusionAdvection("ode", "tanh"), "form='ode', activation='tanh', scope='filter'"),
        (nc.ReactionDiffusionAdvection("ode", torch.sin), "form='ode', activation=sin, scope='filter'"),
        (nc.ReactionDiffusionAdvection("ode", nn.PReLU()), "(sigma): PReLU(num_parameters=1)"),
        (nc.ReactionDiffusionAdvection(nonnegative_diffusion=True), "reaction, nonnegative_diffusion=True"),
        (ConvEvolution(4), "hidden=4, kernel_size=3, padding='circular'"),
        (MLPEvolution(4, time=True), "hidden=4, time=True, scope='kernel'"),
        (HyperNetwork(3, 4), "embedding=3, hidden=4"),
    ],
)
def test_operators_show_their_options(operator, text):
    assert text in repr(operator)


# Networks


def test_the_convolutional_block_moves_with_the_pattern():
    """On periodic filters convolutions commute with shifts; with zeros beyond the edge they do not."""
    w = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    t = torch.zeros(())
    shifts = {"dims": (-2, -1), "shifts": (1, 2)}
    for padding, same in (("circular", True), ("zeros", False)):
        q = randomized(ConvEvolution(4, padding=padding).bind(w))
        assert torch.allclose(q(t, torch.roll(w, **shifts)), torch.roll(q(t, w), **shifts)) == same


@pytest.mark.parametrize(("scope", "axes"), [("kernel", 2), ("filter", 1)])
def test_the_perceptron_treats_all_kernels_alike(scope, axes):
    """Any order of kernels (or filters) in gives the same order out; single ones do not see each other."""
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    q = randomized(MLPEvolution(6, scope=scope).bind(w))
    t = torch.zeros(())
    fields = w.flatten(0, axes - 1)
    order = torch.randperm(len(fields))
    assert torch.allclose(q(t, fields[order].reshape(w.shape)), q(t, w).flatten(0, axes - 1)[order].reshape(w.shape))


def test_the_perceptron_sees_the_time_only_where_asked():
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    for time in (True, False):
        q = randomized(MLPEvolution(6, time=time).bind(w))
        early, late = (q(torch.tensor(t, dtype=w.dtype), w) for t in (0.0, 1.0))
        assert torch.equal(early, late) == (not time)


# The hypernetwork


def test_one_step_with_a_network_gives_the_hypernetwork():
    """Euler, one step: theta is the generated weights throughout, whatever w0, as in Ha, Dai and Le."""
    hyper = layer(
        HyperNetwork(3, 4), kernel=nc.SampleAndHold(1), steps=4, weight_steps=1, weight_method="euler", method="euler"
    )
    z0 = small_state()
    weights = {name: hyper.field.operator(name).generated() for name in hyper.field.names}
    z = z0
    for _ in range(4):
        z = z + 0.25 * functional_call(hyper.field.dynamics, weights, (z,))
    assert torch.allclose(hyper(z0), z, rtol=1e-12, atol=1e-12)
    found = oracle.gradients(hyper(z0).square().sum(), dict(hyper.named_parameters()))
    assert found["field.dynamics.0.weight"].abs().max() < 1e-14
    for part in ("embedding", "project.weight", "generate.weight"):
        assert found[f"field.evolution.0/weight.{part}"].abs().max() > 0


def test_generated_weights_are_two_linear_layers_of_the_embedding():
    """g(e)[:, i] = W_out (W_i e + B_i) + B_out, written out for one input channel after the other."""
    q = randomized(HyperNetwork(3, 4).bind(torch.randn(5, 2, 3, 3, dtype=torch.float64)), 1.0)
    for i in range(2):
        rows = slice(4 * i, 4 * (i + 1))
        a = q.project.weight[rows] @ q.embedding + q.project.bias[rows]
        assert torch.allclose(q.generated()[:, i].flatten(), q.generate.weight @ a + q.generate.bias)


def test_with_more_steps_weights_relax_to_the_generated_ones():
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    q = HyperNetwork(3, 4).bind(w)
    expected = q.generated() + math.exp(-0.7) * (w - q.generated())
    assert torch.allclose(integrated(q, w, 0.7), expected, rtol=1e-9, atol=1e-10)


def test_generated_weights_start_about_as_large_as_the_parameter():
    w = 0.05 * torch.randn(64, 32, 3, 3)
    size = HyperNetwork(8, 16).bind(w).generated().square().mean().sqrt()
    assert 0.01 < size < 0.25


def test_layers_share_the_generator_and_have_their_own_embeddings():
    shared = HyperNetwork(3, 4)
    both = layer({"*": shared})
    first, second = (both.field.operator(name) for name in both.field.names)
    assert first.generate is second.generate
    assert first.project is second.project
    assert first.embedding is not second.embedding
    alone = sum(p.numel() for p in first.parameters())
    assert sum(p.numel() for p in both.field.evolution.parameters()) == alone + 3
    with pytest.raises(ValueError, match=r"cannot be shared with one of shape \(3, 3, 5, 5\)"):
        shared.bind(torch.randn(3, 3, 5, 5))


# In a coupled solve


@pytest.mark.parametrize("kind", OPERATORS)
@settings(max_examples=5)
@given(seed=SEEDS, kernel=st.sampled_from([nc.Dirac(), nc.SampleAndHold(2)]), method=st.sampled_from(["euler", "rk4"]))
def test_the_discrete_adjoint_is_unrolled_autograd(kind, seed, kernel, method):
    torch.manual_seed(seed)
    coupled = randomized(layer(OPERATORS[kind](), kernel=kernel, steps=2, method=method), 0.2)
    z0 = small_state()
    tensors = {"z0": z0, **dict(coupled.named_parameters())}
    found = []
    for adjoint in (nc.DiscreteAdjoint(), nc.Backprop()):
        coupled.adjoint = adjoint
        found.append(oracle.gradients(coupled(z0).square().sum(), tensors))
    assert oracle.largest_error(*found) < 1e-12


@pytest.mark.parametrize("kind", OPERATORS)
def test_torchdiffeq_integrates_the_same_system(kind):
    """dopri5 at tight tolerances on the augmented field, and our own fine grid; time-dependent operators included."""
    coupled = randomized(layer(OPERATORS[kind]()), 0.2)
    z0 = small_state()
    ours = nc.solve(coupled.field, z0, steps=64, method="rk4")
    span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    state = torchdiffeq.odeint(coupled.field, coupled.field.initial_state(z0), span, rtol=1e-10, atol=1e-10)
    theirs = coupled.field.activation(state)[-1]
    assert torch.allclose(ours.z, theirs, rtol=1e-6, atol=1e-6)
    weights = ours.weights([1.0])
    for name, w in coupled.field.weights(tuple(part[-1] for part in state)).items():
        assert torch.allclose(weights[name][0], w, rtol=1e-6, atol=1e-6)
        assert (weights[name][0] - coupled.field.evolving()[name]).abs().max() > 1e-4
    tensors = {"z0": z0, **dict(coupled.named_parameters())}
    assert (
        oracle.largest_error(
            oracle.gradients(theirs.square().sum(), tensors), oracle.gradients(ours.z.square().sum(), tensors)
        )
        < 1e-5
    )


@pytest.mark.parametrize("t", [(0.0, 1.0), (0.5, -0.25)])
def test_time_dependent_operators_see_the_time_of_the_solve(t):
    """w' = r cos(3t) w has w(t) = w0 exp(r (sin 3t - sin 3t0) / 3)."""
    coupled = layer(Spinning(), steps=32, t=t, method="rk4_classic")
    w0 = coupled.field.dynamics[0].weight
    expected = w0 * math.exp(0.7 * (math.sin(3 * t[1]) - math.sin(3 * t[0])) / 3)
    found = coupled.weight_trajectory([t[1]])["0.weight"][0]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_different_operators_by_pattern():
    coupled = layer({"0.*": MLPEvolution(3), "2.weight": LinearEvolution("channels", rank=1)})
    assert isinstance(coupled.field.operator("0.weight"), MLPEvolution)
    assert isinstance(coupled.field.operator("2.weight"), LinearEvolution)
    assert coupled(small_state()).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("kind", [name for name in OPERATORS if name != "hypernetwork"])
def test_layers_of_one_shape_can_share_an_operator(kind):
    """The gradient of shared coefficients is the sum of what each layer alone would give."""
    shared = randomized(layer({"*": OPERATORS[kind]()}), 0.2)
    own = layer(OPERATORS[kind]())
    assert shared.field.operator("0.weight") is shared.field.operator("2.weight")
    own.field.dynamics.load_state_dict(shared.field.dynamics.state_dict())
    for operator in own.field.evolution.values():
        operator.load_state_dict(shared.field.operator("0.weight").state_dict())
    z0 = small_state()
    together, apart = (
        oracle.gradients(coupled(z0).square().sum(), dict(coupled.field.evolution.named_parameters()))
        for coupled in (shared, own)
    )
    for name, gradient in together.items():
        part = name.removeprefix("0/weight.")
        assert torch.allclose(gradient, apart[f"0/weight.{part}"] + apart[f"2/weight.{part}"], rtol=1e-10, atol=1e-12)


# Closed forms over many steps


@pytest.mark.parametrize("pixels", [(3, 3), (9, 9)], ids=["dense", "FFT"])
@pytest.mark.parametrize(("method", "lengths"), [("euler", 1), ("midpoint", 2), ("rk4", 3)])
def test_a_nonlinear_propagator_is_built_once_for_each_length_of_step(pixels, method, lengths, monkeypatch):
    """Whatever the number of steps; and the weights are those of one ``propagate`` after the other."""
    dynamics = nn.Conv2d(2, 2, pixels, padding="same").double()
    coupled = oracle.randomize(
        nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(activation="tanh"), steps=5, method=method)
    )
    operator, w, built = coupled.field.operator("weight"), dynamics.weight, []
    build = operator.spectrum.propagator
    with monkeypatch.context() as patch:
        patch.setattr(operator.spectrum, "propagator", lambda times, *rest: built.append(times) or build(times, *rest))
        coupled(torch.randn(1, 2, 9, 9, dtype=torch.float64)).sum().backward()
    assert len(built) == lengths
    for n, found in enumerate(coupled.weight_trajectory([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])["weight"]):
        assert torch.allclose(found, w, rtol=1e-12, atol=1e-14), n
        w = operator.propagate(w, 0.2)


class Halving(nn.Module):
    """A user's own map with a closed form whose expensive part depends on the step's length alone."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))
        self.made = []

    def forward(self, t, w):
        return -self.rate * w

    def propagate(self, w, dt):
        return self.propagator(dt, w)(w)

    def propagator(self, dt, like):
        self.made.append(dt)
        factor = torch.exp(-self.rate * dt).to(like)
        return lambda w: factor * w


def test_an_operator_of_ones_own_may_prepare_its_steps():
    """The prepared steps give what the numerical solution tends to, with the gradient of all steps together."""
    coupled = layer(Halving(), steps=4, method="euler")
    z0, operator = small_state(), coupled.field.operator("0.weight")
    z = coupled(z0)
    assert operator.made == [0.25]
    (found,) = torch.autograd.grad(z.square().sum(), operator.rate)
    expected = nc.kkt.multipliers(coupled, z0, lambda z: z.square().sum()).gradients()
    assert float(found) == pytest.approx(float(expected["field.evolution.0/weight.rate"]), rel=1e-11)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearEvolution("rows"), "unknown scope 'rows': choose one of pixels, channels"),
        (lambda: LinearEvolution(per="kernel"), "unknown per 'kernel': choose one of layer, filter"),
        (lambda: LinearEvolution("pixels", rank=2), "rank=2 belongs to scope='channels'"),
        (lambda: LinearEvolution("channels"), "needs a rank of at least 1, a whole number, got rank=None"),
        (lambda: LinearEvolution("channels", rank=True), "needs a rank of at least 1, a whole number, got rank=True"),
        (lambda: ConvEvolution(2, kernel_size=True), "kernel_size must be odd and positive.*got True"),
        (lambda: LinearEvolution("channels", rank=0), "needs a rank of at least 1, a whole number, got rank=0"),
        (lambda: LinearEvolution("channels", rank=1, per="filter"), "per='filter' belongs to scope='pixels'"),
        (lambda: ConvEvolution(0), "hidden must be a whole number of at least 1, got 0"),
        (lambda: ConvEvolution(2, 4), "kernel_size must be odd and positive.*got 4"),
        (lambda: ConvEvolution(2, 2.5), "kernel_size must be odd and positive, a whole number.*got 2.5"),
        (lambda: ConvEvolution(2, "3"), "kernel_size must be odd and positive, a whole number.*got '3'"),
        (lambda: ConvEvolution(2, padding="same"), "unknown padding 'same': choose one of circular, zeros"),
        (lambda: MLPEvolution(-1), "hidden must be a whole number of at least 1, got -1"),
        (lambda: MLPEvolution(2, scope="layer"), "unknown scope 'layer': choose one of kernel, filter"),
        (lambda: HyperNetwork(0, 4), "embedding must be a whole number of at least 1, got 0"),
        (lambda: HyperNetwork(4, 0), "hidden must be a whole number of at least 1, got 0"),
        (lambda: HyperNetwork(2.5, 4), "embedding must be a whole number of at least 1, got 2.5"),
        (lambda: ConvEvolution(1.5), "hidden must be a whole number of at least 1, got 1.5"),
        (lambda: MLPEvolution("3"), "hidden must be a whole number of at least 1, got '3'"),
        (lambda: LinearEvolution("channels", rank=1.5), "needs a rank of at least 1, a whole number, got rank=1.5"),
    ],
)
def test_unknown_options_name_the_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        (LinearEvolution(), (7,), r"needs a weight of at least 2 axes, got \(7,\)"),
        (LinearEvolution("channels", rank=1), (), r"needs a weight of at least 1 axes, got \(\)"),
        (LinearEvolution("channels", rank=5), (4, 3), "rank=5 is above the 4 output channels"),
        (LinearEvolution(), (64, 64), "over the 4096 pixels .* use scope='channels' with a rank"),
        (ConvEvolution(2), (7,), r"a weight of 2 to 5 axes, .* got \(7,\)"),
        (ConvEvolution(2), (1, 1, 2, 2, 2, 2), "a weight of 2 to 5 axes"),
        (ConvEvolution(2, 5), (4, 3, 1, 1), r"kernel_size=5 reaches around filters of \(1, 1\) pixels.*at most 3"),
        (MLPEvolution(2), (7,), r"needs a weight of at least 2 axes.*got \(7,\)"),
        (HyperNetwork(2, 2), (7,), r"needs a weight of at least 2 axes.*got \(7,\)"),
    ],
)
def test_operators_refuse_weights_they_cannot_evolve(operator, shape, message):
    with pytest.raises(ValueError, match=message):
        operator.bind(torch.randn(shape))


@pytest.mark.parametrize(
    ("operator", "first", "fits", "misfit"),
    [
        (LinearEvolution(), (4, 3, 3, 3), (2, 5, 3, 3), (4, 3, 5, 5)),
        (LinearEvolution(per="filter"), (4, 3, 3, 3), (4, 5, 3, 3), (2, 3, 3, 3)),
        (LinearEvolution("channels", rank=1), (4, 3, 3, 3), (4, 7), (3, 3, 3, 3)),
        (ConvEvolution(2), (4, 3, 3, 3), (2, 3, 5, 5), (4, 2, 3, 3)),
        (MLPEvolution(2), (4, 3, 3, 3), (2, 5, 3, 3), (4, 3, 5, 5)),
    ],
)
def test_shared_operators_refuse_weights_that_do_not_fit(operator, first, fits, misfit):
    operator.bind(torch.randn(first))
    assert operator.bind(torch.randn(fits)) is operator
    other = torch.randn(fits)
    assert operator(torch.zeros(()), other).shape == other.shape
    with pytest.raises(ValueError, match=r"cannot be shared with one of shape .* give that one an operator of its own"):
        operator.bind(torch.randn(misfit))


@pytest.mark.parametrize(
    "activation",
    [lambda x: x.sum(), nn.Softmax(dim=-1), lambda x: x - x.mean(), nn.Linear(3, 3), lambda x: 1.0, lambda x, y: x],
)
def test_activations_must_be_elementwise(activation):
    with pytest.raises(ValueError, match="is not elementwise"):
        nc.ReactionDiffusionAdvection(form="ode", activation=activation)


def test_activations_are_names_or_functions():
    for wrong, shown in ((3, "3"), (nn.Tanh, "<class .*Tanh'>")):
        message = rf"one of identity, tanh, sigmoid or a function \(of a class, one instance\), got {shown}"
        with pytest.raises(TypeError, match=message):
            nc.ReactionDiffusionAdvection(activation=wrong)


@pytest.mark.parametrize("activation", [torch.log, torch.sqrt, nn.ReLU(inplace=True)])
def test_activations_need_not_be_defined_everywhere(activation):
    """A logarithm is elementwise, though it is NaN below zero."""
    w = torch.rand(2, 2, 3, 3, dtype=torch.float64) + 1
    q = nc.ReactionDiffusionAdvection(activation=activation).bind(w)
    assert torch.allclose(q.propagate(w, 1.0), activation(w.clone()))


def test_an_activation_with_parameters_is_trained():
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    q = nc.ReactionDiffusionAdvection(form="ode", activation=nn.PReLU().double()).bind(w)
    oracle.randomize(q)
    q(torch.zeros(()), w).square().sum().backward()
    assert q.sigma.weight.grad.abs() > 0


class Given(nn.Module):
    """A user's own q, by a function of w."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, t, w):
        return self.q(w)


class GivenMap(Given):
    def propagate(self, w, dt):
        return self.q(w)


@pytest.mark.parametrize("make", [Given, GivenMap])
@pytest.mark.parametrize(
    ("q", "made"), [(lambda w: w.sum(0), r"\(4,\)"), (lambda w: w.flatten(), r"\(16,\)"), (lambda w: (w,), "tuple")]
)
def test_operators_must_keep_the_shape_of_the_weight(make, q, made):
    """One that does not is not broadcast."""
    coupled = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), make(q), steps=2)
    message = rf"operator {make.__name__} must keep the shape of the weight: it made {made} of \(4, 4\)"
    z0 = torch.randn(2, 4)
    state = coupled.field.initial_state(z0)
    for use in (lambda: coupled(z0), lambda: coupled.field(torch.zeros(()), state)):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("evolution", [nc.ReactionDiffusionAdvection, "static", 3])
def test_evolution_is_an_operator_a_mapping_or_a_function(evolution):
    message = r"evolution must be an operator such as .* \(an instance, not the class\).*got .*(Advection|static|3)"
    with pytest.raises(TypeError, match=message):
        nc.CoupledODE(nn.Linear(4, 4), evolution, steps=2)


# Weights out of range


@pytest.mark.parametrize(
    ("scope", "index", "where"),
    [("layer", (), "every field"), ("filter", (1,), "filter 1"), ("kernel", (1, 2), r"kernel \(1, 2\)")],
)
def test_a_propagator_that_overflows_says_which_filter_and_mode(scope, index, where):
    """Negative diffusion grows the highest frequency: the Nyquist mode of the even axis, the last of the odd one."""
    w = torch.randn(2, 3, 4, 3)
    q = nc.ReactionDiffusionAdvection(scope=scope).bind(w)
    with torch.no_grad():
        q.diffusion[index] = -50.0
    with pytest.raises(
        NonFiniteWeights, match=rf"overflows torch.float32: Fourier mode \(2, [12]\) of {where} grows by exp\(7"
    ):
        q.propagate(w, 1.0)
    assert q.propagate(w, 0.05).isfinite().all()
    assert nc.ReactionDiffusionAdvection(scope=scope).bind(w.double()).propagate(w.double(), 1.0).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("term", ["diffusion", "reaction"])
def test_coefficients_that_are_no_numbers_say_which_filter(term, value):
    w = torch.randn(3, 2, 3, 3)
    q = nc.ReactionDiffusionAdvection().bind(w)
    with torch.no_grad():
        getattr(q, term)[1] = value
    with pytest.raises(NonFiniteWeights, match=r"Fourier mode \(\d, \d\) of filter 1 grows by exp\((nan|inf)\)"):
        q.trajectory(w, torch.tensor([0.0, 1.0]))


def test_overflow_backwards_in_time_is_seen_too():
    w = torch.randn(3, 2, dtype=torch.float64)
    q = nc.ReactionDiffusionAdvection(diffusion=False, advection=False).bind(w)
    nn.init.constant_(q.reaction, 800.0)
    with pytest.raises(ValueError, match=r"Fourier mode \(0, 0\) of every field grows by exp\(800\)"):
        q.trajectory(w, torch.tensor([0.0, 1.0]).double())
    assert q.propagate(w, -1.0).abs().max() < 1e-14
    nn.init.constant_(q.reaction, -800.0)
    with pytest.raises(ValueError, match="grows by exp"):
        q.propagate(w, -1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stages", [(), (2,)])
def test_non_finite_weights_say_the_step_and_the_parameter(bad, stages):
    path = torch.zeros(4, *stages, 2, 3)
    check_finite(path, "conv.weight")
    path[2:, ..., 1, 1] = bad
    with pytest.raises(
        NonFiniteWeights, match=r"weights of 'conv.weight' are NaN or infinite from step 2 on: use more"
    ):
        check_finite(path, "conv.weight")
    path[0, ..., 0, 0] = bad
    with pytest.raises(ValueError, match=r"'conv.weight' are NaN or infinite from the start"):
        check_finite(path, "conv.weight")


class Exploding(nn.Module):
    """dw/dt = 1000 w |w|: beyond every precision within a few steps."""

    def forward(self, t, w):
        return 1e3 * w * w.abs()


@pytest.mark.parametrize(
    ("kernel", "step"),
    [
        (nc.Dirac(), "step 6"),
        (nc.SampleAndHold(2), "weight step 6"),
        (nc.Exponential(2.0), "weight step 6"),
        (nc.Box(0.3), "weight step 6"),
        (nc.MatrixKernel(torch.eye(10, 11)), "weight step 6"),
    ],
    ids=str,
)
def test_a_solve_says_where_weights_blow_up_whatever_the_kernel(kernel, step):
    """An average has infinite terms times zero in every row: the weights' own path says where they begin."""
    coupled = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Exploding(), kernel, steps=10, weight_steps=10)
    nn.init.constant_(coupled.field.dynamics[0].weight, 0.1)
    with pytest.raises(NonFiniteWeights, match=rf"weights of '0.weight' are NaN or infinite from {step} on"):
        coupled(torch.randn(2, 4))
    with torch.no_grad():
        coupled.field.dynamics[0].weight[1, 1] = math.nan
    with pytest.raises(NonFiniteWeights, match=r"'0.weight' are NaN or infinite from the start"):
        coupled(torch.randn(2, 4))


@pytest.mark.parametrize(
    "adjoint",
    [nc.Backprop(), nc.DiscreteAdjoint(weights="recomputed"), nc.ReversibleAdjoint(), nc.ContinuousAdjoint()],
    ids=str,
)
def test_every_gradient_method_says_where_weights_blow_up(adjoint):
    """Behind a tanh infinite weights leave activations finite: nobody else would notice."""
    coupled = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Exploding(), steps=10, adjoint=adjoint)
    nn.init.constant_(coupled.field.dynamics[0].weight, 0.1)
    with pytest.raises(NonFiniteWeights, match=r"weights of '0.weight' are NaN or infinite from step 6 on"):
        coupled(torch.randn(2, 4))


class Ending(nn.Module):
    """dw/dt = sqrt(1/2 - t) w: not a number from t = 1/2 on."""

    def forward(self, t, w):
        return (0.5 - t).sqrt() * w


@pytest.mark.parametrize("adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.ContinuousAdjoint()], ids=str)
@pytest.mark.parametrize("kernel", [nc.Dirac(), nc.SampleAndHold(2), nc.Exponential(2.0)], ids=str)
def test_an_adaptive_solve_says_whose_weights_are_not_finite(kernel, adjoint):
    q = {"0.weight": nc.Static(), "2.weight": Ending()}
    coupled = layer(q, kernel=kernel, steps=None, method="dopri5", rtol=1e-3, atol=1e-3, adjoint=adjoint)
    with pytest.raises(NonFiniteWeights, match=r"weights of '2.weight' are NaN or infinite, .* near t = [01]\.\d"):
        coupled(small_state())


def test_paths_of_weights_that_blow_up_are_not_handed_out():
    """Nor are the penalties on them."""
    coupled = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Exploding(), steps=10)
    nn.init.constant_(coupled.field.dynamics[0].weight, 1e-4)
    solution = nc.solve(coupled.field, torch.randn(2, 4), steps=10)
    nn.init.constant_(coupled.field.dynamics[0].weight, 0.1)
    for use in (coupled.weight_trajectory, solution.weights):
        with pytest.raises(NonFiniteWeights, match=r"'0.weight' are NaN or infinite from requested time 1 on"):
            use([0.0, 0.9])
    with pytest.raises(NonFiniteWeights, match=r"'0.weight' are NaN or infinite from weight step 6 on"):
        coupled.regularization(kinetic=1.0)
    coupled = layer(nc.ReactionDiffusionAdvection())
    nn.init.constant_(coupled.field.operator("2.weight").reaction, 800.0)
    for use in (lambda: coupled.weight_trajectory([1.0]), lambda: coupled.regularization(displacement=1.0)):
        with pytest.raises(NonFiniteWeights, match=r"parameter '2.weight': .* overflows"):
            use()


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("weights", ["stored", "recomputed"])
def test_a_solve_says_whose_coefficients_overflow(activation, weights):
    coupled = layer(nc.ReactionDiffusionAdvection(activation=activation), adjoint=nc.DiscreteAdjoint(weights=weights))
    with torch.no_grad():
        coupled.field.operator("2.weight").diffusion[1] = -2e4
    with pytest.raises(
        NonFiniteWeights,
        match=r"parameter '2.weight': .* overflows torch.float64: Fourier mode \([12], [12]\) of filter 1",
    ):
        coupled(small_state())


def test_large_but_finite_weights_pass():
    """Their sum overflows, they do not."""
    check_finite(torch.full((3, 2), 3e38), "w")


def test_compiled_code_is_not_interrupted_to_look():
    """The checks read values, which would break the graph."""
    w = torch.randn(2, 2, 3, 3)
    q = nc.ReactionDiffusionAdvection().bind(w)

    def path(w):
        found = q.propagate(w, 0.5)
        check_finite(found[None], "w")
        return found

    compiled = torch.compile(path, backend="eager", fullgraph=True)
    assert torch.equal(compiled(w), path(w))


def test_ensembles_of_operators_under_vmap():
    """Under vmap there is no value to look at: the checks stand aside."""
    w = torch.randn(2, 2, 3, 3)
    q = nc.ReactionDiffusionAdvection().bind(w)
    coefficients = {name: 0.1 * torch.randn(3, *p.shape) for name, p in q.named_parameters()}

    def path(coefficients):
        tau, upsilon, rho = (coefficients[name] for name in ("diffusion", "advection", "reaction"))
        times = torch.tensor([0.5])
        q._check_overflow(times, tau, rho)
        found = q.spectrum.propagate(w, times, tau, upsilon, rho)
        check_finite(found, "w")
        return found

    together = torch.func.vmap(path)(coefficients)
    for i in range(3):
        alone = path({name: c[i] for name, c in coefficients.items()})
        assert torch.allclose(together[i], alone, atol=1e-6)


@pytest.mark.parametrize("size", [3, 9], ids=["dense", "fft"])
@pytest.mark.parametrize("form", ["propagator", "ode"])
@pytest.mark.parametrize("begin", ["built on meta", "moved to meta"])
@pytest.mark.parametrize("assign", [False, True])
def test_layers_that_begin_on_meta(size, form, begin, assign):
    """The tables of the operators are in no state dict: they have to be there without one."""

    def make():
        dynamics = nn.Sequential(nn.Conv2d(2, 2, size, padding=size // 2), nn.Tanh())
        return nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(form=form), steps=2)

    source = oracle.randomize(make())
    with torch.device("meta" if begin == "built on meta" else "cpu"):
        layer = make()
    layer = layer.to("meta")
    if not assign:
        layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    z0 = torch.randn(1, 2, 9, 9)
    assert torch.equal(layer(z0), source(z0))
    torch.testing.assert_close(layer.double()(z0.double()), source.double()(z0.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 2, 9, 8)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        nc.Static,
        nc.ReactionDiffusionAdvection,
        lambda: nc.ReactionDiffusionAdvection(activation="tanh"),
        lambda: LinearEvolution("channels", rank=2),
        lambda: LinearEvolution("pixels", per="filter"),
    ],
)
def test_closed_forms_are_differentiable_in_time(make, shape):
    """By matrices and by the FFT, at zero too, as a step and at all times at once."""
    operator = make()
    w = torch.randn((2, 2, 4, 3) if isinstance(operator, LinearEvolution) else shape, dtype=torch.float64)
    operator = oracle.randomize(operator.bind(w))
    for dt in (0.0, 0.3, -0.2):
        length = torch.tensor(dt, dtype=torch.float64, requires_grad=True)
        assert torch.allclose(operator.propagate(w, length), operator.propagate(w, dt))
        assert torch.autograd.gradcheck(lambda dt: operator.propagate(w, dt) + 0 * dt, (length,))
    if operator.trajectory is not None:
        times = torch.tensor([0.0, 0.3, -0.2], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: operator.trajectory(w, t) + 0 * t.sum(), (times,))
