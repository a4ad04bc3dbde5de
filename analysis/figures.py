"""The figures of many conversations: accuracy with its interval, pass@k, and the tables of a validation.

The unit of every figure is the question: its conversations are not independent of each other, so intervals come from
resampling questions, not conversations. Plain Python and numpy.
"""

import dataclasses
import math
from collections import Counter, defaultdict

import numpy as np

from config import Config
from data import ERROR_KINDS, Stop, Usage
from tools import TOOLS, allowed_calls, offered, title

RESAMPLES = 2000  # of a bootstrap; its 2.5th percentile is then the 50th of 2000 values


def verdict(record: dict, judge: str = "") -> bool | None:
    """Was the conversation right: by what rewards it, or by a judge. None: aborted, or not judged."""
    if record["stop"] == "aborted":
        return None
    return record.get("judged", {}).get(judge) if judge else record["correct"]


def by_question(records: list[dict], judge: str = "", key: str = "question_id") -> dict[str, list[bool]]:
    """Question id (or another entry of a record: key) -> the verdicts, missing ones left out; none: not there."""
    verdicts = defaultdict(list)
    for r in records:
        right = verdict(r, judge)
        if right is not None:
            verdicts[r[key]].append(right)
    return dict(verdicts)


def bootstrap(sums: list[float], counts: list[float]) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(counts), one of each a question: percentiles over 2,000 resamples of
    the questions with replacement (Efron 1979). The resamples are the same in every run."""
    rng = np.random.default_rng(0)
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    n, values = len(sums), []
    while len(values) < RESAMPLES:
        drawn = rng.integers(n, size=(min(max(1, 10**6 // n), RESAMPLES - len(values)), n))  # a million values at once
        values.extend(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share: 95 % by default; (0, 1) without data."""
    if n == 0:
        return 0.0, 1.0
    share, shrink = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(verdicts: dict[str, list[bool]]) -> dict[str, float]:
    """accuracy (the mean over conversations), accuracy_low and accuracy_high (95 %)."""
    right, counts = [sum(v) for v in verdicts.values()], [len(v) for v in verdicts.values()]
    if sum(right) in (0, sum(counts)):  # all equal: resampling says nothing
        low, high = wilson(len(verdicts) if sum(right) else 0, len(verdicts))
    else:
        low, high = bootstrap(right, counts)
    return {"accuracy": sum(right) / max(sum(counts), 1), "accuracy_low": low, "accuracy_high": high}


def pass_at_k(right: int, n: int, k: int) -> float:
    """The chance that k of n conversations, of which `right` are, hold a right one (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def several(records: list[dict], judge: str = "") -> dict:
    """Figures of several conversations about each question; {} if there is one of each. pass: k -> mean pass@k over
    the questions with at least k conversations, for powers of two and the largest k; spread: standard deviation (with
    Bessel's correction) of the accuracy between the first, second ... conversations."""
    verdicts, by_sample = by_question(records, judge), by_question(records, judge, key="sample")
    if len(by_sample) < 2:
        return {}
    passed, most = {}, max(map(len, verdicts.values()))
    for k in sorted({2**i for i in range(most.bit_length())} | {most}):
        chances = [pass_at_k(sum(v), len(v), k) for v in verdicts.values() if len(v) >= k]
        passed[str(k)] = sum(chances) / len(chances)
    return {"pass": passed, "spread": float(np.std([np.mean(v) for v in by_sample.values()], ddof=1))}


def summarize(records: list[dict], cfg: Config) -> dict[str, dict]:
    """Figures of each data_source, and over all of them under "all". Aborted conversations, and those without the
    verdict that was to reward them, are in no share."""
    summary = {}
    for source in [*sorted({r["data_source"] for r in records}), "all"]:
        part = [r for r in records if source in ("all", r["data_source"])]
        summary[source] = _figures(part, cfg) | accuracy(by_question(part)) | several(part)
    return summary


def _figures(records, cfg):
    done = [r for r in records if verdict(r) is not None]
    n = max(len(done), 1)
    called = [Counter(call["tool"] for call in r["calls"]) for r in done]
    calls = [call for r in records for call in r["calls"]]
    used = {f.name: sum(call.get("usage", {}).get(f.name, 0) for call in calls) for f in dataclasses.fields(Usage)}
    errors = Counter(call["error_kind"] for call in calls if call.get("error_kind"))
    return {
        "n": len(done),
        "accuracy": sum(r["correct"] for r in done) / n,
        "reward": sum(r["reward"] for r in done) / n,
        "search_ratio": sum(c.total() for c in called) / (n * max(allowed_calls(cfg), 1)),
        **{name: sum(c[name] > 0 for c in called) / n for name in offered(cfg)},
        "combined": sum(len(c) > 1 for c in called) / n,  # called two or more different tools
        "format": sum(r["format_ok"] for r in done) / n,
        "turns": sum(sum(t["role"] == "model" for t in r["turns"]) for r in done) / n,
        "tool_failures": sum(call["status"] == "error" for call in calls),
        "errors": dict(sorted(errors.items())),
        "cost": used["cost"] / max(len(records), 1),
        "cached": used["cached"] / max(len(calls), 1),
        "usage": used,
        "stops": dict(sorted(Counter(r["stop"] for r in records).items())),
    }


def of_step(records: list[dict], cfg: Config) -> dict[str, float]:
    """The figures of a training step, as metrics.jsonl has them."""
    figures, calls = _figures(records, cfg), sum(len(r["calls"]) for r in records)
    used, means = figures["usage"], ("reward", "accuracy", "format", "search_ratio", *offered(cfg), "turns")
    return {
        **{name: figures[name] for name in means},
        "tokens": sum(r["tokens"] for r in records if verdict(r) is not None) / max(figures["n"], 1),
        "tool_failures": figures["tool_failures"],
        "results_cut": sum(r["results_cut"] for r in records) / max(calls, 1),  # the share of calls
        **{f"errors/{kind}": figures["errors"].get(kind, 0) for kind in ERROR_KINDS},
        "search/calls": calls,
        "seconds/search": used.pop("seconds"),  # waited for the web
        **{f"search/{name}": value for name, value in used.items()},
        **{f"stop/{stop.value}": figures["stops"].get(stop.value, 0) for stop in Stop},
    }


# ------------------------------------------------------------------------------------------------------- as text
def aligned(rows: list[list[str]], sides: str) -> list[str]:
    """Rows of cells as lines of text; sides: for each column, whether its cells stand at the left or right: < or >."""
    widths, lines = [max(map(len, column)) for column in zip(*rows, strict=True)], []
    for row in rows:
        cells = zip(row, sides, widths, strict=True)
        lines.append("  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip())
    return lines


def interval(figures: dict) -> str:
    """Accuracy and its interval, as `accuracy` gives them."""
    return "{accuracy:.3f} ({accuracy_low:.3f}-{accuracy_high:.3f})".format(**figures)


def table(summary: dict[str, dict]) -> str:
    """The summary as text, one line for each data source. calls: share of those allowed; then shares of conversations
    that called each tool, and several of them; cost: of a question's searches; cached: share of recorded answers."""
    shares = [*filter(summary["all"].__contains__, TOOLS), "combined", "format"]
    head = ["", "n", "accuracy (95 %)", "calls", *map(title, shares), "turns", "failed", "cost", "cached", "stops"]
    rows, passed = [head], []
    for source, f in summary.items():
        cells = [f"{f[name]:.3f}" for name in ("search_ratio", *shares, "turns")]
        used = [str(f["tool_failures"]), f"{f['cost']:.3f}", f"{f['cached']:.3f}"]
        stops = ", ".join(f"{stop} {n}" for stop, n in f["stops"].items())
        rows.append([source, str(f["n"]), interval(f), *cells, *used, stops])
        if "pass" in f:
            chances = "  ".join(f"{k}: {share:.3f}" for k, share in f["pass"].items())
            passed.append(f"{source}  pass@k  {chances}   spread of accuracy {f['spread']:.3f}")
    return "\n".join([*aligned(rows, "<" + ">" * (len(head) - 2) + "<"), *passed])


def before_and_after(log: list[dict]) -> str:
    """The table at the end of a run: first and last validation, by kind of question."""
    lines = []
    for mode in ("greedy", "sampled"):
        of_mode = [entry[mode] for entry in log if mode in entry]
        if of_mode:
            first, last = of_mode[0], of_mode[-1]
            names = ("accuracy", *filter(last["all"].__contains__, TOOLS), "format")
            rows = [[mode, *map(title, names)]]
            for kind in filter(last.__contains__, first):  # the questions may have changed in between
                rows.append([kind, *(f"{first[kind][name]:.2f} -> {last[kind][name]:.2f}  " for name in names)])
            lines += [*aligned(rows, "<" * len(rows[0])), ""]
    return "\n".join(lines) or "no validation questions"
