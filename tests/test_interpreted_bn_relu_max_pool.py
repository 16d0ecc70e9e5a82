"""bn_relu_max_pool in Triton, run by the interpreter: tiles, windows, order of programs.

What the operators compute in every dtype and layout is tested in test_bn_relu_max_pool.py, where
the interpreter is one more backend.
"""

from __future__ import annotations

from typing import Any

import interpreted_backend
import pytest
import torch
from numerics import LAYOUTS, assert_as_accurate_as_eager, normal
from torch import Tensor

from resnet_fused import reference
from resnet_fused.layout import pooled_shape

if not interpreted_backend.ENABLED:
    pytest.skip(interpreted_backend.REASON, allow_module_level=True)

from test_interpreted_bn_relu import TINY, launches

from resnet_fused.triton_kernels import bn_relu_max_pool as module

pytestmark = pytest.mark.interpreter

CONFIGURATION = module.Configuration(*(TINY._replace(vectors=1) for _ in range(4)))
FORWARD, SUMS, APPLY = (
    interpreted_backend.on_uninitialised_memory(getattr(module, f"bn_relu_max_pool{part}"))
    for part in ("", "_backward_sums", "_backward_apply")
)
EPS = 1e-5
Windows = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
STEM: Windows = ((3, 3), (2, 2), (1, 1))
WIDE: Windows = ((2, 5), (1, 4), (1, 2))
# In channels_last programs see all channels, in NCHW one: with few of them there are few programs.
CASES = [
    ("channels_last", (2, 12, 9, 7), torch.float32, STEM, True),
    ("channels_last", (1, 16, 12, 9), torch.bfloat16, STEM, False),
    ("channels_last", (1, 16, 7, 13), torch.float16, WIDE, True),
    ("nchw", (3, 2, 17, 11), torch.bfloat16, STEM, True),
    ("nchw", (2, 3, 8, 16), torch.float32, WIDE, False),
]


def draw(layout: str, shape: tuple[int, ...], dtype: torch.dtype, windows: Windows) -> Any:
    """An activation, the gradient of its output, and weight, bias, running mean and variance."""
    # In tenths: values of one window are often equal.
    x = ((normal(shape, 0) * 10).round() / 10).to(dtype)
    grad_out = normal(pooled_shape(shape, *windows), 1).to(dtype)
    vectors = [normal(shape[1:2], i).float() for i in range(2, 6)]
    vectors[1][0] = -2  # closes windows
    vectors[3] = vectors[3].abs() + 0.5
    return *map(LAYOUTS[layout][0], (x, grad_out)), vectors


def backward(
    sums_of: Any,
    apply: Any,
    tensors: tuple[Tensor, ...],
    vectors: list[Tensor],
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    """tensors: grad_out, x, argmax; vectors: weight, mean, invstd; rest: training, windows."""
    weight, mean, invstd = vectors
    training, *windows = rest
    sums = sums_of(*tensors, mean, *windows, **named)
    averages = sums / (tensors[1].numel() // tensors[1].size(1))
    return sums, apply(*tensors, weight, mean, invstd, training, averages, *windows, **named)


@pytest.mark.parametrize(("layout", "shape", "dtype", "windows", "training"), CASES, ids=str)
def test_many_tiles(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype, windows: Windows, training: bool
) -> None:
    x, grad_out, vectors = draw(layout, shape, dtype, windows)
    found = []
    with launches() as kernels:
        for _ in range(2):  # in another order of programs
            out, *statistics, argmax = FORWARD(
                *(x, *(v.clone() for v in vectors), training, 0.1, EPS),
                *(*windows, CONFIGURATION),
            )
            affine = [vectors[0], *statistics]
            tensors = grad_out, x, argmax
            grads = backward(
                SUMS, APPLY, tensors, affine, training, *windows, configuration=CONFIGURATION
            )
            found.append((out, *statistics, argmax, *grads))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    of_batch = ["_statistics_kernel", "_finalize_kernel"] if training else []
    assert kernels == 2 * [
        *(*of_batch, "_max_pool_kernel"),
        *("_sums_kernel", "_sum_kernel", "_gradients_kernel"),
    ]
    assert out.stride() == argmax.stride() == grad_out.stride()
    assert grads[1].stride() == x.stride()

    plain, exact = (
        reference.bn_relu_max_pool(
            *(x.to(d), *(v.to(d, copy=True) for v in vectors), training, 0.1, EPS), *windows
        )
        for d in (dtype if dtype == torch.float32 else None, torch.double)
    )
    assert_as_accurate_as_eager(out, plain[0], exact[0])
    places = argmax == plain[3]
    # In training our statistics may round another way, and with them what is equal.
    assert places.double().mean() > 0.99 if training else places.all()
    assert 0.2 < (argmax != 255).double().mean() < 1
    doubled = grad_out.double(), x.double(), argmax
    exact_grads = backward(
        *(reference.bn_relu_max_pool_backward_sums, reference.bn_relu_max_pool_backward_apply),
        *(doubled, [v.double() for v in affine], training, *windows),
    )
    plain_grads = backward(
        *(reference.bn_relu_max_pool_backward_sums, reference.bn_relu_max_pool_backward_apply),
        *(tensors, affine, training, *windows),
    )
    for name, *each in zip(("sums", "grad_x"), grads, plain_grads, exact_grads, strict=True):
        assert_as_accurate_as_eager(*each, name)


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_an_argmax_from_elsewhere_reads_nothing_else(layout: str) -> None:
    """The interpreter knows where tensors end."""
    x, grad_out, (mean, *_) = draw(layout, (2, 3, 5, 6), torch.float32, STEM)
    generator = torch.Generator().manual_seed(0)
    argmax = torch.randint(0, 256, grad_out.shape, generator=generator).to(torch.uint8)
    argmax = LAYOUTS[layout][0](argmax)
    actual = SUMS(grad_out, x, argmax, mean, *STEM)
    arguments = grad_out, x, argmax, mean
    plain = reference.bn_relu_max_pool_backward_sums(*arguments, *STEM)
    doubled = (t.double() if t.is_floating_point() else t for t in arguments)
    exact = reference.bn_relu_max_pool_backward_sums(*doubled, *STEM)
    assert_as_accurate_as_eager(actual, plain, exact)
