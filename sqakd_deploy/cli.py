"""The command line: parse, call one function, print.

This module imports click alone, so that ``--help`` answers at once; everything heavy is behind
:func:`_commands`.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from sqakd_deploy import __version__
from sqakd_deploy.epilogs import BENCH, EVAL, EXPORT, TEACHER, TRAIN, VERIFY
from sqakd_deploy.errors import ModelError, SqakdError
from sqakd_deploy.option_types import EXISTING, FILE
from sqakd_deploy.options import (
    COMPARED_ON,
    JSON,
    SAVE_REFERENCE,
    augmentation_option,
    data_options,
    export_options,
    model_options,
    quantization_options,
    run_options,
    setting,
    settings_of,
    tolerance_options,
    weights_option,
    work_options,
)
from sqakd_deploy.streams import take_any_text

_HEAVY = ("torch", "torchvision", "brevitas")
_WITHOUT = (
    "this needs {0}, which is not installed: pip install torch torchvision brevitas; without them "
    "bench and verify --reference work"
)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _commands(name: str = "commands") -> ModuleType:
    # Imported late: torch and Brevitas take seconds, and --help needs neither. On a machine with
    # the CUDA compiler and no GPU, the import logs a warning that concerns nobody here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Threads that spin while they wait for each other stand in the way of the one they wait for as
    # soon as another process wants a core: training was seen to run 40 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    commands = importlib.import_module(f"sqakd_deploy.{name}")
    warnings.showwarning = _warn
    return commands


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Warnings as a person reads them: one line, without the source line that raised them."""
    click.echo(f"warning: {message}", err=True)


class _Group(click.Group):
    """Turns this package's errors into one line and their exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        take_any_text()
        try:
            return super().main(*args, **kwargs)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SqakdError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if error.name not in _HEAVY:
                raise
            click.echo(f"error: {_WITHOUT.format(error.name)}", err=True)
            ctx.exit(ModelError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  sqakd-deploy train --bits 4        distil a 4-bit student, without labels
  sqakd-deploy export model.onnx     write the newest run, proven in ONNX Runtime
  sqakd-deploy list                  methods, models, datasets and targets there are
""",
)
@click.version_option(__version__, prog_name="sqakd-deploy")
def main() -> None:
    """Make a trained vision model low-bit without labels, and deploy it exactly."""


@main.command(epilog=TRAIN)
@run_options
@quantization_options
@model_options
@weights_option
@data_options
@augmentation_option
@setting(
    "distillation.loss",
    "--loss",
    type=click.Choice(["kl", "ce", "kl+ce"]),
    help="kl sees no label; the others are baselines.  [default: kl]",
)
@setting(
    "distillation.epochs",
    "--epochs",
    type=int,
    help="0 calibrates ranges and re-estimates BatchNorm.  [default: 30]",
)
@setting("distillation.batch_size", "--batch-size", type=int, help="[default: 128]")
@setting(
    "distillation.lr",
    "--lr",
    type=float,
    help="Model's rate.  [default: 3e-4, below 4 bits 1e-3]",
)
@setting(
    "distillation.quantizer_lr", "--quantizer-lr", type=float, help="Quantizers'.  [default: 1e-4]"
)
@setting("distillation.temperature", "--temperature", type=float, help="[default: 4]")
@click.option("--delta", help="EWGS: a number, or hessian.  [default: 1e-3]")
@setting(
    "distillation.feature_weight",
    "--features",
    is_flag=True,
    flag_value=1.0,
    type=float,
    help="Compare the last inner layer's codes with the teacher's, too (SQuaT).",
)
@setting(
    "distillation.freeze_bn_after",
    "--freeze-bn-after",
    type=float,
    help="Share of epochs until BatchNorm freezes.  [default: 0 from 4 bits on, else 1]",
)
@setting("distillation.clip_grad", "--clip-grad", type=float, help="Largest gradient norm.")
@setting("teacher.epochs", "--teacher-epochs", type=int, help="If none is given.  [default: 30]")
@setting("teacher.lr", "--teacher-lr", type=float, help="[default: 0.1]")
@work_options
@JSON
@click.pass_context
def train(ctx: click.Context, **options: Any) -> None:
    """Distil a low-bit student from a trained model and unlabelled images.

    With nothing but --bits, the job runs on the embedded UCI digits: a ResNet-20 teacher is
    trained first (with labels, for that step only), then the student, without any.
    """
    _commands().train(settings_of(ctx), **options)


@main.command(epilog=EXPORT)
@click.argument("path", type=FILE)
@click.option("--run", type=EXISTING, help="Run folder.  [default: the newest under runs/]")
@COMPARED_ON
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Of these images, evenly spread, at most.",
)
@tolerance_options
@click.option("--target", help="Another target.  [default: the one the run was trained for]")
@click.option("--anyway", is_flag=True, help="Allow a target whose rules would change the student.")
@export_options
@click.option(
    "--pack/--no-pack",
    default=None,
    help="Weights below 8 bits at their own width.  [default: where the target can restore them]",
)
@SAVE_REFERENCE
@JSON
def export(path: Path, **options: Any) -> None:
    """Write a run's student to PATH, if the runtime gives the same answers as PyTorch.

    The file is compared in stages: student in PyTorch, then the runtime with its optimisations off,
    then with them on. It gets its name only when it passes.

    For target tensorrt, a profile, nothing is run in TensorRT: the stages are ONNX Runtime's, and
    the file is checked against the documented rules. One that breaks any is refused.
    """
    if options["target"] is not None:
        _commands("plugins").get_exporter(options["target"])  # refused at once, without torch
    _commands().export(path, **options)


@main.command(epilog=VERIFY)
@click.argument("path", type=FILE)
@click.option("--run", type=EXISTING, help="Run folder.  [default: the file's own, under runs/]")
@click.option("--reference", type=EXISTING, help="Saved answers instead of a run; needs no torch.")
@COMPARED_ON
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Of these images, evenly spread, at most.  [default: 2048]",
)
@tolerance_options
@click.option(
    "--runtime",
    multiple=True,
    help="Another runtime whose answers count.  [default: all are shown, and decide nothing]",
)
@click.option("--layers", is_flag=True, help="Compare every quantised tensor, too.")
@click.option(
    "--layer-samples",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images for --layers, at most.",
)
@SAVE_REFERENCE
@JSON
def verify(path: Path, **options: Any) -> None:
    """Compare the exported file PATH with its student, and say where and why it differs.

    Answers are compared stage by stage: the student in PyTorch, the runtime with its optimisations
    off, then on, then every other installed runtime that opens the file. Every constant of the file
    is compared with the student's, every layer on the codes that the runtime computed before it,
    for 8 images, and what the file says of its input, preprocessing and classes. Layers that can
    saturate on CPUs without VNNI are named.

    --layers reports each quantised tensor, worst first, and where differences begin: in the export,
    in the runtime's optimiser or by rounding in its kernels; and each layer on the runtime's own
    codes, where no difference is handed down, for all those images. --reference verifies against
    answers that --save-reference wrote, or any .npz of "images" (preprocessed, N×C×H×W) and
    "logits"; of OpenVINO IR, answers alone.
    """
    _commands("verification.command").verify(path, **options)


@main.command(epilog=TEACHER)
@run_options
@model_options
@weights_option
@data_options
@augmentation_option
@setting("teacher.epochs", "--epochs", type=int, help="[default: 30]")
@setting("teacher.batch_size", "--batch-size", type=int, help="[default: 128]")
@setting("teacher.lr", "--lr", type=float, help="Highest learning rate.  [default: 0.1]")
@setting("teacher.weight_decay", "--weight-decay", type=float, help="[default: 5e-4]")
@setting(
    "teacher.schedule",
    "--schedule",
    type=click.Choice(["one-cycle", "cosine"]),
    help="Of the rate.  [default: one-cycle]",
)
@work_options
@JSON
@click.pass_context
def teacher(ctx: click.Context, **options: Any) -> None:
    """Train a full-precision model with labels, for those who have none yet.

    The weights are for train --weights. With --weights, training starts from them.
    """
    _commands().teacher(settings_of(ctx), **options)


@main.command(name="eval", epilog=EVAL)
@click.argument("what", type=EXISTING, metavar="RUN|WEIGHTS|FILE.onnx")
@model_options
@data_options
@click.option("--samples", type=click.IntRange(min=1), help="At most.  [default: all held out]")
@click.option("--runtime", help="For .onnx files.  [default: onnxruntime]")
@JSON
@click.pass_context
def eval_(ctx: click.Context, what: Path, **options: Any) -> None:
    """Score a run, a float model's weights or an exported file on labelled images.

    Runs, their teachers' weights and exported files know how their images are prepared, and a run
    its data, of which it is said if they have changed since; so do files of a run under runs/. For
    anything else say so with --data, --input-size, --channels, --mean and --std. The held-out part
    is used: of a folder without a test part, every tenth image of each class.
    """
    _commands().evaluate(what, settings_of(ctx), **options)


def _counts(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    counts = value.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise click.BadParameter(f"wanted N or N,M with N of at least 1, got {value!r}")
    return tuple(int(count) for count in counts)


@main.command(epilog=BENCH)
@click.argument("model", type=EXISTING)
@click.option("--runtime", multiple=True, help="Repeatable.  [default: all that are installed]")
@click.option("--fp32", type=EXISTING, help="The float model.  [default: the run's teacher]")
@click.option(
    "--run",
    type=EXISTING,
    help="Run folder of the teacher.  [default: the file's own, under runs/]",
)
@click.option("--threads", default="1", show_default=True, callback=_counts, help="N or N,M.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Turns.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=0.25,
    show_default=True,
    help="Of a turn.",
)
@click.option(
    "--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Untimed, a turn."
)
@click.option(
    "--input-size",
    type=(click.IntRange(min=1), click.IntRange(min=1)),
    metavar="H W",
    help="Pixels, for files that leave it open.",
)
@click.option("--plot", type=EXISTING, help="Picture to draw, .svg or .png.")
@JSON
def bench(**options: Any) -> None:
    """Measure MODEL in each runtime: latency, throughput, load time, memory, size, coverage.

    Each file in each runtime has a process of its own; they take turns, so that whatever else
    happens on the machine meets all alike. The float model is measured beside.
    """
    _commands("bench.command").run(**options)


@main.command(name="list")
@click.argument(
    "kind", required=False, type=click.Choice(["methods", "models", "datasets", "targets"])
)
@JSON
def list_(kind: str | None, as_json: bool) -> None:
    """Show the methods, models, datasets and targets there are."""
    _commands("catalogue").list_all(kind, as_json)


if __name__ == "__main__":
    main()
