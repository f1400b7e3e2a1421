"""The command line: ``train``, ``compare``, ``predict``, ``export``, ``check``, ``filters`` and ``transport``.

The options of an experiment are made from the fields of `Experiment`. What needs more than a moment to import is
imported by the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

from neuralode_coupled import __version__
from neuralode_coupled._checks import choice
from neuralode_coupled._extras import needs
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import NotWritten, RunFolder
from neuralode_coupled.train.interruptions import Interrupted, end_with_standard_input, interruptible
from neuralode_coupled.train.names import FIXED, VELOCITIES, check_name, folder_root
from neuralode_coupled.train.result import Result

with needs("train"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from neuralode_coupled.train.extending import Extension

app = typer.Typer(
    name="neuralode-coupled",
    help="Train, compare and use coupled neural ODEs (ANODEV2) on images.",
    epilog="Example: neuralode-coupled train --out runs/digits; neuralode-coupled COMMAND --help shows the options.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

BAD_INPUT, FAILED = 2, 1
"""Exit codes: the command cannot be carried out as it stands; a run started and did not end well."""

Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show a progress bar, in a terminal.")]

Allocator = Annotated[
    bool,
    typer.Option(
        "--allocator/--no-allocator",
        help="Keep freed memory for the next tensors (glibc's malloc): this is faster.",
    ),
]

_FIELDS: dict[str, Field[Any]] = {field.name: field for field in fields(Experiment)}
_OF_ONE_RUN = ("variant", "seed")
"""The fields of which `compare` takes several values."""


def _option(name: str) -> Any:
    """The option that sets a field of the experiment, without its type and default."""
    field = _FIELDS[name]
    flag = f"--{name.replace('_', '-')}"
    return typer.Option(flag, help=field.metadata["help"])


def _shared_options() -> list[Parameter]:
    """The options that `train` and `compare` have in common, as parameters of a command."""
    types = get_type_hints(Experiment) | {"data_root": Path | None}
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[types[name], _option(name)])
        for name, field in _FIELDS.items()
        if name not in _OF_ONE_RUN
    ]


def _with_experiment(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of an experiment, in place of its ``experiment`` made of them."""
    shared = _shared_options()

    @wraps(command)
    def wrapper(**options: Any) -> None:
        given: dict[str, Any] = {option.name: options.pop(option.name) for option in shared}
        if given["data_root"] is not None:
            given["data_root"] = str(given["data_root"])
        with _bad_input():
            experiment = Experiment(**given)
            _check_own(experiment)
        command(experiment=experiment, **options)

    own = [p for name, p in signature(command, eval_str=True).parameters.items() if name != "experiment"]
    # What typer reads; the help shows the options in this order.
    options = [*own, *shared]
    wrapper.__signature__ = Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    wrapper.__annotations__ = {option.name: option.annotation for option in options}
    return wrapper


def _check_own(experiment: Experiment) -> None:
    """Look for the images, and make what is the user's own, before Lightning, which takes seconds to load."""
    if experiment.data == "folder":
        folder_root(experiment.data_root)
    if ":" in (experiment.evolution or "") + (experiment.kernel or ""):
        from neuralode_coupled.models import evolution_named, kernel_named

        evolution_named(experiment.evolution)
        kernel_named(experiment.kernel)


def _show_version(wanted: bool) -> None:
    if wanted:
        _line(f"neuralode-coupled {__version__}")
        raise typer.Exit


@app.callback()
def overview(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command."""


@app.command(epilog="Example: neuralode-coupled train --variant anodev2-1 --epochs 10 --out runs/digits")
@_with_experiment
def train(
    *,
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--out", help="The run's folder.")],
    variant: Annotated[str, _option("variant")] = Experiment.variant,
    seed: Annotated[int, _option("seed")] = Experiment.seed,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Continue the finished run in --out to --epochs epochs in all.")
    ] = False,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Try on one batch which layout, precision and stored graphs are fastest, and take these.",
        ),
    ] = False,
    allocator: Allocator = True,
    progress: Progress = True,
    end_with_stdin: Annotated[bool, typer.Option("--end-with-stdin", hidden=True)] = False,
    experiment: Experiment,
) -> None:
    """Train one network.

    The folder gets metrics.csv (one row per epoch), the same for TensorBoard,
    the best and the last checkpoint, and at the end result.json. A finished
    run is not repeated. --resume continues a run that was killed. --extend
    continues a finished run to --epochs epochs in all; options that you do
    not give are then those of the run.
    """
    with _interruptible("continue the run with --resume"):
        if end_with_stdin:
            end_with_standard_input()
        extension = None
        with _bad_input():
            experiment = replace(experiment, variant=variant, seed=seed)
            if extend:
                from neuralode_coupled.train import extending

                extension = extending.plan(folder, experiment, _given(context))
                experiment, resume = extension.experiment, True
        if allocator:
            _keep_freed_memory()
        if fast:
            experiment = _fast(experiment, RunFolder(folder), _given(context))
        _train(experiment, RunFolder(folder), resume, progress, extension)


def _given(context: typer.Context) -> set[str]:
    """The fields of an experiment that the user has chosen, be it by their defaults."""
    sources = {name: context.get_parameter_source(name) for name in _FIELDS}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _keep_freed_memory() -> None:
    from neuralode_coupled.train.allocator import keep_freed_memory

    keep_freed_memory()


def _fast(experiment: Experiment, run: RunFolder, given: set[str]) -> Experiment:
    """The experiment with what is fastest here, and a line that says so."""
    with _bad_input():
        from neuralode_coupled.train.building import resolve
        from neuralode_coupled.train.fast import choose

        found = choose(resolve(experiment, run.experiment()), run, given)
    _line(str(found))
    return found.experiment


def _train(experiment: Experiment, run: RunFolder, resume: bool, progress: bool, extension: Extension | None) -> None:
    """`train`, of an experiment that is complete."""
    extends = None if extension is None else extension.finished
    with _bad_input():
        from neuralode_coupled.evolution import NonFiniteWeights
        from neuralode_coupled.train.building import resolve
        from neuralode_coupled.train.learner import Diverged
        from neuralode_coupled.train.processes import FolderNotShared, ProcessLost
        from neuralode_coupled.train.run import prepare

        run.check(resolve(experiment, run.experiment()) if extends is None else extends, resume=True)
        result = run.result() if extends is None else None
        if result is not None:
            _line(f"{run.path} is finished already: {_accuracies(result)}")
            return
        bar = progress and out.is_terminal
        ready = prepare(experiment, run, resume=resume, extends=extends, progress=bar, report=None if bar else _line)
    if ready.done and ready.trainer.is_global_zero:
        rate = "" if extension is None else f"; {extension.schedule}"
        _line(f"continuing after epoch {ready.done} of {experiment.epochs}{rate}")
    try:
        result = ready.run()
    except ProcessLost as error:
        if error.explained:
            raise typer.Exit(FAILED) from error
        _stop(error, FAILED)
    except (Diverged, NonFiniteWeights, FolderNotShared, NotWritten) as error:
        _stop(error, FAILED)
    if ready.trainer.is_global_zero:
        _line(f"{_accuracies(result)}; see {run.path}")


@app.command(epilog="Example: neuralode-coupled compare --variants baseline,anodev2-1 --seeds 0,1 --out runs/compare")
@_with_experiment
def compare(
    *,
    folder: Annotated[Path, typer.Option("--out", help="The folder of the runs, the table and the figures.")],
    variants: Annotated[
        str, typer.Option(help="Variants, separated by commas; see train.")
    ] = "baseline, anode, anodev2-1, anodev2-2",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; one run per variant and seed.")] = "0",
    allocator: Allocator = True,
    progress: Progress = True,
    experiment: Experiment,
) -> None:
    """Train several variants of one network, and compare them.

    Each run has its own process, and its folder OUT/MODEL-VARIANT-seedN.
    Finished runs are not repeated; unfinished ones continue. The results are a
    table (table.csv, table.md) and two figures: the learning curves, and
    filters that evolve over time.
    """
    with _bad_input():
        for variant in _names(variants):
            check_name("variant", variant)
        from neuralode_coupled.train import compare as comparison
        from neuralode_coupled.train.table import present

        chosen = comparison.plan(folder, experiment, _names(variants), _seeds(seeds))
    with _interruptible("the same command continues from here"):
        failures = comparison.run(chosen, progress=progress, allocator=allocator, report=_line)
        for failure in failures:
            err.print(f"[red]failed:[/red] {escape(failure)}", soft_wrap=True)
        with _bad_input():  # what the folder of a finished run holds may be damaged
            present(folder, chosen, out)
    if failures:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: neuralode-coupled predict --run runs/digits photo.png photos --out classes.csv")
def predict(
    *,
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.", show_default=False)],
    run: Annotated[Path, typer.Option(help="The folder of a run with at least one finished epoch.")],
    table: Annotated[Path | None, typer.Option("--out", help="Write the table to this file, NAME.csv.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best (by test accuracy) or last.")] = "best",
    allocator: Allocator = True,
) -> None:
    """Classify images with a trained network.

    Each image gets its most probable class, with the probability.
    Images are resized to 32x32 and normalised as in training.
    """
    with _bad_input():
        RunFolder(run).trained(checkpoint)
        from neuralode_coupled.train import predicting

        if allocator:
            _keep_freed_memory()
        if table is not None:
            predicting.check_table(table)
        found = predicting.predict(run, images, checkpoint)
        if table is None:
            for prediction in found:
                _line(f"{prediction.image}: {prediction.class_name} {100 * prediction.probability:.1f}%")
            return
        predictions = list(found)
        predicting.written(predictions, table)
    _line(f"images: {len(predictions)}; see {table}")


@app.command(epilog="Example: neuralode-coupled export --run runs/digits --out model.onnx")
def export(
    *,
    run: Annotated[Path, typer.Option(help="The folder of a run with at least one finished epoch.")],
    file: Annotated[Path, typer.Option("--out", help="The file: NAME.onnx (ONNX) or NAME.pt2 (torch.export).")],
    checkpoint: Annotated[str, typer.Option(help="best (by test accuracy) or last.")] = "best",
    opset: Annotated[
        int | None, typer.Option(help="Version of ONNX's operators, by default 20; GroupNorm is refused from 21 on.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the ODE blocks; by default those of training.")] = None,
    method: Annotated[str | None, typer.Option(help="Their solver, with --steps; for a run with dopri5, say.")] = None,
) -> None:
    """Write a trained network as a file for other runtimes.

    The file takes pixels (uint8, RGB, 32x32, any batch size), normalises them as
    in training, and returns the probabilities of the classes. It is run with 1
    and 8 images, and compared with the network, before it is kept.
    """
    with _bad_input():
        RunFolder(run).trained(checkpoint)
        from neuralode_coupled.train import exporting

        try:
            exported = exporting.export(run, file, checkpoint=checkpoint, opset=opset, steps=steps, method=method)
        except exporting.Inexact as error:
            _stop(error, FAILED)
    _line(str(exported))


@app.command(epilog="Example: neuralode-coupled check --model resnet4 --variant anodev2-1")
def check(
    *,
    model: Annotated[str, _option("model")] = Experiment.model,
    variant: Annotated[str, typer.Option(help="node, anode, anodev2-1 or anodev2-2.")] = "anodev2-1",
    steps: Annotated[int | None, _option("steps")] = Experiment.steps,
    method: Annotated[str, _option("method")] = Experiment.method,
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    seed: Annotated[int, typer.Option(help="Seed of weights, coefficients of the evolution, and images.")] = 0,
) -> None:
    """Compare the gradients of a network's coupled layers.

    Each layer gets random images. Its gradient is computed by DTO, by unrolled
    autograd, by the continuous adjoint and by finite differences. The exit code
    is 1 if DTO differs from unrolled autograd by more than rounding.
    """
    with _bad_input():
        for field, name in (("model", model), ("variant", variant), ("method", method)):
            check_name(field, name)
        from neuralode_coupled.train.layers_to_check import layers_and_inputs

        cases = layers_and_inputs(model, variant, steps, method, dtype, seed)
    from neuralode_coupled import kkt

    exact = True
    for name, (layer, z0) in cases.items():
        result = kkt.check(layer, z0, show=False)
        _line(f"layer {name} of {model} {variant}, z0 of shape {tuple(z0.shape)}, {dtype}")
        _line(str(result))
        exact = exact and result.exact
    if not exact:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: neuralode-coupled filters --run runs/digits --out figures")
def filters(
    *,
    folder: Annotated[Path, typer.Option("--out", help="The folder of the pictures.")],
    size: Annotated[int, typer.Option(help="Pixels per side of the Gaussian filter; an odd number.")] = 33,
    run: Annotated[Path | None, typer.Option(help="Also draw the evolving filters of this trained run.")] = None,
) -> None:
    """Draw filters that evolve.

    A Gaussian filter under diffusion, advection, reaction and all three, as a
    picture (filters.png) and as an animation (filters.gif), and under the
    other operators (operators.png). --run adds the learned filters of each
    layer (learned-LAYER.png).
    """
    with _bad_input():
        if run is not None:
            RunFolder(run).trained()
        from neuralode_coupled.figures import gallery

        gallery.gaussian(size)  # a size that will not do is refused before anything is written
        learned = [] if run is None else _draw_run(folder, run)
        for path in [*gallery.draw(folder, size), *learned]:
            _line(str(path))


@app.command(epilog="Example: neuralode-coupled transport --out runs/transport")
def transport(
    *,
    folder: Annotated[Path, typer.Option("--out", help="The folder of the results and the pictures.")],
    velocities: Annotated[
        str, typer.Option(help="Some of constant, linear, exponential, sinusoidal, sign-changing, separated by commas.")
    ] = "constant, linear, exponential, sinusoidal, sign-changing",
    seed: Annotated[int, typer.Option(help="Seed of the signals and the initial weights.")] = 0,
    steps: Annotated[int, typer.Option(help="Activation steps; a multiple of 4, the number of observed times.")] = 16,
    method: Annotated[str, _option("method")] = "rk4",
    iterations: Annotated[int, typer.Option(help="Iterations of L-BFGS, at most.")] = 150,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat what is already in --out.")] = False,
) -> None:
    """Learn transport with a velocity that changes in time (the paper's Fig. 2).

    One convolution learns dz/dt = c(t) dz/dx from four observed times: with
    constant weights (Neural ODE, ANODE), and with weights that evolve. Each
    velocity gets a file of results; finished ones are not repeated. The command
    prints a table, and draws a picture (transport.png) and an animation
    (transport.gif).
    """
    with _bad_input():
        chosen = _names(velocities)
        for name in chosen:
            choice("velocity", name, VELOCITIES)
        choice("method", method, FIXED)
        from neuralode_coupled import transport as problem

        config = problem.Config(seed, steps, method, iterations)
        problem.check(chosen)
        done = {} if fresh else {name: problem.load(folder, name, config) for name in chosen}
        folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in chosen:
        outcome = done.get(name)
        if outcome is None:
            outcome = problem.learn(name, config, report=_line)
            with _bad_input():  # the disk may be full by now
                problem.save(outcome, folder)
        outcomes.append(outcome)
    out.print(problem.table(outcomes))
    with _bad_input():
        for path in problem.draw(folder, outcomes):
            _line(str(path))


def main() -> None:
    """The console script."""
    app()


@contextmanager
def _bad_input() -> Iterator[None]:
    """What is raised here is the user's to mend: one line, and no traceback. Warnings are one line each, too."""
    with warnings.catch_warnings():
        warnings.showwarning = _warning
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError) as error:
            _stop(error, BAD_INPUT)


@contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what happens here, with one line that says how it goes on."""
    with interruptible():
        try:
            yield
        except Interrupted as error:
            if error.explained:
                raise typer.Exit(error.exit_code) from error
            _stop(f"{error}: {advice}", error.exit_code)


def _warning(message: Warning | str, *where: Any, **more: Any) -> None:
    err.print(f"[yellow]warning:[/yellow] {_in_one_line(message)}", soft_wrap=True)


def _stop(error: Exception | str, code: int) -> NoReturn:
    err.print(f"[red]error:[/red] {_in_one_line(error)}", soft_wrap=True)
    raise typer.Exit(code)


def _in_one_line(said: object) -> str:
    return escape(" ".join(str(said).split()))


def _line(text: str) -> None:
    out.print(escape(text), soft_wrap=True)


def _draw_run(folder: Path, run: Path) -> list[Path]:
    from neuralode_coupled.train.pictures import draw_run  # with Lightning, which the other pictures do not need

    return draw_run(folder, run)


def _accuracies(result: Result) -> str:
    return (
        f"test accuracy {100 * result.final_accuracy:.2f}% after epoch {result.epochs} "
        f"(best {100 * result.best_accuracy:.2f}%)"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError as error:
        raise ValueError(f"seeds must be whole numbers separated by commas, got {text!r}") from error


if __name__ == "__main__":
    main()
