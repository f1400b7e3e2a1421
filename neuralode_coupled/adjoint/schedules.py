"""Which states a discrete adjoint stores, and how it recomputes the others.

Schedules come from ``checkpoint-schedules`` (the Firedrake project's Revolve): for a given number of stored states they
need provably the fewest recomputed steps (Griewank and Walther, ACM TOMS 2000).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Load:
    """Make the stored state ``n`` the current one, for the last time if ``last``."""

    n: int
    last: bool


@dataclass(frozen=True)
class Advance:
    """Repeat the steps ``first .. end - 1`` from the current state, after storing it if ``store``."""

    first: int
    end: int
    store: bool


@dataclass(frozen=True)
class Reverse:
    """Repeat step ``n`` from the current state with its graph, and go back through it."""

    n: int


@dataclass(frozen=True)
class Schedule:
    """A forward pass and a backward pass over a number of steps.

    Attributes:
        stored: the indices of the states that the forward pass stores, 0 first.
        program: what the backward pass does, in order.
    """

    stored: tuple[int, ...]
    program: tuple[Load | Advance | Reverse, ...]

    @cached_property
    def top(self) -> int:
        """One more than the last step that the backward pass repeats."""
        return next((action.n + 1 for action in self.program if isinstance(action, Reverse)), 0)

    def behind(self, steps: int) -> Schedule:
        """The same after ``steps`` other steps; the very first state is stored in any case."""
        if steps == 0:
            return self
        if not self.program:
            return Schedule((0,), ())
        return Schedule(
            (0, *(n + steps for n in self.stored)), tuple([_moved(action, steps) for action in self.program])
        )

    @cached_property
    def steps(self) -> int:
        """How many steps the backward pass goes through by repeating them."""
        return sum(isinstance(action, Reverse) for action in self.program)

    @property
    def recomputed(self) -> int:
        """How many steps the backward pass repeats."""
        sizes = (
            1 if isinstance(a, Reverse) else a.end - a.first if isinstance(a, Advance) else 0 for a in self.program
        )
        return sum(sizes)


def _moved(action: Load | Advance | Reverse, steps: int) -> Load | Advance | Reverse:
    match action:
        case Load(n, last):
            return Load(n + steps, last)
        case Advance(first, end, store):
            return Advance(first + steps, end + steps, store)
        case Reverse(n):
            return Reverse(n + steps)


@lru_cache(maxsize=64)
def schedule(steps: int, checkpoints: int | None, parts: int = 1) -> Schedule:
    """The schedule for a number of steps and of stored states (None: every step's), each step in ``parts``."""
    whole = _schedule(steps, checkpoints)
    return whole if parts == 1 else _parted(whole, parts)


def _parted(whole: Schedule, parts: int) -> Schedule:
    """The same if each step has several parts. To go back through a step, the states between its parts are made and
    stored, so that one part's graph exists at a time."""
    program: list[Load | Advance | Reverse] = []
    for action in whole.program:
        match action:
            case Load(n, last):
                program.append(Load(n * parts, last))
            case Advance(first, end, store):
                program.append(Advance(first * parts, end * parts, store))
            case Reverse(n):
                first, final = n * parts, n * parts + parts - 1
                program += [Advance(m, m + 1, store=True) for m in range(first, final)]
                program.append(Reverse(final))
                for m in reversed(range(first, final)):
                    program += [Load(m, last=True), Reverse(m)]
    return Schedule(tuple(n * parts for n in whole.stored), tuple(program))


def _schedule(steps: int, checkpoints: int | None) -> Schedule:
    if checkpoints is None or checkpoints >= steps:
        backward = [action for n in reversed(range(steps)) for action in (Load(n, last=True), Reverse(n))]
        return Schedule(tuple(range(max(steps, 1))), tuple(backward))
    # One step more than there are: it stands for the loss, whose graph is the caller's, so that each real step is
    # repeated at least once in the backward pass and no graph is kept in between.
    return _revolve(steps, checkpoints)


def _revolve(steps: int, checkpoints: int) -> Schedule:
    from checkpoint_schedules import Copy, EndForward, Forward, Move, MultistageCheckpointSchedule
    from checkpoint_schedules import Reverse as Back

    stored: list[int] = []
    program: list[Load | Advance | Reverse] = []
    forward = True
    for action in MultistageCheckpointSchedule(steps + 1, checkpoints, 0):
        match action:
            case EndForward():
                forward = False
            case Forward() if forward:
                stored += [action.n0] if action.write_ics else []
            case Forward() if not action.write_adj_deps:
                program.append(Advance(action.n0, action.n1, action.write_ics))
            case Copy() | Move():
                program.append(Load(action.n, last=isinstance(action, Move)))
            case Back() if action.n0 < steps:
                program.append(Reverse(action.n0))
    return Schedule(tuple(stored), tuple(program))
