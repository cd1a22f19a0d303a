"""A file's constants and operators against its student's, form by form."""

from __future__ import annotations

import numpy as np

from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.graph import Grid
from sqakd_deploy.pixels import PREPROCESSING_KEY, pixel_of_zero
from sqakd_deploy.verification.bounds import other_bounds, other_terms
from sqakd_deploy.verification.constants import (
    HIGHEST,
    LOWEST,
    READER_ZERO,
    SCALE,
    STEP,
    ZERO_POINT,
    Constants,
    Difference,
    Facts,
    compare_constants,
)
from sqakd_deploy.verification.equivalents import in_one_form
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.ir_file import Conversion
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.verification.operators import Operators, other_operators


def differences_of(
    conversion: Conversion, expected: Constants, operators: Operators | None
) -> list[Difference] | None:
    """A file's constants and operators that are not the student's, or where it is no conversion.

    Args:
        conversion: the file, and where it is not the conversion that it should be.
        expected: constants of the student.
        operators: of the student, where known.

    Returns:
        Each of them; None if the file has constants in no form known here.
    """
    file = conversion.file
    found = compare_with_student(file, expected, operators) if file.known_form else None
    return [*conversion.differences, *(found or ())] if conversion.differences else found


def compare_with_student(
    file: OnnxFile, expected: Constants, operators: Operators | None = None
) -> list[Difference]:
    """Compare a file's constants, and its operators, with a student's.

    A file that takes pixels as codes has no first quantizer; what is left of it is what the first
    layer makes of its input: the scale, and the pixel that stands for zero. Numbers in another form
    are no difference; a bound, term or factor that the student has nowhere is one, though no image
    may show it.
    """
    known = {**dict.fromkeys(expected, ""), **(operators or {})}
    others = [*other_operators(file, operators or {})]
    others += other_bounds(file, known)
    if operators or isinstance(file, QdqFile):  # a step of QONNX may be a constant of no layer
        others += other_terms(file, known, whole=bool(operators))
    expected, constants = in_one_form(file, expected, file.constants)
    first = next((name for name, facts in expected.items() if STEP in facts), None)
    if not isinstance(file, QdqFile) or not file.takes_codes or first is None:
        return [*compare_constants(expected, constants, file.unsupported), *others]
    pixels, read = _of_pixels(file, expected[first]), file.input_facts()
    wanted = {**expected, first: pixels}
    constants = {**constants, first: {name: read[name] for name in pixels}}
    return [*compare_constants(wanted, constants, file.unsupported), *others]


def _of_pixels(file: QdqFile, quantizer: Facts) -> Facts:
    """What readers should make of pixels that are codes, of a student's first quantizer."""
    stated = file.stated(PREPROCESSING_KEY)
    if not isinstance(stated, dict):
        return {SCALE: quantizer[SCALE]}
    low, high, zero = (int(quantizer[name]) for name in (LOWEST, HIGHEST, ZERO_POINT))
    step, scale = np.float32(quantizer[STEP]), np.float32(quantizer[SCALE][0])
    preprocessing = Preprocessing.parse(stated, PREPROCESSING_KEY)
    pixel = pixel_of_zero(step, Grid(scale, zero, low, high), preprocessing)
    zeros = np.array([] if pixel is None else [pixel])  # none: pixels are not its codes
    return {SCALE: quantizer[SCALE], READER_ZERO: zeros}
