"""What every command needs to talk to its user: errors, tables, progress, safe files."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class CommandError(Exception):
    """A problem that the user can repair; shown as one line, without a traceback."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text table; a column whose cells all start like numbers is aligned to the right."""
    cells = [list(row) for row in rows]
    widths = [max([len(title)] + [len(row[i]) for row in cells]) for i, title in enumerate(header)]
    numeric = [all(row[i][:1] in "0123456789-." for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A tqdm bar on a terminal, one line otherwise (logs stay readable, tqdm stays optional)."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            import tqdm

            bar: Iterable[T] = tqdm.tqdm(items, desc=description, total=total, leave=False)
            return bar
    print(f"{description} ...", file=sys.stderr, flush=True)
    return items


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it on success and removed on any failure."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Create `path` if needed and check early that files can be written there.

    A folder made here is removed again when it is still empty after a failure.
    """
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CommandError(
            f"cannot write to the folder {str(path)!r}: {error.strerror} (choose another one "
            "with --out DIR)"
        ) from error
    try:
        yield path
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def attempt(probe: Callable[[], T]) -> tuple[T | None, str | None]:
    """(result, None), or (None, why not): for reports that must survive any failure."""
    try:
        return probe(), None
    except Exception as error:  # a report about a broken installation must not break
        return None, f"{type(error).__name__}: {error}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
