"""Options that several commands share, and where their values go.

Imports click alone, as :mod:`sqakd_deploy.cli` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from sqakd_deploy.option_types import EMPTY, EXISTING, FILE, TEXT, Finite

F = TypeVar("F", bound=Callable[..., Any])


def grouped(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; ``--help`` shows them in this order."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def settings_of(ctx: click.Context) -> dict[str, Any]:
    """The config values that options gave."""
    settings: dict[str, Any] = ctx.meta.get("sqakd.settings", {})
    return settings


def setting(path: str, *names: str, **options: Any) -> Any:
    """A click option whose value goes to ``path`` in the config when it is given."""
    kwargs = {"default": None, "callback": _keep, **options}
    name = "__".join(["setting", *path.split(".")])  # click wants an identifier
    return click.option(*names, name, expose_value=False, **kwargs)


def _keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is None or value == ():
        return
    if value == "":
        raise click.BadParameter(EMPTY, ctx, parameter)
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


def _layer_bits(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> None:
    pairs: dict[str, str] = {}
    for text in values:
        pattern, separator, bits = text.rpartition("=")
        if not separator or not pattern:
            wanted = f"wanted PATTERN=BITS, as 'layer4.*=8'; got {text!r}"
            raise click.BadParameter(wanted, ctx, parameter)
        pairs.pop(pattern, None)  # one that is given again goes to the end: the last counts
        pairs[pattern] = bits
    _keep(ctx, parameter, pairs or None)


def _channels(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """One number for all channels, or one for each, with commas between them."""
    if value is None:
        return
    try:
        numbers = tuple(float(text) for text in value.split(","))
    except ValueError:
        wanted = f"wanted numbers with commas between them, as 0.485,0.456,0.406; got {value!r}"
        raise click.BadParameter(wanted, ctx, parameter) from None
    _keep(ctx, parameter, numbers)


def _cache(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        _only_one_cache(ctx)
        _keep(ctx, parameter, value)


def _no_cache(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        _only_one_cache(ctx)
        ctx.meta.setdefault("sqakd.settings", {}).setdefault("data", {})["cache"] = False


def _only_one_cache(ctx: click.Context) -> None:
    if "cache" in settings_of(ctx).get("data", {}):
        raise click.UsageError("--cache and --no-cache contradict each other; give one", ctx)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
_OF_MODEL = (
    "Of the model's training images; one value stands for all channels.  [default: its own, or the "
    "dataset's]"
)

COMPARED_ON = click.option(
    "--data",
    type=TEXT,
    help="Dataset or folder to compare on: its test part, or all images of a folder without one, "
    "unless the run was trained on it.  [default: the run's held-out part]",
)
SAVE_REFERENCE = click.option(
    "--save-reference",
    type=FILE,
    help="Write images and the student's answers (.npz), for verify --reference.",
)


run_options = grouped(
    click.option("--config", type=EXISTING, help="YAML file with settings; options win over it."),
    click.option("--output", type=EXISTING, help="Run folder.  [default: a free name under runs/]"),
    click.option(
        "--resume", type=EXISTING, help="Go on with a run that was stopped, by its own settings."
    ),
)
"""Where settings come from, and where the run goes."""

quantization_options = grouped(
    click.option("--bits", help="Weights and activations: 4, or w4a8.  [default: 4]"),
    setting("quantization.weights.bits", "--weight-bits", type=int, help="Weights alone, 1-8."),
    setting(
        "quantization.activations.bits", "--act-bits", type=int, help="Activations alone, 1-8."
    ),
    click.option("--method", help="ste, pact, lsq, dorefa or ewgs.  [default: lsq]"),
    click.option(
        "--per-channel/--per-tensor", default=None, help="Weight scales.  [default: per tensor]"
    ),
    setting(
        "quantization.first_last_bits", "--first-last-bits", type=int, help="Ends.  [default: 8]"
    ),
    setting(
        "quantization.residual_bits", "--residual-bits", type=int, help="Sums, pools.  [default: 8]"
    ),
    setting(
        "quantization.layer_bits",
        "--layer-bits",
        multiple=True,
        callback=_layer_bits,
        metavar="PATTERN=BITS",
        help="Of single layers: 'layer4.*=8', 'conv1=w4a8'; repeatable, the last that matches "
        "counts.",
    ),
    setting(
        "quantization.exclude", "--exclude", multiple=True, help="Layer pattern left in float."
    ),
    setting("quantization.target", "--target", help="See list targets.  [default: onnxruntime]"),
    setting(
        "quantization.placement",
        "--placement",
        type=click.Choice(["target", "paper"]),
        help="paper: only inner layers' inputs and weights.  [default: target]",
    ),
)
"""How the student is quantised."""

model_options = grouped(
    setting(
        "model.name",
        "--model",
        help="Name, or file.py:factory.  [default: the weights' run's, or resnet20]",
    ),
    click.option(
        "--model-arg",
        multiple=True,
        callback=_key_values,
        expose_value=False,
        help="key=value for its factory; repeatable.",
    ),
)
"""Which network."""

weights_option = setting(
    "model.weights", "--weights", help="Trained float model: a file, or DEFAULT."
)

data_options = grouped(
    setting("data.source", "--data", help="Dataset, or a folder of images.  [default: digits]"),
    setting("data.input_size", "--input-size", type=(int, int), help="Height and width (pixels)."),
    setting(
        "data.channels",
        "--channels",
        type=int,
        metavar="1|3",
        help="Grey or RGB.  [default: the model's, or the images' own]",
    ),
    setting(
        "data.skip_bad_images",
        "--skip-bad-images",
        is_flag=True,
        help="Skip, count bad ones.",
    ),
    setting("data.mean", "--mean", callback=_channels, metavar="R,G,B", help=_OF_MODEL),
    setting("data.std", "--std", callback=_channels, metavar="R,G,B", help=_OF_MODEL),
    setting(
        "data.cache",
        "--cache",
        callback=_cache,
        help="Folder for decoded images.  [default: the user's cache]",
    ),
    click.option(
        "--no-cache",
        is_flag=True,
        expose_value=False,
        callback=_no_cache,
        help="Decode in every run.",
    ),
    setting(
        "data.max_cache_gb",
        "--max-cache-gb",
        type=float,
        help="Larger folders are decoded in every epoch.  [default: 16]",
    ),
    setting(
        "data.workers",
        "--workers",
        type=int,
        help="Processes that decode.  [default: cores − 1, 1 to 8]",
    ),
)
"""Which images, and how they are read."""

augmentation_option = setting(
    "data.augmentation",
    "--augmentation",
    type=click.Choice(["none", "cifar", "imagenet"]),
    help="Of training images.  [default: the dataset's own]",
)

work_options = grouped(
    setting("distillation.seed", "--seed", type=int, help="[default: 0]"),
    setting(
        "distillation.compile",
        "--compile",
        type=click.Choice(["auto", "on", "off"]),
        help="auto decides from the work ahead.  [default: auto]",
    ),
    setting(
        "distillation.precision",
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        help="Of convolutions in training.  [default: auto]",
    ),
    setting(
        "distillation.save_seconds",
        "--save-every",
        type=float,
        help="Seconds between saves.  [default: 30]",
    ),
    setting(
        "device", "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]"
    ),
    setting("tensorboard", "--tensorboard", is_flag=True, help="Write curves into the run."),
)
"""How the machine is used."""


def _batch(ctx: click.Context, parameter: click.Parameter, value: str) -> int | None:
    if value == "dynamic":
        return None
    if not value.isdecimal() or int(value) < 1:
        wanted = f"wanted a number of images from 1 on, or dynamic; got {value!r}"
        raise click.BadParameter(wanted, ctx, parameter)
    return int(value)


export_options = grouped(
    click.option(
        "--input",
        "input_type",
        type=click.Choice(["float32", "uint8"]),
        default="float32",
        show_default=True,
        help="uint8: raw pixels, normalised in the file.",
    ),
    click.option(
        "--input-layout",
        type=click.Choice(["nchw", "nhwc"]),
        default="nchw",
        show_default=True,
        help="nhwc for raw pixels only.",
    ),
    click.option(
        "--batch",
        default="dynamic",
        show_default=True,
        metavar="N|dynamic",
        callback=_batch,
        help="Images in a batch.",
    ),
    click.option("--input-name", default="input", show_default=True, help="In the file."),
    click.option("--output-name", default="logits", show_default=True, help="In the file."),
    click.option("--opset", type=int, help="ONNX opset.  [default: the lowest that will do]"),
)
"""What the file looks like from outside."""


tolerance_options = grouped(
    click.option(
        "--min-agreement",
        type=Finite(0, 100),
        default=99.5,
        show_default=True,
        help="Top-1, percent.",
    ),
    click.option(
        "--max-accuracy-gap",
        type=Finite(0, 100),
        default=0.3,
        show_default=True,
        help="Top-1, points.",
    ),
    click.option(
        "--max-mean-error",
        type=Finite(min=0),
        default=4.0,
        show_default=True,
        help="Logits, in steps of the output's scale.",
    ),
)
"""What passes."""
