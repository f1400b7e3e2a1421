"""Learning transport from a few observed times, with one convolution, by models with and without evolving weights."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._files import write_atomically
from neuralode_coupled.adjoint import Backprop, ContinuousAdjoint, GradientMethod
from neuralode_coupled.coupled.solving import solve
from neuralode_coupled.evolution import EvolutionOperator, MLPEvolution, ReactionDiffusionAdvection, Static
from neuralode_coupled.field import CoupledField
from neuralode_coupled.runge_kutta import tableau
from neuralode_coupled.transport.problem import VELOCITIES, Signals, exact, signals, velocity_of

TAPS = 7
OBSERVED = 4
"""Times of training: 1/4, 1/2, 3/4 and 1."""

_TRAIN, _TEST = 16, 64


@dataclass(frozen=True)
class Model:
    """A model that learns the problem: an evolution operator for the convolution's filter, and a gradient method."""

    label: str
    evolution: Callable[[], EvolutionOperator]
    adjoint: Callable[[], GradientMethod]


# The discrete gradient is that of DTO however it is computed, and here it is small enough to store every step.
MODELS: dict[str, Model] = {
    "node": Model("Neural ODE (q = 0, continuous adjoint)", Static, ContinuousAdjoint),
    "anode": Model("ANODE (q = 0, DTO)", Static, Backprop),
    "anodev2-reaction": Model(
        "ANODEV2, q = reaction",
        lambda: ReactionDiffusionAdvection(diffusion=False, advection=False, scope="layer"),
        Backprop,
    ),
    "anodev2-mlp": Model("ANODEV2, q = perceptron of (w, t)", lambda: MLPEvolution(hidden=16, time=True), Backprop),
}


@dataclass(frozen=True)
class Config:
    """What determines the numbers.

    Attributes:
        seed: of the signals and of the initial weights.
        steps: activation steps from 0 to 1; the grid points that are not observed are the unseen times.
        method: the Runge-Kutta method.
        iterations: of L-BFGS, at most.

    Raises:
        ValueError: for an unknown method, steps that are no multiple of four or leave no time unseen, a negative seed
            or iterations below one.
    """

    seed: int = 0
    steps: int = 16
    method: str = "rk4"
    iterations: int = 150

    def __post_init__(self) -> None:
        tableau(self.method)
        if self.steps < 2 * OBSERVED or self.steps % OBSERVED:
            raise ValueError(
                f"steps must be a multiple of {OBSERVED}, the observed times, and at least {2 * OBSERVED}, "
                f"got {self.steps}"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def times(self) -> list[float]:
        """The grid, from 0 to 1."""
        return [n / self.steps for n in range(self.steps + 1)]

    @property
    def observed(self) -> list[int]:
        """The grid points at which the models see the solution."""
        return [n * self.steps // OBSERVED for n in range(1, OBSERVED + 1)]

    @property
    def unseen(self) -> list[int]:
        """The grid points after the first at which they do not."""
        return [n for n in range(1, self.steps + 1) if n not in self.observed]


@dataclass(frozen=True)
class Learned:
    """The result of one model. Errors are ``|z - exact| / |exact|`` over all signals and times concerned.

    Attributes:
        parameters: the number of learned parameters.
        iterations: that L-BFGS took.
        train_error: training signals at the observed times.
        unseen_times: training signals at the other times of the grid.
        unseen_signals: other signals at the observed times.
        unseen: other signals at the other times.
        error: other signals at every time of the grid.
        velocity: the one of the filter in force at every time of the grid, see `problem.velocity_of`.
        z: the first of the other signals at every time of the grid.
    """

    parameters: int
    iterations: int
    train_error: float
    unseen_times: float
    unseen_signals: float
    unseen: float
    error: list[float]
    velocity: list[float]
    z: list[list[float]]


@dataclass(frozen=True)
class Outcome:
    """One velocity, and the result of each model."""

    velocity: str
    config: Config
    models: dict[str, Learned]
    versions: dict[str, str]


def check(velocities: Sequence[str]) -> None:
    """Raise ValueError unless there is at least one, and all names are known."""
    unknown = [name for name in velocities if name not in VELOCITIES]
    if unknown or not velocities:
        raise ValueError(f"velocities must be some of {', '.join(VELOCITIES)}, got {', '.join(unknown) or 'none'}")


def learn(velocity: str, config: Config, report: Callable[[str], None] | None = None) -> Outcome:
    """Train every model on one velocity, in float64 on the CPU.

    Raises ValueError for an unknown velocity.
    """
    check([velocity])
    found = {}
    for name, model in MODELS.items():
        found[name] = _learn(model, velocity, config)
        if report is not None:
            report(f"{velocity}, {model.label}: error at unseen times {found[name].unseen:.1e}")
    versions = {name: metadata.version(name) for name in ("torch", "torchdiffeq")}
    return Outcome(velocity, config, found, versions | {"python": platform.python_version()})


def unseen_signals(config: Config) -> Signals:
    """The test signals, from a random stream of their own."""
    return signals(_TEST, 2 * config.seed + 1)


def _learn(model: Model, velocity: str, config: Config) -> Learned:
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(config.seed)
    convolution = nn.Conv1d(1, 1, TAPS, padding="same", padding_mode="circular", bias=False, dtype=torch.float64)
    nn.init.normal_(convolution.weight, std=0.1)
    field = CoupledField(convolution, model.evolution())
    torch.random.set_rng_state(torch_state)
    distances = [VELOCITIES[velocity].distance(t) for t in config.times]
    train, test = signals(_TRAIN, 2 * config.seed), unseen_signals(config)

    def run(z0: Signals) -> Tensor:
        adjoint = model.adjoint()
        return solve(field, z0, config.times, steps=config.steps, method=config.method, adjoint=adjoint).z

    target = exact(train, distances)
    iterations = _minimise(
        list(field.parameters()), lambda: (run(train) - target)[config.observed].square().mean(), config.iterations
    )
    with torch.no_grad():
        errors = [_relative(run(z0), exact(z0, distances)) for z0 in (train, test)]
        z = run(test[:1])[:, 0, 0]
        solution = solve(field, test[:1], config.times, steps=config.steps, method=config.method)
        filters = next(iter(solution.weights(config.times).values()))
    seen, new = errors
    return Learned(
        parameters=sum(p.numel() for p in field.parameters()),
        iterations=iterations,
        train_error=seen(config.observed),
        unseen_times=seen(config.unseen),
        unseen_signals=new(config.observed),
        unseen=new(config.unseen),
        error=[new([n]) for n in range(len(config.times))],
        velocity=velocity_of(filters).tolist(),
        z=z.tolist(),
    )


def _relative(z: Tensor, truth: Tensor) -> Callable[[list[int]], float]:
    """The relative error over some of the times."""
    return lambda at: float((z[at] - truth[at]).norm() / truth[at].norm())


def _minimise(parameters: list[nn.Parameter], loss: Callable[[], Tensor], iterations: int) -> int:
    """L-BFGS with a strong Wolfe line search; returns the number of iterations."""
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    return int(optimiser.state[parameters[0]]["n_iter"])


def save(outcome: Outcome, folder: Path) -> Path:
    """Write ``velocity-NAME.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, outcome.velocity)
    write_atomically(path, json.dumps(asdict(outcome), indent=1) + "\n")
    return path


def load(folder: Path, velocity: str, config: Config) -> Outcome | None:
    """The outcome in a folder; None if there is none, or only a part of one.

    Raises ValueError if it is that of another configuration.
    """
    path = _path(folder, velocity)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        there = Config(**content["config"])
        models = {name: Learned(**learned) for name, learned in content["models"].items()}
        outcome = Outcome(content["velocity"], there, models, content["versions"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if there != config:
        raise ValueError(f"{path} was made with {there}, not {config}: choose another folder, or --fresh")
    return outcome


def _path(folder: Path, velocity: str) -> Path:
    return folder / f"velocity-{velocity}.json"
