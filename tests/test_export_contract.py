"""One suite over every registered method and every installed exporter.

A newcomer's quantizer or exporter is tested by registering or installing it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, SHAPE, exact_here, images, network

from sqakd_deploy.api import export
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.parity import verify
from sqakd_deploy.plugins import exporters, get_exporter, get_runtime
from sqakd_deploy.quantization import quantize, reestimate_batch_norm
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.isolating import isolate

BITS = (1, 2, 3, 4, 8)
# QONNX has one stage and one opset, files for TensorRT run in float: both have tests of their own.
TARGETS = sorted(set(exporters()) - {"qonnx", "tensorrt"})
ALL_BITS = ("lsq", "ewgs")  # a grid with zero, one without
COMBINATIONS = [
    (method, bits, target)
    for target in TARGETS
    for method in METHODS
    for bits in BITS
    # A method is what it is in the integers, whatever writes them: elsewhere 4 bits show it, and
    # each width on a grid of each kind that it is written.
    if target == "onnxruntime" or bits == 4 or method in ALL_BITS
]
TRAINED = DistillConfig(epochs=2, batch_size=32, lr=3e-3, quantizer_lr=1e-3, bn_images=128)

# Rule 20: an optimised runtime may land on the neighbouring code where its arithmetic rounds a
# sum or a mean the other way. Through the layers behind, one such code moves a logit by a few
# steps of the output; more than that is a wrong scale, sign or bias. Logits are whole steps apart,
# but for float noise: half a step is left to it.
FEW_STEPS = 4.5

# Snapped biases make the integers and the student one function. What is left is the float noise of
# sums, some 3e-7 relative: an 8-bit code (up to 255 steps) then lies within 1e-4 steps of a
# rounding boundary by chance, so of the 1,500 codes behind an image's logits one in some images
# is its neighbour. A wrong constant moves every logit.
RARELY = 0.05


@cache
def student_of(name: str, spec: QuantSpec) -> torch.fx.GraphModule:
    """A trained student, made once: tests only read it."""
    teacher = network(name)
    reestimate_batch_norm(teacher, images(128))
    student = quantize(teacher, spec, example=SHAPE)
    distill(student, images(128), teacher=teacher, config=TRAINED)
    return student


def spec_of(method: str, bits: int, target: str, **more: object) -> QuantSpec:
    side = TensorSpec(method=method, bits=bits)
    values = {"weights": side, "activations": side, "target": target, **more}
    return exact_here(QuantSpec.parse(values))


@pytest.mark.parametrize(("method", "bits", "target"), COMBINATIONS)
def test_every_method_exports_exactly(method: str, bits: int, target: str, tmp_path: Path) -> None:
    student = student_of("residual", spec_of(method, bits, target))
    artifact = export(student, tmp_path / "model.onnx")
    held_out = images(256, seed=5)
    report = verify(artifact, student, held_out)
    _, unoptimised, optimised = report.stages
    for stage in (unoptimised, optimised):
        assert stage.mean_error < RARELY
    if max(stage.max_error for stage in (unoptimised, optimised)) > FEW_STEPS:
        # A 1-bit code is all of its tensor's range: one at a border may move logits further.
        assert bits == 1
        runtime = get_runtime(get_exporter(target).runtime)
        alone = isolate(student, QdqFile(artifact.path), runtime, held_out.numpy())
        assert alone.differing > 0
        assert alone.faulty == ()
    assert report.coverage.fallbacks == ()
    assert report.coverage.total == report.coverage.integer


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_runs_in_integers(name: str, target: str, tmp_path: Path) -> None:
    student = student_of(name, spec_of("lsq", 4, target))
    artifact = export(student, tmp_path / "model.onnx")
    report = verify(artifact, student, images(256, seed=5))
    assert report.coverage.fallbacks == ()
    assert max(stage.max_error for stage in report.stages) <= FEW_STEPS
    expected = {"residual": {"Conv": 4, "Gemm": 1, "Add": 1, "GlobalAveragePool": 1}}
    if name in expected:
        assert report.coverage.integer == expected[name]


@pytest.mark.parametrize("target", TARGETS)
def test_mixed_methods_and_bits(target: str, tmp_path: Path) -> None:
    spec = QuantSpec(
        weights=TensorSpec(method="ewgs", bits=2, per_channel=True),
        activations=TensorSpec(method="pact", bits=5),
        residual_bits=6,
        first_last_bits=7,
        output_bits=None,
        target=target,
    )
    student = student_of("residual", spec)
    artifact = export(student, tmp_path / "model.onnx")
    report = verify(artifact, student, images(256, seed=5))
    assert report.coverage.fallbacks == ()
    assert report.output_step_source == "1/255 of the logits' range"
    assert max(stage.max_error for stage in report.stages) <= FEW_STEPS


@pytest.mark.parametrize("target", TARGETS)
def test_paper_placement_says_what_stays_in_float(target: str, tmp_path: Path) -> None:
    student = student_of("residual", spec_of("lsq", 4, target, placement="paper"))
    artifact = export(student, tmp_path / "model.onnx")
    report = verify(artifact, student, images(256, seed=5))
    assert min(stage.agreement for stage in report.stages) == 100.0
    reasons = {fallback.op_type: fallback.reason for fallback in report.coverage.fallbacks}
    assert set(reasons) >= {"Conv", "Gemm"}
    assert all("rule" in reason for reason in reasons.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_is_dynamic(target: str, batch: int, tmp_path: Path) -> None:
    student = student_of("mixed", spec_of("lsq", 4, target))
    artifact = export(student, tmp_path / "model.onnx")
    session = get_runtime(get_exporter(target).runtime).open(artifact.path)
    array = images(8).numpy()
    whole = session.run(array)
    np.testing.assert_array_equal(session.run(array[:batch]), whole[:batch])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_opset_names_and_metadata(target: str, opset: int, tmp_path: Path) -> None:
    student = student_of("residual", spec_of("lsq", 4, target))
    options = ExportOptions(opset=opset, input_name="pixels", output_name="scores")
    artifact = export(student, tmp_path / "m.onnx", options=options, metadata={"who": "me"})
    model = onnx.load(artifact.path)
    assert model.opset_import[0].version == opset
    assert [value.name for value in model.graph.input] == ["pixels"]
    assert [value.name for value in model.graph.output] == ["scores"]
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts["who"] == "me"
    assert QuantSpec.model_validate_json(facts["sqakd.spec"]) == spec_of("lsq", 4, target)
    report = verify(artifact, student, images(64))
    assert max(stage.max_error for stage in report.stages) <= FEW_STEPS
