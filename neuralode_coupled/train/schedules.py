"""The learning rate as a function of the progress of a run, so that a resumed run continues with the same rates."""

from __future__ import annotations

import math
from collections.abc import Callable

DROPS = (150 / 350, 250 / 350)
"""The fractions of the epochs after which the paper divides the learning rate by ten."""

WARM_UP = 0.3
"""The fraction of a run in which ``one-cycle`` rises to its peak, from a 25th of it."""

FIRST = 1 / 25


def learning_rate(base: float, epoch: int, epochs: int, schedule: str = "steps", within: float = 0.0) -> float:
    """The learning rate at one batch of a run.

    Args:
        base: the highest rate.
        epoch: counts from 0.
        epochs: how many there are.
        schedule: ``"steps"``, the paper's: ``base``, divided by ten after 150/350 and again after 250/350 of the
            epochs; ``"one-cycle"``: along half a cosine from base/25 to base in the first 30% of the batches, and along
            another to 0 (Smith and Topin, arXiv:1708.07120; as PyTorch's OneCycleLR, with constant momentum);
            ``"cosine"``: half a cosine from base to 0 (Loshchilov and Hutter, arXiv:1608.03983).
        within: the fraction of the epoch's batches that are done; ``steps`` changes between epochs alone.
    """
    return base * SCHEDULES[schedule](epoch, within, epochs)


def _steps(epoch: int, within: float, epochs: int) -> float:
    return 1 / 10 ** sum(epoch >= drop * epochs for drop in DROPS)


def _cosine(epoch: int, within: float, epochs: int) -> float:
    return _fall((epoch + within) / epochs)


def _one_cycle(epoch: int, within: float, epochs: int) -> float:
    done = (epoch + within) / epochs
    if done < WARM_UP:
        return 1 - (1 - FIRST) * _fall(done / WARM_UP)
    return _fall((done - WARM_UP) / (1 - WARM_UP))


def _fall(x: float) -> float:
    """Half a cosine from 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * x)) / 2


SCHEDULES: dict[str, Callable[[int, float, int], float]] = {
    "steps": _steps,
    "one-cycle": _one_cycle,
    "cosine": _cosine,
}
