"""What the benchmarks of the single operators share: ResNet's layers, providers, bytes."""

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from harness import Harness, Work, choices, parser, skipped
from plot import plot_folder
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.commands import baselines, networks, verify
from resnet_fused.commands.cases import EPS, MOMENTUM, Case, Shapes, cases, layer_shapes, run_case
from resnet_fused.commands.numerics import Check, short_name

# "fused" is the operator as it comes; the others of ours are that operator on one backend.
OURS = ("fused", "reference", "cpu", "cuda", "triton")
PROVIDERS = ("eager", "compile", "cudnn", *OURS)
T = TypeVar("T")


class Provider(NamedTuple):
    """A function of a case's tensors; backend: the one that it asks for, if any."""

    function: Callable[..., Tensor]
    backend: str | None = None


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
    shapes = _shapes(arguments)
    for dtype in (verify.DTYPES[name] for name in arguments.dtype):
        found = cases(shapes, dtype, harness.device, (operator,))
        chosen = (case for case in found if _occurs(case, shapes) and arguments.match in case.label)
        for case in itertools.islice(chosen, arguments.limit):
            providers, checks = _checked_providers(case, dtype, arguments.providers)
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
                    _prepared(providers, case, mode, arguments.providers),
                    checks,
                    flush=True,
                )
    if not harness.rows:
        raise SystemExit(f"no layer of {arguments.model} has {arguments.match!r} in its name")
    plot_folder(harness.write().parent)
    return 0


def activation_bytes(case: Case) -> int:
    """Bytes of the case's input x."""
    return case.tensors["x"].nbytes


def in_training(case: Case) -> bool:
    return "training" in case.label


def _shapes(arguments: argparse.Namespace) -> Shapes:
    """The network's layers for these images; nothing is computed."""
    model = copy.deepcopy(networks.build_pair(arguments.model).eager).to("meta")
    size = arguments.batch, 3, arguments.size, arguments.size
    return layer_shapes(model, torch.empty(size, device="meta"))


def _occurs(case: Case, shapes: Shapes) -> bool:
    """Whether the network has this case: residuals are added where blocks end, and only there."""
    if case.operator == "conv_bn_relu" or "residual" not in case.tensors:
        return True
    return tuple(case.tensors["x"].shape) in shapes.sums


def _checked_providers(
    case: Case, dtype: torch.dtype, wanted: list[str]
) -> tuple[dict[str, Provider], list[Check]]:
    """Providers that can run here, except "compile", and what was compared with float64 of ours."""
    providers = {"eager": Provider(_eager(case))}
    checks: list[Check] = []
    if "cudnn" in wanted:
        try:
            providers["cudnn"] = Provider(_cudnn(case, dtype))
        except baselines.UnavailableError as reason:
            skipped("cudnn", reason)
    device_type = case.tensors["x"].device.type
    for name in (name for name in OURS if name in wanted):
        available = backends.available(case.operator, device_type, dtype)
        if name != "fused" and name not in available:
            skipped(name, f"it does not run {case.operator} on {device_type} in {dtype}")
            continue
        provider = Provider(case.fused, None if name == "fused" else name)
        providers[name] = provider
        checks += _under(provider.backend, lambda: run_case(case, dtype))()
    return providers, checks


def _eager(case: Case) -> Callable[..., Tensor]:
    def eager(*tensors: Tensor) -> Tensor:
        return case.before_relu(*tensors).relu_()

    return eager


def _cudnn(case: Case, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Batch norm by cuDNN, called by its name, with PyTorch's sum and ReLU behind it.

    Eager takes this batch norm or PyTorch's own, by a rule that changes from version to version.
    Raises UnavailableError where it does not run, or computes something else.
    """
    if case.operator != "bn_relu":
        raise baselines.UnavailableError(f"it has nothing for {case.operator} alone")
    if not (case.tensors["x"].is_cuda and torch.backends.cudnn.is_available()):
        raise baselines.UnavailableError("there is no cuDNN for these tensors")
    training = in_training(case)

    def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        arguments = x, weight, bias, mean, var, training, MOMENTUM, EPS
        return torch.ops.aten.cudnn_batch_norm(*arguments)[0]

    def cudnn(x: Tensor, *tensors: Tensor) -> Tensor:
        total = batch_norm(x, *tensors[:4])
        if len(tensors) > 4:
            other = batch_norm(*tensors[4:]) if len(tensors) > 5 else tensors[4]
            total = total + other
        return F.relu_(total)

    try:
        checks = run_case(case._replace(fused=cudnn), dtype)
    except RuntimeError as error:
        raise baselines.UnavailableError(f"cuDNN's batch norm fails: {error}") from error
    wrong = [check for check in checks if not check.passed]
    if wrong:
        raise baselines.UnavailableError(
            f"its {wrong[0].tensor} is off by {wrong[0].error:.1e}"
            f" where {wrong[0].allowed:.1e} is allowed"
        )
    return cudnn


def _prepared(
    providers: dict[str, Provider], case: Case, mode: str, wanted: list[str]
) -> dict[str, Callable[[], object]]:
    prepare = _forward if mode == "forward" else _backward
    calls = {
        name: _under(provider.backend, _under(provider.backend, prepare)(provider.function, case))
        for name, provider in providers.items()
    }
    if "compile" in wanted:
        try:
            calls["compile"] = _compiled(prepare, case)
        except (baselines.UnavailableError, RuntimeError) as reason:
            skipped("compile", reason)
    return {name: calls[name] for name in PROVIDERS if name in calls}


def _compiled(
    prepare: Callable[[Callable[..., Tensor], Case], Callable[[], object]], case: Case
) -> Callable[[], object]:
    baselines.need_compiler(case.tensors["x"].device)
    # Each case anew: after some others of the same code, Dynamo would generalise the shapes, and
    # later give up without a word.
    torch._dynamo.reset()
    call = prepare(torch.compile(_eager(case), dynamic=False), case)
    call()
    return call


def _forward(function: Callable[..., Tensor], case: Case) -> Callable[[], object]:
    """In training with what the backward will need, else without."""
    training = in_training(case)
    tensors = list(_inputs(case, training))

    def run() -> Tensor:
        with torch.set_grad_enabled(training):
            return function(*tensors)

    return run


def _backward(function: Callable[..., Tensor], case: Case) -> Callable[[], object]:
    tensors = list(_inputs(case, True))
    out = function(*tensors)
    grad_out = torch.randn_like(out)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)


def _inputs(case: Case, gradients: bool) -> Iterator[Tensor]:
    for name, tensor in case.tensors.items():
        yield tensor.clone().requires_grad_(gradients and name not in case.updated)


def _under(backend: str | None, call: Callable[..., T]) -> Callable[..., T]:
    """The same call, with one backend asked for while it runs."""
    if backend is None:
        return call

    def run(*arguments: object) -> T:
        with rf.backend(backend):
            return call(*arguments)

    return run


def _parser(description: str | None) -> argparse.ArgumentParser:
    result = parser(description, seconds=2)
    result.add_argument("--model", default="resnet50", choices=networks.NAMES)
    result.add_argument("--size", type=int, default=224, help="height and width of the images")
    result.add_argument("--batch", type=int, default=8)
    result.add_argument("--mode", type=choices("forward", "backward"), default="forward,backward")
    result.add_argument("--dtype", type=choices(*verify.DTYPES), default="float32,bfloat16")
    result.add_argument(
        "--providers", type=choices(*PROVIDERS), default="eager,compile,fused",
        help=f"of {', '.join(PROVIDERS)}; default: %(default)s; eager always takes part",
    )  # fmt: skip
    result.add_argument(
        "--match", default="", help='only layers with this in their description, e.g. "training"'
    )
    result.add_argument("--limit", type=int, help="stop after this many layers")
    return result
