from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from networks import SHAPE, images, network
from torch import nn

from sqakd_deploy.models import MODELS, build_model
from sqakd_deploy.models.resnet import CifarResNet
from sqakd_deploy.models.vgg import vgg8
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training import acceleration
from sqakd_deploy.training.acceleration import decide, fitting_threads, multiply_adds
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.training.losses import distillation_loss

CPU = torch.device("cpu")


def spec(method: str) -> QuantSpec:
    side = TensorSpec(method=method, bits=4)
    return QuantSpec(weights=side, activations=side)


def test_multiply_adds_are_counted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(512, 5)
    )
    assert multiply_adds(model, torch.zeros(1, *SHAPE)) == 3 * 8 * 9 * 64 + 512 * 5


@pytest.mark.parametrize(
    ("asked", "steps", "compiles", "words"),
    [
        ("auto", 10, False, "eager: "),
        ("auto", 10**8, True, "compiled: "),
        ("on", 1, True, "compiled, as asked"),
        ("off", 10**8, False, "eager, as asked"),
    ],
)
def test_auto_decides_from_the_steps_ahead(
    asked: str, steps: int, compiles: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: f"/usr/bin/{name}")
    config = DistillConfig.parse({"compile": asked})
    how = decide(config, network("residual"), images(16), steps, CPU)
    assert how.compile is compiles
    assert how.reason.startswith(words)
    assert how == decide(config, network("residual"), images(16), steps, CPU)


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: None)
    config = DistillConfig(compile="on", epochs=1, batch_size=16)
    said: list[str] = []
    teacher = network("residual")
    student = quantize(teacher, example=SHAPE)
    distill(student, images(32), teacher=teacher, config=config, message=said.append)
    assert any("there is no C++ compiler (install g++ to train faster)" in text for text in said)


def test_small_networks_train_on_one_thread() -> None:
    before = torch.get_num_threads()
    with fitting_threads(network("residual"), images(16)):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def one_graph(model: nn.Module) -> None:
    """``fullgraph=True`` makes any graph break an error; the backend does not matter for that."""
    student = quantize(model, spec("ewgs"), example=(3, 16, 16))
    batch = torch.randn(4, 3, 16, 16)
    calibrate(student, batch)
    torch._dynamo.reset()
    compiled = torch.compile(student.train(), fullgraph=True, backend="eager")
    compiled(batch).sum().backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("make", [lambda: CifarResNet(blocks=1), vgg8], ids=["resnet", "vgg"])
def test_students_of_each_kind_are_one_graph(make: Callable[[], nn.Module]) -> None:
    """The other built-in networks are more of the same layers."""
    one_graph(make())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_built_in_student_is_one_graph(name: str) -> None:
    one_graph(build_model(name, num_classes=10, in_channels=3))


@pytest.mark.parametrize("features", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_compiled_training_is_eager_training(
    features: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both networks and the freeze in mid-run, as torch.compile captures them: weights, bounds and
    BatchNorm's parameters move as in eager training, but for the order of a convolution's sums in
    another layout (seen: half a percent of the way)."""
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: f"/usr/bin/{name}")
    backend = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(acceleration.torch, "compile", backend)
    settings = {"epochs": 2, "batch_size": 16, "precision": "fp32", "freeze_bn_after": 0.5}
    teacher, found = network("residual"), []
    for epochs, compiles in ((0, "off"), (2, "off"), (2, "on")):
        torch._dynamo.reset()
        changed = {"compile": compiles, "feature_weight": features, "epochs": epochs}
        student = quantize(teacher, spec("ewgs"), example=SHAPE)
        config = DistillConfig.parse(settings | changed)
        distill(student, images(64), teacher=teacher, config=config)
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    start, eager, compiled = found
    assert (compiled - eager).norm() < 0.02 * (eager - start).norm()


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("residual", method) for method in METHODS), ("mixed", "ewgs"), ("preactivation", "ewgs")],
)
def test_every_method_is_one_graph(name: str, method: str) -> None:
    """A graph breaks in a quantizer or in what a network does between them, each on its own."""
    student = quantize(network(name), spec(method), example=SHAPE)
    calibrate(student, images())
    torch._dynamo.reset()
    compiled = torch.compile(student.train(), fullgraph=True, backend="eager")
    torch.manual_seed(1)
    found = compiled(images())
    torch.manual_seed(1)
    assert torch.equal(found, student(images()))


def test_quantizers_stay_in_float32_under_autocast() -> None:
    student = quantize(network("residual"), spec("lsq"), example=SHAPE)
    calibrate(student, images())
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def watch(module: nn.Module, inputs: tuple[torch.Tensor], outputs: object) -> None:
        scale = outputs[1]  # type: ignore[index]
        seen.append((inputs[0].dtype, scale.dtype))

    for module in student.modules():
        if isinstance(module, tuple(m.activation for _, m in METHODS.items())):
            module.register_forward_hook(watch)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        student.train()(images()).float().sum().backward()
    assert torch.bfloat16 in {dtype for dtype, _ in seen}
    assert {dtype for _, dtype in seen} == {torch.float32}
    assert {p.grad.dtype for p in student.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.slow
def test_compiled_and_eager_agree() -> None:
    """In float32 inductor reorders sums, 1e-6 relative; through a rounding that is another 4-bit
    code here and there. Single elements may then differ by far more, so whole gradients are
    compared: seen within 2 % of their norm."""
    teacher = network("residual")
    batch = images(32)
    with torch.no_grad():
        target = teacher(batch)
    grads = []
    for compiles in (False, True):
        student = quantize(teacher, spec("lsq"), example=SHAPE)
        calibrate(student, batch)
        torch._dynamo.reset()
        ready = torch.compile(student.train(), fullgraph=True) if compiles else student.train()
        distillation_loss(ready(batch), target, 4.0).backward()
        grads.append({n: p.grad for n, p in student.named_parameters()})
    for name, eager in grads[0].items():
        assert eager is not None
        if eager.dim() < 2:
            continue  # a quantizer's step: a sum that all but cancels, its terms see above
        difference = (grads[1][name] - eager).norm()
        assert difference < 0.05 * eager.norm() + 1e-4, name
