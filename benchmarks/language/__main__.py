"""``python -m benchmarks.language``, see `benchmarks.language.measure`."""

from benchmarks.language.measure import main

if __name__ == "__main__":
    main()
