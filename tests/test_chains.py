"""Chains of blocks in inference: same results, which operators run, and what ends a chain."""

import contextlib
import copy
import importlib
import json
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hand_written_blocks import BottleneckCloned
from model_equality import distance, images, randomize
from numerics import device_of, no_recompilation, on_backends
from test_models import plain
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import backends, models, reference
from resnet_fused._torchvision import import_torchvision
from resnet_fused.conversion import explain, fuse, unfuse
from resnet_fused.conversion.swap import Fused, FusedStage
from resnet_fused.models.stages import run_stages
from resnet_fused.nn import BasicBlock, Bottleneck, FrozenBatchNorm2d, chains

CONV, TAIL, ROLL = "conv_bn_relu", "bottleneck_tail", "bottleneck_roll"
PROJECTION = "conv_projection_relu"
CHAINS = (TAIL, ROLL, PROJECTION)
# Blocks of conv1 to conv3: 4 with a projection and 12 without; of these 3 and 2 pairs roll.
RESNET50 = {CONV: 1 + 2 * 4 + 12 - 3, PROJECTION: 4, TAIL: 9, ROLL: 3}
WIDE = {CONV: 1 + 2 * 4 + 12 - 1, PROJECTION: 4, TAIL: 11, ROLL: 1}
TAIL_TEXT, ROLL_TEXT = "conv2+conv3+add", "conv2+conv3+add, conv1 of the next block"
PROJECTION_TEXT = "conv3+downsample+add"
Names = Counter[str]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Names:
    """How often the reference of each operator has run."""
    counter: Names = Counter()
    choose = backends.choose

    def spy(operator: str, x: Tensor) -> Any:
        implementation = choose(operator, x)

        def counted(*arguments: Any) -> Any:
            counter[operator] += 1
            return implementation(*arguments)

        return counted if implementation is getattr(reference, operator) else implementation

    monkeypatch.setattr(backends, "choose", spy)
    return counter


@pytest.fixture(autouse=True)
def _same_weights_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    module = import_torchvision()
    if module is None:
        pytest.skip("torchvision is not installed")
    return module


@pytest.fixture(scope="module")
def timm(torchvision: ModuleType) -> ModuleType:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return importlib.import_module("timm")


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.no_grad(), rf.backend("reference"):
        yield


def stage(width: int = 64, blocks: int = 3, projection: bool = False) -> nn.Sequential:
    """Bottlenecks in a row, in evaluation. projection: the first one has that and stride 2."""
    channels = Bottleneck.expansion * width
    made = [Bottleneck(channels, width) for _ in range(blocks)]
    if projection:
        downsample = nn.Sequential(
            nn.Conv2d(width, channels, 1, 2, bias=False), nn.BatchNorm2d(channels)
        )
        made[0] = Bottleneck(width, width, 2, downsample)
    return randomize(nn.Sequential(*made)).eval()


def texts(model: nn.Module) -> list[str]:
    return [row.chain for row in explain(model).rows]


def assert_same_inference(
    eager: nn.Module, convert: Callable[[nn.Module], nn.Module], *shape: int
) -> None:
    """In float64 within 1e-9; in float32 the error is at most twice eager's, plus a rounding.

    Over four inputs: for a single one eager may be rounded luckily.
    """
    draws = [images(*shape, seed=seed) for seed in range(4)]
    native = [x.contiguous(memory_format=torch.channels_last) for x in draws]
    doubled = copy.deepcopy(eager).double()
    exact = torch.cat([doubled(x.double()) for x in draws])
    assert distance(convert(doubled)(draws[0].double()), exact[: len(draws[0])]) <= 1e-9
    converted = convert(eager)
    error = distance(torch.cat([converted(x) for x in draws]), exact)
    eager_error = distance(torch.cat([eager(x) for x in native]), exact)
    assert error <= 2.0 * eager_error + torch.finfo(torch.float32).eps


def assert_as_plain(blocks: nn.Sequential, x: Tensor) -> None:
    """The stage computes what its layers compute one by one."""
    with rf.backend("reference"):
        actual = run_stages(x, (blocks,))
    torch.testing.assert_close(actual, plain(blocks)(x), rtol=1e-4, atol=1e-4)


X = images(2, 256, 5, 4).contiguous(memory_format=torch.channels_last)


# Networks


@pytest.mark.parametrize(
    ("name", "size", "operators"),
    [
        ("resnet50", (2, 64, 64), RESNET50),
        ("resnet50", (1, 33, 47), RESNET50),
        ("wide_resnet50_2", (1, 33, 32), WIDE),
        ("resnext50_32x4d", (1, 33, 32), {CONV: 1 + 2 * 4 + 3 * 12, PROJECTION: 4}),
    ],
)
def test_networks(
    name: str,
    size: tuple[int, int, int],
    operators: dict[str, int],
    torchvision: ModuleType,
    ran: Names,
    inference: None,
) -> None:
    batch, *pixels = size
    x = images(batch, 3, *pixels)
    theirs = randomize(getattr(torchvision.models, name)(num_classes=5)).eval()
    ours = getattr(models, name)(num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    for model in (fuse(theirs), ours.eval()):
        ran.clear()
        model(x)
        assert ran == operators
    assert_same_inference(theirs, fuse, *x.shape)


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("resnet50", RESNET50),
        # Three convolutions in the stem. Blocks with a pooled shortcut, which has a convolution of
        # its own, are no chains; in the first block the pooling is none.
        ("resnet50d", {CONV: 3 + (2 + 3 * 4) + 12 - 3, TAIL: 9, ROLL: 3, PROJECTION: 1}),
        ("resnet26", {CONV: 1 + 2 * 4 + 4, TAIL: 4, PROJECTION: 4}),
    ],
)
def test_networks_of_timm(
    name: str, operators: dict[str, int], timm: ModuleType, ran: Names, inference: None
) -> None:
    model = randomize(timm.create_model(name, num_classes=5)).eval()
    x = images(2, 3, 32, 32)
    fuse(model)(x)
    assert ran == operators
    assert_same_inference(model, fuse, *x.shape)


def test_networks_of_basic_blocks(torchvision: ModuleType, ran: Names, inference: None) -> None:
    model = randomize(torchvision.models.resnet18(num_classes=5)).eval()
    fuse(model)(images(2, 3, 32, 32))
    assert not any(ran[chain] for chain in CHAINS)
    assert_same_inference(model, fuse, 2, 3, 32, 32)


def test_empty_batch(ran: Names, inference: None) -> None:
    model = models.resnet50(num_classes=5).eval()
    assert model(images(0, 3, 64, 64)).shape == (0, 5)
    assert ran == RESNET50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", on_backends(TAIL, torch.bfloat16))
def test_stages_in_16_bits(backend: str, dtype: torch.dtype) -> None:
    """On every backend that has the operators, also where the next width has no kernel."""
    device = device_of(backend)
    network = nn.Sequential(*stage(64, 4, projection=True), Bottleneck(256, 24)).eval()
    network[4].downsample = nn.Sequential(nn.Conv2d(256, 96, 1), nn.BatchNorm2d(96))
    network[4].conv3, network[4].bn3 = nn.Conv2d(24, 96, 1), nn.BatchNorm2d(96)
    randomize(network).eval().to(device, dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = images(2, 64, 7, 5).to(device, dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        with rf.backend(backend):
            actual = run_stages(x, (network,))
        eager = plain(network)(x)
        exact = plain(network).double()(x.double())
    assert actual.dtype == dtype
    limit = 2.0 * distance(eager, exact) + torch.finfo(dtype).eps
    assert distance(actual, exact) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, ran: Names, inference: None) -> None:
    network = nn.Sequential(*stage(64, 3, projection=True))
    x = images(2, 64, 7, 5).contiguous(memory_format=torch.channels_last).bfloat16()
    exact = plain(network).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, eager = run_stages(x.to(dtype), (network,)), plain(network)(x.to(dtype))
    assert ran == {CONV: 3, PROJECTION: 1, ROLL: 1, TAIL: 1}
    assert actual.dtype == torch.bfloat16
    limit = 2.0 * distance(eager, exact) + torch.finfo(torch.bfloat16).eps
    assert distance(actual, exact) <= limit


def test_autocast_leaves_float64(ran: Names, inference: None) -> None:
    network, x = stage(64, 2).double(), X.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_stages(x, (network,))
    torch.testing.assert_close(actual, plain(network)(x), rtol=1e-9, atol=1e-9)
    assert ran == {CONV: 1, ROLL: 1, TAIL: 1}


# Which operators run


def test_a_block_alone(ran: Names, inference: None) -> None:
    projected, identical = stage(12, 2, projection=True)
    x = images(2, 12, 7, 5).contiguous(memory_format=torch.channels_last)
    between = projected(x)
    torch.testing.assert_close(between, plain(projected)(x), rtol=1e-4, atol=1e-4)
    assert ran == {CONV: 2, PROJECTION: 1}
    ran.clear()
    out = identical(between)
    torch.testing.assert_close(out, plain(identical)(between), rtol=1e-4, atol=1e-4)
    assert ran == {CONV: 1, TAIL: 1}


@pytest.mark.parametrize(
    ("width", "next_width", "rolls"),
    [(64, 64, 1), (128, 128, 1), (64, 128, 0), (128, 64, 0), (32, 32, 0), (256, 256, 0)],
)
def test_what_rolls(width: int, next_width: int, rolls: int, ran: Names, inference: None) -> None:
    channels = 4 * width
    blocks = nn.Sequential(Bottleneck(channels, width), Bottleneck(channels, next_width)).eval()
    blocks[1].conv3 = nn.Conv2d(next_width, channels, 1)
    blocks[1].bn3 = nn.BatchNorm2d(channels)
    randomize(blocks).eval()
    x = images(1, channels, 3, 4).contiguous(memory_format=torch.channels_last)
    assert_as_plain(blocks, x)
    assert ran == Counter({CONV: 2 - rolls, TAIL: 2 - rolls, ROLL: rolls})


def _next_with_stride(block: Bottleneck) -> None:
    block.conv1.stride = (2, 2)
    block.downsample = nn.Sequential(nn.Conv2d(256, 256, 1, 2), nn.BatchNorm2d(256)).eval()


def test_conv1_with_a_stride_is_not_rolled_into(ran: Names, inference: None) -> None:
    blocks = stage(blocks=2)
    _next_with_stride(blocks[1])
    assert_as_plain(blocks, X)
    assert ran == {CONV: 1 + 2, TAIL: 1, PROJECTION: 1}


def test_rolls_into_a_block_with_a_projection(ran: Names, inference: None) -> None:
    blocks = stage(blocks=2)
    blocks[1].downsample = nn.Sequential(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256)).eval()
    assert_as_plain(blocks, X)
    assert ran == {CONV: 1 + 1, ROLL: 1, PROJECTION: 1}


BIASED = {"conv1": (256, 64, 1), "conv2": (64, 64, 3), "conv3": (64, 256, 1)}


def test_biases_and_frozen_norms(ran: Names, inference: None) -> None:
    blocks = stage(blocks=2)
    for block in blocks:
        for number, (name, (channels, kernels, size)) in enumerate(BIASED.items(), 1):
            setattr(block, name, nn.Conv2d(channels, kernels, size, padding=size // 2))
            setattr(block, f"bn{number}", FrozenBatchNorm2d(kernels))
    randomize(blocks)
    assert_as_plain(blocks, X)
    assert ran == {CONV: 1, ROLL: 1, TAIL: 1}


OTHER_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: Bottleneck(256, 64, groups=2, base_width=32),
    "dilated": lambda: Bottleneck(256, 64, dilation=2),
    "another norm": lambda: Bottleneck(256, 64, norm_layer=lambda n: nn.GroupNorm(4, n)),
    "pooled shortcut": lambda: Bottleneck(256, 64, downsample=nn.AvgPool2d(3, 1, 1)),
    "BasicBlock": lambda: BasicBlock(256, 256),
    "convolution": lambda: nn.Conv2d(256, 256, 1),
    "subclass": lambda: Doubled(256, 64),
}


class Doubled(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_other_blocks_run_as_they_are(name: str, ran: Names, inference: None) -> None:
    """And end the chain: the blocks around them form others."""
    blocks = stage(blocks=5)
    other = randomize(OTHER_BLOCKS[name]()).eval()
    blocks[2] = other
    assert chains.layers_of(other) is None
    expected = plain(blocks[:2])(X)
    expected = plain(blocks[3:])(other(expected))
    ran.clear()
    other(X)
    alone = ran.copy()
    ran.clear()
    out = run_stages(X, (blocks,))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert ran == alone + Counter({CONV: 2, ROLL: 2, TAIL: 2})


class Unbatched(Bottleneck):
    """Its output is for no chain."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def test_a_block_can_end_what_chains_need(inference: None) -> None:
    """Behind it blocks run as they are, and say of bad input what they say alone."""
    blocks = stage(blocks=2)
    blocks[0] = Unbatched(256, 64).eval()
    with pytest.raises(ValueError, match=r"^expected 4D input \(got 3D input\)$"):
        run_stages(X[:1], (blocks,))


def test_blocks_that_are_converted(ran: Names, inference: None) -> None:
    """Its convolution in groups and a shortcut without batch norm are for no chain."""
    block = randomize(BottleneckCloned()).eval()
    x = images(2, 8, 6, 5)
    fused = fuse(block)
    torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-4)
    assert not any(ran[chain] for chain in CHAINS)


def test_one_block_twice(ran: Names, inference: None) -> None:
    (block,) = stage(blocks=1)
    assert_as_plain(nn.Sequential(block, block), X)
    assert ran == {CONV: 1, ROLL: 1, TAIL: 1}


def test_chains_go_over_the_borders_of_stages(ran: Names, inference: None) -> None:
    stages = stage(blocks=2), stage(blocks=1)
    out = run_stages(X, stages)
    torch.testing.assert_close(out, plain(stages[1])(plain(stages[0])(X)), rtol=1e-4, atol=1e-4)
    assert ran == {CONV: 1, ROLL: 2, TAIL: 1}


def test_formats(inference: None) -> None:
    blocks = stage(blocks=2)
    expected = plain(blocks)(X)
    for x in (X, X.contiguous(), X.transpose(2, 3).contiguous().transpose(2, 3)):
        out = run_stages(x, (blocks,))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        format_ = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        assert out.is_contiguous(memory_format=format_)


# When chains run


def test_only_where_they_are_asked_for(ran: Names) -> None:
    """On a CPU they would be plain PyTorch, and on a GPU nobody has timed them."""
    blocks = stage()
    with torch.no_grad():
        for wish in (contextlib.nullcontext(), rf.backend("cpu")):
            with wish:
                for _ in range(3):
                    run_stages(X, (blocks,))
    assert not any(ran[chain] for chain in CHAINS)


def test_not_with_gradients(ran: Names) -> None:
    blocks = stage()
    with rf.backend("reference"):
        out = run_stages(X, (blocks,))
        assert out.requires_grad
        frozen = run_stages(X, (blocks.requires_grad_(False),))
    torch.testing.assert_close(out, frozen)
    assert not any(ran[chain] for chain in CHAINS)


@pytest.mark.parametrize("fused", [False, True])
def test_compiled(fused: bool, ran: Names, torchvision: ModuleType) -> None:
    make = torchvision.models.resnet.Bottleneck
    blocks = fuse(nn.Sequential(make(256, 64), make(256, 64))) if fused else stage(blocks=2)
    randomize(blocks).eval()
    with no_recompilation(), torch.no_grad():
        compiled = torch.compile(
            blocks if fused else lambda x: run_stages(x, (blocks,)),
            fullgraph=True, backend="eager",
        )  # fmt: skip
        expected = blocks(X)
        for wish in ("reference", "cpu"):
            with rf.backend(wish):
                torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-4)
    assert not any(ran[chain] for chain in CHAINS)


def test_traced_and_transformed(ran: Names, inference: None) -> None:
    blocks = stage(blocks=2).requires_grad_(False)  # or tracing would refuse their weights
    expected = plain(blocks)(X)
    traced = torch.jit.trace(lambda x: run_stages(x, (blocks,)), (X,), check_trace=False)
    torch.testing.assert_close(traced(X), expected, rtol=1e-4, atol=1e-4)
    mapped = torch.func.vmap(lambda x: run_stages(x[None], (blocks,))[0])(X.contiguous())
    torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-4)
    assert not any(ran[chain] for chain in CHAINS)


def test_global_hooks_are_called(ran: Names, inference: None) -> None:
    blocks, called = stage(blocks=2), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        run_stages(X, (blocks,))
    finally:
        handle.remove()
    assert {blocks[0], blocks[1].conv2, blocks[1].bn3} <= set(called)
    assert not any(ran[chain] for chain in CHAINS)


# Changes between two calls


def _train_one_norm(blocks: nn.Sequential) -> None:
    blocks[1].bn2.train()


def _hook_a_convolution(blocks: nn.Sequential) -> None:
    blocks[1].conv1.register_forward_hook(lambda _, inputs, out: out + 1.0)


def _hook_a_block(blocks: nn.Sequential) -> None:
    blocks[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1.0,))


def _another_forward(blocks: nn.Sequential) -> None:
    forward = blocks[1].forward
    blocks[1].forward = lambda x: forward(x) + 1.0


def _another_activation(blocks: nn.Sequential) -> None:
    blocks[1].relu = nn.ReLU6()


def _another_norm(blocks: nn.Sequential) -> None:
    blocks[1].bn1 = randomize(nn.BatchNorm2d(64, eps=0.1), seed=9).eval()


def _another_convolution(blocks: nn.Sequential) -> None:
    blocks[1].conv2 = nn.Conv2d(64, 64, 3, padding=1)


def _other_weights(blocks: nn.Sequential) -> None:
    state = blocks.state_dict()
    blocks.load_state_dict({name: 1.2 * t if t.dim() else t for name, t in state.items()})


def _an_edited_weight(blocks: nn.Sequential) -> None:
    blocks[1].conv3.weight.mul_(-1.0)


def _edited_statistics(blocks: nn.Sequential) -> None:
    blocks[2].bn1.running_mean.add_(0.5)


def _more_blocks(blocks: nn.Sequential) -> None:
    blocks.append(stage(blocks=1)[0])


def _fewer_blocks(blocks: nn.Sequential) -> None:
    del blocks[1]


def _a_projection(blocks: nn.Sequential) -> None:
    blocks[1].downsample = nn.Sequential(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256)).eval()


# And what runs for three blocks then.
ROLLED = {CONV: 1, ROLL: 2, TAIL: 1}
AROUND = {CONV: 2, TAIL: 2}  # of the other two blocks
CHANGES: dict[Callable[[nn.Sequential], None], dict[str, int]] = {
    _train_one_norm: AROUND | {CONV: 2 + 2, "bn_relu": 1},
    _hook_a_convolution: AROUND,
    _hook_a_block: AROUND | {CONV: 3, TAIL: 3},
    _another_forward: AROUND | {CONV: 3, TAIL: 3},
    _another_activation: AROUND,
    _another_norm: ROLLED,
    _another_convolution: ROLLED,
    _other_weights: ROLLED,
    _an_edited_weight: ROLLED,
    _edited_statistics: ROLLED,
    _more_blocks: ROLLED | {ROLL: 3},
    _fewer_blocks: ROLLED | {ROLL: 1},
    _a_projection: {CONV: 3, ROLL: 1, PROJECTION: 1, TAIL: 1},
}


def one_by_one(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """By calls of modules alone, with all of their hooks; in training no statistics are updated."""
    for block in copy.deepcopy(blocks):
        for hook in block._forward_pre_hooks.values():
            (x,) = hook(block, (x,))
        identity = x if block.downsample is None else block.downsample(x)
        out = block.relu(block.bn1(block.conv1(x)))
        out = block.relu(block.bn2(block.conv2(out)))
        x = block.relu(block.bn3(block.conv3(out)) + identity)
        x = x + 1.0 if "forward" in vars(block) else x
    return x


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_counts_from_the_next_call(
    change: Callable[[nn.Sequential], None], ran: Names, inference: None
) -> None:
    blocks = stage()
    for _ in range(2):
        torch.testing.assert_close(
            run_stages(X, (blocks,)), one_by_one(blocks, X), rtol=1e-4, atol=1e-4
        )
    assert ran == {name: 2 * count for name, count in ROLLED.items()}
    change(blocks)
    for _ in range(2):
        expected = one_by_one(blocks, X)
        ran.clear()
        torch.testing.assert_close(run_stages(X, (blocks,)), expected, rtol=1e-4, atol=1e-4)
        assert ran == CHANGES[change]


@pytest.mark.parametrize("seed", range(4))
def test_random_changes(seed: int, inference: None) -> None:
    """Every state that a sequence of changes leads to is computed as it is."""
    blocks, generator = stage(blocks=4), random.Random(seed)  # noqa: S311
    once = {_fewer_blocks, _another_forward}
    left = [change for change in CHANGES if change not in once or generator.random() < 0.5]
    generator.shuffle(left)
    for change in left:
        change(blocks)
        if generator.random() < 0.3:
            blocks.eval()
        expected = one_by_one(blocks, X)
        torch.testing.assert_close(run_stages(X, (blocks,)), expected, rtol=1e-3, atol=1e-3)


def test_training_and_back(ran: Names) -> None:
    blocks = stage(blocks=2)
    with rf.backend("reference"):
        run_stages(X, (blocks.train(),)).square().mean().backward()
        with torch.no_grad():
            for parameter in blocks.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
            assert not any(ran[chain] for chain in CHAINS)
            assert_as_plain(blocks.eval(), X)
    assert ran[ROLL] == ran[TAIL] == 1


@pytest.mark.parametrize("place", ["layer1", "layer1.1", "layer1.1.conv2", "layer1.2.relu"])
def test_hooks_in_a_converted_network(
    place: str, torchvision: ModuleType, ran: Names, inference: None
) -> None:
    model = randomize(torchvision.models.resnet50(num_classes=5)).eval()
    x, called = images(1, 3, 64, 64), []
    expected, fused = model(x), fuse(model)
    handle = fused.get_submodule(place).register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-3)
    assert len(called) == (3 if place.endswith("relu") else 1)
    assert ran[ROLL] == texts(fused).count(ROLL_TEXT) == 2
    handle.remove()
    ran.clear()
    fused(x)
    assert ran == RESNET50


# Stages of networks that keep their own forward


class Network(nn.Module):
    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(make(256, 64), make(256, 64), make(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


@pytest.fixture
def network(torchvision: ModuleType) -> nn.Module:
    return randomize(Network(torchvision.models.resnet.Bottleneck)).eval()


def test_stages_are_converted_and_restored(network: nn.Module, ran: Names, inference: None) -> None:
    fused = fuse(network)
    assert isinstance(fused.body, FusedStage)
    assert isinstance(fused.body, nn.Sequential)
    assert type(network.body) is nn.Sequential
    for model in (fused, fuse(fused), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # noqa: S301
        ran.clear()
        torch.testing.assert_close(model(X), network(X), rtol=1e-4, atol=1e-4)
        assert ran == ROLLED
    sliced = fused.body[1:]
    torch.testing.assert_close(sliced(X), network.body[1:](X), rtol=1e-4, atol=1e-4)
    back = unfuse(fused)
    assert type(back.body) is nn.Sequential
    assert not any(isinstance(module, Fused) for module in back.modules())
    assert torch.equal(back(X), network(X))


def test_hooks_on_a_stage(network: nn.Module, ran: Names, inference: None) -> None:
    """They run around the whole of it, as they would around a Sequential."""
    fused, called = fuse(network), []
    fused.body.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(fused(X), network(X), rtol=1e-4, atol=1e-4)
    assert called == [1]
    assert ran == ROLLED


def test_one_block_is_no_stage(torchvision: ModuleType) -> None:
    make = torchvision.models.resnet.Bottleneck
    fused = fuse(nn.Sequential(nn.Sequential(make(256, 64)), nn.Sequential(nn.ReLU())))
    assert not any(isinstance(module, FusedStage) for module in fused.modules())


def test_subclasses_of_sequential_keep_their_forward(torchvision: ModuleType) -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    make = torchvision.models.resnet.Bottleneck
    model = randomize(Residual(make(256, 64), make(256, 64))).eval()
    fused = fuse(model)
    assert type(fused) is Residual
    with torch.no_grad():
        torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-4)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each native call the number of its blocks."""
    calls: list[int] = []
    run = rf.nn.inference_plan.run

    def spy(blocks: Any, *arguments: Any) -> Tensor | None:
        out = run(blocks, *arguments)
        if out is not None:
            calls.append(len(blocks))
        return out

    monkeypatch.setattr(rf.nn.inference_plan, "run", spy)
    return calls


def test_stages_in_one_native_call_on_a_cpu(network: nn.Module, native_calls: list[int]) -> None:
    """Where every block has an inference plan, those of a stage run together."""
    fused = fuse(network)
    with torch.no_grad(), rf.backend("cpu"):
        for _ in range(3):
            torch.testing.assert_close(fused(X), network(X), rtol=1e-4, atol=1e-4)
    assert native_calls == [3, 3]


def test_a_stage_that_was_converted_first(torchvision: ModuleType, native_calls: list[int]) -> None:
    """Its blocks run with those of the network that is converted around it."""
    resnet = torchvision.models.resnet
    model = randomize(resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=5)).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad(), rf.backend("cpu"):
        expected = model(x)
        model.layer2 = fuse(model.layer2)
        fused = fuse(model)
        assert isinstance(fused.layer2, FusedStage)
        for _ in range(3):
            torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-3)
    assert native_calls == [5, 5]


# What explain says of them

# Of the widest blocks no kernel does more than one convolution.
TEXTS = [
    *("", PROJECTION_TEXT, ROLL_TEXT, TAIL_TEXT),
    *(PROJECTION_TEXT, ROLL_TEXT, ROLL_TEXT, TAIL_TEXT),
    *(PROJECTION_TEXT, TAIL_TEXT, TAIL_TEXT, TAIL_TEXT, TAIL_TEXT, TAIL_TEXT),
    *(PROJECTION_TEXT, "", ""),
]


def test_explain_names_the_chains(torchvision: ModuleType, timm: ModuleType) -> None:
    with torch.device("meta"):
        own, theirs = models.resnet50(), torchvision.models.resnet50()
        stages_alone = timm.create_model("resnet50")
    assert texts(own) == texts(theirs) == texts(fuse(theirs)) == TEXTS
    assert texts(stages_alone) == texts(fuse(stages_alone)) == TEXTS
    lines = str(explain(own)).splitlines()
    notes = {line.split(": ", 1)[1]: line[0] for line in lines if line[1:].startswith(": chain")}
    assert {*notes} == {f"chain: {text}" for text in (PROJECTION_TEXT, ROLL_TEXT, TAIL_TEXT)}
    assert lines[4].startswith("layer1.1 ")
    assert lines[4].split()[-1] == notes[f"chain: {ROLL_TEXT}"]
    assert lines[-1].endswith("in bfloat16 and float16; no rule chooses them.")
    assert json.loads(json.dumps(explain(own).to_dict()))["rows"][2]["chain"] == ROLL_TEXT


def test_explain_counts_bytes_in_chains(network: nn.Module) -> None:
    """Of a block that rolls only y1, its input and its output travel; the next starts from y1."""
    explanation = explain(network, torch.empty(3, 256, 6, 5, dtype=torch.float16))
    pixels = 6 * 5
    x, y = 256 * pixels, 64 * pixels
    fused = (x + y) + 2 * y + (y + x) + x
    ends = y + x + x  # y1 and the shortcut are read, the output is written
    assert [row.bytes_after for row in explanation.rows] == [2 * fused] * 3
    chained = [row.bytes_chained for row in explanation.rows]
    assert chained == [2 * (x + y + ends), 2 * (y + ends), 2 * (y + ends)]
    assert f"{sum(chained) / 1e6:.2f} MB chained. Chains run" in explanation.summary
    assert "MB chained" in str(explanation).splitlines()[0]


def test_explain_counts_bytes_of_projections(torchvision: ModuleType) -> None:
    """The shortcut is neither written nor read."""
    make, projection = torchvision.models.resnet.Bottleneck, nn.Conv2d(64, 256, 1, 2)
    block = make(64, 64, 2, nn.Sequential(projection, nn.BatchNorm2d(256)))
    (row,) = explain(block, torch.empty(1, 64, 6, 8)).rows
    assert row.chain == PROJECTION_TEXT
    x, y1, y2, out = 64 * 48, 64 * 48, 64 * 12, 256 * 12
    assert row.bytes_after == 4 * (x + y1 + y1 + y2 + y2 + x + out + 2 * out)
    assert row.bytes_chained == 4 * (x + y1 + y1 + y2 + y2 + x + out)


def test_explain_says_what_ends_a_chain(network: nn.Module) -> None:
    assert texts(network) == texts(fuse(network)) == [ROLL_TEXT, ROLL_TEXT, TAIL_TEXT]
    for model in (network, fuse(network)):
        handle = model.body[1].register_forward_hook(lambda *_: None)
        assert texts(model) == [TAIL_TEXT, TAIL_TEXT, TAIL_TEXT]
        handle.remove()
    alone = nn.Sequential(network.body[0], nn.ReLU())
    assert texts(alone) == texts(fuse(alone)) == [TAIL_TEXT]


@pytest.mark.parametrize("name", ["wide_resnet50_2", "resnext50_32x4d"])
def test_explain_tells_of_kernels_alone(name: str) -> None:
    """What has none runs layer by layer, though by the same operators."""
    with torch.device("meta"):
        model = getattr(models, name)()
    assert Counter(texts(model)) == {"": 13, PROJECTION_TEXT: 4}


def test_explain_without_chains() -> None:
    explanation = explain(models.resnet18(), torch.empty(1, 3, 64, 64))
    assert not any(row.chain for row in explanation.rows)
    assert [row.bytes_chained for row in explanation.rows] == [
        row.bytes_after for row in explanation.rows
    ]
    assert "chain" not in str(explanation)
