"""ResNet-20 learns digits with fused blocks as with eager ones, step by step and in the end.

Training multiplies every difference: rounding changes the sign of a value next to 0, a ReLU opens,
the next gradient is another one, and ten steps later the losses differ in the third digit. So any
two correct programs part, eager from eager when only the order of its sums changes. The fused
network is therefore held to two bands, both spanned by eager runs alone:

* Followed: it starts over from an eager run's state, at moments all along 200 steps, and takes a
  few steps. There rounding alone separates correct programs. Losses, momenta and statistics may be
  as far from float64 as the rule for every number here says: at most twice as far as eager, in the
  worst of its orders, plus one rounding. Of all moments the median counts, as in some of them a
  ReLU opens right away. An error of 2 % in any gradient is hundreds of times as far.
* Free: 200 steps on its own. What is left of the band once ReLUs have opened is chance: the losses,
  averaged over windows, must stay where one more run from the same distribution as the eager ones
  would, and the accuracy in the end, too. This sees what a few steps do not, such as statistics
  that never arrive, and little else: 2 % in every gradient are less than chance.
"""

import copy
import functools
import math
from collections.abc import Callable
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import pytest
import torch
from model_equality import distance
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.commands import digits
from resnet_fused.commands.networks import eager_twin

sklearn = pytest.importorskip("sklearn", reason="scikit-learn and its digits are not installed")
stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")

STEPS, BATCH, WINDOW = 200, 32, 20
MOMENTS = range(0, STEPS, 22)  # where followed runs start
FOLLOWED = 3  # steps from there: each sees the gradients of those before it
FALSE_ALARM = 1e-3  # probability that a correct network leaves the free band
# Orders of the sums: memory format, and seed of a permutation of the images in each batch.
EAGER_ORDERS = [
    (torch.contiguous_format, None),
    (torch.channels_last, None),
    *((torch.channels_last, seed) for seed in range(4)),
]


class Run:
    """A network in training: its own copy of the model, and its optimizer."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        order: int | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).to(dtype).to(memory_format=memory_format)
        self.dtype, self.memory_format, self.order = dtype, memory_format, order
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

    def step(self, number: int) -> float:
        """Train on batch `number`; the loss before that."""
        images, labels = batch(number)
        if self.order is not None:
            generator = torch.Generator().manual_seed(1000 * self.order + number)
            order = torch.randperm(BATCH, generator=generator)
            images, labels = images[order], labels[order]
        self.model.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.placed(images)), labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def evaluate(self) -> tuple[float, float]:
        """Loss and accuracy on the test images, in evaluation."""
        data = digits_8x8()
        self.model.eval()
        with torch.no_grad():
            out = self.model(self.placed(data.test_images))
        hits = (out.argmax(1) == data.test_labels).float().mean()
        return float(F.cross_entropy(out, data.test_labels)), float(hits)

    def placed(self, images: Tensor) -> Tensor:
        return images.to(self.dtype).contiguous(memory_format=self.memory_format)

    def state(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(copy.deepcopy(state[1]))


@functools.cache
def digits_8x8() -> digits.Digits:
    return digits.load(8)


def batch(number: int) -> tuple[Tensor, Tensor]:
    data = digits_8x8()
    per_epoch = len(data.train_images) // BATCH
    epoch, index = divmod(number, per_epoch)
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(epoch))[
        index * BATCH : (index + 1) * BATCH
    ]
    return data.train_images[order], data.train_labels[order]


def network() -> nn.Module:
    torch.manual_seed(0)
    return rf.models.resnet20(in_channels=1)


def eager_runs() -> list[Run]:
    eager = eager_twin(network())
    return [Run(eager, torch.float32, *order) for order in EAGER_ORDERS]


# Followed


Followed = dict[str, Tensor]


class Reference(NamedTuple):
    """States of an eager run at some moments, and what float64 makes of each."""

    states: list[Any]
    followed: list[Followed]


@functools.cache
def reference() -> Reference:
    eager = eager_twin(network())
    run = Run(eager)
    states = []
    for number in range(max(MOMENTS) + 1):
        if number in MOMENTS:
            states.append(run.state())
        run.step(number)
    return Reference(states, follow(Run(eager, torch.float64), states))


def follow(run: Run, states: list[Any]) -> list[Followed]:
    """From each state: the losses of some steps and of an evaluation, momenta and statistics."""
    found = []
    for number, state in zip(MOMENTS, states, strict=True):
        run.load(state)
        losses = [run.step(number + i) for i in range(FOLLOWED)]
        losses.append(run.evaluate()[0])
        tensors = {f"loss {i}": torch.tensor(v).double() for i, v in enumerate(losses)}
        tensors |= {n: b.clone() for n, b in run.model.named_buffers() if "running" in n}
        for name, parameter in run.model.named_parameters():
            tensors[name] = run.optimizer.state[parameter]["momentum_buffer"].clone()
        found.append(tensors)
    return found


def deviations(run: Run) -> dict[str, float]:
    """Relative distance of each of them from float64, the median over all moments."""
    states, exact = reference()
    pairs = list(zip(follow(run, states), exact, strict=True))
    return {n: median(distance(mine[n], true[n]) for mine, true in pairs) for n in exact[0]}


@functools.cache
def followed_band() -> dict[str, float]:
    """The largest deviation allowed."""
    of_all = [deviations(run) for run in eager_runs()[:4]]
    eps = torch.finfo(torch.float32).eps
    return {name: 2 * max(each[name] for each in of_all) + eps for name in of_all[0]}


def leaves_followed_band(run: Run) -> list[str]:
    band = followed_band()
    return [
        f"{name}: {error:.1e}, not at most {band[name]:.1e}"
        for name, error in deviations(run).items()
        if not error <= band[name]
    ]


def test_fused_network_follows_eager() -> None:
    assert leaves_followed_band(Run(network())) == []


# Free


class Free(NamedTuple):
    """Logarithms of the losses' means over windows, and the accuracy in the end."""

    windows: list[float]
    accuracy: float


def free(run: Run, steps: int = STEPS) -> Free:
    losses = [run.step(number) for number in range(steps)]
    windows = [math.log(fmean(losses[i : i + WINDOW])) for i in range(0, steps, WINDOW)]
    return Free(windows, run.evaluate()[1])


@functools.cache
def free_eager() -> list[Free]:
    return [free(run) for run in eager_runs()]


def leaves_free_band(found: Free) -> list[str]:
    """Where it leaves the interval that one more eager run stays in.

    For K runs from one normal distribution, mean m and standard deviation s, the next is within
    m +- t s sqrt(1 + 1/K), t a quantile of Student's distribution with K - 1 degrees of freedom.
    The probability of a false alarm is shared among the windows. Accuracies may differ by three
    standard errors, as in `demo`.
    """
    runs = free_eager()
    count, windows = len(runs), STEPS // WINDOW
    factor = stats.t.ppf(1 - FALSE_ALARM / windows / 2, count - 1) * math.sqrt(1 + 1 / count)
    reasons = []
    for number, value in enumerate(found.windows):
        eager = [run.windows[number] for run in runs]
        middle, width = fmean(eager), factor * stdev(eager)
        if not abs(value - middle) <= width:
            reasons.append(f"window {number}: {value:.3f}, not {middle:.3f} +- {width:.3f}")
    if len(found.windows) < windows:
        return reasons
    p, tests = fmean(run.accuracy for run in runs), len(digits_8x8().test_labels)
    allowed = 3 * math.sqrt(2 * p * (1 - p) / tests) + 1 / tests
    if not abs(found.accuracy - p) <= allowed:
        reasons.append(f"accuracy: {found.accuracy:.3f}, not {p:.3f} +- {allowed:.3f}")
    return reasons


def test_fused_network_learns_as_eager() -> None:
    assert leaves_free_band(free(Run(network()))) == []


# What must be seen


Damage = Callable[[nn.Module], object]


def scaled(x: Tensor, factor: float) -> Tensor:
    """The same values, with a wrong gradient."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda grad: factor * grad)
    return x


class ScaledGradient(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return scaled(x, self.factor)


def scale_shortcuts(*parts: str, factor: float) -> Damage:
    def damage(model: nn.Module) -> None:
        for part in parts:
            model.get_submodule(part).downsample = ScaledGradient(factor)

    return damage


def scale_input(part: str, factor: float) -> Damage:
    """The gradient that a block hands on to the one before."""
    return lambda model: model.get_submodule(part).register_forward_pre_hook(
        lambda _, inputs: scaled(inputs[0], factor)
    )


def scale_gradient(name: str, factor: float) -> Damage:
    return lambda model: model.get_parameter(name).register_hook(lambda grad: factor * grad)


def set_norms(part: str, **values: float) -> Damage:
    def damage(model: nn.Module) -> None:
        for module in model.get_submodule(part).modules():
            if isinstance(module, nn.BatchNorm2d):
                vars(module).update(values)

    return damage


IDENTITIES = ("layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2")
FOLLOWED_DAMAGE: dict[str, tuple[Damage, str]] = {
    "shortcut_gradient_of_one_block": (scale_shortcuts("layer2.1", factor=0.98), "loss 1"),
    "input_gradient_of_one_block": (scale_input("layer3.1", 1.02), "loss 1"),
    "convolution": (scale_gradient("layer2.1.conv2.weight", 1.02), "layer2.1.conv2.weight"),
    "norm_weight": (scale_gradient("layer2.1.bn2.weight", 1.02), "layer2.1.bn2.weight"),
    "norm_bias": (scale_gradient("layer1.0.bn1.bias", 1.02), "layer1.0.bn1.bias"),
    "momentum_of_one_norm": (set_norms("layer2.1.bn1", momentum=0.102), "loss 3"),
    "one_norm_that_does_not_count": (set_norms("layer3.2.bn2", momentum=0.0), "loss 3"),
    "eps_of_one_norm": (set_norms("layer2.1.bn1", eps=2e-5), "layer2.1.bn2.running_var"),
}


@pytest.mark.parametrize("damage", FOLLOWED_DAMAGE)
def test_errors_that_are_seen_in_a_few_steps(damage: str) -> None:
    run = Run(network())
    FOLLOWED_DAMAGE[damage][0](run.model)
    assert FOLLOWED_DAMAGE[damage][1] in [text.split(":")[0] for text in leaves_followed_band(run)]


FREE_DAMAGE: dict[str, tuple[Damage, int, str]] = {
    "shortcut_gradients": (scale_shortcuts(*IDENTITIES, factor=0.5), WINDOW, "window 0"),
    "no_statistics": (set_norms("", momentum=0.0), STEPS, "accuracy"),
}


@pytest.mark.parametrize("damage", FREE_DAMAGE)
def test_errors_that_are_seen_in_the_long_run(damage: str) -> None:
    change, steps, seen = FREE_DAMAGE[damage]
    run = Run(network())
    change(run.model)
    assert seen in [text.split(":")[0] for text in leaves_free_band(free(run, steps))]
