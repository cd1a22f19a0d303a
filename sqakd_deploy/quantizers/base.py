"""The two quantizer modules that the methods fill in, in the shape that Brevitas calls.

Brevitas hands a tensor to ``tensor_quant`` and expects ``(value, scale, zero_point, bit_width)``.
Both classes answer that, so the injectors of :mod:`~sqakd_deploy.quantizers.injectors` work in
stock ``brevitas.nn`` layers; and both give exact codes, which is what an export is made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_deploy.errors import ModelError, SpecError
from sqakd_deploy.quantizers.ranges import search_around_zero, search_range, search_step
from sqakd_deploy.quantizers.unified import Rule, discretise, round_through, unified_quantize

Quantised = tuple[Tensor, Tensor, Tensor, Tensor]


def check_bits(bits: int) -> int:
    """``bits`` if it is an integer from 1 to 8.

    Raises:
        SpecError: otherwise.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise SpecError(f"bits: wanted an integer from 1 to 8, got {bits!r}")
    return bits


_LATER = ContextVar("later", default=False)


@contextmanager
def initialised_later() -> Iterator[None]:
    """Quantizers of weights made here wait for ``initialise``: a search takes seconds for millions
    of weights, and would be for nothing where others follow."""
    before = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(before)


class WeightQuantizer(nn.Module, ABC):
    """Quantises a layer's weight, per tensor or per output channel (axis 0).

    Grids: at 1 bit, and from 2 to 7 bits for methods with ``mid_rise``, the levels are the odd
    multiples of half a step and hold no zero; elsewhere they are whole multiples, from
    ``−2^(b−1)`` to ``2^(b−1) − 1`` as in LSQ. At 8 bits the lowest is −127, so that negating a
    code (BatchNorm with a negative factor) stays within int8.

    Args:
        weight: the parameter, for its shape and initial values; ``(O, …)``.
        bits: bit-width.
        per_channel: one set of parameters per output channel.
    """

    mid_rise = False
    rule_options: dict[str, Any] = {}  # noqa: RUF012 - constant, extended by methods
    low: Tensor
    high: Tensor
    delta: Tensor
    bit_width: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, bits: int, per_channel: bool = False) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.per_channel = per_channel
        self.has_zero = bits == 8 or (bits > 1 and not self.mid_rise)
        steps = 2**bits - (2 if bits == 8 else 1)
        low = -(steps // 2 + steps % 2) if self.has_zero else -steps / 2
        self.rule = Rule(steps, 0.0 if self.has_zero else steps / 2, **self.rule_options)
        self.parameter_shape = self._parameter_shape(weight)
        constants = {"low": low, "high": low + steps, "zero": 0.0}
        constants["bit_width"] = bits if self.has_zero else bits + 1
        for name, value in constants.items():
            self.register_buffer(name, torch.tensor(float(value)), persistent=False)
        self.register_buffer("delta", torch.tensor(0.0))
        self.build()
        if not _LATER.get():
            self.initialise(weight)

    def _parameter_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (weight.shape[0], *[1] * (weight.dim() - 1)) if self.per_channel else ()

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as ``(C, K)``: a row for each scale."""
        return weight.detach().float().reshape(weight.shape[0] if self.per_channel else 1, -1)

    def search(self, weight: Tensor) -> Tensor:
        """The steps that fit the weight best, in the shape of the parameters."""
        rows = self.rows(weight)
        return self.shaped(search_step(rows, float(self.low), float(self.high), self.rule.offset))

    def shaped(self, values: Tensor) -> Tensor:
        """Row values ``(C,)`` in the shape of the parameters."""
        return values.reshape(self.parameter_shape)

    @abstractmethod
    def build(self) -> None:
        """Register the method's parameters and buffers, of ``parameter_shape``."""

    @abstractmethod
    def initialise(self, weight: Tensor) -> None:
        """Set them from the weight's values, in place."""

    @abstractmethod
    def operands(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the unified function is applied to: (input, step, out_step)."""

    def forward(self, weight: Tensor) -> Quantised:
        """Quantise; the scale returned is that of the integer codes (Brevitas' convention)."""
        x, step, out_step = self.operands(weight)
        y = unified_quantize(x, step, self.low, self.high, out_step, self.delta, self.rule)
        scale = out_step if self.has_zero else out_step / 2
        return y.to(weight.dtype), scale, self.zero, self.bit_width

    @torch.no_grad()
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Exact integers of the weight.

        Returns:
            int8 codes shaped like ``weight`` (odd integers on a grid without zero) and the float32
            scale, shaped like the parameters: their product is what :meth:`forward` gives, to the
            last bit, since halving a step and doubling a level are exact.
        """
        x, step, out_step = self.operands(weight)
        _, level = discretise(x.float() / step, self.low, self.high, self.rule.offset)
        codes, scale = (level, out_step) if self.has_zero else (level * 2, out_step / 2)
        return codes.to(torch.int8), scale.float()


class ActivationQuantizer(nn.Module, ABC):
    """Quantises activations, per tensor, to unsigned codes 0 … 2^b − 1.

    After a ReLU (``signed=False``) the zero-point is 0. Elsewhere it is an integer learned with
    the range. Zero is always a level, so that zero padding is exact.

    ``symmetric`` is for runtimes that know int8 with zero-point 0 and nothing else. The scale is
    then all that is learned: signed inputs have the levels ``−2^(b−1) … 2^(b−1) − 1``, here counted
    from the lowest with the fixed zero-point ``2^(b−1)``; others ``0 … 2^b − 1``, at 8 bits ``0 …
    127``. At 1 bit both have 0 and 1: a level below zero would leave none above.

    The range is set by the first batches seen while :attr:`observing`, or by the first batch in
    training mode; several batches are averaged, each by its number of images.

    Args:
        bits: bit-width.
        signed: the input takes negative values.
        limit: the range never exceeds it; 6 after ReLU6, which the range then replaces.
        symmetric: no zero-point is learned, and all codes fit int8 around 0.

    Attributes:
        steps: between the lowest and the highest code.
        learns_zero: whether the zero-point is learned.
        fixed_zero: the zero-point where it is not.
        top: codes above zero, where the zero-point is fixed.
    """

    rule_options: dict[str, Any] = {}  # noqa: RUF012 - constant, extended by methods
    decayed: tuple[str, ...] = ()  # parameters that weight decay pulls on
    range_names: tuple[str, ...] = ()  # what gives the step, in proportion to all at once
    delta: Tensor
    bit_width: Tensor
    batches_observed: Tensor

    def __init__(
        self, bits: int, signed: bool, limit: float | None = None, symmetric: bool = False
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.signed = signed
        self.limit = limit
        self.symmetric = symmetric
        self.learns_zero = signed and not symmetric
        self.steps = 127 if symmetric and not signed and bits == 8 else 2**bits - 1
        self.fixed_zero = 2 ** (bits - 1) if symmetric and signed and bits > 1 else 0
        self.top = self.steps - self.fixed_zero
        self.rule = Rule(self.steps, **self.rule_options)
        self.observing = False
        self._seen = 0  # images of the batches observed
        self._ready = False  # mirrors batches_observed > 0 without reading a tensor each step
        self.register_buffer("bit_width", torch.tensor(float(bits)), persistent=False)
        self.register_buffer("delta", torch.tensor(0.0))
        self.register_buffer("batches_observed", torch.tensor(0))
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Register the method's parameters and buffers, all ``()``."""

    @abstractmethod
    def set_range(self, x: Tensor, weight: float) -> None:
        """Move the range by ``weight`` (1 for the first batch) towards the one ``x`` asks for."""

    @abstractmethod
    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scalars of the unified function: (step, real-valued zero-point, out_step).

        ``x`` is given for what depends on its shape only, such as LSQ's gradient scale.
        """

    def forward(self, x: Tensor) -> Quantised:
        """Quantise."""
        if self.observing or (self.training and not self._ready):
            self.observe(x)
        elif not self._ready:
            raise SpecError(
                "an activation quantizer was evaluated before it saw any data: "
                "call calibrate(student, images), or run one batch in training mode"
            )
        step, zero, out_step = self.operands(x)
        zero = round_through(zero, 0, self.steps)
        y = unified_quantize(x, step, -zero, self.steps - zero, out_step, self.delta, self.rule)
        return y, out_step, zero, self.bit_width

    def normalised(self, y: Tensor) -> Tensor:
        """Codes on [0, 1], the papers' x_q, of what :meth:`forward` gave; differentiable.

        Args:
            y: quantised values.
        """
        _, zero, out_step = self.operands(y)
        return (y / out_step + round_through(zero, 0, self.steps)) / self.steps

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range (l, u) that fits a batch best, within :attr:`limit`."""
        if self.symmetric:
            step = search_around_zero(x, -self.fixed_zero, self.top)
            lower, upper = -self.fixed_zero * step, self.top * step
        else:
            lower, upper = search_range(x, self.bits, signed=self.signed)
        return lower, upper if self.limit is None else upper.clamp(max=self.limit)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Set the range from a batch, averaging with the batches before it, image by image."""
        self.batches_observed += 1
        self._seen += len(x)
        self.set_range(x.detach(), len(x) / self._seen)
        self._ready = True

    @property
    def calibrated(self) -> bool:
        """Whether the range was ever set."""
        return self._ready

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the batches observed; the next ones set the range anew."""
        self.batches_observed.zero_()
        self._seen = 0
        self._ready = False

    def range_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that give the step, by name: all times a factor, so is the
        step (unless a limit holds it), and the zero-point stays."""
        tensors = dict([*self.named_parameters(), *self.named_buffers()])
        return {name: tensors[name] for name in self.range_names if name in tensors}

    def zero_like(self, step: Tensor) -> Tensor:
        """The zero-point where it is not learned, as a constant beside ``step``."""
        return torch.full_like(step, float(self.fixed_zero))

    @torch.no_grad()
    def grid(self) -> tuple[float, int, float]:
        """The float32 numbers of an export: (step, zero-point, out_step)."""
        step, zero, out_step = self.operands(torch.zeros(1, 1, device=self.delta.device))
        if not bool(zero.isfinite().all() & step.isfinite().all()):
            raise ModelError(
                "an activation quantizer has read numbers that are not finite; where the model "
                "divides, the divisor may round to 0: add something to it that does not"
            )
        zero_point = int(round_through(zero, 0, self.steps))
        return float(step), zero_point, float(out_step)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.state_changed()

    def state_changed(self) -> None:
        """Called after something else has filled the buffers."""
        self._ready = bool(self.batches_observed > 0)
