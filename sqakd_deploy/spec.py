"""What a person asks for: validated, torch-free, and the same in YAML, JSON and Python.

A :class:`QuantSpec` travels unchanged from the command line into the run folder and from there
into the metadata of the ONNX file, so that there is one truth about how a student was made.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sqakd_deploy.errors import SpecError

SPEC_KEY = "sqakd.spec"
"""Of a :class:`QuantSpec` in a file's metadata."""

Bits = Annotated[int, Field(ge=1, le=8)]
_NO_TRUTH = "wanted a number, not a truth value, which YAML reads yes, on and true as"
BitsText = Annotated[str, Field(coerce_numbers_to_str=True)]  # YAML reads 8 as a number
Method = Annotated[str, Field(min_length=1)]
S = TypeVar("S", bound="Spec")


def _switch(value: object) -> object:
    """YAML 1.1 reads on and off, without quotes, as truth values."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


class Spec(BaseModel):
    """Base of all specs: frozen; an unknown key is an error, and so is a number not finite or a
    truth value for one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Python counts True as 1, so that ``epochs: yes`` would be one epoch."""
        values = value if isinstance(value, (tuple, list)) else (value,)
        field = cls.model_fields[str(info.field_name)]
        if any(isinstance(one, bool) for one in values) and _holds_numbers(field.annotation):
            raise PydanticCustomError("number", _NO_TRUTH)
        return value

    @classmethod
    def parse(cls: type[S], values: dict[str, Any], where: str = "") -> S:
        """Build the spec, turning validation failures into one-line messages.

        Args:
            values: the fields.
            where: a file or option, named in the error.

        Raises:
            SpecError: if a field is unknown, missing, of the wrong type or out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpecError(_explain(error, where or cls.__name__)) from error


def _holds_numbers(annotation: Any) -> bool:
    """Whether a field's type is a number, or has one in it."""
    if isinstance(annotation, (int, float)):  # of a Literal
        return not isinstance(annotation, bool)
    return annotation in (int, float) or any(map(_holds_numbers, get_args(annotation)))


def _explain(error: ValidationError, where: str) -> str:
    """What is wrong, each thing once: of several values that it is said of, all are named."""
    found: dict[str, list[tuple[str, str]]] = {}
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "value"
        found.setdefault(item["msg"], []).append((field, repr(item["input"])))
    parts = [
        f"{', '.join(field for field, _ in said)}: {message}, got {', '.join(v for _, v in said)}"
        for message, said in found.items()
    ]
    return f"{where}: " + "; ".join(parts)


class TensorSpec(Spec):
    """How one side (weights or activations) is quantised.

    Attributes:
        method: a registered quantization method, for instance ``"lsq"``.
        bits: bit-width, 1 to 8.
        per_channel: one scale per output channel (weights only) instead of one per tensor.
    """

    method: Method = "lsq"
    bits: Bits = 4
    per_channel: bool = False


class QuantSpec(Spec):
    """How a float model becomes a student.

    Attributes:
        weights: the inner layers' weights.
        activations: the inner layers' inputs.
        first_last_bits: weights and inputs of the first and last layers (bits); some targets take
            fewer for the weights.
        residual_bits: the tensors between layers that are added, concatenated or pooled (bits).
        output_bits: the model's output (bits); ``None`` leaves the logits in float.
        layer_bits: bits of single layers, the ends included: ``fnmatch`` patterns of names, each
            with what ``--bits`` takes (``8``, ``w4a8``); of several that match, the last counts.
        exclude: ``fnmatch`` patterns of layer names that stay in float.
        target: the exporter whose rules decide where quantizers go.
        placement: ``"target"`` follows those rules; ``"paper"`` quantises only the inner layers'
            weights and inputs, as the SQAKD paper does, and leaves residuals in float.
    """

    weights: TensorSpec = TensorSpec()
    activations: TensorSpec = TensorSpec()
    first_last_bits: Bits = 8
    residual_bits: Bits = 8
    output_bits: Bits | None = 8
    layer_bits: dict[str, BitsText] = Field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    target: str = "onnxruntime"
    placement: Literal["target", "paper"] = "target"

    @model_validator(mode="after")
    def _sides(self) -> QuantSpec:
        if self.activations.per_channel:
            raise SpecError("per_channel: activations have one scale a tensor; it is for weights")
        for pattern, text in self.layer_bits.items():
            try:
                parse_bits(text)
            except SpecError as error:
                raise SpecError(f"layer_bits: {pattern!r}: {error}") from error
        return self

    def __eq__(self, other: object) -> bool:
        """As it is written: the order of ``layer_bits`` counts."""
        return isinstance(other, QuantSpec) and self.model_dump_json() == other.model_dump_json()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def label(self) -> str:
        """Short name, for instance ``w4a4``, or ``w4a4-mixed`` where layers have their own bits."""
        mixed = "-mixed" if self.layer_bits else ""
        return f"w{self.weights.bits}a{self.activations.bits}{mixed}"


class DistillConfig(Spec):
    """How a student is trained.

    Attributes:
        loss: ``"kl"`` is SQAKD and sees no label; ``"ce"`` and ``"kl+ce"`` are baselines.
        temperature: softening of both softmaxes, T in ``T²·KL`` (Hinton et al., 2015).
        epochs: passes over the training images; 0 only sets ranges and re-estimates BatchNorm.
        batch_size: images a step.
        kl_weight: α in ``α·T²·KL``; with ``"kl+ce"`` it weighs the two.
        feature_weight: γ of SQuaT's term beside the KL (``training/features.py``); 0 is none.
        optimizer: ``"adam"`` with coupled L2, or ``"sgd"``.
        momentum: of SGD.
        nesterov: SGD's momentum in Nesterov's form.
        lr: learning rate of weights, biases and BatchNorm, decayed to 0 by a cosine. None takes
            3e-4 where nothing has fewer than 4 bits, else 1e-3.
        quantizer_lr: the same for the quantizers' own parameters.
        warmup_steps: steps in which the rates rise in a line before the cosine begins.
        weight_decay: coupled L2 on the model's parameters, and on those quantizer parameters whose
            method decays them (PACT's α).
        quantizer_weight_decay: the same on all other quantizer parameters.
        delta: EWGS's scaling of the gradient by the discretisation error; ``"hessian"``
            re-estimates it by Hutchinson's trace (Lee et al., 2021, eq. 8).
        delta_every: epochs between re-estimates of ``delta``.
        clip_grad: largest gradient norm; ``None`` does not clip.
        calibration_images: unlabelled images that set the initial ranges.
        bn_images: unlabelled images that re-estimate BatchNorm's statistics, where they freeze or
            at the end. Where there are fewer than 128 the statistics stay as they are, unless so
            few are asked for here.
        freeze_bn_after: share of the epochs after which BatchNorm's statistics are re-estimated and
            frozen, as they are at inference: 0 trains with constants from the start, 1 with each
            batch's own to the end, as published. None takes 0 where nothing has fewer than 4 bits,
            else 1.
        seed: of everything random.
        compile: ``auto`` compiles student and teacher where the steps ahead make up for it.
        precision: ``auto`` takes bfloat16 for convolutions where compiled and the device gains.
        save_seconds: least time between two saves for ``--resume``.
    """

    loss: Literal["kl", "ce", "kl+ce"] = "kl"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    epochs: Annotated[int, Field(ge=0)] = 30
    batch_size: Annotated[int, Field(ge=2)] = 128
    kl_weight: Annotated[float, Field(gt=0)] = 1.0
    feature_weight: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    lr: Annotated[float, Field(gt=0)] | None = None
    quantizer_lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    quantizer_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    delta: Annotated[float, Field(ge=0)] | Literal["hessian"] = 1e-3
    delta_every: Annotated[int, Field(ge=1)] = 10
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    calibration_images: Annotated[int, Field(ge=1)] = 512
    bn_images: Annotated[int, Field(ge=1)] = 4096
    freeze_bn_after: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    compile: Switch = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    save_seconds: Annotated[float, Field(ge=0)] = 30.0

    @model_validator(mode="after")
    def _settings_go_together(self) -> DistillConfig:
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise SpecError(
                "nesterov: wanted optimizer 'sgd' with a momentum above 0, got "
                f"{self.optimizer!r} with {self.momentum:g}; change them, or leave nesterov out"
            )
        if self.kl_weight != 1.0 and self.loss == "ce":
            raise SpecError("kl_weight: the loss 'ce' has no KL to weigh; leave it out")
        if self.feature_weight and self.loss == "ce":
            raise SpecError("feature_weight: goes with the losses 'kl' and 'kl+ce', not with 'ce'")
        return self


_BITS = re.compile(r"(?:w(?P<w>\d+)a(?P<a>\d+)|(?P<both>\d+))", re.IGNORECASE)


def parse_bits(text: str) -> tuple[int, int]:
    """Read ``4`` or ``w4a8`` as (weight bits, activation bits).

    Raises:
        SpecError: if the text is neither, or a width is outside 1 to 8.
    """
    match = _BITS.fullmatch(text.strip())
    if match is None:
        raise SpecError(f"bits: wanted a number like 4 or a pair like w4a8, got {text!r}")
    weight = int(match["both"] or match["w"])
    activation = int(match["both"] or match["a"])
    for bits in (weight, activation):
        if not 1 <= bits <= 8:
            raise SpecError(f"bits: wanted 1 to 8, got {bits} in {text!r}")
    return weight, activation


# What the reader lets through besides its own: of a date that is none, of a number by tag, of text
# that is no UTF-8, of lists too deep for it.
_NO_YAML = (
    yaml.YAMLError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


class _Reader(yaml.SafeLoader):
    """Refuses a key that is given twice in a mapping, of which YAML's own reader takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{key.value!r} is given twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        SpecError: if the file is missing, is not YAML, or does not hold a mapping; if a key is
            given twice in one.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Reader)
    except OSError as error:
        raise SpecError(f"cannot read config {path}: {error.strerror}") from error
    except _NO_YAML as error:
        raise SpecError(f"config {path} is not valid YAML: {error}".replace("\n", " ")) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SpecError(f"config {path}: wanted keys and values, got {type(loaded).__name__}")
    return loaded
