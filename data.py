"""The records that flow through the code, and how questions, replies and search results become tokens.

    Question   a row of a parquet file (veRL layout): text, images as encoded bytes, accepted answers
    Call       what the model asks of a tool            Result   what the tool returned
    Episode    one conversation, append-only: tokens, which of them the policy sampled, their log-probs, images

An episode holds image placeholders *expanded* (one `<|image_pad|>` per merged patch cell); `engine_prompt` is the
second view, with one placeholder per image. Example, an image of 2 cells and a reply of 2 tokens:

    tokens    user  <vis>  pad  pad  </vis>  what  assistant  bako  <|im_end|>
    sampled    .     .      .    .     .      .       .        x       x
"""

import enum
import hashlib
import io
import json
import os
import string
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from config import Config, InputError


class Stop(enum.Enum):
    """Why a conversation ended."""

    ANSWERED = "answered"
    NO_ACTION = "no_action"  # neither a search nor an answer
    MAX_TURNS = "max_turns"  # asked for a search on the last turn
    MAX_TOKENS = "max_tokens"  # no room for the result or for the rest of the turn
    TOOL_LIMIT = "tool_limit"  # asked for one search too many
    TRUNCATED_TURN = "truncated_turn"  # the turn reached max_tokens_per_turn
    ABORTED = "aborted"  # deadline or infrastructure; says nothing about the policy


@dataclass(frozen=True)
class Question:
    """One question. `images` are encoded files (PNG, JPEG ...); the first is the one that image search sees."""

    id: str
    text: str
    images: tuple[bytes, ...] = field(default=(), repr=False)
    answers: tuple[str, ...] = ()
    data_source: str = "unknown"
    data_id: str | None = None
    image_url: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Call:
    """A search the model asked for: kind 'image' (of the question's first image) or 'text' (with a query)."""

    kind: str
    query: str = ""


@dataclass(frozen=True)
class Hit:
    """One result of a search; `image` is an encoded thumbnail."""

    title: str
    url: str = ""
    text: str = ""
    image: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Result:
    """What a search returned. status: ok | no_results | error (then `error` says what happened)."""

    status: str
    hits: tuple[Hit, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Picture:
    """An image inside an episode: encoded bytes, pixel range (question or thumbnail), patch grid (height, width)."""

    data: bytes = field(repr=False)
    thumbnail: bool
    grid: tuple[int, int]
    tokens: int
    key: str  # identifies the pixels: equal keys, equal pictures


@dataclass(frozen=True)
class Turn:
    """tokens[start:end] were sampled in one turn, with the weights of `version`."""

    start: int
    end: int
    version: int


@dataclass
class Episode:
    """One conversation. `tokens`, `sampled` and `logprobs` have one length and only ever grow."""

    question: Question
    codec: "Codec" = field(repr=False)
    sample: int = 0
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    images: list[Picture] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    calls: list[tuple[Call, Result]] = field(default_factory=list)
    stop: Stop | None = None

    @classmethod
    def start(cls, question: Question, codec: "Codec", sample: int = 0, template: str | None = None) -> "Episode":
        """template: instead of the prompt file question.txt."""
        episode = cls(question, codec, sample)
        episode._append(*codec.prompt(question, template))
        return episode

    @property
    def question_id(self) -> str:
        return self.question.id

    @property
    def responses(self) -> list[str]:
        """The text of each of the model's turns, without the token that ended it."""
        return [self.codec.decode_reply(self.tokens[t.start : t.end]) for t in self.turns]

    def room(self) -> int:
        """Tokens left in the conversation's budget."""
        return self.codec.cfg.max_tokens - len(self.tokens)

    def add_reply(self, reply) -> None:
        """Append what the model said: `reply.ids`, `reply.logprobs` (one each), `reply.version`."""
        if len(reply.ids) != len(reply.logprobs) or len(reply.ids) > self.room():
            raise ValueError(f"reply of {len(reply.ids)} ids, {len(reply.logprobs)} log-probs, room for {self.room()}")
        start = len(self.tokens)
        self.tokens += reply.ids
        self.sampled += [True] * len(reply.ids)
        self.logprobs += reply.logprobs
        self.turns.append(Turn(start, len(self.tokens), reply.version))

    def add_result(self, call: Call, result: Result) -> bool:
        """Append what a tool returned as a user turn, ids and images together; False, unchanged, if there is no
        room."""
        self.calls.append((call, result))
        ids, images = self.codec.result_turn(call, result, self.question, self.tokens[-1])
        if len(ids) >= self.room():  # at least one token must be left to say
            return False
        self._append(ids, images)
        return True

    def _append(self, ids, images):
        self.tokens += ids
        self.sampled += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.images += images

    def engine_prompt(self) -> list[int]:
        """The conversation with one placeholder per image, as engines take it."""
        ids, position, pictures = [], 0, iter(self.images)
        while position < len(self.tokens):
            ids.append(self.tokens[position])
            is_image = self.tokens[position] == self.codec.image_pad
            position += next(pictures).tokens if is_image else 1
        return ids

    def record(self) -> dict:
        """A readable form for JSONL: turns as text, calls with their results; no pixels."""
        turns, position = [], 0
        for turn in self.turns:
            turns.append({"role": "context", "text": self.codec.show(self.tokens[position : turn.start])})
            turns.append({"role": "model", "text": self.codec.decode_reply(self.tokens[turn.start : turn.end])})
            position = turn.end
        if position < len(self.tokens):
            turns.append({"role": "context", "text": self.codec.show(self.tokens[position:])})
        calls = [
            {
                "kind": call.kind,
                "query": call.query,
                "status": result.status,
                "error": result.error,
                "hits": [{"title": h.title, "url": h.url, "text": h.text} for h in result.hits],
            }
            for call, result in self.calls
        ]
        return {
            "question_id": self.question.id,
            "data_source": self.question.data_source,
            "question": self.question.text,
            "answers": list(self.question.answers),
            "sample": self.sample,
            "turns": turns,
            "calls": calls,
            "stop": self.stop.value if self.stop else None,
            "tokens": len(self.tokens),
            "sampled_tokens": sum(self.sampled),
        }


# ---------------------------------------------------------------------------------------------------- questions


def load_questions(files, *, skip_bad_rows: bool = False, progress: bool = True) -> list[Question]:
    """Read parquet files in veRL layout (DESIGN's recipe lists the columns). Images stay encoded, but each is decoded
    once to see that it can be.

    Raises InputError naming file, row and field; with skip_bad_rows bad rows are left out and their number printed.
    """
    questions, bad = [], []
    names = [Path(f).name for f in files]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        for index, file in enumerate(files):
            label = names[index] if names.count(names[index]) == 1 else f"{index}/{names[index]}"
            for row, outcome in _in_order(
                pool, lambda row, label=label, file=file: _read_row(row, label, file), _rows(file)
            ):
                if isinstance(outcome, Question):
                    questions.append(outcome)
                elif skip_bad_rows:
                    bad.append(outcome)
                else:
                    raise InputError(f"{outcome} (row {row} of {file}; --skip_bad_rows leaves such rows out)")
    if bad and progress:
        print(f"left out {len(bad)} bad rows, the first: {bad[0]}", file=sys.stderr)
    return questions


def drop_overlong(questions: list[Question], codec: "Codec") -> tuple[list[Question], int]:
    """The questions whose prompt fits max_prompt_tokens, and how many do not. Nothing is cut."""
    kept = [q for q in questions if len(codec.prompt(q)[0]) <= codec.cfg.max_prompt_tokens]
    return kept, len(questions) - len(kept)


def _in_order(pool, work, rows):
    """work(row) for numbered rows, in order, with a bounded number of rows in flight (they hold images)."""
    waiting = deque()
    for row in rows:
        waiting.append((row[0], pool.submit(work, row)))
        if len(waiting) > 64:
            number, future = waiting.popleft()
            yield number, future.result()
    for number, future in waiting:
        yield number, future.result()


def _rows(file) -> Iterator[tuple[int, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not os.path.isfile(file):
        raise InputError(f"{file}: no such file")
    try:
        table, number = pq.ParquetFile(file), 0
        for batch in table.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (pa.ArrowException, OSError) as error:
        first_line = (str(error).splitlines() or ["?"])[0]
        raise InputError(f"{file}: not a readable parquet file ({first_line})") from None


def _read_row(numbered, label, file):
    """A Question, or a string that says what is wrong with the row."""
    number, row = numbered
    try:
        system, text = _messages(row.get("prompt"))
        images = tuple(_image_bytes(image, Path(file).parent) for image in row.get("images") or ())
        holes = text.count("<image>")
        if holes and holes != len(images):
            return f"field prompt: {holes} <image> placeholders for {len(images)} images"
        for image in images:
            decode_image(image)
        urls = row.get("image_urls")
        data_id = row.get("data_id")
        return Question(
            id=f"{label}:{number}",
            text=text,
            images=images,
            answers=_answers(row.get("reward_model")),
            data_source=str(row.get("data_source") or "unknown"),
            data_id=None if data_id is None else str(data_id),
            image_url=(urls[0] if urls else None) if isinstance(urls, list) else urls,
            system=system,
        )
    except InputError as error:
        return str(error)


def _messages(prompt):
    if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
        raise InputError("field prompt: expected a list of {role, content}")
    system = [m.get("content") for m in prompt if m.get("role") == "system"]
    user = [m.get("content") for m in prompt if m.get("role") == "user"]
    if len(user) != 1 or len(system) > 1 or len(user) + len(system) != len(prompt):
        raise InputError("field prompt: expected one user message and at most one system message")
    if not isinstance(user[0], str) or not user[0].strip():
        raise InputError("field prompt: the user message has no text")
    return (system[0] if system else None), user[0]


def _image_bytes(image, folder):
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if isinstance(data, str):
        data, path = None, data
    if data is None and path:
        try:
            data = (folder / path).read_bytes()
        except OSError as error:
            raise InputError(f"field images: cannot read {path} ({error.strerror})") from None
    if not isinstance(data, bytes) or not data:
        raise InputError("field images: neither bytes nor a path")
    return data


def _answers(reward_model):
    if not isinstance(reward_model, dict):
        raise InputError("field reward_model: expected {ground_truth, candidate_answers}")
    candidates = reward_model.get("candidate_answers")
    if isinstance(candidates, str):
        try:
            candidates = json.loads(candidates) if candidates.strip() else []
        except json.JSONDecodeError:
            raise InputError("field reward_model.candidate_answers: a string that is not a JSON list") from None
    truth = reward_model.get("ground_truth")
    answers = [str(a) for a in [truth, *(candidates if isinstance(candidates, list) else [])] if a is not None]
    blank = string.punctuation + string.whitespace
    if not any(a.strip(blank).lower() not in ("", "a", "an", "the") for a in answers):
        raise InputError("field reward_model: no usable answer")
    return tuple(dict.fromkeys(answers))


# ------------------------------------------------------------------------------------------------------- images


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes to an upright RGB picture, transparency on white. Raises InputError for what is not a whole,
    reasonably sized picture."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise InputError(f"field images: {image.width} x {image.height} pixels: a decompression bomb?")
        if max(image.size) > 200 * min(image.size):
            raise InputError(f"field images: {image.width} x {image.height}: narrower than 1:200")
        image.load()
        image = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"field images: not a whole picture ({type(error).__name__})") from None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# -------------------------------------------------------------------------------------------------------- codec


class Codec:
    """Tokenizer, image processor, chat format and prompts of one model folder.

    Text of users, of search results and of prompts is tokenised with special tokens off: it cannot open a turn or add
    an image. The frame around it (`<|im_start|>user` ...) is read off the tokenizer's own chat template.
    """

    def __init__(self, folder: str | Path, cfg: Config):
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.cfg = cfg
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            first_line = (str(error).splitlines() or ["?"])[0]
            raise InputError(f"{folder}: cannot load tokenizer and image processor ({first_line})") from None
        special = {name: self.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
        missing = [name for name, id in special.items() if id is None or id == self.tokenizer.unk_token_id != 0]
        if missing or not self.tokenizer.chat_template:
            what = f"the token <|{missing[0]}|>" if missing else "a chat template"
            raise InputError(f"{folder}: the tokenizer lacks {what}; is this a Qwen2.5-VL model?")
        self.image_pad = special["image_pad"]
        self.im_end = special["im_end"]
        self.stop_ids = (special["im_end"], special["endoftext"])
        self.vision_ids = tuple(special[name] for name in SPECIAL[2:])
        self.vision_start, self.vision_end = special["vision_start"], special["vision_end"]
        self._frames = {}
        self._check_pixel_range()
        self._load_prompts()
        self._pictures, self._pixels = OrderedDict(), OrderedDict()

    def __len__(self):
        return len(self.tokenizer)

    def banned_ids(self, vocab_size: int) -> list[int]:
        """Ids the policy may not say: vision tokens, and rows of the embedding that no token has."""
        return sorted({*self.vision_ids, *range(len(self.tokenizer), vocab_size)})

    def save(self, folder: str | Path) -> None:
        """Write tokenizer and image processor into a model's folder."""
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # -- text

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens off."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode_reply(self, ids: list[int]) -> str:
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def show(self, ids: list[int]) -> str:
        """Ids as text for reading, each image as <image>."""
        pad = self.image_pad
        ids = [t for i, t in enumerate(ids) if t not in self.vision_ids or (t == pad and ids[i - 1] != pad)]
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.replace("<|image_pad|>", "<image>")

    def frame(self, system: str | None = None) -> tuple[list[int], list[int], list[int]]:
        """The chat template's own ids (before the first user text, from user text to the model's turn, from the
        model's turn, its end token included, to the next user text)."""
        if system not in self._frames:
            marks = ["\x00user\x00", "\x00model\x00", "\x00again\x00"]
            messages = [
                {"role": "user", "content": marks[0]},
                {"role": "assistant", "content": marks[1]},
                {"role": "user", "content": marks[2]},
            ]
            hole = "\x00system\x00"
            if system is not None:
                messages.insert(0, {"role": "system", "content": hole})
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            head, rest = text.split(marks[0])
            to_model, rest = rest.split(marks[1])
            to_user, _ = rest.split(marks[2])
            trusted = lambda part: self.tokenizer.encode(part, add_special_tokens=False)  # noqa: E731
            if system is None:
                head_ids = trusted(head)
            else:  # the system text is a user's text: special tokens off
                before, after = head.split(hole)
                head_ids = trusted(before) + self.encode(system) + trusted(after)
            self._frames[system] = (head_ids, trusted(to_model), trusted(to_user))
        return self._frames[system]

    def prompt(self, question: Question, template: str | None = None) -> tuple[list[int], list[Picture]]:
        """(expanded ids, pictures) up to where the model's first turn begins."""
        head, to_model, _ = self.frame(question.system)
        text = (template or self._prompts["question"]).replace("{question}", question.text)
        pictures = [self.picture(image) for image in question.images]
        parts = text.split("<image>") if "<image>" in question.text else [""] * len(pictures) + [text]
        segments = [parts[0]]
        for picture, part in zip(pictures, parts[1:], strict=True):
            segments += [picture, part]
        ids, pictures = self._encode_segments(segments)
        return head + ids + to_model, pictures

    def result_turn(self, call: Call, result: Result, question: Question, last: int) -> tuple[list[int], list[Picture]]:
        """(expanded ids, pictures) of the user turn that hands a result to the model; `last` is the token before it.

        The template's newline after <|im_end|> belongs to this turn; so does <|im_end|> if the model did not say it.
        """
        _, to_model, to_user = self.frame(question.system)
        if last == self.im_end:
            to_user = to_user[1:]
        ids, pictures = self._encode_segments(self._result_segments(call, result, question))
        return to_user + ids + to_model, pictures

    def _result_segments(self, call, result, question):
        if result.status != "ok":
            outcome = "found nothing" if result.status == "no_results" else "failed"
            return [self._prompts["search_failed"].replace("{outcome}", outcome)]
        template = self._prompts[f"after_{call.kind}_search"]
        before, after = template.split("{results}")
        asked = question.text.replace("<image>", "").strip()
        segments = [before.replace("{question}", asked)]
        for hit in result.hits:
            if hit.image is not None:
                segments.append(self.picture(hit.image, thumbnail=True))
            body = f": {hit.text}" if hit.text else ""
            segments.append(f" {hit.title}{f' ({hit.url})' if hit.url else ''}{body}\n")
        return [*segments, after.replace("{question}", asked)]

    def _encode_segments(self, segments):
        """Text and pictures to expanded ids; neighbouring texts are joined first, so that they tokenise as one."""
        ids, pictures, text = [], [], ""
        for segment in [*segments, None]:
            if isinstance(segment, str):
                text += segment
                continue
            ids += self.encode(text)
            text = ""
            if segment is not None:
                ids += [self.vision_start, *[self.image_pad] * segment.tokens, self.vision_end]
                pictures.append(segment)
        return ids, pictures

    def expand(self, ids: list[int], pictures: list[Picture]) -> list[int]:
        """One placeholder per image to one per grid cell."""
        left, expanded = iter(pictures), []
        for token in ids:
            expanded += [token] * next(left).tokens if token == self.image_pad else [token]
        return expanded

    # -- pictures

    def picture(self, data: bytes, thumbnail: bool = False) -> Picture:
        """The record of an encoded image, at the pixel range of questions or of thumbnails."""
        key = hashlib.sha256(data).hexdigest()[:32] + ("t" if thumbnail else "q")

        def make():
            image = self._resized(data, thumbnail)
            patch, merge = self.processor.patch_size, self.processor.merge_size
            grid = (image.height // patch, image.width // patch)
            return Picture(data, thumbnail, grid, grid[0] * grid[1] // merge**2, key)

        return _cached(self._pictures, key, make, 65536)

    def pixels(self, picture: Picture):
        """float32 [P, C*T*p*p]: the P patches of a picture, as the vision tower takes them."""

        def make():
            image = self._resized(picture.data, picture.thumbnail)
            batch = self.processor.preprocess([image], do_resize=False, return_tensors="pt")
            return batch["pixel_values"]

        return _cached(self._pixels, picture.key, make, 1024)

    def final_image(self, picture: Picture) -> Image.Image:
        """The picture at its final size: any Qwen-VL image processor resizes it by identity."""
        return self._resized(picture.data, picture.thumbnail)

    def _resized(self, data, thumbnail):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        image, cfg = decode_image(data), self.cfg
        low, high = (cfg.thumb_min_pixels, cfg.thumb_max_pixels) if thumbnail else (cfg.min_pixels, cfg.max_pixels)
        factor = self.processor.patch_size * self.processor.merge_size
        height, width = smart_resize(image.height, image.width, factor, min_pixels=low, max_pixels=high)
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)

    def _check_pixel_range(self):
        size, cfg = self.processor.size, self.cfg
        low, high = size["shortest_edge"], size["longest_edge"]
        if min(cfg.min_pixels, cfg.thumb_min_pixels) < low or max(cfg.max_pixels, cfg.thumb_max_pixels) > high:
            raise InputError(f"pixel ranges must lie within the image processor's own, {low} to {high} pixels")

    def _load_prompts(self):
        self._prompts = {}
        for name, holes in PROMPT_FILES.items():
            path = Path(self.cfg.prompts) / f"{name}.txt"
            if not path.is_absolute() and not path.exists():
                path = Path(__file__).parent / path
            try:
                text = path.read_text().strip("\n")
            except OSError as error:
                raise InputError(f"{path}: cannot read this prompt ({error.strerror})") from None
            for hole in holes:
                if text.count(hole) != 1:
                    raise InputError(f"{path}: expected {hole} exactly once")
            self._prompts[name] = text


SPECIAL = ("endoftext", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
PROMPT_FILES = {
    "question": ["{question}"],
    "after_image_search": ["{results}", "{question}"],
    "after_text_search": ["{results}", "{question}"],
    "search_failed": ["{outcome}"],
}


def _cached(cache, key, make, size):
    """cache[key], made on first use; the least recently used entry goes when there are more than `size`."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > size:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
