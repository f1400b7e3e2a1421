"""How an adaptive solve chooses each step by the estimated error of the last one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Decide = Callable[[float, float], tuple[bool, float]]
"""``decide(ratio, length) -> (accept, next length)`` after a step of the (positive) length was tried. ``ratio`` is the
norm of its estimated error in units of the tolerances: at most 1 is within them, nan means that the step overflowed."""


class StepController(Protocol):
    """Decides which steps an adaptive solve accepts, and how long the next one is: an object with one method.

    Pass it in ``options={"controller": ...}`` to `neuralode_coupled.odeint_dto`. In any case ``min_step`` and
    ``max_step`` bound the lengths, and a step of ``min_step`` is accepted.
    """

    def begin(self, order: int) -> Decide:
        """Return the function that decides about the steps of one solve, by a method of that order.

        ``begin`` is called once per solve, so that the memory of earlier steps belongs to this solve. The function is
        called once per tried step, as ``decide(ratio, length) -> (accept, next length)``: ``length`` is the length of
        the step, positive in either direction of time, and ``ratio`` its estimated error in units of the tolerances
        (nan if the step overflowed). The next length must be positive.
        """
        ...


@dataclass(frozen=True)
class IntegralController:
    """torchdiffeq's control: the next length is ``safety * ratio ** (-1 / order)`` times the last.

    It is the standard control of Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, Section II.4.

    Args:
        safety: the part that is taken of the length that would just meet the tolerances.
        ifactor: the largest factor by which a length grows.
        dfactor: the smallest factor by which a length shrinks, after a rejected step. Within the tolerances no length
            shrinks.

    Raises:
        ValueError: if a factor is not finite, ``safety`` or ``dfactor`` is not positive, ``ifactor`` is below 1, or
            ``dfactor`` is not below 1.
    """

    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2

    def __post_init__(self) -> None:
        _check_factors(self.safety, self.ifactor, self.dfactor)

    def begin(self, order: int) -> Decide:
        def decide(ratio: float, length: float) -> tuple[bool, float]:
            if ratio == 0.0:
                return True, length * self.ifactor
            if not ratio < math.inf:
                return False, length * self.dfactor
            least = 1.0 if ratio < 1.0 else self.dfactor
            return ratio <= 1.0, length * min(self.ifactor, max(self.safety / ratio ** (1.0 / order), least))

        return decide


@dataclass(frozen=True)
class PIController:
    """Proportional-integral control: smoother lengths, and fewer rejections if stability limits the steps.

    With ``k`` the method's order, the next length is

        safety * ratio ** (-(integral + proportional) / k) * previous ** (proportional / k)

    times the last, where ``previous`` is the ratio of the last accepted step (1 before there is one). After a rejection
    the integral control ``safety * ratio ** (-1 / k)`` takes over, and the next step does not grow. Pass it as
    ``options={"controller": nc.PIController()}`` to `neuralode_coupled.odeint_dto`.

    Sources: K. Gustafsson 1991, ACM Transactions on Mathematical Software 17, 533-554; Hairer and Wanner, Solving
    Ordinary Differential Equations II, Section IV.2; names of the gains as in G. Soederlind 2002, Numerical Algorithms
    31, 281-310.

    Args:
        integral: the gain on the error itself. Gustafsson's is 0.3.
        proportional: the gain on its change. Gustafsson's is 0.4; 0 with ``integral=1`` is integral control.
        safety: the part that is taken of the length that would just meet the tolerances.
        ifactor: the largest factor by which a length grows.
        dfactor: the smallest factor by which a length shrinks.

    Raises:
        ValueError: if ``integral`` is not positive, ``proportional`` is negative, a number is not finite, ``safety`` or
            ``dfactor`` is not positive, ``ifactor`` is below 1, or ``dfactor`` is not below 1.
    """

    integral: float = 0.3
    proportional: float = 0.4
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.integral < math.inf:
            raise ValueError(f"integral must be a positive number, got {self.integral!r}")
        if not 0.0 <= self.proportional < math.inf:
            raise ValueError(f"proportional must be a number of at least 0, got {self.proportional!r}")
        _check_factors(self.safety, self.ifactor, self.dfactor)

    def begin(self, order: int) -> Decide:
        previous, rejected = 1.0, False

        def decide(ratio: float, length: float) -> tuple[bool, float]:
            nonlocal previous, rejected
            if not ratio <= 1.0:
                rejected = True
                factor = self.safety / ratio ** (1.0 / order) if ratio < math.inf else self.dfactor
                return False, length * min(1.0, max(factor, self.dfactor))
            # Otherwise a step with almost no error would hold back the step after the next.
            now = max(ratio, LEAST_RATIO)
            factor = self.safety * now ** (-(self.integral + self.proportional) / order)
            factor *= previous ** (self.proportional / order)
            most = 1.0 if rejected else self.ifactor
            previous, rejected = now, False
            return True, length * min(most, max(factor, self.dfactor))

        return decide


LEAST_RATIO = 1e-4
"""`PIController` replaces a smaller ratio by this one, as the code DOPRI5 of Hairer and Wanner does."""


def _check_factors(safety: float, ifactor: float, dfactor: float) -> None:
    if not 0.0 < safety < math.inf:
        raise ValueError(f"safety must be a positive number, got {safety!r}")
    if not 1.0 <= ifactor < math.inf:
        raise ValueError(f"ifactor must be a number of at least 1, got {ifactor!r}")
    if not 0.0 < dfactor < 1.0:
        raise ValueError(f"dfactor must be between 0 and 1, got {dfactor!r}")
