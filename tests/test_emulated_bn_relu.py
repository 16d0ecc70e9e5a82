"""bn_relu's CUDA kernels in the emulator: bytes moved, masks, order of blocks, ragged shapes.

What the operator computes in every dtype, layout and variant is tested in test_bn_relu.py, where
the emulator is one more backend.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulated_backend
import emulation
import pytest
import torch
from model_equality import distance, images, randomize, step
from numerics import LAYOUTS, Case, assert_as_accurate_as_eager, normal
from test_block_training import saved_bytes
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused import backends, cuda_chains, cuda_convolutions, reference
from resnet_fused.layout import mask_shape
from resnet_fused.nn import BasicBlock, Bottleneck

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
# Layers of ResNet-50, and one whose planes are no multiple of a vector.
LAYERS = ((1, 64, 56, 56), (2, 256, 28, 28), (4, 512, 7, 7))
# Around the borders of vectors, lanes, tiles and bytes of the mask.
RAGGED = (
    (1, 8, 1, 2),
    (2, 12, 3, 3),
    (3, 20, 5, 7),
    (2, 33, 4, 4),
    (3, 264, 5, 5),
    (1, 1, 129, 17),
    (2, 520, 2, 2),
    (5, 6, 40, 16),
)


class Given(NamedTuple):
    """Arguments of one call of the forward and its backward, in training."""

    x: Tensor
    residual: Tensor
    grad_out: Tensor
    vectors: tuple[Tensor, ...]  # weight, bias of x, then of the residual

    @staticmethod
    def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> Given:
        lay_out = LAYOUTS[layout][0]
        activations = (lay_out(normal(shape, seed + i).to(dtype)) for i in range(3))
        return Given(*activations, tuple(normal(shape[1:2], seed + i).float() for i in range(3, 7)))


@pytest.fixture
def emulated() -> Iterator[Any]:
    ops = emulation.library()
    ops.configure(0, 3)
    launches()
    yield ops
    ops.configure(0, 3)


def launches() -> list[dict[str, Any]]:
    """Those since the last call."""
    return emulation.launches(emulation.library())


Kind = str  # "none", "plain" or "dual"
KINDS = ("none", "plain", "dual")


def forward(
    ops: Any, given: Given, kind: Kind, training: bool = True, save_mask: bool = True
) -> tuple[Tensor, ...]:
    weight, bias, residual_weight, residual_bias = given.vectors
    running = [t.clone() for t in (bias, weight.abs() + 0.5)]
    dual = kind == "dual"
    other = (residual_weight, residual_bias, *(t.clone() for t in running))
    outputs: tuple[Tensor, ...] = ops.bn_relu(
        *(given.x, weight, bias, *running, training, 0.1, EPS),
        *(None if kind == "none" else given.residual, dual, *(other if dual else (None,) * 4)),
        *(training and dual, 0.1, EPS, True, save_mask and kind == "plain"),
    )
    return outputs


def backward(
    ops: Any, given: Given, kind: Kind, outputs: tuple[Tensor, ...], training: bool = True
) -> tuple[Tensor, ...]:
    _, mean, invstd, residual_mean, residual_invstd, mask = outputs
    weight, bias, residual_weight, residual_bias = given.vectors
    dual = kind == "dual"
    other = residual_weight, residual_bias, residual_mean, residual_invstd
    grads: tuple[Tensor, ...] = ops.bn_relu_backward(
        *(given.grad_out, given.x, None, mask if kind == "plain" else None, weight, bias),
        *(mean, invstd, training, kind != "none", given.residual if dual else None, dual),
        *(other if dual else (None,) * 4),
        *(training and dual, True),
    )
    return grads


def two_steps(
    ops: Any, given: Given, kind: Kind, outputs: tuple[Tensor, ...], training: bool = True
) -> tuple[Tensor, ...]:
    """What `backward` returns, by way of sums and averages."""
    _, mean, invstd, residual_mean, residual_invstd, mask = outputs
    weight, bias, residual_weight, residual_bias = given.vectors
    plain, dual = kind == "plain", kind == "dual"
    head = given.grad_out, given.x, None, mask if plain else None, weight, bias, mean, invstd
    other = residual_weight, residual_bias, residual_mean, residual_invstd
    tail = (given.residual, True, *other) if dual else (None, False, *(None,) * 4)
    sums = ops.bn_relu_backward_sums(*head, *tail, True)
    averages = sums / (given.x.size(0) * given.x.size(2) * given.x.size(3))
    grad_x, grad_residual = ops.bn_relu_backward_apply(
        *(*head, training, kind != "none", *tail, training and dual, True, averages)
    )
    of_residual = (sums[2] * residual_invstd, sums[0]) if dual else (sums.new_empty(0),) * 2
    return grad_x, sums[1] * invstd, sums[0], grad_residual, *of_residual


class Moved(NamedTuple):
    """Activations that one launch moves: tensors of the size of x, read and written, and masks."""

    kernel: str
    reads: int
    writes: int
    masks: int = 0


# Statistics of both branches are one launch; so is the backward without batch statistics.
MOVED: dict[tuple[Kind, bool], list[Moved]] = {
    ("none", True): [
        *(Moved("statistics", 1, 0), Moved("apply", 1, 1)),
        *(Moved("reduction", 2, 0), Moved("gradients", 2, 1)),
    ],
    ("plain", True): [
        *(Moved("statistics", 1, 0), Moved("apply", 2, 1, 1)),
        *(Moved("reduction", 2, 1, 1), Moved("gradients", 2, 1)),
    ],
    ("dual", True): [
        *(Moved("statistics", 2, 0), Moved("apply", 2, 1)),
        *(Moved("reduction", 3, 0), Moved("gradients", 3, 2)),
    ],
    ("none", False): [Moved("apply", 1, 1), Moved("reduction", 2, 1)],
    ("plain", False): [Moved("apply", 2, 1, 1), Moved("reduction", 2, 2, 1)],
    ("dual", False): [Moved("apply", 2, 1), Moved("reduction", 3, 2)],
}


# bn_statistics, bn_relu_backward_sums and bn_relu_backward_apply.
MOVED_IN_STEPS: dict[Kind, list[Moved]] = {
    "none": [Moved("statistics", 1, 0), Moved("reduction", 2, 0), Moved("gradients", 2, 1)],
    "plain": [Moved("statistics", 1, 0), Moved("reduction", 2, 0, 1), Moved("gradients", 2, 2, 1)],
    "dual": [Moved("statistics", 1, 0), Moved("reduction", 3, 0), Moved("gradients", 3, 2)],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_every_activation_moves_as_often_as_promised(
    emulated: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    kind: Kind,
    training: bool,
) -> None:
    given = Given.draw(shape, dtype, layout)
    outputs = forward(emulated, given, kind, training)
    backward(emulated, given, kind, outputs, training)
    assert_moved(launches(), MOVED[kind, training], given.x, layout, outputs[5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_step_moves_as_much_as_promised(
    emulated: Any, dtype: torch.dtype, layout: str, kind: Kind
) -> None:
    given = Given.draw((2, 64, 28, 28), dtype, layout)
    outputs = forward(emulated, given, kind)
    launches()
    emulated.bn_statistics(given.x)
    two_steps(emulated, given, kind, outputs)
    assert_moved(launches(), MOVED_IN_STEPS[kind], given.x, layout, outputs[5])


def assert_moved(
    records: list[dict[str, Any]], moves: list[Moved], x: Tensor, layout: str, mask: Tensor
) -> None:
    shape, dtype = x.shape, x.dtype
    run = shape[1] if layout != "nchw" else shape[2] * shape[3]
    wide = layout != "misaligned" and run * dtype.itemsize % 16 == 0
    access = 16 if wide else dtype.itemsize
    for launch, moved in zip(records, moves, strict=True):
        assert launch["kernel"].startswith((f"{moved.kernel}_kernel", f"({moved.kernel}_kernel"))
        # Everything that is not per channel, by the width of its accesses ...
        accesses = launch["accesses"]
        tensors = (moved.reads + moved.writes) * x.nbytes
        per_channel = {4} | ({access} if access == 4 else set())
        if access != 4:
            assert accesses[str(access)] == tensors // access, moved
        else:  # each thread also reads what is per channel of one channel
            threads = math.prod(launch["grid"]) * math.prod(launch["block"])
            assert 0 <= accesses["4"] - tensors // 4 <= 14 * threads, moved
        assert {int(width) for width in accesses} <= {access, *per_channel, 1}
        # ... and all that is written: statistics, parameters' gradients and what blocks leave to
        # the last of them are little beside it.
        mask_bytes = mask.numel() if moved.masks else 0
        if wide and moved.masks:
            per_byte = 8 // (16 // dtype.itemsize)
            touched = mask_bytes * (1 if moved.kernel == "apply" else per_byte)
            assert accesses["1"] == touched
        written = moved.writes * x.nbytes
        written += mask_bytes if moved.kernel == "apply" else 0
        extra = launch["bytes_written"] - written
        assert 0 <= extra <= 0.03 * x.nbytes + 100 * shape[1]


@pytest.mark.parametrize("layout", ["channels_last", "nchw", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_mask_is_that_of_the_reference(
    emulated: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    given = Given.draw(shape, dtype, layout)
    given.residual[0, 0, 0, 0] = float("nan")
    out, *_, mask = forward(emulated, given, "plain")
    assert mask.shape == mask_shape(given.x)
    assert torch.equal(mask, reference._pack_mask(out, given.x))
    passes = reference.unpack_mask(mask, given.x)
    assert torch.equal(passes, ~(out <= 0))
    assert 0 < passes.double().mean() < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_ragged_shapes(
    emulated: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: Kind
) -> None:
    check(emulated, shape, dtype, layout, kind)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 64])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_blocks(emulated: Any, kind: Kind, layout: str, multiprocessors: int) -> None:
    emulated.configure(1, multiprocessors)
    check(emulated, (4, 24, 30, 31), torch.float32, layout, kind)


def check(ops: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: Kind) -> None:
    """Forward and gradients against float64 and eager, over several draws of a small tensor."""
    names = ("out", "grad_x", "grad_weight", "grad_bias", "grad_residual", "grad_w2", "grad_b2")
    results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    for seed in Case("reference", shape, dtype, layout).draws:
        given = Given.draw(shape, dtype, layout, seed)
        outputs = forward(ops, given, kind)
        actual = outputs[0], *backward(ops, given, kind, outputs)
        plain, exact = eager(given, kind), eager(Given(*map(as_double, given)), kind)
        for name, *triple in zip(names, actual, plain, exact, strict=True):
            assert triple[0].shape == triple[1].shape, name
            results[name].append(tuple(t.flatten() for t in triple))
    for name, triples in results.items():
        of_all = (torch.cat(each) for each in zip(*triples, strict=True))
        assert_as_accurate_as_eager(*of_all, name)


def as_double(value: Tensor | tuple[Tensor, ...]) -> Any:
    return value.double() if isinstance(value, Tensor) else tuple(v.double() for v in value)


def eager(given: Given, kind: Kind) -> tuple[Tensor, ...]:
    """The output and the gradients in the order of bn_relu_backward."""
    x, residual = given.x.detach().requires_grad_(), given.residual.detach().requires_grad_()
    weight, bias, weight2, bias2 = (v.detach().requires_grad_() for v in given.vectors)
    total = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
    leaves = [x, weight, bias]
    if kind != "none":
        leaves.append(residual)
    if kind == "plain":
        total = total + residual
    elif kind == "dual":
        total = total + F.batch_norm(residual, None, None, weight2, bias2, True, 0.1, EPS)
        leaves += [weight2, bias2]
    out = torch.relu(total)
    grads = torch.autograd.grad(out, leaves, given.grad_out)
    return out.detach(), *grads, *(x.new_empty(0) for _ in range(6 - len(grads)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "nchw", "misaligned"])
def test_two_steps_are_the_backward_bit_by_bit(emulated: Any, layout: str, kind: Kind) -> None:
    for shape, dtype in zip(RAGGED[1:5], itertools.cycle(DTYPES), strict=False):
        given = Given.draw(shape, dtype, layout)
        outputs = forward(emulated, given, kind)
        expected = backward(emulated, given, kind, outputs)
        actual = two_steps(emulated, given, kind, outputs)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_results_do_not_depend_on_the_order_of_blocks_warps_and_lanes(
    emulated: Any, layout: str, kind: Kind
) -> None:
    given = Given.draw((3, 40, 17, 9), torch.float32, layout)
    expected: tuple[Tensor, ...] | None = None
    for seed in range(10):
        emulated.configure(1000 * seed, 5)
        outputs = forward(emulated, given, kind)
        results = *outputs, *backward(emulated, given, kind, outputs)
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), seed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_channels(emulated: Any, kind: Kind, training: bool) -> None:
    given = Given.draw((2, 0, 3, 3), torch.float32, "nchw")
    outputs = forward(emulated, given, kind, training)
    results = *outputs, *backward(emulated, given, kind, outputs, training)
    results += two_steps(emulated, given, kind, outputs, training)
    results += emulated.bn_statistics(given.x)
    assert outputs[0].shape == given.x.shape
    assert all(tensor.numel() == 0 for tensor in results)


@pytest.mark.parametrize(("layout", "values_in_tile"), [("channels_last", 4), ("nchw", 16)])
def test_an_outlier_that_comes_first(emulated: Any, layout: str, values_in_tile: int) -> None:
    """The first tile of a thread is summed around its first value, all others around a mean."""
    given = Given.draw((4, 16, 20, 20), torch.float32, layout)
    given.x[0, :, 0, 0] = 1e4
    _, mean, invstd, *_ = forward(emulated, given, "none")
    var, exact_mean = torch.var_mean(given.x.double(), (0, 2, 3), correction=0)
    exact_invstd = (var + EPS).rsqrt()
    eps = torch.finfo(torch.float32).eps
    # Of the rounding of x / deviation where that is 1; half of the variance's, and invstd's own.
    assert ((mean.double() - exact_mean) * exact_invstd).abs().max() < eps
    assert (invstd.double() / exact_invstd - 1).abs().max() < (values_in_tile / 2 + 1) * eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounds_to_zero_has_no_gradient(emulated: Any, dtype: torch.dtype) -> None:
    """The sign is that of the output in its own dtype, also where it is recomputed."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    given = Given.draw((4, 16, 5, 5), dtype, "channels_last")
    vectors = torch.full((16,), float(tiny)), torch.zeros(16), torch.zeros(16), torch.zeros(16)
    given = given._replace(vectors=vectors, grad_out=torch.ones_like(given.x))
    for kind in ("none", "plain"):
        given.residual.zero_()
        outputs = forward(emulated, given, kind)
        assert 0 < (outputs[0] == 0).double().mean() < 1
        grad_bias = backward(emulated, given, kind, outputs)[2]
        assert torch.equal(grad_bias, (outputs[0] > 0).sum((0, 2, 3)).float())


def without_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in (*cuda_convolutions.OPERATORS, *cuda_chains.OPERATORS):
        monkeypatch.delitem(backends._IMPLEMENTATIONS[operator], emulated_backend.NAME)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("block_class", [BasicBlock, Bottleneck])
def test_blocks_run_on_these_kernels(
    block_class: type[Any], downsample: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the convolutions are PyTorch's."""
    without_convolutions(monkeypatch)
    planes = 16
    channels = planes if downsample else planes * block_class.expansion
    shortcut = torch.nn.Sequential(
        torch.nn.Conv2d(channels, planes * block_class.expansion, 1, 2, bias=False),
        torch.nn.BatchNorm2d(planes * block_class.expansion),
    )
    block = block_class(channels, planes, 2 if downsample else 1, shortcut if downsample else None)
    randomize(block)
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(9):
        x = images(2, channels, 10, 10, seed=seed).contiguous(memory_format=torch.channels_last)
        with rf.backend("reference"):
            exact = step(copy.deepcopy(block).double(), x.double(), training)
            plain = step(copy.deepcopy(block), x, training)
        launches()
        with rf.backend(emulated_backend.NAME):
            fused = step(copy.deepcopy(block), x, training)
        kernels = {r["kernel"].strip("(").partition("<")[0] for r in launches()}
        assert kernels >= {"apply_kernel", "reduction_kernel"}
        assert ("statistics_kernel" in kernels) is training
        for name, tensor in exact.items():
            pair = distance(fused[name], tensor), distance(plain[name], tensor)
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        error, eager_error = (statistics.median(each) for each in zip(*pairs, strict=True))
        limit = 2 * eager_error + torch.finfo(torch.float32).eps
        assert error <= limit, f"{name}: {error=:.2e} exceeds 2 x {eager_error=:.2e}"


@pytest.mark.parametrize("downsample", [False, True])
def test_inference_is_one_pass_after_each_convolution(
    downsample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the convolutions are PyTorch's, as on a GPU as long as nothing else is asked for."""
    without_convolutions(monkeypatch)
    assert kernels_of_inference(downsample) == ["apply_kernel"] * 3


@pytest.mark.parametrize("downsample", [False, True])
def test_inference_is_convolutions_alone(downsample: bool) -> None:
    last = "conv_projection_kernel" if downsample else "conv_kernel"
    kernels = [kernel for kernel in kernels_of_inference(downsample) if "pack" not in kernel]
    assert kernels == ["conv_kernel", "conv_kernel", last]


def kernels_of_inference(downsample: bool) -> list[str]:
    """What a Bottleneck launches, in order."""
    shortcut = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64))
    block = Bottleneck(64, 16, downsample=shortcut if downsample else None).eval()
    x = images(2, 64, 7, 7).contiguous(memory_format=torch.channels_last)
    launches()
    with torch.no_grad(), rf.backend(emulated_backend.NAME):
        out = randomize(block)(x)
    kernels = [record["kernel"].strip("(").partition("<")[0] for record in launches()]
    with torch.no_grad(), rf.backend("reference"):
        torch.testing.assert_close(out, block(x))
    return kernels


def test_a_block_keeps_a_mask_in_place_of_its_output() -> None:
    block = Bottleneck(64, 16).train()
    x = images(2, 64, 14, 14).contiguous(memory_format=torch.channels_last).requires_grad_()
    pixels = 2 * 14 * 14
    activations = 4 * pixels * (16 + 16 + 64)  # conv1, conv2, conv3
    statistics = 4 * 2 * (16 + 16 + 64)
    with rf.backend(emulated_backend.NAME):
        assert saved_bytes(block, x) == activations + statistics + pixels * 64 // 8


X = torch.ones(2, 3, 4, 5)
C = torch.ones(3)
REST = (0.1, EPS, None, False, *(None,) * 4, False, 0.1, EPS, True, False)
BAD: dict[str, tuple[Callable[[Any], object], str]] = {
    "dimensions": (
        lambda ops: ops.bn_relu(X[0], C, C, C, C, True, *REST),
        r"bn_relu: x must be a 4-d tensor \(N, C, H, W\), got shape \(3, 4, 5\)",
    ),
    "strides": (
        lambda ops: ops.bn_relu(X[..., ::2], C, C, C, C, True, *REST),
        "bn_relu: x must be a 4-d tensor, contiguous or channels_last, got shape",
    ),
    "dtype": (
        lambda ops: ops.bn_relu(X.double(), C, C, C, C, True, *REST),
        "bn_relu: x must be float32, float16 or bfloat16, got Double",
    ),
    "weight": (
        lambda ops: ops.bn_relu(X, C[:2], C, C, C, True, *REST),
        r"bn_relu: weight must have one value for each channel of x, shape \(3,\), got shape",
    ),
    "running statistics": (
        lambda ops: ops.bn_relu(X, C, C, None, C, False, *REST),
        "bn_relu: running_mean and running_var must be given when not training, got None",
    ),
    "one value": (
        lambda ops: ops.bn_relu(X[:1, :, :1, :1].contiguous(), C, C, C, C, True, *REST),
        r"bn_relu: expected more than 1 value per channel when training, got input size \(1, 3",
    ),
    "save_mask": (
        lambda ops: ops.bn_relu(X, C, C, C, C, True, *REST[:-1], True),
        "bn_relu: save_mask must come with relu and a residual without residual_bn",
    ),
    "mask missing": (
        lambda ops: ops.bn_relu_backward(
            *(X, X, X, None, C, C, C, C, True, True, None, False, *(None,) * 4, False, True)
        ),
        "bn_relu_backward: mask must be given with relu and a plain residual, got None",
    ),
    "mask shape": (
        lambda ops: ops.bn_relu_backward(
            *(X, X, None, torch.ones(6, 2, dtype=torch.uint8), C, C, C, C, True, True, None),
            *(False, *(None,) * 4, False, True),
        ),
        r"bn_relu_backward: mask must be the contiguous uint8 tensor of shape \(6, 3\) that the",
    ),
    "sums: output in place of a mask": (
        lambda ops: ops.bn_relu_backward_sums(
            *(X, X, X, None, C, C, C, C, None, False, *(None,) * 4, True)
        ),
        "bn_relu_backward_sums: mask must be given with relu and a plain residual, got None",
    ),
    "averages": (
        lambda ops: ops.bn_relu_backward_apply(
            *(X, X, None, None, C, C, C, C, True, False, None, False, *(None,) * 4, False, True),
            torch.ones(3, 3),
        ),
        r"bn_relu_backward_apply: averages must be a contiguous float32 tensor of shape \(2, 3\)",
    ),
    "grad_out": (
        lambda ops: ops.bn_relu_backward(
            *(X[:1], X, None, None, C, C, C, C, True, False, None, False, *(None,) * 4, False, True)
        ),
        "bn_relu_backward: grad_out must have the shape of x",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(emulated: Any, bad: str) -> None:
    call, message = BAD[bad]
    with pytest.raises(RuntimeError, match=f"^{message}"):
        call(emulated)


def with_headers(source: str) -> str:
    """A source with the kernels' own headers in place of their #include lines, for one dtype."""
    text = (emulation.CSRC / source).read_text()
    seen: set[str] = set()

    def paste(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        header = (emulation.CSRC / name).read_text().replace("#pragma once", "")
        return re.sub(r'#include "(cuda/(?!platform)\w+\.h)"', paste, header)

    text = re.sub(r'#include "(cuda/(?!platform)\w+\.h)"', paste, text)
    only_float = "#define dispatch_up_to_float32(op, name, dtype, ...) (__VA_ARGS__)(float{})\n"
    return text.replace("namespace resnet_fused {", only_float + "namespace resnet_fused {", 1)


class Mutant(NamedTuple):
    """A change to a kernel that makes it wrong."""

    source: str
    old: str
    new: str
    message: str | None  # of the emulator's error; None where the results are wrong


MUTANTS = {
    "barrier before the sums are read": Mutant(
        "cuda/bn_relu.cu",
        "    __syncthreads();\n    if (row < half) {",
        "    if (row < half) {",
        "statistics_kernel.*(races|uninitialised)",
    ),
    "barrier before the sums are overwritten": Mutant(
        "cuda/bn_relu.cu",
        "      combine(values, others);\n    }\n    __syncthreads();",
        "      combine(values, others);\n    }",
        "statistics_kernel.*races",
    ),
    "barrier before the last block is known": Mutant(
        "cuda/bn_relu.cu",
        "  __syncthreads();\n  const bool last",
        "  const bool last",
        "statistics_kernel.*(races|uninitialised)",
    ),
    "the last but one block finishes": Mutant(
        "cuda/bn_relu.cu", "== gridDim.y - 1", "== gridDim.y - 2", None
    ),
    "one row too few": Mutant(
        "cuda/bn_relu.cu",
        "< extent_.rows &&",
        "< extent_.rows - 1 &&",
        None,
    ),
    "mask of the neighbour": Mutant(
        "cuda/bn_relu.cu",
        "static_cast<int>(channel_ % kMaskBits)",
        "static_cast<int>((channel_ + 4) % kMaskBits)",
        None,
    ),
    "the shuffle of some lanes only": Mutant(
        "cuda/bn_relu.cu",
        "      if constexpr (kSaveMask) {\n        store_mask",
        "      if (kSaveMask && walk.valid(u)) {\n        store_mask",
        "apply_kernel.*divergent warp collective",
    ),
    "no mask for the gradient of x": Mutant(
        "cuda/bn_relu_backward.cu", "passes = bits[u] >> j & 1;", "passes = true;", None
    ),
    "the averages of x for the residual": Mutant(
        "cuda/bn_relu_backward.cu",
        "average_dy_xc + extent.channels, first",
        "average_dy_xc, first",
        None,
    ),
    "sums of all blocks but one": Mutant(
        "cuda/bn_relu_backward.cu", "split < gridDim.y;", "split < gridDim.y - 1;", None
    ),
    "vectors at any channel": Mutant(
        "cuda/bn_relu_backward.cu", "run * element % kVectorBytes == 0", "run > 0", "misaligned"
    ),
}


@pytest.fixture(scope="module")
def mutants() -> dict[str, Any]:
    sources = {m.source: with_headers(m.source) for m in MUTANTS.values()}
    texts = {f"original_{i}": text for i, text in enumerate(sources.values())}
    for i, mutant in enumerate(MUTANTS.values()):
        texts[f"mutant_{i}"] = emulation.mutate(sources[mutant.source], mutant.old, mutant.new)
    compiled = emulation.compile_sources(texts, "csrc/cuda/mutant.cu")
    named = dict(zip(MUTANTS, (compiled[f"mutant_{i}"] for i in range(len(MUTANTS))), strict=True))
    return named | {source: compiled[f"original_{i}"] for i, source in enumerate(sources)}


def run(ops: Any, source: str, expected: Any) -> bool:
    """Whether the kernels of one source give what those of the library give."""
    given = Given.draw((3, 38, 23, 50), torch.float32, "channels_last")
    for kind in KINDS:
        outputs = forward(expected, given, kind)
        if source == "cuda/bn_relu.cu":
            right, results = outputs, forward(ops, given, kind)
        else:
            right, results = (
                (*backward(each, given, kind, outputs), *two_steps(each, given, kind, outputs))
                for each in (expected, ops)
            )
        if not all(torch.equal(a, b) for a, b in zip(results, right, strict=True)):
            return False
    return True


@pytest.mark.parametrize("source", ["cuda/bn_relu.cu", "cuda/bn_relu_backward.cu"])
def test_unbroken_copies_are_right(emulated: Any, mutants: dict[str, Any], source: str) -> None:
    mutants[source].configure(0, 3)
    assert run(mutants[source], source, emulated)


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernels_are_caught(emulated: Any, mutants: dict[str, Any], name: str) -> None:
    mutant = MUTANTS[name]
    mutants[name].configure(0, 3)
    if mutant.message is None:
        assert not run(mutants[name], mutant.source, emulated)
    else:
        with pytest.raises(RuntimeError, match=mutant.message):
            run(mutants[name], mutant.source, emulated)
