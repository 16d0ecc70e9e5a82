"""What a training step keeps in memory between forward and backward."""

import copy

import torch
from torch import Tensor, nn

from resnet_fused.commands.networks import placed


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd saves for the backward pass, without parameters, buffers and images.

    Counted once per storage, so that tensors which share memory count once. The model, in
    training mode, is a copy: no running statistics change.
    """
    model = placed(copy.deepcopy(model), images.device).train()
    images = images.contiguous(memory_format=torch.channels_last)
    ignored = {_storage(tensor) for tensor in (images, *model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be used again

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in ignored:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(sizes.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
