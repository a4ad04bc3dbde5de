"""Result files of eval.py: JSON lines, first a header and then one conversation a line.

    {"header": {"config": {...}, "model_id": ..., "search_id": ..., "code": ..., ...}}
    {"question_id": "val.parquet:0", "sample": 0, "turns": [...], "calls": [...], "correct": true, "reward": 0.91, ...}

While an evaluation runs, each process appends finished conversations to NAME.part0, NAME.part1 ...; an interrupted
evaluation resumes from these. At the end NAME is written, complete and in the order of the questions, and the parts are
deleted. Nothing here needs torch.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from config import need
from data import Question, key_of, load_questions, picture_key, read_jsonl, refusing, to_json, write_jsonl


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


# What is read of a conversation and of a header. A type; float: any finite number; [form]: a list; {name: form}: an
# object with these entries and others; {...: form}: with any names; (form,): null or missing, too.
HIT = {"title": str, "url": str, "text": str, "image": (str,)}
CALL = {
    "tool": str, "query": str, "picture": (str,), "box": ([float],), "url": (str,), "turn": (int,), "status": str,
    "error": str, "error_kind": str, "usage": ({...: float},), "hits": [HIT],
}  # fmt: skip
CONVERSATION = {
    "question_id": str, "sample": int, "data_source": str, "question": str, "answers": [str], "pictures": ([str],),
    "turns": [{"role": str, "text": str}], "calls": [CALL], "answer": (str,), "stop": str, "correct": (bool,),
    "format_ok": bool, "reward": (float,), "tokens": (int,), "sampled_tokens": (int,), "judged": ({...: (bool,)},),
    "images": ([str],), "mode": (str,), "advantage": (float,), "logp_gap": (float,), "asked": (int,),
}  # fmt: skip
HEADER = {"config": {"mode": (str,), "files": ([str],)}}
UNJUDGED = {"reward": None, "correct": None}  # the judge's verdict, which was to reward it, is missing
LOGGED = {"step": int, "phase": str, "greedy": ({...: {...: object}},), "sampled": ({...: {...: object}},)}


def check(value, form, where: str, field: str = "") -> None:
    """Raise InputError, naming the field as "calls[0].tool", unless the value read at `where` has the form."""
    sound = True
    if isinstance(form, tuple):
        if value is not None:
            check(value, form[0], where, field)
    elif isinstance(form, list) and isinstance(value, list):
        for n, v in enumerate(value):
            check(v, form[0], where, f"{field}[{n}]")
    elif isinstance(form, dict) and isinstance(value, dict):
        for name, f in (dict.fromkeys(value, form[...]) if ... in form else form).items():
            check(value.get(name), f, where, f"{field}.{name}".lstrip("."))
        if form is CONVERSATION and value["stop"] != "aborted" and not UNJUDGED.items() <= value.items():
            check(value.get("reward"), float, where, "reward")
            check(value.get("correct"), bool, where, "correct")
    elif form is float:
        sound = isinstance(value, int | float) and abs(value) < 1e100
    else:
        sound = isinstance(form, type) and isinstance(value, form)
    need(sound, f"{where}: {f'field {field}: ' if field else ''}not as eval.py or train.py writes it")


def read_log(run: str | Path) -> list[dict]:
    """The metrics of a run. Raises InputError."""
    return list(checked(Path(run) / "metrics.jsonl", LOGGED))


def checked(path: Path, form) -> Iterator[dict]:
    """The objects of a file of JSON lines. Raises InputError at one that has not the form."""
    for number, entry in enumerate(read_jsonl(path), 1):
        check(entry, form, f"{path}, line {number}")
        yield entry


def read_results(path: str | Path) -> tuple[dict, list[dict]]:
    """(header, conversations) of a file of eval.py, or ({}, conversations) of a file of rollouts from train.py (of a
    validation: only the greedy ones). Raises InputError if it is neither."""
    header, records = _read(path)
    need(records, f"{path}: holds no conversation")
    unique = len({(*key_of(r), r.get("asked")) for r in records}) == len(records)  # asked: as in `train.write_rollouts`
    need(unique, f"{path}: two conversations about the same question have the same sample number")
    return header, records


def _check_file(path):
    need(os.path.isfile(path) or not os.path.exists(path), f"{path}: not a file")  # a device may have no end


def _read(path, unfinished=False):
    """(header, conversations); of an unfinished file without what follows the last end of a line."""
    _check_file(path)
    header, records = {}, []
    for number, r in enumerate(read_jsonl(path, unfinished), 1):
        where = f"{path}, line {number}"
        if number == 1 and isinstance(r, dict) and "header" in r:
            header = r["header"]
            check(header, HEADER, where)
        else:
            check(r, CONVERSATION, where)
            records.append(r)
    return header, [r for r in records if r.get("mode") != "sampled"]


def questions_about(records: list[dict], files) -> dict[str, Question]:
    """The questions of conversations by id, in the order of these files. Left out is what is gone or another question
    by now: ids only name places in files. Raises InputError."""
    wanted = {r["question_id"] for r in records}
    how = dict(skip_bad_rows=True, progress=False, match="em_unicode")  # answers that any match can compare
    found = load_questions(files, only=wanted, **how) if wanted else []
    questions = {q.id: q for q in found}
    about = {q.id: (q.text, [picture_key(image) for image in q.images]) for q in found}
    for r in records:
        text, pictures = about.get(r["question_id"], (None, None))
        if r["question"] != text or r.get("pictures") not in (None, pictures):
            questions.pop(r["question_id"], None)
    return questions


def questions_of(path: str | Path, header: dict, records: list[dict]) -> dict[str, Question]:
    """The questions of a result file by id, in their order, from the files that its header names. Raises InputError."""
    files = header.get("config", {}).get("files")
    need(files, f"{path}: its header names no question files: not a result file of eval.py")
    questions = questions_about(records, files)
    for r in records:
        id, found = r["question_id"], questions.get(r["question_id"])
        same = found and r["answers"] == list(found.answers)
        need(same, f"{path}: question {id} is no longer in {', '.join(files)}, or has another picture or other answers")
    return questions


class ResultFile:
    """The file to which an evaluation writes its conversations. Each rank has its own; only rank 0 calls `finish`."""

    def __init__(self, path: str | Path, header: dict, rank: int = 0, neutral: set[str] = frozenset()):
        """neutral: settings that may differ from the resumed evaluation's. Raises InputError if path is not a file."""
        _check_file(path)
        self.path, self.header, self.rank, self.neutral = Path(path), header, rank, neutral
        self.part, self.file = Path(f"{path}.part{rank}"), None

    def parts(self) -> list[Path]:
        found, ours = self.path.parent.glob("*.part*"), f"{self.path.name}.part"  # a name may hold [ or *
        return sorted(p for p in found if p.name.startswith(ours) and p.name[-1].isdigit())

    def done(self) -> dict[tuple[str, int], dict]:
        """The conversations already there, by question id and sample. Raises InputError if they belong to another
        evaluation. If they come from other versions of the code, it warns, and the header names all versions."""
        found, versions = {}, set()
        for path in [self.path, *self.parts()]:
            if os.path.exists(path):
                header, records = _read(path, unfinished=path != self.path)
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

    def _check(self, path, before):
        """Conversations of another model, search or setting must not be mixed in."""
        need(before, f"{path}: holds conversations without the header of an evaluation: give another --out")
        old, new = flat(before), flat(json.loads(json.dumps(self.header)))
        for name in sorted((new.keys() | old.keys()) - {"code", *self.neutral}):
            was, is_ = old.get(name), new.get(name)
            what = f"holds an evaluation with {name}={was!r:.60}, and this is {name}={is_!r:.60}"
            need(was == is_, f"{path}: {what}: give another --out, or --overwrite")

    def clear(self) -> None:
        """Delete what is there."""
        for path in [self.path, *self.parts()]:
            path.unlink(missing_ok=True)

    def add(self, record: dict) -> None:
        """Append a finished conversation. A killed process loses at most the line that it is writing."""
        with refusing(f"{self.part}: cannot write"):
            if self.file is None:
                self.file, end = open(self.part, "a+"), self.part.read_bytes().rfind(b"\n") + 1
                self.file.truncate(end)
                self.file.write("" if end else json.dumps({"header": self.header}) + "\n")
            self.file.write(to_json(record) + "\n")
            self.file.flush()

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
