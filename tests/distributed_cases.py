"""What tests/test_distributed.py runs in several processes on gloo: `FILE rank world folder`.

Each case returns the tensors that one process ends with; they are written to folder/RANK.pt.
"""

import copy
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from model_equality import images, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import resnet_fused as rf
from resnet_fused import models
from resnet_fused._torchvision import import_torchvision
from resnet_fused.models.cifar import ZeroPadShortcut
from resnet_fused.nn import BasicBlock, Bottleneck, ConvBnReLU2d, PreActBottleneck, blocks

TOTAL = 12  # images in all processes together
STEPS = 3
Results = dict[str, Tensor]
Norm = Callable[[int], nn.Module]


def shares(kind: str, world: int) -> list[int]:
    """Images of each process."""
    return {
        "even": [TOTAL // world] * world,
        "uneven": {2: [5, 7], 4: [1, 5, 4, 2]}[world],
        "empty": {2: [0, 12], 4: [3, 0, 9, 0]}[world],
        "nobody": [0] * world,
    }[kind]


def projection(norm: Norm, channels: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), norm(planes))


class PooledStem(nn.Module):
    """conv, bn, ReLU and pooling."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn, self.pool = norm(12), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = blocks.conv_bn_relu_max_pool(x, self.conv, self.bn, self.pool)
        assert out is not None
        return out

    def _forward_unfused(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.bn(self.conv(x))))


BLOCKS: dict[str, Callable[[Norm], nn.Module]] = {
    "basic": lambda norm: BasicBlock(8, 8, norm_layer=norm),
    "basic_projection": lambda norm: BasicBlock(
        8, 12, 2, projection(norm, 8, 12, 2), norm_layer=norm
    ),
    "basic_zero_pad": lambda norm: BasicBlock(8, 12, 2, ZeroPadShortcut(4, 2), norm_layer=norm),
    "bottleneck": lambda norm: Bottleneck(16, 4, norm_layer=norm),
    "bottleneck_projection": lambda norm: Bottleneck(
        8, 4, 2, projection(norm, 8, 16, 2), norm_layer=norm
    ),
    # Only the batch norm of the shortcut is that of one process, or only that of the main branch.
    "frozen_projection": lambda norm: Bottleneck(
        8, 4, 2, projection(rf.nn.FrozenBatchNorm2d, 8, 16, 2), norm_layer=norm
    ),
    "frozen_block": lambda norm: Bottleneck(
        8, 4, 2, projection(norm, 8, 16, 2), norm_layer=rf.nn.FrozenBatchNorm2d
    ),
    "local_projection": lambda norm: Bottleneck(
        8, 4, 2, projection(nn.BatchNorm2d, 8, 16, 2), norm_layer=norm
    ),
    "stem": PooledStem,
    "preact_bottleneck_projection": lambda norm: PreActBottleneck(
        8, 4, 2, nn.Conv2d(8, 16, 1, 2, bias=False), norm_layer=norm
    ),
    "conv_bn_relu": lambda norm: ConvBnReLU2d(8, 12, 3, norm_layer=norm),
    "conv_bn": lambda norm: ConvBnReLU2d(8, 12, 3, norm_layer=norm, relu=False),
}


def make_block(name: str, norm: Norm) -> nn.Module:
    """The same values in every process."""
    torch.manual_seed(0)
    return randomize(BLOCKS[name](norm)).double().train()


def block_input(block: nn.Module) -> Tensor:
    first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    return images(TOTAL, first.in_channels, 5, 6, dtype=torch.float64)


def train_block(
    block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, part: slice
) -> Results:
    """One forward and backward of a part of the batch; gradients of parameters are sums over it."""
    x = x[part].clone().requires_grad_()
    out = run(x)
    out.backward(gradient_of(out)[part])
    parameters = {f"grad {name}": p.grad for name, p in block.named_parameters()}
    buffers = {f"buffer {name}": b.clone() for name, b in block.named_buffers()}
    return {"out": out.detach(), "grad_x": x.grad, **parameters, **buffers}


def gradient_of(out: Tensor) -> Tensor:
    """The gradient of the output of the whole batch, of a part of which the shape is given."""
    seed = torch.Generator().manual_seed(1)
    return torch.randn(TOTAL, *out.shape[1:], generator=seed, dtype=out.dtype)


def part_of(rank: int, sizes: list[int]) -> slice:
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


class BlockCase(NamedTuple):
    """A block of SyncBatchNorm on a share of the batch."""

    block: str
    split: str = "uneven"
    options: tuple[tuple[str, Any], ...] = ()

    def run(self, rank: int, world: int) -> Results:
        options = dict(self.options)
        block = make_block(self.block, nn.SyncBatchNorm)
        if "mode" in options:
            block.training_mode = rf.TrainingMode.of(options["mode"])
        if "momentum" in options:
            for module in block.modules():
                if isinstance(module, nn.SyncBatchNorm):
                    module.momentum = options["momentum"]
        for name in options.get("frozen", ()):
            block.get_submodule(name).eval()
        x = block_input(block)
        if options.get("layout") == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        part = part_of(rank, shares(self.split, world))
        if "backend" in options:
            with rf.backend(options["backend"]):
                results = train_block(block, block, x, part)
        elif options.get("no_grad"):
            with torch.no_grad():
                results = {"out": block(x[part])}
            results |= {f"buffer {name}": b.clone() for name, b in block.named_buffers()}
        else:
            results = train_block(block, block, x, part)
        for name, tensor in results.items():
            if name.startswith("grad "):
                dist.all_reduce(tensor)
        return results


def messages(rank: int, world: int) -> Results:
    """How many messages of which size a block sends, forward and backward."""
    sent: list[int] = []
    original = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    block = make_block("bottleneck_projection", nn.SyncBatchNorm)
    x = block_input(block)[part_of(rank, shares("even", world))]
    dist.all_reduce = counting
    try:
        out = block(x)
        forward = len(sent)
        out.sum().backward()
    finally:
        dist.all_reduce = original
    return {"forward": torch.tensor(sent[:forward]), "backward": torch.tensor(sent[forward:])}


def one_group_per_half(rank: int, world: int) -> Results:
    """Groups of neighbours: each normalises by its own half of the batch."""
    groups = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
    group = groups[rank // 2]
    block = make_block("bottleneck_projection", lambda n: nn.SyncBatchNorm(n, process_group=group))
    sizes = shares("uneven", world)
    results = train_block(block, block, block_input(block), part_of(rank, sizes))
    for name, tensor in results.items():
        if name.startswith("grad "):
            dist.all_reduce(tensor, group=group)
    return results


def local_projection(rank: int, world: int) -> Results:
    """The batch norm of the shortcut is not synchronised: it sees this process's images alone."""
    block = make_block("local_projection", nn.SyncBatchNorm)
    return train_block(block, block, block_input(block), part_of(rank, shares("even", world)))


def network(norm: Norm) -> nn.Module:
    torch.manual_seed(0)
    return models.CifarResNet(1, num_classes=5, norm_layer=norm).double().train()


def network_batch() -> tuple[Tensor, Tensor]:
    x = images(TOTAL, 3, 16, 16, dtype=torch.float64)
    return x, torch.arange(TOTAL) % 5


def train_network(
    model: nn.Module, steps: int, part: slice, world: int, optimizer: torch.optim.Optimizer
) -> None:
    """The mean loss over all processes: DDP and FSDP average over processes, not over images."""
    x, labels = (tensor[part] for tensor in network_batch())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels, reduction="sum") * world / TOTAL
        loss.backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def state(model: nn.Module) -> Results:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def ddp(rank: int, world: int) -> Results:
    model = DistributedDataParallel(network(nn.BatchNorm2d))
    # On CPUs it refuses models that have SyncBatchNorm already.
    nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
    train_network(model, STEPS, part_of(rank, shares("uneven", world)), world, sgd(model))
    return state(model.module)


def converted(rank: int, world: int, before: bool) -> Results:
    """torch.nn.SyncBatchNorm.convert_sync_batchnorm before or after `fuse`."""
    torchvision = import_torchvision()
    if torchvision is None:
        return {}
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).double().train()
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model = rf.fuse(convert(model)) if before else convert(rf.fuse(model))
    fused = [row.fused for row in rf.explain(model).rows]
    assert len(fused) == 9, fused
    assert all(fused), fused
    train_network(model, 1, part_of(rank, shares("uneven", world)), world, sgd(model))
    grads = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    buffers = {f"buffer {name}": b for name, b in model.named_buffers()}
    return {name: grad / world for name, grad in grads.items()} | buffers


def fsdp(rank: int, world: int, folder: Path) -> Results:
    """Two steps, a distributed checkpoint, a third step by another model that loads it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))

    def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network(nn.SyncBatchNorm)
        for module in model.modules():
            if isinstance(module, BasicBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, sgd(model)

    part = part_of(rank, shares("even", world))
    model, optimizer = sharded()
    train_network(model, 2, part, world, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "fsdp")
    model, optimizer = sharded()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)  # nothing may be left of these
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "fsdp")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    train_network(model, STEPS - 2, part, world, optimizer)
    model.eval()
    with torch.no_grad():
        out = model(network_batch()[0])
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    return {**{name: value.detach().clone() for name, value in full.items()}, "eval out": out}


def plain_checkpoint(rank: int, world: int, folder: Path) -> Results:
    """A distributed checkpoint of a fused model loads into the unfused one."""
    from torch.distributed import checkpoint

    torchvision = import_torchvision()
    if torchvision is None:
        return {}
    torch.manual_seed(0)
    eager = torchvision.models.resnet18(num_classes=5)
    fused = rf.fuse(copy.deepcopy(eager))
    randomize(fused, seed=3)
    checkpoint.save({"model": fused.state_dict()}, checkpoint_id=folder / "plain")
    loaded = {"model": eager.state_dict()}
    checkpoint.load(loaded, checkpoint_id=folder / "plain")
    eager.load_state_dict(loaded["model"])
    difference = [
        float((a - b).abs().max())
        for a, b in zip(eager.state_dict().values(), fused.state_dict().values(), strict=True)
    ]
    return {"difference": torch.tensor(max(difference)), "count": torch.tensor(len(difference))}


BLOCK_CASES: dict[str, BlockCase] = {
    **{
        f"{name}-{split}": BlockCase(name, split)
        for name in BLOCKS
        if name != "local_projection"
        for split in ("uneven", "empty")
    },
    "even": BlockCase("bottleneck_projection", "even"),
    "channels_last": BlockCase("bottleneck_projection", options=(("layout", "channels_last"),)),
    "memory": BlockCase("bottleneck_projection", options=(("mode", "memory"),)),
    "operators": BlockCase("bottleneck_projection", options=(("backend", "reference"),)),
    "operators-empty": BlockCase("bottleneck", "empty", options=(("backend", "reference"),)),
    "operators-preact": BlockCase(
        "preact_bottleneck_projection", options=(("backend", "reference"),)
    ),
    "operators-memory": BlockCase(
        "bottleneck_projection", options=(("backend", "reference"), ("mode", "memory"))
    ),
    # Nobody has images: nothing moves.
    "nobody": BlockCase("bottleneck_projection", "nobody"),
    "operators-nobody": BlockCase("bottleneck", "nobody", options=(("backend", "reference"),)),
    "stem-nobody": BlockCase("stem", "nobody"),
    # Batch norms in evaluation see nobody's batch.
    "frozen_middle": BlockCase("bottleneck_projection", options=(("frozen", ("bn2",)),)),
    "frozen_end": BlockCase("bottleneck_projection", options=(("frozen", ("downsample.1",)),)),
    "cumulative": BlockCase("basic", options=(("momentum", None),)),
    "no_grad": BlockCase("bottleneck_projection", options=(("no_grad", True),)),
}


def all_cases(folder: Path) -> dict[str, Callable[[int, int], Results]]:
    return {
        **{name: case.run for name, case in BLOCK_CASES.items()},
        "messages": messages,
        "local_projection": local_projection,
        "groups": one_group_per_half,
        "ddp": ddp,
        "converted_before": lambda rank, world: converted(rank, world, before=True),
        "converted_after": lambda rank, world: converted(rank, world, before=False),
        "fsdp": lambda rank, world: fsdp(rank, world, folder),
        "plain_checkpoint": lambda rank, world: plain_checkpoint(rank, world, folder),
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Results | str] = {}
    for name, case in all_cases(folder).items():
        try:
            results[name] = case(rank, world)
        except Exception:  # the test shows it, with the number of the process
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
