"""From a student to its integers: the one place where trained numbers become codes.

:mod:`~sqakd_deploy.lowering.folding` has the arithmetic. The only error that lowering adds is half
a step of each int32 bias; :func:`snap_biases` moves a student's own biases onto that grid, after
which the student and its integers are the same function.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from brevitas.nn import QuantIdentity
from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ExportError
from sqakd_deploy.lowering.extents import joins_pixels, shape_behind
from sqakd_deploy.lowering.folding import (
    AFFINE_CODE,
    Affine,
    affine_of,
    bias_of,
    bounds_needed,
    fold,
    once,
    scaling,
    set_bias,
    weight_and_bias,
    with_bias,
)
from sqakd_deploy.lowering.geometry import conv_geometry
from sqakd_deploy.lowering.lowerable import Lowered, codes_behind, without_form
from sqakd_deploy.lowering.meaning import Identity, Op, Scalar, Tuple
from sqakd_deploy.lowering.ops import read
from sqakd_deploy.lowering.subpixel import Subpixel, as_pixels, subpixel
from sqakd_deploy.lowering.transposed import QuantTransposed2d
from sqakd_deploy.quantization import BATCH_NORMS, input_shape_of, spec_of
from sqakd_deploy.quantizers import ActivationQuantizer
from sqakd_deploy.spec import SPEC_KEY
from sqakd_deploy.tracing.trace import describe, is_tensor, reads, shape, tensor_inputs

_SNAPPED = 1e-2  # steps of the accumulator that float32 may leave a bias beside its integer


def lower(student: nn.Module, metadata: Mapping[str, str] | None = None) -> ir.IntegerGraph:
    """Encode a calibrated student.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize`; not changed.
        metadata: travels with the graph.

    Raises:
        ModelError: if the module is no student.
        ExportError: if a layer has no integer form, naming it.
        SpecError: if the student was never calibrated.
    """
    return lowered(student, metadata).graph


def lowered(student: nn.Module, metadata: Mapping[str, str] | None = None) -> Lowered:
    """As :func:`lower`, with where each node came from."""
    spec = spec_of(student)
    facts = {SPEC_KEY: spec.model_dump_json(), **(metadata or {})}
    return _Lowering(student).run(facts)  # type: ignore[arg-type]


@torch.no_grad()
def snap_biases(student: nn.Module) -> None:
    """Move biases to the nearest value that int32 can hold, at most half an accumulator step.

    Args:
        student: changed in place: BatchNorm's ``bias`` where one follows a layer, else the layer's.
            One without an integer form has no such grid and stays as it is.
    """
    if without_form(student) is not None:
        return
    known = lowered(student)
    for node in known.graph.nodes:
        if isinstance(node, (ir.Conv, ir.Linear)) and isinstance(node.bias, ir.IntBias):
            layer, norm = known.paths[node.name], known.norms.get(node.name)
            wanted = node.bias.codes.astype(np.float64) * node.bias.scale
            set_bias(student, layer, norm, wanted)


@torch.no_grad()
def lower_snapped(student: nn.Module) -> ir.IntegerGraph | None:
    """As :func:`lower`, of a student whose biases int32 holds as they are; None of another."""
    known = lowered(student)
    for node in known.graph.nodes:
        if isinstance(node, (ir.Conv, ir.Linear)) and isinstance(node.bias, ir.IntBias):
            present = bias_of(student, known.paths[node.name], known.norms.get(node.name))
            if present is None:
                continue
            codes, scale = (once(v, len(present)) for v in (node.bias.codes, node.bias.scale))
            if np.abs(present / scale.astype(np.float64) - codes).max() > _SNAPPED:
                return None
    return known.graph


class _Lowering:
    """Walks the student's graph once; one method per kind of node."""

    def __init__(self, student: fx.GraphModule) -> None:
        self.student = student
        self.nodes: list[ir.Node] = []
        self.values: dict[str, ir.Value] = {}
        self.value_of: dict[fx.Node, ir.Value] = {}
        self.folded: dict[fx.Node, fx.Node] = {}  # BatchNorm → the layer that absorbed it
        self.norms: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self.blocks: dict[str, Subpixel] = {}  # values that are still to be laid out as pixels
        self.laid_out: dict[str, ir.Value] = {}  # those and others in their traced shape, by name
        self.input = self.output = ""

    def run(self, metadata: Mapping[str, str]) -> Lowered:
        for node in self.student.graph.nodes:
            if node.op == "placeholder":
                if node.users:
                    self._input(node)
            elif node.op == "output":
                self._output(node)
            elif node.op != "get_attr":  # the operators that read parameters hold them
                self._call(node)
        name = type(self.student).__name__
        graph = ir.IntegerGraph(
            name, tuple(self.nodes), self.values, self.input, self.output, dict(metadata)
        )
        return Lowered(graph, self.norms, self.paths)

    # -- plumbing ----------------------------------------------------------------------------

    def _value(self, node: fx.Node, dims: ir.Shape, grid: ir.Grid | None = None) -> ir.Value:
        value = ir.Value(node.name, dims, grid)
        self.values[value.name] = self.value_of[node] = value
        return value

    def _keep_blocks(self, source: ir.Value, value: ir.Value) -> None:
        if source.name in self.blocks:
            self.blocks[value.name] = self.blocks[source.name]

    def _source(self, node: fx.Node) -> ir.Value:
        return self.value_of[node.all_input_nodes[0]]

    def _traced(self, node: fx.Node) -> ir.Value:
        return self._as_traced(node, self.value_of[node])

    def _input(self, node: fx.Node) -> None:
        self.input = self._value(node, (None, *input_shape_of(self.student))).name

    def _output(self, node: fx.Node) -> None:
        results = node.all_input_nodes
        if len(results) != 1 or results[0] not in self.value_of:
            raise ExportError("wanted a model that returns one tensor of logits")
        self.output = self._traced(results[0]).name

    def _call(self, node: fx.Node) -> None:
        module = self.student.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantIdentity):
            self._quantize(node, module)
            return
        op = read(node)
        if op is None:
            raise ExportError(
                f"{describe(node)} has no integer form, so that its student stays in PyTorch; "
                "replace it in the model by one that has, and train again"
            )
        if op.kind is Scalar:
            return
        if op.kind is Tuple:  # its pieces are cut by the axes of the traced shape
            self.value_of[node] = self._traced(node.all_input_nodes[0])
        elif op.kind is Identity:
            self.value_of[node] = self._source(node)
        elif op.kind is ir.ChannelAffine:
            self._channel_affine(node, module, op)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            self._layer(node, module)
        else:
            self._operator(node, op)

    # -- nodes -------------------------------------------------------------------------------

    def _quantize(self, node: fx.Node, module: Any) -> None:
        quantizer = next(m for m in module.modules() if isinstance(m, ActivationQuantizer))
        if not quantizer.calibrated:
            raise ExportError(
                f"quantizer '{node.target}' was never calibrated; "
                "call calibrate(student, images) before exporting"
            )
        step, zero_point, out_step = quantizer.grid()
        source = self._source(node)
        first = -zero_point if quantizer.symmetric else 0  # code of the lowest level
        grid = ir.Grid(
            np.float32(out_step),
            zero_point + first,
            first,
            quantizer.steps + first,
            signed=quantizer.symmetric,
        )
        value = self._value(node, source.shape, grid)
        self._keep_blocks(source, value)
        name = str(node.target)
        self.nodes.append(ir.Quantize(name, (source.name,), value.name, np.float32(step)))
        self._as_traced(node, value)

    def _operator(self, node: fx.Node, op: Op) -> None:
        known = [n for n in reads(node) if n in self.value_of]
        elementwise = op.kind is ir.Clip
        as_is = elementwise or joins_pixels(op, ((self.value_of[n].shape, shape(n)) for n in known))
        sources = [self.value_of[n] if as_is else self._traced(n) for n in known]
        attributes = self._limits(node, op) if op.kind is ir.Clip else op.attributes
        if attributes is None:
            self.value_of[node] = sources[0]
            return
        dims = shape_behind(op, [source.shape for source in sources], shape(node))
        moved = issubclass(op.kind, ir.DATA_MOVEMENT)
        value = self._value(node, dims, sources[0].grid if moved else None)
        if elementwise:
            self._keep_blocks(sources[0], value)
        names = tuple(source.name for source in sources)
        self.nodes.append(op.kind(self._name(node), names, value.name, **attributes))

    def _limits(self, node: fx.Node, op: Op) -> dict[str, Any] | None:
        """Attributes of a Clip, or None where the quantizers behind it do all it does."""
        grids = [codes_behind(self.student, user) for user in node.users]
        bounds = bounds_needed(op.attributes["low"], op.attributes["high"], grids)
        return None if bounds is None else {"low": bounds[0], "high": bounds[1]}

    def _name(self, node: fx.Node) -> str:
        """The module's path, or the node's own name where that is taken, or that with a number."""
        taken = {made.name for made in self.nodes}
        wanted = [str(node.target)] if node.op == "call_module" else []
        numbered = (f"{node.name}_{number}" for number in itertools.count(2))
        names = itertools.chain(wanted, [node.name], numbered)
        return next(name for name in names if name not in taken)

    def _layer(self, node: fx.Node, module: Any) -> None:
        source = self._traced(node.all_input_nodes[0])
        if isinstance(module, nn.Linear) and len(source.shape) > 2:
            source = self._reshape(source, f"{node.name}/rows", (None, source.shape[-1]))
        norm = self._following_norm(node)
        affine = affine_of(self.student.get_submodule(str(norm.target))) if norm else None
        name = self._name(node)
        weight, bias = weight_and_bias(module, affine, source.grid)
        if norm is not None:
            self.folded[norm] = node
            self.norms[name] = str(norm.target)
        self.paths[name] = str(node.target)
        if isinstance(module, nn.Linear):
            value = self._value(node, (None, shape(node)[-1]))
            self.nodes.append(ir.Linear(name, (source.name,), value.name, weight, bias))
        else:
            self._convolution(node, module, name, source, weight, bias)

    def _convolution(
        self,
        node: fx.Node,
        module: Any,
        name: str,
        source: ir.Value,
        weight: ir.Weight,
        bias: ir.Bias | None,
    ) -> None:
        dims, geometry = shape(node), conv_geometry(module)
        if isinstance(module, (nn.ConvTranspose2d, QuantTransposed2d)):
            made = subpixel(module, weight, bias, source.shape[2:], dims[2:])
            weight, bias, dims = made.weight, made.bias, (None, made.channels, *made.blocks)
            geometry |= {"stride": (1, 1), "padding": made.padding, "dilation": (1, 1)}
            self.blocks[node.name] = made
        value = self._value(node, dims)
        self.nodes.append(ir.Conv(name, (source.name,), value.name, weight, bias, **geometry))

    def _following_norm(self, node: fx.Node) -> fx.Node | None:
        """A BatchNorm that is the only reader of a layer, and scales the layer's outputs."""
        rows = isinstance(self.student.get_submodule(str(node.target)), nn.Linear)
        if len(node.users) != 1 or (rows and len(shape(node)) != 2):
            return None
        user = next(iter(node.users))
        if user.op != "call_module":
            return None
        module = self.student.get_submodule(str(user.target))
        return user if isinstance(module, BATCH_NORMS) else None

    def _channel_affine(self, node: fx.Node, module: Any, op: Op) -> None:
        """A BatchNorm, or a factor for each channel."""
        if node in self.folded:
            self.value_of[node] = self._source(node)
            return
        source = self._traced(tensor_inputs(node)[0])
        affine = affine_of(module) if module is not None else scaling(op.attributes["scale"])
        if source.grid is None:
            value = self._value(node, shape(node))
            factor, shift = affine.factor.astype(np.float32), affine.shift.astype(np.float32)
            name = self._name(node)
            self.nodes.append(ir.ChannelAffine(name, (source.name,), value.name, factor, shift))
            return
        self._depthwise(node, source, affine)

    def _depthwise(self, node: fx.Node, source: ir.Value, affine: Affine) -> None:
        """A BatchNorm on integers as a 1×1 depthwise convolution: exact, with integer kernels."""
        channels = len(affine.factor)
        codes = np.full((channels, 1, 1, 1), AFFINE_CODE, np.int8)
        scale = np.full(channels, 1.0 / AFFINE_CODE)
        weight = fold(codes, scale, affine.factor, bits=8, mid_rise=False)
        grid = source.grid
        assert grid is not None
        name, bias = self._name(node), None
        if node.op == "call_module":
            weight, bias = with_bias(weight, affine.shift, grid.scale)
            self.norms[name] = self.paths[name] = str(node.target)
        if len(source.shape) == 2:
            source = self._reshape(source, f"{node.name}/image", (None, channels, 1, 1))
        value = ir.Value(node.name, source.shape)
        self.values[value.name] = self.value_of[node] = value
        inputs, one = (source.name,), (1, 1)
        self.nodes.append(
            ir.Conv(name, inputs, value.name, weight, bias, one, (0, 0, 0, 0), one, channels)
        )

    def _reshape(self, source: ir.Value, name: str, dims: ir.Shape) -> ir.Value:
        """Names of what the student has not hold a slash, as no name of a traced node does."""
        value = self.values[name] = ir.Value(name, dims, source.grid)
        self.nodes.append(ir.Reshape(name, (source.name,), name))
        return value

    def _as_traced(self, node: fx.Node, value: ir.Value) -> ir.Value:
        """A value in the traced shape, where lowering gave it another: a vector that a depthwise
        convolution made an image of, rows that a linear layer made of positions, blocks of pixels
        that a transposed convolution made channels of.

        The reshape waits until the value is quantised: between a convolution and its quantizer it
        would keep the runtime from fusing them.
        """
        if value.name in self.laid_out:  # for another node that passes it on
            self.value_of[node] = self.laid_out[value.name]
            return self.value_of[node]
        if value.name in self.blocks:
            made = as_pixels(value.name, value, self.blocks[value.name], shape(node))
            for moved, result in made:
                self.nodes.append(moved)
                self.values[result.name] = self.value_of[node] = result
            self.laid_out[value.name] = self.value_of[node]
            return self.value_of[node]
        if not is_tensor(node) or len(value.shape) == len(shape(node)):
            return value
        flat = self._reshape(value, f"{value.name}/shaped", shape(node))
        self.value_of[node] = self.laid_out[value.name] = flat
        return flat
