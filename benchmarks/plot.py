"""Draw the CSV files of a results folder: python benchmarks/plot.py benchmarks/results/<device>."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from harness import read_rows, skipped

COLOURS = {
    "eager": "#8c8c8c",
    "eager_nchw": "#c7c7c7",
    "compile": "#4c78a8",
    "compile_max_autotune": "#9ecae9",
    "onnxruntime": "#b279a2",
    "openvino": "#72b7b2",
    "cudnn": "#eeca3b",
    "reference": "#d6a5c9",
    "cuda": "#e45756",
    "fused": "#e45756",
}
Rows = list[dict[str, str]]


def plot_folder(folder: Path) -> list[Path]:
    """One PNG beside each CSV file; nothing but the CSV files is read."""
    try:
        import matplotlib
    except ImportError as error:
        skipped("plots", error)
        return []
    matplotlib.use("agg")
    return [_plot(path) for path in sorted(folder.glob("*.csv"))]


def _plot(path: Path) -> Path:
    from matplotlib import pyplot

    groups = latest(read_rows(path))
    in_bytes = any(row["gb_per_s"] for rows in groups.values() for row in rows)
    column, title = (
        ("gb_per_s", "GB/s that must move (dashed: a plain copy)")
        if in_bytes
        else ("ratio_to_eager", "times as fast as eager (channels_last) in the same run")
    )
    height = 0.9 + sum(0.28 * len(rows) + 0.25 for rows in groups.values())
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    position, ticks, labels = 0.0, [], []
    for key, rows in groups.items():
        start = position
        for row in rows:
            value = float(row[column] or 0)
            colour = COLOURS.get(row["provider"], "#54a24b")
            axes.barh(position, value, 0.9, color=colour)
            text = f" {row['provider']}  {value:.3g}  ({float(row['median_ms']):.4g} ms)"
            axes.text(value, position, text, va="center", fontsize=7)
            position += 1
        ticks.append((start + position - 1) / 2)
        labels.append("\n".join(part for part in key if part))
        position += 0.9
    if in_bytes:
        ceiling = max(float(row["copy_gb_per_s"]) for rows in groups.values() for row in rows)
        axes.axvline(ceiling, color="black", linestyle="--", linewidth=0.8)
    else:
        axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.35, y=0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel(title, fontsize=8)
    row = next(iter(groups.values()))[0]
    axes.set_title(
        f"{row['benchmark']}: {row['device_name']}, {row['threads']} threads, "
        f"torch {row['torch']}, resnet_fused {row['library']} ({row['commit']})",
        fontsize=9,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
    return target


def latest(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], Rows]:
    """Rows by comparison; where a comparison was run again, only its newest run."""
    found: dict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        title, setting = f"{row['subject']} {row['mode']}", f"{row['dtype']} batch {row['batch']}"
        found[title, setting, row["shape"]].append(row)
    newest = {key: max(row["timestamp"] for row in group) for key, group in found.items()}
    return {
        key: [row for row in group if row["timestamp"] == newest[key]]
        for key, group in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    drawn = plot_folder(folder)
    for path in drawn:
        print(path)
    if not drawn:
        print(f"nothing drawn: no CSV files in {folder}, or no matplotlib", file=sys.stderr)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
