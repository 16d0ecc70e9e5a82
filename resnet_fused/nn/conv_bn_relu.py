"""ConvBnReLU2d: a convolution, its batch normalisation and ReLU as one module."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused.nn import blocks
from resnet_fused.nn.pairs import refuse_script


class ConvBnReLU2d(nn.Module):
    """relu(bn(conv(x)) + residual), following `.train()` and `.eval()` at each call.

    x: (N, in_channels, H, W); residual, out: (N, out_channels, P, Q). Arguments as in nn.Conv2d,
    without a bias unless asked for; padding=None keeps the image size at stride 1 (odd kernels).
    norm_layer makes the normalisation of a width. relu=False leaves the ReLU out, as projection
    shortcuts need.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_layer: Callable[[int], nn.Module] | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = (kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = blocks.conv_bn_relu(x, self.conv, self.bn, residual, self.relu)
        if out is not None:
            return out
        out = self.bn(self.conv(x))
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out

    def extra_repr(self) -> str:
        return f"relu={self.relu}"
