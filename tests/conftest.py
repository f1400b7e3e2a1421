"""Settings that hold for every test."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# Some tests measure the memory of their process, and some run what changes its allocator.
os.environ["NEURALODE_COUPLED_ALLOCATOR"] = "0"

for name, examples in (("project", 12), ("thorough", 200)):
    settings.register_profile(
        name, deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
settings.load_profile("project")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what runs in the background with SIGINT ignored, and some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """A million objects of the imports live to the end: Python's collector need not walk them at every turn.

    What tests make is collected as before, only after more of it; a tenth of all time went into this.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # among the keywords are the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
