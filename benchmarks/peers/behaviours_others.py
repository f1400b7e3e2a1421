"""torchdyn, TorchDiffEqPack, torchode, diffrax, and the gradients of complex numbers."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.behaviour import Behaviour, Seen, distance


def rk4_stages() -> Seen:
    from torchdyn.numerics import odeint

    times: list[float] = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        times.append(float(t))
        return -x

    odeint(field, torch.ones(1, 1), torch.tensor([0.0, 1.0]), "rk4")
    return Seen(times == [0.0, 0.0, 0.5, 0.5], f"one step from 0 to 1: at {', '.join(f'{t:g}' for t in times)}")


def output_times() -> Seen:
    import torchdiffeq
    from torchdyn.numerics import odeint

    calls = 0

    def field(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(3 * t) * x

    counts = []
    x0, t = torch.ones(1, 1), torch.linspace(0, 1, 101)
    for solve in (
        lambda: odeint(field, x0, t, "dopri5", atol=1e-4, rtol=1e-4),
        lambda: torchdiffeq.odeint(field, x0, t, method="dopri5", atol=1e-4, rtol=1e-4),
    ):
        calls = 0
        solve()
        counts.append(calls)
    text = f"dopri5, 101 outputs: {counts[0]} calls of f, torchdiffeq {counts[1]}"
    return Seen(counts[0] > 5 * counts[1], text)


def backward_times() -> Seen:
    from torchdyn.numerics import odeint

    times, _ = odeint(lambda t, x: -x, torch.ones(1, 1), torch.linspace(1, 0, 3), "dopri5", atol=1e-6, rtol=1e-6)
    text = f"asked for 1, 0.5, 0, got {', '.join(f'{t:g}' for t in times.tolist())} (the states are right)"
    return Seen(times[0].item() == -1, text)


def polynomial_weights() -> Seen:
    from torchdyn.nn import GalLinear, Polynomial

    layer = GalLinear(1, 1, expfunc=Polynomial(3))  # pyright: ignore[reportArgumentType]
    nn.init.ones_(layer.coeffs)
    found = [layer(torch.tensor([[1.0, t]])).item() for t in (-0.5, 0.5)]
    return Seen(math.isnan(found[0]) and math.isfinite(found[1]), f"at t = -0.5: {found[0]}, at 0.5: {found[1]:.3f}")


class _Acceleration(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return self.linear(x)


class _Energy(nn.Module):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x.square().mean()


def second_order() -> Seen:
    from torchdyn.core import NeuralODE

    found = {}
    for sensitivity in ("autograd", "adjoint"):
        x = torch.randn(3, 4)
        if sensitivity == "autograd":  # whose state begins with the integral
            x = torch.cat([torch.zeros(3, 1), x], dim=1)
        model = NeuralODE(
            _Acceleration(), "euler", order=2, sensitivity=sensitivity, integral_loss=_Energy(), return_t_eval=False
        )
        try:
            model(x, torch.linspace(0, 1, 5))
            found[sensitivity] = "runs"
        except AttributeError as error:
            found[sensitivity] = f"AttributeError: {error}"
    text = "; ".join(f"`{name}` {result}" for name, result in found.items())
    return Seen(found["autograd"] != "runs" == found["adjoint"], text)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return self.net(x)


def interpolated_path() -> Seen:
    """The gradient of the mean square of the asked-for rows of the path, against torchdyn's autograd."""
    from torchdyn.core import ODEProblem
    from torchdyn.numerics.solvers.ode import str_to_solver

    off, ends, more = [], [], []
    for count in (3, 5, 17):
        for tolerance in (1e-3, 1e-5, 1e-7):
            t = torch.linspace(0, 1, count, dtype=torch.float64)
            grads: dict[str, list[list[Tensor]]] = {}
            for sensitivity in ("autograd", "interpolated_adjoint"):
                torch.manual_seed(0)
                field, x = _Net(), torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
                options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "rtol_adjoint": tolerance}
                options |= {"atol_adjoint": tolerance, "interpolator": "4th", "sensitivity": sensitivity}
                if sensitivity == "autograd":
                    del options["interpolator"]
                times, path = ODEProblem(field, str_to_solver("dopri5", torch.float64), **options)(x, t)
                asked = path[[i for i, time in enumerate(times) if (t - time).abs().min() < 1e-9]]
                assert len(asked) == count
                leaves = [x, *field.parameters()]
                grads[sensitivity] = [
                    list(torch.autograd.grad(part.square().mean(), leaves, retain_graph=True))
                    for part in (asked, asked[-1])
                ]
            off.append(distance(grads["interpolated_adjoint"][0], grads["autograd"][0]))
            ends.append(distance(grads["interpolated_adjoint"][1], grads["autograd"][1]))
            more.append(len(times) - count)
    text = f"{min(more)} or {max(more)} rows more; loss over the path: gradient {min(off):.0%} to {max(off):.0%} off, "
    return Seen(min(off) > 0.01, f"{text}loss at the end: at most {max(ends):.0e}")


def over_the_end() -> Seen:
    from TorchDiffEqPack import odesolve  # pyright: ignore[reportMissingImports]

    latest = 0.0

    def field(t: Any, y: Tensor) -> Tensor:
        nonlocal latest
        latest = max(latest, float(t))
        return -y

    errors = []
    for more in ({}, {"end_point_mode": True}):
        latest = 0.0
        options = {"method": "Dopri5", "h": None, "t0": 0.0, "t1": 1.0, "rtol": 1e-6, "atol": 1e-6}
        options |= {"print_neval": False, "neval_max": 10**5}
        y = odesolve(field, torch.ones(1, dtype=torch.float64), options=options, **more)
        errors.append((latest, abs(y.item() - math.exp(-1))))
    (over, error), (to, better) = errors
    text = f"y' = -y to 1, tolerance 1e-6: evaluated up to {over:.2f}, error {error:.1e}"
    return Seen(over > 1 and error > 1e-4, f"{text}; with `end_point_mode=True` up to {to:.2f}, {better:.1e}")


def out_of_steps() -> Seen:
    import torchode  # pyright: ignore[reportMissingImports]

    term = torchode.ODETerm(lambda t, y: -50 * (y - torch.cos(t)[:, None]))
    controller = torchode.IntegralController(atol=1e-8, rtol=1e-8, term=term)
    t = torch.linspace(0, 2, 5, dtype=torch.float64).repeat(2, 1)
    problem = torchode.InitialValueProblem(y0=torch.zeros(2, 1, dtype=torch.float64), t_eval=t)
    method = torchode.Tsit5(term=term)
    whole, stopped = (
        torchode.AutoDiffAdjoint(method, controller, max_steps=limit).solve(problem) for limit in (None, 20)
    )
    status, written = stopped.status.tolist(), stopped.stats["n_initialized"].tolist()
    steps = int(whole.stats["n_steps"].max())
    text = f"20 steps of the {steps} that it takes: no exception, status {status} (0 is success), "
    there = all(status) and stopped.ys.shape == whole.ys.shape and max(written) < 5
    return Seen(there, f"{text}{written} outputs of 5 written, the others handed out too")


def _diffrax() -> tuple[Any, Any, Any]:
    import diffrax  # pyright: ignore[reportMissingImports]
    import jax  # pyright: ignore[reportMissingImports]

    jax.config.update("jax_enable_x64", True)
    return diffrax, jax, diffrax.ODETerm(lambda t, y, args: y * jax.numpy.cos(3 * t))


def dense_order() -> Seen:
    diffrax, jax, term = _diffrax()
    t = jax.numpy.linspace(0, 1, 301)
    right = jax.numpy.exp(jax.numpy.sin(3 * t) / 3)
    inside, ends = [], []
    for steps in (8, 16):
        solution = diffrax.diffeqsolve(
            term, diffrax.Dopri8(), 0.0, 1.0, 1 / steps, jax.numpy.array(1.0),
            saveat=diffrax.SaveAt(dense=True, t1=True),
        )  # fmt: skip
        inside.append(float(abs(jax.vmap(solution.evaluate)(t) - right).max()))
        ends.append(float(abs(solution.ys[-1] - right[-1])))
    rates = [math.log2(errors[0] / errors[1]) for errors in (inside, ends)]
    return Seen(rates[0] < 7 < rates[1], f"from 8 to 16 steps: order {rates[0]:.1f} inside, {rates[1]:.1f} at the end")


def dense_outside() -> Seen:
    diffrax, jax, term = _diffrax()
    saveat = diffrax.SaveAt(dense=True)
    solution = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, jax.numpy.array(1.0), saveat=saveat)
    found = [float(solution.evaluate(t)) for t in (-0.5, 1.5)]
    return Seen(all(map(math.isnan, found)), f"solved from 0 to 1: at -0.5 {found[0]}, at 1.5 {found[1]}")


def no_limit() -> Seen:
    diffrax, jax, term = _diffrax()

    def end(y0: Any) -> Any:
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, y0, max_steps=None).ys[-1]

    value = float(end(jax.numpy.array(1.0)))
    try:
        jax.grad(end)(jax.numpy.array(1.0))
        result = "its gradient runs"
    except Exception as error:  # whichever jax and equinox make of it
        result = f"its gradient raises {type(error).__name__}"
    return Seen("raises" in result, f"value {value:.4f}, {result}")


def complex_gradients() -> Seen:
    import jax  # pyright: ignore[reportMissingImports]

    z = torch.tensor(1 + 2j, requires_grad=True)
    (z**2).real.backward()
    assert z.grad is not None
    ours, theirs = complex(z.grad.item()), complex(jax.grad(lambda z: (z**2).real)(1 + 2j))
    text = f"Re z^2 at 1 + 2i: PyTorch {ours.real:g}{ours.imag:+g}i, jax {theirs.real:g}{theirs.imag:+g}i"
    return Seen(ours == theirs.conjugate() and ours.imag != 0, text)


def quiet(look: Any) -> Any:
    """Without the packages' own warnings."""

    def looked() -> Seen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return look()

    return looked


BEHAVIOURS = [
    Behaviour(
        "rk4-stages",
        ("torchdyn",),
        "`rk4` evaluates its stages at other times, and is of first order where f depends on t",
        "`dopri5`; see [its page](torchdyn.md#measured-torchdyns-gradients-and-its-rk4)",
        rk4_stages,
    ),
    Behaviour(
        "output-times",
        ("torchdyn", "torchdiffeq"),
        "an adaptive solve steps onto every output time",
        "few output times; torchdiffeq or `nc.odeint_dto`, which interpolate",
        output_times,
    ),
    Behaviour(
        "backward-times",
        ("torchdyn",),
        "the times of a solve backwards come back with the sign changed",
        "use the times that you gave",
        backward_times,
    ),
    Behaviour(
        "polynomial-weights",
        ("torchdyn",),
        "`Polynomial` Galerkin weights are NaN at negative times",
        "shift the time to be positive",
        polynomial_weights,
    ),
    Behaviour(
        "second-order",
        ("torchdyn",),
        "`order=2` with an integral loss fails by `autograd`",
        "`sensitivity='adjoint'`, or write the system as one of first order",
        second_order,
    ),
    Behaviour(
        "interpolated-path",
        ("torchdyn",),
        "`interpolated_adjoint` with `dopri5` returns the solver's own steps as extra rows, and its gradient of a loss "
        "over the path is wrong",
        "a loss of the last row alone; `autograd`; `nc.odeint_dto`",
        interpolated_path,
    ),
    Behaviour(
        "over-the-end",
        ("TorchDiffEqPack",),
        "an adaptive `odesolve` steps over the end and comes back on a straight line",
        "`odesolve(..., end_point_mode=True)`; as an entry of `options` it is dropped without a word",
        over_the_end,
    ),
    Behaviour(
        "out-of-steps",
        ("torchode",),
        "out of steps: no exception, and outputs behind the last step are memory that nobody has written",
        "look at `status`, or at `stats['n_initialized']`",
        out_of_steps,
    ),
    Behaviour(
        "dense-order",
        ("diffrax", "jax"),
        "`Dopri8`: its dense output is of order 6 to 7 inside of the steps, not 8",
        "`SaveAt(ts=...)` interpolates too: where it matters let steps end at the outputs, by "
        "`ClipStepSizeController(..., step_ts=ts)`",
        dense_order,
    ),
    Behaviour(
        "dense-outside",
        ("diffrax", "jax"),
        "a dense output is NaN outside of its interval, without an exception",
        "check the times",
        dense_outside,
    ),
    Behaviour(
        "no-limit",
        ("diffrax", "jax"),
        "`max_steps=None` solves, and fails only when it is differentiated",
        "a number, `RecursiveCheckpointAdjoint(checkpoints=...)` or `BacksolveAdjoint`",
        no_limit,
    ),
    Behaviour(
        "complex-gradients",
        ("torch", "jax"),
        "gradients in complex numbers: jax gives the conjugate of what PyTorch gives",
        "conjugate jax's before a step of descent",
        complex_gradients,
    ),
]
