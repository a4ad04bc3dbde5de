"""chat.py"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from config import Config, InputError
from data import MAX_ASPECT, Call, Picture, Question, Result, decode_image, first_line, picture_key, split_at_images


def final_size(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """(height, width) a picture is resized to: multiples of `factor`, of low to high pixels, no narrower than 1:200.

    It is transformers' smart_resize, except where that leaves these bounds (it does, for narrow pictures and narrow
    ranges): there it is the size inside them whose shape is closest. So resizing again changes nothing.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    def fits(h, w):
        return h and w and low <= h * w <= high and max(h, w) <= MAX_ASPECT * min(h, w)

    size = smart_resize(height, width, factor, min_pixels=low, max_pixels=high)
    if fits(*size):
        return size
    most, sizes = high // factor**2, []
    for rows in range(1, most + 1):
        columns = min(max(round(rows * width / height), -(-low // (factor**2 * rows))), most // rows)
        if fits(rows * factor, columns * factor):
            sizes.append((rows * factor, columns * factor))
    if not sizes:
        raise InputError(f"no picture of {low} to {high} pixels has sides that are multiples of {factor}")
    return min(sizes, key=lambda s: abs(math.log(s[1] * height / (s[0] * width))))


class Chat:
    """Tokenizer, image processor, chat format and prompts of one model folder.

    Text of users, of search results and of prompts is tokenised with special tokens off: it cannot open a turn or add
    an image. The frame around it (`<|im_start|>user` ...) is read off the tokenizer's own chat template.
    """

    def __init__(self, folder: str | Path, cfg: Config):
        self.cfg, self.folder = cfg, folder
        self._ids = functools.lru_cache(4096)(self._ids)  # the conversations of a question say much that is the same
        self.tokenizer, self.processor = _load_parts(folder)
        self._special = {t.content: id for id, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self._check_tokenizer()
        special = {name: self._special[f"<|{name}|>"] for name in SPECIAL}
        self.image_pad, self.im_end = special["image_pad"], special["im_end"]
        self.vision_start, self.vision_end = special["vision_start"], special["vision_end"]
        self.vision_ids = frozenset(special[name] for name in SPECIAL[2:])
        self.stop_ids = (special["im_end"], special["endoftext"])
        self._frames = {}
        self.frame()
        self._check_pixel_range()
        self._load_prompts()
        nbytes = lambda tensor: tensor.nbytes  # noqa: E731
        self._sizes, self._pixels = Cache(65536), Cache(2**28, nbytes)
        self.layouts = Cache(2**26, nbytes)  # positions by layout, see policy.rope_positions

    def _check_tokenizer(self):
        for name in SPECIAL:
            if f"<|{name}|>" not in self._special:
                raise InputError(f"{self.folder}: the tokenizer lacks the special token <|{name}|>: not a Qwen2.5-VL's")
        text = "as text: <|im_end|> <|image_pad|>"  # an incomplete tokenizer encodes it to nothing
        ids = self.encode(text)
        if self._decode(ids) != text or not set(ids).isdisjoint(self._special.values()):
            raise InputError(f"{self.folder}: the tokenizer cannot write this as plain text: {text}")

    def __len__(self):
        return len(self.tokenizer)

    def banned_ids(self, vocab_size: int) -> list[int]:
        """Ids the policy may not say: vision tokens, and rows of the embedding that no token has."""
        return sorted(self.vision_ids | set(range(vocab_size)).difference(self.tokenizer.get_vocab().values()))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer and image processor into a model's folder."""
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # -- text

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens off."""
        return list(self._ids(text))

    def _ids(self, text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair has no bytes
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode_reply(self, ids: list[int]) -> str:
        """What the model said in a turn, without the token that ended it."""
        return self._decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)

    def show(self, ids: list[int]) -> str:
        """Ids as text for reading, each image as <image>."""
        return "".join(
            "<image>" * list(run).count(self.vision_start) if vision else self._decode(list(run))
            for vision, run in itertools.groupby(ids, key=self.vision_ids.__contains__)
        )

    def frame(self, system: str | None = None) -> tuple[list, list, list]:
        """The chat template's own parts as segments (a special token's id, or text): what comes before the first user
        text, from there to the model's turn, and from the model's turn, its end token included, to the next user text.
        """
        if (system is None) not in self._frames:
            self._frames[system is None] = self._read_frame(system)
        head, to_model, to_user = self._frames[system is None]
        return [s.replace(MARKS["system"], system or "") if isinstance(s, str) else s for s in head], to_model, to_user

    def _read_frame(self, system):
        roles = ("user", "model", "again") if system is None else ("system", "user", "model", "again")
        names = {"model": "assistant", "again": "user"}
        messages = [{"role": names.get(role, role), "content": MARKS[role]} for role in roles]
        special = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            parts = re.split("|".join(MARKS[role] for role in roles[-3:]), text)
            parts = [[self._special.get(s, s) for s in re.split(f"({special})", part) if s] for part in parts]
            head, to_model, to_user, _ = parts
            if to_user[0] != self.im_end:
                raise ValueError("the model's turn does not end in <|im_end|>")
        except Exception as error:  # a template is a program: it can fail in any way
            what = f"cannot use its chat template ({first_line(error)}); is this a Qwen2.5-VL model?"
            raise InputError(f"{self.folder}: {what}") from None
        return head, to_model, to_user

    def prompt(self, question: Question, template: str | None = None) -> tuple[list[int], list[Picture]]:
        """(expanded ids, pictures) up to where the model's first turn begins."""
        head, to_model, _ = self.frame(question.system)
        before, after = (template or self._prompts["question"]).split("{question}")
        texts = split_at_images(question.text, len(question.images))
        place = 0 if "<image>" in question.text else -1  # without placeholders the images go before everything
        texts[place] = before + texts[place]
        texts[-1] += after
        segments = [*head, texts[0]]
        for image, text in zip(question.images, texts[1:], strict=True):
            segments += [self.picture(image), text]
        return self._encode_segments([*segments, *to_model])

    def result_turn(
        self, call: Call, result: Result, question: Question, last: int, template: str | None = None
    ) -> tuple[list[int], list[Picture]]:
        """(expanded ids, pictures) of the user turn that hands a result to the model; `last` is the token before it.

        The template's newline after <|im_end|> belongs to this turn; so does <|im_end|> if the model did not say it.
        """
        _, to_model, to_user = self.frame(question.system)
        if last == self.im_end:
            to_user = to_user[1:]
        return self._encode_segments([*to_user, *self._result_segments(call, result, question, template), *to_model])

    def _result_segments(self, call, result, question, template):
        failed = ""
        if result.status != "ok":
            outcome = "found nothing" if result.status == "no_results" else "failed"
            failed = self._prompts["search_failed"].replace("{outcome}", outcome)
            if template is None:
                return [failed]
        before, after = (template or self._prompts[f"after_{call.kind}_search"]).split("{results}")
        asked = question.text.replace("<image>", "").strip()
        segments = [before.replace("{question}", asked), f"{failed}\n" if failed else ""]
        for hit in result.hits:
            if hit.image is not None:
                try:
                    segments.append(self.picture(hit.image, thumbnail=True))
                except InputError:
                    pass  # a broken picture on the web is no reason to stop: its title is still worth reading
            body = f": {hit.text}" if hit.text else ""
            segments.append(f" {hit.title}{f' ({hit.url})' if hit.url else ''}{body}\n")
        return [*segments, after.replace("{question}", asked)]

    def _encode_segments(self, segments):
        """Ids, texts and pictures to expanded ids; neighbouring texts are joined, so that they tokenise as one."""
        ids, pictures = [], []
        for is_text, run in itertools.groupby(segments, key=lambda segment: isinstance(segment, str)):
            if is_text:
                ids += self.encode("".join(run))
                continue
            for segment in run:
                if isinstance(segment, Picture):
                    ids += [self.vision_start, *[self.image_pad] * segment.tokens, self.vision_end]
                    pictures.append(segment)
                else:
                    ids.append(segment)
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
        key = picture_key(data) + ("t" if thumbnail else "q")
        patch, merge = self.processor.patch_size, self.processor.merge_size
        height, width = self._sizes.get(key, lambda: self._size(decode_image(data), thumbnail))
        grid = (height // patch, width // patch)
        return Picture(data, thumbnail, grid, grid[0] * grid[1] // merge**2, key)

    def pixels(self, picture: Picture):
        """float32 [P, C*T*p*p]: the P patches of a picture, as the vision tower takes them."""

        def make():
            batch = self.processor.preprocess([self.final_image(picture)], do_resize=False, return_tensors="pt")
            return batch["pixel_values"]

        return self._pixels.get(picture.key, make)

    def final_image(self, picture: Picture) -> Image.Image:
        """The picture at its final size: any Qwen-VL image processor resizes it by identity."""
        image = decode_image(picture.data)
        height, width = self._size(image, picture.thumbnail)
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)

    def _size(self, image, thumbnail):
        cfg = self.cfg
        low, high = (cfg.thumb_min_pixels, cfg.thumb_max_pixels) if thumbnail else (cfg.min_pixels, cfg.max_pixels)
        factor = self.processor.patch_size * self.processor.merge_size
        return final_size(image.height, image.width, factor, low, high)

    def _check_pixel_range(self):
        cfg, size = self.cfg, dict(self.processor.size)
        low, high = size.get("shortest_edge"), size.get("longest_edge")
        if low is None or high is None:
            raise InputError(f"{self.folder}: its image processor has no range of pixels: not a Qwen2.5-VL's")
        if min(cfg.min_pixels, cfg.thumb_min_pixels) < low or max(cfg.max_pixels, cfg.thumb_max_pixels) > high:
            raise InputError(f"{self.folder}: pixel ranges must lie within its image processor's, {low} to {high}")
        for thumbnail in (False, True):
            self._size(Image.new("RGB", (1, 1)), thumbnail)  # raises InputError if no size fits the range

    def _load_prompts(self):
        self._prompts = {}
        for name in PROMPT_FILES:
            self.template(name)

    def template(self, name: str) -> str:
        """The text of a prompt file: PROMPT_FILES, MODE_PROMPT_FILES. Raises InputError if it cannot serve."""
        if name not in self._prompts:
            self._prompts[name] = self._read_prompt(name, (PROMPT_FILES | MODE_PROMPT_FILES)[name])
        return self._prompts[name]

    def prompts_id(self, mode: str = "agent") -> str:
        """Ten hex digits that tell the prompts of a mode from others."""
        names = [*PROMPT_FILES, *(name for name in MODE_PROMPT_FILES if name.startswith(mode))]
        return hashlib.sha256(json.dumps([self.template(name) for name in names]).encode()).hexdigest()[:10]

    def _read_prompt(self, name, holes):
        text = read_prompt(path := Path(self.cfg.prompts) / f"{name}.txt")
        for hole in holes:
            if text.count(hole) != 1:
                raise InputError(f"{path}: expected {hole} exactly once")
        return text


def read_prompt(path: Path) -> str:
    """A prompt file, sought in the working directory and then beside the code. Raises InputError."""
    if not path.is_absolute() and not path.exists():
        path = Path(__file__).parent / path
    try:
        return path.read_text(encoding="utf-8").strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read this prompt ({getattr(error, 'strerror', error)})") from None


SPECIAL = ("endoftext", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")


MARKS = {name: f"\0{name}\0" for name in ("system", "user", "model", "again")}  # texts to find in a rendered template


PROMPT_FILES = {
    "question": ["{question}"],
    "after_image_search": ["{results}", "{question}"],
    "after_text_search": ["{results}", "{question}"],
    "search_failed": ["{outcome}"],
}


MODE_PROMPT_FILES = {  # of the evaluation's other modes, read when one of them is used
    "direct": ["{question}"],
    "pipeline_question": ["{question}"],
    "pipeline_image_search": ["<search><img></search>"],  # what the model is made to say first
    "pipeline_after_image_search": ["{results}", "{question}"],
    "pipeline_after_text_search": ["{results}", "{question}"],
}


FIRST_PROMPTS = {"agent": "question", "direct": "direct", "pipeline": "pipeline_question"}  # mode -> prompt file


def _load_parts(folder):
    """A model folder's tokenizer and image processor."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        return AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    except Exception as error:  # on broken files, transformers raises about anything
        what = f"cannot load tokenizer and image processor ({first_line(error)})"
        raise InputError(f"{folder}: {what}") from None


def drop_overlong(questions: list[Question], chat: "Chat", mode: str = "agent") -> tuple[list[Question], int]:
    """The questions whose prompt fits max_prompt_tokens, and how many do not. Nothing is cut."""
    template = chat.template(FIRST_PROMPTS[mode])
    kept = [q for q in questions if len(chat.prompt(q, template)[0]) <= chat.cfg.max_prompt_tokens]
    return kept, len(questions) - len(kept)


class Cache:
    """Values made on first use; when their sizes come to more than the limit, the least recently used ones go."""

    def __init__(self, limit: int, size=lambda value: 1):
        self.limit, self.size = limit, size
        self.clear()

    def clear(self) -> None:
        self.values, self.total = OrderedDict(), 0

    def get(self, key, make):
        """The value of a key, from make() if it is not there. A value larger than the limit is kept alone."""
        if key not in self.values:
            self.values[key] = make()
            self.total += self.size(self.values[key])
            while self.total > self.limit and len(self.values) > 1:
                self.total -= self.size(self.values.popitem(last=False)[1])
        self.values.move_to_end(key)
        return self.values[key]
