"""A positive number of a kernel, which may be learnable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import positive
from neuralode_coupled._files import takes_scalars


class Positive:
    """A descriptor: attribute ``x`` of a module is a positive number, fixed or ``exp`` of ``log_x``, a parameter, (1,).

    The parameter is the logarithm, which keeps the number positive whatever an optimiser does to it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._fixed, self._log = name, f"_{name}", f"log_{name}"

    def begin(self, module: nn.Module, value: float, learnable: bool) -> None:
        """Give a module its number; raises TypeError or ValueError for one that is not positive and finite."""
        number = float(positive(self._name, value))
        setattr(module, self._fixed, number)
        # With one axis: fully_shard takes no parameter without axes.
        module.register_parameter(self._log, nn.Parameter(torch.tensor([math.log(number)])) if learnable else None)
        takes_scalars(module, (self._log,))

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        """A number; if it is learnable, a scalar tensor that gradients flow through."""
        if module is None:
            return self
        log = getattr(module, self._log)
        return getattr(module, self._fixed) if log is None else log.exp().reshape(())

    def __set__(self, module: Any, value: float) -> None:
        """Give the module another number, fixed or learnable as before; raises as `begin` does."""
        number, log = float(positive(self._name, value)), getattr(module, self._log)
        setattr(module, self._fixed, number)
        if log is not None:
            with torch.no_grad():
                log.fill_(math.log(number))

    def shown(self, module: nn.Module) -> str:
        """The number as ``extra_repr`` shows it."""
        value, learnable = self.__get__(module), ""
        if isinstance(value, Tensor):
            value, learnable = float(value.detach()), ", learnable=True"
        return f"{self._name}={value:g}{learnable}"
