#!/usr/bin/env bash
# torchdde 0.1.3 (torch 2.14.1): the gradient of its adjoint, the default, is the parameter itself times the time.
#
# The guess: the adjoint's gradient has the error of a continuous adjoint, and comes to that of autograd through the solver
#   (discretize_then_optimize=True) as the steps become shorter.
# What happens: for y'(t) = a y(t - tau) + b y(t) over [0, T] the gradient of y(T) in a is T a, and in b it is T b, whatever
#   the history, the delay, the steps and the loss are. Training with it is weight decay. The delay's gradient is wrong too, and where the delays are not the first parameter of the module, a part of
#   it is added to the one that is. Values are right, and discretize_then_optimize=True gives right gradients.
# Do this instead: discretize_then_optimize=True.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 torchdde==0.1.3 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import sys
import warnings
from importlib import metadata

import torch
import torchdde

warnings.simplefilter("ignore")

torch.set_default_dtype(torch.float64)
print("torchdde", metadata.version("torchdde"), "torch", torch.__version__)
T = 2.6


class Field(torch.nn.Module):
    """a y(t - tau) + b y(t)."""

    def __init__(self, tau, a, b, delays_first=True):
        super().__init__()
        delays = torch.nn.Parameter(torch.tensor([tau]))
        if delays_first:
            self.delays = delays
        self.a = torch.nn.Parameter(torch.tensor([a]))
        self.b = torch.nn.Parameter(torch.tensor([b]))
        self.delays = delays

    def forward(self, t, y, args, history):
        return self.a * history[0] + self.b * y


def solve(field, outputs, exact):
    """y(T), of a history 1 + t."""
    ts = torch.linspace(0, T, outputs)
    history = lambda t: (1 + t) * torch.ones(1, 1)
    y = torchdde.integrate(
        field, torchdde.RK4(), ts[0], ts[-1], ts, history, None,
        dt0=ts[1] - ts[0], delays=field.delays, discretize_then_optimize=exact,
    )
    return y[0, -1, 0]


def gradient(exact, outputs, *parameters, scale=1.0, **options):
    """Of scale * y(T) in a, b and tau."""
    field = Field(*parameters, **options)
    (scale * solve(field, outputs, exact)).backward()
    return [p.grad.item() for p in (field.a, field.b, field.delays)]


def difference(i, *parameters, h=1e-5):
    """By finite differences, in a (1), b (2) or tau (0)."""
    ends = []
    for sign in (1, -1):
        moved = list(parameters)
        moved[i] += sign * h
        with torch.no_grad():
            ends.append(solve(Field(*moved), 261, True).item())
    return (ends[0] - ends[1]) / (2 * h)


same = True
for parameters in ((0.7123, -1.0, -0.5), (0.7123, 0.3, -0.5), (1.3, -1.0, 0.2)):
    tau, a, b = parameters
    right = [difference(i, *parameters) for i in (1, 2, 0)]
    unrolled = gradient(True, 261, *parameters)
    print(f"tau, a, b = {tau}, {a}, {b}; gradients in a, b, tau")
    show = lambda name, values: print(f"  {name:22}", *(f"{value:10.5f}" for value in values))
    show("finite differences", right)
    show("autograd", unrolled)
    for outputs in (53, 261):
        adjoint = gradient(False, outputs, *parameters)
        show(f"adjoint, {outputs - 1} steps", adjoint)
        same = same and abs(adjoint[0] - T * a) < 1e-3 and abs(adjoint[1] - T * b) < 1e-3
    larger = gradient(False, 261, *parameters, scale=100.0)
    show("adjoint of 100 y(T)", larger)
    print(f"  T a, T b               {T * a:10.5f} {T * b:10.5f}")
    same = same and larger[:2] == adjoint[:2] and all(abs(x - y) < 1e-3 for x, y in zip(right[:2], unrolled))
    same = same and abs(adjoint[0] - right[0]) > 0.1

last = gradient(False, 261, 0.7123, -1.0, -0.5, delays_first=False)
print("the same module with the delays as its last parameter, first row:")
print("  adjoint, 260 steps    ", *(f"{value:10.5f}" for value in last))
same = same and abs(last[0] + T) > 0.5
sys.exit(0 if same else "the behaviour has changed")
PY
