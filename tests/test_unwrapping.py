"""Models as scripts hold them: wrapped, frozen, synchronised, hooked, on another device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import SHAPE, Residual, images
from torch import Tensor, nn
from torch.nn.utils import prune

from sqakd_deploy.errors import ModelError
from sqakd_deploy.quantization import calibrate, quantize, weight_quantizers
from sqakd_deploy.quantizers import WeightQuantizer
from sqakd_deploy.spec import DistillConfig, QuantSpec
from sqakd_deploy.training.distillation import distill


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 6), nn.Flatten()]
    return nn.Sequential(*layers).eval()


def names(student: nn.Module) -> list[str]:
    return [name for name, _ in student.named_parameters()]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = small()
    assert names(quantize(wrap(model), example=SHAPE)) == names(quantize(model, example=SHAPE))


def test_a_frozen_teacher_has_a_student_that_learns() -> None:
    teacher = small().requires_grad_(False)
    student = quantize(teacher, example=SHAPE)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = student.get_parameter("0.weight").detach().clone()
    distill(student, images(64), teacher=teacher, config=DistillConfig(epochs=1, batch_size=16))
    assert not torch.equal(student.get_parameter("0.weight"), before)


def test_synchronised_batch_norm_is_batch_norm() -> None:
    model = small()
    model[1].running_mean.normal_()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    synced.load_state_dict(model.state_dict())
    students = [quantize(m, example=SHAPE) for m in (model, synced.eval())]
    for student in students:
        calibrate(student, images(64))
    assert torch.equal(*(student(images()) for student in students))
    assert type(students[1].get_submodule("1")) is nn.BatchNorm2d
    assert isinstance(synced[1], nn.SyncBatchNorm)


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "bias", 0.5)


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (
            pruned,
            r"its bias is computed \(pruning\); .* torch.nn.utils.prune.remove\(layer, 'bias'",
        ),
        (nn.utils.weight_norm, r"its weight is computed \(weight_norm\); .*remove_weight_norm"),
        (nn.utils.spectral_norm, r"its weight is computed \(spectral_norm\); .*remove_spectral"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_compute_are_refused_with_their_remedy(
    compute: Callable[[nn.Module], object], words: str
) -> None:
    model = small()
    compute(model[0])
    with pytest.raises(ModelError, match=rf"layer '0': {words}"):
        quantize(model, example=SHAPE)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_layers_with_hooks_are_refused(register: str) -> None:
    model = small()
    handle = getattr(model[3], register)(lambda module, inputs, *output: None)
    with pytest.raises(ModelError, match="layer '3': it has forward hooks"):
        quantize(model, example=SHAPE)
    handle.remove()
    quantize(model, example=SHAPE)


class Named(nn.Module):
    """A layer with the name that another one's quantizer would get."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.quant_relu = nn.ReLU(), nn.Conv2d(3, 5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_relu(self.relu(x)).flatten(1)


def test_a_quantizer_takes_the_name_of_no_layer() -> None:
    torch.manual_seed(0)
    model = Named().eval()
    student = quantize(model, QuantSpec(), example=SHAPE)
    assert list(weight_quantizers(student)) == ["quant_relu.weight_quant.tensor_quant"]
    calibrate(student, images(64))
    with torch.no_grad():
        assert torch.allclose(student(images()), model(images()), atol=0.2)


def test_a_student_is_where_its_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values, no answers can be compared and no steps be searched."""
    monkeypatch.setattr("sqakd_deploy.tracing.trace._differs", lambda found, wanted: False)
    monkeypatch.setattr(WeightQuantizer, "search", lambda self, weight: self.step)
    student = quantize(Residual().to("meta"), example=SHAPE)
    assert {tensor.device.type for tensor in student.state_dict().values()} == {"meta"}
