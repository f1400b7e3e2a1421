"""Folded networks beside others of as few parameters: ``python -m benchmarks.fold``, see `benchmarks.fold.measure`."""

from benchmarks.fold.measure import main

__all__ = ["main"]
