"""The optimality system of the coupled problem made visible: Eqs. 7a to 7e, solved and checked by hand.

With the signs of the Lagrangian ``L = J + int alpha.(dz/dt - f) + int beta.(dw/dt - q) + int gamma.(theta - K * w)``,
activation steps ``z_{n+1} = S_n(z_n, theta_n)`` and weight steps ``w_{m+1} = W_m(w_m; p)``, the discrete system is

    alpha_N = -dJ/dz_N,    alpha_n = (dS_n/dz)^T alpha_{n+1}                    (7a)
    gamma_n = (dS_n/dtheta)^T alpha_{n+1}                                       (7b)
    beta_M = (kappa^T gamma)_M,    beta_m = (dW_m/dw)^T beta_{m+1} + (kappa^T gamma)_m      (7c)
    g_w0 = dR/dw0 - beta_0                                                      (7d)
    g_p = dR/dp - sum_m (dW_m/dp)^T beta_{m+1}                                  (7e)

which for Euler's method, ``S_n = z_n + h f`` and ``W_m = w_m + h_w q``, is the familiar one. (If one Runge-Kutta method
advances z and w together, theta consists of the stages of the weight steps and depends on p itself, as it does on the
rate of a learnable kernel: (7e) then has a term ``-(dtheta/dp)^T gamma`` too.)

Here each step has a graph of its own, and these formulas put the steps together. No code is shared with the backward
pass of the gradient methods, so the two can be compared.
"""

from neuralode_coupled.kkt.backward import Multipliers, multipliers
from neuralode_coupled.kkt.comparison import METHODS, Check, Group, check
from neuralode_coupled.kkt.residual import Residuals, residuals

__all__ = ["METHODS", "Check", "Group", "Multipliers", "Residuals", "check", "multipliers", "residuals"]
