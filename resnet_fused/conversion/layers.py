"""Which layers the fused blocks compute themselves, and why a given one must be called as it is."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from resnet_fused.nn.batch_norm_act import has_plain_activation, is_batch_norm_act
from resnet_fused.nn.frozen_batch_norm import is_frozen_batch_norm

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


def is_conv(module: nn.Module) -> bool:
    """Whether this is meant as a convolution; `why_not_conv` says whether it can be fused."""
    return isinstance(module, nn.Conv2d)


def is_norm(module: nn.Module) -> bool:
    """Whether this is meant as a batch norm; `why_not_norm` says whether it can be fused."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_frozen_batch_norm(module)


def is_lazy(module: nn.Module) -> bool:
    """Whether the module becomes one of another class at its first call."""
    return isinstance(module, nn.modules.lazy.LazyModuleMixin)


def why_not_conv(conv: nn.Module) -> str | None:
    """What stands against fusing this convolution, as the end of a sentence; None if nothing."""
    if is_lazy(conv):
        return "is lazy and has not seen any input yet (run the model once, then fuse)"
    reason = _why_not_plain(conv, nn.Conv2d)
    if reason is not None:
        return reason
    if conv.padding_mode != "zeros":
        return f"pads with mode {conv.padding_mode}, not with zeros"
    if isinstance(conv.padding, str):
        return f"has padding={conv.padding!r} (write it as a number)"
    return None


def why_not_norm(norm: nn.Module) -> str | None:
    """What stands against fusing this batch norm, as the end of a sentence; None if nothing."""
    if is_lazy(norm):
        return "is lazy and has not seen any input yet (run the model once, then fuse)"
    if is_batch_norm_act(norm):
        return _why_not_batch_norm_act(norm)
    if isinstance(norm, nn.SyncBatchNorm):
        return _why_not_plain(norm, nn.SyncBatchNorm)
    return _why_not_plain(norm, nn.BatchNorm2d if not is_frozen_batch_norm(norm) else type(norm))


def norm_includes_relu(norm: nn.Module) -> bool:
    """Whether the batch norm has a ReLU in it."""
    return is_batch_norm_act(norm) and has_plain_activation(norm, relu=True)


def hook_on(module: nn.Module) -> str | None:
    """The kind and name of a hook that would no longer run if the module were not called."""
    for attribute, kind in _HOOKS.items():
        for hook in getattr(module, attribute).values():
            name = getattr(hook, "__name__", type(hook).__name__)
            return f"{kind} ({name})"
    return None


_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def _why_not_batch_norm_act(norm: nn.Module) -> str | None:
    for part in norm.children():
        if hook_on(part) is not None:
            return f"has a hook on its {type(part).__name__}"
    if not any(has_plain_activation(norm, relu) for relu in (True, False)):
        return "has another activation than ReLU behind it"
    return _why_not_plain(norm, type(norm))


def _why_not_plain(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why the module's forward may be something else than that of `cls`."""
    if parametrize.is_parametrized(module):
        return f"has a parametrization ({', '.join(module.parametrizations)})"  # type: ignore[arg-type]
    if type(module) is not cls:
        actual = type(module)
        return f"is a {actual.__module__}.{actual.__qualname__}, not a plain {cls.__name__}"
    if "forward" in vars(module):
        return "has its own forward, set on the instance"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or name == "num_batches_tracked":
            continue
        if type(tensor) not in _PLAIN_TENSORS:
            return f"has a {name} of type {type(tensor).__name__}"
        if tensor.dtype not in _FLOATING:
            return f"has a {name} of dtype {tensor.dtype}"
    computed = {"weight", "bias"} & vars(module).keys()
    if computed:
        return f"has a {min(computed)} that is computed, not a parameter (pruning, weight norm)"
    return None
