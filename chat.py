"""A conversation as tokens and pixels: the chat template, the prompt files, the pictures, and the record of it all.

`Chat` turns questions, replies and results of tools into token ids and pictures, and back. `Episode` is one
conversation, append-only. It holds image placeholders *expanded*, one `<|image_pad|>` per vision token. Example, an
image of 2 vision tokens and a reply of 2 tokens:

    tokens    user  <vis>  pad  pad  </vis>  what  assistant  bako  <|im_end|>
    sampled    .     .      .    .     .      .       .        x       x
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

import data
import tools
from config import Config, InputError, need
from data import Call, Question, Result, Stop, decode_image, picture_key, read_prompt, refusing, split_at_images

SPECIAL = ("endoftext", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
MARKS = {name: f"\0{name}\0" for name in ("system", "user", "model", "first", "second")}  # of a template
SENTENCE_END = r"[.!?…][\"')\]”’»]*(?=\s)|[。！？｡।።۔]"  # the first only before white space: not in 3.5
FIRST_PROMPTS = {"agent": "question", "direct": "direct", "pipeline": "pipeline_question"}  # mode -> prompt file
MODE_PROMPTS = {  # of the evaluation's other modes, read when one of them is used: file -> what it has to hold
    "direct": ["{question}"],
    "pipeline_question": ["{question}"],
    "pipeline_image_search": ["<search><img></search>"],  # what the model is made to say first
    "pipeline_after_image_search": ["{results}", "{question}"],
    "pipeline_after_text_search": ["{results}", "{question}"],
}


def agent_prompts(cfg: Config) -> dict[str, list[str]]:
    """The prompt files of a conversation with tools, and what each has to hold."""
    holes = ["{results}", "{question}"] if cfg.dialect == "tags" else ["{results}"]
    after = {f"after_{name}": holes for name in tools.offered(cfg)}
    return {"question": ["{question}"], "search_failed": ["{outcome}"]} | after


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


class Chat:
    """Tokenizer, image processor, chat format and prompts of one model folder.

    Text of users, of search results and of prompts is tokenised with special tokens off: it cannot open a turn or add
    an image. The frame around it (`<|im_start|>user` ...) is read off the tokenizer's own chat template.
    """

    def __init__(self, folder: str | Path, cfg: Config):
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.cfg, self.folder = cfg, folder
        self._ids = functools.lru_cache(4096)(self._ids)  # a question's conversations share much text
        with refusing(f"{folder}: cannot read a Qwen-VL tokenizer", Exception):  # transformers raises about anything
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self._special = {t.content: id for id, t in self.tokenizer.added_tokens_decoder.items() if t.special}
            self._check_tokenizer()
        with refusing(f"{folder}: cannot read a Qwen-VL image processor", Exception):
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
            low, high = self._check_image_processor()
        for name in ("min_pixels", "max_pixels", "thumb_min_pixels", "thumb_max_pixels"):
            size = getattr(cfg, name)
            need(low <= size <= high, f"{name}={size}: the image processor of {folder} takes {low} to {high} pixels")
        for thumbnail in (False, True):
            with refusing("thumb_min_pixels, thumb_max_pixels" if thumbnail else "min_pixels, max_pixels"):
                self._size((1, 1), thumbnail)  # raises InputError if no size fits the range
        ids = [self._special[f"<|{name}|>"] for name in SPECIAL]
        end_of_text, self.im_end, self.vision_start, self.vision_end, _, self.image_pad, _ = ids
        self.vision_ids, self.stop_ids = frozenset(ids[2:]), (self.im_end, end_of_text)
        self.frame = functools.lru_cache(256)(self.frame)
        self.frame()
        self._prompts: dict[str, str] = {}
        self._prompt_files = agent_prompts(cfg) | MODE_PROMPTS
        if cfg.dialect == "json":
            self._prompt_files["pipeline_image_search"] = ["<tool_call>"]
        for name in agent_prompts(cfg):
            self.template(name)
        told = [tool.tags[0] for tool in tools.TOOLS.values() if re.search(tool.tags[0], self._prompts["question"])]
        what = f"{cfg.prompts}/question.txt tells of {', '.join(told)}, but dialect=json has calls in JSON"
        need(cfg.dialect == "tags" or not told, f"{what}: give other --prompts, such as prompts/json")
        self._sizes = Cache(2**16)
        self._pixels = Cache(2**28, size=lambda tensor: tensor.nbytes)
        self.layouts = Cache(2**26, size=lambda tensor: tensor.nbytes)  # see backbone.rope_positions

    def _check_tokenizer(self):
        for name in SPECIAL:
            need(f"<|{name}|>" in self._special, f"it lacks the special token <|{name}|>")
        text = "as text: <|im_end|> <|image_pad|>"  # an incomplete tokenizer encodes it to nothing
        ids = self.encode(text)
        sound = self._decode(ids) == text and set(ids).isdisjoint(self._special.values())
        need(sound, f"it cannot write this as plain text: {text}")

    def banned_ids(self, vocab_size: int) -> list[int]:
        """Ids the policy may not say: vision tokens, and rows of the embedding that no token has."""
        return sorted(self.vision_ids | set(range(vocab_size)).difference(self.tokenizer.get_vocab().values()))

    # -- text

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens off."""
        return list(self._ids(text))

    def _ids(self, text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair has no bytes
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _decode(self, ids):
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)  # without transformers' detours

    def decode_reply(self, ids: list[int]) -> str:
        """What the model said in a turn, without the token that ended it."""
        return self._decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)

    def show(self, ids: list[int]) -> str:
        """Ids as text for reading, each image as <image>."""
        text = ""
        for is_vision, run in itertools.groupby(ids, key=self.vision_ids.__contains__):
            run = list(run)
            text += "<image>" * run.count(self.vision_start) if is_vision else self._decode(run)
        return text

    def frame(self, system: str | None = None, declare: bool = True) -> tuple[list, list, list, list, list]:
        """The chat template's own parts as segments (ids of special tokens, texts): before the first user text; from
        there to the model's turn; from the model's turn, its end token included, to the result of a tool, to the
        result of another one called in that turn, and to the model's next turn. A result is a user's turn, or in the
        dialect json what the template makes of a tool's. declare: offer the tools (json; the prompt does in tags)."""
        json = self.cfg.dialect == "json"
        names = {"model": "assistant"} | dict.fromkeys(("first", "second"), "tool" if json else "user")
        roles = ("user", "model", "first", "second") if system is None else tuple(MARKS)
        messages = [{"role": names.get(role, role), "content": MARKS[role]} for role in roles]
        special = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        declared = tools.declarations(self.cfg) if json and declare else None
        with refusing(f"{self.folder}: not a Qwen-VL's chat template", Exception):
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, tools=declared
            )
            parts = re.split("|".join(MARKS[role] for role in roles[-4:]), text)
            missing = [tool for tool in declared or () if tool["function"]["name"] not in parts[0]]
            need(not missing, "it declares no tools: dialect=json needs a chat_template.jinja that does")
            parts = [[self._special.get(s, s) for s in re.split(f"({special})", part) if s] for part in parts]
            need(parts[2][0] == self.im_end, "the model's turn does not end in <|im_end|>")
            need(parts[1][-1] == parts[4][-1], "a new turn begins unlike earlier ones, as a thinking model's does")
        parts[0] = [s.replace(MARKS["system"], system or "") if isinstance(s, str) else s for s in parts[0]]
        return tuple(parts)

    def prompt(self, question: Question, template: str | None = None) -> tuple[list[int], list[Picture]]:
        """(expanded ids, pictures) up to where the model's first turn begins."""
        head, to_model, *_ = self.frame(question.system, template is None)
        template, images = template or self._prompts["question"], len(question.images)
        places = "" if "<image>" in question.text else "<image>" * images  # the question's own go first
        texts = split_at_images(template.replace("<image>", places).replace("{question}", question.text), images)
        segments = [*head, texts[0]]
        sizes = question.sizes or [None] * len(question.images)
        for image, size, text in zip(question.images, sizes, texts[1:], strict=True):
            segments += [self.picture(image, size=size), text]
        return self._encode_segments([*segments, *to_model])

    def result_turn(
        self, call: Call, result: Result, episode: "Episode", template: str | None = None, more: bool = False
    ) -> tuple[list[int], list[Picture], bool]:
        """(expanded ids, pictures, was it cut) of the user turn that hands a result to the model, its results cut if it
        has more tokens than `episode.room_for_result()`. The template's newline after <|im_end|> belongs to it, and so
        does <|im_end|> if the token before is another: then the model did not say it. A turn of several calls gets one
        user turn for all; more: this is not the last of them."""
        _, _, before, between, after = self.frame(episode.question.system)
        most = episode.room_for_result()
        if episode.tokens[-1] == self.im_end:
            before = before[1:]
        before, after = between if episode.more_results else before, [] if more else after

        def render(hits):
            segments = self._result_segments(call, replace(result, hits=hits), episode, template)
            return self._encode_segments([*before, *segments, *after])

        ids, pictures = render(result.hits)
        cut = len(ids) > most and bool(result.hits)
        if cut:
            ids, pictures = render(self._shorten(result.hits, most - len(render(())[0])))
        return ids, pictures, cut

    def _shorten(self, hits, left):
        """Hits cut to `left` tokens in all: each may have an equal part, and what short ones leave goes to others."""
        kept = {}
        for done, number in enumerate(sorted(range(len(hits)), key=lambda i: self._hit_size(hits[i]))):
            hit, part = hits[number], left // (len(hits) - done)
            if self._hit_size(hit) > part:
                hit = replace(hit, text=self._cut(hit.text, self._hit_size(hit) - part))
            if self._hit_size(hit) > part:
                hit = replace(hit, url="", text="")
                hit = replace(hit, title=self._cut(hit.title, self._hit_size(hit) - part))
            if self._hit_size(hit) <= part:
                kept[number] = hit
                left -= self._hit_size(hit)
        return tuple(kept[number] for number in sorted(kept))

    def _hit_size(self, hit):
        return len(self._encode_segments(self._hit_segments(hit))[0])

    def _cut(self, text, excess):
        """A text without its last `excess` tokens, nor the sentence that this breaks, unless half of it were lost."""
        ids = self.encode(text)
        text = self._decode(ids[: max(0, len(ids) - excess)]).rstrip("\ufffd")  # half a character
        ends = [match.end() for match in re.finditer(SENTENCE_END, text)]
        return text[: ends[-1]] if ends and 2 * ends[-1] > len(text) else text

    def _result_segments(self, call, result, episode, template):
        failed = ""
        if result.status != "ok":
            outcome = "found nothing" if result.status == "no_results" else "failed"
            if result.error_kind in ("bad_call", "malformed"):  # what the model can do better
                outcome += f": {result.error}"
            failed = self._prompts["search_failed"].replace("{outcome}", outcome)
            if template is None:
                return [failed]
            failed += "\n"
        text = template or self._prompts[f"after_{call.tool}"]
        text = text.replace("{picture}", f"img_{len(episode.images) + 1}")
        before, after = text.split("{results}")
        asked = episode.question.text.replace("<image>", "").strip()
        shown = itertools.chain.from_iterable(map(self._hit_segments, result.hits))
        return [before.replace("{question}", asked), failed, *shown, after.replace("{question}", asked)]

    def _hit_segments(self, hit):
        segments = []
        if hit.image is not None:
            with contextlib.suppress(InputError):  # of a broken picture on the web, the title is still worth reading
                segments.append(self.picture(hit.image, thumbnail=not hit.full_size))
        url, text = f" ({hit.url})" if hit.url else "", f": {hit.text}" if hit.text else ""
        return [*segments, f" {hit.title}{url}{text}\n"]

    def _encode_segments(self, segments):
        """Ids, texts and pictures to expanded ids; neighbouring texts are joined, so that they tokenise as one."""
        ids, pictures = [], []
        for kind, run in itertools.groupby(segments, key=type):
            if kind is str:
                ids += self.encode("".join(run))
            elif kind is Picture:
                for picture in run:
                    ids += [self.vision_start, *[self.image_pad] * picture.tokens, self.vision_end]
                    pictures.append(picture)
            else:
                ids += run
        return ids, pictures

    def collapse(self, ids: list[int]) -> list[int]:
        """One placeholder per vision token to one per image."""
        return [b for a, b in itertools.pairwise([None, *ids]) if not a == b == self.image_pad]

    # -- pictures

    def picture(self, data: bytes, thumbnail: bool = False, size: tuple[int, int] | None = None) -> Picture:
        """An encoded image as a record, at the pixel range of questions or thumbnails. size: width, height, if known"""
        key = picture_key(data) + ("t" if thumbnail else "q")
        patch, merge, _ = self.sizes
        height, width = self._sizes.get(key, lambda: self._size(size or decode_image(data).size, thumbnail))
        grid = (height // patch, width // patch)
        return Picture(data, thumbnail, grid, grid[0] * grid[1] // merge**2, key)

    def pixels(self, pictures: list[Picture]):
        """float32 [P, C*T*p*p]: the patches of pictures, one after another, as the vision tower takes them."""
        import torch

        found = {p.key: self._pixels.values.get(p.key) for p in pictures}
        missing = {p.key: p for p in pictures if found[p.key] is None}
        if missing:  # at once: what the processor does once a call takes longer than a small picture
            images = [self.final_image(p) for p in missing.values()]
            made = self.processor.preprocess(images, do_resize=False, return_tensors="pt")["pixel_values"]
            for key, part in zip(missing, made.split([math.prod(p.grid) for p in missing.values()]), strict=True):
                found[key] = self._pixels.get(key, part.clone)
        return torch.cat([found[p.key] for p in pictures])

    def final_image(self, picture: Picture) -> Image.Image:
        """The picture at its final size: any Qwen-VL image processor resizes it by identity."""
        image = decode_image(picture.data)
        height, width = self._size(image.size, picture.thumbnail)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _size(self, size, thumbnail):
        cfg = self.cfg
        low, high = (cfg.thumb_min_pixels, cfg.thumb_max_pixels) if thumbnail else (cfg.min_pixels, cfg.max_pixels)
        return final_size(size[1], size[0], self.factor, low, high)

    def _check_image_processor(self):
        """Returns the least and the most pixels that it takes."""
        processor = self.processor
        self.sizes = [processor.patch_size, processor.merge_size, processor.temporal_patch_size]
        need(self.sizes in ([14, 2, 2], [16, 2, 2]), f"its sizes are {self.sizes}, not [14, 2, 2] or [16, 2, 2]")
        self.factor = processor.patch_size * processor.merge_size  # sides of pictures are multiples of it
        # one vision token: mean, deviation and the rest are sound if its pixels are numbers
        token = Image.new("RGB", (self.factor, self.factor))
        blank = processor.preprocess([token], do_resize=False, return_tensors="pt")
        need(blank["pixel_values"].isfinite().all(), "it makes pixels that are no numbers")
        return int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])

    # -- prompt files

    def template(self, name: str) -> str:
        """The text of a prompt file. Raises InputError if it is missing or lacks a placeholder."""
        if name not in self._prompts:
            path = data.prompt_path(self.cfg.prompts) / f"{name}.txt"  # sought as a whole, not file by file
            text = read_prompt(path)
            for placeholder in self._prompt_files[name]:
                need(text.count(placeholder) == 1, f"{path}: expected {placeholder} exactly once")
            places = text.count("<image>") if name in FIRST_PROMPTS.values() else 0  # elsewhere it is text
            need(places < 2, f"{path}: expected <image> once, or not at all")
            self._prompts[name] = text
        return self._prompts[name]

    def prompts_id(self, mode: str = "agent") -> str:
        """Ten hex digits that tell the prompts of a mode from others."""
        names = [*agent_prompts(self.cfg), *(name for name in MODE_PROMPTS if name.startswith(mode))]
        return hashlib.sha256(json.dumps([self.template(name) for name in names]).encode()).hexdigest()[:10]


@dataclass
class Episode:
    """One conversation. `tokens`, `sampled` and `logprobs` have one length and only ever grow."""

    question: Question
    chat: Chat = field(repr=False)
    sample: int = 0
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    images: list[Picture] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    calls: list[tuple[Call, Result]] = field(default_factory=list)
    call_turns: list[int] = field(default_factory=list)  # of each call, the number of the turn that made it, from 1
    results_cut: int = 0  # results that were shown in part, for want of room
    more_results: bool = False  # further calls of the last turn are still to be answered
    stop: Stop | None = None
    step: int = 0  # whose question it is
    trained_end: int | None = None  # nothing from this token on is trained on (None: no such limit)
    logp_gap: object = None  # float32 tensor: trainer's minus sampler's log-prob of its sampled tokens, once trained on

    @classmethod
    def start(cls, question: Question, chat: Chat, sample=0, template: str | None = None, step=0) -> "Episode":
        """template: instead of the prompt file question.txt."""
        episode = cls(question, chat, sample, step=step)
        episode._append(*chat.prompt(question, template))
        return episode

    @property
    def name(self) -> str:
        """Tells the conversations of a step apart."""
        return f"{self.question.id} of step {self.step}, sample {self.sample}"

    @property
    def group(self) -> tuple[int, str]:
        """It is compared with those about the same question of the same step."""
        return self.step, self.question.id

    @property
    def responses(self) -> list[str]:
        """The text of each of the model's turns, without the token that ended it."""
        return [self.chat.decode_reply(self.tokens[t.start : t.end]) for t in self.turns]

    @property
    def versions(self) -> list[int]:
        """Of the weights that drew each token; 0 where none did."""
        versions = [0] * len(self.tokens)
        for turn in self.turns:
            versions[turn.start : turn.end] = [turn.version] * (turn.end - turn.start)
        return versions

    @property
    def trained(self) -> list[bool]:
        """`sampled`, but False from `trained_end` on."""
        end = len(self.tokens) if self.trained_end is None else self.trained_end
        return self.sampled[:end] + [False] * (len(self.tokens) - end)

    def cut_at_failures(self, failures: int) -> bool:
        """Fatal-aware masking (OpenSearch-VL, arXiv 2605.05185, section 4.2, with 3 failures): do not train on the turn
        with the first of so many failed calls in a row, nor on what follows. Returns whether there is such a turn."""
        failed = 0
        for number, (_, result) in enumerate(self.calls, 1):
            failed = failed + 1 if result.status == "error" else 0
            if failed == failures:
                first = self.call_turns[number - failures]  # counted from 1
                self.trained_end = self.turns[first - 1].start
                return True
        return False

    def room(self) -> int:
        """Tokens left in the conversation's budget."""
        return self.chat.cfg.max_tokens - len(self.tokens)

    def room_for_result(self) -> int:
        """Tokens that the next result may take: room is left for an answer, and the same for each call to come."""
        cfg, room = self.chat.cfg, self.room()
        room -= min(cfg.max_tokens_per_turn, room // 2)
        room //= max(1, tools.allowed_calls(cfg) - len(self.calls))
        return min(room, cfg.max_result_tokens or room)

    def picture(self, name: str) -> Picture | None:
        """A picture by its name: img_1 is the question's first, the others follow in order of appearance."""
        return {f"img_{number}": picture for number, picture in enumerate(self.images, 1)}.get(name)

    def add_reply(self, reply) -> None:
        """Append what the model said: `reply.ids`, `reply.logprobs` (one each), `reply.version`."""
        if len(reply.ids) != len(reply.logprobs) or len(reply.ids) > self.room():
            raise ValueError(f"reply of {len(reply.ids)} ids, {len(reply.logprobs)} log-probs, room for {self.room()}")
        if not self.chat.vision_ids.isdisjoint(reply.ids):  # they would stand for an image that is not there
            raise ValueError("reply with a vision token: the sampler must ban them")
        start = len(self.tokens)
        self._append(reply.ids, [], reply.logprobs)
        self.turns.append(Turn(start, len(self.tokens), reply.version))

    def add_result(self, call: Call, result: Result, template: str | None = None, more: bool = False) -> bool:
        """Append what a tool returned as a user turn, ids and images together, cut to `room_for_result`. False if there
        is no room even so: then only `calls` has grown. template: instead of the tool's prompt file. more: the result
        of another call of the same turn follows, in the same user turn."""
        ids, images, cut = self.chat.result_turn(call, result, self, template, more)
        self.calls.append((call, result))
        self.call_turns.append(len(self.turns))
        self.results_cut += cut
        if len(ids) >= self.room():  # at least one token must be left to say
            return False
        self._append(ids, images)
        self.more_results = more
        return True

    def add_words(self, text: str) -> bool:
        """Append a turn in the model's name that it did not say itself, so that it is not trained on. False, and
        nothing is appended, if there is no room."""
        ids = [*self.chat.encode(text), self.chat.im_end]
        if len(ids) >= self.room():
            return False
        self._append(ids, [])
        return True

    def _append(self, ids, images, logprobs=None):  # logprobs: of ids that the policy sampled
        self.tokens += ids
        self.sampled += [logprobs is not None] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)
        self.images += images

    def bracketed(self) -> str:
        """The conversation as text, what the policy sampled and is trained on in brackets."""
        runs = itertools.groupby(zip(self.trained, self.tokens, strict=True), key=lambda pair: pair[0])
        shown = [(trained, self.chat.show([id for _, id in run])) for trained, run in runs]
        return "".join(f"⟦{text}⟧" if trained else text for trained, text in shown)

    def serialize(self) -> dict:
        """What another rank needs to train on this conversation, without what it has: of the question only the id, of
        its images only their numbers; tool pictures as the bytes the sampler saw. The calls stay here, counted."""
        own = self.question.images
        images = [(own.index(p.data) if p.data in own else p.data, p.thumbnail) for p in self.images]
        names = ("sample", "step", "tokens", "sampled", "logprobs", "turns", "stop", "trained_end")
        kept = {name: getattr(self, name) for name in names}
        return dict(question_id=self.question.id, images=images, kept=kept)

    @classmethod
    def deserialize(cls, sent: dict, questions: dict[str, Question], chat: Chat) -> "Episode":
        """The conversation that `serialize` made; questions by their ids."""
        question = questions[sent["question_id"]]
        images = [(question.images[i] if isinstance(i, int) else i, thumbnail) for i, thumbnail in sent["images"]]
        return cls(question, chat, images=list(itertools.starmap(chat.picture, images)), **sent["kept"])

    def record(self) -> dict:
        """A readable form for JSONL: turns as text, calls with their results; of pictures only the keys."""
        turns, end = [], 0
        for turn, said in zip(self.turns, self.responses, strict=True):
            turns.append({"role": "context", "text": self.chat.show(self.tokens[end : turn.start])})
            turns.append({"role": "model", "text": said})
            end = turn.end
        if end < len(self.tokens):
            turns.append({"role": "context", "text": self.chat.show(self.tokens[end:])})
        calls = []
        for (call, result), turn in zip(self.calls, self.call_turns, strict=True):
            made = {name: getattr(call, name) for name in ("tool", "query", "picture", "box", "url")}
            outcome = {name: getattr(result, name) for name in ("status", "error", "error_kind")}
            hits = [{**vars(hit), "image": hit.image and picture_key(hit.image)} for hit in result.hits]
            calls.append({"turn": turn, **made, **outcome, "usage": dict(vars(result.usage)), "hits": hits})
        asked = self.question
        record = dict(question_id=asked.id, data_source=asked.data_source, question=asked.text)
        record |= dict(pictures=[picture_key(image) for image in asked.images])
        record |= dict(images=[picture_key(image.data) for image in self.images])  # img_1, img_2 ...
        record |= dict(answers=list(asked.answers), sample=self.sample, turns=turns, calls=calls)
        record |= dict(stop=self.stop.value if self.stop else None, results_cut=self.results_cut)
        return record | dict(tokens=len(self.tokens), sampled_tokens=sum(self.sampled))


# ---------------------------------------------------------------------------------------------------------- pictures
def final_size(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """(height, width) a picture is resized to: multiples of `factor`, of low to high pixels, no narrower than 1:200.

    It is transformers' smart_resize, except where that leaves these bounds (it does, for narrow pictures and narrow
    ranges): there it is the size inside them whose shape is closest. So resizing again changes nothing.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    def fits(h, w):
        return h and w and low <= h * w <= high and max(h, w) <= data.MAX_ASPECT * min(h, w)

    size = smart_resize(height, width, factor, min_pixels=low, max_pixels=high)
    if fits(*size):
        return size
    most, sizes = high // factor**2, []
    for rows in range(1, most + 1):
        columns = min(max(round(rows * width / height), -(-low // (factor**2 * rows))), most // rows)
        if fits(rows * factor, columns * factor):
            sizes.append((rows * factor, columns * factor))
    need(sizes, f"no picture of {low} to {high} pixels has sides that are multiples of {factor}")
    return min(sizes, key=lambda s: abs(math.log(s[1] * height / (s[0] * width))))


class Cache:
    """Values made on first use; when their sizes add up to more than the limit, the least recently used ones are
    dropped. size: of a value (default: each counts as one)."""

    def __init__(self, limit: int, size: Callable[[object], int] = lambda value: 1):
        self.limit, self.size = limit, size
        self.clear()

    def clear(self) -> None:
        self.values, self.total = OrderedDict(), 0

    def get(self, key, make):
        """The value of a key, from make() if it is missing. A value larger than the limit is kept alone."""
        if key not in self.values:
            self.values[key] = make()
            self.total += self.size(self.values[key])
            while self.total > self.limit and len(self.values) > 1:
                self.total -= self.size(self.values.popitem(last=False)[1])
        self.values.move_to_end(key)
        return self.values[key]


def drop_overlong(questions: list[Question], chat: Chat, mode: str = "agent") -> list[Question]:
    """The questions whose prompt fits max_prompt_tokens. Nothing is cut."""
    template = None if mode == "agent" else chat.template(FIRST_PROMPTS[mode])
    return [q for q in questions if len(chat.prompt(q, template)[0]) <= chat.cfg.max_prompt_tokens]
