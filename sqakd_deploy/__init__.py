"""Label-free low-bit distillation of vision models, deployed exactly.

Names are loaded on first use, so that importing the package (and ``--help``) costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqakd_deploy.api import calibrate as calibrate
    from sqakd_deploy.api import export as export
    from sqakd_deploy.api import export_proven as export_proven
    from sqakd_deploy.checkpoint import open_run as open_run
    from sqakd_deploy.config import RunConfig as RunConfig
    from sqakd_deploy.data.preprocessing import Preprocessing as Preprocessing
    from sqakd_deploy.errors import SqakdError as SqakdError
    from sqakd_deploy.exporting import ExportOptions as ExportOptions
    from sqakd_deploy.lowering.exact import in_integers as in_integers
    from sqakd_deploy.parity import Tolerance as Tolerance
    from sqakd_deploy.parity import verify as verify
    from sqakd_deploy.quantization import quantize as quantize
    from sqakd_deploy.runs import load_student as load_student
    from sqakd_deploy.scoring import score_file as score_file
    from sqakd_deploy.scoring import score_run as score_run
    from sqakd_deploy.spec import DistillConfig as DistillConfig
    from sqakd_deploy.spec import QuantSpec as QuantSpec
    from sqakd_deploy.spec import TensorSpec as TensorSpec
    from sqakd_deploy.training.distillation import distill as distill
    from sqakd_deploy.training.teaching import teach as teach
    from sqakd_deploy.training.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "DistillConfig": "spec",
    "ExportOptions": "exporting",
    "Preprocessing": "data.preprocessing",
    "QuantSpec": "spec",
    "RunConfig": "config",
    "SqakdError": "errors",
    "TensorSpec": "spec",
    "Tolerance": "parity",
    "calibrate": "api",
    "distill": "training.distillation",
    "export": "api",
    "export_proven": "api",
    "in_integers": "lowering.exact",
    "load_student": "runs",
    "open_run": "checkpoint",
    "quantize": "quantization",
    "score_file": "scoring",
    "score_run": "scoring",
    "teach": "training.teaching",
    "train": "training.train",
    "verify": "parity",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
