"""Result files of eval.py: JSON lines, a header and then one conversation a line; what they say, alone and compared.

    {"header": {"config": {...}, "model_id": ..., "search_id": ..., "code": ..., ...}}
    {"question_id": "val.parquet:0", "sample": 0, "turns": [...], "calls": [...], "correct": true, "reward": 0.91, ...}

While an evaluation runs, each process appends what is finished to NAME.part0, NAME.part1 ...; an evaluation that was
interrupted goes on from there. At the end NAME appears, whole and in the order of the questions, and the parts go.

The unit of every figure is the question: its conversations are not independent of each other, so intervals come from
drawing questions, not conversations, anew. Plain Python and numpy: nothing here needs torch.

    python eval.py compare A.jsonl B.jsonl
"""

import hashlib
import json
import subprocess
from collections import defaultdict
from pathlib import Path

from config import InputError
from data import key_of, write_jsonl
from reward import bootstrap, by_question


def file_id(path: str | Path) -> str:
    """Sixteen hex digits that tell a file from another: of its size and of up to 64 pieces of 64 KiB, evenly spaced (so
    all of a file up to 4 MiB). A folder's are those of its files, by name; hidden files and JSON lines are left out."""
    path = Path(path)
    if path.is_dir():
        parts = [f"{p.name} {file_id(p)}" for p in sorted(path.iterdir()) if p.is_file() and _matters(p)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    size, piece = path.stat().st_size, 2**16
    count = min(64, -(-size // piece))
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(count):
            file.seek(i * (size - piece) // (count - 1) if count == 64 else i * piece)
            digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def _matters(path):
    return not (path.name.startswith(".") or ".jsonl" in path.name)


def code_version() -> str:
    """The commit of this program, as `git describe` says it, if there is one; and a hash of its files as they are."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.glob("*.py")))).hexdigest()[:10]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return f"{commit} {digest}".strip()


def read_results(path: str | Path) -> tuple[dict, list[dict]]:
    """(header, conversations) of a file of eval.py, or ({}, conversations) of rollouts that train.py wrote (of a
    validation: the greedy ones). Raises InputError if it is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({getattr(error, 'strerror', error)})") from None
    header, records = _parse(path, text)
    if len({key_of(r) for r in records}) < len(records):
        raise InputError(f"{path}: holds two conversations of one number about the same question")
    return header, records


def _parse(path, text):
    header, records = {}, []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other ends of a line
        if not line.strip():
            continue
        try:
            r = json.loads(line)
            if number == 1 and "header" in r:
                header = r["header"]
                continue
            key_of(r), r["turns"], r["calls"], r["correct"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: not a conversation that eval.py or train.py wrote") from None
        if r.get("mode") != "sampled":
            records.append(r)
    return header, records


class ResultFile:
    """Where an evaluation keeps its conversations. Each rank has its own; `finish` is rank 0's to call."""

    def __init__(self, path: str | Path, header: dict, rank: int = 0, neutral: set[str] = frozenset()):
        """neutral: settings that may differ from those of the evaluation that is gone on with."""
        self.path, self.header, self.neutral = Path(path), header, neutral
        self.part = Path(f"{path}.part{rank}")
        self.file = None

    def parts(self) -> list[Path]:
        return sorted(p for p in self.path.parent.glob(f"{self.path.name}.part*") if p.name[-1].isdigit())

    def done(self) -> dict[tuple[str, int], dict]:
        """The conversations that are there. Raises InputError if they are of another evaluation."""
        found = {}
        for path in [self.path, *self.parts()]:
            if path.exists():
                header, records = self._read(path)
                if header or records:
                    self._check(path, header)
                found.update({key_of(r): r for r in records})
        return found

    def _read(self, path):
        text = path.read_text(encoding="utf-8", errors="replace")
        if path != self.path:
            text = text[: text.rfind("\n") + 1]  # without half a line: the process was killed there
        return _parse(path, text)

    def _check(self, path, before):
        """Conversations of another model, search or setting must not get mixed in."""
        if not before:
            raise InputError(f"{path}: holds conversations without the header of an evaluation: give another --out")
        now = json.loads(json.dumps(self.header))
        old, new = ({**h, **h.get("config", {})} for h in (before, now))
        for name in sorted(new.keys() | old.keys()):
            if name not in {"config", *self.neutral} and old.get(name) != new.get(name):
                was, is_ = (repr(h.get(name))[:60] for h in (old, new))
                what = f"holds an evaluation with {name}={was}, and this is {name}={is_}"
                raise InputError(f"{path}: {what}: give another --out, or --overwrite")

    def clear(self) -> None:
        """Forget what is there."""
        for path in [self.path, *self.parts()]:
            path.unlink(missing_ok=True)

    def add(self, record: dict) -> None:
        """Keep a finished conversation: a kill loses at most the line that is being written."""
        try:
            if self.file is None:
                self.file = self._open()
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise InputError(f"{self.part}: cannot write ({error.strerror})") from None

    def _open(self):
        file = open(self.part, "a+")
        content = self.part.read_bytes()
        file.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            file.write(json.dumps({"header": self.header}) + "\n")
        return file

    def finish(self, records: list[dict]) -> None:
        """Write the whole file, then remove the parts."""
        write_jsonl(self.path, [{"header": self.header}, *records])
        for part in self.parts():
            part.unlink()

    def close(self) -> None:
        if self.file:
            self.file.close()


def compare(a: list[dict], b: list[dict], judge: str = "") -> dict[str, dict]:
    """What B does better and worse than A, on the questions that both were asked, by data source and over "all".

    n: questions; a, b: accuracy, the mean over questions of the share of right conversations; difference b - a with
    its 95 % interval, low to high (paired: questions are drawn anew, each with both results); gained, lost: ids of the
    questions that B gets right more often, or less often, than A. Raises InputError if the two do not fit each other.
    """
    asked = {r["question_id"]: (r["question"], r["answers"]) for r in a}
    for r in b:
        if asked.get(r["question_id"], (r["question"], r["answers"])) != (r["question"], r["answers"]):
            raise InputError(f"the two files are about different questions: {r['question_id']} is not the same in both")
    ones, others = by_question(a, judge), by_question(b, judge)
    sources = defaultdict(list)
    for question, source in {r["question_id"]: r["data_source"] for r in b}.items():
        if question in ones and question in others:
            sources[source].append(question)
    if not sources:
        raise InputError("the two files have no question in common" + (f" that {judge} has judged" if judge else ""))
    parts = {source: sources[source] for source in sorted(sources)}
    parts["all"] = [q for part in parts.values() for q in part]
    return {source: _paired({q: (_mean(ones[q]), _mean(others[q])) for q in part}) for source, part in parts.items()}


def _mean(values):
    return sum(values) / len(values)


def _paired(shares):
    n, differences = len(shares), [b - a for a, b in shares.values()]
    low, high = bootstrap(differences, [1] * n)
    return {
        "n": n,
        "a": sum(a for a, _ in shares.values()) / n,
        "b": sum(b for _, b in shares.values()) / n,
        "difference": sum(differences) / n,
        "low": low,
        "high": high,
        "gained": [q for q, (a, b) in shares.items() if b > a],
        "lost": [q for q, (a, b) in shares.items() if b < a],
    }


def search_need(direct: list[dict], records: list[dict], judge: str = "") -> dict[str, float]:
    """Searching against need, as the results without tools tell it: a question needs a search if `direct` got it wrong
    (with several conversations: in more than half of them).

    over: conversations that searched, of the over_n whose question direct got right; under: conversations that did not
    search, of the under_n whose question direct got wrong. Both are shares.
    """
    needs = {q: _mean(v) < 0.5 for q, v in by_question(direct, judge).items()}
    asked = [r for r in records if r["question_id"] in needs and r["stop"] != "aborted"]
    free = [bool(r["calls"]) for r in asked if not needs[r["question_id"]]]
    needed = [not r["calls"] for r in asked if needs[r["question_id"]]]
    return {
        "over": sum(free) / max(len(free), 1), "over_n": len(free),
        "under": sum(needed) / max(len(needed), 1), "under_n": len(needed),
    }  # fmt: skip


def comparison(a_path: str | Path, b_path: str | Path, judge: str = "") -> str:
    """The comparison of two result files as text."""
    (a_header, a), (b_header, b) = read_results(a_path), read_results(b_path)
    figures = compare(a, b, judge)
    text_of = {r["question_id"]: r["question"].replace("<image>", "").strip() for r in b}
    lines = [f"A  {a_path}", f"B  {b_path}", *_settings(a_header, b_header), ""]
    width = max(map(len, figures))
    lines.append(f"{'':{width}}     n      A      B   B - A (95 %)              gained  lost")
    for source, f in figures.items():
        difference = f"{f['difference']:+.3f} ({f['low']:+.3f} to {f['high']:+.3f})"
        lines.append(
            f"{source:{width}} {f['n']:5d}  {f['a']:.3f}  {f['b']:.3f}  {difference}  {len(f['gained']):6d}"
            f"  {len(f['lost']):4d}"
        )
    if a_header.get("config", {}).get("mode") == "direct":
        need = search_need(a, b, judge)
        lines += ["", f"over-search   {need['over']:.3f} of {need['over_n']} conversations searched, A being right"]
        lines += [f"under-search  {need['under']:.3f} of {need['under_n']} did not search, A being wrong"]
    for what in ("gained", "lost"):
        ids = figures["all"][what]
        lines += ["", f"{what}: {len(ids)}", *(f"  {q}  {text_of[q][:90]}" for q in ids)]
    return "\n".join(lines)


def _settings(a, b):
    """A line for each setting in which two evaluations differ."""
    a, b = ({**h, **h.get("config", {})} for h in (a, b))
    return [
        f"   {name}: {a.get(name)!r} | {b.get(name)!r}"
        for name in sorted(a.keys() & b.keys() - {"config"})
        if a[name] != b[name]
    ]
