"""Padding and resizing of a traced model, in the terms of :mod:`sqakd_deploy.graph`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ModelError
from sqakd_deploy.lowering.meaning import Op, setting
from sqakd_deploy.tracing.trace import describe, shape

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def pad(node: fx.Node, module: nn.Module | None) -> Op:
    """Padding by zeros, or by what the image holds."""
    amounts: Any = setting(node, None, "pad", 1, None) if module is None else module.padding
    mode = _PAD_MODES.get(_pad_mode(node, module))
    filled = mode == "constant" and setting(node, module, "value", 3, None)
    if mode is None or filled:
        raise ModelError(
            f"{describe(node)}: only padding with zeros, by reflection, by replication, or "
            "circular, can be exported"
        )
    if min(amounts) < 0:
        raise ModelError(f"{describe(node)}: padding by a negative amount; write a slice instead")
    rank = len(shape(node.all_input_nodes[0]))
    before, after = [0] * rank, [0] * rank
    for axis in range(len(amounts) // 2):  # torch counts from the last axis
        before[rank - 1 - axis], after[rank - 1 - axis] = amounts[2 * axis : 2 * axis + 2]
    return Op(ir.Pad, {"before": tuple(before), "after": tuple(after), "mode": mode})


def _pad_mode(node: fx.Node, module: nn.Module | None) -> str:
    if isinstance(module, nn.ReflectionPad2d):
        return "reflect"
    if isinstance(module, nn.ReplicationPad2d):
        return "replicate"
    return str(setting(node, None, "mode", 2, "constant"))


def bilinear(node: fx.Node, module: nn.Module | None) -> Op | None:
    """Bilinear interpolation of images that no pool or slice stands for; None for other modes."""
    mode, aligned = setting(node, module, "mode", 3, "nearest"), _aligned(node, module)
    before, after = shape(node.all_input_nodes[0]), shape(node)
    if mode != "bilinear" or len(before) != 4 or setting(node, None, "antialias", 6, False):
        return None
    given = setting(node, module, "scale_factor", 2, None)
    if aligned or setting(node, module, "recompute_scale_factor", 5, None) or given is None:
        given = (None, None)  # torch goes by the sizes then
    factors = given if isinstance(given, (tuple, list)) else (given, given)
    scale = tuple(
        _scale(node, int(old or 0), int(new or 0), factor)
        for old, new, factor in zip(before[2:], after[2:], factors, strict=True)
    )
    return Op(ir.Resize, {"scale": scale, "align_corners": aligned})


def _aligned(node: fx.Node, module: nn.Module | None) -> bool:
    return bool(setting(node, module, "align_corners", 4, None))


def _scale(node: fx.Node, before: int, after: int, given: float | None) -> np.float32:
    """The float32 factor from which a reader of the file computes that size, rounding down.

    Runtimes multiply in float32, ONNX's shape inference in float64. The next factor up, where
    either falls short of a whole number: some 1e-7 of a pixel off.
    """
    nearest = np.float32(after / before if given is None else given)
    for factor in (nearest, np.nextafter(nearest, np.float32(np.inf))):
        products = np.float32(before) * factor, before * float(factor)
        if all(np.floor(product) == after for product in products):
            return np.float32(factor)
    raise ModelError(
        f"{describe(node)}: {before} times {given} is {after} to torch, and another size in "
        "float32, as runtimes compute it; give the size instead of the factor"
    )
