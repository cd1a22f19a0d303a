"""Other tools' 8-bit models of a torchvision network; called by ``benchmarks/deploy.py``.

It needs no sqakd-deploy, so that it may run in an environment of the tools' own:

    python benchmarks/deploy_peers.py ort resnet18 --state w.safetensors --images i.npy --out o.onnx

Each tool is used as its documentation says, with its defaults but for what is named here: ONNX
Runtime's static quantisation with weights per channel and uint8 activations, which is what its
documentation recommends for x86 with VNNI.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

Images = NDArray[np.float32]
OPSET = 17  # has every operator of these networks; Brevitas' exporter wants one below 18


def float_onnx(model: nn.Module, images: Images, out: Path) -> None:
    """The float model as PyTorch's exporter writes it, with a dynamic batch."""
    torch.onnx.export(
        model,
        (torch.from_numpy(images[:1]),),
        str(out),
        dynamo=False,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
    )


def ort(model: nn.Module, images: Images, out: Path) -> None:
    """``onnxruntime.quantization.quantize_static``: QDQ, per channel, uint8 activations."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, Images] | None:
            image = next(self._left, None)
            return None if image is None else {"input": image[None]}

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared = Path(folder) / "float.onnx", Path(folder) / "prepared.onnx"
        float_onnx(model, images, plain)
        quant_pre_process(str(plain), str(prepared))
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _brevitas(model: nn.Module, images: Images, out: Path, flow: str) -> None:
    from brevitas.export import export_onnx_qcdq
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize

    example = torch.from_numpy(images)
    prepared = preprocess_for_quantize(model.eval())
    student = quantize(prepared) if flow == "fx" else layerwise_quantize(prepared)
    with torch.no_grad(), calibration_mode(student):
        for image in example.split(16):
            student(image)
    export_onnx_qcdq(
        student.eval(),
        args=example[:1],
        export_path=str(out),
        dynamo=False,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
    )


def brevitas_fx(model: nn.Module, images: Images, out: Path) -> None:
    """Brevitas' fx flow at its default 8 bits, by its QCDQ export."""
    _brevitas(model, images, out, "fx")


def brevitas_layerwise(model: nn.Module, images: Images, out: Path) -> None:
    """Brevitas' layer-wise flow at its default 8 bits, by its QCDQ export."""
    _brevitas(model, images, out, "layerwise")


def nncf(model: nn.Module, images: Images, out: Path) -> None:
    """NNCF's post-training quantisation of the OpenVINO model, at its defaults."""
    import openvino
    from nncf import Dataset, quantize

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        float_onnx(model, images, plain)
        quantised = quantize(
            openvino.Core().read_model(plain),
            Dataset([image[None] for image in images]),
            subset_size=len(images),
        )
        openvino.save_model(quantised, out)


TOOLS: dict[str, Callable[[nn.Module, Images, Path], None]] = {
    "float": float_onnx,
    "ort": ort,
    "brevitas-fx": brevitas_fx,
    "brevitas-layerwise": brevitas_layerwise,
    "nncf": nncf,
}


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model", help="of torchvision")
    parser.add_argument("--state", type=Path, required=True, help="its weights, .safetensors")
    parser.add_argument("--images", type=Path, required=True, help="float32 (N, 3, H, W), .npy")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model: Any = torchvision.models.get_model(options.model, weights=None)
    model.load_state_dict(load_file(options.state))
    TOOLS[options.tool](model.eval(), np.load(options.images), options.out)


if __name__ == "__main__":
    main()
