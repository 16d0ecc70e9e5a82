"""What a training step keeps for its backward: bytes of unique storages, parameters left out."""

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models
from resnet_fused._torchvision import import_torchvision


@pytest.fixture
def eager_resnet50() -> nn.Module:
    torchvision = import_torchvision()
    if torchvision is None:
        pytest.skip("torchvision is not installed")
    return torchvision.models.resnet50().to(memory_format=torch.channels_last)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps alive after the forward of `model`, besides parameters and x."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().mean()
    # All storages must still be alive here, or one address could stand for two of them.
    assert loss.grad_fn is not None
    return sum(kept.values())


@pytest.mark.parametrize("image", [224, 64])
def test_resnet50_keeps_at_most_86_percent_of_eager(eager_resnet50: nn.Module, image: int) -> None:
    fused = resnet_fused.fuse(eager_resnet50).train()
    torch.manual_seed(0)
    x = torch.randn(2, 3, image, image).contiguous(memory_format=torch.channels_last)
    eager_bytes, fused_bytes = saved_bytes(eager_resnet50.train(), x), saved_bytes(fused, x)
    ratio = fused_bytes / eager_bytes
    print(f"{image}x{image}: {fused_bytes} bytes fused, {eager_bytes} eager: {ratio:.3f}")
    assert ratio <= 0.86


def test_a_block_keeps_input_outputs_of_convolutions_and_its_own_output() -> None:
    block = models.resnet50().layer1[1].train()
    x = torch.randn(2, 256, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    pixels = 2 * 8 * 8
    activations = pixels * (64 + 64 + 256 + 256)  # y1, y2, y3, out
    statistics = 2 * (64 + 64 + 256)  # mean and invstd
    assert saved_bytes(block, x) == 4 * (activations + statistics)
