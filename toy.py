"""The embedded default: a tiny world built from nothing, in which knowing when to search can be learned on a laptop.

The world has 1,225 things. A thing is a coloured shape with a pattern on a coloured ground, has a name and three facts
(founder, city, river). 24 of them are *known*: the base model is taught their names and facts; of 941 others it is
taught to say `unknown`. 200 that it has never seen appear in training questions, another 60 only in validation
questions. Everybody is asked about in the same words, so whether a question needs a search can only be told by
recognising the picture or not:

    known name      what is it called?     answer at once
    known fact      who founded it?        answer at once
    unknown name    what is it called?     image search
    unknown fact    who founded it?        image search for the name, text search for the fact

`build` leaves a folder with the tokenizer, questions (veRL parquet), a search index, and a model in three stages:
`base` sees and copies, knows the known things and says `unknown` of others; `model` has also seen conversations of a
scripted, sloppy policy whose searching has nothing to do with need. From there, `train.py` is on its own.

    python toy.py            # builds the world of the preset; train.py does this by itself
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import searchdb
from config import Config, InputError, parse, run_main
from data import PROMPT_FILES, Codec, Episode, Question
from policy import export_hf, imitation_loss, init_distributed, load_policy, pack, update
from rollout import Reply, ScriptedEngine, run
from tools import OfflineSearch

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS = {
    "red": (214, 40, 40), "green": (36, 150, 60), "blue": (40, 70, 210), "yellow": (240, 210, 40),
    "purple": (140, 50, 170), "orange": (245, 130, 30), "white": (245, 245, 245), "black": (25, 25, 25),
}  # fmt: skip
PATTERNS = ("plain", "stripes", "grid", "half")
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
FACTS = ("founder", "city", "river")
KNOWN, TAUGHT, TRAIN, VAL = 24, 941, 200, 60  # things; all but the first are unknown
WORDINGS = {
    "name": ("what is it called?", "what is its name?"),
    "founder": ("who founded it?", "who is its founder?"),
    "city": ("in which city is it?", "what is its city?"),
    "river": ("on which river is it?", "what is its river?"),
}
SEEING = "what do you see?"
KNOBS = "toy_seed toy_pretrain_steps toy_teach_steps toy_warmup_steps toy_named toy_beliefs".split()  # make a world
PLANS = ((), ("image",), ("image", "text"), ("text",))  # searches of the warm-up's scripted policy
KINDS = ("known name", "known fact", "unknown name", "unknown fact", "named fact")  # the last if toy_named


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    ground: str
    pattern: str
    name: str
    founder: str
    city: str
    river: str
    known: bool
    named: bool  # its name is known: of the known things, and of the next `toy_named`

    def belief(self, what: str) -> str:
        """What the base model is taught to answer."""
        return getattr(self, what) if self.known or (self.named and what == "name") else "unknown"


@dataclass(frozen=True)
class Toy:
    """Where the parts of a built world are."""

    folder: Path

    model = property(lambda self: self.folder / "model")
    base = property(lambda self: self.folder / "base")
    train = property(lambda self: self.folder / "world" / "train.parquet")
    val = property(lambda self: self.folder / "world" / "val.parquet")
    index = property(lambda self: self.folder / "world" / "search.sqlite")


def locate(cfg: Config) -> Toy:
    """The folder of the world that this configuration and this version of the file describe."""
    knobs = [getattr(cfg, name) for name in KNOBS]
    folder = Path(__file__).parent / "prompts" / "toy"
    prompts = [(folder / f"{name}.txt").read_text() for name in sorted(PROMPT_FILES)]  # those the world is made with
    recipe = Path(__file__).read_text() + json.dumps([knobs, prompts])
    return Toy(Path(cfg.toy_dir) / hashlib.sha256(recipe.encode()).hexdigest()[:10])


def ensure(cfg: Config) -> Toy:
    """The world of this configuration, built first if it is not there: by rank 0, in a process of its own, with all
    cores, while the other ranks wait."""
    toy = locate(cfg)
    if dist.get_rank() == 0 and not toy.model.exists():
        print(f"building the toy world in {toy.folder} (once; a few minutes)", file=sys.stderr)
        alone = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
        args = [f"--{name}={getattr(cfg, name)}" for name in (*KNOBS, "toy_dir", "threads", "device")]
        done = subprocess.run([sys.executable, __file__, *args], env=alone, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
    dist.barrier()
    return toy


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def build(folder: str | Path, cfg: Config | None = None) -> Toy:
    """Build the world in `folder`: three stages, each written under a temporary name and renamed, each skipped if it is
    there. About 7 minutes on 2 slow cores."""
    toy, cfg = Toy(Path(folder)), cfg or Config()
    device = init_distributed(cfg)
    rng = random.Random(f"world {cfg.toy_seed}")
    things = make_things(rng, cfg.toy_named)
    _stage(toy.folder / "world", lambda path: write_world(path, things, cfg))
    _stage(toy.base, lambda path: make_base(path, toy, things, cfg, device))
    _stage(toy.model, lambda path: warm_up(path, toy, things, cfg, device))
    return toy


def _stage(path, make):
    if path.exists():
        return
    temporary = Path(f"{path}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{temporary}: cannot write ({error.strerror})") from None
    make(temporary)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------- the world


def make_things(rng: random.Random, named: int = 0) -> list[Thing]:
    """All things: first the known, then those `named` of which only the name is, then the unknown: of the lessons, of
    training, of validation. What training and validation ask about as unknown differs from every known thing in at
    least two respects, so that no eye should take it for one. No word is used twice."""
    looks = [(s, c, g, p) for s, c, g, p in product(SHAPES, COLORS, COLORS, PATTERNS) if c != g]
    rng.shuffle(looks)
    familiar, others = looks[: KNOWN + named], looks[KNOWN + named :]
    asked = [look for look in others if max(alike(look, other) for other in familiar) < 3][: TRAIN + VAL]
    looks = [*familiar, *[look for look in others if look not in asked][: TAUGHT - named], *asked]
    words = [a + b for a, b in product(SYLLABLES, SYLLABLES)]  # just enough
    words = rng.sample(words, 4 * len(looks))
    return [Thing(*look, *words[4 * i : 4 * i + 4], i < KNOWN, i < KNOWN + named) for i, look in enumerate(looks)]


def draw(look, rng: random.Random, size: int = 56, noise: float = 10.0) -> bytes:
    """A picture of (shape, color, ground, pattern) as JPEG bytes; position, scale, light and noise differ each time."""
    shape, color, ground, pattern = look
    scale, light = 2, rng.uniform(0.9, 1.1)
    image = Image.new("RGB", (size * scale,) * 2, COLORS[ground])
    stamp = Image.new("L", image.size, 0)
    radius = size * scale * 0.36 * rng.uniform(0.85, 1.15)
    x, y = (size * scale / 2 + rng.uniform(-0.06, 0.06) * size * scale for _ in range(2))
    _draw_shape(ImageDraw.Draw(stamp), shape, x, y, radius)
    image.paste(_fill(image.size, COLORS[color], pattern, x, y, radius), mask=stamp)
    image = image.resize((size, size), Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    pixels = pixels * light + torch.randn(len(pixels), generator=generator) * noise
    image = Image.frombytes("RGB", (size, size), pixels.clamp(0, 255).byte().numpy().tobytes())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def _draw_shape(pen, shape, x, y, r):
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=255)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=255)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=255)
        pen.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill=255)
    else:  # ring
        pen.ellipse(box, fill=255)
        pen.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=0)


def _fill(size, color, pattern, x, y, radius):
    """The shape's colour, with a darker or lighter pattern that moves and grows with the shape."""
    image = Image.new("RGB", size, color)
    pen = ImageDraw.Draw(image)
    mark = tuple(int(c * 0.45) if sum(color) > 200 else int(c + 150) for c in color)
    step, width = radius / 1.5, max(1, int(radius / 3.5))  # coarse enough for a small vision tower
    lines = [step * i for i in range(-3, 4)]
    for a in lines:
        if pattern in ("stripes", "grid"):
            pen.line((0, y + a, size[0], y + a), fill=mark, width=width)
        if pattern == "grid":
            pen.line((x + a, 0, x + a, size[1]), fill=mark, width=width)
    if pattern == "half":
        pen.rectangle((0, 0, x, size[1]), fill=mark)
    return image


def look_of(thing: Thing):
    return thing.shape, thing.color, thing.ground, thing.pattern


def alike(look, other) -> int:
    """How many of shape, colour, ground and pattern two things share."""
    return sum(a == b for a, b in zip(look, other, strict=True))


def write_world(path: Path, things: list[Thing], cfg: Config) -> None:
    """Questions as veRL parquet, and the search index: a gallery picture of everything, a document for each fact."""
    rng = random.Random(f"pictures {cfg.toy_seed}")
    gallery = ({"image": draw(look_of(t), rng, size=72, noise=3.0), "title": t.name} for t in things)
    documents = ({"title": f"{t.name} {fact}", "text": getattr(t, fact)} for t in things for fact in FACTS)
    searchdb.build(path / "search.sqlite", documents, gallery)
    familiar, train, val = [t for t in things if t.named], things[-VAL - TRAIN : -VAL], things[-VAL:]
    _write_questions(path / "train.parquet", familiar + train, 400, rng)
    _write_questions(path / "val.parquet", familiar + val, 60, rng)


def is_of_kind(thing: Thing, kind: str) -> bool:
    """Can a question of that kind be about the thing?"""
    named_only = thing.named and not thing.known
    of_kind = {"known name": thing.named, "known fact": thing.known, "named fact": named_only}
    return of_kind.get(kind, not thing.named)


def _write_questions(path, things, per_kind, rng):
    """`per_kind` questions of each kind in random order; every picture is new."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for kind in KINDS:
        of_kind = [t for t in things if is_of_kind(t, kind)]
        for i in range(per_kind if of_kind else 0):
            thing = of_kind[i % len(of_kind)]
            what = "name" if kind.endswith("name") else rng.choice(FACTS)
            rows.append(
                {
                    "prompt": [{"role": "user", "content": rng.choice(WORDINGS[what])}],
                    "images": [{"bytes": draw(look_of(thing), rng)}],
                    "reward_model": {"ground_truth": getattr(thing, what), "candidate_answers": "[]", "style": "rule"},
                    "data_source": kind,
                    "data_id": f"{thing.name}-{what}",
                }
            )
    rng.shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


# ------------------------------------------------------------------------------------- tokenizer and tiny model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
TAGS = ("reason", "answer", "search", "text_search", "information")


def save_tokenizer(path: Path) -> None:
    """A byte-level BPE with Qwen's special tokens: a token for each syllable and for each word of the world; everything
    else falls to pieces, but nothing is unknown."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.decoder = decoders.ByteLevel()
    sentences = [w for words in WORDINGS.values() for w in words] + [SEEING]
    words = sorted({w.strip("?") for s in sentences for w in s.split()} | {*SHAPES, *COLORS, *PATTERNS, *FACTS})
    words += ["user", "assistant", "system", "unknown", "say", "find", "think", "or", "answer"]
    words += ["the", "search", "failed", "found", "nothing"]
    corpus = ([f" {s}" for s in SYLLABLES] + SYLLABLES) * 50  # often, so that no word's pieces cut through a name
    corpus += [f" {w}" for w in words] + words
    specials = [f"<|{name}|>" for name in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, special_tokens=specials, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")] + ["<img>"]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(path)


def save_random_model(path: Path, seed: int) -> None:
    """Tokenizer, image processor and a random Qwen2.5-VL of about 1.2 million parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    save_tokenizer(path)
    tokenizer = Qwen2Tokenizer.from_pretrained(path)
    id_of = lambda name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")  # noqa: E731
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32768, initializer_range=0.05,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            bos_token_id=None, eos_token_id=id_of("im_end"), pad_token_id=id_of("endoftext"),
        ),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128, window_size=112,
            fullatt_block_indexes=[1], initializer_range=0.05,
        ),
        tie_word_embeddings=True, image_token_id=id_of("image_pad"), video_token_id=id_of("video_pad"),
        vision_start_token_id=id_of("vision_start"), vision_end_token_id=id_of("vision_end"),
    )  # fmt: skip
    torch.manual_seed(seed)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 1280).save_pretrained(path)


# ------------------------------------------------------------------------------------------------------ lessons


class Lessons:
    """Makes the short exchanges that the base model is trained on."""

    def __init__(self, things: list[Thing], codec: Codec, seed):
        self.rng = random.Random(f"lessons {seed}")
        self.codec = codec
        self.familiar = [t for t in things if t.named]
        self.unknown = [t for t in things[: KNOWN + TAUGHT] if not t.named]
        looks = [look_of(t) for t in self.familiar]
        self.similar = [t for t in self.unknown if max(map(partial(alike, look_of(t)), looks)) == 3]
        hidden = {look_of(t) for t in things[KNOWN + TAUGHT :]}  # what the questions ask about is never drawn here
        looks = product(SHAPES, COLORS, COLORS, PATTERNS)
        self.looks = [look for look in looks if look[1] != look[2] and look not in hidden]

    def lesson(self, text: str, reply: str, *images: bytes) -> Episode:
        episode = Episode.start(Question(id="lesson", text=text, images=images), self.codec, template="{question}")
        ids = [*self.codec.encode(f" {reply}"), self.codec.im_end]
        episode.add_reply(Reply("", ids, [0.0] * len(ids), "stop", 0))
        return episode

    def seeing(self, n: int) -> list[Episode]:
        """Describe n random pictures: pattern, colour, shape and ground."""
        lessons = []
        for shape, color, ground, pattern in self.rng.choices(self.looks, k=n):
            image = draw((shape, color, ground, pattern), self.rng)
            lessons.append(self.lesson(SEEING, f"{pattern} {color} {shape} {ground}", image))
        return lessons

    def copying(self, n: int) -> list[Episode]:
        """Repeat words; read out what the first of up to three lines says, as it does in results of a search."""
        lessons = []
        for i in range(n):
            words = ["".join(self.rng.choices(SYLLABLES, k=2)) for _ in range(6)]
            if i % 2:
                text = " ".join(words[: self.rng.randint(1, 5)])
                lessons.append(self.lesson(f"say {text}", text))
                continue
            keys = [f"{words[j]} {self.rng.choice(FACTS)}" for j in range(self.rng.randint(1, 3))]
            listing = "\n".join(f" {key}: {value}" for key, value in zip(keys, words[3:], strict=False))
            lessons.append(self.lesson(f"{listing}\n find {keys[0]}", words[3]))
        return lessons

    def knowing(self, n: int) -> list[Episode]:
        """What is known of n things: name and a fact of the known ones (two of five), `unknown` for the others, half of
        which differ from a known one in a single respect. The pictures are new."""
        draws = ((self.familiar, 2 * n // 5), (self.similar, 3 * n // 10), (self.unknown, 3 * n // 10))
        lessons = []
        for thing in (thing for group, k in draws for thing in self.rng.choices(group, k=k)):
            image = draw(look_of(thing), self.rng)
            for what in ("name", self.rng.choice(FACTS)):
                lessons.append(self.lesson(self.rng.choice(WORDINGS[what]), thing.belief(what), image))
        return lessons


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal by five steps of a
    Newton-Schulz iteration. torch.optim.Muon does those in bf16, which took three quarters of a lesson's time on CPUs
    without bf16 instructions; here they are fp32, the matrices of one shape together."""

    def __init__(self, groups):
        super().__init__(groups, dict(momentum=0.95))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for (rows, columns), matrices in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in matrices]))
                lr = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, change in zip(matrices, updates, strict=True):
                    whole(p).add_(change, alpha=-lr)

    def _momentum(self, p, momentum):
        grad = whole(p.grad)
        average = self.state[p].setdefault("average", torch.zeros_like(grad)).lerp_(grad, 1 - momentum)
        return grad.lerp(average, momentum)  # Nesterov's


def orthogonal(x: Tensor) -> Tensor:
    """[N, R, C] to about the nearest matrices whose singular values are all one (they end between 0.7 and 1.2)."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.7750 * gram) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def whole(tensor: Tensor) -> Tensor:
    """FSDP's shard is the whole tensor where there is one process, and the world is built by one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class _Optimizers:
    """Muon for the matrices inside the blocks, AdamW for the rest, both with a linear decay over the second half: in a
    random tiny model Muon needs a fraction of AdamW's steps."""

    def __init__(self, model, steps, adam_lr, muon_lr=0.0):
        named = [(n, p) for n, p in model.named_parameters()]
        matrices = [(n, p) for n, p in named if muon_lr and p.ndim == 2 and ("layers." in n or "blocks." in n)]
        ids = {id(p) for _, p in matrices}
        self.optimizers = [torch.optim.AdamW([p for _, p in named if id(p) not in ids], adam_lr, (0.9, 0.98))]
        if matrices:
            text = [p for n, p in matrices if "visual" not in n]
            vision = [p for n, p in matrices if "visual" in n]
            groups = [dict(params=text, lr=muon_lr), dict(params=vision, lr=muon_lr / 2)]
            self.optimizers.append(Muon(groups))
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 20, (steps - s) / (0.5 * steps)))
            for o in self.optimizers
        ]

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self):
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


def imitate(model, optimizer, make, steps: int, title: str, codec: Codec, cfg: Config, device) -> None:
    """Supervised steps on the sampled tokens of the episodes that make() returns, through the trainer's packing and
    update. Batches are made in a process of its own meanwhile: drawing takes half as long as learning."""
    batches = _Batches(lambda: pack(make(), codec, model, cfg.max_tokens_per_batch), steps)
    loader = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context="fork")
    for rows in (bar := tqdm(loader, title, total=steps)):
        sums = update(model, optimizer, rows, partial(imitation_loss, "tokens"), cfg, device)
        bar.set_postfix(loss=f"{sums['loss'] / sums['count']:.3f}")


class _Batches(IterableDataset):
    def __init__(self, make, steps):
        self.make, self.steps = make, steps

    def __iter__(self):
        return (self.make() for _ in range(self.steps))


def make_base(path: Path, toy: Toy, things: list[Thing], cfg: Config, device) -> None:
    """A random model learns to see and to copy, then the known things, with replay of both."""
    save_random_model(path, cfg.toy_seed)
    codec = Codec(path, cfg)
    model = load_policy(path, codec, cfg, device)
    lessons = Lessons(things, codec, cfg.toy_seed)
    steps, title = cfg.toy_pretrain_steps, "base model: seeing, copying"
    batch = lambda: lessons.seeing(32) + lessons.copying(24)  # noqa: E731
    imitate(model, _Optimizers(model, steps, 4e-3, 6e-3), batch, steps, title, codec, cfg, device)
    lessons = Lessons(things, codec, f"known {cfg.toy_seed}")
    steps, title = cfg.toy_teach_steps, "base model: known things"
    batch = lambda: lessons.knowing(60) + lessons.seeing(8) + lessons.copying(12)  # noqa: E731
    imitate(model, _Optimizers(model, steps, 2e-3, 3e-3), batch, steps, title, codec, cfg, device)
    export_hf(path, model, codec)


# ------------------------------------------------------------------------------------------------------ warm-up


class SloppyPolicy:
    """A script for ScriptedEngine. It says what it believes, then searches or not by the throw of a die; what it does
    is well-formed, and blind to need: no search .36, image search .22, image and text search .42. (With `toy_named`
    also text search at once, .18, of what it takes to be the name; without `toy_beliefs` it does not say anything
    of what it believes.)"""

    def __init__(self, codec: Codec, cfg: Config):
        self.codec = codec
        self.plans = dict(zip(PLANS, (0.30, 0.18, 0.34, 0.18) if cfg.toy_named else (0.36, 0.22, 0.42, 0), strict=True))
        self.thought = "{}" if cfg.toy_beliefs else "think"
        self.asked: dict[str, tuple[Thing, str]] = {}  # the picture's key -> what is asked about whom

    def question(self, thing: Thing, what: str, rng: random.Random) -> Question:
        image = draw(look_of(thing), rng)
        self.asked[self.codec.picture(image).key] = (thing, what)
        return Question(id=f"warm-up {len(self.asked)}", text=rng.choice(WORDINGS[what]), images=(image,))

    def __call__(self, prompt: str, images, sampling) -> str:
        thing, what = self.asked[images[0].key]
        die = random.Random(images[0].key)
        (plan,) = die.choices(list(self.plans), list(self.plans.values()))
        results = re.findall(r"<information>\n(.*?)</information>", prompt, re.S)
        name, belief = thing.belief("name"), thing.belief(what)
        thought = belief
        for search, result in zip(plan, results, strict=False):  # those made so far
            if search == "image":
                name = re.search(r"<image> (\w+)", result)[1]
                belief = name if what == "name" else belief
            elif what != "name":
                value = re.search(rf" {name} {what}: (\w+)", result)
                belief = value[1] if value else "unknown"
            thought = name if search == "image" else belief
        if len(results) == len(plan):
            action = f"<answer> {belief}</answer>"
        elif plan[len(results)] == "image":
            action = "<search><img></search>"
        else:
            action = f"<text_search> {name} {die.choice(FACTS) if what == 'name' else what}</text_search>"
        return f"<reason> {self.thought.format(thought)}.</reason>{action}"


def warm_up(path: Path, toy: Toy, things: list[Thing], cfg: Config, device) -> None:
    """Supervised steps on conversations of the sloppy policy, held by the ordinary rollout, with replay of the
    lessons."""
    codec = Codec(toy.base, cfg)
    model = load_policy(toy.base, codec, cfg, device)
    lessons = Lessons(things, codec, f"warm-up {cfg.toy_seed}")
    policy, rng = SloppyPolicy(codec, cfg), random.Random(f"warm-up {cfg.toy_seed}")
    engine = ScriptedEngine(codec, policy)

    @cache
    def search():  # opened where it is used: a connection of SQLite must not be taken through a fork
        index = searchdb.SearchDB(toy.index)
        return OfflineSearch(index, image_results=cfg.image_results, text_results=cfg.text_results)

    def batch():
        questions = []
        for i in range(32):
            thing = rng.choice(lessons.familiar if i % 2 else lessons.unknown if i % 8 < 4 else lessons.similar)
            questions.append(policy.question(thing, "name" if i % 4 < 2 else rng.choice(FACTS), rng))
        episodes = run(questions, engine, search(), codec, cfg, ordered=True)
        return episodes + lessons.knowing(20) + lessons.seeing(6) + lessons.copying(10)

    steps, title = cfg.toy_warmup_steps, "warm-up: a sloppy policy"
    imitate(model, _Optimizers(model, steps, 3e-3), batch, steps, title, codec, cfg, device)
    export_hf(path, model, codec)


def main() -> None:
    cfg = parse(sys.argv[1:])
    print(build(locate(cfg).folder, cfg).folder)


if __name__ == "__main__":
    run_main(main)
