"""Where quantizers go: decided on the traced graph, before training, by the target's rules.

Vocabulary: an *edge* is a tensor that a runtime has to materialise: the graph's input, or the end
of a chain such as ``conv → batchnorm → relu`` that it fuses. Its *readers* are the layers that
compute with it, seen through operators that only move data. Each reader needs a bit-width:

=========================================  =====================================================
reader                                     bits
=========================================  =====================================================
first and last convolution or linear       ``first_last_bits``
other convolutions and linears             ``activations.bits``
add, product, concat, pool, batchnorm alone ``residual_bits``
products of two activations (attention)    ``residual_bits``
operators in float                         ``residual_bits``
the model's output                         ``output_bits``
a layer in ``layer_bits``                  what stands there
a layer in ``exclude``                     none
=========================================  =====================================================

An edge is quantised once, right where it arises, at the most that any reader needs; a reader that
needs less requantises what it reads (runtime-rule: the 8-bit residual stream stays whole for the
add, and convolutions see ``b`` bits of it). Targets that add inside a convolution's kernel
(``fuse_sums``) read that convolution's own output unrounded. Linear layers too small for a target's
integer kernels stay in float, as if they were excluded. What a concatenation alone reads is rounded
behind it, once, on one grid: exporters round each part on that grid, which is the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ModelError, SpecError
from sqakd_deploy.exporting import PAPER_PLACEMENT, PlacementRules
from sqakd_deploy.lowering.meaning import Identity, Op, Scalar
from sqakd_deploy.lowering.ops import read
from sqakd_deploy.lowering.signs import POOLS, limit, signed
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import QuantSpec, parse_bits
from sqakd_deploy.tracing.shapes import noted_shape
from sqakd_deploy.tracing.trace import (
    describe,
    layer_name,
    reads,
    shape,
    tensor_inputs,
)

LAYERS = (ir.Conv, ir.Linear)
_JOINS = (ir.Add, ir.Mul, ir.Concat, ir.ChannelAffine, ir.Clip, *POOLS)


@dataclass(frozen=True)
class Placed:
    """A quantizer to insert.

    Attributes:
        after: the node whose tensor it quantises.
        readers: the nodes that read the quantised tensor instead; None is all of them.
        bits: its bit-width.
        signed: the tensor takes negative values.
        limit: largest value of the tensor, where an activation bounds it.
    """

    after: fx.Node
    readers: tuple[fx.Node, ...] | None
    bits: int
    signed: bool
    limit: float | None = None


@dataclass(frozen=True)
class Placement:
    """A plan for one model.

    Attributes:
        layers: weight bits of each convolution and linear, by module path.
        activations: the activation quantizers.
    """

    layers: dict[str, int]
    activations: tuple[Placed, ...]


def place(
    traced: fx.GraphModule, spec: QuantSpec, rules: PlacementRules | None = None
) -> Placement:
    """Plan the quantizers of a traced model.

    Args:
        traced: from :func:`~sqakd_deploy.tracing.trace.trace`.
        spec: bit-widths and exclusions.
        rules: the target's; ``spec.placement == "paper"`` overrides them.

    Raises:
        ModelError: if an operator has no integer counterpart, naming it.
        SpecError: if a pattern matches nothing.
    """
    if spec.placement == "paper":
        rules = PAPER_PLACEMENT
    return _Planner(traced, spec, rules or PlacementRules()).plan()


class _Planner:
    def __init__(self, traced: fx.GraphModule, spec: QuantSpec, rules: PlacementRules) -> None:
        self.traced = traced
        self.graph = traced.graph
        self.spec = spec
        self.rules = rules
        self.excluded = _excluded(self.graph, spec.exclude)
        self.ops = {
            node: self._meaning(node) for node in self.graph.nodes if node.op.startswith("call")
        }
        self.ends = self._chain_ends()
        self.starts = {end: start for start, end in self.ends.items()}
        self.end_layers = self._first_and_last()
        self.bits = self._layer_bits()
        self.unrounded = set(self._joined())
        if self.rules.fuse_sums:
            self.unrounded |= set(self._fused_sums())

    def plan(self) -> Placement:
        edges = self._edges() if self.rules.quantize_edges else self._layer_inputs()
        layers = {str(node.target): weight for node, (weight, _) in self.bits.items()}
        return Placement(layers, tuple(edges))

    # -- reading the graph -------------------------------------------------------------------

    def _meaning(self, node: fx.Node) -> Op:
        op = read(node)
        if op is None:
            name = layer_name(node)
            if node in self.excluded:
                return Op(ir.Node)
            raise ModelError(
                f"{describe(node)} cannot be quantised: no integer form of it is known. "
                "Replace it in the model by operators that have one. Excluded "
                f"(--exclude '{name}'), the student is trained with it in float, and no file can "
                "be written of it."
            )
        return op

    def _is(self, node: fx.Node, *kinds: type[ir.Node]) -> bool:
        return node in self.ops and issubclass(self.ops[node].kind, kinds)

    def _chain_ends(self) -> dict[fx.Node, fx.Node]:
        """The last node of the fused chain that starts at each computing node."""
        ends = {}
        absorbed: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in absorbed or node not in self.ops:
                continue
            if self.ops[node].passes_through or self._is(node, Scalar):
                continue
            end = node
            while (follower := self._absorbs(node, end)) is not None:
                absorbed.add(follower)
                end = follower
            ends[node] = end
        return ends

    def _absorbs(self, start: fx.Node, end: fx.Node) -> fx.Node | None:
        """The next node of a chain: BatchNorm right after a layer, then one activation."""
        if len(end.users) != 1 or self._is(end, ir.Clip):
            return None
        follower = next(iter(end.users))
        if self._is(follower, ir.ChannelAffine):
            folds = end is start and follower.op == "call_module" and self._ends_in_channels(start)
            return follower if folds else None
        return follower if self._is(follower, ir.Clip) else None

    def _ends_in_channels(self, layer: fx.Node) -> bool:
        """Whether the axis that a BatchNorm behind it scales is that of its outputs."""
        return self._is(layer, ir.Conv) or (self._is(layer, ir.Linear) and len(shape(layer)) == 2)

    def _readers(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Pairs (tensor read, node that computes with it), seen through data movement."""
        for user in node.users:
            if user in self.ops and self.ops[user].passes_through:
                yield from self._readers(user)
            elif not self._is(user, Scalar):
                yield node, user

    def _sources(self) -> list[fx.Node]:
        inputs = [n for n in self.graph.nodes if n.op == "placeholder" and n.users]
        return inputs + list(dict.fromkeys(self.ends.values()))

    def _first_and_last(self) -> set[str]:
        """Paths of the layers that read the input, or whose chain is the output."""
        names = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                names |= {str(r.target) for _, r in self._readers(node) if self._is(r, *LAYERS)}
            elif self._is(node, *LAYERS) and self._reaches_output(self.ends[node]):
                names.add(str(node.target))
        return names

    def _reaches_output(self, end: fx.Node) -> bool:
        """Whether nothing but pooling and data movement lies between a tensor and the output."""
        return any(
            reader.op == "output"
            or (self._is(reader, *POOLS) and self._reaches_output(self.ends[reader]))
            for _, reader in self._readers(end)
        )

    # -- bits --------------------------------------------------------------------------------

    def _is_float(self, node: fx.Node) -> bool:
        ends_in_float = not self.rules.quantize_first_last and str(node.target) in self.end_layers
        return node in self.excluded or ends_in_float or self._is_too_small(node)

    def _is_too_small(self, node: fx.Node) -> bool:
        if not self._is(node, ir.Linear):
            return False
        layer: Any = self.traced.get_submodule(str(node.target))
        return min(layer.weight.shape) < self.rules.smallest_matmul

    def _layer_bits(self) -> dict[fx.Node, tuple[int, int]]:
        """Bits of weights and inputs of each convolution and linear that is not in float."""
        spec = self.spec
        inner, ends = (spec.weights.bits, spec.activations.bits), 2 * (spec.first_last_bits,)
        layers = [n for n in self.graph.nodes if self._is(n, *LAYERS) and not self._is_float(n)]
        bits = {node: ends if str(node.target) in self.end_layers else inner for node in layers}
        for pattern, text in spec.layer_bits.items():
            matched = [node for node in layers if fnmatchcase(layer_name(node), pattern)]
            if not matched:
                names = ", ".join(layer_name(node) for node in layers)
                raise SpecError(
                    f"layer_bits: {pattern!r} matches no quantised convolution or linear layer. "
                    f"There are: {names}"
                )
            bits |= dict.fromkeys(matched, parse_bits(text))
        odd = METHODS[spec.weights.method].weight.mid_rise
        return {
            node: (self.rules.end_bits(weight, odd=odd), read)
            if str(node.target) in self.end_layers
            else (weight, read)
            for node, (weight, read) in bits.items()
        }

    def _bits(self, reader: fx.Node) -> int | None:
        """Bits that a reader needs; None where it reads floats."""
        if reader.op == "output":
            return self.spec.output_bits if self.rules.quantize_output else None
        if self._is(reader, *LAYERS):
            return self.bits[reader][1] if reader in self.bits else None
        return self.spec.residual_bits if self._is(reader, *_JOINS, ir.FloatNode) else None

    # -- quantizers --------------------------------------------------------------------------

    def _joined(self) -> Iterator[fx.Node]:
        """Ends that a concatenation alone reads, where that is so of all its inputs.

        Not where it takes a ReLU's output together with negative values: no runtime fuses a ReLU
        with a grid whose zero-point is not its lowest code (rule 2). Nor an input that comes twice,
        nor a concatenation.
        """
        for node in self.graph.nodes:
            if not self._is(node, ir.Concat):
                continue
            parts = reads(node)
            alone = len(parts) == len(set(parts)) and all(
                list(part.users) == [node] and not self._is(self.starts.get(part, node), ir.Concat)
                for part in parts
            )
            mixed = signed(self.ops, node) and any(self._is(part, ir.Clip) for part in parts)
            quantised = any(self._bits(reader) for _, reader in self._readers(node))
            if alone and quantised and not mixed:
                yield from parts

    def _fused_sums(self) -> Iterator[fx.Node]:
        """Ends of the convolutions that an Add alone reads, one an Add: it runs in their kernel.

        Where both inputs are such, the later one is taken: its kernel runs when the other's
        output is there. Dropout and the like, which do nothing here, are looked through.
        """
        kinds = (ir.Conv, ir.ChannelAffine) if self.rules.fuse_scaled else (ir.Conv,)
        layers = {end: start for start, end in self.ends.items() if self._is(start, *kinds)}
        for node in self.graph.nodes:
            if self._is(node, ir.Add) and len(node.all_input_nodes) == 2:
                read = [self._unwrapped(source) for source in node.all_input_nodes]
                if len({noted_shape(source) for source in read}) > 1:
                    continue  # no kernel repeats a pixel
                ends = [
                    end
                    for end, start in layers.items()
                    if end in read
                    and len(end.users) == 1
                    and not self._is(end, ir.Clip)
                    and not self._is_float(start)
                ]
                yield from ends[-1:]

    def _unwrapped(self, node: fx.Node) -> fx.Node:
        """The tensor that a node, if it does nothing, is the only reader of."""
        while self._is(node, Identity) and len(node.users) == 1:
            (node,) = node.all_input_nodes
        return node

    def _edges(self) -> Iterator[Placed]:
        for edge in self._sources():
            if edge in self.unrounded:
                continue
            needs = [
                (read_from, reader, self._bits(reader)) for read_from, reader in self._readers(edge)
            ]
            primary = max((bits for *_, bits in needs if bits is not None), default=None)
            if primary is None or self._stays_in_float(edge):
                continue
            yield Placed(edge, None, primary, signed(self.ops, edge), limit(self.ops, edge))
            narrower: dict[tuple[fx.Node, int], list[fx.Node]] = defaultdict(list)
            for read_from, reader, bits in needs:
                if bits is not None and bits < primary:
                    narrower[read_from, bits].append(reader)
            for (read_from, bits), readers in narrower.items():
                yield Placed(
                    read_from, tuple(readers), bits, signed(self.ops, edge), limit(self.ops, edge)
                )

    def _stays_in_float(self, edge: fx.Node) -> bool:
        """Between two operators in float nothing is gained by a quantizer, and accuracy lost."""
        made = self._is(self.starts.get(edge, edge), ir.FloatNode)
        return made and all(self._reads_floats(reader) for _, reader in self._readers(edge))

    def _reads_floats(self, reader: fx.Node) -> bool:
        """A product of activations reads codes where the target multiplies them; it gives reals."""
        by_code = self.rules.integer_products and self._is(reader, ir.MatMul)
        return self._is(reader, ir.FloatNode) and not by_code

    def _layer_inputs(self) -> Iterator[Placed]:
        readers: dict[tuple[fx.Node, int], list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            bits = self._bits(node) if self._is(node, *LAYERS) else None
            if bits is not None:
                readers[tensor_inputs(node)[0], bits].append(node)
        for (tensor, bits), nodes in readers.items():
            yield Placed(
                tensor, tuple(nodes), bits, signed(self.ops, tensor), limit(self.ops, tensor)
            )


def _excluded(graph: fx.Graph, patterns: tuple[str, ...]) -> set[fx.Node]:
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    excluded = set()
    for pattern in patterns:
        matched = {node for node in calls if fnmatchcase(layer_name(node), pattern)}
        if not matched:
            names = ", ".join(layer_name(n) for n in calls if n.op == "call_module")
            raise SpecError(f"exclude: {pattern!r} matches no layer. There are: {names}")
        excluded |= matched
    return excluded
