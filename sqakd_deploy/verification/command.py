"""What ``sqakd-deploy verify`` does once its options are parsed; torch only for a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sqakd_deploy.bench.inputs import metadata_of
from sqakd_deploy.consoles import console, print_json, show
from sqakd_deploy.errors import SpecError
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.verification.ir_file import Converter
from sqakd_deploy.verification.isolated import Isolator
from sqakd_deploy.verification.reference import Reference, load_reference, save_reference
from sqakd_deploy.verification.showing import verification_parts
from sqakd_deploy.verification.stages import Tolerance
from sqakd_deploy.verification.verifying import Recorder, verify_file

SAMPLES = 2048
"""Images compared where nobody says how many."""


def verify(
    path: Path,
    *,
    run: Path | None,
    reference: Path | None,
    data: str | None,
    samples: int | None,
    min_agreement: float,
    max_accuracy_gap: float,
    max_mean_error: float,
    runtime: tuple[str, ...],
    layers: bool,
    layer_samples: int,
    save_reference: Path | None,
    as_json: bool,
) -> None:
    """Verify a file, print what was found, fail if it is not its student."""
    count = layer_samples if layers else 0
    others = {name: get_runtime(name) for name in runtime} or None
    recorder = isolator = converter = None
    if reference is not None:
        _refuse(run=run, data=data, samples=samples, save_reference=save_reference)
        answers = load_reference(reference)
    else:
        answers, recorder, isolator, converter = _from_run(path, run, data, samples or SAMPLES)
    report = verify_file(
        path,
        answers,
        tolerance=Tolerance(min_agreement, max_accuracy_gap, max_mean_error),
        layer_samples=count,
        recorder=recorder,
        isolator=isolator,
        converter=converter,
        others=others,
    )
    if save_reference is not None:
        _save(report.reference, save_reference)
    if as_json:
        print_json({"path": str(path)} | report.to_dict())
    else:
        out = console()
        show(out, verification_parts(report, out.width))
    report.raise_for_failures()


def _refuse(**given: object) -> None:
    """Options that a saved reference leaves no room for."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names:
        raise SpecError(
            f"--reference has images and answers of its own; leave out {', '.join(names)}"
        )


def _from_run(
    path: Path, run: Path | None, data: str | None, samples: int
) -> tuple[Reference, Recorder, Isolator, Converter]:
    """The student of the run that is named, or of the file's own."""
    # Imported late: all of this needs torch, and verifying against a reference must not.
    from sqakd_deploy.checkpoint import open_run, other_student, own_run
    from sqakd_deploy.runs import held_out, load_student
    from sqakd_deploy.verification.converting import converter_of
    from sqakd_deploy.verification.isolating import isolator_of
    from sqakd_deploy.verification.student import record, reference_of

    facts = metadata_of(path)
    loaded = load_student(open_run(run) if run else own_run(facts, path))
    said = f"verifying against {loaded.run.path} ({loaded.run.status})"
    for line in filter(None, (said, other_student(facts, path, loaded.run))):
        console(stderr=True).print(line, highlight=False, soft_wrap=True)
    images, split = held_out(loaded, data, samples)
    answers = reference_of(loaded.student, images, labels=split.labels, metadata=loaded.metadata)
    student = loaded.student
    return answers, partial(record, student), isolator_of(student), converter_of(student)


def _save(answers: Reference, path: Path) -> None:
    save_reference(answers, path)
    console(stderr=True).print(f"wrote {path}", highlight=False, soft_wrap=True)
