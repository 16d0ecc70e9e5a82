"""Residual blocks in inference on a CPU: everything derived from their parameters, kept ready.

Between two convolutions the caches are full of activations, and interpreter code runs several times
slower than usual. A plan is checked once per call of its block, and then one native call runs the
convolutions of any number of blocks, and of the stem before them.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import backends, direct, onednn
from resnet_fused.fingerprint import fingerprint
from resnet_fused.layout import memory_format
from resnet_fused.nn.pairs import (
    Pair,
    calls_are_plain,
    computed_dtype,
    fold,
    hooks_of,
    is_pair,
    is_plain_max_pool,
    is_plain_relu,
    pair_of,
    uses_batch,
)
from resnet_fused.packing import Convolution, PackedBlock


class Stem(NamedTuple):
    """What stands before the blocks: maxpool(relu(bn(conv(x))))."""

    conv: nn.Module
    bn: nn.Module
    relu: nn.Module
    maxpool: nn.Module


def run(blocks: Sequence[nn.Module], x: Tensor, stem: Stem | None = None) -> Tensor | None:
    """The output of `blocks`, one after the other and behind `stem`, by their plans.

    None, and nothing done, where one of them has no plan or its plan does not apply any more.
    """
    # Before the plans are looked up: a graph must not depend on which blocks have one.
    if not _applies(x):
        return None
    # A plan must not keep the module alive that it belongs to: a stem's is its pooling.
    owners = blocks if stem is None else (stem.maxpool, *blocks)
    plans = [plan for plan in map(_plans.get, owners) if plan is not None]
    if len(plans) < len(owners):
        return None
    x = x.to(computed_dtype(x))
    is_direct = direct.runs(x.dtype) and all(plan.takes_direct for plan in plans)
    if stem is not None and not is_direct:
        return None
    for owner, plan in zip(owners, plans, strict=True):
        is_of_stem = stem is None or owner is not stem.maxpool or plan.is_of(stem)
        if not (is_of_stem and plan.is_current() and _holds(owner)):
            _plans.pop(owner, None)  # another thread may have done so
            return None
    shape, packed = tuple(x.shape), []
    for plan in plans:
        if shape[1] != plan.in_channels:
            return None
        packed.append(plan.packed(shape, x.dtype, is_direct))
        shape = packed[-1].out_shape
        if min(shape) < 1:
            return None
    with torch._C._AutoDispatchBelowAutograd():
        if not is_direct:
            return onednn.residual_blocks(x, packed)
        return direct.run(x, packed if stem is None else packed[1:], stem and packed[0])


def make_plan(block: nn.Module, x: Tensor, pairs: Sequence[Pair], has_projection: bool) -> None:
    """Keep a plan for `block`, which computes what `pairs` say, if it can run on tensors like x.

    pairs: a convolution and a normalisation each, in order; the projection of the shortcut last.
    """
    last, _ = pairs[-2 if has_projection else -1]
    # oneDNN does not fuse the sum into grouped convolutions.
    if last.groups == 1 and _can_plan(x, pairs):
        _plans[block] = _Plan(block, pairs, has_projection)


def make_stem_plan(stem: Stem, x: Tensor) -> None:
    """Keep a plan for a plain `stem` if there is none and it can run on tensors like x."""
    pair: Pair = (stem.conv, stem.bn)  # type: ignore[assignment]
    if stem.maxpool not in _plans and _can_plan(x, [pair]):
        _plans[stem.maxpool] = _Plan(None, [pair], has_projection=False)


def is_plain_stem(stem: Stem) -> bool:
    """Whether the modules compute what a plan for a stem computes, and nobody listens."""
    conv, bn, relu, pool = stem
    return (
        is_pair(conv, bn)
        and is_plain_relu(relu)
        and is_plain_max_pool(pool)
        and [pair_of(n) for n in (pool.kernel_size, pool.stride, pool.padding)]
        == [(3, 3), (2, 2), (1, 1)]
    )


def _can_plan(x: Tensor, pairs: Sequence[Pair]) -> bool:
    if not _applies(x) or any(uses_batch(bn) for _, bn in pairs):
        return False
    tensors = [t for pair in pairs for module in pair for t in module.state_dict().values()]
    return not any(t.is_inference() for t in tensors)  # they have no version counter to go by


def _applies(x: Tensor) -> bool:
    """Whether plans are exact for x, here and now."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and calls_are_plain()  # before a size of x is read, which a trace would record
        and type(x) is Tensor
        and x.is_cpu
        and x.dim() == 4
        and memory_format(x) is torch.channels_last
        and x.is_contiguous(memory_format=torch.channels_last)
        and onednn.runs(computed_dtype(x), x.numel())
        and backends.is_implemented("conv_bn_relu")
        and backends.choose("conv_bn_relu", x) is onednn.conv_bn_relu
    )


class _Plan:
    """block: None for the convolution and normalisation of a stem."""

    def __init__(
        self, block: nn.Module | None, pairs: Sequence[Pair], has_projection: bool
    ) -> None:
        self._pairs = tuple(pairs)
        self._is_stem = block is None
        self._has_projection = has_projection
        self._settings = self._current_settings()
        self.in_channels = pairs[0][0].in_channels
        self.takes_direct = all(
            direct.takes(conv.weight, conv.groups, self._is_stem) for conv, _ in pairs
        )
        modules = () if block is None else tuple(block.modules())
        inner = [module for module in modules if module is not block]
        self._children = [
            (module._modules, tuple(module._modules.values()))
            for module in modules
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
        self._packed: dict[tuple[object, ...], PackedBlock] = {}
        self._kept: direct.Kept = {}

    def is_of(self, stem: Stem) -> bool:
        """Whether the plan was made from the modules of `stem`."""
        ((conv, bn),) = self._pairs
        return conv is stem.conv and bn is stem.bn

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

    def packed(self, x_shape: tuple[int, ...], dtype: torch.dtype, is_direct: bool) -> PackedBlock:
        """What it computes for inputs of this shape and dtype, packed when first asked for."""
        key = (x_shape, dtype, is_direct)
        packed = self._packed.get(key)
        if packed is None:
            if len(self._packed) >= onednn.SHAPES_KEPT:
                oldest, *_ = self._packed
                self._packed.pop(oldest, None)
            packed = self._packed[key] = self._pack(x_shape, dtype, is_direct)
        return packed

    def _pack(self, x_shape: tuple[int, ...], dtype: torch.dtype, is_direct: bool) -> PackedBlock:
        convolutions = self._convolutions()
        if self._is_stem:
            return direct.pack_stem(x_shape, dtype, convolutions[0], self._kept)
        block = (x_shape, dtype, convolutions, self._has_projection)
        return direct.pack_block(*block, self._kept) if is_direct else onednn.pack_block(*block)

    def _convolutions(self) -> list[Convolution]:
        return [
            Convolution(
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


def _holds(owner: nn.Module) -> bool:
    condition = conditions.get(type(owner).forward)
    return condition is None or condition(owner)


# What must hold for a block to compute what its plan says, besides its layers, by its forward.
conditions: dict[Callable[..., object], Callable[[nn.Module], bool]] = {}
_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()
