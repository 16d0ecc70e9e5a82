"""timm's BatchNormAct2d: a batch norm with the activation behind it in one module."""

from torch import nn


def is_batch_norm_act(module: nn.Module) -> bool:
    """Whether `module` is that class, and not one derived from it."""
    cls = type(module)
    return cls.__name__ == "BatchNormAct2d" and cls.__module__ == "timm.layers.norm_act"


def has_plain_activation(module: nn.Module, relu: bool) -> bool:
    """Whether what a BatchNormAct2d does behind its batch norm is a ReLU; relu=False: nothing."""
    act, drop = module.act, module.drop
    expected = nn.ReLU if relu else nn.Identity
    return type(act) is expected and type(drop) is nn.Identity
