"""Labels of questions by the tools that they need, for balanced training data.

    python eval.py --model DIR --files train.parquet --samples 8 --out train.jsonl
    python -m analysis label train.jsonl --out labelled.parquet --balance 0.67

A question's label is the least that a right conversation about it called: `search_free`, or the names of its tools in
the order of the table of tools, joined with "+".
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from analysis.figures import verdict
from analysis.results import questions_of, read_results
from config import Options, need, option
from data import write_questions
from tools import TOOLS

FREE = "search_free"


@dataclass(frozen=True)
class LabelOptions(Options):
    """Labels."""

    out: str = option("", "the labelled questions, NAME.parquet in veRL layout")
    balance: float = option(0.0, "also NAME.balanced.parquet: this share needs a tool (0: none)", "from 0 to 1")
    seed: int = option(0, "draws the questions that are left out for the balance", "at least 0")


def label_of(record: dict) -> str:
    """The tools that a conversation called; not what it made up."""
    called = {call["tool"] for call in record["calls"] if call["tool"] in TOOLS or call["status"] != "error"}
    unknown = sorted(called - TOOLS.keys())  # recorded by another version of the table
    return "+".join([name for name in TOOLS if name in called] + unknown) or FREE


def _rank(label):
    """Sorts labels: the fewest tools first, then by the order of the table."""
    names = [] if label == FREE else label.split("+")
    return len(names), [list(TOOLS).index(name) if name in TOOLS else len(TOOLS) for name in names], label


def least_needed(records: list[dict]) -> tuple[str | None, float]:
    """(label, pass rate) of a question from the conversations about it, aborted ones left out; the label is None if
    none was right."""
    done = [r for r in records if verdict(r) is not None]
    right = [label_of(r) for r in done if verdict(r)]
    return min(right, key=_rank, default=None), len(right) / max(len(done), 1)


def balanced(labels: list[str], share: float, seed: int) -> list[int]:
    """Indices, in order, of a largest subset in which `share` (above 0) of the labels name a tool. What is too many of
    either kind is left out at random."""
    free = [i for i, label in enumerate(labels) if label == FREE]
    needing = [i for i, label in enumerate(labels) if label != FREE]
    size = min(len(needing) / share, len(free) / (1 - share) if share < 1 else len(needing))
    rng = random.Random(f"{seed} balance")
    chosen = rng.sample(needing, min(len(needing), round(size * share)))
    chosen += rng.sample(free, min(len(free), round(size * (1 - share))))
    return sorted(chosen)


def write_labels(results: str | Path, options: LabelOptions) -> None:
    """Write the labelled questions of a result file, and their balanced subset. Raises InputError."""
    need(options.out.endswith(".parquet"), f"out={options.out!r}: label needs --out NAME.parquet")
    header, records = read_results(results)
    mode = header.get("config", {}).get("mode")
    need(mode == "agent", f"{results}: mode {mode}: labels need results of eval.py in mode agent")
    about = defaultdict(list)
    for r in records:
        about[r["question_id"]].append(r)
    rows = [(question, *least_needed(about[id])) for id, question in questions_of(results, header, records).items()]
    rows = [row for row in rows if row[1]]
    labels = [label for _, label, _ in rows]
    counts = Counter(labels)
    print(f"{len(about) - len(rows)} of {len(about)} questions never answered right and left out; the others need:")
    print("  " + ", ".join(f"{label} {counts[label]}" for label in sorted(counts, key=_rank)))
    files = {options.out: rows}
    if options.balance:
        few = [rows[i] for i in balanced(labels, options.balance, options.seed)]
        files[options.out.removesuffix(".parquet") + ".balanced.parquet"] = few
    empty = [path for path, rows in files.items() if not rows]
    need(not empty, f"{', '.join(empty)}: no question is left to write")
    for path, rows in files.items():
        questions, labels, pass_rates = map(list, zip(*rows, strict=True))
        write_questions(path, questions, {"label": labels, "pass_rate": pass_rates})
        print(f"{len(rows)} questions in {path}")
