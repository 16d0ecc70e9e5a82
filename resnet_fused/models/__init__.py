"""ResNets built from fused blocks; torchvision's checkpoints load unchanged."""

from resnet_fused.models.cifar import (
    CifarResNet,
    ZeroPadShortcut,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from resnet_fused.models.preactivation import (
    PreActCifarResNet,
    preact_resnet20,
    preact_resnet56,
    preact_resnet110,
    preact_resnet164,
)
from resnet_fused.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "CifarResNet",
    "PreActCifarResNet",
    "ResNet",
    "ZeroPadShortcut",
    "preact_resnet20",
    "preact_resnet56",
    "preact_resnet110",
    "preact_resnet164",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
