from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, SHAPE, Residual, images, network, randomise_norms
from torch import Tensor, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.api import export
from sqakd_deploy.errors import ExportError, ModelError
from sqakd_deploy.lowering.accumulators import check_accumulators
from sqakd_deploy.lowering.folding import bounds_needed, fold, with_bias
from sqakd_deploy.lowering.integer import lower, lower_snapped, snap_biases
from sqakd_deploy.parity import verify
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import QuantSpec, TensorSpec


def calibrated(name: str, spec: QuantSpec | None = None) -> nn.Module:
    student = quantize(network(name), spec, example=SHAPE)
    calibrate(student, images())
    reestimate_batch_norm(student, images())  # so that there are biases to round
    return student


def biases(student: nn.Module) -> dict[str, ir.IntBias]:
    layers = [n for n in lower(student).nodes if isinstance(n, (ir.Conv, ir.Linear))]
    return {n.name: n.bias for n in layers if isinstance(n.bias, ir.IntBias)}


@given(
    factor=st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
def test_folding_is_exact(factor: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (3, 5)).astype(np.int8)
    scale = rng.uniform(0.001, 1.0, 3)
    factors = np.array(factor)
    folded = fold(codes, scale, factors, bits=8, mid_rise=False)
    wanted = codes * (scale * factors)[:, None]
    given_ = folded.codes * folded.scale.astype(np.float64)[:, None]
    # float32 rounds the scale once, half an ulp relative; scales below 1e-30 are raised to it
    np.testing.assert_allclose(given_, wanted, rtol=2**-24, atol=127 * 1.001e-30)
    assert folded.codes.dtype == np.int8
    assert (folded.scale > 0).all()
    np.testing.assert_array_equal(np.abs(folded.codes)[factors != 0], np.abs(codes)[factors != 0])
    assert (folded.codes[factors == 0] == 0).all()


def test_a_bias_is_rounded_to_the_accumulators_scale() -> None:
    weight = ir.IntWeight(np.ones((2, 3), np.int8), np.array([0.5, 0.25], np.float32), 4, False)
    same, bias = with_bias(weight, np.array([1.02, -0.31]), np.float32(0.1))
    assert same is weight
    np.testing.assert_array_equal(bias.codes, [20, -12])
    np.testing.assert_array_equal(bias.scale, np.float32(0.1) * weight.scale)


def test_a_channel_that_is_all_but_off_keeps_its_bias() -> None:
    codes = np.full((2, 4), 7, np.int8)
    weight = ir.IntWeight(codes, np.array([1e-12, 0.1], np.float32), 4, False)
    changed, bias = with_bias(weight, np.array([0.75, 0.75]), np.float32(0.1))
    real = bias.codes * bias.scale.astype(np.float64)
    np.testing.assert_allclose(real, [0.75, 0.75], rtol=0, atol=0.5 * bias.scale.max())
    assert abs(int(bias.codes[0])) <= 2**30
    np.testing.assert_array_equal(changed.codes[1], codes[1])
    assert changed.scale[1] == weight.scale[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_snapped_biases_stay_where_they_are(name: str) -> None:
    student = calibrated(name)
    with torch.no_grad():
        before = {name: value.clone() for name, value in student.named_parameters()}
        snap_biases(student)
        after = dict(student.named_parameters())
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        snapped = student(images())
        first = biases(student)
        snap_biases(student)
        assert torch.equal(student(images()), snapped)
    again = biases(student)
    for layer, bias in first.items():
        np.testing.assert_array_equal(bias.codes, again[layer].codes)
    assert first.keys() == again.keys()
    assert moved
    assert all(path.endswith("bias") for path in moved)


class Named(nn.Module):
    """Layers with the names that values of others could be given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.fc, self.fc_rows, self.fc_shaped = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.norm_image = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.up, self.up_pixels0 = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up_pixels0(F.relu(self.up(self.conv(x)))))
        x = F.relu(self.fc(x.flatten(2).transpose(1, 2)))
        x = F.relu(self.fc_shaped(F.relu(self.fc_rows(x)))).mean(1)
        return self.norm_image(F.relu(self.norm(x)))


def test_names_of_layers_are_free(tmp_path: Path) -> None:
    student = quantize(randomise_norms(Named()).eval(), example=SHAPE)
    calibrate(student, images(32))
    artifact = export(student, tmp_path / "m.onnx")
    report = verify(artifact, student, images(8))
    assert report.failures == []
    assert report.exact[-1] == "onnxruntime, optimisations on"


@pytest.mark.parametrize(("inputs", "fits"), [(67_000, True), (76_800, False)])
def test_a_sum_beyond_int32_is_refused(inputs: int, fits: bool, tmp_path: Path) -> None:
    """Runtimes would wrap round, on images that no proof need have."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 4))
    nn.init.uniform_(model[1].weight, 0.9, 1.0)
    sample = torch.rand(4, inputs // 100, 10, 10) + 1
    student = quantize(model.eval(), example=sample[:1])
    calibrate(student, sample)
    if fits:
        export(student, tmp_path / "m.onnx")
        return
    with pytest.raises(ExportError, match=r"layer '1' can sum up to \d+, .*--layer-bits 1=7"):
        export(student, tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())
    graph = lower(student)
    check_accumulators(graph, None)
    with pytest.raises(ExportError, match=r"sums in int24, up to 8388607: no width"):
        check_accumulators(graph, 24)


def test_every_value_is_written_once_before_it_is_read() -> None:
    for name in NETWORKS:
        graph = lower(calibrated(name))
        written = {graph.input}
        for node in graph.nodes:
            assert set(node.inputs) <= written
            assert node.output not in written
            written.add(node.output)
        assert graph.output in written
        assert written == set(graph.values)
        names = [node.name for node in graph.nodes]
        assert len(set(names)) == len(names)


def test_a_vector_batchnorm_is_quantised_before_it_is_reshaped() -> None:
    """Between a convolution and its quantizer a reshape would keep ORT from fusing them."""
    graph = lower(calibrated("residual"))
    readers = {node.inputs[0]: node for node in graph.nodes}
    (depthwise,) = [n for n in graph.nodes if isinstance(n, ir.Conv) and n.name == "norm"]
    assert depthwise.groups == 16
    assert isinstance(readers[depthwise.output], ir.Quantize)


def test_mid_rise_codes_are_odd() -> None:
    spec = QuantSpec(
        weights=TensorSpec(method="ewgs", bits=3), activations=TensorSpec(method="ewgs", bits=3)
    )
    graph = lower(calibrated("residual", spec))
    (conv,) = [n for n in graph.nodes if n.name == "conv2"]
    assert isinstance(conv, ir.Conv)
    assert isinstance(conv.weight, ir.IntWeight)
    assert conv.weight.mid_rise
    live = conv.weight.codes[1:]  # channel 0 is switched off by its BatchNorm
    assert set(np.unique(live)) <= {-7, -5, -3, -1, 1, 3, 5, 7}
    assert (conv.weight.codes[0] == 0).all()


def test_relu6_is_dropped_where_the_range_ends_below_it() -> None:
    graph = lower(calibrated("mixed"))
    (clip,) = [n for n in graph.nodes if n.name == "stem.1"]
    assert isinstance(clip, ir.Clip)
    assert clip.high is None


@pytest.mark.parametrize(
    ("bounds", "wanted"),
    [
        ((0.0, 6.0), (0.0, 6.0)),  # 6 is code 60 of 63
        ((0.0, 6.24), (0.0, 6.24)),
        ((0.0, 6.26), (0.0, None)),  # rounds to code 63, as all above it
        ((-0.1, 7.0), None),
        ((0.0, None), (0.0, None)),
    ],
)
def test_bounds_that_round_to_the_last_code_are_redundant(
    bounds: tuple[float, float | None], wanted: tuple[float, float | None] | None
) -> None:
    grid = (np.float32(0.1), 0, 63)
    assert bounds_needed(*bounds, [grid]) == wanted
    if wanted is not None:
        assert bounds_needed(*bounds, [grid, (np.float32(0.2), 0, 63)]) == bounds


def test_paper_placement_leaves_residuals_in_float() -> None:
    graph = lower(calibrated("residual", QuantSpec(placement="paper")))
    (add,) = [n for n in graph.nodes if isinstance(n, ir.Add)]
    assert all(graph.values[name].grid is None for name in (*add.inputs, add.output))
    assert any(isinstance(n, ir.ChannelAffine) for n in graph.nodes)
    (stem,) = [n for n in graph.nodes if n.name == "stem"]
    assert isinstance(stem, ir.Conv)
    assert isinstance(stem.weight, np.ndarray)


def test_what_is_no_student_is_refused() -> None:
    with pytest.raises(ModelError, match=r"wanted a student made by quantize\(\), got a Residual"):
        lower(Residual())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_has_its_integers_biases_once_they_are_snapped(name: str) -> None:
    student = calibrated(name)
    assert lower_snapped(student) is None
    snap_biases(student)
    graph = lower_snapped(student)
    assert graph is not None
    assert [type(node) for node in graph.nodes] == [type(node) for node in lower(student).nodes]


def test_an_uncalibrated_student_is_refused() -> None:
    student = quantize(network("residual"), example=SHAPE)
    with pytest.raises(ExportError, match="quantizer 'quant_x' was never calibrated"):
        lower(student)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100))
def test_the_student_is_left_as_it_was(seed: int) -> None:
    student = calibrated("residual")
    state = {k: v.clone() for k, v in student.state_dict().items()}
    lower(student)
    for key, value in student.state_dict().items():
        assert torch.equal(value, state[key])
