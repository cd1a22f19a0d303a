"""Quantization functions: one unified form, and the published methods as instances of it."""

from sqakd_deploy.quantizers.base import ActivationQuantizer, WeightQuantizer
from sqakd_deploy.quantizers.injectors import act_quant, weight_quant
from sqakd_deploy.quantizers.methods import METHODS, Method
from sqakd_deploy.quantizers.unified import Residual, Rule, unified_quantize

__all__ = [
    "METHODS",
    "ActivationQuantizer",
    "Method",
    "Residual",
    "Rule",
    "WeightQuantizer",
    "act_quant",
    "unified_quantize",
    "weight_quant",
]
