"""relu(x + residual) and its backward, each in one pass over memory."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.triton_kernels import device, tiles

_ACCESS_BYTES = 16
_WARP = 32


class Configuration(NamedTuple):
    """vectors: accesses of 16 bytes per thread and tensor, all in flight together."""

    vectors: int
    warps: int = 8


def configurations(
    elements: int, dtype: torch.dtype, architecture: device.Architecture
) -> tuple[Configuration, ...]:
    """What may be fastest, the static choice first."""
    # Two accesses to each of two tensors hide the latency of memory. With 8 TB/s and the same
    # latency it takes twice as many.
    few, many = Configuration(vectors=2), Configuration(vectors=4)
    choices = (many, few) if architecture.generation == "blackwell" else (few, many)
    # Small tensors: rather more programs than more accesses in each of them.
    spread = Configuration(vectors=1)
    if elements < architecture.multiprocessors * _block(choices[0], dtype):
        return spread, *choices
    return choices


def _block(configuration: Configuration, dtype: torch.dtype) -> int:
    """Elements of one program."""
    return _WARP * configuration.warps * configuration.vectors * _ACCESS_BYTES // dtype.itemsize


@triton.jit
def _combine(a_ptr, b_ptr, result_ptr, at, inside, BACKWARD: tl.constexpr):
    # What lies outside is not stored, whatever is loaded there.
    a = tl.load(a_ptr + at, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside).to(tl.float32)
    result = tl.where(tiles.passes_relu(b), a, 0.0) if BACKWARD else tiles.relu(a + b)
    tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_relu_kernel(a_ptr, b_ptr, result_ptr, n, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    """relu(a + b), or in the backward a where not (b <= 0), b being the output.

    Moves three element sizes per element.
    """
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    # Apart, because accesses are as wide as their masks allow for any n. Triton makes a variant for
    # multiples of 16, whose last block is as wide: it takes half the registers.
    if begin + BLOCK <= n:
        _combine(a_ptr, b_ptr, result_ptr, at, None, BACKWARD)
    else:
        _combine(a_ptr, b_ptr, result_ptr, at, at < n, BACKWARD)


def add_relu(x: Tensor, residual: Tensor, configuration: Configuration | None = None) -> Tensor:
    """`reference.add_relu` in one launch."""
    return _launch(x, residual, False, configuration)


def add_relu_backward(
    grad_out: Tensor, out: Tensor, configuration: Configuration | None = None
) -> Tensor:
    """`reference.add_relu_backward` in one launch."""
    return _launch(grad_out, out, True, configuration)


def _launch(a: Tensor, b: Tensor, backward: bool, configuration: Configuration | None) -> Tensor:
    result = torch.empty_like(a)
    n = a.numel()
    if n == 0:
        return result
    if configuration is None:
        configuration = configurations(n, a.dtype, device.architecture(a))[0]
    block = _block(configuration, a.dtype)
    with device.guard(a):
        _add_relu_kernel[(triton.cdiv(n, block),)](
            *(a, b, result, n, block, backward),
            num_warps=configuration.warps,
            enable_fp_fusion=False,
        )
    return result
