"""What a user could change so that more of a model is fused, or runs on faster kernels."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import _extension, onednn
from resnet_fused.conversion.runtime_path import EAGER, RuntimePath
from resnet_fused.conversion.survey import Finding

_NAMED = 3  # paths that one sentence lists


class Advice(NamedTuple):
    """A sentence in the imperative, with {} where `path` belongs; without {} it needs no path."""

    text: str
    path: str = ""

    def __str__(self) -> str:
        return self.text.format(self.path)


COMPILE = Advice('use torch.compile(model, backend="resnet_fused"), which sees such forwards')
_FUSE = Advice("call resnet_fused.fuse(model)")
_CHANNELS_LAST = Advice("pass images in channels_last: x.to(memory_format=torch.channels_last)")
_DOCTOR = "run python -m resnet_fused doctor: it says why no kernel of this library runs here on "

# What a reason says, and what helps. A reason without a line here is of the architecture's: nothing
# helps. The layer that a reason names stands in front; {} is its path, or that of the block.
_LAYER = r"^(?P<layer>\S+) "
_REMEDIES: tuple[tuple[str, str], ...] = (
    (_LAYER + r"has an? ([a-z-]+ )*(pre-)?hook", "remove the hook on {}, or hook the whole block"),
    (_LAYER + r"is lazy", "run the model once, then fuse: {} is lazy"),
    (
        _LAYER + r"has a parametrization",
        "remove the parametrization of {} before fuse: "
        "torch.nn.utils.parametrize.remove_parametrizations",
    ),
    (
        _LAYER + r"has a (weight|bias) that is computed",
        "make the weight of {} a parameter before fuse: torch.nn.utils.prune.remove, "
        "remove_weight_norm or remove_spectral_norm",
    ),
    (_LAYER + r"has padding=", "write the padding of {} as a number"),
    (_LAYER + r"is shared: it is also", "give each place of {} a layer of its own, under one name"),
    (r": it calls (?P<layer>\S+) more than once", "give each call of {} a layer of its own"),
    (_LAYER + r"has its own forward", "remove the forward that is set on the instance {}"),
    (_LAYER + r"is a \S+, not a plain", "use torch.nn's own layer for {}, if it computes the same"),
    (_LAYER + r"has a \S+ of type", "make the tensors of {} plain parameters or buffers"),
    (r"^the instance has its own forward", "define the forward of {} in its class"),
    (r"^it is a TorchScript module", "fuse before torch.jit.script or torch.jit.trace"),
    (r"^a torch.fx graph calls", "fuse before tracing with torch.fx"),
    (r"^it is made for quantization", "fuse the float model, before it is made for quantization"),
    (r"found drop_?(path|block)\S* ", "for inference, exchange the drop path of {} for Identity()"),
    (r": it adds in place into the shortcut", "add the shortcut to the result of the layers in {}"),
    (r"its shortcut (?P<layer>\S+) may change the input", "set inplace=False in {}"),
    (r": it calls print\b", "take the print out of the forward of {}"),
    (r": it changes the attribute", "do not store anything in the forward of {} (a hook can)"),
    (r": it makes a tensor", "register the tensor that the forward of {} makes as a buffer"),
    # Whatever else keeps a forward from being traced. The others name what the block computes.
    (
        r"^its forward is not a known one: "
        r"(?!expected|it has|it also computes|it does not return|its stem|it adds)",
        COMPILE.text,
    ),
)


def advice_for(
    finding: Finding, path: RuntimePath, example_input: Tensor | None
) -> tuple[Advice, ...]:
    """What would help one block, the most important first."""
    advice = [] if finding.fused or finding.recipe is None else [_FUSE]
    advice += _for_reason(finding.path, finding.reason)
    if finding.recipe is not None:
        advice += _for_runtime_path(path)
        has_format = path.layout == "channels_last" or path.device == "meta"
        is_native = example_input is not None and example_input.is_contiguous(
            memory_format=torch.channels_last
        )
        if not (has_format or is_native) and path.dtype != "float64":
            advice.append(_CHANNELS_LAST)
    return tuple(advice)


def merged(advice: Sequence[Advice]) -> tuple[str, ...]:
    """Each sentence once, with the paths of all the blocks that it is about."""
    paths: dict[str, list[str]] = {}
    for text, path in advice:
        found = paths.setdefault(text, [])
        if path not in found:
            found.append(path)
    return tuple(text.format(_listed(found)) for text, found in paths.items())


def _for_reason(place: str, reason: str) -> Iterator[Advice]:
    for pattern, text in _REMEDIES:
        match = re.search(pattern, reason)
        if match is not None:
            layer = match.groupdict().get("layer", "")
            path = f"{place}.{layer}" if place and layer else place or layer
            yield Advice(text, (path or "the model") if "{}" in text else "")
            return


def _for_runtime_path(path: RuntimePath) -> Iterator[Advice]:
    if path.problem:
        yield Advice(f"ask for another backend: {path.problem}".replace("{", "{{"))
        return
    if path.device == "cpu" and not _extension.load():
        yield Advice(f"{_DOCTOR}{path.device}")
    elif path.device == "cpu" and path.convolutions == EAGER and path.dtype != "mixed":
        fast = [n for n in ("float32", "bfloat16") if onednn.runs(getattr(torch, n), elements=1)]
        if fast and path.dtype not in fast:
            yield Advice(
                f"use {' or '.join(fast)}: this CPU has no fused convolutions in {path.dtype}"
            )
    elif path.backend == EAGER and path.dtype != "float64":
        yield Advice(f"{_DOCTOR}{path.device} in {path.dtype}")


def _listed(paths: Sequence[str]) -> str:
    more = len(paths) - _NAMED
    text = ", ".join(paths[:_NAMED])
    return f"{text} and {more} more" if more > 0 else text
