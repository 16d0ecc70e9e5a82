"""Activation bytes that fusion saves, counted from shapes; nothing is computed."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.conversion.clone import HOOK_TABLES, clone_modules
from resnet_fused.conversion.fuse import restore_classes
from resnet_fused.conversion.links import Link
from resnet_fused.conversion.roles import Roles


class Traffic(NamedTuple):
    """Activation bytes per image that one inference reads and writes: unfused, fused, in chains."""

    before: int
    after: int
    chained: int


class _Sizes(NamedTuple):
    """Elements per image that a layer reads and writes."""

    read: int
    written: int


def inference_traffic(
    model: nn.Module, places: dict[str, Roles], links: dict[str, Link], example_input: Tensor
) -> dict[str, Traffic]:
    """Traffic of the residual blocks (and stems) at these paths, for one image of `example_input`.

    example_input: (N, C, H, W) as the model takes it; only its shape and dtype are used.
    Convolutions read their input and write their output once; batch norm and ReLU each read and
    write, the add reads twice and writes. Fused, only the convolutions and the residual are left,
    with pre-activation also the first batch norm and the add, in a pass each.
    In chains, `links` by path, nothing is left of what stands between layers that run at once.
    Weights are not counted. Raises ValueError if the model does not run on such an input.
    """
    sizes = _dry_run(model, [_layers(path, roles) for path, roles in places.items()], example_input)
    return {
        path: _traffic(path, roles, links.get(path), sizes, example_input.element_size())
        for path, roles in places.items()
        if all(layer in sizes for layer in _layers(path, roles))
    }


def _traffic(
    path: str, roles: Roles, link: Link | None, sizes: dict[str, _Sizes], item_size: int
) -> Traffic:
    if roles.is_preactivation:
        return _preactivation_traffic(path, roles, sizes, item_size)
    *inner, last = (sizes[_join(path, conv)] for conv in roles.convs)
    convs = sum(size.read + size.written for size in (*inner, last))
    batch_norm = relu = 2
    add, residual = 3, 1
    before = convs + sum((batch_norm + relu) * size.written for size in (*inner, last))
    after = convs
    if roles.pattern != "ResNet":
        before += add * last.written
        after += residual * last.written
    if roles.shortcut is not None:
        shortcut = sizes[_join(path, roles.shortcut)]
        before += shortcut.read + shortcut.written + batch_norm * shortcut.written
        after += shortcut.read + shortcut.written
    chained = after
    if link is not None and link.text:
        kept = roles.convs[1] if roles.shortcut is None else roles.shortcut
        chained -= 2 * sizes[_join(path, kept)].written
    if link is not None and link.is_rolled_into:
        chained -= inner[0].read
    return Traffic(before * item_size, after * item_size, chained * item_size)


def _preactivation_traffic(
    path: str, roles: Roles, sizes: dict[str, _Sizes], item_size: int
) -> Traffic:
    """Fused, the first batch norm is one pass with its ReLU, and the add a pass of its own."""
    layers = [sizes[layer] for layer in _layers(path, roles)]
    main = layers[: len(roles.convs)]
    convs_and_add = sum(size.read + size.written for size in layers) + 3 * main[-1].written
    before = convs_and_add + sum(4 * size.read for size in main)
    after = convs_and_add + 2 * main[0].read
    return Traffic(before * item_size, after * item_size, after * item_size)


def _layers(path: str, roles: Roles) -> list[str]:
    names = [*roles.convs] + ([roles.shortcut] if roles.shortcut is not None else [])
    return [_join(path, name) for name in names]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _dry_run(
    model: nn.Module, layers: Sequence[Sequence[str]], example_input: Tensor
) -> dict[str, _Sizes]:
    stand_in = restore_classes(clone_modules(model)).eval()
    for module in stand_in.modules():
        _move_to_meta(module)
        for table in HOOK_TABLES:
            if table in vars(module):
                setattr(module, table, OrderedDict())
    sizes: dict[str, _Sizes] = {}
    for path in {layer for block in layers for layer in block}:
        stand_in.get_submodule(path).register_forward_hook(_recorder(sizes, path))
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
    return sizes


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
        images = max(output.shape[0], 1)
        sizes[path] = _Sizes(inputs[0].numel() // images, output.numel() // images)

    return record
