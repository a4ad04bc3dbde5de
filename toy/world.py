"""The toy world's things, their pictures, the questions about them, and the index that a search looks them up in."""

import itertools
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import Question, encode_image, write_questions
from search.index import build
from toy import Recipe

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS = {
    "red": (214, 40, 40), "green": (36, 150, 60), "blue": (40, 70, 210), "yellow": (240, 210, 40),
    "purple": (140, 50, 170), "orange": (245, 130, 30), "white": (245, 245, 245), "black": (25, 25, 25),
}  # fmt: skip
PATTERNS = ("plain", "stripes", "grid", "half")
Look = tuple[str, str, str, str]  # shape, colour, ground, pattern
LOOKS: list[Look] = [look for look in product(SHAPES, COLORS, COLORS, PATTERNS) if look[1] != look[2]]
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
FACTS = ("founder", "city", "river")
KNOWN, TAUGHT, TRAIN, VAL = 24, 941, 200, 60  # things; all but the first are unknown
TRAIN_QUESTIONS, VAL_QUESTIONS = 400, 60  # of each kind
WORDINGS = {
    "name": ("what is it called?", "what is its name?"),
    "founder": ("who founded it?", "who is its founder?"),
    "city": ("in which city is it?", "what is its city?"),
    "river": ("on which river is it?", "what is its river?"),
}
SEEING, SEEN = "what do you see?", "{3} {1} {0} {2}"  # the reply: pattern, colour, shape, ground
SEEKING = "where is the {1} {0}?"  # with toy_crop; {1} {0}: colour, shape
KINDS = ("known name", "known fact", "unknown name", "unknown fact", "named fact")  # the last only with toy_named
CROP_KINDS = ("known alone", "known among others", "unknown alone", "unknown among others")  # with toy_crop
CROP_WORDINGS = {"name": ("what is the {1} {0} called?", "what is the name of the {1} {0}?")}
NUMBERS = ("one", "two", "three", "four")
SIDE = 56  # of a picture of one thing, pixels
CELLS = ("0 0 500 500", "500 0 1000 500", "0 500 500 1000", "500 500 1000 1000")  # of a picture of four, as crop boxes


@dataclass(frozen=True)
class Thing:
    look: Look
    name: str
    founder: str
    city: str
    river: str
    known: bool
    named: bool  # its name is known: of the known things, and of the next `toy_named`

    def belief(self, what: str) -> str:
        """What the base model is taught to answer."""
        return getattr(self, what) if self.known or (self.named and what == "name") else "unknown"

    def kinds(self, crop: bool) -> tuple[str, str]:
        """The kinds of question that are asked about it."""
        if crop:
            return CROP_KINDS[:2] if self.known else CROP_KINDS[2:]
        if self.named:
            return "known name", "known fact" if self.known else "named fact"
        return "unknown name", "unknown fact"


def make_things(rng: random.Random, named: int = 0, crop: bool = False) -> list[Thing]:
    """All things: first the known, then those `named` of which only the name is, then the unknown: of the lessons, of
    training, of validation. What training and validation ask about as unknown differs from every known thing in at
    least two respects, so that no eye should take it for one. No word is used twice.

    crop: questions tell colour and shape. So no two known things share both, and the unknown ones that are asked about
    have the known ones' in equal numbers."""
    looks = list(LOOKS)
    rng.shuffle(looks)
    if crop:
        first = {look[:2]: look for look in reversed(looks)}  # of each shape and colour
        looks.sort(key=lambda look: look != first[look[:2]])
    familiar, others = looks[: KNOWN + named], looks[KNOWN + named :]
    asked = [look for look in others if max(alike(look, other) for other in familiar) < 3]
    if crop:
        turns = {look[:2]: itertools.count() for look in familiar}
        asked = [look for look in asked if look[:2] in turns]
        asked.sort(key=lambda look: next(turns[look[:2]]))  # a round of all pairs, and so on
    asked = asked[: TRAIN + VAL]
    taught = [look for look in others if look not in asked][: TAUGHT - named]
    looks = [*familiar, *taught, *asked]
    words = rng.sample([a + b for a, b in product(SYLLABLES, SYLLABLES)], 4 * len(looks))  # just enough
    return [Thing(look, *words[4 * i : 4 * i + 4], i < KNOWN, i < KNOWN + named) for i, look in enumerate(looks)]


def alike(look: Look, other: Look) -> int:
    """How many of shape, colour, ground and pattern two looks share."""
    return sum(a == b for a, b in zip(look, other, strict=True))


def apart(look: Look, pool: list[Look], rng: random.Random) -> list[Look]:
    """The look and three others, in random order; no two have the same colour."""
    found = {look[1]: look}
    while len(found) < len(CELLS):
        other = rng.choice(pool)
        found.setdefault(other[1], other)
    return rng.sample([*found.values()], len(found))


def seek(look: Look, looks: list[Look]) -> tuple[str, str]:
    """(what is said in looking for it, its box): the things' colours, one after another, until it is found. Of a thing
    that is alone the box is the whole picture."""
    cell = looks.index(look)
    seen = [f"{number} {other[1]}" for number, other in zip(NUMBERS, looks[: cell + 1], strict=False)]
    return " ".join(seen), CELLS[cell] if len(looks) > 1 else "0 0 1000 1000"


def equally(known: list[Thing], unknown: list[Thing]) -> list[Look]:
    """Looks to choose from, so that known and unknown things are about equally likely."""
    return [t.look for t in [*known * (len(unknown) // len(known)), *unknown]]


def draw(look: Look, rng: random.Random, size: int = SIDE, noise: float = 10.0) -> bytes:
    """A picture, size x size pixels, as JPEG bytes; position, scale, light and noise differ each time."""
    return encode_image(_paint(look, rng, size, noise), "JPEG", 95)


def draw_four(looks: list[Look], rng: random.Random) -> bytes:
    """A picture of four things, in the order of CELLS; each quarter is drawn like a picture of its own."""
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for cell, look in enumerate(looks):
        image.paste(_paint(look, rng), (cell % 2 * SIDE, cell // 2 * SIDE))
    return encode_image(image, "JPEG", 95)


def _paint(look, rng, size=SIDE, noise=10.0):
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
    return Image.frombytes("RGB", (size, size), pixels.clamp(0, 255).byte().numpy().tobytes())


def _draw_shape(pen, shape, x, y, r):
    def box(a, b):
        return x - a * r, y - b * r, x + a * r, y + b * r

    if shape in ("circle", "ring"):
        pen.ellipse(box(1, 1), fill=255)
    if shape == "ring":
        pen.ellipse(box(0.5, 0.5), fill=0)
    if shape == "square":
        pen.rectangle(box(0.85, 0.85), fill=255)
    if shape == "cross":
        pen.rectangle(box(1, 0.35), fill=255)
        pen.rectangle(box(0.35, 1), fill=255)
    if shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=255)
    if shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=255)


def _fill(size, color, pattern, x, y, radius):
    """The shape's colour, with a darker or lighter pattern that moves and grows with the shape."""
    image = Image.new("RGB", size, color)
    pen = ImageDraw.Draw(image)
    mark = tuple(int(c * 0.45) if sum(color) > 200 else int(c + 150) for c in color)
    step, width = radius / 1.5, max(1, int(radius / 3.5))  # coarse enough for a small vision tower
    for i in range(-3, 4):
        if pattern in ("stripes", "grid"):
            pen.line((0, y + step * i, size[0], y + step * i), fill=mark, width=width)
        if pattern == "grid":
            pen.line((x + step * i, 0, x + step * i, size[1]), fill=mark, width=width)
    if pattern == "half":
        pen.rectangle((0, 0, x, size[1]), fill=mark)
    return image


def write_world(path: Path, things: list[Thing], recipe: Recipe) -> None:
    """Questions as veRL parquet, and the search index: a gallery picture of each thing, a document for each fact."""
    rng = random.Random(f"pictures {recipe.toy_seed}")
    gallery = ({"image": draw(t.look, rng, size=72, noise=3.0), "title": t.name} for t in things)
    documents = ({"title": f"{t.name} {fact}", "text": getattr(t, fact)} for t in things for fact in FACTS)
    build(path / "search.sqlite", documents, gallery)
    familiar, train, val = [t for t in things if t.named], things[-VAL - TRAIN : -VAL], things[-VAL:]
    for name, group, count in (("train", train, TRAIN_QUESTIONS), ("val", val, VAL_QUESTIONS)):
        questions = make_questions(familiar + group, count, rng, recipe.toy_crop)
        write_questions(path / f"{name}.parquet", questions, {})


def make_questions(things: list[Thing], per_kind: int, rng: random.Random, crop: bool = False) -> list[Question]:
    """`per_kind` questions of each kind, evenly about the things, in random order; no picture is used twice."""
    questions, wordings = [], CROP_WORDINGS if crop else WORDINGS
    pool = equally([t for t in things if t.known], [t for t in things if not t.known])
    for kind in CROP_KINDS if crop else KINDS:
        of_kind = [t for t in things if kind in t.kinds(crop)]
        for i in range(per_kind if of_kind else 0):
            thing = of_kind[i % len(of_kind)]
            what = rng.choice(FACTS) if kind.endswith("fact") else "name"
            id = f"{thing.name}-{what}"
            text = rng.choice(wordings[what]).format(*thing.look)
            among = kind.endswith("others")
            image = draw_four(apart(thing.look, pool, rng), rng) if among else draw(thing.look, rng)
            questions.append(Question(id, text, (image,), (getattr(thing, what),), kind, data_id=id))
    rng.shuffle(questions)
    return questions
