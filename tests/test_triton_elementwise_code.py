"""What Triton makes of the kernels without a product, for GPUs that are not here.

They are as fast as memory lets them be if each thread moves 16 bytes at a time and has as many
accesses under way as its configuration says. Compiled, disassembled and read as the convolutions
are in test_triton_machine_code.py.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import ahead_of_time
from ahead_of_time import AMPERE, BLACKWELL, CAPABILITIES, HOPPER, MULTIPROCESSORS, Code

from resnet_fused.layout import mask_shape
from resnet_fused.triton_kernels import (
    add_relu,
    bn_relu,
    bn_relu_backward,
    bn_relu_max_pool,
    device,
)
from resnet_fused.triton_kernels.activations import Spread

ACCESS_BYTES = 16  # the widest there is
Residual = Literal["none", "plain", "bn"]


class Layer(NamedTuple):
    """Activations of the network."""

    shape: tuple[int, int, int, int]
    memory_format: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        n, c, h, _ = self.shape
        channels_last = self.memory_format == torch.channels_last
        return f"{n}x{c}x{h}{', channels_last' if channels_last else ''}"

    def untouched(self, dtype: torch.dtype) -> Tensor:
        return ahead_of_time.untouched(*self.shape, dtype=dtype, memory_format=self.memory_format)

    def access_bytes(self, dtype: torch.dtype) -> int:
        """The widest accesses for which every run of memory is aligned: pixels, or planes."""
        _, c, h, w = self.shape
        run = c if self.memory_format == torch.channels_last else h * w
        return math.gcd(run * dtype.itemsize, ACCESS_BYTES)


WIDE = Layer((256, 256, 56, 56), torch.channels_last)
PLANES_OF_16_BYTES = Layer((256, 256, 56, 56))  # a multiple of that, in 16-bit floats
PLANES_OF_8_BYTES = Layer((256, 1024, 14, 14))
ODD_PLANES = Layer((256, 2048, 7, 7))
SMALL = Layer((1, 2048, 7, 7))


class Traffic(NamedTuple):
    """How many tensors like the activations a pass reads and writes."""

    reads: int
    writes: int


class Operator(NamedTuple):
    """passes: by the name of the field that spreads them in a configuration."""

    launch: Callable[[Layer, torch.dtype], object]
    configurations: Callable[[torch.dtype, device.Architecture], tuple[Any, ...]]
    passes: dict[str, Traffic]

    def spread(self, name: str, capability: tuple[int, int], dtype: torch.dtype) -> Spread:
        """The static choice."""
        architecture = device.of_capability(capability, MULTIPROCESSORS[capability])
        found: Spread = getattr(self.configurations(dtype, architecture)[0], name)
        return found


def forward(
    residual: Residual, training: bool, save_mask: bool, **passes: tuple[int, int]
) -> Operator:
    dual = residual == "bn"

    def launch(layer: Layer, dtype: torch.dtype) -> object:
        x = layer.untouched(dtype)
        arguments: tuple[Any, ...] = (
            *(x, *vectors(x, 4), training, 0.1, 1e-5),
            *(None if residual == "none" else x, dual, *vectors(x, 4, dual)),
            *(training and dual, 0.1, 1e-5, True, save_mask),
        )
        return bn_relu.bn_relu(*arguments)

    configurations = functools.partial(bn_relu.configurations, residual != "none")
    return Operator(launch, configurations, traffic(passes))


def backward(
    residual: Residual, training: bool, sign: str, in_steps: bool = False, **passes: tuple[int, int]
) -> Operator:
    """in_steps: by way of sums and averages."""
    dual = residual == "bn"

    def launch(layer: Layer, dtype: torch.dtype) -> object:
        x = layer.untouched(dtype)
        mask = ahead_of_time.untouched(*mask_shape(x), dtype=torch.uint8)
        head: tuple[Any, ...] = (
            *(x, x, x if sign == "out" else None, mask if sign == "mask" else None),
            *vectors(x, 4),
        )
        other: tuple[Any, ...] = x if dual else None, dual, *vectors(x, 4, dual)
        arguments = *head, training, residual != "none", *other, training and dual, True
        if not in_steps:
            return bn_relu_backward.bn_relu_backward(*arguments)
        sums = bn_relu_backward.bn_relu_backward_sums(*head, *other, True)
        return bn_relu_backward.bn_relu_backward_apply(*arguments, sums)

    configurations = functools.partial(bn_relu_backward.configurations, dual)
    return Operator(launch, configurations, traffic(passes))


def vectors(x: Tensor, count: int, exist: bool = True) -> list[Tensor | None]:
    return [ahead_of_time.untouched(x.size(1)) if exist else None for _ in range(count)]


def traffic(passes: dict[str, tuple[int, int]]) -> dict[str, Traffic]:
    return {name: Traffic(*counts) for name, counts in passes.items()}


OPERATORS: dict[str, Operator] = {
    "inference, residual": forward("plain", False, False, apply=(2, 1)),
    "training": forward("none", True, False, statistics=(1, 0), apply=(1, 1)),
    "training, residual bn, mask": forward("bn", True, True, statistics=(1, 0), apply=(2, 1)),
    "backward": backward("none", True, "recomputed", reduction=(2, 0), gradients=(2, 1)),
    "backward, residual, mask": backward("plain", True, "mask", reduction=(2, 1), gradients=(2, 1)),
    "backward, residual bn, mask": backward("bn", True, "mask", reduction=(3, 0), gradients=(3, 2)),
    "backward in steps, residual, mask": backward(
        "plain", True, "mask", in_steps=True, reduction=(2, 0), gradients=(2, 2)
    ),
    "backward of inference, residual bn, output": backward("bn", False, "out", reduction=(4, 2)),
}


@functools.cache
def compiled(
    operator: str, capability: tuple[int, int], dtype: torch.dtype, layer: Layer
) -> list[Code]:
    launch = OPERATORS[operator].launch
    return ahead_of_time.kernels(capability, lambda: launch(layer, dtype))


# Between them they start every kernel: with the most accesses to one tensor, the most tensors.
PLAIN = ("training", "backward")
DUAL = ("training, residual bn, mask", "backward, residual bn, mask")


def cases() -> list[Any]:
    """Operator, capability, dtype and layer.

    In channels_last all layers of 256 channels and more have one kernel.
    """
    return [
        *itertools.product(OPERATORS, [HOPPER], [torch.bfloat16], [WIDE]),
        *itertools.product(DUAL, [AMPERE, BLACKWELL], [torch.bfloat16], [WIDE]),
        *itertools.product(DUAL, CAPABILITIES, [torch.float32], [WIDE]),
        *itertools.product(DUAL, [HOPPER], [torch.float16], [WIDE]),
        *itertools.product(PLAIN, CAPABILITIES, [torch.bfloat16], [ODD_PLANES]),
        *itertools.product(PLAIN, [HOPPER], [torch.bfloat16], [PLANES_OF_16_BYTES]),
        *itertools.product(PLAIN, [HOPPER], [torch.bfloat16], [PLANES_OF_8_BYTES]),
        ("inference, residual", HOPPER, torch.bfloat16, SMALL),
    ]


every_case = pytest.mark.parametrize(
    ("operator", "capability", "dtype", "layer"), cases(), ids=ahead_of_time.case_id
)


@every_case
def test_no_kernel_spills(
    operator: str, capability: tuple[int, int], dtype: torch.dtype, layer: Layer
) -> None:
    """Neither the passes nor those that combine partial results."""
    codes = compiled(operator, capability, dtype, layer)
    assert [code.name for code in codes if code.spills] == []


@every_case
def test_loops_move_each_tensor_once_as_wide_as_its_planes_are_aligned(
    operator: str, capability: tuple[int, int], dtype: torch.dtype, layer: Layer
) -> None:
    """Beside them the bytes of masks; what is per channel is read before the loop."""
    width = layer.access_bytes(dtype)
    for name, (reads, writes) in OPERATORS[operator].passes.items():
        spread = OPERATORS[operator].spread(name, capability, dtype)
        per_tensor = spread.vectors * ACCESS_BYTES // width
        for code in passes(name, operator, capability, dtype, layer):
            loops = code.loops_with("LDG")
            assert loops, code.name
            for loop in loops:
                loads, stores = (ahead_of_time.accesses(loop, each) for each in ("LDG", "STG"))
                del loads[1], stores[1]
                assert loads == Counter({width: reads * per_tensor}), code.name
                assert stores == Counter({width: writes * per_tensor}), code.name


@every_case
def test_programs_that_leave_partial_results_are_one_round(
    operator: str, capability: tuple[int, int], dtype: torch.dtype, layer: Layer
) -> None:
    for name in {"statistics", "reduction"} & set(OPERATORS[operator].passes):
        programs = OPERATORS[operator].spread(name, capability, dtype).programs
        codes = passes(name, operator, capability, dtype, layer)
        assert min(code.blocks_by_registers for code in codes) >= programs, name


def passes(
    name: str, operator: str, capability: tuple[int, int], dtype: torch.dtype, layer: Layer
) -> list[Code]:
    """Of both batch norms, where the residual has one."""
    codes = compiled(operator, capability, dtype, layer)
    found = [code for code in codes if code.name == f"_{name}_kernel"]
    assert found, name
    return found


@pytest.mark.parametrize("capability", CAPABILITIES, ids=ahead_of_time.case_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("elements", [1 << 24, 1 << 14, (1 << 24) + 8])
def test_add_relu_moves_16_bytes_at_a_time(
    elements: int, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    """But for a last block that is no multiple of 16 elements, which are masked one by one."""
    x = ahead_of_time.untouched(elements, dtype=dtype)
    architecture = device.of_capability(capability, MULTIPROCESSORS[capability])
    vectors = add_relu.configurations(elements, dtype, architecture)[0].vectors
    codes = ahead_of_time.kernels(capability, functools.partial(both_directions, x))
    assert len(codes) == 2
    ragged = elements % 16 != 0
    width = dtype.itemsize if ragged else ACCESS_BYTES
    last = vectors * ACCESS_BYTES // width
    for code in codes:
        loads, stores = (ahead_of_time.accesses(code.instructions, each) for each in ("LDG", "STG"))
        assert code.spills == 0
        assert loads == Counter({ACCESS_BYTES: 2 * vectors}) + Counter({width: 2 * last})
        assert stores == Counter({ACCESS_BYTES: vectors}) + Counter({width: last})
        assert ragged or code.registers <= 40  # 48 warps on a multiprocessor


def both_directions(x: Tensor) -> None:
    add_relu.add_relu(x, x)
    add_relu.add_relu_backward(x, x)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(each, torch.bfloat16) for each in CAPABILITIES] + [(HOPPER, torch.float32)],
    ids=ahead_of_time.case_id,
)
def test_pooling_moves_16_bytes_at_a_time(capability: tuple[int, int], dtype: torch.dtype) -> None:
    """A vector of channels and its bytes of argmax; x alone is gathered one by one by the sums."""
    layer = Layer((256, 64, 112, 112), torch.channels_last)
    codes = ahead_of_time.kernels(capability, functools.partial(stem, layer, dtype))
    assert [code.name for code in codes if code.spills] == []
    found = {code.name: code for code in codes}
    channels = ACCESS_BYTES // dtype.itemsize
    argmax, one_by_one = Counter({channels: 1}), Counter({dtype.itemsize: channels})
    vector = Counter({ACCESS_BYTES: 1})
    # In a loop: a row of taps; an element of the output; the outputs that a pixel can be.
    expected = {
        "_max_pool_kernel": (times(3, vector), vector + argmax),
        "_sums_kernel": (vector + argmax + one_by_one, Counter()),
        "_gradients_kernel": (times(4, vector + argmax) + vector, vector),
    }
    for name, (loads, stores) in expected.items():
        outermost = max(found[name].loops_with("LDG"), key=len)
        assert ahead_of_time.accesses(outermost, "LDG") == loads, name
        assert ahead_of_time.accesses(outermost, "STG") == stores, name
    architecture = device.of_capability(capability, MULTIPROCESSORS[capability])
    spreads = bn_relu_max_pool.configurations(dtype, architecture)[0]
    assert found["_sums_kernel"].blocks_by_registers >= spreads.sums.programs


def times(number: int, counts: Counter[int]) -> Counter[int]:
    return Counter({key: number * count for key, count in counts.items()})


def stem(layer: Layer, dtype: torch.dtype) -> None:
    """Forward and backward of what stands behind the first convolution of a ResNet."""
    x = layer.untouched(dtype)
    windows = (3, 3), (2, 2), (1, 1)
    out, mean, invstd, argmax = bn_relu_max_pool.bn_relu_max_pool(
        *(x, *vectors(x, 4), True, 0.1, 1e-5), *windows
    )
    tensors = out, x, argmax
    averages = bn_relu_max_pool.bn_relu_max_pool_backward_sums(*tensors, mean, *windows)
    bn_relu_max_pool.bn_relu_max_pool_backward_apply(
        *(*tensors, *vectors(x, 1), mean, invstd, True, averages), *windows
    )
