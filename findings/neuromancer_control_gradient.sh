#!/usr/bin/env bash
# neuromancer 1.5.6 (torch 2.14.1, torchdiffeq 0.2.5): DiffEqIntegrator gives the control input no gradient.
#
# The guess: its integrators are interchangeable, block(x, u) in and the next x out, and a policy is trained through any of them
#   (differentiable predictive control is what the package is for).
# What happens: DiffEqIntegrator calls torchdiffeq's adjoint with u in a closure. The adjoint differentiates with respect to the
#   state and the block's parameters, and nothing else: u's gradient is None where RK4's is right, and nothing is said as long as
#   a parameter of the block wants a gradient, because the loss has one. A cost that counts u too has that part's gradient alone:
#   the policy learns to do nothing. Here RK4 brings the cost from 14.1 to 0.4, and DiffEqIntegrator with method="rk4" to 13.5.
#   It also costs more with every step: u was made by the earlier steps, and each evaluation in the backward pass goes through
#   their adjoints again on the way to the block's parameters. The block is called 8, 32, 136 and 640 times for a
#   gradient of 1, 2, 3 and 4 steps, where RK4 needs 4, 8, 12 and 16 calls.
# Do this instead: RK4, Luther and the package's other own integrators; or make u a part of the state with slope zero.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
# The file of integrators needs no more than this; the whole package has two dozen dependencies.
"$work/env/bin/pip" install --quiet torch==2.14.1 torchdiffeq==0.2.5 torchsde==0.2.6 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
"$work/env/bin/pip" install --quiet --no-deps neuromancer==1.5.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I -W ignore - <<'PY'
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

print("torch", torch.__version__, "torchdiffeq", version("torchdiffeq"), "neuromancer", version("neuromancer"))
package = Path(importlib.util.find_spec("neuromancer").submodule_search_locations[0])
spec = importlib.util.spec_from_file_location("integrators", package / "dynamics" / "integrators.py")
integrators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(integrators)
torch.set_default_dtype(torch.float64)


class Plant(nn.Module):
    """An unstable system whose two coefficients were identified before: dx/dt = a x + b u."""

    in_features, out_features = 2, 1

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))
        self.calls = 0

    def forward(self, x, u):
        self.calls += 1
        return self.a * x + self.b * u


def cost(integrator, policy, steps):
    """Steps of 0.3 from x = 2: the state's squares and a little of the control's."""
    x, total, largest = torch.full((1, 1), 2.0), 0.0, 0.0
    for _ in range(steps):
        u = policy(x)
        x = integrator(x, u)
        total = total + (x**2).sum() + 0.01 * (u**2).sum()
        largest = max(largest, u.abs().item())
    return total, largest


def new_policy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def trained(integrator, steps=3):
    policy = new_policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    first = cost(integrator, policy, steps)[0].item()
    for _ in range(40):
        optimizer.zero_grad()
        cost(integrator, policy, steps)[0].backward()
        optimizer.step()
    last, largest = cost(integrator, policy, steps)
    return first, last.item(), largest


def calls(integrator, steps):
    """Of the block, forwards and backwards, for one gradient of a rollout."""
    before = integrator.block.calls
    cost(integrator, new_policy(), steps)[0].backward()
    return integrator.block.calls - before


plant = Plant()
choices = {
    "RK4": integrators.RK4(plant, h=0.3),
    "DiffEqIntegrator": integrators.DiffEqIntegrator(plant, h=0.3, method="rk4"),
}
x, u = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
gradients, results, counts = {}, {}, {}
for name, integrator in choices.items():
    found = torch.autograd.grad(integrator(x, u).sum(), (x, u, plant.a, plant.b), allow_unused=True)
    gradients[name] = [None if g is None else round(g.item(), 6) for g in found]
    first, last, largest = results[name] = trained(integrator)
    counts[name] = [calls(integrator, steps) for steps in (1, 2, 3, 4)]
    print(f"{name}: gradient in x, u, a, b: {gradients[name]}")
    print(f"    cost {first:.1f} before, {last:.1f} after 40 steps of Adam, largest control {largest:.2f}")
    print(f"    calls of the block for a gradient of 1, 2, 3 and 4 steps: {counts[name]}")

right, lost = gradients["RK4"], gradients["DiffEqIntegrator"]
agree = all(abs(lost[i] - right[i]) < 1e-3 for i in (0, 2, 3))
(start, well, _), (begin, badly, largest) = results["RK4"], results["DiffEqIntegrator"]
learns = abs(start - begin) < 1e-6 and well < 0.3 * start and badly > 0.7 * start and largest < 0.3
grows = counts["RK4"] == [4, 8, 12, 16] and counts["DiffEqIntegrator"][3] > 4 * counts["DiffEqIntegrator"][2]
same = right[1] is not None and lost[1] is None and agree and learns and grows
sys.exit(0 if same else "the behaviour has changed")
PY
