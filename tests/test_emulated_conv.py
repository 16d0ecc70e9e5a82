"""The CUDA convolutions in the emulator: every tile, bytes moved, order of blocks, messages.

What the operators compute in general is tested in test_conv_*.py, where the emulator is one more
backend and the launchers choose the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import emulation
import pytest
import test_conv_dgrad
import torch
from convolutions import Tensors
from emulated_convolutions import (
    ARITHMETICS,
    KINDS,
    PROJECTED_CHANNELS,
    Arithmetic,
    Kind,
    Tile,
    eager,
    fuses,
    given,
    products_in_tf32,
    run,
    tiles_of,
)
from numerics import assert_as_accurate_as_eager, normal
from test_conv_bn_relu import Conv
from torch import Tensor
from torch.nn import functional as F

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

# Pixels, kernels and channels that divide neither a tile nor a step, and mostly no vector.
RAGGED = {
    "1x1": Conv((2, 72, 5, 7), 88, 1, padding=(0, 0)),
    "several tiles": Conv((1, 40, 13, 11), 136, 1, padding=(0, 0)),
    "3x3": Conv((1, 27, 6, 7), 65),
    "strided": Conv((2, 40, 7, 9), 70, stride=(2, 2)),
    "strided 1x1": Conv((2, 72, 7, 8), 72, 1, stride=(2, 2), padding=(0, 0)),
    "dilated": Conv((1, 24, 9, 8), 72, padding=(2, 1), dilation=(2, 1)),
    "six phases": Conv((2, 20, 11, 9), 68, stride=(3, 2), padding=(0, 2), dilation=(1, 2)),
    "grouped": Conv((1, 144, 3, 4), 160, groups=2),
    "depthwise": Conv((1, 67, 5, 4), 67, groups=67),
    "stem": Conv((1, 3, 15, 12), 65, 7, stride=(2, 2), padding=(3, 3)),
}
SPLITS = (1, 3)


@pytest.fixture
def emulated() -> Iterator[Any]:
    """The operators; no launch of the test may have met a bank conflict."""
    ops = emulation.library()
    ops.configure(0, 3)
    launches(ops)
    # Eager's convolutions are so small that threads would mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ops
    torch.set_num_threads(threads)
    launches(ops)
    ops.configure(0, 3)


def launches(ops: Any) -> list[dict[str, Any]]:
    """Those since the last call."""
    records = emulation.launches(ops)
    assert all(record["bank_conflicts"] == 0 for record in records)
    return records


def is_for(kind: Kind, conv: Conv) -> bool:
    is_plain_1x1 = conv.kernel == 1 and conv.groups == 1
    return kind.operator != "conv_projection_relu" or is_plain_1x1


def every_second_kind_will_do(kind: Kind, name: str) -> bool:
    """There are many of conv_dgrad, and where it is not 1x1 they have no prologue."""
    return kind.operator == "conv_dgrad" and name not in ("1x1", "several tiles")


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_tile(emulated: Any, kind: Kind, arithmetic: str) -> None:
    """Each tile with each number of splits is right, and moves exactly what it must."""
    dtype, tf32 = ARITHMETICS[arithmetic]
    for i, (name, conv) in enumerate(RAGGED.items()):
        if not is_for(kind, conv):
            continue
        if every_second_kind_will_do(kind, name) and (i + KINDS.index(kind)) % 2 == 0:
            continue
        tensors = given(kind, conv, dtype)
        exact = eager(kind, conv, in_double(tensors))
        with products_in_tf32(tf32):
            plain = eager(kind, conv, tensors)
        for index, tile in enumerate(tiles_of(kind, conv, dtype, tf32)):
            # Of each convolution one number of splits, each with every tile.
            splits = SPLITS[(index + i) % len(SPLITS)]
            title = f"{name} in tile {index}, {splits} splits"
            launches(emulated)
            results = run(emulated, kind, conv, tensors, tf32, index, splits)
            records = [r for r in launches(emulated) if r["kernel"].startswith("conv_")]
            for output, actual in results.items():
                assert actual.dtype == plain[output].dtype, title
                of_title = f"{output} of {title}"
                assert_as_accurate_as_eager(actual, plain[output], exact[output], of_title)
            for record in records:
                assert record["grid"][1] == splits, title
                assert record["block"] == [tile.threads, 1, 1], title
            if len(records) == 1:  # else there are more phases than a launch has
                traffic = traffic_of(kind, conv, ARITHMETICS[arithmetic], tile, splits)
                assert moved(records[0]) == vars(traffic), title


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("name", ["1x1", "3x3", "grouped"])
def test_shares_of_the_weight_are_added_in_one_pass(emulated: Any, name: str, splits: int) -> None:
    kind, conv = Kind("conv_wgrad", "identity"), RAGGED[name]
    tensors = given(kind, conv, torch.bfloat16)
    launches(emulated)
    run(emulated, kind, conv, tensors, False, 0, splits)
    record = launches(emulated)[-1]
    assert record["kernel"].startswith("sum_shares_kernel")
    share = conv.kernels * conv.kernel**2 * round_up(conv.weight[1], 8) * 4
    weight = tensors["weight"].numel()
    assert record["bytes_read"] == record["distinct_bytes_read"] == splits * share
    assert record["bytes_written"] == record["distinct_bytes_written"] == 2 * weight
    assert record["accesses"] == {"2": weight, "16": splits * share // 16}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_these_are_all_tiles(emulated: Any, kind: Kind, arithmetic: str) -> None:
    dtype, tf32 = ARITHMETICS[arithmetic]
    conv = RAGGED["1x1"]
    count = len(tiles_of(kind, conv, dtype))
    with pytest.raises(
        RuntimeError, match=f"^{kind.operator}: tile must be less than {count}, got {count}$"
    ):
        run(emulated, kind, conv, given(kind, conv, dtype), tf32, count)


def in_double(tensors: Tensors) -> Tensors:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


# Kernel, stride and channels of ResNets' layers, mostly with smaller images.
LAYERS = {
    "stem": Conv((1, 3, 32, 32), 64, 7, stride=(2, 2), padding=(3, 3)),
    "layer1 3x3": Conv((1, 64, 14, 14), 64),
    "layer1 reduce": Conv((1, 256, 7, 7), 64, 1, padding=(0, 0)),
    "layer1 expand": Conv((1, 64, 14, 14), 256, 1, padding=(0, 0)),
    "layer2 strided": Conv((1, 128, 14, 14), 128, stride=(2, 2)),
    "layer2 projection": Conv((2, 256, 8, 8), 512, 1, stride=(2, 2), padding=(0, 0)),
    "layer3 reduce": Conv((2, 1024, 7, 7), 256, 1, padding=(0, 0)),
    "layer4 expand": Conv((1, 512, 7, 7), 2048, 1, padding=(0, 0)),
    "layer3 3x3": Conv((1, 256, 5, 5), 256),
    "32 groups": Conv((1, 128, 7, 7), 128, groups=32),
    "32 groups of layer4": Conv((1, 1024, 3, 3), 1024, groups=32),
    "depthwise": Conv((1, 96, 7, 7), 96, groups=96),
}
OF_LAYERS = [
    *(Kind("conv_bn_relu", "residual"), Kind("conv_projection_relu", "projection")),
    *(Kind("conv_stats", "identity"), Kind("conv_stats", "prologue")),
    *(Kind("conv_dgrad", "all"), Kind("conv_dgrad", "all with mask")),
    *(Kind("conv_wgrad", "identity"), Kind("conv_wgrad", "prologue")),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for kind in OF_LAYERS for name, conv in LAYERS.items() if is_for(kind, conv)],
    ids=str,
)
def test_layers(emulated: Any, name: str, kind: Kind) -> None:
    """With the tile and the splits that launchers choose on a large device."""
    conv, dtype = LAYERS[name], torch.bfloat16
    emulated.configure(0, 132)
    tensors = given(kind, conv, dtype)
    plain = eager(kind, conv, tensors)
    exact = eager(kind, conv, in_double(tensors))
    results = run(emulated, kind, conv, tensors, tf32=False)
    for output, actual in results.items():
        assert_as_accurate_as_eager(actual, plain[output], exact[output], output)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tensors_that_begin_between_vectors(emulated: Any, kind: Kind, arithmetic: str) -> None:
    (dtype, tf32), conv = ARITHMETICS[arithmetic], RAGGED["1x1"]
    tensors = given(kind, conv, dtype)
    shifted = {name: behind_one_element(t) for name, t in tensors.items()}
    plain, exact = eager(kind, conv, tensors), eager(kind, conv, in_double(tensors))
    results = run(emulated, kind, conv, shifted, tf32)
    for output, actual in results.items():
        assert_as_accurate_as_eager(actual, plain[output], exact[output], output)


def behind_one_element(tensor: Tensor) -> Tensor:
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


STATS = Kind("conv_stats", "identity")


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_statistics_far_from_zero(emulated: Any, arithmetic: str) -> None:
    """Mean and sum of squares keep their digits, also in a tile of one row."""
    dtype, tf32 = ARITHMETICS[arithmetic]
    conv = Conv((1, 144, 3, 43), 72, 1, padding=(0, 0))
    tensors = given(STATS, conv, dtype)
    weight = tensors["weight"].double().abs()
    tensors["weight"] = (weight / weight.sum(1, keepdim=True)).to(dtype)
    tensors["x"] = (tensors["x"].double() + 1e3).to(dtype)
    exact = eager(STATS, conv, in_double(tensors))
    assert (exact["mean"] > 950).all()
    with products_in_tf32(tf32):
        plain = eager(STATS, conv, tensors)
    for tile in range(len(tiles_of(STATS, conv, dtype))):
        for splits in SPLITS:
            results = run(emulated, STATS, conv, tensors, tf32, tile, splits)
            for output, actual in results.items():
                assert_as_accurate_as_eager(actual, plain[output], exact[output], output)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_statistics_of_one_row(emulated: Any, arithmetic: str) -> None:
    dtype, tf32 = ARITHMETICS[arithmetic]
    conv = Conv((1, 72, 1, 1), 88, 1, padding=(0, 0))
    tensors = given(STATS, conv, dtype)
    for tile in range(len(tiles_of(STATS, conv, dtype))):
        y, mean, m2 = run(emulated, STATS, conv, tensors, tf32, tile, 2).values()
        assert torch.equal(mean.to(dtype), y.flatten())
        assert torch.equal(m2, torch.zeros_like(mean))


@pytest.mark.parametrize(
    "kind", [Kind("conv_stats", "identity"), Kind("conv_dgrad", "sums")], ids=str
)
def test_partial_results_of_many_tiles(emulated: Any, kind: Kind) -> None:
    """So many that several blocks combine those of a channel, and the last of them the rest."""
    conv, dtype = Conv((1, 40, 160, 121), 40, 1, padding=(0, 0)), torch.bfloat16
    tensors = given(kind, conv, dtype)
    plain = eager(kind, conv, tensors)
    exact = eager(kind, conv, in_double(tensors))
    launches(emulated)
    results = run(emulated, kind, conv, tensors, tf32=False, tile=2, splits=1)
    product, combination = launches(emulated)
    tiles = product["grid"][0]
    assert combination["kernel"].startswith("combine_partials_kernel")
    assert tiles > 256
    assert combination["grid"][1] == 2
    # Of each channel: two values of each tile, and those of the two blocks, with counts or without.
    values = 3 if kind.operator == "conv_stats" else 2
    assert combination["bytes_read"] == (2 * tiles + 2 * values) * 40 * 4
    for output, actual in results.items():
        assert_as_accurate_as_eager(actual, plain[output], exact[output], output)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("kind", OF_LAYERS, ids=str)
def test_results_do_not_depend_on_the_order_of_blocks(
    emulated: Any, kind: Kind, splits: int
) -> None:
    name = "strided 1x1" if kind.operator == "conv_projection_relu" else "strided"
    for conv in (RAGGED["1x1"], RAGGED[name]):
        for dtype in (torch.bfloat16, torch.float32):
            tensors = given(kind, conv, dtype)
            expected: Tensors | None = None
            for seed in range(8):
                emulated.configure(1000 * seed, (1, 3, 5, 132)[seed % 4])
                results = run(emulated, kind, conv, tensors, False, 1, splits)
                expected = expected or results
                assert all(torch.equal(results[n], expected[n]) for n in expected), seed


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_infinity_and_the_largest_numbers_are_as_in_eager(emulated: Any, arithmetic: str) -> None:
    """Products of parts of a float32 must not make NaN of them, nor infinity of a finite number."""
    dtype, tf32 = ARITHMETICS[arithmetic]
    conv = Conv((1, 16, 6, 5), 24)
    x = normal(conv.x, 0).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (normal(conv.weight, 1) / 100).to(dtype).contiguous(memory_format=torch.channels_last)
    weight[:, :, 1, 1] = weight[:, :, 1, 1].bfloat16().to(dtype)  # nothing is left of a rest
    # The largest float32 is infinite in TF32.
    largest = torch.finfo(dtype).max * (0.99 if tf32 else 1)
    x[0, 3, 2, 2], x[0, 5, 5, 4] = float("inf"), largest
    vectors = torch.full((24,), 0.5), torch.zeros(24)
    geometry = [1, 1, 1, 1, 1, 1, 1]
    out = emulated.conv_bn_relu(x, weight, *vectors, None, False, geometry, tf32, -1, 0)
    expected = torch.conv2d(x.double(), weight.double(), padding=1) * 0.5
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out == float("inf"), expected == float("inf"))
    assert torch.equal(out == -float("inf"), expected == -float("inf"))


# ---- Bytes ----


@dataclass
class Traffic:
    """What a launch moves, as the emulator counts it."""

    bytes_read: int = 0
    bytes_written: int = 0
    distinct_bytes_read: int = 0
    distinct_bytes_written: int = 0
    accesses: dict[str, int] = field(default_factory=dict)
    products: int = 0

    def read(self, width: int, issued: int, distinct: int) -> None:
        """`issued` bytes in accesses of so many, of which `distinct` are different ones."""
        self.bytes_read += issued
        self.distinct_bytes_read += distinct
        self._count(width, issued)

    def write(self, width: int, once: int) -> None:
        self.bytes_written += once
        self.distinct_bytes_written += once
        self._count(width, once)

    def _count(self, width: int, issued: int) -> None:
        if issued > 0:
            self.accesses[str(width)] = self.accesses.get(str(width), 0) + issued // width


class Reached(NamedTuple):
    """Pairs of an output pixel and a tap that meets an input pixel, and the pixels in any pair."""

    pairs: int
    inputs: int
    outputs: int

    @staticmethod
    def by(conv: Conv) -> Reached:
        image = torch.ones(1, 1, *conv.x[2:], requires_grad=True)
        stride, padding, dilation, _ = conv.geometry
        kernel = torch.ones(1, 1, conv.kernel, conv.kernel)
        taps = F.conv2d(image, kernel, None, stride, padding, dilation)
        (used,) = torch.autograd.grad(taps.sum(), image)
        counts = taps.sum(), (used > 0).sum(), (taps > 0).sum()
        return Reached(*(conv.x[0] * int(count) for count in counts))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


class Sides(NamedTuple):
    """Channels and kernels of a group as the kernels see them: small groups are one."""

    groups: int
    channels: int
    kernels: int

    @staticmethod
    def of(conv: Conv) -> Sides:
        groups = conv.groups if conv.x[1] // conv.groups >= 64 else 1
        return Sides(groups, conv.x[1] // groups, conv.kernels // groups)


def joins_rows(conv: Conv, arithmetic: Arithmetic) -> bool:
    """Whether the forward takes a row of taps as one tap with the channels of all its pixels."""
    padded = round_up(conv.x[1], arithmetic.chunk)
    return conv.kernel > 1 and conv.groups == 1 and 2 * padded <= arithmetic.step


def add_products(traffic: Traffic, steps: int, arithmetic: Arithmetic, tile: Tile) -> None:
    """Of so many steps of blocks, each 64 bytes deep; one instruction takes 32 bytes."""
    parts = 4 if arithmetic == ARITHMETICS["float32"] else 1
    traffic.products += steps * 2 * (tile.m // 16) * (tile.n // 8) * parts


def add_split_sums(traffic: Traffic, blocks: int, tile: Tile, splits: int) -> None:
    """Every part of a sum is written, and read by the last block."""
    if splits > 1:
        sums = blocks * splits * tile.m * tile.n * 4
        traffic.write(16, sums)
        traffic.read(16, sums, sums)


def add_forward_operands(traffic: Traffic, conv: Conv, arithmetic: Arithmetic, tile: Tile) -> None:
    """The source for every tile of columns; the weight for every tile of rows, in whole tiles."""
    size, chunk = arithmetic.dtype.itemsize, arithmetic.chunk
    groups, channels, kernels = Sides.of(conv)
    run = round_up(channels, chunk) * size
    if joins_rows(conv, arithmetic):
        # Of an x that lies between zeros.
        n, c, h, w = conv.x
        wide = (n, c, h, w + 2 * conv.padding[1])
        reached = Reached.by(conv._replace(x=wide, padding=(conv.padding[0], 0)))
        steps_of_image = conv.kernel * ceil_div(conv.kernel * run, 64)
    else:
        reached = Reached.by(conv)
        steps_of_image = conv.kernel**2 * ceil_div(channels * size, 64)
    row_tiles = ceil_div(conv.out[0] * conv.out[2] * conv.out[3], tile.m)
    column_tiles = ceil_div(kernels, tile.n)
    traffic.read(16, column_tiles * reached.pairs * groups * run, reached.inputs * groups * run)
    columns = column_tiles * tile.n
    taps = conv.kernel**2
    traffic.read(16, row_tiles * columns * groups * taps * run, kernels * groups * taps * run)
    add_products(traffic, row_tiles * column_tiles * groups * steps_of_image, arithmetic, tile)


def forward_traffic(
    kind: Kind, conv: Conv, arithmetic: Arithmetic, tile: Tile, splits: int
) -> Traffic:
    traffic = Traffic()
    size, chunk = arithmetic.dtype.itemsize, arithmetic.chunk
    groups, channels, kernels = Sides.of(conv)
    n, _, p, q = conv.out
    row_tiles, column_tiles = ceil_div(n * p * q, tile.m), ceil_div(kernels, tile.n)
    add_forward_operands(traffic, conv, arithmetic, tile)
    if kind.operator == "conv_projection_relu":
        own = Conv((n, PROJECTED_CHANNELS, p, q), kernels, 1, padding=(0, 0))
        add_forward_operands(traffic, own, arithmetic, tile)
    if fuses(kind, conv, arithmetic.dtype):
        # For every chunk that a thread transforms: scale and shift.
        chunks = row_tiles * column_tiles * tile.threads // 4 * ceil_div(channels, chunk)
        traffic.read(16, chunks * 2 * chunk * 4, 2 * channels * 4)
    add_split_sums(traffic, row_tiles * column_tiles * groups, tile, splits)
    result = n * p * q * conv.kernels * size
    width = 16 if kernels % chunk == 0 else size
    if kind.operator == "conv_stats":
        traffic.write(4, 2 * row_tiles * conv.kernels * 4)
    else:
        add_vectors(traffic, row_tiles, conv.kernels, tile, 2)
        if kind.variant in ("residual", "no relu"):
            traffic.read(width, result, result)
    traffic.write(width, result)
    return traffic


def add_vectors(traffic: Traffic, row_tiles: int, channels: int, tile: Tile, vectors: int) -> None:
    """Every thread reads those of its columns, which 8 lanes of each warp above others share."""
    once = vectors * channels * 4
    traffic.read(4, row_tiles * tile.warps_m * 8 * once, once)


def gradient_phases(conv: Conv) -> list[tuple[int, int]]:
    """Pixels and taps of each: pixels of x at the same place between two steps."""
    axes = []
    for size, stride, padding, dilation in zip(
        conv.x[2:], conv.stride, conv.padding, conv.dilation, strict=True
    ):
        reach = [
            sum((i + padding - tap * dilation) % stride == 0 for tap in range(conv.kernel))
            for i in range(min(stride, size))
        ]
        axes.append([(ceil_div(size - i, stride), taps) for i, taps in enumerate(reach)])
    n = conv.x[0]
    return [(n * h * w, rows * columns) for h, rows in axes[0] for w, columns in axes[1]]


def dgrad_traffic(
    kind: Kind, conv: Conv, arithmetic: Arithmetic, tile: Tile, splits: int
) -> Traffic:
    traffic = Traffic()
    size, chunk = arithmetic.dtype.itemsize, arithmetic.chunk
    groups, channels, kernels = Sides.of(conv)
    n, c, h, w = conv.x
    parts = test_conv_dgrad.PARTS[kind.variant]
    phases = gradient_phases(conv)
    row_tiles = [ceil_div(pixels, tile.m) for pixels, _ in phases]
    column_tiles = ceil_div(channels, tile.n)
    run = round_up(kernels, chunk) * size
    reached = Reached.by(conv)
    # grad_y for every tile of columns; and y, where the batch norm's backward is part of it.
    fused = fuses(kind, conv, arithmetic.dtype)
    sources = 2 if fused else 1
    traffic.read(
        16,
        sources * column_tiles * reached.pairs * groups * run,
        sources * reached.outputs * groups * run,
    )
    # The weight for every tile of rows: only what is there.
    of_tap = groups * kernels * round_up(channels, chunk) * size
    reads = sum(tiles * taps for tiles, (_, taps) in zip(row_tiles, phases, strict=True))
    traffic.read(16, reads * of_tap, sum(taps for _, taps in phases) * of_tap)
    steps = reads * ceil_div(kernels * size, 64)
    add_products(traffic, steps * column_tiles * groups, arithmetic, tile)
    # All phases have as many blocks as the largest.
    launched = max(row_tiles) * len(phases)
    if fused:
        chunks = row_tiles[0] * column_tiles * tile.threads // 4 * ceil_div(kernels, chunk)
        traffic.read(16, chunks * 3 * chunk * 4, 3 * kernels * 4)
        traffic.write(16, n * h * w * kernels * size)
    add_split_sums(traffic, launched * column_tiles * groups, tile, splits)
    result = n * h * w * c * size
    width = 16 if channels % chunk == 0 else size
    alike = result * len({"residual", "x"}.intersection(parts))
    traffic.read(width, alike, alike)
    if "mask" in parts:
        # One byte for each pair of a thread's columns.
        traffic.read(1, n * h * w * ceil_div(c, 2), n * h * w * ceil_div(c, 8))
    add_vectors(traffic, launched, c, tile, len({"scale", "shift", "mean"}.intersection(parts)))
    if "mean" in parts:
        traffic.write(4, 2 * launched * c * 4)
    traffic.write(width, result)
    return traffic


def wgrad_traffic(
    kind: Kind, conv: Conv, arithmetic: Arithmetic, tile: Tile, splits: int
) -> Traffic:
    traffic = Traffic()
    size, chunk = arithmetic.dtype.itemsize, arithmetic.chunk
    groups, channels, kernels = Sides.of(conv)
    n, _, p, q = conv.out
    taps, run = conv.kernel**2, round_up(channels, chunk)
    row_tiles = ceil_div(kernels, tile.m)
    column_tiles = ceil_div(taps * run, tile.n)
    reached = Reached.by(conv)
    # grad_y for every tile of columns, x for every tile of rows.
    grad = n * p * q * groups * round_up(kernels, chunk) * size
    traffic.read(16, column_tiles * grad, grad)
    of_pixel = groups * run * size
    traffic.read(16, row_tiles * reached.pairs * of_pixel, reached.inputs * of_pixel)
    blocks = row_tiles * column_tiles * groups
    steps = ceil_div(n * p * q, arithmetic.step)
    if fuses(kind, conv, arithmetic.dtype):
        # By every thread once.
        scale_and_shift = 2 * chunk * 4
        traffic.read(16, blocks * splits * tile.threads * scale_and_shift, 2 * conv.x[1] * 4)
    traffic.write(8, splits * groups * kernels * taps * run * 4)
    add_products(traffic, blocks * steps, arithmetic, tile)
    return traffic


def traffic_of(kind: Kind, conv: Conv, arithmetic: Arithmetic, tile: Tile, splits: int) -> Traffic:
    of_operator = {"conv_dgrad": dgrad_traffic, "conv_wgrad": wgrad_traffic}
    function = of_operator.get(kind.operator, forward_traffic)
    return function(kind, conv, arithmetic, tile, splits)


def moved(record: dict[str, Any]) -> dict[str, Any]:
    """Of a launch, what Traffic has."""
    return {name: record[name] for name in vars(Traffic())}


# ---- Messages of the launchers, which the library's own checks leave nothing to say ----

Change = Callable[[Tensors], Tensors]


class Bad(NamedTuple):
    """A call of an operator with one argument that it refuses."""

    kind: Kind
    message: str  # behind the operator's name
    change: Change = dict
    conv: Conv = RAGGED["1x1"]
    dtype: torch.dtype = torch.bfloat16
    geometry: tuple[int, ...] | None = None


def replaced(name: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    return lambda tensors: tensors | {name: change(tensors[name])}


FORWARD, IN_PLACE = Kind("conv_bn_relu", "residual"), Kind("conv_bn_relu_", "residual")
PROJECTION, PROLOGUE = Kind("conv_projection_relu", "projection"), Kind("conv_stats", "prologue")
DGRAD, DGRAD_MASK = Kind("conv_dgrad", "all"), Kind("conv_dgrad", "all with mask")
WGRAD = Kind("conv_wgrad", "prologue")
EMPTY = Conv((0, 72, 5, 7), 88, 1, padding=(0, 0))

BAD = {
    "float64": Bad(
        STATS, "x must be float32, float16 or bfloat16, got Double", dtype=torch.float64
    ),
    "dimensions": Bad(
        FORWARD,
        r"x must be a 4-d tensor \(N, C, H, W\), got shape \(72, 5, 7\)",
        replaced("x", lambda x: x[0]),
    ),
    "gaps": Bad(
        FORWARD,
        "x must be a 4-d tensor, contiguous or channels_last, got shape",
        replaced("x", lambda x: x[:, ::2]),
    ),
    "NCHW": Bad(
        FORWARD,
        r"activations must be channels_last, got strides \(2520, 35, 7, 1\)",
        replaced("x", lambda x: x.contiguous()),
    ),
    "NCHW gradient": Bad(
        WGRAD,
        "activations must be channels_last, got strides",
        replaced("grad_y", lambda grad: grad.contiguous()),
    ),
    "scale in another dtype": Bad(
        FORWARD,
        r"scale must have 88 values in float32, side by side, got shape \(88\) of Double",
        replaced("scale", lambda scale: scale.double()),
    ),
    "scale with gaps": Bad(
        FORWARD,
        r"scale must have 88 values in float32, side by side, got shape \(88\) of Float",
        replaced("scale", lambda scale: scale.repeat_interleave(2)[::2]),
    ),
    "shift too short": Bad(
        IN_PLACE,
        r"shift must have 88 values in float32, side by side, got shape \(87\)",
        replaced("shift", lambda shift: shift[1:]),
    ),
    "residual's shape": Bad(
        FORWARD,
        r"residual must have the shape of the output \(2, 88, 5, 7\), got \(1, 88, 5, 7\)",
        replaced("residual", lambda residual: residual[:1]),
    ),
    "residual's dtype": Bad(
        FORWARD,
        "residual must have the dtype of the output BFloat16, got Float",
        replaced("residual", lambda residual: residual.float()),
    ),
    "residual's strides": Bad(
        FORWARD,
        "residual must have the strides of the output",
        replaced("residual", lambda residual: residual.contiguous()),
    ),
    "residual in place": Bad(
        IN_PLACE,
        r"residual must be channels_last, have the dtype of x and shape \(2, 88, 5, 7\), got",
        replaced("residual", lambda residual: residual.contiguous()),
    ),
    "channels": Bad(
        FORWARD,
        "weight must have C / groups = 72 input channels, got 71",
        replaced("weight", lambda weight: weight[:, 1:]),
    ),
    "weight": Bad(
        FORWARD,
        r"weight must be \(K, C / groups, R, S\), got shape \(88, 72, 1\)",
        replaced("weight", lambda weight: weight[..., 0]),
    ),
    "too many taps": Bad(
        FORWARD,
        r"weight must be at most 15 x 15 for the cuda backend, got 16 x 16 \(choose another",
        conv=Conv((1, 8, 16, 16), 8, 16, padding=(0, 0)),
    ),
    "geometry": Bad(
        FORWARD,
        "geometry must have 7 numbers: stride, padding, dilation and groups, got 6",
        geometry=(1, 1, 0, 0, 1, 1),
    ),
    "stride": Bad(
        FORWARD,
        r"stride, dilation and groups must be at least 1, got \(1, 0, 0, 0, 1, 1, 1\)",
        geometry=(1, 0, 0, 0, 1, 1, 1),
    ),
    "padding": Bad(
        FORWARD, r"padding must not be negative, got \(0, -1\)", geometry=(1, 1, 0, -1, 1, 1, 1)
    ),
    "groups": Bad(
        FORWARD,
        r"groups must divide the kernels of weight \(88\), got 3",
        geometry=(1, 1, 0, 0, 1, 1, 3),
    ),
    "kernel": Bad(
        FORWARD,
        "x must be at least as large as the kernel, got 6 x 7",
        conv=RAGGED["3x3"],
        geometry=(1, 1, 0, 0, 3, 1, 1),
    ),
    "projection's dtype": Bad(
        PROJECTION,
        "x must have the dtype of y BFloat16, got Float",
        replaced("x", lambda x: x.float()),
    ),
    "projection's taps": Bad(
        PROJECTION,
        r"weight and projection_weight must be 1x1, got \(88, 40, 1, 1\) and \(88, 72, 3, 3\)",
        replaced("projection_weight", lambda weight: weight.repeat(1, 1, 3, 3)),
    ),
    "projection's pixels": Bad(
        PROJECTION,
        r"the projection must have the output's shape \(2, 88, 5, 6\), got \(2, 88, 5, 7\)",
        replaced("y", lambda y: y[..., :6].clone(memory_format=torch.channels_last)),
    ),
    "projection's stride": Bad(
        PROJECTION, r"stride must be two numbers, got \(1, 1, 1\)", geometry=(1, 1, 1)
    ),
    "projection's scale": Bad(
        PROJECTION,
        "projection_scale must have 88 values in float32",
        replaced("projection_scale", lambda scale: scale[1:]),
    ),
    "shift without scale": Bad(
        PROLOGUE,
        "scale and shift must be given together",
        replaced("scale", lambda _: None),
    ),
    "no pixels": Bad(PROLOGUE, r"y must not be empty, got shape \(0, 88, 5, 7\)", conv=EMPTY),
    "prologue's scale": Bad(
        PROLOGUE,
        "scale must have 72 values in float32, side by side",
        replaced("scale", lambda scale: scale[1:]),
    ),
    "gradient's shape": Bad(
        DGRAD,
        r"grad_y must have the shape of the convolution's output \(1, 88, 5, 7\), got"
        r" \(1, 87, 5, 7\)",
        replaced("grad_y", lambda grad: grad[:1, 1:].clone(memory_format=torch.channels_last)),
    ),
    "no gradient": Bad(DGRAD, r"grad_x must not be empty, got shape \(0, 72, 5, 7\)", conv=EMPTY),
    "coefficients": Bad(
        DGRAD,
        r"coefficients must have 264 values in float32, side by side, got shape \(2, 88\)",
        replaced("coefficients", lambda coefficients: coefficients[1:]),
    ),
    "coefficients without y": Bad(
        DGRAD,
        "y and coefficients must be given together",
        replaced("y", lambda _: None),
    ),
    "y": Bad(
        DGRAD,
        "y must have the shape of grad_y",
        replaced("y", lambda y: y[:1]),
    ),
    "x": Bad(
        DGRAD,
        r"x must have the shape of grad_x \(2, 72, 5, 7\), got",
        replaced("x", lambda x: x[:1]),
    ),
    "no x": Bad(
        DGRAD,
        "x must be given with scale and mean, got None",
        replaced("x", lambda _: None),
    ),
    "scale without shift": Bad(
        DGRAD,
        "scale and shift must be given together",
        replaced("shift", lambda _: None),
    ),
    "mean": Bad(
        DGRAD,
        "scale, shift and mean must have 72 values in float32",
        replaced("mean", lambda mean: mean[1:]),
    ),
    "mask's shape": Bad(
        DGRAD_MASK,
        r"mask must be contiguous, uint8 and of shape \(70, 9\), got \(69, 9\) of Byte",
        replaced("mask", lambda mask: mask[1:]),
    ),
    "mask's dtype": Bad(
        DGRAD_MASK,
        r"mask must be contiguous, uint8 and of shape \(70, 9\), got \(70, 9\) of Bool",
        replaced("mask", lambda mask: mask.bool()),
    ),
    "dtypes of a weight's gradient": Bad(
        WGRAD, "grad_y must have the dtype of x", replaced("grad_y", lambda grad: grad.float())
    ),
    "no pixels for a weight's gradient": Bad(
        WGRAD, r"grad_y must not be empty, got shape \(0, 88, 5, 7\)", conv=EMPTY
    ),
    "scale of a weight's gradient": Bad(
        WGRAD,
        "scale must have 72 values in float32, side by side",
        replaced("scale", lambda scale: scale[1:]),
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(emulated: Any, bad: str) -> None:
    kind, message, change, conv, dtype, geometry = BAD[bad]
    tensors = change(given(kind, conv, dtype))
    with pytest.raises(RuntimeError, match=f"^{kind.operator}: {message}"):
        run(emulated, kind, conv, tensors, False, geometry=geometry)


def test_input_size(emulated: Any) -> None:
    conv = RAGGED["1x1"]._replace(x=(2, 72, 5))
    tensors = given(DGRAD, RAGGED["1x1"], torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^conv_dgrad: input_size must be \(H, W\), got \(5\)$"):
        run(emulated, DGRAD, conv, tensors, False)


def test_an_image_too_large(emulated: Any) -> None:
    """Of memory that nobody touches."""
    x = torch.empty(1, 1, 1 << 16, 1 << 15, dtype=torch.bfloat16)
    x = x.as_strided(x.shape, (x.numel(), 1, 1 << 15, 1))
    weight, one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1)
    message = r"conv_bn_relu: x must have less than 2\^31 pixels, got 2147483648 \(choose another"
    with pytest.raises(RuntimeError, match=f"^{message}"):
        emulated.conv_bn_relu(x, weight, one, one, None, True, [1, 1, 0, 0, 1, 1, 1], False, -1, 0)
