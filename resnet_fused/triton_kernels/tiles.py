"""Device functions that several kernels share. Arithmetic between tensors is float32."""

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """max(x, 0) that passes NaN on, as torch.relu does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_shift(x, scale, shift):
    """Scale and shift with one rounding: forward and backward must agree on its sign."""
    return tl.fma(x, scale, shift)


@triton.jit
def passes_relu(x):
    """Whether a gradient passes the ReLU of `x`: everywhere but at x <= 0, also at NaN."""
    return (x <= 0.0) == 0


@triton.jit
def tile_origin(tile, h, w, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image, row and column of the first pixel of box number `tile` over images of h x w."""
    tiles_w = tl.cdiv(w, TILE_W)
    tiles_h = tl.cdiv(h, TILE_H)
    column = (tile % tiles_w) * TILE_W
    row = (tile // tiles_w % tiles_h) * TILE_H
    image = (tile // tiles_w // tiles_h) * TILE_N
    return image, row, column


@triton.jit
def tile_statistics(values, inside, count, AXIS: tl.constexpr, WHOLE: tl.constexpr):
    """Mean and sum of squared differences from it, over the pixels (AXIS) of one tile.

    values: float32; inside: which pixels exist, broadcastable, ignored where WHOLE says that all
    do; count: how many, as float32. Two passes over registers: no cancellation.
    """
    if not WHOLE:
        values = tl.where(inside, values, 0.0)
    mean = tl.sum(values, axis=AXIS) / count
    difference = values - tl.expand_dims(mean, AXIS)
    if not WHOLE:
        difference = tl.where(inside, difference, 0.0)
    return mean, tl.sum(difference * difference, axis=AXIS)


@triton.jit
def combine_statistics(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """(count, mean, M2) of two sets of values together.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.
    """
    count = count_a + count_b
    weight = count_b / tl.maximum(count, 1.0)
    difference = mean_b - mean_a
    mean = mean_a + difference * weight
    return count, mean, m2_a + m2_b + difference * difference * count_a * weight


@triton.jit
def pack_bits(passes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of booleans as (ROWS, COLUMNS // 8) bytes, column 8 i + j in bit j."""
    bits = tl.reshape(passes.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What `pack_bits` packed."""
    bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (ROWS, COLUMNS)) != 0
