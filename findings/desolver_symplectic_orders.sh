#!/usr/bin/env bash
# desolver 5.1.0: the orders of its symplectic methods are not those that they are declared with.
#
# The guess: BABs9o7HSolver, "the 7th order", is of order 7, ABAs5o6HSolver of order 6, the symplectic Euler method of order 1.
#   Double the steps, divide the error by 128, 64 and 2; choose the first for long solves to high accuracy.
# What happens: on a pendulum, H = p^2 / 2 - cos q, the rates are 4, 4 and 2. The two schemes gain 7 and 6 only in the size
#   of a perturbation of an integrable system; in the step they are of order 4 (and with small constants: the first is still
#   the most accurate of them). The "Euler" is a leapfrog.
# Do this instead: measure the order on your own system before you extrapolate, or choose by the error at one step size.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet desolver==5.1.0 numpy==2.4.6 scipy==1.17.1 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - 2> "$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import sys
from importlib import metadata

import desolver as de
import numpy as np
from desolver import integrators
from scipy.integrate import solve_ivp

print("desolver", metadata.version("desolver"))


def pendulum(t, state):
    return np.array([state[1], -np.sin(state[0])])


start = np.array([1.0, 0.3])
right = solve_ivp(pendulum, (0, 2), start, "DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
rates = {}
for solver in (
    integrators.BABs9o7HSolver,
    integrators.ABAs5o6HSolver,
    integrators.SymplecticEulerSolver,
    integrators.RK4Solver,
    integrators.MidpointSolver,
):
    errors = []
    for steps in (8, 16, 32):
        system = de.OdeSystem(pendulum, y0=start, t=(0.0, 2.0), dt=2.0 / steps)
        system.method = solver
        system.integrate()
        assert len(system.t) == steps + 1
        errors.append(np.abs(system.y[-1] - right).max())
    declared, rate = solver.__order__, float(np.log2(errors[1] / errors[2]))
    rates[solver.__name__] = rate
    print(f"{solver.__name__:22} declared {declared:g}, measured {rate:.2f}, errors", *(f"{e:.1e}" for e in errors))

expected = {"BABs9o7HSolver": 4, "ABAs5o6HSolver": 4, "SymplecticEulerSolver": 2, "RK4Solver": 4, "MidpointSolver": 2}
same = all(abs(rates[name] - order) < 0.1 for name, order in expected.items())
sys.exit(0 if same else "the behaviour has changed")
PY
