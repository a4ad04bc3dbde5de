"""Result files of eval.py: JSON lines, first a header and then one conversation a line.

    {"header": {"config": {...}, "model_id": ..., "search_id": ..., "code": ..., ...}}
    {"question_id": "val.parquet:0", "sample": 0, "turns": [...], "calls": [...], "correct": true, "reward": 0.91, ...}

While an evaluation runs, each process appends finished conversations to NAME.part0, NAME.part1 ...; an interrupted
evaluation resumes from these. At the end NAME is written, complete and in the order of the questions, and the parts are
deleted. Nothing here needs torch.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from config import InputError, need
from data import Question, key_of, load_questions, write_jsonl


def code_version() -> str:
    """The commit of this program from `git describe`, if there is one, and a hash of the files that evaluate."""
    root = Path(__file__).parent.parent
    files = sorted([*root.glob("*.py"), *root.glob("search/*.py")])
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:10]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return f"{commit} {digest}".strip()


def read_results(path: str | Path) -> tuple[dict, list[dict]]:
    """(header, conversations) of a file of eval.py, or ({}, conversations) of a file of rollouts from train.py (of a
    validation: only the greedy ones). Raises InputError if it is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({getattr(error, 'strerror', error)})") from None
    header, records = _parse(path, text)
    unique = len({key_of(r) for r in records}) == len(records)
    need(unique, f"{path}: two conversations about the same question have the same sample number")
    return header, records


def _parse(path, text):
    header, records = {}, []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028, which JSON may hold
        if not line.strip():
            continue
        try:
            r = json.loads(line)
            if number == 1 and "header" in r:
                header = r["header"]
                continue
            key_of(r), r["turns"], r["correct"], [call["tool"] for call in r["calls"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: not a conversation that eval.py or train.py wrote") from None
        if r.get("mode") != "sampled":
            records.append(r)
    return header, records


def questions_of(path: str | Path, header: dict, records: list[dict]) -> dict[str, Question]:
    """The questions of a result file by id, in their order, from the files that its header names. Raises InputError."""
    files = header.get("config", {}).get("files")
    need(files, f"{path}: its header names no question files: not a result file of eval.py")
    asked = {r["question_id"]: r["question"] for r in records}
    questions = {q.id: q for q in load_questions(files, skip_bad_rows=True, progress=False, only=set(asked))}
    for id, text in asked.items():
        same = id in questions and questions[id].text == text
        need(same, f"{path}: question {id} is no longer in {', '.join(files)}")
    return questions


class ResultFile:
    """The file to which an evaluation writes its conversations. Each rank has its own; only rank 0 calls `finish`."""

    def __init__(self, path: str | Path, header: dict, rank: int = 0, neutral: set[str] = frozenset()):
        """neutral: names of settings that may differ from those of the evaluation that is resumed."""
        self.path, self.header, self.rank, self.neutral = Path(path), header, rank, neutral
        self.part, self.file = Path(f"{path}.part{rank}"), None

    def parts(self) -> list[Path]:
        return sorted(p for p in self.path.parent.glob(f"{self.path.name}.part*") if p.name[-1].isdigit())

    def done(self) -> dict[tuple[str, int], dict]:
        """The conversations already there, by question id and sample. Raises InputError if they belong to another
        evaluation. If they come from other versions of the code, it warns, and the header names all versions."""
        found, versions = {}, set()
        for path in [self.path, *self.parts()]:
            if path.exists():
                header, records = self._read(path)
                if header or records:
                    self._check(path, header)
                    versions |= set(str(header.get("code")).split(" + "))
                found.update({key_of(r): r for r in records})
        now = str(self.header.get("code"))
        if before := ", ".join(sorted(versions - {now})):
            if self.rank == 0:
                print(f"warning: {self.path}: resumed with code {now}, begun with {before}", file=sys.stderr)
            self.header = {**self.header, "code": " + ".join(sorted(versions | {now}))}
        return found

    def _read(self, path):
        text = path.read_text(encoding="utf-8", errors="replace")
        if path != self.path:
            text = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
        return _parse(path, text)

    def _check(self, path, before):
        """Conversations of another model, search or setting must not be mixed in."""
        need(before, f"{path}: holds conversations without the header of an evaluation: give another --out")
        old, new = flat(before), flat(json.loads(json.dumps(self.header)))
        for name in sorted(new.keys() | old.keys()):
            if name not in {"code", *self.neutral} and old.get(name) != new.get(name):
                was, is_ = (repr(h.get(name))[:60] for h in (old, new))
                what = f"holds an evaluation with {name}={was}, and this is {name}={is_}"
                raise InputError(f"{path}: {what}: give another --out, or --overwrite")

    def clear(self) -> None:
        """Delete what is there."""
        for path in [self.path, *self.parts()]:
            path.unlink(missing_ok=True)

    def add(self, record: dict) -> None:
        """Append a finished conversation. A killed process loses at most the line that it is writing."""
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
        """Write the complete file, then delete the parts."""
        write_jsonl(self.path, [{"header": self.header}, *records])
        for part in self.parts():
            part.unlink()

    def close(self) -> None:
        if self.file:
            self.file.close()


def flat(header: dict) -> dict:
    """A header with the settings of the evaluation beside its other entries."""
    return {name: value for name, value in {**header, **header.get("config", {})}.items() if name != "config"}
