"""Being asked to end: Ctrl-C, SIGTERM, or the end of the program that started this one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ASKED_TO_END = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process has got a signal that asks it to end.

    No `Exception`, so that nothing between here and the command takes it for an error; no KeyboardInterrupt or
    SystemExit, of which Lightning makes exit codes of its own.

    Attributes:
        signal: which.
        explained: whether another process of the run tells the user.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.explained = False
        super().__init__(f"interrupted by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """That of a program that such a signal has ended, as a shell has it."""
        return 128 + self.signal


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, a signal that asks to end raises `Interrupted`; those that were ignored before, as by nohup, still are.

    Outside the main thread, where Python handles no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in ASKED_TO_END}
    for number, handler in found.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def ignore_more() -> None:
    """The process is ending, and does so in order however often it is asked; `interruptible` undoes this."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKED_TO_END:
            signal.signal(number, signal.SIG_IGN)


def end_with_standard_input() -> None:
    """Send this process SIGTERM when its standard input ends: when whoever holds the other end of the pipe is gone."""
    threading.Thread(target=_wait_for_end, args=(sys.stdin.fileno(),), daemon=True).start()


def _wait_for_end(descriptor: int) -> None:
    while os.read(descriptor, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)
