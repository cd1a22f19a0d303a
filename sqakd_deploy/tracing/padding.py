"""Convolutions that pad by what the image holds, parted into the padding and a plain one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx, nn

from sqakd_deploy.lowering.geometry import conv_arguments, conv_geometry

_MODES = ("circular", "reflect", "replicate")


def part_padding(traced: fx.GraphModule) -> None:
    """Pad in front of convolutions with ``padding_mode`` circular, reflect or replicate.

    Args:
        traced: changed in place; the convolutions keep their paths and share their weights.
    """
    calls = list(traced.graph.find_nodes(op="call_module"))
    for path in dict.fromkeys(str(node.target) for node in calls):
        layer = traced.get_submodule(path)
        if type(layer) is not nn.Conv2d or layer.padding_mode not in _MODES:
            continue  # one whose weight is computed is refused by that
        for node in calls:
            if node.target == path:
                _pad(node, layer)
        traced.add_submodule(path, _without_padding(layer))


def _pad(node: fx.Node, layer: nn.Conv2d) -> None:
    (source,) = node.args
    top, left, bottom, right = conv_geometry(layer)["padding"]
    amounts, mode = (left, right, top, bottom), layer.padding_mode
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(F.pad, (source, amounts), {"mode": mode})
    padded.stack_trace = node.stack_trace
    node.args = (padded,)


def _without_padding(layer: nn.Conv2d) -> nn.Conv2d:
    settings = {**conv_arguments(layer), "padding": 0, "device": "meta"}
    plain = nn.Conv2d(**settings)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)
