"""Train a small ResNet on real handwritten digits twice: with eager blocks and with fused ones."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import models
from resnet_fused.commands.console import CommandError, progress
from resnet_fused.commands.networks import eager_twin, placed

EARLY_STEPS = 10
EXACT_STEPS = 5
EXACT_BATCH = 32
EXACT_ALLOWED = 1e-9  # relative; float64 rounds at 1e-16, which five steps enlarge a thousandfold
TEST_IMAGES = 360
RATE = 0.01


class Digits(NamedTuple):
    """Images (N, 1, H, W) in [0, 1] and labels (N,), split once and for all."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Comparison(NamedTuple):
    """Two trainings from the same start on the same batches, with what it takes to judge them.

    Training multiplies every difference, so that rounding alone separates two correct programs
    after a few steps: a ReLU whose input is within one rounding of zero opens in one and not in
    the other. The control shows how much: the eager network in its other memory format, the same
    mathematics summed in another order. The mathematics itself is therefore compared in float64.
    """

    eager_losses: list[float]
    fused_losses: list[float]
    control_losses: list[float]
    eager_accuracies: list[float]  # on the test images, after each epoch
    fused_accuracies: list[float]
    eager_step_ms: float
    fused_step_ms: float
    speedup: float
    steps_per_epoch: int
    exact_difference: float  # relative, of the losses of the first steps in float64
    changed_predictions: int  # when eager blocks load the weights that fused blocks trained
    dtype: str

    @property
    def early_difference(self) -> float:
        return _largest_difference(self.fused_losses, self.eager_losses)

    @property
    def control_difference(self) -> float:
        return _largest_difference(self.control_losses, self.eager_losses)

    @property
    def first_difference(self) -> float:
        """Relative difference of the losses before any step."""
        return abs(self.fused_losses[0] - self.eager_losses[0]) / self.eager_losses[0]

    @property
    def first_allowed(self) -> float:
        """A few times what the control shows, and some roundings of the activations' dtype."""
        control = abs(self.control_losses[0] - self.eager_losses[0]) / self.eager_losses[0]
        return 4 * control + 16 * float(torch.finfo(getattr(torch, self.dtype)).eps)

    @property
    def accuracy_difference(self) -> float:
        return abs(self.fused_accuracies[-1] - self.eager_accuracies[-1])

    @property
    def accuracy_allowed(self) -> float:
        """Three standard errors of the difference of two accuracies on this many images."""
        p = (self.fused_accuracies[-1] + self.eager_accuracies[-1]) / 2
        return 3 * math.sqrt(2 * p * (1 - p) / TEST_IMAGES) + 1 / TEST_IMAGES

    def disagreements(self) -> list[str]:
        """Why the two trainings do not agree; empty when they do. Written so that NaN fails."""
        found = []
        if not self.exact_difference <= EXACT_ALLOWED:
            found.append(
                f"in float64 the losses of the first {EXACT_STEPS} steps differ by "
                f"{self.exact_difference:.1e}, more than the {EXACT_ALLOWED:.0e} that rounding "
                "explains"
            )
        if not self.first_difference <= self.first_allowed:
            found.append(
                f"the losses before the first step differ by {self.first_difference:.1e}, more "
                f"than the {self.first_allowed:.1e} that rounding explains"
            )
        if not self.accuracy_difference <= self.accuracy_allowed:
            found.append(
                f"final accuracies differ by {self.accuracy_difference:.1%}, "
                f"more than the {self.accuracy_allowed:.1%} that chance explains"
            )
        if self.changed_predictions > 1:
            found.append(
                f"{self.changed_predictions} predictions change when eager blocks load the "
                "weights trained by fused blocks"
            )
        return found


def load(size: int) -> Digits:
    """scikit-learn's 1797 scanned digits, enlarged from 8x8 to size x size."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CommandError(
            f"demo needs scikit-learn for its digits: {error} (pip install 'resnet_fused[demo]')"
        ) from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])


def train_both(
    digits: Digits,
    epochs: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 32,
    wrap_fused: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Comparison:
    """Train ResNet-20 with eager and with fused blocks, step by step side by side.

    Weights are in float32; bfloat16 runs under autocast. wrap_fused: for tests, which must be able
    to break the fused network and see the comparison fail.
    """
    torch.manual_seed(0)
    fused: nn.Module = models.resnet20(in_channels=1)
    eager = eager_twin(fused)
    control = copy.deepcopy(eager)
    fused = wrap_fused(fused)
    digits = Digits(*(tensor.to(device) for tensor in digits))
    exact_difference = _difference_in_float64(digits, eager, fused, device)
    steps = len(digits.train_images) // batch
    eager_run = _Training(eager, epochs * steps, device, dtype, torch.channels_last)
    fused_run = _Training(fused, epochs * steps, device, dtype, torch.channels_last)
    control_run = _Training(control, epochs * steps, device, dtype, torch.contiguous_format)
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(len(digits.train_images), generator=generator) for _ in range(epochs)]
    batches = [order[i * batch : (i + 1) * batch] for order in orders for i in range(steps)]
    accuracies: tuple[list[float], list[float]] = ([], [])
    for number, chosen in enumerate(
        progress(batches, "training ResNet-20 on digits, eager and fused in turns")
    ):
        data = digits.train_images[chosen], digits.train_labels[chosen]
        # Taking turns at going first keeps the comparison of step times fair.
        for run in (eager_run, fused_run) if number % 2 else (fused_run, eager_run):
            run.step(*data)
        if number < EARLY_STEPS:
            control_run.step(*data)
        if (number + 1) % steps == 0:
            for run, found in zip((eager_run, fused_run), accuracies, strict=True):
                found.append(_accuracy(run.predict(digits.test_images), digits.test_labels))
    predictions = fused_run.predict(digits.test_images)
    eager.load_state_dict(fused.state_dict())
    changed = int((eager_run.predict(digits.test_images) != predictions).sum())
    warm_up = min(EARLY_STEPS, len(batches) // 2)
    times = eager_run.times[warm_up:], fused_run.times[warm_up:]
    return Comparison(
        eager_losses=eager_run.losses,
        fused_losses=fused_run.losses,
        control_losses=control_run.losses,
        eager_accuracies=accuracies[0],
        fused_accuracies=accuracies[1],
        eager_step_ms=statistics.median(times[0]) * 1e3,
        fused_step_ms=statistics.median(times[1]) * 1e3,
        speedup=statistics.median(e / f for e, f in zip(*times, strict=True)),
        steps_per_epoch=steps,
        exact_difference=exact_difference,
        changed_predictions=changed,
        dtype=str(dtype).removeprefix("torch."),
    )


def _difference_in_float64(
    digits: Digits, eager: nn.Module, fused: nn.Module, device: torch.device
) -> float:
    """Largest relative difference of the losses of the first steps, both networks in float64."""
    images, labels = digits.train_images.double(), digits.train_labels
    runs = [
        _Training(
            copy.deepcopy(model).double(), EXACT_STEPS, device, torch.float64, torch.channels_last
        )
        for model in (eager, fused)
    ]
    title = "the first steps in float64"
    for number in progress(range(min(EXACT_STEPS, len(images) // EXACT_BATCH)), title):
        chosen = slice(number * EXACT_BATCH, (number + 1) * EXACT_BATCH)
        for run in runs:
            run.step(images[chosen], labels[chosen])
    pairs = zip(runs[0].losses, runs[1].losses, strict=True)
    return _largest([abs(a - b) / a for a, b in pairs])


class _Training:
    """One network on its way, with its losses and step times."""

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        self.model = placed(model, device, memory_format=memory_format)
        self.memory_format = memory_format
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype.itemsize < 4)
        self.device = device
        self.losses: list[float] = []
        self.times: list[float] = []
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, RATE, total_steps=steps + 1, cycle_momentum=False
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        images = images.contiguous(memory_format=self.memory_format)
        self.model.train()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            out = self.model(images)
        loss = F.cross_entropy(out if out.dtype == images.dtype else out.float(), labels)
        loss.backward()
        self.optimizer.step()
        value = float(loss.detach())  # waits for the device
        self.times.append(time.perf_counter() - start)
        self.losses.append(value)
        self.schedule.step()

    def predict(self, images: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad(), self.autocast:
            out = self.model(images.contiguous(memory_format=self.memory_format))
        return out.argmax(1)


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return float((predictions == labels).float().mean())


def _largest_difference(losses: list[float], others: list[float]) -> float:
    pairs = zip(losses[:EARLY_STEPS], others[:EARLY_STEPS], strict=True)
    return _largest([abs(a - b) for a, b in pairs])


def _largest(values: list[float]) -> float:
    # max() would drop a NaN that does not come first.
    return float(torch.tensor(values, dtype=torch.float64).max())
