"""toy/world.py"""

import io
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from config import Config
from search.index import build

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
    build(path / "search.sqlite", documents, gallery)
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
