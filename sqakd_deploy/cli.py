"""The command line: parse, call one function, print.

This module imports click alone, so that ``--help`` answers at once; everything heavy is behind
:func:`_commands`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from sqakd_deploy import __version__
from sqakd_deploy.errors import SqakdError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_EPILOG_TRAIN = """\b
Examples:
  sqakd-deploy train --bits 4
  sqakd-deploy train --bits w4a8 --method ewgs --epochs 60
  sqakd-deploy train --data photos/ --model resnet18 --weights resnet18.pth --bits 4
  sqakd-deploy train --config run.yaml --lr 5e-4 --output runs/lower-rate
  sqakd-deploy train --resume runs/lower-rate
  accelerate launch --num_processes 4 -m sqakd_deploy train --bits 4
"""
_EPILOG_EXPORT = """\b
Examples:
  sqakd-deploy export model.onnx
  sqakd-deploy export model.onnx --run runs/digits-resnet20-w4a4-lsq
  sqakd-deploy export model.onnx --json > parity.json

\b
Exit codes: 0 proven, 2 wrong usage or setting, 3 the file does not give its student's answers
(none is left under the name), 4 data, 5 run or weights, 6 model, 7 export, 8 training,
130 interrupted.
"""
_EPILOG_BENCH = """\b
Examples:
  sqakd-deploy bench model.onnx
  sqakd-deploy bench model.onnx --runtime onnxruntime --runtime openvino --threads 1,2
  sqakd-deploy bench model.onnx --fp32 model_fp32.onnx --json > bench.json
  sqakd-deploy bench model.onnx --plot bench.svg

\b
Exit codes: 0 measured, 2 wrong usage or unknown runtime, 5 run, 6 no such model or no ONNX file,
7 refused by the runtime, 130 interrupted.
"""


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


def _setting(path: str, *names: str, **options: Any) -> Any:
    """A click option whose value goes to ``path`` in the config when it is given."""
    kwargs = {"default": None, **options}
    name = "__".join(["setting", *path.split(".")])  # click wants an identifier
    return click.option(*names, name, expose_value=False, callback=_keep, **kwargs)


def _keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is None or value == ():
        return
    _, *parents, leaf = str(parameter.name).split("__")
    settings: dict[str, Any] = ctx.meta.setdefault("sqakd.settings", {})
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[leaf] = value


def _key_values(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> None:
    if not values:
        return
    pairs = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"wanted key=value, got {text!r}", ctx, parameter)
        pairs[key] = _literal(value)
    ctx.meta.setdefault("sqakd.settings", {}).setdefault("model", {})["args"] = pairs


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
_EXISTING = click.Path(path_type=Path)


@main.command(epilog=_EPILOG_TRAIN)
@click.option("--config", type=_EXISTING, help="YAML file with settings; options win over it.")
@click.option("--output", type=_EXISTING, help="Run folder.  [default: a free name under runs/]")
@click.option(
    "--resume", type=_EXISTING, help="Go on with a run that was stopped, by its own settings."
)
@click.option("--bits", help="Weights and activations: 4, or w4a8.  [default: 4]")
@_setting("quantization.weights.bits", "--weight-bits", type=int, help="Weights alone, 1-8.")
@_setting("quantization.activations.bits", "--act-bits", type=int, help="Activations alone, 1-8.")
@click.option("--method", help="ste, pact, lsq, dorefa or ewgs.  [default: lsq]")
@click.option(
    "--per-channel/--per-tensor", default=None, help="Weight scales.  [default: per tensor]"
)
@_setting("quantization.first_last_bits", "--first-last-bits", type=int, help="Ends.  [default: 8]")
@_setting(
    "quantization.residual_bits", "--residual-bits", type=int, help="Sums, pools.  [default: 8]"
)
@_setting("quantization.exclude", "--exclude", multiple=True, help="Layer pattern left in float.")
@_setting("quantization.target", "--target", help="Exporter to follow.  [default: onnxruntime]")
@_setting(
    "quantization.placement",
    "--placement",
    type=click.Choice(["target", "paper"]),
    help="paper: only inner layers' inputs and weights.  [default: target]",
)
@_setting("model.name", "--model", help="Name, or file.py:factory.  [default: resnet20]")
@click.option("--model-arg", multiple=True, callback=_key_values, expose_value=False, help="k=v.")
@_setting("model.weights", "--weights", help="The trained float model; none trains a teacher.")
@_setting("data.source", "--data", help="Dataset, or a folder of images.  [default: digits]")
@_setting("data.input_size", "--input-size", type=(int, int), help="Height and width (pixels).")
@_setting(
    "data.skip_bad_images",
    "--skip-bad-images",
    is_flag=True,
    help="Skip, count bad ones.",
)
@_setting(
    "distillation.loss",
    "--loss",
    type=click.Choice(["kl", "ce", "kl+ce"]),
    help="kl sees no label; the others are baselines.  [default: kl]",
)
@_setting("distillation.epochs", "--epochs", type=int, help="0 only calibrates.  [default: 30]")
@_setting("distillation.batch_size", "--batch-size", type=int, help="[default: 128]")
@_setting("distillation.lr", "--lr", type=float, help="Model's learning rate.  [default: 1e-3]")
@_setting(
    "distillation.quantizer_lr", "--quantizer-lr", type=float, help="Quantizers'.  [default: 1e-4]"
)
@_setting("distillation.temperature", "--temperature", type=float, help="[default: 4]")
@click.option("--delta", help="EWGS: a number, or hessian.  [default: 1e-3]")
@_setting("distillation.clip_grad", "--clip-grad", type=float, help="Largest gradient norm.")
@_setting("distillation.seed", "--seed", type=int, help="[default: 0]")
@_setting(
    "distillation.compile",
    "--compile",
    type=click.Choice(["auto", "on", "off"]),
    help="auto decides from the work ahead.  [default: auto]",
)
@_setting(
    "distillation.precision",
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    help="Of convolutions in training.  [default: auto]",
)
@_setting("distillation.save_seconds", "--save-every", type=float, help="Seconds.  [default: 30]")
@_setting("teacher.epochs", "--teacher-epochs", type=int, help="If none is given.  [default: 30]")
@_setting("teacher.lr", "--teacher-lr", type=float, help="[default: 0.1]")
@_setting("device", "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]")
@_JSON
@click.pass_context
def train(ctx: click.Context, **options: Any) -> None:
    """Distil a low-bit student from a trained model and unlabelled images.

    With nothing but --bits, the job runs on the embedded UCI digits: a ResNet-20 teacher is
    trained first (with labels, for that step only), then the student, without any.
    """
    _commands().train(ctx.meta.get("sqakd.settings", {}), **options)


@main.command(epilog=_EPILOG_EXPORT)
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--run", type=_EXISTING, help="Run folder.  [default: the newest under runs/]")
@click.option("--data", help="Dataset or folder to compare on.  [default: the run's held-out part]")
@click.option(
    "--samples", type=click.IntRange(min=1), default=2048, show_default=True, help="At most."
)
@click.option(
    "--min-agreement", type=float, default=99.5, show_default=True, help="Top-1, percent."
)
@click.option(
    "--max-accuracy-gap", type=float, default=0.3, show_default=True, help="Top-1, points."
)
@click.option("--opset", type=int, help="ONNX opset.  [default: the lowest that will do]")
@_JSON
def export(path: Path, **options: Any) -> None:
    """Write a run's student to PATH, if the runtime gives the same answers as PyTorch.

    The file is compared in stages: student in PyTorch, then the runtime with its optimisations off,
    then with them on. It gets its name only when it passes.
    """
    _commands().export(path, **options)


def _counts(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    counts = value.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise click.BadParameter(f"wanted N or N,M with N of at least 1, got {value!r}")
    return tuple(int(count) for count in counts)


@main.command(epilog=_EPILOG_BENCH)
@click.argument("model", type=_EXISTING)
@click.option("--runtime", multiple=True, help="Repeatable.  [default: all that are installed]")
@click.option("--fp32", type=_EXISTING, help="The float model.  [default: the run's teacher]")
@click.option("--run", type=_EXISTING, help="Run folder of the teacher.  [default: the newest]")
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
@click.option("--plot", type=_EXISTING, help="Picture to draw, .svg or .png.")
@_JSON
def bench(**options: Any) -> None:
    """Measure MODEL in each runtime: latency, throughput, load time, memory, size, coverage.

    Each file in each runtime has a process of its own; they take turns, so that whatever else
    happens on the machine meets all alike. The float model is measured beside.
    """
    _commands("bench_command").run(**options)


@main.command(name="list")
@click.argument(
    "kind", required=False, type=click.Choice(["methods", "models", "datasets", "targets"])
)
@_JSON
def list_(kind: str | None, as_json: bool) -> None:
    """Show the methods, models, datasets and targets there are."""
    _commands().list_all(kind, as_json)


if __name__ == "__main__":
    main()
