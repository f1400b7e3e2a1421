"""``torch.nn.TransformerEncoderLayer`` with coupled layers in place of its two residual branches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from neuralode_coupled._types import Activation
from neuralode_coupled.coupled.baking import BakedBlocks, BakedReversibleSteps, with_hooks_of
from neuralode_coupled.coupled.layer import CoupledODE

Mask = Float[Tensor, "..."] | Bool[Tensor, "..."] | None


class CoupledEncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each a coupled layer, in a row; made by `nc.couple`.

    With ``norm_first`` the normalisations belong to the branches, ``z + f(norm(z))``; otherwise they follow the sums.
    The layer replaces the original in an ``nn.TransformerEncoder``.

    Args:
        original: the layer whose modules are used.
        couple: a function that makes a coupled layer from a branch.
    """

    def __init__(self, original: nn.TransformerEncoderLayer, couple: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        first = original.norm_first
        self.attention = couple(SelfAttention(original.norm1 if first else nn.Identity(), original))
        self.norm1 = nn.Identity() if first else original.norm1
        self.feed_forward = couple(FeedForward(original.norm2 if first else nn.Identity(), original))
        self.norm2 = nn.Identity() if first else original.norm2
        self.training = original.training

    @property
    def self_attn(self) -> nn.MultiheadAttention:
        """The attention at its initial weights; ``nn.TransformerEncoder`` asks it whether the batch comes first."""
        return next(part for part in self.attention.modules() if isinstance(part, SelfAttention)).self_attn

    def forward(
        self,
        src: Activation,
        src_mask: Mask = None,
        src_key_padding_mask: Mask = None,
        is_causal: bool = False,
    ) -> Activation:
        """As ``nn.TransformerEncoderLayer.forward``. ``is_causal`` is a hint; with ``src_mask`` it is not needed.

        Raises ValueError for ``is_causal`` without a mask.
        """
        if is_causal and src_mask is None:
            raise ValueError(
                "is_causal=True needs the mask as well: pass src_mask=nn.Transformer.generate_square_subsequent_mask(n)"
            )
        z = self.norm1(self.attention(src, _additive(src_mask, src), _additive(src_key_padding_mask, src)))
        return self.norm2(self.feed_forward(z))


class SelfAttention(nn.Module):
    """The attention branch: ``dropout(attention(norm(z)))``.

    Args:
        norm: what comes first.
        layer: the encoder layer whose modules are used.
    """

    def __init__(self, norm: nn.Module, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm = norm
        self.self_attn = layer.self_attn
        self.dropout = layer.dropout1
        self.training = layer.training

    def forward(self, z: Activation, mask: Mask = None, padding: Mask = None) -> Activation:
        """f(z), of the shape of z, under masks that are added: of pairs of positions, and of positions."""
        z = self.norm(z)
        found, _ = self.self_attn(z, z, z, attn_mask=mask, key_padding_mask=padding, need_weights=False)
        return self.dropout(found)


class FeedForward(nn.Module):
    """The feed-forward branch: ``dropout(linear(dropout(activation(linear(norm(z))))))``.

    Args:
        norm: what comes first.
        layer: the encoder layer whose modules are used.
    """

    def __init__(self, norm: nn.Module, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm = norm
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.activation = layer.activation
        self.dropout, self.dropout2 = layer.dropout, layer.dropout2
        self.training = layer.training

    def forward(self, z: Activation) -> Activation:
        """f(z), of the shape of z."""
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(self.norm(z))))))


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers to add: minus infinity where a boolean mask is True."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)


class FoldedEncoder(CoupledODE):
    """Several encoder layers as one coupled layer, in an ``nn.TransformerEncoder``; made by `nc.fold`.

    Args, attributes and errors are those of `CoupledODE`.
    """

    @property
    def self_attn(self) -> nn.MultiheadAttention:
        """The attention at its initial weights; ``nn.TransformerEncoder`` asks it whether the batch comes first."""
        return self.get_submodule("field.dynamics.module.self_attn")  # pyright: ignore[reportReturnType]

    def bake(self) -> BakedEncoder | BakedReversibleEncoder:
        """See `CoupledODE.bake`."""
        baked = super().bake()
        made = (BakedEncoder if isinstance(baked, BakedBlocks) else BakedReversibleEncoder)(*baked)
        made.training = baked.training
        return with_hooks_of(self, made)


class BakedEncoder(BakedBlocks):
    """The result of baking a `FoldedEncoder`: encoder layers in a row."""

    @property
    def self_attn(self) -> nn.MultiheadAttention:
        """The attention of the first layer, see `FoldedEncoder`."""
        return self.get_submodule("0.branches.0.module.self_attn")  # pyright: ignore[reportReturnType]


class BakedReversibleEncoder(BakedReversibleSteps):
    """The same of one that `ReversibleAdjoint` solves."""

    @property
    def self_attn(self) -> nn.MultiheadAttention:
        """The attention of the first layer, see `FoldedEncoder`."""
        return self.get_submodule("0.there.branches.0.module.self_attn")  # pyright: ignore[reportReturnType]
