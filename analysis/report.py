"""A run directory as one HTML page.

    python -m analysis report runs/toy                              # writes runs/toy/report.html
    python -m analysis report runs/a runs/b --out compared.html     # the curves of both overlaid, conversations of both

The page needs no network. Its form is report_template.html, into which this module inserts the data as JSON. What
models and web pages said is untrusted: the JSON cannot end its script element, the page shows it as text nodes only,
and a Content-Security-Policy allows no script but the template's own. Pictures are looked up where the run had them, in
its question files and its search index; the page names what is missing there and is complete without it.
"""

import base64
import hashlib
import itertools
import json
import re
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import toy
from analysis import picture_url
from analysis.judge import JudgeOptions
from analysis.results import CONVERSATION, checked, questions_about, read_log
from config import Config, InputError, Options, as_dict, from_dict, need, option, replacing
from data import Call, Question, picture_key, refusing, to_json
from search.index import SearchDB
from tools import TOOLS, ask_search, run_tool

TEMPLATE = Path(__file__).with_name("report_template.html")
QUESTION_SIDE, THUMBNAIL_SIDE = 384, 128  # pixels, at most
LOCAL_TOOLS = [name for name, tool in TOOLS.items() if tool.answer is not ask_search]
PICTURE_BYTES = 48 * 2**20  # of a page's pictures, as data URLs, at most


@dataclass(frozen=True)
class ReportOptions(Options):
    """Report."""

    out: str = option("", "where to write the page (none: report.html in the first run)")
    limit: int = option(2000, "conversations on the page, at most", "at least 0")


def render(runs: list[str | Path], options: ReportOptions) -> Path:
    """Write the page of one or several run directories; returns its path. If there are more conversations than the
    limit, it takes whole groups, evenly over the steps. Raises InputError for what is no run, or damaged."""
    runs = [Path(run) for run in runs]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    pictures, notes, conversations, parts = Pictures(), [], [], []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        settings, log = read_settings(run), read_log(run)
        train, evals = ([entry for entry in log if entry["phase"] == phase] for phase in ("train", "eval"))
        parts.append({"name": name, "settings": settings, "train": train, "evals": evals})
        chosen, total = read_conversations(run / "rollouts", options.limit // len(runs))
        if len(chosen) < total:
            notes.append(f"{name}: {len(chosen)} of {total} conversations, evenly over the steps (--limit takes more)")
        try:
            cfg, recipe = from_dict(Config, settings), from_dict(toy.Recipe, settings)
        except InputError as error:
            notes.append(f"{name}: no pictures: the settings are of another version ({error})")
            cfg = Config()
        else:
            notes += [f"{name}: {problem}" for problem in add_pictures(chosen, cfg, recipe, pictures)]
        for c in chosen:
            keys, earned = c.get("pictures") or [], reward_parts(c, cfg.format_weight)
            conversations.append({**c, "run": number, "pictures": keys, "parts": earned})
    if pictures.left_out:
        notes.append(f"{len(pictures.left_out)} pictures left out: the others have {PICTURE_BYTES >> 20} MiB already")
    page = dict(runs=parts, conversations=conversations, pictures=pictures.urls, notes=notes)
    page |= dict(defaults=as_dict(Config(), toy.Recipe(), JudgeOptions()), tools=list(TOOLS))
    out = Path(options.out or runs[0] / "report.html")
    with replacing(out) as temporary:
        temporary.write_text(fill_template(page), encoding="utf-8")
    return out


def fill_template(page: dict) -> str:
    """The template with the page's data, and with the hash of its script, the only one that may run."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = to_json(page).replace("<", "\\u003c")  # no </script>, no <!--
    head, tail = template.replace("{{script_hash}}", digest).split("{{data}}")
    return head + data + tail


def read_settings(run: Path) -> dict:
    """The run's config.json. Raises InputError if `run` is no run directory (a model's folder also has a config)."""
    with refusing(f"{run}: holds no run of train.py, no config.json of one", KeyError, TypeError):
        settings = json.loads((run / "config.json").read_text())
        settings["run_dir"]
    need((run / "metrics.jsonl").is_file(), f"{run}: has no metrics.jsonl: the run has not begun")
    return settings


def read_conversations(folder: Path, limit: int) -> tuple[list[dict], int]:
    """(at most `limit` records, how many there are). The samples of a question are taken together or not at all, evenly
    over the files; each record gets its `part` (training, greedy, sampled) and its `step`."""
    matches = [(re.fullmatch(r"(?:step|eval)-(\d+)", file.stem), file) for file in folder.glob("*.jsonl")]
    files = sorted((int(match[1]), file) for match, file in matches if match)
    total, seen, chosen = sum(file.read_bytes().count(b"\n") for _, file in files), 0, []
    for step, file in files:
        records = checked(file, CONVERSATION)
        for _, group in itertools.groupby(records, key=lambda r: (r.get("mode"), r["question_id"])):
            group = [{**r, "part": r.get("mode") or "training", "step": step} for r in group]
            is_due = len(chosen) * total <= seen * limit and len(chosen) + len(group) <= limit
            if is_due or total <= limit:
                chosen += group
            seen += len(group)
    return chosen, total


def reward_parts(record: dict, format_weight: float) -> dict[str, float] | None:
    """The reward as a sum: what the right answer earned, what searching cost of it, what the format earned. Computed
    from the reward itself, so that it also holds under a ramped penalty. None for one that is aborted or not judged."""
    if record["reward"] is None:
        return None
    right, form = (1 - format_weight) * record["correct"], format_weight * record["format_ok"]
    return {"answer": right, "searching": round(record["reward"] - right - form, 9), "format": form}


class Pictures:
    """The page's pictures as data URLs: small, each distinct one once, up to PICTURE_BYTES together."""

    def __init__(self):
        self.urls: dict[str, str] = {}
        self.left_out: set[str] = set()  # keys of those there is no room for
        self._bytes = 0

    def add(self, data: bytes, side: int) -> str:
        """Put an encoded picture on the page if there is room and it can be decoded. Returns its key."""
        key = picture_key(data)
        if key in self.urls or key in self.left_out:
            return key
        with suppress(InputError):
            url = picture_url(data, side, "webp", quality=82)  # of a file from the web, only the pixels get here
            if self._bytes + len(url) > PICTURE_BYTES:
                self.left_out.add(key)
            else:
                self.urls[key] = url
                self._bytes += len(url)
        return key


def add_made_pictures(record: dict, sources: dict[str, bytes], pictures: Pictures) -> None:
    """Make again what tools made of pictures in `sources` (key -> encoded picture), such as crops; add it there."""
    named = {f"img_{number}": key for number, key in enumerate(record.get("images") or [], 1)}
    for call in record["calls"]:
        source = sources.get(named.get(call.get("picture") or "img_1"))
        if call["tool"] in LOCAL_TOOLS and call["hits"] and source:
            asked = Call(call["tool"], call["query"], box=tuple(call.get("box") or ()), image=source)
            for hit in run_tool(asked, Question("", ""), None).hits:
                sources[pictures.add(hit.image, QUESTION_SIDE)] = hit.image


def add_pictures(records: list[dict], cfg: Config, recipe: toy.Recipe, pictures: Pictures) -> list[str]:
    """Add the pictures of questions and hits, and to each record the keys of its question's as `pictures`. Returns a
    message for each source of pictures that could not be read, or that holds others by now: these are not shown."""
    problems, sources = [], {}
    for what, files in zip(("training", "validation"), toy.question_files(cfg, recipe), strict=True):
        some = [r for r in records if (r["part"] == "training") == (what == "training")]
        try:
            questions = questions_about(some, files)
            for r in some:
                if question := questions.get(r["question_id"]):
                    r["pictures"] = [pictures.add(image, QUESTION_SIDE) for image in question.images]
                    sources |= dict(zip(r["pictures"], question.images, strict=True))
            if lost := {r["question_id"] for r in some} - questions.keys():
                where = f"{min(lost)} first, of {', '.join(files)}: gone, or something else is there now"
                problems.append(f"pictures of {len(lost)} {what} questions are not shown, {where}")
        except InputError as error:
            problems.append(f"no pictures of the {what} questions: {error}")
    index = cfg.search_index or toy.locate(recipe).index
    calls = [call for r in records for call in r["calls"] if call["tool"] not in LOCAL_TOOLS]
    hits = [hit for call in calls for hit in call["hits"] if hit.get("image")]
    wanted = {hit["image"] for hit in hits}
    try:
        if hits:
            with closing(SearchDB(index)) as db:
                found = {picture_key(t): t for t in db.thumbnails({(hit["title"], hit["url"]) for hit in hits})}
            for key in sorted(wanted & found.keys()):
                sources[pictures.add(found[key], THUMBNAIL_SIDE)] = found[key]
            if lost := wanted - found.keys():
                problems.append(f"{len(lost)} pictures of results are not in {index}, and not shown")
    except (ValueError, sqlite3.Error) as error:
        problems.append(f"no thumbnails: {error}")
    for r in records:
        add_made_pictures(r, sources, pictures)
    return problems
