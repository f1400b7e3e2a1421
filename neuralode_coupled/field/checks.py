"""Checks of a field's inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import parts


def check_activation(dynamics: nn.Module, z0: Tensor) -> None:
    """Raise TypeError or ValueError for a z0 that fits no parameter of the dynamics."""
    if not isinstance(z0, Tensor) or not z0.is_floating_point():
        what = z0.dtype if isinstance(z0, Tensor) else type(z0).__name__
        raise TypeError(f"z0 must be a floating-point tensor, got {what}: convert it with .float()")
    if z0.ndim < 1:
        raise ValueError(f"z0 must have a batch axis, got shape {tuple(z0.shape)}")
    # f may have parameters of other dtypes too (complex, whole numbers, frozen in float64): f knows which ones fit z0.
    own = [p for part in parts(dynamics) for p in part._parameters.values() if p is not None and p.is_floating_point()]
    for p in own:
        if z0.device == p.device and z0.dtype == p.dtype:
            return  # the usual case
    if not own:
        return
    evolving = next((p for p in own if p.ndim >= 2), own[0])
    if all(z0.device != p.device for p in own):
        raise ValueError(f"z0 is on {z0.device}, the weights are on {evolving.device}: move one of them with .to(...)")
    if all(z0.dtype != p.dtype for p in own) and not torch.is_autocast_enabled(z0.device.type):
        raise ValueError(
            f"z0 is {z0.dtype}, the weights are {evolving.dtype}: convert one of them, or solve under torch.autocast"
        )


def check_slope(dz: Tensor, z: Tensor) -> Tensor:
    """dz; raises TypeError or ValueError if it is not a tensor of the shape of z."""
    if not isinstance(dz, Tensor):
        raise TypeError(f"dynamics must return a tensor, got {type(dz).__name__}: wrap it in a module that returns one")
    if dz.shape != z.shape:
        raise ValueError(
            f"dynamics must keep the shape of the state: it made {tuple(dz.shape)} of {tuple(z.shape)}: change "
            "the shape before the layer or after it"
        )
    if dz.is_complex() and not z.is_complex():
        raise TypeError(
            f"dynamics must return real numbers, as the state is ({z.dtype}), got {dz.dtype}: take torch.view_as_real, "
            "or the real part"
        )
    return dz
