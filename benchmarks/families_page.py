"""The page that benchmarks/families.py writes of what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIZE, CLASSES = 224, 10  # pixels of a photograph's side, centres
SMALL, TAUGHT_BATCH = 64, 64  # pixels, images

ANSWERS = (
    "| model | bits | steps taught | images (fitted on) | answers | spread | close | "
    "agreement on | error on: max, mean | agreement off | error off: max, mean | "
    "agreement simulated | error simulated: max, mean |"
)
LAYERS = (
    "| model | bits | images | tensors | codes | differ off | differ on | by at most | "
    "outside off | outside on |"
)
COVERED = "| model | in integers | in float |"


def ruled(head: str) -> list[str]:
    """A table's head and the line under it."""
    return [head, "|---" + "|---:" * (head.count("|") - 2) + "|"]


def answer_row(row: dict[str, Any]) -> str:
    """Logits."""
    ways = (row["stages"]["on"], row["stages"]["off"], row["simulated"])
    figures = (f"{w['agreement']:.1f} | {w['max']:.1f}, {w['mean']:.2f}" for w in ways)
    return (
        f"| {row['model']} | {row['bits']} | {row['taught']} | "
        f"{row['images']} ({row['fitted_on']}) | {row['distinct']} of {CLASSES} | "
        f"{row['std_steps']:.1f} | {100 * row['close']:.1f} % | "
        f"{' | '.join(figures)} |"
    )


def layer_row(row: dict[str, Any]) -> str:
    """Codes."""
    off, on = row["isolated"]["off"], row["isolated"]["on"]
    unseen = len(set(off["unseen"]) | set(on["unseen"]))
    tensors = f"{off['tensors']}" + (f" ({unseen} unseen)" if unseen else "")
    shares = (f"{1e6 * s['differing'] / s['codes']:.1f}" for s in (off, on))
    return (
        f"| {row['model']} | {row['bits']} | {off['images']} | {tensors} | "
        f"{off['codes'] / 1e6:.1f} M | "
        + " | ".join(shares)
        + f" | {max(off['largest'], on['largest'])} | {off['outside']:.1e} | {on['outside']:.1e} |"
    )


def covered_row(row: dict[str, Any]) -> str:
    """Operators."""
    counts = ", ".join(
        f"{row['integer'].get(op, 0)} of {total} {op}" for op, total in sorted(row["total"].items())
    )
    left = sum(item["count"] for item in row["float"])
    return f"| {row['model']} W{row['bits']}A{row['bits']} | {counts} | {left or '–'} |"


def float_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What stays in float, and why."""
    return [
        f"- {row['model']}: {item['count']} {item['op']}: {item['reason']}"
        for row in rows
        for item in row["float"]
    ]


def page(result: dict[str, Any], order: list[str]) -> str:
    """The page."""
    rows = sorted(result["rows"].values(), key=lambda r: (-r["bits"], order.index(r["model"])))
    other = len({(bool(row["taught"]), row["images"]) for row in rows}) > 1
    exceptions = "; without `--teach`, and with `--samples`, where steps and images say so"
    narrow = [row for row in rows if row["bits"] == min(r["bits"] for r in rows)]
    lines = [
        "# Every family at full size",
        "",
        f"{len({row['model'] for row in rows})} of torchvision's families at 3×{SIZE}×{SIZE} on "
        f"ImageNet photographs, placed for ONNX Runtime ({result['versions']}, one thread): "
        "`python benchmarks/families.py --images photos/ --teach cifar10-jpeg/ --fit 64 "
        "--json docs/families.json`, then "
        f"`--report docs/families.md`{exceptions if other else ''}.",
        "",
        TEXT_STUDENTS,
        "",
        "## Answers",
        "",
        TEXT_ANSWERS,
        *_plain(rows),
        "",
        *ruled(ANSWERS),
        *map(answer_row, rows),
        "",
        "## Every layer on the runtime's own codes",
        "",
        TEXT_LAYERS,
        "",
        *ruled(LAYERS),
        *map(layer_row, rows),
        "",
        "## What runs in integers",
        "",
        "How large the files are: [sizes.md](sizes.md).",
        "",
        *ruled(COVERED),
        *map(covered_row, narrow),
        "",
        "In float, with the reason that `export` prints (rules are those of "
        "[runtime-rules.md](runtime-rules.md)):",
        "",
        *float_lines(narrow),
    ]
    return "\n".join(lines) + "\n"


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of last layers in the directions that a network's features have by themselves."""
    names = [row["model"] for row in rows if not row.get("whitened")]
    return ["", f"Not whitened yet: {', '.join(names)}."] if names else []


TEXT_STUDENTS = f"""\
Weights are as torchvision initialises them (seed 0) and taught for so many steps of {TAUGHT_BATCH}
images of {SMALL}×{SMALL} pixels with labels, since untrained layers amplify a difference on its way
to the logits. BatchNorm's statistics are re-estimated on photographs, students calibrated as
`train --epochs 0` does, and the last layer finds the nearest of {CLASSES} centres of a k-means in
the whitened principal directions of what it reads, so that answers differ from image to image.
Nothing here says how accurate a family is."""

TEXT_ANSWERS = """\
Errors are those of logits in steps of the 8-bit output, against the student in its integers'
arithmetic (`in_integers`). *Answers*: how many different ones the student gives; *spread*: standard
deviation of a logit between images, in steps; *close*: share of images whose two largest logits are
at most a step apart, so that one code decides. *on* is the file as it is deployed; *off* the same
file without ONNX Runtime's optimisations, which sums in float32; *simulated* the student as it is
trained, which sums in float32 in PyTorch. The last two are no other functions: the next table shows
that they begin to differ in no layer. How far a network carries the rounding of float32 is its own
affair, and untaught ones carry it far."""

TEXT_LAYERS = """\
The student is run layer by layer on the codes that ONNX Runtime computed, so nothing is handed
down. *differ*: codes in a million that are not the student's; *by at most*: steps; *outside*: how
far the student's value before rounding lies outside the interval of the runtime's code, at most, in
steps. Where that is next to nothing, each code that differs stems from a value on the border of two
codes, which float32 sums put on the other side. A wrong kernel, constant or operator would move
values that lie far from any border."""
