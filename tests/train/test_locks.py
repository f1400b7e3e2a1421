"""One process at a time in a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from neuralode_coupled.train import locks
from neuralode_coupled.train.locks import Lock

HOLDS = """
import sys, time
from pathlib import Path
from neuralode_coupled.train.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_is_held_once_until_it_is_released_or_forgotten(tmp_path):
    lock = Lock(tmp_path / ".lock")
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {os.getpid()} on .*: wait until it has"):
        Lock(tmp_path / ".lock")
    lock.release()
    lock.release()
    Lock(tmp_path / ".lock")  # nobody keeps it
    Lock(tmp_path / ".lock")


def test_a_killed_process_holds_nothing(tmp_path):
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            Lock(path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        Lock(path)


@pytest.mark.skipif(locks.fcntl is None, reason="needs a system with file locks")
def test_where_the_file_system_knows_no_locks_it_goes_on_without(tmp_path, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unknown)
    one, other = Lock(tmp_path / ".lock"), Lock(tmp_path / ".lock")
    one.release()
    other.release()
