#!/usr/bin/env bash
# torch 2.14.1: what becomes of torch.utils.checkpoint in torch.export, and of BatchNorm inside of it in torch.compile.
#
# Export. The guess: a model that saves memory by checkpoints does so when its exported program is trained too (export is the
#   way into training elsewhere), or the export says that it cannot. What happens: the default export traces through the
#   checkpoint and drops it without a word. Gradients are the same; what autograd saves is many times more.
#   (strict=True fails, with "_checkpoint_context_fn" as its message.)
#   Do this instead: count the saved bytes after an export; put the recomputation around the program again, or compile.
# Compile. The guess: compiled or not, BatchNorm in a checkpoint moves its running statistics twice a step, as is well known of
#   checkpoints, so that one may compile a training run or not. What happens: eager moves them twice, compiled once. The same
#   training has other statistics, and another model at test time, from the day that it is compiled.
#   Do this instead: keep BatchNorm out of checkpoints, or compare its num_batches_tracked with the number of steps.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import sys
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

warnings.simplefilter("ignore")
print("torch", torch.__version__)
torch.manual_seed(0)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(8))

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


def saved(model, x):
    """MiB that autograd saves in one forward pass, each memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # which stays alive until all are counted
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


model, x = Residual(), torch.randn(128, 64)
program = torch.export.export(model, (x,)).module()
before, after = saved(model, x), saved(program, x)
print(f"saved by autograd: {before:.2f} MiB by the model, {after:.2f} MiB by its exported program")
gradients = []
for run in (model, program):
    model.zero_grad()
    run(x).square().mean().backward()  # the two share their parameters
    gradients.append(model.blocks[0][0].weight.grad.clone())
assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)

tracked = {}
for compiled in (False, True):
    norm = nn.BatchNorm1d(3)

    def loss(x):
        return checkpoint(lambda z: norm(z).relu(), x, use_reentrant=False).square().sum()

    step = torch.compile(loss, backend="aot_eager") if compiled else loss
    for _ in range(5):
        step(torch.randn(8, 3, requires_grad=True)).backward()
    tracked[compiled] = int(norm.num_batches_tracked)
print(f"BatchNorm in a checkpoint, 5 steps: {tracked[False]} batches counted in eager mode, {tracked[True]} compiled")

same = after > 5 * before and tracked == {False: 10, True: 5}
sys.exit(0 if same else "the behaviour has changed")
PY
