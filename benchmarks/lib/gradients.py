"""Gradients of the coupled block, and their errors by group of tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import neuralode_coupled as nc
from benchmarks.lib.block import by_hand, groups, training_step

Gradients = dict[str, list[Tensor]]


def gradients(layer: nc.CoupledODE, run, z0: Tensor) -> Gradients:
    """The gradients of the mean square of the output, by group; zeros where none arrives."""
    training_step(run, z0)
    return {
        name: [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in group]
        for name, group in groups(layer, z0).items()
    }


def exact(layer: nc.CoupledODE, z0: Tensor) -> Gradients:
    """In float64, as z0 is: of the hand-written loop, or of the reversible scheme's unrolled solve."""
    layer = copy.deepcopy(layer).double()
    layer.zero_grad(set_to_none=True)
    if not isinstance(layer.adjoint, nc.ReversibleAdjoint):
        return gradients(layer, by_hand(layer), z0)
    parts = groups(layer, z0)
    flat = [tensor for group in parts.values() for tensor in group]
    # A backward pass that builds a graph goes through the unrolled solve.
    found = iter(torch.autograd.grad(layer(z0).square().mean(), flat, create_graph=True))
    return {name: [next(found).detach() for _ in group] for name, group in parts.items()}


def errors(found: Gradients, reference: Gradients) -> dict[str, float]:
    """Relative errors, by group."""

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())

    return {
        name: norm([a.double() - b for a, b in zip(found[name], reference[name], strict=True)]) / norm(reference[name])
        for name in reference
    }
