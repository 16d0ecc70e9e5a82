"""The fused operators, as functions on tensors."""

from resnet_fused.ops.add_relu import add_relu
from resnet_fused.ops.bn_relu import BatchNormArgs, bn_relu
from resnet_fused.ops.bn_relu_backward import bn_relu_backward_apply, bn_relu_backward_sums
from resnet_fused.ops.bn_relu_max_pool import bn_relu_max_pool
from resnet_fused.ops.bn_statistics import bn_statistics
from resnet_fused.ops.bottleneck_block import bottleneck_block
from resnet_fused.ops.bottleneck_roll import bottleneck_roll
from resnet_fused.ops.bottleneck_tail import bottleneck_tail
from resnet_fused.ops.conv_bn_relu import conv_bn_relu
from resnet_fused.ops.conv_dgrad import conv_dgrad
from resnet_fused.ops.conv_projection_relu import conv_projection_relu
from resnet_fused.ops.conv_stats import conv_stats
from resnet_fused.ops.conv_wgrad import conv_wgrad

__all__ = [
    "BatchNormArgs",
    "add_relu",
    "bn_relu",
    "bn_relu_backward_apply",
    "bn_relu_backward_sums",
    "bn_relu_max_pool",
    "bn_statistics",
    "bottleneck_block",
    "bottleneck_roll",
    "bottleneck_tail",
    "conv_bn_relu",
    "conv_dgrad",
    "conv_projection_relu",
    "conv_stats",
    "conv_wgrad",
]
