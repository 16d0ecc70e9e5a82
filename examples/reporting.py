"""What a training run tells: errors of one line, a progress bar, metrics.csv and TensorBoard."""

import contextlib
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

HISTORY_COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "val_loss",
    "top1",
    "seconds",
    "images_per_second",
)


class UsageError(Exception):
    """A problem that the user can repair: shown as one line, exit code 2."""


def print_error(program: str, error: UsageError) -> None:
    # From a worker of a DataLoader the message arrives behind the worker's traceback.
    message = str(error).strip().splitlines()[-1].split(f"{UsageError.__name__}: ")[-1]
    print(f"{program}: {message}", file=sys.stderr)


def progress(items: Iterable[T], count: int, title: str, show: bool) -> Iterable[T]:
    """A tqdm bar where someone looks: on a terminal, if tqdm is installed."""
    if not (show and sys.stdout.isatty()):
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=title, total=count, leave=False, file=sys.stdout)
    return bar


def output_folder(path: Path) -> Path:
    """Make the folder and prove that files can be written there, before hours of training."""
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write to the folder {str(path)!r}: {error.strerror} (choose another --out)"
        ) from error
    return path


@contextlib.contextmanager
def rewritten(path: Path, mode: str) -> Iterator[IO[Any]]:
    """A file to write, which replaces `path` at once when it is complete, and on the disk.

    At any moment, also at that of a `kill -9`, `path` is the old file or the new one.
    """
    temporary = path.with_name(path.name + ".tmp")  # in the same folder: renaming is atomic there
    try:
        with temporary.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A rename is a change of the folder, which goes to the disk on its own."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Metrics:
    """One row per epoch, in metrics.csv and, where TensorBoard is installed, as its scalars."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self.path = folder / "metrics.csv"
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("TensorBoard is not installed (pip install tensorboard): metrics.csv alone")
            self.writer = None
        else:
            # Scalars of epochs that a killed run wrote, and its checkpoint did not, are dropped.
            self.writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def write(self, history: Sequence[dict[str, Any]]) -> None:
        """The rows of all epochs so far, the last one of which is new."""
        with rewritten(self.path, "w") as file:
            table = csv.DictWriter(file, HISTORY_COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(history)
        if self.writer is not None:
            newest = history[-1]
            for name in HISTORY_COLUMNS[1:]:
                self.writer.add_scalar(name, newest[name], newest["epoch"])
            self.writer.flush()
