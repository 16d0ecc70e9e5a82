"""What stands against replacing the forward of a module whose data flow is proven."""

from collections import defaultdict

from torch import nn

from resnet_fused.conversion.layers import hook_on, why_not_conv, why_not_norm
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
    for name in (*roles.convs, *roles.norms):
        child = module.get_submodule(name)
        reason = why_not_conv(child) if name in roles.convs else why_not_norm(child)
        if reason is not None:
            return f"{name} {reason}"
        others = registrations.others(child, f"{path}.{name}" if path else name)
        if others:
            return f"{name} is shared: it is also {others[0]}"
    for name in (*roles.convs, *roles.norms, *roles.bypassed):
        hook = hook_on(module.get_submodule(name))
        if hook is not None:
            return f"{name} has a {hook}, which would no longer run"
    return None
