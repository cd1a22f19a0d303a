"""SQuaT's term: what is compared, what gradient it gives, and what it never sees."""

from __future__ import annotations

import pytest
import torch
from networks import CLASSES, SHAPE, images, network
from torch import Tensor, nn

from sqakd_deploy.errors import ModelError, SpecError
from sqakd_deploy.quantization import activation_quantizers, calibrate, quantize
from sqakd_deploy.quantizers import ActivationQuantizer
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.training.features import WithCodes, feature_loss, with_codes
from sqakd_deploy.training.hessian import update_deltas

METHODS = ("lsq", "ewgs", "pact", "dorefa", "ste")
BITS = 3
STEPS = 2**BITS - 1


def pair(method: str = "lsq", placement: str = "target") -> tuple[nn.Module, WithCodes, WithCodes]:
    side = TensorSpec(method=method, bits=BITS)
    spec = QuantSpec(weights=side, activations=side, placement=placement)
    teacher = network("residual").eval()
    student = quantize(teacher, spec, example=SHAPE)
    calibrate(student, images(32))
    return student, *with_codes(student.eval(), teacher)


def tapped(student: nn.Module) -> ActivationQuantizer:
    """The quantizer before ``conv2``, the last inner layer of the residual network."""
    found = activation_quantizers(student)
    (name,) = [name for name in found if name.startswith("quant_relu_1.")]
    return found[name]


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_on_the_unit_interval_and_logits_as_before(method: str) -> None:
    student, ours, theirs = pair(method)
    batch = images(16)
    with torch.no_grad():
        logits, codes = ours(batch)
        wanted, target = theirs(batch)
        torch.testing.assert_close(logits, student(batch), rtol=0, atol=0)
        torch.testing.assert_close(wanted, network("residual").eval()(batch))
    for found in (codes, target):
        levels = found * STEPS
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert float(found.min()) >= -1e-6
        assert float(found.max()) <= 1 + 1e-6
        assert len(levels.round().unique()) > 2


@pytest.mark.parametrize("placement", ["target", "paper"])
def test_the_teacher_is_quantised_by_the_students_quantizer(placement: str) -> None:
    """Recomputed from the float model's own tensor and the numbers of an export."""
    _, _, theirs = pair(placement=placement)
    model, batch = network("residual").eval(), images(16)
    seen: list[Tensor] = []
    model.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(batch)
        _, codes = theirs(batch)
    step, zero, _ = theirs.quantizer.grid()
    expected = ((seen[0] / step).round() + zero).clamp(0, STEPS) / STEPS
    torch.testing.assert_close(codes, expected)


def test_gradients_reach_the_step_through_the_student_alone() -> None:
    """LSQ: q = R(x/s) in range, so that dq/ds is −x/s² with the rounding passed through."""
    student, ours, theirs = pair()
    batch = images(16)
    quantizer = ours.quantizer
    assert quantizer is tapped(student)
    parameters = list(quantizer.parameters())
    _, codes = theirs(batch)
    feature_loss(torch.zeros_like(codes, requires_grad=True), codes).backward()
    assert all(p.grad is None for p in parameters)
    _, codes = ours(batch)
    feature_loss(codes, torch.zeros_like(codes)).backward()
    (step,) = parameters
    assert step.grad is not None
    assert float(step.grad) < 0  # a longer step makes codes smaller, and so the loss


def test_the_gradient_of_normalised_codes() -> None:
    """Against finite differences of x/s clipped to the range, which the rule passes through."""
    _, ours, _ = pair("ste")
    quantizer = ours.quantizer
    step, _, _ = (float(v) for v in quantizer.grid())
    x = torch.tensor([0.3, 1.7, 2.2, 40.0]).mul(step).requires_grad_()
    quantizer.normalised(quantizer(x)[0]).sum().backward()
    inside = torch.tensor([1.0, 1.0, 1.0, 0.0]) / (step * STEPS)
    torch.testing.assert_close(x.grad, inside)


def test_the_loss_is_a_mean_of_squares() -> None:
    first, second = torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.5])
    assert float(feature_loss(first, second)) == pytest.approx(0.5)


def trained(weight: float) -> tuple[nn.Module, float]:
    """A student, and its feature loss on the training images."""
    side = TensorSpec(method="ewgs", bits=2)
    spec = QuantSpec(weights=side, activations=side)
    teacher = network("residual").eval()
    student = quantize(teacher, spec, example=SHAPE)
    config = DistillConfig(epochs=6, batch_size=16, lr=3e-3, feature_weight=weight, seed=1)
    distill(student, images(64), teacher=teacher, config=config)
    ours, theirs = with_codes(student, teacher)
    with torch.no_grad():
        return student, float(feature_loss(ours(images(64))[1], theirs(images(64))[1]))


def test_training_with_it_brings_the_codes_together() -> None:
    _, without = trained(0.0)
    _, beside = trained(100.0)
    assert beside < 0.8 * without


def test_its_networks_compile_to_one_graph() -> None:
    _, ours, theirs = pair("ewgs")
    batch = images(16)
    for net in (ours, theirs):
        wanted = net(batch)
        found = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)(batch)
        torch.testing.assert_close(found, wanted)


def test_hessian_deltas_see_the_term() -> None:
    def deltas(weight: float) -> dict[str, float]:
        student, _, _ = pair("ewgs")
        teacher = network("residual").eval()
        with torch.no_grad():
            teacher.conv1.weight.mul_(1.3)  # else student and teacher are at the minimum
        return update_deltas(
            student, teacher, [images(16)], temperature=4.0, feature_weight=weight, probes=4
        )

    plain, beside = deltas(0.0), deltas(10.0)
    assert plain.keys() == beside.keys()
    assert plain != beside


def test_what_cannot_be_compared_is_refused() -> None:
    student, _, _ = pair()
    with pytest.raises(SpecError, match="teacher has no tensor 'relu_1'"):
        with_codes(student, nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)))
    with pytest.raises(ModelError, match="wanted a student made by quantize"):
        with_codes(nn.Identity(), nn.Identity())
    alone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES))
    only_ends = quantize(alone, QuantSpec(), example=SHAPE)
    with pytest.raises(SpecError, match="no layer of this model has 4-bit weights"):
        with_codes(only_ends, alone)
    with pytest.raises(SpecError, match="not with 'ce'"):
        DistillConfig(feature_weight=1.0, loss="ce")
