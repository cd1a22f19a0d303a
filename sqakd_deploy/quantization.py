"""From a float model to a student of Brevitas layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear
from torch import Tensor, fx, nn

from sqakd_deploy.errors import DataError, ModelError, SpecError
from sqakd_deploy.given import enough_to_normalise, images_in, made_student, network, setting
from sqakd_deploy.lowering.geometry import conv_arguments
from sqakd_deploy.lowering.transposed import QuantTransposed2d, as_convolution
from sqakd_deploy.modes import in_plain_mode
from sqakd_deploy.placement import Placed, place
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.quantizers import METHODS, ActivationQuantizer, WeightQuantizer
from sqakd_deploy.quantizers.base import initialised_later
from sqakd_deploy.quantizers.injectors import act_quant, weight_quant
from sqakd_deploy.spec import QuantSpec
from sqakd_deploy.student import Student
from sqakd_deploy.tracing.attention import open_attention
from sqakd_deploy.tracing.lifting import check_layers, free_name
from sqakd_deploy.tracing.trace import check_answers, describe, separate_calls, trace
from sqakd_deploy.tracing.unwrapping import refuse_hooks, unwrapped

_SPEC, _INPUT_SHAPE = "sqakd_deploy.spec", "sqakd_deploy.input_shape"


@in_plain_mode
def quantize(
    model: nn.Module, spec: QuantSpec | None = None, *, example: Tensor | tuple[int, ...]
) -> fx.GraphModule:
    """Build a student that computes what the target's runtime will compute.

    Args:
        model: a trained classifier in float32, of one image tensor; copied, not changed. The
            student is on its device.
        spec: methods, bit-widths, target; the default is LSQ W4A4 for ONNX Runtime.
        example: preprocessed images ``(N, C, H, W)``, for their shape, or the shape ``(C, H, W)``.

    Returns:
        The student, with the model's weights, in evaluation mode. Its activation ranges are not
        set yet: :func:`calibrate` or the first training batch does that.

    Raises:
        SpecError: if a method or target is unknown, the target cannot run the spec, or the example
            has another form.
        ModelError: if the model cannot be traced, holds a layer without an integer form, or no
            convolution or linear layer.
    """
    spec = QuantSpec() if spec is None else setting(spec, QuantSpec, "spec")
    for side in (spec.weights, spec.activations):
        METHODS[side.method]  # a misspelt method must not cost a trace
    exporter = get_exporter(spec.target)
    exporter.check(spec)
    input_shape = _image_shape(example)
    opened = unwrapped(network(model, "model"), input_shape)
    open_attention(opened)
    traced = trace(opened, input_shape)
    student = Student(traced, traced.graph, type(opened).__name__)
    separate_calls(student)
    refuse_hooks(student)
    placement = place(student, spec, exporter.placement)
    check_answers(student)
    check_layers(student)
    with _made_where_it_is(student):
        for path, bits in placement.layers.items():
            _replace_layer(student, path, spec, bits)
        for placed in placement.activations:
            _insert(student, placed, spec, symmetric=exporter.placement.symmetric)
    student.graph.lint()
    student.recompile()
    student.meta[_SPEC], student.meta[_INPUT_SHAPE] = spec, input_shape
    return student.eval()


def _image_shape(example: Tensor | tuple[int, ...]) -> tuple[int, ...]:
    """``(C, H, W)`` of example images, or as given."""
    if isinstance(example, Tensor) and example.dim() == 4:
        return tuple(example.shape[1:])
    is_shape = isinstance(example, (tuple, list)) and all(isinstance(n, int) for n in example)
    if is_shape and len(example) == 3:
        return tuple(example)
    shape = example if is_shape else getattr(example, "shape", None)
    got = type(example).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
    raise SpecError(
        "example: wanted a torch tensor of images (N, C, H, W), or their shape (C, H, W); "
        f"got {got}"
    )


def _made_where_it_is(model: nn.Module) -> AbstractContextManager[object]:
    """New tensors lie on the model's device. Where they do so anyhow nothing is entered: a device's
    context costs every operator under it more than a small one takes."""
    weight = next(model.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    return nullcontext() if torch.get_default_device() == device else device


def spec_of(student: nn.Module) -> QuantSpec:
    """The spec that a student was made with.

    Raises:
        ModelError: if the module is not the result of :func:`quantize`, or no longer in float32.
    """
    return _meta(student)[0]


def input_shape_of(student: nn.Module) -> tuple[int, ...]:
    """``(C, H, W)`` of the images that a student takes.

    Raises:
        ModelError: if the module is not the result of :func:`quantize`, or no longer in float32.
    """
    return _meta(student)[1]


def _meta(student: nn.Module) -> tuple[QuantSpec, tuple[int, ...]]:
    made = made_student(student)
    return made.meta[_SPEC], made.meta[_INPUT_SHAPE]


# -- surgery -------------------------------------------------------------------------------------


def _replace_layer(student: fx.GraphModule, path: str, spec: QuantSpec, bits: int) -> None:
    old: Any = student.get_submodule(path)
    if not isinstance(getattr(old, "weight", None), nn.Parameter):
        raise ModelError(
            f"layer {path!r}: its weight is computed (a parametrization, as weight_norm); make it "
            "plain, with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    side = spec.weights
    quant = weight_quant(side.method, bits, side.per_channel)
    with initialised_later():  # Brevitas makes a quantizer for each weight that a layer is given
        new: Any = _quant_layer(old, quant, path)
        new.weight, new.bias = old.weight, old.bias
    new.weight_quant.tensor_quant.initialise(old.weight)
    new.weight_quant.skip_create_quant_tensor = True  # plain tensors keep torch.compile's one graph
    parent, _, name = path.rpartition(".")
    setattr(student.get_submodule(parent), name, new)


def _quant_layer(old: nn.Module, quant: type, path: str) -> nn.Module:
    if isinstance(old, nn.ConvTranspose2d):
        new = QuantTransposed2d(old, quant)
        old.weight = nn.Parameter(as_convolution(old.weight.detach(), old.groups).clone())
        return new
    if isinstance(old, nn.Conv2d):
        return QuantConv2d(**conv_arguments(old), weight_quant=quant)
    if isinstance(old, nn.Linear):
        return QuantLinear(old.in_features, old.out_features, old.bias is not None, quant)
    raise ModelError(
        f"layer {path!r}: wanted Conv2d, ConvTranspose2d or Linear, got {type(old).__name__}"
    )


def _insert(student: fx.GraphModule, placed: Placed, spec: QuantSpec, *, symmetric: bool) -> None:
    edge = placed.after.name
    name = f"requant_{edge}_{placed.bits}" if placed.readers else f"quant_{edge}"
    name = free_name(student, name)
    injector = act_quant(
        spec.activations.method, placed.bits, placed.signed, placed.limit, symmetric
    )
    module = QuantIdentity(act_quant=injector)
    module.act_quant.skip_create_quant_tensor = True
    student.add_submodule(name, module)
    source = _latest_quantised(placed) if placed.readers else placed.after
    with student.graph.inserting_after(source):
        node = student.graph.call_module(name, (source,))
    node.meta = dict(source.meta)  # the same shape
    for reader in placed.readers or tuple(u for u in placed.after.users if u is not node):
        reader.replace_input_with(source, node)


def _latest_quantised(placed: Placed) -> fx.Node:
    """The tensor that the readers read now: the edge may have been quantised at more bits."""
    sources = {
        source
        for source in placed.readers[0].all_input_nodes  # type: ignore[index]
        if source is placed.after or placed.after in source.all_input_nodes
    }
    if len(sources) != 1:
        raise ModelError(f"{describe(placed.after)}: cannot tell which tensor its readers read")
    return sources.pop()


# -- ranges --------------------------------------------------------------------------------------


def activation_quantizers(student: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every activation quantizer by module path, in order of definition."""
    return {n: m for n, m in student.named_modules() if isinstance(m, ActivationQuantizer)}


def weight_quantizers(student: nn.Module) -> dict[str, WeightQuantizer]:
    """Every weight quantizer by module path, in order of definition."""
    return {n: m for n, m in student.named_modules() if isinstance(m, WeightQuantizer)}


def is_calibrated(student: nn.Module) -> bool:
    """Whether every activation range was set."""
    return all(quantizer.calibrated for quantizer in activation_quantizers(student).values())


def scaling_quantizers(student: nn.Module) -> dict[str, ActivationQuantizer | WeightQuantizer]:
    """The quantizers whose method scales gradients by the discretisation error, by path."""
    spec = spec_of(student)
    found: dict[str, ActivationQuantizer | WeightQuantizer] = {}
    if METHODS[spec.weights.method].scales_gradient:
        found |= weight_quantizers(student)
    if METHODS[spec.activations.method].scales_gradient:
        found |= activation_quantizers(student)
    return found


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Every BatchNorm that keeps running statistics."""
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode but BatchNorm, which normalises by, and records, the batch."""
    training = model.training
    model.eval()
    for norm in batch_norms(model):
        norm.train()
    try:
        yield
    finally:
        model.train(training)


@in_plain_mode
@torch.no_grad()
def calibrate(student: nn.Module, images: Tensor | Iterable[object]) -> None:
    """Set every activation range from unlabelled images; several batches are averaged by images.

    Layers are calibrated in one pass, each on inputs that are already quantised upstream and
    normalised by the batch. BatchNorm's own statistics stay as they are: quantised weights have
    others, which :func:`reestimate_batch_norm` finds. What is exported is settled as well, as
    :func:`sqakd_deploy.api.calibrate` does.

    Args:
        student: changed in place.
        images: preprocessed images ``(N, C, H, W)``, or batches of them (of a batch that is a
            tuple, the first element; nothing else is looked at).

    Raises:
        DataError: if there is no image, or too few in a batch for BatchNorm, or one that is not
            finite; the student is left as it was.
    """
    kept = [{name: t.clone() for name, t in n.named_buffers()} for n in batch_norms(student)]
    with _as_it_was_if_refused(student):
        for quantizer in activation_quantizers(student).values():
            quantizer.reset()
            quantizer.observing = True
        _run_by_batches(student, images)
    for norm, buffers in zip(batch_norms(student), kept, strict=True):
        for name, buffer in norm.named_buffers():
            buffer.copy_(buffers[name])


@contextmanager
def _as_it_was_if_refused(student: nn.Module) -> Iterator[None]:
    """A student that was calibrated stays so, where the new images turn out to be none."""
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in student.state_dict().items():
                tensor.copy_(before[name])
        raise
    finally:
        for quantizer in activation_quantizers(student).values():
            quantizer.observing = False
            quantizer.state_changed()


def _run_by_batches(
    student: nn.Module,
    images: Tensor | Iterable[object],
    before: Callable[[float], None] = lambda share: None,
) -> None:
    """Answer all images, normalised by their own batches.

    Args:
        student: in evaluation mode but for BatchNorm.
        images: or batches of them.
        before: told before each batch how much of the images seen, itself included, it is.
    """
    device = next(student.parameters()).device
    shape = input_shape_of(student) if isinstance(student, Student) else None
    seen = 0
    with batch_statistics(student):
        for batch in [images] if isinstance(images, Tensor) else images:
            some = images_in(batch, shape, wait=True)
            if not len(some):
                continue
            before(len(some) / (seen + len(some)))
            with enough_to_normalise():
                student(some.to(device))
            seen += len(some)
    if not seen:
        raise DataError("wanted images, got none")


@in_plain_mode
@torch.no_grad()
def reestimate_batch_norm(student: nn.Module, images: Tensor | Iterable[object]) -> None:
    """Replace BatchNorm's running statistics by averages over unlabelled images.

    A batch counts by its images: the last one may be of a few.

    Quantised weights move at steps, so that the running averages lag behind the last of them.

    Args:
        student: changed in place.
        images: as for :func:`calibrate`.

    Raises:
        DataError: as :func:`calibrate`.
    """
    norms = batch_norms(student)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]

    def average(share: float) -> None:
        for norm in norms:
            norm.momentum = share  # type: ignore[assignment]

    with _as_it_was_if_refused(student):
        for norm in norms:
            norm.reset_running_stats()  # type: ignore[operator]
        try:
            _run_by_batches(student, images, average)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def count_quantizers(student: nn.Module) -> dict[str, dict[int, int]]:
    """How many quantizers of each bit-width there are: ``{"weights": {4: 18, 8: 2}, …}``."""
    weights = Counter(quantizer.bits for quantizer in weight_quantizers(student).values())
    activations = Counter(quantizer.bits for quantizer in activation_quantizers(student).values())
    return {
        "weights": dict(sorted(weights.items())),
        "activations": dict(sorted(activations.items())),
    }
