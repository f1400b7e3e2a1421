"""Embedded Runge-Kutta pairs: two methods on the same slopes, whose difference estimates the error of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._checks import choice
from neuralode_coupled._types import State
from neuralode_coupled.runge_kutta.stepping import combine
from neuralode_coupled.runge_kutta.tableaus import Tableau


@dataclass(frozen=True)
class Embedded:
    """An adaptive method.

    Attributes:
        method: the tableau of the state at a step's end. Its order is that of the step size control.
        middle: the weights of all slopes in the state at a step's middle, relative to the step.
        error: the weights of all slopes in the estimated error, likewise.
        reuses: whether the last slope is evaluated at the state at the step's end, so that the next step starts with it
            ("first same as last"); the tableau then leaves that slope out.

    Without ``reuses`` the next step still starts with the last slope, as in torchdiffeq: the slope is that at a
    predicted state, and the discrete map carries it along as part of the state.

    Raises:
        ValueError: unless ``middle`` and ``error`` have one weight per slope, and sum to 1/2 and 0.
    """

    method: Tableau
    middle: tuple[float, ...]
    error: tuple[float, ...]
    reuses: bool

    def __post_init__(self) -> None:
        for label, weights, whole in (("middle", self.middle, 0.5), ("error", self.error, 0.0)):
            if len(weights) != self.slopes:
                raise ValueError(
                    f"{self.method.name}: {label} must have one weight for each of {self.slopes} slopes, got "
                    f"{len(weights)}"
                )
            if abs(sum(weights) - whole) > 1e-13:
                raise ValueError(f"{self.method.name}: {label} sums to {sum(weights)}, not to {whole}")

    @property
    def slopes(self) -> int:
        """How many slopes a step has: those of the tableau, and the one at its end if the next step reuses it."""
        return self.method.stages + self.reuses

    def within(self, y: State, slopes: Sequence[State], dt: float | Tensor, x: float | Tensor) -> State:
        """The state within a step from y, at the fraction x of its length dt, differentiable in both as tensors.

        It is the polynomial of degree 4 through the states at both ends, their slopes and the state in the middle
        (Shampine 1986, Mathematics of Computation 46, 135-150). All five are sums of the step's slopes, and so is the
        polynomial. For ``tsit5`` it is Tsitouras' own interpolant, which has the same five.

        Args:
            y: the state at the step's start, a tuple of tensors.
            slopes: all slopes of the step, states like y.
            dt: the step's length, a number or a scalar tensor, negative if time runs backwards.
            x: the fraction, a number or a scalar tensor.
        """
        return combine(y, slopes, self.weights(x), dt)

    def weights(self, x: float | Tensor) -> list[float | Tensor]:
        """The weights of all slopes in the state at the fraction x of a step, relative to the step; some are 0.0."""
        at_end, at_middle, at_first, at_last = _basis(x)
        weights: list[float | Tensor] = [
            end * at_end + middle * at_middle if end or middle else 0.0
            for end, middle in zip_longest(self.method.b, self.middle, fillvalue=0.0)
        ]
        weights[0] = weights[0] + at_first
        weights[-1] = weights[-1] + at_last
        return weights

    def among(self, y: State, slopes: Sequence[State], weights: Tensor) -> list[State]:
        """`within` at many fractions at once.

        Args:
            y: the state at the step's start, a tuple of tensors.
            slopes: all slopes of the step, states like y.
            weights: (times, slopes), the weights of the slopes times the step's length, real, on the state's device.
        """
        rows: list[tuple[Tensor, ...]] = []
        for i, part in enumerate(y):
            columns = weights.to(part.dtype).view(*weights.shape, *[1] * part.ndim).unbind(1)
            # Not a product of matrices, which may be computed in a lower precision than the state's.
            moved = torch.addcmul(part, columns[0], slopes[0][i])
            for j in self._inner:
                moved.addcmul_(columns[j], slopes[j][i])
            rows.append(moved.unbind())
        return list(zip(*rows, strict=True))

    @cached_property
    def _inner(self) -> list[int]:
        """The indices of the slopes after the first that states within a step are made of."""
        return [j for j, weight in enumerate(self.weights(0.3)) if j > 0 and weight != 0.0]

    def many_weights(self, x: Sequence[float], dt: float, like: Tensor) -> Tensor:
        """(times, slopes): `weights` at many fractions, times the step's length, for a state such as ``like``."""
        powers = [(dt * one, dt * two, dt * three, dt * four) for one, two, three, four in self._by_slope]
        rows = [[u * (one + u * (two + u * (three + u * four))) for one, two, three, four in powers] for u in x]
        return torch.tensor(rows, dtype=like.dtype.to_real(), device=like.device)

    def weights_on_device(self, x: Tensor, dt: float, powers: State) -> Tensor:
        """(times, slopes): the same for a tensor of fractions, (times,), by `powers` of its dtype on its device.

        To make such a tensor from numbers, the host would have to wait.
        """
        column, (one, two, three, four) = x[:, None], powers
        cubic = torch.addcmul(two, column, torch.addcmul(three, column, four))
        return torch.addcmul(one, column, cubic).mul_(dt * column)

    def powers(self, like: Tensor) -> State:
        """The weights of the slopes by the powers 1 to 4 of the fraction, each (slopes,), of the dtype and device of
        ``like``."""
        return torch.tensor(self._by_slope, dtype=like.dtype, device=like.device).unbind(1)

    @cached_property
    def _by_slope(self) -> list[tuple[float, float, float, float]]:
        """The weight of each slope by the powers 1 to 4 of the fraction."""
        last = self.slopes - 1
        rows = [
            (float(j == 0), float(j == last), end, middle)
            for j, (end, middle) in enumerate(zip_longest(self.method.b, self.middle, fillvalue=0.0))
        ]
        return [
            (
                first,
                final - 4 * first - 5 * end + 16 * middle,
                5 * first - 3 * final + 14 * end - 32 * middle,
                2 * (final - first) - 8 * end + 16 * middle,
            )
            for first, final, end, middle in rows
        ]


def _basis(x: Any) -> tuple[Any, Any, Any, Any]:
    """The weights at the fraction x of a step: of its end and middle, relative to its start, and its outer slopes."""
    square, rest = x * x, 1 - x
    return (
        square * (x * (14 - 8 * x) - 5),
        16 * square * (rest * rest),
        x * (rest * rest) * (1 - 2 * x),
        square * rest * (1 - 2 * x),
    )


def _less(b: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """The weights of the error: those of one method minus those of the other."""
    return tuple(one - two for one, two in zip_longest(b, other, fillvalue=0.0))


BOSH3 = Embedded(
    Tableau(
        "bosh3",
        3,
        c=(0.0, 1 / 2, 3 / 4),
        a=((), (1 / 2,), (0.0, 3 / 4)),
        b=(2 / 9, 1 / 3, 4 / 9),
    ),
    middle=(0.0, 1 / 2, 0.0, 0.0),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    reuses=True,
)
"""Bogacki and Shampine 1989, Applied Mathematics Letters 2, 321-325."""

FEHLBERG2 = Embedded(
    Tableau(
        "fehlberg2", 2, c=(0.0, 1 / 2, 1.0), a=((), (1 / 2,), (1 / 256, 255 / 256)), b=(1 / 512, 255 / 256, 1 / 512)
    ),
    middle=(0.0, 1 / 2, 0.0),
    error=(-1 / 512, 0.0, 1 / 512),
    reuses=False,
)
"""Fehlberg 1969, NASA Technical Report R-315, of orders 1 and 2."""

ADAPTIVE_HEUN = Embedded(
    Tableau("adaptive_heun", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2)),
    middle=(1 / 2, 0.0),
    error=(1 / 2, -1 / 2),
    reuses=False,
)
"""Heun's method, whose error is estimated by Euler's."""

DOPRI5 = Embedded(
    Tableau(
        "dopri5",
        5,
        c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        a=(
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 - -12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    reuses=True,
)
"""Dormand and Prince 1980, Journal of Computational and Applied Mathematics 6, 19-26; the middle is Shampine's (1986),
the estimated error torchdiffeq's."""

_B8 = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
_B7 = (
    13451932 / 455176623,
    0.0,
    0.0,
    0.0,
    0.0,
    -808719846 / 976000145,
    1757004468 / 5645159321,
    656045339 / 265891186,
    -3867574721 / 1518517206,
    465885868 / 322736535,
    53011238 / 667516719,
    2 / 45,
)

DOPRI8 = Embedded(
    Tableau(
        "dopri8",
        8,
        c=(
            0.0,
            1 / 18,
            1 / 12,
            1 / 8,
            5 / 16,
            3 / 8,
            59 / 400,
            93 / 200,
            5490023248 / 9719169821,
            13 / 20,
            1201146811 / 1299019798,
            1.0,
            1.0,
        ),
        a=(
            (),
            (1 / 18,),
            (1 / 48, 1 / 16),
            (1 / 32, 0.0, 3 / 32),
            (5 / 16, 0.0, -75 / 64, 75 / 64),
            (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
            (
                29443841 / 614563906,
                0.0,
                0.0,
                77736538 / 692538347,
                -28693883 / 1125000000,
                23124283 / 1800000000,
            ),
            (
                16016141 / 946692911,
                0.0,
                0.0,
                61564180 / 158732637,
                22789713 / 633445777,
                545815736 / 2771057229,
                -180193667 / 1043307555,
            ),
            (
                39632708 / 573591083,
                0.0,
                0.0,
                -433636366 / 683701615,
                -421739975 / 2616292301,
                100302831 / 723423059,
                790204164 / 839813087,
                800635310 / 3783071287,
            ),
            (
                246121993 / 1340847787,
                0.0,
                0.0,
                -37695042795 / 15268766246,
                -309121744 / 1061227803,
                -12992083 / 490766935,
                6005943493 / 2108947869,
                393006217 / 1396673457,
                123872331 / 1001029789,
            ),
            (
                -1028468189 / 846180014,
                0.0,
                0.0,
                8478235783 / 508512852,
                1311729495 / 1432422823,
                -10304129995 / 1701304382,
                -48777925059 / 3047939560,
                15336726248 / 1032824649,
                -45442868181 / 3398467696,
                3065993473 / 597172653,
            ),
            (
                185892177 / 718116043,
                0.0,
                0.0,
                -3185094517 / 667107341,
                -477755414 / 1098053517,
                -703635378 / 230739211,
                5731566787 / 1027545527,
                5232866602 / 850066563,
                -4093664535 / 808688257,
                3962137247 / 1805957418,
                65686358 / 487910083,
            ),
            (
                403863854 / 491063109,
                0.0,
                0.0,
                -5068492393 / 434740067,
                -411421997 / 543043805,
                652783627 / 914296604,
                11173962825 / 925320556,
                -13158990841 / 6184727034,
                3936647629 / 1978049680,
                -160528059 / 685178525,
                248638103 / 1413531060,
                0.0,
            ),
        ),
        b=_B8,
    ),
    middle=(
        0.04103130360739393,
        0.0,
        0.0,
        0.0,
        0.0,
        0.05100562801991382,
        0.2388930677412202,
        0.3096870143996103,
        -0.2172325471755352,
        0.07833405679331928,
        -0.0018614369715579948,
        0.007072844202678841,
        0.00690847373200576,
        -0.013838404349047373,
    ),
    error=(*_less(_B8, _B7), 0.0),
    reuses=True,
)
"""Prince and Dormand 1981, Journal of Computational and Applied Mathematics 7, 67-75; the middle is torchdiffeq's."""

_B_TSIT5 = (
    0.09646076681806523,
    1 / 100,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)

TSIT5 = Embedded(
    Tableau(
        "tsit5",
        5,
        c=(0.0, 161 / 1000, 327 / 1000, 9 / 10, 0.9800255409045097, 1.0),
        a=(
            (),
            (161 / 1000,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        ),
        b=_B_TSIT5,
    ),
    # Tsitouras' interpolant at 1/2. It is of degree 4 and has the states and slopes of both ends, as `within` has.
    middle=(
        0.10741235230096878,
        0.01135625,
        0.3956090305604531,
        -0.3447521435259353,
        1.316185364958165,
        -1.0170608542936517,
        1 / 32,
    ),
    error=_less(
        (*_B_TSIT5, 0.0),
        (
            0.09468075576583945,
            0.009183565540343254,
            0.4877705284247616,
            1.2342975669304790,
            -2.7077123499835256,
            1.8666284181705871,
            1 / 66,
        ),
    ),
    reuses=True,
)
"""Tsitouras 2011, Computers and Mathematics with Applications 62, 770-775."""

EMBEDDED: dict[str, Embedded] = {
    pair.method.name: pair for pair in (BOSH3, FEHLBERG2, ADAPTIVE_HEUN, DOPRI5, DOPRI8, TSIT5)
}
"""The adaptive methods. Their coefficients are torchdiffeq's to the last bit where it has the method."""

ADAPTIVE = tuple(EMBEDDED)
"""Their names."""


def embedded(method: str) -> Embedded:
    """The adaptive method with this name.

    Raises:
        ValueError: if there is no such method; the message lists all methods.
    """
    return EMBEDDED[choice("adaptive method", method, EMBEDDED)]
