"""Kernels with inline assembly against their twins without: bit by bit, on a GPU.

Triton's interpreter runs the twins only. Each variant is one piece of assembly in one main loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import resnet_fused as rf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytest.importorskip("triton", reason="Triton is not installed")


class Variant(NamedTuple):
    """An operator whose kernel has a prologue in assembly; misaligned: as pointers, not TMA."""

    run: Callable[[Tensor, Tensor, Tensor], Any]
    misaligned: bool


def vectors(channels: int, count: int) -> Tensor:
    return torch.randn(count, channels, device="cuda")


def conv_stats(x: Tensor, weight: Tensor, _: Tensor) -> Any:
    return rf.ops.conv_stats(x, weight, *vectors(x.size(1), 2))


def conv_dgrad(x: Tensor, weight: Tensor, y: Tensor) -> Any:
    coefficients = vectors(y.size(1), 3)
    return rf.ops.conv_dgrad(y, weight, x.shape[2:], y * 0.5 + 1, coefficients)


def conv_wgrad(x: Tensor, weight: Tensor, y: Tensor) -> Any:
    return rf.ops.conv_wgrad(y, x, weight, *vectors(x.size(1), 2))


VARIANTS = {
    f"{function.__name__}, {'pointers' if misaligned else 'TMA where there is'}": Variant(
        function, misaligned
    )
    for function in (conv_stats, conv_dgrad, conv_wgrad)
    for misaligned in (False, True)
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("images", [1, 3])
def test_assembly_and_its_twin_agree(
    name: str, dtype: torch.dtype, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_fused.triton_kernels import device

    x = activation(images, 128, dtype, VARIANTS[name].misaligned)
    y = activation(images, 192, dtype, VARIANTS[name].misaligned)
    weight = torch.randn(192, 128, 1, 1, device="cuda").to(dtype) / 128**0.5
    x[0, :3, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    results = []
    for assembly in (True, False):
        monkeypatch.setattr(device, "inline_assembly", lambda assembly=assembly: assembly)
        torch.manual_seed(1)
        with rf.backend("triton"):
            found = VARIANTS[name].run(x, weight, y)
        results.append(found if isinstance(found, tuple) else (found,))
    for with_assembly, twin in zip(*results, strict=True):
        torch.testing.assert_close(with_assembly, twin, rtol=0, atol=0, equal_nan=True)


def activation(images: int, channels: int, dtype: torch.dtype, misaligned: bool) -> Tensor:
    """(images, channels, 14, 14), channels_last, one element off 16 bytes where asked for."""
    shape, strides = (images, channels, 14, 14), (196 * channels, 1, 14 * channels, channels)
    storage = torch.randn(images * channels * 196 + 1, device="cuda").to(dtype)
    return storage.as_strided(shape, strides, int(misaligned))
