"""Numbers of a dtype, computed as numbers, are those that tensors have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuralode_coupled.runge_kutta.rounding import beside, rounding

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EDGES = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38, 1e300, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@given(x=st.one_of(st.floats(allow_nan=False), st.sampled_from(EDGES)))
def test_rounding_is_that_of_tensors(dtype, x):
    assert rounding(dtype)(x) == torch.tensor(x, dtype=torch.float64).to(dtype).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("towards", [math.inf, -math.inf])
@given(x=st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(EDGES)))
def test_the_next_number_is_that_of_tensors(dtype, towards, x):
    number = torch.tensor(x, dtype=torch.float64).to(dtype)
    if number.isfinite():
        expected = torch.nextafter(number, torch.tensor(towards, dtype=dtype)).item()
        assert beside(number.item(), towards, dtype) == expected


def test_what_is_no_number_stays_none():
    for dtype in DTYPES:
        assert math.isnan(rounding(dtype)(math.nan))
