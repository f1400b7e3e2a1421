"""``python -m neuralode_coupled``, and the console script ``neuralode-coupled``."""

from __future__ import annotations

import sys

from neuralode_coupled._extras import MissingExtra


def main() -> None:
    """Run the command line. Without the extra ``train`` say in one line what to install; the exit code is then 2."""
    try:
        from neuralode_coupled.cli import main as run
    except MissingExtra as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    run()


if __name__ == "__main__":
    main()
