"""The command line, called within the test's own process."""

from __future__ import annotations

from typer.testing import CliRunner

from neuralode_coupled import cli


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def complaint(done) -> str:
    """The one line of an error that is the user's to mend."""
    assert done.exit_code == cli.BAD_INPUT, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line
