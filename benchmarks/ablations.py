"""The data, the table and the figure of benchmarks/ablations.sh.

python benchmarks/ablations.py data SEED FOLDER     # train-, val- and search-heavy-SEED.parquet, correct-SEED.jsonl
python benchmarks/ablations.py teacher SEED FOLDER  # teacher-world-SEED: the world with a model that knows other things
python benchmarks/ablations.py failing SHARE ...    # train.py, a share of the searches in its rollouts failing
python benchmarks/ablations.py table FOLDER         # table on stdout and in ablations.md, figure in ablations.png
"""

import random
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FIGURES = {  # column -> (kind of question, figure)
    "accuracy": ("all", "accuracy"), "known: any search": ("known", "any"),
    "names: image": ("unknown name", "image_search"), "names: text": ("unknown name", "text_search"),
    "facts: image": ("unknown fact", "image_search"), "facts: text": ("unknown fact", "text_search"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- data


def make_data(seed: str, folder: Path) -> None:
    import toy
    from config import Config, parse
    from policy import init_distributed

    cfg, recipe = parse(["--toy_seed", seed], Config, toy.Recipe)
    folder.mkdir(parents=True, exist_ok=True)
    init_distributed(cfg)
    world = toy.ensure(recipe, cfg)
    for source in (world.train, world.val):
        shutil.copyfile(source, folder / f"{source.stem}-{seed}.parquet")
    heavy, correct = folder / f"search-heavy-{seed}.parquet", folder / f"correct-{seed}.jsonl"
    if not heavy.exists():
        search_heavy(world.train, heavy)
    if not correct.exists():
        right_conversations(world, cfg, recipe, correct)


def search_heavy(source: Path, target: Path) -> None:
    """All questions about unknown things, and one in eight of the others."""
    import pyarrow.parquet as pq

    rows = pq.read_table(source)
    keep, known = [], 0
    for kind in rows["data_source"].to_pylist():
        keep.append(not kind.startswith("known") or known % 8 == 0)
        known += kind.startswith("known")
    pq.write_table(rows.filter(keep), target)


def right_conversations(world, cfg, recipe, target: Path) -> None:
    """A script that searches when it must and only then, about the training questions; what it gets wrong, because a
    search did not find the thing, is left out by train.py's sft_min_reward."""
    import tools
    from chat import Chat
    from data import load_questions, write_jsonl
    from reward import record, score_episode
    from rollout import run
    from search.index import OfflineSearch, SearchDB
    from toy.lessons import ScriptedEngine, SloppyPolicy
    from toy.world import make_things

    class Teacher(SloppyPolicy):
        def plan(self, thing, what, rng):
            if thing.belief(what) != "unknown":
                return ()
            return ("image_search",) if what == "name" else ("image_search", "text_search")

    chat = Chat(world.model, cfg)
    teacher = Teacher(chat, recipe)
    things = {t.name: t for t in make_things(random.Random(f"world {recipe.toy_seed}"), recipe.toy_named)}
    questions = load_questions((str(world.train),), progress=False)
    for q in questions:
        name, what = q.data_id.split("-")
        teacher.asked[chat.picture(q.images[0]).key] = (things[name], what)
    search = OfflineSearch(SearchDB(world.index), tools.results(cfg))
    episodes = run(questions, ScriptedEngine(chat, teacher), search, chat, cfg, ordered=True)
    header = {"header": {"config": {"mode": "agent", "files": [str(world.train)]}}}
    write_jsonl(target, [header, *(record(e, score_episode(e, cfg)) for e in episodes)])


def make_teacher(seed: str, folder: Path) -> None:
    """A model that knows other things: of those that the student is asked about in training and does not know, as many
    as the student knows. What the student knows is unknown to it. Its training questions are about the same 224 things.
    """
    import toy
    from config import Config, parse
    from toy.build import build
    from toy.world import KNOWN, TAUGHT, make_things

    cfg, recipe = parse(["--toy_seed", seed], Config, toy.Recipe)
    things = make_things(random.Random(f"world {seed}"))
    known, of_lessons, asked = things[:KNOWN], things[KNOWN : KNOWN + TAUGHT], things[KNOWN + TAUGHT :]
    strange = [replace(t, known=False, named=False) for t in known]
    known = [replace(t, known=True, named=True) for t in asked[:KNOWN]]
    build(folder / f"teacher-world-{seed}", cfg, recipe, [*known, *of_lessons, *strange, *asked[KNOWN:]])


def train_failing(share: str, *options: str) -> None:
    """train.py with these options; in its rollouts, not in its validations, a share of the searches fails."""
    import rollout
    import train
    from config import run_main
    from data import Result
    from search.index import OfflineSearch

    draws, search, roll_out = random.Random(share), OfflineSearch.search, train.Run.roll_out

    def search_or_fail(self, call, question):
        if draws.random() < float(share):
            return Result("error", error="no connection", error_kind="connection")
        return search(self, call, question)

    def roll_out_failing(self, *how):
        with patch.object(OfflineSearch, "search", search_or_fail):
            return roll_out(self, *how)

    rollout.MAX_FAILED_CALLS = 1.0  # where few calls are left, most of a step's may fail by chance: do not stop
    train.Run.roll_out, sys.argv = roll_out_failing, ["train.py", *options]
    run_main(train.main)


# -------------------------------------------------------------------------------------------------------- table


def figures(entry: dict) -> dict[str, float]:
    """The columns of one validation (greedy or sampled)."""
    known = [entry[kind] for kind in ("known name", "known fact")]
    searched = [k["image_search"] + k["text_search"] - k["combined"] for k in known]
    entry = entry | {"known": {"any": sum(searched) / 2}}
    return {column: entry[kind][figure] for column, (kind, figure) in FIGURES.items()}


def validations(run: Path) -> list[dict]:
    from data import read_jsonl

    return [entry for entry in read_jsonl(run / "metrics.jsonl") if entry["phase"] == "eval"]


def load(folder: Path) -> tuple[dict, dict]:
    """{name: [figures of a seed]} after the last step, greedy; the same at temperature 1. "warm-up" is before it."""
    greedy, sampled = defaultdict(list), defaultdict(list)
    for path in sorted(folder.glob("*/final")):
        name = path.parent.name.rpartition("-")[0]
        evals = validations(path.parent)
        for mode, out in (("greedy", greedy), ("sampled", sampled)):
            out[name].append(figures(evals[-1][mode]))
            if name == "grpo":
                out["warm-up"].append(figures(evals[0][mode]))
    return greedy, sampled


def modes(folder: Path) -> dict[str, list[dict]]:
    """The grpo model asked directly, with both searches forced, and on demand: {mode: [summary of a seed]}."""
    from analysis.figures import summarize
    from analysis.results import read_results
    from config import Config

    found = defaultdict(list)
    for mode in ("direct", "pipeline"):
        for path in sorted(folder.glob(f"{mode}-*.jsonl")):
            found[mode].append(summarize(read_results(path)[1], Config())["all"])
    found["agent"] = [validations(path.parent)[-1]["greedy"]["all"] for path in sorted(folder.glob("grpo-*/final"))]
    return found


def cell(values: list[float]) -> str:
    middle = f"{np.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}-{max(values):.2f})"


def ordered(runs: dict) -> list[str]:
    """The start first, whole runs before short ones, each after the one that it differs from."""
    first = ("warm-up", "grpo")
    rest = sorted(set(runs) - {*first}, key=lambda name: (name.startswith("short"), name != "short-grpo", name))
    return [name for name in first if name in runs] + rest


def table(folder: Path) -> str:
    """Mean (least - most) over the seeds."""
    lines = []
    for title, runs in zip(("greedy", "temperature 1"), load(folder), strict=True):
        lines += [f"| {title} | seeds | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 2) + "|"]
        for name in ordered(runs):
            cells = " | ".join(cell([seed[column] for seed in runs[name]]) for column in FIGURES)
            lines.append(f"| {name} | {len(runs[name])} | {cells} |")
        lines.append("")
    for mode, seeds in modes(folder).items():
        accuracy, ratio = (cell([s[key] for s in seeds]) for key in ("accuracy", "search_ratio"))
        lines.append(f"{mode}, the grpo model ({len(seeds)} seeds, greedy): accuracy {accuracy}, search ratio {ratio}")
    return "\n".join(lines)


def draw(folder: Path) -> None:
    """A panel for each figure, a line for each run: a dot for a seed, a bar for their mean."""
    from matplotlib.figure import Figure

    greedy, sampled = load(folder)
    names = ordered(greedy)[::-1]
    figure = Figure(figsize=(13, 1.2 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(FIGURES), sharey=True)
    for panel, column in zip(panels, FIGURES, strict=True):
        for runs, color, shift, label in ((greedy, "C0", 0.15, "greedy"), (sampled, "C1", -0.15, "temperature 1")):
            for y, name in enumerate(names):
                x = [seed[column] for seed in runs[name]]
                panel.plot(x, [y + shift] * len(x), ".", color=color, alpha=0.6)
                panel.plot(np.mean(x), y + shift, "|", color=color, markersize=14, label=None if y else label)
        panel.set_title(column, fontsize=10)
        panel.set_xlim(-0.05, 1.05)
        panel.grid(axis="y", alpha=0.2)
    panels[0].set_yticks(range(len(names)), names)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(folder / "ablations.png", dpi=110)


def main(what: str, *args: str) -> None:
    if what == "failing":
        train_failing(*args)
        return
    if what in ("data", "teacher"):
        {"data": make_data, "teacher": make_teacher}[what](args[0], Path(args[1]))
        return
    folder = Path(args[0])
    text = table(folder)
    (folder / "ablations.md").write_text(text + "\n")
    print(text)
    try:
        draw(folder)
    except ImportError:
        print("no figure: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
