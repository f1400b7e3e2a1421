"""Times rounded to a dtype, computed as numbers: operations on scalar tensors take as long as a small f."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from ctypes import c_float

import torch


def rounding(dtype: torch.dtype) -> Callable[[float], float]:
    """The function that rounds a number to a dtype."""
    if dtype == torch.float64:
        return lambda x: x
    if dtype == torch.float32:
        return lambda x: c_float(x).value
    return lambda x: torch.tensor(x, dtype=dtype, device="cpu").item()


def beside(x: float, towards: float, dtype: torch.dtype) -> float:
    """The next number of a dtype after one of its numbers, towards inf or -inf."""
    if dtype == torch.float64:
        return math.nextafter(x, towards)
    if dtype != torch.float32 or x == 0.0:
        pair = [torch.tensor(number, dtype=dtype, device="cpu") for number in (x, towards)]
        return torch.nextafter(*pair).item()
    # Numbers of one sign are in the order of their bits, read as a whole number.
    (bits,) = struct.unpack("=i", struct.pack("=f", x))
    away = (x > 0.0) == (towards > 0.0)
    return struct.unpack("=f", struct.pack("=i", bits + (1 if away else -1)))[0]
