"""How the constants of an ONNX layer lie, and as what the integer graph has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto


def unique(*arrays: NDArray[Any]) -> NDArray[Any]:
    """All different numbers, sorted."""
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    return np.unique(np.concatenate(flat)) if flat else np.zeros(0)


def channelwise(scale: NDArray[Any], codes: NDArray[Any]) -> NDArray[Any]:
    """A scale for each channel of codes ``(O, …)``, where there may be one for all."""
    return np.broadcast_to(scale.reshape(-1), len(codes)) if scale.size == 1 else scale


def scales_channels(node: NodeProto, dequantizer: NodeProto, rank: int) -> bool:
    """Whether scales lie on the axis of a layer's output channels.

    Args:
        node: the layer.
        dequantizer: of its weight, with several scales.
        rank: of the weight.
    """
    axis = next((a.i for a in dequantizer.attribute if a.name == "axis"), 1)
    turned = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
    last = node.op_type in ("MatMul", "Gemm") and not turned
    channels = rank - 1 if last else int(node.op_type == "ConvTranspose")
    return bool(axis % rank == channels)


def channels_first(node: NodeProto, weight: NDArray[Any]) -> NDArray[Any]:
    """A layer's weight with output channels on the first axis, as in the integer graph."""
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "ConvTranspose":
        groups = attributes.get("group", 1)
        split = weight.reshape(groups, -1, *weight.shape[1:])
        return np.swapaxes(split, 1, 2).reshape(-1, split.shape[1], *weight.shape[2:])
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB")):
        return np.swapaxes(weight, -1, -2)
    return weight
