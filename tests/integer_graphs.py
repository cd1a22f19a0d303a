"""Small hand-made integer graphs that between them use every node, grid and form.

A grid's scale is taken from the values seen when ``IMAGES`` run through the graph so far, so that
codes use their whole range and a wrong constant shows. Nothing here comes from a student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from reference_executor import Held, Reader, Scaled, run

from sqakd_deploy import graph as g

UINT8, INT8 = (0, 255), (-128, 127)


def images(count: int, shape: tuple[int, ...] = (3, 8, 8), seed: int = 0) -> np.ndarray:
    """Random floats ``(N, *shape)``."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A graph and what ONNX Runtime should make of it.

    Attributes:
        graph: the integers.
        integer: count of layers in integers, by operator.
        floats: names of the layers in float.
    """

    graph: g.IntegerGraph
    integer: Mapping[str, int]
    floats: frozenset[str] = frozenset()


@dataclass
class Builder:
    """Appends nodes, runs each on a sample and names the values."""

    widest: ClassVar[int] = 8  # bits of weights, for runtimes that are exact with no more

    shape: tuple[int, ...] = (3, 8, 8)
    nodes: list[g.Node] = field(default_factory=list)
    values: dict[str, g.Value] = field(default_factory=dict)
    sample: dict[str, Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(7)
        self.values["x"] = g.Value("x", (None, *self.shape))
        self.sample["x"] = images(16, self.shape, seed=3).astype(np.float64)

    def graph(self, output: str, **metadata: str) -> g.IntegerGraph:
        return g.IntegerGraph("made", tuple(self.nodes), self.values, "x", output, metadata)

    def append(
        self,
        kind: type[g.Node],
        name: str,
        *sources: str,
        grid: g.Grid | None = None,
        shape: g.Shape | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; its output is called like it and its shape is that of the sample."""
        if issubclass(kind, g.DATA_MOVEMENT):
            grid = self.values[sources[0]].grid
        output = f"{name}_out"
        node = kind(name, sources, output, **attributes)
        self.values[output] = g.Value(output, shape or (), grid)
        held = self.sample[output] = run(node, Reader(self.values, self.sample))
        seen = held.integers if isinstance(held, Scaled) else held
        self.values[output] = g.Value(output, (None, *seen.shape[1:]), grid)
        self.nodes.append(node)
        return output

    def quantize(
        self, name: str, source: str, bounds: tuple[int, int] = UINT8, zero: int = 0,
        step_ratio: float = 1.0,
    ) -> str:  # fmt: skip
        """Quantise to codes within ``bounds``; the step is ``step_ratio · scale``."""
        real = Reader(self.values, self.sample).real(source)
        above, below = bounds[1] - zero, zero - bounds[0]
        needed = [real.max() / above] if above else []
        needed += [-real.min() / below] if below else []
        # Some values are cut, too; a ratio with no small denominator puts no sum on a tie.
        scale = np.float32(np.sqrt(0.8) * max(*needed, 1e-3))
        step = np.float32(scale * np.float32(step_ratio))
        grid = g.Grid(scale, zero, *bounds)
        return self.append(g.Quantize, name, source, grid=grid, step=step)

    def conv(self, name: str, source: str, channels: int, kernel: int = 3, **options: Any) -> str:
        """A convolution with integer weights and an int32 bias."""
        inputs = self.values[source].shape[1]
        assert inputs is not None
        groups = options.get("groups", 1)
        weight, bias = self.weights((channels, inputs // groups, kernel, kernel), source, options)
        same = (kernel // 2,) * 4
        return self.append(
            g.Conv,
            name,
            source,
            weight=weight,
            bias=bias,
            stride=options.get("stride", (1, 1)),
            padding=options.get("padding", same),
            dilation=options.get("dilation", (1, 1)),
            groups=groups,
        )

    def linear(self, name: str, source: str, channels: int, **options: Any) -> str:
        """A linear layer with integer weights and an int32 bias."""
        inputs = self.values[source].shape[1]
        assert inputs is not None
        weight, bias = self.weights((channels, inputs), source, options)
        return self.append(g.Linear, name, source, weight=weight, bias=bias)

    def weights(
        self, shape: tuple[int, ...], source: str, options: Mapping[str, Any]
    ) -> tuple[g.Weight, g.Bias | None]:
        """Random weights and biases: ``bits``, ``mid_rise``, ``bias``, ``floats``."""
        bits, mid_rise = min(options.get("bits", 4), self.widest), options.get("mid_rise", False)
        top = 2 ** (bits - 1)
        codes = self.random.integers(1 - top, top, size=shape) if bits > 1 else np.ones(shape)
        if mid_rise:
            codes = 2 * self.random.integers(0, 2**bits, size=shape) - (2**bits - 1)
        scale = self.random.uniform(0.02, 0.06, shape[0]).astype(np.float32)
        shift = self.random.normal(size=shape[0]).astype(np.float32)
        if options.get("floats"):
            real = codes * scale.reshape(-1, *[1] * (len(shape) - 1))
            return real.astype(np.float32), shift
        weight = g.IntWeight(codes.astype(np.int8), scale, bits, mid_rise)
        grid = self.values[source].grid
        kind = options.get("bias", "integer")
        if kind == "integer" and grid is not None:
            accumulator = np.float32(grid.scale * scale)
            return weight, g.IntBias(np.rint(shift / accumulator).astype(np.int32), accumulator)
        return weight, None if kind is None else shift

    def relu(self, name: str, source: str) -> str:
        return self.append(g.Clip, name, source, low=0.0, high=None)

    def layer(self, name: str, source: str, channels: int, **options: Any) -> str:
        """Convolution, ReLU, quantizer with ``2^act_bits`` codes."""
        top = 2 ** options.pop("act_bits", 8) - 1
        active = self.relu(f"{name}_relu", self.conv(name, source, channels, **options))
        return self.quantize(f"{name}_quant", active, (0, top))

    def pool_and_classify(self, source: str) -> str:
        """Global mean, flatten, linear, quantised logits."""
        mean = self.append(g.GlobalAveragePool, "pool", source)
        codes = self.quantize("pool_quant", mean, UINT8, self.zero(source))
        shape = (None, self.values[source].shape[1])
        flat = self.append(g.Reshape, "flatten", codes, shape=shape)
        return self.quantize("fc_quant", self.linear("fc", flat, 5, bits=8), UINT8, 128)

    def zero(self, source: str) -> int:
        grid = self.values[source].grid
        return 128 if grid is None or grid.zero_point else 0


@dataclass
class Symmetric(Builder):
    """Every grid is int8 with zero-point 0: what is wide and signed around 0, what is not above."""

    def quantize(
        self, name: str, source: str, bounds: tuple[int, int] = UINT8, zero: int = 0,
        step_ratio: float = 1.0,
    ) -> str:  # fmt: skip
        levels = bounds[1] - bounds[0] + 1
        real = Reader(self.values, self.sample).real(source)
        low, high = (-levels // 2, levels // 2 - 1) if real.min() < 0 else (0, min(levels - 1, 127))
        if levels == 2:
            low, high = 0, 1
        below = -real.min() / -low if low else 0.0
        scale = np.float32(np.sqrt(0.8) * max(real.max() / high, below, 1e-3))
        grid = g.Grid(scale, 0, low, high, signed=True)
        step = np.float32(scale * np.float32(step_ratio))
        return self.append(g.Quantize, name, source, grid=grid, step=step)


CASES: dict[str, Callable[..., Case]] = {}


def case(
    floats: tuple[str, ...] = (), **integer: int
) -> Callable[[Callable[[Builder], str]], Callable[[Builder], str]]:
    """Register a function that fills a builder and returns the output's name."""

    def register(fill: Callable[[Builder], str]) -> Callable[[Builder], str]:
        def make(kind: type[Builder] = Builder) -> Case:
            builder = kind()
            graph = builder.graph(fill(builder), made_by=fill.__name__)
            return Case(replace(graph, name=fill.__name__), integer, frozenset(floats))

        CASES[fill.__name__] = make
        return fill

    return register


@case(Conv=3, GlobalAveragePool=1, Gemm=1)
def plain(b: Builder) -> str:
    """8-bit stem on a signed image, 4-bit layers behind a requantisation."""
    x = b.quantize("image", "x", UINT8, 128)
    x = b.layer("stem", x, 16, bits=8)
    x = b.quantize("requant", x, (0, 15))
    x = b.layer("conv1", x, 16, act_bits=4)
    return b.pool_and_classify(b.layer("conv2", x, 32, stride=(2, 2), bias=None))


@case(Conv=3, GlobalAveragePool=1, Gemm=1)
def signed(b: Builder) -> str:
    """int8 grids, symmetric and not, without activations between."""
    x = b.quantize("image", "x", INT8, 0)
    x = b.quantize("quant1", b.conv("conv1", x, 8, bits=8), INT8, -5)
    x = b.quantize("quant2", b.conv("conv2", x, 8), (-8, 7), 0)
    x = b.quantize("quant3", b.conv("conv3", x, 8), INT8, 0)
    mean = b.quantize("mean", b.append(g.GlobalAveragePool, "pool", x), INT8, 3)
    flat = b.append(g.Reshape, "flatten", mean, shape=(None, 8))
    return b.quantize("logits", b.linear("fc", flat, 5), INT8, 0)


@case(Conv=5, GlobalAveragePool=1, Gemm=1)
def narrow(b: Builder) -> str:
    """Grids of 1, 2, 3 and 5 bits, with zero-points inside and at the ends."""
    x = b.quantize("image", "x", (0, 31), 14)
    x = b.layer("conv1", x, 8, act_bits=3)
    x = b.quantize("quant2", b.conv("conv2", x, 8), (0, 3), 1)
    x = b.quantize("quant3", b.conv("conv3", x, 8), (0, 1), 0)
    x = b.quantize("quant4", b.conv("conv4", x, 8), (0, 15), 15)
    return b.pool_and_classify(b.layer("conv5", x, 16))


@case(Conv=4, GlobalAveragePool=1, Gemm=1)
def mid_rise(b: Builder) -> str:
    """Odd weights of grids without zero."""
    x = b.quantize("image", "x", UINT8, 128)
    for bits in (4, 3, 2, 1):
        x = b.layer(f"conv{bits}", x, 8, bits=bits, mid_rise=True, act_bits=4)
    return b.pool_and_classify(x)


@case(Conv=5, GlobalAveragePool=1, Gemm=1)
def shapes(b: Builder) -> str:
    """Groups, depthwise, dilation, uneven padding and strides; zero-points padded with."""
    x = b.quantize("image", "x", UINT8, 117)
    x = b.quantize("quant1", b.conv("conv1", x, 8, padding=(0, 1, 2, 1)), (0, 15), 9)
    x = b.layer("grouped", x, 16, groups=4)
    x = b.layer("depthwise", x, 16, groups=16)
    x = b.layer("dilated", x, 8, dilation=(2, 1), padding=(2, 1, 2, 1))
    return b.pool_and_classify(b.layer("strided", x, 8, stride=(2, 3), kernel=1))


@case(Conv=5, Add=2, GlobalAveragePool=1, Gemm=1)
def residual(b: Builder) -> str:
    """An identity shortcut and one of slice and pad, on an 8-bit stream."""
    stream = b.layer("stem", b.quantize("image", "x", UINT8, 128), 8, bits=8)
    for name, channels, stride in (("one", 8, 1), ("two", 16, 2)):
        x = b.layer(f"{name}a", b.quantize(f"{name}_in", stream, (0, 15)), channels,
                    stride=(stride, stride), act_bits=4)  # fmt: skip
        x = b.quantize(f"{name}b_quant", b.conv(f"{name}b", x, channels), UINT8, 128)
        if stride == 2:
            every, to_end = (2, 2), (None, None)
            stream = b.append(g.Slice, "shortcut_slice", stream, axes=(2, 3), starts=(0, 0),
                              ends=to_end, steps=every)  # fmt: skip
            around = (0, 4, 0, 0)
            stream = b.append(g.Pad, "shortcut_pad", stream, before=around, after=around)
        total = b.relu(f"{name}_relu", b.append(g.Add, f"{name}_add", x, stream))
        stream = b.quantize(f"{name}_quant", total)
    return b.pool_and_classify(stream)


@case(Conv=3, GlobalAveragePool=1, Gemm=1)
def two_steps(b: Builder) -> str:
    """Quantizers whose input step is not their output scale (EWGS)."""
    x = b.quantize("image", "x", UINT8, 128, step_ratio=0.8)
    active = b.relu("relu1", b.conv("conv1", x, 8))
    x = b.quantize("quant1", active, (0, 15), step_ratio=1.3)
    again = b.quantize("requant", x, (0, 7), step_ratio=0.7)
    x = b.layer("conv2", again, 8)
    return b.pool_and_classify(b.layer("conv3", x, 8))


@case(Conv=3, Concat=1, MaxPool=1, AveragePool=1, GlobalAveragePool=1, Gemm=1)
def branches(b: Builder) -> str:
    """Concatenation of four branches with different scales and zero-points."""
    x = b.layer("stem", b.quantize("image", "x", UINT8, 128), 8)
    square, one, pads = (3, 3), (1, 1), (1, 1, 1, 1)
    largest = b.append(g.MaxPool, "maxpool", x, kernel=square, stride=one, padding=pads,
                       dilation=one, ceil_mode=False)  # fmt: skip
    mean = b.append(g.AveragePool, "avgpool", x, kernel=square, stride=one, padding=pads,
                    ceil_mode=False, count_include_pad=False)  # fmt: skip
    parts = (
        b.layer("left", b.quantize("left_in", x, (0, 15)), 8),
        b.quantize("right_quant", b.conv("right", x, 8), UINT8, 131),
        largest,
        b.quantize("avg_quant", mean),
    )
    joined = b.append(g.Concat, "concat", *parts, axis=1)
    return b.pool_and_classify(b.quantize("concat_quant", joined, UINT8, 100))


@case(Conv=6, Concat=2, GlobalAveragePool=1, Gemm=1)
def joined(b: Builder) -> str:
    """Concatenations rounded behind them: to 4 bits, and around a zero-point by another step."""
    x = b.layer("stem", b.quantize("image", "x", UINT8, 128), 8)
    parts = (b.conv("one", x, 6, kernel=1), b.conv("three", x, 10))
    both = b.append(g.Concat, "concat1", *parts, axis=1)
    x = b.quantize("narrow", b.relu("both_relu", both), (0, 15))
    parts = (b.conv("left", x, 4), b.conv("right", x, 4))
    both = b.append(g.Concat, "concat2", *parts, axis=1)
    x = b.quantize("wide", both, (0, 63), 20, step_ratio=0.8)
    return b.pool_and_classify(b.layer("last", x, 8, act_bits=5))


@case(AveragePool=4, MaxPool=3, GlobalAveragePool=1, Gemm=1)
def pools(b: Builder) -> str:
    """Every form of pooling, on codes whose zero-point is not 0."""
    x = b.quantize("image", "x", UINT8, 90)
    one, two, three = (1, 1), (2, 2), (3, 3)
    forms = [
        (three, one, (1, 1, 1, 1), False, True),
        (two, one, (0, 1, 1, 0), False, False),
        (two, two, (0, 0, 0, 0), True, False),
    ]
    for i, (kernel, stride, padding, ceil_mode, include) in enumerate(forms):
        mean = b.append(g.AveragePool, f"avg{i}", x, kernel=kernel, stride=stride, padding=padding,
                        ceil_mode=ceil_mode, count_include_pad=include)  # fmt: skip
        x = b.quantize(f"avg{i}_quant", mean, UINT8, 60 + i)
    x = b.append(g.MaxPool, "padded", x, kernel=three, stride=one, padding=(1, 1, 1, 1),
                 dilation=one, ceil_mode=False)  # fmt: skip
    x = b.quantize("signed", x, INT8, -7)
    x = b.append(g.MaxPool, "dilated", x, kernel=two, stride=one, padding=(1, 1, 1, 1),
                 dilation=two, ceil_mode=False)  # fmt: skip
    x = b.append(g.MaxPool, "ceiled", x, kernel=three, stride=two, padding=(0, 0, 0, 0),
                 dilation=one, ceil_mode=True)  # fmt: skip
    mean = b.append(g.AveragePool, "last", x, kernel=two, stride=one, padding=(0, 0, 0, 0),
                    ceil_mode=False, count_include_pad=False)  # fmt: skip
    x = b.quantize("last_quant", mean, INT8, 11)
    x = b.quantize("unsigned", x, UINT8, 128)
    return b.pool_and_classify(x)


@case(Conv=2, GlobalAveragePool=1, Gemm=1)
def shuffle(b: Builder) -> str:
    """A channel shuffle, and slices and padding with steps and on a zero-point."""
    x = b.quantize("image", "x", UINT8, 128)
    x = b.quantize("quant1", b.conv("conv1", x, 8), (0, 15), 7)
    x = b.append(g.Reshape, "split", x, shape=(None, 2, 4, 8, 8))
    x = b.append(g.Transpose, "swap", x, perm=(0, 2, 1, 3, 4))
    x = b.append(g.Reshape, "merge", x, shape=(None, 8, 8, 8))
    x = b.append(g.Slice, "part", x, axes=(1, 3), starts=(1, 0), ends=(7, None), steps=(1, 2))
    x = b.append(g.Pad, "pad", x, before=(0, 0, 1, 2), after=(0, 2, 0, 1))
    return b.pool_and_classify(b.layer("conv2", x, 8, padding=(0, 0, 0, 0)))


@case(Conv=2, GlobalAveragePool=1, Gemm=1)
def mirrored(b: Builder) -> str:
    """Padding by what the image holds, and entries in another order, some of them twice."""
    x = b.quantize("image", "x", UINT8, 128)
    x = b.quantize("quant1", b.conv("conv1", x, 8), (0, 15), 7)
    around = {"before": (0, 0, 1, 2), "after": (0, 0, 2, 0)}
    x = b.append(g.Pad, "mirror", x, **around, mode="reflect")
    x = b.append(g.Pad, "border", x, **around, mode="edge")
    x = b.append(g.Select, "channels", x, axis=1, indices=(3, 1, 7, 0, 0, 2))
    x = b.append(g.Select, "rows", x, axis=2, indices=(0, 0, 1, 2, 2, 3, 9, 8))
    return b.pool_and_classify(b.layer("conv2", x, 8))


@case(Conv=2, Gemm=1)
def relu6_and_float_logits(b: Builder) -> str:
    """ReLU6 whose quantizer ends inside it; logits in float behind an integer Gemm."""
    x = b.quantize("image", "x", UINT8, 128)
    x = b.append(g.Clip, "relu6", b.conv("conv1", x, 8), low=0.0, high=60.0)
    x = b.quantize("quant1", x, UINT8)
    x = b.layer("conv2", x, 4, stride=(4, 4))
    return b.linear("fc", b.append(g.Reshape, "flatten", x, shape=(None, 16)), 5)


@case(("cut", "one_side"), Conv=1, GlobalAveragePool=1, Gemm=1)
def clips(b: Builder) -> str:
    """Clips that are no ReLU: the quantizer's range inside, beyond it, and open to one side."""
    x = b.quantize("image", "x", UINT8, 128)
    bounds = {"inside": (-9.0, 9.0, 120), "cut": (-0.5, 0.3, 150), "one_side": (-0.25, None, 130)}
    for name, (low, high, zero) in bounds.items():
        active = b.append(g.Clip, f"{name}_clip", b.conv(name, x, 8), low=low, high=high)
        x = b.quantize(f"{name}_quant", active, (0, 255), zero)
    return b.pool_and_classify(x)


@case(Conv=1, GlobalAveragePool=1, Gemm=1)
def normalised(b: Builder) -> str:
    """Values of another range, normalised per channel before the first quantizer."""
    mean, std = (np.array(v, np.float32) for v in ((0.01, -0.02, 0.0), (0.004, 0.003, 0.005)))
    x = b.append(g.Normalize, "normalise", "x", mean=mean, std=std)
    return b.pool_and_classify(b.layer("conv1", b.quantize("image", x, UINT8, 128), 8))


@case(Conv=2, GlobalAveragePool=1, Gemm=1)
def batch_norm_alone(b: Builder) -> str:
    """A BatchNorm as a depthwise 1×1 convolution with the code 127, signs included."""
    x = b.layer("conv1", b.quantize("image", "x", UINT8, 128), 8)
    codes = np.full((8, 1, 1, 1), 127, np.int8) * np.array([1, -1] * 4, np.int8).reshape(8, 1, 1, 1)
    scale = b.random.uniform(0.5, 2.0, 8).astype(np.float32) / np.float32(127)
    grid = b.values[x].grid
    assert grid is not None
    bias = g.IntBias(b.random.integers(-9000, 9000, 8).astype(np.int32), grid.scale * scale)
    weight = g.IntWeight(codes, scale, 8, False)
    x = b.append(g.Conv, "norm", x, weight=weight, bias=bias, stride=(1, 1),
                 padding=(0, 0, 0, 0), dilation=(1, 1), groups=8)  # fmt: skip
    return b.pool_and_classify(b.quantize("norm_quant", x, UINT8, 77))


@case(
    floats=("stem", "only_weights", "only_input", "affine", "add", "concat", "pool", "fc"),
    MaxPool=1,
)
def floats(b: Builder) -> str:
    """Everything that stays in float, in the academic placement and beyond it."""
    x = b.relu("relu1", b.conv("stem", "x", 16, floats=True))
    x = b.append(g.ChannelAffine, "affine", x, scale=np.linspace(-1, 1, 16, dtype=np.float32),
                 shift=np.linspace(1, 2, 16, dtype=np.float32))  # fmt: skip
    y = b.append(g.Clip, "relu6", b.conv("only_weights", x, 16, bias="float"), low=0.0, high=6.0)
    codes = b.quantize("quant", y, (0, 15))
    z = b.conv("only_input", codes, 16, floats=True)
    x = b.append(g.Add, "add", z, x)
    x = b.append(g.Concat, "concat", x, y, axis=1)
    x = b.append(g.Slice, "slice", x, axes=(2, 3), starts=(0, 0), ends=(None, None), steps=(2, 2))
    x = b.append(g.Pad, "pad", x, before=(0, 2, 1, 1), after=(0, 2, 0, 0))
    x = b.append(g.Reshape, "split", x, shape=(None, 2, 18, 5, 5))
    x = b.append(g.Transpose, "swap", x, perm=(0, 2, 1, 3, 4))
    x = b.append(g.Reshape, "merge", x, shape=(None, 36, 5, 5))
    codes = b.quantize("late", x, UINT8, 128)
    codes = b.append(g.MaxPool, "maxpool", codes, kernel=(2, 2), stride=(1, 1),
                     padding=(0, 0, 0, 0), dilation=(1, 1), ceil_mode=False)  # fmt: skip
    mean = b.append(g.GlobalAveragePool, "pool", codes)
    return b.linear("fc", b.append(g.Reshape, "flatten", mean, shape=(None, 36)), 5, bias="float")


def vector() -> g.IntegerGraph:
    """Linear layers alone, on a flat input ``(N, 12)``."""
    b = Builder(shape=(12,))
    x = b.quantize("input_quant", "x", UINT8, 128)
    active = b.relu("relu", b.linear("fc1", x, 16))
    x = b.quantize("hidden", active, (0, 15))
    return b.graph(b.quantize("out", b.linear("fc2", x, 4, bias="float"), UINT8, 128))
