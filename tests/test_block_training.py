"""Blocks as one autograd node: what a training step keeps for its backward."""

import gc
import weakref

import pytest
import torch
from model_equality import assert_same_function, images, randomize
from numerics import device_of, on_backends, short
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import TrainingMode, _extension
from resnet_fused._torchvision import import_torchvision
from resnet_fused.commands.memory import saved_bytes_per_image, theoretical_bytes
from resnet_fused.nn import Bottleneck, block_function

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_resnet50_keeps_what_theory_says(dtype: torch.dtype) -> None:
    """At most 0.80 of eager's bytes per image in the one mode, 0.50 in the other."""
    eager = torchvision.models.resnet50()
    x = images(2, 3, 224, 224)
    theory = theoretical_bytes(eager, x[:1], dtype.itemsize)
    before = saved_bytes_per_image(eager, x, dtype)
    for mode, limit in ((TrainingMode.SPEED, 0.80), (TrainingMode.MEMORY, 0.50)):
        after = saved_bytes_per_image(rf.fuse(eager, training_mode=mode), x, dtype)
        assert after <= limit * before, f"{mode}: {after / before:.3f} of {before / 1e6:.1f} MB"
        # Besides, statistics; and under autocast the images in 16 bit.
        assert theory.of(mode) <= after <= 1.02 * theory.of(mode), f"{mode}: {after / 1e6:.2f} MB"
    assert theory.eager <= before <= 1.02 * theory.eager, f"{before / 1e6:.2f} MB"


@pytest.mark.parametrize("backend", on_backends("bn_relu", interpreter=False))
@pytest.mark.parametrize("mode", TrainingMode)
def test_a_block_keeps_its_output_and_what_its_convolutions_gave(
    mode: TrainingMode, backend: str
) -> None:
    """Without the last convolution and the projection in the mode that saves memory."""
    downsample = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64))
    block = Bottleneck(32, 16, downsample=downsample).train()
    block.training_mode = mode
    x = images(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    block, x = block.to(device_of(backend)), x.to(device_of(backend)).requires_grad_()
    results = 16 + 16  # of conv1 and conv2
    if mode is TrainingMode.SPEED:
        results += 64 + 64
    with rf.backend(backend):
        if block_function.keeps_output(x):
            results += 64
        statistics = 4 * 2 * (16 + 16 + 64 + 64)
        assert saved_bytes(block, x) == 4 * 2 * 8 * 8 * results + statistics


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
