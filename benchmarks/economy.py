"""How the cost of searching is compared: what each kind of advantage learns at several costs, on the toy world.

    python benchmarks/economy.py run FOLDER [SEED ...]     # 108 runs of 60 steps for three seeds; resumes
    python benchmarks/economy.py table FOLDER              # what there is, on stdout and in economy.md; economy.png

A run is named KIND-COST-ENTROPY-SEED. It is the README's toy run but for its length and for what its name says.
"""

import subprocess
import sys
from collections import defaultdict, deque
from itertools import product
from pathlib import Path

from ablations import ROOT, cell, figures, validations

KINDS = {
    "coupled": "--advantage grpo",  # the paper's
    "coupled_no_std": "--advantage dr_grpo",
    "decoupled_0.15": "--advantage decoupled --economy_weight 0.15",  # HDPO's
    "mastered": "--advantage mastered --economy_weight 1",
    "gdpo": "--advantage gdpo --economy_weight 0.3",
    "bn_grpo": "--advantage bn_grpo",
}
COSTS, ENTROPIES = ("0.02", "0.1", "0.3"), ("0", "0.03")
LENGTH, WINDOW = "--steps 60 --eval_every 0 --val_limit 120", 5


def run(folder: Path, seeds: list[str]) -> None:
    for seed, (kind, options), cost, entropy in product(seeds, KINDS.items(), COSTS, ENTROPIES):
        path = folder / f"{kind}-{cost}-{entropy}-{seed}"
        if (path / "final" / "config.json").exists():
            continue
        how = f"{options} --search_penalty {cost} --entropy_coef {entropy} {LENGTH}"
        command = [sys.executable, "train.py", "--seed", seed, "--toy_seed", seed, "--resume", "auto", *how.split()]
        subprocess.run([*command, "--run_dir", str(path)], cwd=ROOT, check=True)


def split_at(path: Path) -> float:
    """The first step after which, over WINDOW steps of training, at most a tenth of the conversations about known
    things searched and at least nine tenths of the others did; infinite if there is none."""
    from data import read_jsonl

    last = deque(maxlen=WINDOW)
    for file in sorted((path / "rollouts").glob("step-*.jsonl")):
        searched = defaultdict(list)
        for record in read_jsonl(file):
            searched[record["data_source"].startswith("known")].append(bool(record["calls"]))
        last.append({known: sum(flags) / len(flags) for known, flags in searched.items()})
        known, unknown = (sum(step.get(key, 0.0) for step in last) / WINDOW for key in (True, False))
        if len(last) == WINDOW and known <= 0.1 and unknown >= 0.9:
            return int(file.stem.removeprefix("step-")) + 1
    return float("inf")


def load(folder: Path) -> dict[tuple, list[dict]]:
    """(kind, cost, entropy) -> the figures of each seed after the last step, greedy."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*/final")):
        kind, cost, entropy, _ = path.parent.name.rsplit("-", 3)
        last = validations(path.parent)[-1]
        sampled = {"sampled accuracy": last["sampled"]["all"]["accuracy"]}
        runs[kind, cost, entropy].append({**figures(last["greedy"]), **sampled, "split at": split_at(path.parent)})
    return runs


def table(runs: dict) -> str:
    """Mean (least - most) over the seeds, a row for each kind, cost and entropy bonus."""
    columns = list(next(iter(runs.values()))[0])
    lines = ["| advantage | cost | entropy | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 4) + "|"]
    for (kind, cost, entropy), seeds in sorted(runs.items(), key=lambda item: (item[0][2], item[0])):
        shown = []
        for column in columns:
            values = [seed[column] for seed in seeds]
            shown.append(", ".join(map("{:g}".format, values)) if column == "split at" else cell(values))
        lines.append(f"| {kind} | {cost} | {entropy} | {len(seeds)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(runs: dict, target: Path) -> None:
    """For each cost a panel: known things searched (x) against unknown ones searched (y), a dot for each run, those of
    each kind moved a little, so that none hides another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    drawn = {}
    for panel, cost in zip(panels, COSTS, strict=True):
        for number, kind in enumerate(KINDS):
            for entropy, mark in zip(ENTROPIES, "o^", strict=True):
                seeds = runs.get((kind, cost, entropy), [])
                known = [seed["known: any search"] + 0.02 * (number - 2.5) for seed in seeds]
                unknown = [(seed["names: image"] + seed["facts: text"]) / 2 for seed in seeds]
                (line,) = panel.plot(known, unknown, mark, color=f"C{number}", alpha=0.6)
                if seeds:
                    drawn[f"{kind}, entropy bonus {entropy}"] = line
        panel.set_title(f"a search costs {cost}")
        panel.set_xlabel("known things: searched")
        panel.set_xlim(-0.1, 1.1)
        panel.set_ylim(-0.05, 1.05)
    panels[0].set_ylabel("unknown things: searched as needed")
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center")
    figure.savefig(target, dpi=110)


def main(what: str, folder: str, *seeds: str) -> None:
    if what == "run":
        run(Path(folder), list(seeds) or ["0", "1", "2"])
        return
    runs = load(Path(folder))
    text = table(runs)
    (Path(folder) / "economy.md").write_text(text + "\n")
    print(text)
    draw(runs, Path(folder) / "economy.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
