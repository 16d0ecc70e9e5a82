"""Modules that compute fused, with the constructors and state_dicts of those they replace."""

from resnet_fused.nn.conv_bn_relu import ConvBnReLU2d
from resnet_fused.nn.frozen_batch_norm import FrozenBatchNorm2d
from resnet_fused.nn.preactivation import PreActBasicBlock, PreActBottleneck
from resnet_fused.nn.residual import BasicBlock, Bottleneck
from resnet_fused.nn.training_mode import TrainingMode

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBnReLU2d",
    "FrozenBatchNorm2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "TrainingMode",
]
