"""What is known of a model's trained weights: from the run that made them, or their publisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sqakd_deploy.checkpoint import CONFIG, STUDENT, TEACHER, Run, open_run
from sqakd_deploy.config import ModelConfig
from sqakd_deploy.data import ImageData, Preprocessing
from sqakd_deploy.data.published import published_classes, published_preprocessing
from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.models import MODELS


@dataclass(frozen=True)
class Origin:
    """What nobody needs to repeat who names weights.

    Attributes:
        preprocessing: of the images that they were trained on.
        num_classes: that the network was built for.
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

    def of_other_classes(self, data: ImageData) -> bool:
        """Whether the weights are known to tell other classes apart than the images have."""
        return self.ours and data.difference(self.classes) is not None

    def completed(self, model: ModelConfig) -> ModelConfig:
        """A person's wishes; the network that they do not name, and the arguments that they do not
        give for it, are those of the weights, but for the number of classes."""
        if self.model is None:
            return model
        name = model.name if "name" in model.model_fields_set else self.model.name
        theirs = self.model.args if name == self.model.name else {}
        kept = {key: value for key, value in theirs.items() if key != "num_classes"}
        return model.model_copy(update={"name": name, "args": {**kept, **model.args}})

    def of_images_alone(self) -> Origin:
        """Without the network's classes, for training that brings its own."""
        return replace(self, num_classes=None, classes=None)


def origin_of(model: ModelConfig) -> Origin:
    """What is known of a model's weights; nothing is fetched.

    Args:
        model: its weights may be a run's ``teacher.safetensors``, in its folder, or the name of
            published ones. Of any other file nobody knows where it comes from.

    Raises:
        CheckpointError: if the run around the file is damaged, or the file is its student.
    """
    if model.weights is None:
        return Origin()
    path = Path(model.weights).expanduser().resolve()  # through links
    if path.name in (TEACHER, STUDENT) and (path.parent / CONFIG).is_file():
        if path.name == STUDENT:
            raise CheckpointError(
                f"weights {path}: wanted those of a float model, got a run's student; name its "
                f"teacher, {path.with_name(TEACHER)}"
            )
        run = open_run(path.parent)
        return origin_in(run) or Origin(model=run.config.model)
    if model.name in MODELS:  # torchvision has networks of the same names
        return Origin()
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
        num_classes=facts.get("built_for", facts["num_classes"]),
        classes=tuple(classes) if classes else None,
        model=model,
        ours=True,
    )
