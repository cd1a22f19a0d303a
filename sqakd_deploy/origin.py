"""What is known of a model's trained weights: from the run that made them, or their publisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sqakd_deploy.checkpoint import CONFIG, TEACHER, Run, open_run
from sqakd_deploy.config import ModelConfig
from sqakd_deploy.data import ImageData, Preprocessing
from sqakd_deploy.data.published import published_classes, published_preprocessing
from sqakd_deploy.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """What nobody needs to repeat who names weights.

    Attributes:
        preprocessing: of the images that they were trained on.
        num_classes: K, the number of logits.
        classes: names of the logits.
        model: the network, and the arguments that it was built with.
        ours: a run of this package made them, whose class names are spelled as its data's are.
    """

    preprocessing: Preprocessing | None = None
    num_classes: int | None = None
    classes: tuple[str, ...] | None = None
    model: ModelConfig | None = None
    ours: bool = False

    def difference(self, data: ImageData, num_classes: int) -> str | None:
        """How the classes of images differ from those of a model of K logits, in words."""
        return data.difference(self.classes if self.ours else None, num_classes)

    def completed(self, model: ModelConfig) -> ModelConfig:
        """A person's wishes, and for the network that they do not name, the one of the weights."""
        if self.model is None or model.model_fields_set & {"name", "args"}:
            return model
        return model.model_copy(update={"name": self.model.name, "args": self.model.args})

    def of_images_alone(self) -> Origin:
        """Without the network's classes, for training that brings its own."""
        return replace(self, num_classes=None, classes=None)


def origin_of(model: ModelConfig) -> Origin:
    """What is known of a model's weights; nothing is fetched.

    Args:
        model: its weights may be a run's ``teacher.safetensors``, in its folder, or the name of
            published ones. Of any other file nobody knows where it comes from.

    Raises:
        CheckpointError: if the run around the file is damaged.
    """
    if model.weights is None:
        return Origin()
    path = Path(model.weights).expanduser()
    if path.name == TEACHER and (path.parent / CONFIG).is_file():
        return origin_in(open_run(path.parent)) or Origin()
    classes = published_classes(model.name, model.weights)
    return Origin(
        preprocessing=published_preprocessing(model.name, model.weights),
        num_classes=len(classes) if classes else None,
        classes=classes,
    )


def origin_in(run: Run) -> Origin | None:
    """What a run knows of its own teacher; None if it was stopped before its images were read.

    Raises:
        CheckpointError: if the run is damaged.
    """
    facts = run.facts.get("data")
    if facts is None:
        return None
    try:
        return _read(facts, run.config.model)
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"run {run.path} is damaged: no data facts in run.json") from error


def _read(facts: Mapping[str, Any], model: ModelConfig) -> Origin:
    classes = facts["classes"]
    return Origin(
        preprocessing=Preprocessing.model_validate(facts["preprocessing"]),
        num_classes=facts["num_classes"],
        classes=tuple(classes) if classes else None,
        model=model,
        ours=True,
    )
