"""Starting weights of the models, as in torchvision."""

from torch import Tensor, nn

from resnet_fused.nn import BasicBlock, Bottleneck


def initialize(model: nn.Module, zero_init_residual: bool = False) -> None:
    """Kaiming-normal convolutions (fan out), batch norms of weight 1 and bias 0, in place.

    zero_init_residual: the last batch norm of every block starts with weight 0, so that each block
    starts as the identity (https://arxiv.org/abs/1706.02677).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)
