"""Every implementation of a residual block in training, in both modes, against plain modules."""

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from model_equality import images, randomize
from numerics import device_of, on_backends, short
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import TrainingMode, _extension
from resnet_fused.models.cifar import ZeroPadShortcut
from resnet_fused.nn import (
    BasicBlock,
    Bottleneck,
    FrozenBatchNorm2d,
    block_function,
    block_native,
    block_operators,
    block_plain,
)

Results = dict[str, Tensor]


def projection(channels: int, planes: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, planes, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(planes))


def _frozen(*names: str) -> nn.Module:
    """A Bottleneck with a projection some of whose batch norms are in evaluation."""
    block = Bottleneck(16, 8, 2, projection(16, 32, 2)).train()
    for name in names:
        block.get_submodule(name).eval()
    return block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: BasicBlock(16, 16),
    "basic_projection": lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)),
    "basic_zero_pad": lambda: BasicBlock(16, 24, 2, ZeroPadShortcut(8, 2)),
    "bottleneck": lambda: Bottleneck(32, 8),
    "bottleneck_projection": lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)),
    "groups": lambda: Bottleneck(16, 8, 1, projection(16, 32), groups=2, base_width=64),
    "no_affine": lambda: Bottleneck(32, 8, norm_layer=lambda n: nn.BatchNorm2d(n, affine=False)),
    "frozen_first": lambda: _frozen("bn1"),
    "frozen_middle": lambda: _frozen("bn2"),
    "frozen_last": lambda: _frozen("bn3"),
    "frozen_projection": lambda: _frozen("downsample.1"),
    "frozen_type": lambda: Bottleneck(
        32, 8, norm_layer=lambda n: FrozenBatchNorm2d(n) if n == 8 else nn.BatchNorm2d(n)
    ),
}
MAIN = ("basic", "basic_zero_pad", "bottleneck_projection")


def make(name: str, mode: TrainingMode) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.affine:
            module.weight = None
    block = randomize(block)
    block.training_mode = mode
    return block


def x_for(block: nn.Module, seed: int, layout: torch.memory_format) -> Tensor:
    x = images(4, block.conv1.in_channels, 6, 5, seed=seed, dtype=torch.float64)
    return x.contiguous(memory_format=layout)


def train(block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Results:
    """One forward and backward; what needs no gradient has none."""
    block.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    out = run(x)
    out.backward(images(*out.shape, seed=77, dtype=torch.float64).to(out))
    grads = {"grad_x": x.grad} if x.grad is not None else {}
    grads |= {f"grad {n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
    buffers = {f"buffer {n}": b.clone() for n, b in block.named_buffers()}
    return {"out": out.detach()} | grads | buffers


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """The implementations that were chosen."""
    chosen: list[ModuleType] = []
    original = block_function._implementation

    def choose(*arguments: object) -> ModuleType:
        chosen.append(original(*arguments))
        return chosen[-1]

    monkeypatch.setattr(block_function, "_implementation", choose)
    return chosen


def context(backend: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend is None else rf.backend(backend)


# Backend asked for, memory format of x.
IN_FLOAT64 = {
    block_plain: ("cpu", torch.contiguous_format),
    block_operators: ("reference", torch.channels_last),
}
needs_extension = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not available: {_extension.error()}"
)


@needs_extension
@pytest.mark.parametrize("mode", TrainingMode)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("implementation", IN_FLOAT64, ids=lambda m: m.__name__.rpartition(".")[2])
def test_float64(
    implementation: ModuleType, name: str, mode: TrainingMode, used: list[ModuleType]
) -> None:
    backend, layout = IN_FLOAT64[implementation]
    block, plain = make(name, mode).double(), make(name, mode).double()
    for seed in range(2):
        x = x_for(block, seed, layout).requires_grad_()
        with context(backend):
            actual = train(block, block, x)
        expected = train(plain, plain._forward_unfused, x)
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(actual[key], tensor, rtol=1e-10, atol=1e-10, msg=key)
    assert set(used) == {implementation}


NEEDS = {
    "x": lambda _: False,
    "no_x": lambda _: True,
    "first_conv": lambda name: name.startswith("conv1"),
    "last_conv": lambda name: name.startswith("conv2"),
    "first_norm": lambda name: name == "bn1.weight",
    "last_norm": lambda name: name == "bn2.bias",
    "projection": lambda name: name == "downsample.0.weight",
}


@needs_extension
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("name", ["basic_projection", "basic_zero_pad", "bottleneck"])
@pytest.mark.parametrize("implementation", IN_FLOAT64, ids=lambda m: m.__name__.rpartition(".")[2])
def test_what_needs_a_gradient(implementation: ModuleType, name: str, needs: str) -> None:
    backend, layout = IN_FLOAT64[implementation]
    if needs == "projection" and name != "basic_projection":
        return
    block, plain = (make(name, TrainingMode.MEMORY).double() for _ in range(2))
    for each in (block, plain):
        for key, parameter in each.named_parameters():
            parameter.requires_grad_(NEEDS[needs](key))
    x = x_for(block, 0, layout).requires_grad_(needs == "x")
    with context(backend):
        actual = train(block, block, x)
    expected = train(plain, plain._forward_unfused, x)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-10, atol=1e-10, msg=key)


def test_batch_norm_is_part_of_the_convolutions_that_read_each_value_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In front of a larger kernel it is a pass of its own, forward and backward."""
    fused: dict[str, list[bool]] = {name: [] for name in ("conv_stats", "conv_wgrad", "conv_dgrad")}
    for name, position in (("conv_stats", 2), ("conv_wgrad", 3), ("conv_dgrad", 4)):
        original = getattr(block_operators, name)

        def record(
            *arguments: Any,
            name: str = name,
            at: int = position,
            original: Any = original,
            **named: Any,
        ) -> Any:
            fused[name].append(arguments[at] is not None)
            return original(*arguments, **named)

        monkeypatch.setattr(block_operators, name, record)
    block = make("bottleneck", TrainingMode.SPEED)
    with rf.backend("reference"):
        train(block, block, x_for(block, 0, torch.channels_last).float().requires_grad_())
    assert fused["conv_stats"] == [False, False, True]  # conv1, conv2, conv3
    assert fused["conv_wgrad"] == [True, False, False]  # conv3, conv2, conv1
    # Of the batch norms behind them: the last has a residual, the middle one a 3x3 convolution.
    assert fused["conv_dgrad"] == [False, False, True]


@pytest.mark.parametrize("mode", TrainingMode)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("name", MAIN)
@needs_extension
def test_native(name: str, dtype: torch.dtype, mode: TrainingMode, used: list[ModuleType]) -> None:
    assert_as_accurate_as_eager(None, name, dtype, mode)
    assert set(used) == {block_native}


@pytest.mark.parametrize("mode", TrainingMode)
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("backend", on_backends("conv_stats"))
def test_operators(backend: str, name: str, mode: TrainingMode, used: list[ModuleType]) -> None:
    assert_as_accurate_as_eager(backend, name, torch.float32, mode)
    assert set(used) == {block_operators}


def assert_as_accurate_as_eager(
    backend: str | None, name: str, dtype: torch.dtype, mode: TrainingMode
) -> None:
    """Distances from float64, in the 2-norm over three inputs: twice eager's and a rounding."""
    device = device_of(backend or "cpu")
    block, plain = (make(name, mode).to(device, dtype) for _ in range(2))
    exact = make(name, mode).to(dtype).double().to(device)
    collected: dict[str, list[list[Tensor]]] = {}
    for seed in range(3):
        x = x_for(block, seed, torch.channels_last).to(device, dtype)
        with context(backend):
            actual = train(block, block, x.requires_grad_())
        eager = train(plain, plain._forward_unfused, x)
        wanted = train(exact, exact._forward_unfused, x.double())
        assert actual.keys() == eager.keys() == wanted.keys()
        for key, tensor in wanted.items():
            differences = [each[key].double() - tensor.double() for each in (actual, eager)]
            collected.setdefault(key, []).append([*differences, tensor.double()])
    for key, triples in collected.items():
        error, eager_error, size = (
            float(torch.cat([t.flatten() for t in each]).norm())
            for each in zip(*triples, strict=True)
        )
        rounding = torch.finfo(dtype).eps * size
        assert error <= 2 * eager_error + rounding, f"{key}: {error=:.2e} {eager_error=:.2e}"
