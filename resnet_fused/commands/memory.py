"""What a training step keeps in memory between forward and backward, measured and in theory."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import TrainingMode
from resnet_fused.commands.networks import placed
from resnet_fused.conversion.survey import survey
from resnet_fused.conversion.swap import parts_of
from resnet_fused.nn.pairs import as_pair


class Theory(NamedTuple):
    """Bytes per image that must be kept, by shapes alone.

    eager: outputs of convolutions and of ReLUs, the pooling's output and its int64 indices. speed:
    of the ReLUs only those that end a block, and indices of a byte. memory: without the outputs of
    the blocks' last convolutions and projections, too.
    """

    eager: int
    speed: int
    memory: int

    def of(self, mode: TrainingMode) -> int:
        """What is kept in this mode."""
        return self.speed if mode is TrainingMode.SPEED else self.memory


def theoretical_bytes(eager: nn.Module, image: Tensor, item_size: int) -> Theory:
    """What training `eager`, a ResNet of plain modules, keeps for each image.

    image: (1, C, H, W), of which only the shape counts. item_size: bytes of an activation.
    """
    eager = copy.deepcopy(eager).to("meta").eval()
    ends = _block_ends(eager)
    outputs: dict[nn.Module, list[int]] = {}
    for module in eager.modules():
        if not [*module.children()]:
            module.register_forward_hook(
                lambda module, _, out: outputs.setdefault(module, []).append(out.numel())
            )
    eager(image.to("meta"))

    def total(kind: type[nn.Module]) -> int:
        return sum(sum(sizes) for module, sizes in outputs.items() if isinstance(module, kind))

    convolutions, pooled = total(nn.Conv2d), total(nn.MaxPool2d)
    results = sum(outputs[conv][0] for conv, _ in ends)
    dropped = sum(outputs[conv][0] * (1 + has_projection) for conv, has_projection in ends)
    speed = item_size * (convolutions + results + pooled) + pooled
    return Theory(
        eager=item_size * (convolutions + total(nn.ReLU) + pooled) + 8 * pooled,
        speed=speed,
        memory=speed - item_size * dropped,
    )


def _block_ends(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The last convolution of each residual block, and whether a projection is beside it."""
    ends = []
    for finding in survey(model):
        block, roles = finding.module, finding.roles
        if roles is None or roles.pattern == "ResNet":
            continue
        _, shortcut = parts_of(block, roles)
        ends.append((block.get_submodule(roles.convs[-1]), as_pair(shortcut) is not None))
    return ends


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


def saved_bytes_per_image(model: nn.Module, images: Tensor, dtype: torch.dtype) -> int:
    """`saved_bytes` of two images less those of one: without what is kept once, as cast weights.

    images: two in float32; in 16-bit dtypes the model runs under autocast.
    """
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    with autocast:
        return saved_bytes(model, images) - saved_bytes(model, images[:1])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
