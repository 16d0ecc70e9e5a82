"""Batch normalisation with everything frozen, as used in detection backbones."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from resnet_fused.folding import scale_shift


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are buffers.

    x, out: (N, C, H, W). Equivalent to torchvision.ops.FrozenBatchNorm2d: same constructor, same
    buffers (weight, bias, running_mean, running_var), and checkpoints of BatchNorm2d load as well.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = scale_shift(
            self.weight, self.bias, self.running_mean, self.running_var, self.eps
        )
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def is_frozen_batch_norm(module: nn.Module) -> TypeGuard[FrozenBatchNorm2d]:
    """Whether `module` is this class, or torchvision's of the same name and formula."""
    cls = type(module)
    return cls is FrozenBatchNorm2d or (
        cls.__name__ == "FrozenBatchNorm2d" and cls.__module__ == "torchvision.ops.misc"
    )
