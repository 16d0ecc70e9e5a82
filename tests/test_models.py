"""Models: torchvision's checkpoints and arguments, and the CIFAR networks of the paper."""

import copy
from collections.abc import Callable

import pytest
import torch
from model_equality import assert_same_function, distance, images, randomize, step
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused import models
from resnet_fused._torchvision import import_torchvision
from resnet_fused.models.stages import run_stages
from resnet_fused.nn import FrozenBatchNorm2d

NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
CIFAR = {
    "resnet20": (20, 0.27),
    "resnet32": (32, 0.46),
    "resnet44": (44, 0.66),
    "resnet56": (56, 0.85),
    "resnet110": (110, 1.7),
}


@pytest.fixture(scope="module")
def torchvision() -> object:
    module = import_torchvision()
    if module is None:
        pytest.skip("torchvision is not installed")
    return module


def plain(model: nn.Module) -> nn.Module:
    """The same layers called one by one: an oracle that shares no code with fused operators."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, resnet_fused.nn.BasicBlock | resnet_fused.nn.Bottleneck):
            module.__class__ = _Plain
        elif isinstance(module, models.ResNet | models.CifarResNet):
            module.__class__ = _PlainNetwork
    return model


class _Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class _PlainNetwork(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_that_of_torchvision(name: str, torchvision: object) -> None:
    with torch.device("meta"):
        ours = getattr(models, name)().state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)
    assert all(ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_computes_what_torchvision_computes(name: str, training: bool, torchvision: object) -> None:
    options = {"num_classes": 10}
    theirs = randomize(getattr(torchvision.models, name)(**options))

    def ours(eager: nn.Module) -> nn.Module:
        model = getattr(models, name)(**options).to(next(eager.parameters()).dtype)
        model.load_state_dict(eager.state_dict(), strict=True)
        return model

    assert_same_function(theirs, ours, images(2, 3, 64, 64), training)


def test_torchvision_loads_our_checkpoint(torchvision: object) -> None:
    ours = randomize(models.resnet18(num_classes=3)).eval()
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_dilated_and_frozen_as_in_torchvision(torchvision: object) -> None:
    options = {"replace_stride_with_dilation": [False, True, True], "num_classes": 3}
    theirs = randomize(
        torchvision.models.resnet50(norm_layer=torchvision.ops.misc.FrozenBatchNorm2d, **options)
    )

    def ours(eager: nn.Module) -> nn.Module:
        model = models.resnet50(norm_layer=FrozenBatchNorm2d, **options)
        model.load_state_dict(eager.state_dict(), strict=True)
        return model.to(next(eager.parameters()).dtype)

    assert_same_function(theirs, ours, images(1, 3, 64, 64), training=True)


def test_starting_weights_of_the_last_norms() -> None:
    model = models.resnet18(zero_init_residual=True)
    assert not model.layer1[0].bn2.weight.any()
    assert model.layer1[0].bn1.weight.eq(1).all()
    assert not models.resnet50(zero_init_residual=True).layer4[2].bn3.weight.any()
    assert models.resnet18().layer1[0].bn2.weight.all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="replace_stride_with_dilation must be None or have 3"):
        models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="layers must have 4 elements, one per stage"):
        models.ResNet(resnet_fused.nn.BasicBlock, (2, 2))
    with pytest.raises(ValueError, match="shortcut must be 'A' or 'B', got 'C'"):
        models.resnet20(shortcut="C")


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_cifar_sizes_are_those_of_the_paper(name: str, shortcut: str) -> None:
    layers, million_parameters = CIFAR[name]
    with torch.device("meta"):
        model = getattr(models, name)(shortcut=shortcut)
    body = [m for n, m in model.named_modules() if "downsample" not in n]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in body) == layers
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(million_parameters, rel=0.03)
    assert any("downsample" in key for key in model.state_dict()) == (shortcut == "B")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_cifar_computes_what_its_layers_compute(shortcut: str, training: bool) -> None:
    model = randomize(models.resnet20(shortcut=shortcut, in_channels=1, num_classes=5))
    assert_same_function(plain(model), lambda m: _restore(m, model), images(4, 1, 9, 11), training)


def _restore(eager: nn.Module, like: nn.Module) -> nn.Module:
    """A model of the class of `like` with the state of `eager`."""
    model = copy.deepcopy(like).to(next(eager.parameters()).dtype)
    model.load_state_dict(eager.state_dict(), strict=True)
    return model


def test_zero_padding_shortcut() -> None:
    x = images(2, 3, 5, 4)
    out = models.ZeroPadShortcut(extra_channels=2, stride=2)(x)
    assert out.shape == (2, 5, 3, 2)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert not out[:, 3:].any()


@pytest.mark.parametrize("make", [models.resnet18, models.resnet20])
def test_memory_formats(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    seen = []
    model.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    wide = images(2, 3, 32, 80)
    layouts = {
        "nchw": wide[..., :32].contiguous(),
        "channels_last": wide[..., :32].contiguous(memory_format=torch.channels_last),
        "sliced": wide[..., :32],
    }
    with torch.no_grad():
        outs = {name: model(x) for name, x in layouts.items()}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    for out in outs.values():
        torch.testing.assert_close(out, outs["nchw"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names", [("conv1",), ("bn1",), ("relu",), ("layer1.0.relu",), ("layer1.0.conv1", "layer1")]
)
def test_layers_with_hooks_are_called(names: tuple[str, ...]) -> None:
    model = models.resnet20().eval()
    called = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    for training in (True, False):
        called.clear()
        model.train(training)(images(2, 3, 16, 16))
        assert set(called) == set(names)
    with torch.no_grad():
        for _ in range(2):
            called.clear()
            model(images(2, 3, 16, 16))
            assert set(called) == set(names)


def test_other_activations_in_our_blocks_are_called() -> None:
    block = resnet_fused.nn.BasicBlock(4, 4)
    block.relu = nn.Softplus()
    assert block(images(2, 4, 5, 5)).gt(0).all()


def test_stages_in_one_call() -> None:
    network = randomize(models.resnet20(shortcut="B")).eval()
    stages = (network.layer1, network.layer2)
    x = images(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        expected = [x]
        for block in (*network.layer1, *network.layer2):
            expected.append(plain(block)(expected[-1]))
        for _ in range(3):  # what is derived from the weights is used from the second call on
            out = run_stages(x, stages)
            torch.testing.assert_close(out, expected[-1], rtol=1e-4, atol=1e-4)
        assert torch.equal(x, before)
        for listened in (network.layer1, network.layer1[1], network.layer2[0].conv2):
            seen = []
            handle = listened.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            out = run_stages(x, stages)
            handle.remove()
            assert seen == [1]
            torch.testing.assert_close(out, expected[-1], rtol=1e-4, atol=1e-4)
        network.layer2[1].forward = lambda x: x + 1.0
        out = run_stages(x, (nn.Sequential(*network.layer2[:2]),))
        torch.testing.assert_close(out, plain(network.layer2[0])(x) + 1.0, rtol=1e-4, atol=1e-4)


def test_forward_of_a_subclass_of_our_block_is_called() -> None:
    class Doubled(resnet_fused.nn.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    stage = nn.Sequential(*(Doubled(16, 16) for _ in range(2))).eval()
    x = images(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = 2.0 * plain(stage[1])(2.0 * plain(stage[0])(x))
        for _ in range(3):
            torch.testing.assert_close(run_stages(x, (stage,)), expected, rtol=1e-4, atol=1e-4)


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    model = models.resnet20(in_channels=1, num_classes=2).train()
    x, labels = images(16, 1, 8, 8), torch.arange(16) % 2
    x[labels == 1] += 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert model.bn1.num_batches_tracked == 8


def test_follows_the_mode_of_each_norm() -> None:
    model = randomize(models.resnet20().double()).train()
    model.layer1[0].bn1.eval()
    frozen = model.layer1[0].bn1.running_mean.clone()
    x = images(4, 3, 8, 8, dtype=torch.float64)
    expected = plain(model)(x)
    assert distance(model(x).detach(), expected.detach()) < 1e-9
    assert torch.equal(model.layer1[0].bn1.running_mean, frozen)


def test_evaluation_follows_training_and_loading() -> None:
    model = randomize(models.resnet20())
    x = images(4, 3, 8, 8)
    other = randomize(models.resnet20(), seed=5).state_dict()
    for change in (
        lambda: step(model, x, training=True),
        lambda: model.load_state_dict(other),
        lambda: model.layer1[0].conv1.weight.data.mul_(2.0),
    ):
        with torch.no_grad():
            for _ in range(3):
                model.eval()(x)
            change_result = torch.enable_grad()
            with change_result:
                change()
            torch.testing.assert_close(
                model.eval()(x), plain(model).eval()(x), rtol=1e-4, atol=1e-4
            )
