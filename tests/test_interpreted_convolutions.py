"""Forward convolutions in Triton, run by the interpreter: every main loop, type and geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import interpreted_backend
import pytest
import torch
from numerics import assert_as_accurate_as_eager, normal
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import reference

if not interpreted_backend.ENABLED:
    pytest.skip(interpreted_backend.REASON, allow_module_level=True)

from resnet_fused.triton_kernels import conv_bn_relu as conv_bn_relu_module
from resnet_fused.triton_kernels import conv_stats as conv_stats_module
from resnet_fused.triton_kernels import convolution, device
from resnet_fused.triton_kernels.problem import TMA_KINDS, conv_problem

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Conv(NamedTuple):
    """A convolution, and the main loop that computes it with TMA and without."""

    x: tuple[int, ...]
    kernels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    by_tma: str = "gather"
    by_pointer: str = "gather"

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.kernels, self.x[1] // self.groups, *self.kernel)

    @property
    def out(self) -> tuple[int, ...]:
        x, weight = torch.empty(self.x, device="meta"), torch.empty(self.weight, device="meta")
        return tuple(F.conv2d(x, weight, None, *self.geometry).shape)


NO_PADDING = (0, 0)
CONVS = {
    "1x1": Conv((2, 32, 5, 7), 40, (1, 1), padding=NO_PADDING, by_tma="rows"),
    "1x1 in two steps": Conv((3, 72, 5, 3), 72, (1, 1), padding=NO_PADDING, by_tma="rows"),
    "padded 1x1": Conv((2, 16, 5, 7), 24, (1, 1), by_tma="boxes"),
    "strided 1x1": Conv((2, 32, 6, 8), 16, (1, 1), (2, 2), NO_PADDING, by_tma="strided_boxes"),
    "strided 1x1, odd image": Conv((2, 16, 5, 7), 16, (1, 1), (2, 2), NO_PADDING),
    "3x3": Conv((2, 16, 7, 6), 24, by_tma="boxes"),
    "3x3, ragged channels": Conv((1, 40, 5, 4), 72, by_tma="boxes"),
    "strided 3x3": Conv((2, 16, 6, 10), 24, stride=(2, 2), by_tma="strided_boxes"),
    "strided 3x3, ragged channels": Conv((1, 24, 6, 4), 24, stride=(2, 2)),
    "strided 3x3, odd image": Conv((1, 16, 7, 5), 24, stride=(2, 2)),
    "strided 3x3, odd height": Conv((1, 16, 7, 6), 24, stride=(2, 2)),
    "strided 3x3, odd width": Conv((1, 16, 6, 7), 24, stride=(2, 2)),
    "strides of 2 and 1": Conv((1, 16, 6, 8), 24, stride=(2, 1)),
    "strided 5x3": Conv((1, 16, 8, 6), 16, (5, 3), (2, 2), (2, 0), by_tma="strided_boxes"),
    "strided, dilated": Conv(
        (1, 16, 10, 8), 16, stride=(2, 2), padding=(2, 3), dilation=(2, 3), by_tma="strided_boxes"
    ),
    "dilated": Conv((1, 16, 9, 8), 16, padding=(2, 3), dilation=(2, 3), by_tma="boxes"),
    "uneven": Conv((2, 16, 9, 8), 16, (3, 2), (2, 1), (0, 2), (1, 2)),
    "stem": Conv(
        (1, 3, 15, 18), 16, (7, 7), (2, 2), (3, 3), by_tma="filter_rows", by_pointer="filter_rows"
    ),
    "odd stem": Conv(
        (2, 3, 9, 7), 9, (5, 5), (1, 2), (2, 1), by_tma="filter_rows", by_pointer="filter_rows"
    ),
    "dilated stem": Conv(
        *((1, 3, 9, 10), 8, (3, 3), (1, 1), (2, 2), (2, 2)),
        by_tma="filter_rows",
        by_pointer="filter_rows",
    ),
    "one channel": Conv((3, 1, 5, 4), 17, by_tma="filter_rows", by_pointer="filter_rows"),
    "long filter rows": Conv(
        (1, 13, 5, 9), 7, (3, 7), by_tma="filter_rows", by_pointer="filter_rows"
    ),
    "grouped": Conv((1, 24, 5, 4), 12, groups=2),
    "grouped in two steps": Conv((1, 144, 3, 4), 160, (1, 1), padding=NO_PADDING, groups=2),
    "depthwise": Conv((1, 9, 4, 5), 9, groups=9, by_tma="depthwise", by_pointer="depthwise"),
    "strided depthwise": Conv(
        *((1, 72, 4, 5), 72, (3, 2), (2, 1), (1, 0), (2, 1), 72),
        by_tma="depthwise",
        by_pointer="depthwise",
    ),
    "depthwise, two kernels each": Conv((1, 5, 4, 3), 10, groups=5),
    "odd channels": Conv((2, 17, 5, 4), 7),
    "1x1 images": Conv((5, 16, 1, 1), 24, by_tma="boxes"),
}
BY_TMA = ("rows", "boxes", "strided_boxes")
# Each main loop, with several tiles of pixels, of kernels or steps.
EACH_LOOP = (
    *("1x1 in two steps", "strided 1x1", "3x3, ragged channels", "strided 3x3", "stem"),
    *("grouped", "depthwise", "odd channels"),
)


def on_generations(names: Iterable[str], other: str) -> list[tuple[str, str]]:
    """Each on Hopper, and what takes TMA there on another generation, too."""
    by_tma = [(name, other) for name in names if CONVS[name].by_tma in BY_TMA]
    return [*((name, "hopper") for name in names), *by_tma]


def channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def misaligned(x: Tensor) -> Tensor:
    """channels_last, one element behind the start of its storage."""
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    return x.new_empty(x.numel() + 1).as_strided(x.shape, strides, 1).copy_(x)


class Draw(NamedTuple):
    """Arguments of conv_bn_relu."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None


def draw(
    conv: Conv,
    dtype: torch.dtype,
    residual: bool = False,
    place: Callable[[Tensor], Tensor] = channels_last,
) -> Draw:
    fan_in = conv.weight[1] * conv.kernel[0] * conv.kernel[1]
    return Draw(
        place(normal(conv.x, 0).to(dtype)),
        (normal(conv.weight, 1) / fan_in**0.5).to(dtype),
        normal((conv.kernels,), 2).abs().add(0.5).float(),
        normal((conv.kernels,), 3).float(),
        place(normal(conv.out, 4).to(dtype)) if residual else None,
    )


def conv_bn_relu(conv: Conv, tensors: Draw, relu: bool = True, **named: Any) -> Tensor:
    launcher = interpreted_backend.on_uninitialised_memory(conv_bn_relu_module.conv_bn_relu)
    out: Tensor = launcher(*tensors, relu, *conv.geometry, **named)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == tensors.x.dtype
    return out


def conv_stats(
    conv: Conv, x: Tensor, weight: Tensor, *prologue: Tensor | None, **named: Any
) -> tuple[Tensor, ...]:
    launcher = interpreted_backend.on_uninitialised_memory(conv_stats_module.conv_stats)
    y, mean, m2 = launcher(x, weight, *(prologue or (None, None)), *conv.geometry, **named)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y.dtype, mean.dtype, m2.dtype) == (x.dtype, torch.float32, torch.float32)
    return y, mean, m2


def exact_conv_bn_relu(conv: Conv, tensors: Draw, relu: bool = True) -> tuple[Tensor, Tensor]:
    """As eager computes it, and in float64."""
    doubled = (None if t is None else t.double() for t in tensors)
    exact = reference.conv_bn_relu(*doubled, relu, *conv.geometry)
    return reference.conv_bn_relu(*tensors, relu, *conv.geometry), exact


def check_conv_bn_relu(conv: Conv, tensors: Draw, relu: bool = True, **named: Any) -> None:
    out = conv_bn_relu(conv, tensors, relu, **named)
    assert_as_accurate_as_eager(out, *exact_conv_bn_relu(conv, tensors, relu))


def check_conv_stats(
    conv: Conv, x: Tensor, weight: Tensor, *prologue: Tensor, **named: Any
) -> None:
    arguments = (x, weight, *(prologue or (None, None)))
    results = conv_stats(conv, *arguments, **named)
    eager = reference.conv_stats(*arguments, *conv.geometry)
    p = reference._scale_shift_relu(x, *arguments[2:])  # with the rounding behind the prologue
    exact = reference.conv_stats(p.double(), weight.double(), None, None, *conv.geometry)
    for name, *values in zip(("y", "mean", "m2"), results, eager, exact, strict=True):
        assert_as_accurate_as_eager(*values, name)


class TestConvBnReLU:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("name", "generation"), on_generations(CONVS, "ampere"))
    def test_every_geometry(self, name: str, dtype: torch.dtype, generation: str) -> None:
        conv = CONVS[name]
        with interpreted_backend.generation(generation):
            check_conv_bn_relu(conv, draw(conv, dtype))

    @pytest.mark.parametrize(("name", "generation"), on_generations(EACH_LOOP, "blackwell"))
    def test_residual_and_its_memory(self, name: str, generation: str) -> None:
        conv = CONVS[name]
        tensors = draw(conv, torch.bfloat16, residual=True)
        with interpreted_backend.generation(generation):
            check_conv_bn_relu(conv, tensors, relu=False)
            out = conv_bn_relu(conv, tensors)
            conv_bn_relu_module.conv_bn_relu_(*tensors, True, *conv.geometry)
        assert torch.equal(tensors.residual, out)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["1x1", "stem"])
    def test_misaligned_tensors_take_pointers(self, name: str, dtype: torch.dtype) -> None:
        conv = CONVS[name]
        check_conv_bn_relu(conv, draw(conv, dtype, residual=True, place=misaligned))
        aligned = draw(conv, dtype, residual=True)
        expected = conv_bn_relu(conv, aligned)
        residual = misaligned(aligned.residual)
        tensors = aligned._replace(weight=misaligned(aligned.weight), residual=residual)
        assert torch.equal(conv_bn_relu(conv, tensors), expected)
        conv_bn_relu_module.conv_bn_relu_(*tensors, True, *conv.geometry)
        assert torch.equal(residual, expected)

    @pytest.mark.parametrize("generation", ["ampere", "hopper"])
    def test_memory_that_is_not_channels_last(self, generation: str) -> None:
        conv = Conv((3, 16, 6, 6), 16)  # several tiles of pixels
        tensors = draw(conv, torch.float32, residual=True)
        with interpreted_backend.generation(generation):
            expected = conv_bn_relu(conv, tensors)
            nchw = tensors._replace(
                x=tensors.x.contiguous(), residual=tensors.residual.contiguous()
            )
            assert torch.equal(conv_bn_relu(conv, nchw), expected)
            conv_bn_relu_module.conv_bn_relu_(*nchw, True, *conv.geometry)
            assert torch.equal(nchw.residual, expected)

    def test_parameters_of_other_dtypes_and_strides(self) -> None:
        conv = CONVS["3x3"]
        tensors = draw(conv, torch.bfloat16)
        expected = conv_bn_relu(conv, tensors)
        others = tensors._replace(
            weight=tensors.weight.double().contiguous(memory_format=torch.channels_last),
            scale=tensors.scale.double().repeat_interleave(2)[::2],
            shift=tensors.shift.repeat_interleave(3)[::3],
        )
        assert torch.equal(conv_bn_relu(conv, others), expected)

    @pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
    @pytest.mark.parametrize(("name", "generation"), on_generations(EACH_LOOP, "ampere"))
    def test_nan_and_infinity_stay_where_they_belong(self, name: str, generation: str) -> None:
        conv = CONVS[name]
        tensors = draw(conv, torch.float16, residual=True)
        # The last channel: a run that began one element early would reach it from the next pixel.
        tensors.x[0, -1, 2, 2] = float("nan")
        tensors.x[-1, -1, -1, -1] = float("inf")
        tensors.residual[0, -1, 0, -1] = float("nan")
        with interpreted_backend.generation(generation):
            out = conv_bn_relu(conv, tensors)
        eager, exact = exact_conv_bn_relu(conv, tensors)
        assert torch.equal(out.isnan(), exact.isnan())
        assert torch.equal(out.isinf(), eager.isinf())

    @pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 4, 4)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        conv = Conv(shape, 16 if shape[0] == 0 else 0)
        assert conv_bn_relu(conv, draw(conv, torch.bfloat16)).shape == conv.out

    @pytest.mark.parametrize(("name", "generation"), on_generations(EACH_LOOP, "ampere"))
    def test_every_configuration(self, name: str, generation: str) -> None:
        conv = CONVS[name]
        tensors = draw(conv, torch.bfloat16)
        problem = conv_problem(tensors.x, tensors.weight, *conv.geometry)
        with interpreted_backend.generation(generation):
            architecture = device.architecture(tensors.x)
            found = convolution.configurations(problem, torch.bfloat16, architecture)
            assert len(set(found)) == len(found)
            for configuration in {each._replace(registers=None) for each in found}:
                check_conv_bn_relu(conv, tensors, configuration=configuration)

    def test_a_configuration_that_cannot_read_the_tensors_is_replaced(self) -> None:
        conv = CONVS["1x1"]
        aligned = draw(conv, torch.bfloat16)
        problem = conv_problem(aligned.x, aligned.weight, *conv.geometry)
        architecture = device.architecture(aligned.x)
        by_tma = convolution.configurations(problem, torch.bfloat16, architecture)[0]
        tensors = draw(conv, torch.bfloat16, place=misaligned)
        check_conv_bn_relu(conv, tensors, configuration=by_tma)


class TestConvStats:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("name", "generation"),
        [(name, "hopper") for name in (*EACH_LOOP, "1x1 images")]
        + [("1x1 in two steps", "blackwell"), ("strided 3x3", "ampere")],
    )
    def test_output_and_statistics(self, name: str, dtype: torch.dtype, generation: str) -> None:
        conv = CONVS[name]
        tensors = draw(conv, dtype)
        with interpreted_backend.generation(generation):
            check_conv_stats(conv, tensors.x, tensors.weight)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["1x1 in two steps", "strided 3x3", "stem", "odd channels"])
    def test_variance_far_from_zero(self, name: str, dtype: torch.dtype) -> None:
        conv = CONVS[name]
        tensors = draw(conv, dtype)
        fan_in = conv.weight[1] * conv.kernel[0] * conv.kernel[1]
        check_conv_stats(conv, tensors.x + 50, (tensors.weight / fan_in**0.5 + 1 / fan_in))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("name", "generation"),
        [
            *(("1x1 in two steps", each) for each in ("ampere", "hopper", "blackwell")),
            *(("strided 1x1", each) for each in ("ampere", "hopper")),
            *((name, "hopper") for name in ("padded 1x1", "3x3", "stem", "grouped", "depthwise")),
            ("odd channels", "ampere"),
        ],
    )
    def test_prologue(self, name: str, dtype: torch.dtype, generation: str) -> None:
        conv = CONVS[name]
        tensors = draw(conv, dtype)
        # Zero would not be its own image: padding must not go through the prologue.
        scale = normal((conv.x[1],), 5).float()
        shift = normal((conv.x[1],), 6).abs().add(0.5).float()
        with interpreted_backend.generation(generation):
            check_conv_stats(conv, tensors.x, tensors.weight, scale, shift)

    def test_prologue_passes_nan_and_misaligned_tensors(self) -> None:
        for name in ("1x1 in two steps", "3x3"):
            conv = CONVS[name]
            tensors = draw(conv, torch.bfloat16, place=misaligned)
            tensors.x[0, 0, 1, 1] = float("nan")
            scale, shift = torch.ones(2, conv.x[1]).half().unbind()
            y, mean, _ = conv_stats(conv, tensors.x, tensors.weight, scale, shift)
            exact = reference.conv_stats(*tensors[:2], scale, shift, *conv.geometry)
            assert torch.equal(y.isnan(), exact[0].isnan())
            assert mean.isnan().all()

    @pytest.mark.parametrize("name", ["1x1", "3x3"])
    def test_vectors_of_another_dtype_and_stride(self, name: str) -> None:
        conv = CONVS[name]
        tensors = draw(conv, torch.bfloat16)[:2]
        scale, shift = normal((2, conv.x[1]), 5).float().unbind()
        expected = conv_stats(conv, *tensors, scale, shift)
        others = scale.double().repeat_interleave(2)[::2], shift.repeat_interleave(3)[::3]
        assert all(map(torch.equal, conv_stats(conv, *tensors, *others), expected))

    @pytest.mark.parametrize("place", [channels_last, misaligned])
    def test_prologue_in_a_pass_of_its_own(self, place: Callable[[Tensor], Tensor]) -> None:
        x = place(normal((3, 24, 9, 7), 0).bfloat16())  # blocks begin at any channel
        scale, shift = normal((2, 24), 1).float().unbind()
        p = conv_stats_module.scale_shift_relu(x, scale, shift)
        assert torch.equal(p, reference._scale_shift_relu(x, scale, shift))

    def test_results_repeat_in_every_order_of_the_programs(self) -> None:
        conv = CONVS["3x3, ragged channels"]._replace(x=(4, 40, 9, 7))
        tensors = draw(conv, torch.float32)
        first, second = (conv_stats(conv, *tensors[:2]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_empty(self) -> None:
        conv = Conv((0, 16, 4, 4), 24)
        y, mean, m2 = conv_stats(conv, *draw(conv, torch.bfloat16)[:2])
        assert y.shape == conv.out
        assert mean.tolist() == m2.tolist() == [0.0] * 24


class TestPersistent:
    """The same parts of the output, several of them by each program."""

    CONV = Conv((3, 72, 20, 16), 136, (1, 1), padding=NO_PADDING, by_tma="rows")

    def configurations(self, tensors: Draw, generation: str = "hopper") -> list[Any]:
        problem = conv_problem(tensors.x, tensors.weight, *self.CONV.geometry)
        with interpreted_backend.generation(generation):
            architecture = device.architecture(tensors.x)
            found = convolution.configurations(problem, tensors.x.dtype, architecture)
        return [each for each in found if each.persistent]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_conv_bn_relu(self, dtype: torch.dtype) -> None:
        tensors = draw(self.CONV, dtype, residual=True)
        first, *others = self.configurations(tensors)
        check_conv_bn_relu(self.CONV, tensors, configuration=first)
        for each in (first, *others):
            out = conv_bn_relu(self.CONV, tensors, configuration=each)
            once = each._replace(persistent=False)
            assert torch.equal(out, conv_bn_relu(self.CONV, tensors, configuration=once))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_conv_stats(self, dtype: torch.dtype) -> None:
        tensors = draw(self.CONV, dtype)
        scale, shift = normal((2, 72), 5).float().unbind()
        for prologue in ((), (scale, shift)):
            arguments = tensors.x, tensors.weight, *prologue
            first, *others = self.configurations(tensors)
            check_conv_stats(self.CONV, *arguments, configuration=first)
            for each in (first, *others):
                results = conv_stats(self.CONV, *arguments, configuration=each)
                once = each._replace(persistent=False)
                expected = conv_stats(self.CONV, *arguments, configuration=once)
                assert all(map(torch.equal, results, expected))

    def test_where_it_is_offered(self) -> None:
        tensors = draw(self.CONV, torch.bfloat16)
        problem = conv_problem(tensors.x, tensors.weight, *self.CONV.geometry)
        out = torch.empty(self.CONV.out, dtype=torch.bfloat16)
        for each in self.configurations(tensors):
            plan = convolution.plan(problem, *tensors[:2], out, configuration=each)
            once = each._replace(persistent=False)
            parts = convolution.plan(problem, *tensors[:2], out, configuration=once).programs
            assert parts >= 2 * plan.programs == 2 * interpreted_backend.MULTIPROCESSORS
        assert self.configurations(tensors, "blackwell") == []
        assert self.configurations(tensors._replace(x=tensors.x[:1, :, :8, :8])) == []


class TestPlan:
    @pytest.mark.parametrize("generation", ["ampere", "hopper", "blackwell"])
    @pytest.mark.parametrize("name", CONVS)
    def test_main_loop(self, name: str, generation: str) -> None:
        conv = CONVS[name]
        for dtype, place in ((torch.float16, channels_last), (torch.float16, misaligned)):
            tensors = draw(conv, dtype, place=place)
            problem = conv_problem(tensors.x, tensors.weight, *conv.geometry)
            out = torch.empty(conv.out, dtype=dtype)
            by_tma = generation != "ampere" and place is channels_last
            for residual in (None, out):
                with interpreted_backend.generation(generation):
                    plan = convolution.plan(problem, *tensors[:2], out, residual)
                assert plan.loop.kind == (conv.by_tma if by_tma else conv.by_pointer)
                swaps = generation == "hopper" or residual is not None
                assert plan.loop.swapped == (swaps and plan.loop.kind in TMA_KINDS)

    @pytest.mark.parametrize(
        ("x", "dtype", "place", "padding", "expected"),
        [
            ((1, 3, 8, 8), torch.bfloat16, channels_last, 3, (True, 1)),
            ((1, 3, 8, 8), torch.bfloat16, channels_last, 2, (True, 0)),
            ((1, 3, 8, 7), torch.bfloat16, channels_last, 3, (False, 0)),
            ((1, 3, 8, 8), torch.bfloat16, misaligned, 3, (False, 0)),
            ((1, 3, 8, 8), torch.float32, channels_last, 3, (False, 0)),
        ],
    )
    def test_pairs_begin_at_multiples_of_4_bytes(
        self,
        x: tuple[int, ...],
        dtype: torch.dtype,
        place: Callable[[Tensor], Tensor],
        padding: int,
        expected: tuple[bool, int],
    ) -> None:
        conv = Conv(x, 8, (7, 7), (2, 2), (padding, padding))
        tensors = draw(conv, dtype, place=place)
        problem = conv_problem(tensors.x, tensors.weight, *conv.geometry)
        loop = convolution.plan(problem, *tensors[:2], torch.empty(conv.out, dtype=dtype)).loop
        assert (loop.pairs, loop.early) == expected

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_configurations_fit_the_gpu(
        self, dtype: torch.dtype, capability: tuple[int, int]
    ) -> None:
        architecture = device.of_capability(capability, 100)
        for c, k, size, kernel in ((64, 256, 56, 1), (512, 512, 7, 3), (3, 64, 224, 7)):
            x = torch.empty(8, c, size, size, device="meta")
            weight = torch.empty(k, c, kernel, kernel, device="meta")
            problem = conv_problem(x, weight, (1, 1), (kernel // 2,) * 2, (1, 1), 1)
            for each in convolution.configurations(problem, dtype, architecture):
                stage = (each.block_m + each.block_n) * each.block_k * dtype.itemsize
                assert each.stages >= 2
                assert each.stages * stage < architecture.shared_bytes

    def test_small_problems_are_spread_over_the_gpu(self) -> None:
        architecture = device.of_capability((9, 0), 132)
        weight = torch.empty(256, 256, 3, 3, device="meta")
        blocks = []
        for images in (1, 256):
            x = torch.empty(images, 256, 14, 14, device="meta")
            problem = conv_problem(x, weight, (1, 1), (1, 1), (1, 1), 1)
            first = convolution.configurations(problem, torch.bfloat16, architecture)[0]
            blocks.append((first.block_m, first.block_n))
        assert blocks == [(64, 64), (128, 128)]
