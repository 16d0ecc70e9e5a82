"""Statistics of several processes, as in torch.nn.SyncBatchNorm: what is exchanged, and how.

The forward exchanges one message of counts and sums and the backward one of the gradient's sums,
whatever number of batch norms they are about. Batches may differ in size from process to process,
and be empty. Any process group will do, on any device that its backend takes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fused.ops.bn_relu import BatchNormArgs

Group = Any  # torch.distributed.ProcessGroup, which not every build of PyTorch has


class Moments(NamedTuple):
    """Of the values of each channel: how many, their mean, their sum of (value - mean)^2.

    mean, m2: (C,). values: an int, or (1,) where it comes from other processes.
    """

    values: int | Tensor
    mean: Tensor
    m2: Tensor


def group_of(bn: nn.Module) -> Group | None:
    """The processes whose batches `bn` normalises together, now; None for this one alone."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def values_per_channel(x: Tensor) -> int:
    return x.size(0) * x.size(2) * x.size(3)


def of_all_processes(moments: Sequence[Moments], groups: Sequence[Group | None]) -> list[Moments]:
    """Each of the moments over all processes of its group.

    Sums are exchanged in float64, where a sum of squares loses nothing that values in float32 had:
    the relative error of the variance is (mean / standard deviation)^2 * 1e-16.
    """
    messages: list[Tensor | None] = []
    for (count, mean, m2), group in zip(moments, groups, strict=True):
        if group is None:
            messages.append(None)
            continue
        mean, m2 = mean.double(), m2.double()
        total = mean.new_full((1,), float(count))
        messages.append(torch.cat((total, total * mean, m2 + total * mean * mean)))
    combined = []
    for given, message in zip(moments, all_reduced(messages, groups), strict=True):
        if message is None:
            combined.append(given)
            continue
        channels = given.mean.numel()
        count, sums, squares = message.split((1, channels, channels))
        mean = sums / count.clamp(min=1)
        m2 = (squares - mean * sums).clamp(min=0)
        dtype = given.mean.dtype
        combined.append(Moments(count.to(dtype), mean.to(dtype), m2.to(dtype)))
    return combined


def all_reduced(
    vectors: Sequence[Tensor | None], groups: Sequence[Group | None]
) -> list[Tensor | None]:
    """Each vector summed over the processes of its group; one message for each group."""
    results = list(vectors)
    for group in {id(group): group for group in groups if group is not None}.values():
        chosen = [i for i, other in enumerate(groups) if other is group]
        parts = [cast(Tensor, vectors[i]) for i in chosen]
        message = torch.cat(parts)
        dist.all_reduce(message, group=group)
        for i, part in zip(chosen, message.split([p.numel() for p in parts]), strict=True):
            results[i] = part
    return results


def settle(bn: BatchNormArgs, moments: Moments) -> BatchNormArgs:
    """`bn` as evaluation by these moments, which the running statistics move towards.

    Moments of no values move nothing. Raises ValueError on one value per channel in this process,
    as every batch norm in training; how many there are elsewhere is not waited for.
    """
    values, mean, m2 = moments
    momentum: float | Tensor
    if isinstance(values, Tensor):
        var, unbiased = m2 / values.clamp(min=1), m2 / (values - 1).clamp(min=1)
        momentum = bn.momentum * (values > 0).to(values.dtype)
    elif values == 1:
        raise ValueError("bn_relu: expected more than 1 value per channel when training, got 1")
    else:
        var, unbiased = m2 / max(values, 1), m2 / max(values - 1, 1)
        momentum = bn.momentum if values else 0.0
    with torch.no_grad():
        for running, value in ((bn.running_mean, mean), (bn.running_var, unbiased)):
            if running is not None:
                running.mul_(1 - momentum).add_(momentum * value)
    return BatchNormArgs(bn.weight, bn.bias, mean, var, False, 0.0, bn.eps)


def averages_over(sums: Tensor, count: int, group: Group | None) -> Tensor:
    """Sums by count; the sums of both over the processes of the group, if there is one.

    sums: (rows, C). count: values per channel in this process.
    """
    if group is None:
        return sums / max(count, 1)
    counted = sums.new_full((1,), count, dtype=torch.float64)
    message = torch.cat((counted, sums.flatten().double()))
    dist.all_reduce(message, group=group)
    return (message[1:] / message[0].clamp(min=1)).to(sums.dtype).view_as(sums)
