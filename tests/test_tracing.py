import copy
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import SHAPE, Residual
from torch import Tensor, nn
from torchvision.transforms import Normalize

from sqakd_deploy.errors import ModelError
from sqakd_deploy.tracing.shapes import is_size
from sqakd_deploy.tracing.trace import describe, known, shape, trace


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if y.sum() > 0:
            return y
        return -y


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_model_that_branches_on_values_is_located() -> None:
    with pytest.raises(ModelError, match=r"cannot trace Branching: .*test_tracing\.py:\d+: if y"):
        trace(Branching(), SHAPE)


class Asking(nn.Module):
    """Code that is given an image and asks whether it is one."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.code, self.layer = code, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.code(x).mean((1, 2)))


def only_tensors(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"wanted a tensor, got {type(x)}")
    return x


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            Normalize((0.4, 0.5, 0.6), (0.2, 0.2, 0.3)),
            r"Got a stand-in for a tensor \(at test_tracing\.py:\d+: return self\.layer.*\)\. "
            r"torchvision's transforms cannot be traced: .* write \(x - mean\) / std there",
        ),
        (
            only_tensors,
            r"wanted a tensor, got a stand-in for a tensor \(at .*leave out what asks for the type",
        ),
    ],
    ids=["torchvision", "own"],
)
def test_code_that_asks_for_tensors_is_told_what_to_write(
    code: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        trace(Asking(code), SHAPE)


def test_a_wrong_input_shape_is_named() -> None:
    with pytest.raises(ModelError, match=r"does not run on images of shape \(1, 8, 8\)"):
        trace(Residual(), (1, 8, 8))


class Square(nn.Module):
    """As models do whose positions are made for one size."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 9
        return x.mean((2, 3))


def test_code_that_refuses_an_image_says_so() -> None:
    place = r"test_tracing\.py:\d+: assert x\.shape\[2\] == 9"
    with pytest.raises(ModelError, match=rf"does not run on images of shape .* \(at {place}\)"):
        trace(Square(), SHAPE)


def test_two_inputs_are_refused() -> None:
    with pytest.raises(
        ModelError, match="wanted a model of one image tensor, got the inputs: x, y"
    ):
        trace(TwoInputs(), SHAPE)


def test_in_place_operators_are_gone() -> None:
    traced = trace(Residual(), SHAPE)
    targets = [node.target for node in traced.graph.nodes]
    assert operator.iadd not in targets
    assert operator.add in targets
    relu = traced.get_submodule("relu")
    assert not relu.inplace  # type: ignore[union-attr]


def test_shapes_have_a_dynamic_batch() -> None:
    traced = trace(Residual(), SHAPE)
    shapes = {node.name: shape(node) for node in traced.graph.nodes if node.op == "call_module"}
    assert shapes["conv1"] == (None, 16, 4, 4)
    assert shapes["norm"] == (None, 16)


def test_a_node_is_described_with_its_line() -> None:
    traced = trace(Residual(), SHAPE)
    (pad,) = [node for node in traced.graph.nodes if node.name == "pad"]
    assert describe(pad).startswith("operator 'pad' (node 'pad') at networks.py:")
    (conv,) = [node for node in traced.graph.nodes if node.name == "conv1"]
    assert describe(conv).startswith("layer 'conv1' (Conv2d) at networks.py:")


def test_the_traced_model_answers_as_the_model() -> None:
    model = Residual().eval()
    x = torch.randn(4, *SHAPE)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(trace(model, SHAPE)(x), expected)


class Through(nn.Module):
    """Whatever ``call`` does to a tensor."""

    def __init__(self, call: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(self.conv(x))


def test_a_view_changed_in_place_is_refused() -> None:
    def changed(x: Tensor) -> Tensor:
        x[:, :2].relu_()  # changes x, through a tensor that nothing reads later
        return x

    with pytest.raises(ModelError, match="does not answer as the model does"):
        trace(Through(changed), SHAPE)


def test_dropout_that_never_ends_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"operator 'dropout' .* at test_tracing\.py:\d+ .*training=self\.training"
    ):
        trace(Through(lambda x: F.dropout(x, 0.5)), SHAPE)


def test_random_numbers_are_refused() -> None:
    with pytest.raises(ModelError, match="or draw random numbers when evaluated"):
        trace(Through(lambda x: x + torch.rand(2, 4, 6, 6)), SHAPE)


def test_several_results_are_refused() -> None:
    with pytest.raises(ModelError, match="returns one tensor of logits, got a tuple; wrap it"):
        trace(Through(lambda x: (x, x)), SHAPE)


def test_sizes_are_known_and_the_batch_stays_open() -> None:
    traced = trace(
        Through(lambda x: F.avg_pool2d(x, x.size()[2:]).view(x.size(0), x.shape[1])), SHAPE
    )
    named = {node.name: node for node in traced.graph.nodes}
    assert named["avg_pool2d"].args[1] == (6, 6)
    batch, channels = named["view"].args[1:]
    assert isinstance(batch, torch.fx.Node)
    assert channels == 4
    with pytest.raises(ModelError, match="computes with the number of images"):
        known(batch)
    assert is_size(batch)
    assert not is_size(named["view"])


class Normed(nn.Module):
    """By a layer, and by its function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=self.training)
        return F.avg_pool2d(x, x.size()[2:]).flatten(1)


def test_sizes_are_known_behind_a_norm() -> None:
    (pool,) = trace(Normed(), SHAPE).graph.find_nodes(op="call_function", target=F.avg_pool2d)
    assert pool.args[1] == (6, 6)


def test_a_model_of_spoilt_weights_is_refused() -> None:
    model = Through(torch.relu)
    with torch.no_grad():
        model.conv.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weights hold values .* not finite: conv\.weight"):
        trace(model, SHAPE)


def test_an_answer_that_is_not_finite_for_noise_is_no_fault() -> None:
    trace(Through(torch.sqrt), SHAPE)


class Remembers(nn.Module):
    """Makes a table for the size that it is called with, and keeps it (as timm's ConViT does)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.table.shape[-1] != x.shape[-1]:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)[None] / 10
        return (x + self.table).mean([2, 3])


def test_a_table_kept_from_the_first_call_is_a_constant() -> None:
    torch.manual_seed(0)
    model = Remembers().eval()
    traced = trace(copy.deepcopy(model), (3, 8, 8))
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(traced(images), model(images))
