"""A picture of a benchmark: bars of the median latency, as SVG or PNG.

Both are drawn from the same rectangles and texts. SVG is written as it is; PNG is drawn with
Pillow, which reads images here anyway: no plotting library is needed for a few bars.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from sqakd_deploy.bench.measure import BenchReport
from sqakd_deploy.bench.process import FP32
from sqakd_deploy.bench.report import milliseconds, row_name
from sqakd_deploy.errors import SpecError
from sqakd_deploy.files import replacing
from sqakd_deploy.words import counted

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _LINE = 760, 230, 130, 22, 8, 23  # pixels
_COLORS = {FP32: "#9aa5b1"}
_MODEL_COLOR, _INK, _PAPER = "#1f77b4", "#1b1f24", "#ffffff"
_FONT_SIZE = 13  # pixels


@dataclass(frozen=True)
class _Bar:
    """A bar with its name before it and its figure behind it; places in pixels."""

    top: int
    length: float
    color: str
    name: str
    figure: str


def check_picture(path: Path) -> None:
    """Refuse, before anything is measured, what cannot be drawn.

    Raises:
        SpecError: if the suffix is neither ``.svg`` nor ``.png``, or the folder does not exist.
    """
    if path.suffix not in _FORMATS:
        raise SpecError(f"plot: wanted a name that ends in .svg or .png, got {path.name!r}")
    if not path.parent.is_dir():
        raise SpecError(f"plot: the folder {path.parent} does not exist")


def draw(
    report: BenchReport, path: Path, *, label: str | None = None, note: str | None = None
) -> None:
    """Draw the median latency of every row.

    Args:
        report: what was measured.
        path: ends in ``.svg`` or ``.png``; written whole or not at all.
        label: what the file's bits are called; None takes the report's.
        note: a line to stand below the title.

    Raises:
        SpecError: as :func:`check_picture`, or if the file cannot be written.
    """
    check_picture(path)
    title = f"{report.path.name}, batch {report.shape[0]}: median latency"
    lines = [title, *([note] if note else [])]
    bars = _bars(report, label, (len(lines) + 1) * _LINE)
    content = _FORMATS[path.suffix](lines, bars)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise SpecError(f"plot: cannot write {path}: {error.strerror}") from error


def _bars(report: BenchReport, label: str | None, top: int) -> list[_Bar]:
    longest = max(row.median for row in report.rows)
    room = _WIDTH - _LEFT - _RIGHT
    bars, group = [], None
    for row in report.rows:
        if group not in (None, (row.runtime, row.threads)):
            top += _GAP
        group = (row.runtime, row.threads)
        baseline = report.baseline(row)
        figure = milliseconds(row.median)
        if baseline is not None and row.kind != FP32:
            figure += f" ({row.faster_than(baseline):.2f}×)"
        threads = counted(row.threads, "thread")
        bars.append(
            _Bar(
                top=top,
                length=room * row.median / longest,
                color=_COLORS.get(row.kind, _MODEL_COLOR),
                name=f"{row.runtime}, {threads}, {row_name(report, row, label)}",
                figure=figure,
            )
        )
        top += _BAR + _GAP // 2
    return bars


def _height(bars: list[_Bar]) -> int:
    return bars[-1].top + _BAR + _GAP


def _svg(lines: list[str], bars: list[_Bar]) -> bytes:
    def text(x: float, y: float, words: str, anchor: str) -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(words)}</text>'

    height = _height(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="{_FONT_SIZE}" fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="{_PAPER}"/>',
        *(text(_GAP, (i + 1) * _LINE, line, "start") for i, line in enumerate(lines)),
    ]
    for bar in bars:
        middle = bar.top + _BAR / 2 + _FONT_SIZE / 3
        parts += [
            f'<rect x="{_LEFT}" y="{bar.top}" width="{bar.length:.1f}" height="{_BAR}" '
            f'fill="{bar.color}"/>',
            text(_LEFT - _GAP, middle, bar.name, "end"),
            text(_LEFT + bar.length + _GAP, middle, bar.figure, "start"),
        ]
    return "\n".join([*parts, "</svg>\n"]).encode("utf-8")


def _png(lines: list[str], bars: list[_Bar]) -> bytes:
    image = Image.new("RGB", (_WIDTH, _height(bars)), _PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT_SIZE)
    for i, line in enumerate(lines):
        pen.text((_GAP, (i + 1) * _LINE), line, _INK, font, anchor="ls")
    for bar in bars:
        middle = bar.top + _BAR / 2
        pen.rectangle((_LEFT, bar.top, _LEFT + bar.length, bar.top + _BAR), bar.color)
        pen.text((_LEFT - _GAP, middle), bar.name, _INK, font, anchor="rm")
        figure = bar.figure.replace("×", "x")  # which Pillow's own font does not have
        pen.text((_LEFT + bar.length + _GAP, middle), figure, _INK, font, anchor="lm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


_FORMATS = {".svg": _svg, ".png": _png}
