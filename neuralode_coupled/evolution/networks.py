"""Neural networks as evolution operators: q of ``dw/dt = q(w; p)`` is a small network (Eq. 5c)."""

from __future__ import annotations

import math
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import choice, is_whole, whole
from neuralode_coupled._types import Weight
from neuralode_coupled.evolution.base import EvolutionOperator, bound, check_layout, check_real

Padding = Literal["circular", "zeros"]
NetworkScope = Literal["kernel", "filter"]

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvEvolution(EvolutionOperator):
    """q is a small convolutional block, ``conv, tanh, conv``, that treats filters as images.

    Every filter of a convolution ``(out, in, *pixels)`` is an image with ``in`` channels; the block is the same for
    all of them. A linear layer ``(out, in)`` is one image with one channel. The last convolution starts at zero, so
    that training starts from the Neural ODE.

    Args:
        hidden: the channels between the two convolutions.
        kernel_size: the size of both convolutions along every axis, an odd number.
        padding: the values beyond a filter's edge: the filter again (``"circular"``, the boundary of
            reaction-diffusion-advection) or ``"zeros"``.

    Raises:
        ValueError: for an even or nonpositive size, hidden channels below 1 or an unknown padding, or when bound to a
            parameter that does not have two to five axes, is smaller than its padding, or has other channels than
            before.
    """

    def __init__(self, hidden: int, kernel_size: int = 3, padding: Padding = "circular") -> None:
        super().__init__()
        whole("hidden", hidden)
        if not is_whole(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd and positive, a whole number, to keep the filters' size, got {kernel_size!r}"
            )
        choice("padding", padding, get_args(Padding))
        self.hidden, self.kernel_size, self.padding = hidden, kernel_size, padding
        self.network: nn.Sequential | None = None
        self.layout: tuple[int, ...] | None = None

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, kernel_size={self.kernel_size}, padding={self.padding!r}"

    def bind(self, weight: Weight) -> Self:
        """Create the block for filters of this many channels; see the base class."""
        check_real(weight, "convolutional evolution")
        shape = tuple(weight.shape)
        if not 2 <= len(shape) <= 5:
            raise ValueError(
                f"convolutional evolution needs a weight of 2 to 5 axes, filters of 1 to 3 dimensions, got {shape}: "
                "leave it out of `evolve`, or give it another operator"
            )
        _, channels, *pixels = _as_images(shape)
        edge = self.kernel_size // 2
        if self.padding == "circular" and edge > min(pixels):
            raise ValueError(
                f"kernel_size={self.kernel_size} reaches around filters of {tuple(pixels)} pixels more than once: "
                f"make it at most {2 * min(pixels) + 1}, or use padding='zeros'"
            )
        layout = (channels, len(pixels))
        if self.network is not None and self.layout is not None:
            check_layout(self, layout, self.layout, shape)
            return self
        self.layout = layout
        options = {"padding": edge, "padding_mode": self.padding, "dtype": weight.dtype, "device": weight.device}
        convolution = _CONVOLUTIONS[len(pixels)]
        first = convolution(channels, self.hidden, self.kernel_size, **options)
        last = convolution(self.hidden, channels, self.kernel_size, **options)
        self.network = nn.Sequential(first, nn.Tanh(), _zeroed(last))
        return self

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt, of the shape of ``w``."""
        return bound(self.network, self)(w.reshape(_as_images(tuple(w.shape)))).reshape(w.shape)


class MLPEvolution(EvolutionOperator):
    """q is a multilayer perceptron, ``linear, tanh, linear``, on the entries of each kernel, shared by all of them.

    The last layer starts at zero, so that training starts from the Neural ODE.

    Args:
        hidden: the units between the two layers.
        time: whether the network also takes t: q(t, w).
        scope: the entries that it takes at once: the pixels of one ``"kernel"`` of a weight ``(out, in, *pixels)``, or
            all entries of one ``"filter"``. The kernels and filters of a linear layer ``(out, in)`` are its rows.

    Raises:
        ValueError: for hidden units below 1 or an unknown scope, or when bound to a parameter with fewer than two axes
            or with kernels of another size than before.
    """

    def __init__(self, hidden: int, time: bool = False, scope: NetworkScope = "kernel") -> None:
        super().__init__()
        whole("hidden", hidden)
        choice("scope", scope, get_args(NetworkScope))
        self.hidden, self.time, self.scope = hidden, time, scope
        self.network: nn.Sequential | None = None
        self.layout: tuple[int, ...] | None = None

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, time={self.time}, scope={self.scope!r}"

    def bind(self, weight: Weight) -> Self:
        """Create the perceptron for kernels of this size; see the base class."""
        shape = tuple(weight.shape)
        check_real(weight, "the perceptron")
        _check_axes("the perceptron", shape)
        entries = math.prod(shape[2:] if self.scope == "kernel" and len(shape) > 2 else shape[1:])
        if self.network is not None and self.layout is not None:
            check_layout(self, (entries,), self.layout, shape)
            return self
        self.layout = (entries,)
        factory = {"dtype": weight.dtype, "device": weight.device}
        first = nn.Linear(entries + int(self.time), self.hidden, **factory)
        self.network = nn.Sequential(first, nn.Tanh(), _zeroed(nn.Linear(self.hidden, entries, **factory)))
        return self

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt, of the shape of ``w``."""
        seen = w.reshape(-1, *bound(self.layout, self))
        if self.time:
            seen = torch.cat([seen, t.to(w).expand(len(seen), 1)], dim=1)
        return bound(self.network, self)(seen).reshape(w.shape)


class HyperNetwork(EvolutionOperator):
    """``q(t, w) = g(e) - w``: a network g turns an embedding e into weights, and w moves towards them.

    One Euler step of size 1 reaches g(e) from any w0: ``w0 + 1 * (g(e) - w0) = g(e)``. That is the static hypernetwork
    of Ha, Dai and Le (arXiv:1609.09106), and in this layer theta is always g(e)::

        nc.CoupledODE(f, nc.HyperNetwork(4, 16), nc.SampleAndHold(1), steps=N, weight_steps=1, weight_method="euler")

    With more steps w approaches ``g(e)`` as ``w(t) = g(e) + exp(-t) (w0 - g(e))``, and depends on w0.

    g has the two linear layers of their paper: for every input channel i of a weight ``(out, in, *pixels)`` its own
    ``a_i = W_i e + B_i`` with ``hidden`` entries, then one layer for all channels, ``g(e)[:, i] = W_out a_i + B_out``.
    At the start the generated weights are about as large as w0 (in the root mean square). An operator that several
    parameters of one shape share has one g and, as in that paper, one embedding per parameter.

    Args:
        embedding: the number of entries of e.
        hidden: the number of entries of every a_i.

    Attributes:
        embedding: e, of shape (embedding,).

    Raises:
        ValueError: for sizes below 1, or when bound to a parameter with fewer than two axes or of another shape than
            before.
    """

    embedding: nn.Parameter | None

    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        whole("hidden", hidden)
        whole("embedding", embedding)
        self.size, self.hidden = embedding, hidden
        self.project: nn.Linear | None = None
        self.generate: nn.Linear | None = None
        self.weight_shape: tuple[int, ...] | None = None
        self.register_parameter("embedding", None)

    def extra_repr(self) -> str:
        return f"embedding={self.size}, hidden={self.hidden}"

    def bind(self, weight: Weight) -> Self:
        """Create g and an embedding. For a further parameter, return an operator with the same g and an embedding of
        its own."""
        shape = tuple(weight.shape)
        check_real(weight, "a hypernetwork")
        _check_axes("a hypernetwork", shape)
        if self.weight_shape is not None:
            check_layout(self, shape, self.weight_shape, shape)
            sibling = type(self)(self.size, self.hidden)
            sibling.project, sibling.generate, sibling.weight_shape = self.project, self.generate, shape
            sibling.embedding = _random_embedding(self.size, weight)
            return sibling
        self.weight_shape = shape
        factory = {"dtype": weight.dtype, "device": weight.device}
        self.embedding = _random_embedding(self.size, weight)
        self.project = _scaled(nn.Linear(self.size, self.hidden * shape[1], **factory))
        self.generate = _scaled(nn.Linear(self.hidden, weight.numel() // shape[1], **factory))
        with torch.no_grad():
            self.generate.weight.mul_(weight.square().mean().sqrt())
        return self

    def generated(self) -> Weight:
        """g(e), of the shape of the evolving parameter."""
        project, generate = bound(self.project, self), bound(self.generate, self)
        out, channels, *pixels = bound(self.weight_shape, self)
        by_channel = generate(project(self.embedding).reshape(channels, self.hidden))
        return by_channel.reshape(channels, out, *pixels).transpose(0, 1)

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt = g(e) - w, of the shape of ``w``."""
        return self.generated() - w


def _as_images(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(images, channels, *pixels) of a weight's filters."""
    return (1, 1, *shape) if len(shape) == 2 else shape


def _check_axes(who: str, shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ValueError(
            f"{who} needs a weight of at least 2 axes, (out, in, *pixels), got {shape}: "
            "leave it out of `evolve`, or give it another operator"
        )


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _scaled(layer: nn.Linear) -> nn.Linear:
    """The layer, scaled so that entries of unit variance keep unit variance."""
    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
    nn.init.zeros_(layer.bias)
    return layer


def _random_embedding(size: int, weight: Weight) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, dtype=weight.dtype, device=weight.device))
