"""What the benchmarks of the single operators share: ResNet's layers, providers, bytes."""

import argparse
import copy
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from harness import Harness, Work, choices, parser, skipped
from plot import plot_folder
from roofline import parsed
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused import backends
from resnet_fused.commands import baselines, networks, numerics, verify
from resnet_fused.commands.cases import EPS, MOMENTUM, Case, Shapes, cases, layer_shapes, run_case
from resnet_fused.commands.numerics import Check, Subject, short_name

# "fused" is the operator as it comes; the others of ours are that operator on one backend.
OURS = ("fused", "reference", "cpu", "cuda", "triton")
COMPILED = {"compile": {}, "compile_max_autotune": {"max_autotune": True}}
PROVIDERS = ("eager", *COMPILED, "cudnn", *OURS)
MODES = ("forward", "backward")
# cuDNN's convolution may be wrong by this many times what ours may: it takes weights that the scale
# was folded into, which rounds them once more.
FOLDED_FACTOR = 2.0
T = TypeVar("T")
Find = Callable[[argparse.Namespace, torch.dtype, torch.device], Iterable[Case]]


class Provider(NamedTuple):
    """A function of a case's tensors; backend: the one that it asks for, if any."""

    function: Callable[..., Tensor]
    backend: str | None = None
    modes: tuple[str, ...] = MODES


Build = Callable[[Case, torch.dtype], Provider]


def benchmark(
    operator: str,
    description: str | None,
    moved_bytes: Callable[[Case, str], int],
    flop: Callable[[Case, str], int] | None = None,
    find: Find | None = None,
    others: Mapping[str, Build] = types.MappingProxyType({}),
) -> int:
    """Time one operator on every distinct layer of a network that uses it.

    moved_bytes and flop: of a case and "forward" or "backward", the least that must move through
    memory when nothing fits into the caches, and the multiplications and additions. find: the
    cases, where they are not those of one layer. others: further providers by name; building one
    raises UnavailableError where it does not run.
    """
    arguments = _parser(description, tuple(others)).parse_args()
    harness = Harness(arguments)
    # The first call with a new shape tries what cuDNN has, for every provider that uses it.
    torch.backends.cudnn.benchmark = harness.device.type == "cuda"
    find = find or functools.partial(_layers, operator, _shapes(arguments))
    for dtype in (verify.DTYPES[name] for name in arguments.dtype):
        found = find(arguments, dtype, harness.device)
        chosen = (case for case in found if arguments.match in f"{case.operator} {case.label}")
        for case in itertools.islice(chosen, arguments.limit):
            providers, checks = _checked_providers(case, dtype, arguments.providers)
            providers |= _built(others, case, dtype, arguments.providers)
            modes = ("forward",) if case.inference else arguments.mode
            for mode in modes:
                harness.compare(
                    Work(
                        benchmark=operator,
                        subject=case.operator,
                        mode=mode,
                        dtype=short_name(dtype),
                        shape=case.label,
                        batch=arguments.batch,
                        moved_bytes=moved_bytes(case, mode),
                        flop=flop(case, mode) if flop else None,
                    ),
                    _prepared(providers, case, mode, arguments.providers, tuple(others)),
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


def _layers(
    operator: str,
    shapes: Shapes,
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Case]:
    return (case for case in cases(shapes, dtype, device, (operator,)) if _occurs(case, shapes))


def _built(
    others: Mapping[str, Build], case: Case, dtype: torch.dtype, wanted: list[str]
) -> dict[str, Provider]:
    found = {}
    for name in (name for name in others if name in wanted):
        try:
            found[name] = others[name](case, dtype)
        except baselines.UnavailableError as reason:
            skipped(name, reason)
    return found


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
    """Providers that can run here, except compiled ones, and what was compared of ours."""
    providers = {"eager": Provider(_eager(case))}
    checks: list[Check] = []
    if "cudnn" in wanted:
        try:
            providers["cudnn"] = _cudnn(case, dtype)
        except baselines.UnavailableError as reason:
            skipped("cudnn", reason)
    device_type = next(iter(case.tensors.values())).device.type
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


def _cudnn(case: Case, dtype: torch.dtype) -> Provider:
    """What cuDNN fuses itself, called by its name.

    Raises UnavailableError where it has none, does not run, or computes something else.
    """
    builders = {"bn_relu": _cudnn_batch_norm, "conv_bn_relu": _cudnn_convolution}
    if case.operator not in builders:
        raise baselines.UnavailableError(f"it has nothing for {case.operator} alone")
    need_cudnn(case.tensors["x"])
    try:
        return builders[case.operator](case, dtype)
    except RuntimeError as error:
        raise baselines.UnavailableError(f"cuDNN fails: {error}") from error


def _cudnn_batch_norm(case: Case, dtype: torch.dtype) -> Provider:
    """Batch norm by cuDNN, with PyTorch's sum and ReLU behind it.

    Eager takes this batch norm or PyTorch's own, by a rule that changes from version to version.
    """
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

    for check in run_case(case._replace(fused=cudnn), dtype):
        _refuse_wrong(check, check.allowed)
    return Provider(cudnn)


def _cudnn_convolution(case: Case, dtype: torch.dtype) -> Provider:
    """Convolution, shortcut and ReLU in one call of cuDNN: the strongest baseline in inference.

    The scale is folded into the weight beforehand, as a deployed network has it.
    """
    layer = parsed(case.label)
    if layer is None:
        raise baselines.UnavailableError(f"the geometry of {case.label!r} is not known")
    conv = layer.conv
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    scale = case.tensors["scale"].view(-1, 1, 1, 1)
    folded = (case.tensors["weight"] * scale).to(dtype, memory_format=torch.channels_last)
    bias = case.tensors["shift"].to(dtype)

    def cudnn(x: Tensor, *tensors: Tensor) -> Tensor:
        if layer.residual:
            arguments = x, folded, tensors[3], 1.0, bias, *geometry
            return torch.ops.aten.cudnn_convolution_add_relu(*arguments)
        return torch.ops.aten.cudnn_convolution_relu(x, folded, bias, *geometry)

    refuse_wrong_convolution(case, dtype, cudnn)
    return Provider(cudnn, modes=("forward",))


def need_cudnn(x: Tensor) -> None:
    """Raises UnavailableError where cuDNN does not run on x."""
    if not (x.is_cuda and torch.backends.cudnn.is_available()):
        raise baselines.UnavailableError("there is no cuDNN for these tensors")


def refuse_wrong_convolution(case: Case, dtype: torch.dtype, folded: Callable[..., Tensor]) -> None:
    """Raises UnavailableError where convolutions with folded weights compute something else."""
    with torch.no_grad():
        tensors = case.tensors.values()
        exact = case.before_relu(*(tensor.double() for tensor in tensors)).relu()
        eager = _eager(case)(*tensors)
        subject = Subject(case.operator, case.label, dtype)
        check = numerics.check(subject, "out", folded(*tensors), eager, exact)
    _refuse_wrong(check, FOLDED_FACTOR * check.allowed)


def _refuse_wrong(check: Check, allowed: float) -> None:
    if not check.error <= allowed:
        raise baselines.UnavailableError(
            f"its {check.tensor} is off by {check.error:.1e} where {allowed:.1e} is allowed"
        )


def _prepared(
    providers: dict[str, Provider],
    case: Case,
    mode: str,
    wanted: list[str],
    others: tuple[str, ...] = (),
) -> dict[str, Callable[[], object]]:
    prepare = _forward if mode == "forward" else _backward
    calls = {}
    for name, provider in providers.items():
        if mode not in provider.modes:
            skipped(name, f"it has no {mode} pass of {case.operator}")
            continue
        call = _under(provider.backend, prepare)(provider.function, case)
        calls[name] = _under(provider.backend, call)
    for name, options in COMPILED.items():
        if name not in wanted:
            continue
        try:
            calls[name] = _compiled(prepare, case, options)
        except (baselines.UnavailableError, RuntimeError) as reason:
            skipped(name, reason)
    return {name: calls[name] for name in (*PROVIDERS, *others) if name in calls}


def _compiled(
    prepare: Callable[[Callable[..., Tensor], Case], Callable[[], object]],
    case: Case,
    options: dict[str, bool],
) -> Callable[[], object]:
    baselines.need_compiler(next(iter(case.tensors.values())).device)
    # Each case anew: after some others of the same code, Dynamo would generalise the shapes, and
    # later give up without a word.
    torch._dynamo.reset()
    call = prepare(torch.compile(_eager(case), dynamic=False, options=options), case)
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


def _parser(description: str | None, others: tuple[str, ...]) -> argparse.ArgumentParser:
    result = parser(description, seconds=2)
    result.add_argument("--model", default="resnet50", choices=networks.NAMES)
    result.add_argument("--size", type=int, default=224, help="height and width of the images")
    result.add_argument("--batch", type=int, default=8)
    result.add_argument("--mode", type=choices(*MODES), default="forward,backward")
    result.add_argument("--dtype", type=choices(*verify.DTYPES), default="float32,bfloat16")
    result.add_argument(
        "--providers", type=choices(*PROVIDERS, *others), default="eager,compile,fused",
        help=f"of {', '.join((*PROVIDERS, *others))}; default: %(default)s; eager always runs",
    )  # fmt: skip
    result.add_argument(
        "--match", default="", help='only layers with this in their description, e.g. "training"'
    )
    result.add_argument("--limit", type=int, help="stop after this many layers")
    return result
