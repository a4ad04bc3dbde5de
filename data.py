"""The records that flow through the code, and the files that questions come from.

    Question   a row of a question file: text, images as encoded bytes, accepted answers
    Call       what the model asks of a tool            Result   what the tool returned

A conversation as tokens, `Episode`, is in chat.py.
"""

import base64
import enum
import hashlib
import io
import json
import math
import os
import re
import string
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image

from config import InputError, need, replacing


class Stop(enum.Enum):
    """Why a conversation ended."""

    ANSWERED = "answered"
    NO_ACTION = "no_action"  # neither a call nor an answer
    MAX_TURNS = "max_turns"  # called a tool on the last turn
    MAX_TOKENS = "max_tokens"  # no room for the result or for the rest of the turn
    TOOL_LIMIT = "tool_limit"  # called a tool once too often
    TRUNCATED_TURN = "truncated_turn"  # the turn reached max_tokens_per_turn
    ABORTED = "aborted"  # deadline or infrastructure; says nothing about the policy


@dataclass(frozen=True)
class Question:
    """One question. `images` are encoded files (PNG, JPEG ...); the first is the one that image search sees. `sizes`:
    their (width, height) once decoded, or (), where nobody has looked yet."""

    id: str
    text: str
    images: tuple[bytes, ...] = field(default=(), repr=False)
    answers: tuple[str, ...] = ()
    data_source: str = "unknown"
    data_id: str | None = None
    image_url: str | None = None
    system: str | None = None
    sizes: tuple[tuple[int, int], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Call:
    """What the model asks of a tool: the tool's name (a key of `tools.TOOLS`) and what that tool needs."""

    tool: str
    query: str = ""
    picture: str = ""  # a picture of the conversation, as img_2; "": the question's first
    box: tuple[float, ...] | None = None  # a part of it: left, top, right, bottom in thousandths of width and height
    url: str = ""  # a page
    problem: str = ""  # why the call cannot be understood
    image: bytes | None = field(default=None, repr=False, compare=False)  # that picture, encoded, where it is named


@dataclass(frozen=True)
class Hit:
    """One result of a tool; `image` is an encoded picture, shown as a thumbnail or at the size of a question's."""

    title: str
    url: str = ""
    text: str = ""
    image: bytes | None = field(default=None, repr=False)
    full_size: bool = False


# Why a call failed. In the order of a request's way: what the model asked, our own limits, the network, the answer.
ERROR_KINDS = (
    "bad_call",  # no image, no query, an unknown tool
    "malformed",  # not JSON, or not what the tool takes
    "no_url",  # the image is only bytes, and there is no place to show it from
    "budget",  # search_budget is used up
    "not_recorded",  # a replay in which this was never recorded
    "index",  # the local index or the cache cannot be read
    "blocked",  # not an address that may be fetched
    "connection",
    "timeout",
    "rate_limit",  # 429
    "quota",  # the account has no searches left
    "server",  # 5xx
    "refused",  # another status: a wrong key, a wrong request
    "bad_response",  # too large, of the wrong type or form
    "internal",  # a mistake in this code
)


@dataclass(frozen=True)
class Usage:
    """What a call used of the web; all zero where it used none."""

    searches: int = 0  # asked of the search engine, which bills them
    pages: int = 0  # pages read and thumbnails fetched
    bytes: int = 0  # received
    tokens: int = 0  # of the summariser, read and written
    cached: int = 0  # 1: answered from the record
    cost: float = 0.0
    seconds: float = 0.0  # waited for the web


@dataclass(frozen=True)
class Result:
    """What a tool returned. status: ok | no_results | error (then `error` says what happened, and error_kind is one
    of ERROR_KINDS). Results are equal if they say the same, whatever it cost."""

    status: str
    hits: tuple[Hit, ...] = ()
    error: str = ""
    error_kind: str = ""
    usage: Usage = field(default=Usage(), compare=False, repr=False)


# ---------------------------------------------------------------------------------------------- question files
def load_questions(files, *, skip_bad_rows=False, progress=True, only=None, match="em") -> list[Question]:
    """Read questions from parquet, JSONL or JSON files (a list), each PATH in veRL layout or BENCHMARK=PATH.

    veRL layout: `prompt` [{role, content}], `images` [{bytes}, {path}, or either as it is, or base64], `reward_model`
    {ground_truth, candidate_answers}; `data_source`, `image_urls` and `data_id` may be missing. BENCHMARK is a key of
    BENCHMARKS, whose columns are read, and the data_source of its questions; those without a picture are left out.
    Paths of images start at the file's folder. Images stay encoded, but each is decoded once to see that it can be.
    A file in which no question has a picture has to be meant: text=PATH (veRL layout).

    only: a set of the ids to read (None: all rows). match: the option; an answer has to be one that it can compare.
    Raises InputError naming a file of which nothing is left, or file, row (from 0) and field (not if skip_bad_rows).
    """
    questions, bad = [], []
    names = [Path(path_of(file)).name for file in files]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        for index, file in enumerate(files):
            label = names[index] if names.count(names[index]) == 1 else f"{index}/{names[index]}"
            benchmark, path = _split(file)
            read = partial(_read_row, label=label, folder=Path(path).parent, benchmark=benchmark, match=match)
            rows = ((n, row) for n, row in enumerate(_rows(path, benchmark)) if only is None or f"{label}:{n}" in only)
            found, before = [], len(bad)
            while batch := list(islice(rows, 64)):  # few at once: they hold images
                for number, outcome in pool.map(read, batch):
                    if isinstance(outcome, Question):
                        found.append(outcome)
                        continue
                    bad.append(f"row {number} of {file}: {outcome}")
                    need(skip_bad_rows, f"{bad[-1]} (--skip_bad_rows leaves such rows out)")
            if only is None:
                why = "it has no rows" if len(bad) == before else bad[before]
                need(found, f"{file}: no question is left of it; {why}")
            if only is None and benchmark != TEXT:
                _check_pictures(found, file, benchmark, progress)
            questions += [q for q in found if q.images or not BENCHMARKS.get(benchmark)]
    pa.default_memory_pool().release_unused()  # it keeps as much as the largest file took
    if bad and progress:
        print(f"left out {len(bad)} bad rows, the first: {bad[0]}", file=sys.stderr)
    return questions


def _check_pictures(found, file, benchmark, progress):
    """Say how many of a file's questions have no picture. Raises InputError if none has."""
    blind, column = sum(not q.images for q in found), (BENCHMARKS.get(benchmark) or COLUMNS)[2]
    hint = f"(in veRL layout, {TEXT}=PATH reads a file without any)"
    need(blind < len(found), f"{file}: no question has a picture in {column!r} {hint}")
    if blind and progress:
        left_out = ", and are left out" if BENCHMARKS.get(benchmark) else ""
        print(f"{file}: {blind} of {len(found)} questions have no picture{left_out}", file=sys.stderr)


TEXT = "text"  # before a path as if it were a benchmark: a file in veRL layout whose questions have no pictures
COLUMNS = ("prompt", "reward_model", "images", "data_source", "image_urls", "data_id")  # the first two are needed

# Benchmarks whose files are not in veRL layout: the columns of question, answers, picture and id. Where such a file is
# in veRL layout all the same, it is read as that. Names and columns as of the data sets' cards and their users' code.
BENCHMARKS = {
    # hub lmms-lab/FVQA, fvqa_test.parquet (arXiv 2506.20670): veRL layout, pictures as bytes
    "fvqa-test": None,
    # github open-vision-language/infoseek, infoseek_val.jsonl (arXiv 2302.11713); pictures are OVEN's, named by
    # image_id, beside it or in OVEN's folders (oven_images/04/oven_04925271.jpg). The 2,000 questions of arXiv
    # 2506.20670 (mmsearch_r1_infoseek_sub_2k.parquet) are in veRL layout.
    "infoseek": ("question", ("answer", "answer_eval"), "image_id", "data_id"),
    # hub CaraJ/MMSearch, end2end.parquet (arXiv 2409.12959)
    "mmsearch": ("query", ("gt_answer", "alternative_gt_answers"), "query_image", "sample_id"),
    # hub m-a-p/SimpleVQA (arXiv 2502.13059), English and Chinese; pictures as base64
    "simplevqa": ("question", ("answer",), "image", "data_id"),
    # hub ONE-Lab/LiveVQA-Research-Preview, qa.json (arXiv 2504.05288); pictures in image/ beside it
    "livevqa": ("query", ("gt_answer",), "query_image", "sample_id"),
}


def path_of(file: str | Path) -> str:
    """The path in PATH, BENCHMARK=PATH or text=PATH."""
    return _split(file)[1]


def _split(file):
    """(benchmark, TEXT or None; path)"""
    benchmark, _, path = str(file).partition("=")
    return (benchmark, path) if path and benchmark in (*BENCHMARKS, TEXT) else (None, str(file))


def _columns(names, benchmark):
    """The columns that are read of a file or row with these: a benchmark's, or veRL's. Raises InputError."""
    needed, wanted = COLUMNS[:2], COLUMNS
    if BENCHMARKS.get(benchmark) and not set(needed) <= set(names):
        question, answers, image, id = BENCHMARKS[benchmark]
        needed, wanted = (question, answers[0], image), (question, *answers, image, id)
    for column in needed:
        need(column in names, f"no column {column!r}, only {', '.join(names)[:200] or 'an empty table'}")
    return wanted


def _rows(file, benchmark) -> Iterator[dict]:
    need(os.path.isfile(file), f"{file}: {'not a file' if os.path.exists(file) else 'no such file'}")
    if Path(file).suffix in (".jsonl", ".json"):
        with refusing(f"{file}: not a readable JSON file, a list of rows or one row a line"):
            text = Path(file).read_text(encoding="utf-8-sig")
            lines = filter(str.strip, text.split("\n"))
            yield from json.loads(text) if text.lstrip()[:1] == "[" else map(json.loads, lines)
    else:
        with refusing(f"{file}: not a readable parquet file of questions", pa.ArrowException):
            with pq.ParquetFile(file) as table:
                names = table.schema_arrow.names
                columns = [c for c in _columns(names, benchmark) if c in names]
                for batch in table.iter_batches(batch_size=64, columns=columns):
                    yield from batch.to_pylist()


def _as_verl(row, benchmark):
    """A row of a benchmark in veRL layout."""
    question, answers, image, id = BENCHMARKS[benchmark]
    values = [row.get(column) for column in answers]
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    texts = [v for v in flat if isinstance(v, str | int | float)]
    ranges = [v.get("range") for v in flat if isinstance(v, dict)]  # InfoSeek's of a number; reward.in_range reads them
    texts += [f"between {r[0]} and {r[1]}" for r in ranges if isinstance(r, list) and len(r) > 1]
    return {
        "prompt": [{"role": "user", "content": row[question]}],
        "images": [row[image]] if row[image] else [],
        "reward_model": {"ground_truth": None, "candidate_answers": texts},
        "data_id": row.get(id),
    }


def write_questions(path: str | Path, questions: list[Question], columns: dict[str, list]) -> None:
    """Write questions as parquet in veRL layout, with further columns. Raises InputError if it cannot be written."""
    fields = [
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("reward_model", pa.struct([(n, pa.string()) for n in ("ground_truth", "candidate_answers", "style")])),
        *((name, pa.string()) for name in ("data_source", "image_urls", "data_id")),
    ]
    rows = []
    for q in questions:
        said = [{"role": r, "content": c} for r, c in (("system", q.system), ("user", q.text)) if c is not None]
        graded = dict(ground_truth=q.answers[0], candidate_answers=json.dumps(q.answers[1:]), style="rule")
        row = dict(prompt=said, images=[{"bytes": image} for image in q.images], reward_model=graded)
        rows.append(row | dict(data_source=q.data_source, image_urls=q.image_url, data_id=q.data_id))
    table = pa.Table.from_pylist(rows, pa.schema(fields))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    with replacing(path) as temporary:
        pq.write_table(table, temporary, row_group_size=256)


HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can spell one, and UTF-8 cannot write it


@contextmanager
def refusing(what: str, *more: type[Exception]) -> Iterator[None]:
    """Errors of a file and its form, and more kinds of them, become an InputError: what is refused, and why."""
    try:
        yield
    except (OSError, ValueError, RecursionError, *more) as error:
        raise InputError(f"{what} ({getattr(error, 'strerror', None) or first_line(error)})") from None


def first_line(error: Exception) -> str:
    """What an exception says, for a message of one line: its first, and the second where the first ends in a colon."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first


def _read_row(numbered, label, folder, benchmark, match):
    """(number of the row, a Question or what is wrong with the row)"""
    number, row = numbered
    try:
        need(isinstance(row, dict), "not a JSON object")
        if _columns(row, benchmark) is not COLUMNS:
            row = _as_verl(row, benchmark)
        data_id, urls = row.get("data_id"), row.get("image_urls")
        system, text = _messages(row.get("prompt"))
        images, sizes = _pictures(row.get("images"), folder)
        split_at_images(text, len(images))
        url = next(iter(urls), None) if isinstance(urls, list) else urls
        need(isinstance(url, str | None), "field image_urls: expected text, or a list of it")
        answers, source = _answers(row.get("reward_model"), match), str(row.get("data_source") or "unknown")
        source = benchmark if benchmark in BENCHMARKS else source
        data_id = None if data_id is None else str(data_id)
        texts = {"prompt": f"{system}{text}", "reward_model": "".join(answers), "data_source": source}
        for name, value in (texts | {"data_id": data_id, "image_urls": url}).items():
            need(not HALF.search(value or ""), f"field {name}: not valid Unicode")
        return number, Question(f"{label}:{number}", text, images, answers, source, data_id, url, system, sizes)
    except InputError as error:
        return number, str(error)


def _messages(prompt):
    sound = isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)
    need(sound, "field prompt: expected a list of {role, content}")
    said = {str(m.get("role")): m.get("content") for m in prompt}
    sound = len(said) == len(prompt) and {"user"} <= said.keys() <= {"user", "system"}
    need(sound, "field prompt: expected one user message and at most one system message")
    for role, content in said.items():
        need(isinstance(content, str) and content.strip(), f"field prompt: the {role} message has no text")
    return said.get("system"), said["user"]


def split_at_images(text: str, images: int) -> list[str]:
    """The text of a prompt before, between and after its images: at each <image>; without any, the images go first."""
    parts = text.split("<image>")
    if len(parts) == 1:
        return [""] * images + parts
    need(len(parts) - 1 == images, f"field prompt: {len(parts) - 1} <image> placeholders for {images} images")
    return parts


def _pictures(images, folder):
    """(encoded pictures, their (width, height))"""
    try:
        need(isinstance(images, list | None), "expected a list")
        found = tuple(_image_bytes(image, folder) for image in images or ())
        return found, tuple(decode_image(image).size for image in found)
    except (OSError, ValueError) as error:  # ValueError: also a path that holds a NUL
        raise InputError(f"field images: {str(error)[:200]}") from None


def _image_bytes(image, folder):
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if isinstance(data, str):
        data, path = _base64(data), data
    if data is None and isinstance(path, str) and path:
        data = _find(path, folder).read_bytes()
    need(isinstance(data, bytes) and data, "neither bytes nor a path")
    return data


def _base64(text):
    """The bytes of a base64 text or data URL; None for what is too short to be a picture, or is not base64: a path."""
    is_url = text.startswith("data:")
    if is_url or len(text) >= 200:
        with suppress(ValueError):
            body = text.partition(",")[2] if is_url else text
            return base64.b64decode("".join(body.splitlines()), validate=True)
    return None


def _find(path, folder):
    """Where a picture is: its path may lack the ending (InfoSeek's ids), or be meant from the folder (/image/1.jpg), or
    be in one of the folders of OVEN, which are named by the first two digits: oven_images/04/oven_04925271.jpg."""
    names = [path, path.lstrip("/"), f"oven_images/{path[5:7]}/{path}", f"../oven_images/{path[5:7]}/{path}"]
    places = [folder / f"{name}{end}" for name in names for end in ("", ".jpg", ".JPEG", ".png")]
    return next((place for place in places if place.is_file()), folder / path)


def _answers(reward_model, match="em"):
    need(isinstance(reward_model, dict), "field reward_model: expected {ground_truth, candidate_answers}")
    candidates = reward_model.get("candidate_answers")
    if isinstance(candidates, str):
        with suppress(ValueError, RecursionError):  # then it stays a string
            candidates = json.loads(candidates.strip() or "null")
    need(isinstance(candidates, list | None), "field reward_model.candidate_answers: neither a list nor JSON of one")
    answers = [a for a in (reward_model.get("ground_truth"), *(candidates or ())) if a is not None]
    need(all(isinstance(a, str | int | float) for a in answers), "field reward_model: an answer is not text")
    answers = [a for a in answers if not isinstance(a, float) or math.isfinite(a)]  # NaN: pandas' missing value
    whole = [int(a) if isinstance(a, float) and a.is_integer() else a for a in answers]  # pandas' 1998.0 is "1998"
    answers = tuple(dict.fromkeys(map(str, whole)))
    usable = any(map(normalize_answer if match == "em" else str.strip, answers))  # "A" is one of vitamins
    need(usable, f"field reward_model: no usable answer for match={match}")
    return answers


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop the words a/an/the, squeeze white space: "The  U.S.A." -> "usa"."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# ------------------------------------------------------------------------------------------------------ pictures
MAX_ASPECT = 200  # Qwen-VL's image processors refuse narrower pictures
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {number: Image.Transpose[turn] for number, turn in enumerate(TURNS.split(), 2)}  # by EXIF's orientation
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, and of bombs, which decode_image refuses


def picture_key(data: bytes) -> str:
    """A name for an encoded picture: equal keys, equal files."""
    return hashlib.sha256(data).hexdigest()[:32]


def decode_image(data: bytes, formats: tuple[str, ...] | None = None, max_pixels: int | None = None) -> Image.Image:
    """Encoded bytes to an upright RGB picture (of an animation the first), transparency on white. Raises InputError if
    it is not whole or of an odd size. formats: Pillow's names of those allowed; max_pixels: by default Pillow's."""
    try:
        return _decode(data, formats, max_pixels)
    except InputError:
        raise
    except Exception as error:  # on broken files, Pillow's readers raise about anything
        plain = _without_metadata(data) if data.startswith(b"\x89PNG\r\n\x1a\n") else data
        if plain != data:
            return decode_image(plain, formats, max_pixels)
        raise InputError(f"not a whole picture ({type(error).__name__})") from None


def _decode(data, formats, max_pixels):
    image = Image.open(io.BytesIO(data), formats=formats)
    format = image.format
    size = f"{image.width} x {image.height} pixels"
    need(image.width * image.height <= (max_pixels or Image.MAX_IMAGE_PIXELS), f"{size}: a decompression bomb?")
    need(max(image.size) <= MAX_ASPECT * min(image.size), f"{size}: narrower than 1:{MAX_ASPECT}")
    image.load()
    with suppress(Exception):  # on broken metadata, Pillow's readers raise about anything
        image = image.transpose(UPRIGHT[image.getexif()[ExifTags.Base.Orientation]])
    if image.mode[0] in "IF":  # grey of up to 32 bits, or of floats: convert("RGB") would clip it
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        low, high = min(values.min(), 0), values.max()
        bits = max(8, math.ceil(math.log2(high - low + 1)))  # 12-bit cameras write files of 16 bits
        scale = 255 / (high - low or 1) if image.mode == "F" else 256 / 2**bits
        image = Image.fromarray(((values - low) * scale).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.format = format  # Pillow forgets it
    return image


def encode_image(image: Image.Image, form: str, quality: int = 90, side: int = 0) -> bytes:
    """A picture as a file (PNG knows no quality), no side longer than `side` (0: as it is)."""
    file = io.BytesIO()
    if side:
        image = image.copy()
        image.thumbnail((side, side))
    image.save(file, form, quality=quality)
    return file.getvalue()


def _without_metadata(data):
    """A PNG without what Pillow may refuse it for although its pixels are sound: long texts, broken metadata."""
    kept, start = [data[:8]], 8
    while start < len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        chunk = data[start : start + length + 12]
        sound = int.from_bytes(chunk[-4:], "big") == zlib.crc32(chunk[4:-4])
        if kind[:1].isupper() or (sound and kind in (b"tRNS", b"eXIf")):  # capital letters: its size, palette, pixels
            kept.append(chunk)
        start += length + 12
    return b"".join(kept)


PIECES, PIECE = 2**10, 2**20  # `file_id` reads at most so many pieces, of so many bytes each: about a second


def file_id(path: str | Path) -> str:
    """Sixteen hex digits that identify a file's content: a hash of its size and bytes, above 1 GiB of 1,024 even pieces
    of 1 MiB. For a folder: of its files by name, without hidden ones and JSON lines. Raises InputError."""
    path = Path(path)
    with refusing(f"{path}: cannot read it"):
        if path.is_dir():
            files = [p for p in sorted(path.glob("[!.]*")) if p.is_file() and ".jsonl" not in p.name]
            parts = [f"{p.name} {file_id(p)}" for p in files]
            return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        size = path.stat().st_size
        need(path.is_file(), "not a file")  # a pipe or a device may have no end
        count = min(PIECES, -(-size // PIECE))
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for i in range(count):
                file.seek(i * (size - PIECE) // (count - 1) if count == PIECES else i * PIECE)
                digest.update(file.read(PIECE))
        return digest.hexdigest()[:16]


def read_jsonl(path: str | Path, unfinished: bool = True) -> Iterator[dict]:
    """The records of a file of JSON lines; NaN and infinities become None. unfinished: a last line without its end is
    still being written, and is left out. Raises InputError."""
    with refusing(f"{path}: cannot read it"), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and (line.endswith(b"\n") or not unfinished):
                with refusing(f"line {number} is not JSON"):
                    record = json.loads(line.decode(), parse_constant=lambda _: None)
                yield record


def to_json(value) -> str:
    """One line of JSON, which has no NaN and no infinities: they become null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))


def write_jsonl(path: Path, records: list[dict]) -> None:
    with replacing(path) as temporary, open(temporary, "w") as file:
        file.writelines(to_json(r) + "\n" for r in records)


def thinned(items: list, limit: int) -> list:
    """At most `limit` of the items, evenly spaced; 0: all."""
    return [items[i * len(items) // limit] for i in range(limit)] if 0 < limit < len(items) else items


def key_of(record: dict) -> tuple[str, int]:
    return record["question_id"], record["sample"]


def prompt_path(path: str | Path) -> Path:
    """A prompt file or a folder of them, sought in the working directory and then beside the code."""
    path = Path(path)
    return path if path.is_absolute() or path.exists() else Path(__file__).parent / path


def read_prompt(path: str | Path) -> str:
    """The text of a prompt file. Raises InputError."""
    with refusing(f"{path}: cannot read this prompt"):
        return Path(path).read_text(encoding="utf-8").strip("\n")
