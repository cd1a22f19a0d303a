"""Models as scripts hold them: wrapped, frozen, synchronised, hooked, on another device."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SHAPE, Residual, images
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

from sqakd_deploy.api import export
from sqakd_deploy.errors import ModelError, SpecError
from sqakd_deploy.parity import verify
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


class Ranks(nn.Module):
    """BatchNorm of vectors, of rows of pixels and of images; one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.images = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.rows, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.vectors = self.again = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.images(self.conv(x)).relu()
        x = self.rows(x.flatten(2)).mean(2)
        return self.fc(self.again(x).relu())


def test_synchronised_batch_norm_is_that_of_its_inputs_rank() -> None:
    """``convert_sync_batchnorm`` converts each kind alike."""
    torch.manual_seed(0)
    model = Ranks().eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    synced.again = synced.vectors  # which is converted under the first of its names alone
    students = [quantize(m, example=SHAPE) for m in (model, synced)]
    assert names(students[0]) == names(students[1])
    for student, teacher in zip(students, (model, synced), strict=True):
        config = DistillConfig(epochs=1, batch_size=16)
        distill(student, images(64), teacher=teacher, config=config)
    assert torch.equal(*(student(images()) for student in students))


def frozen(model: nn.Sequential) -> nn.Sequential:
    """The model with torchvision's frozen BatchNorm, of the same numbers."""
    norm = FrozenBatchNorm2d(model[1].num_features, model[1].eps)
    norm.load_state_dict(model[1].state_dict())
    return nn.Sequential(model[0], norm, *model[2:]).eval()


def test_frozen_batch_norm_is_batch_norm_with_constant_factors(tmp_path: Path) -> None:
    model = small()
    for tensor in (model[1].running_mean, model[1].weight.data, model[1].bias.data):
        tensor.normal_()
    students = [quantize(m, example=SHAPE) for m in (model, frozen(model))]
    layers = [[(n, type(m).__name__) for n, m in student.named_modules()] for student in students]
    assert layers[0] == layers[1]
    assert [name for name, p in students[1].named_parameters() if not p.requires_grad] == [
        "1.weight",
        "1.bias",
    ]
    for student in students:
        calibrate(student, images(64))
    assert torch.equal(*(student(images()) for student in students))
    config = DistillConfig(epochs=1, batch_size=16)
    kept = students[1].get_parameter("1.weight").clone()
    distill(students[1], images(64), teacher=frozen(model), config=config)
    assert torch.equal(students[1].get_parameter("1.weight"), kept)
    report = verify(export(students[1], tmp_path / "model.onnx"), students[1], images())
    report.raise_for_failures()
    assert report.coverage is not None
    assert report.coverage.integer == {"Conv": 2}
    assert not report.coverage.fallbacks


@pytest.mark.parametrize("other", [frozen, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_hooks_of_other_batch_norms_are_refused(
    other: Callable[[nn.Sequential], nn.Sequential],
) -> None:
    model = other(small())
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(ModelError, match="layer '1': it has forward hooks"):
        quantize(model, example=SHAPE)


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


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_parts_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """As PyTorch's ImageNet example wraps ``features`` alone."""
    model = nn.Sequential(wrap(small()[:3]), small()[3:])
    plain = nn.Sequential(small()[:3], small()[3:])
    assert names(quantize(model, example=SHAPE)) == names(quantize(plain, example=SHAPE))
    assert not isinstance(model[0], nn.Sequential)


def test_parametrized_layers_are_refused_with_their_remedy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.Linear(8, 5)).eval()
    nn.utils.parametrizations.orthogonal(model[2])
    with pytest.raises(ModelError, match=r"layer '2': its weight is computed .*remove_param"):
        quantize(model, example=SHAPE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small, r"wanted a network \(torch.nn.Module\), got a function$"),
        (lambda: nn.Identity, "got the class Identity; call it to make one"),
        (lambda: small().state_dict(), "got a OrderedDict$"),
        (lambda: nn.Sequential(nn.LazyConv2d(5, 8)), "'0.weight' has no shape yet; run the model"),
        (lambda: small().double(), "wanted parameters in float32, got '0.weight' in float64; give"),
        (lambda: small().bfloat16(), "got '0.weight' in bfloat16"),
        (lambda: quantize(small(), example=SHAPE), "wanted the float network, got a student"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_no_float_network_is_refused(make: Callable[[], Any], words: str) -> None:
    model = make()
    with pytest.raises(ModelError, match=f"^model: .*{words}"):
        quantize(model, example=SHAPE)
    teacher = small()
    student = quantize(teacher, example=SHAPE)
    with pytest.raises(ModelError, match=f"^teacher: .*{words}"):
        distill(student, images(), teacher=model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_student_in_another_type_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    student = quantize(small(), example=SHAPE)
    calibrate(student, images(64))
    path = export(student, tmp_path / "m.onnx").path
    other = copy.deepcopy(student).to(dtype)
    name = str(dtype).removeprefix("torch.")
    words = rf"^student: wanted parameters in float32, got '0.weight' in {name}; give student.float"
    with pytest.raises(ModelError, match=words):
        export(other, tmp_path / "n.onnx")
    with pytest.raises(ModelError, match=words):
        verify(path, other, images())
    if dtype == torch.float64:  # which holds every float32
        verify(path, other.float(), images()).raise_for_failures()


def test_settings_of_another_kind_are_refused() -> None:
    with pytest.raises(SpecError, match=r"^spec: wanted a QuantSpec, got a int"):
        quantize(small(), 4, example=SHAPE)  # type: ignore[arg-type]
    config = {"epochs": 1}
    student = quantize(small(), example=SHAPE)
    with pytest.raises(SpecError, match=r"^config: wanted a DistillConfig, got a dict"):
        distill(student, images(), teacher=small(), config=config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)]
)
def test_modes_around_a_call_change_nothing(
    mode: Callable[[], AbstractContextManager[object]], tmp_path: Path
) -> None:
    teacher, config = small(), DistillConfig(epochs=1, batch_size=16)

    def answers() -> Tensor:
        student = quantize(teacher, example=SHAPE)
        distill(student, images(64), teacher=teacher, config=config)
        verify(export(student, tmp_path / "m.onnx"), student, images()).raise_for_failures()
        return student.get_parameter("0.weight").detach()

    wanted = answers()
    with mode():
        assert torch.equal(answers(), wanted)


def test_a_student_can_be_copied_and_is_saved_by_its_tensors() -> None:
    student = quantize(small(), example=SHAPE)
    calibrate(student, images(64))
    twin = copy.deepcopy(student)
    with pytest.raises(ModelError, match=r"cannot be pickled; save its tensors: .*state_dict\(\)"):
        torch.save(twin, io.BytesIO())
    again = quantize(small(), example=SHAPE)
    again.load_state_dict(student.state_dict())
    for other in (twin, again):
        assert torch.equal(other(images()), student(images()))
    calibrate(twin, 2 * images(64))
    assert not torch.equal(twin(images()), student(images()))
