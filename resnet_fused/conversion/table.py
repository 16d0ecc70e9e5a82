"""Rows about modules as text: equal neighbours in one line, long notes below the table."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH = 100  # of the text below the table
LONGEST = 36  # cell; longer ones are cut


class _Component(NamedTuple):
    """Of a path: a name with numbers from first to last behind it, or without any (None)."""

    name: str
    first: int | None
    last: int | None


class Line(NamedTuple):
    """What the table says of one module. Numbers are bytes, shown and summed as megabytes."""

    path: str
    cells: tuple[str | int | None, ...]
    notes: tuple[str, ...]


class _Group(NamedTuple):
    line: Line
    components: tuple[_Component, ...]
    size: int


def table(header: Sequence[str], lines: Sequence[Line], total: bool) -> list[str]:
    """The lines of the table and of its notes. header: names of path and cells.

    Modules that are numbered in a row and differ in nothing else are one line, with the sums of
    their bytes. total: whether the last line is the sum of all.
    """
    texts = list(dict.fromkeys(note for line in lines for note in line.notes))
    rows = [[*header, "notes" if texts else ""], []]
    for group in _grouped(lines):
        name = ".".join(map(_named, group.components)) or "(model)"
        name += f" ({group.size})" if group.size > 1 else ""
        notes = ", ".join(str(texts.index(note) + 1) for note in group.line.notes)
        rows.append([name, *(_cell(cell, group.size) for cell in group.line.cells), notes])
    if total:
        rows.append([f"total ({len(lines)})", *_sums(lines), ""])
    return [*_aligned(rows, [*map(_is_number, lines[0].cells)]), *_numbered(texts)]


def megabytes(count: int | None) -> str:
    """Bytes as megabytes with two decimals, "-" if they are not known."""
    return "-" if count is None else f"{count / 1e6:.2f}"


def wrapped(first: str, text: str) -> str:
    """A paragraph that hangs behind its `first` characters."""
    indent = " " * len(first)
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _grouped(lines: Sequence[Line]) -> list[_Group]:
    """Lines in order, where consecutive numbers in one place of a path are one group."""
    groups = [_Group(line, tuple(map(_component, line.path.split("."))), 1) for line in lines]
    for place in range(max(len(group.components) for group in groups) - 1, -1, -1):
        joined: list[_Group] = []
        for group in groups:
            for i, other in enumerate(joined):
                both = _joined(other, group, place)
                if both is not None:
                    joined[i] = both
                    break
            else:
                joined.append(group)
        groups = joined
    return groups


def _joined(first: _Group, second: _Group, place: int) -> _Group | None:
    """Both as one, if they differ only in numbers at this place, and those follow each other."""
    a, b = first.components, second.components
    if first.line[1:] != second.line[1:] or len(a) != len(b) or len(a) <= place:
        return None
    low, high = a[place], b[place]
    rest_is_same = (a[:place], a[place + 1 :]) == (b[:place], b[place + 1 :])
    if low.last is None or low.name != high.name or low.last + 1 != high.first or not rest_is_same:
        return None
    components = (*a[:place], low._replace(last=high.last), *a[place + 1 :])
    return _Group(first.line, components, first.size + second.size)


def _component(text: str) -> _Component:
    name = text.rstrip("0123456789")
    digits = text[len(name) :]
    if not digits or digits != str(int(digits)):  # "block01" must stay that
        return _Component(text, None, None)
    return _Component(name, int(digits), int(digits))


def _named(component: _Component) -> str:
    name, first, last = component
    if first is None:
        return name
    return f"{name}{first}" if first == last else f"{name}{first}-{last}"


def _cell(cell: str | int | None, count: int) -> str:
    if isinstance(cell, str):
        return cell if len(cell) <= LONGEST else f"{cell[: LONGEST - 3]}..."
    return megabytes(cell if cell is None else cell * count)


def _sums(lines: Sequence[Line]) -> list[str]:
    columns = zip(*(line.cells for line in lines), strict=True)
    sums = [sum(c for c in column if isinstance(c, int)) for column in columns]
    return [
        megabytes(total) if _is_number(cell) else ""
        for total, cell in zip(sums, lines[0].cells, strict=True)
    ]


def _is_number(cell: str | int | None) -> bool:
    return not isinstance(cell, str)


def _aligned(rows: list[list[str]], are_numbers: Sequence[bool]) -> list[str]:
    """rows: the header, an empty one for the rule, and the others."""
    columns = range(len(rows[0]))
    widths = [max(len(row[column]) for row in rows if row) for column in columns]
    rows[1] = ["-" * width for width in widths]
    to_the_right = (False, *are_numbers, False)
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _numbered(texts: Sequence[str]) -> list[str]:
    return [wrapped(f"{number}: ", text) for number, text in enumerate(texts, 1)]
