"""A whole run as one validated, torch-free value, read by ``--config`` and kept in the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from sqakd_deploy.data.preprocessing import Mean, Std
from sqakd_deploy.errors import SpecError
from sqakd_deploy.spec import DistillConfig, QuantSpec, Spec, read_yaml


def _text(value: object) -> object:
    if value == "":  # as a path it would be the current folder
        raise PydanticCustomError("text", "wanted a name or a path, not an empty text")
    if not isinstance(value, os.PathLike):
        return value
    path = os.fspath(value)
    # Path("./digits") is Path("digits"), and no more a data set's name than the former.
    return os.path.join(os.curdir, path) if path == Path(path).name else path  # noqa: PTH118


Text = Annotated[str, BeforeValidator(_text)]
"""A name or a path; in Python a ``Path``, too, which is never a name."""


class ModelConfig(Spec):
    """Which network.

    Attributes:
        name: a built-in or torchvision model, ``file.py:factory`` or ``package.module:factory``.
        args: keyword arguments of the factory.
        weights: a file of the trained float model's weights, or the name of published ones
            (``DEFAULT``, ``IMAGENET1K_V1``); None trains a teacher with labels.
    """

    name: str = "resnet20"
    args: dict[str, Any] = Field(default_factory=dict)
    weights: Text | None = None


class DataConfig(Spec):
    """Which images.

    Attributes:
        source: a built-in dataset, or a folder: class folders or loose images.
        input_size: ``(H, W)``; None takes the images' own.
        channels: 1 for grey, 3 for RGB: grey images are repeated in each channel, RGB become their
            luma. None takes what the weights were trained with where that is known, else the
            images' own.
        mean: one value a channel or one for all, 0 to 1; None takes what the weights were trained
            with where that is known (of torchvision's, a run, an exported file), else the data
            set's, of a folder ImageNet's.
        std: as ``mean``, but above 0.
        skip_bad_images: leave out images that cannot be read, and count them.
        augmentation: random changes in training; None takes the data set's own.
        cache: folder of decoded images; None takes the user's, False decodes in every run.
        max_cache_gb: folders of more decoded images (GiB) are decoded in every epoch instead.
        workers: processes that do so, or resize a data set that is too large for memory once
            enlarged; 0 uses none, None suits the machine.
    """

    source: Text = "digits"
    input_size: tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    mean: tuple[Mean, ...] | None = None
    std: tuple[Std, ...] | None = None
    skip_bad_images: bool = False
    augmentation: Literal["none", "cifar", "imagenet"] | None = None
    cache: Literal[False] | Text | None = None
    max_cache_gb: Annotated[float, Field(ge=0)] = 16.0
    workers: Annotated[int, Field(ge=0)] | None = None


class TeacherConfig(Spec):
    """How a float teacher is trained, with labels, where none is given.

    Attributes:
        epochs: passes over the labelled training images.
        batch_size: images a step.
        lr: highest learning rate (SGD, Nesterov momentum 0.9).
        weight_decay: L2 on every parameter.
        schedule: ``one-cycle`` rises to ``lr`` and falls to 0, ``cosine`` starts there.
    """

    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"


class RunConfig(Spec):
    """Everything that decides a run's result.

    Attributes:
        model: the network.
        data: the images.
        teacher: how a missing teacher is trained.
        quantization: the student's spec.
        distillation: the student's training.
        device: ``auto`` takes a GPU where there is one.
        tensorboard: write training curves into the run folder.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    quantization: QuantSpec = QuantSpec()
    distillation: DistillConfig = DistillConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = False

    @property
    def base(self) -> str:
        """Images and model, for instance ``digits-resnet20``."""
        return f"{_own_name(self.data.source)}-{self.model.name.rpartition(':')[2]}"

    @property
    def label(self) -> str:
        """Default name of the run's folder."""
        method = self.quantization.activations.method
        return f"{self.base}-{self.quantization.label}-{method}"

    def to_yaml(self) -> str:
        """The resolved config, as ``--config`` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _own_name(source: str) -> str:
    """A dataset's name or a folder's own, which ``.`` and ``..`` do not say; never a hidden one."""
    path = Path(source).expanduser()
    named = path.resolve() if path.name in ("", "..") else path
    return named.name.lstrip(".") or "images"


def load_config(path: Path | None, overrides: dict[str, Any]) -> RunConfig:
    """A config file with values put over it.

    Args:
        path: YAML; None starts from the defaults.
        overrides: nested values that win over the file's.

    Raises:
        SpecError: if the file or a value is wrong; names the file and the key.
    """
    values = read_yaml(path) if path else {}
    values = {key: value for key, value in values.items() if value is not None}  # as good as absent
    where = str(path) if path else "settings"
    try:
        merged = merge(values, overrides)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error
    return RunConfig.parse(merged, where=where)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over``'s leaves put into ``base``; neither is changed.

    Raises:
        SpecError: if ``base`` has a single value where ``over`` has a section.
    """
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if not isinstance(value, dict) or below is None:
            merged[key] = value
        elif isinstance(below, dict):
            kept = below if key != "layer_bits" else _without(below, value)
            merged[key] = merge(kept, value)
        else:
            raise SpecError(f"{key}: wanted a section of settings, got {below!r}")
    return merged


def _without(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Patterns but those given anew, which then come last and count where others match, too."""
    return {pattern: bits for pattern, bits in below.items() if pattern not in over}
