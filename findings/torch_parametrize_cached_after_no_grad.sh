#!/usr/bin/env bash
# torch 2.14.1 (torchdeq 0.1.0, torchdiffeq 0.2.5): torch.nn.utils.parametrize.cached() around a forward pass that begins without
#   gradients.
#
# The guess: cached() saves time and changes nothing else. Its page says to put it around the forward pass, in training too, if a
#   parametrized weight (spectral norm, weight norm, orthogonal) is used more than once: a loop, a fixed point, an ODE.
# What happens: the weight is computed once, at its first use, and kept as it is, whether gradients are on or not. If the first use
#   is under no_grad, all later uses get a weight without a graph. Its parameters get no gradient, and nothing is said: biases and
#   other layers have theirs, so that backward works and the loss falls. Forward passes that begin so are usual: a fixed point is
#   found under no_grad and then evaluated once with gradients (by hand, or torchdeq does it); a loop has gradients in its last
#   passes only; burn-in of an RNN; a target branch. By torchdiffeq's odeint_adjoint, and by reentrant checkpoints, it happens if
#   backward is inside of the block too: the gradient is 0 or None. (The cache of autocast had the same fault, and has it no more.)
#   A fixed-point model here learns from 4.3 to 0.21 and looks healthy, exactly as with its recurrent weight frozen; plain, to 0.03.
# Do this instead: read the weight once, as the first thing in the block (with cached(): layer.weight; ...); or put the block around
#   the part with gradients only. After the first backward look for parameters whose gradient is None.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 torchdiffeq==0.2.5 torchdeq==0.1.0 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I -W ignore - <<'PY'
import sys
from contextlib import nullcontext
from importlib.metadata import version

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import cached
from torch.utils.checkpoint import checkpoint
from torchdeq import get_deq
from torchdiffeq import odeint_adjoint

print("torch", torch.__version__, "torchdeq", version("torchdeq"), "torchdiffeq", version("torchdiffeq"))
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


class Step(nn.Module):
    """One pass, z -> tanh(0.5 W z + b + x)."""

    def __init__(self, parametrization=orthogonal):
        super().__init__()
        torch.manual_seed(0)
        self.layer = parametrization(nn.Linear(4, 4)).eval()

    def forward(self, z):
        return torch.tanh(0.5 * self.layer(z) + x)


def by_hand(step):
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(60):
            z = step(z)
    return step(z)


def last_passes(step):
    z = torch.zeros_like(x)
    for i in range(8):
        with torch.set_grad_enabled(i >= 4):
            z = step(z)
    return z


def weight_first(step):
    step.layer.weight
    return by_hand(step)


def by_torchdeq(step):
    deq = get_deq(ift=True, f_max_iter=60, b_max_iter=60, f_tol=1e-13, b_tol=1e-13)
    return deq(step, torch.zeros_like(x))[0][-1]


def by_adjoint(step):
    return odeint_adjoint(lambda t, z: step(z), x, torch.tensor([0.0, 1.0]), method="rk4", adjoint_params=tuple(step.parameters()))[-1]


def by_checkpoint(step):
    return checkpoint(step, x.clone().requires_grad_(), use_reentrant=True)


def norms(forward, step, block, backward_inside=False):
    """Of the gradients: of all that the weight is made of, and of the bias."""
    step.zero_grad()
    with block:
        loss = forward(step).square().sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    parts = [p.grad for p in step.layer.parametrizations.parameters()]
    weight = None if any(g is None for g in parts) else float(sum(g.square().sum() for g in parts).sqrt())
    return weight, float(step.layer.bias.grad.norm())


same = True
cases = [
    ("fixed point by hand, spectral norm", by_hand, Step(spectral_norm), False),
    ("fixed point by hand, weight norm", by_hand, Step(weight_norm), False),
    ("fixed point by hand, orthogonal", by_hand, Step(), False),
    ("gradients in the last 4 passes of 8", last_passes, Step(), False),
    ("torchdeq, implicit gradient", by_torchdeq, Step(), False),
    ("odeint_adjoint, backward inside", by_adjoint, Step(), True),
    ("reentrant checkpoint, backward inside", by_checkpoint, Step(), True),
    ("fixed point, weight read first", weight_first, Step(), False),
]
print("norm of the gradient in the weight's parameters, and in the bias")
show = lambda norms: "  ".join("   None" if v is None else f"{v:7.4f}" for v in norms)
for name, forward, step, inside in cases:
    plain, kept = norms(forward, step, nullcontext(), inside), norms(forward, step, cached(), inside)
    print(f"  {name:38} plain {show(plain)}    cached() {show(kept)}")
    same &= plain[0] > 0.1 and abs(plain[1] - kept[1]) < 1e-8
    same &= abs(plain[0] - kept[0]) < 1e-8 if forward is weight_first else not kept[0]

linear = nn.Linear(4, 4).float()
with torch.autocast("cpu", torch.bfloat16):
    with torch.no_grad():
        linear(x.float())
    linear(x.float()).sum().backward()
print("autocast, first use under no_grad: gradient of the weight is", "None" if linear.weight.grad is None else "there")
same &= linear.weight.grad is not None


class Model(nn.Module):
    """A fixed point z = tanh(0.9 (W z + b) + x), read out linearly."""

    def __init__(self):
        super().__init__()
        self.inner, self.leave = spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8)

    def step(self, z, x):
        return torch.tanh(0.9 * self.inner(z) + x)

    def forward(self, x):
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(30):
                z = self.step(z, x)
        return self.leave(self.step(z, x))


def trained(seed, block, frozen=False):
    torch.manual_seed(seed)
    teacher, model, x = Model(), Model(), torch.randn(256, 8)
    y = 5 * teacher(x).detach()
    original = model.inner.parametrizations.weight.original
    original.requires_grad_(not frozen)
    before = original.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        with block():
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1], float((original - before).norm() / before.norm())


for seed in range(3):
    found = {"plain": trained(seed, nullcontext), "cached()": trained(seed, cached), "W frozen": trained(seed, cached, True)}
    line = "; ".join(f"{name} {a:.3f} to {b:.4f}, W moved by {moved:.1%}" for name, (a, b, moved) in found.items())
    print(f"training, seed {seed}, loss: {line}")
    same &= found["cached()"][2] == 0 and found["plain"][2] > 0.1 and found["cached()"][1] > 2 * found["plain"][1]
    same &= abs(found["cached()"][1] - found["W frozen"][1]) < 1e-9
sys.exit(0 if same else "the behaviour has changed")
PY
