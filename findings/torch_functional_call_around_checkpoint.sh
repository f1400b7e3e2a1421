#!/usr/bin/env bash
# torch 2.14.1: torch.func.functional_call around a module that has torch.utils.checkpoint in it.
#
# The guess: a checkpoint changes memory and not gradients, so that a model with checkpoints in it can be called with fast weights
#   (meta-learning, a hypernetwork, an averaged copy), as every other model; use_reentrant=False, the recommended one, works with
#   torch.autograd.grad.
# What happens: the backward pass runs the module again after functional_call has put its own parameters back, and finds those.
#   The loss is right, nothing is said, and the gradient at the fast weights is computed with intermediate results of other
#   weights. As long as the weights given are the module's own (the first step of the inner loop, and most tests) it is exact.
#   With use_reentrant=True the fast weights get no gradient at all, and the module's own parameters get the wrong one.
# Do this instead: put the checkpoint around the call, checkpoint(functional_call, block, weights, x, use_reentrant=False), which
#   calls with the same weights again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import sys

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

print("torch", torch.__version__)


class Residual(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, x):
        return x + self.run(self.net, x)


def plain(net, x):
    return net(x)


def recomputed(net, x):
    return checkpoint(net, x, use_reentrant=False)


def reentrant(net, x):
    return checkpoint(net, x, use_reentrant=True)


torch.manual_seed(0)
x, y = torch.randn(64, 8, requires_grad=True), torch.randn(64, 8)


def inner_loop(run, steps, around=False):
    """Gradient descent on fast weights: the loss of each step, and the last step's gradient."""
    torch.manual_seed(1)
    model = Residual(run)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for _ in range(steps):
        if around:
            out = checkpoint(functional_call, model, weights, (x,), use_reentrant=False)
        else:
            out = functional_call(model, weights, (x,))
        loss = (out - y).square().mean()
        losses.append(loss.item())
        gradient = torch.autograd.grad(loss, list(weights.values()))
        weights = {n: (w - 0.5 * g).detach().requires_grad_() for (n, w), g in zip(weights.items(), gradient)}
    return losses, torch.cat([g.flatten() for g in gradient])


def error(ours, right):
    return float((ours - right).norm() / right.norm())


first = error(inner_loop(recomputed, 1)[1], inner_loop(plain, 1)[1])
(losses, right), (others, wrong) = inner_loop(plain, 30), inner_loop(recomputed, 30)
late = error(wrong, right)
instead = error(inner_loop(plain, 30, around=True)[1], right)
print(f"first step of the inner loop: relative error of the gradient {first:.0e}")
print(f"step 30: {late:.0%}, loss {others[-1]:.3f} in place of {losses[-1]:.3f}; with the checkpoint around: {instead:.0e}")

model = Residual(reentrant)
fast = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
functional_call(model, fast, (x,)).square().mean().backward()
given = sum(w.grad is not None for w in fast.values())
own = sum(p.grad is not None for p in model.parameters())
print(f"use_reentrant=True: gradients reach {given} of the 4 fast weights, and {own} of the module's 4 parameters")

same = first < 1e-5 and late > 0.05 and instead < 1e-5 and (given, own) == (0, 4)
sys.exit(0 if same else "the behaviour has changed")
PY
