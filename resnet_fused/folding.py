"""Evaluation-mode batch normalisation as one scale and one shift per channel, computed once."""

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import _extension
from resnet_fused.fingerprint import Snapshot
from resnet_fused.reference import statistics_dtype


class _Folded(NamedTuple):
    eps: float
    snapshot: Snapshot
    scale: Tensor
    shift: Tensor


_folded: dict[int, _Folded] = {}  # by id of running_var; entries go when one of their tensors dies


def scale_shift(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    conv_bias: Tensor | None = None,
    conv_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, shift), (C,) each, with bn(y + conv_bias) == y * scale + shift.

    float32, or float64 for float64 statistics. Differentiable in weight, bias and conv_bias.
    Without gradients the same two tensors come back until one of the arguments changes (conv_weight
    is only watched), so that whatever is made from them can be kept as long.
    """
    tensors = (running_var, running_mean, weight, bias, conv_bias, conv_weight)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors[:-1]
    )
    if differentiable or torch.compiler.is_compiling() or not _cacheable(running_var):
        return _fold(weight, bias, running_mean, running_var, eps, conv_bias)
    key = id(running_var)
    entry = _folded.get(key)
    if entry is not None and entry.eps == eps and entry.snapshot.is_current(tensors):
        return entry.scale, entry.shift
    with torch.inference_mode(False), torch.no_grad():
        scale, shift = _fold(weight, bias, running_mean, running_var, eps, conv_bias)
    snapshot = Snapshot(tensors, sampled=True, on_death=lambda _: _folded.pop(key, None))
    _folded[key] = _Folded(eps, snapshot, scale, shift)
    return scale, shift


def _cacheable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and _extension.load()


def _fold(
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    conv_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(running_var)
    scale = (running_var.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    mean = running_mean.to(dtype)
    shift = (mean if conv_bias is None else mean - conv_bias.to(dtype)) * -scale
    return scale, shift if bias is None else shift + bias.to(dtype)
