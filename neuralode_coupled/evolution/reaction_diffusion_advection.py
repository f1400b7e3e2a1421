"""Turing's reaction-diffusion-advection over a filter's own pixels (Eqs. 8 and 9)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import Times, choice
from neuralode_coupled._files import takes_scalars
from neuralode_coupled._times import Scalar, time_vector
from neuralode_coupled._types import Weight, WeightPath
from neuralode_coupled.evolution.base import EvolutionOperator, NonFiniteWeights, bound, check_real
from neuralode_coupled.evolution.fitting import Start, fit_coefficients, read_path
from neuralode_coupled.evolution.spectral import Spectrum
from neuralode_coupled.evolution.starts import spectral_terms

Form = Literal["ode", "propagator"]
Scope = Literal["layer", "filter", "kernel"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "identity": None,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class ReactionDiffusionAdvection(EvolutionOperator):
    """``dw/dt = sigma(tau Lap w + upsilon . grad w + rho w)`` on a periodic grid of pixels (Eq. 8), or its propagator
    ``w(t + dt) = sigma(F^-1[exp((-tau |k|^2 + i k.upsilon + rho) dt) F[w]])`` (Eq. 9).

    With ``sigma`` the identity the two are the same flow, one integrated and one exact; with another ``sigma`` they
    are different models. Space is measured in pixels: ``tau`` in pixels^2 per unit of time, ``upsilon`` in pixels per
    unit of time (positive: the pattern moves towards lower indices), ``rho`` in 1 / time. All coefficients start at
    zero, so with the identity, training starts from the Neural ODE. Along an axis with an even number of pixels the
    mode that alternates from pixel to pixel does not move: no real flow can move it.

    The operator acts on the axes after a weight's two channel axes: a convolution ``(out, in, *pixels)`` of any
    dimension holds ``out * in`` fields; a linear layer ``(out, in)`` is one two-dimensional field, for which the
    three scopes coincide.

    Args:
        form: ``"propagator"`` (Eq. 9, exact in time) or ``"ode"`` (Eq. 8, integrated by the solver).
        activation: sigma, by name or as an elementwise function (an ``nn.Module`` with parameters is trained too).
        scope: the part that has its own coefficients: the whole ``"layer"``, every output ``"filter"``, or every single
            ``"kernel"``.
        diffusion: whether to use the term tau Lap w.
        advection: whether to use the term upsilon . grad w.
        reaction: whether to use the term rho w.
        nonnegative_diffusion: use ``max(tau, 0)``; negative diffusion sharpens, and grows without bound in time.

    Attributes:
        diffusion: tau, of shape ``(1,)``, ``(out,)`` or ``(out, in)`` by ``scope``; None if the term is absent.
        advection: upsilon, ``(d,)``, ``(out, d)`` or ``(out, in, d)`` on d spatial axes; None if the term is absent.
        reaction: rho, of the shape of ``diffusion``; None if the term is absent. State dicts of older versions, in
            which ``diffusion`` and ``reaction`` had no axis with ``scope="layer"``, still load.

    Raises:
        TypeError: for an activation that is neither a name nor a function.
        ValueError: for an unknown form, activation or scope, an activation that is not elementwise, if no term is used,
            or when bound to a parameter with fewer than two axes or of another shape than before.
        NonFiniteWeights: a ValueError, on the CPU, if a mode of a filter grows beyond the range of its dtype.
    """

    diffusion: nn.Parameter | None
    advection: nn.Parameter | None
    reaction: nn.Parameter | None

    def __init__(
        self,
        form: Form = "propagator",
        activation: str | Callable[[Tensor], Tensor] = "identity",
        scope: Scope = "filter",
        *,
        diffusion: bool = True,
        advection: bool = True,
        reaction: bool = True,
        nonnegative_diffusion: bool = False,
    ) -> None:
        super().__init__()
        choice("form", form, get_args(Form))
        choice("scope", scope, get_args(Scope))
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)} or a function")
        if not (diffusion or advection or reaction):
            raise ValueError("no term is left: enable diffusion, advection or reaction, or use Static()")
        self.form = form
        self.scope = scope
        self.sigma = ACTIVATIONS[activation] if isinstance(activation, str) else _elementwise(activation)
        self.terms = {"diffusion": diffusion, "advection": advection, "reaction": reaction}
        self.nonnegative_diffusion = nonnegative_diffusion
        self.weight_shape: tuple[int, ...] | None = None
        self.spectrum: Spectrum | None = None
        for term in self.terms:
            self.register_parameter(term, None)
        takes_scalars(self, ("diffusion", "reaction"))

    def extra_repr(self) -> str:
        terms = ", ".join(term for term, present in self.terms.items() if present)
        activation = "" if isinstance(self.sigma, nn.Module) else f", activation={_activation_name(self.sigma)}"
        nonnegative = ", nonnegative_diffusion=True" if self.nonnegative_diffusion else ""
        return f"form={self.form!r}{activation}, scope={self.scope!r}, {terms}{nonnegative}"

    def bind(self, weight: Weight) -> Self:
        """Create the coefficients for parameters of this shape, all zero; see the base class."""
        check_real(weight, "reaction-diffusion-advection")
        shape = tuple(weight.shape)
        if len(shape) < 2:
            raise ValueError(
                f"reaction-diffusion-advection needs a weight of at least 2 axes, a field of pixels, got {shape}: "
                "leave it out of `evolve`, or give it another operator"
            )
        if self.weight_shape is not None:
            # One operator may serve several parameters: they must have the same groups of coefficients and pixels.
            if _layout(shape, self.scope) != _layout(self.weight_shape, self.scope):
                raise ValueError(
                    f"this operator has coefficients for weights of shape {self.weight_shape} (scope {self.scope!r}), "
                    f"and cannot be shared with one of shape {shape}: use scope='layer' or an operator of its own"
                )
            return self
        groups, pixels = _layout(shape, self.scope)
        self.weight_shape = shape
        self.spectrum = Spectrum(pixels, weight.dtype, weight.device)
        # One number for the layer has an axis too: fully_shard takes no parameter without axes.
        shapes = {"diffusion": groups or (1,), "advection": (*groups, len(pixels)), "reaction": groups or (1,)}
        for term, present in self.terms.items():
            if present:
                zeros = torch.zeros(shapes[term], dtype=weight.dtype, device=weight.device)
                self.register_parameter(term, nn.Parameter(zeros))
        return self

    def fit(self, times: Times, weights: Tensor | Sequence[Tensor]) -> float:
        """Set the coefficients whose path from the first weight is nearest to given weights, in least squares.

        The search starts from the growth and the turn of each Fourier mode between the times, from differences, and
        from zero. Advection by half a pattern or more between two times is ambiguous. If sigma is not the identity, the
        propagator takes one step between two times. Coefficients that the weights do not determine are zero.

        Args:
            times: strictly monotone times, at least two.
            weights: the weights at these times, (len(times), *weight), or a sequence of weights.

        Returns:
            The relative error of the path, ``|w - given| / |given|`` over all times.

        Raises:
            TypeError: if the times are not times, or the weights are not real weights.
            ValueError: for times out of order or fewer than two, and for weights that are not finite, not one per time,
                or of another shape than before.
        """
        t, path = read_path(times, weights, self.weight_shape, 2, f"{self}, a flow,")
        self.bind(weights[0])
        starts = self.starts(t, path)
        if self.form == "ode" and self.sigma is None:  # the same flow, without steps
            twin = copy.deepcopy(self)
            twin.form = "propagator"
            error = fit_coefficients(twin, t, path, starts)
            self.load_state_dict(twin.state_dict())
            return error
        return fit_coefficients(self, t, path, starts)

    def starts(self, t: Tensor, path: WeightPath) -> list[Start]:
        """Starts of a search for the coefficients, from times (T,) and weights, float64 on the CPU. Needs `bind`."""
        before, after = path[:-1], path[1:]
        if self.sigma in _INVERSES:
            inverse, dt = _INVERSES[self.sigma], t.diff().reshape(-1, *[1] * (path.ndim - 1))
            # After sigma is inverted, a linear flow remains.
            after = inverse(after) if self.form == "propagator" else before + dt * inverse((after - before) / dt)
        spectrum = Spectrum(bound(self.spectrum, self).pixels, torch.float64)
        before, after = [torch.stack([self._group(w) for w in states]) for states in (before, after)]
        present = [term for term, there in self.terms.items() if there]
        starts: list[Start] = []
        for start in spectral_terms(spectrum, before, after, t.diff(), present):
            if self.nonnegative_diffusion and "diffusion" in start:
                start["diffusion"] = start["diffusion"].clamp(min=0)
            starts.append({term: value.reshape(getattr(self, term).shape) for term, value in start.items()})
        return starts

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt of Eq. 8. Raises ValueError for the propagator form with a nonlinear sigma, which is not a flow."""
        if self.form == "propagator" and self.sigma is not None:
            raise ValueError(
                "the propagator form with a nonlinear activation (Eq. 9) is a map, not a vector field: "
                "use form='ode' with a general-purpose solver, or nc.solve"
            )
        w = self._ungroup(bound(self.spectrum, self).generate(self._group(w), *self._coefficients()), w)
        return w if self.sigma is None else self.sigma(w)

    @property
    def propagate(self) -> Callable[[Tensor, Scalar], Tensor] | None:
        """``propagate(w, dt)``: Eq. 9 over a time ``dt``, differentiable in a ``dt`` that is a tensor. None in the ODE
        form, which a solver integrates."""
        return None if self.form == "ode" else self._propagate

    @property
    def propagator(self) -> Callable[[Scalar, Tensor], Callable[[Tensor], Tensor]] | None:
        """``propagator(dt, like)``: ``propagate`` for one ``dt``, its matrix built once. None in the ODE form."""
        return None if self.form == "ode" else self._propagator

    @property
    def trajectory(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """``trajectory(w0, times)``: w at all times in one product. None unless the form is a propagator with sigma =
        identity: only that reaches every time at once."""
        return None if self.form == "ode" or self.sigma is not None else self._trajectory

    def _propagate(self, w: Weight, dt: Scalar) -> Weight:
        return self._propagator(dt, w)(w)

    def _propagator(self, dt: Scalar, like: Weight) -> Callable[[Weight], Weight]:
        flow = self._flow(time_vector([dt], like))

        def advance(w: Weight) -> Weight:
            w = flow(w)[0]
            return w if self.sigma is None else self.sigma(w)

        return advance

    def _trajectory(self, w0: Weight, times: Tensor) -> WeightPath:
        return self._flow(times)(w0)

    def _flow(self, times: Tensor) -> Callable[[Weight], WeightPath]:
        """The linear flow from any w to all the times."""
        spectrum = bound(self.spectrum, self)
        tau, upsilon, rho = self._coefficients()
        # On other devices the check would make the host wait; inside torch.compile it would break the graph.
        if times.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_overflow(times.detach(), tau, rho)
        advance = spectrum.propagator(times, tau, upsilon, rho)
        return lambda w: self._ungroup(advance(self._group(w)), w)

    @torch.no_grad()
    def _check_overflow(self, times: Tensor, tau: Tensor | None, rho: Tensor | None) -> None:
        found = bound(self.spectrum, self).overflow(times, tau, rho)
        if found is None or self.weight_shape is None:
            return
        group, mode, exponent = found
        where = _group_name(group, _layout(self.weight_shape, self.scope)[0])
        raise NonFiniteWeights(
            f"reaction-diffusion-advection overflows {times.dtype}: Fourier mode {mode} of {where} grows by "
            f"exp({exponent:.4g}) within a time of {float(times.abs().max()):.4g}. Use nonnegative_diffusion=True, a "
            "lower learning rate, or weight decay on the coefficients"
        )

    def _coefficients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """tau (groups,), upsilon (groups, axes), rho (groups,); None if the term is absent."""
        tau, upsilon, rho = self.diffusion, self.advection, self.reaction
        if tau is not None and self.nonnegative_diffusion:
            tau = tau.clamp(min=0)
        return (
            None if tau is None else tau.reshape(-1),
            None if upsilon is None else upsilon.reshape(-1, upsilon.shape[-1]),
            None if rho is None else rho.reshape(-1),
        )

    def _group(self, w: Tensor) -> Tensor:
        """(out, in, *pixels) -> (groups, fields per group, *pixels)."""
        groups, pixels = _layout(tuple(w.shape), self.scope)
        return w.reshape(math.prod(groups), -1, *pixels)

    @staticmethod
    def _ungroup(fields: Tensor, w: Tensor) -> Tensor:
        """(..., groups, fields per group, *pixels) -> (..., *shape of w)."""
        pixels = fields.ndim - (w.ndim if w.ndim > 2 else 4)
        return fields.reshape(*fields.shape[:pixels], *w.shape)


def _elementwise(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The activation; raises an error if it is not elementwise."""
    if not callable(activation) or isinstance(activation, type):
        raise TypeError(
            f"activation must be one of {', '.join(ACTIVATIONS)} or a function (of a class, one instance), "
            f"got {activation!r}"
        )
    parameter = next(activation.parameters(), None) if isinstance(activation, nn.Module) else None
    factory = {} if parameter is None else {"dtype": parameter.dtype, "device": parameter.device}
    probe = torch.linspace(-1.5, 1.0, 6, **factory).reshape(2, 3)
    try:
        with torch.no_grad():
            whole, alone = activation(probe), torch.stack([activation(x) for x in probe.reshape(6, 1)])
        # A logarithm is elementwise, though it is NaN for half of the probe.
        same = whole.shape == probe.shape and torch.allclose(whole.flatten(), alone.flatten(), equal_nan=True)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"activation {activation!r} is not elementwise: {error}") from error
    if not same:
        raise ValueError(
            f"activation {activation!r} is not elementwise: each entry of its result must depend on the same entry of "
            "its argument alone"
        )
    return activation


def _activation_name(sigma: Callable[[Tensor], Tensor] | None) -> str:
    """As the user gave it: a name in quotes, or the function's own."""
    known = next((repr(name) for name, function in ACTIVATIONS.items() if function is sigma), None)
    return known or getattr(sigma, "__name__", repr(sigma))


_INVERSES: dict[Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor]] = {
    torch.tanh: lambda x: x.clamp(-1 + 1e-9, 1 - 1e-9).atanh(),
    torch.sigmoid: lambda x: x.logit(1e-9),
}
"""The inverses of activations that have one."""


def _group_name(group: int, groups: tuple[int, ...]) -> str:
    """A description of what the coefficients of one group belong to."""
    if len(groups) == 2:
        return f"kernel {divmod(group, groups[1])}"
    return f"filter {group}" if groups else "every field"


def _layout(shape: tuple[int, ...], scope: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the coefficients and the grid of pixels of one field."""
    if len(shape) == 2:  # a linear layer is one two-dimensional field
        return (), shape
    return {"layer": (), "filter": shape[:1], "kernel": shape[:2]}[scope], shape[2:]
