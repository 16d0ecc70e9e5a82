"""A residual block in inference on a CPU: everything derived from its parameters, kept ready.

Between two convolutions the caches are full of activations, and interpreter code runs several times
slower than usual. A plan is checked once per call of its block, and then one native call runs the
convolutions of any number of blocks.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resnet_fused import backends, onednn
from resnet_fused.fingerprint import fingerprint
from resnet_fused.layout import memory_format
from resnet_fused.nn.pairs import Pair, calls_are_plain, fold, hooks_of, uses_batch


def run(blocks: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """The output of `blocks`, one after the other, by their plans.

    None, and nothing done, where one of them has no plan or its plan does not apply any more.
    """
    # Before the plans are looked up: a graph must not depend on which blocks have one.
    if not _applies(x):
        return None
    plans = [_plans.get(block) for block in blocks]
    x, current = x.to(_dtype(x)), []
    for block, plan in zip(blocks, plans, strict=True):
        if plan is None:
            return None
        if not plan.is_current():
            _plans.pop(block, None)  # another thread may have done so
            return None
        current.append(plan)
    shape, packed = tuple(x.shape), []
    for plan in current:
        packed.append(plan.packed(shape, x.dtype))
        shape = packed[-1].out_shape
    with torch._C._AutoDispatchBelowAutograd():
        return onednn.residual_blocks(x, packed)


def make_plan(block: nn.Module, x: Tensor, pairs: Sequence[Pair], has_projection: bool) -> None:
    """Keep a plan for `block`, which computes what `pairs` say, if it can run on tensors like x.

    pairs: a convolution and a normalisation each, in order; the projection of the shortcut last.
    """
    tensors = [t for pair in pairs for module in pair for t in module.state_dict().values()]
    last, _ = pairs[-2 if has_projection else -1]
    if (
        _applies(x)
        and last.groups == 1  # oneDNN does not fuse the sum into grouped convolutions
        and not any(uses_batch(bn) for _, bn in pairs)
        and not any(t.is_inference() for t in tensors)  # no version counter to go by
    ):
        _plans[block] = _Plan(block, pairs, has_projection)


def _applies(x: Tensor) -> bool:
    """Whether plans are exact for x, here and now."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dim() == 4
        and memory_format(x) is torch.channels_last
        and x.is_contiguous(memory_format=torch.channels_last)
        and onednn.runs(_dtype(x), x.numel())
        and backends.choose("conv_bn_relu", x) is onednn.conv_bn_relu
        and calls_are_plain()
    )


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x computes in."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


class _Plan:
    def __init__(self, block: nn.Module, pairs: Sequence[Pair], has_projection: bool) -> None:
        self._pairs = tuple(pairs)
        self._has_projection = has_projection
        self._settings = self._current_settings()
        inner = [module for module in block.modules() if module is not block]
        self._children = [
            (module._modules, tuple(module._modules.values()))
            for module in (block, *inner)
            if module._modules
        ]
        self._hooks = [hooks for module in inner for hooks in hooks_of(module)]
        self._attributes = [module.__dict__ for module in inner]
        self._watched = [
            (named, name, tensor, None if tensor is None else tensor._version)
            for pair in pairs
            for module in pair
            for named in (module._parameters, module._buffers)
            for name, tensor in named.items()
            if name != "num_batches_tracked"
        ]
        self._tensors = [tensor for _, _, tensor, _ in self._watched if tensor is not None]
        self._fingerprint = fingerprint(self._tensors)
        self._packed: dict[tuple[tuple[int, ...], torch.dtype], onednn.PackedBlock] = {}

    def is_current(self) -> bool:
        """Whether calling the block would compute what the plan was made from."""
        for modules, children in self._children:
            if tuple(modules.values()) != children:
                return False
        for named, name, tensor, version in self._watched:
            if named.get(name) is not tensor:
                return False
            if tensor is not None and tensor._version != version:
                return False
        return (
            not any(self._hooks)
            and not any("forward" in attributes for attributes in self._attributes)
            and self._current_settings() == self._settings
            and fingerprint(self._tensors) == self._fingerprint
        )

    def packed(self, x_shape: tuple[int, ...], dtype: torch.dtype) -> onednn.PackedBlock:
        """The block for inputs of this shape and dtype, packed when first asked for."""
        key = (x_shape, dtype)
        packed = self._packed.get(key)
        if packed is None:
            if len(self._packed) >= onednn.SHAPES_KEPT:
                oldest, *_ = self._packed
                self._packed.pop(oldest, None)
            packed = self._packed[key] = onednn.pack_block(
                *(x_shape, dtype, self._convolutions(), self._has_projection)
            )
        return packed

    def _convolutions(self) -> list[onednn.Convolution]:
        return [
            onednn.Convolution(
                *(conv.weight, *fold(conv, bn)),
                (conv.padding, conv.stride, conv.dilation, conv.groups),  # type: ignore[arg-type]
            )
            for conv, bn in self._pairs
        ]

    def _current_settings(self) -> list[tuple[object, ...]]:
        """What the block computes depends on, besides tensors."""
        return [
            (
                *(conv.__class__, conv.stride, conv.padding, conv.dilation, conv.groups),
                *(conv.padding_mode, bn.__class__, bn.training, bn.eps),
            )
            for conv, bn in self._pairs
        ]


_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()
