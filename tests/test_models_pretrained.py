"""Published weights by name. No test downloads: the cache and its client are the test's own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn

from sqakd_deploy.data.published import published_classes, published_preprocessing
from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.models import build_model, load_any_weights

NAME = "shufflenet_v2_x0_5"
FILE = "shufflenetv2_x0.5-f707e7126e.pth"
URL = f"https://download.pytorch.org/models/{FILE}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; a download is an error unless the test says otherwise."""

    def refuse(*arguments: object, **options: object) -> None:
        raise URLError("there is no network in tests")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "checkpoints"


def _served(state: dict[str, Tensor], seen: list[tuple[Any, ...]]) -> Callable[..., None]:
    def download(url: str, path: str, prefix: str | None, progress: bool) -> None:
        seen.append((url, prefix))
        torch.save(state, path)

    return download


def test_published_weights_are_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published, seen = build_model(NAME, num_classes=1000), []
    download = _served(published.state_dict(), seen)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for weights in ("DEFAULT", "IMAGENET1K_V1"):
        model = build_model(NAME, num_classes=1000)
        load_any_weights(model, f"torchvision:{NAME}", weights)
        assert torch.equal(model.fc.weight, published.fc.weight)  # type: ignore[union-attr,arg-type]
    assert seen == [(URL, "f707e7126e")]
    assert (cache / FILE).exists()


def test_without_a_network_the_message_says_where_the_file_belongs(cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_any_weights(build_model(NAME, num_classes=1000), NAME, "DEFAULT")
    assert str(caught.value) == (
        f"cannot download {URL}: <urlopen error there is no network in tests>. "
        f"Copy that file to {cache / FILE} from a machine that can, "
        "or name a file of the trained model's weights (--weights FILE)"
    )


def test_another_number_of_classes_is_refused_before_downloading() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_any_weights(build_model(NAME, num_classes=10), NAME, "IMAGENET1K_V1")
    assert str(caught.value) == (
        "weights IMAGENET1K_V1 of 'shufflenet_v2_x0_5' tell 1000 classes apart, but the model has "
        "10. Fine-tune the float model on your 10 classes first, as sqakd-deploy teacher does "
        "from these weights, and name its file (--weights FILE), or distil all 1000 classes "
        "(--model-arg num_classes=1000)"
    )


@pytest.mark.parametrize("name", [NAME, "squeezenet1_1"])
def test_a_classifier_of_other_classes_can_be_left_as_it_is(name: str, cache: Path) -> None:
    published = build_model(name, num_classes=1000)
    url = torchvision.models.get_model_weights(name).DEFAULT.url  # type: ignore[attr-defined]
    cache.mkdir()
    torch.save(
        {f"module.{k}": v for k, v in published.state_dict().items()}, cache / Path(url).name
    )
    model = build_model(name, num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_any_weights(model, name, "DEFAULT", new_classifier=True) == 1000
    last = "fc" if name == NAME else "classifier.1"
    for key, value in model.state_dict().items():
        own = key in (f"{last}.weight", f"{last}.bias")
        assert torch.equal(value, before[key] if own else published.state_dict()[key]), key
    whole = build_model(name, num_classes=1000)
    assert load_any_weights(whole, name, "DEFAULT", new_classifier=True) is None
    assert all(torch.equal(v, published.state_dict()[k]) for k, v in whole.state_dict().items())


def test_only_the_classifier_may_be_another(tmp_path: Path) -> None:
    """Weights of a wider network have other inputs to their last layer, too."""
    torch.save(build_model("shufflenet_v2_x1_0", num_classes=7).state_dict(), tmp_path / "w.pth")
    model = build_model(NAME, num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"does not fit ShuffleNetV2: .* of another shape"):
        load_any_weights(model, NAME, str(tmp_path / "w.pth"), new_classifier=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_any_weights(nn.Linear(2, 2), "resnet50", "IMAGENET21K")
    assert str(caught.value) == (
        "torchvision has no weights 'IMAGENET21K' of 'resnet50'. There are: IMAGENET1K_V1, "
        "IMAGENET1K_V2, DEFAULT; choose one, or name a file of the trained model's weights "
        "(--weights FILE)"
    )


def test_weights_of_features_alone_are_refused_before_they_are_fetched() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_any_weights(nn.Linear(2, 2), "vgg16", "IMAGENET1K_FEATURES")
    assert str(caught.value) == (
        "weights IMAGENET1K_FEATURES of 'vgg16' hold its features alone, without a classifier; "
        "choose others (IMAGENET1K_V1, DEFAULT), or name a file of the trained model's weights "
        "(--weights FILE)"
    )


@pytest.mark.parametrize("name", ["resnet20", "vgg13", "net.py:make"])
def test_models_without_published_weights(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"nobody publishes weights of '{name}' under a na"):
        load_any_weights(nn.Linear(2, 2), name, "DEFAULT")


def test_what_is_no_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"^weight file best\.pth does not exist$"):
        load_any_weights(nn.Linear(2, 2), NAME, "best.pth")
    monkeypatch.chdir(tmp_path)
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(source.state_dict(), "WEIGHTS")  # a file of that name wins
    load_any_weights(model, NAME, "WEIGHTS")
    assert torch.equal(model.weight, source.weight)


def test_files_of_torchvision_s_own_past_fit(cache: Path) -> None:
    published = build_model("densenet121", num_classes=1000)
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")
        if "denselayer" in key
        else key: value
        for key, value in published.state_dict().items()
    }
    assert old.keys() != published.state_dict().keys()
    cache.mkdir()
    torch.save(old, cache / "densenet121-a639ec97.pth")
    model = build_model("densenet121", num_classes=1000)
    load_any_weights(model, "densenet121", "DEFAULT")
    assert torch.equal(model.classifier.weight, published.classifier.weight)  # type: ignore[union-attr,arg-type]


def test_inputs_that_the_model_transforms() -> None:
    model = build_model("googlenet", num_classes=1000)
    with pytest.raises(CheckpointError, match="add --model-arg transform_input=true"):
        load_any_weights(model, "googlenet", "DEFAULT")


def test_a_pickle_in_the_cache_does_not_run(cache: Path) -> None:
    cache.mkdir()
    torch.save(nn.Linear(2, 2), cache / FILE)
    with pytest.raises(CheckpointError, match=r"holds a Python object .* are never loaded"):
        load_any_weights(build_model(NAME, num_classes=1000), NAME, "DEFAULT")


def test_timm_names_its_weights_in_the_model() -> None:
    with pytest.raises(CheckpointError, match=r"as in timm:resnet18\.a1_in1k; write --weights DEF"):
        load_any_weights(nn.Linear(2, 2), "timm:resnet18", "IMAGENET1K_V1")


def _fake_timm(create: Callable[..., nn.Module]) -> Any:
    return SimpleNamespace(create_model=create)


class _Published(nn.Linear):
    num_classes = 3


def test_timm_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    published = _Published(4, 3)

    def create(name: str, pretrained: bool) -> nn.Module:
        assert (name, pretrained) == ("any.tag", True)
        return published

    monkeypatch.setitem(sys.modules, "timm", _fake_timm(create))
    model = nn.Linear(4, 3)
    load_any_weights(model, "timm:any.tag", "DEFAULT")
    assert torch.equal(model.weight, published.weight)
    with pytest.raises(CheckpointError, match="tell 3 classes apart, but the model has 5"):
        load_any_weights(nn.Linear(4, 5), "timm:any.tag", "DEFAULT")


def test_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> nn.Module:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "timm", _fake_timm(create))
    with pytest.raises(CheckpointError, match=r"through timm: ConnectionError: no route; try agai"):
        load_any_weights(nn.Linear(4, 3), "timm:any", "DEFAULT")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_has_what_is_asked_of_it() -> None:
    model = build_model("timm:resnet10t", num_classes=4)
    assert model.num_classes == 4


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_torchvision_s_own_needs_no_heads(tmp_path: Path, prefix: str) -> None:
    """GoogLeNet's published file has two heads for training; the file beside it, a name less."""
    published = torchvision.models.googlenet(num_classes=7, aux_logits=True, init_weights=False)
    state = {prefix + key: value for key, value in published.state_dict().items()}
    assert any("aux1." in key for key in state)
    torch.save(state, tmp_path / "own.pth")
    for args in ({}, {"aux_logits": True}):
        model = build_model("googlenet", num_classes=7, args=args)
        load_any_weights(model, "googlenet", str(tmp_path / "own.pth"))
        for key, value in model.state_dict().items():
            assert torch.equal(value, published.state_dict()[key]), key


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_says_how_its_images_are_prepared() -> None:
    known = published_preprocessing("timm:resnet18.a1_in1k", "DEFAULT")
    assert known is not None
    assert (known.input_size, known.resize) == ((224, 224), 235)  # 224 of 0.95
    assert known.mean == (0.485, 0.456, 0.406)
    assert published_preprocessing("timm:resnet18.a1_in1k", "own.pth") is None
    assert published_preprocessing("timm:nosuch", "DEFAULT") is None


def test_published_classes_have_their_names() -> None:
    names = published_classes("resnet50", "DEFAULT")
    assert names is not None
    assert (len(names), names[0]) == (1000, "tench")
    assert published_classes("resnet50", "own.pth") is None
