"""The model itself, where a person's script holds it wrapped or computes its weights in hooks."""

from __future__ import annotations

import copy

from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sqakd_deploy.errors import ModelError

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


def unwrapped(model: nn.Module) -> nn.Module:
    """A copy of the model in ``DataParallel`` or ``torch.compile``, ready to be a student.

    All its parameters take gradients, whatever the teacher was told; ``SyncBatchNorm`` is BatchNorm
    (processes are synchronised where it is trained).

    Args:
        model: left as it is.

    Raises:
        ModelError: if hooks compute a layer's weight, naming it and what makes it plain.
    """
    for path, module in _inner(model).named_modules():
        _check_hooks(path, module)
    own = own_copy(model).requires_grad_(True)
    for path, module in list(own.named_modules()):
        if isinstance(module, nn.SyncBatchNorm):
            own = _with_plain_norm(own, path, module)
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


def _with_plain_norm(model: nn.Module, path: str, old: nn.SyncBatchNorm) -> nn.Module:
    new = nn.BatchNorm2d(
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats
    )
    new.weight, new.bias = old.weight, old.bias
    for name, buffer in old.named_buffers():
        setattr(new, name, buffer)
    new.train(old.training)
    if not path:
        return new
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
    return model
