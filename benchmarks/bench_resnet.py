"""A whole ResNet, inference and training step, against eager PyTorch and other engines.

python benchmarks/bench_resnet.py --device cpu --mode eval,train --dtype float32 --batch 1,8
"""

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from harness import Harness, Work, Wrong, choices, comma_list, parser, skipped
from plot import plot_folder
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import TrainingMode, fuse
from resnet_fused.commands import baselines, networks, verify
from resnet_fused.commands.baselines import Inference, UnavailableError

# Eager comes first: it is what the others are compared with.
EVAL: dict[str, Callable[[nn.Module, Tensor], Inference]] = {
    "eager": baselines.eager,
    "eager_nchw": baselines.eager_nchw,
    "compile": baselines.compiled,
    "compile_max_autotune": baselines.compiled_max_autotune,
    "onnxruntime": baselines.onnxruntime,
    "openvino": baselines.openvino,
}
# Somebody else's engine computes the same network while its error against float32 is at most this
# multiple of eager's error in the same dtype, or this share of the largest output (ours is held to
# verify's rule).
SAME_NETWORK = 4.0
SAME_FLOAT32_NETWORK = 1e-3
TRAIN = ("eager", "compile", "fused", "fused_memory")
OURS = ("fused", "fused_memory")  # the second differs in training: TrainingMode.MEMORY
DEFAULT_PROVIDERS = "eager,eager_nchw,compile,onnxruntime,openvino,fused,fused_memory"


def main() -> int:
    arguments = _parser().parse_args()
    harness = Harness(arguments)
    for batch in map(int, arguments.batch):
        images = torch.randn(batch, 3, arguments.size, arguments.size)
        pair = networks.build_pair(arguments.model)
        networks.warm_up(pair, torch.randn(2, 3, arguments.size, arguments.size))
        for model in pair[:2]:
            networks.placed(model, harness.device)
        x = images.to(harness.device)
        for mode in arguments.mode:
            run = _inference if mode == "eval" else _training
            for name in arguments.dtype:
                run(harness, arguments, pair, x, verify.DTYPES[name])
    plot_folder(harness.write().parent)
    return 0


def _inference(
    harness: Harness,
    arguments: argparse.Namespace,
    pair: networks.Pair,
    x: Tensor,
    dtype: torch.dtype,
) -> None:
    builders = {**EVAL, "fused": lambda _, x: baselines.eager(pair.fused, x)}
    skip = ("eager", "fused_memory")
    wanted = ["eager", *(name for name in arguments.providers if name not in skip)]
    providers: dict[str, Inference] = {}
    for name in wanted:
        try:
            providers[name] = builders[name](pair.eager, x.to(dtype))
        except UnavailableError as reason:
            skipped(name, reason)
    checks = verify.check_inference(arguments.model, *pair[:2], x[:2], dtype)
    exact = baselines.eager(pair.eager, x)().float()
    eager_error = _error("eager", providers["eager"](), exact)
    limit = max(SAME_NETWORK * eager_error, SAME_FLOAT32_NETWORK)
    for name in list(providers):
        error = _error(name, providers[name](), exact)
        if not error <= limit:
            skipped(
                name, f"its error of {error:.1e} is not that of this network ({eager_error=:.1e})"
            )
            del providers[name]
    work = _work(arguments, "eval", dtype, x)
    harness.compare(work, providers, checks, memory=True)


def _training(
    harness: Harness,
    arguments: argparse.Namespace,
    pair: networks.Pair,
    x: Tensor,
    dtype: torch.dtype,
) -> None:
    if len(x) == 1:
        return  # nobody trains batch norm on one image
    checks = verify.check_training_step(arguments.model, *pair[:2], x[:2], dtype)
    providers: dict[str, Inference] = {}
    for name in TRAIN:
        if name != "eager" and name not in arguments.providers:
            continue
        model = copy.deepcopy(pair.fused if name in OURS else pair.eager).train()
        if name == "fused_memory":
            model = fuse(model, inplace=True, training_mode=TrainingMode.MEMORY)
        try:
            forward = baselines.compiled_training(model) if name == "compile" else model
        except UnavailableError as reason:
            skipped(name, reason)
            continue
        providers[name] = _step(model, forward, x, dtype)
    harness.compare(_work(arguments, "train", dtype, x), providers, checks, memory=True)


def _step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype
) -> Inference:
    """Forward, cross-entropy, backward and SGD with momentum; bfloat16 and float16 by autocast."""
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(len(x), device=x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            out = forward(x)
        F.cross_entropy(out.float(), labels).backward()
        optimizer.step()

    return step


def _error(name: str, out: object, exact: Tensor) -> float:
    """Largest error of `out`, relative to the largest output."""
    if not isinstance(out, Tensor):
        raise Wrong(f"{name} returned {type(out).__name__}, not a tensor: nothing is timed")
    return float((out.float() - exact).abs().max() / exact.abs().max())


def _work(arguments: argparse.Namespace, mode: str, dtype: torch.dtype, x: Tensor) -> Work:
    shape = "x".join(map(str, x.shape[1:]))
    name = str(dtype).removeprefix("torch.")
    return Work("resnet", arguments.model, mode, name, shape, len(x), counts_images=True)


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__, seconds=40)
    result.add_argument("--model", default="resnet50", choices=networks.NAMES)
    result.add_argument("--size", type=int, default=224, help="height and width of the images")
    result.add_argument("--mode", type=choices("eval", "train"), default="eval,train")
    result.add_argument("--dtype", type=choices(*verify.DTYPES), default="float32,bfloat16")
    result.add_argument("--batch", type=comma_list, default="1,8")
    result.add_argument(
        "--providers", type=choices(*EVAL, *OURS), default=DEFAULT_PROVIDERS,
        help=f"of {', '.join((*EVAL, *OURS))}; default: {DEFAULT_PROVIDERS}",
    )  # fmt: skip
    return result


if __name__ == "__main__":
    sys.exit(main())
