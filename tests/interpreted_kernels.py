"""Kernels that need one repair of the interpreter each, or break one of its rules."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset, mask=offset < n).to(tl.float32), offset < n)


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset).to(out_ptr.dtype.element_ty))


@triton.jit
def add_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    tl.store(out_ptr + offset, x + x)


@triton.jit
def fma_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    tl.store(out_ptr + offset, tl.fma(x, x, -1.0))


@triton.jit
def maximum_kernel(x_ptr, out_ptr, ALL: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    propagation: tl.constexpr = tl.PropagateNan.ALL if ALL else tl.PropagateNan.NONE
    tl.store(out_ptr + offset, tl.maximum(x, 0.0, propagate_nan=propagation))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    offset = row[:, None] * SIZE + row[None, :]
    a = tl.load(a_ptr + offset)
    b = tl.load(b_ptr + offset)
    tl.store(out_ptr + offset, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def same_place_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def neighbour_kernel(x_ptr, n):
    program = tl.program_id(0)
    tl.store(x_ptr + program, tl.load(x_ptr + (program + 1) % n) + 1)


@triton.jit
def order_kernel(out_ptr, count_ptr):
    turn = tl.atomic_add(count_ptr, 1)
    tl.store(out_ptr + turn, tl.program_id(0))


@triton.jit
def scalar_kernel(out_ptr, n):
    total = 0
    for i in range(0, n):
        if i % 2 == 0:
            total += i
    tl.store(out_ptr, total)
