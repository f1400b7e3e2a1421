"""torchdiffeq, and what is built on it or on the same ideas: torchcde, torchsde, spectral norm inside of a solve."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.behaviour import Behaviour, Seen, distance

UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)


class Field(nn.Module):
    """dy/dt = g(y), g a small network in float64."""

    def __init__(self, width: int = 3, hidden: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class Solve(nn.Module):
    """A module that solves with another one."""

    def __init__(self, field: nn.Module, solve: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.field, self.solve = field, solve

    def forward(self, y0: Tensor) -> Tensor:
        return self.solve(self.field, y0)


def adjoint(field: nn.Module, y0: Tensor) -> Tensor:
    return torchdiffeq.odeint_adjoint(field, y0, UNIT, rtol=1e-8, atol=1e-8)[-1]  # pyright: ignore[reportReturnType]


def lost(model: Solve, y0: Tensor) -> tuple[float, float]:
    """The norms of the gradient inside of functional_call, in the tensors that it was given, and without it."""
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    norms = []
    for output, leaves in (
        (functional_call(model, given, (y0,)), list(given.values())),
        (model(y0), list(model.parameters())),
    ):
        grads = torch.autograd.grad(output.square().sum(), leaves)
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    return norms[0], norms[1]


def in_functional_call() -> Seen:
    import neuralode_coupled as nc

    norms = []
    for solve in (adjoint, lambda field, y0: nc.odeint_dto(field, y0, UNIT, rtol=1e-8, atol=1e-8)[-1]):
        torch.manual_seed(0)
        norms.append(lost(Solve(Field(), solve), torch.randn(4, 3, dtype=torch.float64)))
    (inside, outside), (ours, _) = norms
    text = (
        f"norm of the gradient {inside:g}, without functional_call {outside:.4g}; by `nc.odeint_dto` inside {ours:.4g}"
    )
    return Seen(inside == 0 < outside and abs(ours - outside) < 1e-3 * outside, text)


class Steered(Field):
    """dy/dt = g(y) + u, which counts its evaluations; u is an attribute, as the inputs of a controlled system are."""

    u: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.net(y) + self.u


def rollout(solve: Callable[[Steered, Tensor], Tensor], solves: int) -> tuple[Tensor, int]:
    """The gradient in the field's parameters of solves in a row, whose inputs a policy makes of the last state; the
    number of evaluations."""
    torch.manual_seed(0)
    net, policy, y = Field().net, nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    loss, fields = y.new_zeros(()), []
    for _ in range(solves):
        field = Steered()
        field.net, field.u = net, policy(y)
        y = solve(field, y)
        loss = loss + y.square().sum()
        fields.append(field)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    return torch.cat([g.flatten() for g in gradients]), sum(field.calls for field in fields)


def inputs_counted_twice() -> Seen:
    import neuralode_coupled as nc

    def named(field: Steered, y: Tensor) -> Tensor:
        known = (*field.parameters(), field.u)
        return torchdiffeq.odeint_adjoint(field, y, UNIT, method="rk4", adjoint_params=known)[-1]  # pyright: ignore

    def through(field: Steered, y: Tensor) -> Tensor:
        return torchdiffeq.odeint(field, y, UNIT, method="rk4")[-1]  # pyright: ignore[reportReturnType]

    def ours(field: Steered, y: Tensor) -> Tensor:
        return nc.odeint_dto(field, y, UNIT, method="rk4")[-1]

    found = {solves: [rollout(solve, solves) for solve in (named, through, ours)] for solves in (1, 2, 3)}
    off = [float((theirs[0] - exact[0]).norm() / exact[0].norm()) for theirs, exact, _ in found.values()]
    same = max(float((own[0] - exact[0]).norm() / exact[0].norm()) for _, exact, own in found.values())
    counts = [", ".join(str(runs[i][1]) for runs in found.values()) for i in (0, 2)]
    text = (
        f"1, 2, 3 solves: {', '.join(f'{x:.0%}' for x in off)} off, {counts[0]} evaluations; "
        f"`nc.odeint_dto` {same:.0e} off, {counts[1]} evaluations"
    )
    grows = found[3][0][1] > 4 * found[2][0][1] > 12 * found[1][0][1]
    return Seen(off[0] < 0.05 < off[1] and grows and same < 1e-10, text)


def cde_in_functional_call() -> Seen:
    import torchcde

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 6).double()

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.linear(z).tanh().view(*z.shape, 2)

    torch.manual_seed(0)
    knots = torch.randn(4, 10, 2, dtype=torch.float64)
    path = torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(knots))

    def solve(field: nn.Module, z0: Tensor) -> Tensor:
        options = {"step_size": 0.1}
        solved: Any = torchcde.cdeint(path, field, z0, path.interval, True, method="rk4", options=options)
        return solved[..., -1, :]

    inside, outside = lost(Solve(Vectors(), solve), torch.randn(4, 3, dtype=torch.float64))
    return Seen(inside == 0 < outside, f"norm of the gradient {inside:g}, without functional_call {outside:.2g}")


class Noisy(nn.Module):
    """dy = tanh(A y + b) dt + dW / 10, which counts its evaluations."""

    noise_type = "diagonal"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.sde_type, self.calls = kind, 0
        self.linear = nn.Linear(3, 3).double()

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(y).tanh()

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * torch.ones_like(y)


def noise(y0: Tensor) -> Any:
    import torchsde

    return torchsde.BrownianInterval(0.0, 1.0, size=y0.shape, dtype=y0.dtype, entropy=1)


def sde_in_functional_call() -> Seen:
    import torchsde

    torch.manual_seed(0)

    def solve(field: nn.Module, y0: Tensor) -> Tensor:
        solved: Any = torchsde.sdeint_adjoint(field, y0, UNIT, bm=noise(y0), dt=0.1, method="midpoint")
        return solved[-1]

    inside, outside = lost(Solve(Noisy("stratonovich"), solve), torch.randn(4, 3, dtype=torch.float64))
    return Seen(inside == 0 < outside, f"norm of the gradient {inside:g}, without functional_call {outside:.2g}")


def second_derivatives() -> Seen:
    """A penalty on the gradient of a network with a solve inside: its gradient, by backward()."""
    import neuralode_coupled as nc

    off = {"all parameters": [], "the layer before the solve": [], "`nc.odeint_dto`": []}
    for seed in range(4):
        torch.manual_seed(seed)
        before, field, behind = nn.Linear(2, 3).double(), Field(), nn.Linear(3, 1).double()
        x = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
        parameters = [*before.parameters(), *field.parameters(), *behind.parameters()]
        found = []
        for odeint in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint, nc.odeint_dto):
            solved: Any = odeint(field, torch.tanh(before(x)), UNIT, rtol=1e-9, atol=1e-9)
            output = behind(torch.tanh(solved[-1]))
            (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            slope.square().sum().backward()
            found.append([p.grad.clone() for p in parameters if p.grad is not None])
        off["all parameters"].append(distance(found[1], found[0]))
        off["the layer before the solve"].append(distance(found[1][:2], found[0][:2]))
        off["`nc.odeint_dto`"].append(distance(found[2], found[0]))
    ours = max(off.pop("`nc.odeint_dto`"))
    text = "; ".join(f"{name} {min(x):.0%} to {max(x):.0%} off" for name, x in off.items())
    there = min(off["the layer before the solve"]) > 0.05 and ours < 1e-4
    return Seen(there, f"{text} (four seeds); `nc.odeint_dto` {ours:.0e}")


def explicit_adams() -> Seen:
    errors = []
    for steps in (16, 32, 64):
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        end: Any = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1, dtype=t.dtype), t, method="explicit_adams")
        errors.append(abs(end[-1].item() - math.exp(-1)))
    text = "y' = -y, 16, 32, 64 steps: errors " + ", ".join(f"{error:.1e}" for error in errors)
    return Seen(errors[0] < errors[1] < errors[2], text)


def first_step() -> Seen:
    y0 = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    off = []
    for options in (None, {"first_step": 0.1}):
        end: Any = torchdiffeq.odeint(lambda t, y: -y, y0, UNIT, rtol=1e-3, atol=1e-3, options=options)
        (gradient,) = torch.autograd.grad(end[-1], y0)
        off.append(abs((gradient * y0 / end[-1] - 1).item()))
    text = f"y' = -y, tolerance 1e-3: the gradient in y0 is {off[0]:.1e} from y(1) / y0; with `first_step` {off[1]:.0e}"
    return Seen(off[0] > 1e-6 and off[1] < 1e-12, text)


def jump() -> Seen:
    times: list[float] = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        times.append(t.item())
        return -y if t < 0.5 else y

    options = {"jump_t": torch.tensor([0.5], dtype=torch.float64)}
    torchdiffeq.odeint(field, torch.ones(1, dtype=torch.float64), UNIT, options=options)
    near = sorted({time - 0.5 for time in times if abs(time - 0.5) < 1e-9})
    text = "evaluations near a jump at 1/2: 1/2 " + " and 1/2 ".join(f"{x:+.1e}" for x in near)
    return Seen(len(near) > 1 and 0.0 not in near, text)


def dense_backwards() -> Seen:
    """torchdiffeq.odeint_dense, from 1 to 0, y = e^(1 - t)."""
    start, end = UNIT.flip(0)
    solution: Any = torchdiffeq.odeint_dense(lambda t, y: -y, torch.ones(1, dtype=UNIT.dtype), start, end)
    outside = solution(torch.tensor(-1.0, dtype=UNIT.dtype)).item()
    try:
        inside = f"{solution(torch.tensor(0.5, dtype=UNIT.dtype)).item():.3f}"
    except IndexError:
        inside = "an IndexError"
    text = f"from t = 1 to 0: inside, at 0.5, {inside}; outside, at -1, {outside:.3f} (right {math.exp(2):.3f})"
    return Seen(inside == "an IndexError" and abs(outside - math.exp(2)) > 0.1, text)


def sde_outputs() -> Seen:
    import torchsde

    torch.manual_seed(0)
    field, y0 = Noisy("ito"), torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([0.0, 0.52, 0.55, 0.58, 1.0], dtype=torch.float64)
    y: Any = torchsde.sdeint(field, y0, t, bm=noise(y0), dt=0.125, method="euler")
    bend = (y[2] - (y[1] + y[3]) / 2).abs().max().item()
    text = f"8 steps of Euler: {field.calls} calls of f; three outputs within a step bend by {bend:.0e}"
    return Seen(field.calls == 9 and bend < 1e-12, text)


def cde_linear() -> Seen:
    import torchcde

    class Vectors(nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.stack([torch.sin(z), torch.cos(2 * z)], -1).view(*z.shape, 2)

    torch.manual_seed(0)
    knots = torch.randn(1, 11, 2, dtype=torch.float64)
    knots[..., 0] = torch.arange(11.0)
    knots.requires_grad_()

    def end(method: str, **more: Any) -> Tensor:
        path = torchcde.LinearInterpolation(knots)
        z0 = torch.ones(1, 1, dtype=torch.float64)
        solved: Any = torchcde.cdeint(path, Vectors(), z0, path.interval, False, method=method, **more)
        return solved[0, -1]

    grid = torch.arange(11, dtype=torch.float64)
    right = end("dopri5", rtol=1e-11, atol=1e-12, options={"jump_t": grid}).detach()
    errors = [abs((end("rk4", options={"step_size": 1 / k}) - right).item()) for k in (4, 8, 16)]
    rate = math.log2(errors[1] / errors[2])
    (last,) = torch.autograd.grad(end("euler", options={"step_size": 1.0}).sum(), knots)
    size = last[0, -1].norm().item()
    text = f"rk4, 4, 8, 16 steps a knot: errors {', '.join(f'{e:.1e}' for e in errors)}, order {rate:.1f}"
    return Seen(rate < 1.5 and size == 0, f"{text}; Euler: gradient of the last observation {size:g}")


def euler_by(way: str, field: nn.Module, y: Tensor) -> Tensor:
    """Five Euler steps."""
    import neuralode_coupled as nc

    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    if way == "checkpoints":
        for _ in range(5):
            y = y + checkpoint(field, t[0], y, use_reentrant=False) / 5  # pyright: ignore[reportOptionalOperand]
        return y
    if way == "nc.odeint_dto":
        return nc.odeint_dto(field, y, t, method="euler", checkpoints=1)[-1]
    solved: Any = getattr(torchdiffeq, way)(field, y, t, method="euler")
    return solved[-1]


def spectral_norm() -> Seen:
    """Its power iteration goes on at every evaluation, also at those of the backward pass."""
    off: dict[str, list[float]] = {}
    for seed in range(6):
        for normalise in (nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):
            torch.manual_seed(seed)
            made, y0 = Field(32, 32), torch.randn(16, 32, dtype=torch.float64)
            for linear in (made.net[0], made.net[2]):
                normalise(linear)  # pyright: ignore[reportArgumentType]
            grads: dict[str, list[Tensor]] = {}
            for way in ("odeint", "odeint_adjoint", "checkpoints", "nc.odeint_dto"):
                field = copy.deepcopy(made)
                euler_by(way, field, y0).square().mean().backward()
                grads[way] = [p.grad for p in field.parameters() if p.grad is not None]
            for way in ("odeint_adjoint", "checkpoints", "nc.odeint_dto"):
                off.setdefault(way, []).append(distance(grads[way], grads["odeint"]))
    text = "; ".join(f"{way} {min(x):.0%} to {max(x):.0%} off" for way, x in off.items() if way != "nc.odeint_dto")
    ours = max(off["nc.odeint_dto"])
    there = min(off["odeint_adjoint"]) > 1e-3 and max(off["checkpoints"]) > 1e-2 and ours < 1e-12
    return Seen(there, f"{text} (both spectral norms of torch, six seeds); `nc.odeint_dto` {ours:.0e}")


REPLACED = "in a module that `torch.func.functional_call` calls: every gradient is exactly 0"

BEHAVIOURS = [
    Behaviour(
        "functional-call",
        ("torchdiffeq",),
        f"`odeint_adjoint` {REPLACED}",
        "`odeint`; `nc.odeint_dto`",
        in_functional_call,
    ),
    Behaviour(
        "second-derivatives",
        ("torchdiffeq",),
        "`odeint_adjoint`: its second derivatives lack terms, in silence (a gradient penalty, say)",
        "`odeint`; `nc.odeint_dto`",
        second_derivatives,
    ),
    Behaviour(
        "adjoint-inputs",
        ("torchdiffeq",),
        "`odeint_adjoint` with an input in `adjoint_params` that earlier solves of f made (a policy's output): f's "
        "parameters get that path twice, in silence, and each solve in a row multiplies the evaluations",
        "`odeint`; `nc.odeint_dto`; the input as a part of the state, with slope 0",
        inputs_counted_twice,
    ),
    Behaviour(
        "explicit-adams",
        ("torchdiffeq",),
        "`explicit_adams`: half the step, a larger error",
        "`implicit_adams`, or a Runge-Kutta method",
        explicit_adams,
    ),
    Behaviour(
        "first-step",
        ("torchdiffeq",),
        "adaptive gradients contain how the first step was chosen from y0",
        "`options={'first_step': ...}`; `nc.odeint_dto` holds the lengths of steps fixed",
        first_step,
    ),
    Behaviour(
        "jump",
        ("torchdiffeq",),
        "a time of `jump_t` is evaluated a rounding to either side, never itself",
        "let f decide by `t < jump`, not by `t == jump`",
        jump,
    ),
    Behaviour(
        "dense-backwards",
        ("torchdiffeq",),
        "the dense output of a solve backwards in time fails inside of its interval and answers outside of it",
        "`odeint` with the times that are wanted",
        dense_backwards,
    ),
    Behaviour(
        "cde-functional-call",
        ("torchcde", "torchdiffeq"),
        f"`cdeint` {REPLACED}",
        "`adjoint=False`",
        cde_in_functional_call,
    ),
    Behaviour(
        "cde-linear",
        ("torchcde",),
        "a linear path with fixed steps on its knots: the steps' ends see the slope of the other side. rk4 is of first "
        "order, and by Euler the last observation has gradient 0",
        "a smooth path; an adaptive method with `jump_t=X.grid_points`",
        cde_linear,
    ),
    Behaviour(
        "sde-functional-call",
        ("torchsde",),
        f"`sdeint_adjoint` {REPLACED}",
        "`sdeint`",
        sde_in_functional_call,
    ),
    Behaviour(
        "sde-outputs",
        ("torchsde",),
        "calls f once more than there are steps, to learn shapes; outputs between steps lie on a straight line",
        "do not count or draw in f; put output times on the steps' grid",
        sde_outputs,
    ),
    Behaviour(
        "spectral-norm",
        ("torch", "torchdiffeq"),
        "spectral norm in f moves at every evaluation, so that a backward pass by `odeint_adjoint` or by "
        "`torch.utils.checkpoint` sees other weights",
        "`odeint`; `nc.odeint_dto` and coupled layers, which repeat each step with its buffers",
        spectral_norm,
    ),
]
