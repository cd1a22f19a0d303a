from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from networks import SHAPE, images, network
from torch import nn

from sqakd_deploy.models import MODELS, build_model
from sqakd_deploy.models.resnet import CifarResNet
from sqakd_deploy.models.vgg import vgg8
from sqakd_deploy.quantization import batch_norms, calibrate, quantize
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training import acceleration, distillation
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


@pytest.mark.parametrize(
    ("machine", "has", "bf16"),
    [
        ("x86_64", {"mkldnn"}, False),  # by way of float32, several times slower than in it
        ("AMD64", {"mkldnn", "avx512"}, True),
        ("x86_64", {"mkldnn", "amx"}, True),
        ("x86_64", {"avx512"}, True),
        ("aarch64", {"mkldnn"}, True),
        ("arm64", set[str](), False),
    ],
)
def test_bfloat16_is_chosen_where_the_cpu_multiplies_in_it(
    machine: str, has: set[str], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(acceleration.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in has)
    mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: "mkldnn" in has)
    monkeypatch.setattr(torch.ops, "mkldnn", mkldnn)
    for precision, wanted in (("auto", bf16), ("bf16", True), ("fp32", False)):
        config = DistillConfig.parse({"compile": "on", "precision": precision})
        how = decide(config, network("residual"), images(16), 10, CPU)
        assert how.bf16 is wanted, precision
        assert how.reason.endswith(
            "; bfloat16, channels last" if wanted else "; float32, channels last"
        )


@pytest.mark.parametrize(
    ("machine", "system", "known", "flag"),
    [
        ("x86_64", "linux", ["cpp.march"], True),
        ("x86_64", "linux", [], False),  # a torch that takes no flags
        ("AMD64", "win32", ["cpp.march"], False),
        ("arm64", "darwin", ["cpp.march"], False),
    ],
)
def test_bfloat16_kernels_are_compiled_without_the_flag_that_breaks_them(
    machine: str, system: str, known: list[str], flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GCC makes of them is `test_compiled_and_eager_agree`."""
    import torch._inductor

    monkeypatch.setattr(acceleration.platform, "machine", lambda: machine)
    monkeypatch.setattr(acceleration.sys, "platform", system)
    monkeypatch.setattr(torch._inductor, "list_options", lambda: known)
    taken: list[object] = []
    monkeypatch.setattr(
        acceleration.torch, "compile", lambda model, **given: taken.append(given["options"])
    )
    for bf16 in (False, True):
        acceleration.Acceleration(True, bf16, True, "").compiled(nn.ReLU(), whole=True)
    wanted = {"cpp.march": "native -fno-tree-slp-vectorize"} if flag else None
    assert taken == [None, wanted]


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
    BatchNorm's parameters move as in eager training of the same memory layout. In another layout a
    convolution sums in another order and codes flip: 0.5 to 2.3 % of the way on two CPUs."""
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: f"/usr/bin/{name}")
    backend = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(acceleration.torch, "compile", backend)
    monkeypatch.setattr(
        distillation, "decide", lambda *given: replace(decide(*given), channels_last=True)
    )
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
    assert (compiled - eager).norm() < 1e-5 * (eager - start).norm()


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


def gradients(
    teacher: nn.Module,
    batch: torch.Tensor,
    how: acceleration.Acceleration,
    placement: Literal["target", "paper"] = "target",
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        target = teacher(batch)
    wanted = spec("lsq").model_copy(update={"placement": placement})
    student = quantize(teacher, wanted, example=tuple(batch.shape[1:])).train()
    calibrate(student, batch)
    if placement == "paper":
        for norm in batch_norms(student):
            norm.eval()
    torch._dynamo.reset()
    ready = how.compiled(how.place(student), whole=True)
    with how.autocast(CPU):
        found = ready(how.images(batch))
    distillation_loss(found, target, 4.0).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_compiled_and_eager_agree() -> None:
    """In float32 inductor reorders sums, 1e-6 relative; through a rounding that is another 4-bit
    code here and there. Single elements may then differ by far more, so whole gradients are
    compared: seen within 2 % of their norm."""
    eager, compiled = (
        gradients(network("residual"), images(32), acceleration.Acceleration(on, False, False, ""))
        for on in (False, True)
    )
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():
        if gradient.dim() < 2:
            continue  # a quantizer's step: a sum that all but cancels, its terms see above
        assert (compiled[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-4, name


@pytest.mark.slow
def test_compiled_in_bfloat16_gradients_are_of_the_eager_ones_size() -> None:
    """Many codes flip in bfloat16, and gradients of an untrained network with them: what a wrong
    kernel makes of them, NaN and 1e38, is still told apart, at a size where tiles are whole."""
    teacher = CifarResNet(blocks=3).eval()
    batch = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    eager, compiled = (
        gradients(teacher, batch, acceleration.Acceleration(on, True, True, ""), "paper")
        for on in (False, True)
    )
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():
        assert bool(compiled[name].isfinite().all()), name
        if gradient.dim() >= 2:
            assert 0.5 < compiled[name].norm() / gradient.norm() < 2.0, name
