"""bn_statistics: what a batch norm measures of its input, before anything is normalised by it.

Statistics over several processes are combined from those of each (Chan, Golub and LeVeque,
"Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979).
"""

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.layout import memory_format
from resnet_fused.ops import _checks
from resnet_fused.ops._registration import call, define, refuse_gradient


def bn_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, m2): per channel the mean of x, and its sum of (x - mean)^2.

    x: (N, C, H, W); mean, m2: (C,), in float32 (float64 for float64), 0 where x is empty. The
    biased variance is m2 / (N * H * W). Equivalent to torch.var_mean over N, H and W, and to what
    `bn_relu` in training normalises by. No gradient goes through it: that of a batch norm comes
    from `bn_relu_backward_sums` and `bn_relu_backward_apply`.

    Raises ValueError where x has not 4 dimensions, TypeError where it is not of floating point,
    and RuntimeError where it needs a gradient.
    """
    _checks.check_tensors("bn_statistics", x=x)
    statistics: tuple[Tensor, Tensor] = call(_bn_statistics, x)
    return statistics


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    _checks.check_activation("bn_statistics", "x", x)
    statistics: tuple[Tensor, Tensor] = backends.choose("bn_statistics", x)(
        x.contiguous(memory_format=memory_format(x))
    )
    return statistics


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _checks.check_activation("bn_statistics", "x", x)
    mean = x.new_empty(x.size(1), dtype=reference.statistics_dtype(x))
    return mean, torch.empty_like(mean)


_bn_statistics = define(
    "bn_statistics(Tensor x) -> (Tensor mean, Tensor m2)",
    _kernel,
    _fake,
    refuse_gradient("bn_statistics", "use bn_relu, conv_stats or x.detach()"),
)
