"""Layers and solves within what their users put around them, and with what they put inside."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint

import neuralode_coupled as nc
from tests.helpers import oracle

ADJOINTS = [
    nc.Backprop(),
    nc.DiscreteAdjoint(),
    nc.DiscreteAdjoint(None),
    nc.DiscreteAdjoint(2),
    nc.DiscreteAdjoint(storage="cpu"),
    nc.DiscreteAdjoint(keep_last=2),
    nc.DiscreteAdjoint(2, weights="recomputed", keep_last=1),
    nc.ReversibleAdjoint(),
    nc.ReversibleAdjoint(weights="recomputed"),
]


def smooth(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))


def layer(dynamics: nn.Module | None = None, adjoint: nc.GradientMethod | None = None, **options) -> nc.CoupledODE:
    torch.manual_seed(0)
    dynamics = smooth() if dynamics is None else dynamics
    options = {"steps": 4} | options
    made = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), adjoint=adjoint, **options)
    return oracle.randomize(made.double())


def activations() -> torch.Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(of, z0: torch.Tensor, wanted) -> list[torch.Tensor]:
    return list(torch.autograd.grad(of(z0).square().sum(), [z0, *wanted]))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_layer_may_stand_inside_of_torchs_checkpoint(adjoint, early_stop):
    made, z0 = layer(adjoint=adjoint), activations()
    expected = gradients(made, z0, made.parameters())
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        found = gradients(lambda z: checkpoint(made, z, use_reentrant=False), z0, made.parameters())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_solve_may_stand_inside_of_torchs_checkpoint(method):
    net, z0, t = smooth().double(), activations(), torch.linspace(0, 1, 4, dtype=torch.float64)

    def solve(z):
        return nc.odeint_dto(lambda t, y: net(y), z, t, method=method)

    expected = gradients(solve, z0, net.parameters())
    found = gradients(lambda z: checkpoint(solve, z, use_reentrant=False), z0, net.parameters())
    torch.testing.assert_close(found, expected)


ADAPTIVE = {"steps": None, "method": "dopri5", "rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize(
    ("adjoint", "options"),
    [
        *((adjoint, {}) for adjoint in [*ADJOINTS, nc.ContinuousAdjoint()]),
        *(
            (adjoint, ADAPTIVE)
            for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.ContinuousAdjoint())
        ),
    ],
    ids=str,
)
def test_functional_calls_differentiate_the_tensors_that_they_are_given(adjoint, options):
    made, z0 = layer(adjoint=adjoint, **options), activations()
    shift = {name: p.detach() + 0.1 for name, p in made.named_parameters()}
    there = layer(adjoint=adjoint, **options)
    there.load_state_dict(shift)
    expected = gradients(there, z0, there.parameters())
    given = {name: p.clone().requires_grad_() for name, p in shift.items()}
    found = gradients(lambda z: functional_call(made, given, (z,)), z0, given.values())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("inner", ADJOINTS, ids=str)
def test_layers_within_layers(adjoint, inner):
    def nested(inner, adjoint):
        return nc.CoupledODE(layer(adjoint=inner, steps=2), nc.Static(), steps=3, adjoint=adjoint)

    z0 = activations()
    made, unrolled = nested(inner, adjoint), nested(reference(inner), reference(adjoint))
    torch.testing.assert_close(
        gradients(made, z0, made.parameters()), gradients(unrolled, z0, unrolled.parameters()), rtol=1e-7, atol=1e-9
    )


def reference(adjoint: nc.GradientMethod) -> nc.GradientMethod:
    """What has the same discrete map and needs no recomputed weights."""
    return nc.ReversibleAdjoint() if isinstance(adjoint, nc.ReversibleAdjoint) else nc.Backprop()


class Conditioned(nn.Module):
    """f with a tensor that is given to it between the solves."""

    condition: torch.Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.net = smooth()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.net(z + self.condition)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("adjoint", "options"),
    [
        *((adjoint, {}) for adjoint in [*ADJOINTS, nc.ContinuousAdjoint()]),
        *(
            (adjoint, ADAPTIVE)
            for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.ContinuousAdjoint())
        ),
    ],
    ids=str,
)
def test_a_tensor_that_is_no_parameter_gets_its_gradient(adjoint, options, create_graph):
    made, z0 = layer(Conditioned(), adjoint, **options), activations()
    source = torch.ones(4, dtype=torch.float64, requires_grad=True)
    made.field.dynamics.condition = 2 * source.detach()
    given = [z0, *made.parameters()]
    torch.autograd.grad(made(z0).square().sum(), given)  # without a gradient it is a constant
    *_, exact = differentiated(made, z0, [*given, source], reference(adjoint))
    if create_graph and isinstance(adjoint, nc.ContinuousAdjoint):
        with pytest.raises(RuntimeError, match=r"ContinuousAdjoint has no second derivative: .* use DiscreteAdjoint"):
            differentiated(made, z0, [*given, source], adjoint, create_graph=True)
        return
    *_, found = differentiated(made, z0, [*given, source], adjoint, create_graph=create_graph)
    if isinstance(adjoint, nc.ContinuousAdjoint):  # on so coarse a grid its error is large
        assert found.abs().sum() > 0
    else:
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)


def differentiated(made, z0, wanted, adjoint, create_graph=False):
    made.adjoint, made.field.dynamics.condition = adjoint, 2 * wanted[-1]
    return torch.autograd.grad(made(z0).square().sum(), wanted, create_graph=create_graph)


class Inside(nn.Module):
    """f that evaluates its network under torch's checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smooth()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.net, z, use_reentrant=False)


@pytest.mark.parametrize(
    "adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.ReversibleAdjoint()], ids=str
)
def test_torchs_checkpoint_inside_of_f_is_refused_where_it_would_take_w0_for_theta(adjoint):
    made, z0 = layer(Inside(), adjoint), activations()
    with pytest.raises(ValueError, match=r"^dynamics uses torch.utils.checkpoint.*around the layer$"):
        gradients(made, z0, made.parameters())
    with torch.no_grad():
        made(z0)
    constant = nc.CoupledODE(made.field.dynamics, nc.Static(), steps=4, adjoint=adjoint)
    plain = nc.CoupledODE(made.field.dynamics.net, nc.Static(), steps=4, adjoint=adjoint)
    torch.testing.assert_close(gradients(constant, z0, constant.parameters()), gradients(plain, z0, plain.parameters()))


def test_hooks_on_saved_tensors_may_stand_around_a_layer():
    made, z0 = layer(adjoint=nc.Backprop()), activations()
    with torch.autograd.graph.save_on_cpu():
        found = gradients(made, z0, made.parameters())
    torch.testing.assert_close(found, gradients(made, z0, made.parameters()))


class Statistics(nn.Module):
    """f that assigns its buffer anew, or overwrites it."""

    mean: torch.Tensor

    def __init__(self, assign: bool) -> None:
        super().__init__()
        self.net, self.assign = smooth(), assign
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        mean = z.detach().mean(0)
        if self.assign:
            self.mean = mean
        else:
            self.mean.copy_(mean)
        return self.net(z)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_buffer_that_is_assigned_anew_is_an_error(adjoint):
    """The solve goes on with the one it knows: the update would be lost."""
    z0 = activations()
    with pytest.raises(ValueError, match=r"'mean' was assigned a new tensor.*self\.mean\.copy_"):
        layer(Statistics(assign=True), adjoint)(z0)
    made = layer(Statistics(assign=False), adjoint)
    made(z0).sum().backward()
    assert made.field.dynamics.mean.abs().sum() > 0


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_buffer_that_is_assigned_anew_is_an_error_of_a_solve(method):
    net, z0, t = Statistics(assign=True).double(), activations(), torch.linspace(0, 1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mean' was assigned a new tensor"):
        nc.odeint_dto(lambda t, y: net(y), z0, t, method=method)[-1].sum().backward()


class Overwriting(nn.Module):
    """f that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smooth()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.net(torch.relu_(z))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"method": "rk4"}, ADAPTIVE], ids=str)
@pytest.mark.parametrize("adjoint", [*ADJOINTS, nc.ContinuousAdjoint()], ids=str)
def test_dynamics_that_overwrite_their_input_are_refused(adjoint, options, grad):
    if options is ADAPTIVE and adjoint not in (
        nc.Backprop(),
        nc.DiscreteAdjoint(),
        nc.DiscreteAdjoint(None),
        nc.ContinuousAdjoint(),
    ):
        return
    made, z0 = layer(Overwriting(), adjoint, **options), activations().detach()
    with pytest.raises(ValueError, match=r"changes its input in place.*inplace=False"), torch.set_grad_enabled(grad):
        made(z0)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "bosh3"])
def test_functions_that_overwrite_their_input_are_refused(method, grad):
    net, z0, t = Overwriting().double(), activations().detach(), torch.linspace(0, 1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"changes its input in place.*inplace=False"), torch.set_grad_enabled(grad):
        nc.odeint_dto(lambda t, y: net(y), z0, t, method=method)


def test_threads_may_compute_with_one_layer_at_a_time():
    made, z0 = layer(smooth(64)).eval(), activations().detach()
    with torch.no_grad():
        expected = made(z0)
    differences: list[float] = []

    def work():
        with torch.no_grad():
            differences.extend(float((made(z0) - expected).abs().max()) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 200
    assert max(differences) == 0.0
    assert all(isinstance(p, nn.Parameter) for p in made.parameters())
    torch.testing.assert_close(made(z0), expected)


@pytest.mark.parametrize("adjoint", [*ADJOINTS, nc.ContinuousAdjoint()], ids=str)
def test_a_module_that_is_there_twice_is_one_with_two_that_share_their_parameters(adjoint):
    twice = nn.Linear(4, 4)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight, second.bias = first.weight, first.bias
    made = layer(nn.Sequential(twice, nn.Tanh(), twice), adjoint)
    tied = layer(nn.Sequential(first, nn.Tanh(), second), adjoint)
    tied.load_state_dict(made.state_dict())
    z0 = activations()
    for _ in range(2):  # also behind a solve
        found = gradients(made, z0, made.parameters())
        torch.testing.assert_close(found, gradients(tied, z0, tied.parameters()))
    assert all(isinstance(p, nn.Parameter) for p in made.parameters())


def test_the_optimality_system_of_a_module_that_is_there_twice():
    twice = nn.Linear(4, 4)
    made, z0 = layer(nn.Sequential(twice, nn.Tanh(), twice)), activations().detach()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    assert nc.kkt.check(made, z0, show=False).exact
    assert all(torch.equal(before[name], p) for name, p in made.named_parameters())


def test_a_solve_of_a_module_that_is_there_twice():
    net, z0, t = nn.Linear(4, 4).double(), activations(), torch.linspace(0, 1, 4, dtype=torch.float64)
    both = nn.Sequential(net, nn.Tanh(), net)
    expected = gradients(lambda z: odeint(lambda t, y: both(y), z, t, method="rk4"), z0, net.parameters())
    for _ in range(2):
        found = gradients(lambda z: nc.odeint_dto(lambda t, y: both(y), z, t, method="rk4"), z0, net.parameters())
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_frozen_parameters_of_a_solve_are_held_and_watched(method):
    z0, t = activations(), torch.linspace(0, 1, 4, dtype=torch.float64)
    net = smooth().double().requires_grad_(False)

    class Solve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, z):
            return nc.odeint_dto(lambda t, y: self.net(y), z, t, method=method)

    solve, other = Solve(), {name: p + 0.1 for name, p in Solve().named_parameters()}
    (found,) = gradients(lambda z: functional_call(solve, other, (z,)), z0, [])
    end = solve(z0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end[-1].sum().backward()
    (expected,) = gradients(solve, z0, [])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_jacobians_in_one_batch(adjoint):
    made, z0 = layer(adjoint=adjoint), activations()
    end = made(z0).sum(0)
    weight = made.field.dynamics[0].weight
    each = [torch.autograd.grad(end, weight, row, retain_graph=True)[0] for row in torch.eye(4, dtype=torch.float64)]
    rows = torch.eye(4, dtype=torch.float64)
    (batched,) = torch.autograd.grad(end, weight, rows, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(each))


class Symmetric(nn.Module):
    """A parametrisation."""

    def forward(self, w):
        return w.triu() + w.triu(1).mT


def parametrised(adjoint, **options) -> nc.CoupledODE:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(linear, "weight", Symmetric())
    return layer(nn.Sequential(linear, nn.Tanh()), adjoint, **options)


@pytest.mark.parametrize("where", ["the forward pass", "both passes"])
@pytest.mark.parametrize(
    ("adjoint", "options"),
    [*((a, {}) for a in [*ADJOINTS, nc.ContinuousAdjoint()]), (nc.DiscreteAdjoint(), ADAPTIVE)],
    ids=str,
)
def test_cached_parametrisations_are_left_out(adjoint, options, where):
    """theta evolves, gradients arrive, and what is read of the weight outside keeps its own."""
    results = []
    for cached in (True, False):
        made, z0 = parametrised(adjoint, **options), activations().detach()
        with contextlib.ExitStack() as stack:
            if cached:
                stack.enter_context(nn.utils.parametrize.cached())
            loss = made(z0).square().sum() + made.field.dynamics[0].weight.square().sum()
            if where == "the forward pass":
                stack.close()
            results.append(oracle.gradients(loss, dict(made.named_parameters())))
    assert oracle.largest_error(*results) < 1e-12


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_cached_parametrisations_are_left_out_of_solves(method):
    linear, results = nn.Linear(3, 3).double(), []
    nn.utils.parametrize.register_parametrization(linear, "weight", Symmetric())
    options = {"options": {"first_step": 0.2}} if method == "dopri5" else {}
    for solver in (nc.odeint_dto, odeint):
        y0, t = torch.ones(2, 3, dtype=torch.float64), torch.linspace(0, 1, 3, dtype=torch.float64)
        with nn.utils.parametrize.cached():
            z = solver(lambda t, y: torch.tanh(linear(y)), y0, t, method=method, **options)
            loss = z.square().sum() + linear.weight.square().sum()
            results.append(oracle.gradients(loss, dict(linear.named_parameters())))
    assert oracle.largest_error(*results) < 1e-8


class Conservative(nn.Module):
    """f that differentiates an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            q = z if z.requires_grad else z.detach().requires_grad_()
            return -torch.autograd.grad(self.net(q).sum(), q, create_graph=True)[0]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_torchs_checkpoint_around_a_layer_whose_dynamics_differentiate(adjoint):
    """It must not run the layer again inside of an evaluation, where theta stands in the place of w0."""
    made, z0 = layer(Conservative(), adjoint), activations()
    expected = gradients(made, z0, made.parameters())

    def outside():
        return gradients(lambda z: checkpoint(made, z, use_reentrant=False), z0, made.parameters())

    if isinstance(adjoint, nc.Backprop):
        with pytest.raises(ValueError, match=r"inside of its own evaluation: .* use DiscreteAdjoint\(\)"):
            outside()
    else:
        torch.testing.assert_close(outside(), expected)


@pytest.mark.parametrize("adjoint", [*ADJOINTS, nc.ContinuousAdjoint()], ids=str)
def test_replaced_tensors_inside_of_torchs_checkpoint_are_refused(adjoint):
    """torch recomputes with the module's own: 85% off, without a word."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(None, adjoint)

        def forward(self, z):
            return checkpoint(self.layer, z, use_reentrant=False)

    block, z0 = Block(), activations()
    others = {name: (2 * p).detach().requires_grad_() for name, p in block.named_parameters()}
    with pytest.raises(ValueError, match=r"replaced for this call, as by functional_call.*leave the checkpoint out"):
        functional_call(block, others, (z0,))
    functional_call(block.layer, {name.removeprefix("layer."): p for name, p in others.items()}, (z0,))
    net = smooth().double()
    func = Solving(net)
    replaced = {f"net.{name}": (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"replaced for this call"):
        functional_call(func, replaced, (z0,))


class Solving(nn.Module):
    """A block that solves under torch's checkpoint."""

    def __init__(self, net) -> None:
        super().__init__()
        self.net = net

    def forward(self, z):
        t = torch.linspace(0, 1, 3, dtype=torch.float64)
        return checkpoint(lambda z: nc.odeint_dto(lambda t, y: self.net(y), z, t), z, use_reentrant=False)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("checkpoints", ["auto", None])
def test_threads_over_layers_that_share_a_module(grad, checkpoints):
    """Each sees its own weights, and in the end all Parameters are Parameters."""
    shared = smooth(32)
    first = layer(nn.Sequential(shared, nn.Tanh()), nc.DiscreteAdjoint(checkpoints))
    second = layer(nn.Sequential(nn.Tanh(), shared), nc.DiscreteAdjoint(checkpoints))
    z0, t = activations().detach(), torch.linspace(0, 1, 5, dtype=torch.float64)

    # Read beforehand, as by an optimiser: meanwhile there may be other tensors in their places.
    parameters = {module: list(module.parameters()) for module in (first, second, shared)}

    def alone(made):
        return torch.autograd.grad(made(z0).sum(), parameters[made]) if grad else [made(z0).detach()]

    def solved():
        z = nc.odeint_dto(lambda t, y: shared(y), z0, t, method="rk4")
        return torch.autograd.grad(z.sum(), parameters[shared]) if grad else [z.detach()]

    tasks = [lambda: alone(first), lambda: alone(second), solved] * 2
    expected, errors = [task() for task in tasks], []

    def work(i):
        try:
            for _ in range(15):
                torch.testing.assert_close(tasks[i](), expected[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors
    assert all(isinstance(p, nn.Parameter) for made in (first, second) for p in made.parameters())


def test_a_backward_pass_on_another_thread_does_not_wait_for_who_waits_for_it():
    """As on autograd's threads: f solves something inside of itself, and differentiates it."""
    inner = smooth().double()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, z):
            with torch.enable_grad():
                q = z.detach().requires_grad_()
                inside = nc.odeint_dto(
                    lambda t, y: self.inner(y), q, torch.linspace(0, 1, 3, dtype=torch.float64), method="rk4"
                )
            found = []
            thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(inside.sum(), q)), daemon=True)
            thread.start()
            thread.join(timeout=60)
            return found[0]

    made = layer(Outer(), nc.DiscreteAdjoint())
    with torch.no_grad():
        assert made(activations().detach()).isfinite().all()


class Visited(nn.Module):
    """tanh of a product; one visitor at a time. It waits for ``leave``, where that is given, and says so before."""

    def __init__(self) -> None:
        super().__init__()
        self.product, self.leave = nn.Linear(4, 4), None
        self.inside, self.crowd, self.waits = 0, 0, threading.Event()

    def forward(self, z):
        self.inside += 1
        self.crowd = max(self.crowd, self.inside)
        if self.leave is not None:
            self.waits.set()
            assert self.leave.wait(timeout=60)
        self.inside -= 1
        return self.product(z).tanh()


@pytest.mark.parametrize("over", [False, True])
def test_a_backward_pass_waits_for_a_thread_that_has_gone_on(over):
    """The thread of the forward pass solves once more. Or it is over, and the system gives its number to a new one."""
    dynamics = Visited()
    made, z0 = layer(dynamics, nc.DiscreteAdjoint(None)), activations()
    own, expected = dynamics.product.weight, gradients(made, z0, made.parameters())
    wanted, losses, found = [z0, *made.parameters()], [], []
    solved, go = threading.Event(), threading.Event()

    def forward():
        losses.append(made(z0).square().sum())
        solved.set()

    def more():
        assert go.wait(timeout=60)
        with torch.no_grad():
            made(z0)

    def run(*tasks):
        thread = threading.Thread(target=lambda: [task() for task in tasks], daemon=True)
        thread.start()
        return thread

    if over:
        run(forward).join(timeout=60)
        worker = run(more)
    else:
        worker = run(forward, more)
        assert solved.wait(timeout=60)
    dynamics.leave = threading.Event()
    go.set()
    assert dynamics.waits.wait(timeout=60)
    backward = run(lambda: found.extend(torch.autograd.grad(losses[0], wanted)))
    backward.join(timeout=0.2)
    dynamics.leave.set()
    for thread in (worker, backward):
        thread.join(timeout=60)
    assert dynamics.crowd == 1
    assert dynamics.product.weight is own
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_parts_may_be_replaced_between_solves():
    """The next solve has the new ones: nothing is remembered of where the old ones kept their weights."""
    made, z0 = layer(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), activations().detach()
    t, state = torch.tensor([0.0, 1.0], dtype=torch.float64), made.field.initial_state(z0)
    ways = [
        lambda made: made(z0),
        lambda made: odeint(made.field, made.field.initial_state(z0), t, method="rk4")[0][-1],
        lambda made: made.field(t[0], state)[0],
        lambda made: nc.odeint_dto(lambda t, z: made.field.dynamics(z), z0, t, method="rk4")[-1],
    ]
    for solved in ways:
        with torch.no_grad():
            before = solved(made)
            made.field.dynamics[0] = nn.Linear(4, 4).double()
            assert torch.equal(solved(made), solved(copy.deepcopy(made)))
            assert solved is ways[2] or not torch.allclose(solved(made), before)
