"""The models that coverage.py runs: how each is built, on what input, and how it is called."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from hand_written_blocks import PROVABLE, UNPROVABLE
from hand_written_networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused._torchvision import import_torchvision

Call = Callable[[nn.Module, Tensor], Any]


class Case(NamedTuple):
    """A model. build: makes it with random weights. shape: of its input. call: runs it."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 48, 48)
    call: Call = nn.Module.__call__

    @property
    def label(self) -> str:
        return f"{self.family}: {self.name}"


def cases() -> list[Case]:
    """Every model, in the order of the table. Builds nothing and imports none of the libraries."""
    return [*_torchvision(), *_timm(), *_hugging_face(), *_hand_written()]


TORCHVISION = (
    "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d "
    "resnext101_64x4d wide_resnet50_2 wide_resnet101_2"
)
SEGMENTATION = "fcn_resnet50 fcn_resnet101 deeplabv3_resnet50 deeplabv3_resnet101"
DETECTION = (
    "fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 maskrcnn_resnet50_fpn "
    "maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn retinanet_resnet50_fpn "
    "retinanet_resnet50_fpn_v2 fcos_resnet50_fpn"
)
QUANTIZABLE = "resnet18 resnet50 resnext101_32x8d resnext101_64x4d"
VIDEO = "r3d_18 mc3_18 r2plus1d_18"

# Without weights to download, "tv", "gluon", "ssl" and so on are one architecture per name.
TIMM = {
    "resnet": (
        "resnet10t resnet14t resnet18 resnet26 resnet34 resnet50 resnet34.tv_in1k resnet50.tv_in1k "
        "resnet50.gluon_in1k test_resnet"
    ),
    "resnet-c, -d, -s, -t": (
        "resnet18d resnet26d resnet26t resnet34d resnet50c resnet50d resnet50s resnet50t "
        "resnet101s resnet50c.gluon_in1k"
    ),
    "resnext, wide": (
        "resnext50_32x4d resnext50d_32x4d resnext101_32x4d resnext101_64x4d "
        "resnext50_32x4d.tv_in1k wide_resnet50_2 wide_resnet101_2"
    ),
    "seresnet": (
        "seresnet18 seresnet34 seresnet50 seresnet50t seresnet101 seresnext50_32x4d "
        "seresnext26d_32x4d seresnext26t_32x4d seresnext50_32x4d.gluon_in1k legacy_seresnet18 "
        "legacy_seresnet50 legacy_seresnext50_32x4d"
    ),
    "ecaresnet": (
        "ecaresnet26t ecaresnet50d ecaresnet50d_pruned ecaresnet50t ecaresnetlight "
        "ecaresnext26t_32x4d ecaresnext50t_32x4d"
    ),
    "resnetaa, blur": (
        "resnetaa34d resnetaa50 resnetaa50d seresnetaa50d resnetblur18 resnetblur50 resnetblur50d"
    ),
    "skresnet": "skresnet18 skresnet34 skresnet50 skresnet50d skresnext50_32x4d",
    "resnetrs": "resnetrs50 resnetrs101",
    "resnetv2 (BatchNormAct2d)": (
        "resnetv2_18 resnetv2_18d resnetv2_34 resnetv2_34d resnetv2_50 resnetv2_50d resnetv2_50t "
        "resnetv2_101 resnetv2_50d_gn resnetv2_50d_frn resnetv2_50d_evos resnetv2_50x1_bit"
    ),
    "other residual networks": (
        "resnet50_gn resnet51q resnet61q resnet33ts eca_resnet33ts seresnet33ts gcresnet33ts "
        "gcresnet50t gcresnext26ts bat_resnext26ts resnet50_clip resnet50_mlp lambda_resnet26t "
        "nf_resnet50 res2net50_26w_4s res2net50d res2next50 resnest14d resnest50d resnest26d "
        "tresnet_m cspresnet50 cspresnext50 botnet26t_256 halonet26t inception_resnet_v2"
    ),
    "other users of conv, norm and ReLU": (
        "dla34 dla60x hrnet_w18_small hrnet_w18_small_v2 darknet53 vovnet39a ese_vovnet19b_dw "
        "regnetx_008 regnety_008 regnetz_005 densenet121 dpn68 selecsls42 xception41 repvgg_a0 "
        "mobilenetv2_100 inception_v3 vit_small_resnet26d_224"
    ),
}
TIMM_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18, features_only": ("resnet18", {"features_only": True}),
    "resnet50d, output_stride=8": ("resnet50d", {"output_stride": 8}),
    "resnet26, drop_path_rate=0.3": ("resnet26", {"drop_path_rate": 0.3}),
    "resnet26, drop_block_rate=0.3": ("resnet26", {"drop_block_rate": 0.3}),
    "resnet18, drop_rate=0.5": ("resnet18", {"drop_rate": 0.5}),
    "resnet18, in_chans=1": ("resnet18", {"in_chans": 1}),
    "resnet18, SiLU": ("resnet18", {"act_layer": nn.SiLU}),
    "resnet26, no classifier": ("resnet26", {"num_classes": 0, "global_pool": ""}),
}
# Those of strides, blocks or positions that 48 does not fit; and those whose last batch norms would
# see two values per channel, of which gradients are noise, in eager as well.
TIMM_SIZES = {
    "resnetaa34d resnetaa50 resnetaa50d seresnetaa50d dla34 dla60x": 64,
    "hrnet_w18_small hrnet_w18_small_v2 densenet121 vovnet39a ese_vovnet19b_dw dpn68": 64,
    "selecsls42 xception41 repvgg_a0 mobilenetv2_100 regnetz_005 darknet53": 64,
    "inception_resnet_v2 inception_v3 lambda_resnet26t": 128,
    "resnet50_clip vit_small_resnet26d_224": 224,
    "bat_resnext26ts botnet26t_256 halonet26t": 256,
}


def _torchvision() -> Iterator[Case]:
    def family(title: str, names: str, folder: str, call: Call, **options: Any) -> Iterator[Case]:
        for name in names.split():

            def build(name: str = name) -> nn.Module:
                module = _library("torchvision", f"torchvision.models{folder}")
                return getattr(module, name)(weights=None, **options)

            shape = (2, 3, 4, 32, 32) if folder == ".video" else (2, 3, 48, 48)
            yield Case(f"torchvision{title}", name, build, shape, call)

    plain = nn.Module.__call__
    yield from family("", TORCHVISION, "", plain, num_classes=10)
    for name, build in _torchvision_backbones().items():
        yield Case("torchvision as backbone", name, build)
    segmentation = {"weights_backbone": None, "num_classes": 5, "aux_loss": True}
    yield from family(" segmentation", SEGMENTATION, ".segmentation", plain, **segmentation)
    yield from family(
        " detection", DETECTION, ".detection", _detection, weights_backbone=None, num_classes=5
    )
    yield from family(" quantizable", QUANTIZABLE, ".quantization", plain, num_classes=10)
    yield from family(" video", VIDEO, ".video", plain, num_classes=10)


def _torchvision_backbones() -> dict[str, Callable[[], nn.Module]]:
    def models(folder: str = "") -> ModuleType:
        return _library("torchvision", f"torchvision.models{folder}")

    def frozen() -> Any:
        return _library("torchvision", "torchvision.ops").FrozenBatchNorm2d

    def layers(model: nn.Module) -> nn.Module:
        wanted = {f"layer{i}": str(i) for i in (1, 2, 3)}
        return models("._utils").IntermediateLayerGetter(model, wanted)

    def pyramid(name: str) -> nn.Module:
        utils = models(".detection.backbone_utils")
        return utils.resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)

    def features() -> nn.Module:
        extraction = models(".feature_extraction")
        return extraction.create_feature_extractor(models().resnet18(), ["layer2.0.add", "layer4"])

    return {
        "resnet50, dilated": lambda: models().resnet50(
            replace_stride_with_dilation=[False, True, True], num_classes=10
        ),
        "resnet50, FrozenBatchNorm2d": lambda: models().resnet50(
            norm_layer=frozen(), num_classes=10
        ),
        "IntermediateLayerGetter(resnet34)": lambda: layers(models().resnet34()),
        "IntermediateLayerGetter(resnet50)": lambda: layers(models().resnet50()),
        "resnet_fpn_backbone(resnet18)": lambda: pyramid("resnet18"),
        "resnet_fpn_backbone(resnext50_32x4d)": lambda: pyramid("resnext50_32x4d"),
        "create_feature_extractor(resnet18)": features,
    }


def _detection(model: nn.Module, x: Tensor) -> list[Any]:
    """Everything with weights. What stands between the heads has none, and needs torchvision's own
    operators, which are not everywhere (non-maximum suppression).
    """
    features = list(model.backbone(x).values())
    if not hasattr(model, "rpn"):
        return [features, model.head(features)]
    heads, outputs = model.roi_heads, [features, model.rpn.head(features)]
    pooled = F.adaptive_avg_pool2d(features[0], 7)
    outputs.append(heads.box_predictor(heads.box_head(pooled)))
    if heads.has_mask():
        outputs.append(heads.mask_predictor(heads.mask_head(pooled)))
    if heads.has_keypoint():
        outputs.append(heads.keypoint_predictor(heads.keypoint_head(pooled)))
    return outputs


def _timm() -> Iterator[Case]:
    sizes = {name: size for names, size in TIMM_SIZES.items() for name in names.split()}
    named = [(title, name, name, {}) for title, names in TIMM.items() for name in names.split()]
    named += [("with options", label, *made) for label, made in TIMM_OPTIONS.items()]
    for title, label, name, options in named:

        def build(name: str = name, options: dict[str, Any] = options) -> nn.Module:
            classes = {} if options.get("features_only") else {"num_classes": 10}
            return _library("timm", "timm").create_model(name, **(classes | options))

        size = sizes.get(name, 48)
        channels = options.get("in_chans", 3)
        yield Case(f"timm {title}", label, build, (2, channels, size, size))


def _hugging_face() -> Iterator[Case]:
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 96], "depths": [2, 2, 2, 2]}
    resnet18 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    bottleneck = {"layer_type": "bottleneck", **small}
    made: dict[str, tuple[str, str, dict[str, Any]]] = {
        "ResNetModel, as resnet-18": ("ResNetModel", "ResNetConfig", resnet18),
        "ResNetModel, as resnet-50": ("ResNetModel", "ResNetConfig", {}),
        "ResNetForImageClassification, as resnet-18": (
            "ResNetForImageClassification", "ResNetConfig", resnet18
        ),
        "ResNetForImageClassification, as resnet-50": (
            "ResNetForImageClassification", "ResNetConfig", {}
        ),
        "ResNetForImageClassification, as resnet-101": (
            "ResNetForImageClassification", "ResNetConfig", {"depths": [3, 4, 23, 3]}
        ),
        "ResNetModel, downsample_in_bottleneck": (
            "ResNetModel", "ResNetConfig", bottleneck | {"downsample_in_bottleneck": True}
        ),
        "ResNetModel, downsample_in_first_stage": (
            "ResNetModel", "ResNetConfig", bottleneck | {"downsample_in_first_stage": True}
        ),
        "ResNetModel, GELU": ("ResNetModel", "ResNetConfig", bottleneck | {"hidden_act": "gelu"}),
        "ResNetModel, output_hidden_states": (
            "ResNetModel", "ResNetConfig", bottleneck | {"output_hidden_states": True}
        ),
        "ResNetBackbone": (
            "ResNetBackbone", "ResNetConfig", bottleneck | {"out_features": ["stage2", "stage4"]}
        ),
        "RTDetrResNetBackbone": ("RTDetrResNetBackbone", "RTDetrResNetConfig", small),
        "RegNetForImageClassification": (
            "RegNetForImageClassification",
            "RegNetConfig",
            {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 2, 2, 1], "groups_width": 8},
        ),
        "BitModel": ("BitModel", "BitConfig", small | {"num_groups": 8}),
    }  # fmt: skip
    for label, (name, config, options) in made.items():

        def build(
            name: str = name, config: str = config, options: dict[str, Any] = options
        ) -> nn.Module:
            library = _library("transformers", "transformers")
            return getattr(library, name)(getattr(library, config)(**options))

        yield Case("Hugging Face", label, build)


def _hand_written() -> Iterator[Case]:
    for name, network in NETWORKS.items():
        yield Case("hand-written networks", name, network.build, network.shape)
    for name, build in PROVABLE.items():
        yield Case("hand-written blocks", name, build, (3, 8, 9, 7))
    for name, (build, _) in UNPROVABLE.items():
        yield Case("hand-written blocks, left alone", name, build, (3, 8, 9, 7))


def _library(name: str, module: str) -> ModuleType:
    import_torchvision()  # timm and transformers import it too
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)
