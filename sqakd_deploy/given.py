"""What a script hands over, checked before any work is done on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sqakd_deploy.errors import DataError, ModelError, SpecError
from sqakd_deploy.nonfinite import check_images
from sqakd_deploy.student import Student

T = TypeVar("T")


def network(model: object, what: str) -> nn.Module:
    """A network as it is, if it can be worked on.

    Args:
        model: whatever was given.
        what: it is for, as its argument is called.

    Raises:
        ModelError: if it is no module, a student, has layers without a shape yet, or parameters of
            another type than float32.
    """
    if not isinstance(model, nn.Module):
        hint = "; call it to make one" if isinstance(model, type) else ""
        raise ModelError(f"{what}: wanted a network (torch.nn.Module), got {_named(model)}{hint}")
    if isinstance(model, Student):
        raise ModelError(f"{what}: wanted the float network, got a student made by quantize()")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ModelError(
                f"{what}: parameter {name!r} has no shape yet; run the model on images once, as "
                "lazy layers want it"
            )
    _check_float32(model, what, "model")
    return model


def made_student(module: object) -> Student:
    """A student as it is, if it is one and in its own type.

    Raises:
        ModelError: if it was not made by ``quantize()``, or has parameters of another type than
            float32: files hold float32, and so does what is rounded in training.
    """
    if not isinstance(module, Student):
        raise ModelError(
            f"wanted a student made by quantize(), got {_named(module)} without a spec"
        )
    _check_float32(module, "student", "student")
    return module


def _check_float32(model: nn.Module, what: str, called: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"{what}: wanted parameters in float32, got {name!r} in {_bare(parameter.dtype)}; "
                f"give {called}.float()"
            )


def setting(value: object, kind: type[T], what: str) -> T:
    """A setting as it is, if it is of its kind.

    Raises:
        SpecError: if it is not.
    """
    if isinstance(value, kind):
        return value
    raise SpecError(f"{what}: wanted a {kind.__name__}, got {_named(value)}")


def images_in(batch: object, shape: tuple[int, ...] | None, *, wait: bool = False) -> Tensor:
    """The images of a batch: the tensor, or the first element of a tuple.

    Args:
        batch: of a person's own loader.
        shape: of an image that the student takes, ``(C, H, W)``; None for any.
        wait: for a GPU, to see that its images are finite, too; it costs more in each training
            step than it saves.

    Returns:
        Finite float32 images ``(N, C, H, W)``; a copy of those made in ``inference_mode``, which no
        gradient can be computed by.

    Raises:
        DataError: if it holds something else.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise DataError(
            "images: wanted batches that are a tensor of images, or a tuple that begins with one, "
            f"got {_named(images)}"
        )
    if images.dtype != torch.float32:
        remedy = (
            "give images.float()"
            if images.is_floating_point()
            else ("prepare them as the model's own were: scaled, normalised")
        )
        raise DataError(f"images: wanted float32, got {_bare(images.dtype)}; {remedy}")
    if shape is not None and images.shape[1:] != shape:
        wanted = ", ".join(map(str, ("N", *shape)))
        raise DataError(
            f"images: wanted ({wanted}), as the student was made for, got {tuple(images.shape)}"
        )
    if wait or images.device.type == "cpu":
        check_images(images)
    return images.clone() if images.is_inference() else images


def labels_in(batch: object, images: int, classes: int) -> Tensor:
    """The labels of a batch: the second element of a tuple.

    Args:
        batch: of a person's own loader.
        images: how many it has.
        classes: of the model.

    Returns:
        Class indices int64 ``(N,)``; a copy of those made in ``inference_mode``.

    Raises:
        DataError: if there is none, not one for each image, or one that is no class.
    """
    parts = batch if isinstance(batch, (tuple, list)) else ()
    labels = parts[1] if len(parts) > 1 else None
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        raise DataError(
            "labelled: wanted batches (images, labels), labels in int64 of shape (N,), got a "
            f"{type(batch).__name__}"
        )
    if len(labels) != images:
        raise DataError(f"labelled: wanted {images} labels for {images} images, got {len(labels)}")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(
            f"labelled: wanted class indices from 0 to {classes - 1}, got {int(wrong[0])}; number "
            "classes as the model does, and leave out images of none"
        )
    return labels.clone() if labels.is_inference() else labels


@contextmanager
def enough_to_normalise() -> Iterator[None]:
    """Context of steps that normalise by their batch, which torch refuses for a single vector.

    Raises:
        DataError: in its place.
    """
    try:
        yield
    except ValueError as error:  # of torch's BatchNorm
        if "more than 1 value" not in str(error):
            raise
        raise DataError(
            "wanted at least 2 images a batch for BatchNorm, got 1; drop a last batch of one "
            "(drop_last=True of a DataLoader), or give larger batches"
        ) from error


def _named(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
