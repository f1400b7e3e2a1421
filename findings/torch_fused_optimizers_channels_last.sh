#!/usr/bin/env bash
# torch 2.14.1, CPU: fused optimizers, a checkpoint, and channels-last weights.
#
# The guess: the memory format is a matter of speed. A run that was begun with contiguous weights goes on from its checkpoint with
#   model.to(memory_format=torch.channels_last), and fused=True computes what the other implementations compute; or it refuses.
# What happens: load_state_dict keeps the strides of the momenta that it loads, and the weights have others. The fused kernels of
#   Adam, AdamW, Adagrad and SGD walk through weights, gradients and momenta in the order of memory, so that every weight of a
#   kernel larger than 1 x 1 gets the momenta of another one. Nothing is said; shapes and values are right wherever one looks at
#   them. The first update is off by more than its own length. Losses go up for a while and come back as momenta are
#   forgotten, which looks like a warm-up; the sums of Adagrad are never forgotten. (On CUDA such strides are an error.)
# Do this instead: fused=False for such a run; or, after load_state_dict, give every state of a parameter's shape its strides
#   (torch.empty_like(parameter).copy_(state)).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
"$work/env/bin/python" - <<'PY'
import copy
import sys

import torch
from torch import nn
from torch.nn.functional import mse_loss

print("torch", torch.__version__)
STEPS, MORE = 200, 12


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)
    )


torch.manual_seed(1)
x = torch.randn(16, 3, 12, 12)
with torch.no_grad():
    y = 3 * model()(x).roll(1, 2)


def train(net, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resumed(saved, kind, options, memory_format, fused, steps):
    """Losses and weights of a new process that goes on from the checkpoint."""
    weights, state = copy.deepcopy(saved)
    net = model().to(memory_format=memory_format)
    net.load_state_dict(weights)
    optimizer = kind(net.parameters(), **options)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = fused
    losses = train(net, optimizer, steps)
    return losses, torch.cat([p.detach().flatten() for p in net.parameters()])


KINDS = {
    torch.optim.Adam: {"lr": 3e-3},
    torch.optim.AdamW: {"lr": 3e-3},
    torch.optim.Adagrad: {"lr": 1e-2},
    torch.optim.SGD: {"lr": 0.05, "momentum": 0.9},
}
same = True
for kind, options in KINDS.items():
    net = model()
    optimizer = kind(net.parameters(), fused=True, **options)
    before = train(net, optimizer, STEPS)[-1]
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    old = torch.cat([p.detach().flatten() for p in net.parameters()])
    right = resumed(saved, kind, options, torch.contiguous_format, False, 1)[1]
    print(f"{kind.__name__}: loss {before:.4f} in the checkpoint")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for fused in (False, True):
            first = resumed(saved, kind, options, memory_format, fused, 1)[1]
            losses = resumed(saved, kind, options, memory_format, fused, MORE)[0]
            off = float((first - right).norm() / (right - old).norm())
            name = str(memory_format).removeprefix("torch.")
            print(f"  {name:17} fused={fused!s:5}: first update {off:7.2%} off, then losses up to {max(losses):.4f}")
            wrong = fused and memory_format is torch.channels_last
            same = same and (off > 0.1 if wrong else off < 1e-2)
sys.exit(0 if same else "the behaviour has changed")
PY
