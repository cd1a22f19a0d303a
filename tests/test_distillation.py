from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from networks import CLASSES, SHAPE, images, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sqakd_deploy.errors import DataError, ModelError, SpecError, TrainingError
from sqakd_deploy.quantization import (
    activation_quantizers,
    calibrate,
    quantize,
    reestimate_batch_norm,
    scaling_quantizers,
    weight_quantizers,
)
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.batching import TensorBatches
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.training.fitting import Epoch, Step, cosine, warm_cosine
from sqakd_deploy.training.hessian import update_deltas
from sqakd_deploy.training.losses import distillation_loss, label_loss
from sqakd_deploy.training.optimizers import build_optimizer, parameter_groups

SHORT = DistillConfig(epochs=3, batch_size=16, seed=3)


def spec(method: str, bits: int = 3) -> QuantSpec:
    side = TensorSpec(method=method, bits=bits)
    return QuantSpec(weights=side, activations=side)


def trained(loader: object, config: DistillConfig = SHORT, **options: object) -> nn.Module:
    teacher = network("residual")
    student = quantize(teacher, spec("ewgs"), example=SHAPE)
    distill(student, loader, teacher=teacher, config=config, **options)  # type: ignore[arg-type]
    return student


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class Labelled:
    """Batches of (images, labels), in a fixed order."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(images(64).split(16), self.labels.split(16), strict=True))


class Untouchable:
    """Stands where a label would and fails when it is looked at in any way."""

    def _touched(self, *args: object, **kwargs: object) -> object:
        raise AssertionError("a label was touched")

    __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = __array__ = _touched  # type: ignore
    __add__ = __radd__ = __eq__ = __float__ = __int__ = __index__ = _touched  # type: ignore
    __hash__ = None  # type: ignore[assignment]


class Forbidden(Labelled):
    def __init__(self) -> None:
        super().__init__(torch.zeros(64))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter((batch, Untouchable()) for batch in images(64).split(16))  # type: ignore[misc]


def test_training_never_touches_a_label() -> None:
    student = trained(Forbidden())
    assert same(student, trained(Labelled(torch.zeros(64))))


def test_permuting_the_labels_changes_no_bit() -> None:
    labels = torch.randint(0, CLASSES, (64,))
    permuted = labels[torch.randperm(64)]
    assert not torch.equal(labels, permuted)
    assert same(trained(Labelled(labels)), trained(Labelled(permuted)))


def test_the_supervised_baseline_does_use_them() -> None:
    """The test above can fail: with a loss that sees labels, permuting them changes the student."""
    config = SHORT.model_copy(update={"loss": "kl+ce"})
    labels = torch.randint(0, CLASSES, (64,))
    first = trained(images(64), config, labelled=Labelled(labels))
    second = trained(images(64), config, labelled=Labelled(labels.flip(0)))
    assert not same(first, second)


@pytest.mark.parametrize(("loss", "runs"), [("ce", 0), ("kl+ce", 4)])
def test_labels_alone_need_no_teacher_in_the_loop(loss: str, runs: int) -> None:
    teacher, sizes = network("residual"), []
    teacher.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    student = quantize(teacher, spec("lsq"), example=SHAPE)
    config, steps = SHORT.model_copy(update={"loss": loss, "epochs": 1}), list[Step]()
    labels = torch.zeros(64, dtype=torch.long)
    sizes.clear()
    distill(student, images(64), teacher=teacher, config=config, labelled=Labelled(labels),
            on_step=steps.append)  # fmt: skip
    assert sizes.count(16) == runs
    assert steps[-1].target == ("top-1" if loss == "ce" else "agreement")


def test_hits_of_labels_are_counted() -> None:
    logits = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss, hits = label_loss(logits.bfloat16(), torch.tensor([1, 0, 1, 1]))
    assert (loss.dtype, hits.item()) == (torch.float32, 0.75)
    losses = [math.log1p(math.exp(-gap)) for gap in (2.0, 3.0, -1.0, 1.0)]
    assert loss.item() == pytest.approx(sum(losses) / 4)


def test_labels_and_losses_must_go_together() -> None:
    with pytest.raises(SpecError, match="loss 'ce' wants labelled batches"):
        trained(images(64), SHORT.model_copy(update={"loss": "ce"}))
    with pytest.raises(SpecError, match="loss 'kl' wants no labels"):
        trained(images(64), labelled=Labelled(torch.zeros(64)))


def test_the_same_seed_gives_the_same_bits() -> None:
    assert same(trained(images(64)), trained(images(64)))
    other = SHORT.model_copy(update={"seed": 4})
    assert not same(trained(images(64)), trained(images(64), other))


def test_training_brings_the_student_to_its_teacher() -> None:
    teacher = network("residual")
    reestimate_batch_norm(teacher, images(256))  # a teacher that normalises as in training
    student = quantize(teacher, spec("lsq", 2), example=SHAPE)
    calibrate(student, images(256))
    with torch.no_grad():
        before = distillation_loss(student(images(256)), teacher(images(256)), 4.0)
    config = DistillConfig(epochs=30, batch_size=32)
    records = distill(student, images(256), teacher=teacher, config=config)
    with torch.no_grad():
        after = distillation_loss(student(images(256)), teacher(images(256)), 4.0)
    assert after < before / 2
    assert records[-1].loss < records[0].loss


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = network("residual").train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = quantize(teacher, spec("lsq"), example=SHAPE)
    distill(student, images(64), teacher=teacher, config=SHORT)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_no_epochs_only_calibrate() -> None:
    student = trained(images(64), DistillConfig(epochs=0))
    teacher = dict(network("residual").named_parameters())
    assert torch.equal(student.get_parameter("conv1.weight"), teacher["conv1.weight"])
    assert all(q.calibrated for q in activation_quantizers(student).values())


def ranges(student: nn.Module) -> list[Tensor]:
    quantizers = activation_quantizers(student).values()
    return [value.clone() for q in quantizers for value in q.state_dict().values()]


def alike(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_run_goes_on_with_what_the_first_learned() -> None:
    teacher, untrained = network("residual"), SHORT.model_copy(update={"epochs": 0})
    student = trained(images(64), SHORT.model_copy(update={"quantizer_lr": 0.05}))
    learned = ranges(student)
    for calibration, kept in ((None, True), (images(16, seed=9), False)):
        options = {"teacher": teacher, "config": untrained, "calibration": calibration}
        distill(student, images(64), **options)  # type: ignore[arg-type]
        assert alike(ranges(student), learned) == kept


def test_ranges_set_by_hand_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = network("residual")
    student = quantize(teacher, spec("lsq"), example=SHAPE)
    calibrate(student, 3 * images(64))
    by_hand, begun = ranges(student), list[list[Tensor]]()

    def begin(*arguments: object) -> torch.optim.Optimizer:
        begun.append(ranges(student))
        return build_optimizer(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("sqakd_deploy.training.distillation.build_optimizer", begin)
    distill(student, images(64), teacher=teacher, config=SHORT)
    assert alike(begun[0], by_hand)
    assert not alike(ranges(student), by_hand)


def test_steps_and_epochs_are_reported() -> None:
    steps: list[Step] = []
    epochs: list[Epoch] = []
    trained(images(64), on_step=steps.append, on_epoch=epochs.append)
    assert [(s.epoch, s.step) for s in steps] == [(e, s) for e in range(3) for s in range(4)]
    assert [e.epoch for e in epochs] == [0, 1, 2]
    assert all(0 <= s.agreement <= 100 and s.images_per_second > 0 for s in steps)
    assert steps[0].lr == pytest.approx(1e-3)
    assert steps[-1].lr < steps[0].lr / 5


def spoilt(value: float = float("nan")) -> Tensor:
    """Images of which one pixel is no number."""
    bad = images(64)
    bad[40, 1, 2, 3] = value
    return bad


SPOILT = r"^images: wanted finite numbers, got {0} at \[{1}, 1, 2, 3\] of \({2}, 3, 8, 8\)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("change", [calibrate, reestimate_batch_norm])
@pytest.mark.parametrize("split", [64, 32])
def test_images_that_are_not_finite_change_no_student(
    change: Callable[[nn.Module, object], None], value: float, split: int
) -> None:
    student = trained(images(64))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    batches = spoilt(value) if split == 64 else spoilt(value).split(split)
    with pytest.raises(DataError, match=SPOILT.format(value, 40 % split, split)):
        change(student, batches)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())


@pytest.mark.parametrize("as_batches", [False, True])
def test_training_on_images_that_are_not_finite_is_refused_as_such(as_batches: bool) -> None:
    """Nor does a second try, with good ones, go on from ranges that are no numbers."""
    teacher = network("residual")
    student = quantize(teacher, spec("lsq"), example=SHAPE)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    bad = list(spoilt().split(16)) if as_batches else spoilt()
    words = SPOILT.format("nan", 40 % 16, 16) if as_batches else SPOILT.format("nan", 40, 64)
    with pytest.raises(DataError, match=words):
        distill(student, bad, teacher=teacher, config=SHORT)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    distill(student, images(64), teacher=teacher, config=SHORT)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_batch_that_is_not_finite_is_refused_before_its_step(loss: str) -> None:
    """It was no part of what ranges were set by: neither weights nor statistics are spoilt."""
    teacher = network("residual")
    student = quantize(teacher, spec("lsq"), example=SHAPE)
    batches = list(
        zip(spoilt().split(16), torch.zeros(64, dtype=torch.int64).split(16), strict=True)
    )
    given = {"labelled": batches} if loss == "ce" else {}
    config = SHORT.model_copy(update={"loss": loss, "epochs": 1})
    with pytest.raises(DataError, match=SPOILT.format("nan", 8, 16)):
        distill(student, batches, teacher=teacher, config=config, calibration=images(64), **given)
    assert all(bool(tensor.isfinite().all()) for tensor in student.state_dict().values())


def test_where_only_the_loss_is_looked_at_the_images_are_what_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, which no step waits for."""
    monkeypatch.setattr("sqakd_deploy.given.check_images", lambda images: None)
    with pytest.raises(DataError, match=SPOILT.format("nan", 8, 16)):
        trained(list(spoilt().split(16)), calibration=images(64))


def test_the_first_layer_that_is_not_finite_is_named() -> None:
    teacher = network("residual")
    student = quantize(teacher, spec("lsq"), example=SHAPE)

    def poison(step: Step) -> None:
        if step.epoch == 1:
            student.get_parameter("norm2.bias").data[3] = float("nan")

    with pytest.raises(TrainingError, match=r"layer 'norm2' \(BatchNorm2d\) is the first not fin"):
        distill(student, images(64), teacher=teacher, config=SHORT, on_step=poison)


@pytest.mark.parametrize("clip", [None, 5.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_no_weight(value: float, clip: float | None) -> None:
    """The loss is finite all the while."""
    student = quantize(network("residual"), spec("lsq"), example=SHAPE)
    weight = student.get_parameter("norm2.weight")

    def poison(step: Step) -> None:
        if step.epoch == 1 and step.step == 0:
            weight.register_hook(lambda gradient: gradient.clone().fill_(value))

    config = SHORT.model_copy(update={"clip_grad": clip})
    with pytest.raises(TrainingError, match=r"loss is finite, the gradient of 'norm2\.weight' is"):
        distill(student, images(64), teacher=network("residual"), config=config, on_step=poison)
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"image": images()}, "or a tuple that begins with one, got a dict"),
        (images().numpy(), "got a ndarray"),
        ((images() * 9).byte(), "wanted float32, got uint8; prepare them"),
        (images().double(), r"wanted float32, got float64; give images.float\(\)"),
        (images()[0], r"wanted \(N, 3, 8, 8\), as the student was made for, got \(3, 8, 8\)"),
        (images()[..., :6], r"got \(\d+, 3, 8, 6\)"),
    ],
)
def test_what_are_no_images_of_the_student_is_refused(batch: object, words: str) -> None:
    student = quantize(network("residual"), example=SHAPE)
    with pytest.raises(DataError, match=f"^images: .*{words}"):
        calibrate(student, [batch])
    calibrate(student, images(64))  # which must not be what refuses them
    with pytest.raises(DataError, match=f"^images: .*{words}"):
        distill(student, [batch], teacher=network("residual"), config=SHORT)


def test_images_refused_later_change_no_student() -> None:
    """The first batch is right: ranges and statistics were moving already."""
    student = quantize(network("residual"), example=SHAPE)
    calibrate(student, images(64))
    reestimate_batch_norm(student, images(64))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    batches = [3 * images(32), images(32)[..., :6]]
    for change in (calibrate, reestimate_batch_norm):
        with pytest.raises(DataError, match=r"^images: "):
            change(student, batches)
        assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    student.eval()(images(8))  # calibrated still


class TwoHeads(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.body, self.heads = network("residual"), heads

    def forward(self, x: Tensor) -> object:
        logits = self.body(x)
        return (logits, logits) if self.heads == 2 else logits[:, 1:]


@pytest.mark.parametrize(("heads", "got"), [(2, "a tuple"), (1, r"\(1, 4\)")])
def test_a_teacher_that_answers_otherwise_is_refused(heads: int, got: str) -> None:
    student = quantize(network("residual"), example=SHAPE)
    with pytest.raises(ModelError, match=rf"wanted logits of shape \(1, 5\), .* got {got}"):
        distill(student, images(64), teacher=TwoHeads(heads), config=SHORT)


def test_one_logit_is_refused() -> None:
    """Its softmax is 1 whatever the weights are: nothing would be learned."""
    teacher = nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten())
    student = quantize(teacher, example=SHAPE)
    with pytest.raises(ModelError, match=r"two or more for each image, got for one \(1, 1\)"):
        distill(student, images(64), teacher=teacher, config=SHORT)


@pytest.mark.parametrize("batch", [images(16), (images(16),), (images(16), torch.zeros(16))])
def test_batches_without_labels_are_refused(batch: object) -> None:
    with pytest.raises(DataError, match=r"^labelled: wanted batches \(images, labels\), labels in"):
        trained(images(64), SHORT.model_copy(update={"loss": "ce"}), labelled=[batch] * 2)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.full((16,), CLASSES), f"class indices from 0 to {CLASSES - 1}, got {CLASSES}; numb"),
        (torch.full((16,), -100), "class indices .* got -100; .* leave out images of none"),
        (torch.zeros(15, dtype=torch.long), "16 labels for 16 images, got 15"),
    ],
)
@pytest.mark.parametrize("loss", ["ce", "kl+ce"])
def test_labels_that_no_loss_can_take_are_refused(loss: str, labels: Tensor, words: str) -> None:
    config = SHORT.model_copy(update={"loss": loss})
    right = torch.zeros(16, dtype=torch.long)
    for batches in ([labels], [right, labels]):
        pairs = [(images(16), of_batch) for of_batch in batches]
        with pytest.raises(DataError, match=f"^labelled: wanted .*{words}"):
            trained(images(64), config, labelled=pairs)


@pytest.mark.parametrize("loss", ["kl", "ce", "kl+ce"])
def test_batches_made_in_inference_mode_are_trained_on(loss: str) -> None:
    with torch.inference_mode():
        some = [image.clone() for image in images(64).split(16)]
        pairs = [(image, torch.zeros(16, dtype=torch.long)) for image in some]
    config = SHORT.model_copy(update={"loss": loss, "delta": "hessian", "delta_every": 1})
    trained(some, config, labelled=None if loss == "kl" else pairs)


@pytest.mark.parametrize(("last", "warns"), [(nn.Softmax(1), True), (nn.LogSoftmax(1), False)])
def test_a_teacher_of_probabilities_is_warned_of(last: nn.Module, warns: bool) -> None:
    teacher = nn.Sequential(network("residual"), last)
    student = quantize(network("residual"), example=SHAPE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distill(student, images(64), teacher=teacher, config=SHORT)
    told = [str(warning.message) for warning in caught]
    assert sum("does the model end in a softmax" in text for text in told) == warns


def test_a_small_last_batch_is_dropped() -> None:
    sizes = [len(batch) for batch in TensorBatches(images(37), 16, 0)]
    assert sizes == [16, 16]
    assert [len(batch) for batch in TensorBatches(images(41), 16, 0)] == [16, 16, 9]
    assert [len(batch) for batch in TensorBatches(images(5), 16, 0)] == [5]
    assert [len(batch) for batch in TensorBatches(images(5), 2, 0)] == [2, 2]


def test_every_parameter_is_in_one_group_with_its_own_rate() -> None:
    student = quantize(network("residual"), spec("pact"), example=SHAPE)
    groups = parameter_groups(student, DistillConfig(lr=0.1, quantizer_lr=0.01, weight_decay=0.5))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in student.parameters())
    names = {id(p): name for name, p in student.named_parameters()}
    decayed = {
        names[id(p)].rpartition(".")[2]
        for group in groups
        if group["lr"] == 0.01 and group["weight_decay"] == 0.5
        for p in group["params"]
    }
    assert decayed == {"alpha"}  # PACT's α decays, its lower bound does not
    model = next(group for group in groups if group["lr"] == 0.1)
    assert "conv1.weight" in {names[id(p)] for p in model["params"]}
    assert model["weight_decay"] == 0.5


# -- EWGS's δ ------------------------------------------------------------------------------------


def test_a_fixed_delta_reaches_every_ewgs_quantizer_and_no_other() -> None:
    mixed = QuantSpec(weights=TensorSpec(method="ewgs"), activations=TensorSpec(method="lsq"))
    teacher = network("residual")
    student = quantize(teacher, mixed, example=SHAPE)
    config = SHORT.model_copy(update={"delta": 0.25})
    distill(student, images(64), teacher=teacher, config=config)
    assert {float(q.delta) for q in weight_quantizers(student).values()} == {0.25}
    assert {float(q.delta) for q in activation_quantizers(student).values()} == {0.0}


def test_delta_changes_the_student() -> None:
    first = trained(images(64), SHORT.model_copy(update={"delta": 0.0}))
    second = trained(images(64), SHORT.model_copy(update={"delta": 0.5}))
    key = "conv1.weight"
    assert not torch.equal(first.get_parameter(key), second.get_parameter(key))


def test_hutchinson_finds_the_trace_of_a_known_hessian() -> None:
    """The logits are linear in the last layer's x̂, so the Hessian is known in closed form.

    For z = W·x̂ + b and L = T²·KL, ∂²L/∂x̂² of one sample is Wᵀ(diag(p) − ppᵀ)W / N, p at T.
    """
    teacher = network("residual")
    no_output = spec("ewgs", 4).model_copy(update={"output_bits": None})
    student = quantize(teacher, no_output, example=SHAPE)
    calibrate(student, images())
    batch, temperature = images(16), 2.0
    name, quantizer = next(
        (n, q) for n, q in activation_quantizers(student).items() if n.startswith("quant_norm.")
    )
    outputs: list[Tensor] = []
    handle = quantizer.register_forward_hook(lambda m, i, o: outputs.append(o[0]))
    logits = student(batch)
    handle.remove()
    (vector,) = outputs
    p = torch.softmax(logits.detach() / temperature, dim=1)
    quant_weight = student.get_submodule("classifier").quant_weight().detach()  # type: ignore
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    trace = torch.einsum("ki,nkl,li->", quant_weight, curvature, quant_weight) / len(batch)
    with torch.no_grad():
        target = teacher(batch)
    loss = distillation_loss(logits, target, temperature)
    (grad,) = torch.autograd.grad(loss, [vector])
    reach = float(quantizer.out_step) * quantizer.steps  # type: ignore[arg-type]
    wanted = float(trace) * reach / grad.numel() / (3 * float(grad.std()))
    found = update_deltas(student, teacher, [batch], temperature=temperature, probes=500)
    # 500 Rademacher probes: the estimator's standard error is some 5 % here
    assert found[name] == pytest.approx(wanted, rel=0.15)


def test_hessian_deltas_are_used_and_leave_the_rest_alone() -> None:
    teacher = network("residual")
    student = quantize(teacher, spec("ewgs"), example=SHAPE)
    calibrate(student, images())
    before = {k: v.clone() for k, v in student.state_dict().items() if "delta" not in k}
    found = update_deltas(student, teacher, [images(16)], temperature=4.0)
    assert set(found) == set(scaling_quantizers(student))
    assert all(value >= 0 for value in found.values())
    assert any(value > 0 for value in found.values())
    for name, quantizer in scaling_quantizers(student).items():
        assert float(quantizer.delta) == pytest.approx(found[name])
    for key, value in before.items():
        assert torch.equal(student.state_dict()[key], value)


def test_a_hessian_that_is_never_estimated_is_said() -> None:
    said: list[str] = []
    config = SHORT.model_copy(update={"delta": "hessian"})
    trained(images(64), config, message=said.append)
    assert any("first estimated after epoch 10, and there are 3" in text for text in said)
    said.clear()
    trained(images(64), config.model_copy(update={"delta_every": 2}), message=said.append)
    assert any("Hutchinson" in text for text in said)
    assert not any("first estimated" in text for text in said)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_to_train_on(count: int) -> None:
    with pytest.raises(DataError, match=f"at least 2 images to train on, got {count}"):
        trained(images(64)[:count])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(images(64))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter([images(16)]), r"got a list_iterator \(.* has no len\(\)\); give a list of batches"),
        ((batch for batch in [images(16)]), "whose number is known .* got a generator"),
        (DataLoader(Stream(), 16), r"got a DataLoader \(object of type 'Stream' has no len\(\)\)"),
        ([], "wanted batches to train on, got none"),
    ],
)
def test_batches_that_end_once_are_refused_before_any_work(batches: object, message: str) -> None:
    with pytest.raises(DataError, match=f"images: .*{message}"):
        trained(batches, calibration=Unread())
    config = SHORT.model_copy(update={"loss": "ce"})
    with pytest.raises(DataError, match=message):
        trained(images(64), config, labelled=batches, calibration=Unread())


class Unread:
    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("images were read")


def test_images_to_calibrate_by_are_needed_more_than_once() -> None:
    with pytest.raises(DataError, match=r"calibration: .* several times, got a generator; give a"):
        trained(images(64), calibration=(batch for batch in images(64).split(16)))


def norm_over_a_vector() -> nn.Module:
    shape = (SHAPE[0], 4, 3, 1, 1)
    return nn.Sequential(
        nn.Conv2d(*shape),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(4),
        nn.Linear(4, CLASSES),
    ).eval()


def test_one_image_is_no_batch_to_normalise_by() -> None:
    student = quantize(norm_over_a_vector(), example=SHAPE)
    calibrate(student, images(64))
    for run in (calibrate, reestimate_batch_norm):
        with pytest.raises(DataError, match="at least 2 images a batch for BatchNorm, got 1"):
            run(student, images(1))
        calibrate(student, images(64))
        with pytest.raises(DataError, match="got none"):
            run(student, [])
        calibrate(student, images(64))


@pytest.mark.parametrize("batch_size", [15, 64])
def test_a_last_image_of_its_own_is_no_batch(batch_size: int) -> None:
    teacher = norm_over_a_vector()
    config = DistillConfig(epochs=0, batch_size=batch_size, calibration_images=46, bn_images=46)
    more = config.model_copy(update={"calibration_images": 513, "bn_images": 513})
    many = images(64).repeat(9, 1, 1, 1)
    for some, how, calibration in (
        (images(64), config, None),
        (many, more, None),
        (many, more, many),
    ):
        student = quantize(teacher, example=SHAPE)
        distill(student, some, teacher=teacher, config=how, calibration=calibration)


@pytest.mark.parametrize(("count", "batch_size"), [(33, 32), (8, 1)])
def test_training_wants_more_than_one_image_a_batch(count: int, batch_size: int) -> None:
    teacher = norm_over_a_vector()
    student = quantize(teacher, spec("lsq"), example=SHAPE)
    config = SHORT.model_copy(update={"freeze_bn_after": 1.0})
    batches = DataLoader(images(count), batch_size)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"at least 2 images a batch .* got 1; drop a last batch"):
        distill(student, batches, teacher=teacher, config=config)


def test_images_that_come_one_by_one_set_ranges_as_together() -> None:
    def state(batches: list[Tensor]) -> list[Tensor]:
        student = quantize(network("residual"), spec("lsq"), example=SHAPE)
        config = DistillConfig(epochs=0)
        distill(student, batches, teacher=network("residual"), config=config)
        return list(student.state_dict().values())

    together = state([images(24)])
    alone = state(list(images(24).split(1)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_calibration_leaves_batch_norm_as_it_was() -> None:
    student = quantize(norm_over_a_vector(), example=SHAPE)
    before = [b.clone() for n in student.modules() for b in _statistics(n)]
    calibrate(student, images(64))
    after = [b for n in student.modules() for b in _statistics(n)]
    assert len(before) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    reestimate_batch_norm(student, images(64))
    assert not torch.equal(before[0], after[0])


def _statistics(module: nn.Module) -> list[Tensor]:
    return list(module.buffers()) if isinstance(module, nn.BatchNorm1d) else []


def test_training_with_hessian_deltas_refreshes_them() -> None:
    config = SHORT.model_copy(update={"delta": "hessian", "delta_every": 1})
    student = trained(images(64), config)
    assert any(float(q.delta) > 0 for q in scaling_quantizers(student).values())


def test_the_loss_is_hintons() -> None:
    student, teacher, temperature = torch.randn(6, 4), torch.randn(6, 4), 3.0
    p = torch.softmax(teacher.double() / temperature, 1)
    q = torch.softmax(student.double() / temperature, 1)
    wanted = temperature**2 * (p * (p / q).log()).sum() / 6
    found = distillation_loss(student, teacher, temperature)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    leaf = student.clone().requires_grad_()
    distillation_loss(leaf, teacher, temperature).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, (temperature / 6 * (q - p)).float())


def test_the_optimizer_is_the_one_named() -> None:
    student = quantize(network("residual"), spec("lsq"), example=SHAPE)
    config = DistillConfig(
        optimizer="sgd", momentum=0.8, nesterov=True, weight_decay=0.1, quantizer_weight_decay=0.2
    )
    sgd = build_optimizer(student, config)
    assert isinstance(sgd, torch.optim.SGD)
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.1, 0.2]
    assert all(group["momentum"] == 0.8 and group["nesterov"] for group in sgd.param_groups)
    assert isinstance(build_optimizer(student, DistillConfig()), torch.optim.Adam)


def test_warm_up_is_a_line_and_then_a_cosine() -> None:
    factor = warm_cosine(steps=110, warmup=10)
    line = [factor(step / 110) for step in range(10)]
    assert line == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factor(10 / 110) == pytest.approx(1.0)
    assert factor(60 / 110) == pytest.approx(0.5)
    assert factor(1.0) == pytest.approx(0.0)
    assert [warm_cosine(7, 0)(x / 7) for x in range(7)] == pytest.approx(
        [cosine(x / 7) for x in range(7)]
    )


def test_warm_up_reaches_the_optimizer() -> None:
    rates: list[float] = []
    config = DistillConfig(epochs=2, batch_size=16, lr=1e-3, warmup_steps=4)
    trained(images(64), config, on_step=lambda step: rates.append(step.lr))
    assert rates[:5] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert rates[5] < 1e-3


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    config = DistillConfig(epochs=2, batch_size=16, warmup_steps=8)
    with pytest.raises(SpecError, match=r"fewer than the 8 steps of this run \(2 epochs of 4\), "):
        trained(images(64), config)


def test_the_kl_weight_multiplies_the_loss() -> None:
    """Of the first step, which the weight has not reached yet through the weights."""

    def first_loss(**settings: object) -> float:
        losses: list[float] = []
        config = SHORT.model_copy(update={"epochs": 1, "lr": 1e-9, **settings})
        trained(images(64), config, on_step=lambda step: losses.append(step.loss))
        return losses[0]

    plain = first_loss()
    assert plain > 0
    assert first_loss(kl_weight=100.0) == pytest.approx(100 * plain, rel=1e-5)


def test_sgd_trains() -> None:
    config = DistillConfig(
        epochs=20, batch_size=32, optimizer="sgd", nesterov=True, lr=5e-3, quantizer_lr=5e-4
    )
    teacher = network("residual")
    reestimate_batch_norm(teacher, images(256))
    student = quantize(teacher, spec("lsq", 2), example=SHAPE)
    records = distill(student, images(256), teacher=teacher, config=config)
    assert records[-1].loss < records[0].loss / 1.5


@pytest.mark.parametrize(
    ("count", "bn_images", "kept"), [(127, 4096, True), (128, 4096, False), (64, 64, False)]
)
def test_too_few_images_leave_batch_norm_as_it_was(count: int, bn_images: int, kept: bool) -> None:
    """Unless a person asks for so few."""
    teacher, said = norm_over_a_vector(), list[str]()
    student = quantize(teacher, example=SHAPE)
    config = DistillConfig(epochs=0, bn_images=bn_images)
    batches = list(images(count).split(30))  # of which the first are seen once
    distill(student, batches, teacher=teacher, config=config, message=said.append)
    before, after = (
        [b for n in model.modules() for b in _statistics(n)] for model in (teacher, student)
    )
    assert torch.equal(before[0], after[0]) == kept
    assert any("stay as they are: there are fewer than 128" in text for text in said) == kept
