"""bn_relu, add_relu and the reductions in Triton, run by the interpreter: tiles, order, masks.

What the operators compute in every dtype, layout and variant is tested in test_bn_relu.py and
test_add_relu.py, where the interpreter is one more backend.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import interpreted_backend
import pytest
import torch
from numerics import LAYOUTS, assert_as_accurate_as_eager, normal
from torch import Tensor

from resnet_fused import reference
from resnet_fused.layout import mask_shape

if not interpreted_backend.ENABLED:
    pytest.skip(interpreted_backend.REASON, allow_module_level=True)

import interpretation

from resnet_fused.triton_kernels import activations, device, reductions
from resnet_fused.triton_kernels import add_relu as add_relu_module
from resnet_fused.triton_kernels import bn_relu as forward_module
from resnet_fused.triton_kernels import bn_relu_backward as backward_module
from resnet_fused.triton_kernels import bn_statistics as statistics_module

pytestmark = pytest.mark.interpreter

# Tiles of a few hundred elements, and programs enough for every split of the reductions.
TINY = activations.Spread(vectors=2, columns=1, programs=4, min_tiles=2, warps=1)
FORWARD = forward_module.Configuration(TINY, TINY._replace(min_tiles=1))
BACKWARD = backward_module.Configuration(TINY, TINY._replace(min_tiles=1))
bn_relu = interpreted_backend.on_uninitialised_memory(forward_module.bn_relu)
bn_relu_backward = interpreted_backend.on_uninitialised_memory(forward_module.bn_relu_backward)
backward_sums = interpreted_backend.on_uninitialised_memory(backward_module.bn_relu_backward_sums)
backward_apply = interpreted_backend.on_uninitialised_memory(backward_module.bn_relu_backward_apply)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("channels_last", "nchw")
KINDS = ("none", "plain", "dual")
EPS = 1e-5
# Around the borders of vectors, tiles and bytes of the mask; the last ones in many tiles.
SHAPES = ((3, 5, 3, 3), (2, 12, 4, 5), (1, 33, 7, 3), (3, 20, 17, 11), (7, 3, 23, 16))
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES[: 3 if shape[2] == 4 else 1]]


class Given(NamedTuple):
    """Arguments of one call of the forward and its backward."""

    x: Tensor
    residual: Tensor
    grad_out: Tensor
    vectors: tuple[Tensor, ...]  # weight, bias, running mean and variance; those of the residual

    @staticmethod
    def draw(
        shape: Sequence[int], dtype: torch.dtype, layout: str, offset: float = 0.5, seed: int = 0
    ) -> Given:
        x, residual, grad_out = (
            LAYOUTS[layout][0]((normal(shape, seed + i) + offset * (i < 2)).to(dtype))
            for i in range(3)
        )
        vectors = [normal(shape[1:2], seed + i).float() for i in range(3, 11)]
        vectors[3::4] = [v.abs() + 0.5 for v in vectors[3::4]]
        return Given(x, residual, grad_out, tuple(vectors))

    def double(self) -> Given:
        return Given(*(t.double() for t in self[:3]), tuple(v.double() for v in self.vectors))


def forward(
    function: Any, given: Given, kind: str, training: bool = True, relu: bool = True, **named: Any
) -> dict[str, Tensor]:
    """Outputs by name, with the running statistics."""
    weight, bias, *running, weight2, bias2, mean2, var2 = (v.clone() for v in given.vectors)
    running += [mean2, var2]
    dual = kind == "dual"
    outputs = function(
        *(given.x, weight, bias, *running[:2], training, 0.1, EPS),
        *(None if kind == "none" else given.residual, dual),
        *((weight2, bias2, *running[2:]) if dual else (None,) * 4),
        *(training and dual, 0.2, 2 * EPS, relu, relu and kind == "plain"),
        **named,
    )
    names = "out", "mean", "invstd", "residual_mean", "residual_invstd", "mask"
    updated = {f"running {i}": tensor for i, tensor in enumerate(running)}
    return dict(zip(names, outputs, strict=True)) | updated


GRADIENTS = ("x", "weight", "bias", "residual", "residual weight", "residual bias")


def backward(
    function: Any,
    given: Given,
    kind: str,
    outputs: dict[str, Tensor],
    training: bool = True,
    residual_training: bool = True,
    sign: str = "mask",
    **named: Any,
) -> dict[str, Tensor]:
    weight, bias, _, _, weight2, bias2, *_ = given.vectors
    dual = kind == "dual"
    other = weight2, bias2, outputs["residual_mean"], outputs["residual_invstd"]
    grads = function(
        *(given.grad_out, given.x, outputs["out"] if sign == "out" else None),
        *(outputs["mask"] if sign == "mask" else None, weight, bias),
        *(outputs["mean"], outputs["invstd"], training, kind != "none"),
        *(given.residual if dual else None, dual, *(other if dual else (None,) * 4)),
        *(dual and residual_training, sign != "none"),
        **named,
    )
    return dict(zip(GRADIENTS, grads, strict=True))


def assert_accurate(
    actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    for name, tensor in actual.items():
        assert tensor.shape == plain[name].shape, name
        assert tensor.dtype == plain[name].dtype, name
        if tensor.dtype == torch.uint8:
            assert torch.equal(tensor, plain[name])
        else:
            assert_as_accurate_as_eager(tensor, plain[name], exact[name], name)


# ---- Forward ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward_in_many_tiles(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: str
) -> None:
    given = Given.draw(shape, dtype, layout)
    outputs = forward(bn_relu, given, kind, configuration=FORWARD)
    expected = forward(reference.bn_relu, given, kind)
    if kind == "plain":  # the bits are those of this output
        expected["mask"] = reference._pack_mask(outputs["out"], given.x)
        assert outputs["mask"].shape == mask_shape(given.x)
    assert_accurate(outputs, expected, forward(reference.bn_relu, given.double(), kind))
    assert outputs["out"].stride() == given.x.stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FORMATS)
def test_evaluation_is_one_launch(layout: str, kind: str) -> None:
    given = Given.draw((3, 20, 23, 17), torch.float32, layout)
    with launches() as kernels:
        outputs = forward(bn_relu, given, kind, training=False, configuration=FORWARD)
    assert kernels == ["_apply_kernel"]
    expected = forward(reference.bn_relu, given, kind, training=False)
    assert_accurate(
        outputs, expected, forward(reference.bn_relu, given.double(), kind, training=False)
    )


@pytest.mark.parametrize("offset", [50.0, 1000.0])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_far_from_zero(dtype: torch.dtype, layout: str, offset: float) -> None:
    given = Given.draw((4, 10, 20, 20), dtype, layout, offset)
    outputs = forward(bn_relu, given, "none", configuration=FORWARD)
    expected = forward(reference.bn_relu, given, "none")
    assert_accurate(outputs, expected, forward(reference.bn_relu, given.double(), "none"))


@pytest.mark.parametrize("layout", FORMATS)
def test_an_outlier_that_comes_first(layout: str) -> None:
    given = Given.draw((4, 16, 20, 20), torch.float32, layout)
    given.x[0, :, 0, 0] = 1e4
    outputs = forward(bn_relu, given, "none", configuration=FORWARD)
    var, mean = torch.var_mean(given.x.double(), (0, 2, 3), correction=0)
    invstd = (var + EPS).rsqrt()
    eps = torch.finfo(torch.float32).eps
    # In units of the deviation, which the outlier makes 250 times as large.
    assert ((outputs["mean"].double() - mean) * invstd).abs().max() < 4 * eps
    assert (outputs["invstd"].double() / invstd - 1).abs().max() < 4 * eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_vectors_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    given = Given.draw((2, 12, 4, 5), torch.float32, "channels_last")
    wide = [torch.stack([v, v], 1).to(dtype) for v in given.vectors]
    strided = given._replace(vectors=tuple(w[:, 0] for w in wide))
    dense = given._replace(vectors=tuple(w[:, 0].contiguous() for w in wide))
    weight, bias, mean, var = strided.vectors[:4]
    outputs = bn_relu(
        *(given.x, weight, bias, mean, var, True, 0.1, EPS, None, False, *(None,) * 4, False),
        *(0.1, EPS, True, False),
    )
    expected = forward(bn_relu, dense, "none")
    assert torch.equal(outputs[0], expected["out"])
    assert torch.equal(mean, expected["running 0"]), "not updated in place"
    assert torch.equal(var, expected["running 1"]), "not updated in place"
    assert torch.equal(wide[2][:, 1], given.vectors[2].to(dtype)), "updated the neighbours"


# ---- Backward ----


BACKWARDS = [
    (kind, training, sign)
    for kind in KINDS
    for training in (("both", "own", "other", "neither") if kind == "dual" else ("own", "neither"))
    for sign in ("mask", "out", "none", *(() if kind == "plain" else ("recomputed",)))
]


@pytest.mark.parametrize(("kind", "training", "sign"), BACKWARDS)
@pytest.mark.parametrize("layout", FORMATS)
def test_every_backward(layout: str, kind: str, training: str, sign: str) -> None:
    given = Given.draw((3, 20, 9, 7), torch.float32, layout)
    outputs = forward(reference.bn_relu, given, kind, relu=sign != "none")
    outputs["mask"] = reference._pack_mask(outputs["out"], given.x)
    exact_outputs = {n: t.double() if t.is_floating_point() else t for n, t in outputs.items()}
    flags = {
        "training": training in ("both", "own"),
        "residual_training": training in ("both", "other"),
    }
    with launches() as kernels:
        grads = backward(
            *(bn_relu_backward, given, kind, outputs), sign=sign, configuration=BACKWARD, **flags
        )
    passes = 1 if training == "neither" else 2
    assert kernels == ["_reduction_kernel", "_finalize_kernel", "_gradients_kernel"][: passes + 1]
    assert_accurate(
        grads,
        backward(reference.bn_relu_backward, given, kind, outputs, sign=sign, **flags),
        backward(
            reference.bn_relu_backward, given.double(), kind, exact_outputs, sign=sign, **flags
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_backward_in_many_tiles(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: str
) -> None:
    """As many draws as it takes to see 16 channels: of a few, plain PyTorch may round luckily."""
    collected: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(0, 100 * -(-16 // shape[1]), 100):
        given = Given.draw(shape, dtype, layout, seed=seed)
        outputs = forward(reference.bn_relu, given, kind)
        exact_outputs = {n: t.double() if t.is_floating_point() else t for n, t in outputs.items()}
        sign = "mask" if kind == "plain" else "recomputed"
        grads = backward(bn_relu_backward, given, kind, outputs, sign=sign, configuration=BACKWARD)
        plain = backward(reference.bn_relu_backward, given, kind, outputs, sign=sign)
        exact = backward(reference.bn_relu_backward, given.double(), kind, exact_outputs, sign=sign)
        assert grads["x"].stride() == given.x.stride()
        for name, tensor in grads.items():
            assert (tensor.dtype, tensor.shape) == (plain[name].dtype, exact[name].shape), name
            collected.setdefault(name, []).append((tensor, plain[name], exact[name]))
    for name, triples in collected.items():
        of_all = (torch.cat([t.flatten() for t in each]) for each in zip(*triples, strict=True))
        assert_as_accurate_as_eager(*of_all, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FORMATS)
def test_two_steps_are_the_backward_bit_by_bit(layout: str, kind: str) -> None:
    given = Given.draw((3, 20, 9, 7), torch.float32, layout)
    outputs = forward(reference.bn_relu, given, kind)
    sign = "mask" if kind == "plain" else "recomputed"

    def in_two_steps(*args: Any, **named: Any) -> tuple[Tensor, ...]:
        sums = backward_sums(*args[:8], *args[10:16], args[17], **named)
        grad_x, grad_residual = backward_apply(*args, sums / (3 * 9 * 7), **named)
        of_residual = sums.new_empty(0), sums.new_empty(0)
        if kind == "dual":
            of_residual = sums[2] * args[15], sums[0]
        return grad_x, sums[1] * args[7], sums[0], grad_residual, *of_residual

    with launches() as kernels:
        actual = backward(in_two_steps, given, kind, outputs, sign=sign, configuration=BACKWARD)
    assert kernels == ["_reduction_kernel", "_finalize_kernel", "_gradients_kernel"]
    expected = backward(bn_relu_backward, given, kind, outputs, sign=sign, configuration=BACKWARD)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounds_to_zero_has_no_gradient(dtype: torch.dtype) -> None:
    """The sign is that of the output in its own dtype, also where it is recomputed."""
    tiny = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    given = Given.draw((4, 16, 5, 5), dtype, "channels_last")
    zero, ones = torch.zeros(16), torch.ones(16)
    vectors = torch.full((16,), tiny), zero, zero, ones, zero, zero, zero, ones
    given = given._replace(vectors=vectors, grad_out=torch.ones_like(given.x))
    given.residual.zero_()
    for kind in ("none", "plain"):
        outputs = forward(bn_relu, given, kind)
        assert 0 < (outputs["out"] == 0).double().mean() < 1
        sign = "mask" if kind == "plain" else "recomputed"
        grads = backward(bn_relu_backward, given, kind, outputs, sign=sign)
        assert torch.equal(grads["bias"], (outputs["out"] > 0).sum((0, 2, 3)).float())


def test_the_recomputed_sign_is_that_of_the_output() -> None:
    """Bit by bit: computed in another order, it differs where the mean is far from zero."""
    given = Given.draw((4, 16, 9, 9), torch.float32, "channels_last", offset=1e5)
    given = given._replace(grad_out=torch.ones_like(given.x))
    outputs = forward(bn_relu, given, "none")
    grads = backward(bn_relu_backward, given, "none", outputs, sign="recomputed")
    assert torch.equal(grads["bias"], (outputs["out"] > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("sign", ["mask", "out", "recomputed"])
def test_nan_passes_the_relu(sign: str) -> None:
    given = Given.draw((2, 12, 4, 5), torch.float32, "channels_last")
    given.x[0, :, 0, 0] = float("nan")
    outputs = forward(bn_relu, given, "none", training=False)
    outputs["mask"] = reference._pack_mask(outputs["out"], given.x)
    plain = {
        name: backward(bn_relu_backward, given, "none", outputs, False, sign=name)["x"]
        for name in (sign, "none")
    }
    assert not plain["none"][0, :, 0, 0].isnan().any()
    assert torch.equal(plain[sign][0, :, 0, 0], plain["none"][0, :, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_vectors_have_their_dtype(dtype: torch.dtype) -> None:
    given = Given.draw((2, 12, 4, 5), torch.float32, "channels_last")
    given = given._replace(vectors=tuple(v.to(dtype) for v in given.vectors))
    outputs = forward(reference.bn_relu, given, "dual")
    grads = backward(bn_relu_backward, given, "dual", outputs, sign="recomputed")
    for name in ("weight", "bias", "residual weight", "residual bias"):
        assert grads[name].dtype == dtype, name


# ---- Both ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FORMATS)
def test_results_do_not_depend_on_the_order_of_programs(layout: str, kind: str) -> None:
    """The interpreter draws another order for every launch."""
    given = Given.draw((2, 10, 13, 11), torch.float32, layout)
    results = []
    for _ in range(3):
        outputs = forward(bn_relu, given, kind, configuration=FORWARD)
        sign = "mask" if kind == "plain" else "recomputed"
        results.append(
            outputs
            | backward(bn_relu_backward, given, kind, outputs, sign=sign, configuration=BACKWARD)
        )
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


def test_launches_of_a_training_step() -> None:
    given = Given.draw((2, 12, 4, 5), torch.float32, "channels_last")
    statistics = ["_statistics_kernel", "_finalize_kernel"]
    for kind in KINDS:
        with launches() as kernels:
            forward(bn_relu, given, kind)
        assert kernels == statistics * (1 + (kind == "dual")) + ["_apply_kernel"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_channels(kind: str, training: bool) -> None:
    given = Given.draw((2, 0, 3, 3), torch.float32, "nchw")
    with launches() as kernels:
        outputs = forward(bn_relu, given, kind, training)
        grads = backward(bn_relu_backward, given, kind, outputs, training, training)
        outputs |= {"m2": statistics_module.bn_statistics(given.x)[1]}
    assert kernels == []
    assert outputs["out"].shape == given.x.shape
    assert all(tensor.numel() == 0 for tensor in (*outputs.values(), *grads.values()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_pixels_in_evaluation(kind: str, layout: str, shape: tuple[int, ...]) -> None:
    given = Given.draw(shape, torch.float32, layout)
    outputs = forward(bn_relu, given, kind, training=False)
    assert torch.equal(outputs["mean"], given.vectors[2])
    grads = backward(bn_relu_backward, given, kind, outputs, False, False)
    assert torch.equal(grads["weight"], torch.zeros(3))
    assert torch.equal(grads["bias"], torch.zeros(3))


# ---- Plans ----


def test_a_small_tensor_is_not_spread_over_the_whole_device() -> None:
    """The last layer of a ResNet for CIFAR: 8192 values per channel."""
    x = torch.empty(128, 64, 8, 8)
    for layout in FORMATS:
        given = LAYOUTS[layout][0](x)
        (choice, *_) = forward_module.configurations(False, x.dtype, device.architecture(x))
        plan = activations.plan(choice.statistics, given)
        assert plan.walk["n_tiles"] * plan.walk["BLOCK_ROWS"] * plan.walk[
            "BLOCK_COLUMNS"
        ] <= 8192 * (64 if layout == "channels_last" else 1)


@pytest.mark.parametrize("plane", [3136, 784, 192, 64])
def test_planes_are_cut_where_little_is_left_over(plane: int) -> None:
    plan = activations.plan(activations.Spread(4, 16, 2), torch.empty(64, 8, plane, 1))
    columns = plan.walk["BLOCK_COLUMNS"]
    assert -(-plane // columns) * columns <= 1.1 * plane
    assert plan.whole_tiles == (plan.walk["n_tiles"] if plane % columns == 0 else 0)


# ---- Reductions ----


@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize("rows", [1, 3, 255, 257, 1025, 5000])
def test_statistics_of_all_rows(rows: int, channels: int) -> None:
    counts = torch.randint(0, 200, (rows,), generator=torch.Generator().manual_seed(0)).float()
    counts[-1] = 3
    means = normal((rows, channels), 1).float() + 300
    m2s = normal((rows, channels), 2).float().square()
    means[counts == 0] = 0
    m2s[counts == 0] = 0
    with launches() as kernels:
        mean, m2 = reductions.combine_statistics(counts, means, m2s)
    assert len(kernels) == len(reductions.stages(rows, channels)) == (1 if rows <= 1024 else 2)
    weights, means, m2s = counts.double()[:, None], means.double(), m2s.double()
    expected = (weights * means).sum(0) / weights.sum()
    expected_m2 = (m2s + weights * (means - expected).square()).sum(0)
    eps = torch.finfo(torch.float32).eps
    assert mean.shape == m2.shape == (channels,)
    assert ((mean - expected) / expected).abs().max() <= eps
    assert ((m2 - expected_m2) / expected_m2).abs().max() <= 16 * eps
    again = reductions.combine_statistics(counts, means.float(), m2s.float())
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], m2)


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("shape", [(0, 3), (1, 40), (300, 9), (1025, 20), (4, 5000)], ids=str)
def test_sums_of_all_rows(shape: tuple[int, int], tensors: int) -> None:
    partials = [normal(shape, i).float() for i in range(tensors)]
    sums = reductions.sum_partials(*partials)
    again = reductions.sum_partials(*partials)
    assert len(sums) == tensors
    for partial, total, repeated in zip(partials, sums, again, strict=True):
        assert total.shape == shape[1:]
        assert torch.equal(total, repeated)
        bound = torch.finfo(torch.float32).eps * partial.double().abs().sum(0)
        assert ((total - partial.double().sum(0)).abs() <= bound).all()


def test_reductions_over_no_rows_and_no_channels() -> None:
    nothing = torch.empty(0, 3)
    assert torch.equal(
        reductions.combine_statistics(torch.empty(0), nothing, nothing)[1], torch.zeros(3)
    )
    assert reductions.sum_partials(torch.empty(4, 0))[0].shape == (0,)


# ---- add_relu ----


@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "elements"), [*itertools.product(DTYPES, (1, 1023, 4096, 9001))])
def test_add_relu_in_many_tiles(dtype: torch.dtype, elements: int, vectors: int) -> None:
    x, residual, grad_out = (normal((1, 1, 1, elements), i).to(dtype) for i in range(3))
    x[..., 0] = float("nan")
    configuration = add_relu_module.Configuration(vectors, warps=2)
    with launches(lambda executor: executor.grid) as grids:
        out = add_relu_module.add_relu(x, residual, configuration)
    block = 2 * 32 * vectors * 16 // dtype.itemsize
    assert grids == [(-(-elements // block),)]
    assert torch.equal(out.nan_to_num(7.0), reference.add_relu(x, residual).nan_to_num(7.0))
    grad = add_relu_module.add_relu_backward(grad_out, out, configuration)
    assert torch.equal(grad, reference.add_relu_backward(grad_out, out))


@contextlib.contextmanager
def launches(
    described: Callable[[Any], Any] = lambda executor: executor.fn.__name__,
) -> Iterator[list[Any]]:
    """Names of the kernels that are launched inside, or what else `described` says of them."""
    found: list[Any] = []
    executor = interpretation.upstream.GridExecutor
    call = executor.__call__

    def recorded_call(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(described(self))
        call(self, *args, **kwargs)

    executor.__call__ = recorded_call
    try:
        yield found
    finally:
        executor.__call__ = call
