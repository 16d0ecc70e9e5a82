"""What Triton makes of its kernels for GPUs that are not here: compiled, disassembled, read.

Every layer of a ResNet-50 goes through the launchers as it would on that GPU, with tensors that are
never touched.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from resnet_fused.commands import cases, networks

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import ahead_of_time
from ahead_of_time import AMPERE, BLACKWELL, CAPABILITIES, HOPPER, Code

BATCH = 256
SHARED_BYTES = {AMPERE: 163 * 1024, HOPPER: 227 * 1024, BLACKWELL: 227 * 1024}
PRODUCT = {AMPERE: "HMMA", HOPPER: "HGMMA", BLACKWELL: "UTCHMMA"}


class Layer(NamedTuple):
    """One convolution of the network, and what stands around it."""

    conv: cases.ConvShape
    ends_block: bool

    def __str__(self) -> str:
        _, c, h, _ = self.conv.x
        k, _, r, _ = self.conv.weight
        return f"{c}x{h} -> {k}, {r}x{r}/{self.conv.stride[0]}"

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups

    def of_batch(self, images: int) -> Layer:
        return self._replace(conv=self.conv._replace(x=(images, *self.conv.x[1:])))

    @property
    def is_stem(self) -> bool:
        return self.conv.x[1] == 3

    @property
    def is_1x1(self) -> bool:
        return self.conv.weight[2:] == (1, 1)


def network_layers() -> list[Layer]:
    model = networks.build_pair("resnet50").eager.to("meta")
    shapes = cases.layer_shapes(model, torch.empty(BATCH, 3, 224, 224, device="meta"))
    return [
        Layer(conv, conv.weight[2:] == (1, 1) and conv.weight[0] == 4 * conv.weight[1])
        for conv in shapes.convolutions
    ]


LAYERS = network_layers()


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    format_ = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return ahead_of_time.untouched(*shape, dtype=dtype, memory_format=format_)


class Variant(NamedTuple):
    """An operator with the options that make another kernel of it."""

    launch: Callable[..., object]  # of layer, dtype, configuration
    applies: Callable[[Layer], bool] = lambda layer: True


def conv_bn_relu(
    layer: Layer, dtype: torch.dtype, configuration: Any = None, residual: bool = False
) -> object:
    from resnet_fused.triton_kernels import conv_bn_relu

    x, weight, y = activations(layer, dtype)
    vectors = (untouched(y.size(1)) for _ in range(2))
    other = y if residual else None
    return conv_bn_relu.conv_bn_relu(
        *(x, weight, *vectors, other, True, *layer.geometry), configuration=configuration
    )


def conv_stats(
    layer: Layer, dtype: torch.dtype, configuration: Any = None, prologue: bool = False
) -> object:
    from resnet_fused.triton_kernels import conv_stats

    x, weight, _ = activations(layer, dtype)
    vectors = [untouched(x.size(1)) if prologue else None for _ in range(2)]
    return conv_stats.conv_stats(
        *(x, weight, *vectors, *layer.geometry), configuration=configuration
    )


def conv_dgrad(
    layer: Layer,
    dtype: torch.dtype,
    configuration: Any = None,
    prologue: bool = False,
    sign: str = "x",
    residual: bool = False,
) -> object:
    from resnet_fused.triton_kernels import conv_dgrad

    x, weight, y = activations(layer, dtype)
    c, k = x.size(1), y.size(1)
    vectors = [untouched(c) if sign == "x" else None for _ in range(2)]
    mask = None
    if sign == "mask":
        mask = torch.empty(x.numel() // c, -(-c // 8), dtype=torch.uint8)
    return conv_dgrad.conv_dgrad(
        *(y, weight, list(x.shape[2:]), y if prologue else None),
        *(untouched(3, k) if prologue else None, x if residual else None),
        *(x, *vectors, mask, untouched(c), *layer.geometry),
        configuration=configuration,
    )


def conv_wgrad(
    layer: Layer, dtype: torch.dtype, configuration: Any = None, prologue: bool = False
) -> object:
    from resnet_fused.triton_kernels import conv_wgrad

    x, weight, y = activations(layer, dtype)
    vectors = [untouched(x.size(1)) if prologue else None for _ in range(2)]
    return conv_wgrad.conv_wgrad(
        *(y, x, weight, *vectors, *layer.geometry), configuration=configuration
    )


def activations(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    conv = layer.conv
    x, weight = untouched(*conv.x, dtype=dtype), untouched(*conv.weight, dtype=dtype)
    with torch.device("meta"):
        y = torch.conv2d(x.to("meta"), weight.to("meta"), None, *layer.geometry)
    return x, weight, untouched(*y.shape, dtype=dtype)


def with_options(function: Callable[..., object], **options: Any) -> Callable[..., object]:
    return functools.partial(function, **options)


VARIANTS: dict[str, Variant] = {
    "conv_bn_relu": Variant(conv_bn_relu, lambda layer: not layer.ends_block),
    "conv_bn_relu, residual": Variant(
        with_options(conv_bn_relu, residual=True), lambda layer: layer.ends_block
    ),
    "conv_stats": Variant(conv_stats),
    "conv_stats, prologue": Variant(
        with_options(conv_stats, prologue=True), lambda layer: layer.is_1x1
    ),
    "conv_dgrad": Variant(conv_dgrad, lambda layer: not layer.is_stem),
    "conv_dgrad, residual, mask": Variant(
        with_options(conv_dgrad, sign="mask", residual=True), lambda layer: layer.is_1x1
    ),
    "conv_dgrad, prologue": Variant(
        with_options(conv_dgrad, prologue=True), lambda layer: layer.is_1x1
    ),
    "conv_wgrad": Variant(conv_wgrad),
    "conv_wgrad, prologue": Variant(
        with_options(conv_wgrad, prologue=True), lambda layer: not layer.is_stem
    ),
}


def representatives() -> list[Layer]:
    """One layer of each sort.

    What tells kernels apart is the filter, the stride, and how far channels fill a tile of 128.
    """
    found: dict[tuple[int, ...], Layer] = {}
    for layer in LAYERS:
        k, c, r, _ = layer.conv.weight
        found.setdefault((r, layer.conv.stride[0], min(k, 128), min(c, 128)), layer)
    return list(found.values())


@functools.cache
def compiled_layers(
    variant: str, capability: tuple[int, int], dtype: torch.dtype, images: int
) -> list[tuple[Layer, Code]]:
    """Of each layer the kernel with the products, among all that the operator launches."""
    launch, applies = VARIANTS[variant]
    layers = [layer.of_batch(images) for layer in representatives() if applies(layer)]
    codes = ahead_of_time.products(capability, lambda: [launch(layer, dtype) for layer in layers])
    return list(zip(layers, codes, strict=True))


every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_capability = pytest.mark.parametrize("capability", CAPABILITIES, ids=ahead_of_time.case_id)


def no_spills_cases() -> list[Any]:
    """Variant, capability, dtype and images of a batch.

    fp16 differs from bf16 in the arithmetic around the product only: one capability stands for all.
    A single image has small tiles.
    """
    plain = [variant for variant in VARIANTS if "," not in variant]
    inference = ["conv_bn_relu", "conv_bn_relu, residual"]
    return [
        *itertools.product(VARIANTS, CAPABILITIES, [torch.bfloat16], [BATCH]),
        *itertools.product(plain, CAPABILITIES, [torch.float32], [BATCH]),
        *itertools.product(plain, [HOPPER], [torch.float16], [BATCH]),
        *itertools.product(inference, CAPABILITIES, [torch.bfloat16], [1]),
    ]


@pytest.mark.parametrize(
    ("variant", "capability", "dtype", "images"), no_spills_cases(), ids=ahead_of_time.case_id
)
def test_no_kernel_spills_and_every_block_fits(
    variant: str, capability: tuple[int, int], dtype: torch.dtype, images: int
) -> None:
    layers = compiled_layers(variant, capability, dtype, images)
    assert [str(layer) for layer, code in layers if code.spills] == []
    limit = SHARED_BYTES[capability]
    assert [str(layer) for layer, code in layers if code.shared_bytes > limit] == []


def candidates(
    operator: str, layer: Layer, capability: tuple[int, int], dtype: torch.dtype
) -> tuple[Any, ...]:
    """What the operator offers to a tuner."""
    from resnet_fused.triton_kernels import conv_dgrad, conv_wgrad, convolution, device, problem

    architecture = device.of_capability(capability, ahead_of_time.MULTIPROCESSORS[capability])
    x, weight, _ = activations(layer, dtype)
    arguments = problem.conv_problem(x, weight, *layer.geometry), dtype, architecture
    if operator == "conv_dgrad":
        return conv_dgrad.configurations(*arguments, conv_dgrad.Options(tma=True))
    module = conv_wgrad if operator == "conv_wgrad" else convolution
    return module.configurations(*arguments)


@every_capability
@pytest.mark.parametrize("operator", ["conv_bn_relu", "conv_stats", "conv_dgrad", "conv_wgrad"])
@pytest.mark.parametrize("sort", ["3x3", "1x1"])
def test_every_tile_that_is_offered_has_a_way_without_spills(
    operator: str, sort: str, capability: tuple[int, int]
) -> None:
    """With a limit of registers or without: which one spills depends on the version of Triton."""
    layer = next(
        layer
        for layer in LAYERS
        if layer.conv.weight[0] == 128 and layer.is_1x1 == (sort == "1x1") and not layer.is_stem
    )
    dtype = torch.bfloat16
    found = candidates(operator, layer, capability, dtype)
    assert len(found) == len(set(found)) > 1
    spills: dict[Any, list[int]] = {}
    for candidate in found:
        launch = functools.partial(VARIANTS[operator].launch, layer, dtype, candidate)
        (code,) = ahead_of_time.products(capability, launch)
        assert code.shared_bytes <= SHARED_BYTES[capability], candidate
        spills.setdefault(candidate._replace(registers=None), []).append(code.spills)
    assert {tile: counts for tile, counts in spills.items() if min(counts) > 0} == {}


@pytest.mark.parametrize("capability", [AMPERE, BLACKWELL], ids=ahead_of_time.case_id)
def test_spills_are_seen(capability: tuple[int, int]) -> None:
    """With half of the registers that the kernel needs; on Hopper that does not compile."""
    layer = next(layer for layer in LAYERS if layer.is_1x1 and layer.conv.weight[0] == 128)
    first, *_ = candidates("conv_bn_relu", layer, capability, torch.bfloat16)
    launch = functools.partial(
        *(VARIANTS["conv_bn_relu"].launch, layer, torch.bfloat16, first._replace(registers=64))
    )
    (code,) = ahead_of_time.products(capability, launch)
    assert code.count("LDL", "STL") > 0
    assert code.stack_bytes > 0
    assert code.spills > code.stack_bytes


@every_variant
@every_capability
def test_products_of_16_bit_floats_use_the_tensor_cores(
    variant: str, capability: tuple[int, int]
) -> None:
    """Also behind a prologue: its operand goes to the product through registers."""
    for layer, code in compiled_layers(variant, capability, torch.bfloat16, BATCH):
        assert code.count(PRODUCT[capability]) > 0, layer


@pytest.mark.parametrize("variant", ["conv_bn_relu", "conv_stats", "conv_dgrad"])
def test_hopper_loops_feed_the_tensor_cores_from_shared_memory(variant: str) -> None:
    """Nothing passes through registers on the way: TMA writes what wgmma reads."""
    looked_at = 0
    for layer, code in compiled_layers(variant, HOPPER, torch.bfloat16, BATCH):
        if layer.is_stem or not steps_are_many(layer, variant):
            continue
        looked_at += 1
        assert code.count_in_loop("HGMMA") > 0, layer
        assert code.count_in_loop("LDSM", "LDS", "STS") == 0, layer
        assert not any(from_registers(each) for each in code.loop), layer
        assert code.count_in_loop("UTMALDG") == 2, layer
        kind = "UTMALDG.2D" if layer.is_1x1 else "UTMALDG.4D"
        kind = "UTMALDG.5D" if layer.conv.stride == (2, 2) and variant != "conv_dgrad" else kind
        assert code.count_in_loop(kind) >= 1, layer
    assert looked_at >= 3


@pytest.mark.parametrize(
    "variant", ["conv_bn_relu", "conv_bn_relu, residual", "conv_stats", "conv_stats, prologue"]
)
@pytest.mark.parametrize("channels", [64, 256])
def test_persistent_programs_read_the_next_part_before_they_store_one(
    channels: int, variant: str
) -> None:
    """Their two loops have become one, which begins with loads already under way."""
    layer = next(layer for layer in LAYERS if layer.ends_block and layer.conv.x[1] == channels)
    found = candidates(variant.split(",", 1)[0], layer, HOPPER, torch.bfloat16)
    launch = functools.partial(
        VARIANTS[variant].launch,
        *(layer, torch.bfloat16, next(each for each in found if each.persistent)),
    )
    (code,) = ahead_of_time.products(HOPPER, launch)
    assert code.spills == 0
    assert code.shared_bytes <= SHARED_BYTES[HOPPER]
    assert code.count_in_loop("HGMMA") > 0
    assert code.count_in_loop("UTMASTG") == 1
    assert code.count_in_loop("UTMALDG") == (3 if "residual" in variant else 2)
    assert code.count("UTMALDG") > code.count_in_loop("UTMALDG")


def test_ampere_loops_copy_16_bytes_at_a_time() -> None:
    for variant in ("conv_bn_relu", "conv_stats", "conv_dgrad", "conv_wgrad"):
        for layer, code in compiled_layers(variant, AMPERE, torch.bfloat16, BATCH):
            if layer.is_stem or not steps_are_many(layer, variant):
                continue
            copies = code.count_in_loop("LDGSTS")
            assert copies > 0, (variant, layer)
            assert copies == wide_copies(code), (variant, layer)


def test_the_stem_is_copied_in_4_bytes() -> None:
    """Of a tile of 128 x 32 values each of 256 threads copies 16: wider, alignment forbids it.

    The weight, whose rows begin anywhere, is read in half as many loads of 2 bytes.
    """
    for capability in CAPABILITIES:
        layers = compiled_layers("conv_bn_relu", capability, torch.bfloat16, BATCH)
        (code,) = (code for layer, code in layers if layer.is_stem)
        assert code.count_in_loop("LDGSTS") == 8
        assert code.count_in_loop("LDG.E.U16") <= 8


def steps_are_many(layer: Layer, variant: str) -> bool:
    """Whether the loop is one: short ones are unrolled."""
    k, c, r, _ = layer.conv.weight
    summed = k if variant == "conv_dgrad" else c
    return variant == "conv_wgrad" or r * r * summed > 4 * 64


def from_registers(instruction: str) -> bool:
    """Whether a wgmma takes an operand from registers, not by a descriptor of shared memory."""
    return re.search(r"HGMMA\S*\s+R\d+, R\d+, gdesc", instruction) is not None


def wide_copies(code: Code) -> int:
    return sum("LDGSTS" in each and ".128" in each for each in code.loop)
