"""Models by name, from torchvision and from a person's own code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sqakd_deploy.errors import ModelError
from sqakd_deploy.models import CifarVGG, build_model, list_models

CODE = """
import torch
from dataclasses import dataclass
from torch import nn

import helper

@dataclass
class Config:
    width: int = 4

def plain(num_classes, in_channels, hidden=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 4, hidden),
                         nn.Linear(hidden, num_classes))

def fixed():
    return nn.Conv2d(3, helper.WIDTH, 1)

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(Config().width, num_classes)

def broken():
    raise RuntimeError("out of luck")

def nothing():
    return None

constant = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 6\n")
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path / "net.py"


@pytest.fixture(autouse=True)
def _forget_helpers() -> None:
    sys.modules.pop("helper", None)


def test_an_unknown_name_lists_ours_and_the_nearest_of_torchvision() -> None:
    with pytest.raises(ModelError) as caught:
        build_model("resnet_20", num_classes=10)
    message = str(caught.value)
    assert message.startswith("unknown model 'resnet_20'. Did you mean 'resnet20'? There are: ")
    assert "resnet20, resnet32, vgg11_tiny, vgg13, vgg8, " in message
    assert message.endswith(
        " Any torchvision classifier, timm:NAME, FILE.py:FACTORY and PACKAGE.MODULE:FACTORY "
        "are models too."
    )


def test_the_list_begins_with_ours_and_every_name_is_there_once() -> None:
    names = list_models()
    assert names[:5] == ["resnet20", "resnet32", "vgg11_tiny", "vgg13", "vgg8"]
    papers = {"resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_0"}
    assert {*papers, "vgg11", "torchvision:vgg13"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("fcn_resnet50", "resnet50"),
        ("torchvision:quantized_resnet18", "resnet18"),
        ("raft_large", "see sqakd-deploy list models"),
        ("maskrcnn_resnet50_fpn", "resnet50"),
        ("mc3_18", "see sqakd-deploy list models"),
    ],
)
def test_torchvision_s_other_models_are_refused(name: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(name, num_classes=10)
    begin = (
        f"model {name!r} of torchvision is no float classifier of images, and only those can be "
        "distilled here. Classifiers of near names: "
    )
    assert str(caught.value).startswith(begin)
    assert near in str(caught.value).removeprefix(begin)


def test_a_torchvision_classifier_has_our_classes() -> None:
    model = build_model("squeezenet1_1", num_classes=5)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_ours_come_before_torchvision_s_of_the_same_name() -> None:
    assert isinstance(build_model("vgg13", num_classes=10), CifarVGG)


def test_torchvision_s_networks_of_our_names_have_a_prefix() -> None:
    with torch.device("meta"):  # its 130 million weights are not needed here
        model = build_model("torchvision:vgg13", num_classes=10)
    assert type(model).__module__ == "torchvision.models.vgg"


def test_inception_returns_logits_in_training_too() -> None:
    model = build_model("googlenet", num_classes=3)
    assert isinstance(model.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)


def test_torchvision_s_networks_read_colour() -> None:
    with pytest.raises(ModelError) as caught:
        build_model("resnet18", num_classes=10, in_channels=1)
    assert str(caught.value) == (
        "model 'resnet18' reads images of 3 channels, but the data has 1: read the data with "
        "--channels 3, or take one of the models that adapt, such as resnet20"
    )


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_arguments_that_a_model_does_not_take(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^cannot build model '{name}' with .*depth=3.*'depth'"):
        build_model(name, num_classes=10, args={"depth": 3})


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_asked_for_by_name() -> None:
    with pytest.raises(ModelError) as caught:
        build_model("timm:resnet18", num_classes=10)
    assert str(caught.value) == (
        "model 'timm:resnet18' needs timm, which is not installed: pip install timm"
    )


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet10", ": .*resnet10t"),
        ("vit", ": vit_"),
        ("resnt18", ": .*resnet18"),
        ("xyzzy", r": none; timm"),
    ],
)
def test_names_near_to_one_that_timm_does_not_have(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=f"^unknown timm model '{name}'. There are.*{words}"):
        build_model(f"timm:{name}", num_classes=2)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_models_take_classes_and_channels() -> None:
    model = build_model("timm:resnet10t", num_classes=4, in_channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)


def test_a_factory_in_a_file_is_given_what_it_names(code: Path) -> None:
    model = build_model(f"{code}:plain", num_classes=5, in_channels=2, args={"hidden": 7})

    assert model(torch.randn(3, 2, 2, 2)).shape == (3, 5)
    assert model[1].out_features == 7  # type: ignore[index]


def test_a_file_may_use_its_neighbours(code: Path) -> None:
    path = list(sys.path)
    model = build_model(f"{code}:fixed", num_classes=5)
    assert isinstance(model, nn.Conv2d)
    assert model.out_channels == 6
    assert sys.path == path


def test_a_class_is_a_factory(code: Path) -> None:
    model = build_model(f"{code}:Net", num_classes=9)
    assert model.fc.out_features == 9  # type: ignore[union-attr]


def test_given_arguments_win(code: Path) -> None:
    model = build_model(f"{code}:Net", num_classes=9, args={"num_classes": 2})
    assert model.fc.out_features == 2  # type: ignore[union-attr]


def test_a_module_of_the_working_folder(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(code.parent)
    package = code.parent / "my_package_of_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text(CODE)
    model = build_model("my_package_of_nets.net:Net", num_classes=4)
    assert model.fc.out_features == 4  # type: ignore[union-attr]


def test_an_installed_module() -> None:
    model = build_model(
        "torch.nn:Linear", num_classes=1, args={"in_features": 2, "out_features": 3}
    )
    assert isinstance(model, nn.Linear)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("broken", "^cannot build model '.*:broken' with no arguments: RuntimeError: out of luck$"),
        (
            "nothing",
            "^model '.*:nothing': wanted its factory to return a torch.nn.Module, got NoneType$",
        ),
        (
            "brokn",
            "unknown factory 'brokn'. Did you mean 'broken'? There are: "
            "Config, Net, broken, dataclass, fixed, nothing, plain.$",
        ),
        ("constant", "^constant in .*net.py is a int; wanted a function or a class$"),
        ("Net", "^cannot build model .*: TypeError: .*'depth'$"),
    ],
)
def test_factories_that_fail_are_named(code: Path, factory: str, message: str) -> None:
    args = {"depth": 1} if factory == "Net" else {}
    with pytest.raises(ModelError, match=message.replace("? T", r"\? T")):
        build_model(f"{code}:{factory}", num_classes=2, args=args)


def test_arguments_that_a_factory_lacks_are_named(code: Path) -> None:
    code.write_text("def make(classes, width, *more, depth, wide=1, **other): pass\n")
    with pytest.raises(ModelError) as refused:
        build_model(f"{code}:make", num_classes=2, args={"width": 3})
    assert str(refused.value).endswith(
        "; give what it lacks: --model-arg classes=... --model-arg depth=..."
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path: Path, body: str, reason: str) -> None:
    (tmp_path / "bad.py").write_text(body)
    with pytest.raises(ModelError, match=rf"^importing .*bad\.py failed: {reason}"):
        build_model(f"{tmp_path / 'bad.py'}:make", num_classes=2)


def test_code_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model file .*none\.py does not exist$"):
        build_model(f"{tmp_path / 'none.py'}:make", num_classes=2)
    with pytest.raises(
        ModelError, match=r"^importing no\.such failed: ModuleNotFoundError: No module named 'no'$"
    ):
        build_model("no.such:make", num_classes=2)
    with pytest.raises(
        ModelError, match=r"^model 'net\.py': say which function builds the model, as in net\.py:F"
    ):
        build_model("net.py", num_classes=2)
    with pytest.raises(ModelError, match=r"^model 'net\.py:': wanted FILE\.py:FACTORY or PACKAGE"):
        build_model("net.py:", num_classes=2)


def test_what_foreign_code_prints_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("print('imported')", "import torch", "def make():", "    print('made')")
    body = "\n".join((*lines, "    return torch.nn.Linear(1, 1)\n"))
    (tmp_path / "loud.py").write_text(body)
    build_model(f"{tmp_path / 'loud.py'}:make", num_classes=None)
    said, told = capsys.readouterr()
    assert "imported" not in said
    assert told == "imported\nmade\n"
