"""Two result files side by side: what does B get right that A does not?

Every figure counts questions, as those of figures.py do. Nothing here needs torch.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from analysis.figures import aligned, bootstrap, by_question
from analysis.results import flat, read_results
from config import Options, need, option


@dataclass(frozen=True)
class CompareOptions(Options):
    """Comparison."""

    judge: str = option("", "a judge that both files hold verdicts of (none: the match that the reward uses)")


def compare(a: list[dict], b: list[dict], judge: str = "") -> dict[str, dict]:
    """How B differs from A on the questions that both were asked, by data source and over "all".

    n: questions; a, b: accuracy, the mean over questions of the fraction of right conversations; difference: b - a,
    with its paired 95 % interval from low to high; gained, lost: ids of the questions that B gets right more often, or
    less often, than A. Raises InputError if a question differs between the two, or if they have none in common.
    """
    asked, pairs = {r["question_id"]: (r["question"], r["answers"]) for r in a}, defaultdict(dict)
    verdicts_a, verdicts_b = by_question(a, judge), by_question(b, judge)
    for r in b:
        id, about = r["question_id"], (r["question"], r["answers"])
        same = asked.get(id, about) == about
        need(same, f"the two files are about different questions: {id} is not the same in both")
        if id in verdicts_a and id in verdicts_b:
            pairs[r["data_source"]][id] = fmean(verdicts_a[id]), fmean(verdicts_b[id])
    need(pairs, "the two files have no question in common" + (f" that {judge} has judged" if judge else ""))
    everything = {id: pair for part in pairs.values() for id, pair in part.items()}
    return {source: _paired(part) for source, part in [*sorted(pairs.items()), ("all", everything)]}


def _paired(accuracies):
    """The figures of `compare`; accuracies: question id -> (of A, of B)."""
    a, b = zip(*accuracies.values(), strict=True)
    differences = [after - before for before, after in accuracies.values()]
    low, high = bootstrap(differences, [1] * len(a))
    gained = [id for id, (before, after) in accuracies.items() if after > before]
    lost = [id for id, (before, after) in accuracies.items() if after < before]
    figures = {"n": len(a), "a": fmean(a), "b": fmean(b), "difference": fmean(differences), "low": low, "high": high}
    return {**figures, "gained": gained, "lost": lost}


def search_need(direct: list[dict], records: list[dict], judge: str = "") -> dict[str, float]:
    """Whether tools are called where they are needed. A question needs one if `direct`, the results without tools, got
    it wrong (with several conversations: in more than half of them).

    over: the fraction of the over_n conversations that called a tool although direct got their question right; under:
    the fraction of the under_n that called none although direct got it wrong.
    """
    needs = {id: fmean(verdicts) < 0.5 for id, verdicts in by_question(direct, judge).items()}
    done = [r for r in records if r["question_id"] in needs and r["stop"] != "aborted"]
    over = [bool(r["calls"]) for r in done if not needs[r["question_id"]]]
    under = [not r["calls"] for r in done if needs[r["question_id"]]]
    figures = {"over": sum(over) / max(len(over), 1), "over_n": len(over)}
    return {**figures, "under": sum(under) / max(len(under), 1), "under_n": len(under)}


def comparison(a_path: str | Path, b_path: str | Path, judge: str = "") -> str:
    """The comparison of two result files as text."""
    (a_header, a), (b_header, b) = read_results(a_path), read_results(b_path)
    figures = compare(a, b, judge)
    lines = [f"A  {a_path}", f"B  {b_path}"]
    a_settings, b_settings = flat(a_header), flat(b_header)
    for name in sorted(a_settings.keys() & b_settings.keys()):
        if a_settings[name] != b_settings[name]:
            lines.append(f"   {name}: {a_settings[name]!r} | {b_settings[name]!r}")
    rows = [["", "n", "A", "B", "B - A (95 %)", "gained", "lost"]]
    for source, f in figures.items():
        difference = "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**f)
        changed = str(len(f["gained"])), str(len(f["lost"]))
        rows.append([source, str(f["n"]), f"{f['a']:.3f}", f"{f['b']:.3f}", difference, *changed])
    lines += ["", *aligned(rows, "<>>>>>>")]
    if a_header.get("config", {}).get("mode") == "direct":
        f = search_need(a, b, judge)
        lines += ["", f"over-search   {f['over']:.3f} of {f['over_n']} conversations called a tool where A was right"]
        lines.append(f"under-search  {f['under']:.3f} of {f['under_n']} called no tool where A was wrong")
    text_of = {r["question_id"]: r["question"].replace("<image>", "").strip() for r in b}
    for what in ("gained", "lost"):
        ids = figures["all"][what]
        lines += ["", f"{what}: {len(ids)}", *(f"  {id}  {text_of[id][:90]}" for id in ids)]
    return "\n".join(lines)
