"""Runs a student on the codes that a runtime computed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ParityError
from sqakd_deploy.evaluate import predict
from sqakd_deploy.exporting import Runtime, Session
from sqakd_deploy.lowering.exact import in_integers
from sqakd_deploy.lowering.integer import lower, lower_snapped, snap_biases
from sqakd_deploy.tracing.trace import first_tensor
from sqakd_deploy.verification.isolated import Isolated, IsolatedReport, Isolator
from sqakd_deploy.verification.measures import Logits
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.verification.stages import output_step
from sqakd_deploy.verification.student import Rounding, record_exact, roundings
from sqakd_deploy.verification.taps import CHUNK, read_codes


def isolator_of(student: nn.Module) -> Isolator:
    """Runs a student as it is, or a copy where its biases are not those of the file: rounded, which
    moves a student that was never trained by up to half an accumulator's step.

    It runs on the CPU. Accelerators sum convolutions in TF32 unless they are told not to, which
    moves values by hundredths of a step, and some have no float64 to compare in.
    """
    here = all(parameter.is_cpu for parameter in student.parameters())
    graph = lower_snapped(student) if here else None
    if graph is None:
        student = copy.deepcopy(student).cpu()
        snap_biases(student)
        graph = lower(student)
    return _Isolator(student, graph)


def isolate(
    student: nn.Module,
    file: OnnxFile,
    runtime: Runtime,
    images: NDArray[np.float32],
    optimize: bool = True,
    session: Session | None = None,
) -> IsolatedReport:
    """Compare every quantised tensor of a file with what the student makes of the codes before it.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize`, as exported.
        file: written from it.
        runtime: that runs it.
        images: ``(M, C, H, W)``.
        optimize: let the runtime rewrite the graph.
        session: the file opened so; None opens it.

    Raises:
        ExportError: if the runtime cannot open or run the file.
        ParityError: if a tensor has another shape than the student's.
    """
    return _Isolator(student, lower(student))(file, runtime, images, optimize, session)


class _Isolator:
    """What is the student's alone is found once, for all stages of a file."""

    def __init__(self, student: nn.Module, graph: ir.IntegerGraph) -> None:
        self.trained, self.exact = student, in_integers(student)
        self.graph, self.rules = graph, roundings(graph)
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def shapes(self, image: NDArray[np.float32]) -> dict[str, tuple[int, ...]]:
        """Of every quantised tensor of an image ``(1, C, H, W)``, without the batch."""
        if self._shapes is None:
            own = record_exact(self.exact, self.graph, image)
            self._shapes = {name: tensor.codes.shape[1:] for name, tensor in own.items()}
        return self._shapes

    def __call__(
        self,
        file: OnnxFile,
        runtime: Runtime,
        images: NDArray[np.float32],
        optimize: bool = True,
        session: Session | None = None,
    ) -> IsolatedReport:
        found, shapes = file.quantized, self.shapes(images[:1])
        known = {name: size for name, size in shapes.items() if name in found}
        seen = read_codes(file, runtime, images, known, optimize=optimize, session=session)
        levels = {
            name: codes.astype(np.int16) - found[name].zero_point
            for name, codes in seen.codes.items()
        }
        parts, answers = self._run(self.exact, images, levels)
        unseen = tuple(name for name in shapes if name not in {part.name for part in parts})
        off = _logits_off(self.graph, answers, seen.logits)
        copies = seen.programs, seen.unseen, seen.moved
        return IsolatedReport(len(images), parts, unseen, off, *copies)

    def simulated(self, images: NDArray[np.float32]) -> IsolatedReport:
        """Compare the student as it was trained with its integers, which files are compared with:
        they are made of what lowering folds, as the file is."""
        own = record_exact(self.exact, self.graph, images)
        levels = {name: t.codes.astype(np.int16) - t.zero_point for name, t in own.items()}
        training = self.trained.training
        try:
            parts, answers = self._run(self.trained.eval(), images, levels)
        finally:  # the student may be the caller's own
            self.trained.train(training)
        logits = predict(self.exact, torch.from_numpy(images).split(CHUNK))
        return IsolatedReport(
            len(images), parts, (), _logits_off(self.graph, answers, logits.reshape(answers.shape))
        )

    @torch.no_grad()
    def _run(
        self, student: nn.Module, images: NDArray[np.float32], levels: Mapping[str, NDArray[Any]]
    ) -> tuple[tuple[Isolated, ...], Logits]:
        """Every tensor on the codes before it, in topological order, and the answers to those."""
        parts: dict[str, Isolated] = {}
        answers: list[torch.Tensor] = []
        device = next(student.parameters()).device
        for start in range(0, len(images), CHUNK):
            here = slice(start, start + CHUNK)
            of_batch = {name: torch.from_numpy(codes[here]) for name, codes in levels.items()}
            on_codes = _OnCodes(student, self.rules, of_batch, parts)
            batch = torch.from_numpy(images[here]).to(device)
            answers.append(first_tensor(on_codes.run(batch)).reshape(len(batch), -1))
        ordered = tuple(parts[rule.name] for rule in self.rules.values() if rule.name in parts)
        return ordered, torch.cat(answers).float().cpu().numpy()


def _logits_off(graph: ir.IntegerGraph, expected: Logits, found: Logits) -> float:
    """Largest error of answers (steps of the output)."""
    if found.shape != expected.shape:
        raise ParityError(f"wanted logits {expected.shape}, the file has {found.shape}")
    step, _ = output_step(graph, expected)
    return float(np.abs(found.astype(np.float64) - expected).max()) / step


class _OnCodes(fx.Interpreter):
    """Runs a student, and goes on behind each quantizer with the runtime's codes."""

    def __init__(
        self,
        student: Any,
        rules: Mapping[str, Rounding],
        levels: Mapping[str, torch.Tensor],
        parts: dict[str, Isolated],
    ) -> None:
        super().__init__(student)
        self.rules, self.levels, self.parts = rules, levels, parts

    def run_node(self, n: fx.Node) -> Any:
        rule = self.rules.get(n.name)
        level = None if rule is None else self.levels.get(rule.name)
        if rule is None or level is None:
            return super().run_node(n)
        (real,), _ = self.fetch_args_kwargs_from_env(n)
        if real.numel() != level.numel():
            wanted, got = tuple(real.shape), tuple(level.shape)
            raise ParityError(f"{rule.name}: wanted codes {wanted}, the file has {got}")
        level = level.to(real.device).reshape(real.shape)  # an image may have several rows
        found = _compare(rule, real, level)
        before = self.parts.get(rule.name)
        self.parts[rule.name] = found if before is None else _joined(before, found)
        return level.float() * rule.out_step


def _compare(rule: Rounding, real: torch.Tensor, level: torch.Tensor) -> Isolated:
    """A batch of a tensor: what the student would round, and the levels that the runtime has."""
    position = (real.double() / rule.step).float().clamp(rule.low, rule.high)  # as it is rounded
    outside = float(((position.double() - level).abs() - 0.5).max())
    gap = (position.round() - level).abs()
    return Isolated(
        rule.name,
        level.numel(),
        int(torch.count_nonzero(gap)),
        int(torch.nan_to_num(gap, nan=rule.high - rule.low).max()),
        max(outside, 0.0),
    )


def _joined(one: Isolated, other: Isolated) -> Isolated:
    return replace(
        one,
        codes=one.codes + other.codes,
        differing=one.differing + other.differing,
        largest=max(one.largest, other.largest),
        outside=float(np.maximum(one.outside, other.outside)),
    )
