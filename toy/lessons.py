"""toy/lessons.py"""

import random
import re
from collections import defaultdict
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from chat import Chat
from checkpoint import export_hf
from config import Config
from data import Episode, Question
from engines import Reply, ScriptedEngine
from policy import imitation_loss, load_policy, pack, update
from rollout import run
from search.index import OfflineSearch, SearchDB
from toy import Toy
from toy.model import save_random_model
from toy.world import (
    COLORS,
    FACTS,
    KNOWN,
    PATTERNS,
    SEEING,
    SHAPES,
    SYLLABLES,
    TAUGHT,
    WORDINGS,
    Thing,
    alike,
    draw,
    look_of,
)


class Lessons:
    """Makes the short exchanges that the base model is trained on."""

    def __init__(self, things: list[Thing], chat: Chat, seed):
        self.rng = random.Random(f"lessons {seed}")
        self.chat = chat
        self.familiar = [t for t in things if t.named]
        self.unknown = [t for t in things[: KNOWN + TAUGHT] if not t.named]
        looks = [look_of(t) for t in self.familiar]
        self.similar = [t for t in self.unknown if max(map(partial(alike, look_of(t)), looks)) == 3]
        hidden = {look_of(t) for t in things[KNOWN + TAUGHT :]}  # what the questions ask about is never drawn here
        looks = product(SHAPES, COLORS, COLORS, PATTERNS)
        self.looks = [look for look in looks if look[1] != look[2] and look not in hidden]

    def lesson(self, text: str, reply: str, *images: bytes) -> Episode:
        episode = Episode.start(Question(id="lesson", text=text, images=images), self.chat, template="{question}")
        ids = [*self.chat.encode(f" {reply}"), self.chat.im_end]
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


def imitate(model, optimizer, make, steps: int, title: str, chat: Chat, cfg: Config, device) -> None:
    """Supervised steps on the sampled tokens of the episodes that make() returns, through the trainer's packing and
    update. Batches are made in a process of its own meanwhile: drawing takes half as long as learning."""
    batches = _Batches(lambda: pack(make(), chat, model, cfg.max_tokens_per_batch), steps)
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
    chat = Chat(path, cfg)
    model = load_policy(path, chat, cfg, device)
    lessons = Lessons(things, chat, cfg.toy_seed)
    steps, title = cfg.toy_pretrain_steps, "base model: seeing, copying"
    batch = lambda: lessons.seeing(32) + lessons.copying(24)  # noqa: E731
    imitate(model, _Optimizers(model, steps, 4e-3, 6e-3), batch, steps, title, chat, cfg, device)
    lessons = Lessons(things, chat, f"known {cfg.toy_seed}")
    steps, title = cfg.toy_teach_steps, "base model: known things"
    batch = lambda: lessons.knowing(60) + lessons.seeing(8) + lessons.copying(12)  # noqa: E731
    imitate(model, _Optimizers(model, steps, 2e-3, 3e-3), batch, steps, title, chat, cfg, device)
    export_hf(path, model, chat)


PLANS = ((), ("image",), ("image", "text"), ("text",))  # searches of the warm-up's scripted policy


class SloppyPolicy:
    """A script for ScriptedEngine. It says what it believes, then searches or not by the throw of a die; what it does
    is well-formed, and blind to need: no search .36, image search .22, image and text search .42. (With `toy_named`
    also text search at once, .18, of what it takes to be the name; without `toy_beliefs` it does not say anything
    of what it believes.)"""

    def __init__(self, chat: Chat, cfg: Config):
        self.chat = chat
        self.plans = dict(zip(PLANS, (0.30, 0.18, 0.34, 0.18) if cfg.toy_named else (0.36, 0.22, 0.42, 0), strict=True))
        self.thought = "{}" if cfg.toy_beliefs else "think"
        self.asked: dict[str, tuple[Thing, str]] = {}  # the picture's key -> what is asked about whom

    def question(self, thing: Thing, what: str, rng: random.Random) -> Question:
        image = draw(look_of(thing), rng)
        self.asked[self.chat.picture(image).key] = (thing, what)
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
    chat = Chat(toy.base, cfg)
    model = load_policy(toy.base, chat, cfg, device)
    lessons = Lessons(things, chat, f"warm-up {cfg.toy_seed}")
    policy, rng = SloppyPolicy(chat, cfg), random.Random(f"warm-up {cfg.toy_seed}")
    engine = ScriptedEngine(chat, policy)

    @cache
    def search():  # opened where it is used: a connection of SQLite must not be taken through a fork
        index = SearchDB(toy.index)
        return OfflineSearch(index, image_results=cfg.image_results, text_results=cfg.text_results)

    def batch():
        questions = []
        for i in range(32):
            thing = rng.choice(lessons.familiar if i % 2 else lessons.unknown if i % 8 < 4 else lessons.similar)
            questions.append(policy.question(thing, "name" if i % 4 < 2 else rng.choice(FACTS), rng))
        episodes = run(questions, engine, search(), chat, cfg, ordered=True)
        return episodes + lessons.knowing(20) + lessons.seeing(6) + lessons.copying(10)

    steps, title = cfg.toy_warmup_steps, "warm-up: a sloppy policy"
    imitate(model, _Optimizers(model, steps, 3e-3), batch, steps, title, chat, cfg, device)
    export_hf(path, model, chat)
