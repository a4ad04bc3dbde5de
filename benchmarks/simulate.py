"""Training steps of a 7B model on 8, 32 and 128 GPUs, on paper: an event simulation of engines, searches and trainer.

    python benchmarks/simulate.py                   # the tables of benchmarks/RESULTS.md
    python benchmarks/simulate.py --check torch     # beside rollouts measured here, with an engine of slow_tools.py

One engine a GPU. An engine's step samples a token for each turn that runs and runs the prompts of those that are new.
A turn ends in a call, which the provider begins when its limit of calls a second allows, or ends the conversation.
Nothing of it was measured on a GPU; docs/scale.md says where the figures come from. Three ways to run steps:

together  the GPUs roll out until all conversations are finished, then train: what train.py does without carry-over
carry     train.py --carry_over 2 (OLDEST). SPARE times a step's groups more are under way. When a step's groups are
          finished, turns that run are finished, the GPUs train, and the other conversations continue in the next step;
          their prompts are run again with the new weights. A step waits for groups that began OLDEST steps before.
          Searches go on meanwhile
separate  some GPUs only roll out and never stop, the others only train; as many groups are under way as in `carry`.
          The best of SPLITS. Favourable: new weights take the engines no time and leave their caches as they are
"""

import argparse
import heapq
import itertools
import math
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

DECODE, RUNNING, PROMPT = 7e-3, 7e-5, 4e-5  # seconds: a step of an engine, each turn that runs, each new token
TRAIN, ACROSS_NODES = 1.7e-4, 1.25  # seconds a token and GPU; times more on several nodes
SYNC, MOST_TURNS = 2.5, 256  # seconds a step: weights to the engine, sleep, wake; turns that run in an engine at once
GPU_HOUR, CALL = 3.0, 0.002  # dollars
CALLS, WAIT, WAIT_P99 = {0: 0.2, 1: 0.3, 2: 0.5}, 0.5, 8.0  # of a conversation; seconds of each, log-normal
SAID, SAID_P99, SAID_MOST = 150, 600, 2048  # tokens of a turn, log-normal
QUESTION, SHARED, RESULTS = 1400, 16, (500, 1500)  # tokens: prompt; not in the cache for a group's others; of calls
WAYS, SPARE, OLDEST, SPLITS = ("together", "carry", "separate"), 1.0, 2, (0.125, 0.25, 0.375)
CASES, SAMPLES = ((8, 16), (32, 64), (32, 512), (128, 256), (128, 512)), 8  # GPUs, groups; conversations of a group
LIMITS = (300, 50, 6000 / 3600)  # calls a second
STEPS, WARM, AT_ONCE = 8, 3, 10  # simulated, and of these not counted; uneventful steps of an engine taken as one


class Turn(NamedTuple):
    fresh: int  # tokens of the prompt that the engine's cache does not hold
    said: int  # tokens that are sampled
    wait: float  # seconds of the call that follows, if any turn does


@dataclass
class Conversation:
    turns: list[Turn]
    group: int = 0
    total: int = 0  # tokens that are trained
    turn: int = 0  # the next one
    cached: int = 0  # tokens of the turns before it
    version: int = 0  # of the weights with which the cache was filled


@dataclass
class Engine:
    number: int = 0  # steps so far
    running: int = 0  # turns
    due: float | None = None  # when its step ends, or when it wakes up
    ready: list = field(default_factory=list)  # a heap: since when, order of submission, conversation
    ends: dict = field(default_factory=lambda: defaultdict(list))  # number of a step -> conversations


class Machines:
    """Engines, and a provider of searches. cost(steps so far, turns running, new tokens) -> seconds of a step."""

    def __init__(self, engines: int, cost: Callable[[int, int, int], float], limit: float = math.inf):
        self.engines, self.cost, self.gap = [Engine() for _ in range(engines)], cost, 1 / limit
        self.events: list[tuple[float, int]] = []  # a heap: time, engine; one counts if its engine is due then
        self.order, self.next_call, self.calls = itertools.count(), 0.0, []
        self.admits, self.version, self.running, self.busy = True, 0, 0, 0.0

    def submit(self, conversation: Conversation, clock: float, number: int) -> None:
        """Engine `number` generates the conversation's next turn, from `clock` on."""
        heapq.heappush(self.engines[number].ready, (clock, next(self.order), conversation))

    def wake(self, clock: float) -> None:
        """Let idle engines see what was submitted, or that they may admit again."""
        for number, engine in enumerate(self.engines):
            if not engine.running and engine.ready:
                self._due(number, max(clock, engine.ready[0][0]))

    def step(self) -> tuple[float, list[Conversation]]:
        """The next event: its time, and the conversations that are over."""
        clock, number = heapq.heappop(self.events)
        engine = self.engines[number]
        if engine.due != clock:
            return clock, []
        over, engine.due = [], None
        for conversation in engine.ends.pop(engine.number, []):
            engine.running, self.running = engine.running - 1, self.running - 1
            conversation.turn += 1
            if conversation.turn == len(conversation.turns):
                over.append(conversation)
            else:  # events, and so calls, come in the order of their time
                self.calls.append(max(clock, self.next_call))
                self.next_call = self.calls[-1] + self.gap
                self.submit(conversation, self.calls[-1] + conversation.turns[conversation.turn - 1].wait, number)
        new = self._admit(engine, clock) if self.admits else []
        if engine.running or new:
            seconds = self.cost(engine.number, engine.running, sum(new))
            engine.running, self.running = engine.running + len(new), self.running + len(new)
            steps = 1 if new else self._uneventful(engine, clock, seconds)
            engine.number, self.busy = engine.number + steps, self.busy + steps * seconds
            self._due(number, clock + steps * seconds)
        elif self.admits and engine.ready:
            self._due(number, engine.ready[0][0])
        return clock, over

    def _due(self, number, clock):
        self.engines[number].due = clock
        heapq.heappush(self.events, (clock, number))

    def _uneventful(self, engine, clock, seconds):
        """Steps until a turn ends or begins; few, so that what is submitted meanwhile soon begins."""
        steps = min(AT_ONCE, min(engine.ends) - engine.number)
        if engine.ready and self.admits:
            steps = min(steps, math.ceil((engine.ready[0][0] - clock) / seconds))
        return max(1, steps)

    def _admit(self, engine, clock):
        """Turns that wait begin; the new tokens of each."""
        new = []
        while engine.ready and engine.ready[0][0] <= clock and engine.running + len(new) < MOST_TURNS:
            conversation = heapq.heappop(engine.ready)[2]
            turn = conversation.turns[conversation.turn]
            again = conversation.cached if conversation.version != self.version else 0
            conversation.version = self.version
            conversation.cached += turn.fresh + turn.said
            engine.ends[engine.number + turn.said].append(conversation)
            new.append(again + turn.fresh)
        return new


def gpu_cost(number: int, running: int, fresh: int) -> float:
    return DECODE + RUNNING * running + PROMPT * fresh


def log_normal(draw: random.Random, median: float, p99: float) -> float:
    return median * math.exp(draw.gauss(0, 1) * math.log(p99 / median) / 2.326)


def draw_group(group: int, slow: bool) -> list[Conversation]:
    """The conversations about one question; their tokens do not depend on how slow searches are."""
    conversations = []
    for sample in range(SAMPLES):
        draw = random.Random(f"{group}/{sample}")
        turns = []
        for turn in range(1 + draw.choices(list(CALLS), list(CALLS.values()))[0]):
            fresh = RESULTS[turn - 1] if turn else SHARED if sample else QUESTION
            said = min(SAID_MOST, math.ceil(log_normal(draw, SAID, SAID_P99)))
            turns.append(Turn(fresh, said, log_normal(draw, WAIT, WAIT_P99) * slow))
        total = QUESTION - turns[0].fresh + sum(turn.fresh + turn.said for turn in turns)
        conversations.append(Conversation(turns, group, total))
    return conversations


class Step(NamedTuple):
    seconds: float
    busy: float  # seconds of all GPUs
    groups: list[int]  # that were trained
    calls: list[float]  # when they began


class Training:
    """Steps of `groups` groups. share: of the GPUs that roll out, in the way `separate`."""

    def __init__(self, gpus: int, groups: int, way: str, limit=math.inf, slow=True, share=1.0, cost=gpu_cost):
        self.groups, self.way, self.slow = groups, way, slow
        self.engines = int(gpus * share)
        self.trainers = gpus - self.engines if way == "separate" else gpus
        self.machines = Machines(self.engines, cost, limit)
        self.clock = self.trained_until = self.training = 0.0
        self.began: list[int] = []  # the step of each group
        self.left: dict[int, int] = {}  # group -> conversations that are not over
        self.tokens, self.finished = Counter(), []

    def run(self, steps: int) -> list[Step]:
        return [self._one(step) for step in range(steps)]

    def _one(self, step):
        self.step = step
        before, calls, busy = self.clock, len(self.machines.calls), self.machines.busy
        spare = 0 if self.way == "together" else int(self.groups * SPARE)
        while len(self.left) + len(self.finished) < self.groups + spare:
            group = len(self.began)
            self.left[group] = SAMPLES
            self.began.append(self.step)
            for conversation in draw_group(group, self.slow):
                self.machines.submit(conversation, self.clock, group % self.engines)
        self.machines.wake(self.clock)
        self._until(self._enough)
        if self.way == "separate":
            self._until(lambda: self.machines.events[0][0] >= self.trained_until)
            self.clock = max(self.clock, self.trained_until)
        else:
            self.machines.admits = False
            self._until(lambda: not self.machines.running)
        batch = sorted(self.finished)[: self.groups]  # the oldest first
        self.finished = sorted(self.finished)[self.groups :]
        slower = ACROSS_NODES if self.trainers > 8 else 1
        seconds = SYNC + TRAIN * slower * sum(self.tokens[group] for group in batch) / self.trainers
        trained, self.training = self.training, seconds * self.trainers
        self.trained_until = self.clock + seconds
        if self.way != "separate":
            trained, self.clock = self.training, self.trained_until
            self.machines.admits, self.machines.version = True, self.machines.version + 1
        return Step(self.clock - before, self.machines.busy - busy + trained, batch, self.machines.calls[calls:])

    def _enough(self):
        oldest = self.began[next(iter(self.left))] if self.left and self.way == "carry" else self.step
        return len(self.finished) >= self.groups and self.step - oldest < OLDEST

    def _until(self, reached):
        while self.machines.events and not reached():
            clock, over = self.machines.step()
            self.clock = max(self.clock, clock)  # an event that does not count may be older
            for conversation in over:
                self.tokens[conversation.group] += conversation.total
                self.left[conversation.group] -= 1
                if not self.left[conversation.group]:
                    del self.left[conversation.group]
                    self.finished.append(conversation.group)


def rollout_seconds(lengths: list[list[int]], waits: list[list[float]], cost) -> float:
    """Of one engine whose cost counts new turns. lengths: tokens of each turn; waits: seconds of each call."""
    machines, clock = Machines(1, cost), 0.0
    for said, calls in zip(lengths, waits, strict=True):
        machines.submit(Conversation([Turn(1, *turn) for turn in zip(said, [*calls, 0.0], strict=True)]), 0.0, 0)
    machines.wake(0.0)
    while machines.events:
        clock, _ = machines.step()
    return clock


def figures(gpus: int, groups: int, way: str, limit=math.inf, slow=True) -> dict[str, float]:
    """Means over the counted steps; of `separate`, with the best share of the GPUs."""
    found = []
    for share in SPLITS if way == "separate" else (1.0,):
        steps = Training(gpus, groups, way, limit, slow, share).run(STEPS)[WARM:]
        seconds, calls = sum(step.seconds for step in steps), sum((step.calls for step in steps), [])
        most = max(Counter(map(int, calls)).values())
        idle = 1 - sum(step.busy for step in steps) / seconds / gpus
        found.append(dict(step=seconds / len(steps), idle=idle, calls=len(calls) / len(steps), most=most, share=share))
    return min(found, key=lambda figures: figures["step"])


def show(*cells) -> None:
    print("|", " | ".join(f"{cell:,.0f}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def tables() -> None:
    show("GPUs", "conversations", "way", "s a step", "instant tools", "GPUs idle", "calls a second", "most in a second")
    for gpus, groups in CASES:
        for way in WAYS:
            got, instant = figures(gpus, groups, way), figures(gpus, groups, way, slow=False)["step"]
            name = f"{way}, {got['share'] * gpus:.0f} roll out" if way == "separate" else way
            cells = f"{got['idle']:.0%}", got["calls"] / got["step"], float(got["most"])
            show(gpus, float(groups * SAMPLES), name, got["step"], instant, *cells)
    show("GPUs", "conversations", "calls a step", "limit", "together", "carry", "binds", "$ of GPUs", "$ of searches")
    for gpus, groups in CASES:
        free, instant = (figures(gpus, groups, "together", slow=slow)["step"] for slow in (True, False))
        for limit in LIMITS:
            together, carry = (figures(gpus, groups, way, limit) for way in WAYS[:2])
            parts = {"computing": instant, "slow searches": free - instant, "limit": together["step"] - free}
            cells = [f"{limit:.3g}/s", together["step"], carry["step"], max(parts, key=parts.get)]
            cells += [f"{carry['step'] / 3600 * gpus * GPU_HOUR:.2f}", f"{carry['calls'] * CALL:.2f}"]
            show(gpus, float(groups * SAMPLES), carry["calls"], *cells)


def check(engine: str) -> None:
    """What a step costs is fitted to a run with instant tools; it has to give the seconds of others."""
    import slow_tools

    show("conversations", "tools", "measured s", "simulated s", "simulated / measured")
    with tempfile.TemporaryDirectory() as folder:
        work = slow_tools.Work(Path(folder), engine, 64)
        slow_tools.measure("free", work, slow_tools.draw_waits(8, 0, slow=False))  # warm
        for count in (8, 16, 64):
            fitted = slow_tools.measure("free", work, slow_tools.draw_waits(count, 0, slow=False))
            cost, _ = slow_tools.fit_steps([fitted])
            for seed in range(4):
                waits = slow_tools.draw_waits(count, seed, slow=seed > 0)
                measured = slow_tools.measure("free", work, waits).seconds
                simulated = rollout_seconds(fitted.lengths, waits, cost)
                ratio = f"{simulated / measured:.2f}"
                show(count, "slow" if seed else "0 s", f"{measured:.2f}", f"{simulated:.2f}", ratio)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", choices=("torch", "asleep"), help="compare with rollouts that are measured here")
    args = parser.parse_args()
    check(args.check) if args.check else tables()
