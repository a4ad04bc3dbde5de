"""A run directory as one page to look at.

    python report.py runs/toy                              # writes runs/toy/report.html
    python report.py runs/a runs/b --out compared.html     # the curves of both overlaid, the conversations of both

The page is one file that needs no network: settings, curves, validations, and the conversations with their pictures.
Its form is report_template.html; this module gathers the data and puts them in, as JSON. What models and web pages
said is untrusted: the JSON cannot end its script element, the page shows it as text nodes only, and a
Content-Security-Policy lets no script run but the template's own.

A run directory holds no pixels. Pictures are looked up where the run had them: those of questions in its parquet files,
thumbnails in its search index. What is not found there any more is named on the page, which is whole without it.
"""

import argparse
import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
import sqlite3
from pathlib import Path

import toy
from config import Config, InputError
from data import decode_image, load_questions, picture_key, read_jsonl
from search.index import SearchDB

TEMPLATE = Path(__file__).with_name("report_template.html")


CONVERSATIONS = 2000  # on a page, unless --limit says otherwise


QUESTION_SIDE, THUMBNAIL_SIDE = 384, 128  # pixels, at most


PICTURE_BYTES = 48 * 2**20  # of a page's pictures, as data URLs, at most


def render(runs: list[str | Path], out: str | Path | None = None, limit: int = CONVERSATIONS) -> Path:
    """Write the page of one or several run directories; returns its path.

    out: default report.html in the first run. limit: conversations on the page, at most; of more, whole groups are
    taken evenly over the steps. Raises InputError for a folder that holds no run, and for damaged files in one.
    """
    runs = [Path(run) for run in runs]
    names = run_names(runs)
    pictures, notes, conversations, parts = Pictures(), [], [], []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        settings = read_settings(run)
        log = list(read_jsonl(run / "metrics.jsonl"))
        parts.append({
            "name": name,
            "settings": settings,
            "train": [entry for entry in log if entry.get("phase") == "train"],
            "evals": [entry for entry in log if entry.get("phase") == "eval"],
        })  # fmt: skip
        chosen, total = read_conversations(run / "rollouts", limit // len(runs))
        if len(chosen) < total:
            notes.append(f"{name}: {len(chosen)} of {total} conversations, evenly over the steps (--limit takes more)")
        notes += [f"{name}: {problem}" for problem in add_pictures(chosen, settings, pictures)]
        weight = settings.get("format_weight", Config.format_weight)
        conversations += [{**c, "run": number, "parts": reward_parts(c, weight)} for c in chosen]
    if pictures.left_out:
        notes.append(f"{pictures.left_out} pictures left out: the others have {PICTURE_BYTES >> 20} MiB already")
    page = {
        "runs": parts,
        "defaults": dataclasses.asdict(Config()),
        "conversations": conversations,
        "pictures": pictures.urls,
        "notes": notes,
    }
    out = Path(out or runs[0] / "report.html")
    try:
        out.write_text(fill_template(page), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot write ({error.strerror})") from None
    return out


def fill_template(page: dict) -> str:
    """The template with the page's data, and with the hash of its script, the only one that may run."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(page, allow_nan=False).replace("<", "\\u003c")  # no </script>, no <!--
    head, tail = template.replace("{{script_hash}}", digest).split("{{data}}")
    return head + data + tail


def run_names(runs: list[Path]) -> list[str]:
    """What to call the runs: their folders' names, or whole paths where two are the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_settings(run: Path) -> dict:
    """The run's config.json. Raises InputError if `run` is no run directory (a model's folder has one, too)."""
    try:
        settings = json.loads((run / "config.json").read_text())
        settings["run_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run}: holds no run of train.py (no config.json of one)") from None
    if not (run / "metrics.jsonl").is_file():
        raise InputError(f"{run}: has no metrics.jsonl: the run has not begun")
    return settings


def read_conversations(folder: Path, limit: int) -> tuple[list[dict], int]:
    """(at most `limit` records, how many there are). A question's samples are taken together or not at all, evenly over
    the files; each record is told its `part` (training, greedy, sampled) and its `step`."""
    files = sorted(folder.glob("*-[0-9]*.jsonl"), key=lambda file: (_step(file), file.name))
    sizes = {}
    for file in files:
        with open(file, "rb") as lines:
            sizes[file] = sum(1 for _ in lines)
    total, seen, chosen = sum(sizes.values()), 0, []
    for file in files:
        for _, group in itertools.groupby(read_jsonl(file), key=lambda r: (r.get("mode"), r["question_id"])):
            group = [{**r, "part": r.get("mode", "training"), "step": _step(file)} for r in group]
            if len(chosen) * total <= seen * limit and len(chosen) + len(group) <= limit or total <= limit:
                chosen += group
            seen += len(group)
    return chosen, total


def _step(file):
    return int(file.stem.split("-")[1])


def reward_parts(record: dict, format_weight: float) -> dict[str, float] | None:
    """The reward as a sum: what the right answer earned, what searching cost of it, what the format earned. Taken from
    the reward itself, so that it holds under a ramped penalty, too. None for an aborted conversation."""
    if record["reward"] is None:
        return None
    right, form = (1 - format_weight) * record["correct"], format_weight * record["format_ok"]
    return {"answer": right, "searching": round(record["reward"] - right - form, 9), "format": form}


class Pictures:
    """The page's pictures as data URLs, each distinct one once, small, up to PICTURE_BYTES together."""

    def __init__(self):
        self.urls: dict[str, str] = {}
        self.left_out, self._bytes = 0, 0

    def add(self, data: bytes, side: int) -> str:
        """The key of an encoded picture, which is on the page from now on if there is room and it can be decoded."""
        key = picture_key(data)
        if key not in self.urls and (url := _data_url(data, side)):
            if self._bytes + len(url) > PICTURE_BYTES:
                self.left_out += 1
            else:
                self.urls[key] = url
                self._bytes += len(url)
        return key


def _data_url(data, side):
    """Encoded anew, whatever it was: nothing of a file from the web gets through but its pixels."""
    try:
        image = decode_image(data)
    except InputError:
        return None
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def add_pictures(records: list[dict], settings: dict, pictures: Pictures) -> list[str]:
    """Add the pictures of questions and hits; tell each record the keys of its question's. Returns what went wrong."""
    for r in records:
        r["pictures"] = []
    try:
        fields = {f.name for f in dataclasses.fields(Config)}
        cfg = Config(**{name: value for name, value in settings.items() if name in fields})
    except InputError as error:
        return [f"pictures not looked up: the settings are of another version ({error})"]
    problems = []
    for what, files in zip(("training", "validation"), toy.question_files(cfg), strict=True):
        mine = [r for r in records if (r["part"] == "training") == (what == "training")]
        try:
            _add_question_pictures(mine, files, pictures)
        except InputError as error:
            problems.append(f"no pictures of the {what} questions: {error}")
    try:
        _add_thumbnails(records, cfg, pictures)
    except (InputError, sqlite3.DatabaseError) as error:
        problems.append(f"no thumbnails: {error}")
    return problems


def _add_question_pictures(records, files, pictures):
    wanted = {r["question_id"] for r in records}
    questions = load_questions(files, skip_bad_rows=True, progress=False, only=wanted) if wanted else []
    keys = {q.id: [pictures.add(image, QUESTION_SIDE) for image in q.images] for q in questions}
    for r in records:
        r["pictures"] = keys.get(r["question_id"], [])


def _add_thumbnails(records, cfg, pictures):
    hits = [hit for r in records for call in r["calls"] for hit in call["hits"] if hit.get("image")]
    if not hits:
        return
    db = SearchDB(cfg.search_index or toy.locate(cfg).index)
    wanted = {hit["image"] for hit in hits}
    for thumbnail in db.thumbnails({(hit["title"], hit["url"]) for hit in hits}):
        if picture_key(thumbnail) in wanted:
            pictures.add(thumbnail, THUMBNAIL_SIDE)
    db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="one or several runs of train.py as a page to look at")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--out", metavar="FILE", help="where to write the page [report.html in the first run]")
    parser.add_argument(
        "--limit", type=int, default=CONVERSATIONS, metavar="N", help="conversations on the page, at most [%(default)s]"
    )
    args = parser.parse_args()
    if args.limit < 0:
        raise InputError(f"limit={args.limit}: must not be negative")
    path = render(args.runs, args.out, args.limit)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
