#!/usr/bin/env bash
# heyoka 7.13.2 (Python): a Taylor step goes over the kink of a ReLU as if it were not there.
#
# The guess: an adaptive solver at a tolerance of 1e-10 notices a kink, rejects the step, and takes small ones there, as
#   every embedded Runge-Kutta pair does. A network with ReLU as the field (heyoka.model.ffnn) costs more steps, no more.
# What happens: the step's length follows from the Taylor coefficients at its start, and nothing is compared at its end.
#   At a point where the ReLU is off they are those of the other branch: zero, or a polynomial, and the step is as long as
#   one likes. The result is wrong in its first digits, and the outcome is the usual "time_limit".
# Do this instead: a smooth activation, or max_delta_t, or an event at the kink.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet heyoka==7.13.2 numpy==2.4.6 scipy==1.17.1 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import math
import sys

import heyoka as hy
import numpy as np
from scipy.integrate import solve_ivp

x, y = hy.make_vars("x", "y")
print("heyoka", hy.__version__)


def end(system, start, time, **options):
    """The state at `time`, and the number of steps."""
    solver = hy.taylor_adaptive(system, start, tol=1e-10)
    outcome = solver.propagate_until(time, **options)
    assert outcome[0] == hy.taylor_outcome.time_limit
    return solver.state.copy(), outcome[3]


(a,), steps_a = end([(x, hy.relu(hy.time - 0.5))], [0.0], 1.0)
print(f"x' = relu(t - 1/2), x(0) = 0:      x(1)   = {a:.6f} in {steps_a} step,  right: {1 / 8:.6f}")
(b,), steps_b = end([(x, 1.0 + hy.relu(x))], [-0.5], 1.5)
print(f"x' = 1 + relu(x), x(0) = -1/2:     x(3/2) = {b:.6f} in {steps_b} step,  right: {math.e - 1:.6f}")
(c,), steps_c = end([(x, 1.0 + hy.relu(x))], [-0.5], 1.5, max_delta_t=1e-3)
print(f"  the same with max_delta_t=1e-3:  x(3/2) = {c:.6f} in {steps_c} steps")

errors = {}
weights = [float(w) for w in 0.7 * np.random.default_rng(0).standard_normal(2 * 8 + 8 * 2 + 8 + 2)]
for name, activation in (("relu", hy.relu), ("tanh", hy.tanh)):
    net = hy.model.ffnn(inputs=[x, y], nn_hidden=[8], n_out=2, activations=[activation, lambda e: e], nn_wb=weights)
    found, steps = end([(x, net[0]), (y, net[1])], [1.0, -0.5], 2.0)
    field = hy.cfunc(net, [x, y])
    right = solve_ivp(lambda t, z: field(z), (0, 2), [1.0, -0.5], "DOP853", rtol=1e-12, atol=1e-13, max_step=1e-3).y[:, -1]
    errors[name] = float(np.abs(found - right).max())
    print(f"a network 2-8-2 with {name}, to t = 2: error {errors[name]:.1e} in {steps} steps")

same = abs(a) < 1e-12 and abs(b - 1) < 1e-12 and abs(c - (math.e - 1)) < 1e-3
same = same and errors["relu"] > 1e-2 and errors["tanh"] < 1e-9
sys.exit(0 if same else "the behaviour has changed")
PY
