#!/usr/bin/env bash
# flowpde 0.2.0 (torch 2.14.1, torchdiffeq 0.2.5): NeuralODEFlow.log_prob, as it comes, solves an equation with fresh noise in every
#   evaluation by an adaptive method.
#
# The guess: the defaults (trace_estimator='hutchinson', ode_method='dopri5', ode_rtol=1e-5, ode_atol=1e-7) are those of FFJORD: one
#   random vector for a solve, a smooth equation, some dozens of evaluations; 'hutchinson' is the cheap choice, 'exact' the dear one.
# What happens: the vector is drawn anew at each evaluation. To the solver the slope of log p jumps at random, so that it shortens its
#   steps until step times noise is below the tolerance: a tenth of the tolerance, ten times the calls. A small smooth network in 4
#   dimensions is called 26 times with the exact trace, and 92,384 times as it comes (most of a minute for 16 points; training by
#   MaximumLikelihoodObjective keeps the graph of all of them). With the same vector in all calls it is 26 again. Nothing is said,
#   the values are right, and sampling, which needs no trace, is fast.
# Do this instead: trace_estimator='exact' in few dimensions; else ode_method='rk4' with ode_n_steps, where the noise costs nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 torchdiffeq==0.2.5 flowpde==0.2.0 numpy==2.4.6 scipy==1.17.1 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && MPLCONFIGDIR="$work" "$work/env/bin/python" -I -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
from flowpde.flows import NeuralODEFlow
from torch import nn

print("torch", torch.__version__, "torchdiffeq", version("torchdiffeq"), "flowpde", version("flowpde"))
torch.set_num_threads(1)

class Network(nn.Module):
    """A velocity field of x, a condition and the time; counts its calls, and draws the same noise after each of them if asked to."""

    def __init__(self, same_noise):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4))
        self.same_noise, self.calls = same_noise, 0

    def forward(self, x, condition, t):
        self.calls += 1
        if self.same_noise:
            torch.manual_seed(1)
        return self.layers(torch.cat([x, condition, t], 1))


def measured(same_noise=False, **options):
    """Calls of the network for one log_prob of 16 points, and the mean."""
    network = Network(same_noise)
    flow = NeuralODEFlow(network, **options)
    torch.manual_seed(2)
    x, condition = torch.randn(16, 4), torch.randn(16, 1)
    with torch.no_grad():
        value = float(flow.log_prob(x, condition).mean())
    return network.calls, value


ways = {
    "exact": {"trace_estimator": "exact"},
    "as it comes": {},
    "the same noise in all calls": {"same_noise": True},
}
calls, values = {}, {}
for tolerance in (1e-3, 1e-4, 1e-5, None):
    for name, options in ways.items():
        tolerances = {} if tolerance is None else {"ode_rtol": tolerance, "ode_atol": tolerance}
        calls[name, tolerance], values[name, tolerance] = measured(**tolerances, **options)
        label = "rtol 1e-5, atol 1e-7, the default" if tolerance is None else f"rtol and atol {tolerance:.0e}"
        print(f"{label:33}  {name:27}: {calls[name, tolerance]:6} calls, mean log p {values[name, tolerance]:.3f}", flush=True)
fixed = measured(ode_method="rk4", ode_n_steps=16)
print(f"rk4, 16 steps, noise in every call: {fixed[0]} calls, mean log p {fixed[1]:.3f}")

noisy = [calls["as it comes", tolerance] for tolerance in (1e-3, 1e-4, 1e-5, None)]
same = all(later > 4 * earlier for earlier, later in zip(noisy, noisy[1:])) and noisy[-1] > 20000
same &= all(count < 100 for (name, _), count in calls.items() if name != "as it comes")
right = values["exact", None]
same &= all(abs(value - right) < 0.2 for value in [*values.values(), fixed[1]])
sys.exit(0 if same else "the behaviour has changed")
PY
