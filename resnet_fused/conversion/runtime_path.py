"""On what a block runs, here and now: backend, convolutions, dtype, layout."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from resnet_fused import backends, direct, models, onednn
from resnet_fused.conversion.program import Program
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.survey import Finding
from resnet_fused.conversion.swap import parts_of
from resnet_fused.nn.pairs import as_pair

EAGER = "PyTorch"
_CONVERTING = (models.ResNet, models.CifarResNet, models.PreActCifarResNet)


class RuntimePath(NamedTuple):
    """How a block runs on the device and in the dtype of its parameters.

    backend: what computes batch norm, add and ReLU if no convolution takes them along; "PyTorch"
    where no kernel of this library runs. convolutions: what convolves channels_last tensors in
    inference ("direct" and "oneDNN" on CPUs, "cuDNN" or a backend on GPUs, else "PyTorch"), "" if
    there are none; in training PyTorch does. Both are "" on the meta device. dtype: of the
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
    converting = [f.path for f in findings if _is_network(f)]
    converting += [path for path, m in model.named_modules() if isinstance(m, _CONVERTING)]
    direct_paths = _direct_paths(findings, converting)
    return [
        _path(
            finding,
            converts=any(_is_in(finding.path, outer) for outer in converting),
            is_direct=finding.path in direct_paths,
        )
        for finding in findings
    ]


def _path(finding: Finding, converts: bool, is_direct: bool) -> RuntimePath:
    layers = [*_layers(finding)]
    # An add has no layer of its own: it is where the rest of the module is.
    tensors = _tensors(layers) or _tensors(finding.module.modules())
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else "mixed" if dtypes else ""
    device = tensors[0].device.type if tensors else "cpu"
    layout = "channels_last" if converts else "as its input"
    convs = [layer.weight for layer in layers if isinstance(layer, nn.Conv2d)]
    eager = RuntimePath(EAGER, EAGER if convs else "", dtype, layout, device)
    if device == "meta":
        return eager._replace(backend="", convolutions="")
    if finding.recipe is None:
        return eager
    # Activations have the dtype of the convolutions.
    like = convs[0] if convs else tensors[0] if tensors else torch.empty(0)
    try:
        backend = backends.chosen("bn_relu", device, like.dtype)
    except RuntimeError as error:
        return eager._replace(problem=str(error))
    if not backends.is_accelerated("bn_relu", like):
        return eager
    convolutions = _convolutions(device, like.dtype, is_direct) if convs else ""
    return eager._replace(backend=backend, convolutions=convolutions)


def _convolutions(device: str, dtype: torch.dtype, is_direct: bool) -> str:
    try:
        name = backends.chosen("conv_bn_relu", device, dtype)
    except RuntimeError:
        return EAGER
    if name == "reference" and device == "cuda" and torch.backends.cudnn.is_available():
        return "cuDNN"
    if name == "reference" or (name == "cpu" and not onednn.runs(dtype, elements=1)):
        return EAGER
    if name == "cpu":
        return "direct" if is_direct else "oneDNN"
    return name


def _direct_paths(findings: Sequence[Finding], networks: Sequence[str]) -> set[str]:
    """Where inference plans are of direct convolutions."""
    able = {f.path for f in findings if _has_plan(f) and _takes_direct(f)}
    for network in networks:
        blocks = [f for f in findings if _is_in(f.path, network) and not _is_network(f)]
        stem = [f for f in findings if f.path == network and _is_network(f)]
        are_one = all(map(_has_plan, blocks))
        if are_one and able.issuperset(f.path for f in blocks):
            able |= {f.path for f in stem if _takes_direct(f)}
        elif are_one:
            # One call runs all of them, and in one way.
            able -= {f.path for f in blocks}
    return able


def _has_plan(finding: Finding) -> bool:
    """Whether the block gets an inference plan, whatever it holds."""
    roles = finding.roles
    if roles is None or roles.is_preactivation or _is_network(finding):
        return False
    pairs, shortcut = parts_of(finding.module, roles)
    is_grouped = cast(nn.Conv2d, pairs[-1][0]).groups > 1
    return not is_grouped and (shortcut is None or as_pair(shortcut) is not None)


def _takes_direct(finding: Finding) -> bool:
    convs = [layer for layer in _layers(finding) if isinstance(layer, nn.Conv2d)]
    is_stem = _is_network(finding)
    return all(
        direct.runs(conv.weight.dtype) and direct.takes(conv.weight, conv.groups, is_stem)
        for conv in convs
    )


def _is_network(finding: Finding) -> bool:
    return finding.roles is not None and finding.roles.pattern == "ResNet"


def _is_in(path: str, outer: str) -> bool:
    return path == outer or not outer or path.startswith(f"{outer}.")


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


def _tensors(layers: Iterable[nn.Module]) -> list[Tensor]:
    return [
        tensor
        for layer in layers
        for tensor in (*layer._parameters.values(), *layer._buffers.values())
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex())
    ]
