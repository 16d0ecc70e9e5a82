"""The demo's plots and its one-page report."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from resnet_fused.commands.console import CommandError, atomic_path, write_atomically
from resnet_fused.commands.digits import EARLY_STEPS, Comparison
from resnet_fused.commands.timing import Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EAGER, FUSED, OTHER = "#4c78a8", "#e45756", "#8c8c8c"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
img { max-width: 100% }
pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: 1rem }
.ok { color: #2a7f3f } .failed { color: #c0392b }
"""


def load_pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing into files. Raises CommandError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise CommandError(
            f"demo needs matplotlib for its plots: {error} (pip install 'resnet_fused[demo]')"
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_training(run: Comparison, path: Path) -> None:
    """Loss and accuracy of both trainings over each other, and the distance between the losses."""
    pyplot = load_pyplot()
    figure, (losses, accuracies, distance) = pyplot.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained"
    )
    losses.plot(run.eager_losses, color=EAGER, linewidth=2.5, label="eager")
    losses.plot(run.fused_losses, color=FUSED, linewidth=1, linestyle="--", label="fused")
    losses.set(title="training loss", xlabel="step", yscale="log")
    epochs = range(1, len(run.eager_accuracies) + 1)
    for values, colour, style, label in (
        (run.eager_accuracies, EAGER, "o-", "eager"),
        (run.fused_accuracies, FUSED, "x--", "fused"),
    ):
        accuracies.plot(epochs, [100 * v for v in values], style, color=colour, label=label)
    accuracies.set(title="accuracy on test digits (%)", xlabel="epoch")
    accuracies.xaxis.get_major_locator().set_params(integer=True)
    for values, colour, label in (
        (run.fused_losses, FUSED, "fused"),
        (run.control_losses, OTHER, "control: eager, other memory format"),
    ):
        # No lower than what float32 can resolve: a logarithm cannot show equality.
        gaps = [max(abs(a - b), 1e-8) for a, b in zip(values, run.eager_losses, strict=False)]
        distance.plot(gaps, color=colour, label=label)
    distance.axvspan(0, EARLY_STEPS - 1, color="#eeeeee", zorder=0)
    distance.set(title="distance of loss from eager's", xlabel="step", yscale="log")
    for axes in (losses, accuracies, distance):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_timing(timings: dict[str, Timing], title: str, path: Path) -> None:
    """Median times, with the 20th and 80th percentile."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.5 * len(timings)), layout="constrained")
    names = list(timings)
    for position, name in enumerate(names):
        timing = timings[name]
        spread = [[timing.median_ms - timing.p20_ms], [timing.p80_ms - timing.median_ms]]
        colour = FUSED if name == "fused" else OTHER
        axes.barh(position, timing.median_ms, 0.7, xerr=spread, color=colour, capsize=3)
        text = f"  {timing.median_ms:.4g} ms, {timing.speedup:.2f}x eager"
        axes.text(timing.p80_ms, position, text, va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(timing.p80_ms for timing in timings.values()))
    axes.set(xlabel="ms per batch (median; whiskers: 20th to 80th percentile)")
    axes.set_title(title, fontsize=10)
    _save(figure, path)


class Page:
    """A self-contained HTML page that is written in one go."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def verdict(self, text: str, passed: bool) -> None:
        kind = "ok" if passed else "failed"
        self._parts.append(f'<p class="{kind}"><b>{html.escape(text)}</b></p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [_cells("th", header), *(_cells("td", row) for row in rows)]
        self._parts.append(f"<table>{''.join(lines)}</table>")

    def preformatted(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def image(self, path: Path, alternative: str) -> None:
        data = base64.b64encode(path.read_bytes()).decode()
        self._parts.append(
            f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'
        )

    def write(self, path: Path) -> None:
        title = html.escape(self.title)
        body = "\n".join(self._parts)
        write_atomically(
            path,
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
            f"<style>{STYLE}</style>\n<h1>{title}</h1>\n{body}\n</html>\n",
        )


def _cells(tag: str, row: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"


def _save(figure: "Figure", path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    load_pyplot().close(figure)
