"""EWGS's δ from the curvature of the loss, by Hutchinson's trace estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_deploy.given import images_in
from sqakd_deploy.quantization import scaling_quantizers
from sqakd_deploy.quantizers import ActivationQuantizer, WeightQuantizer
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.training.features import answers, feature_loss, with_codes
from sqakd_deploy.training.losses import distillation_loss

Quantizer = ActivationQuantizer | WeightQuantizer


def set_delta(student: nn.Module, config: DistillConfig) -> bool:
    """Give δ to the quantizers whose method scales gradients; whether there are any."""
    start = 0.0 if config.delta == "hessian" else float(config.delta)
    quantizers = scaling_quantizers(student)
    for quantizer in quantizers.values():
        quantizer.delta.fill_(start)
    return bool(quantizers)


class _Outputs:
    """Records what each quantizer puts out in a forward pass, and the size of its range."""

    def __init__(self, quantizers: list[Quantizer]) -> None:
        self.tensors: dict[Quantizer, Tensor] = {}
        self._ranges: dict[Quantizer, Tensor] = {}
        self._handles = [q.register_forward_hook(self._record) for q in quantizers]

    def _record(self, module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        value, scale = outputs[0], outputs[1]
        if not isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            return
        if value.requires_grad:
            self.tensors[module] = value
            step = scale.detach() * (1 if module.rule.offset == 0 else 2)
            self._ranges[module] = step * module.rule.steps

    def range_of(self, quantizer: Quantizer) -> Tensor:
        """``out_step · n``, one or one a channel: how far the output moves when x_q goes from 0
        to 1."""
        return self._ranges[quantizer]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def update_deltas(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[object],
    *,
    temperature: float,
    feature_weight: float = 0.0,
    divergence: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
    probes: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Set δ of the quantizers that use it to ``max(0, (Tr H / N) / (3·std(g)))`` (EWGS eq. 8–9).

    g and H are the loss's gradient and Hessian with respect to the discretised tensor x_q on
    [0, 1], of N elements; the trace is the mean of ``vᵀHv`` over Rademacher vectors v (Hutchinson,
    1990). One backward pass serves all quantizers: with independent v, the cross terms between
    two of them average to zero.

    Args:
        student: its ``delta`` buffers are changed; parameters and statistics are not.
        teacher: gives the targets.
        batches: images, with labels if the loss needs them; the estimates are averaged over them.
        temperature: of the loss.
        feature_weight: γ of the loss (:mod:`sqakd_deploy.training.features`).
        divergence: the rest of the loss, of the student's logits, the teacher's and the batch; by
            default the divergence of the two at that temperature.
        probes: vectors v per batch.
        seed: of v.

    Returns:
        δ by the quantizer's path.
    """
    named = scaling_quantizers(student)
    quantizers = list(named.values())
    generator = torch.Generator().manual_seed(seed)
    training = student.training
    student.eval()
    sums = dict.fromkeys(quantizers, 0.0)
    count = 0
    for quantizer in quantizers:
        quantizer.delta.zero_()  # the curvature of the loss itself, not of the scaled gradient
    networks = with_codes(student, teacher) if feature_weight else (student, teacher)

    def loss(batch: object) -> Tensor:
        images = images_in(batch, None).to(next(student.parameters()).device)
        with torch.no_grad():
            target, *wanted = answers(networks[1](images))
        logits, *codes = answers(networks[0](images))
        if divergence is None:
            found = distillation_loss(logits, target, temperature)
        else:
            found = divergence(logits, target, batch)
        return found + feature_weight * feature_loss(*codes, *wanted) if codes else found

    for batch in batches:
        count += 1
        for quantizer, ratio in _ratios(student, batch, loss, probes, generator):
            sums[quantizer] += ratio
    student.train(training)
    deltas = {name: max(0.0, sums[q] / max(1, count)) for name, q in named.items()}
    for name, quantizer in named.items():
        quantizer.delta.fill_(deltas[name])
    return deltas


def _ratios(
    student: nn.Module,
    batch: object,
    objective: Callable[[object], Tensor],
    probes: int,
    generator: torch.Generator,
) -> list[tuple[Quantizer, float]]:
    """(Tr H / N) / (3·std(g)) of each quantizer on one batch."""
    outputs = _Outputs(list(scaling_quantizers(student).values()))
    try:
        loss = objective(batch)
    finally:
        outputs.remove()
    quantizers = list(outputs.tensors)
    tensors = [outputs.tensors[q] for q in quantizers]
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    # with x̂ = r·x_q + const: H on [0, 1] is r·H·r of x̂, and g is r·g of x̂
    reaches = [outputs.range_of(quantizer) for quantizer in quantizers]
    traces = [0.0] * len(tensors)
    for _ in range(probes):
        signs = [_rademacher(x, generator) * r for x, r in zip(tensors, reaches, strict=True)]
        product = torch.stack([(g * v).sum() for g, v in zip(grads, signs, strict=True)]).sum()
        curved = torch.autograd.grad(product, tensors, retain_graph=True, allow_unused=True)
        for i, (v, hv) in enumerate(zip(signs, curved, strict=True)):
            traces[i] += float((v * hv).sum()) / probes if hv is not None else 0.0
    results = []
    for quantizer, grad, reach, trace in zip(quantizers, grads, reaches, traces, strict=True):
        spread = float((grad.detach() * reach).std()) if grad.numel() > 1 else 0.0
        usable = spread > 0.0
        results.append((quantizer, trace / grad.numel() / (3 * spread) if usable else 0.0))
    return results


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return signs.to(like)
