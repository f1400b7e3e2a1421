#!/usr/bin/env bash
# torch 2.14.1: torch.linalg.matrix_exp in bfloat16 and float16 on the CPU is garbage for every matrix but zero.
#
# The guess: the exponential of a small matrix in bfloat16, which the docs name among the dtypes it supports, is right to three digits.
# What happens: for [[0.1, 0.2], [0.3, -0.1]] the diagonal is -1.3e30 in bfloat16 and -21072 in float16, in place of 1.14 and 0.93; other
#   sizes and scales give 1e30, inf or nan. There is no error or warning. Only exp(0) is right, and that is where layers made of it
#   begin: an orthogonal weight by the parametrization (orthogonal_map="matrix_exp") is right in bfloat16 when it is new, and has a norm of
#   1e30 or nan once it has been trained. The derivative uses the same function. It is the same with oneDNN on and off. Linear
#   ODEs dw/dt = A w that are solved in closed form, state-space layers, rotations and Lie groups go through it.
# Do this instead: matrix_exp(A.float()).to(A.dtype), with an autograd function of your own or autocast turned off around it; for
#   parametrizations keep the module in float32 (autocast does).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import copy
import sys
import warnings

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

print("torch", torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
assert "bfloat16" in torch.linalg.matrix_exp.__doc__
warnings.simplefilter("error")
LOW = (torch.bfloat16, torch.float16)


def off(found, right):
    return float((found.double() - right.double()).norm() / right.double().norm())


def wrong(error):
    return not error < 0.1  # nan too


same = True
small = torch.tensor([[0.1, 0.2], [0.3, -0.1]])
print("exp of", small.tolist())
for dtype in (torch.float64, torch.float32, *LOW):
    print(f"  {dtype!s:15}", [[f"{value:.4g}" for value in row] for row in torch.linalg.matrix_exp(small.to(dtype)).tolist()])

print("relative errors of random matrices by size and largest sum of a column: float32, bfloat16, float16")
for size in (2, 8, 32):
    for scale in (0.01, 0.1, 1.0, 3.0):
        matrix = torch.randn(size, size)
        matrix = (matrix * scale / matrix.abs().sum(0).max()).bfloat16()
        right = torch.linalg.matrix_exp(matrix.double())
        errors = [off(torch.linalg.matrix_exp(matrix.to(dtype)), right) for dtype in (torch.float32, *LOW)]
        with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
            plain = off(torch.linalg.matrix_exp(matrix), right)
        by_float = off(torch.linalg.matrix_exp(matrix.float()).bfloat16(), right)
        print(f"  {size:2} {scale:5}", *(f"{e:9.1e}" for e in errors), f"   bfloat16 without oneDNN {plain:.1e}, by way of float32 {by_float:.1e}")
        same &= errors[0] < 1e-5 and by_float < 0.01 and all(map(wrong, [*errors[1:], plain]))
zero = torch.linalg.matrix_exp(torch.zeros(3, 3, dtype=torch.bfloat16))
same &= torch.equal(zero, torch.eye(3, dtype=torch.bfloat16))
print("exp of zero is the identity:", torch.equal(zero, torch.eye(3, dtype=torch.bfloat16)))

layer = orthogonal(nn.Linear(8, 8, bias=False), orthogonal_map="matrix_exp")
target = orthogonal(nn.Linear(8, 8, bias=False)).weight.detach()
optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
for steps in (0, 20):
    for _ in range(steps):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    weight = layer.weight.detach()
    low = [copy.deepcopy(layer).to(dtype).weight.detach() for dtype in LOW]
    print(f"an orthogonal weight after {steps} steps of training in float32, norm {weight.norm():.2f}; converted to bfloat16 and float16:",
          *(f"{w.float().norm():.3g}" for w in low))
    same &= all(wrong(off(w, weight)) == (steps > 0) for w in low)
sys.exit(0 if same else "the behaviour has changed")
PY
