"""bn_relu_max_pool's CUDA kernels in the emulator: bytes moved, kinds of windows, order of blocks.

What the operators compute in every dtype, layout and mode is tested in test_bn_relu_max_pool.py,
where the emulator is one more backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulation
import pytest
import torch
from numerics import LAYOUTS, assert_as_accurate_as_eager, normal
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import reference

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("channels_last", "nchw", "misaligned")
EPS = 1e-5
Windows = tuple[list[int], list[int], list[int]]  # kernel_size, stride, padding
STEM: Windows = ([3, 3], [2, 2], [1, 1])
WINDOWS: dict[str, Windows] = {
    "stem": STEM,
    "side by side": ([2, 2], [2, 2], [0, 0]),
    "apart": ([2, 2], [3, 3], [1, 0]),
    "overlapping": ([3, 3], [1, 1], [1, 1]),
    "wide": ([2, 5], [1, 4], [1, 2]),
    "largest": ([15, 15], [4, 7], [7, 7]),
}


class Given(NamedTuple):
    """Arguments of the three operators."""

    x: Tensor
    grad_out: Tensor
    vectors: tuple[Tensor, ...]  # weight, bias, running mean and variance
    windows: Windows

    @staticmethod
    def draw(
        shape: tuple[int, ...], dtype: torch.dtype, layout: str, windows: Windows = STEM
    ) -> Given:
        # In tenths: values of one window are often equal.
        lay_out = LAYOUTS[layout][0]
        x = lay_out(((normal(shape, 0) * 10).round() / 10).to(dtype))
        pooled = F.max_pool2d(torch.empty(shape, device="meta"), *windows).shape
        vectors = [normal(shape[1:2], i).float() for i in range(2, 6)]
        vectors[3] = vectors[3].abs() + 0.5
        return Given(x, lay_out(normal(pooled, 1).to(dtype)), tuple(vectors), windows)

    def double(self) -> Given:
        vectors = tuple(v.double() for v in self.vectors)
        return Given(self.x.double(), self.grad_out.double(), vectors, self.windows)


@pytest.fixture
def emulated() -> Iterator[Any]:
    ops = emulation.library()
    ops.configure(0, 3)
    emulation.launches(ops)
    yield ops
    ops.configure(0, 3)


def forward(ops: Any, given: Given, training: bool) -> tuple[Tensor, ...]:
    weight, bias, *running = (v.clone() for v in given.vectors)
    outputs: tuple[Tensor, ...] = ops.bn_relu_max_pool(
        *(given.x, weight, bias, *running, training, 0.1, EPS), *given.windows
    )
    return outputs


def backward(
    ops: Any, given: Given, outputs: tuple[Tensor, ...], training: bool
) -> tuple[Tensor, Tensor]:
    """The sums and the gradient of x."""
    _, mean, invstd, argmax = outputs
    tensors = given.grad_out, given.x, argmax
    sums = ops.bn_relu_max_pool_backward_sums(*tensors, mean, *given.windows)
    averages = sums / (given.x.numel() // given.x.size(1))
    grad_x = ops.bn_relu_max_pool_backward_apply(
        *(*tensors, given.vectors[0], mean, invstd, training, averages), *given.windows
    )
    return sums, grad_x


def results(ops: Any, given: Given, training: bool) -> tuple[Tensor, ...]:
    outputs = forward(ops, given, training)
    return *outputs, *backward(ops, given, outputs, training)


def assert_backward_is_accurate(
    actual: tuple[Tensor, Tensor], given: Given, outputs: tuple[Tensor, ...], training: bool
) -> None:
    """As the reference of the same outputs of the forward."""
    doubled = tuple(t.double() if t.is_floating_point() else t for t in outputs)
    plain = backward(reference, given, outputs, training)
    exact = backward(reference, given.double(), doubled, training)
    for name, *tensors in zip(("sums", "grad_x"), actual, plain, exact, strict=True):
        assert_as_accurate_as_eager(*tensors, name)


def taps_within(given: Given) -> int:
    """How often the windows of all images reach an element of x."""
    ones = torch.ones(1, 1, *given.x.shape[2:])
    counts = F.avg_pool2d(ones, *given.windows, divisor_override=1)
    return int(counts.sum()) * given.x.size(0) * given.x.size(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_moves_once_through_memory(
    emulated: Any, dtype: torch.dtype, layout: str, training: bool
) -> None:
    """And as often through the caches as windows reach it, in accesses of 16 bytes."""
    given = Given.draw((2, 64, 28, 28), dtype, layout)
    x, out = given.x.nbytes, given.grad_out.nbytes
    outputs = forward(emulated, given, training)
    backward(emulated, given, outputs, training)
    *statistics, pooling, sums, gradients = emulation.launches(emulated)
    assert len(statistics) == int(training)
    kernels = [r["kernel"].strip("(").partition("<")[0] for r in (pooling, sums, gradients)]
    assert kernels == ["max_pool_kernel", "pooled_sums_kernel", "pooled_gradients_kernel"]

    argmax, vector = outputs[3], 4 * 64
    assert pooling["distinct_bytes_read"] == x + 4 * vector
    written = out + argmax.nbytes + (0 if training else 2 * vector)
    assert pooling["bytes_written"] == pooling["distinct_bytes_written"] == written

    is_open = int((argmax != 255).sum())
    # Of several blocks each leaves two vectors behind, and the last one reads all of them.
    splits = sums["grid"][1]
    left_behind = 2 * vector * splits if splits > 1 else 0
    elements = sums["distinct_bytes_read"] - (out + argmax.nbytes + vector + left_behind)
    assert 0 < elements <= is_open * dtype.itemsize
    assert sums["bytes_written"] == left_behind + 2 * vector

    read = out + argmax.nbytes + 5 * vector + (x if training else 0)
    assert gradients["distinct_bytes_read"] == read
    assert gradients["bytes_written"] == gradients["distinct_bytes_written"] == x

    reached = taps_within(given) * dtype.itemsize
    tensors = reached + out, out, (x if training else 0) + reached + x
    for record, bytes_ in zip((pooling, sums, gradients), tensors, strict=True):
        width = "16" if layout == "channels_last" else str(dtype.itemsize)
        count = record["accesses"].get(width, 0)
        if layout == "channels_last":
            assert count == bytes_ // 16
        elif dtype.itemsize == 2:
            gathered = is_open if record is sums else 0
            assert count == bytes_ // 2 + gathered
    if layout == "channels_last" and dtype.itemsize == 2:
        assert sums["accesses"]["2"] == is_open


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_kernels_do_the_same(emulated: Any, dtype: torch.dtype, windows: str) -> None:
    """Those of vectors, of windows known and unknown, and of both formats; as the reference."""
    shape = (2, 24, 17, 22)
    expected = Given.draw(shape, dtype, "channels_last", WINDOWS[windows])
    right = forward(reference, expected, False)
    for layout in FORMATS:
        given = Given.draw(shape, dtype, layout, WINDOWS[windows])
        out, mean, invstd, argmax, sums, grad_x = results(emulated, given, False)
        assert torch.equal(argmax, right[3]), layout
        assert 0.2 < (argmax != 255).double().mean() < 1
        assert out.stride() == argmax.stride() == given.grad_out.stride(), layout
        if layout == "channels_last":
            first = out, mean, invstd, grad_x
        for ours, theirs in zip((out, mean, invstd, grad_x), first, strict=True):
            assert torch.equal(ours, theirs), layout
        assert_backward_is_accurate((sums, grad_x), expected, right, False)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 64])
@pytest.mark.parametrize("layout", FORMATS[:2])
def test_any_number_of_blocks(emulated: Any, layout: str, multiprocessors: int) -> None:
    emulated.configure(1, multiprocessors)
    given = Given.draw((4, 24, 30, 31), torch.float32, layout)
    out, mean, invstd, argmax, sums, grad_x = results(emulated, given, True)
    plain, exact = (results(reference, g, True) for g in (given, given.double()))
    places = argmax == exact[3]
    assert places.double().mean() > 0.999  # but where values are equal up to a rounding
    for name, index, ours in (("out", 0, out), ("mean", 1, mean), ("invstd", 2, invstd)):
        assert_as_accurate_as_eager(ours, plain[index], exact[index], name)
    assert_backward_is_accurate((sums, grad_x), given, (out, mean, invstd, argmax), True)


@pytest.mark.parametrize("layout", FORMATS[:2])
def test_results_do_not_depend_on_the_order_of_blocks_warps_and_lanes(
    emulated: Any, layout: str
) -> None:
    given = Given.draw((3, 40, 17, 9), torch.float32, layout)
    expected: tuple[Tensor, ...] | None = None
    for seed in range(6):
        emulated.configure(1000 * seed, 64)
        found = results(emulated, given, True)
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed


@pytest.mark.parametrize("layout", FORMATS)
def test_an_argmax_from_elsewhere_reads_nothing_else(emulated: Any, layout: str) -> None:
    given = Given.draw((2, 8, 5, 6), torch.float32, layout)
    generator = torch.Generator().manual_seed(0)
    argmax = torch.randint(0, 256, given.grad_out.shape, generator=generator).to(torch.uint8)
    argmax = LAYOUTS[layout][0](argmax)
    mean = given.vectors[2]
    tensors = given.grad_out, given.x, argmax
    actual = emulated.bn_relu_max_pool_backward_sums(*tensors, mean, *STEM)
    (launch,) = emulation.launches(emulated)
    workspace = launch["grid"][1] * 4 * 2 * 8 if launch["grid"][1] > 1 else 0
    most = given.grad_out.nbytes + argmax.nbytes + given.x.nbytes + mean.nbytes + workspace
    assert launch["distinct_bytes_read"] <= most
    plain = reference.bn_relu_max_pool_backward_sums(*tensors, mean, *STEM)
    doubled = given.grad_out.double(), given.x.double(), argmax
    exact = reference.bn_relu_max_pool_backward_sums(*doubled, mean.double(), *STEM)
    assert_as_accurate_as_eager(actual, plain, exact)


X, C = torch.ones(2, 3, 4, 4), torch.ones(3)
G, A = torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
BN = (C, C, C, C, False, 0.1, EPS)
BAD: dict[str, tuple[Callable[[Any], object], str]] = {
    "dimensions": (
        lambda ops: ops.bn_relu_max_pool(X[0], *BN, *STEM),
        r"bn_relu_max_pool: x must be a 4-d tensor \(N, C, H, W\), got shape \(3, 4, 4\)",
    ),
    "dtype": (
        lambda ops: ops.bn_relu_max_pool(X.double(), *BN, *STEM),
        "bn_relu_max_pool: x must be float32, float16 or bfloat16, got Double",
    ),
    "sizes": (
        lambda ops: ops.bn_relu_max_pool(X, *BN, [3], [2, 2], [1, 1]),
        "bn_relu_max_pool: kernel_size, stride and padding must be two integers each",
    ),
    "kernel": (
        lambda ops: ops.bn_relu_max_pool(X, *BN, [3, 16], [2, 2], [1, 1]),
        "bn_relu_max_pool: kernel_size must be 1 to 15 along each axis, got 16",
    ),
    "stride": (
        lambda ops: ops.bn_relu_max_pool(X, *BN, [3, 3], [0, 2], [1, 1]),
        "bn_relu_max_pool: stride must be positive, got 0",
    ),
    "padding": (
        lambda ops: ops.bn_relu_max_pool(X, *BN, [3, 3], [2, 2], [1, 2]),
        "bn_relu_max_pool: padding must be at most half of kernel_size 3, got 2",
    ),
    "room": (
        lambda ops: ops.bn_relu_max_pool(X, *BN, [5, 3], [2, 2], [0, 1]),
        "bn_relu_max_pool: x must be as large as a window, 5 pixels or more along each axis, got 4",
    ),
    "weight": (
        lambda ops: ops.bn_relu_max_pool(X, C[:2], *BN[1:], *STEM),
        "bn_relu_max_pool: weight must have one value for each channel of x",
    ),
    "grad_out shape": (
        lambda ops: ops.bn_relu_max_pool_backward_sums(X, X, A, C, *STEM),
        r"bn_relu_max_pool_backward_sums: grad_out must have the shape of the output \(2, 3,",
    ),
    "grad_out dtype": (
        lambda ops: ops.bn_relu_max_pool_backward_sums(G.half(), X, A, C, *STEM),
        "bn_relu_max_pool_backward_sums: grad_out must be Float, got Half",
    ),
    "argmax": (
        lambda ops: ops.bn_relu_max_pool_backward_sums(G, X, G, C, *STEM),
        "bn_relu_max_pool_backward_sums: argmax must be Byte, got Float",
    ),
    "format": (
        lambda ops: ops.bn_relu_max_pool_backward_sums(
            *(G.contiguous(memory_format=torch.channels_last), X, A, C), *STEM
        ),
        "bn_relu_max_pool_backward_sums: grad_out must have the memory format of x, got shape",
    ),
    "averages": (
        lambda ops: ops.bn_relu_max_pool_backward_apply(G, X, A, C, C, C, True, X[0, 0], *STEM),
        r"bn_relu_max_pool_backward_apply: averages must be float32 of shape \(2, 3\), got Float",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(emulated: Any, bad: str) -> None:
    call, message = BAD[bad]
    with pytest.raises(RuntimeError, match=f"^{message}"):
        call(emulated)


# Broken copies: one text holds all mistakes, each of which can be switched on alone.

BEFORE = """
#define dispatch_up_to_float32(op, name, dtype, ...) (__VA_ARGS__)(float{})
"""
# Running statistics are all that the mistakes need.
AFTER = """
namespace resnet_fused {
Statistics normalisation(const char* op, const Tensor& x, const BatchNormTensors& bn) {
  const int32_t float32 = aoti_torch_dtype_float32();
  return {allocate_vector(x, x.size(1), float32),
          allocate_vector(x, x.size(1), float32),
          {channel_vector(op, "mean", bn.running_mean, x),
           channel_vector(op, "var", bn.running_var, x), true, static_cast<float>(bn.eps),
           channel_vector(op, "weight", bn.weight, x), channel_vector(op, "bias", bn.bias, x)}};
}
}
"""


class Mutant(NamedTuple):
    """A mistake: what stands between the two @ of `site` becomes `new`."""

    site: str
    new: str
    found: str = "results"  # or part of an emulator's error


MUTANTS = {
    "one window too few over a pixel": Mutant(
        "return @(kernel + stride - 1)@ / stride; }", "kernel"
    ),
    "a pixel before the image": Mutant("return std::clamp(input, @0@, inputs - 1); }", "-1"),
    "a pixel behind the image": Mutant("return std::clamp(input, 0, @inputs - 1@); }", "inputs"),
    "the last tile": Mutant("return tile_ < @pixels_.tiles@; }", "pixels_.tiles - 1"),
    "rows behind the last": Mutant(
        "return @row < pixels_.height@ && column < pixels_.width; }", "true", "races|results"
    ),
    "columns behind the last": Mutant(
        "return row < pixels_.height && @column < pixels_.width@; }", "true", "races|results"
    ),
    "tiles in the wrong image": Mutant(
        "image = static_cast<int>(@down / pixels_.tiles_down@);", "0", "races|results"
    ),
    "taps of the next window": Mutant("exists[u] = @tap + u < taps@ && row", "true"),
    "taps above the image": Mutant("< taps && @row + down >= 0@ && row", "true"),
    "taps below the image": Mutant(">= 0 && @row + down < rows.inputs@ &&", "true"),
    "taps left of the image": Mutant("@column + across >= 0@ && column + across", "true"),
    "taps right of the image": Mutant(">= 0 && @column + across < columns.inputs@;", "true"),
    "rows of taps of the output's length": Mutant(
        "if (@++across == columns.kernel@) {", "++across == columns.outputs"
    ),
    "the last of equals": Mutant("if (@y > best[j]@ || y != y) {", "y >= best[j]"),
    "NaN loses": Mutant("if (y > best[j] || @y != y@) {", "false"),
    "taps counted from each load": Mutant("argmax[j] = @tap + u@;", "u"),
    "closed windows have a sum": Mutant(
        "if (@argmax.values[j] == kClosed@) continue;\n      const float g", "false"
    ),
    "the first row of taps alone": Mutant("down = @tap / columns.kernel@;", "0"),
    "sums in one place": Mutant("a.block_sums + @blockIdx.y@ * 2", "0", "races"),
    "sums of all blocks but one": Mutant("split < @gridDim.y@;", "gridDim.y - 1"),
    "the last block is not waited for": Mutant(
        "if (@!is_last_of_column(a.finished + blockIdx.x, flag)@) return;",
        "blockIdx.y != 0",
        "races|results",
    ),
    "outputs above the first": Mutant("return @output >= 0@ && output < axis", "true"),
    "outputs below the last": Mutant(">= 0 && @output < axis.outputs@ && tap", "true"),
    "taps behind the window": Mutant("&& @tap < axis.kernel@ ? tap", "true"),
    "any window's gradient": Mutant(
        "const bool is_maximum = @argmax[u].values[j] == tap[u]@;", "true"
    ),
    "vectors at any channel": Mutant(
        "if (@activation.width == 1@) {", "false", "misaligned|results"
    ),
    "windows like a stem's": Mutant(
        "return @known(windows.rows) && known(windows.columns)@;", "true"
    ),
}


@pytest.fixture(scope="module")
def broken() -> Any:
    text = (emulation.CSRC / "cuda/bn_relu_max_pool.cu").read_text()
    mistakes = ((i, m.site, m.new) for i, m in enumerate(MUTANTS.values(), 1))
    text = emulation.MISTAKE + emulation.AMID_NAN + BEFORE + emulation.with_mistakes(text, mistakes)
    text += AFTER + emulation.MAKE_MISTAKE
    return emulation.compile_sources({"max_pool": text}, "csrc/cuda/mutants.cu")["max_pool"]


@pytest.fixture
def mutants(broken: Any) -> Iterator[Any]:
    broken.configure(0, 3)
    yield broken
    broken.make_mistake(0)


def cases() -> Iterator[Given]:
    """Vectors and windows that a mistake can spoil; several tiles and parts of one."""
    for shape, windows in (
        ((3, 32, 19, 23), "stem"),
        ((2, 8, 12, 13), "overlapping"),
        ((2, 8, 9, 17), "wide"),
        ((2, 7, 9, 6), "stem"),
    ):
        given = Given.draw(shape, torch.float32, "channels_last", WINDOWS[windows])
        given.x[0, 1, 2, 2] = float("nan")
        x, grad_out = map(emulation.amid_nan, given[:2])
        yield given._replace(x=x, grad_out=grad_out)


@pytest.fixture(scope="module")
def right() -> list[tuple[Tensor, ...]]:
    library = emulation.library()
    library.configure(0, 3)
    return [calls(library, given) for given in cases()]


def calls(ops: Any, given: Given) -> tuple[Tensor, ...]:
    """Each with what the one before should have returned, and sums of an argmax from elsewhere."""
    out, _, _, argmax = forward(ops, given, False)
    *statistics, right = forward(reference, given, False)
    generator = torch.Generator().manual_seed(0)
    elsewhere = torch.randint(0, 256, right.shape, generator=generator).to(torch.uint8)
    elsewhere = elsewhere.contiguous(memory_format=torch.channels_last)
    results = [out, argmax]
    for each in map(emulation.amid_nan, (right, elsewhere)):
        results += backward(ops, given, (*statistics, each), False)
    return tuple(results)


def how_found(ops: Any, right: list[tuple[Tensor, ...]]) -> str:
    try:
        found = [calls(ops, given) for given in cases()]
    except RuntimeError as error:
        return str(error)
    pairs = (
        (a, b)
        for ours, theirs in zip(found, right, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    same = all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in pairs)
    return "nothing" if same else "results"


def test_without_a_mistake_all_is_right(mutants: Any, right: list[tuple[Tensor, ...]]) -> None:
    assert how_found(mutants, right) == "nothing"


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_found(mutants: Any, right: list[tuple[Tensor, ...]], name: str) -> None:
    if emulation.SANITIZE and name == "vectors at any channel":
        pytest.skip("it reads behind a tensor, where AddressSanitizer ends the process")
    mutants.make_mistake(1 + list(MUTANTS).index(name))
    found = how_found(mutants, right)
    assert any(part in found for part in MUTANTS[name].found.split("|")), found
