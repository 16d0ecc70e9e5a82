"""Direct convolutions on CPUs: a stem and residual blocks in one native call, without oneDNN.

The inner loops exist for AVX-512, in float32 and, with AVX-512 BF16, in bfloat16. Threads take
whole images through the network, so that activations stay in their caches, and 3x3 convolutions in
float32 use Winograd's algorithm: see csrc/cpu/direct_network.cpp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused import _extension, native
from resnet_fused.layout import convolution_shape
from resnet_fused.packing import Convolution, PackedBlock

PANEL = 32  # output channels that are computed together
_WORD = 4  # bytes that are multiplied at once
# Packed weights of a block: by place, dtype and whether they are transformed. Unlike oneDNN's, they
# do not depend on the shape of x otherwise.
Kept = dict[tuple[int, torch.dtype, bool], Tensor]
# G of Winograd's F(2x2, 3x3): the transformed weight is G weight G^T.
_WINOGRAD = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def runs(dtype: torch.dtype) -> bool:
    """Whether this CPU and build have inner loops for the dtype."""
    info = _extension.build_info()
    return info is not None and str(dtype).removeprefix("torch.") in info["convolutions"]


def takes(weight: Tensor, groups: int, is_stem: bool = False) -> bool:
    """Whether a convolution of this weight, (K, C, R, S), can be packed."""
    # A stem's pixels are filled up to whole words.
    return groups == 1 and weight.shape[0] % PANEL == 0 and (is_stem or weight.shape[1] % 2 == 0)


def pack_block(
    x_shape: tuple[int, ...],
    dtype: torch.dtype,
    convolutions: Sequence[Convolution],
    has_projection: bool,
    kept: Kept,
) -> PackedBlock:
    """Pack a residual block for one shape of x. convolutions: in order, the projection last.

    kept: where packed weights are looked up and added.
    """
    weights, shifts, geometry, shape = [], [], [], x_shape
    for index, convolution in enumerate(convolutions):
        is_projection = has_projection and index == len(convolutions) - 1
        out_shape = _out_shape(x_shape if is_projection else shape, convolution)
        winograd = _uses_winograd(convolution, dtype, out_shape)
        key = (index, dtype, winograd)
        if key not in kept:
            kept[key] = _pack(convolution, dtype, winograd)
        weights.append(kept[key])
        shifts.append(convolution.shift.float().contiguous())
        padding, stride, dilation, _ = convolution.geometry
        geometry += [*padding, *stride, *dilation, int(winograd)]
        if not is_projection:
            shape = out_shape
    return PackedBlock(weights, shifts, geometry, has_projection, shape)


def pack_stem(
    x_shape: tuple[int, ...], dtype: torch.dtype, convolution: Convolution, kept: Kept
) -> PackedBlock:
    """Pack a convolution that is followed by a 3x3 max pooling of stride 2 and padding 1."""
    packed = pack_block(x_shape, dtype, [convolution], False, kept)
    n, c, h, w = packed.out_shape
    return packed._replace(out_shape=(n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1))


def run(x: Tensor, blocks: Sequence[PackedBlock], stem: PackedBlock | None) -> Tensor:
    """relu(conv(x)) and its pooling where there is a stem, then residual blocks, in inference.

    x: (N, C, H, W), channels_last, of the shape that the first of them was packed for.
    """
    packed = [*blocks] if stem is None else [stem, *blocks]
    out: Tensor = native.launcher("direct_network")(
        x,
        [weight for p in packed for weight in p.weights],
        [shift for p in packed for shift in p.shifts],
        [number for p in packed for number in p.geometry],
        [len(block.weights) - block.has_projection for block in blocks],
        [int(block.has_projection) for block in blocks],
        stem is not None,
    )
    return out


def _out_shape(x_shape: tuple[int, ...], convolution: Convolution) -> tuple[int, ...]:
    padding, stride, dilation, _ = convolution.geometry
    return convolution_shape(x_shape, convolution.weight.shape, stride, padding, dilation)


def _uses_winograd(
    convolution: Convolution, dtype: torch.dtype, out_shape: tuple[int, ...]
) -> bool:
    """Whether 16 products for 4 pixels instead of 36 can be used, and are worth larger weights."""
    _, stride, dilation, _ = convolution.geometry
    n, _, h, w = out_shape
    return (
        dtype == torch.float32
        and convolution.weight.shape[1] % PANEL == 0
        and (*convolution.weight.shape[2:], *stride, *dilation) == (3, 3, 1, 1, 1, 1)
        and h % 2 == w % 2 == 0
        # In 2x2 tiles: with fewer, reading the transformed weight takes longer than using it.
        and n * h * w // 4 >= 28
    )


def _pack(convolution: Convolution, dtype: torch.dtype, winograd: bool) -> Tensor:
    """(K, C, R, S) as (K / PANEL, R, S, C, PANEL), with the values of one word side by side."""
    weight, scale = convolution.weight, convolution.scale
    with torch.inference_mode(False), torch.no_grad():
        folded = weight.double() * scale.double().view(-1, 1, 1, 1)
        if winograd:
            transform = folded.new_tensor(_WINOGRAD)
            folded = torch.einsum("ya,kcab,xb->kcyx", transform, folded, transform)
        word = _WORD // dtype.itemsize
        folded = torch.nn.functional.pad(folded, (0, 0, 0, 0, 0, -folded.shape[1] % word))
        k, c, r, s = folded.shape
        words = folded.to(dtype).view(k // PANEL, PANEL, c // word, word, r, s)
        return words.permute(0, 4, 5, 2, 1, 3).contiguous().view(k // PANEL, r, s, c, PANEL)
