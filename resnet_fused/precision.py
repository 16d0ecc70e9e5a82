"""In which precision convolutions compute: one rule, shared by the backends."""

import torch
from torch import Tensor


def uses_tf32(x: Tensor) -> bool:
    """Whether products of `x` on a GPU have TF32's precision: PyTorch's setting for convolutions.

    False for 16-bit floats, for which it has no meaning.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return x.dtype == torch.float32 and convolutions.fp32_precision == "tf32"
