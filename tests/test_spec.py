from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqakd_deploy.config import DataConfig
from sqakd_deploy.errors import SpecError
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec, parse_bits, read_yaml


@given(weight=st.integers(1, 8), activation=st.integers(1, 8))
def test_bits_are_read_in_both_forms(weight: int, activation: int) -> None:
    assert parse_bits(f"w{weight}a{activation}") == (weight, activation)
    assert parse_bits(f"W{weight}A{activation}") == (weight, activation)
    assert parse_bits(str(weight)) == (weight, weight)


@pytest.mark.parametrize("text", ["0", "9", "w4a9", "w0a4", "32"])
def test_bits_outside_1_to_8_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"bits: wanted 1 to 8, got \d+ in"):
        parse_bits(text)


@pytest.mark.parametrize("text", ["", "four", "w4", "4a4", "-4", "4.0", "w4a4x"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="wanted a number like 4 or a pair like w4a8"):
        parse_bits(text)


def test_a_spec_survives_json() -> None:
    spec = QuantSpec(
        weights=TensorSpec(method="ewgs", bits=2, per_channel=True),
        activations=TensorSpec(method="pact", bits=3),
        exclude=("head.*",),
        output_bits=None,
        placement="paper",
    )
    assert QuantSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.label == "w2a3"


def test_bits_of_single_layers_keep_their_order() -> None:
    spec = QuantSpec.parse({"layer_bits": {"b*": 8, "a": "w2a3"}})  # YAML has numbers
    again = QuantSpec.model_validate_json(spec.model_dump_json())
    assert list(again.layer_bits.items()) == [("b*", "8"), ("a", "w2a3")]
    assert spec.label == "w4a4-mixed"
    turned = QuantSpec(layer_bits={"a": "w2a3", "b*": "8"})
    assert len({spec, again, turned}) == 2  # the last that matches counts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"bits": 9}}, r"QuantSpec: weights\.bits: .*less than or equal to 8, got 9"),
        ({"residual_bits": 0}, r"residual_bits: .*greater than or equal to 1, got 0"),
        ({"wieghts": {}}, "wieghts: Extra inputs are not permitted"),
        ({"activations": {"per_channel": True}}, "activations have one scale a tensor"),
        ({True: 1}, "Keys should be strings"),
        ({"layer_bits": {"stem": 9}}, "layer_bits: 'stem': bits: wanted 1 to 8, got 9 in '9'"),
        ({"layer_bits": {"stem": "x"}}, "layer_bits: 'stem': bits: wanted a number like 4 or a pa"),
        ({"placement": "random"}, "placement: .*'target' or 'paper', got 'random'"),
    ],
)
def test_a_bad_field_is_named(values: dict[Any, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        QuantSpec.parse(values)


def test_delta_is_a_number_or_hessian() -> None:
    assert DistillConfig.parse({"delta": "hessian"}).delta == "hessian"
    assert DistillConfig.parse({"delta": 0.5}).delta == 0.5
    with pytest.raises(SpecError, match="delta"):
        DistillConfig.parse({"delta": "often"})
    with pytest.raises(SpecError, match="delta"):
        DistillConfig.parse({"delta": -1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"nesterov": True},
            "wanted optimizer 'sgd' with a momentum above 0, got 'adam'",
        ),
        ({"nesterov": True, "optimizer": "sgd", "momentum": 0.0}, "got 'sgd' with 0; change them"),
        ({"loss": "ce", "kl_weight": 2.0}, "kl_weight: the loss 'ce' has no KL to weigh"),
        ({"kl_weight": 0}, "kl_weight: .*greater than 0, got 0"),
        ({"optimizer": "lion"}, "optimizer: .*'adam' or 'sgd', got 'lion'"),
        ({"momentum": 1.0}, "momentum: .*less than 1, got 1.0"),
        ({"seed": 2**63}, "seed: .*less than 9223372036854775808"),
        ({"warmup_steps": -1}, "warmup_steps: .*greater than or equal to 0, got -1"),
        ({"quantizer_weight_decay": -1.0}, "quantizer_weight_decay: .*greater than or equal to 0"),
    ],
)
def test_training_settings_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DistillConfig.parse(values)


def test_yaml_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(SpecError, match=r"cannot read config .*run\.yaml: No such file"):
        read_yaml(path)
    path.write_text("a: [1,")
    with pytest.raises(SpecError, match=r"run\.yaml is not valid YAML"):
        read_yaml(path)
    for text in ("seed: 2020-13-45", "seed: !!int abc", "seed: !!timestamp x", "seed: !!bool x"):
        path.write_text(text)
        with pytest.raises(SpecError, match=r"run\.yaml is not valid YAML"):
            read_yaml(path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(SpecError, match="wanted keys and values, got list"):
        read_yaml(path)
    path.write_text("")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlr: 2\nseed: 3\n", "'seed' is given twice, in lines 1 and 3"),
        ("a:\n  b: 1\n  'b': 2\n", "'b' is given twice, in lines 2 and 3"),
        ("a: {b: 1, b: 1}\n", "'b' is given twice, in lines 1 and 1"),
    ],
)
def test_a_key_given_twice_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SpecError, match=rf"run\.yaml is not valid YAML: {message}$"):
        read_yaml(tmp_path / "run.yaml")


def test_a_key_of_another_section_or_of_a_template_is_no_second_one(tmp_path: Path) -> None:
    text = "a: &a {x: 1}\nb:\n  c: &c {<<: *a, x: 2}\nd: {<<: *c, y: 1, x: 3}\n"
    (tmp_path / "run.yaml").write_text(text)
    read = read_yaml(tmp_path / "run.yaml")
    assert read == {"a": {"x": 1}, "b": {"c": {"x": 2}}, "d": {"x": 3, "y": 1}}


def test_what_is_wrong_with_several_values_is_said_once() -> None:
    values = {"mean": (125, 3, 0.5), "std": (58, 57, 57), "source": 3}
    with pytest.raises(SpecError) as refused:
        DataConfig.parse(values, where="data")
    assert str(refused.value).count("divide what counts") == 1
    assert "mean.0, mean.1, std.0, std.1, std.2: wanted 0 to 1" in str(refused.value)
    assert "got 125, 3, 58, 57, 57" in str(refused.value)
    assert str(refused.value).startswith("data: source: ")
    assert "; mean.0" in str(refused.value)
