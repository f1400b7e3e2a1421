"""The adaptive loop against torchdiffeq's, steps replayed by hand, and the orders that its methods promise."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchdiffeq._impl.odeint import SOLVERS

import neuralode_coupled as nc
from neuralode_coupled import odeint_dto
from neuralode_coupled.runge_kutta import (
    ADAPTIVE,
    AdaptiveOptions,
    IntegralController,
    PIController,
    Problem,
    Tally,
    accepted_steps,
    adaptive,
    embedded,
    mixed_norm,
)

FLOAT64 = {"dtype": torch.float64}
SHARED = [name for name in ADAPTIVE if name in SOLVERS]


# Coefficients


@pytest.mark.parametrize("name", SHARED)
def test_coefficients_are_torchdiffeqs_to_the_last_bit(name):
    ours, theirs = embedded(name), SOLVERS[name]
    method, end = ours.method, [1.0] * ours.reuses
    assert method.order == theirs.order
    assert [*method.c[1:], *end] == theirs.tableau.alpha.tolist()
    rows = [*method.a[1:], *[method.b] * ours.reuses]
    assert [list(row) for row in rows] == [row.tolist() for row in theirs.tableau.beta]
    assert [*method.b, *[0.0] * ours.reuses] == theirs.tableau.c_sol.tolist()
    assert list(ours.error) == theirs.tableau.c_error.tolist()
    assert list(ours.middle) == theirs.mid.tolist()


def trees(order):
    """The rooted trees with that many nodes, each the sorted tuple of its branches."""
    if order == 1:
        return {()}
    found = set()
    for size in range(1, order):  # one branch, grafted to the root of a tree of the remaining nodes
        for branch, rest in itertools.product(trees(size), trees(order - size)):
            found.add(tuple(sorted((*rest, branch))))
    return found


def nodes(tree):
    return 1 + sum(map(nodes, tree))


def density(tree):
    return nodes(tree) * math.prod(map(density, tree))


def stage_weights(tree, a):
    """What each stage contributes to an elementary differential."""
    product = np.ones(len(a))
    for branch in tree:
        product *= a @ stage_weights(branch, a)
    return product


def violation(weights, a, order, x=1.0):
    """The largest violation of the conditions for that order, at the fraction x of a step."""
    return max(
        abs(np.dot(weights, stage_weights(tree, a)) - x**size / density(tree))
        for size in range(1, order + 1)
        for tree in trees(size)
    )


@pytest.mark.parametrize("name", ADAPTIVE)
def test_order_conditions(name):
    """Of the method, of the one that its error is measured by, one order less, and of the state in the middle."""
    pair = embedded(name)
    method, size = pair.method, pair.slopes
    a = np.zeros((size, size))
    for i, row in enumerate([*method.a, *[method.b] * pair.reuses]):
        a[i, : len(row)] = row
    b = np.array([*method.b, *[0.0] * pair.reuses])
    assert np.allclose(a.sum(1), [*method.c, *[1.0] * pair.reuses], rtol=0, atol=1e-14)
    assert violation(b, a, method.order) < 1e-13
    assert violation(b, a, method.order + 1) > 1e-6
    # dopri8's published error weights are of order 7; torchdiffeq's dopri5 and the others' of one less as well.
    assert violation(b - np.array(pair.error), a, method.order - 1) < 1e-13
    assert violation(b - np.array(pair.error), a, method.order) > 1e-6
    inside = {"dopri5": 4, "dopri8": 4, "tsit5": 4, "bosh3": 1, "fehlberg2": 1, "adaptive_heun": 1}[name]
    assert violation(np.array(pair.middle), a, inside, 0.5) < 1e-11


@pytest.mark.parametrize("name", ADAPTIVE)
def test_many_states_within_a_step_are_each_of_them(name):
    pair = embedded(name)
    y = (torch.randn(3, **FLOAT64), torch.randn(2, 2, dtype=torch.complex128))
    slopes = [tuple(torch.randn_like(part) for part in y) for _ in range(pair.slopes)]
    x = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], **FLOAT64)
    weights = pair.many_weights(x.tolist(), -0.3, x)
    assert torch.allclose(weights, pair.weights_on_device(x, -0.3, pair.powers(x)), rtol=0.0, atol=1e-14)
    for fraction, found in zip(x.tolist(), pair.among(y, slopes, weights), strict=True):
        for one, two in zip(found, pair.within(y, slopes, -0.3, fraction), strict=True):
            assert torch.allclose(one, two, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("backwards", [False, True])
def test_outputs_are_weighted_on_the_device_where_the_host_would_wait(monkeypatch, backwards):
    t = torch.linspace(0.0, 3.0, 61, **FLOAT64)
    t, y0 = (t.flip(0) if backwards else t), torch.tensor([1.0, 0.5])
    on_host = odeint_dto(swing, y0, t)
    monkeypatch.setattr(adaptive, "HOST", ())
    torch.testing.assert_close(odeint_dto(swing, y0, t), on_host, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle": (0.5, 0.5)}, r"adaptive_heun: middle sums to 1\.0, not to 0\.5"),
        ({"error": (0.5, 0.5)}, r"adaptive_heun: error sums to 1\.0, not to 0\.0"),
        ({"error": (0.5,)}, r"error must have one weight for each of 2 slopes, got 1"),
    ],
)
def test_a_wrong_pair_does_not_come_into_being(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(embedded("adaptive_heun"), **change)
    with pytest.raises(ValueError, match=r"unknown adaptive method 'rk45': choose one of bosh3, .*tsit5"):
        embedded("rk45")


# The same steps as torchdiffeq


class Heard:
    """A right-hand side that writes down when it is called, and what its callbacks are told."""

    def __init__(self, slope, is_tuple=False):
        self.slope, self.is_tuple = slope, is_tuple
        self.times, self.told = [], []

    def __call__(self, t, y):
        assert t.shape == ()
        self.times.append(t.item())
        return self.slope(t, y)

    def _write(self, name, t, y, dt):
        state = y if self.is_tuple else (y,)
        self.told.append((name, t.item(), dt.item(), t.dtype, dt.dtype, [part.clone() for part in state]))

    def callback_step(self, t, y, dt):
        self._write("step", t, y, dt)

    def callback_accept_step(self, t, y, dt):
        self._write("accept", t, y, dt)

    def callback_reject_step(self, t, y, dt):
        self._write("reject", t, y, dt)

    def count(self, name):
        return sum(told[0] == name for told in self.told)


def assert_alike(slope, y0, t, tolerance=1e-12, loose=1e-9, **arguments):
    """Values, evaluation times and everything that callbacks hear; gives back what ours heard.

    Lengths of steps are compared loosely: they follow from estimated errors, which are small differences.
    """
    is_tuple = isinstance(y0, tuple)
    ours, theirs = Heard(slope, is_tuple), Heard(slope, is_tuple)
    with torch.no_grad():
        found = odeint_dto(ours, y0, t, **arguments)
        expected = torchdiffeq.odeint(theirs, y0, t, **arguments)
    for one, two in zip(*((x if is_tuple else (x,)) for x in (found, expected)), strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    assert [told[0] for told in ours.told] == [told[0] for told in theirs.told]
    assert ours.times == pytest.approx(theirs.times, rel=loose, abs=loose)
    for one, two in zip(ours.told, theirs.told, strict=True):
        assert one[1:3] == pytest.approx(two[1:3], rel=loose, abs=loose)
        assert one[3:5] == two[3:5]
        for a, b in zip(one[5], two[5], strict=True):
            torch.testing.assert_close(a, b, rtol=loose, atol=loose)
    return ours


def swing(t, y):
    """A pendulum that is pushed: steps are long, short and refused in turn."""
    return torch.stack([y[1], -torch.sin(3 * y[0]) * 4 + torch.cos(5 * t) * 3])


GRIDS = {
    "ends": torch.tensor([0.0, 3.0], **FLOAT64),
    "few": torch.linspace(0.0, 3.0, 4, **FLOAT64),
    "many": torch.linspace(0.0, 3.0, 61, **FLOAT64),
    "float32": torch.linspace(0.0, 3.0, 7),
}


FIRST = {"dopri5": 0.45, "dopri8": 0.8, "bosh3": 0.2, "fehlberg2": 0.1, "adaptive_heun": 0.05}
"""First steps whose errors are near the tolerance of 1e-3. Those of much shorter ones are rounding, and the next length
follows from it: sums taken in another order choose others, by some 1e-9 in double precision and 1e-1 in single."""


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backwards", [False, True])
def test_steps_are_torchdiffeqs(method, grid, backwards):
    t = GRIDS[grid].flip(0) if backwards else GRIDS[grid]
    y0, options = torch.tensor([1.0, 0.5], **FLOAT64), {"first_step": FIRST[method]}
    heard = assert_alike(swing, y0, t, method=method, rtol=1e-3, atol=1e-3, options=options)
    assert heard.count("accept") >= 3
    assert heard.count("reject") >= (1 if method in ("bosh3", "dopri5", "dopri8") else 0)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("start", [[1.0, 0.5], [0.0, 0.0]])
def test_the_first_step_is_torchdiffeqs(method, dtype, start):
    """Chosen by the slopes at the start and a little further on; from nothing it is 1e-6 further on."""
    told = []
    for solver in (odeint_dto, torchdiffeq.odeint):
        for t in (torch.tensor([0.0, 1e-3]), torch.tensor([1.0, 0.999])):
            func = Heard(swing)
            with torch.no_grad():
                solver(func, torch.tensor(start, dtype=dtype), t, method=method, rtol=1e-3, atol=1e-4)
            told.append([func.told[0][1:3], func.times[:2]])
    tolerance = 1e-12 if dtype.to_real() == torch.float64 else 1e-6
    for ours, theirs in zip(told[:2], told[2:], strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert one == pytest.approx(two, rel=tolerance, abs=1e-12)


@given(
    seed=st.integers(0, 2**20),
    method=st.sampled_from(SHARED),
    backwards=st.booleans(),
    outputs=st.integers(2, 9),
    form=st.sampled_from(["tensor", "tuple", "complex"]),
)
def test_steps_are_torchdiffeqs_on_random_problems(seed, method, backwards, outputs, form):
    torch.manual_seed(seed)
    dtype = torch.complex128 if form == "complex" else torch.float64
    matrix = torch.randn(3, 3, dtype=dtype)
    t = (torch.rand(outputs, **FLOAT64) + 0.05).cumsum(0)
    t = 2 * t / t[-1]

    def slope(t, y):
        if form == "tuple":
            return torch.sin(4 * y[1].sum() - y[0] @ matrix.T), torch.cos(3 * y[1] + t) * y[0].mean()
        return torch.sin(4 * (y @ matrix.T) * 0.3 + t) if form == "tensor" else (y @ matrix.T) * 1j

    y0 = (
        (torch.randn(2, 3, **FLOAT64), torch.randn((), **FLOAT64))
        if form == "tuple"
        else torch.randn(2, 3, dtype=dtype)
    )
    # Where estimated errors are rounding, lengths differ a little, and what is interpolated with them.
    arguments = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": {"first_step": FIRST[method], "ifactor": 3.0}}
    assert_alike(slope, y0, t.flip(0) if backwards else t, 1e-9, 1e-7, **arguments)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_steps_in_single_precision(method, backwards, dtype):
    t = torch.linspace(0.0, 2.0, 5)
    y0, options = torch.tensor([1.0, 0.5], dtype=dtype), {"first_step": FIRST[method]}
    t = t.flip(0) if backwards else t
    # Of methods of high order the estimated errors are rounding, as in FIRST, and so are differences of their lengths.
    tolerance, loose = {"dopri8": (2e-4, 1e-2), "dopri5": (2e-5, 1e-3)}.get(method, (1e-5, 1e-3))
    assert_alike(swing, y0, t, tolerance, loose, method=method, rtol=1e-3, atol=1e-3, options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """To the precision, on steps of given lengths. (torchdiffeq interpolates with an error of 0.1 in bfloat16.)"""
    t, held = torch.linspace(0, 1, 8), {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}
    found = odeint_dto(lambda t, y: -y * t, torch.ones(3, dtype=dtype), t, method="dopri5", options=held)
    assert found.dtype == dtype
    assert torch.allclose(found[:, 0].double(), torch.exp(-(t.double() ** 2) / 2), rtol=0, atol=2e-2)


INNER = torch.tensor([0.31, 1.27, 2.4], **FLOAT64)
OPTIONS = {
    "first_step": {"first_step": 0.2},
    "tensors": {
        "first_step": torch.tensor(0.2),
        "min_step": torch.tensor(0.01, **FLOAT64),
        "safety": torch.tensor(0.8),
    },
    "factors": {"safety": 0.7, "ifactor": 2.0, "dfactor": 0.5},
    "min_step": {"min_step": 0.15},
    "max_step": {"max_step": 0.05},
    "step_t": {"step_t": INNER},
    "unsorted": {"step_t": INNER.flip(0)},
    "behind the start": {"step_t": torch.tensor([-1.0, 0.0, 0.5, 3.0, 4.0], **FLOAT64)},
    "jump_t": {"jump_t": INNER},
    "both": {"step_t": INNER[:1], "jump_t": INNER[1:]},
    "short": {"step_t": INNER, "min_step": 0.2},
    "norm": {"norm": lambda y: y.abs().max()},
    "part": {"norm": lambda y: y[:1].abs().max()},
    "none": {"first_step": None},
}


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backwards", [False, True])
def test_options_mean_what_they_mean_in_torchdiffeq(method, name, backwards):
    t, options = torch.linspace(0.0, 3.0, 5, **FLOAT64), dict(OPTIONS[name])
    if backwards:
        t = t.flip(0)
        options |= {key: 3.0 - options[key] for key in ("step_t", "jump_t") if key in options}
    y0, options = torch.tensor([1.0, 0.5], **FLOAT64), {"first_step": FIRST[method]} | options
    # Behind a step that was cut short, dopri5's estimated error is rounding, see FIRST.
    tolerance = 1e-8 if method == "dopri5" else 1e-11
    assert_alike(swing, y0, t, tolerance, 1e-6, method=method, rtol=1e-3, atol=1e-3, options=options)


@pytest.mark.parametrize("backwards", [False, True])
def test_times_are_rounded_to_their_dtype(backwards):
    t = torch.linspace(0.1, 3.0, 5)
    y0, options = torch.tensor([1.0, 0.5]), {"dtype": torch.float32, "first_step": 0.45, "jump_t": torch.tensor([1.3])}
    t = t.flip(0) if backwards else t
    heard = assert_alike(swing, y0, t, 1e-5, loose=1e-3, method="dopri5", rtol=1e-3, atol=1e-3, options=options)
    assert {told[3] for told in heard.told} == {torch.float32}
    assert all(told[1] == float(np.float32(told[1])) for told in heard.told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("backwards", [False, True])
def test_evaluations_are_at_torchdiffeqs_very_times(dtype, method, backwards):
    """To the last bit, also on both sides of a jump, on steps of given lengths."""
    t, jump = torch.linspace(0.1, 1.3, 4, **FLOAT64), torch.tensor([0.577], **FLOAT64)
    held = {"first_step": 0.07, "min_step": 0.07, "max_step": 0.07, "jump_t": jump}
    times = []
    for solver in (odeint_dto, torchdiffeq.odeint):
        func = Heard(lambda t, y: -y * t)
        with torch.no_grad():
            solver(func, torch.ones(2, dtype=dtype), t.flip(0) if backwards else t, method=method, options=held)
        times.append(func.times)
    assert times[0] == times[1]
    beside = np.asarray(0.577, dtype={torch.float32: np.float32, torch.float64: np.float64}[dtype])
    assert {float(np.nextafter(beside, side * beside.dtype.type(np.inf))) for side in (-1, 1)} <= set(times[0])


@pytest.mark.parametrize(
    ("rtol", "atol"),
    [
        (torch.tensor(1e-3), torch.tensor(1e-4)),
        ((1e-3, 1e-2), (1e-4, 1e-5)),
        ((torch.tensor([1e-3, 1e-4]), 1e-2), 1e-4),
        (1e-3, torch.tensor([1e-4, 1e-2])),
    ],
)
def test_tolerances_of_a_tuple(rtol, atol):
    def slope(t, y):
        return torch.stack([y[0][1], -4 * torch.sin(y[0][0])]), -y[1] * y[0][0]

    y0 = (torch.tensor([1.0, 0.5], **FLOAT64), torch.ones(3, **FLOAT64))
    arguments = {"method": "bosh3", "rtol": rtol, "atol": atol, "options": {"first_step": 0.1}}
    assert_alike(slope, y0, torch.linspace(0.0, 2.0, 4, **FLOAT64), 1e-11, **arguments)


def test_tolerances_of_a_tensor_have_its_shape():
    atol = torch.tensor([1e-3, 1e-6], **FLOAT64)
    y0, t = torch.tensor([1.0, 0.5], **FLOAT64), torch.linspace(0.0, 2.0, 4, **FLOAT64)
    arguments = {"method": "bosh3", "rtol": 0.0, "options": {"first_step": 0.1}}
    assert_alike(swing, y0, t, 1e-11, atol=atol, **arguments)
    assert_alike(swing, y0.float(), t, 1e-5, loose=1e-3, atol=atol * 100, **arguments)


def test_norms_of_tuples():
    """Theirs is handed the tuple; the default is the largest root mean square."""

    def slope(t, y):
        return y[1], -4 * torch.sin(y[0])

    y0, t = (torch.ones(2, 2, **FLOAT64), torch.zeros(2, 2, **FLOAT64)), torch.linspace(0.0, 2.0, 4, **FLOAT64)
    for options in ({}, {"norm": lambda y: y[0].abs().max() + y[1].abs().mean()}):
        assert_alike(slope, y0, t, method="bosh3", rtol=1e-3, atol=1e-4, options=options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_default_norm_is_the_one_that_is_exported(dtype):
    """Though its roots are taken of numbers: handed in as somebody's own it makes the same steps."""
    y0 = (torch.ones(2, 3, dtype=dtype), torch.zeros(0, dtype=dtype), 1e-3 * torch.ones((), dtype=dtype))
    t, told = torch.tensor([0.0, 1.0], **FLOAT64), []
    for options in ({}, {"norm": functools.partial(mixed_norm)}):
        func = Heard(lambda t, y: (torch.sin(4 * y[0]), y[1], -100 * y[2]), is_tuple=True)
        odeint_dto(func, y0, t, rtol=1e-4, atol=1e-6, options=options)
        told.append([heard[:3] for heard in func.told])
    assert len(told[0]) > 10
    assert [name for name, *_ in told[0]] == [name for name, *_ in told[1]]
    for one, two in zip(*told, strict=True):
        assert one[1:] == pytest.approx(two[1:], rel=1e-9)


# Where it does better


def test_a_step_that_overflows_is_rejected():
    y0, t = torch.ones(2), torch.linspace(0, 1, 3)
    options = {"first_step": 1e15}
    found = odeint_dto(lambda t, y: -(y**3), y0, t, rtol=1e-5, atol=1e-6, options=options)
    assert torch.allclose(found, ((1 + 2 * t) ** -0.5)[:, None].expand(3, 2), atol=1e-4)
    with pytest.raises(AssertionError, match="underflow"):
        torchdiffeq.odeint(lambda t, y: -(y**3), y0, t, rtol=1e-5, atol=1e-6, method="dopri5", options=options)


def test_a_step_that_happens_to_end_at_a_jump_is_cut_there():
    """And times that are prescribed behind it hold."""
    func = Heard(lambda t, y: torch.where(t < 0.5, -1.0, 3.0) * y)
    options = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25, "jump_t": [0.5], "step_t": [0.6]}
    t = torch.tensor([0.0, 1.0], **FLOAT64)
    odeint_dto(func, torch.ones(1, **FLOAT64), t, method="dopri5", options=options)
    ends = [time + dt for name, time, dt, *_ in func.told if name == "accept"]
    assert ends == pytest.approx([0.25, 0.5, 0.6, 0.85, 1.1])
    assert float(np.nextafter(0.5, 1)) in func.times
    assert float(np.nextafter(0.5, 0)) in func.times


def test_tensors_without_entries_have_no_error():
    y0 = (torch.zeros(0, **FLOAT64), torch.ones(2, **FLOAT64))
    empty, found = odeint_dto(lambda t, y: (y[0], -y[1]), y0, torch.tensor([0.0, 1.0], **FLOAT64))
    assert empty.shape == (2, 0)
    assert torch.allclose(found[-1], torch.full((2,), math.exp(-1), **FLOAT64))
    assert odeint_dto(lambda t, y: y, y0[0], torch.tensor([0.0, 1.0])).shape == (2, 0)


# Orders


def logistic(t, y):
    return 2 * y * (1 - y)


def solutions(t):
    """Solutions from several starts, (times, starts)."""
    start = torch.tensor([0.1, 0.3, 0.6, 0.9], **FLOAT64)
    return 1 / (1 + (1 / start - 1) * torch.exp(-2 * t[:, None]))


@pytest.mark.parametrize("backwards", [False, True])
def test_tsit5_has_order_five_and_its_dense_output_order_four(backwards):
    """By regression: one step of length h errs by h^6 at its end, or less for as long as its constant is small, and by
    h^5 within."""
    sign, lengths = (-1 if backwards else 1), [0.4, 0.3, 0.2, 0.15, 0.1]

    errors = []
    for h in lengths:
        held = {"first_step": h, "min_step": h, "max_step": h}
        t = sign * h * torch.tensor([0.0, 0.3, 0.6, 0.8, 1.0], **FLOAT64)
        found = odeint_dto(logistic, solutions(torch.zeros(1, **FLOAT64))[0], t, method="tsit5", options=held)
        errors.append((found - solutions(t)).norm(dim=1)[1:].numpy())
    orders = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert orders[-1] > 5.7
    assert orders[:-1] == pytest.approx(5.0, abs=0.7)


def test_tsit5_converges_with_order_five():
    errors, lengths = [], [0.2, 0.1, 0.05, 0.025]
    for h in lengths:
        held = {"first_step": h, "min_step": h, "max_step": h}
        t = torch.tensor([0.0, 2.0], **FLOAT64)
        found = odeint_dto(logistic, solutions(t)[0], t, method="tsit5", options=held)
        errors.append(float((found - solutions(t))[-1].norm()))
    assert np.polyfit(np.log(lengths), np.log(errors), 1)[0] == pytest.approx(5.0, abs=0.6)


# Gradients


def replayed(func, y, t, method, steps):
    """The solution on accepted steps (start, signed length, behind a jump), by hand."""
    pair = embedded(method)
    a = [*pair.method.a, *[pair.method.b] * pair.reuses]
    c = [*pair.method.c, *[1.0] * pair.reuses]
    f, found = func(t[0], y), [y]
    for start, h in steps:
        k = [f]
        for i in range(1, len(a)):
            stage = y + h * sum(w * slope for w, slope in zip(a[i], k, strict=True))
            k.append(func(torch.tensor(start + c[i] * h, **FLOAT64), stage))
        after = y + h * sum(w * slope for w, slope in zip(pair.method.b, k, strict=False))
        middle = y + h * sum(w * slope for w, slope in zip(pair.middle, k, strict=True))
        while len(found) < len(t) and (t[len(found)] - start) / h <= 1 + 1e-14:
            # The quartic through both ends and the middle, with the slopes at the ends.
            x = (t[len(found)] - start) / h
            hermite = (1 - x) ** 2 * ((1 + 2 * x) * y + x * h * k[0]) + x**2 * (
                (3 - 2 * x) * after + (x - 1) * h * k[-1]
            )
            at_middle = (y + after) / 2 + h * (k[0] - k[-1]) / 8
            found.append(hermite + 16 * x**2 * (1 - x) ** 2 * (middle - at_middle))
        y, f = after, k[-1]
    return torch.stack(found)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("checkpoints", [None, 2])
def test_gradients_are_those_of_the_accepted_steps(method, backwards, checkpoints):
    weight = torch.randn(2, 2, **FLOAT64, requires_grad=True)
    y0 = torch.tensor([1.0, 0.5], **FLOAT64, requires_grad=True)
    t = torch.linspace(0.0, 2.0, 7, **FLOAT64)
    t = (t.flip(0) if backwards else t).requires_grad_()
    func = Heard(lambda t, y: torch.sin(weight @ y * 2 + 3 * t))
    found = odeint_dto(func, y0, t, method=method, rtol=1e-3, atol=1e-4, params=(weight,), checkpoints=checkpoints)
    sign = -1.0 if backwards else 1.0
    steps = [(at, sign * dt) for name, at, dt, *_ in func.told if name == "accept"]
    assert len(steps) > 2
    times = t.detach().clone().requires_grad_()
    expected = replayed(func.slope, y0, times, method, steps)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(found)
    ours = torch.autograd.grad((found * probe).sum(), [y0, weight, t])
    theirs = torch.autograd.grad((expected * probe).sum(), [y0, weight, times])
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-12, atol=1e-12)
    # t[0] moves all steps as well; the others the outputs alone.
    torch.testing.assert_close(ours[2][1:], theirs[2][1:], rtol=1e-11, atol=1e-11)


def problem(f, y0, t, method="dopri5", tolerance=1e-3, **options):
    tolerances = (tolerance,) * len(y0)
    return Problem(f, y0, t, embedded(method), tolerances, tolerances, AdaptiveOptions(**options))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_with_gradients_on_the_graph_is_that_of_the_accepted_steps(method):
    weight = torch.randn(2, 2, **FLOAT64, requires_grad=True)
    t, y0 = torch.linspace(0.0, 3.0, 5, **FLOAT64), (torch.tensor([1.0, 0.5], **FLOAT64),)
    tally = Tally()

    def f(t, y):
        return (torch.sin(weight @ y[0] * 4 + 3 * t),)

    steps = list(accepted_steps(problem(f, y0, t, method, first_step=1.5), tally))
    assert tally.rejected > 0
    assert tally.accepted == len(steps)
    ours = torch.stack([y0[0], *(state[0] for step in steps for state in step.outputs)])
    theirs = replayed(lambda t, y: f(t, (y,))[0], y0[0], t, method, [(step.start, step.length) for step in steps])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("backwards", [False, True])
def test_what_a_step_says_of_itself(method, backwards):
    """Steps follow on each other, and the last slope of one is the first of the next."""
    t = torch.linspace(0.0, 2.0, 5, **FLOAT64)
    bounds = {"step_t": (0.7,), "jump_t": (1.1,)}
    tally = Tally()
    f = Heard(lambda t, y: (torch.stack([y[0][1], -9 * y[0][0]]),))
    y0 = (torch.ones(2, **FLOAT64),)
    with torch.no_grad():
        steps = list(accepted_steps(problem(f, y0, t.flip(0) if backwards else t, method, **bounds), tally))
    assert tally.evaluations == len(f.times)
    assert steps[0].start == (2.0 if backwards else 0.0)
    assert all((step.length < 0) is backwards and step.end != step.start for step in steps)
    for step, after in itertools.pairwise(steps):
        assert step.end == after.start
        assert step.last is after.first
    assert [step.end for step in steps if step.cut] == ([1.1, 0.7] if backwards else [0.7, 1.1])
    assert [step.end for step in steps if step.jump] == [1.1]
    assert sum(len(step.outputs) for step in steps) == 4


class Reads(TorchFunctionMode):
    """Counts how often numbers are read from a tensor."""

    READING = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__)
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.READING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("norm", [mixed_norm, lambda y: y[0].abs().max()])
def test_numbers_are_read_once_for_each_step_that_is_tried(method, norm):
    t, tally = torch.linspace(0.0, 3.0, 7, **FLOAT64), Tally()
    y0 = (torch.ones(2), torch.ones(3))
    f = problem(lambda t, y: (torch.stack([y[0][1], -9 * y[0][0]]), -y[1]), y0, t, method, norm=norm)
    with torch.no_grad(), Reads() as reads:
        list(accepted_steps(f, tally))
    assert reads.count == tally.accepted + tally.rejected + 3  # and the times, and twice for the first length


def test_without_gradients_no_state_is_kept_but_the_outputs():
    alive, most = [], []

    def note(t, y, dt):
        alive.append(weakref.ref(y))
        most.append(len({id(ref()) for ref in alive if ref() is not None}))

    func = Heard(swing)
    func.callback_step, func.callback_accept_step, func.callback_reject_step = note, None, None
    with torch.no_grad():
        odeint_dto(func, torch.ones(2), GRIDS["ends"], method="bosh3", rtol=1e-4, atol=1e-4)
    assert len(most) > 10
    assert max(most) <= 3


# Controllers


def test_a_controller_of_ones_own():
    """It decides alone: here all steps are of one length, whatever the error."""

    class Constant:
        def begin(self, order):
            assert order == 5
            return lambda ratio, length: (True, 0.1)

    func = Heard(lambda t, y: -y)
    options = {"controller": Constant(), "first_step": 0.1}
    odeint_dto(func, torch.ones(2, **FLOAT64), torch.tensor([0.0, 1.0], **FLOAT64), rtol=1e-14, options=options)
    assert {round(dt, 12) for name, _, dt, *_ in func.told if name == "accept"} == {0.1}


@pytest.mark.parametrize("returned", [-0.1, math.nan, math.inf])
def test_a_controller_must_return_a_length(returned):
    class Wrong:
        def begin(self, order):
            return lambda ratio, length: (True, returned)

    with pytest.raises(ValueError, match=r"controller must return a positive length for the next step, got"):
        odeint_dto(lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 3), options={"controller": Wrong()})


def test_the_default_controller_by_hand():
    decide = IntegralController(safety=0.9, ifactor=10.0, dfactor=0.2).begin(4)
    assert decide(0.0, 2.0) == (True, 20.0)
    assert decide(0.5, 2.0) == (True, pytest.approx(2 * 0.9 * 0.5**-0.25))
    assert decide(0.9, 2.0) == (True, 2.0)
    assert decide(16.0, 2.0) == (False, pytest.approx(0.9))
    assert decide(1e9, 2.0) == (False, pytest.approx(0.4))
    assert decide(math.inf, 2.0) == decide(math.nan, 2.0) == (False, 0.4)


def test_the_proportional_controller_by_hand():
    decide = PIController(integral=0.3, proportional=0.4, safety=0.9).begin(5)
    assert decide(0.5, 2.0) == (True, pytest.approx(2 * 0.9 * 0.5**-0.14))
    assert decide(0.2, 2.0) == (True, pytest.approx(2 * 0.9 * 0.2**-0.14 * 0.5**0.08))
    assert decide(32.0, 2.0) == (False, pytest.approx(0.9))
    assert decide(math.nan, 2.0) == (False, pytest.approx(0.4))
    assert decide(0.01, 2.0) == (True, 2.0)  # does not grow behind a rejection
    assert decide(1e-30, 2.0) == (True, pytest.approx(2 * 0.9 * 1e-4**-0.14 * 0.01**0.08))
    assert PIController().begin(5)(0.5, 2.0) == (True, pytest.approx(2 * 0.9 * 0.5**-0.14))


@pytest.mark.parametrize("method", [name for name in ADAPTIVE if name != "fehlberg2"])  # whose estimates are too small
def test_the_proportional_controller_solves(method):
    """To tolerance, and where stability bounds the steps with fewer rejections."""
    y0, t = torch.ones(1, **FLOAT64), torch.tensor([0.0, 3.0], **FLOAT64)
    rejected = []
    for controller in (None, nc.PIController()):
        func = Heard(lambda t, y: -80 * (y - torch.cos(t)))
        options = {"controller": controller, "step_t": t[1:]}
        found = odeint_dto(func, y0, t, method=method, rtol=1e-3, atol=1e-3, options=options)
        exact = (6400 * math.cos(3) + 80 * math.sin(3)) / 6401
        assert float(found[-1]) == pytest.approx(exact, abs=2e-2)
        rejected.append(func.count("reject"))
    assert rejected[1] <= rejected[0]
    if method in ("dopri5", "tsit5"):
        assert rejected[1] < rejected[0] / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PIController(integral=0.0), r"integral must be a positive number, got 0\.0"),
        (lambda: PIController(integral=math.nan), r"integral must be a positive number, got nan"),
        (lambda: PIController(proportional=-0.1), r"proportional must be a number of at least 0, got -0\.1"),
        (lambda: PIController(safety=-1.0), r"safety must be a positive number, got -1\.0"),
        (lambda: PIController(ifactor=0.5), r"ifactor must be a number of at least 1, got 0\.5"),
        (lambda: IntegralController(dfactor=1.0), r"dfactor must be between 0 and 1, got 1\.0"),
        (lambda: IntegralController(safety=math.inf), r"safety must be a positive number, got inf"),
    ],
)
def test_controllers_refuse_what_makes_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Errors


def decay(t, y):
    return -y


UP, ONE = torch.linspace(0.0, 1.0, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"options": {"first_step": 0.0}}, ValueError, r"first_step must be positive, .* got 0\.0"),
        ({"options": {"first_step": "long"}}, TypeError, r"option 'first_step' must be a number, got 'long'"),
        ({"options": {"first_step": torch.ones(2)}}, TypeError, r"option 'first_step' must be a number"),
        ({"options": {"min_step": -1.0}}, ValueError, r"min_step must be a number of at least 0, got -1\.0"),
        ({"options": {"max_step": 0}}, ValueError, r"max_step must be positive and at least min_step=0\.0, got 0"),
        ({"options": {"min_step": 1.0, "max_step": 0.5}}, ValueError, r"at least min_step=1\.0, got 0\.5"),
        ({"options": {"max_num_steps": 0}}, ValueError, r"max_num_steps must be at least 1, got 0"),
        ({"options": {"safety": 0}}, ValueError, r"safety must be a positive number, got 0"),
        ({"options": {"dtype": torch.int64}}, ValueError, r"dtype must be a real floating one, .* got torch\.int64"),
        ({"options": {"dtype": "float32"}}, TypeError, r"'dtype' must be a torch\.dtype, got 'float32'"),
        ({"options": {"norm": 2}}, TypeError, r"'norm' must be callable, got 2"),
        (
            {"options": {"norm": lambda y: y}},
            ValueError,
            r"norm must return a tensor of one number, got the shape \(2,\)",
        ),
        ({"options": {"norm": lambda y: 1.0}}, ValueError, r"norm must return a tensor of one number, got float"),
        ({"options": {"controller": nc.PIController}}, ValueError, r"controller .*an instance, got <class"),
        ({"options": {"controller": "PI"}}, ValueError, r"controller must be one such as .* got 'PI'"),
        (
            {"options": {"controller": 0.9}},
            ValueError,
            r"controller must be one such as nc\.PIController\(\), .* got 0\.9",
        ),
        (
            {"options": {"controller": SimpleNamespace(begin=5)}},
            ValueError,
            r"controller must be one such as .*begin=5",
        ),
        (
            {"options": {"controller": nc.PIController(), "safety": 0.8}},
            ValueError,
            r"'safety' is the default controller's: set it in 'controller'",
        ),
        ({"options": {"step_t": [0.5], "jump_t": [0.5]}}, ValueError, r"must not name a time twice, got 0\.5 again"),
        ({"rtol": -1.0}, ValueError, r"rtol must not be negative, got -1\.0"),
        ({"atol": torch.tensor([1.0, -1.0])}, ValueError, r"atol must not be negative"),
        ({"rtol": math.nan}, ValueError, r"rtol must not be negative, got nan"),
        ({"rtol": torch.ones(3)}, ValueError, r"rtol of the shape \(3,\) does not fit y0's \(2,\)"),
        ({"rtol": torch.ones(2, requires_grad=True)}, ValueError, r"rtol must not require a gradient"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        odeint_dto(decay, ONE, UP, **arguments)


def test_tolerances_that_do_not_fit_a_tuple():
    with pytest.raises(ValueError, match=r"rtol must have one entry for each of the 2 tensors of y0, got 3"):
        odeint_dto(lambda t, y: y, (ONE, ONE), UP, rtol=(1e-3, 1e-3, 1e-3))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("slope", "options", "message"),
    [
        (lambda t, y: y**2, {}, r"step size underflows at t = -?1: \d+ steps in a row were rejected; .*'min_step'"),
        (decay, {"max_num_steps": 1}, r"max_num_steps exceeded at t = -?0\.\d+: raise it in options"),
        (lambda t, y: y * math.nan, {}, r"derivative that is not finite near t = -?0$"),
        (lambda t, y: y * math.nan, {"first_step": 0.1}, r"derivative that is not finite near t = -?0$"),
        (lambda t, y: y * math.inf, {"min_step": 0.1}, r"derivative that is not finite near t = -?0$"),
        (
            lambda t, y: torch.where(y.abs() > 0.5, -y, math.nan),
            {"first_step": 0.1, "min_step": 0.1},
            r"(state|derivative).* not finite (at|near) t = -?0\.",
        ),
        (
            lambda t, y: torch.cat([-y[:1], 1e30 * (1 + y[1:] ** 2)]),
            {"norm": lambda y: y[:1].abs().max(), "min_step": 0.01},
            r"the state is not finite at t = |derivative that is not finite",
        ),
    ],
)
def test_solves_that_cannot_go_on(slope, options, message, sign, gradients):
    y0 = ONE.clone().requires_grad_(gradients)
    with pytest.raises(ValueError, match=message) as caught:
        odeint_dto(lambda t, y: sign * slope(t, y), y0, 2.5 * sign * UP, options=options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("first_step", [None, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("norm", [mixed_norm, lambda y: y[:1].abs().max()])
def test_a_first_slope_that_is_not_finite_is_told_with_its_time(backwards, first_step, bad, norm):
    """Also where the norm does not look at it, and without evaluations that would tell nothing more."""
    func = Heard(lambda t, y: torch.stack([-y[0], bad * y[1]]))
    t, options = torch.tensor([1.5, 2.5]), {"first_step": first_step, "norm": norm}
    start = 2.5 if backwards else 1.5
    with pytest.raises(ValueError, match=rf"^func returned a derivative that is not finite near t = {start}$"):
        odeint_dto(func, ONE, t.flip(0) if backwards else t, options=options)
    assert func.times[0] == start
    assert len(func.times) <= 9


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_step_that_underflows_tells_after_how_many_rejections_and_what_to_try(method, backwards):
    """Behind a pole at t = 1."""
    sign = -1.0 if backwards else 1.0
    func = Heard(lambda t, y: sign * y**2)
    with pytest.raises(ValueError, match="the step size underflows at t = ") as caught:
        odeint_dto(func, ONE.double(), sign * torch.tensor([0.0, 2.0]), method=method, rtol=1e-6, atol=1e-6)
    row = list(itertools.takewhile(lambda name: name != "accept", (told[0] for told in reversed(func.told))))
    assert f"t = {sign:g}: {row.count('reject')} steps in a row were rejected" in str(caught.value)
    assert row.count("reject") >= 1
    for advice in ("stiff", "loosen rtol and atol", "float64", "'jump_t'", "'min_step'"):
        assert advice in str(caught.value)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_stiff_problem_says_where_it_ran_out_of_steps(method):
    """Stability holds the steps below some 3e-4, whatever the tolerances."""
    options = {"max_num_steps": 50}
    func = Heard(lambda t, y: -1e4 * (y - torch.cos(t)))
    with pytest.raises(ValueError, match=r"max_num_steps exceeded at t = 0\.0\d+: .* loosen rtol and atol$"):
        odeint_dto(func, ONE, UP, method=method, rtol=1e-3, atol=1e-3, options=options)
    assert func.count("step") == 50


@pytest.mark.parametrize("first", [1e30, 1e-30])
def test_slopes_beside_which_norms_overflow_have_a_first_step(first):
    """Their quotients are infinite, 0 or none: the solve neither divides by 0 nor takes a length that is no number."""
    y0, t = torch.tensor([first, 1.0]), torch.tensor([0.0, 1e-3])
    found = odeint_dto(lambda t, y: -y, y0, t, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], y0 * math.exp(-1e-3))
    with pytest.raises(ValueError, match=r"step size underflows at t = 0: 0 steps in a row"):
        odeint_dto(lambda t, y: 1e35 + 0 * y, torch.ones(2), t, rtol=0.0, atol=1e-30)


def test_steps_are_counted_between_outputs():
    """As in torchdiffeq: with more outputs more steps may be taken."""
    options = {"first_step": 0.05, "max_step": 0.05, "max_num_steps": 12}
    odeint_dto(decay, ONE, torch.linspace(0, 1, 5), options=options)
    with pytest.raises(ValueError, match="max_num_steps exceeded"):
        odeint_dto(decay, ONE, torch.linspace(0, 1, 2), options=options)
