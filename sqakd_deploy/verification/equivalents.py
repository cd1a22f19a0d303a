"""Constants that a file states in another form than its student, and that mean the same.

Targets differ in what they want bounded and how: codes by an integer Clip, or reals by a float one
before they are rounded; codes counted from another zero, as int8 or as uint8; biases as int32
codes, or as the floats that these stand for; a constant for each channel or each entry; weights of
an image that is laid out otherwise. Here the student's and the file's constants are brought into
one form, so that only other numbers differ.
"""

from __future__ import annotations

import numpy as np

from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.verification.rearranged import as_in_the_student
from sqakd_deploy.verification.signs import never_negative

_COUNTED = (c.ZERO_POINT, c.LOWEST, c.HIGHEST, c.READER_ZERO)


def in_one_form(
    file: OnnxFile, expected: c.Constants, found: c.Constants
) -> tuple[c.Constants, c.Constants]:
    """The student's and the file's constants, alike wherever they mean the same.

    Args:
        file: whose constants ``found`` are.
        expected: of the student.
        found: of the file.

    Returns:
        ``expected`` and ``found``; only bounds, biases, shapes of constants and of kernels may have
        changed.
    """
    wanted = {
        name: _spread(_float_bias(facts, found.get(name, {})), found.get(name, {}))
        for name, facts in expected.items()
    }
    if not isinstance(file, QdqFile):  # a width that is stated is no way of bounding reals
        return {name: _as_unsigned(f, _first(name, found)) for name, f in wanted.items()}, found
    adjusted = {
        name: as_in_the_student(file, name, facts, expected.get(name, {}))
        for name, facts in found.items()
    }
    for part, quantizer in file.quantizers.items():
        name = part if part in expected else part.rpartition("/")[0]
        facts = expected.get(name, {})
        if c.LOWEST not in facts or c.LOWEST not in found.get(part, {}):
            continue
        facts = _as_unsigned(facts, found[part])
        if part != name:  # each part of a concatenation has bounds of its own
            wanted.pop(name, None)
        before = file.producer(quantizer.input[0])
        clip = before.name if before is not None and before.op_type in ("Clip", "Relu") else ""
        own = _codes(found[part], found.get(clip, {}))
        if int(facts[c.LOWEST]) == int(facts[c.ZERO_POINT]) and never_negative(
            file, quantizer.input[0]
        ):
            own = max(own[0], int(found[part][c.ZERO_POINT])), own[1]
        behind = file.clip_behind(quantizer)
        alone = file.reader_count(quantizer.input[0]) == 1
        if not clip and behind is not None:  # the student's, on codes
            clip, alone = behind.name, True
        stated = clip if clip in expected else clip.rpartition("/")[0]  # one for each part
        right = _codes(facts, expected.get(stated, {}))
        wanted[part] = _with_codes(facts, right)
        adjusted[part] = _counted_alike(_with_codes(found[part], own), wanted[part])
        if _bounds(adjusted[part]) == right and stated in expected and alone:
            adjusted[clip] = expected[stated]
    return wanted, adjusted


def _float_bias(facts: c.Facts, found: c.Facts) -> c.Facts:
    """A student's int32 bias as the floats that a file has instead."""
    if c.BIAS_CODES not in facts or c.BIAS not in found:
        return facts
    real = facts[c.BIAS_CODES].astype(np.float64) * facts[c.BIAS_SCALE]
    others = {k: v for k, v in facts.items() if k not in (c.BIAS_CODES, c.BIAS_SCALE)}
    return {**others, c.BIAS: real.astype(np.float32)}


def _spread(facts: c.Facts, found: c.Facts) -> c.Facts:
    """A student's constant for each channel as the file may have it: one for each entry."""
    if c.CONSTANT not in facts or c.CONSTANT not in found:
        return facts
    stated, shape = facts[c.CONSTANT], found[c.CONSTANT].shape
    sizes = (1,) * (len(shape) - stated.ndim) + stated.shape
    fits = len(sizes) == len(shape) and all(a in (1, b) for a, b in zip(sizes, shape, strict=True))
    return {**facts, c.CONSTANT: np.broadcast_to(stated, shape)} if fits else facts


def _first(name: str, found: c.Constants) -> c.Facts:
    """What a file has under a layer's name, or under that of its first part."""
    return next((found[part] for part in (name, *c.parts_of(name, found)) if part in found), {})


def _as_unsigned(facts: c.Facts, found: c.Facts) -> c.Facts:
    """Codes of int8 that are not negative, counted from 0 where a file holds them as uint8."""
    middle = -c.offset("int8")
    if c.LOWEST not in facts or c.LOWEST not in found:
        return facts
    if int(facts[c.LOWEST]) < middle or int(found[c.ZERO_POINT]) >= middle:
        return facts
    return {**facts, **{name: facts[name] - middle for name in _COUNTED}}


def _codes(quantizer: c.Facts, clip: c.Facts) -> tuple[int, int]:
    """The codes that a quantizer really gives, bounds of the reals before it included.

    Rounding keeps order: what a bound cuts rounds to the code that the bound rounds to.
    """
    step, zero = quantizer[c.STEP], int(quantizer[c.ZERO_POINT])
    low, high = _bounds(quantizer)
    if c.LOWER in clip:
        low = max(low, int(np.rint(clip[c.LOWER] / step)) + zero)
    if c.UPPER in clip:
        high = min(high, int(np.rint(clip[c.UPPER] / step)) + zero)
    return low, high


def _bounds(quantizer: c.Facts) -> tuple[int, int]:
    return int(quantizer[c.LOWEST]), int(quantizer[c.HIGHEST])


def _counted_alike(found: c.Facts, wanted: c.Facts) -> c.Facts:
    """Codes counted from the student's zero, if that makes all of them the student's."""
    shift = found[c.ZERO_POINT] - wanted[c.ZERO_POINT]
    moved = {name: found[name] - shift for name in _COUNTED}
    alike = all(np.array_equal(codes, wanted[name]) for name, codes in moved.items())
    return {**found, **moved} if alike else found


def _with_codes(facts: c.Facts, codes: tuple[int, int]) -> c.Facts:
    return {**facts, c.LOWEST: np.array(codes[0]), c.HIGHEST: np.array(codes[1])}
