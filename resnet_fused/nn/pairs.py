"""A convolution and the batch normalisation of its output: the unit that is fused."""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from resnet_fused.folding import scale_shift
from resnet_fused.nn.batch_norm_act import has_plain_activation, is_batch_norm_act
from resnet_fused.nn.frozen_batch_norm import FrozenBatchNorm2d, is_frozen_batch_norm
from resnet_fused.ops.bn_relu import BatchNormArgs

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d
Pair = tuple[nn.Conv2d, BatchNorm]
_LIVE = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Projection(NamedTuple):
    """The shortcut of a block that has both layers itself."""

    conv: nn.Module
    bn: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """bn(conv(x)), layer by layer."""
        return self.bn(self.conv(x))


Shortcut = nn.Module | Projection | None


def is_pair(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the two are a plain Conv2d and a batch norm that nobody listens to."""
    return is_plain_conv(conv) and is_plain_norm(bn)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether the module is a Conv2d that pads with zeros, by a number, and has no hooks."""
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        return False
    return not (isinstance(module.padding, str) or has_hooks(module))


def is_plain_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm that is fused, and has no hooks."""
    if is_batch_norm_act(module):
        return has_plain_activation(module, relu=False) and not _is_heard(module)
    return (type(module) in _LIVE or is_frozen_batch_norm(module)) and not has_hooks(module)


def is_plain_norm_before_relu(module: nn.Module) -> bool:
    """Whether relu(module(x)) is that of a fused batch norm, which may have the ReLU in it."""
    if not is_batch_norm_act(module):
        return is_plain_norm(module)
    has_activation = any(has_plain_activation(module, relu) for relu in (True, False))
    return has_activation and not _is_heard(module)


def as_pair(downsample: Shortcut) -> Pair | None:
    """Convolution and normalisation of a projection shortcut; None if it is anything else."""
    if not isinstance(downsample, Projection):
        if type(downsample) is not nn.Sequential or len(downsample) != 2 or has_hooks(downsample):
            return None
        downsample = Projection(*downsample)
    conv, bn = downsample
    return (conv, bn) if is_pair(conv, bn) else None  # type: ignore[return-value]


def is_plain_relu(module: nn.Module) -> bool:
    """Whether the module is a ReLU, and nothing else, that nobody listens to."""
    return type(module) is nn.ReLU and not has_hooks(module)


def is_plain_max_pool(module: nn.Module) -> TypeGuard[nn.MaxPool2d]:
    """Whether the module is a MaxPool2d of adjacent values that nobody listens to."""
    return (
        type(module) is nn.MaxPool2d
        and not has_hooks(module)
        and not (module.ceil_mode or module.return_indices)
        and pair_of(module.dilation) == (1, 1)
    )


def pair_of(size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Two sizes from one for both sides of an image, or two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def calls_are_plain() -> bool:
    """Whether calling a module runs it and nothing else: no tracing, transform or global hook.

    ONNX knows the plain layers, and not this library's operators.
    """
    return (
        torch._C._get_tracing_state() is None
        and not (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and not torch_module._has_any_global_hook()
    )


def refuse_script(module: nn.Module) -> NoReturn:
    """For `__prepare_scriptable__`, which torch.jit.script asks before it compiles anything."""
    raise TypeError(
        f"torch.jit.script: model must be without fused blocks, got {type(module).__name__}"
        " (use torch.jit.trace or torch.export, or script what rf.unfuse returns)"
    )


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """What a call of `module` runs besides its forward; all empty as a rule."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    return any(hooks_of(module)) or "forward" in module.__dict__


def _is_heard(module: nn.Module) -> bool:
    """Whether anything listens to the module, or to one in it."""
    return any(map(has_hooks, module.modules()))


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x computes in, here and now."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def uses_batch(bn: BatchNorm) -> bool:
    """Whether `bn` normalises by the statistics of the batch."""
    return isinstance(bn, _LIVE) and (bn.training or bn.running_mean is None)


def batch_norm_args(bn: BatchNorm) -> BatchNormArgs:
    """How `bn` normalises now. In training it counts a batch, as calling the module does."""
    if not isinstance(bn, _LIVE):
        return BatchNormArgs(bn.weight, bn.bias, bn.running_mean, bn.running_var, eps=bn.eps)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    running = (bn.running_mean, bn.running_var)
    if bn.training and not bn.track_running_stats:
        running = (None, None)
    return BatchNormArgs(bn.weight, bn.bias, *running, uses_batch(bn), momentum, bn.eps)


def fold(conv: nn.Conv2d, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) of `bn` in evaluation and of the convolution's bias: see `scale_shift`."""
    mean, var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    return scale_shift(bn.weight, bn.bias, mean, var, bn.eps, conv.bias, conv.weight)
