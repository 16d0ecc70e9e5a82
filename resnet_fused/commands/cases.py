"""The operators of a network, one case per distinct layer shape, compared with float64."""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import ops
from resnet_fused.commands.console import CommandError
from resnet_fused.commands.numerics import Check, Subject, check
from resnet_fused.nn.pairs import pair_of

EPS = 1e-5
MOMENTUM = 0.1
OPERATORS = ("conv_bn_relu", "bn_relu", "bn_relu_max_pool", "add_relu")


class ConvShape(NamedTuple):
    """A convolution as it occurs in a network: input shape, weight shape and geometry."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class PoolShape(NamedTuple):
    """A pooling as it occurs in a network: input shape and windows."""

    x: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


class Shapes(NamedTuple):
    """The distinct shapes of a network's layers, in the order of the forward pass.

    sums: those of `activations` in which blocks end, where a residual is added.
    """

    convolutions: list[ConvShape]
    activations: list[tuple[int, ...]]
    sums: list[tuple[int, ...]]
    poolings: list[PoolShape]


class Case(NamedTuple):
    """One operator on one shape.

    fused(*tensors) is the operator; before_relu(*tensors) is plain PyTorch up to the last ReLU, in
    any dtype. `updated` tensors are changed in place by both; the others get gradients, unless the
    operator is for inference alone.
    """

    operator: str
    label: str
    fused: Callable[..., Tensor]
    before_relu: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    updated: tuple[str, ...] = ()
    inference: bool = False


def layer_shapes(model: nn.Module, images: Tensor) -> Shapes:
    """Shapes seen by the convolutions and batch norms of an eager model for these images.

    Both may be on the device "meta".
    """
    convolutions: dict[ConvShape, None] = {}
    activations: dict[tuple[int, ...], None] = {}
    sums: dict[tuple[int, ...], None] = {}
    poolings: dict[PoolShape, None] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if hasattr(module, "downsample"):
            sums[tuple(output.shape)] = None
            return
        if isinstance(module, nn.Conv2d):
            shape = ConvShape(
                tuple(inputs[0].shape),
                tuple(module.weight.shape),
                module.stride,
                _explicit(module.padding),
                module.dilation,
                module.groups,
            )
            convolutions[shape] = None
        elif isinstance(module, nn.MaxPool2d):
            sizes = module.kernel_size, module.stride, module.padding
            poolings[PoolShape(tuple(inputs[0].shape), *map(pair_of, sizes))] = None
        else:
            activations[tuple(output.shape)] = None

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d)
        or hasattr(module, "downsample")
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return Shapes(list(convolutions), list(activations), list(sums), list(poolings))


def _explicit(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(padding, str):
        raise CommandError(f"convolutions with padding={padding!r} are not supported here")
    return padding


def cases(
    shapes: Shapes,
    dtype: torch.dtype,
    device: torch.device,
    operators: Collection[str] = OPERATORS,
) -> Iterator[Case]:
    """These operators on every shape that they would meet; the same random inputs each time."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        value = torch.randn(shape, generator=generator, device=device).to(dtype)
        return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value

    for conv in shapes.convolutions if "conv_bn_relu" in operators else ():
        yield from _conv_cases(conv, random)
    for shape in shapes.activations:
        if "bn_relu" in operators:
            yield from _bn_cases(shape, random)
        if "add_relu" in operators:
            tensors = {"x": random(*shape), "residual": random(*shape)}
            yield Case("add_relu", _label(shape), ops.add_relu, torch.add, tensors)
    for pooling in shapes.poolings if "bn_relu_max_pool" in operators else ():
        yield from _pool_cases(pooling, random)


def run_case(case: Case, dtype: torch.dtype) -> list[Check]:
    """Compare output, updated tensors and every gradient of one case."""
    actual, eager = _copies(case), _copies(case)
    exact = {name: value.double() for name, value in _copies(case).items()}
    for tensors in (actual, eager, exact):
        for name, tensor in tensors.items():
            tensor.requires_grad_(not (case.inference or name in case.updated))
    out = case.fused(*actual.values())
    eager_out = torch.relu(case.before_relu(*eager.values()))
    exact_total = case.before_relu(*exact.values())
    subject = Subject(case.operator, case.label, dtype)
    checks = [check(subject, "out", out.detach(), eager_out.detach(), exact_total.detach().relu())]
    checks += [
        check(subject, name, actual[name], eager[name], exact[name]) for name in case.updated
    ]
    if case.inference:
        return checks
    generator = torch.Generator(out.device).manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, device=out.device).to(out)
    grads = _gradients(out, actual, grad_out)
    eager_grads = _gradients(eager_out, eager, grad_out)
    # A sum within one rounding of zero has a sign that rounding decides: each implementation is
    # compared with the exact gradient for its own signs, which the check of "out" has judged.
    exact_grads = [
        _gradients(exact_total, exact, grad_out.double() * (mask > 0), retain_graph=True)
        for mask in (out, eager_out)
    ]
    checks += [
        check(
            subject, f"grad_{name}", grad, eager_grads[name], exact_grads[0][name],
            exact_grads[1][name],
        )
        for name, grad in grads.items()
    ]  # fmt: skip
    return checks


def _conv_cases(conv: ConvShape, random: Callable[..., Tensor]) -> Iterator[Case]:
    fan_in = conv.weight[1] * conv.weight[2] * conv.weight[3]
    weight = random(*conv.weight) * fan_in**-0.5
    channels = conv.weight[0]
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    float32 = torch.float32
    tensors = {
        "x": random(*conv.x),
        "weight": weight,
        "scale": 1 + 0.1 * random(channels, dtype=float32),
        "shift": random(channels, dtype=float32),
    }

    def fused(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        return ops.conv_bn_relu(x, weight, scale, shift, residual, True, *geometry)

    def plain(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        y = scaled(F.conv2d(x, weight, None, *geometry), scale, shift)
        return y if residual is None else y + residual

    kernel = "x".join(map(str, conv.weight[2:]))
    label = f"{_label(conv.x)} -> {channels}, {kernel}/{conv.stride[0]}"
    if conv.groups > 1:
        label += f", groups {conv.groups}"
    yield Case("conv_bn_relu", label, fused, plain, tensors)
    with torch.no_grad():
        out_shape = F.conv2d(tensors["x"][:1], weight, None, *geometry).shape
    residual = random(conv.x[0], *out_shape[1:])
    with_residual = {**tensors, "residual": residual}
    yield Case("conv_bn_relu", label + ", residual", fused, plain, with_residual)


def scaled(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Eager's y * scale + shift, rounded once: its batch norm in evaluation."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    # F.batch_norm refuses eps=0 in torch 2.11.
    return torch.batch_norm(
        y, scale, shift, zero, one, False, 0.0, 0.0, torch.backends.cudnn.enabled
    )


def _normalised(shape: tuple[int, ...], random: Callable[..., Tensor]) -> dict[str, Tensor]:
    """x, and the tensors of its batch norm."""
    return {"x": random(*shape) * 2 + 1, **_batch_norm_tensors(shape[1], random)}


def _batch_norm_tensors(channels: int, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    weight, bias, mean = (random(channels, dtype=torch.float32) for _ in range(3))
    running = {"running_mean": mean, "running_var": 1 + mean.abs()}
    return {"weight": 1 + 0.1 * weight, "bias": bias, **running}


def _bn_cases(shape: tuple[int, ...], random: Callable[..., Tensor]) -> Iterator[Case]:
    plain = _normalised(shape, random)
    residual = {**plain, "residual": random(*shape)}
    other = _batch_norm_tensors(shape[1], random)
    dual = {**residual, **{f"residual_{name}": tensor for name, tensor in other.items()}}
    variants = [("", plain), (", residual", residual), (", residual with batch norm", dual)]
    for training in (True, False):
        for suffix, tensors in variants:
            label = f"{_label(shape)}, {'training' if training else 'eval'}{suffix}"
            statistics = tuple(name for name in tensors if "running" in name)
            yield Case(
                "bn_relu", label, _fused_bn(training), _plain_bn(training), tensors, statistics
            )


def _pool_cases(pooling: PoolShape, random: Callable[..., Tensor]) -> Iterator[Case]:
    x_shape, kernel_size, stride, padding = pooling
    tensors = _normalised(x_shape, random)
    running = ("running_mean", "running_var")

    def fused(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        bn = weight, bias, mean, var, True, MOMENTUM, EPS
        return ops.bn_relu_max_pool(x, *bn, kernel_size, stride, padding)

    def plain(x: Tensor, *bn: Tensor) -> Tensor:
        # The ReLU behind the pooling leaves the same numbers as in front of it.
        return F.max_pool2d(_batch_norm(x, bn, training=True), kernel_size, stride, padding)

    label = f"{_label(x_shape)}, training, {_label(kernel_size)}/{_label(stride)}"
    yield Case("bn_relu_max_pool", label, fused, plain, tensors, running)


def _fused_bn(training: bool) -> Callable[..., Tensor]:
    def fused(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None = None,
        *residual_bn: Tensor,
    ) -> Tensor:
        return ops.bn_relu(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            training,
            MOMENTUM,
            EPS,
            residual,
            _arguments(residual_bn, training) if residual_bn else None,
        )

    return fused


def _arguments(tensors: tuple[Tensor, ...], training: bool) -> ops.BatchNormArgs:
    weight, bias, mean, var = tensors
    return ops.BatchNormArgs(weight, bias, mean, var, training, MOMENTUM, EPS)


def _plain_bn(training: bool) -> Callable[..., Tensor]:
    def plain(x: Tensor, *tensors: Tensor) -> Tensor:
        total = _batch_norm(x, tensors[:4], training)
        if len(tensors) == 4:
            return total
        residual, residual_bn = tensors[4], tensors[5:]
        if residual_bn:
            residual = _batch_norm(residual, residual_bn, training)
        return total + residual

    return plain


def _batch_norm(x: Tensor, tensors: tuple[Tensor, ...], training: bool) -> Tensor:
    weight, bias, mean, var = tensors
    return F.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS)


def _gradients(
    out: Tensor, tensors: dict[str, Tensor], grad_out: Tensor, retain_graph: bool = False
) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out, retain_graph=retain_graph)
    return dict(zip(wanted, grads, strict=True))


def _copies(case: Case) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in case.tensors.items()}


def _label(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
