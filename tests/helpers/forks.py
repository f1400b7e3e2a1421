"""Programs that start with their imports done: one process makes them, and every program is a fork of it.

    python -m tests.helpers.forks MODULE DESCRIPTOR

A fork is a process as any other, with its own memory, session, signals and end. Importing Lightning takes five seconds,
and a run of two processes needs it twice.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any


class Started:
    """A program that runs: see `Forks.start`."""

    def __init__(self, control: socket.socket, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._arguments = list(arguments)
        self._said = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  (closed when they are read)
        # Says its number and the code of its end. Whatever it has started holds this open too.
        self._code, held = os.pipe()
        request = json.dumps([self._arguments, dict(environment)]).encode()
        socket.send_fds(control, [request], [*(file.fileno() for file in self._said), held])
        os.close(held)

    def communicate(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait until it and all that it has started have ended; after ``timeout`` seconds they are killed.

        Raises:
            TimeoutError: if they had to be.
        """
        latest, told = time.monotonic() + timeout, b""
        while select.select([self._code], [], [], max(0.0, latest - time.monotonic()))[0]:
            piece = os.read(self._code, 64)
            told += piece
            if not piece:
                os.close(self._code)
                _, code = told.split()
                return subprocess.CompletedProcess(self._arguments, int(code), *map(_content, self._said))
        os.killpg(int(told.split()[0]), signal.SIGKILL)
        raise TimeoutError(f"{self._arguments} still ran after {timeout} s")


def _content(file: Any) -> str:
    with file:
        file.seek(0)
        return file.read()


class Forks:
    """The process that programs are forked from; each of them calls ``forked()`` of a module.

    Args:
        module: its name. It imports what its programs need, and starts no threads.
    """

    def __init__(self, module: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.helpers.forks", module, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL
        )
        theirs.close()

    def start(self, *arguments: str, **environment: object) -> Started:
        """Start a program with these arguments, in a session of its own, and with more environment variables."""
        chosen = {name: str(value) for name, value in environment.items()}
        return Started(self._control, arguments, os.environ | chosen)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *caught: object) -> None:
        self._control.close()
        assert self._process.wait(timeout=60) == 0


def become_a_program(control: socket.socket) -> None:
    """Fork at every request, and return in each of the programs. When no more can come, the process ends in here."""
    waiting = []
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 2**20, 3)
        if not request:
            for process in waiting:
                os.waitpid(process, 0)
            raise SystemExit
        # One that waits for the program, so that this one can take the next request.
        waiting.append(os.fork())
        if waiting[-1] == 0:
            *said, told = descriptors
            program = os.fork()
            if program == 0:
                _begin(*json.loads(request), said)
                return
            os.write(told, f"{program} ".encode())
            os.write(told, str(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])).encode())
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _begin(arguments: list[str], environment: dict[str, str], said: list[int]) -> None:
    os.setsid()
    for standard, descriptor in zip((1, 2), said, strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    sys.argv[1:] = arguments
    os.environ.clear()
    os.environ.update(environment)


def main() -> None:
    """The process that forks, and then each of the programs."""
    module, control = import_module(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    gc.freeze()
    become_a_program(control)
    control.close()
    module.forked()


if __name__ == "__main__":
    main()
