"""Runs an integer graph in true integer arithmetic: the third opinion beside two ONNX Runtimes.

Written against the definitions in :mod:`sqakd_deploy.graph` alone, with numpy and nothing of the
exporters. Codes and accumulators are int64, checked to fit the int32 of real kernels; scales are
float32 numbers multiplied in float64; the one rounding is :func:`numpy.rint`, half to even, in
Quantize. Runtimes multiply scales in float32 and may land on the neighbouring code where a sum lies
within that noise of a rounding boundary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sqakd_deploy import graph as g

Array = NDArray[Any]


@dataclass(frozen=True)
class Scaled:
    """Real numbers ``scale · integers`` with the zero-point already taken off.

    Attributes:
        integers: int64.
        scale: float64, broadcastable to the integers.
    """

    integers: Array
    scale: Array

    @property
    def real(self) -> Array:
        """In float64."""
        return self.integers * self.scale


Held = Array | Scaled  # codes of a grid, floats, or an accumulator


class Reader:
    """What a node reads, as the form it computes in."""

    def __init__(self, values: Mapping[str, g.Value], held: Mapping[str, Held]) -> None:
        self.values = values
        self.held = held

    def scaled(self, name: str) -> Scaled | None:
        """Integers with a scale, if the value is made of them."""
        held, grid = self.held[name], self.values[name].grid
        if isinstance(held, Scaled):
            return held
        return None if grid is None else Scaled(held - grid.zero_point, np.float64(grid.scale))

    def real(self, name: str) -> Array:
        """In float64."""
        scaled = self.scaled(name)
        held = self.held[name]
        return scaled.real if scaled is not None else np.asarray(held, np.float64)


def execute(graph: g.IntegerGraph, images: NDArray[np.float32]) -> dict[str, Held]:
    """Every value of a graph: int64 codes where it has a grid.

    Args:
        graph: the integers.
        images: ``(N, C, H, W)``, or what the graph's input is.
    """
    held: dict[str, Held] = {graph.input: images.astype(np.float64)}
    for node in graph.nodes:
        held[node.output] = run(node, Reader(graph.values, held))
    return held


def logits(graph: g.IntegerGraph, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """The output in real numbers ``(N, K)``."""
    return Reader(graph.values, execute(graph, images)).real(graph.output)


@singledispatch
def run(node: g.Node, reader: Reader) -> Held:
    """Compute one node."""
    raise NotImplementedError(type(node).__name__)


@run.register
def _(node: g.Quantize, reader: Reader) -> Held:
    grid = reader.values[node.output].grid
    assert grid is not None
    steps = np.rint(reader.real(node.inputs[0]) / np.float64(node.step))
    return np.clip(steps + grid.zero_point, grid.qmin, grid.qmax).astype(np.int64)


def _accumulate(node: g.Conv | g.Linear, reader: Reader, product: Any, channels: tuple) -> Held:
    """``product(input, weight) + bias``, in integers where both are integers."""
    source, weight = reader.scaled(node.inputs[0]), node.weight
    if source is None or not isinstance(weight, g.IntWeight):
        real = weight
        if isinstance(weight, g.IntWeight):
            shape = (-1, *[1] * (weight.codes.ndim - 1))
            real = weight.codes * weight.scale.astype(np.float64).reshape(shape)
        result = product(reader.real(node.inputs[0]), np.asarray(real, np.float64))
        assert not isinstance(node.bias, g.IntBias)
        return result if node.bias is None else result + node.bias.reshape(channels)
    sums = product(source.integers, weight.codes.astype(np.int64))
    scale = source.scale * weight.scale.astype(np.float64).reshape(channels)
    if isinstance(node.bias, g.IntBias):
        sums = sums + node.bias.codes.astype(np.int64).reshape(channels)
    assert np.abs(sums).max(initial=0) < 2**31, "accumulator overflows int32"
    if isinstance(node.bias, np.ndarray):
        return sums * scale + node.bias.astype(np.float64).reshape(channels)
    return Scaled(sums, scale)


def _contract(windows: Array, weight: Array) -> Array:
    """``(N, C, H, W, I, J)`` with ``(O, C, I, J)``: ``(N, O, H, W)``, of the windows' type.

    float64 has fast kernels, numpy's integers have none; and integers below 2⁵³ are exact in it in
    whatever order they are summed, far above the int32 that ``_accumulate`` allows.
    """
    axes = ((1, 4, 5), (1, 2, 3))
    sums = np.tensordot(windows.astype(np.float64), weight.astype(np.float64), axes)
    return np.moveaxis(sums, -1, 1).astype(windows.dtype)


@run.register
def _(node: g.Conv, reader: Reader) -> Held:
    def product(x: Array, weight: Array) -> Array:
        windows = _windows(x, weight.shape[2:], node.stride, node.padding, node.dilation)
        group_in, group_out = x.shape[1] // node.groups, len(weight) // node.groups
        parts = [
            _contract(
                windows[:, i * group_in : (i + 1) * group_in],
                weight[i * group_out : (i + 1) * group_out],
            )
            for i in range(node.groups)
        ]
        return np.concatenate(parts, axis=1)

    return _accumulate(node, reader, product, (-1, 1, 1))


@run.register
def _(node: g.Linear, reader: Reader) -> Held:
    return _accumulate(node, reader, lambda x, weight: x @ weight.T, (-1,))


@run.register
def _(node: g.ChannelAffine, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    shape = (-1, *[1] * (x.ndim - 2))
    return x * node.scale.astype(np.float64).reshape(shape) + node.shift.reshape(shape)


@run.register
def _(node: g.Normalize, reader: Reader) -> Held:
    # the node is defined by its roundings to float32
    x = reader.real(node.inputs[0]).astype(np.float32) / np.float32(255)
    shape = (-1, *[1] * (x.ndim - 2))
    return ((x - node.mean.reshape(shape)) / node.std.reshape(shape)).astype(np.float64)


@run.register
def _(node: g.Clip, reader: Reader) -> Held:
    scaled = reader.scaled(node.inputs[0])
    if scaled is not None and (node.low, node.high) == (0.0, None):
        return Scaled(np.maximum(scaled.integers, 0), scaled.scale)  # ReLU, exactly
    return np.clip(reader.real(node.inputs[0]), node.low, node.high)


@run.register
def _(node: g.Add, reader: Reader) -> Held:
    first, second = (reader.real(name) for name in node.inputs)
    return first + second


@run.register
def _(node: g.Mul, reader: Reader) -> Held:
    first, second = (reader.real(name) for name in node.inputs)
    return first * second


@run.register
def _(node: g.Divide, reader: Reader) -> Held:
    first, second = (reader.real(name) for name in node.inputs)
    return first / second


@run.register
def _(node: g.Reduce, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    if node.function == "mean":
        return x.mean(node.axes, keepdims=True)
    squares = (x * x).sum(node.axes, keepdims=True)
    return squares if node.function == "squares" else np.sqrt(squares)


@run.register
def _(node: g.Resize, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    for axis, scale in enumerate(node.scale, 2):
        last = _between(np.moveaxis(x, axis, -1), float(scale), node.align_corners)
        x = np.moveaxis(last, -1, axis)
    return x


def _between(x: Array, scale: float, align_corners: bool) -> Array:
    """Linear interpolation along the last axis."""
    old = x.shape[-1]
    places = np.arange(math.floor(np.float32(old) * np.float32(scale)))
    aligned = places * (old - 1) / max(len(places) - 1, 1)
    at = np.clip(aligned if align_corners else (places + 0.5) / scale - 0.5, 0, old - 1)
    below = np.floor(at).astype(int)
    above, share = np.minimum(below + 1, old - 1), at - below
    return x[..., below] * (1 - share) + x[..., above] * share


@run.register
def _(node: g.Scale, reader: Reader) -> Held:
    return reader.real(node.inputs[0]) * node.constant


@run.register
def _(node: g.Shift, reader: Reader) -> Held:
    return reader.real(node.inputs[0]) + node.constant


@run.register
def _(node: g.Repeat, reader: Reader) -> Held:
    images = next(iter(reader.held.values()))
    assert isinstance(images, np.ndarray)
    return np.repeat(node.constant.astype(np.float64), len(images), axis=0)


@run.register
def _(node: g.MatMul, reader: Reader) -> Held:
    first, second = (reader.real(name) for name in node.inputs)
    return first @ second


@run.register
def _(node: g.Softmax, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    powers = np.exp(x - x.max(axis=node.axis, keepdims=True))
    chances = powers / powers.sum(axis=node.axis, keepdims=True)
    return np.log(chances) if node.log else chances


@run.register
def _(node: g.UnitLength, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    return x / np.maximum(np.linalg.norm(x, axis=node.axis, keepdims=True), node.epsilon)


@run.register
def _(node: g.LayerNorm, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    axes = tuple(range(-node.scale.ndim, 0))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + node.epsilon) * node.scale + node.shift


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_FUNCTIONS = {
    "sigmoid": _sigmoid,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "reciprocal": lambda x: 1 / x,
    "softplus": lambda x: np.logaddexp(x, 0),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


@run.register
def _(node: g.Activation, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    if node.function == "leaky_relu":
        return np.maximum(x, 0) + node.slope * np.minimum(x, 0)
    if node.function == "elu":
        return np.maximum(x, 0) + node.slope * np.expm1(np.minimum(x, 0))
    return _FUNCTIONS[node.function](x)


@run.register
def _(node: g.ParametricRelu, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    return np.maximum(x, 0) + node.constant * np.minimum(x, 0)


@run.register
def _(node: g.Concat, reader: Reader) -> Held:
    on_codes = reader.values[node.output].grid is not None
    parts = [reader.held[name] if on_codes else reader.real(name) for name in node.inputs]
    return np.concatenate(parts, axis=node.axis)


@run.register
def _(node: g.GlobalAveragePool, reader: Reader) -> Held:
    scaled = reader.scaled(node.inputs[0])
    if scaled is None:
        return reader.real(node.inputs[0]).mean(axis=(2, 3), keepdims=True)
    pixels = scaled.integers.shape[2] * scaled.integers.shape[3]
    return Scaled(scaled.integers.sum(axis=(2, 3), keepdims=True), scaled.scale / pixels)


@run.register
def _(node: g.AveragePool, reader: Reader) -> Held:
    x = reader.real(node.inputs[0])
    arguments = (node.kernel, node.stride, node.padding, (1, 1), node.ceil_mode)
    inside = np.ones((1, 1, *x.shape[2:]))
    if node.count_include_pad:  # the padding counts, what ceil_mode adds beyond it does not
        top, left, bottom, right = node.padding
        inside = np.ones((1, 1, x.shape[2] + top + bottom, x.shape[3] + left + right))
        arguments_of_inside = (node.kernel, node.stride, (0, 0, 0, 0), (1, 1), node.ceil_mode)
    else:
        arguments_of_inside = arguments
    count = _windows(inside, *arguments_of_inside).sum(axis=(4, 5))
    sums = _windows(x, *arguments).sum(axis=(4, 5))
    return sums / count[:, :, : sums.shape[2], : sums.shape[3]]


# -- nodes that only move data: on whatever is held -------------------------------------------


def _moving(node: g.Node, reader: Reader) -> Array:
    held = reader.held[node.inputs[0]]
    return held.real if isinstance(held, Scaled) else held


@run.register
def _(node: g.MaxPool, reader: Reader) -> Held:
    x = _moving(node, reader)
    lowest = np.iinfo(np.int64).min if x.dtype.kind == "i" else -np.inf
    arguments = (node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode)
    return _windows(x, *arguments, fill=lowest).max(axis=(4, 5))


@run.register
def _(node: g.Reshape, reader: Reader) -> Held:
    x = _moving(node, reader)
    return x.reshape(-1, *reader.values[node.output].shape[1:])


@run.register
def _(node: g.Transpose, reader: Reader) -> Held:
    return _moving(node, reader).transpose(node.perm)


@run.register
def _(node: g.Slice, reader: Reader) -> Held:
    x = _moving(node, reader)
    index = [slice(None)] * x.ndim
    for axis, *bounds in zip(node.axes, node.starts, node.ends, node.steps, strict=True):
        index[axis] = slice(*bounds)
    return x[tuple(index)]


@run.register
def _(node: g.Pad, reader: Reader) -> Held:
    grid = reader.values[node.inputs[0]].grid
    amounts = list(zip(node.before, node.after, strict=True))
    if node.mode != "constant":
        return np.pad(_moving(node, reader), amounts, mode=node.mode)
    return np.pad(_moving(node, reader), amounts, constant_values=grid.zero_point if grid else 0)


@run.register
def _(node: g.Select, reader: Reader) -> Held:
    return _moving(node, reader).take(node.indices, axis=node.axis)


def _windows(
    x: Array,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    ceil_mode: bool = False,
    fill: float = 0,
) -> Array:
    """Windows ``(N, C, oH, oW, kH, kW)``.

    In ceil mode one more window is added where it starts inside the image or the padding before it.
    """
    top, left, bottom, right = padding
    sizes, extra = [], []
    for axis, (before, after) in enumerate(((top, bottom), (left, right))):
        extent, span = x.shape[2 + axis], dilation[axis] * (kernel[axis] - 1) + 1
        room = extent + before + after - span
        count = (-(-room // stride[axis]) if ceil_mode else room // stride[axis]) + 1
        if ceil_mode and (count - 1) * stride[axis] >= extent + before:
            count -= 1
        sizes.append(count)
        extra.append(max(0, (count - 1) * stride[axis] + span - extent - before - after))
    pads = ((0, 0), (0, 0), (top, bottom + extra[0]), (left, right + extra[1]))
    padded = np.pad(x, pads, constant_values=fill)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    windows = sliding_window_view(padded, spans, axis=(2, 3))
    strided = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return strided[:, :, : sizes[0], : sizes[1]]
