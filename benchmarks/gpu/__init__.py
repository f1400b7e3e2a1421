"""A training step on a GPU, and what else it answers: ``python -m benchmarks.gpu``, see `benchmarks.gpu.command`."""

from benchmarks.gpu.command import main

__all__ = ["main"]
