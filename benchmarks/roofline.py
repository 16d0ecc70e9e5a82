"""The least time that a ResNet's convolutions can take on a GPU, and how near measurements come.

    python benchmarks/roofline.py --gpu H100,A100 --batch 256 --dtype bfloat16
    python benchmarks/roofline.py --csv benchmarks/results/nvidia-h100-80gb-hbm3/conv_bn_relu.csv

A step (forward, dgrad, wgrad) takes at least bytes / bandwidth, as every tensor moves once, and at
least FLOPs / peak: the larger of both is its floor. Nothing is computed here; --csv reads what
bench_conv_bn_relu.py measured.
"""

import argparse
import copy
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from harness import choices, read_rows, skipped
from plot import COLOURS, latest
from torch import Tensor, nn

from resnet_fused.commands import networks
from resnet_fused.commands.cases import ConvShape
from resnet_fused.commands.console import table
from resnet_fused.layout import convolution_shape


class Gpu(NamedTuple):
    """What a GPU can do at most; tensor cores, without sparsity."""

    tflop_per_s: float  # bfloat16 and float16
    tf32_tflop_per_s: float
    tb_per_s: float  # memory bandwidth
    source: str


_ESTIMATE = "what good kernels reach of it: an estimate, not a measurement; TF32 at half the rate"
GPUS = {
    "H100": Gpu(989.4, 494.7, 3.35, "NVIDIA H100 datasheet, SXM"),
    "H100-achievable": Gpu(800.0, 400.0, 3.0, _ESTIMATE),
    "H200": Gpu(989.4, 494.7, 4.8, "NVIDIA H200 datasheet, SXM"),
    "A100": Gpu(312.0, 156.0, 2.039, "NVIDIA A100 datasheet, SXM, 80 GB"),
}
# Of the same chips, with slower memory than the table says.
_OTHER_VARIANTS = re.compile("PCIe|NVL|40GB")
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
# By the modes of the benchmarks, and of training: the steps that they consist of.
STEPS = {
    "forward": ("forward",),
    "backward": ("dgrad", "wgrad"),
    "training": ("forward", "dgrad", "wgrad"),
}
_LABEL = re.compile(
    r"(?P<x>\d+x\d+x\d+x\d+) -> (?P<kernels>\d+), (?P<kernel>\d+)x\d+/(?P<stride>\d+)"
    r"(, groups (?P<groups>\d+))?(?P<residual>, residual)?"
)


class Layer(NamedTuple):
    """A convolution of a network; residual: whether a shortcut is added to its output."""

    conv: ConvShape
    residual: bool
    first: bool = False  # takes the images, which need no gradient

    @property
    def label(self) -> str:
        """As in the column "shape" of bench_conv_bn_relu.py."""
        kernel = "x".join(map(str, self.conv.weight[2:]))
        x, kernels = "x".join(map(str, self.conv.x)), self.conv.weight[0]
        label = f"{x} -> {kernels}, {kernel}/{self.conv.stride[0]}"
        label += f", groups {self.conv.groups}" if self.conv.groups > 1 else ""
        return label + (", residual" if self.residual else "")


class Work(NamedTuple):
    """What one step of a layer moves and computes at least."""

    moved_bytes: int
    flop: int


class Floor(NamedTuple):
    """The least time of some work on a GPU, and what sets it: "memory", "compute" or "both"."""

    us: float
    side: str


class Measured(NamedTuple):
    """One comparison of a CSV file: microseconds by provider, beside the floor."""

    device_name: str
    dtype: str
    mode: str
    layer: Layer
    floor: Floor
    us: dict[str, float]


def work(layer: Layer, step: str, item_size: int) -> Work:
    """The forward step reads x, weight and residual and writes y; dgrad reads the gradient of y and
    weight and writes that of x; wgrad reads the gradient of y and x and writes that of weight.

    Of x only what the kernels touch is read: every fourth pixel by a 1x1 convolution of stride 2.
    """
    conv = layer.conv
    out = convolution_shape(conv.x, conv.weight, conv.stride, conv.padding, conv.dilation)
    n, c, *size = conv.x
    touched = [min(a, b * taps) for a, b, taps in zip(size, out[2:], conv.weight[2:], strict=True)]
    x, weight, y = (math.prod(shape) for shape in ((n, c, *touched), conv.weight, out))
    if step == "dgrad":
        x = math.prod(conv.x)
    residual = y if layer.residual and step == "forward" else 0
    return Work((x + weight + y + residual) * item_size, 2 * y * math.prod(conv.weight[1:]))


def floor(layer: Layer, mode: str, dtype: str, gpu: Gpu) -> Floor:
    """Of all steps of a mode, one after the other."""
    us, sides = 0.0, set()
    for step in _steps(layer, mode):
        moved_bytes, flop = work(layer, step, ITEM_SIZES[dtype])
        by_memory, by_compute = moved_bytes / gpu.tb_per_s / 1e6, flop / _peak(gpu, dtype) / 1e6
        us += max(by_memory, by_compute)
        sides.add("memory" if by_memory >= by_compute else "compute")
    return Floor(us, sides.pop() if len(sides) == 1 else "both")


def layers(model: nn.Module, images: Tensor) -> dict[Layer, int]:
    """The distinct convolutions of an eager model and how often it has them, in forward order.

    Both may be on the device "meta".
    """
    found: dict[Layer, int] = {}
    ends = {_last_convolution(m) for m in model.modules() if hasattr(m, "downsample")}

    def record(module: nn.Conv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        geometry = module.stride, module.padding, module.dilation, module.groups
        conv = ConvShape(tuple(inputs[0].shape), tuple(module.weight.shape), *geometry)
        layer = Layer(conv, module in ends, first=not found)
        found[layer] = found.get(layer, 0) + 1

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def measured(path: Path, gpu: Gpu | None) -> list[Measured]:
    """The newest comparison of each convolution in a CSV file of the benchmarks.

    gpu: the one that it was measured on; None: by the name of the device. Raises ValueError where
    that is not in the table or where the file has no convolutions.
    """
    comparisons = [
        (group, layer)
        for group in latest(read_rows(path)).values()
        if (layer := parsed(group[0]["shape"])) is not None
        and group[0]["mode"] in STEPS
        and group[0]["dtype"] in ITEM_SIZES
    ]
    if not comparisons:
        raise ValueError(
            f"{path} has no rows of convolutions (bench_conv_bn_relu.py writes such a file)"
        )
    result = []
    for group, layer in comparisons:
        name, mode, dtype = (group[0][column] for column in ("device_name", "mode", "dtype"))
        times = {row["provider"]: float(row["median_ms"]) * 1e3 for row in group}
        least = floor(layer, mode, dtype, gpu or _gpu_named(name))
        result.append(Measured(name, dtype, mode, layer, least, times))
    return result


def parsed(label: str) -> Layer | None:
    """The layer with this label; None where it is no convolution's.

    Labels leave out the padding: that of a ResNet keeps the size where the stride is 1.
    """
    match = _LABEL.fullmatch(label)
    if match is None:
        return None
    x = tuple(int(size) for size in match["x"].split("x"))
    kernels, kernel, stride, groups = (
        int(match[name] or 1) for name in ("kernels", "kernel", "stride", "groups")
    )
    weight = (kernels, x[1] // groups, kernel, kernel)
    geometry = (stride, stride), (kernel // 2, kernel // 2), (1, 1), groups
    return Layer(ConvShape(x, weight, *geometry), match["residual"] is not None)


def network_table(found: Mapping[Layer, int], mode: str, dtype: str, gpus: Iterable[str]) -> str:
    """One line per distinct layer, and the sum over all layers."""
    gpus, item_size = list(gpus), ITEM_SIZES[dtype]
    lines, totals, moved, flop = [], dict.fromkeys(gpus, 0.0), 0, 0
    for layer, count in found.items():
        each = [work(layer, step, item_size) for step in _steps(layer, mode)]
        layer_bytes, layer_flop = sum(w.moved_bytes for w in each), sum(w.flop for w in each)
        floors = {name: floor(layer, mode, dtype, GPUS[name]) for name in gpus}
        for name, least in floors.items():
            totals[name] += count * least.us
        moved, flop = moved + count * layer_bytes, flop + count * layer_flop
        lines.append(
            (
                *(layer.label, str(count), f"{layer_bytes / 1e6:.1f}", f"{layer_flop / 1e9:.1f}"),
                *(f"{least.us:.1f} {least.side}" for least in floors.values()),
            )
        )
    batch = next(iter(found)).conv.x[0]
    lines += [
        (
            *("all", str(sum(found.values())), f"{moved / 1e6:.0f}", f"{flop / 1e9:.0f}"),
            *(f"{us:.0f}" for us in totals.values()),
        ),
        (
            *("images/s", "", "", ""),
            *(f"{batch / us * 1e6:.0f}" for us in totals.values()),
        ),
    ]
    return table(["layer", "times", "MB", "GFLOP", *(f"{name} us" for name in gpus)], lines)


def measured_table(found: list[Measured]) -> str:
    """Microseconds of each provider, and the floor in percent of them."""
    providers = list(dict.fromkeys(name for each in found for name in each.us))
    lines = [
        (
            *(each.layer.label, each.mode, each.dtype, f"{each.floor.us:.1f} {each.floor.side}"),
            *(
                f"{each.us[name]:.1f} ({each.floor.us / each.us[name]:.0%})"
                if name in each.us
                else ""
                for name in providers
            ),
        )
        for each in found
    ]
    return table(["layer", "mode", "dtype", "floor us", *providers], lines)


def draw(found: list[Measured], target: Path) -> None:
    """Measured time against the floor, one point per layer and provider.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained")
    for name in dict.fromkeys(name for each in found for name in each.us):
        points = [(each.floor.us, each.us[name]) for each in found if name in each.us]
        colour = COLOURS.get(name, "#54a24b")
        axes.scatter(*zip(*points, strict=True), s=18, alpha=0.8, color=colour, label=name)
    ends = [min(each.floor.us for each in found), max(each.floor.us for each in found)]
    for factor, style in ((1, "-"), (2, "--"), (4, ":")):
        times = [factor * end for end in ends]
        axes.plot(ends, times, style, color="black", linewidth=0.8, label=f"{100 // factor} %")
    axes.set(xscale="log", yscale="log", xlabel="floor, us", ylabel="measured, us")
    axes.set_title(f"convolutions on {found[0].device_name}, lines: share of the floor", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.size) < 1:
        parser.error("--batch and --size must be at least 1")
    if arguments.plot and len(arguments.csv) != 1:
        parser.error("--plot must come with exactly one --csv FILE")
    if arguments.csv and arguments.gpu and len(arguments.gpu) != 1:
        parser.error("--gpu must name exactly one GPU with --csv")
    return _show_measured(arguments) if arguments.csv else _show_network(arguments)


def _show_network(arguments: argparse.Namespace) -> int:
    # In evaluation, where batch norms take even a single pixel.
    model = copy.deepcopy(networks.build_pair(arguments.model).eager).eval().to("meta")
    size = arguments.batch, 3, arguments.size, arguments.size
    found = layers(model, torch.empty(size, device="meta"))
    gpus = arguments.gpu or list(GPUS)
    for name in gpus:
        gpu = GPUS[name]
        peak = f"{_peak(gpu, arguments.dtype):g} TFLOP/s, {gpu.tb_per_s:g} TB/s"
        print(f"{name}: {peak} ({gpu.source})")
    for mode in arguments.mode:
        print(f"\n{arguments.model} {mode} {arguments.dtype}, {'x'.join(map(str, size))}")
        print(network_table(found, mode, arguments.dtype, gpus))
    print("\nConvolutions only: what is not fused into them comes on top.")
    return 0


def _show_measured(arguments: argparse.Namespace) -> int:
    """A table and a plot for each file; 1 where one cannot be read."""
    status = 0
    gpu = GPUS[arguments.gpu[0]] if arguments.gpu else None
    for path in arguments.csv:
        try:
            found = measured(path, gpu)
        except (OSError, ValueError) as error:
            print(f"roofline: {error}", file=sys.stderr)
            status = 1
            continue
        print(f"\n{path}: {found[0].device_name}, microseconds (the floor in percent of them)")
        print(measured_table(found))
        target = arguments.plot or path.with_name(f"{path.stem}_roofline.png")
        try:
            draw(found, target)
        except ImportError as error:
            skipped("plot", f"{error} (pip install matplotlib)")
        else:
            print(f"wrote {target}")
    return status


def _steps(layer: Layer, mode: str) -> list[str]:
    return [step for step in STEPS[mode] if not (layer.first and step == "dgrad")]


def _peak(gpu: Gpu, dtype: str) -> float:
    """TFLOP/s; convolutions in float32 run in TF32, as cuDNN's do unless told otherwise."""
    return gpu.tf32_tflop_per_s if dtype == "float32" else gpu.tflop_per_s


def _last_convolution(block: nn.Module) -> nn.Module:
    """The one whose output the shortcut is added to."""
    return [module for module in block.children() if isinstance(module, nn.Conv2d)][-1]


def _gpu_named(device_name: str) -> Gpu:
    for name, gpu in GPUS.items():
        if re.search(rf"\b{name}\b", device_name) and not _OTHER_VARIANTS.search(device_name):
            return gpu
    raise ValueError(
        f"the device {device_name!r} is not in the table of GPUs (name the one to compare with by"
        f" --gpu: {', '.join(GPUS)})"
    )


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--model", default="resnet50", choices=networks.NAMES)
    result.add_argument("--size", type=int, default=224, help="height and width of the images")
    result.add_argument("--batch", type=int, default=256)
    result.add_argument("--dtype", default="bfloat16", choices=ITEM_SIZES)
    result.add_argument(
        "--gpu", type=choices(*GPUS),
        help=f"of {', '.join(GPUS)}; default: all, or with --csv the one that the rows name",
    )  # fmt: skip
    result.add_argument(
        "--mode", type=choices("forward", "training"), default="forward,training",
        help="training: forward, and the gradients of input and weight; default: %(default)s",
    )  # fmt: skip
    result.add_argument(
        "--csv", type=Path, nargs="+", default=[], help="files that bench_conv_bn_relu.py wrote"
    )
    result.add_argument(
        "--plot", type=Path, help="where the plot of one --csv goes; default: beside it"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
