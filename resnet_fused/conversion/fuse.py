"""`fuse` and `unfuse`."""

import logging
import sys
import warnings
from typing import TypeVar

from torch import nn

from resnet_fused.conversion.clone import clone_modules
from resnet_fused.conversion.links import stages
from resnet_fused.conversion.survey import survey
from resnet_fused.conversion.swap import FusedBlock, swap_in, swap_in_stage, swap_out
from resnet_fused.nn import BasicBlock, Bottleneck, TrainingMode

_log = logging.getLogger("resnet_fused")

Model = TypeVar("Model", bound=nn.Module)


def fuse(
    model: Model, inplace: bool = False, training_mode: TrainingMode | str | None = None
) -> Model:
    """The same model with fused residual blocks: same numbers, less memory traffic.

    Converts every residual block, and the stem of torchvision's ResNets, whose forward is proven to
    compute what the fused one does. Everything else is left alone; `explain` says why. The result
    has new modules but the same parameters and buffers: optimizers, hooks, `state_dict` keys,
    `requires_grad`, devices and training flags carry over, and both models stay usable (until one
    of them is moved to another dtype or device, which gives it buffers of its own). With
    inplace=True the given modules are converted. Fusing twice is fusing once.

    training_mode: what every fused block keeps for its backward, see `TrainingMode`; None leaves it
    as it is, "speed" where nothing else was set.

    Equivalent to `model`, called with one tensor. Later changes are safe: a block whose layers are
    exchanged or hooked afterwards runs its original forward again.

    Raises TypeError unless model is a module, and ValueError on an unknown training_mode and where
    a copy cannot share the tensors (DistributedDataParallel, compiled modules).
    """
    mode = None if training_mode is None else TrainingMode.of(training_mode)
    model = _prepare(model, "fuse", inplace)
    findings = survey(model)
    for finding in findings:
        if finding.recipe is not None and not finding.fused:
            swap_in(finding.module, finding.recipe, finding.attributes)
    for stage in stages(model, findings):
        swap_in_stage(stage)
    if mode is not None:
        set_training_mode(model, mode)
    done = sum(finding.recipe is not None for finding in findings)
    _log.info("fused %d of %d candidates in %s", done, len(findings), type(model).__name__)
    if not done:
        found = f"none of its {len(findings)} blocks" if findings else "no residual block"
        warnings.warn(
            f"fuse: {found} in {type(model).__name__} could be fused; "
            "print(resnet_fused.explain(model)) says why",
            stacklevel=2,
        )
    return model


def unfuse(model: Model, inplace: bool = False) -> Model:
    """The model as it was before `fuse`: the original classes over the same parameters and buffers.

    Modules built from this library's own classes stay as they are. Raises as `fuse` does.
    """
    return restore_classes(_prepare(model, "unfuse", inplace))


def set_training_mode(model: nn.Module, mode: TrainingMode) -> None:
    """Let every fused block in `model` keep what `mode` says for its backward."""
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck | FusedBlock):
            module.training_mode = mode


def restore_classes(model: Model) -> Model:
    """Swap every fused class in `model` back, in place."""
    for module in model.modules():
        swap_out(module)
    return model


def _prepare(model: Model, function: str, inplace: bool) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model must be a torch.nn.Module, got {type(model).__name__}"
            + (" (call it on an instance, not on the class)" if isinstance(model, type) else "")
        )
    for module in model.modules():
        if _is_compiled(module):
            raise ValueError(
                f"{function}: model must not be compiled, got the result of torch.compile "
                f"(call {function} first, then torch.compile)"
            )
        if not inplace and isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{function}: a DistributedDataParallel model cannot be copied with shared "
                f"parameters (call {function} before wrapping it, or pass inplace=True)"
            )
    return model if inplace else clone_modules(model)


def _is_compiled(module: nn.Module) -> bool:
    # The compiler takes seconds to import; unless that has happened, nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
