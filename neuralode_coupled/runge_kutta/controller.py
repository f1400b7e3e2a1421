"""How an adaptive solve chooses its steps: from the estimated error of the last one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Decide = Callable[[float, float], tuple[bool, float]]
"""``decide(ratio, length) -> (accept, next length)`` for a step of the (positive) length that was tried, where ratio is
the norm of its estimated error in units of the tolerances: at most 1 is within them, nan is a step that overflowed."""


class StepController(Protocol):
    """Decides which steps an adaptive solve accepts, and the length of the next: one object with one method.

    Pass it in ``options={"controller": ...}`` to `neuralode_coupled.odeint_dto`. In any case ``min_step`` and
    ``max_step`` bound the lengths, and a step of ``min_step`` is accepted.
    """

    def begin(self, order: int) -> Decide:
        """The decisions of one solve, by a method of that order.

        Called once per solve, so that its memory of earlier steps belongs to this solve. It returns a function that is
        called once per tried step, as ``decide(ratio, length) -> (accept, next length)``: ``length`` is that of the
        step, positive in either direction of time, and ``ratio`` its estimated error in units of the tolerances (nan if
        the step overflowed). The next length must be positive.
        """
        ...


@dataclass(frozen=True)
class IntegralController:
    """torchdiffeq's control: the next length is ``safety * ratio ** (-1 / order)`` times the last.

    It is the standard control of Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, Section II.4.

    Args:
        safety: the part of the length that is expected to meet the tolerances just so.
        ifactor: the most that a length grows by.
        dfactor: the most that a length shrinks by, after a step that is rejected; within the tolerances none shrinks.

    Raises:
        ValueError: for factors that are not finite, a ``safety`` or ``dfactor`` that is not positive, an ``ifactor``
            below 1, or a ``dfactor`` that is not below 1.
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
    the integral control ``safety * ratio ** (-1 / k)`` takes over, and the next step does not grow. For
    ``options={"controller": nc.PIController()}`` of `neuralode_coupled.odeint_dto`.

    Sources: K. Gustafsson 1991, ACM Transactions on Mathematical Software 17, 533-554; Hairer and Wanner, Solving
    Ordinary Differential Equations II, Section IV.2; names of the gains as in G. Soederlind 2002, Numerical Algorithms
    31, 281-310.

    Args:
        integral: the gain on the error itself. Gustafsson's is 0.3.
        proportional: the gain on its change. Gustafsson's is 0.4; 0 with ``integral=1`` is integral control.
        safety: the part of the length that is expected to meet the tolerances just so.
        ifactor: the most that a length grows by.
        dfactor: the smallest factor by which a length shrinks.

    Raises:
        ValueError: for an ``integral`` that is not positive, a negative ``proportional``, numbers that are not finite,
            a ``safety`` or ``dfactor`` that is not positive, an ``ifactor`` below 1, or a ``dfactor`` not below 1.
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
            # A step whose error is next to nothing would otherwise hold back the one after the next.
            now = max(ratio, LEAST_RATIO)
            factor = self.safety * now ** (-(self.integral + self.proportional) / order)
            factor *= previous ** (self.proportional / order)
            most = 1.0 if rejected else self.ifactor
            previous, rejected = now, False
            return True, length * min(most, max(factor, self.dfactor))

        return decide


LEAST_RATIO = 1e-4
"""What `PIController` takes a smaller ratio for, as the code DOPRI5 of Hairer and Wanner does."""


def _check_factors(safety: float, ifactor: float, dfactor: float) -> None:
    if not 0.0 < safety < math.inf:
        raise ValueError(f"safety must be a positive number, got {safety!r}")
    if not 1.0 <= ifactor < math.inf:
        raise ValueError(f"ifactor must be a number of at least 1, got {ifactor!r}")
    if not 0.0 < dfactor < 1.0:
        raise ValueError(f"dfactor must be between 0 and 1, got {dfactor!r}")
