"""A run folder read back: the student, and the images to judge it on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import fx, nn
from torch.nn.parameter import is_lazy

from sqakd_deploy.checkpoint import (
    STUDENT,
    STUDENT_KEY,
    TEACHER,
    Run,
    checksum_of,
    load_weights,
    opened,
)
from sqakd_deploy.config import DataConfig, ModelConfig
from sqakd_deploy.data import DATASETS, ImageSplit, Preprocessing, load_data
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.data.fitted import limited
from sqakd_deploy.data.options import Keeping
from sqakd_deploy.errors import CheckpointError, DataError, SpecError
from sqakd_deploy.models import build_model, is_code
from sqakd_deploy.models.outputs import count_logits
from sqakd_deploy.placed import check_rules
from sqakd_deploy.quantization import quantize

_EVALUATION_BATCH = 256


def still_batches(
    split: ImageSplit, preprocessing: Preprocessing, shuffle_seed: int | None = None
) -> Batches:
    """Batches without augmentation, shuffled only to make the first ones a fair sample."""
    return Batches(
        split.images,
        preprocessing,
        _EVALUATION_BATCH,
        seed=shuffle_seed or 0,
        shuffle=shuffle_seed is not None,
    )


@dataclass(frozen=True)
class Loaded:
    """A run read back.

    Attributes:
        run: the folder.
        student: with its weights, in evaluation mode.
        preprocessing: what its images need.
        classes: their names, where known.
    """

    run: Run
    student: fx.GraphModule
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None

    @property
    def metadata(self) -> dict[str, str]:
        """What an exported file carries."""
        facts = {
            "sqakd.preprocessing": self.preprocessing.model_dump_json(),
            STUDENT_KEY: json.dumps(checksum_of(self.run.path / STUDENT)),
        }
        if self.classes:
            facts["sqakd.classes"] = json.dumps(self.classes)
        return facts


def build_float(config: ModelConfig, classes: int | None, channels: int) -> nn.Module:
    """The float model of a config, without trained weights.

    Args:
        config: which.
        classes: of the images, None if unknown; the config's own ``num_classes`` wins.
        channels: of the images.

    Raises:
        SpecError: if the number of classes is no such number, or unknown and needed.
    """
    args = {key: value for key, value in config.args.items() if value is not None}
    given = args.get("num_classes")
    if given is not None and (not isinstance(given, int) or given < 2):
        raise SpecError(f"num_classes: wanted a whole number from 2 on, got {given!r}")
    if given is None and classes is None and not is_code(config.name):
        raise SpecError(
            "the images have no labels, so the number of classes is unknown; "
            "give it with --model-arg num_classes=K"
        )
    return build_model(config.name, num_classes=classes, in_channels=channels, args=args)


def load_student(run: Run | Path | str) -> Loaded:
    """Rebuild the student of a run.

    Args:
        run: its folder, opened or not.

    Raises:
        CheckpointError: if the folder is incomplete or damaged, a teacher's, or placed by other
            rules.
    """
    run = opened(run)
    if run.kind == "teacher":
        raise CheckpointError(
            f"{run.path} is a teacher's run, which has no student; train one from it: "
            f"'sqakd-deploy train --weights {run.path / TEACHER}'"
        )
    check_rules(run)
    model, preprocessing = _untrained(run)
    shape = (preprocessing.channels, *preprocessing.input_size)
    student = quantize(model, run.config.quantization, example=shape)
    load_weights(student, _saved(run, STUDENT))
    classes = run.facts["data"].get("classes")
    return Loaded(run, student.eval(), preprocessing, tuple(classes) if classes else None)


def load_teacher(run: Run | Path | str) -> tuple[nn.Module, Preprocessing]:
    """Rebuild the float teacher of a run, and what its images need.

    Args:
        run: its folder, opened or not.

    Raises:
        CheckpointError: if the folder is incomplete or damaged.
    """
    run = opened(run)
    model, preprocessing = _untrained(run)
    load_weights(model, _saved(run, TEACHER))
    return model.eval(), preprocessing


def _saved(run: Run, name: str) -> Path:
    """A run's file of weights.

    Raises:
        CheckpointError: if it is not there, saying how the run goes on.
    """
    path = run.path / name
    if path.is_file():
        return path
    if run.status == "complete":  # which nothing goes on with
        raise CheckpointError(f"{path} does not exist, though the run is complete; train it anew")
    command = "teacher" if run.kind == "teacher" else "train"
    raise CheckpointError(
        f"{path} does not exist; the run was stopped before it was saved: go on with "
        f"'sqakd-deploy {command} --resume {run.path}'"
    )


def _untrained(run: Run) -> tuple[nn.Module, Preprocessing]:
    """A run's model without its weights."""
    try:
        facts = run.facts["data"]
        preprocessing = Preprocessing(**facts["preprocessing"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"run {run.path} is damaged: no data facts in run.json") from error
    classes = facts.get("built_for", facts["num_classes"])
    model = build_float(run.config.model, classes, preprocessing.channels)
    if any(map(is_lazy, model.parameters())):  # one forward pass gives lazy layers their shapes
        shape = (preprocessing.channels, *preprocessing.input_size)
        count_logits(model, run.config.model.name, shape)
    return model, preprocessing


def keeping_of(config: DataConfig) -> Keeping:
    """Where a run's config says that decoded images are kept."""
    cache = Path(config.cache) if isinstance(config.cache, str) else config.cache
    return Keeping(cache, config.max_cache_gb, config.workers)


def check_images(run: Run, hint: str = "name where it is now with --data") -> None:
    """Refuse a run whose folder of images is gone, before it is taken for a data set's name.

    Args:
        run: whose own images are wanted.
        hint: what to do, if it cannot be put back.

    Raises:
        DataError: if it is.
    """
    source = run.config.data.source
    if source in DATASETS:
        return
    folder = Path(source).expanduser()
    if not folder.exists():
        folder = Path(str(run.facts.get("started_in", Path.cwd()))) / folder
        raise DataError(
            f"the images of run {run.path} are gone: there is no folder {folder}; {hint}"
        )


def held_out(
    loaded: Loaded, source: str | None = None, limit: int | None = None
) -> tuple[Batches, ImageSplit]:
    """The images that a run's export is compared on.

    Args:
        loaded: the run.
        source: another dataset or folder; None takes the run's own. Of a folder without a test
            part, in which nothing was trained on, all images are taken.
        limit: at most so many images, evenly spread.

    Returns:
        Batches, and the same images with labels where these mean the run's classes.
    """
    config = loaded.run.config.data
    if source is None:
        check_images(loaded.run)
    data = load_data(
        source or config.source,
        preprocessing=loaded.preprocessing,
        skip_bad_images=config.skip_bad_images,
        keeping=keeping_of(config),
    )
    facts = loaded.run.facts["data"]
    known = data.difference(facts.get("classes"), facts["num_classes"]) is None
    foreign = source is not None and not _same_place(source, config.source)
    part = data.whole if foreign and data.whole is not None else data.test
    split = limited(part if known else ImageSplit(part.images), limit)
    return still_batches(split, loaded.preprocessing), split


def _same_place(source: str, other: str) -> bool:
    """Whether two names of data are one data set's or one folder's."""
    return (
        source == other or Path(source).expanduser().resolve() == Path(other).expanduser().resolve()
    )
