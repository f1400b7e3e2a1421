"""``python -m benchmarks.gpu``, see `benchmarks.gpu.command`."""

from benchmarks.gpu.command import main

if __name__ == "__main__":
    main()
