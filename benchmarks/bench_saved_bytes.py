"""What a training step keeps for its backward, per image: eager, ours in both modes, and by theory.

python benchmarks/bench_saved_bytes.py --model resnet50 --size 224 --dtype float32,bfloat16
Runs on a CPU. A GPU keeps the signs of the blocks' last ReLUs besides, one bit per element.
"""

import argparse
import sys

import torch
from harness import choices

from resnet_fused import TrainingMode, fuse
from resnet_fused.commands import networks
from resnet_fused.commands.console import table
from resnet_fused.commands.memory import saved_bytes_per_image, theoretical_bytes
from resnet_fused.commands.verify import DTYPES


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", choices=networks.NAMES)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--dtype", type=choices(*DTYPES), default="float32,bfloat16")
    arguments = parser.parse_args()
    pair = networks.build_pair(arguments.model)
    images = torch.randn(2, 3, arguments.size, arguments.size)
    for name in arguments.dtype:
        dtype = DTYPES[name]
        theory = theoretical_bytes(pair.eager, images[:1], dtype.itemsize)
        expected = {"eager": theory.eager}
        measured = {"eager": saved_bytes_per_image(pair.eager, images, dtype)}
        for mode in TrainingMode:
            model = fuse(pair.fused, training_mode=mode)
            expected[mode.value] = theory.of(mode)
            measured[mode.value] = saved_bytes_per_image(model, images, dtype)
        rows = [
            (
                *(kind, f"{measured[kind] / 1e6:.2f}", f"{measured[kind] / measured['eager']:.3f}"),
                *(f"{expected[kind] / 1e6:.2f}", f"{expected[kind] / expected['eager']:.3f}"),
            )
            for kind in expected
        ]
        print(f"\n{arguments.model}, {arguments.size}x{arguments.size}, {name}")
        print(table(("", "MB", "of eager", "theory, MB", "of eager"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
