"""What an exported file is fed: preprocessed floats, or the raw pixels of an image.

A file for raw pixels takes uint8 and prepares them itself. Both forms are exact, so that it gives
the bits of the file that takes floats:

- *folded*: where the student's input quantizer maps every pixel value to itself but for a shift,
  the pixels are the codes, and the shift is their zero-point. Padding of the first layer, real
  zero, is then the pixel that stands for zero.
- *nodes*: elsewhere ``(pixel / 255 − mean) / std`` is written as three float nodes in front of the
  quantizer, the very operations that training used. A scale cannot take their place: codes are
  rounded on the student's grid, which is not the grid of the pixels, and where ``−mean / std`` is
  off the grid no pixel stands for padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.errors import ExportError, SpecError
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.graph import Grid, IntegerGraph, Node, Normalize, Quantize, Transpose, Value

PREPROCESSING_KEY = "sqakd.preprocessing"
INPUT_KEY = "sqakd.input"
PIXELS = Grid(np.float32(1), 0, 0, 255)
"""Raw pixels as integers that stand for themselves."""

_FORMS = {
    "caller": "float32: the caller prepares images as the file's metadata says",
    "folded": "uint8: pixels are the codes of the first layer's input, normalisation costs nothing",
    "nodes": "uint8: normalisation stays as float nodes before the first layer, because the "
    "codes of its input are no shifted pixels",
}
_OFF = 0.01  # of a pixel: far above float32 noise, far below what another preprocessing gives


def fed_as(graph: IntegerGraph, options: ExportOptions) -> tuple[IntegerGraph, str]:
    """Give a graph the input that is asked for, and say in its metadata what that is.

    Args:
        graph: with a float input; for pixels its metadata hold the preprocessing.
        options: the input's kind, layout, name and batch.

    Returns:
        The graph, and a line that says how images are normalised and why so.

    Raises:
        SpecError: if pixels are asked for and the preprocessing is unknown or does not fit.
    """
    form = "caller"
    if options.input_type == "uint8":
        preprocessing = preprocessing_in(graph.metadata)
        _check_fits(graph, preprocessing)
        shifted = _folded(graph, preprocessing)
        form = "nodes" if shifted is None else "folded"
        graph = shifted or _with_nodes(graph, preprocessing)
        graph = _channels_last(graph) if options.input_layout == "nhwc" else graph
    facts = {
        "name": options.input_name,
        "type": options.input_type,
        "layout": options.input_layout.upper(),
        "batch": options.batch,
        "range": [0, 255] if options.input_type == "uint8" else None,
        "normalisation": form,
    }
    metadata = {**graph.metadata, INPUT_KEY: json.dumps(facts, separators=(",", ":"))}
    return replace(graph, metadata=metadata), _FORMS[form]


def preprocessing_in(metadata: Mapping[str, str]) -> Preprocessing:
    """The preprocessing that travels with a graph or file.

    Raises:
        SpecError: if there is none, or it is malformed.
    """
    if PREPROCESSING_KEY not in metadata:
        raise SpecError(
            f"uint8 input: wanted the preprocessing under {PREPROCESSING_KEY!r} in the metadata, "
            "got none; pass metadata={'sqakd.preprocessing': preprocessing.model_dump_json()}"
        )
    try:
        values = json.loads(metadata[PREPROCESSING_KEY])
    except ValueError as error:
        raise SpecError(f"metadata {PREPROCESSING_KEY!r}: wanted JSON, got {error}") from error
    return Preprocessing.parse(values, PREPROCESSING_KEY)


def to_pixels(images: NDArray[Any], metadata: Mapping[str, str]) -> NDArray[np.uint8]:
    """The raw pixels that preprocessed images were made of.

    Args:
        images: preprocessed floats ``(N, C, H, W)``, or raw uint8, which stay what they are.
        metadata: of the file that wants pixels.

    Returns:
        uint8 ``(N, C, H, W)``, or ``(N, H, W, C)`` where the file wants channels last.

    Raises:
        SpecError: if the metadata do not say how images are prepared.
        ExportError: if the floats are no prepared pixels.
    """
    if images.dtype != np.uint8:
        images = _undone(images, preprocessing_in(metadata))
    facts = json.loads(metadata.get(INPUT_KEY, "{}"))
    pixels: NDArray[np.uint8] = images
    return pixels.transpose(0, 2, 3, 1) if facts.get("layout") == "NHWC" else pixels


def _undone(images: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    mean, std = (np.array(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    if images.ndim != 4 or images.shape[1] != len(mean):
        raise ExportError(f"wanted images (N, {len(mean)}, H, W), got {list(images.shape)}")
    real = (images * std + mean) * 255.0
    pixels = np.clip(np.rint(real), 0, 255)
    off = np.abs(real - pixels).max(initial=0.0)
    if not off <= _OFF:
        raise ExportError(
            "the file takes raw pixels, and these images are not pixels prepared as it says "
            f"(one is {off:.3g} from the nearest pixel value); give uint8 images"
        )
    return pixels.astype(np.uint8)


def _check_fits(graph: IntegerGraph, preprocessing: Preprocessing) -> None:
    wanted, stated = graph.values[graph.input].shape[1:], preprocessing
    got = (stated.channels, *stated.input_size)
    if wanted != got:
        raise SpecError(
            f"uint8 input: the student takes images {wanted}, the preprocessing gives {got}"
        )


def _folded(graph: IntegerGraph, preprocessing: Preprocessing) -> IntegerGraph | None:
    """The graph with pixels as codes; None where they are not, or someone reads the floats."""
    readers = [node for node in graph.nodes if graph.input in node.inputs]
    quantizer = readers[0] if len(readers) == 1 else None
    if not isinstance(quantizer, Quantize) or quantizer.output == graph.output:
        return None
    grid = graph.values[quantizer.output].grid
    zero = None if grid is None else pixel_of_zero(quantizer.step, grid, preprocessing)
    if grid is None or zero is None:
        return None
    nodes = tuple(node for node in graph.nodes if node is not quantizer)
    values = {name: value for name, value in graph.values.items() if name != quantizer.output}
    values[graph.input] = replace(values[graph.input], grid=Grid(grid.scale, zero, 0, 255))
    return replace(graph, nodes=_redirected(nodes, quantizer.output, graph.input), values=values)


def pixel_of_zero(step: np.float32, grid: Grid, preprocessing: Preprocessing) -> int | None:
    """The pixel that stands for real zero, where every code is a pixel but for a shift.

    Args:
        step: of the first quantizer.
        grid: of its codes.
        preprocessing: of the images.
    """
    pixels = np.arange(256, dtype=np.float32)
    mean, std = (np.array(v, np.float32)[:, None] for v in (preprocessing.mean, preprocessing.std))
    real = (pixels / np.float32(255) - mean) / std
    codes = np.clip(np.rint(real / step) + grid.zero_point, grid.qmin, grid.qmax)
    zeros = np.unique(pixels - (codes - grid.zero_point))
    return int(zeros[0]) if len(zeros) == 1 and 0 <= zeros[0] <= 255 else None


def _with_nodes(graph: IntegerGraph, preprocessing: Preprocessing) -> IntegerGraph:
    source = graph.values[graph.input]
    made = Value(f"{graph.input}/normalised", source.shape)
    mean, std = (np.array(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    node = Normalize("normalise", (graph.input,), made.name, mean, std)
    values = {**graph.values, made.name: made, graph.input: replace(source, grid=PIXELS)}
    nodes = (node, *_redirected(graph.nodes, graph.input, made.name))
    output = made.name if graph.output == graph.input else graph.output
    return replace(graph, nodes=nodes, values=values, output=output)


def _channels_last(graph: IntegerGraph) -> IntegerGraph:
    source = graph.values[graph.input]
    made = replace(source, name=f"{graph.input}/nchw")
    count, channels, height, width = source.shape
    values = {
        **graph.values,
        made.name: made,
        graph.input: replace(source, shape=(count, height, width, channels)),
    }
    node = Transpose("to_nchw", (graph.input,), made.name, (0, 3, 1, 2))
    nodes = (node, *_redirected(graph.nodes, graph.input, made.name))
    return replace(graph, nodes=nodes, values=values)


def _redirected(nodes: tuple[Node, ...], old: str, new: str) -> tuple[Node, ...]:
    """The nodes, reading ``new`` where they read ``old``."""
    return tuple(
        replace(node, inputs=tuple(new if name == old else name for name in node.inputs))
        for node in nodes
    )
