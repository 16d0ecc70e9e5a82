"""On what a block runs, here and now: backend, convolutions, dtype, layout."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from resnet_fused import backends, direct, models, onednn
from resnet_fused.conversion.layers import is_conv
from resnet_fused.conversion.program import Program
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.survey import Finding
from resnet_fused.conversion.swap import parts_of
from resnet_fused.nn.pairs import as_pair

EAGER = "PyTorch"
_CONVERTING = (models.ResNet, models.CifarResNet, models.PreActCifarResNet)


class RuntimePath(NamedTuple):
    """How a block runs on the device and in the dtype of its parameters.

    backend: what computes batch norm, add and ReLU where no convolution takes them along; "PyTorch"
    for blocks that are left alone. convolutions: what convolves in inference ("direct" and
    "oneDNN" on CPUs, "cuDNN" or a backend on GPUs, else "PyTorch"), "" where there are none; in
    training PyTorch does. Both are "" on the meta device, where nothing is computed. dtype: of the
    parameters, "mixed" if there are several, "" if there are none. layout: "channels_last" where
    the network converts its input, else "as its input". device: type of the parameters' device.
    problem: why the backend that was asked for cannot run, "" if it can.
    """

    backend: str
    convolutions: str
    dtype: str
    layout: str
    device: str
    problem: str = ""


def runtime_paths(model: nn.Module, findings: Sequence[Finding]) -> list[RuntimePath]:
    """Of each finding in `model`. Autocast is not looked at."""
    converting = [f.path for f in findings if f.roles is not None and f.roles.pattern == "ResNet"]
    converting += [path for path, m in model.named_modules() if isinstance(m, _CONVERTING)]
    return [_path(finding, converting) for finding in findings]


def _path(finding: Finding, converting: Sequence[str]) -> RuntimePath:
    layers = [*_layers(finding)]
    tensors = [t for layer in layers for t in _tensors(layer)]
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else "mixed" if dtypes else ""
    device = tensors[0].device.type if tensors else "cpu"
    path = RuntimePath(EAGER, "", dtype, "as its input", device)
    if any(finding.path == outer or f"{finding.path}.".startswith(outer) for outer in converting):
        path = path._replace(layout="channels_last")
    if device == "meta":
        return path._replace(backend="")
    convs = [layer for layer in layers if is_conv(layer)]
    if finding.recipe is None:
        return path._replace(convolutions=EAGER if convs else "")
    # The convolution's dtype is that of the activations.
    computed = convs[0].weight.dtype if convs else tensors[0].dtype if tensors else torch.float32
    assert isinstance(computed, torch.dtype)
    try:
        backend = backends.chosen("bn_relu", device, computed)
    except RuntimeError as error:
        return path._replace(backend=EAGER, convolutions=EAGER, problem=str(error))
    convolutions = _convolutions(finding, convs, device, computed) if convs else ""
    return path._replace(backend=backend, convolutions=convolutions)


def _convolutions(
    finding: Finding, convs: Sequence[nn.Module], device: str, dtype: torch.dtype
) -> str:
    if not backends.is_implemented("conv_bn_relu"):
        return EAGER
    try:
        name = backends.chosen("conv_bn_relu", device, dtype)
    except RuntimeError:
        return EAGER
    if name == "reference" and device == "cuda" and torch.backends.cudnn.is_available():
        return "cuDNN"
    if name == "reference":
        return EAGER
    if name != "cpu":
        return name
    if not onednn.runs(dtype, elements=1):
        return EAGER
    return "direct" if _is_direct(finding, convs, dtype) else "oneDNN"


def _is_direct(finding: Finding, convs: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Whether an inference plan of direct convolutions is made for a whole block, or a stem."""
    roles = finding.roles
    if roles is None or roles.is_preactivation or not direct.runs(dtype):
        return False
    if roles.shortcut is not None and as_pair(parts_of(finding.module, roles)[1]) is None:
        return False
    is_stem = roles.pattern == "ResNet"
    plain = (cast(nn.Conv2d, conv) for conv in convs)
    return all(direct.takes(conv.weight, conv.groups, is_stem) for conv in plain)


def _layers(finding: Finding) -> Iterator[nn.Module]:
    """The convolutions and batch norms that are computed; of what is left alone, everything."""
    module, recipe = finding.module, finding.recipe
    if isinstance(recipe, Program):
        for step in recipe.steps:
            yield from (module.get_submodule(p) for p in (step.conv, step.norm) if p is not None)
    elif isinstance(recipe, Roles):
        yield from (module.get_submodule(path) for path in recipe.layers)
        if recipe.shortcut is not None:
            yield from module.get_submodule(recipe.shortcut).modules()
    else:
        yield from module.modules()


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    for tensor in (*layer._parameters.values(), *layer._buffers.values()):
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            yield tensor
