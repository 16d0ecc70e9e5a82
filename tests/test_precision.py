"""resnet_fused/precision.py: every backend on GPUs computes float32 as PyTorch's setting says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import cuda_chains, cuda_convolutions, precision
from resnet_fused.triton_kernels import device

GEOMETRY = (1, 1), (0, 0), (1, 1), 1
X, W, S = torch.ones(2, 8, 3, 3), torch.ones(8, 8, 1, 1), torch.ones(8)
CALLS: dict[str, tuple[Any, ...]] = {
    "conv_bn_relu": (X, W, S, S, None, True, *GEOMETRY),
    "conv_bn_relu_": (X, W, S, S, X.to(memory_format=torch.channels_last), True, *GEOMETRY),
    "conv_stats": (X, W, None, None, *GEOMETRY),
    "conv_dgrad": (X, W, (3, 3), *(None,) * 8, *GEOMETRY),
    "conv_wgrad": (X, X, W, None, None, *GEOMETRY),
    "conv_projection_relu": (X, W, S, S, X, W, S, S, (1, 1)),
}


@pytest.mark.parametrize(
    ("setting", "dtype", "expected"),
    [
        ("tf32", torch.float32, True),
        ("ieee", torch.float32, False),
        ("tf32", torch.bfloat16, False),
        ("ieee", torch.bfloat16, False),
    ],
)
def test_float32_is_computed_as_convolutions_are(
    setting: str, dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=setting))
    x = torch.empty(1, dtype=dtype)
    assert precision.uses_tf32(x) is expected
    assert device.dot_precision(x) == ("tf32" if expected else "tf32x3")


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("operator", CALLS)
def test_cuda_kernels_are_told(operator: str, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cuda_chains if operator in cuda_chains.OPERATORS else cuda_convolutions
    asked: list[Tensor] = []

    def uses_tf32(x: Tensor) -> bool:
        asked.append(x)
        return tf32

    monkeypatch.setattr(module, "uses_tf32", uses_tf32)
    calls: list[tuple[Any, ...]] = []
    overload = SimpleNamespace(default=lambda *arguments: calls.append(arguments))
    module.launcher(operator, lambda: SimpleNamespace(**{operator: overload}))(*CALLS[operator])
    (arguments,) = calls
    assert arguments[-3:] == (tf32, -1, 0)
    assert asked[0] is X
