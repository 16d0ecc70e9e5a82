"""Operators under torch.vmap: as one batch where images do not meet, else sample by sample."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = torch._ops.OpOverload
Updated = Callable[..., tuple[int, ...]]


def updates_nothing(*args: Any) -> tuple[int, ...]:
    return ()


def rule(
    overload: Operator,
    images: tuple[int, ...],
    updated: Updated,
    info: Any,
    in_dims: tuple[Any, ...],
    *args: Any,
) -> tuple[Any, Any]:
    """For `torch.library.register_vmap`: outputs and which of their dimensions is the mapped one.

    images, updated: see `define`. Raises RuntimeError where samples would write to one tensor.
    """
    mapped = [i for i, d in enumerate(in_dims) if isinstance(d, int)]
    moved = [a.movedim(in_dims[i], 0) if i in mapped else a for i, a in enumerate(args)]
    for position in updated(*args):
        if position not in mapped:
            _refuse_update(overload, position)
    if set(mapped) <= set(images):
        outputs = _as_one_batch(overload, images, info.batch_size, mapped, moved)
    else:
        outputs = _one_by_one(overload, info.batch_size, mapped, moved)
    if isinstance(outputs, tuple):
        return outputs, (0,) * len(outputs)
    return outputs, None if outputs is None else 0


def _refuse_update(overload: Operator, position: int) -> None:
    operator = overload._schema.name.partition("::")[2]
    name = overload._schema.arguments[position].name
    raise RuntimeError(
        f"{operator}: {name} must be mapped by vmap where it is updated, got one for all samples"
        " (map it as well, or do without its update)"
    )


def _as_one_batch(
    overload: Operator, images: tuple[int, ...], samples: int, mapped: list[int], moved: list[Any]
) -> Any:
    n = moved[mapped[0]].size(1)
    for i in images:
        if isinstance(moved[i], Tensor):
            each = moved[i] if i in mapped else moved[i].expand(samples, *moved[i].shape)
            moved[i] = each.flatten(0, 1)
    outputs = overload(*moved)
    if isinstance(outputs, tuple):
        return tuple(output.unflatten(0, (samples, n)) for output in outputs)
    return outputs.unflatten(0, (samples, n))


def _one_by_one(overload: Operator, samples: int, mapped: list[int], moved: list[Any]) -> Any:
    results = [
        overload(*(a[sample] if i in mapped else a for i, a in enumerate(moved)))
        for sample in range(samples)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(each) for each in zip(*results, strict=True))
    return None if results[0] is None else torch.stack(results)
