#!/usr/bin/env bash
# torchdiffeq 0.2.5: every evaluation of the field takes the absolute value of the whole state, to learn its dtype.
#
# The guess: between the evaluations a fixed-step solver makes the weighted sums of its tableau and nothing else, and whatever it asks
#   of the state besides (its dtype, its shape) costs nothing.
# What happens: before each call of the field the time is cast to y.abs().dtype, the real dtype of a complex state. So |y| is computed
#   and thrown away, once for each evaluation, by every method, for real states too. odeint_adjoint does it twice, and in its
#   backward solve once for y and once for y, its adjoint and the adjoints of all parameters in one row. For a cheap field on a
#   large state this is a good part of the time. Results are not affected.
# Do this instead: know of it when the solver seems slow beside the field (a profile shows aten::abs), and give it fewer, dearer
#   evaluations; or take a solver that reads y.dtype.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 torchdiffeq==0.2.5 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import sys

import torch
import torchdiffeq
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torchdiffeq import odeint, odeint_adjoint

print("torch", torch.__version__, "torchdiffeq", torchdiffeq.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)


class Sizes(TorchDispatchMode):
    """How many numbers each call of abs takes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.abs.default:
            self.seen.append(args[0].numel())
        return func(*args, **(kwargs or {}))


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(7))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(self.scale * y)


t = torch.tensor([0.0, 1.0])
start = torch.randn(5, 7, requires_grad=True)
row = start.numel()
same = True
for name, solver in (("odeint", odeint), ("odeint_adjoint", odeint_adjoint)):
    for method in ("euler", "rk4", "midpoint"):
        field, forward, backward = Field(), Sizes(), Sizes()
        with forward:
            end = solver(field, start, t, method=method, options={"step_size": 0.25})[-1]
        calls = field.calls
        with backward:
            end.sum().backward()
        again = field.calls - calls
        large, behind = [[n for n in sizes.seen if n >= row] for sizes in (forward, backward)]
        print(f"{name:14} {method:8} {calls:2} evaluations, abs of {sorted(set(large))} numbers {len(large):2} times;"
              f" backward {again:2} evaluations, abs of {sorted(set(behind))} numbers {len(behind):2} times")
        twice = 2 if solver is odeint_adjoint else 1
        same &= len(large) == twice * calls and set(large) == {row}
        same &= sorted(behind) == [*[row] * again, *[2 * row + 7 + 1] * again]

large = torch.randn(256, 16, 32, 32)


class Cheap(nn.Module):
    def forward(self, t, y):
        return torch.relu(y)


with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as measured:
    odeint(Cheap(), large, t, method="euler", options={"step_size": 0.1})
times = {event.key: event.self_cpu_time_total for event in measured.key_averages()}
share = times["aten::abs"] / sum(times.values())
print(f"ten Euler steps of relu on {large.numel():,} numbers: {share:.0%} of the time is abs")
same &= share > 0.05
sys.exit(0 if same else "the behaviour has changed")
PY
