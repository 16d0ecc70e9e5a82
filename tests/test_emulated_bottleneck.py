"""The kernels of whole bottlenecks in the emulator: results, bytes, order of blocks, races."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulation
import pytest
import torch
from numerics import assert_as_accurate_as_eager, normal
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import cuda_chains

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

DTYPES = (torch.bfloat16, torch.float16)
# Layers of ResNet-50; batches whose images are no multiple of a step, one pixel, one row, one
# column, ragged rows. (N, H, W) by channels of the 3x3 convolution.
IMAGES = {
    64: ((1, 56, 56), (3, 14, 14), (5, 7, 7), (2, 5, 9), (1, 1, 1), (130, 1, 1), (2, 13, 30)),
    128: ((1, 28, 28), (7, 7, 7), (1, 1, 1), (3, 1, 40), (1, 13, 30)),
    256: ((1, 14, 14), (3, 7, 7), (1, 40, 1), (2, 5, 9)),
}
MIDDLE = {
    "bottleneck_tail": (64, 128, 256),
    "bottleneck_roll": (64, 128),
    "bottleneck_block": (64,),
}
# Pixels of a step, where the batch has enough for all multiprocessors; else SMALL_STEP.
PIXELS = {
    ("bottleneck_tail", 64): 128,
    ("bottleneck_tail", 128): 256,
    ("bottleneck_tail", 256): 128,
    ("bottleneck_roll", 64): 128,
    ("bottleneck_roll", 128): 128,
    ("bottleneck_block", 64): 128,
}
SMALL_STEP = 64
FEW, MANY = 2, 132  # multiprocessors


def step_pixels(operator: str, middle: int, pixels: int, multiprocessors: int) -> int:
    step = PIXELS[operator, middle]
    is_large = operator == "bottleneck_block" or -(-pixels // step) >= multiprocessors
    return step if is_large else SMALL_STEP


def resident_blocks(operator: str, middle: int, step: int) -> int:
    """Of which the grid has so many for each multiprocessor."""
    return 2 if middle == 64 or step == SMALL_STEP else 1


class Folded(NamedTuple):
    """A convolution and its folded batch norm."""

    weight: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def draw(columns: int, summed: int, side: int, seed: int, dtype: torch.dtype) -> Folded:
        """Sums have variance 1, and half of what comes out of a ReLU is 0."""
        weight = normal((columns, summed, side, side), seed) * (summed * side * side / 2) ** -0.5
        scale = normal((columns,), seed + 1).abs() + 0.5
        return Folded(weight.to(dtype), scale.float(), normal((columns,), seed + 2).float())

    def apply(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(conv(x, weight) * scale + shift + residual), each of them rounded as by eager."""
        vector = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        scale, shift = (t.to(vector).view(1, -1, 1, 1) for t in (self.scale, self.shift))
        y = (y.to(vector) * scale + shift).to(x.dtype)
        return torch.relu(y if residual is None else y + residual)


class Given(NamedTuple):
    """Arguments of one call."""

    y1: Tensor
    residual: Tensor  # or x
    conv2: Folded
    conv3: Folded
    conv1: Folded  # of this block, or of the next one

    @staticmethod
    def draw(middle: int, images: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Given:
        n, h, w = images
        wide = 4 * middle
        return Given(
            channels_last(normal((n, middle, h, w), seed).relu().to(dtype)),
            channels_last(normal((n, wide, h, w), seed + 1).to(dtype)),
            Folded.draw(middle, middle, 3, seed + 2, dtype),
            Folded.draw(wide, middle, 1, seed + 5, dtype),
            Folded.draw(middle, wide, 1, seed + 8, dtype),
        )

    def call(self, ops: Any, operator: str) -> tuple[Tensor, ...]:
        tail = (*self.conv2, *self.conv3)
        if operator == "bottleneck_tail":
            return (ops.bottleneck_tail(self.y1, self.residual, *tail),)
        if operator == "bottleneck_block":
            return (ops.bottleneck_block(self.residual, *self.conv1, *tail),)
        results: tuple[Tensor, ...] = ops.bottleneck_roll(
            self.y1, self.residual, *tail, *self.conv1
        )
        return results

    def compute(self, operator: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same with one operator of torch after the other."""
        residual = self.residual.to(dtype)
        begins_at_x = operator == "bottleneck_block"
        y1 = self.conv1.apply(residual) if begins_at_x else self.y1.to(dtype)
        out = self.conv3.apply(self.conv2.apply(y1), residual)
        return (out, self.conv1.apply(out)) if operator == "bottleneck_roll" else (out,)

    def inputs(self, operator: str) -> tuple[Tensor, ...]:
        return (self.residual,) if operator == "bottleneck_block" else (self.y1, self.residual)

    def convolutions(self, operator: str) -> list[Folded]:
        return [self.conv2, self.conv3, *([] if operator == "bottleneck_tail" else [self.conv1])]


def channels_last(x: Tensor) -> Tensor:
    # Not .contiguous(), which leaves 1x1 images as they are.
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def cases() -> list[Any]:
    return [
        pytest.param(operator, middle, id=f"{operator}-{middle}")
        for operator, channels in MIDDLE.items()
        for middle in channels
    ]


@pytest.fixture
def emulated() -> Iterator[Any]:
    ops = emulation.library()
    ops.configure(0, 3)
    emulation.launches(ops)
    yield ops
    ops.configure(0, 3)


def launches(ops: Any) -> list[dict[str, Any]]:
    """Those since the last call: of a kernel that packs, and of the kernel itself, in turn."""
    records = emulation.launches(ops)
    kernels = [record["kernel"].partition("<")[0] for record in records]
    assert kernels == ["pack_chain_kernel", "bottleneck_kernel"] * (len(records) // 2)
    return records[1::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "middle"), cases())
def test_results(emulated: Any, operator: str, middle: int, dtype: torch.dtype) -> None:
    # Large and small steps in turn, for each image and in each dtype.
    turns = itertools.cycle((1, MANY) if dtype == torch.bfloat16 else (MANY, 1))
    for images, multiprocessors in zip(IMAGES[middle], turns, strict=False):
        given = Given.draw(middle, images, dtype)
        emulated.configure(0, multiprocessors)
        results = given.call(emulated, operator)
        eager, exact = (given.compute(operator, d) for d in (dtype, torch.float64))
        for result, plain, right in zip(results, eager, exact, strict=True):
            assert result.is_contiguous(memory_format=torch.channels_last)
            assert result.dtype == dtype
            assert_as_accurate_as_eager(result, plain, right, f"{images}")
        assert [launch["bank_conflicts"] for launch in launches(emulated)] == [0]


@pytest.mark.parametrize(("operator", "middle"), cases())
def test_order_and_number_of_blocks_change_nothing(
    emulated: Any, operator: str, middle: int
) -> None:
    """Nor does the size of a step."""
    given = Given.draw(middle, (3, 12, 13), torch.bfloat16)
    pixels = 3 * 12 * 13
    expected: tuple[Tensor, ...] = ()
    for seed, multiprocessors in enumerate((1, FEW, 3, MANY)):
        emulated.configure(seed, multiprocessors)
        results = given.call(emulated, operator)
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        step = step_pixels(operator, middle, pixels, multiprocessors)
        most = resident_blocks(operator, middle, step) * multiprocessors
        (launch,) = launches(emulated)
        assert launch["grid"] == [min(-(-pixels // step), most), 1, 1]


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize(("operator", "middle"), cases())
def test_every_byte_moves_once(
    emulated: Any, operator: str, middle: int, multiprocessors: int
) -> None:
    """But for weights, in every step, and the rows of y1 that neighbouring parts share."""
    n, h, w = {64: (1, 56, 56), 128: (2, 28, 28), 256: (2, 14, 14)}[middle]
    given = Given.draw(middle, (n, h, w), torch.bfloat16)
    emulated.configure(0, multiprocessors)
    results = given.call(emulated, operator)
    (launch,) = launches(emulated)
    activations = [*given.inputs(operator), *results]
    convolutions = given.convolutions(operator)
    coefficients = sum(c.scale.nbytes + c.shift.nbytes for c in convolutions)
    weights = sum(c.weight.nbytes for c in convolutions)
    inputs = sum(t.nbytes for t in given.inputs(operator))
    written = sum(t.nbytes for t in results)
    assert launch["distinct_bytes_read"] == inputs + weights + coefficients
    assert launch["distinct_bytes_written"] == launch["bytes_written"] == written
    # Per pixel, as stated at the kernel.
    per_pixel = {"bottleneck_tail": 18, "bottleneck_roll": 20, "bottleneck_block": 16}[operator]
    assert sum(t.nbytes for t in activations) == per_pixel * middle * n * h * w

    step = step_pixels(operator, middle, n * h * w, multiprocessors)
    parts = parts_of(launch, step, n * h * w)
    computed = 0  # y1, in products of conv1 with the pixels of a step
    read = given.residual.nbytes + weights * sum(part.steps for part in parts)
    for part in parts:
        # A part begins to read weights for a step that never comes.
        read += coefficients + 3 * 64 * 64 * 2
        if operator != "bottleneck_block":
            read += part.pixels(1 + w, 1 + w) * 2 * middle
            continue
        first_passes = 1 + -(-(2 * w + 2) // part.step_pixels)
        read += part.pixels((first_passes - 1) * part.step_pixels - 1 - w, 1 + w) * 8 * middle
        read += (first_passes - 1) * given.conv1.weight.nbytes
        computed += first_passes - 1
    assert launch["bytes_read"] == read
    assert launch["accesses"] == {"16": (read + written) // 16}
    # What the mathematics needs, in products of 16 x 8 x 16.
    sums = 9 + 4 + (0 if operator == "bottleneck_tail" else 4)
    steps = sum(part.steps for part in parts)
    of_step = step * middle * middle // (16 * 8 * 16)
    assert launch["products"] == (steps * sums + computed * 4) * of_step


class Part(NamedTuple):
    """Steps of one block of a kernel, each of step_pixels of all_pixels."""

    first: int
    steps: int
    step_pixels: int
    all_pixels: int

    def pixels(self, before: int, behind: int) -> int:
        """How many exist, with so many more before the first and behind the last step."""
        begin = self.first * self.step_pixels - before
        end = (self.first + self.steps) * self.step_pixels + behind
        return min(end, self.all_pixels) - max(begin, 0)


def parts_of(launch: dict[str, Any], step: int, pixels: int) -> list[Part]:
    blocks, _, _ = launch["grid"]
    bounds = [-(-pixels // step) * block // blocks for block in range(blocks + 1)]
    return [Part(a, b - a, step, pixels) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize(
    ("operator", "expected"), [("bottleneck_roll", 1280), ("bottleneck_block", 1024)]
)
def test_layer1_moves_so_many_bytes_per_pixel(emulated: Any, operator: str, expected: int) -> None:
    """Instead of 2048 layer by layer; the weights are what little is more."""
    Given.draw(64, (4, 56, 56), torch.bfloat16).call(emulated, operator)
    (launch,) = launches(emulated)
    moved = launch["distinct_bytes_read"] + launch["distinct_bytes_written"]
    assert expected <= moved / (4 * 56 * 56) <= 1.05 * expected


@pytest.mark.parametrize(("operator", "middle"), cases())
def test_what_is_no_number_stays_where_it_belongs(
    emulated: Any, operator: str, middle: int
) -> None:
    """NaN passes every ReLU and reaches the pixels around it, in its own image alone."""
    given = Given.draw(middle, (3, 6, 7), torch.bfloat16)
    given.y1[1, 5, 0, 6] = float("nan")
    given.y1[1, 5, 5, 0] = float("inf")
    given.residual[2, 3, 3, 3] = float("nan")
    results = given.call(emulated, operator)
    eager, exact = (given.compute(operator, d) for d in (torch.bfloat16, torch.float64))
    for result, plain, right in zip(results, eager, exact, strict=True):
        finite = right.isfinite()
        assert 0 < finite.double().mean() < 1
        assert torch.equal(result.isfinite(), finite)
        assert_as_accurate_as_eager(result[finite], plain[finite], right[finite])
        assert torch.equal(result[0].isnan(), torch.zeros_like(result[0], dtype=torch.bool))


def test_weights_of_any_dtype_and_strides(emulated: Any) -> None:
    given = Given.draw(64, (2, 5, 9), torch.float16)
    expected = given.call(emulated, "bottleneck_roll")
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda weight: weight.float(),
        lambda weight: weight.double().contiguous(memory_format=torch.channels_last),
        lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
        lambda weight: F.pad(weight, (1, 2, 0, 1))[..., : weight.shape[2], 1 : 1 + weight.shape[3]],
    ]
    for kind in kinds:
        convolutions = (
            folded._replace(weight=kind(folded.weight))
            for folded in (given.conv2, given.conv3, given.conv1)
        )
        other = Given(given.y1, given.residual, *convolutions)
        results = other.call(emulated, "bottleneck_roll")
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("operator", MIDDLE)
def test_empty_batch(emulated: Any, operator: str) -> None:
    given = Given.draw(64, (0, 5, 9), torch.bfloat16)
    for result, right in zip(
        given.call(emulated, operator), given.compute(operator, torch.float64), strict=True
    ):
        assert result.shape == right.shape
    assert emulation.launches(emulated) == []


def without_conv2(given: Given, **changes: Tensor) -> Given:
    return given._replace(conv2=given.conv2._replace(**changes))


# By what is wrong: the operator, the channels of y1, the change, and the message.
BAD: dict[str, tuple[str, int, Callable[[Given], Given], str]] = {
    "dimensions": (
        "bottleneck_tail",
        64,
        lambda given: given._replace(y1=given.y1[0]),
        r"y1 must be a 4-d tensor \(N, C, H, W\), got shape \(64, 5, 9\)",
    ),
    "dtype": (
        "bottleneck_tail",
        64,
        lambda given: given._replace(y1=given.y1.float()),
        "y1 must be bfloat16 or float16, got Float",
    ),
    "layout": (
        "bottleneck_roll",
        64,
        lambda given: given._replace(y1=given.y1.contiguous()),
        r"y1 must be channels_last, got strides \(2880, 45, 9, 1\)",
    ),
    "alignment": (
        "bottleneck_tail",
        64,
        lambda given: given._replace(
            y1=given.y1.new_ones(given.y1.numel() + 1).as_strided(
                given.y1.shape, given.y1.stride(), 1
            )
        ),
        "y1 must be aligned to 16 bytes, got address",
    ),
    "residual's shape": (
        "bottleneck_tail",
        64,
        lambda given: given._replace(residual=given.residual[:, :64]),
        r"residual must have shape \(2, 256, 5, 9\), got \(2, 64, 5, 9\)",
    ),
    "residual's dtype": (
        "bottleneck_roll",
        64,
        lambda given: given._replace(residual=given.residual.half()),
        "residual must have the dtype of y1 BFloat16, got Half",
    ),
    "residual's layout": (
        "bottleneck_roll",
        64,
        lambda given: given._replace(residual=given.residual.contiguous()),
        "residual must be channels_last, got strides",
    ),
    "weight's shape": (
        "bottleneck_tail",
        64,
        lambda given: without_conv2(given, weight=given.conv3.weight),
        r"weight2 must have shape \(64, 64, 3, 3\), got \(256, 64, 1, 1\)",
    ),
    "weight's dtype": (
        "bottleneck_tail",
        64,
        lambda given: without_conv2(given, weight=given.conv2.weight.int()),
        "weight2 must be float32, float64, float16 or bfloat16, got Int",
    ),
    "scale": (
        "bottleneck_tail",
        64,
        lambda given: without_conv2(given, scale=given.conv2.scale.double()),
        r"scale2 must have 64 values in float32, side by side, got shape \(64\) of Double",
    ),
    "shift": (
        "bottleneck_tail",
        64,
        lambda given: without_conv2(given, shift=given.conv3.shift),
        r"shift2 must have 64 values in float32, side by side, got shape \(256\) of Float",
    ),
    "next weight": (
        "bottleneck_roll",
        64,
        lambda given: given._replace(conv1=given.conv3),
        r"next_weight1 must have shape \(64, 256, 1, 1\), got \(256, 64, 1, 1\)",
    ),
    "channels": (
        "bottleneck_tail",
        32,
        lambda given: given,
        r"y1 must have 64, 128 or 256 channels, got 32 \(use conv_bn_relu\)",
    ),
    "channels of a block": (
        "bottleneck_block",
        128,
        lambda given: given,
        r"x must have 256 channels, got 512 \(use bottleneck_tail\)",
    ),
    "first weight": (
        "bottleneck_block",
        64,
        lambda given: given._replace(conv1=given.conv3),
        r"weight1 must have shape \(64, 256, 1, 1\), got \(256, 64, 1, 1\)",
    ),
    "x": (
        "bottleneck_block",
        64,
        lambda given: given._replace(residual=given.residual.contiguous()),
        "x must be channels_last, got strides",
    ),
    "channels of a roll": (
        "bottleneck_roll",
        256,
        lambda given: given,
        r"y1 must have 64 or 128 channels, got 256 \(use bottleneck_tail\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(emulated: Any, bad: str) -> None:
    operator, middle, change, message = BAD[bad]
    given = change(Given.draw(middle, (2, 5, 9), torch.bfloat16))
    with pytest.raises(RuntimeError, match=f"^{operator}: {message}"):
        given.call(emulated, operator)


@pytest.mark.parametrize(("operator", "middle"), cases())
def test_the_widest_images_fit_into_every_gpu(emulated: Any, operator: str, middle: int) -> None:
    """The backend sends wider ones elsewhere; some GPUs have 99 KiB, of which one is not ours."""
    emulated.configure(0, 1000)  # so that the small instance is taken
    given = Given.draw(middle, (1, 1, cuda_chains.WIDEST_IMAGES[middle]), torch.bfloat16)
    given.call(emulated, operator)
    *_, kernel = launches(emulated)
    assert kernel["shared_bytes"] <= 98 * 1024


@pytest.mark.parametrize(("operator", "middle"), cases())
def test_images_may_be_as_wide_as_the_ring(emulated: Any, operator: str, middle: int) -> None:
    """Up to the shared memory of a block, and no wider."""
    sides = middle // 64
    columns = middle * (5 if operator == "bottleneck_tail" else 6)
    rows = (227 * 1024 - 4 * 8192 - 8 * columns) // (128 * sides) - 1
    step = PIXELS[operator, middle] if operator == "bottleneck_block" else SMALL_STEP
    widest = (rows // 8 * 8 - step - 2) // 2
    given = Given.draw(middle, (1, 1, widest), torch.bfloat16)
    results = given.call(emulated, operator)
    eager, exact = (given.compute(operator, d) for d in (torch.bfloat16, torch.float64))
    for result, plain, right in zip(results, eager, exact, strict=True):
        assert_as_accurate_as_eager(result, plain, right)
    given = Given.draw(middle, (1, 1, widest + 1), torch.bfloat16)
    message = f"images must be less wide with {4 * middle} channels, got {widest + 1} pixels"
    with pytest.raises(RuntimeError, match=f"^{operator}: {message}.*use conv_bn_relu"):
        given.call(emulated, operator)


# In place of all of conv_operands.cu.
UNCHECKED = """namespace resnet_fused {
void check_coefficients(const char*, const char*, const Tensor&, int64_t, const Tensor&) {}
}
"""


def source(operator: str) -> str:
    """With its own headers in place of their #include lines, for one instance."""
    text = (emulation.CSRC / f"cuda/{operator}.cu").read_text()
    for name in ("bottleneck_launch.cuh", "bottleneck_tiles.h", "bottleneck.cuh"):
        header = (emulation.CSRC / "cuda" / name).read_text().replace("#pragma once", "")
        text = emulation.mutate(text, f'#include "cuda/{name}"', header)
    text, _ = re.subn(r"case 128:.*?;", "", text, flags=re.DOTALL)
    text = emulation.mutate(text, "return body(ptx::Half{});", "break;")
    small = "  launch_chain<SmallChainOf<T, Part, kMiddle>>(op, block, out, next_y1);\n"
    text = emulation.mutate(text, small, "")
    return f'#include "cuda/bottleneck_weights.cu"\n{UNCHECKED}{text}'


class Mutant(NamedTuple):
    """A change to the kernel that makes it wrong."""

    old: str
    new: str
    message: str | None  # of the emulator's error; None where results or bank conflicts are wrong
    operator: str = "bottleneck_roll"


MUTANTS = {
    "wait for the next block of weights": Mutant(
        "ptx::wait_for_copies<kStages - 2>();", "", "in flight"
    ),
    "wait for one block less": Mutant(
        "ptx::wait_for_copies<kStages - 2>();", "ptx::wait_for_copies<kStages - 1>();", "in flight"
    ),
    "barrier before a block of weights": Mutant(
        "    __syncthreads();\n    copy_block(",
        "    copy_block(",
        "in flight|races|uninitialised",
    ),
    "barrier before y1 is overwritten": Mutant(
        "// All have read the ring.\n      __syncthreads();", "", "races"
    ),
    "wait for the last copies": Mutant(
        "  ptx::wait_for_copies<0>();\n}", "}", "ends while copies are in flight"
    ),
    "no row of zeros": Mutant("i < kChunksOfPixel; i +=", "i < 0; i +=", "uninitialised"),
    "a ring without room for the last pixels": Mutant(
        "(kPixels + 2 * width + 2 + 7) / 8 * 8", "kPixels", "races|in flight"
    ),
    "one pixel too few": Mutant(
        "return 2 * p_.width.divisor() + 2;", "return 2 * p_.width.divisor() + 1;", "uninitialised"
    ),
    "neighbours across the end of a row": Mutant("kFirstColumn << 2", "0", None),
    "neighbours across the end of an image": Mutant("kFirstRow << 6", "0", None),
    "zeros that all lie in the same banks": Mutant(
        "row_offset(slot, lane() / 16)", "row_offset(is_missing ? 0 : slot, lane() / 16)", None
    ),
    "conv1 once, where the first step needs it more often": Mutant(
        "--passes_ > 0", "--passes_ > 99", None, "bottleneck_block"
    ),
    "y1 that lies before what the ring has": Mutant(
        "own < 0 || ", "", "races|in flight|store", "bottleneck_block"
    ),
}


@pytest.fixture(scope="module")
def mutants() -> dict[str, Any]:
    texts = {mutant.operator: source(mutant.operator) for mutant in MUTANTS.values()}
    originals = list(texts)
    for i, mutant in enumerate(MUTANTS.values()):
        texts[f"bottleneck_mutant_{i}"] = emulation.mutate(
            texts[mutant.operator], mutant.old, mutant.new
        )
    compiled = emulation.compile_sources(texts, "csrc/cuda/mutant.cu")
    return dict(zip((*originals, *MUTANTS), compiled.values(), strict=True))


def is_right(ops: Any, operator: str) -> bool:
    """Of two blocks with two steps each, the last of which is not full."""
    given = Given.draw(64, (5, 9, 11), torch.bfloat16)
    ops.configure(0, 1)
    results = given.call(ops, operator)
    (launch,) = launches(ops)
    assert launch["grid"] == [2, 1, 1]
    exact = given.compute(operator, torch.float64)
    distances = [
        (a.double() - b).abs().max() / b.max() for a, b in zip(results, exact, strict=True)
    ]
    return max(distances) < 0.02 and launch["bank_conflicts"] == 0


@pytest.mark.parametrize("operator", sorted({mutant.operator for mutant in MUTANTS.values()}))
def test_unbroken_copies_are_right(mutants: dict[str, Any], operator: str) -> None:
    assert is_right(mutants[operator], operator)


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernels_are_caught(mutants: dict[str, Any], name: str) -> None:
    mutant = MUTANTS[name]
    if mutant.message is None:
        assert not is_right(mutants[name], mutant.operator)
    else:
        with pytest.raises(RuntimeError, match=f"bottleneck_kernel.*({mutant.message})"):
            is_right(mutants[name], mutant.operator)
