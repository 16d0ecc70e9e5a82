"""What is derived from parameters (folded, packed, planned) is never stale nor outlives them."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import normal
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import folding, onednn
from resnet_fused.nn import BasicBlock, Bottleneck, ConvBnReLU2d, inference_plan
from resnet_fused.ops import conv_bn_relu

CALLS = 4  # enough for weights to be packed and for blocks to have a plan


def projection(channels: int, planes: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, planes, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(planes))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "ConvBnReLU2d": lambda: ConvBnReLU2d(16, 16, bias=True),
    "BasicBlock": lambda: BasicBlock(16, 16),
    "Bottleneck": lambda: Bottleneck(16, 8, downsample=projection(16, 32)),
}


def make(name: str) -> nn.Module:
    module = MODULES[name]()
    for index, norm in enumerate(norms(module)):
        norm.running_mean.copy_(normal(norm.running_mean.shape, index))
        norm.running_var.copy_(normal(norm.running_var.shape, index + 10).abs() + 0.5)
        norm.weight.data.copy_(normal(norm.weight.shape, index + 20))
        norm.bias.data.copy_(normal(norm.bias.shape, index + 30))
    return module.eval()


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def images(layout: torch.memory_format = torch.channels_last, size: int = 8) -> Tensor:
    return normal((2, 16, size, size), 7, torch.float32).contiguous(memory_format=layout)


def by_its_layers(module: nn.Module, x: Tensor) -> Tensor:
    """What the module computes, layer by layer in eager PyTorch."""
    x = x.to(next(module.parameters()).dtype)
    if isinstance(module, ConvBnReLU2d):
        return torch.relu(module.bn(module.conv(x)))
    out = torch.relu(module.bn1(module.conv1(x)))
    out = module.bn2(module.conv2(out))
    if isinstance(module, Bottleneck):
        out = module.bn3(module.conv3(torch.relu(out)))
    return torch.relu(out + (x if module.downsample is None else module.downsample(x)))


def assert_current(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        expected = by_its_layers(module, x)
        for _ in range(CALLS):
            out = module(x.to(expected.dtype))
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    return expected


def train_once(module: nn.Module) -> None:
    module.train()
    module(images() * 3 + 1)
    module.eval()


def step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(images()).square().mean().backward()
    optimizer.step()


def edit(kind: str, change: Callable[[Tensor], Any]) -> Callable[[nn.Module], None]:
    """Change the tensors of one kind, e.g. every running_mean, without autograd."""

    def apply(module: nn.Module) -> None:
        with torch.no_grad():
            for name, tensor in module.state_dict(keep_vars=True).items():
                norm = "bn" in name or "downsample.1" in name
                if name.endswith(kind.removeprefix("conv.")) and norm is not ("conv." in kind):
                    change(tensor)

    return apply


def replace_parameters(module: nn.Module) -> None:
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            setattr(child, name, nn.Parameter(parameter.detach() * 1.3))


def replace_modules(module: nn.Module) -> None:
    for child in list(module.modules()):
        for name, norm in list(child.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(child, name, nn.BatchNorm2d(norm.num_features).eval())


def change_eps(module: nn.Module) -> None:
    for norm in norms(module):
        norm.eps = 1.0


KINDS = ("conv.weight", "weight", "bias", "running_mean", "running_var")
EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "train": train_once,
    "optimizer": step,
    "load_state_dict": lambda m: m.load_state_dict(
        {name: t * 2 for name, t in m.state_dict().items()}
    ),
    "load_state_dict_assign": lambda m: m.load_state_dict(
        {name: t * 2 for name, t in m.state_dict().items()}, assign=True
    ),
    "bfloat16_and_back": lambda m: m.bfloat16().float(),
    "bfloat16": lambda m: m.bfloat16().float().double(),
    "parameters": replace_parameters,
    "modules": replace_modules,
    "eps": change_eps,
    **{f"in_place_{kind}": edit(kind, lambda t: t.mul_(1.5)) for kind in KINDS},
    **{f"data_mul_{kind}": edit(kind, lambda t: t.data.mul_(1.5)) for kind in KINDS},
    **{f"data_copy_{kind}": edit(kind, lambda t: t.data.copy_(t.data * 2)) for kind in KINDS},
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("change", EDITS)
@pytest.mark.parametrize("name", MODULES)
def test_edits_are_seen(name: str, change: str, layout: torch.memory_format) -> None:
    module, x = make(name), images(layout)
    before = assert_current(module, x)
    EDITS[change](module)
    after = assert_current(module, x)
    assert not torch.allclose(before.double(), after.double(), rtol=1e-4, atol=1e-4), "no edit"


@pytest.mark.parametrize("name", MODULES)
def test_evaluation_after_training_after_evaluation(name: str) -> None:
    module, x = make(name), images()
    for _ in range(3):
        assert_current(module, x)
        train_once(module)
    assert_current(module, x)


@pytest.mark.parametrize("name", MODULES)
def test_double_and_back(name: str) -> None:
    module, x = make(name), images()
    before = assert_current(module, x)
    module.double()
    assert_current(module, x)
    module.float()
    torch.testing.assert_close(assert_current(module, x), before)


@pytest.mark.parametrize("name", MODULES)
def test_a_copy_is_its_own(name: str) -> None:
    module, x = make(name), images()
    before = assert_current(module, x)
    other = copy.deepcopy(module)
    torch.testing.assert_close(assert_current(other, x), before)
    EDITS["in_place_weight"](other)
    assert_current(other, x)
    torch.testing.assert_close(assert_current(module, x), before)


@pytest.mark.parametrize("name", MODULES)
def test_made_in_inference_mode(name: str) -> None:
    """Inference tensors have no version counter."""
    with torch.inference_mode():
        module, x = make(name), images()
        assert_current(module, x)
        for parameter in module.parameters():
            parameter[-1] *= 1.5  # one of many elements
        assert_current(module, x)
    assert_current(module, x)


@pytest.mark.parametrize("name", MODULES)
def test_many_shapes_and_dtypes(name: str) -> None:
    module = make(name)
    for _ in range(2):
        for size in range(3, 11):
            assert_current(module, images(size=size))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for _ in range(CALLS):
            out = module(images())
            expected = by_its_layers(module, images())
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), expected.float(), rtol=0.1, atol=0.2)
    assert_current(module, images())


def test_weights_of_the_operator_are_watched() -> None:
    """Without modules: every in-place edit of weight, scale or shift counts."""
    x, weight = images(), normal((8, 16, 3, 3), 1, torch.float32)
    scale, shift = normal((8,), 2, torch.float32), normal((8,), 3, torch.float32)
    for changed in (None, weight, scale, shift):
        if changed is not None:
            changed.mul_(1.5)
        y = torch.conv2d(x, weight) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        for _ in range(CALLS):
            out = conv_bn_relu(x, weight, scale, shift)
            torch.testing.assert_close(out, torch.relu(y), rtol=1e-4, atol=1e-4)


def kept() -> int:
    """How many things are kept, in all."""
    gc.collect()
    return len(onednn._weights) + len(folding._folded) + len(inference_plan._plans)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_outlives_the_model(name: str) -> None:
    before = kept()
    module = make(name)
    assert_current(module, images())
    assert_current(module, images(torch.contiguous_format))
    assert kept() > before
    del module
    assert kept() == before


def test_nothing_outlives_the_tensors_of_the_operator() -> None:
    before = kept()
    weight, vector = normal((8, 16, 1, 1), 1, torch.float32), torch.ones(8)
    for _ in range(CALLS):
        conv_bn_relu(images(), weight, vector, vector)
    assert kept() > before
    del weight
    assert kept() == before


@pytest.mark.parametrize("name", MODULES)
def test_training_keeps_nothing_old(name: str) -> None:
    """Evaluation after every step replaces what was kept, and does not add to it."""
    module, counts = make(name), []
    for _ in range(4):
        train_once(module)
        assert_current(module, images())
        counts.append(kept())
    assert len(set(counts)) == 1


@pytest.mark.parametrize("name", MODULES)
def test_two_threads(name: str) -> None:
    """More shapes than are kept, so that both threads pack and evict at the same time."""
    module, errors = make(name), []
    inputs = [images(size=size) for size in range(3, 11)]
    with torch.no_grad():
        expected = [by_its_layers(module, x) for x in inputs]
    start = threading.Barrier(2)

    def run(order: int) -> None:
        try:
            start.wait()
            with torch.no_grad():
                for _ in range(6):
                    for x, y in list(zip(inputs, expected, strict=True))[::order]:
                        torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(order,)) for order in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize("missing", ["weight", "conv_bias", "both", "neither"])
def test_scale_and_shift(missing: str) -> None:
    norm = nn.BatchNorm2d(6, eps=0.1).double().eval()
    norm.running_mean.copy_(normal((6,), 1))
    norm.running_var.copy_(normal((6,), 2).abs())
    norm.weight.data.copy_(normal((6,), 3))
    norm.bias.data.copy_(normal((6,), 4))
    conv_bias = normal((6,), 5).requires_grad_()
    if missing in ("weight", "both"):
        norm.weight, norm.bias = None, None
    arguments: list[Any] = [norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps]
    if missing not in ("conv_bias", "both"):
        arguments.append(conv_bias)
    scale, shift = folding.scale_shift(*arguments)
    y = normal((2, 6, 3, 3), 6)
    shifted = y + conv_bias.view(-1, 1, 1) if len(arguments) == 6 else y
    actual = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(actual, norm(shifted))
    leaves = [t for t in (norm.weight, norm.bias, *arguments[5:]) if t is not None]
    if leaves:
        ours = torch.autograd.grad(actual.square().sum(), leaves)
        theirs = torch.autograd.grad(norm(shifted).square().sum(), leaves)
        torch.testing.assert_close(ours, theirs)


def test_the_reference_backend_keeps_nothing_packed() -> None:
    before = len(onednn._weights)
    module = make("BasicBlock")
    with rf.backend("reference"):
        assert_current(module, images())
    assert len(onednn._weights) == before
