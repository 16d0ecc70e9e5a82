"""What the benchmarks of the single operators share: ResNet's layers, providers, bytes."""

import argparse
from collections.abc import Callable

import torch
from harness import Harness, Work, comma_list, parser, skipped
from plot import plot_folder
from torch import Tensor

from resnet_fused.commands import baselines, networks, verify
from resnet_fused.commands.cases import Case, cases, layer_shapes, run_case
from resnet_fused.commands.numerics import short_name

Provider = Callable[..., Tensor]


def benchmark(
    operator: str,
    description: str | None,
    moved_bytes: Callable[[Case, str], int],
    flop: Callable[[Case, str], int] | None = None,
) -> int:
    """Time one operator on every distinct layer of a network that uses it.

    moved_bytes and flop: of a case and "forward" or "backward", the least that must move through
    memory when nothing fits into the caches, and the multiplications and additions.
    """
    arguments = _parser(description).parse_args()
    harness = Harness(arguments)
    pair = networks.build_pair(arguments.model)
    shapes = layer_shapes(
        pair.eager, torch.zeros(arguments.batch, 3, arguments.size, arguments.size)
    )
    for name in arguments.dtype:
        dtype = verify.DTYPES[name]
        chosen = (
            case
            for case in cases(shapes, dtype, harness.device)
            if case.operator == operator and arguments.match in case.label
        )
        for number, case in enumerate(chosen):
            if number == arguments.limit:
                break
            checks = run_case(case, dtype)
            for mode in arguments.mode:
                harness.compare(
                    Work(
                        benchmark=operator,
                        subject=operator,
                        mode=mode,
                        dtype=short_name(dtype),
                        shape=case.label,
                        batch=arguments.batch,
                        moved_bytes=moved_bytes(case, mode),
                        flop=flop(case, mode) if flop else None,
                    ),
                    _providers(case, mode, arguments.providers),
                    checks,
                    flush=True,
                )
    plot_folder(harness.write().parent)
    return 0


def activation_bytes(case: Case) -> int:
    """Bytes of the case's input x."""
    return case.tensors["x"].nbytes


def _providers(case: Case, mode: str, wanted: list[str]) -> dict[str, Callable[[], object]]:
    def eager(*tensors: Tensor) -> Tensor:
        return case.before_relu(*tensors).relu_()

    functions: dict[str, Provider] = {"eager": eager, "fused": case.fused}
    if "compile" in wanted:
        try:
            baselines.need_compiler(case.tensors["x"].device)
            functions["compile"] = torch.compile(eager)
        except baselines.UnavailableError as reason:
            skipped("compile", reason)
    prepare = _forward if mode == "forward" else _backward
    return {
        name: prepare(function, case)
        for name, function in functions.items()
        if name == "eager" or name in wanted
    }


def _forward(function: Provider, case: Case) -> Callable[[], object]:
    tensors = [tensor.clone() for tensor in case.tensors.values()]

    def run() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    return run


def _backward(function: Provider, case: Case) -> Callable[[], object]:
    tensors = [
        tensor.clone().requires_grad_(name not in case.updated)
        for name, tensor in case.tensors.items()
    ]
    out = function(*tensors)
    grad_out = torch.randn_like(out)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)


def _parser(description: str | None) -> argparse.ArgumentParser:
    result = parser(description, seconds=2)
    result.add_argument("--model", default="resnet50", choices=networks.NAMES)
    result.add_argument("--size", type=int, default=224, help="height and width of the images")
    result.add_argument("--batch", type=int, default=8)
    result.add_argument("--mode", type=comma_list, default="forward,backward")
    result.add_argument("--dtype", type=comma_list, default="float32,bfloat16")
    result.add_argument("--providers", type=comma_list, default="eager,compile,fused")
    result.add_argument(
        "--match", default="", help='only layers with this in their description, e.g. "training"'
    )
    result.add_argument("--limit", type=int, help="stop after this many layers")
    return result
