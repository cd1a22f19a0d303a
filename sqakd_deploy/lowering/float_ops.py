"""Operators that no integer kernel computes, and products: what they mean in the graph's terms.

Bare parameters (a layer scale, a position embedding) are read here: they become constants of the
node that uses them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ModelError
from sqakd_deploy.lowering.meaning import Identity, Op, Reader, Scalar, setting, simple
from sqakd_deploy.tracing.norms import sum_of_squares
from sqakd_deploy.tracing.shapes import noted_shape
from sqakd_deploy.tracing.trace import BATCH, describe, is_parameter, shape

_LINEAR = 20  # from here on a softplus is its argument, but for 2e-9


def parameter(node: fx.Node) -> NDArray[np.float32]:
    """The values of a bare parameter or buffer."""
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return np.asarray(owner.detach().float().cpu().numpy(), np.float32)


def _terms(node: fx.Node) -> tuple[list[fx.Node], list[Any]]:
    """What an elementwise operator of two reads: computed tensors, and constants."""
    both = (node.args[0], setting(node, None, "other", 1, None))
    computed = [t for t in both if isinstance(t, fx.Node) and not is_parameter(t)]
    return computed, [term for term in both if not any(term is known for known in computed)]


def _constant(value: Any) -> NDArray[np.float32] | None:
    """A constant operand's values, None where it is no constant."""
    if isinstance(value, fx.Node):
        return parameter(value) if is_parameter(value) else None
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return np.array(value, np.float32) if known else None


def product(node: fx.Node, module: nn.Module | None) -> Op | None:
    """Two tensors that broadcast, or one and a constant; a constant a channel is an affine map."""
    computed, others = _terms(node)
    if len(computed) == 2:
        _check_broadcast(node, "product", computed)
        return Op(ir.Mul)
    constant = _constant(others[0]) if len(computed) == len(others) == 1 else None
    if constant is None:
        return None
    dims = shape(computed[0])
    if shape(node) != dims:
        raise ModelError(f"{describe(node)}: a constant factor that changes the tensor's shape")
    if len(dims) == 4 and constant.size == dims[1] and constant.shape[-3:] == (dims[1], 1, 1):
        return Op(ir.ChannelAffine, {"scale": constant.reshape(-1)})
    return Op(ir.Scale, {"constant": constant})


def _check_broadcast(node: fx.Node, what: str, terms: list[fx.Node]) -> None:
    first, second = (shape(term) for term in terms)
    if shape(node) not in (first, second) or len(first) != len(second):
        raise ModelError(
            f"{describe(node)}: the {what} of shapes {first} and {second}; one must have the "
            "result's shape and the other as many axes"
        )


def _quotient(node: fx.Node, module: nn.Module | None) -> Op | None:
    """Of two computed tensors; constants divide as factors."""
    computed, _ = _terms(node)
    if len(computed) != 2 or node.kwargs.get("rounding_mode"):
        return None
    _check_broadcast(node, "quotient", computed)
    return Op(ir.Divide)


def axes_of(given: Any, rank: int) -> tuple[int, ...]:
    """Axes that a reduction is over, in order; none where it is over all."""
    numbers = given if isinstance(given, (tuple, list)) else () if given is None else (given,)
    return tuple(sorted(axis % rank for axis in numbers))


def _length(node: fx.Node, module: nn.Module | None) -> Op:
    """Euclidean length along axes of an image."""
    matrix = node.target is torch.linalg.norm  # of two axes, where it is given a number
    name = "p" if node.target in (torch.norm, "norm") else "ord"
    power, over = setting(node, None, name, 1, None), setting(node, None, "dim", 2, None)
    axes = axes_of(over, len(shape(node.all_input_nodes[0])))
    euclidean = power in (None, 2, "fro") and not (matrix and len(axes) == 2 and power == 2)
    if not euclidean or not axes or axes[0] == 0:
        raise ModelError(
            f"{describe(node)}: wanted the Euclidean norm (p=2) along axes of an image, got "
            f"{name}={power}, dim={over}"
        )
    return Op(ir.Reduce, {"function": "length", "axes": axes})


def _squares(node: fx.Node, module: nn.Module | None) -> Op:
    axes = axes_of(setting(node, None, "axes", 1, None), len(shape(node)))
    return Op(ir.Reduce, {"function": "squares", "axes": axes})


def shifted(node: fx.Node) -> Op | None:
    """A sum with a bare parameter (a position embedding) or a number; None for any other sum."""
    computed, others = _terms(node)
    constant = _constant(others[0]) if len(computed) == len(others) == 1 else None
    if constant is None or node.kwargs.get("alpha", 1) != 1:
        return None
    if not isinstance(others[0], fx.Node) and not others[0]:
        return None  # adds nothing
    if shape(node) != shape(computed[0]):
        raise ModelError(f"{describe(node)}: a constant term that changes the tensor's shape")
    return Op(ir.Shift, {"constant": constant})


def _repeated(node: fx.Node, module: nn.Module | None) -> Op | None:
    """A parameter ``(1, …)`` expanded along the batch (a class token)."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_parameter(source):
        return None
    if (noted_shape(node) or (0,))[0] != BATCH:
        raise ModelError(f"{describe(node)}: a parameter repeated for parts of images")
    constant = parameter(source)
    if constant.shape[1:] != shape(node)[1:] or constant.shape[:1] != (1,):
        raise ModelError(f"{describe(node)}: only a parameter (1, …) repeated along the batch")
    return Op(ir.Repeat, {"constant": constant})


def _gelu(node: fx.Node, module: nn.Module | None) -> Op:
    approximate = setting(node, module, "approximate", 1, "none")
    return Op(ir.Activation, {"function": "gelu" if approximate == "none" else "gelu_tanh"})


def _leaky_relu(node: fx.Node, module: nn.Module | None) -> Op:
    slope = float(setting(node, module, "negative_slope", 1, 0.01))
    return Op(ir.Activation, {"function": "leaky_relu", "slope": slope})


def _elu(node: fx.Node, module: nn.Module | None) -> Op:
    slope = float(setting(node, module, "alpha", 1, 1.0))
    return Op(ir.Activation, {"function": "elu", "slope": slope})


def _softplus(node: fx.Node, module: nn.Module | None) -> Op | None:
    beta, threshold = setting(node, module, "beta", 1, 1), setting(node, module, "threshold", 2, 20)
    plain = beta == 1 and threshold >= _LINEAR
    return Op(ir.Activation, {"function": "softplus"}) if plain else None


def _parametric_relu(node: fx.Node, module: nn.Module | None) -> Op:
    slopes = _affine(node, module, "weight", 1, np.zeros(1, np.float32))
    if slopes.size == 1:
        return Op(ir.Activation, {"function": "leaky_relu", "slope": float(slopes.item())})
    ones = (1,) * (len(shape(node)) - 2)
    return Op(ir.ParametricRelu, {"constant": slopes.reshape(1, -1, *ones)})


def _layer_norm(node: fx.Node, module: nn.Module | None) -> Op:
    axes = setting(node, module, "normalized_shape", 1, None)
    sizes = tuple(axes) if isinstance(axes, (tuple, list, torch.Size)) else (axes,)
    scale = _affine(node, module, "weight", 2, np.ones(sizes, np.float32))
    shift = _affine(node, module, "bias", 3, np.zeros(sizes, np.float32))
    epsilon = float(setting(node, module, "eps", 4, 1e-5))
    return Op(ir.LayerNorm, {"scale": scale, "shift": shift, "epsilon": epsilon})


def _affine(
    node: fx.Node, module: nn.Module | None, name: str, at: int, default: NDArray[np.float32]
) -> NDArray[np.float32]:
    given = setting(node, module, name, at, None)
    if given is None:
        return default
    if isinstance(given, torch.Tensor):
        return np.asarray(given.detach().float().cpu().numpy(), np.float32)
    constant = _constant(given)
    if constant is None:
        raise ModelError(f"{describe(node)}: wanted parameters as {name}, not a computed tensor")
    return constant


def _softmax(node: fx.Node, module: nn.Module | None) -> Op:
    axis = setting(node, module, "dim", 1, None)
    if not isinstance(axis, int) or axis % len(shape(node)) == 0:
        raise ModelError(f"{describe(node)}: wanted one axis, not that of the batch, got {axis}")
    logs = (torch.log_softmax, F.log_softmax, "log_softmax")
    log = isinstance(module, nn.LogSoftmax) or node.target in logs
    return Op(ir.Softmax, {"axis": axis % len(shape(node)), "log": log})


def _unit_length(node: fx.Node, module: nn.Module | None) -> Op:
    power, axis = setting(node, None, "p", 1, 2.0), setting(node, None, "dim", 2, 1)
    if power != 2 or not isinstance(axis, int) or axis % len(shape(node)) == 0:
        raise ModelError(f"{describe(node)}: wanted p=2 and one axis, not that of the batch")
    epsilon = float(setting(node, None, "eps", 3, 1e-12))
    return Op(ir.UnitLength, {"axis": axis % len(shape(node)), "epsilon": epsilon})


def _matmul(node: fx.Node, module: nn.Module | None) -> Op:
    computed, _ = _terms(node)
    ranks = [len(shape(term)) for term in computed]
    if len(ranks) != 2 or ranks[0] != ranks[1] or ranks[0] < 3:
        raise ModelError(
            f"{describe(node)}: only the product of two computed tensors (N, …, A, B) and "
            "(N, …, B, C) can be exported; put weights into nn.Linear"
        )
    return Op(ir.MatMul)


def _activation(function: ir.Function) -> Reader:
    return simple(ir.Activation, function=function)


def dropped(function: Any) -> Reader | None:
    """Stochastic depth, known by its name: torchvision need not be imported for it."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    is_it = (module, name) == ("torchvision.ops.stochastic_depth", "stochastic_depth")
    return simple(Identity) if is_it else None


MODULES: Mapping[type[nn.Module], Reader] = {
    nn.Hardswish: _activation("hard_swish"),
    nn.Hardsigmoid: _activation("hard_sigmoid"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.SiLU: _activation("silu"),
    nn.GELU: _gelu,
    nn.ELU: _elu,
    nn.LeakyReLU: _leaky_relu,
    nn.Mish: _activation("mish"),
    nn.PReLU: _parametric_relu,
    nn.Softplus: _softplus,
    nn.LayerNorm: _layer_norm,
    nn.LogSoftmax: _softmax,
    nn.Softmax: _softmax,
    nn.Tanh: _activation("tanh"),
}

FUNCTIONS: Mapping[Callable[..., Any], Reader] = {
    operator.mul: product,
    torch.mul: product,
    operator.matmul: _matmul,
    torch.bmm: _matmul,
    torch.matmul: _matmul,
    F.hardswish: _activation("hard_swish"),
    F.hardsigmoid: _activation("hard_sigmoid"),
    F.sigmoid: _activation("sigmoid"),
    torch.sigmoid: _activation("sigmoid"),
    F.silu: _activation("silu"),
    F.gelu: _gelu,
    F.elu: _elu,
    F.leaky_relu: _leaky_relu,
    F.mish: _activation("mish"),
    F.prelu: _parametric_relu,
    torch.prelu: _parametric_relu,
    F.softplus: _softplus,
    torch.reciprocal: _activation("reciprocal"),
    torch.sqrt: _activation("sqrt"),
    F.layer_norm: _layer_norm,
    F.log_softmax: _softmax,
    F.normalize: _unit_length,
    F.softmax: _softmax,
    torch.log_softmax: _softmax,
    torch.softmax: _softmax,
    torch.tanh: _activation("tanh"),
    torch._assert: simple(Scalar),
    operator.truediv: _quotient,
    torch.div: _quotient,
    torch.true_divide: _quotient,
    sum_of_squares: _squares,
    torch.norm: _length,
    torch.linalg.norm: _length,
    torch.linalg.vector_norm: _length,
}

METHODS: Mapping[str, Reader] = {
    "div": _quotient,
    "mul": product,
    "norm": _length,
    "bmm": _matmul,
    "matmul": _matmul,
    "sigmoid": _activation("sigmoid"),
    "log_softmax": _softmax,
    "softmax": _softmax,
    "tanh": _activation("tanh"),
    "reciprocal": _activation("reciprocal"),
    "sqrt": _activation("sqrt"),
    "expand": _repeated,
}
