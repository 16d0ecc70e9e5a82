"""Pre-activation blocks and networks (ResNet V2): every implementation, against plain modules."""

import copy
from collections.abc import Callable
from types import ModuleType

import interpreted_backend
import pytest
import torch
from model_equality import assert_same_function, distance, images, randomize
from numerics import device_of, no_recompilation, on_backends, short
from test_block_implementations import context, needs_extension, train
from test_block_training import saved_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused import models
from resnet_fused.commands.networks import eager_twin
from resnet_fused.models.cifar import ZeroPadShortcut
from resnet_fused.nn import (
    FrozenBatchNorm2d,
    PreActBasicBlock,
    PreActBottleneck,
    preactivation_function,
    preactivation_operators,
    preactivation_plain,
)

Norm = Callable[[int], nn.Module]


def conv1x1(channels: int, planes: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, planes, 1, stride, bias=bias)


def _frozen(*names: str) -> nn.Module:
    """A Bottleneck with a projection some of whose batch norms are in evaluation."""
    block = PreActBottleneck(16, 8, 2, conv1x1(16, 32, 2)).train()
    for name in names:
        block.get_submodule(name).eval()
    return block


def _bottleneck(norm: Norm) -> nn.Module:
    return PreActBottleneck(32, 8, norm_layer=norm)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: PreActBasicBlock(16, 16),
    "basic_projection": lambda: PreActBasicBlock(16, 24, 2, conv1x1(16, 24, 2)),
    "basic_zero_pad": lambda: PreActBasicBlock(16, 24, 2, ZeroPadShortcut(8, 2)),
    "from_the_first_relu": lambda: PreActBasicBlock(16, 16, downsample=nn.Identity()),
    "biased_projection": lambda: PreActBasicBlock(16, 24, 2, conv1x1(16, 24, 2, bias=True)),
    "bottleneck": lambda: PreActBottleneck(32, 8),
    "bottleneck_projection": lambda: PreActBottleneck(16, 8, 2, conv1x1(16, 32, 2)),
    "bottleneck_zero_pad": lambda: PreActBottleneck(16, 8, 2, ZeroPadShortcut(16, 2)),
    "groups": lambda: PreActBottleneck(16, 8, 1, conv1x1(16, 32), groups=2, base_width=64),
    "dilation": lambda: PreActBottleneck(32, 8, dilation=2),
    "no_affine": lambda: _bottleneck(lambda n: nn.BatchNorm2d(n, affine=False)),
    "cumulative": lambda: _bottleneck(lambda n: nn.BatchNorm2d(n, momentum=None)),
    "no_statistics": lambda: _bottleneck(lambda n: nn.BatchNorm2d(n, track_running_stats=False)),
    "frozen_first": lambda: _frozen("bn1"),
    "frozen_middle": lambda: _frozen("bn2"),
    "frozen_last": lambda: _frozen("bn3"),
    "frozen_type": lambda: _bottleneck(
        lambda n: FrozenBatchNorm2d(n) if n == 8 else nn.BatchNorm2d(n)
    ),
    "frozen_first_type": lambda: _bottleneck(
        lambda n: FrozenBatchNorm2d(n) if n == 32 else nn.BatchNorm2d(n)
    ),
}
MAIN = ("basic", "basic_zero_pad", "bottleneck_projection")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.track_running_stats:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return randomize(block)


def plain(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """The block's layers called one by one, without code of the library."""

    def forward(x: Tensor) -> Tensor:
        z = F.relu(block.bn1(x))
        out = block.conv2(F.relu(block.bn2(block.conv1(z))))
        if hasattr(block, "conv3"):
            out = block.conv3(F.relu(block.bn3(out)))
        return out + (x if block.downsample is None else block.downsample(z))

    return forward


def x_for(block: nn.Module, seed: int, layout: torch.memory_format) -> Tensor:
    channels = block.conv1.in_channels
    return images(4, channels, 6, 5, seed=seed, dtype=torch.float64).contiguous(
        memory_format=layout
    )


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """The implementations that were chosen."""
    chosen: list[ModuleType] = []
    original = preactivation_function._implementation

    def choose(x: Tensor) -> ModuleType:
        chosen.append(original(x))
        return chosen[-1]

    monkeypatch.setattr(preactivation_function, "_implementation", choose)
    return chosen


# Backend asked for, memory format of x.
IN_FLOAT64 = {
    preactivation_plain: (None, torch.channels_last),
    preactivation_operators: ("reference", torch.contiguous_format),
}
each_implementation = pytest.mark.parametrize(
    "implementation", IN_FLOAT64, ids=lambda m: m.__name__.rpartition("_")[2]
)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-10, atol=1e-10, msg=key)


@needs_extension
@each_implementation
@pytest.mark.parametrize("name", BLOCKS)
def test_float64(implementation: ModuleType, name: str, used: list[ModuleType]) -> None:
    """Outputs, gradients, running statistics and counts of batches after two steps."""
    backend, layout = IN_FLOAT64[implementation]
    block, eager = make(name).double(), make(name).double()
    for seed in range(2):
        x = x_for(block, seed, layout).requires_grad_()
        with context(backend):
            actual = train(block, block, x)
        assert_equal(actual, train(eager, plain(eager), x))
    assert used == [implementation] * 2


NEEDS: dict[str, Callable[[str], bool]] = {
    "x": lambda _: False,
    "no_x": lambda _: True,
    "first_conv": lambda name: name == "conv1.weight",
    "last_conv": lambda name: name == "conv2.weight",
    "first_norm": lambda name: name == "bn1.weight",
    "last_norm": lambda name: name == "bn2.bias",
    "behind_first_norm": lambda name: not name.startswith("bn1"),
    "projection": lambda name: name == "downsample.weight",
}


@needs_extension
@pytest.mark.parametrize(
    ("name", "needs"),
    [
        *(("basic_projection", needs) for needs in NEEDS),
        *(("basic_zero_pad", needs) for needs in NEEDS if needs != "projection"),
        ("bottleneck_projection", "behind_first_norm"),  # conv1 is 1x1
    ],
)
@each_implementation
def test_what_needs_a_gradient(
    implementation: ModuleType, name: str, needs: str, used: list[ModuleType]
) -> None:
    backend, layout = IN_FLOAT64[implementation]
    block, eager = make(name).double(), make(name).double()
    for each in (block, eager):
        for key, parameter in each.named_parameters():
            parameter.requires_grad_(NEEDS[needs](key))
    x = x_for(block, 0, layout).requires_grad_(needs == "x")
    with context(backend):
        actual = train(block, block, x)
    assert_equal(actual, train(eager, plain(eager), x))
    assert used == [implementation]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("name", MAIN)
@needs_extension
def test_accuracy(name: str, dtype: torch.dtype, used: list[ModuleType]) -> None:
    assert_as_accurate_as_eager(None, name, dtype)
    assert set(used) == {preactivation_plain}


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("backend", on_backends("conv_stats", interpreter=False))
def test_accuracy_of_operators(backend: str, name: str, used: list[ModuleType]) -> None:
    assert_as_accurate_as_eager(backend, name, torch.float32)
    assert set(used) == {preactivation_operators}


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted_backend.ENABLED, reason=interpreted_backend.REASON)
def test_accuracy_of_interpreted_operators(used: list[ModuleType]) -> None:
    """The one block that has everything: 1x1 and 3x3 convolutions, a stride, a projection."""
    assert_as_accurate_as_eager(interpreted_backend.NAME, "bottleneck_projection", torch.float32)
    assert set(used) == {preactivation_operators}


def assert_as_accurate_as_eager(backend: str | None, name: str, dtype: torch.dtype) -> None:
    """Distances from float64, in the 2-norm over three inputs: twice eager's and a rounding."""
    device = device_of(backend or "cpu")
    block, eager = (make(name).to(device, dtype) for _ in range(2))
    exact = make(name).to(dtype).double().to(device)
    collected: dict[str, list[list[Tensor]]] = {}
    for seed in range(3):
        x = x_for(block, seed, torch.channels_last).to(device, dtype).requires_grad_()
        with context(backend):
            actual = train(block, block, x)
        others = train(eager, plain(eager), x), train(exact, plain(exact), x.double())
        assert actual.keys() == others[0].keys() == others[1].keys()
        for key, true in others[1].items():
            assert actual[key].dtype == others[0][key].dtype, key
            differences = [each[key].double() - true.double() for each in (actual, others[0])]
            collected.setdefault(key, []).append([*differences, true.double()])
    for key, triples in collected.items():
        error, eager_error, size = (
            float(torch.cat([t.flatten() for t in each]).norm())
            for each in zip(*triples, strict=True)
        )
        rounding = torch.finfo(dtype).eps * size
        assert error <= 2 * eager_error + rounding, f"{key}: {error=:.2e} {eager_error=:.2e}"


@needs_extension
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_block_keeps_its_input_and_what_its_convolutions_but_the_last_gave(
    backend: str | None,
) -> None:
    """Of float32; the statistics are the mean and 1 / standard deviation of what is normalised."""
    x = images(2, 64, 14, 14).contiguous(memory_format=torch.channels_last).requires_grad_()
    image = 4 * 2 * 14 * 14
    blocks = {
        PreActBottleneck(64, 16): image * (16 + 16) + 4 * 2 * (64 + 16 + 16),
        PreActBottleneck(64, 24, 1, conv1x1(64, 96)): image * 48 + 4 * 2 * (64 + 24 + 24),
        PreActBottleneck(64, 24, 1, ZeroPadShortcut(32, 1)): image * 48 + 4 * 2 * (64 + 24 + 24),
        PreActBasicBlock(64, 64): image * 64 + 4 * 2 * (64 + 64),
    }
    with context(backend):
        for block, expected in blocks.items():
            assert saved_bytes(block.train(), x) == expected


@needs_extension
def test_a_network_keeps_half_of_eagers_bytes() -> None:
    model = models.preact_resnet20().to(memory_format=torch.channels_last).train()
    x = images(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    ours, eagers = saved_bytes(model, x), saved_bytes(eager_twin(model), x)
    assert ours <= 0.505 * eagers, f"{ours / eagers:.3f} of {eagers / 1e6:.1f} MB"


@pytest.mark.parametrize("changed", ["conv2.weight", "bn1.weight", "x"])
def test_changes_between_forward_and_backward_are_refused(changed: str) -> None:
    block = PreActBottleneck(64, 16).train()
    given = images(2, 64, 6, 6).requires_grad_() * 1
    loss = block(given).sum()
    with torch.no_grad():
        (given if changed == "x" else block.get_parameter(changed)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", ["basic", "bottleneck_projection", "from_the_first_relu"])
def test_gradients_share_no_memory(name: str, backend: str | None) -> None:
    block = make(name)
    x = x_for(block, 0, torch.channels_last).float().requires_grad_()
    with context(backend):
        out = block(x)
        grad_out = images(*out.shape, seed=3)
        grads = torch.autograd.grad(out, [x, *block.parameters()], grad_out)
    addresses = {t.untyped_storage().data_ptr() for t in (*grads, grad_out)}
    assert len(addresses) == len(grads) + 1
    assert torch.equal(grad_out, images(*out.shape, seed=3))


@pytest.mark.parametrize("name", [*MAIN, "bottleneck", "frozen_first", "no_affine"])
def test_second_derivatives(name: str) -> None:
    values = []
    for fused in (True, False):
        block = make(name).double()
        x = x_for(block, 0, torch.contiguous_format).requires_grad_()
        leaves = [x, *block.parameters()]
        out = (block if fused else plain(block))(x)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        values.append([*grads, *torch.autograd.grad(penalty, leaves, allow_unused=True)])
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shortcut", [None, conv1x1(2, 4, 2), ZeroPadShortcut(2, 2)])
def test_gradcheck(shortcut: nn.Module | None) -> None:
    stride = 1 if shortcut is None else 2
    planes = 2 if shortcut is None else 4
    torch.manual_seed(1)
    block = randomize(PreActBasicBlock(2, planes, stride, copy.deepcopy(shortcut))).double()
    names = [name for name, _ in block.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        for name, parameter in zip(names, parameters, strict=True):
            owner, _, leaf = name.rpartition(".")
            module = block.get_submodule(owner)
            del module._parameters[leaf]
            module._parameters[leaf] = parameter
        return block(x)

    leaves = [p.detach().clone().requires_grad_() for p in block.parameters()]
    x = images(2, 2, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    block, eager = make("bottleneck_projection").double(), make("bottleneck_projection").double()
    x = x_for(block, 0, torch.channels_last).requires_grad_()
    actual, expected = (
        train(each, lambda x, run=run: checkpoint(run, x, use_reentrant=reentrant), x)
        for each, run in ((block, block), (eager, plain(eager)))
    )
    assert_equal(actual, expected)


@needs_extension
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("name", MAIN)
def test_autocast(name: str, of_x: torch.dtype, used: list[ModuleType]) -> None:
    """X in float32 is normalised as it is, so that then the block is no single node."""
    block, eager, exact = make(name), make(name), make(name).double()
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(3):
        x = x_for(block, seed, torch.channels_last).to(of_x).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual, others = (
                train(each, run, x)
                for each, run in ((block, block), (eager, eager._forward_unfused))
            )
        true = train(exact, plain(exact), x.double())
        for key, tensor in true.items():
            assert actual[key].dtype == others[key].dtype, key
            pair = [float((t[key].double() - tensor).norm()) for t in (actual, others)]
            errors.setdefault(key, []).append((*pair, float(tensor.double().norm())))
    for key, of_inputs in errors.items():
        error, eager_error, size = (sum(each) for each in zip(*of_inputs, strict=True))
        rounding = torch.finfo(torch.bfloat16).eps * size
        assert error <= 2 * eager_error + rounding, f"{key}: {error=:.2e} {eager_error=:.2e}"
    assert len(used) == (3 if of_x == torch.bfloat16 else 0)


@needs_extension
@pytest.mark.parametrize(
    ("name", "training"), [("basic_zero_pad", True), ("bottleneck_projection", False)]
)
def test_compile(name: str, training: bool) -> None:
    block, eager = (make(name).double().train(training) for _ in range(2))
    x = x_for(block, 0, torch.channels_last).requires_grad_()
    with no_recompilation():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (4, 3):
            part = x[:batch].detach().requires_grad_()
            assert_equal(train(block, compiled, part), train(eager, plain(eager), part))


@needs_extension
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*MAIN, "biased_projection", "no_statistics", "frozen_type"])
def test_without_gradients(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in training mode, where running statistics move."""
    block, eager = (make(name).double().train(training) for _ in range(2))
    expected = plain(eager)

    def unfused(_: Tensor) -> Tensor:
        raise AssertionError("it ran module by module")

    monkeypatch.setattr(block, "_forward_unfused", unfused)
    for seed in range(3):
        x = x_for(block, seed, torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(block(x), expected(x), rtol=1e-10, atol=1e-10)
    for buffer, other in zip(block.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-10, atol=1e-10)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_accuracy_of_inference(dtype: torch.dtype) -> None:
    for name in MAIN:
        block = make(name).eval().to(dtype)
        exact = copy.deepcopy(block).double()
        errors = []
        with torch.no_grad():
            for seed in range(4):
                x = x_for(block, seed, torch.channels_last).to(dtype)
                true = plain(exact)(x.double())
                pair = [(run(x).double() - true).norm() for run in (block, plain(block))]
                errors.append([*pair, true.norm()])
        error, eager_error, size = torch.tensor(errors).sum(0)
        assert error <= 2 * eager_error + torch.finfo(dtype).eps * size, name


@needs_extension
@pytest.mark.parametrize("hooked", ["conv1", "bn2", "relu", "downsample"])
def test_layers_with_hooks_are_called(hooked: str, used: list[ModuleType]) -> None:
    block, eager = (make("bottleneck_projection").double() for _ in range(2))
    seen: list[Tensor] = []
    block.get_submodule(hooked).register_forward_hook(lambda *args: seen.append(args[2]))
    x = x_for(block, 0, torch.channels_last).requires_grad_()
    assert_equal(train(block, block, x), train(eager, plain(eager), x))
    assert seen
    with torch.no_grad():
        count = len(seen)
        block.eval()(x)
    assert len(seen) == 2 * count
    # A shortcut that is called stands outside of the node.
    assert len(used) == (hooked == "downsample")


def test_other_layers_are_called() -> None:
    block = make("basic").double()
    block.relu = nn.Softplus()
    x = x_for(block, 0, torch.channels_last)
    z = F.softplus(block.bn1(x))
    expected = block.conv2(F.softplus(block.bn2(block.conv1(z)))) + x
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    group_norm = PreActBasicBlock(8, 8, norm_layer=lambda n: nn.GroupNorm(2, n)).double()
    x = images(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(group_norm(x), plain(group_norm)(x), rtol=1e-10, atol=1e-10)
    biased = make("basic").double()
    biased.conv2.bias = nn.Parameter(images(16, dtype=torch.float64))
    x = x_for(biased, 0, torch.channels_last)
    torch.testing.assert_close(biased(x), plain(biased)(x), rtol=1e-10, atol=1e-10)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="PreActBasicBlock: groups and base_width must be 1 and"):
        PreActBasicBlock(8, 8, groups=2)
    with pytest.raises(ValueError, match="PreActBasicBlock: dilation must be 1, got 2"):
        PreActBasicBlock(8, 8, dilation=2)
    with pytest.raises(ValueError, match="PreActCifarResNet: shortcut must be 'A' or 'B', got 'C'"):
        models.preact_resnet20(shortcut="C")
    for block in (PreActBasicBlock(8, 8), PreActBottleneck(8, 2)):
        with pytest.raises(ValueError, match="xpected more than 1 value per channel"):
            block.train()(torch.ones(1, 8, 1, 1))


# Layers and millions of parameters: but for batch norms those of the networks of 2015.
NETWORKS = {
    "preact_resnet20": (20, 0.27),
    "preact_resnet56": (56, 0.85),
    "preact_resnet110": (110, 1.73),
    "preact_resnet164": (164, 1.70),
}


@pytest.mark.parametrize(
    ("name", "shortcut"), [*((name, "A") for name in NETWORKS), ("preact_resnet20", "B")]
)
def test_sizes_are_those_of_the_paper(name: str, shortcut: str) -> None:
    layers, million_parameters = NETWORKS[name]
    with torch.device("meta"):
        model = getattr(models, name)(shortcut=shortcut)
    body = [m for n, m in model.named_modules() if "downsample" not in n]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in body) == layers
    count = sum(p.numel() for n, p in model.named_parameters() if "downsample" not in n)
    assert count / 1e6 == pytest.approx(million_parameters, rel=0.03)
    assert any("downsample" in key for key in model.state_dict()) == (shortcut == "B")


class PlainNetwork(nn.Module):
    """The layers of a network called one by one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        out = network.conv1(x)
        for block in (*network.layer1, *network.layer2, *network.layer3):
            out = plain(block)(out)
        return network.fc(F.relu(network.bn(out)).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_deep_network_computes_what_its_layers_compute(shortcut: str, training: bool) -> None:
    options = {"num_classes": 5, "in_channels": 1, "shortcut": shortcut}
    if training:
        network = models.PreActCifarResNet(PreActBottleneck, 3, **options)
    else:
        network = models.preact_resnet20(**options)

    def fused(eager: nn.Module) -> nn.Module:
        wrapped = nn.Module()
        wrapped.network = eager.network
        wrapped.forward = eager.network.forward
        return wrapped

    x = images(4, 1, 9, 11)
    assert_same_function(PlainNetwork(randomize(network)), fused, x, training)


@needs_extension
@pytest.mark.parametrize("training", [True, False])
def test_no_batch_norm_of_a_network_is_called(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> Tensor:
        raise AssertionError("a batch norm was called")

    monkeypatch.setattr(nn.BatchNorm2d, "forward", forward)
    model = models.preact_resnet20(shortcut="B").train(training)
    out = model(images(2, 3, 8, 8))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(images(2, 3, 8, 8)), out.detach(), rtol=1e-4, atol=1e-4)


def test_the_first_shortcut_starts_behind_the_first_relu() -> None:
    model = models.preact_resnet20()
    nn.init.zeros_(model.layer1[0].conv2.weight)
    x = images(2, 16, 4, 4)
    out = model.layer1[0].eval()(x)
    assert distance(out.detach(), F.relu(model.layer1[0].bn1(x)).detach()) < 1e-6
    nn.init.zeros_(model.layer1[1].conv2.weight)
    assert torch.equal(model.layer1[1](x), x)


def test_explain() -> None:
    model = models.PreActCifarResNet(PreActBottleneck, 1, shortcut="B")
    model.layer2[0].conv1.register_forward_hook(lambda *_: None)
    rows = rf.explain(model, torch.empty(1, 3, 8, 8)).rows
    assert [row.state for row in rows] == ["fused", "can be fused in part", "fused"]
    # Of the width of ResNet-50's first stage, where a Bottleneck of 2015 would have a chain.
    assert [row.chain for row in rf.explain(PreActBottleneck(256, 64)).rows] == [""]
    # In channels at 8x8, first block: convolutions 16 -> 16 -> 16 -> 64 and 16 -> 64.
    convs_and_add = (16 + 16) + (16 + 16) + (16 + 64) + (16 + 64) + 3 * 64
    bytes_of_channel = 4 * 8 * 8
    assert rows[0].bytes_before == bytes_of_channel * (convs_and_add + 4 * 3 * 16)
    assert rows[0].bytes_after == bytes_of_channel * (convs_and_add + 2 * 16)
    assert rf.fuse(models.preact_resnet20()).layer1[0].__class__ is PreActBasicBlock
