"""What stands against leaving a layer of a module uncalled."""

from collections import defaultdict

from torch import nn

from resnet_fused.conversion.layers import hook_on, is_conv, is_norm, why_not_conv, why_not_norm
from resnet_fused.conversion.roles import Roles


class Registrations:
    """Under which names the modules of a model are registered."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = defaultdict(list)
        for path, parent in model.named_modules():
            for name, child in parent._modules.items():
                self._names[id(child)].append(f"{path}.{name}" if path else name)

    def others(self, module: nn.Module, path: str) -> list[str]:
        """Where else the module stands, besides `path`."""
        return [name for name in self._names[id(module)] if name != path]


def obstacle(
    module: nn.Module, roles: Roles, registrations: Registrations, path: str
) -> str | None:
    """Why the module must keep its own forward, in words; None if nothing stands against it."""
    for name in (*roles.layers, *roles.bypassed):
        place = f"{path}.{name}" if path else name
        reason = why_not_layer(module.get_submodule(name), registrations, place)
        if reason is not None:
            return f"{name} {reason}"
    return None


def why_not_layer(module: nn.Module, registrations: Registrations, path: str) -> str | None:
    """Why the module at `path` must be called as it is, as the end of a sentence; None if not."""
    if is_conv(module) or is_norm(module):
        reason = why_not_conv(module) if is_conv(module) else why_not_norm(module)
        if reason is not None:
            return reason
        others = registrations.others(module, path)
        if others:
            return f"is shared: it is also {others[0]}"
    if "forward" in vars(module):
        return "has its own forward, set on the instance"
    hook = hook_on(module)
    return None if hook is None else f"has a {hook}, which would no longer run"
