"""Reproduce Fig. 7 of He et al., "Deep Residual Learning for Image Recognition" (2015).

    python examples/layer_responses.py                         # short trainings on digits first
    python examples/layer_responses.py --checkpoint resnet20=A/last.pt resnet110=B/last.pt

For each CIFAR ResNet: the standard deviation of what each 3x3 layer answers to the validation
images, behind its batch norm and before addition and ReLU. Trained on CIFAR-10 for long, deeper
networks have smaller ones: each block changes its input less. The folder --out gets
layer_responses.csv and layer_responses.png, with the two panels of the figure: layers in their
order, and sorted by magnitude. Checkpoints are those of train.py.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import data
import torch
import train
from reporting import UsageError, output_folder, print_error, progress, rewritten
from torch import Tensor, nn

NETWORKS = ("resnet20", "resnet56", "resnet110")
CIFAR_NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
BATCH_SIZE = 128
LEARNING_RATE = "0.02"  # ResNet-110 does not learn at 0.1 in a few epochs


class Response(NamedTuple):
    """One row of the CSV file. layer: from 1 on, in the order of the forward pass."""

    network: str
    layer: int
    name: str
    std: float


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for what the user can repair (one line says what), 130 when interrupted."""
    try:
        arguments = parse(argv)
        out = output_folder(arguments.out)
        responses: dict[str, list[Response]] = {}
        for arch, path in checkpoints(arguments).items():
            responses[arch] = measure(arch, checkpoint.load(path), arguments.root)
        write_csv(out / "layer_responses.csv", responses)
        plot(out / "layer_responses.png", responses)
    except UsageError as error:
        print_error("layer_responses.py", error)
        return 2
    except KeyboardInterrupt:
        print("\nlayer_responses.py: interrupted", file=sys.stderr)
        return 130
    for arch, rows in responses.items():
        mean = sum(row.std for row in rows) / len(rows)
        print(f"{arch}: {len(rows)} layers, mean std {mean:.4f}")
    print(out / "layer_responses.png")
    return 0


def checkpoints(arguments: argparse.Namespace) -> dict[str, Path]:
    """Per network a checkpoint: those given, else those of short trainings here."""
    if arguments.checkpoint:
        return dict(arguments.checkpoint)
    found = {}
    for arch in arguments.arch:
        folder = arguments.out / arch
        options = ["--arch", arch, "--out", str(folder)]
        options += ["--epochs", str(arguments.epochs), "--lr", LEARNING_RATE]
        if arguments.root is not None:
            options += ["--root", str(arguments.root)]
        train.train(train.parse(options))
        found[arch] = folder / "last.pt"
    return found


def measure(arch: str, state: Mapping[str, Any], root: Path | None) -> list[Response]:
    """The responses of the network in a checkpoint to the validation images it was tested on."""
    trained = state["arguments"]
    if trained["arch"] != arch:
        raise UsageError(f"--checkpoint {arch}=PATH must hold that network, got {trained['arch']}")
    if root is None and trained["root"] is not None:
        root = Path(trained["root"])
    split = data.load(root, trained["image_size"], trained["limit"]).val
    network = train.build_network(arch, state["classes"])
    network.load_state_dict(state["model"])
    batches = data.val_batches(split, BATCH_SIZE, data.Share())
    images = (images for images, _ in progress(batches, len(batches), arch, show=True))
    stds = response_stds(network, images)
    return [Response(arch, number, *item) for number, item in enumerate(stds.items(), 1)]


@torch.no_grad()
def response_stds(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Standard deviation of all values that each BatchNorm2d puts out in evaluation.

    batches: images (N, 3, H, W). In a CIFAR ResNet, whose shortcuts have no layers, each 3x3
    convolution has one BatchNorm2d and there is no other.
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    # (number of values, their sum, the sum of their squares), in float64.
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in layers}

    def record(name: str, out: Tensor) -> None:
        values = out.double()
        sums[name] += torch.stack(
            [torch.tensor(float(values.numel())), values.sum(), values.square().sum()]
        )

    # A fused block never forms these outputs. It notices that someone listens to a layer, and then
    # runs its layers one by one: the same network, measured as a plain one.
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, out, name=name: record(name, out))
        for name, layer in layers.items()
    ]
    network.eval()
    for images in batches:
        network(images)
    for hook in hooks:
        hook.remove()
    return {name: _std(*value.tolist()) for name, value in sums.items()}


def _std(count: float, total: float, squares: float) -> float:
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))


def write_csv(path: Path, responses: Mapping[str, Sequence[Response]]) -> None:
    with rewritten(path, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Response._fields)
        for rows in responses.values():
            table.writerows(rows)


def plot(path: Path, responses: Mapping[str, Sequence[Response]]) -> None:
    """The two panels of the figure."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError(
            f"the plot needs matplotlib: {error} (pip install matplotlib); the numbers are in "
            f"{path.with_suffix('.csv')}"
        ) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (in_order, by_magnitude) = pyplot.subplots(2, 1, figsize=(7, 7), layout="constrained")
    for arch, rows in responses.items():
        stds = [row.std for row in rows]
        label = f"ResNet-{arch.removeprefix('resnet')}"
        in_order.plot(range(1, len(stds) + 1), stds, label=label)
        by_magnitude.plot(range(1, len(stds) + 1), sorted(stds, reverse=True), label=label)
    in_order.set(xlabel="layer index (original)", ylabel="std")
    by_magnitude.set(xlabel="layer index (sorted by magnitude)", ylabel="std")
    in_order.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = train.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="layer_responses.py",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        nargs="+",
        type=named_path,
        metavar="NAME=PATH",
        help=f"trained networks; NAME: one of {', '.join(CIFAR_NETWORKS)}; default: train here",
    )
    add(
        "--arch",
        nargs="+",
        choices=CIFAR_NETWORKS,
        default=NETWORKS,
        metavar="NAME",
        help=f"networks to train here; default {' '.join(NETWORKS)}",
    )
    add(
        "--epochs",
        type=train.positive,
        default=10,
        metavar="N",
        help="of training here; default %(default)s",
    )
    add(
        "--root",
        type=Path,
        metavar="DIR",
        help="images, as in train.py; default: those that the checkpoint was trained on, or digits",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/layer_responses"),
        metavar="DIR",
        help="default %(default)s",
    )
    return parser.parse_args(argv)


def named_path(text: str) -> tuple[str, Path]:
    """An argparse type: NAME=PATH, where NAME is a network's."""
    name, _, path = text.partition("=")
    if name not in CIFAR_NETWORKS or not path:
        raise argparse.ArgumentTypeError(
            f"must be NAME=PATH with NAME one of {', '.join(CIFAR_NETWORKS)}, got {text!r}"
        )
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
