#!/usr/bin/env bash
# torchdae 0.1.1 (torch 2.14.1): in a batch, the adjoint gives every sample but the first the mass matrix of the first.
#
# The guess: solve_dae_adjoint takes a batch, as all solvers of the package do, and the gradient of a batch is that of its samples.
# What happens: where the matrix dF/dy' depends on y (or dF/dy on y'), the backward pass builds it from the first sample's state
#   for all of them. Gradients of the first sample are right, of all others wrong, and a shared parameter's is a sum of both. For
#   (1 + y^2) y' + k y = 0 from 0.5, 1.5 and 3.0 the gradients in y0 are 0.58, 0.89 and 1.77 in place of 0.58, 1.08 and 1.07,
#   and the one in k is -4.49 in place of -1.05; shorter steps do not change that. Values are right, one sample alone is exact
#   (which is what a test tries), and so is the same system divided by its mass.
# Do this instead: differentiate through the solver itself (solve_bdf1(...).ys.sum().backward()), or one sample at a time.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 torchdae==0.1.1 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import sys
from importlib.metadata import version

import torch
from torchdae.adjoint_sensitivity import solve_dae_adjoint
from torchdae.bdf import solve_bdf1

print("torch", torch.__version__, "torchdae", version("torchdae"))
torch.set_default_dtype(torch.float64)
k = torch.tensor(0.8, requires_grad=True)
starts = torch.tensor([[0.5], [1.5], [3.0]])


def with_mass(t, y, slope):
    return (1 + y**2) * slope + k * y


def divided(t, y, slope):
    return slope + k * y / (1 + y**2)


def solve(residual, span, y0, h):
    """Implicit Euler from consistent slopes."""
    return solve_bdf1(residual, span, y0, yp0=(-k * y0 / (1 + y0**2)).detach(), h=h)


def gradients(residual, y0, h, adjoint):
    """Of the sum of y(1), in y0 (a number for each sample) and in k."""
    y0 = y0.clone().requires_grad_()
    if adjoint:
        ys = solve_dae_adjoint(residual, (0.0, 1.0), y0, h, [k], solve)
    else:
        ys = solve(residual, (0.0, 1.0), y0, h).ys
    in_y0, in_k = torch.autograd.grad(ys[-1].sum(), (y0, k))
    return torch.cat([in_y0.flatten(), in_k.reshape(1)])


def differences(residual, h, step=1e-5):
    with torch.no_grad():
        above, below = (solve(residual, (0.0, 1.0), starts + sign * step, h).ys[-1] for sign in (1, -1))
    return ((above - below) / (2 * step)).flatten()


def shown(values):
    return "  ".join(f"{value:+.4f}" for value in values)


same = True
for residual in (with_mass, divided):
    for h in (0.01, 0.0025):
        batch, through = (gradients(residual, starts, h, adjoint) for adjoint in (True, False))
        alone = torch.stack([gradients(residual, y[None], h, True) for y in starts])
        alone = torch.cat([alone[:, 0], alone[:, 1].sum().reshape(1)])
        finite = differences(residual, h)
        print(f"{residual.__name__}, h = {h}: gradients in the three starts, and in k")
        for name, values in (("adjoint of the batch", batch), ("adjoint, one by one", alone), ("through the solver", through)):
            print(f"    {name:20}  {shown(values)}")
        print(f"    {'finite differences':20}  {shown(finite)}")
        same &= (alone - through).abs().max() < 1e-6 and (through[:3] - finite).abs().max() < 1e-6
        wrong = (batch - through).abs()
        if residual is divided:
            same &= bool(wrong.max() < 1e-6)
        else:
            same &= bool(wrong[0] < 1e-6 and wrong[1] > 0.15 and wrong[2] > 0.6 and wrong[3] > 3)
sys.exit(0 if same else "the behaviour has changed")
PY
