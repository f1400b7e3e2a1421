"""Ways to make looped layers differ: ``python -m benchmarks.language``, see `benchmarks.language.measure`."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """See `benchmarks.language.measure`."""
    from benchmarks.language.measure import main  # here: the room's other commands import what it imports

    main(arguments)
