"""A float teacher as a run of its own, for those who have labels and no trained model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sqakd_deploy.checkpoint import LAST, TEACHER, Run, create_run
from sqakd_deploy.config import RunConfig
from sqakd_deploy.data import ImageData
from sqakd_deploy.errors import CheckpointError, SpecError
from sqakd_deploy.evaluate import predict
from sqakd_deploy.listening import Listener
from sqakd_deploy.models import load_any_weights
from sqakd_deploy.origin import origin_of
from sqakd_deploy.runs import still_batches
from sqakd_deploy.scoring import Score, score_logits
from sqakd_deploy.training.job import TEACHING, Job, reopen


@dataclass(frozen=True)
class TeachResult:
    """What a teacher's training came to.

    Attributes:
        weights: the file of trained weights, for ``train --weights``.
        images: training images.
        seconds: by part of the job.
        score: on the held-out images.
    """

    weights: Path
    images: int
    seconds: dict[str, float]
    score: Score

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return asdict(self) | {"weights": str(self.weights)}


def teach(
    config: RunConfig | None = None,
    *,
    output: Path | str | None = None,
    resume: Path | str | None = None,
    listener: Listener | None = None,
) -> TeachResult:
    """Train a full-precision model with labels, into a run folder.

    Args:
        config: model, data, teacher, device, and the distillation's seed, ``compile``,
            ``precision`` and ``save_seconds``; ``model.weights`` are where it starts from,
            all but the last layer if they tell other classes apart.
        output: the run folder; None picks a free name under ``runs/``.
        resume: a teacher's run folder to go on with; excludes the two above.
        listener: hears of the progress.

    Raises:
        SqakdError: of the kind that says what is wrong; nothing but the run folder is written.
    """
    if resume is not None and (config is not None or output is not None):
        raise SpecError("resume: a run goes on with its own config and folder; give no others")
    found = reopen(resume, "teacher") if resume is not None else None
    config = found.config if found else config or RunConfig()
    return _teach(Job(config, listener or Listener(), found), found, output)


def _teach(job: Job, found: Run | None, output: Path | str | None) -> TeachResult:
    config = job.config
    with job.prepared(config.teacher.batch_size, labelled=True) as (model, data):
        labels = data.test.need_labels()
        if config.model.weights is not None:
            _start_from(job, model, data, found)
        run = job.opened(lambda: found or create_run(config, output, "teacher"))
        message = f"interrupted; go on with 'sqakd-deploy teacher --resume {run.path}'"
        with job.recorded(run, lambda: job.listener.message(message)):
            job.train_teacher(model, data, run)
            run.save(model.eval(), TEACHER)
            with job.timed("evaluation"):
                logits = predict(model, still_batches(data.test, data.preprocessing))
        score = score_logits("teacher", logits, labels)
        result = TeachResult(run.path / TEACHER, len(data.train.images), job.seconds, score)
        job.finish(run, result.to_dict())
        return result


def _start_from(job: Job, model: nn.Module, data: ImageData, found: Run | None) -> None:
    """Load what training starts from: all of it, or all but a classifier of other classes."""
    wanted = job.config.model
    assert wanted.weights is not None
    try:
        other = origin_of(wanted).of_other_classes(data)
        classes = load_any_weights(
            model,
            wanted.name,
            wanted.weights,
            new_classifier=True,
            other_classes=other,
            message=job.listener.message,
        )
    except CheckpointError as error:
        if found is None or not (found.path / LAST / TEACHING).exists():
            raise
        job.listener.message(f"{error}; going on from what the run saved")
        return
    if classes is not None:
        job.listener.message(
            f"the weights tell {classes} {'other ' * other}classes apart: the last layer starts "
            "anew, the others from them"
        )
