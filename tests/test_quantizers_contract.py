"""What every registered method must hold to, at every bit-width, alone and in Brevitas' layers.

Registering a method is all it takes to be tested here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from sqakd_deploy.errors import SpecError
from sqakd_deploy.quantizers import (
    METHODS,
    ActivationQuantizer,
    WeightQuantizer,
    act_quant,
    weight_quant,
)
from sqakd_deploy.quantizers.unified import MIN_STEP

METHODS_BY_NAME = sorted(METHODS)
SHAPE = (6, 4, 3, 3)

every_method = pytest.mark.parametrize("method", METHODS_BY_NAME)
every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
both_shapes = pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
both_signs = pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])

# Brevitas does not compute the zero-point of a layer's sums where its input has one; the layer then
# gives a plain tensor, which is right, and warns.
no_sum_zero_point = pytest.mark.filterwarnings(
    "ignore:Computing zero point of output accumulator not supported yet:UserWarning"
)


def weights(shape: tuple[int, ...] = SHAPE) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.1)


def inputs(signed: bool, shape: tuple[int, ...] = (4, 5, 6, 6)) -> Tensor:
    x = torch.randn(shape)
    return x + 0.3 if signed else x.relu()


def calibrated(method: str, bits: int, signed: bool, **more: Any) -> ActivationQuantizer:
    quantizer = METHODS[method].activation(bits, signed, **more)
    quantizer.observe(inputs(signed))
    return quantizer


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Move every learned parameter, as training does."""
    for parameter in module.parameters():
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.01)


def check_levels(values: Tensor, scale: Tensor, codes: Tensor) -> None:
    """Values are scale·codes, codes are whole, to the last bit."""
    assert scale.dtype == torch.float32
    assert (scale > 0).all()
    assert torch.equal(codes, codes.round())
    assert torch.equal(values, codes * scale)


# -- weights -------------------------------------------------------------------------------------


@every_method
@every_width
@both_shapes
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_weights_lie_on_the_integer_grid_that_encode_gives(
    method: str, bits: int, per_channel: bool, trained: bool
) -> None:
    weight = weights()
    quantizer = METHODS[method].weight(weight, bits, per_channel)
    if trained:
        shake(quantizer)
    value, scale, zero_point, bit_width = quantizer(weight)
    codes, code_scale = quantizer.encode(weight)
    assert codes.dtype == torch.int8
    assert codes.shape == value.shape == weight.shape
    assert scale.shape == ((SHAPE[0], 1, 1, 1) if per_channel else ())
    assert zero_point == 0
    assert torch.equal(code_scale, scale)
    check_levels(value, scale, codes.float())
    _check_codes(codes, bits, quantizer.mid_rise)
    # Brevitas' width holds every code: odd multiples of half a step take one bit more
    assert codes.min() >= -(2 ** (int(bit_width) - 1))
    assert codes.max() <= 2 ** (int(bit_width) - 1) - 1


def _check_codes(codes: Tensor, bits: int, mid_rise: bool) -> None:
    low, high = int(codes.min()), int(codes.max())
    if bits == 8:
        assert low >= -127  # a BatchNorm with a negative factor negates codes
        assert high <= 127
    elif bits == 1 or mid_rise:
        assert (codes % 2 != 0).all()
        assert low >= -(2**bits - 1)
        assert high <= 2**bits - 1
    else:
        assert low >= -(2 ** (bits - 1))
        assert high <= 2 ** (bits - 1) - 1
    assert codes.unique().numel() > 2 ** (bits - 1) or bits == 8  # the width is made use of


@every_method
@every_width
def test_per_channel_is_per_tensor_for_each_channel(method: str, bits: int) -> None:
    weight = weights() * torch.logspace(-2, 1, SHAPE[0]).reshape(-1, 1, 1, 1)
    value = METHODS[method].weight(weight, bits, per_channel=True)(weight)[0]
    alone = [METHODS[method].weight(row[None], bits)(row[None])[0] for row in weight]
    # means over rows are summed in another order
    torch.testing.assert_close(value, torch.cat(alone), rtol=1e-6, atol=1e-9)


@every_method
@every_width
@both_shapes
def test_gradients_of_weights(method: str, bits: int, per_channel: bool) -> None:
    weight = weights()
    quantizer = METHODS[method].weight(weight, bits, per_channel)
    shake(quantizer)
    grad = torch.randn(SHAPE)
    quantizer(weight)[0].backward(grad)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    passed = weight.grad != 0
    assert passed.float().mean() > 0.1
    assert (weight.grad.sign() == grad.sign())[passed].all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).all(), name


WEIGHTS = {
    "zeros": torch.zeros(SHAPE),
    "denormal": torch.full(SHAPE, 1e-40),
    "tiny": 1e-7 * torch.linspace(-1, 1, 216).reshape(SHAPE),
    "huge": 1e6 * torch.linspace(-1, 1, 216).reshape(SHAPE),
    "constant": torch.full(SHAPE, 0.25),
    "negative": torch.full(SHAPE, -0.25),
    "outlier": torch.cat([torch.full((1, *SHAPE[1:]), 100.0), torch.zeros(5, *SHAPE[1:])]),
}


@every_method
@every_width
@both_shapes
@pytest.mark.parametrize("kind", WEIGHTS)
def test_odd_weights_start_near_themselves(
    method: str, bits: int, per_channel: bool, kind: str
) -> None:
    weight = nn.Parameter(WEIGHTS[kind].clone())
    quantizer = METHODS[method].weight(weight, bits, per_channel)
    value, scale, *_ = quantizer(weight)
    value.backward(torch.randn(SHAPE))
    assert (scale > 0).all()
    assert value.isfinite().all()
    for tensor in (weight, *quantizer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    # no worse than quantising to zeros, but for the smallest step there is; channel by channel
    # where each has its own
    groups = SHAPE[0] if per_channel else 1
    error = (value - weight).detach().reshape(groups, -1).double().norm(dim=1)
    size = weight.detach().reshape(groups, -1).double().norm(dim=1)
    smallest = MIN_STEP * (weight.numel() / groups) ** 0.5
    assert (error <= size * (1 + 1e-6) + smallest).all()


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_their_type(method: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(weights().to(dtype).detach())
    quantizer = METHODS[method].weight(weight, 4)
    value, scale, *_ = quantizer(weight)
    value.sum().backward()
    codes, _ = quantizer.encode(weight)
    assert value.dtype == weight.grad.dtype == dtype  # type: ignore[union-attr]
    assert torch.equal(value, (codes * scale).to(dtype))
    assert all(p.dtype == torch.float32 for p in quantizer.parameters())


# -- activations ---------------------------------------------------------------------------------


@every_method
@every_width
@both_signs
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_activations_lie_on_the_integer_grid(
    method: str, bits: int, signed: bool, trained: bool
) -> None:
    quantizer = calibrated(method, bits, signed)
    if trained:
        shake(quantizer)
    with torch.no_grad():
        value, scale, zero_point, bit_width = quantizer(inputs(signed) * 3)
    codes = (value / scale).round() + zero_point
    check_levels(value, scale, codes - zero_point)
    assert bit_width == bits
    assert zero_point == zero_point.round()
    assert 0 <= zero_point <= 2**bits - 1
    if not signed:
        assert zero_point == 0
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert codes.unique().numel() > 2 ** (bits - 1)
    step, grid_zero, out_step = quantizer.grid()
    assert step > 0
    assert (grid_zero, out_step) == (int(zero_point), float(scale))


@every_method
@every_width
@both_signs
def test_zero_stays_zero(method: str, bits: int, signed: bool) -> None:
    quantizer = calibrated(method, bits, signed)
    zeros = torch.zeros(2, 3)
    for _ in range(5):
        assert (quantizer(zeros)[0] == 0).all()
        shake(quantizer)


@every_method
@every_width
@both_signs
def test_activations_round_half_to_even(method: str, bits: int, signed: bool) -> None:
    quantizer = calibrated(method, bits, signed)
    step, zero_point, out_step = quantizer.grid()
    below = torch.arange(-zero_point, 2**bits - 1 - zero_point)
    ties = step * (below + 0.5)
    exact = ties / step == below + 0.5  # the others fall beside the tie in float32
    assert exact.any()
    level = (quantizer(ties)[0] / out_step).round()
    even = below + below % 2
    assert torch.equal(level[exact].long(), even[exact])


@every_method
@every_width
@both_signs
def test_gradients_of_activations(method: str, bits: int, signed: bool) -> None:
    quantizer = calibrated(method, bits, signed)
    shake(quantizer)
    x = (inputs(signed) * 3).requires_grad_()
    grad = torch.rand(x.shape) + 0.5
    value, *_ = quantizer(x)
    value.backward(grad)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    step, zero_point, _ = quantizer.grid()
    position = x.detach() / step + zero_point
    assert (x.grad[(position > 0.01) & (position < 2**bits - 1.01)] > 0).all()
    assert (x.grad[(position < -0.01) | (position > 2**bits - 0.99)] == 0).all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite(), name
        assert parameter.grad != 0, name


@every_method
@every_width
@both_signs
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-7, 1e6])
def test_odd_inputs(method: str, bits: int, signed: bool, value: float) -> None:
    quantizer = METHODS[method].activation(bits, signed)
    x = torch.full((2, 3), value, requires_grad=True)
    output, scale, *_ = quantizer(x)
    output.sum().backward()
    assert scale > 0
    for tensor in (output, x.grad, *(p.grad for p in quantizer.parameters())):
        assert tensor is not None
        assert tensor.isfinite().all()
    far = quantizer(torch.tensor([[-1e30, 1e30]]))[0]
    assert far.isfinite().all()


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_keep_their_type(method: str, dtype: torch.dtype) -> None:
    quantizer = calibrated(method, 4, signed=True)
    x = inputs(signed=True).to(dtype).requires_grad_()
    value, scale, *_ = quantizer(x)
    value.sum().backward()
    assert value.dtype == x.grad.dtype == dtype  # type: ignore[union-attr]
    assert torch.equal(value, ((value.float() / scale).round() * scale).to(dtype))


# -- calibration ---------------------------------------------------------------------------------


@every_method
@both_signs
def test_evaluating_before_calibration_is_an_error(method: str, signed: bool) -> None:
    quantizer = METHODS[method].activation(4, signed).eval()
    assert not quantizer.calibrated
    with pytest.raises(SpecError, match="before it saw any data: call calibrate"):
        quantizer(inputs(signed))
    quantizer.train()
    quantizer(inputs(signed))
    assert quantizer.calibrated
    quantizer.eval()(inputs(signed))


@every_method
@both_signs
def test_the_first_training_batch_calibrates_and_the_next_do_not(method: str, signed: bool) -> None:
    quantizer = METHODS[method].activation(4, signed)
    first, second = inputs(signed), inputs(signed) * 10
    quantizer(first)
    grid = quantizer.grid()
    quantizer(second)
    assert quantizer.grid() == grid


@every_method
@every_width
@both_signs
def test_calibration_averages_over_batches(method: str, bits: int, signed: bool) -> None:
    batches = [inputs(signed) * factor for factor in (1, 2, 6)]
    alone = [METHODS[method].activation(bits, signed) for _ in batches]
    together = METHODS[method].activation(bits, signed).eval()
    together.observing = True
    for quantizer, batch in zip(alone, batches, strict=True):
        quantizer.observe(batch)
        together(batch)
    together.observing = False
    assert together.batches_observed == 3
    states = [quantizer.state_dict() for quantizer in alone]
    for name, value in together.state_dict().items():
        if value.is_floating_point():
            mean = torch.stack([state[name] for state in states]).mean(dim=0)
            torch.testing.assert_close(value, mean)
    grid = together.grid()
    together(batches[0] * 100)
    assert together.grid() == grid


@every_method
@both_signs
def test_reset_forgets_the_batches_before(method: str, signed: bool) -> None:
    quantizer = calibrated(method, 4, signed)
    quantizer.reset()
    assert not quantizer.calibrated
    with pytest.raises(SpecError, match="before it saw any data"):
        quantizer.eval()(inputs(signed))
    batch = inputs(signed) * 7
    quantizer.observe(batch)
    fresh = METHODS[method].activation(4, signed)
    fresh.observe(batch)
    assert quantizer.grid() == fresh.grid()


@every_method
@every_width
def test_a_limit_bounds_the_range_through_training(method: str, bits: int) -> None:
    quantizer = METHODS[method].activation(bits, signed=False, limit=6.0)
    x = torch.linspace(0, 20, 101).reshape(1, -1)
    quantizer.observe(x)
    rounding = 1 + 1e-6  # of n·(limit/n)
    assert quantizer(x)[0].max() <= 6.0 * rounding
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(5)
    assert quantizer(x)[0].max() <= 6.0 * rounding
    assert quantizer.grid()[0] <= 6.0 * rounding / (2**bits - 1)
    # a range at its limit can still shrink
    for parameter in quantizer.parameters():
        (grad,) = torch.autograd.grad(quantizer(x)[0].sum(), parameter)
        assert grad != 0


# -- second derivatives, compiling -----------------------------------------------------------------


@every_method
@every_width
@both_signs
def test_curvature_passes_through_activations(method: str, bits: int, signed: bool) -> None:
    """L = ½·Σ x̂² has ∂L/∂x = x̂·J and, rounding taken as the identity, Hv = J²·v."""
    quantizer = calibrated(method, bits, signed)
    x = (inputs(signed) * 2).requires_grad_()
    value = quantizer(x)[0]
    (grad,) = torch.autograd.grad(value.square().sum() / 2, x, create_graph=True)
    probe = torch.randn_like(x)
    (product,) = torch.autograd.grad((grad * probe).sum(), x)
    (slope,) = torch.autograd.grad(quantizer(x)[0].sum(), x)
    torch.testing.assert_close(product, slope**2 * probe)
    assert (product != 0).any()


@every_method
@every_width
@both_shapes
def test_curvature_passes_through_weights(method: str, bits: int, per_channel: bool) -> None:
    weight = weights()
    quantizer = METHODS[method].weight(weight, bits, per_channel)
    value = quantizer(weight)[0]
    leaves = [weight, *quantizer.parameters()]
    grads = torch.autograd.grad(value.square().sum() / 2, leaves, create_graph=True)
    seconds = torch.autograd.grad(sum((g * torch.randn_like(g)).sum() for g in grads), leaves)
    for second in seconds:
        assert second.isfinite().all()
        assert (second != 0).any()


class EveryQuantizer(nn.Module):
    """A weight and an activation quantizer of each method, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) * 0.3)
        pairs = [(METHODS[name], index % 2 == 0) for index, name in enumerate(METHODS_BY_NAME)]
        self.weights = nn.ModuleList(m.weight(self.weight, 4, signed) for m, signed in pairs)
        self.activations = nn.ModuleList(m.activation(4, signed) for m, signed in pairs)
        for quantizer in (*self.weights, *self.activations):
            quantizer.delta.fill_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        for weight_q, activation_q in zip(self.weights, self.activations, strict=True):
            x = x + activation_q(x)[0] @ weight_q(self.weight)[0]
        return x


@every_method
@both_signs
def test_a_compiled_graph_repeats_each_method_to_the_last_bit(method: str, signed: bool) -> None:
    weight, x = weights((6, 5)), inputs(signed, (4, 5)).requires_grad_()
    weight_q, activation_q = (
        METHODS[method].weight(weight, 3, signed),
        calibrated(method, 3, signed),
    )
    for quantizer in (weight_q, activation_q):
        quantizer.delta.fill_(0.5)
    leaves = [x, weight, *weight_q.parameters(), *activation_q.parameters()]

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return activation_q(x)[0], weight_q(weight)[0]

    def run(function: Any) -> list[Tensor]:
        outputs = function(x)
        grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
        return [*outputs, *grads]

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for got, wanted in zip(run(compiled), run(function), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_quantizers_compile_to_one_graph(backend: str) -> None:
    model, x = EveryQuantizer(), torch.randn(16, 8)
    model(x)  # calibrates
    wanted = model(x)
    grads = torch.autograd.grad(wanted.square().sum(), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = compiled(x)
    # a sum in another order moves a value; inputs that then cross a tie would show as whole steps
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    compiled_grads = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    for one, other in zip(compiled_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# -- around zero-point 0 of int8 -----------------------------------------------------------------


@every_method
@every_width
@both_signs
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_symmetric_codes_are_int8_around_zero(
    method: str, bits: int, signed: bool, trained: bool
) -> None:
    quantizer = calibrated(method, bits, signed, symmetric=True)
    if trained:
        shake(quantizer)
    value, scale, zero_point, _ = quantizer(inputs(signed) * 3)
    codes = (value / scale).round()
    check_levels(value, scale, codes)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, min(2**bits - 1, 127))
    if bits == 1:
        low, high = 0, 1
    assert (codes.min(), codes.max()) == (low, high)  # three times the range calibrated on
    assert quantizer.grid()[1] == zero_point == -low
    assert not [name for name, _ in quantizer.named_parameters() if name in ("zero_point", "lower")]
    assert quantizer(torch.zeros(1, 1))[0] == 0


@every_method
def test_symmetric_and_affine_grids_of_what_is_not_negative_are_one(method: str) -> None:
    """But at 8 bits, where int8 has half the levels."""
    x = inputs(signed=False)
    for bits in (1, 2, 3, 4, 7):
        affine, symmetric = (METHODS[method].activation(bits, False, symmetric=s) for s in (0, 1))
        torch.testing.assert_close(affine(x)[0], symmetric(x)[0], rtol=1e-6, atol=0)
    assert METHODS[method].activation(8, False, symmetric=True).steps == 127


# -- in Brevitas' layers -------------------------------------------------------------------------


def stock_network(method: str, bits: int, per_channel: bool) -> nn.Sequential:
    weight = weight_quant(method, bits, per_channel)
    return nn.Sequential(
        QuantIdentity(act_quant=act_quant(method, bits, signed=True)),
        QuantConv2d(3, 6, 3, weight_quant=weight),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        QuantConv2d(6, 4, 3, weight_quant=weight, input_quant=act_quant(method, bits)),
        nn.Flatten(),
        QuantLinear(
            16, 5, bias=True, weight_quant=weight, input_quant=act_quant(method, bits, signed=True)
        ),
    )


@every_method
@every_width
@both_shapes
@no_sum_zero_point
def test_a_state_dict_restores_stock_layers_bit_for_bit(
    method: str, bits: int, per_channel: bool
) -> None:
    trained = stock_network(method, bits, per_channel)
    images = torch.randn(8, 3, 6, 6)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        trained(images).square().mean().backward()
        optimizer.step()
    for name, buffer in trained.named_buffers():
        if name.endswith("delta"):
            buffer.fill_(0.01)
    fresh = stock_network(method, bits, per_channel)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(images), trained.eval()(images))
    state = fresh.state_dict()
    assert set(state) == set(trained.state_dict())
    for name, value in trained.state_dict().items():
        assert torch.equal(state[name], value), name
    assert sum(name.endswith("delta") for name in state) == 6
    shake(fresh)
    assert not torch.equal(fresh(images), trained(images))


@every_method
@every_width
@both_shapes
def test_brevitas_reads_the_codes_of_weights(method: str, bits: int, per_channel: bool) -> None:
    for layer in (
        QuantConv2d(4, 6, 3, weight_quant=weight_quant(method, bits, per_channel)),
        QuantLinear(12, 6, bias=False, weight_quant=weight_quant(method, bits, per_channel)),
    ):
        quantised = layer.quant_weight()
        assert isinstance(quantised, IntQuantTensor)
        assert isinstance(layer.weight_quant.tensor_quant, WeightQuantizer)
        codes, scale = layer.weight_quant.tensor_quant.encode(layer.weight)
        assert torch.equal(quantised.int(), codes)
        assert torch.equal(quantised.value, codes * scale)


@every_method
@every_width
@both_signs
def test_brevitas_reads_the_codes_of_activations(method: str, bits: int, signed: bool) -> None:
    injector = act_quant(method, bits, signed)
    layer = QuantIdentity(act_quant=injector, return_quant_tensor=True)
    plain = QuantIdentity(act_quant=injector, return_quant_tensor=False)
    x = inputs(signed)
    quantised, value = layer(x), plain(x)
    assert isinstance(quantised, IntQuantTensor)
    assert not isinstance(value, IntQuantTensor)
    assert torch.equal(quantised.value, value)
    codes = (value / quantised.scale).round() + quantised.zero_point
    assert quantised.int().dtype == torch.uint8
    assert torch.equal(quantised.int().float(), codes)


@every_method
@both_shapes
@both_signs
@no_sum_zero_point
def test_stock_layers_pass_quant_tensors(method: str, per_channel: bool, signed: bool) -> None:
    weight = weight_quant(method, 4, per_channel)
    chain = nn.Sequential(
        QuantIdentity(act_quant=act_quant(method, 4, signed), return_quant_tensor=True),
        QuantConv2d(5, 6, 3, bias=False, weight_quant=weight),
    )
    x = inputs(signed)
    output = chain(x)
    assert not isinstance(output, IntQuantTensor)
    wanted = nn.functional.conv2d(chain[0](x).value, chain[1].quant_weight().value)
    torch.testing.assert_close(output, wanted)


@every_method
@both_shapes
def test_a_stock_layers_output_has_the_scale_of_its_integers(
    method: str, per_channel: bool
) -> None:
    layer = QuantConv2d(
        5,
        6,
        3,
        bias=False,
        weight_quant=weight_quant(method, 3, per_channel),
        input_quant=act_quant(method, 3),
        return_quant_tensor=True,
    )
    x = inputs(signed=False)
    output = layer(x)
    codes, scale = layer.weight_quant.tensor_quant.encode(layer.weight)
    quantised = layer.input_quant(x)
    sums = nn.functional.conv2d(quantised.int().float(), codes.float())
    assert isinstance(output, IntQuantTensor)
    torch.testing.assert_close(output.scale.flatten(), (scale * quantised.scale).flatten())
    torch.testing.assert_close(output.int().float(), sums, rtol=0, atol=0)


# -- wrong settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("injector", [weight_quant, act_quant])
def test_an_unknown_method_lists_those_there_are(injector: Any) -> None:
    there_are = ", ".join(METHODS_BY_NAME)
    with pytest.raises(SpecError, match=f"unknown method 'lsqq'.*'lsq'.*There are: {there_are}"):
        injector("lsqq", 4)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 4.0, "4", True])
def test_bits_outside_one_to_eight_are_refused(bits: Any) -> None:
    wanted = f"bits: wanted an integer from 1 to 8, got {bits!r}"
    for build in (
        lambda: weight_quant("lsq", bits),
        lambda: act_quant("lsq", bits),
        *(lambda m=m: METHODS[m].weight(weights(), bits) for m in METHODS_BY_NAME),
        *(lambda m=m: METHODS[m].activation(bits, signed=False) for m in METHODS_BY_NAME),
    ):
        with pytest.raises(SpecError, match=wanted):
            build()
