"""This package beside others, on one problem: ``python -m benchmarks.peers``, see `benchmarks.peers.measure`."""

from benchmarks.peers.measure import main

__all__ = ["main"]
