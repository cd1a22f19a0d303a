"""A student trained for one target, exported for another: what would change, and whether it may.

Quantizers are placed by the target's rules before training. A file for another target computes what
the student computes, but not in the form that this target would have trained for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import SpecError
from sqakd_deploy.exporting import Exporter, PlacementRules, ProfileExporter
from sqakd_deploy.graph import IntegerGraph

TARGET_KEY = "sqakd.target"
"""Metadata: the target that a file was written for, where the student was trained for another."""


def check_target(graph: IntegerGraph, trained: Exporter, wanted: Exporter, *, anyway: bool) -> None:
    """Refuse another target where its rules would have placed quantizers otherwise.

    Args:
        graph: the student's integers.
        trained: the target that it was trained for.
        wanted: the target that it is to be exported for.
        anyway: allow it.

    Raises:
        SpecError: unless told, with what would change.
    """
    found = changes(graph, trained.placement, wanted.placement)
    if found and not anyway:
        or_else = (
            "; --anyway would not help, since its rules refuse such codes"
            if _breaks_rules(graph, wanted)
            else ", or export it as it is with --anyway"
        )
        raise SpecError(
            f"the student was trained for target {trained.name!r}. Trained for {wanted.name!r}, "
            f"{'; '.join(found)}. Train with --target {wanted.name}{or_else}"
        )


def _breaks_rules(graph: IntegerGraph, wanted: Exporter) -> bool:
    """Whether a target that refuses what breaks its rules wants other codes than a student has."""
    if not isinstance(wanted, ProfileExporter) or not wanted.placement.symmetric:
        return False
    grids = [v.grid for v in graph.values.values() if v.grid is not None]
    return any(grid.zero_point != 0 or grid.qmax > 127 for grid in grids)


def changes(graph: IntegerGraph, trained: PlacementRules, wanted: PlacementRules) -> list[str]:
    """What another target's rules would change in a student, a line each; empty if nothing.

    Args:
        graph: the student's integers.
        trained: the rules that it was placed by.
        wanted: the other target's rules.
    """
    return [*_grids(graph, trained, wanted), *_places(graph, trained, wanted)]


def _grids(graph: IntegerGraph, trained: PlacementRules, wanted: PlacementRules) -> Iterator[str]:
    grids = [v.grid for v in graph.values.values() if v.grid is not None]
    if wanted.symmetric and not trained.symmetric:
        moved = sum(grid.zero_point != 0 for grid in grids)
        wide = sum(grid.qmax > 127 for grid in grids)
        if moved or wide:
            yield (
                f"{moved} of {len(grids)} quantised tensors would have zero-point 0, and {wide} "
                "no codes beyond int8"
            )
    if trained.symmetric and not wanted.symmetric:
        signed = sum(grid.qmin < 0 for grid in grids)
        halved = sum((grid.qmin, grid.qmax) == (0, 127) for grid in grids)
        if signed or halved:
            yield (
                f"{signed} of {len(grids)} quantised tensors would learn a zero-point, and "
                f"{halved} would have 255 steps instead of 127"
            )


def _places(graph: IntegerGraph, trained: PlacementRules, wanted: PlacementRules) -> Iterator[str]:
    if trained.fuse_sums != wanted.fuse_sums:
        count = sum(
            isinstance(node, ir.Add) and _adds_convolution(node, graph, rounded=wanted.fuse_sums)
            for node in graph.nodes
        )
        how = "unrounded" if wanted.fuse_sums else "rounded"
        if count:
            yield f"{count} sums would take a convolution's output {how}"
    if trained.quantize_output != wanted.quantize_output:
        on_grid = graph.values[graph.output].grid is not None
        if on_grid != wanted.quantize_output:
            yield f"the output would be {'quantised' if wanted.quantize_output else 'in float'}"
    if trained.smallest_matmul != wanted.smallest_matmul:
        yield from _small_layers(graph, trained.smallest_matmul, wanted.smallest_matmul)
    products = sum(isinstance(node, ir.MatMul) for node in graph.nodes)
    if trained.integer_products != wanted.integer_products and products:
        how = "codes" if wanted.integer_products else "reals"
        yield f"{products} products of activations would multiply {how}"
    yield from _wide_ends(graph, trained.widest_ends, wanted.widest_ends)
    for name, what in (
        ("quantize_edges", "tensors between layers"),
        ("quantize_first_last", "first and last layers"),
    ):
        if getattr(trained, name) != getattr(wanted, name):
            yield f"{what} would be {'quantised' if getattr(wanted, name) else 'in float'}"


def _wide_ends(graph: IntegerGraph, trained: int, wanted: int) -> Iterator[str]:
    """Of the first and last layers; a BatchNorm that stands alone is only written as one."""
    layers = [node for node in graph.nodes if isinstance(node, (ir.Conv, ir.Linear))]
    weights = [node.weight for node in layers if not _is_factor(node)]
    ends = [w for w in (weights[:1] + weights[-1:]) if isinstance(w, ir.IntWeight)]
    if trained > wanted and any(w.bits + w.mid_rise > wanted for w in ends):
        yield f"the first and last layers' weights would have {wanted} bits at most"


def _is_factor(node: ir.Conv | ir.Linear) -> bool:
    weight = node.weight.codes if isinstance(node.weight, ir.IntWeight) else node.weight
    return isinstance(node, ir.Conv) and node.groups > 1 and weight[0].size == 1


def _adds_convolution(node: ir.Add, graph: IntegerGraph, *, rounded: bool) -> bool:
    """Whether a sum takes the output of a convolution that it alone reads, rounded or not."""
    producers = {made.output: made for made in graph.nodes}
    readers = Counter(name for reader in graph.nodes for name in reader.inputs)
    for name in node.inputs:
        source = producers.get(name)
        if rounded and isinstance(source, ir.Quantize) and readers[name] == 1:
            source = producers.get(source.inputs[0])
            if isinstance(source, ir.Conv):
                return True
        elif not rounded and isinstance(source, ir.Conv):
            return True
    return False


def _small_layers(graph: IntegerGraph, trained: int, wanted: int) -> Iterator[str]:
    low, high = sorted((trained, wanted))
    layers = [node for node in graph.nodes if isinstance(node, ir.Linear)]
    shapes = [
        node.weight.codes.shape if isinstance(node.weight, ir.IntWeight) else node.weight.shape
        for node in layers
    ]
    count = sum(low <= min(shape) < high for shape in shapes)
    if count:
        how = "in float" if wanted > trained else "quantised"
        yield f"{count} linear layers with fewer than {high} inputs or outputs would be {how}"
