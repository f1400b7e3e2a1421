"""A training step on a GPU: ``python -m benchmarks.gpu``, see `benchmarks.gpu.measure`."""

from benchmarks.gpu.measure import main

__all__ = ["main"]
