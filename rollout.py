"""Multi-turn conversations: one as a generator, and many at once without a barrier between turns.

`converse` reads like the protocol. It yields what it needs, a turn of the model (`Generate`) or a call of a tool
(`Call`), and is sent what came of it. `Rollout.run` drives all conversations at once: it steps the engine, hands
finished turns to their conversations, answers calls on threads and feeds each result back when it arrives, so a
slow search delays only its own conversation.

Training, validation, eval.py and its single questions all go through `Rollout.run`. Where several ranks share one
tensor-parallel vLLM, the first of them has the conversations and the others repeat its commands to the engine.
"""

import hashlib
import itertools
import math
import random
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import grpo
from chat import FIRST_PROMPTS, Chat, Episode, Picture
from config import Config
from data import ERROR_KINDS, Call, Question, Result, Stop, key_of
from engines import Reply, Sampling
from policy import all_gather, all_sum
from reward import Score, economy, extract_answer, ramped_penalty, record, score_episode
from tools import TOOLS, ask_search, limits, parse_calls, refused, run_tool, spawn


@dataclass(frozen=True)
class Generate:
    """A conversation asks for the model's next turn."""

    prompt: list[int] = field(repr=False)
    images: list[Picture]
    sampling: Sampling


def turn_seed(seed: int, step: int, question_id: str, sample: int, turn: int) -> int:
    """Random numbers belong to the turn of a conversation, whatever the schedule and the number of ranks."""
    text = f"{seed}/{step}/{question_id}/{sample}/{turn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


# ---------------------------------------------------------------------------------------------- one conversation
Conversation = Generator[Generate | Call, Reply | Result | None, Episode]


def converse(
    question: Question, chat: Chat, cfg: Config, *, sample=0, step=0, temperature=1.0, template: str | None = None
) -> Conversation:
    """One conversation. Yields Generate or Call, is sent Reply or Result, or None when its rollout has run out of time;
    returns the Episode with its `stop` set. template: instead of the prompt file question.txt."""
    episode = Episode.start(question, chat, sample, template, step)
    left = Counter(limits(cfg))
    while not episode.stop:
        text = yield from _speak(episode, cfg, temperature)
        if episode.stop:
            break
        calls = parse_calls(text, cfg.dialect)
        left.subtract(call.tool for call in calls)
        if not calls:
            episode.stop = Stop.NO_ACTION if extract_answer(text) is None else Stop.ANSWERED
        elif len(episode.turns) == cfg.max_turns:
            episode.stop = Stop.MAX_TURNS
        elif any(left[call.tool] < 0 for call in calls if call.tool in TOOLS):
            episode.stop = Stop.TOOL_LIMIT
        for number, call in enumerate(calls, 1):
            if not episode.stop:
                yield from _call_tool(episode, call, more=number < len(calls))
    return episode


def _speak(episode, cfg, temperature):
    """The model's next turn: appends it and returns its text; sets the episode's stop if it was cut short."""
    room = min(cfg.max_tokens_per_turn, episode.room())
    seed = turn_seed(cfg.seed, *episode.group, episode.sample, len(episode.turns))
    reply = yield Generate(list(episode.tokens), list(episode.images), Sampling(temperature, room, seed))
    if reply is None:
        episode.stop = Stop.ABORTED
        return ""
    episode.add_reply(reply)
    if reply.finish_reason == "abort":
        episode.stop = Stop.ABORTED
    elif reply.finish_reason == "length":
        episode.stop = Stop.MAX_TOKENS if room < cfg.max_tokens_per_turn else Stop.TRUNCATED_TURN
    return episode.responses[-1]


def _call_tool(episode, call, template=None, more=False):
    """Have a call answered and append the result; sets the episode's stop if there is no time or no room for it. more:
    another call of the same turn follows."""
    picture = episode.picture(call.picture)
    links = {hit.url for _, result in episode.calls for hit in result.hits}
    if call.picture and picture is None:
        result = refused(f"there is no picture {call.picture[:20]}")
    elif call.url and call.url not in links:  # the model does not make addresses up
        result = refused("no search has returned this link")
    else:
        found_by_url = picture and picture.data in episode.question.images[:1]
        result = yield replace(call, image=picture.data) if picture and not found_by_url else call
    if result is None:
        episode.stop = Stop.ABORTED
    elif not episode.add_result(call, result, template, more):
        episode.stop = Stop.MAX_TOKENS


def converse_always_searching(
    question: Question, chat: Chat, cfg: Config, *, sample=0, step=0, temperature=1.0
) -> Conversation:
    """The baseline of MMSearch-R1's authors: whatever the question, an image search, a text search, then the answer.

    The model generates two turns, the query and the answer. The turn that asks for the image search is a prompt file,
    and if the model gives no query, what it says instead is searched for.
    """
    episode = Episode.start(question, chat, sample, chat.template(FIRST_PROMPTS["pipeline"]), step)
    call = Call("image_search")
    if not episode.add_words(chat.template("pipeline_image_search")):
        episode.stop = Stop.MAX_TOKENS
    for tool in ("image_search", "text_search"):
        if not episode.stop:
            yield from _call_tool(episode, call, chat.template(f"pipeline_after_{tool}"))
        if not episode.stop:
            text = yield from _speak(episode, cfg, temperature)
        if episode.stop:
            return episode
        call = Call("text_search", query_in(text, cfg.dialect) or question.text)
    episode.stop = Stop.NO_ACTION if extract_answer(text) is None else Stop.ANSWERED
    return episode


def query_in(text: str, dialect: str) -> str:
    """The query of a turn that was to end in a text search; without one, what it says apart from reasoning and tags."""
    for call in parse_calls(text, dialect):
        if call.tool == "text_search" and call.query:
            return call.query
    said = re.sub(r"<reason>.*?</reason>", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"</?\w+>", " ", said).split())


# -------------------------------------------------------------------------------------------------- many at once
@dataclass(eq=False)
class Group:
    """The conversations about a question of a step."""

    question: Question
    step: int  # that the question belongs to
    episodes: list[Episode] = field(default_factory=list)  # of conversations that have ended


class Rollout:
    """Runs conversations with an engine and a search. Each waits for the engine (`generating`) or a tool (`calling`).

    search: anything with search(call, question) -> Result. ordered: calls are answered beside one engine step, which is
    then followed by all their results in request order, so that the engine sees the same batches each time (exact
    reruns); otherwise each result is fed back as soon as it arrives. judge: is asked about each conversation as it ends
    (`analysis.judge.JudgedReward`); `run` returns when it has answered.
    """

    def __init__(self, engine, search, chat: Chat, cfg: Config, ordered: bool = False, judge=None):
        self.engine, self.search, self.chat, self.cfg, self.ordered = engine, search, chat, cfg, ordered
        self.judge = judge
        self.ranks = getattr(engine, "group", None)  # that share it; the first has conversations, tools and clock
        self.waited = 0.0  # seconds of the last run in which nothing was done but wait for tools
        self._begin()

    def _begin(self):
        """What a run leaves to the next one, where it carries conversations over: nothing yet."""
        self.groups: list[Group] = []  # in the order in which they were asked
        self.conversations: dict[int, tuple[Group, Conversation]] = {}  # that have not ended
        self.waiting: deque[tuple[int, Generate | None]] = deque()  # to be admitted; None: they have not begun
        self.calling: dict[Future, int] = {}
        self.numbers = itertools.count()

    def run(
        self, questions: list[Question], *, samples=1, step=0, temperature=1.0, mode="agent", progress=None,
        refill=None, quota: int | None = None, asked: list[int] | None = None,
    ) -> list[Episode]:  # fmt: skip
        """`samples` conversations about each question; episodes come back question by question, sample by sample.

        mode: agent (tools on demand), direct (one turn, no tool is offered), pipeline (always both searches).
        progress(episode) is called at the end of each conversation; refill(episodes) when all about a question have
        ended, in time: the further question that it returns, or None, is asked in the same rollout, and its episodes
        come after the others. Ranks that follow another's engine get none.

        quota: carry conversations over. The run ends when so many groups are finished, and all that may not become
        older; the oldest are returned. Turns in the engine are finished first, so that each has one version of the
        weights. What else goes on stays for the next run, with its calls. asked: each question's step, if not this one.
        """
        if self.ranks and dist.get_rank(self.ranks):
            self._follow()
            return []
        if quota is None:
            self._begin()
        cfg, talk = self.cfg, converse
        if mode == "pipeline":
            talk = converse_always_searching
        if mode == "direct":
            cfg = replace(cfg, max_turns=1)
            talk = partial(converse, template=self.chat.template(FIRST_PROMPTS[mode]))
        self.talk = partial(talk, chat=self.chat, cfg=cfg, temperature=temperature)
        self.step, self.samples, self.refill, self.quota = step, samples, refill, quota
        for question, of_step in zip(questions, asked or [step] * len(questions), strict=True):
            self._queue(question, of_step)
        self.generating: dict[str, int] = {}
        self.due: list[Future] = []  # ordered: the calls that are to be answered next
        self.progress, self.names, self.waited, self.ending = progress, map(str, itertools.count()), 0.0, False
        try:
            self._drive()
        finally:
            self._command("abort", list(self.generating))  # Ctrl-C or an error: leave the engine empty
            if self.ranks:
                dist.broadcast_object_list([None], group_src=0, group=self.ranks)  # the others leave `_follow`
        if self.judge:
            self.judge.wait()
        done = [group for group in self.groups if len(group.episodes) == samples][:quota]
        self.groups = [group for group in self.groups if group not in done]
        return [episode for group in done for episode in sorted(group.episodes, key=lambda e: e.sample)]

    def _queue(self, question, of_step):
        self.groups.append(Group(question, of_step))
        for sample in range(self.samples):
            index = next(self.numbers)
            self.waiting.append((index, None))
            self.conversations[index] = self.groups[-1], self.talk(question, sample=sample, step=of_step)

    def _drive(self):
        deadline = time.monotonic() + (self.cfg.rollout_deadline or 1e9)
        while self.conversations and not self._enough():
            if time.monotonic() > deadline:
                self._abort()
                break
            while self.waiting and len(self.generating) + len(self.calling) < self.cfg.concurrency:
                index, held = self.waiting.popleft()
                self._start(index, held) if held else self._advance(index, None)
            if self.generating:
                self._step()
            if self.calling:
                self._collect(deadline)
        self.ending = True  # what conversations ask of the engine from now on is held until the next run
        while self.generating:
            self._step()

    def _enough(self):
        """Whether as many groups are finished as the run is to return, and all that were asked carry_over steps ago."""
        going_on = [group.step for group in self.groups if len(group.episodes) < self.samples]
        too_old = min(going_on, default=math.inf) - self.cfg.steps_ahead <= self.step - self.cfg.carry_over
        return self.quota is not None and len(self.groups) - len(going_on) >= self.quota and not too_old

    def _step(self):
        for reply in self._command("step"):
            self._advance(self.generating.pop(reply.request_id), reply)

    def _advance(self, index, answer, start=True):
        """Send a conversation what it waited for, and start what it asks for next, unless told not to."""
        group, conversation = self.conversations[index]
        try:
            request = conversation.send(answer)
        except StopIteration as end:
            del self.conversations[index]
            self._end(group, end.value)
            return
        if start:
            self._start(index, request)

    def _start(self, index, request):
        if isinstance(request, Call):
            question = self.conversations[index][0].question
            self.calling[spawn(run_tool, request, question, self.search)] = index
        elif self.ending:
            self.waiting.appendleft((index, request))  # before what has not begun
        else:
            name = next(self.names)
            self.generating[name] = index
            self._command("submit", name, request.prompt, request.images, request.sampling)

    def _end(self, group, episode):
        """Keep a finished conversation, and replace its question if the last about it shows no signal."""
        group.episodes.append(episode)
        if self.judge:
            self.judge.ask(episode)
        if self.progress:
            self.progress(episode)
        further = self.refill(group.episodes) if self.refill and len(group.episodes) == self.samples else None
        if further:
            self._queue(further, self.step)

    def _collect(self, deadline):
        """Hand over the results that have arrived (ordered: that are due); wait for one only if the engine is idle."""
        started, may_start = time.monotonic(), self.waiting and len(self.calling) < self.cfg.concurrency
        busy = self.generating or may_start
        patience = max(0.0, deadline - started)
        if self.ordered:
            done, _ = wait(self.due if busy else self.calling, patience)
            self.due = [future for future in self.calling if future not in done]
        else:
            done, _ = wait(self.calling, 0 if busy else patience, FIRST_COMPLETED)
        self.waited += time.monotonic() - started
        for future in [f for f in self.calling if f in done]:  # in the order of their submission
            self._advance(self.calling.pop(future), future.result())

    def _abort(self):
        """The deadline has passed: what is unfinished of the groups to return is aborted, and keeps its tokens."""
        self.refill = None
        late = {i for i, (group, _) in self.conversations.items() if group in self.groups[: self.quota]}
        for reply in self._command("abort", [name for name, index in self.generating.items() if index in late]):
            self._advance(self.generating.pop(reply.request_id), reply)
        for index, held in self.waiting:
            if index in late and not held:
                self._advance(index, None, start=False)  # up to its first request, or to its end
        self.waiting = deque(pair for pair in self.waiting if pair[0] not in late)
        self.calling = {future: index for future, index in self.calling.items() if index not in late}
        for index in late & self.conversations.keys():
            self._advance(index, None)

    def _command(self, name, *arguments):
        """Call a method of the engine, on all ranks that share it, so that they take the same steps."""
        if self.ranks:
            dist.broadcast_object_list([(name, arguments)], group_src=0, group=self.ranks)
        return getattr(self.engine, name)(*arguments)

    def _follow(self):
        """Execute what the group's first rank commands, until its rollout is over."""
        while True:
            box = [None]
            dist.broadcast_object_list(box, group_src=0, group=self.ranks)
            if box[0] is None:
                return
            name, arguments = box[0]
            getattr(self.engine, name)(*arguments)


def run(questions: list[Question], engine, search, chat: Chat, cfg: Config, *, ordered=False, **how) -> list[Episode]:
    """One `Rollout.run`."""
    return Rollout(engine, search, chat, cfg, ordered).run(questions, **how)


def share(items: list | range, cfg: Config) -> list | range:
    """This rank's part of what all ranks do together: every n-th item, for the n engines; none for a follower."""
    rank, size = dist.get_rank(), cfg.tensor_parallel
    return [] if rank % size else items[rank // size :: dist.get_world_size() // size]


# ----------------------------------------------------------------------------------------------- rating: who did well
@dataclass
class Sample:
    """An episode of the step, and its role in the update."""

    episode: Episode
    number: int | None  # of its question in the step: the samples of one question are a group. None: it was replaced
    score: Score | None = None  # None on a rank that only trains on it
    advantage: float | None = None  # None: it is not compared with its group, and not trained on


def rate(episodes: list[Episode], numbers: dict[tuple, int], step: int, cfg: Config, judge=None) -> list[Sample]:
    """Scores and advantages of this rank's episodes; whole groups are on one rank. numbers: `Episode.group` -> its
    place in the step; those without one were replaced. judge: as in `Rollout`. All ranks must call it."""
    samples = [Sample(e, numbers.get(e.group), score) for e, score in scored(episodes, step, cfg, judge)]
    compared = [s for s in samples if s.number is not None and is_compared(s.episode, s.score, cfg)]
    values = advantages([s.score for s in compared], [s.number for s in compared], step, cfg)
    for sample, value in zip(compared, values.tolist(), strict=True):
        sample.advantage = value
        if cfg.fatal_failures and sample.episode.cut_at_failures(cfg.fatal_failures):
            sample.advantage = max(value, 0.0)  # the turns before are not blamed for the failures
    return samples


def scored(episodes: list[Episode], step: int, cfg: Config, judge=None) -> list[tuple[Episode, Score]]:
    """Each episode with its score under the step's search penalty."""
    score = judge.score if judge else score_episode
    penalty = ramped_penalty(cfg.search_penalty, step, cfg.penalty_ramp_steps)
    return [(episode, score(episode, cfg, penalty)) for episode in episodes]


def is_compared(episode: Episode, score: Score, cfg: Config) -> bool:
    """Aborted conversations and those without a judge's verdict say nothing about the policy, nor, if so configured,
    those in which a tool failed."""
    failed = any(result.status == "error" for _, result in episode.calls)
    left_out = failed and "failed_tools" in cfg.leave_out
    return episode.stop != Stop.ABORTED and score.reward is not None and not left_out


def advantages(scores: list[Score], groups: list[int], step: int, cfg: Config) -> Tensor:
    """float32 [N], of the kind that --advantage names (docs/training.md). They sum to 0 in each group."""
    kind, weight = cfg.advantage, cfg.format_weight
    penalty = ramped_penalty(cfg.search_penalty, step, cfg.penalty_ramp_steps)
    rows = [(s.reward, s.correct, s.format_ok, economy(s.searches, penalty, cfg.per_search_penalty)) for s in scores]
    rewards, right, well_formed, saved = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T
    if kind in ("decoupled", "mastered"):
        accuracy = (1 - weight) * right + weight * well_formed
        saving = grpo.mastered(right, groups) if kind == "mastered" else right > 0
        return grpo.decoupled_advantages(accuracy, saved, saving, groups, cfg.economy_weight)
    if kind == "gdpo":
        parts = ((1 - weight, right), (weight, well_formed), (cfg.economy_weight, saved))
        values = sum(part_weight * grpo.group_advantages(part, groups) for part_weight, part in parts)
    else:
        normalize = kind in ("grpo", "bn_grpo")
        values = grpo.group_advantages(rewards, groups, normalize=normalize, leave_one_out=kind == "rloo")
    if kind in ("gdpo", "bn_grpo"):
        batch = torch.tensor(all_gather(values.tolist()))
        values = values / (batch.square().mean().sqrt() + grpo.STD_EPSILON)
    return values


# ------------------------------------------------------------------------------------- questions without a signal
class Refill:
    """The questions of a step, and the `refill` of its rollout: a question whose conversations all earned the same is
    replaced, up to refill_groups times (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).

    Each further question belongs to a place and a round, so that neither schedule nor ranks decide what replaces what.
    With refill_groups, a question whose answers were all right, at equal rewards, is then asked half as often.
    """

    def __init__(self, own: list[Question], questions: list[Question], outcomes: dict, step: int, cfg: Config):
        """own: those of all `questions` whose turn it is. outcomes: question id -> [share of right answers, spread of
        rewards] when it was last asked; `count` adds this step's."""
        self.outcomes, self.step, self.cfg = outcomes, step, cfg
        draws, own_ids = random.Random(f"{cfg.seed} refill {step}"), {q.id for q in own}
        others = [q for q in draws.sample(questions, len(questions)) if q.id not in own_ids]
        easy = {id for id, outcome in outcomes.items() if outcome == [1.0, 0.0] and cfg.refill_groups}
        postponed = {q.id for q in questions if draws.random() < 0.5 and q.id in easy}
        order = sorted([*own, *others], key=lambda q: q.id in postponed)
        self.questions, self.further = order[: len(own)], order[len(own) :]
        self.numbers = {(step, q.id): number for number, q in enumerate(self.questions)}  # as `rate` takes them
        self.replaced = Counter()  # number -> how often

    def __call__(self, episodes: list[Episode]) -> Question | None:
        number = self.numbers[episodes[0].group]
        index = self.replaced[number] * len(self.questions) + number  # in `further`
        left = self.replaced[number] < self.cfg.refill_groups and index < len(self.further)
        if not left or not self.earned_the_same(episodes):
            return None
        self.replaced[number] += 1
        self.numbers[self.step, self.further[index].id] = self.numbers.pop(episodes[0].group)
        return self.further[index]

    def earned_the_same(self, episodes):
        """False where fewer than two can be compared: failures are no reason to ask more."""
        pairs = scored(episodes, self.step, self.cfg)
        rewards = [score.reward for episode, score in pairs if is_compared(episode, score, self.cfg)]
        return len(rewards) > 1 and min(rewards) == max(rewards)

    def count(self, records: list[dict]) -> None:
        """Keep how the step's questions went, by the records of all ranks; aborted conversations do not count."""
        groups = defaultdict(list)
        for r in records:
            if r["reward"] is not None:
                groups[r["question_id"]].append(r)
        for id, group in groups.items():
            rewards = [r["reward"] for r in group]
            right = sum(r["correct"] for r in group) / len(group)
            self.outcomes[id] = [right, max(rewards) - min(rewards)]

    def metrics(self) -> dict[str, float]:
        """Of the questions asked so far, and of this step's groups on all ranks."""
        right, asked = [share_right for share_right, _ in self.outcomes.values()], max(1, len(self.outcomes))
        figures = {"always_right": right.count(1.0) / asked, "never_right": right.count(0.0) / asked}
        if self.cfg.refill_groups:
            replaced = sum(all_gather([self.replaced.total()]))
            figures["replaced_groups"] = replaced / (replaced + len(self.numbers))
            figures["refill_rounds"] = max(all_gather([0, *self.replaced.values()]))
        return figures


# ---------------------------------------------------------------------------------------------------- evaluation
def evaluate(
    rollout: Rollout, questions: list[Question], *, samples=1, done=None, keep=None, guard=None, progress="", **how
) -> list[dict]:
    """Records of `samples` conversations about each question, the questions spread over the ranks; all of them, in
    order, on every rank. how: the other arguments of `Rollout.run`.

    done: (question id, sample) -> records that need not be made again, the same on all ranks (a question is asked again
    unless all of its samples are there). keep: called with each record as it is finished. guard: called with the
    rollout as a function, so that a caller can interrupt it before ranks have to meet again. progress: of the bar.
    """
    cfg = replace(rollout.cfg, rollout_deadline=0.0)  # an evaluation is about all questions, the slow ones too
    rollout = Rollout(rollout.engine, rollout.search, rollout.chat, cfg, rollout.ordered, rollout.judge)
    done = done or {}
    left = [q for q in questions if not all((q.id, sample) in done for sample in range(samples))]
    mine = share(left, cfg)

    def finished(episode):
        bar.update()
        if keep and episode.stop != Stop.ABORTED:
            keep(record(episode, score_episode(episode, cfg)))

    quiet = not progress or dist.get_rank() > 0
    with tqdm(total=len(mine) * samples, desc=progress, disable=quiet, leave=False) as bar:
        run_mine = partial(rollout.run, mine, samples=samples, progress=finished, **how)
        episodes = guard(run_mine) if guard else run_mine()
    score = rollout.judge.score if rollout.judge else score_episode
    records = [record(episode, score(episode, cfg)) for episode in episodes]
    found = done | {key_of(r): r for r in all_gather(records)}
    return [found[q.id, sample] for q in questions for sample in range(samples)]


# ----------------------------------------------------------------------------------------------------- failures
class SearchDown(Exception):
    """Most searches of a step failed, or a judge's verdicts: its conversations say nothing about the policy."""


MAX_FAILED_CALLS = 0.5  # share of a step's searches, and of its verdicts
FEW_FAILURES = 5  # fewer never stop a run


def check_calls(episodes: list[Episode], device) -> None:
    """Raise SearchDown, on all ranks, if more than MAX_FAILED_CALLS of the step's searches failed, and more than a few.
    What the model asked wrongly is not counted."""
    asking = [name for name, tool in TOOLS.items() if tool.answer is ask_search]
    searches = [r for e in episodes for call, r in e.calls if call.tool in asking]
    kinds = Counter(r.error_kind for r in searches if r.error_kind not in ("bad_call", "malformed"))
    sums = all_sum({kind: kinds[kind] for kind in ("", *ERROR_KINDS)}, device)
    stop_if_most_failed("searches", sum(sums.values()), {kind: n for kind, n in sums.items() if kind and n})


def stop_if_most_failed(what: str, total: float, failures: dict[str, float]) -> None:
    """See `check_calls`. failures: reason -> how many, over all ranks."""
    failed = sum(failures.values())
    if failed >= FEW_FAILURES and failed > MAX_FAILED_CALLS * total:
        said = ", ".join(f"{why} {n:.0f}" for why, n in failures.items())
        raise SearchDown(f"{failed:.0f} of {total:.0f} {what} failed ({said})")
