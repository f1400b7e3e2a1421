"""``python -m benchmarks.fold``, see `benchmarks.fold.measure`."""

from benchmarks.fold.measure import main

if __name__ == "__main__":
    main()
