"""analysis/labels.py"""

import random
from collections import Counter

from analysis.judge import agreement
from config import Config, InputError
from data import Question, write_questions
from reward import accuracy, by_question

NEEDS = ("search-free", "image", "text", "both")


def need_of(records: list[dict]) -> tuple[str | None, float]:
    """(the searches a question needs, the share of right ones) of the conversations about it: the least that a right
    one did, in the order of NEEDS; None if none was right."""
    right = [{call["kind"] for call in r["calls"]} for r in records if r["correct"]]
    needs = ["both" if len(kinds) == 2 else next(iter(kinds), "search-free") for kinds in right]
    return min(needs, key=NEEDS.index, default=None), len(right) / max(len(records), 1)


def balanced(labels: list[str], share: float, seed: int) -> list[int]:
    """Indices, in order, of a largest subset in which `share` need a search: surplus ones of either kind are left out
    at random."""
    free = [i for i, label in enumerate(labels) if label == "search-free"]
    needed = [i for i, label in enumerate(labels) if label != "search-free"]
    most = min(len(needed) / share if share else len(free), len(free) / (1 - share) if share < 1 else len(needed))
    rng = random.Random(f"{seed} balance")
    return sorted(
        rng.sample(needed, min(len(needed), round(most * share)))
        + rng.sample(free, min(len(free), round(most * (1 - share))))
    )


def write_labels(questions: list[Question], records: list[dict], cfg: Config) -> None:
    """Write the labelled questions to cfg.out, and with cfg.balance a subset of them beside it."""
    of_question = {q.id: [] for q in questions}
    for r in records:
        of_question[r["question_id"]].append(r)
    labelled = [(q, *need_of(of_question[q.id])) for q in questions]
    labelled = [(q, need, share) for q, need, share in labelled if need]
    counts = Counter(need for _, need, _ in labelled)
    print(f"{len(questions) - len(labelled)} of {len(questions)} questions never right, left out; the others need:")
    print("  " + ", ".join(f"{need} {counts[need]}" for need in NEEDS))
    chosen = {cfg.out: range(len(labelled))}
    if cfg.balance:
        chosen[f"{cfg.out.removesuffix('.parquet')}.balanced.parquet"] = balanced(
            [need for _, need, _ in labelled], cfg.balance, cfg.seed
        )
    for path, indices in chosen.items():
        part = [labelled[i] for i in indices]
        if not part:
            raise InputError(f"{path}: no question is left to write")
        columns = {"label": [need for _, need, _ in part], "pass_rate": [share for _, _, share in part]}
        write_questions(path, [q for q, _, _ in part], columns)
        print(f"{len(part)} questions in {path}")


def judges_table(records: list[dict], missing: Counter) -> str:
    """What the judges say, by data source, and where they agree, as text."""
    sources = [*sorted({r["data_source"] for r in records}), "all"]
    width = max(map(len, sources))
    lines = [f"{'':{width}}  judge   judged  missing  accuracy (95 %)"]
    for source in sources:
        part = [r for r in records if source in ("all", r["data_source"])]
        for name in part[0]["judged"]:
            f, n = accuracy(by_question(part, name)), sum(r["judged"][name] is not None for r in part)
            interval = f"{f['accuracy']:.3f} ({f['accuracy_low']:.3f}-{f['accuracy_high']:.3f})"
            lines.append(f"{source:{width}}  {name:6}  {n:6d}  {len(part) - n:7d}  {interval}")
    for (a, b), (same, n) in agreement(records).items():
        lines.append(f"{a} and {b} agree on {same} of {n} ({same / max(n, 1):.3f})")
    if missing:
        lines.append("not judged: " + ", ".join(f"{why} {n}" for why, n in sorted(missing.items())))
    return "\n".join(lines)
