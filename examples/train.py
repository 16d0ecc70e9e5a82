"""Train a ResNet, fused or eager, in one process or many, and continue after any interruption.

    python examples/train.py                                   # scikit-learn's digits, on a laptop
    python examples/train.py --root DIR --epochs 200           # CIFAR-10: DIR/cifar-10-batches-py
    python examples/train.py --root DIR --arch resnet50 --amp bf16 --workers 8
                                                               # DIR/train/CLASS/*, DIR/val/CLASS/*
    torchrun --nproc-per-node 4 examples/train.py --root DIR   # one process per GPU

The same command again continues from the last complete epoch, whatever ended it. The folder --out
gets last.pt, best.pt, metrics.csv and TensorBoard's scalars; the last line on stdout is the result
as JSON. The "model" in a checkpoint is a plain state_dict, which unfused models load as well.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import checkpoint
import data
import torch
from reporting import Metrics, UsageError, output_folder, print_error, progress
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import resnet_fused as rf

AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What may change between the start of a training and its continuation.
FREE_ARGUMENTS = {"root", "out", "resume", "epochs", "workers", "eager", "compile", "device"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for what the user can repair (one line says what), 130 when interrupted."""
    is_first = os.environ.get("RANK", "0") == "0"
    last = None
    try:
        arguments = parse(argv)
        last = arguments.out / "last.pt"
        result = train(arguments)
    except UsageError as error:
        print_error("train.py", error)
        return 2
    except KeyboardInterrupt:
        if is_first:
            saved = last is not None and last.exists()
            hint = f"the last complete epoch is in {last}" if saved else "no epoch is complete"
            print(f"\ntrain.py: interrupted; {hint}", file=sys.stderr)
        return 130
    if is_first:
        print(json.dumps(result))
    return 0


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything from the data to the result, which is the same in every process."""
    dataset = data.load(arguments.root, arguments.image_size, arguments.limit)
    with processes(arguments.device) as process:
        training = Training(arguments, dataset, process)
        if process.is_first:
            out = output_folder(arguments.out)
        training.resume()
        if training.epoch < arguments.epochs and process.is_first:
            metrics = Metrics(out, training.epoch + 1)
        while training.epoch < arguments.epochs:
            training.run_epoch()
            state = training.state()
            if process.is_first:
                # last.pt comes last: a run killed before it trains this epoch again.
                if training.is_best():
                    checkpoint.save(out / "best.pt", state)
                metrics.write(training.history)
                checkpoint.save(out / "last.pt", state)
                print(training.summary(), flush=True)
        return training.result()


class Process(NamedTuple):
    """One of the processes that train together, and the device that it trains on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes files and prints."""
        return self.rank == 0


@contextlib.contextmanager
def processes(device_name: str) -> Iterator[Process]:
    """Join the other processes, if torchrun started some."""
    device = torch.device(device_name)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Process(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()


def build_network(arch: str, classes: int, eager: bool = False, sync_bn: bool = False) -> nn.Module:
    """A network of `resnet_fused.models`, or one of torchvision's that those lack, then fused.

    Raises UsageError on a name that neither has.
    """
    norm: type[nn.Module] = nn.SyncBatchNorm if sync_bn else nn.BatchNorm2d
    if eager:
        # Blocks fuse the normalisations that they know. A subclass could compute anything, so
        # around this one they run their layers one by one, as eager PyTorch does.
        norm = type(f"Eager{norm.__name__}", (norm,), {})
    if arch.islower() and arch in rf.models.__all__:
        network: nn.Module = getattr(rf.models, arch)(num_classes=classes, norm_layer=norm)
        return network
    network = torchvision_constructor(arch)(num_classes=classes, norm_layer=norm)
    return network if eager else rf.fuse(network)


def torchvision_constructor(arch: str) -> Callable[..., nn.Module]:
    ours = ", ".join(name for name in rf.models.__all__ if name.islower())
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
        raise UsageError(
            f"--arch must be one of {ours}, got {arch!r}; others are torchvision's, which cannot "
            f"be imported: {error}"
        ) from error
    is_resnet = arch.startswith(("resnet", "resnext", "wide_resnet"))
    constructor = getattr(models, arch, None) if is_resnet else None
    if not callable(constructor):
        raise UsageError(f"--arch must be {ours} or a ResNet of torchvision, got {arch!r}")
    return constructor


class Training:
    """A network on its way through the epochs."""

    def __init__(self, arguments: argparse.Namespace, dataset: data.Data, process: Process) -> None:
        self.arguments = arguments
        self.dataset = dataset
        self.process = process
        self.epoch = 0  # so many are complete
        self.history: list[dict[str, Any]] = []  # a row of metrics.csv for each of them
        self._make_batches()
        torch.manual_seed(arguments.seed)
        self._make_network()
        self._make_optimizer()
        # Each process augments its images in its own way.
        torch.manual_seed(arguments.seed + process.rank)

    def _make_batches(self) -> None:
        arguments, process = self.arguments, self.process
        share = data.Share(process.rank, process.world_size)
        # Workers are new in each epoch and take their seeds from this process, whose random state a
        # checkpoint holds. That of persistent workers would be lost.
        loader = {"num_workers": arguments.workers, "pin_memory": process.device.type == "cuda"}
        self.train_batches = data.train_batches(
            self.dataset.train, arguments.batch_size, share, arguments.seed, **loader
        )
        self.val_batches = data.val_batches(self.dataset.val, arguments.batch_size, share, **loader)
        self.steps_per_epoch = len(self.train_batches) // arguments.accumulate
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--accumulate must be at most {len(self.train_batches)}, the number of batches "
                f"per epoch, got {arguments.accumulate}"
            )

    def _make_network(self) -> None:
        arguments, process = self.arguments, self.process
        self.memory_format = getattr(torch, arguments.memory_format)
        # On CPUs DistributedDataParallel refuses SyncBatchNorm, and fused blocks take it.
        sync_later = arguments.sync_bn and process.device.type == "cpu"
        sync_now = arguments.sync_bn and not sync_later
        network = build_network(arguments.arch, self.dataset.classes, arguments.eager, sync_now)
        network.to(process.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        if arguments.compile:
            network.compile()
        self.network = self.parallel = network
        if process.world_size > 1:
            devices = [process.device] if process.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(network, devices)
        if sync_later:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)

    def _make_optimizer(self) -> None:
        arguments, steps = self.arguments, self.steps_per_epoch
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=arguments.lr,
            momentum=arguments.momentum,
            weight_decay=arguments.weight_decay,
        )
        curve = warmup_and_cosine(round(arguments.warmup * steps), arguments.epochs * steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, curve)
        device_type = self.process.device.type
        self.scaler = torch.amp.GradScaler(device_type, enabled=arguments.amp == "fp16")
        self.autocast = torch.autocast(
            device_type, AMP_DTYPES[arguments.amp], enabled=arguments.amp != "none"
        )

    def run_epoch(self) -> None:
        """Train on every image once, validate, and add a row to the history."""
        rate = self.optimizer.param_groups[0]["lr"]
        start = time.perf_counter()
        train_loss = self._train()
        seconds = time.perf_counter() - start
        if not math.isfinite(train_loss):
            raise UsageError(
                f"the loss became {train_loss} in epoch {self.epoch + 1} (lower --lr, or raise "
                "--warmup); checkpoints hold the epoch before"
            )
        val_loss, top1 = self._validate()
        self.epoch += 1
        images = self.steps_per_epoch * self.arguments.accumulate * self.arguments.batch_size
        self.history.append(
            {
                "epoch": self.epoch,
                "lr": rate,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "top1": top1,
                "seconds": round(seconds, 3),
                "images_per_second": round(images * self.process.world_size / seconds, 1),
            }
        )

    def _train(self) -> float:
        """The mean loss of an epoch of optimizer steps."""
        self.parallel.train()
        self.train_batches.sampler.set_epoch(self.epoch)
        accumulate = self.arguments.accumulate
        count = self.steps_per_epoch * accumulate
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.process.device)
        batches = self._on_device(self.train_batches, count, f"epoch {self.epoch + 1}")
        for number, (images, labels) in enumerate(batches):
            is_step = (number + 1) % accumulate == 0
            # Gradients travel between the processes once per step, with those of the last batch.
            with contextlib.nullcontext() if is_step else self._no_sync():
                with self.autocast:
                    logits = self.parallel(images).float()
                loss = F.cross_entropy(
                    logits, labels, label_smoothing=self.arguments.label_smoothing
                )
                self.scaler.scale(loss / accumulate).backward()
            loss_sum += loss.detach()
            if is_step:
                self._step()
        return float(total(loss_sum)) / count / self.process.world_size

    def _step(self) -> None:
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() >= scale:  # else fp16 overflowed, and no step was taken
            self.schedule.step()

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy on all validation images."""
        self.network.eval()
        self._share_running_statistics()
        sums = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        batches = self._on_device(self.val_batches, len(self.val_batches), "validation")
        for images, labels in batches:
            # Not `parallel`, in which processes wait for each other at every batch: the number of
            # batches may differ.
            with self.autocast:
                logits = self.network(images).float()
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
        loss_sum, correct_sum = total(sums).tolist()
        count = len(self.dataset.val)
        return loss_sum / count, correct_sum / count

    def _on_device(self, batches: Any, count: int, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `count` batches, with a progress bar."""
        device = self.process.device
        chosen = itertools.islice(batches, count)
        for images, labels in progress(chosen, count, title, show=self.process.is_first):
            images = images.to(device, non_blocking=True)
            yield (
                images.contiguous(memory_format=self.memory_format),
                labels.to(device, non_blocking=True),
            )

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        if self.process.world_size == 1:
            return contextlib.nullcontext()
        return self.parallel.no_sync()  # type: ignore[operator]

    def _share_running_statistics(self) -> None:
        """Every process validates with those of the first, which the checkpoint holds."""
        if self.process.world_size > 1:
            for buffer in self.network.buffers():
                dist.broadcast(buffer, 0)

    def is_best(self) -> bool:
        """Whether the last epoch is the first with the highest accuracy so far."""
        return self._best_epoch() == self.epoch

    def _best_epoch(self) -> int:
        return max(self.history, key=lambda row: row["top1"])["epoch"]

    def summary(self) -> str:
        last = self.history[-1]
        return (
            f"epoch {self.epoch}/{self.arguments.epochs}: train loss {last['train_loss']:.4f}, "
            f"val loss {last['val_loss']:.4f}, top-1 {last['top1']:.2%}, {last['seconds']:.1f} s, "
            f"{last['images_per_second']:.0f} images/s"
        )

    def result(self) -> dict[str, Any]:
        last, best = self.history[-1], self.history[self._best_epoch() - 1]
        return {
            "arch": self.arguments.arch,
            "data": self.dataset.name,
            "blocks": "eager" if self.arguments.eager else "fused",
            **last,
            "best_top1": best["top1"],
            "best_epoch": best["epoch"],
            "checkpoint": str(self.arguments.out / "last.pt"),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. All processes have to call it."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "random_states": checkpoint.random_states(),
            "arguments": plain(self.arguments),
            "data": self.dataset.name,
            "classes": self.dataset.classes,
        }

    def resume(self) -> None:
        """Continue as --resume says. Raises UsageError where the checkpoint is of another run."""
        choice = self.arguments.resume
        path = self.arguments.out / "last.pt" if choice == "auto" else Path(choice)
        if choice == "never" or (choice == "auto" and not path.exists()):
            return
        state = checkpoint.load(path)
        self._check_same_run(state, path)
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.history = state["epoch"], state["history"]
        checkpoint.restore_random_state(state["random_states"][self.process.rank])
        if self.process.is_first:
            print(f"continuing after epoch {self.epoch} of {path}", flush=True)

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        own = {
            **plain(self.arguments),
            "data": self.dataset.name,
            "classes": self.dataset.classes,
            "processes": self.process.world_size,
        }
        theirs = {
            **state["arguments"],
            "data": state["data"],
            "classes": state["classes"],
            "processes": len(state["random_states"]),
        }
        differences = [
            f"{name} {theirs.get(name)} (now {own[name]})"
            for name in own
            if name not in FREE_ARGUMENTS and theirs.get(name) != own[name]
        ]
        if differences:
            raise UsageError(
                f"{str(path)!r} was trained with {', '.join(differences)}: pass the same, another "
                "--out, or --resume never"
            )


def warmup_and_cosine(warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate per step: up on a line, then down on half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return (1 + math.cos(math.pi * min(1.0, done))) / 2

    return factor


def total(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments in types that a checkpoint may hold."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the options)")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; UsageError where they make no sense."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train.py"
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.warmup >= arguments.epochs:
        parser.error(f"--warmup must be less than --epochs, got {arguments.warmup:g}")
    if arguments.out is None:
        name = arguments.root.resolve().name if arguments.root else "digits"
        arguments.out = Path("runs") / f"{arguments.arch}-{name}"
    check_device(arguments)
    return arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of CIFAR-10 (its python version) or with train/ and val/; "
        "default: scikit-learn's digits",
    )
    add("--out", type=Path, metavar="DIR", help="results; default runs/ARCH-DATA")
    add(
        "--arch",
        default="resnet20",
        help="resnet20 ... resnet110 for small images, resnet18 ... wide_resnet101_2, or another "
        "ResNet of torchvision; default %(default)s",
    )
    parser.set_defaults(eager=False)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--fused", dest="eager", action="store_false", help="train fused blocks (the default)"
    )
    kind.add_argument("--eager", action="store_true", help="train with plain PyTorch instead")
    add(
        "--image-size",
        type=positive,
        metavar="N",
        help="height and width; default 16 for digits, 32 for CIFAR-10, 224 for folders",
    )
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="use N images of each split only, to try something out; default: all",
    )
    add("--epochs", type=positive, default=10, metavar="N", help="default %(default)s")
    add(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images per process and forward pass; default %(default)s",
    )
    add(
        "--accumulate",
        type=positive,
        default=1,
        metavar="N",
        help="forward passes per step of the optimizer; default %(default)s",
    )
    add(
        "--lr",
        type=number(above=0),
        default=0.1,
        metavar="X",
        help="learning rate after the warmup; default %(default)s",
    )
    add(
        "--warmup",
        type=number(),
        default=0.5,
        metavar="EPOCHS",
        help="the learning rate rises for so long, then falls as a cosine; default %(default)s",
    )
    add("--momentum", type=number(below=1), default=0.9, metavar="X", help="default %(default)s")
    add("--weight-decay", type=number(), default=5e-4, metavar="X", help="default %(default)s")
    add(
        "--label-smoothing",
        type=number(below=1),
        default=0.0,
        metavar="X",
        help="default %(default)s",
    )
    add(
        "--amp",
        choices=AMP_DTYPES,
        default="none",
        help="autocast to bfloat16, or to float16 with scaled gradients; default %(default)s",
    )
    add(
        "--memory-format",
        choices=("channels_last", "contiguous_format"),
        default="channels_last",
        help="default %(default)s",
    )
    add("--sync-bn", action="store_true", help="normalise by the batches of all processes together")
    add("--compile", action="store_true", help="run the network through torch.compile")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; default: cuda where there is one",
    )
    add(
        "--workers",
        type=natural,
        default=2,
        metavar="N",
        help="processes that read images from folders; default %(default)s",
    )
    add("--seed", type=natural, default=0, metavar="N", help="default %(default)s")
    add(
        "--resume",
        default="auto",
        metavar="{auto,never,PATH}",
        help="auto: continue from last.pt in --out if it is there; never: start anew and overwrite "
        "it; PATH: continue from that checkpoint; default %(default)s",
    )


def check_device(arguments: argparse.Namespace) -> None:
    """Raise UsageError where this process cannot train on the device."""
    try:
        device = torch.device(arguments.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {arguments.device!r} cannot be used: {reason}") from error
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda" and own >= torch.cuda.device_count():
        raise UsageError(
            f"--nproc-per-node of torchrun must be at most {torch.cuda.device_count()}, the number "
            f"of GPUs, got {os.environ['LOCAL_WORLD_SIZE']}"
        )
    if device.type == "cpu" and arguments.sync_bn and arguments.eager:
        raise UsageError("--sync-bn must be left out with --eager on CPUs: eager's needs GPUs")
    if device.type == "cpu" and arguments.sync_bn and arguments.compile:
        raise UsageError("--sync-bn must be left out with --compile on CPUs: layers run as eager's")


def number(above: float = -math.inf, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of at least 0, greater than `above` and less than `below`."""

    def parsed(text: str) -> float:
        value = float(text)
        if not (max(0.0, above) <= value < below and value > above):
            least = "greater than 0" if above == 0 else "at least 0"
            most = f" and less than {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {least}{most}, got {text}")
        return value

    parsed.__name__ = "number"
    return parsed


def natural(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    # torchrun and job schedulers stop a process with SIGTERM: that is an interrupt, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
