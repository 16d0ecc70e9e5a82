"""Random programs: what happens to a model between two calls, the same for a model and its twin.

Every event names a submodule by a number, which is looked up among the names of the plain model.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from random_blocks import SETTINGS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

MODES = (
    *("grad", "no_grad", "inference_mode", "frozen_input", "leaf", "double", "grad_twice"),
    *("two_calls", "autocast", "global_hook"),
)
HOOK_KINDS = ("forward", "pre", "backward", "backward_pre")
ATTRIBUTES: tuple[tuple[str, Any], ...] = (
    *(("scale", 2.0), ("has_shortcut", False), ("has_relu", False), ("rate", 1.0)),
    *(("rate", 0.0), ("factor", 3.0), ("eps", 0.1), ("momentum", 0.5), ("momentum", None)),
    *(("inplace", False), ("inplace", True), ("p", 0.5), ("p", 0.0), ("bias", None)),
    *(("training", True), ("training", False), ("running_mean", None), ("downsample", None)),
    *(("track_running_stats", False), ("relu", "nn.Tanh"), ("drop_block", "nn.Tanh")),
    *(("groups", 1), ("padding_mode", "circular"), ("function", "torch.relu")),
    *(("gamma", "nn.Parameter"), ("weight", None), ("stride", (1, 1))),
    # Methods of a class, on an instance.
    *(("identity", "torch.neg"), ("main", "torch.tanh"), ("finish", "torch.sub")),
    ("forward", "torch.neg"),
)
_OBJECTS: dict[str, Callable[[], Any]] = {
    "nn.Tanh": nn.Tanh,
    "nn.Parameter": lambda: nn.Parameter(torch.tensor(2.0)),
    "torch.neg": lambda: torch.neg,
    "torch.relu": lambda: torch.relu,
    "torch.sub": lambda: torch.sub,
    "torch.tanh": lambda: torch.tanh,
}
REPLACEMENTS = ("nn.Identity", "nn.Tanh", "same", "norm_twin", "scaled")
EDITS = ("step", "mul", "data", "requires_grad", "freeze", "unfreeze", "zero")
WRAPS = ("weight_norm", "prune", "parametrize", "unparametrize", "forward")
COPIES = ("deepcopy", "pickle", "save", "state_dict")


class Hook(NamedTuple):
    """which: the submodule. factor: what the hook multiplies by; 1 for one that only listens."""

    kind: str = "forward"
    which: int = 0
    factor: float = 1.0


class Compare(NamedTuple):
    """Run both on the same input."""

    mode: str = "grad"
    seed: int = 0
    channels_last: bool = False


class Train(NamedTuple):
    """.train(training) of a submodule, 0 being the whole model."""

    training: bool = True
    which: int = 0


class Load(NamedTuple):
    seed: int = 0


class Set(NamedTuple):
    """Set an attribute of one of the submodules that have it.

    value: or the name of something that is made anew for each model, see _OBJECTS.
    """

    name: str = "scale"
    value: Any = 2.0
    which: int = 0


class SetItem(NamedTuple):
    """Change what stands in the dictionary of a block, and in a global one."""

    scale: float = 2.0
    relu: bool = False


class Replace(NamedTuple):
    kind: str = "nn.Identity"
    which: int = 1


class AddHook(NamedTuple):
    hook: Hook = Hook()


class RemoveHooks(NamedTuple):
    which: int = 0


class Edit(NamedTuple):
    """Of parameters, as optimizers and users do it."""

    kind: str = "step"
    which: int = 0


class Wrap(NamedTuple):
    kind: str = "weight_norm"
    which: int = 0


class Copy(NamedTuple):
    kind: str = "deepcopy"


class To(NamedTuple):
    """Another memory format, or to float32 and back."""

    kind: str = "channels_last"


class CallPart(NamedTuple):
    """Compare calls of one convolution or norm, from outside."""

    which: int = 0


class FuseAgain(NamedTuple):
    inplace: bool = False
    unfuses: bool = False


class Recorder:
    """Hooks that write down what they get. Copies of a model have recorders of their own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls: list[tuple[str, list[Tensor | None]]] = []

    def pre(self, module: nn.Module, args: tuple[Any, ...]) -> object:
        self._write("pre", args)
        return None if self.factor == 1 else (args[0] * self.factor, *args[1:])

    def forward(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> object:
        self._write("forward", (*args, out))
        return out * self.factor if self.factor != 1 and isinstance(out, Tensor) else None

    def backward(self, module: nn.Module, grad_in: Any, grad_out: Any) -> object:
        self._write("backward", (*grad_in, *grad_out))
        if self.factor == 1:
            return None
        return tuple(None if g is None else g * self.factor for g in grad_in)

    def backward_pre(self, module: nn.Module, grad_out: Any) -> object:
        self._write("backward_pre", grad_out)
        return None if self.factor == 1 else tuple(g and g * self.factor for g in grad_out)

    def _write(self, kind: str, values: tuple[Any, ...]) -> None:
        tensors = [v.detach().clone() if isinstance(v, Tensor) else None for v in values]
        self.calls.append((kind, tensors))


_REGISTER = {
    "forward": "register_forward_hook",
    "pre": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
    "backward_pre": "register_full_backward_pre_hook",
}
_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def install(hook: Hook, model: nn.Module, plain: nn.Module) -> None:
    """plain: the model whose submodules are counted."""
    recorder = Recorder(hook.factor)
    module = _find(model, plain, hook.which)
    getattr(module, _REGISTER[hook.kind])(getattr(recorder, hook.kind))


def recorders(model: nn.Module, plain: nn.Module) -> Iterator[Recorder]:
    """Those of the hooks in `model`, in the order of the submodules of `plain`."""
    for path, _ in plain.named_modules():
        for table in _TABLES:
            for hook in getattr(model.get_submodule(path), table).values():
                if isinstance(getattr(hook, "__self__", None), Recorder):
                    yield hook.__self__


def happen(event: Any, model: nn.Module, plain: nn.Module) -> nn.Module:
    """The model after `event`, which is neither Compare nor FuseAgain."""
    result = _HANDLERS[type(event)](event, model, plain)
    return model if result is None else result


def part(model: nn.Module, plain: nn.Module, event: CallPart) -> nn.Module:
    """The convolution or norm that `event` means; the model if it has none."""
    return _find(model, plain, event.which, (nn.Conv2d, nn.BatchNorm2d))


def _find(model: nn.Module, plain: nn.Module, which: int, kind: Any = nn.Module) -> nn.Module:
    """The submodule of that number, or the first one of this kind behind it."""
    paths = [path for path, _ in plain.named_modules()]
    start = which % len(paths)
    for path in [*paths[start:], *paths[:start]]:
        if isinstance(plain.get_submodule(path), kind):
            return model.get_submodule(path)
    return model


def _train(event: Train, model: nn.Module, plain: nn.Module) -> None:
    _find(model, plain, event.which).train(event.training)


def _load(event: Load, model: nn.Module, plain: nn.Module) -> None:
    generator = torch.Generator().manual_seed(event.seed)
    state = model.state_dict()
    for name in plain.state_dict():
        tensor = state[name]
        if tensor.is_floating_point() and not name.endswith("_mask"):
            low = 0.5 if name.endswith(("var", "original0")) else -0.5
            fresh = torch.empty(tensor.shape).uniform_(low, low + 1.0, generator=generator)
            state[name] = fresh.bfloat16().to(tensor.dtype)  # exact in every dtype
    model.load_state_dict(state)


def _set_attribute(event: Set, model: nn.Module, plain: nn.Module) -> None:
    paths = [path for path, module in plain.named_modules() if hasattr(module, event.name)]
    if paths:
        module = model.get_submodule(paths[event.which % len(paths)])
        value = _OBJECTS[event.value]() if event.value in _OBJECTS else event.value
        setattr(module, event.name, value)
        if event.name == "running_mean":
            module.running_var = None


def _set_item(event: SetItem, model: nn.Module, plain: nn.Module) -> None:
    for path, module in plain.named_modules():
        if "config" in vars(module):
            config: Any = model.get_submodule(path).config
            config["scale"], config["relu"] = event.scale, event.relu
    SETTINGS["scale"] = event.scale


def _replace(event: Replace, model: nn.Module, plain: nn.Module) -> None:
    paths = [path for path, m in plain.named_modules() if path and not [*m.children()]]
    path = paths[event.which % len(paths)]
    old = model.get_submodule(path)
    new: nn.Module = {"nn.Identity": nn.Identity, "nn.Tanh": nn.Tanh}.get(
        event.kind, lambda: copy.deepcopy(old)
    )()
    if event.kind == "norm_twin" and isinstance(old, nn.BatchNorm2d):
        new = nn.BatchNorm2d(old.num_features, eps=0.5).to(next(model.parameters()).dtype)
        new.train(old.training)
    elif event.kind == "scaled":
        new = nn.Sequential(new, nn.Hardtanh(-0.5, 0.5))
    model.set_submodule(path, new)


def _add_hook(event: AddHook, model: nn.Module, plain: nn.Module) -> None:
    install(event.hook, model, plain)


def _remove_hooks(event: RemoveHooks, model: nn.Module, plain: nn.Module) -> None:
    paths = [path for path, m in plain.named_modules() if any(getattr(m, t) for t in _TABLES)]
    if paths:
        module = model.get_submodule(paths[event.which % len(paths)])
        for table in _TABLES:
            getattr(module, table).clear()


def _edit(event: Edit, model: nn.Module, plain: nn.Module) -> None:
    module = _find(model, plain, event.which)
    parameters = [*module.parameters()]
    if event.kind == "step" and parameters:
        torch.optim.SGD(parameters, lr=0.01).step()
    elif event.kind in ("freeze", "unfreeze"):
        module.requires_grad_(event.kind == "unfreeze")
    for parameter in parameters:
        if event.kind == "mul":
            with torch.no_grad():
                parameter.mul_(-1.5)
        elif event.kind == "data":
            parameter.data = parameter.data * 0.5
        elif event.kind == "zero":
            nn.init.zeros_(parameter)
        elif event.kind == "requires_grad":
            parameter.requires_grad_(not parameter.requires_grad)


def _wrap(event: Wrap, model: nn.Module, plain: nn.Module) -> None:
    conv: Any = _find(model, plain, event.which, nn.Conv2d)
    if event.kind == "unparametrize":
        if parametrize.is_parametrized(conv, "weight"):
            parametrize.remove_parametrizations(conv, "weight")
    elif not isinstance(conv, nn.Conv2d) or "weight" not in conv._parameters:
        return
    elif event.kind == "weight_norm":
        parametrizations.weight_norm(conv)
    elif event.kind == "prune":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    elif event.kind == "parametrize":
        parametrize.register_parametrization(conv, "weight", nn.Tanh())
    elif event.kind == "forward":
        conv.forward = torch.neg


def _copy(event: Copy, model: nn.Module, plain: nn.Module) -> nn.Module | None:
    if event.kind == "deepcopy":
        return copy.deepcopy(model)
    if event.kind == "pickle":
        return pickle.loads(pickle.dumps(model))  # noqa: S301
    if event.kind == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return None


def _to(event: To, model: nn.Module, plain: nn.Module) -> None:
    if event.kind == "float32":
        dtype = next(model.parameters()).dtype
        model.float().to(dtype)
    else:
        model.to(memory_format=torch.channels_last)


_HANDLERS: dict[type, Any] = {
    Train: _train,
    Load: _load,
    Set: _set_attribute,
    SetItem: _set_item,
    Replace: _replace,
    AddHook: _add_hook,
    RemoveHooks: _remove_hooks,
    Edit: _edit,
    Wrap: _wrap,
    Copy: _copy,
    To: _to,
}

_which = st.integers(0, 30)
hooks: st.SearchStrategy[Hook] = st.builds(
    Hook, st.sampled_from(HOOK_KINDS), _which, st.sampled_from((1.0, 1.0, 2.0))
)
compares: st.SearchStrategy[Compare] = st.builds(
    Compare, st.sampled_from(MODES), st.integers(0, 5), st.booleans()
)
_hooked = st.builds(AddHook, hooks)
_set = st.builds(lambda pair, which: Set(*pair, which), st.sampled_from(ATTRIBUTES), _which)
_changes: st.SearchStrategy[Any] = st.one_of(
    *(_hooked, _hooked, _hooked, _set, _set, _set),  # the many kinds of each are rare otherwise
    st.builds(Train, st.booleans(), st.one_of(st.just(0), _which)),
    st.builds(Load, st.integers(0, 5)),
    st.builds(SetItem, st.sampled_from((2.0, 0.1)), st.booleans()),
    st.builds(Replace, st.sampled_from(REPLACEMENTS), _which),
    st.builds(RemoveHooks, _which),
    st.builds(Edit, st.sampled_from(EDITS), st.one_of(st.just(0), _which)),
    st.builds(Wrap, st.sampled_from(WRAPS), _which),
    st.builds(Copy, st.sampled_from(COPIES)),
    st.builds(To, st.sampled_from(("channels_last", "float32"))),
    st.builds(CallPart, _which),
    st.builds(FuseAgain, st.booleans(), st.booleans()),
)
# A call between changes is what may leave something stale behind.
programs: st.SearchStrategy[tuple[Any, ...]] = st.lists(
    st.one_of(compares, _changes, _changes), max_size=5
).map(tuple)
