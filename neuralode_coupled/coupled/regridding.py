"""Depth on demand: trained layers on another grid, or by another method, without retraining."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from neuralode_coupled._checks import check_model, whole
from neuralode_coupled.coupled.discretisation import Discretisation
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.field.per_step import sharing_parameters
from neuralode_coupled.runge_kutta import ADAPTIVE

Model = TypeVar("Model", bound=nn.Module)


def with_steps(model: Model, steps: int, method: str | None = None) -> Model:
    """A copy of a coupled layer, or of a model with coupled layers, that takes ``steps`` steps in each of them.

    The activation ODE (5b) and the weights theta(t) are functions of time, so the same trained layer can be solved on
    any grid: with h = (t1 - t0) / steps,

        z_{n+1} = z_n + h sum_i b_i f(z_{n,i}, theta(t_n + c_i h)),        n = 0 .. steps - 1.

    The weights' own grid (``weight_steps``) stays as it is; without one, the weights use the new grid. Per-step modules
    are functions of time too, constant over each step of the training: step n uses the copy in force at t_n, see
    `PerStep.resample`. With the trained number of steps and method the copy computes what the model
    does, bit for bit.

    The copy shares the model's parameters (and times that require a gradient), so training the copy trains the model.
    It has its own buffers. The running statistics of BatchNorm belong to the trained steps, not to the states on the
    new grid; ``torch.optim.swa_utils.update_bn(batches, copy)`` estimates them again, without gradients and without
    changing the model's.

    Args:
        model: a `CoupledODE`, or a module that contains some.
        steps: the number of activation steps.
        method: the Runge-Kutta method; by default each layer's own. Required for an adaptive layer, whose tolerances
            the copy drops.

    Returns:
        The copy, of the model's type and in its train/eval mode.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if the model has no coupled layers, for steps below 1, an unknown or an adaptive method, or if the
            kernel of a layer cannot be put on the grid (`SampleAndHold` needs a multiple of its samples).
    """
    check_model(model)
    whole("steps", steps)
    times = [time for layer in _layers(model) for time in layer.moving_times()]
    changed = sharing_parameters(model, times)
    layers = _layers(changed)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no coupled layers, whose steps could be changed: give a CoupledODE, or a "
            "model that contains one"
        )
    for layer in layers:
        _change(layer, steps, method)
    return changed


def _layers(model: nn.Module) -> list[CoupledODE]:
    return [module for module in model.modules() if isinstance(module, CoupledODE)]


def _change(layer: CoupledODE, steps: int, method: str | None) -> None:
    """Put a layer that nothing else uses on another grid."""
    old = layer.discretisation
    method = old.method if method is None else method
    if method in ADAPTIVE:
        raise ValueError(
            f"{method!r} chooses its own steps, by rtol and atol: name a method that takes equal ones, as in "
            f"nc.with_steps(model, {steps}, 'rk4')"
        )
    layer.stats = None
    layer.field.resample(steps)
    # A grid does not use the tolerances of an adaptive layer.
    layer.discretise(Discretisation(steps, method, old.weight_steps, old.weight_method))
