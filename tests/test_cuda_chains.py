"""The Python half of the chain kernels: what reaches them, and what takes the layers one by one."""

from types import SimpleNamespace
from typing import Any

import pytest
import test_bottleneck_block
import test_bottleneck_roll
import test_bottleneck_tail
import test_conv_projection_relu
import torch
from bottlenecks import Subject
from numerics import Case
from torch import Tensor

from resnet_fused import cuda_chains, reference

MODULES = (
    *(test_bottleneck_tail, test_bottleneck_roll, test_bottleneck_block),
    test_conv_projection_relu,
)
SUBJECTS: dict[str, Subject] = {
    module.SUBJECT.function.__name__: module.SUBJECT for module in MODULES
}
HALF = (torch.bfloat16, torch.float16)
WIDTHS = {
    "bottleneck_tail": (64, 128, 256),
    "bottleneck_roll": (64, 128),
    "bottleneck_block": (64,),
    "conv_projection_relu": (12, 64),
}
INSTANCES = [(name, width) for name, widths in WIDTHS.items() for width in widths]


class Kernel:
    """In place of one that is compiled; keeps the arguments of its calls."""

    def __init__(self, name: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._compute = getattr(reference, name)
        # tf32, tile and splits, which are the kernel's own.
        self._extra = 3 if name == "conv_projection_relu" else 0
        self.layers = 0  # that ran one by one
        layer = SimpleNamespace(default=self._layer)
        self.ops = SimpleNamespace(**{name: SimpleNamespace(default=self)}, conv_bn_relu=layer)

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        return self._compute(*arguments[: len(arguments) - self._extra])

    def _layer(self, *arguments: Any) -> Tensor:
        self.layers += 1
        *tensors, relu, geometry, tf32, tile, splits = arguments
        assert (tf32, tile, splits) == (False, -1, 0)
        *pairs, groups = geometry[:2], geometry[2:4], geometry[4:6], geometry[6]
        return reference.conv_bn_relu(*tensors, relu, *pairs, groups)


def arguments_of(name: str, case: Case) -> list[Any]:
    return [*SUBJECTS[name].tensors(case, 0).values(), *SUBJECTS[name].settings]


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=5e-2)


def test_every_chain_is_covered() -> None:
    assert set(cuda_chains.OPERATORS) == set(SUBJECTS) == set(WIDTHS)


def apart(values: Tensor) -> Tensor:
    """The same values, every other one in memory."""
    return torch.stack((values, torch.full_like(values, float("nan"))), -1)[..., 0]


@pytest.mark.parametrize("layout", ["nchw", "misaligned"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("name", "width"), INSTANCES)
def test_what_a_kernel_gets(name: str, width: int, dtype: torch.dtype, layout: str) -> None:
    kernel = Kernel(name)
    given = arguments_of(name, Case("reference", (2, width, 2, 3), dtype, layout))
    expected = getattr(reference, name)(*given)
    is_activation = [isinstance(a, Tensor) and a.dim() == 4 and a.size(0) == 2 for a in given]
    wide = [apart(a.double()) if isinstance(a, Tensor) else a for a in given]
    wide = [a if x else w for a, w, x in zip(given, wide, is_activation, strict=True)]
    with torch.no_grad():
        actual = cuda_chains.launcher(name, lambda: kernel.ops)(*wide)
    (arguments,) = kernel.calls
    assert arguments[len(given) :] == ((False, -1, 0) if "projection" in name else ())
    for argument, x in zip(arguments, is_activation, strict=False):
        if not isinstance(argument, Tensor):
            assert argument == (2, 2)
        elif argument.dim() == 1:
            assert argument.dtype == torch.float32
            assert argument.is_contiguous()
        elif x:
            assert argument.dtype == dtype
            assert argument.is_contiguous(memory_format=torch.channels_last)
            assert "projection" in name or argument.data_ptr() % 16 == 0
    assert_close(actual, expected)


def without_instance(name: str) -> dict[str, list[Any]]:
    """Arguments that no kernel takes, by what is wrong with them."""
    width = WIDTHS[name][0]

    def case(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Any]:
        return arguments_of(name, Case("reference", shape, dtype, "channels_last"))

    fits = case((1, width, 2, 3))
    kernels = 4 * width
    narrow = [a[: kernels - 8] if a.size(0) == kernels else a for a in fits]
    narrow = [a[:, : kernels - 8] if a.dim() == 4 and a.size(1) == kernels else a for a in narrow]
    return {
        "float32": case((1, width, 2, 3), torch.float32),
        "width": case((1, 2 * WIDTHS[name][-1], 2, 3)),
        "not a multiple": case((1, width + 8, 2, 3)),
        "wide image": case((1, width, 1, cuda_chains.WIDEST_IMAGES[width] + 1)),
        "expansion": narrow,
    }


@pytest.mark.parametrize("what", ["float32", "width", "not a multiple", "wide image", "expansion"])
@pytest.mark.parametrize("name", [name for name in WIDTHS if name.startswith("bottleneck")])
def test_without_a_kernel_the_layers_run_one_by_one(name: str, what: str) -> None:
    kernel, arguments = Kernel(name), without_instance(name)[what]
    with torch.no_grad():
        actual = cuda_chains.launcher(name, lambda: kernel.ops)(*arguments)
        assert_close(actual, getattr(reference, name)(*arguments))
    assert not kernel.calls
    assert kernel.layers == (2 if name == "bottleneck_tail" else 3)


@pytest.mark.parametrize("width", cuda_chains.WIDEST_IMAGES)
def test_the_widest_images_have_a_kernel(width: int) -> None:
    for name in (name for name, other in INSTANCES if other == width and "bottleneck" in name):
        kernel = Kernel(name)
        shape = (1, width, 1, cuda_chains.WIDEST_IMAGES[width])
        case = Case("reference", shape, torch.bfloat16, "channels_last")
        with torch.no_grad():
            cuda_chains.launcher(name, lambda kernel=kernel: kernel.ops)(*arguments_of(name, case))
        assert len(kernel.calls) == 1


def test_a_roll_to_another_width_has_no_kernel() -> None:
    kernel = Kernel("bottleneck_roll")
    case = Case("reference", (1, 64, 2, 3), torch.bfloat16, "channels_last")
    tensors = test_bottleneck_roll.tensors_of(case, 0, next_width=128).values()
    with torch.no_grad():
        out, next_y1 = cuda_chains.launcher("bottleneck_roll", lambda: kernel.ops)(*tensors)
    assert not kernel.calls
    assert kernel.layers == 3
    assert_close((out, next_y1), reference.bottleneck_roll(*tensors))
