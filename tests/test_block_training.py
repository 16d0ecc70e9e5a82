"""Blocks as one autograd node: what a training step keeps for its backward."""

import gc
import weakref

import pytest
import torch
from model_equality import assert_same_function, images, randomize
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import _extension, models
from resnet_fused._torchvision import import_torchvision
from resnet_fused.nn import Bottleneck

torchvision = import_torchvision()
needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")
needs_extension = pytest.mark.skipif(
    not _extension.load(), reason=f"the extension is not available: {_extension.error()}"
)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward, parameters, buffers and x not counted."""
    known = {
        t.untyped_storage().data_ptr() for t in (x, *model.state_dict(keep_vars=True).values())
    }
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del out
    return total


@needs_extension
@needs_torchvision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resnet50_keeps_less_than_eager(dtype: torch.dtype) -> None:
    """At most 0.86 of eager's bytes: convolution outputs and statistics, and no ReLU outputs.

    Counted for one image; under autocast for one image more, because there both keep a copy of all
    weights, too.
    """
    x = images(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    eager = torchvision.models.resnet50().to(memory_format=torch.channels_last).train()
    fused = models.resnet50().train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        before, after = saved_bytes(eager, x[:1]), saved_bytes(fused, x[:1])
        if dtype == torch.bfloat16:
            before, after = saved_bytes(eager, x) - before, saved_bytes(fused, x) - after
    assert after <= 0.86 * before, f"{after / before:.3f} of {before / 1e6:.1f} MB"


@needs_extension
def test_a_block_keeps_its_input_its_output_and_what_its_convolutions_gave() -> None:
    block = Bottleneck(64, 16).train()
    x = images(2, 64, 14, 14).contiguous(memory_format=torch.channels_last).requires_grad_()
    activations = 4 * 2 * 14 * 14 * (16 + 16 + 64 + 64)  # conv1, conv2, conv3, out
    statistics = 4 * 2 * (16 + 16 + 64)
    assert saved_bytes(block, x) == activations + statistics


@pytest.mark.parametrize("backend", ["reference", None])
def test_nothing_is_kept_after_the_backward(backend: str | None) -> None:
    block = Bottleneck(64, 16).train()
    x = images(2, 64, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    kept: list[weakref.ref] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and not isinstance(tensor, nn.Parameter) and tensor is not x:
            kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if backend is None:
            block(x).sum().backward()
        else:
            with rf.backend(backend):
                block(x).sum().backward()
    gc.collect()
    assert kept
    assert not any(reference() is not None for reference in kept)


@pytest.mark.parametrize("changed", ["conv2.weight", "bn1.weight", "x"])
def test_changes_between_forward_and_backward_are_refused(changed: str) -> None:
    block = Bottleneck(64, 16).train()
    x = images(2, 64, 6, 6)
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    loss = block(given).sum()
    with torch.no_grad():
        (given if changed == "x" else block.get_parameter(changed)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_says_that_its_tensors_are_gone() -> None:
    block = Bottleneck(64, 16).train()
    loss = block(images(2, 64, 6, 6)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_add_up_over_two_backwards() -> None:
    block = randomize(Bottleneck(64, 16)).train()
    x = images(2, 64, 6, 6)
    loss = block(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in block.parameters()]
    loss.backward()
    torch.testing.assert_close([p.grad for p in block.parameters()], [2 * g for g in once])


def test_two_blocks_that_share_their_parameters() -> None:
    """Each call adds its part of the gradient, and updates the running statistics in order."""
    twice = []
    for fused in (True, False):
        torch.manual_seed(0)
        block = randomize(Bottleneck(64, 16)).double().train()
        run = block if fused else block._forward_unfused
        x = images(2, 64, 6, 6, dtype=torch.float64)
        run(run(x)).square().sum().backward()
        twice.append([p.grad for p in block.parameters()] + list(block.buffers()))
    torch.testing.assert_close(*twice, rtol=1e-9, atol=1e-9)


@needs_torchvision
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_gradients_of_large_weights(stride: int, dilation: int) -> None:
    """Products with the unfolded input."""
    projection = nn.Conv2d(32, 2048, 1, stride, bias=False)
    downsample = nn.Sequential(projection, nn.BatchNorm2d(2048))
    block = torchvision.models.resnet.Bottleneck(
        32, 512, stride, downsample=downsample, dilation=dilation
    )
    x = images(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
    assert_same_function(randomize(block), rf.fuse, x, training=True, deep=False)


@needs_torchvision
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("inplanes", "planes", "size"),
    [(64, 64, (14, 14)), (32, 96, (6, 10)), (64, 64, (13, 14)), (64, 64, (2, 2))],
)
def test_float32_gradients_of_3x3_convolutions(
    inplanes: int, planes: int, size: tuple[int, int], layout: torch.memory_format
) -> None:
    """Sizes with which Winograd's algorithm is used, and sizes with which it is not."""
    downsample = None
    if inplanes != planes:
        conv = nn.Conv2d(inplanes, planes, 1, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))
    block = torchvision.models.resnet.BasicBlock(inplanes, planes, downsample=downsample)
    block = randomize(block).to(memory_format=layout)  # the weights too
    x = images(8, inplanes, *size).contiguous(memory_format=torch.channels_last)
    assert_same_function(block, rf.fuse, x, training=True, deep=False)
