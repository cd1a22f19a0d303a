from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from networks import SHAPE, Mixed, PreActivation, Residual, images
from torch import Tensor, nn

from sqakd_deploy.errors import ModelError, SpecError
from sqakd_deploy.exporting import PlacementRules
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.placement import Placement, place
from sqakd_deploy.quantization import _made_where_it_is, calibrate, quantize
from sqakd_deploy.retargeting import changes
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.tracing.trace import trace

W4A2 = QuantSpec(weights=TensorSpec(bits=4), activations=TensorSpec(bits=2))


def planned(model: nn.Module, spec: QuantSpec = W4A2) -> Placement:
    return place(trace(model, SHAPE), spec)


def by_node(placement: Placement) -> dict[tuple[str, int], tuple[bool, float | None]]:
    return {(p.after.name, p.bits): (p.signed, p.limit) for p in placement.activations}


def test_a_residual_network_for_onnxruntime() -> None:
    plan = planned(Residual())
    assert plan.layers == {"stem": 8, "conv1": 4, "conv2": 4, "classifier": 8}
    assert by_node(plan) == {
        ("x", 8): (True, None),
        ("relu", 8): (False, None),  # the residual stream, read by the shortcut
        ("relu", 2): (False, None),  # what conv1 reads of it
        ("relu_1", 2): (False, None),  # only conv2 reads it: no 8-bit copy
        ("norm2", 8): (True, None),  # input of the add
        ("relu_2", 8): (False, None),  # output of the add, behind its ReLU
        ("adaptive_avg_pool2d", 8): (False, None),
        ("norm", 8): (True, None),
        ("classifier", 8): (True, None),
    }


def test_requantisation_reaches_only_the_layers_that_need_it() -> None:
    plan = planned(Residual())
    readers = {(p.after.name, p.bits): p.readers for p in plan.activations}
    assert readers["relu", 8] is None
    assert [node.name for node in readers["relu", 2] or ()] == ["conv1"]


def test_paper_placement_quantises_inner_layers_only() -> None:
    plan = planned(Residual(), W4A2.model_copy(update={"placement": "paper"}))
    assert plan.layers == {"conv1": 4, "conv2": 4}
    assert by_node(plan) == {("relu", 2): (False, None), ("relu_1", 2): (False, None)}


def test_data_movement_is_seen_through() -> None:
    found = by_node(planned(Mixed()))
    assert found["stem_1", 2] == (False, 6.0)  # both convolutions read it behind the max pool
    assert ("pool", 2) not in found
    assert found["cat", 8] == (True, None)  # a second concat reads it, cut and shuffled
    assert found["cat_1", 2] == (True, None)
    assert found["relu", 8] == (False, None)
    assert found["average", 8] == (False, None)


class Joins(nn.Module):
    """A concatenation of two convolutions, whose second a sum reads, too, or an activation ends."""

    def __init__(self, shared: bool = False, left: bool = False, right: bool = False) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(c, 4, 1) for c in (3, 4, 4))
        self.active = left, right
        self.last = nn.Conv2d(8, 4, 1)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        left, right = self.left(stem), self.right(stem)
        left, right = (
            y.relu() if a else y for y, a in zip((left, right), self.active, strict=True)
        )
        y = self.last(torch.cat([left, right], 1))
        return y + right if self.shared else y


@pytest.mark.parametrize(
    ("options", "apart"),
    [({}, False), ({"left": True, "right": True}, False), ({"shared": True}, True),
     ({"right": True}, True)],
)  # fmt: skip
def test_what_a_concatenation_alone_reads_is_rounded_once(
    options: dict[str, bool], apart: bool
) -> None:
    """Parts have grids of their own where one has another reader, or one a ReLU and one not."""
    names = {name for name, _ in by_node(planned(Joins(**options)))}
    assert "cat" in names
    parts = {name for name in names if name.startswith(("left", "right", "relu"))}
    assert len(parts) == (2 if apart else 0)


def test_a_lone_batchnorm_reads_and_writes_integers() -> None:
    found = by_node(planned(PreActivation()))
    assert found["stem", 8] == (True, None)
    assert found["relu", 2] == (False, None)
    assert found["add", 8] == (True, None)
    assert found["relu_1", 8] == (False, None)


def test_the_last_layer_is_found_behind_a_pool() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert planned(model).layers == {"0": 8, "2": 4, "4": 8}


def test_float_logits_get_no_quantizer() -> None:
    spec = W4A2.model_copy(update={"output_bits": None})
    assert ("classifier", 8) not in by_node(planned(Residual(), spec))


def test_an_excluded_layer_stays_in_float() -> None:
    spec = W4A2.model_copy(update={"exclude": ("conv?",)})
    plan = planned(Residual(), spec)
    assert plan.layers == {"stem": 8, "classifier": 8}
    assert ("relu", 2) not in by_node(plan)


def test_an_exclusion_that_matches_nothing_is_an_error() -> None:
    spec = W4A2.model_copy(update={"exclude": ("conv9",)})
    with pytest.raises(SpecError, match=r"exclude: 'conv9' matches no layer\. There are: stem, "):
        planned(Residual(), spec)


def test_single_layers_have_bits_of_their_own() -> None:
    """An end too; the last pattern that matches counts; an edge holds the most that is read."""
    bits = {"conv?": "8", "conv2": "w3a5", "stem": "6"}
    plan = planned(Residual(), W4A2.model_copy(update={"layer_bits": bits}))
    assert plan.layers == {"stem": 6, "conv1": 8, "conv2": 3, "classifier": 8}
    found = by_node(plan)
    assert {key for key in found if key[0] in ("x", "relu", "relu_1")} == {
        ("x", 6),
        ("relu", 8),  # conv1 reads what the shortcut does
        ("relu_1", 5),
    }


def test_a_pattern_of_bits_that_reaches_no_quantised_layer_is_an_error() -> None:
    for spec in (
        W4A2.model_copy(update={"layer_bits": {"relu": "8"}}),
        W4A2.model_copy(update={"layer_bits": {"conv1": "8"}, "exclude": ("conv1",)}),
        W4A2.model_copy(update={"layer_bits": {"stem": "8"}, "placement": "paper"}),
    ):
        with pytest.raises(SpecError, match=r"matches no quantised convolution or linear"):
            planned(Residual(), spec)


def test_weights_of_the_ends_are_no_wider_than_the_target_takes() -> None:
    spec = W4A2.model_copy(update={"layer_bits": {"*": "8"}})
    plan = place(trace(Residual(), SHAPE), spec, PlacementRules(widest_ends=7))
    assert plan.layers == {"stem": 7, "conv1": 8, "conv2": 8, "classifier": 7}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(3, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.norm(x), 1)


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x**3).mean([2, 3])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Normed(), r"layer 'norm' \(InstanceNorm2d\) .*--exclude 'norm'"),
        (Squared(), r"operator 'pow' \(node 'pow_1'\) at test_placement\.py:\d+ cannot be"),
    ],
)
def test_what_has_no_integer_form_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        planned(model)


class Call(nn.Module):
    def __init__(self, call: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.call(self.conv(x))  # type: ignore[operator]
        return torch.flatten(result, 1)


INDICES = "return_indices=True has no form here; leave it out"


@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AdaptiveMaxPool2d])
def test_pools_that_say_where_are_refused(pool: type[nn.Module]) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), pool(2, return_indices=True)

        def forward(self, x: Tensor) -> Tensor:
            return torch.flatten(self.pool(self.conv(x))[0], 1)

    with pytest.raises(ModelError, match=rf"layer 'pool' \({pool.__name__}\) .*: {INDICES}"):
        planned(Indexed())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.add(x, x, alpha=2), "only the sum of two tensors"),
        (lambda x: x.mean().reshape(1, 1), "only a mean over axes of an image"),
        (lambda x: nn.functional.pad(x, (-1, 1)), "padding by a negative amount"),
        (lambda x: x[:, [0, 2], [1, 3]], "only slices"),
        (lambda x: x[[0, 1]], "a list of numbers along one axis of an image|as its first axis"),
        (lambda x: x.chunk(4, 1)[::2][0], "take the tensors of a tuple one by one"),
        (lambda x: x.clamp(min=x.mean((2, 3), keepdim=True)), "wanted numbers as bounds"),
        (lambda x: x.norm(p=1, dim=1, keepdim=True) + x, r"wanted the Euclidean norm \(p=2\)"),
        (lambda x: x[:, :1] / x[:, :, :1], "the quotient of shapes"),
        (lambda x: x + torch.arange(x.shape[0]).reshape(-1, 1, 1, 1), "cannot|no integer form"),
        (lambda x: nn.functional.interpolate(x, scale_factor=2.0, mode="bicubic"), "'interpolate'"),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 3), "windows of different sizes"),
        (lambda x: x.flatten(1).reshape(4, -1, 8).flatten(1), "the batch as its first axis"),
        (lambda x: (x > 0).sum(1), "operator 'gt'"),
        (lambda x: torch.sum(input=x, dim=0), "batch as its first axis|no integer form|cannot"),
        (lambda x: x[None, :].flatten(0, 1), "only slices"),
        (lambda x: x.permute(1, 0, 2, 3), "moves the batch axis|batch as its first axis"),
        (lambda x: nn.functional.max_pool2d(x, 2, return_indices=True)[0], INDICES),
        (lambda x: nn.functional.adaptive_max_pool2d(x, 2, return_indices=True)[0], INDICES),
        (
            lambda x: x.exp(),
            r"by operators that have one\. Excluded \(--exclude 'exp'\), .* no file can be written",
        ),
    ],
)
def test_forms_without_an_operator_are_refused(call: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        planned(Call(call))


class BatchNormed(nn.Module):
    def __init__(self, norm: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, nn.BatchNorm1d):
            x = x.mean([2, 3])
        return torch.flatten(self.norm(x), 1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_norm_without_statistics_is_refused_before_training(
    norm: type[nn.BatchNorm1d] | type[nn.BatchNorm2d],
) -> None:
    wanted = rf"layer 'norm' \({norm.__name__}\) .*statistics.*with track_running_stats=True"
    with pytest.raises(ModelError, match=wanted):
        quantize(BatchNormed(norm), example=SHAPE)


def test_ends_have_no_more_bits_than_the_target_takes() -> None:
    """Their weights, that is: inputs have the bits that were asked for."""
    rules = PlacementRules(widest_ends=7)
    for method, asked, wanted in (
        ("lsq", 8, 7), ("lsq", 7, 7), ("lsq", 4, 4), ("ewgs", 8, 6), ("ewgs", 7, 6), ("ewgs", 6, 6)
    ):  # fmt: skip
        weights = TensorSpec(method=method, bits=4)
        spec = W4A2.model_copy(update={"first_last_bits": asked, "weights": weights})
        plan = place(trace(Residual(), SHAPE), spec, rules)
        assert plan.layers == {"stem": wanted, "conv1": 4, "conv2": 4, "classifier": wanted}
        assert ("x", asked) in by_node(plan)


FOR_OPENVINO = PlacementRules(widest_ends=7)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, True),
        ({"first_last_bits": 7}, False),
        ({"first_last_bits": 7, "weights": TensorSpec(method="ewgs")}, True),
        ({"first_last_bits": 6, "weights": TensorSpec(method="ewgs")}, False),
        ({"weights": TensorSpec(bits=8), "exclude": ("stem", "classifier")}, False),
        ({"weights": TensorSpec(bits=8), "placement": "paper"}, False),
    ],
)
def test_another_target_may_take_narrower_ends(settings: dict[str, object], said: bool) -> None:
    student = quantize(Residual().eval(), QuantSpec.parse(settings), example=SHAPE)
    calibrate(student, images(16))
    found = changes(lower(student), PlacementRules(), FOR_OPENVINO)
    assert found == ["the first and last layers' weights would have 7 bits at most"] * said
    assert changes(lower(student), FOR_OPENVINO, FOR_OPENVINO) == []


def test_quantizers_are_made_where_the_model_is() -> None:
    """Whatever device a script made the default; and under no context where it is the same one."""
    model, elsewhere = nn.Linear(1, 1), torch.device("meta")
    assert isinstance(_made_where_it_is(model), nullcontext)
    with elsewhere, _made_where_it_is(model):
        assert torch.zeros(1).is_cpu
