"""Multi-head attention as the layers that it is made of, so that each can be quantised.

torch's :class:`~torch.nn.MultiheadAttention` is one operator with its weights inside; tracing stops
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqakd_deploy.errors import ModelError


class OpenAttention(nn.Module):
    """``softmax(q·kᵀ/√d)·v`` between four linear layers (Vaswani et al., 2017, eq. 1).

    Args:
        closed: batch-first attention over tokens of one width; its weights are copied.

    Attributes:
        query: linear layer, as ``key``, ``value`` and ``out_proj``.
        heads: number of heads.
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = closed.num_heads
        width = closed.embed_dim
        weights = closed.in_proj_weight.detach().chunk(3)
        biases = (None,) * 3 if closed.in_proj_bias is None else closed.in_proj_bias.chunk(3)
        self.query, self.key, self.value = (
            _linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.dropout = nn.Dropout(closed.dropout)
        self.out_proj = _linear(closed.out_proj.weight, closed.out_proj.bias)
        self.factor = (width // self.heads) ** -0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend, as the closed layer does; masks and the weights of attention there are none.

        Args:
            query: ``(N, L, E)``.
            key: ``(N, S, E)``.
            value: ``(N, S, E)``.
            key_padding_mask: must be None.
            need_weights: not looked at.
            attn_mask: must be None.
            average_attn_weights: not looked at.
            is_causal: must be False.

        Returns:
            ``(N, L, E)`` and None.

        Raises:
            ModelError: if there is a mask.
        """
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ModelError("attention with a mask has no form here")
        q, k, v = (
            self._by_head(layer(tokens))
            for layer, tokens in ((self.query, query), (self.key, key), (self.value, value))
        )
        # The factor comes after the product, so that codes are multiplied, not scaled codes.
        scores = torch.matmul(q, k.transpose(2, 3)) * self.factor
        mixed = torch.matmul(self.dropout(F.softmax(scores, dim=-1)), v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None

    def _by_head(self, tokens: Tensor) -> Tensor:
        """``(N, L, E)`` as ``(N, heads, L, E/heads)``."""
        batch, length, width = tokens.shape
        return tokens.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)


class OpenEncoderLayer(nn.Module):
    """A block of attention and two linear layers, as torch's encoder layer computes it.

    Args:
        closed: its modules are taken.
    """

    norm1: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    linear1: nn.Module
    linear2: nn.Module
    self_attn: nn.Module

    def __init__(self, closed: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        for name, module in closed.named_children():
            self.add_module(name, module)
        self.norm_first = closed.norm_first
        self.function: Callable[[Tensor], Tensor] = closed.activation

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``(N, L, E)`` to ``(N, L, E)``, normed before each part or after it.

        Raises:
            ModelError: if there is a mask.
        """
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
        if self.norm_first:
            src = src + self._attend(self.norm1(src), is_causal=is_causal, **masks)
            return src + self._feed(self.norm2(src))
        src = self.norm1(src + self._attend(src, is_causal=is_causal, **masks))
        result: Tensor = self.norm2(src + self._feed(src))
        return result

    def _attend(self, x: Tensor, **masks: Any) -> Tensor:
        result: Tensor = self.dropout1(self.self_attn(x, x, x, need_weights=False, **masks)[0])
        return result

    def _feed(self, x: Tensor) -> Tensor:
        result: Tensor = self.dropout2(self.linear2(self.dropout(self.function(self.linear1(x)))))
        return result


class OpenEncoder(nn.Module):
    """Encoder layers in a row, and a norm if there is one.

    Args:
        closed: its modules are taken.
    """

    def __init__(self, closed: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers, self.norm = closed.layers, closed.norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """``(N, L, E)`` to ``(N, L, E)``.

        Raises:
            ModelError: if there is a mask.
        """
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, bool(is_causal))
        return src if self.norm is None else self.norm(src)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def open_attention(model: nn.Module) -> None:
    """Replace :class:`~torch.nn.MultiheadAttention` and torch's encoder around it by their parts.

    Args:
        model: changed in place.

    Raises:
        ModelError: if one has settings that the parts do not know, naming it.
    """
    opened: dict[nn.Module, nn.Module] = {}  # a layer of two names stays one
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.MultiheadAttention):
            _check(path, module)
        opener = _OPENERS.get(type(module))
        if opener is not None and path:
            if module not in opened:
                opened[module] = opener(module).train(module.training)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, opened[module])


_OPENERS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.MultiheadAttention: OpenAttention,
    nn.TransformerEncoderLayer: OpenEncoderLayer,
    nn.TransformerEncoder: OpenEncoder,
}


def _check(path: str, module: nn.MultiheadAttention) -> None:
    problems = {
        "batch_first=False": not module.batch_first,
        "kdim or vdim": module.in_proj_weight is None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
    }
    found = ", ".join(name for name, there in problems.items() if there)
    if found:
        raise ModelError(
            f"layer '{path}' (MultiheadAttention): {found} has no form here; "
            "wanted batch_first=True and otherwise torch's defaults"
        )
