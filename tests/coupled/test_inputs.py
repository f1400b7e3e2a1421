"""Inputs besides the state: exact gradients into every one, by every gradient method, and clear errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchdiffeq import odeint

import neuralode_coupled as nc
from tests.helpers import oracle

FLOAT64 = {"dtype": torch.float64}
METHODS = {
    "kept": nc.DiscreteAdjoint,
    "recomputed": lambda: nc.DiscreteAdjoint(None),
    "checkpoints": lambda: nc.DiscreteAdjoint(2, storage="cpu"),
    "keep_last": lambda: nc.DiscreteAdjoint(keep_last=1),
    "own weights": lambda: nc.DiscreteAdjoint(None, weights="recomputed"),
}


def error(found, expected) -> float:
    """The largest relative one, in a row of tensors."""
    return oracle.largest_error(*[dict(enumerate(row)) for row in (found, expected)])


class Conditioned(nn.Module):
    """f(z, c, scale=..., pair=...) of inputs in every position."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.c = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, z, c, *, scale=None, pair=None):
        h = torch.tanh(self.z(z) + self.c(c))
        if scale is not None:
            h = h * scale
        if pair is not None:
            a, more = pair
            h = h + a * more["b"] * z
        return h


def layer(dynamics=None, **options) -> nc.CoupledODE:
    torch.manual_seed(0)
    found = nc.CoupledODE(
        Conditioned() if dynamics is None else dynamics,
        nc.LinearEvolution("channels", rank=1),
        **{"steps": 3} | options,
    )
    for p in found.field.evolution.parameters():
        nn.init.normal_(p, std=0.3)
    return found.double()


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = {"z0": (4, 3), "c": (4, 2), "scale": (3,), "a": (4, 1), "b": ()}
    return {name: torch.randn(shape, **FLOAT64).requires_grad_() for name, shape in shapes.items()}


def run(layer: nc.CoupledODE, x: dict[str, torch.Tensor]) -> torch.Tensor:
    return layer(x["z0"], x["c"], scale=x["scale"], pair=(x["a"], {"b": x["b"]}))


def gradients(layer: nc.CoupledODE, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    loss = run(layer, x).square().sum()
    return list(torch.autograd.grad(loss, [*x.values(), *layer.parameters()], materialize_grads=True))


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_into_every_input_are_those_of_the_unrolled_solve(name, method):
    if method == "dopri5" and name == "own weights":
        pytest.skip("weights='recomputed' is for grids")
    options = {"steps": None, "rtol": 1e-4, "atol": 1e-6} if method == "dopri5" else {}
    found, expected = (
        gradients(layer(method=method, adjoint=adjoint, **options), inputs())
        for adjoint in (METHODS[name](), nc.Backprop())
    )
    assert error(found, expected) < 1e-12
    assert all(g.abs().sum() > 0 for g in expected[:5])


def test_reversible_and_continuous_gradients_reach_inputs():
    for adjoint, options in ((nc.ReversibleAdjoint(), {"steps": 64}), (nc.ContinuousAdjoint(), {"steps": 64})):
        found = gradients(layer(method="rk4", adjoint=adjoint, **options), inputs())
        expected = gradients(layer(method="rk4", adjoint=nc.Backprop(), **options), inputs())
        assert error(found, expected) < 1e-6
    found = gradients(layer(kernel=nc.SampleAndHold(2), steps=4, adjoint=nc.ContinuousAdjoint()), inputs())
    assert all(g.abs().sum() > 0 for g in found[:5])


def test_gradients_are_those_of_finite_differences():
    exact, x, h = layer(), inputs(), 1e-6
    found = torch.autograd.grad(run(exact, x).square().sum(), list(x.values()))
    for gradient, (name, value) in zip(found, x.items(), strict=True):
        direction = torch.randn_like(value)
        ends = [run(exact, x | {name: value + s * h * direction}).square().sum() for s in (1, -1)]
        assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(["tuple", "list", "dict", "nested"]),
    st.sets(st.integers(0, 2)),
    st.booleans(),
    st.booleans(),
)
def test_nests_unused_repeated_and_constant_inputs(name, nest, constant, twice, unused):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, z, given):
            flat = torch.utils._pytree.tree_leaves(given)
            h = self.net(z)
            for x in flat[: len(flat) - unused]:
                h = h if x is None else torch.sin(h + x)
            return h

    def solved(adjoint) -> list[torch.Tensor]:
        torch.manual_seed(1)
        field = layer(Nested(), adjoint=adjoint)
        torch.manual_seed(2)
        z0 = torch.randn(3, 2, **FLOAT64)
        x = [torch.randn(2, **FLOAT64).requires_grad_(i not in constant) for i in range(3)]
        leaves = [*x, x[0]] if twice else x
        makes = {
            "tuple": tuple,
            "list": list,
            "dict": lambda xs: {str(i): x for i, x in enumerate(xs)},
            "nested": lambda xs: {"a": (xs[0], [xs[1], {"b": tuple(xs[2:])}]), "none": None},
        }
        out = field(z0, makes[nest](leaves))
        wanted = [x for x in (*leaves, *field.parameters()) if x.requires_grad]
        return list(torch.autograd.grad(out.square().sum(), wanted, materialize_grads=True))

    assert error(solved(METHODS[name]()), solved(nc.Backprop())) < 1e-12


def test_one_layer_takes_other_inputs_each_time_and_keeps_none():
    exact, x = layer(), inputs()
    with torch.no_grad():
        first, other = run(exact, x), run(exact, x | {"c": 2 * x["c"]})
        assert not torch.allclose(first, other)
        assert torch.equal(run(exact, x), first)
    assert exact.field.inputs is None
    assert not any(value is x["c"] for value in vars(exact.field).values())


def test_two_solves_in_flight_have_their_own_inputs():
    exact, x = layer(adjoint=nc.DiscreteAdjoint(None)), inputs()
    losses = [run(exact, x | {"c": factor * x["c"]}).square().sum() for factor in (1.0, 3.0)]
    both = torch.autograd.grad(losses[0] + losses[1], x["c"])[0]
    singly = sum(torch.autograd.grad(run(exact, x | {"c": f * x["c"]}).square().sum(), x["c"])[0] for f in (1.0, 3.0))
    assert torch.allclose(both, singly, atol=1e-13)


class Path(nn.Module):
    """A control path: a cubic in time with a learned coefficient."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 2, **FLOAT64))

    def forward(self, t):
        return self.a * t**3 + t


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("takes", ["module", "function", "in a nest"])
def test_functions_of_time_are_called_at_stage_times(name, takes):
    """By hand: the same as f(t, z) that calls the path itself."""

    class Steered(nn.Module):
        def __init__(self, path=None) -> None:
            super().__init__()
            self.net, self.path = nn.Linear(2, 2), path

        def forward(self, t, z, c=None):
            c = self.path(t) if c is None else c["c"] if isinstance(c, dict) else c
            return torch.tanh(self.net(z)) * c

    def solved(inside: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        path = Path()
        made = layer(Steered(path if inside else None), method="rk4", adjoint=METHODS[name](), evolve=["net.weight"])
        torch.manual_seed(4)
        z0 = torch.randn(4, 2, **FLOAT64, requires_grad=True)
        scale = torch.ones((), **FLOAT64, requires_grad=True)
        paths = {"module": path, "function": lambda t: path(t) * scale, "in a nest": {"c": path}}
        out = made(z0) if inside else made(z0, paths[takes])
        own = [p for n, p in made.named_parameters() if "path" not in n]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [z0, path.a, *own])]

    assert error(solved(False), solved(True)) < 1e-12


def test_functions_of_time_with_gradients_in_time():
    t1 = torch.tensor(0.9, **FLOAT64, requires_grad=True)

    class Driven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, z, c):
            return self.net(z) * c

    torch.manual_seed(0)
    field = nc.CoupledField(Driven().double(), nc.Static())
    z0 = torch.randn(3, 2, **FLOAT64)

    def loss(end, adjoint):
        return (
            nc.solve(
                field, z0, (torch.zeros((), **FLOAT64), end), steps=4, method="rk4", adjoint=adjoint, args=(torch.cos,)
            )
            .z.square()
            .sum()
        )

    found, expected = (float(torch.autograd.grad(loss(t1, a), t1)[0]) for a in (nc.DiscreteAdjoint(), nc.Backprop()))
    assert found == pytest.approx(expected, rel=1e-12)
    h = 1e-6
    numeric = (loss(t1.detach() + h, nc.Backprop()) - loss(t1.detach() - h, nc.Backprop())) / (2 * h)
    assert found == pytest.approx(float(numeric), rel=1e-6)
    with pytest.raises(ValueError, match=r"a number of"):
        nc.solve(field, z0, (torch.zeros((), **FLOAT64), t1), steps=4, args=(lambda t: torch.tensor(float(t)),))


def test_a_bound_field_is_a_field_for_other_solvers():
    exact, x = layer(method="rk4", steps=40), inputs()
    bound = exact.field.bind(x["c"], scale=x["scale"], pair=(x["a"], {"b": x["b"]}))
    t = torch.linspace(0, 1, 41, **FLOAT64)
    state = odeint(bound, bound.initial_state(x["z0"]), t, method="rk4")
    assert torch.allclose(state[0][-1], run(exact, x), atol=1e-8)
    assert [*bound.parameters()] == [*exact.field.parameters()]
    flat = nc.FlatField(bound, x["z0"])
    assert flat(t[0], flat.initial_state(x["z0"])).shape == flat.initial_state(x["z0"]).shape


def test_trajectories_and_solve_take_inputs():
    exact, x = layer(), inputs()
    given = {"scale": x["scale"]}
    path = exact.trajectory(x["z0"], [0.0, 0.5, 1.0], args=(x["c"],), kwargs=given)
    assert torch.equal(path[-1], exact(x["z0"], x["c"], scale=x["scale"]))
    solution = nc.solve(exact.field, x["z0"], [0.0, 0.5, 1.0], steps=3, args=(x["c"],), kwargs=given)
    assert torch.equal(solution.z, path)
    assert set(solution.weights([0.0, 1.0])) == {"z.weight", "c.weight"}


@pytest.mark.parametrize("name", METHODS)
def test_inputs_that_are_overwritten_before_the_backward_pass_are_noticed(name):
    exact, x = layer(adjoint=METHODS[name]()), inputs()
    constant = torch.randn(4, 2, **FLOAT64)
    loss = exact(x["z0"], constant).square().sum()
    constant.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|overwritten"):
        loss.backward()


def test_a_function_of_time_that_updates_its_buffers_is_refused():
    path = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)).double()
    exact, x = layer(), inputs()
    with pytest.raises(ValueError, match=r"updates its buffers when it is called.* put it in evaluation mode"):
        exact(x["z0"], lambda t: path(t.expand(4, 1)))
    path.eval()
    exact(x["z0"], lambda t: path(t.expand(4, 1)))


def test_double_backward_reaches_inputs():
    def second(adjoint):
        exact, x = layer(adjoint=adjoint), inputs()
        (first,) = torch.autograd.grad(run(exact, x).square().sum(), x["c"], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), list(x.values())))

    assert error(second(nc.DiscreteAdjoint()), second(nc.Backprop())) < 1e-12


def test_per_sample_gradients_of_inputs_and_parameters():
    exact, x = layer(), {name: value.detach() for name, value in inputs().items()}
    parameters = dict(exact.named_parameters())

    def loss(parameters, z, c):
        return torch.func.functional_call(exact, parameters, (z[None], c[None])).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 2)), (None, 0, 0))(parameters, x["z0"], x["c"])
    for i in range(4):
        c = x["c"][i].clone().requires_grad_()
        expected = torch.autograd.grad(loss(parameters, x["z0"][i], c), [*parameters.values(), c])
        ours = [found[0][name][i] for name in parameters] + [found[1][i]]
        assert error(ours, expected) < 1e-12


def test_inputs_keep_their_dtype_under_autocast():
    seen = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3)

        def forward(self, z, c):
            seen.append(c.dtype)
            return self.net(z) * c.to(z.dtype)

    exact = nc.CoupledODE(Looking(), nc.Static(), steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        exact(torch.randn(2, 3), torch.randn(2, 3, **FLOAT64)).sum().backward()
    assert set(seen) == {torch.float64}


def test_compiled_layers_take_inputs():
    exact, x = layer(), inputs()
    compiled = torch.compile(exact, backend="aot_eager", fullgraph=True)

    def found(layer):
        out = layer(x["z0"], x["c"], scale=x["scale"])
        return [out, *torch.autograd.grad(out.square().sum(), [x["c"], x["scale"], *exact.parameters()])]

    assert error(found(compiled), found(exact)) < 1e-12


def test_exported_and_baked_layers_take_inputs():
    exact, x = layer().eval(), inputs()
    given = (x["z0"].detach(), x["c"].detach())
    expected = exact(*given)
    batch = torch.export.Dim("batch", min=2, max=64)
    for made in (exact, exact.bake()):
        assert torch.allclose(made(*given), expected, atol=1e-14)
    program = torch.export.export(exact.bake(), given, dynamic_shapes={"z": {0: batch}, "args": ({0: batch},)})
    assert torch.allclose(program.module()(*given), expected, atol=1e-14)
    smaller = tuple(part[:2] for part in given)
    assert torch.allclose(program.module()(*smaller), exact(*smaller), atol=1e-14)
    with pytest.raises(TypeError, match="a baked layer takes inputs that are constant, got Path"):
        exact.bake()(given[0], Path())


class Two(nn.Module):
    def __init__(self, name: str = "c") -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.name = name


def with_signature(source: str) -> nn.Module:
    space: dict = {}
    exec(f"def forward(self, {source}):\n    return self.net(z)", space)
    made = Two()
    type_ = type("Made", (Two,), {"forward": space["forward"]})
    made.__class__ = type_
    return made


@pytest.mark.parametrize(
    ("source", "takes_time"), [("t, z", True), ("z", False), ("t, z, c", True), ("z, t", False), ("z, c=None", False)]
)
def test_time_is_taken_by_name_and_not_by_the_number_of_parameters(source, takes_time):
    field = nc.CoupledField(with_signature(source), nc.Static())
    assert field.takes_time is takes_time


def test_time_is_taken_where_it_is_said():
    assert nc.CoupledField(with_signature("s, z"), nc.Static(), takes_time=True).takes_time
    layer = nc.CoupledODE(with_signature("s, z"), nc.Static(), steps=2, takes_time=True)
    assert layer(torch.randn(2, 3)).shape == (2, 3)
    field = nc.CoupledField(with_signature("t, z").train(), nc.Static(), takes_time=False)
    assert not field.takes_time


def test_two_readings_of_two_parameters_are_both_named():
    made = nc.CoupledODE(with_signature("x, z"), nc.Static(), steps=2)
    message = (
        r"dynamics takes \(x, z\): if x is the time, name it t or say takes_time=True; if z is an input besides the "
        r"state, give it: layer\(z0, z\) or solve\(\.\.\., args=\(z,\)\)"
    )
    with pytest.raises(TypeError, match=message):
        made(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, z: f(z), r"dynamics takes \(z, c, scale, pair\): if z is the time, name it t"),
        (lambda f, z: f(z, z, z), r"the inputs after the state are 2 by position: too many positional arguments"),
        (lambda f, z: f(z, z, mask=z), r"are 1 by position and mask: got an unexpected keyword argument 'mask'"),
        (lambda f, z: f(z, scale=z), r"missing a required argument: 'c'"),
        (lambda f, z: nc.solve(f.field, z, steps=2, args=z), r"args must be a tuple of inputs, got Tensor"),
        (lambda f, z: f.trajectory(z, [0.0, 1.0], args=[z]), r"args must be a tuple of inputs, got list"),
    ],
)
def test_inputs_that_f_does_not_take(call, message):
    with pytest.raises(TypeError, match=message):
        call(layer(), torch.randn(4, 3, **FLOAT64))


def test_an_input_of_another_length_is_named_with_its_shape():
    with pytest.raises(ValueError, match=r"state of shape \(4, 3\) and dtype torch.float64, with inputs \(5, 2\): "):
        layer()(torch.randn(4, 3, **FLOAT64), torch.randn(5, 2, **FLOAT64))


def test_three_parameters_need_inputs_and_say_which():
    made = nc.CoupledODE(with_signature("t, z, c, d"), nc.Static(), steps=2)
    with pytest.raises(TypeError, match=r"dynamics takes \(t, z, c, d\), and c, d is missing: give inputs"):
        made(torch.randn(2, 3))


def test_dynamics_without_a_state_are_refused():
    with pytest.raises(TypeError, match=r"with inputs after that, but its forward takes \['t'\]"):
        nc.CoupledField(with_signature("t, *, z=None"), nc.Static())


@pytest.mark.parametrize("kernel", [nc.Box(0.5), nc.Exponential(2.0), nc.SampleAndHold(2)])
def test_every_kernel_takes_inputs(kernel):
    found, expected = (
        gradients(layer(kernel=kernel, steps=4, adjoint=adjoint), inputs())
        for adjoint in (nc.DiscreteAdjoint(None), nc.Backprop())
    )
    assert error(found, expected) < 1e-12
