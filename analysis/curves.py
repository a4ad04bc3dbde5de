"""analysis/curves.py"""

from pathlib import Path

from config import InputError
from data import read_jsonl

PLOTTED = (
    "reward accuracy search_ratio format turns tokens loss entropy grad_norm mismatch/mean lr tokens_per_second".split()
)


def plot(runs: tuple[str, ...]) -> Path:
    """Draw the curves of runs over each other (dashed: greedy validation) into curves.png in the first one's folder.
    Needs matplotlib. Raises InputError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(15, 9), layout="constrained")
    charts = dict(zip(PLOTTED, figure.subplots(3, 4).flat, strict=True))
    for number, folder in enumerate(runs):
        log = list(read_jsonl(Path(folder) / "metrics.jsonl"))
        for key, axes in charts.items():
            axes.set_title(key)
            trained = [(e["step"], e[key]) for e in log if e["phase"] == "train" and e.get(key) is not None]
            judged = [(e["step"], e["greedy"]["all"].get(key)) for e in log if e["phase"] == "eval"]
            judged = [point for point in judged if point[1] is not None]
            axes.plot([p[0] for p in trained], [p[1] for p in trained], color=f"C{number}", label=folder)
            axes.plot([p[0] for p in judged], [p[1] for p in judged], "o--", color=f"C{number}", markersize=3)
    lines, labels = charts["reward"].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center")
    path = Path(runs[0]) / "curves.png"
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({error.strerror})") from None
    return path
