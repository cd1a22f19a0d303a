"""Float models: the paper's networks, torchvision's, timm's, and a person's own code."""

from sqakd_deploy.models.build import build_model, check_model, is_code, list_models
from sqakd_deploy.models.builtin import MADE_FOR, MODELS
from sqakd_deploy.models.pretrained import check_weights, load_any_weights
from sqakd_deploy.models.resnet import CifarResNet
from sqakd_deploy.models.vgg import CifarVGG
from sqakd_deploy.models.weights import load_weights

__all__ = [
    "MADE_FOR",
    "MODELS",
    "CifarResNet",
    "CifarVGG",
    "build_model",
    "check_model",
    "check_weights",
    "is_code",
    "list_models",
    "load_any_weights",
    "load_weights",
]
