"""Activation bytes that fusion saves, counted from shapes; nothing is computed."""

import copy
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.conversion.clone import HOOK_TABLES, clone_modules
from resnet_fused.conversion.fuse import restore_classes
from resnet_fused.conversion.layers import norm_includes_relu
from resnet_fused.conversion.links import Link
from resnet_fused.conversion.program import Program, compiled
from resnet_fused.conversion.roles import Roles
from resnet_fused.conversion.stand_ins import join
from resnet_fused.conversion.survey import Finding
from resnet_fused.conversion.swap import parts_of
from resnet_fused.nn import graph_steps
from resnet_fused.nn.pairs import as_pair, is_plain_conv


class Traffic(NamedTuple):
    """Activation bytes per image that one inference reads and writes: unfused, fused, in chains."""

    before: int
    after: int
    chained: int


class _Sizes(NamedTuple):
    """Elements that the calls of a module read and write."""

    read: int
    written: int


class _Counts(NamedTuple):
    """Elements read and written, unfused and fused."""

    before: int
    after: int

    def plus(self, other: "_Counts") -> "_Counts":
        return _Counts(self.before + other.before, self.after + other.after)


def inference_traffic(
    model: nn.Module,
    findings: Sequence[Finding],
    links: Mapping[str, Link],
    example_input: Tensor,
) -> dict[str, Traffic]:
    """By path, the traffic of what is or can be fused, for one image of `example_input`.

    example_input: (N, C, H, W) as the model takes it; only its shape and dtype are used.
    Convolutions read their input and write their output once; batch norm and ReLU each read and
    write, the add reads twice and writes, max pooling reads all and writes the pooled output.
    Fused, the convolutions and poolings are left and a read of the residual; of a group without a
    convolution a read and a write, and the residual; with pre-activation the first batch norm and
    the add, in a pass each. In chains, `links` by path, nothing is left of what stands between
    layers that run at once. Weights are not counted, and nothing else that a block calls (squeeze
    and excitation, average pooling, other shortcuts): it costs the same before and after. What
    the forward does not reach has no entry. Raises ValueError if the model does not run on such an
    input.
    """
    blocks = {f.path: (f.roles, _layers(f.module, f.roles)) for f in findings if f.roles}
    programs = {f.path: f.recipe for f in findings if isinstance(f.recipe, Program)}
    places = {join(path, layer) for path, (_, layers) in blocks.items() for layer in layers}
    sizes, counts = _dry_run(model, places, programs, example_input)
    item_size, images = example_input.element_size(), max(*example_input.shape[:1], 1)
    elements = {path: Traffic(*count, count.after) for path, count in counts.items()}
    for path, (roles, layers) in blocks.items():
        if all(join(path, layer) in sizes for layer in layers):
            known = {layer: sizes[join(path, layer)] for layer in layers}
            elements[path] = _roles_traffic(roles, known, links.get(path))
    return {
        path: Traffic(*(count * item_size // images for count in counted))
        for path, counted in elements.items()
    }


def _layers(module: nn.Module, roles: Roles) -> tuple[str, ...]:
    """Paths of the convolutions that are computed with the block, and of a stem's pooling."""
    if roles.pattern == "ResNet":
        return (*roles.convs, "maxpool")
    if roles.projection is not None:
        return (*roles.convs, roles.projection[0])
    if roles.shortcut is None:
        return roles.convs
    _, shortcut = parts_of(module, roles)
    if roles.is_preactivation:
        is_part = isinstance(shortcut, nn.Module) and is_plain_conv(shortcut)
        return (*roles.convs, roles.shortcut) if is_part else roles.convs
    is_part = as_pair(shortcut) is not None
    return (*roles.convs, f"{roles.shortcut}.0") if is_part else roles.convs


def _roles_traffic(roles: Roles, sizes: Mapping[str, _Sizes], link: Link | None) -> Traffic:
    """sizes: of the layers that `_layers` names."""
    main = [sizes[conv] for conv in roles.convs]
    beside = [size for name, size in sizes.items() if name not in roles.convs]
    if roles.is_preactivation:
        count = _preactivation_count(main, beside)
        return Traffic(*count, count.after)
    if roles.pattern == "ResNet":
        count = _group(main[0], norm=True, relu=True, pooled=beside[0].written)
        return Traffic(*count, count.after)
    count = _Counts(0, 0)
    for conv in main[:-1]:
        count = count.plus(_group(conv, norm=True, relu=True))
    count = count.plus(_group(main[-1], norm=True, add=True, relu=True))
    for conv in beside:
        count = count.plus(_group(conv, norm=True))
    chained = count.after
    if link is not None and link.text:
        chained -= 2 * (beside[0] if beside else main[1]).written
    if link is not None and link.is_rolled_into:
        chained -= main[0].read
    return Traffic(*count, chained)


def _group(
    conv: _Sizes | None = None,
    norm: bool = False,
    add: bool = False,
    relu: bool = False,
    written: int = 0,
    pooled: int | None = None,
) -> _Counts:
    """Of layers that become one. written: elements of the result, where there is no convolution."""
    if conv is not None:
        written = conv.written
    convolved = 0 if conv is None else conv.read + written
    pooling = 0 if pooled is None else written + pooled
    before = convolved + (2 * norm + 3 * add + 2 * relu) * written + pooling
    after = (convolved or 2 * written) + add * written + pooling
    return _Counts(before, after)


def _preactivation_count(main: Sequence[_Sizes], beside: Sequence[_Sizes]) -> _Counts:
    """Fused, the first batch norm is one pass with its ReLU, and the add a pass of its own."""
    convs_and_add = sum(map(sum, (*main, *beside))) + 3 * main[-1].written
    before = convs_and_add + sum(4 * size.read for size in main)
    return _Counts(before, convs_and_add + 2 * main[0].read)


def _dry_run(
    model: nn.Module, places: set[str], programs: Mapping[str, Program], example_input: Tensor
) -> tuple[dict[str, _Sizes], dict[str, _Counts]]:
    """Sizes of the modules at `places`, and counts of the programs, by path."""
    stand_in = _copied_scripts(restore_classes(clone_modules(model))).eval()
    for module in stand_in.modules():
        _move_to_meta(module)
        for table in HOOK_TABLES:
            if table in vars(module):
                setattr(module, table, OrderedDict())
    sizes: dict[str, _Sizes] = defaultdict(lambda: _Sizes(0, 0))
    counts: dict[str, _Counts] = {}
    for path in places:
        stand_in.get_submodule(path).register_forward_hook(_recorder(sizes, path))
    for path, program in programs.items():
        _count_steps(stand_in.get_submodule(path), program, counts, path)
    x = torch.empty_like(example_input, device="meta", requires_grad=False)
    try:
        with torch.no_grad():
            stand_in(x)
    except Exception as error:  # the model is arbitrary code
        raise ValueError(
            f"explain: example_input must be an input of the model, got shape "
            f"{tuple(example_input.shape)}, on which its dry run fails "
            f"({type(error).__name__}: {str(error).strip()})"
        ) from error
    return sizes, counts


def _copied_scripts(module: nn.Module) -> nn.Module:
    """The module without a TorchScript module of the user's, which clones have in common."""
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module)
    for parent in [*module.modules()]:
        for name, child in parent._modules.items():
            if isinstance(child, torch.jit.ScriptModule):
                parent._modules[name] = copy.deepcopy(child)
    return module


def _move_to_meta(module: nn.Module) -> None:
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    for table in tables:
        for name, tensor in table.items():
            if isinstance(tensor, Tensor):
                meta = torch.empty_like(tensor, device="meta", requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(meta, requires_grad=False) if is_parameter else meta


def _recorder(
    sizes: dict[str, _Sizes], path: str
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        read, written = sizes[path]
        sizes[path] = _Sizes(read + inputs[0].numel(), written + output.numel())

    return record


def _count_steps(
    module: nn.Module, program: Program, counts: dict[str, _Counts], path: str
) -> None:
    """Let the module run the program with counting steps, where its fused class would run it."""
    counter, original, function = _StepCounter(counts, path), module.forward, compiled(program)
    steps: dict[object, object] = {
        getattr(graph_steps, name): getattr(counter, name) for name in STEPS
    }
    names = {
        name: steps.get(value, value) if callable(value) else value
        for name, value in function.__globals__.items()
    }
    run = types.FunctionType(function.__code__, names)

    def forward(*args: Any, **kwargs: Any) -> Any:
        is_proven = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        return run(module, *args) if is_proven else original(*args, **kwargs)

    module.forward = forward


STEPS = ("conv_bn_relu", "conv_bn_relu_max_pool", "bn_relu", "add_relu")


class _StepCounter:
    """The functions of `graph_steps` for shapes alone."""

    def __init__(self, counts: dict[str, _Counts], path: str) -> None:
        self._counts, self._path = counts, path

    def conv_bn_relu(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module,
        residual: Tensor | None = None,
        relu: bool = True,
        how: str = "",
    ) -> Tensor:
        out: Tensor = bn(conv(x))
        sizes, add = _Sizes(x.numel(), out.numel()), residual is not None
        self._note(_group(sizes, norm=True, add=add, relu=relu or norm_includes_relu(bn)))
        return out if residual is None else out + residual

    def conv_bn_relu_max_pool(
        self, x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module, relu: bool = True
    ) -> Tensor:
        out: Tensor = bn(conv(x))
        pooled: Tensor = pool(out)
        sizes = _Sizes(x.numel(), out.numel())
        self._note(_group(sizes, norm=True, relu=True, pooled=pooled.numel()))
        return pooled

    def bn_relu(
        self,
        x: Tensor,
        bn: nn.Module,
        residual: Tensor | None = None,
        relu: bool = True,
        how: str = "",
    ) -> Tensor:
        out: Tensor = bn(x)
        add, relu = residual is not None, relu or norm_includes_relu(bn)
        self._note(_group(norm=True, add=add, relu=relu, written=out.numel()))
        return out if residual is None else out + residual

    def add_relu(self, x: Tensor, residual: Tensor, how: str = "") -> Tensor:
        out = x + residual
        self._note(_group(add=True, relu=True, written=out.numel()))
        return out

    def _note(self, count: _Counts) -> None:
        self._counts[self._path] = self._counts.get(self._path, _Counts(0, 0)).plus(count)
