from pathlib import Path

import pytest
import yaml

from sqakd_deploy.config import DataConfig, ModelConfig, RunConfig, load_config, merge
from sqakd_deploy.errors import SpecError


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(
        None, {"quantization": {"weights": {"bits": 2}}, "model": {"name": "vgg8"}}
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path, {}) == config


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"distillation": {"lr": 0.5, "epochs": 3}}))
    config = load_config(path, {"distillation": {"lr": 0.25}})
    assert config.distillation.lr == 0.25
    assert config.distillation.epochs == 3


def test_a_pattern_given_anew_counts_last(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("quantization: {layer_bits: {'*': 8, 'layer1.*': 4}}")
    config = load_config(path, {"quantization": {"layer_bits": {"*": "2"}}})
    assert list(config.quantization.layer_bits.items()) == [("layer1.*", "4"), ("*", "2")]


@pytest.mark.parametrize(
    "values",
    [
        {"distillation": {"epochs": True}},
        {"distillation": {"delta": True}},
        {"quantization": {"weights": {"bits": True}}},
        {"data": {"workers": False}},
        {"data": {"input_size": [True, 8]}},
        {"data": {"channels": True}},
    ],
)
def test_a_truth_value_is_no_number(values: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=r"wanted a number, not a truth value.*got .*(True|False)"):
        RunConfig.parse(values)


@pytest.mark.parametrize("wanted", ["on", "off", "auto"])
def test_switches_need_no_quotes_in_yaml(wanted: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"distillation: {{compile: {wanted}}}\n")
    config = load_config(tmp_path / "c.yaml", {})
    assert config.distillation.compile == wanted
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml", {}) == config


def test_a_wrong_key_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("distilation: {}\n")
    with pytest.raises(SpecError, match=r"config\.yaml: distilation: Extra inputs"):
        load_config(path, {})


def test_a_value_where_a_section_belongs_is_no_default(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("quantization: {weights: 2}\n")
    with pytest.raises(SpecError, match=r"c\.yaml: weights: wanted a section of settings, got 2"):
        load_config(tmp_path / "c.yaml", {"quantization": {"weights": {"bits": 4}}})
    empty = merge({"data": None}, {"data": {"source": "photos"}})
    assert empty == {"data": {"source": "photos"}}


def test_merging_changes_neither_side() -> None:
    base, over = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 5}, "c": {"z": 1}}
    assert merge(base, over) == {"a": {"x": 1, "y": 5}, "b": 3, "c": {"z": 1}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}
    assert over == {"a": {"y": 5}, "c": {"z": 1}}


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "digits-resnet20-w4a4-lsq"),
        ({"data": {"source": "/tmp/photos/"}}, "photos-resnet20-w4a4-lsq"),
        ({"data": {"source": "."}}, "here-resnet20-w4a4-lsq"),
        ({"data": {"source": "./"}}, "here-resnet20-w4a4-lsq"),
        ({"data": {"source": "below/.."}}, "here-resnet20-w4a4-lsq"),
        ({"data": {"source": "below/../.hidden"}}, "hidden-resnet20-w4a4-lsq"),
        ({"data": {"source": "/"}}, "images-resnet20-w4a4-lsq"),
        ({"model": {"name": "net.py:make"}}, "digits-make-w4a4-lsq"),
    ],
)
def test_a_run_is_named_after_what_it_is(
    values: dict[str, object], label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert RunConfig.parse(values).label == label


@pytest.mark.parametrize("section", ["teacher", "distillation"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_rate_that_is_not_finite_is_refused(section: str, value: float) -> None:
    with pytest.raises(SpecError, match=rf"{section}\.lr: Input should be a finite number, got"):
        RunConfig.parse({section: {"lr": value}})


@pytest.mark.parametrize("values", [{"data": {"source": ""}}, {"model": {"weights": ""}}])
def test_an_empty_text_is_no_path(values: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="wanted a name or a path, not an empty text, got ''"):
        RunConfig.parse(values)


def test_in_python_a_path_is_as_good_as_its_text() -> None:
    """And never a name: ``Path("./digits")`` is ``Path("digits")``."""
    weights, folder = Path("t.safetensors"), Path("images")
    data = DataConfig(source=folder, cache=folder)  # type: ignore[arg-type]
    config = RunConfig(model=ModelConfig(weights=weights), data=data)  # type: ignore[arg-type]
    assert (config.model.weights, config.data.source, config.data.cache) == (
        "./t.safetensors", "./images", "./images",
    )  # fmt: skip
    for path in ("a/b", "/a", "../a", "."):
        assert DataConfig(source=Path(path)).source == path  # type: ignore[arg-type]
    assert DataConfig(source=Path("./digits")).source == "./digits"  # type: ignore[arg-type]
    assert DataConfig(source="digits").source == "digits"
    assert RunConfig.parse(yaml.safe_load(config.to_yaml())) == config
