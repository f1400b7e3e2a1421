#!/usr/bin/env bash
# zuko 1.6.0 (torch 2.14.1): the gradient of zuko.utils.odeint in the start of the interval has the wrong sign.
#
# The guess: "gradients are propagated through x0, t0, t1 and phi", so that either end of the interval can be learned: a flow
#   with a trainable duration, an onset that is not known.
# What happens: the values are right, and so is the gradient in t1. That in t0 is right but for its sign, forwards and backwards
#   in time, so that gradient descent on t0 goes uphill from the first step: for dx/dt = 0.7 t x from 0.5 to 1.5 it is +0.7048,
#   where finite differences give -0.7048; an onset to be found from 0.8, the right one being 1.0, goes to 0.59 in eight steps.
# Do this instead: learn the end alone, and shift the time inside of f; or solve from 0 to 1 with f times (t1 - t0).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 zuko==1.6.0 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import sys

import torch
import zuko
from zuko.utils import odeint

print("torch", torch.__version__, "zuko", zuko.__version__)
torch.set_default_dtype(torch.float64)
rate = torch.tensor(0.7, requires_grad=True)


def field(t, x):
    """dx/dt = rate * x * t."""
    return rate * x * t


def end(t0, t1):
    """x(t1) from x(t0) = 1: exp(rate (t1^2 - t0^2) / 2)."""
    return odeint(field, torch.ones(1), t0, t1, phi=(rate,), atol=1e-12, rtol=1e-11).squeeze()


def gradients(start, stop):
    t0, t1 = torch.tensor(start, requires_grad=True), torch.tensor(stop, requires_grad=True)
    return [g.item() for g in torch.autograd.grad(end(t0, t1), (t0, t1))]


def differences(start, stop, h=1e-4):
    with torch.no_grad():
        t0, t1 = torch.tensor(start), torch.tensor(stop)
        return [
            ((end(t0 + h, t1) - end(t0 - h, t1)) / (2 * h)).item(),
            ((end(t0, t1 + h) - end(t0, t1 - h)) / (2 * h)).item(),
        ]


seen = True
for start, stop in ((0.5, 1.5), (1.5, 0.5)):
    got, wanted = gradients(start, stop), differences(start, stop)
    print(f"from {start} to {stop}: gradient in t0 {got[0]:+.6f}, in t1 {got[1]:+.6f}")
    print(f"    finite differences: in t0 {wanted[0]:+.6f}, in t1 {wanted[1]:+.6f}")
    seen &= abs(got[0] + wanted[0]) < 1e-6 and abs(wanted[0]) > 0.1 and abs(got[1] - wanted[1]) < 1e-6

# An onset to be found: data end at 1.5 with the value that an onset at 1.0 gives.
target = torch.exp(rate.detach() * (1.5**2 - 1.0**2) / 2)
t0, losses = torch.tensor(0.8, requires_grad=True), []
for _ in range(8):
    loss = (end(t0, torch.tensor(1.5)) - target) ** 2
    losses.append(loss.item())
    (slope,) = torch.autograd.grad(loss, t0)
    t0 = (t0 - 0.05 * slope).detach().requires_grad_()
print(f"descent on t0 from 0.8 (the onset is 1.0): ends at {t0.item():.3f}, losses", *(f"{x:.4f}" for x in losses))
seen &= all(later > earlier for earlier, later in zip(losses, losses[1:])) and t0.item() < 0.8
print("as described" if seen else "CHANGED")
sys.exit(0 if seen else 1)
PY
