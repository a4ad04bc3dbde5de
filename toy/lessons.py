"""What the toy model is taught before training, by imitation: short exchanges about pictures and words, then (the
warm-up) conversations of a scripted policy that searches without regard to need."""

import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import tools
from chat import Chat, Episode, Picture
from checkpoint import export_hf
from config import Config
from data import Question
from engines import Engine, Reply, Sampling
from policy import imitation_loss, load_policy, pack, update
from rollout import run
from search.index import OfflineSearch, SearchDB
from toy import Recipe, Toy, world
from toy.model import save_random_model
from toy.world import Look, Thing

PLANS = ((), ("image_search",), ("image_search", "text_search"), ("text_search",))  # of the scripted policy
SHARES = (0.36, 0.22, 0.42, 0.0)  # how often it follows each
SHARES_NAMED = (0.26, 0.14, 0.30, 0.30)  # with toy_named, where a text search at once can be right
CROP_PLANS = ((), ("image_search",), ("crop", "image_search"), ("crop",))  # with toy_crop
CROP_SHARES = (0.2, 0.15, 0.6, 0.05)


class Lessons:
    """Makes the short exchanges that the base model is trained on."""

    def __init__(self, things: list[Thing], chat: Chat, seed: int | str, crop: bool = False):
        self.rng = random.Random(f"lessons {seed}")
        self.chat, self.crop = chat, crop
        self.familiar = [t for t in things if t.named]
        self.unknown = [t for t in things[: world.KNOWN + world.TAUGHT] if not t.named]
        self.similar = [t for t in self.unknown if max(world.alike(t.look, f.look) for f in self.familiar) == 3]
        hidden = {t.look for t in things[world.KNOWN + world.TAUGHT :]}  # what is asked about is never drawn
        self.looks = [look for look in world.LOOKS if look not in hidden]
        self.pool = world.equally(self.familiar, self.unknown)

    def lesson(self, text: str, reply: str, *images: bytes) -> Episode:
        sizes = () if self.crop else ((world.SIDE, world.SIDE),) * len(images)  # known: not decoded twice
        episode = Episode.start(Question("lesson", text, images, sizes=sizes), self.chat, template="{question}")
        ids = [*self.chat.encode(f" {reply}"), self.chat.im_end]
        episode.add_reply(Reply("", ids, [0.0] * len(ids), "stop", 0))
        return episode

    def seeing(self, n: int) -> list[Episode]:
        """Describe n random pictures: pattern, colour, shape and ground."""
        looks = self.rng.choices(self.looks, k=n)
        return [self.lesson(world.SEEING, world.SEEN.format(*look), world.draw(look, self.rng)) for look in looks]

    def looking(self, n: int) -> Iterator[Episode]:
        """With toy_crop, n pictures of four things each: describe all, or look for one of them."""
        for i in range(n if self.crop else 0):
            look = self.rng.choice(self.looks)
            looks = world.apart(look, self.looks, self.rng)
            image = world.draw_four(looks, self.rng)
            if i % 2:
                yield self.lesson(world.SEEING, " ".join(world.SEEN.format(*look) for look in looks), image)
            else:
                yield self.lesson(world.SEEKING.format(*look), " ".join(world.seek(look, looks)), image)

    def copying(self, n: int) -> Iterator[Episode]:
        """Repeat words; read out what the first of up to three lines says, as it does in results of a search."""
        for i in range(n):
            words = ["".join(self.rng.choices(world.SYLLABLES, k=2)) for _ in range(6)]
            if i % 2:
                text = " ".join(words[: self.rng.randint(1, 5)])
                yield self.lesson(f"say {text}", text)
                continue
            keys = [f"{words[j]} {self.rng.choice(world.FACTS)}" for j in range(self.rng.randint(1, 3))]
            listing = "\n".join(f" {key}: {value}" for key, value in zip(keys, words[3:], strict=False))
            yield self.lesson(f"{listing}\n find {keys[0]}", words[3])

    def knowing(self, n: int) -> Iterator[Episode]:
        """What is known of n things: name and a fact of the known ones (two of five), `unknown` for the others, half of
        which differ from a known one in a single respect. The pictures are new. With toy_crop: names alone, of a thing
        that is alone and of one among others."""
        for group, count in ((self.familiar, 2 * n // 5), (self.similar, 3 * n // 10), (self.unknown, 3 * n // 10)):
            for thing in self.rng.choices(group, k=count):
                if self.crop:
                    looks = world.apart(thing.look, self.pool, self.rng)
                    for image in (world.draw(thing.look, self.rng), world.draw_four(looks, self.rng)):
                        text = self.rng.choice(world.CROP_WORDINGS["name"]).format(*thing.look)
                        yield self.lesson(text, thing.belief("name"), image)
                    continue
                image = world.draw(thing.look, self.rng)
                for what in ("name", self.rng.choice(world.FACTS)):
                    yield self.lesson(self.rng.choice(world.WORDINGS[what]), thing.belief(what), image)


class Muon(torch.optim.AdamW):
    """AdamW, but for the matrices inside the model's blocks Muon (https://kellerjordan.github.io/posts/muon): momentum
    made orthogonal by five steps of a Newton-Schulz iteration. In a random tiny model it needs a fraction of AdamW's
    steps. torch.optim.Muon iterates in bf16, which took three quarters of a lesson's time on CPUs without bf16
    instructions; here it is fp32, the matrices of one shape together. muon_lr = 0: AdamW for all."""

    def __init__(self, model: torch.nn.Module, lr: float, muon_lr: float):
        rest, text, vision = [], [], []
        for name, p in model.named_parameters():
            in_block = muon_lr and p.ndim == 2 and ("layers." in name or "blocks." in name)
            (rest if not in_block else vision if "visual" in name else text).append(p)
        matrices = [dict(params=text, lr=muon_lr, muon=True), dict(params=vision, lr=muon_lr / 2, muon=True)]
        super().__init__([dict(params=rest), *matrices], lr, betas=(0.9, 0.98))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"] if "muon" in group else ():
                by_shape[p.shape].append(p)
            for (rows, columns), matrices in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(p) for p in matrices]))
                lr = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, change in zip(matrices, updates, strict=True):
                    p.add_(change, alpha=-lr)
                    p.grad = None  # AdamW leaves it alone
        super().step()

    def _momentum(self, p, momentum=0.95):
        average = self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)  # Nesterov's


def orthogonal(x: Tensor) -> Tensor:
    """[N, R, C] to about the nearest matrices whose singular values are all one (they end between 0.7 and 1.2)."""
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.7750 * gram) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


class Student:
    """The model of a folder, and how it learns."""

    def __init__(self, folder: Path, cfg: Config, device: torch.device):
        self.cfg, self.device = cfg, device
        self.chat = Chat(folder, cfg)
        self.model = load_policy(folder, self.chat, cfg, device)

    def imitate(self, title: str, lessons: Iterator[list], steps: int, lr: float, muon_lr: float = 0.0) -> None:
        """Supervised steps on the sampled tokens of lists of episodes, through the trainer's packing and update. The
        learning rate decays over the second half. Batches are made in a process of its own meanwhile: drawing takes
        half as long as learning."""
        packed = _Packed(self, itertools.islice(lessons, steps))
        loader = DataLoader(packed, batch_size=None, num_workers=1, multiprocessing_context="fork")
        optimizer, loss = Muon(self.model, lr, muon_lr), partial(imitation_loss, "tokens")
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps)))
        progress = tqdm(loader, title, total=steps)
        for batches in progress:
            sums = update(self.model, optimizer, batches, loss, self.cfg, self.device)
            schedule.step()
            progress.set_postfix(loss=f"{sums['loss'] / sums['count']:.3f}")


class _Packed(IterableDataset):
    """Packed batches without their episodes, whose tokenizer cannot be sent to another process."""

    def __init__(self, student, lessons):
        self.student, self.lessons = student, lessons

    def __iter__(self):
        for episodes in self.lessons:
            batches = pack(episodes, self.student.chat, self.student.model, self.student.cfg.max_tokens_per_batch)
            for batch in batches:
                batch.episodes = []
            yield batches


def make_base(path: Path, things: list[Thing], recipe: Recipe, cfg: Config, device: torch.device) -> None:
    """A random model learns to see and to copy, then the known things, with replay of both."""
    save_random_model(path, recipe.toy_seed, recipe.toy_crop, recipe.toy_json, recipe.toy_backbone, recipe.toy_beliefs)
    student = Student(path, cfg, device)
    first = Lessons(things, student.chat, recipe.toy_seed, recipe.toy_crop)
    second = Lessons(things, student.chat, f"known {recipe.toy_seed}", recipe.toy_crop)
    # iter(make, None) calls make() without end
    seeing = iter(lambda: [*first.seeing(32), *first.copying(24), *first.looking(40)], None)
    knowing = iter(lambda: [*second.knowing(60), *second.seeing(8), *second.copying(12), *second.looking(16)], None)
    student.imitate("base model: seeing, copying", seeing, recipe.toy_pretrain_steps, 4e-3, 6e-3)
    student.imitate("base model: known things", knowing, recipe.toy_teach_steps, 2e-3, 3e-3)
    export_hf(path, student.model, student.chat)


class ScriptedEngine(Engine):
    """Says what `script(prompt, images, sampling)` returns for the prompt's text: for tests and supervised warm-up."""

    def __init__(self, chat: Chat, script: Callable[[str, list[Picture], Sampling], str]):
        self.chat, self.script, self.queue = chat, script, []

    def submit(self, request_id, prompt, images, sampling):
        self.queue.append((request_id, prompt, images, sampling))

    def step(self):
        requests, self.queue = self.queue, []
        return [self._reply(*request) for request in requests]

    def _reply(self, request_id, prompt, images, sampling):
        ids = [*self.chat.encode(self.script(self.chat.show(prompt), images, sampling)), self.chat.im_end]
        reason, ids = "stop" if len(ids) <= sampling.max_tokens else "length", ids[: sampling.max_tokens]
        return Reply(request_id, ids, [0.0] * len(ids), reason, 0)

    def abort(self, request_ids):
        gone = [request for request in self.queue if request[0] in request_ids]
        self.queue = [request for request in self.queue if request not in gone]
        return [Reply(request[0], [], [], "abort", 0) for request in gone]


class SloppyPolicy:
    """A script for ScriptedEngine. It says what it believes, a fact after its name (not without toy_beliefs), follows a
    plan drawn at random, well-formed and blind to need, and asks a text search for what it takes to be the name."""

    def __init__(self, chat: Chat, recipe: Recipe):
        self.chat, self.recipe, self.wordings = chat, recipe, world.WORDINGS
        self.plans, self.shares = PLANS, SHARES_NAMED if recipe.toy_named else SHARES
        if recipe.toy_crop:
            self.plans, self.shares, self.wordings = CROP_PLANS, CROP_SHARES, world.CROP_WORDINGS
        self.asked: dict[str, tuple[Thing, str]] = {}  # the picture's key -> what is asked about which thing
        self.shown: dict[str, list[Look]] = {}  # the picture's key -> all that it shows

    def question(self, thing: Thing, what: str, rng: random.Random, pool: Sequence[Look] = ()) -> Question:
        """pool: the thing is shown among three others of these."""
        looks = world.apart(thing.look, pool, rng) if pool else [thing.look]
        image = world.draw_four(looks, rng) if pool else world.draw(thing.look, rng)
        key = self.chat.picture(image, size=None if pool else (world.SIDE, world.SIDE)).key
        self.asked[key], self.shown[key] = (thing, what), looks
        text = rng.choice(self.wordings[what]).format(*thing.look)
        return Question(id=f"warm-up {len(self.asked)}", text=text, images=(image,))

    def plan(self, thing: Thing, what: str, rng: random.Random) -> tuple[str, ...]:
        """The tools to call before answering."""
        return rng.choices(self.plans, self.shares)[0]

    def __call__(self, prompt: str, images: Sequence[Picture], sampling: Sampling) -> str:
        thing, what = self.asked[images[0].key]
        rng = random.Random(images[0].key)  # the same in each turn of a conversation
        plan = self.plan(thing, what, rng)
        results = re.findall(r"<information>\n(.*?)</information>", prompt, re.DOTALL)
        name, belief = thing.belief("name"), thing.belief(what)
        for tool, result in zip(plan, results, strict=False):  # the calls made so far
            if tool == "image_search" and not (self.recipe.toy_crop and thing.known):  # there it trusts itself more
                name = re.search(r"<image> (\w+)", result)[1]
                belief = name if what == "name" else belief
            if tool == "text_search" and what != "name":
                value = re.search(rf" {name} {what}: (\w+)", result)
                belief = value[1] if value else "unknown"
        thought = belief if what == "name" else f"{name} {belief}"
        action, seen = f"<answer> {belief}</answer>", ""
        if len(results) < len(plan):
            action = self._call(plan[len(results)], f" {name} {rng.choice(world.FACTS) if what == 'name' else what}")
            if "crop" in plan and results:
                action = "<search><img_2></search>"
            elif "crop" in plan:
                seen, box = world.seek(thing.look, self.shown[images[0].key])
                seen, action = f" {seen}", f"<crop> {box}</crop>"
        return f"<reason> {thought if self.recipe.toy_beliefs else 'think'}.{seen}</reason>{action}"

    def _call(self, tool, query):
        if self.chat.cfg.dialect == "json":
            call = {"name": tool, "arguments": {"query": query} if tool == "text_search" else {}}
            return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        return f"<text_search>{query}</text_search>" if tool == "text_search" else "<search><img></search>"


def warm_up(path: Path, toy: Toy, things: list[Thing], recipe: Recipe, cfg: Config, device: torch.device) -> None:
    """Supervised steps on conversations of the sloppy policy in the ordinary rollout, with replay of the lessons."""
    student = Student(toy.base, cfg, device)
    chat, seed = student.chat, f"warm-up {recipe.toy_seed}"
    lessons, policy = Lessons(things, chat, seed, recipe.toy_crop), SloppyPolicy(chat, recipe)
    rng = random.Random(seed)

    def ask(i):
        group = lessons.unknown if i % 8 < 4 else lessons.similar
        thing = rng.choice(lessons.familiar if i % 2 else group)
        if recipe.toy_crop:
            return policy.question(thing, "name", rng, lessons.pool if i % 4 < 2 else ())
        return policy.question(thing, "name" if i % 4 < 2 else rng.choice(world.FACTS), rng)

    def batches():  # the index is opened here: a connection of SQLite must not be taken through a fork
        engine = ScriptedEngine(chat, policy)
        search = OfflineSearch(SearchDB(toy.index), tools.results(cfg))
        while True:
            episodes = run([ask(i) for i in range(32)], engine, search, chat, cfg, ordered=True)
            yield [*episodes, *lessons.knowing(20), *lessons.seeing(6), *lessons.copying(10), *lessons.looking(8)]

    student.imitate("warm-up: a sloppy policy", batches(), recipe.toy_warmup_steps, 3e-3)
    export_hf(path, student.model, chat)
