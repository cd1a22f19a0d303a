import pytest

from sqakd_deploy.errors import ModelError, SpecError
from sqakd_deploy.registry import Registry


def test_a_name_is_never_replaced() -> None:
    registry: Registry[int] = Registry("method")
    registry.register("lsq", 1)
    with pytest.raises(ValueError, match="method 'lsq' is already registered"):
        registry.register("lsq", 2)
    assert registry["lsq"] == 1


def test_a_miss_lists_the_names_and_the_nearest() -> None:
    registry: Registry[int] = Registry("model", ModelError)
    registry.register("resnet20", 1)
    registry.register("vgg8", 2)
    with pytest.raises(ModelError, match=r"unknown model 'resnet2'\. Did you mean 'resnet20'\?"):
        registry["resnet2"]
    with pytest.raises(ModelError, match=r"There are: resnet20, vgg8\."):
        registry["zzz"]


def test_of_near_names_the_one_that_begins_alike_is_meant() -> None:
    registry: Registry[int] = Registry("runtime")
    for name in ("qonnx", "onnxruntime", "openvino"):
        registry.register(name, 1)
    with pytest.raises(SpecError, match=r"Did you mean 'onnxruntime'\?"):
        registry["onnxrt"]


def test_names_come_sorted() -> None:
    registry: Registry[int] = Registry("method")
    for name in ("pact", "ewgs", "lsq"):
        registry.register(name, len(name))
    assert list(registry) == ["ewgs", "lsq", "pact"]
    assert list(registry.items()) == [("ewgs", 4), ("lsq", 3), ("pact", 4)]
    assert "lsq" in registry
    assert len(registry) == 3
