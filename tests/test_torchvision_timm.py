"""Conversion of the real models of torchvision and timm."""

import copy
import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from model_equality import assert_same_function, images, randomize
from torch import nn

from resnet_fused import models
from resnet_fused._torchvision import import_torchvision
from resnet_fused.conversion import explain, fuse, unfuse
from resnet_fused.conversion.swap import Fused

X = images(2, 3, 64, 64)


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


def states(model: nn.Module) -> dict[str, int]:
    """How many rows `explain` has of each state."""
    rows = explain(model).rows
    names = {row.state for row in rows}
    return {name: sum(row.state == name for row in rows) for name in names}


def assert_round_trip(model: nn.Module) -> None:
    fused = fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    back = unfuse(fused)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        model.eval()
        back.eval()
        expected, actual = model(X), back(X)
    expected = expected if isinstance(expected, dict) else {"out": expected}
    actual = actual if isinstance(actual, dict) else {"out": actual}
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", 8),
        ("resnet34", 16),
        ("resnet50", 16),
        ("resnet101", 33),
        ("resnet152", 50),
        ("resnext50_32x4d", 16),
        ("resnext101_32x8d", 33),
        ("resnext101_64x4d", 33),
        ("wide_resnet50_2", 16),
        ("wide_resnet101_2", 33),
    ],
)
def test_torchvision_fuses_completely(name: str, blocks: int, torchvision: ModuleType) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    fused = fuse(model, inplace=True)
    assert states(fused) == {"fused": blocks + 1}  # and the stem
    assert sum(isinstance(m, Fused) for m in fused.modules()) == blocks + 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision_computes_the_same(name: str, training: bool, torchvision: ModuleType) -> None:
    model = randomize(getattr(torchvision.models, name)(num_classes=10))
    assert_same_function(model, fuse, X, training)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_round_trip(name: str, torchvision: ModuleType) -> None:
    assert_round_trip(randomize(getattr(torchvision.models, name)(num_classes=10)))


def test_torchvision_stem_with_hooks_keeps_its_forward(torchvision: ModuleType) -> None:
    model = torchvision.models.resnet18(num_classes=4).eval()
    called = []
    model.relu.register_forward_hook(lambda *_: called.append(1))
    fused = fuse(model)
    assert not isinstance(fused, models.ResNet)
    rows = {row.path: row for row in explain(fused).rows}
    assert "relu has a forward hook" in rows[""].reason
    assert rows["layer1.0"].fused
    with torch.no_grad():
        torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-4)
    assert called == [1, 1]


def test_torchvision_stem_hooked_later(torchvision: ModuleType) -> None:
    fused = fuse(torchvision.models.resnet18(num_classes=4).eval())
    called = []
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "fc"):
        fused.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        torch.testing.assert_close(fused(X), unfuse(fused)(X), rtol=1e-4, atol=1e-4)
    assert called == ["conv1", "bn1", "relu", "maxpool", "layer1", "fc"] * 2


def test_own_forward_in_a_subclass(torchvision: ModuleType) -> None:
    class Features(torchvision.models.ResNet):
        def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            return self.layer2(self.layer1(x))

    model = randomize(Features(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))
    fused = fuse(model)
    assert states(fused) == {"fused": 4, "fused in part": 1}
    assert "expected fc, found layer2" in explain(fused).rows[0].reason
    assert_same_function(model, fuse, X, training=False)


def test_inherited_forward_in_a_subclass(torchvision: ModuleType) -> None:
    class Mine(torchvision.models.ResNet):
        pass

    fused = fuse(Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))
    assert states(fused) == {"fused": 5}
    assert isinstance(fused, Mine)
    assert isinstance(fused, models.ResNet)


@pytest.mark.parametrize("training", [False, True])
def test_segmentation_backbone(training: bool, torchvision: ModuleType) -> None:
    model = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=3
    )
    model.classifier[3] = nn.Identity()  # dropout
    randomize(model)
    assert states(fuse(model)) == {"fused": 17}  # and the classifier
    dilations = {m.dilation for m in model.backbone.modules() if isinstance(m, nn.Conv2d)}
    assert dilations == {(1, 1), (2, 2), (4, 4)}
    assert_same_function(model, fuse, images(2, 3, 32, 32), training)


def test_detection_backbone_with_frozen_norms(torchvision: ModuleType) -> None:
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2
    )
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=3
    )
    model.backbone = randomize(backbone)
    fused = fuse(model)
    assert states(fused) == {"fused": 16}
    assert "FrozenBatchNorm2d" in repr(fused.backbone.body)
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in fused.parameters()] == flags
    assert_same_function(model.backbone, fuse, X, training=True)


def test_feature_extractor_is_left_alone(torchvision: ModuleType) -> None:
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    original = randomize(torchvision.models.resnet18()).eval()
    model = extraction.create_feature_extractor(original, ["layer1.0.add"])
    assert states(model) == {"left alone": 1}
    assert "a torch.fx graph calls its layers" in explain(model).rows[0].reason
    fused = extraction.create_feature_extractor(fuse(original), ["layer1.0.add"])
    with torch.no_grad():
        assert torch.equal(fused(X)["layer1.0.add"], model(X)["layer1.0.add"])


def test_intermediate_layers_of_a_fused_model(torchvision: ModuleType) -> None:
    model = randomize(torchvision.models.resnet18(num_classes=2)).eval()
    getter = torchvision.models._utils.IntermediateLayerGetter(fuse(model), {"layer2": "out"})
    plain = torchvision.models._utils.IntermediateLayerGetter(model, {"layer2": "out"})
    with torch.no_grad():
        torch.testing.assert_close(getter(X)["out"], plain(X)["out"], rtol=1e-4, atol=1e-4)


def test_quantizable_models_are_left_alone(torchvision: ModuleType) -> None:
    model = torchvision.models.quantization.resnet18()
    assert states(model) == {"left alone": 9}
    with pytest.warns(UserWarning, match="none of its 9 blocks in QuantizableResNet"):
        fuse(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vgg11_bn", "shufflenet_v2_x0_5"])
def test_other_architectures(name: str, training: bool, torchvision: ModuleType) -> None:
    model = randomize(getattr(torchvision.models, name)(num_classes=4))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert "fused" in states(fuse(model))
    assert_same_function(model, fuse, X, training)


def test_sync_batch_norm(torchvision: ModuleType) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(torchvision.models.resnet18(num_classes=2))
    assert states(fuse(model)) == {"fused": 9}
    fused = fuse(torchvision.models.resnet18(num_classes=2)).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    assert states(synced) == {"fused": 9}
    with torch.no_grad():
        torch.testing.assert_close(synced(X), fused(X), rtol=1e-4, atol=1e-4)


def test_bytes_per_image_are_those_of_the_design(torchvision: ModuleType) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    explanation = explain(model, torch.empty(1, 3, 224, 224, dtype=torch.float16))
    before = sum(row.bytes_before for row in explanation.rows)
    after = sum(row.bytes_after for row in explanation.rows)
    assert 155e6 < before < 165e6
    assert 52e6 < after < 57e6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The blocks, and the stem.
        ("resnet18", {"fused": 9}),
        ("resnet26", {"fused": 9}),
        ("resnet50", {"fused": 17}),
        ("resnet50d", {"fused": 20}),  # and three shortcuts of average pool, convolution, BN
        ("resnext50_32x4d", {"fused": 17}),
        ("wide_resnet50_2", {"fused": 17}),
        ("resnetaa50", {"fused": 17, "fused in part": 3}),
        ("seresnet50", {"fused": 5, "fused in part": 16}),
        ("ecaresnet50d", {"fused": 5, "fused in part": 16}),
        ("skresnet18", {"fused": 36}),
        ("resnetv2_50", {"fused": 17}),
    ],
)
def test_timm_families(name: str, expected: dict[str, int], timm: ModuleType) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert states(fuse(model)) == expected


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("seresnet18", {}, "expected a batch norm, found se (SEModule)"),
        ("resnetaa50", {}, "expected the ReLU before conv3, found aa (AvgPool2d)"),
        ("resnet18", {"drop_path_rate": 0.2}, "expected a batch norm, found drop_path (DropPath)"),
        ("resnet26", {"drop_block_rate": 0.2}, "found drop_block (DropBlock2d)"),
        ("resnet18", {"act_layer": nn.SiLU}, "expected the last ReLU, found act2 (SiLU)"),
        ("resnet18", {"norm_layer": "groupnorm"}, "expected a batch norm, found bn2 (GroupNorm"),
    ],
)
def test_timm_reasons(name: str, options: dict[str, object], text: str, timm: ModuleType) -> None:
    model = timm.create_model(name, **options)
    rows = explain(model).rows
    assert any(text in row.reason for row in rows)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet26", "resnet50d", "seresnet18", "resnetaa50d", "skresnet18"),
        *("ecaresnet26t", "resnetv2_50", "resnetv2_18d"),
    ],
)
def test_timm_computes_the_same(name: str, training: bool, timm: ModuleType) -> None:
    model = randomize(timm.create_model(name, num_classes=7))
    assert_same_function(model, fuse, X, training)


def test_timm_partly_fused_computes_the_same(timm: ModuleType) -> None:
    model = randomize(timm.create_model("resnet18", num_classes=7, drop_path_rate=0.5))
    assert states(fuse(model)) == {"fused": 5, "fused in part": 7}
    assert_same_function(model, fuse, X, training=False)


def test_timm_round_trip(timm: ModuleType) -> None:
    assert_round_trip(randomize(timm.create_model("resnet50", num_classes=7)))


def _hook(_: nn.Module, inputs: object, out: torch.Tensor) -> torch.Tensor:
    return out - 1.0


@pytest.mark.parametrize("kind", ["groups", "pooled", "block"])
@pytest.mark.parametrize(
    "change",
    [
        lambda norm: setattr(norm, "act", nn.SiLU()),
        lambda norm: setattr(norm, "act", nn.Identity()),
        lambda norm: norm.register_forward_hook(_hook),
        lambda norm: norm.act.register_forward_hook(_hook),
    ],
    ids=["other_activation", "no_activation", "hook", "hook_on_activation"],
)
def test_an_activation_in_a_norm_changes_later(
    kind: str, change: Callable[[nn.Module], object], timm: ModuleType
) -> None:
    norm, conv = timm.layers.BatchNormAct2d, timm.layers.create_conv2d
    if kind == "block":
        resnetv2 = importlib.import_module("timm.models.resnetv2")
        model = resnetv2.PreActBottleneck(8, 8, conv_layer=conv, norm_layer=norm)
    else:
        pool = [nn.MaxPool2d(2)] if kind == "pooled" else []
        model = nn.Sequential(nn.Conv2d(8, 8, 3), norm(8), *pool)
    model = randomize(model).eval()
    fused = fuse(model)
    assert explain(fused).rows[0].state == "fused"
    x = images(2, 8, 7, 6)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    for each in (fused, twin := copy.deepcopy(model)):
        change(next(m for m in each.modules() if isinstance(m, norm)))
    torch.testing.assert_close(fused(x), twin(x), rtol=1e-4, atol=1e-5)
