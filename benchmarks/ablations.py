"""The data, the table and the figure of benchmarks/ablations.sh.

python benchmarks/ablations.py data SEED FOLDER     # search-heavy-SEED.parquet, correct-SEED.jsonl, val-SEED.parquet
python benchmarks/ablations.py table FOLDER         # table on stdout and in ablations.md, figure in ablations.png
"""

import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FIGURES = {  # column -> (kind of question, figure)
    "accuracy": ("all", "accuracy"), "known: any search": ("known", "image"),
    "names: image": ("unknown name", "image"), "names: text": ("unknown name", "text"),
    "facts: image": ("unknown fact", "image"), "facts: text": ("unknown fact", "text"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- data


def make_data(seed: str, folder: Path) -> None:
    from config import parse
    from policy import init_distributed

    cfg = parse(["--toy_seed", seed])
    folder.mkdir(parents=True, exist_ok=True)
    device = init_distributed(cfg)
    import toy

    world = toy.ensure(cfg)
    shutil.copyfile(world.val, folder / f"val-{seed}.parquet")
    heavy, correct = folder / f"search-heavy-{seed}.parquet", folder / f"correct-{seed}.jsonl"
    if not heavy.exists():
        search_heavy(world.train, heavy)
    if not correct.exists():
        right_conversations(world, cfg, device, correct)


def search_heavy(source: Path, target: Path) -> None:
    """All questions about unknown things, and one in eight of the others."""
    import pyarrow.parquet as pq

    rows = pq.read_table(source)
    known = [kind.startswith("known") for kind in rows["data_source"].to_pylist()]
    count = iter(range(len(known)))
    keep = [not k or next(count) % 8 == 0 for k in known]
    pq.write_table(rows.filter(keep), target)


def right_conversations(world, cfg, device, target: Path) -> None:
    """A script that searches when it must and only then, about the training questions; what it gets wrong, because a
    search did not find the thing, is left out by train.py's sft_min_reward."""
    import searchdb
    from data import Codec, load_questions
    from eval import record, score_episode
    from results import write_jsonl
    from rollout import ScriptedEngine, run
    from tools import OfflineSearch

    codec = Codec(world.model, cfg)
    questions = load_questions((str(world.train),), progress=False)
    asked = {codec.picture(q.images[0]).key: q for q in questions}

    def script(prompt, images, sampling):
        question = asked[images[0].key]
        what, (truth, *_) = question.data_id.split("-")[1], question.answers
        results = re.findall(r"<information>\n(.*?)</information>", prompt, re.S)
        if question.data_source.startswith("known"):
            return f"<reason> {truth}.</reason><answer> {truth}</answer>"
        if not results:
            return "<reason> unknown.</reason><search><img></search>"
        name = re.search(r"<image> (\w+)", results[0])[1]
        if what == "name":
            return f"<reason> {name}.</reason><answer> {name}</answer>"
        if len(results) == 1:
            return f"<reason> {name}.</reason><text_search> {name} {what}</text_search>"
        value = re.search(rf" {name} {what}: (\w+)", results[1])
        found = value[1] if value else "unknown"
        return f"<reason> {found}.</reason><answer> {found}</answer>"

    index = searchdb.SearchDB(world.index)
    search = OfflineSearch(index, image_results=cfg.image_results, text_results=cfg.text_results)
    episodes = run(questions, ScriptedEngine(codec, script), search, codec, cfg, ordered=True)
    header = {"header": {"config": {"mode": "agent", "files": [str(world.train)]}}}
    write_jsonl(target, [header, *(record(e, score_episode(e, cfg)) for e in episodes)])


# -------------------------------------------------------------------------------------------------------- table


def figures(entry: dict) -> dict[str, float]:
    """The columns of one validation (greedy or sampled)."""
    known = [entry[kind] for kind in ("known name", "known fact")]
    entry = entry | {"known": {"image": sum(k["image"] for k in known) / 2}}
    return {column: entry[kind][figure] for column, (kind, figure) in FIGURES.items()}


def load(folder: Path) -> tuple[dict, dict]:
    """{name: [figures of a seed]} after the last step, greedy; the same at temperature 1. "warm-up" is before it."""
    from results import read_jsonl

    greedy, sampled = defaultdict(list), defaultdict(list)
    for path in sorted(folder.glob("*/final/..")):
        name = path.parent.parent.name.rpartition("-")[0]
        evals = [e for e in read_jsonl(path / "metrics.jsonl") if e["phase"] == "eval"]
        for mode, out in (("greedy", greedy), ("sampled", sampled)):
            out[name].append(figures(evals[-1][mode]))
            if name == "grpo":
                out["warm-up"].append(figures(evals[0][mode]))
    return greedy, sampled


def modes(folder: Path) -> dict[str, list[dict]]:
    """The grpo model asked directly, and with both searches forced: {mode: [accuracy and search ratio of a seed]}."""
    from config import Config
    from eval import summarize
    from results import read_results

    found = defaultdict(list)
    for mode in ("direct", "pipeline"):
        for path in sorted(folder.glob(f"{mode}-*.jsonl")):
            found[mode].append(summarize(read_results(path)[1], Config())["all"])
    return found


def cell(values: list[float]) -> str:
    middle = f"{np.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}-{max(values):.2f})"


def table(folder: Path) -> str:
    """Mean (least - most) over the seeds."""
    lines = []
    for title, runs in zip(("greedy", "temperature 1"), load(folder), strict=True):
        lines += [f"| {title} | seeds | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 2) + "|"]
        for name, seeds in sorted(runs.items(), key=lambda item: (item[0] not in ("warm-up", "grpo"), item[0])):
            cells = " | ".join(cell([seed[column] for seed in seeds]) for column in FIGURES)
            lines.append(f"| {name} | {len(seeds)} | {cells} |")
        lines.append("")
    for mode, seeds in modes(folder).items():
        accuracy, ratio = (cell([s[key] for s in seeds]) for key in ("accuracy", "search_ratio"))
        lines.append(f"{mode}, the grpo model ({len(seeds)} seeds, greedy): accuracy {accuracy}, search ratio {ratio}")
    return "\n".join(lines)


def draw(folder: Path) -> None:
    """Searching against accuracy, greedy: each run's name at the mean of its seeds."""
    from matplotlib.figure import Figure

    greedy, _ = load(folder)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("known things searched for")
    axes.set_ylabel("accuracy")
    for name, seeds in sorted(greedy.items()):
        x, y = ([seed[column] for seed in seeds] for column in ("known: any search", "accuracy"))
        (line,) = axes.plot(x, y, ".", alpha=0.5)
        axes.plot(np.mean(x), np.mean(y), "o", color=line.get_color(), label=name)
    figure.legend(loc="outside right upper")
    figure.savefig(folder / "ablations.png", dpi=120)


def main(what: str, *args: str) -> None:
    if what == "data":
        make_data(args[0], Path(args[1]))
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
