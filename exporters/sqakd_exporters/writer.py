"""Builds an ONNX model node by node from an integer graph.

The writer knows values, constants and names; what each kind of node becomes is said by emitters
(:mod:`sqakd_exporters.qdq`). Rule numbers are those of ``docs/runtime-rules.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, product
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sqakd_deploy import __version__
from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import ExportOptions
from sqakd_exporters.packing import Packed

Array: TypeAlias = NDArray[Any]
Emitter: TypeAlias = Callable[["Writer", Any], None]
Emitters: TypeAlias = Mapping[type[g.Node], Emitter]

LEAN_CHANNELS = 8
"""From so many channels on, a node of a packed file is shorter than four bytes for each."""

_EXPAND_SIZE = 80  # bytes of an Expand and its constants in a packed file, about
_DIGITS, _LETTERS = "0123456789", "0123456789abcdefghijklmnopqrstuvwxyz"

_IR_VERSIONS = {13: 7, 15: 8, 19: 9, 21: 10, 23: 11, 24: 12, 25: 13}
"""The IR version that ONNX released with an opset; older runtimes refuse newer ones."""


class Writer:
    """Writes each node once, in order; keeps the ONNX value that holds each graph value.

    A value on a grid is held as its integers. :meth:`real` dequantises it anew for every reader: a
    DequantizeLinear with one reader is the form that every runtime's fusions know (rules 1, 8).

    Args:
        graph: the integers.
        options: names of the input and output.
        opset: of the model.
        emitters: what writes each kind of node.
        packed: codes to be written packed, by their layer's name. Where there are any, the file is
            to be small: only layers keep their names, values have numbers, equal constants are one,
            and attributes that say what ONNX takes for granted are left out. All of that would take
            a tenth of the room that small networks do.

    Attributes:
        graph: as given.
        opset: as given.
        packed: as given.
    """

    def __init__(
        self,
        graph: g.IntegerGraph,
        options: ExportOptions,
        opset: int,
        emitters: Emitters,
        packed: Mapping[str, Packed] | None = None,
    ) -> None:
        self.graph = graph
        self.packed = packed or {}
        self.opset = opset
        self._emitters = emitters
        self._output_name = options.output_name
        self._taken = {options.input_name, options.output_name}
        if self.packed:  # nn.Sequential calls its layers by numbers, too
            self._taken |= {node.name for node in graph.nodes}
        self._nodes: list[ir.Node] = []
        self._constants: dict[object, ir.Value] = {}
        self._numbers = _numbers()
        self._folded: dict[str, ir.Value] = {}
        self._readers: Counter[str] = Counter()
        self._batch = options.batch
        source = graph.values[graph.input]
        kind = ir.DataType.FLOAT if source.grid is None else ir.DataType[source.grid.dtype.upper()]
        self._input = ir.val(options.input_name, kind, _dims(source.shape, options.batch))
        self._held = {graph.input: self._input}

    def model(self) -> ir.Model:
        """Write every node and return the finished model.

        Raises:
            ExportError: if a node cannot be written, naming it.
        """
        for node in self.graph.nodes:
            emitter = self._emitters.get(type(node))
            if emitter is None:
                kind = type(node).__name__
                raise ExportError(f"node {node.name!r}: {kind} has no form in this exporter")
            emitter(self, node)
        graph = ir.Graph(
            [self._input],
            [self._output()],
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports={"": self.opset},
            name=self.graph.name,
        )
        version = max(v for opset, v in _IR_VERSIONS.items() if opset <= self.opset)
        model = ir.Model(
            graph, ir_version=version, producer_name="sqakd-deploy", producer_version=__version__
        )
        model.metadata_props.update(self.graph.metadata)
        return model

    def _output(self) -> ir.Value:
        """The graph's output in float, under the name asked for."""
        value = self.graph.values[self.graph.output]
        if value.name not in self._held:
            raise ExportError(f"no node writes the graph's output {value.name!r}")
        output = self._real(value.name)
        if output is self._input:
            output = self.op("Identity", [output], value.name)
        output.name = self._output_name
        output.shape = ir.Shape(_dims(value.shape, self._batch))
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return output

    # -- values ------------------------------------------------------------------------------

    def held(self, node: g.Node, position: int = 0) -> ir.Value:
        """What holds an input of a node: integers if it is on a grid, else floats."""
        self._check_written(node, node.inputs[position])
        return self._held[node.inputs[position]]

    def held_value(self, name: str) -> ir.Value:
        """What holds a value of the graph by its name."""
        return self._held[name]

    def grid(self, node: g.Node) -> g.Grid | None:
        """The grid of a node's first input."""
        return self.graph.values[node.inputs[0]].grid

    def real(self, node: g.Node) -> list[ir.Value]:
        """All inputs of a node as floats, each for this reader alone."""
        for name in node.inputs:
            self._check_written(node, name)
        return [self._real(name) for name in node.inputs]

    def hold(self, node: g.Node, value: ir.Value, grid: g.Grid | None) -> None:
        """Record what holds a node's output.

        Raises:
            ExportError: if the graph puts the output on another grid than the one written.
        """
        stated = self.graph.values[node.output].grid
        if stated != grid:
            raise ExportError(
                f"node {node.name!r}: {type(node).__name__} leaves its output on {grid}, "
                f"but the graph says {stated}; only Quantize changes the grid"
            )
        self._held[node.output] = value

    def _real(self, name: str) -> ir.Value:
        value, held = self.graph.values[name], self._held[name]
        if value.grid is None:
            return held
        constants = self.grid_constants(f"{name}/dq", value.grid.scale, value.grid)
        self._readers[name] += 1
        label = f"{name}/real{self._readers[name]}"
        return self.op("DequantizeLinear", [held, *constants], label)

    def _check_written(self, node: g.Node, name: str) -> None:
        if name not in self._held:
            raise ExportError(f"node {node.name!r} reads {name!r}, which no node before it writes")

    # -- building blocks ---------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        output: str,
        name: str | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Append an ONNX node.

        Args:
            op_type: its operator.
            inputs: its inputs.
            output: what its output should be called; a number is added where that is taken.
            name: its own name; None makes one of the output and the operator.
            domain: of the operator, ONNX's own unless given.
            **attributes: ONNX attributes.

        Returns:
            The output.
        """
        free = self._free(output)
        node = ir.node(
            op_type,
            domain=domain,
            inputs=inputs,
            attributes=attributes,
            name=name or ("" if self.packed else f"{free}/{op_type}"),
            outputs=[ir.Value(name=free)],
        )
        self._nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: Array, *, shared: bool = True) -> ir.Value:
        """An initializer; a second call with a name returns the one that is there.

        In a packed file a second call with the same numbers does, unless they are not ``shared``.
        """
        by_content = self.packed and shared
        key = (array.dtype, array.shape, array.tobytes()) if by_content else name
        if key not in self._constants:
            label = self._free(name)
            tensor = ir.tensor(array, name=label)
            self._constants[key] = ir.Value(
                name=label,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self._constants[key]

    def integers(self, name: str, values: Sequence[int]) -> ir.Value:
        """An int64 initializer, for shapes and axes."""
        return self.constant(name, np.array(values, np.int64))

    def grid_constants(self, name: str, scale: np.float32, grid: g.Grid) -> list[ir.Value]:
        """Scale and zero-point, both rank 0 (rule 4), the zero-point explicit (rule 5)."""
        zero = np.array(grid.zero_point, dtype=grid.dtype)
        return [
            self.constant(f"{name}/scale", np.array(scale, np.float32)),
            self.constant(f"{name}/zero_point", zero),
        ]

    def per_channel(
        self, name: str, codes: ir.Value, scale: ir.Value, zero_point: ir.Value
    ) -> ir.Value:
        """Constant integers ``(O, …)`` with a scale and zero-point per output channel, on axis 0
        (rule 13)."""
        return self.op("DequantizeLinear", [codes, scale, zero_point], f"{name}/real", axis=0)

    def scales(self, name: str, scale: NDArray[np.float32]) -> ir.Value:
        """One scale per channel ``(O,)``; in a packed file one for all where all are equal."""
        alike = bool((scale == scale[0]).all())
        if not self.packed or not alike or 4 * len(scale) <= _EXPAND_SIZE:
            return self.constant(name, scale)
        if name not in self._folded:
            one = self.constant(name, scale[:1])
            shape = self.integers(f"shape_{len(scale)}", [len(scale)])
            self._folded[name] = self.op("Expand", [one, shape], name)
        return self._folded[name]

    def zeros(self, count: int, dtype: type[np.int8 | np.int32]) -> ir.Value:
        """Zero-points, shared by all layers of as many channels; int32 ones are four times as big,
        and in a packed file made of the others where that is shorter."""
        name = f"zeros_{np.dtype(dtype)}_{count}"
        if not self.packed or dtype == np.int8 or count < LEAN_CHANNELS:
            return self.constant(name, np.zeros(count, dtype))
        if name not in self._folded:
            narrow = self.zeros(count, np.int8)
            self._folded[name] = self.op("Cast", [narrow], name, to=ir.DataType.INT32)
        return self._folded[name]

    def _free(self, name: str) -> str:
        """The name, or the name with a number where something else has it; the next number where
        names would take too much room."""
        if self.packed:
            name = next(number for number in self._numbers if number not in self._taken)
        free, number = name, 1
        while free in self._taken:
            free, number = f"{name}_{number}", number + 1
        self._taken.add(free)
        return free


def _numbers() -> Iterator[str]:
    """``0`` to ``9``, ``00`` to ``9z`` and so on: short, and known by their first digit."""
    for length in count():
        for digit, *letters in product(_DIGITS, *[_LETTERS] * length):
            yield "".join([digit, *letters])


def _dims(shape: g.Shape, batch: int | None) -> list[int | str]:
    return [(batch or "N") if extent is None else extent for extent in shape]
