"""Weight files of this package and of others."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.models import load_any_weights, load_weights


def _net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, classes))


@pytest.fixture
def source() -> nn.Module:
    model = _net()
    model(torch.randn(4, 1, 1, 1))  # gives BatchNorm statistics of its own
    return model


def _assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, one), other in zip(
        left.state_dict().items(), right.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def _prefixed(prefix: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "best": 0.9},
        lambda state: {"net": state, "acc": 91.3, "epoch": 199},
        lambda state: {"model": "resnet20", "state_dict": state},
        _prefixed("module."),
        _prefixed("_orig_mod."),
        _prefixed("module._orig_mod."),
        _prefixed("_orig_mod.module."),
        lambda state: {"net": _prefixed("module.")(state)},
        lambda state: {"ema": {"module": state}},
        lambda state: {"model_ema": state, "epoch": 3},
        lambda state: {"state_dict": _prefixed("model.")(state), "hyper_parameters": {"lr": 0.1}},
        _prefixed("net."),
        lambda state: {**_prefixed("module.")(state), "n_averaged": torch.tensor(5)},
        _prefixed("model._orig_mod.module."),
        lambda state: {key.replace("0.", "0.module."): value for key, value in state.items()},
        # torchvision's own training script, and scripts that keep their best figure as numpy's
        lambda state: {"model": state, "args": Namespace(lr=0.1, name="a"), "epoch": 3},
        lambda state: {"state_dict": state, "best": np.float64(91.3), "step": np.int64(4)},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_shapes_met_in_the_wild(
    tmp_path: Path, source: nn.Module, wrap: Callable[[dict[str, Tensor]], object], suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(source.state_dict()), path)
    model = _net()

    load_weights(model, path)

    _assert_same(model, source)


@pytest.mark.parametrize(
    ("keys", "taken", "others"),
    [
        (("model_ema", "model"), "model", ["model_ema"]),
        (("model", "best", "state_dict"), "state_dict", ["model", "best"]),
        (("state_dict",), "state_dict", []),
    ],
)
def test_of_several_sets_it_is_said_which_was_taken(
    keys: tuple[str, ...], taken: str, others: list[str], tmp_path: Path, source: nn.Module
) -> None:
    path, said = tmp_path / "w.pth", list[str]()
    few = {"class_weights": {"w": torch.ones(2)}, "optimizer": {"state": {}, "lr": 0.1}}
    sets = {key: {k: v + i for k, v in source.state_dict().items()} for i, key in enumerate(keys)}
    torch.save(few | sets, path)
    model = _net()
    load_any_weights(model, "any", str(path), message=said.append)
    assert torch.equal(model[3].weight, sets[taken]["3.weight"])  # type: ignore[index]
    names = ", ".join(map(repr, others))
    assert said == [
        f"{path} holds several sets of weights: {taken!r} is taken, not {names}; "
        "save another alone to take that"
    ] * bool(others)


def test_sets_deeper_down_are_named_by_where_they_lie(tmp_path: Path, source: nn.Module) -> None:
    path, said = tmp_path / "w.pth", list[str]()
    state = source.state_dict()
    torch.save({"ema": {"module": state}, "raw": {"module": dict(state)}}, path)
    load_any_weights(_net(), "any", str(path), message=said.append)
    assert "'ema.module' is taken, not 'raw.module';" in said[0]


def test_safetensors(tmp_path: Path, source: nn.Module) -> None:
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = _net()
    load_weights(model, tmp_path / "weights.safetensors")
    _assert_same(model, source)


def test_files_of_old_torch(tmp_path: Path, source: nn.Module) -> None:
    # An older container, and no batch counter in BatchNorm.
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = _net()
    load_weights(model, tmp_path / "old.pth")
    assert torch.equal(model[1].running_mean, source[1].running_mean)  # type: ignore[index]


def test_half_precision_becomes_the_model_s_precision(tmp_path: Path, source: nn.Module) -> None:
    torch.save(source.half().state_dict(), tmp_path / "half.pt")
    model = _net()
    load_weights(model, tmp_path / "half.pt")
    assert model[3].weight.dtype == torch.float32  # type: ignore[index]
    _assert_same(model, source.float())


def test_a_prefix_of_the_model_s_own_stays(tmp_path: Path) -> None:
    source = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "own.pt")
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    load_weights(model, tmp_path / "own.pt")
    _assert_same(model, source)


def test_weights_of_another_model_list_the_keys_and_change_nothing(tmp_path: Path) -> None:
    model = _net(classes=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = _net(classes=3).state_dict()
    del state["0.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    path = tmp_path / "other.pt"
    torch.save(state, path)

    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path)

    assert str(caught.value) == (
        f"{path} does not fit Sequential: 1 missing (0.bias); "
        "7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4, and 2 more); "
        "2 of another shape (3.weight (3, 2) for (4, 2), 3.bias (3,) for (4,)). "
        "Is it of another model, or of another number of classes or channels (--channels)?"
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_and_empty_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(CheckpointError, match=r"^weight file .* does not exist$"):
        load_weights(_net(), path)
    path.touch()
    with pytest.raises(CheckpointError, match=r"^weight file .* is empty$"):
        load_weights(_net(), path)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 0.99])
def test_truncated_torch_files(
    tmp_path: Path, source: nn.Module, keep: float, new_format: bool
) -> None:
    path = tmp_path / "cut.pt"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"^.*cut\.pt "):
        load_weights(_net(), path)


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_truncated_safetensors(tmp_path: Path, source: nn.Module, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"is not a whole safetensors file \(.*\); copy or d"):
        load_weights(_net(), path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"version https://git-lfs", b"\0" * 99])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_weights(_net(), path)
    assert str(caught.value).startswith(f"{path} is truncated, damaged or no PyTorch weight file (")
    assert str(caught.value).endswith("); copy or download it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"path": Fraction(1, 2), "model": {}}, "fractions.Fraction"),
    ],
)
def test_python_objects_are_refused_by_name(tmp_path: Path, value: object, named: str) -> None:
    path = tmp_path / "objects.pt"
    torch.save(value, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(_net(), path)
    assert str(caught.value) == (
        f"{path} holds a Python object ({named}) beside tensors, and those are never loaded, "
        "since they can run code. Where the file was made, save the weights alone: "
        "torch.save(model.state_dict(), path)"
    )


class _Attack:
    """Creates a file when unpickled with code execution on."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_file_never_runs(tmp_path: Path) -> None:
    torch.save({"state_dict": _Attack(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"holds a Python object \(\w+\.mkdir\)"):
        load_weights(_net(), tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "found"),
    [({"epoch": 1, "loss": 0.5}, "epoch, loss"), ([1, 2], "list"), ({}, "")],
)
def test_files_without_a_state_dict(tmp_path: Path, value: object, found: str) -> None:
    path = tmp_path / "log.pt"
    torch.save(value, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(_net(), path)
    assert str(caught.value) == (
        f"{path} holds no state dict: wanted tensors by name, or such a mapping under "
        "state_dict, model_state_dict, model, net, network, module, weights, ema, model_ema, "
        f"ema_state_dict, state_dict_ema; found {found or 'nothing'}"
    )


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"wanted a file, got a folder$"):
        load_weights(_net(), tmp_path)
    (tmp_path / "teacher.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"it is a run: name its .*teacher\.safetensors$"):
        load_weights(_net(), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    value: float, source: nn.Module, tmp_path: Path
) -> None:
    state = source.state_dict()
    state["3.weight"][0, 1] = value
    save_file(state, tmp_path / "w.safetensors")
    model = _net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"weights hold .* not finite: 3\.weight$"):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_mask_that_the_model_builds_with_infinities_is_no_fault(tmp_path: Path) -> None:
    model = _net()
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
