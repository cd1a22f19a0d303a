"""The model itself, where a person's script holds it wrapped or computes its weights in hooks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sqakd_deploy.errors import ModelError

_Norm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d
# What computes a weight before each call, and how it is made a plain one.
_COMPUTED: tuple[tuple[type, str, str], ...] = (
    (prune.BasePruningMethod, "pruning", "torch.nn.utils.prune.remove"),
    (WeightNorm, "weight_norm", "torch.nn.utils.remove_weight_norm"),
    (SpectralNorm, "spectral_norm", "torch.nn.utils.remove_spectral_norm"),
)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the model out of ``DataParallel`` and ``torch.compile``, as are its parts."""
    own = copy.deepcopy(_inner(model))
    for path, module in reversed(list(own.named_modules())):
        if _inner(module) is not module:
            own.set_submodule(path, _inner(module))
    return own


def _inner(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrapped(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """A copy of the model in ``DataParallel`` or ``torch.compile``, ready to be a student.

    All its parameters take gradients, whatever the teacher was told; ``SyncBatchNorm`` is BatchNorm
    (processes are synchronised where it is trained), and so is torchvision's
    ``FrozenBatchNorm2d``. The weight and bias of the latter are constants and stay so, until biases
    are put on int32's grid at the end; its statistics are estimated anew as any BatchNorm's, since
    they are those of the float model's weights, not of the student's.

    Args:
        model: left as it is.
        input_shape: of one image, ``(C, H, W)``.

    Raises:
        ModelError: if hooks compute a layer's weight, naming it and what makes it plain.
    """
    for path, module in _inner(model).named_modules():
        _check_hooks(path, module)
    own = own_copy(model).requires_grad_(True)
    for path, norm in _plain_norms(own, input_shape).items():
        if not path:
            return norm
        own.set_submodule(path, norm)
    return own


def refuse_hooks(traced: fx.GraphModule) -> None:
    """Refuse layers whose answer is changed behind them: a file knows of no hook.

    Args:
        traced: its hooks of containers were traced as code.

    Raises:
        ModelError: if a layer has hooks, naming it.
    """
    for node in traced.graph.find_nodes(op="call_module"):
        module = traced.get_submodule(str(node.target))
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"layer {str(node.target)!r}: it has forward hooks, which a file cannot have; "
                "remove them (what register_forward_hook returned has .remove()), or write what "
                "they do into the model"
            )


def _check_hooks(path: str, module: nn.Module) -> None:
    for hook in module._forward_pre_hooks.values():
        for kind, name, remedy in _COMPUTED:
            if isinstance(hook, kind):
                what = getattr(hook, "name", getattr(hook, "_tensor_name", "weight"))
                raise ModelError(
                    f"layer {path!r}: its {what} is computed ({name}); make it plain first, with "
                    f"{remedy}(layer{'' if name != 'pruning' else f', {what!r}'})"
                )


def _plain_norms(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, _Norm]:
    """The BatchNorms to put in the place of others, by path."""
    # A model that holds one has imported it; to import torchvision takes a second.
    frozen = getattr(sys.modules.get("torchvision.ops.misc"), "FrozenBatchNorm2d", None)
    synced = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    ranks = _ranks(model, synced, input_shape) if synced else {}
    made: dict[nn.Module, _Norm] = {old: _unsynced(old, ranks.get(old)) for old in synced}
    made |= {old: _unfrozen(old) for old in model.modules() if type(old) is frozen}
    for old, new in made.items():  # refused by name where there are any
        new._forward_hooks.update(old._forward_hooks)
        new._forward_pre_hooks.update(old._forward_pre_hooks)
    every = model.named_modules(remove_duplicate=False)
    return {path: made[module] for path, module in every if module in made}


@torch.no_grad()
def _ranks(
    model: nn.Module, layers: Iterable[nn.Module], input_shape: tuple[int, ...]
) -> dict[nn.Module, int]:
    """How many dimensions the layers' inputs have, of those that an image reaches."""
    found: dict[nn.Module, int] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            found.setdefault(layer, inputs[0].dim())

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    weight = next(model.parameters(), torch.zeros(()))
    with suppress(Exception):  # of one that does not run, whatever is wrong: tracing says so
        model.eval()(torch.zeros(2, *input_shape, device=weight.device))
    for handle in handles:
        handle.remove()
    return found


def _unsynced(old: nn.SyncBatchNorm, rank: int | None) -> _Norm:
    kind = nn.BatchNorm1d if rank in (2, 3) else nn.BatchNorm2d
    new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    new.weight, new.bias = old.weight, old.bias
    for name, buffer in old.named_buffers():
        setattr(new, name, buffer)
    return new.eval()


def _unfrozen(old: Any) -> _Norm:
    new = nn.BatchNorm2d(len(old.weight), old.eps, device=old.weight.device)
    new.weight, new.bias = (nn.Parameter(t, requires_grad=False) for t in (old.weight, old.bias))
    new.running_mean, new.running_var = old.running_mean, old.running_var
    return new.eval()
