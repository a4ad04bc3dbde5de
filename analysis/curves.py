"""The curves of runs as a picture: `python -m analysis curves RUN [RUN...]`. Needs matplotlib."""

from dataclasses import dataclass
from pathlib import Path

from analysis.results import read_log
from config import Options, need, option, replacing
from data import refusing

KEYS = "reward accuracy search_ratio format turns tokens loss entropy grad_norm mismatch/mean lr tokens_per_second"


@dataclass(frozen=True)
class CurvesOptions(Options):
    """Curves."""

    out: str = option("", "where to write the picture (none: curves.png in the first run)")


def plot(runs: list[str], options: CurvesOptions) -> Path:
    """Draw the metrics of runs over each other (dashed: greedy validation); returns the picture's path. Raises
    InputError."""
    with refusing("curves needs matplotlib: pip install matplotlib", ImportError):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 9), layout="constrained")
    charts = dict(zip(KEYS.split(), figure.subplots(3, 4).flat, strict=True))
    for number, run in enumerate(runs):
        log = read_log(run)
        for key, axes in charts.items():
            axes.set_title(key)
            axes.plot(*_points(log, key, "train"), color=f"C{number}", label=run)
            axes.plot(*_points(log, key, "eval"), "o--", color=f"C{number}", markersize=3)
    lines, labels = charts["reward"].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center")
    path = Path(options.out or Path(runs[0]) / "curves.png")
    form = path.suffix.lstrip(".").lower()
    need(form in figure.canvas.get_supported_filetypes(), f"{path}: matplotlib writes no such kind of file")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=form)
    return path


def _points(log, key, phase):
    """(steps, values) of a metric; of a validation, the greedy one over all data sources."""
    steps, values = [], []
    for entry in log:
        figures = (entry.get("greedy") or {}).get("all", {}) if phase == "eval" else entry
        if entry["phase"] == phase and isinstance(figures.get(key), int | float):
            steps.append(entry["step"])
            values.append(figures[key])
    return steps, values
