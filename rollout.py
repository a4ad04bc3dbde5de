"""Multi-turn conversations: one as a generator, many at once without a barrier, and the engines that do the sampling.

`converse` reads like the protocol. It yields what it needs, a turn of the model (`Generate`) or a search (`Call`), and
is sent what came of it. `run` drives all conversations at once: it steps the engine, hands finished turns to their
conversations, runs calls on a thread pool and feeds each result back when it arrives, so a slow search delays only its
own conversation.

An engine is anything with

    submit(request_id, prompt_ids, images, sampling)      step() -> list[Reply]      abort(request_ids) -> list[Reply]
    load_weights(named_tensors, version)                  sleep()                    wake()        close()

`TorchEngine` is plain PyTorch and needs nothing else, `VLLMEngine` is vLLM inside of the trainer's processes. Where
several ranks share one tensor-parallel vLLM, the first of them holds the conversations (`Leader`) and the others do
what it does (`follow`), so that all of them take the same steps.

Axes: B requests in a batch, N new tokens, L tokens in the cache, V vocabulary.
"""

import dataclasses
import hashlib
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial

import torch.distributed as dist
from tqdm import tqdm

from chat import FIRST_PROMPTS, Chat
from config import Config
from data import ERROR_KINDS, Call, Episode, Hit, Picture, Question, Result, Stop, Usage, key_of
from engines import Leader, Reply, Sampling, follow
from policy import all_sum
from reward import record, score_episode
from tools import has_answer, parse_call


@dataclass(frozen=True)
class Generate:
    """A conversation asks for the model's next turn: ids with one placeholder per image."""

    prompt_ids: list[int] = field(repr=False)
    images: list[Picture]
    sampling: Sampling


class Aborted(Exception):
    """Thrown into a conversation whose rollout has run out of time."""


def turn_seed(seed: int, step: int, question_id: str, sample: int, turn: int) -> int:
    """Random numbers belong to the turn of a conversation, whatever the schedule and the number of ranks."""
    text = f"{seed}/{step}/{question_id}/{sample}/{turn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


Conversation = Generator[Generate | Call, Reply | Result, Episode]


def converse(
    question: Question, chat: Chat, cfg: Config, *, sample=0, step=0, temperature=1.0, template: str | None = None
) -> Conversation:
    """One conversation. Yields Generate or Call, is sent Reply or Result, returns the Episode with its `stop` set.

    template: instead of the prompt file question.txt.
    """
    episode = Episode.start(question, chat, sample, template)
    left = {"image": cfg.max_image_searches, "text": cfg.max_text_searches}
    try:
        for turn in range(cfg.max_turns):
            text = yield from _speak(episode, cfg, step, temperature)
            call = parse_call(text)
            if episode.stop:
                break
            if call is None:
                episode.stop = Stop.ANSWERED if has_answer(text) else Stop.NO_ACTION
            elif turn + 1 == cfg.max_turns:
                episode.stop = Stop.MAX_TURNS
            elif left[call.kind] == 0:
                episode.stop = Stop.TOOL_LIMIT
            if episode.stop:
                break
            left[call.kind] -= 1
            result = yield call
            if not episode.add_result(call, result):
                episode.stop = Stop.MAX_TOKENS
                break
    except Aborted:
        episode.stop = Stop.ABORTED
    return episode


def _speak(episode, cfg, step, temperature):
    """The model's next turn: appends it and returns its text; sets the episode's stop if it was cut short."""
    room = min(cfg.max_tokens_per_turn, episode.room())
    seed = turn_seed(cfg.seed, step, episode.question_id, episode.sample, len(episode.turns))
    reply = yield Generate(episode.engine_prompt(), list(episode.images), Sampling(temperature, room, seed))
    episode.add_reply(reply)
    if reply.finish_reason == "abort":
        episode.stop = Stop.ABORTED
    elif reply.finish_reason == "length":
        episode.stop = Stop.MAX_TOKENS if room < cfg.max_tokens_per_turn else Stop.TRUNCATED_TURN
    return episode.responses[-1]


def converse_always_searching(
    question: Question, chat: Chat, cfg: Config, *, sample=0, step=0, temperature=1.0
) -> Conversation:
    """The baseline of MMSearch-R1's authors: whatever the question, an image search, a text search, then the answer.

    The model is asked for two turns, the query and the answer. The image search is put into its mouth, and if it gives
    no query, what it says instead is searched for.
    """
    episode = Episode.start(question, chat, sample, chat.template(FIRST_PROMPTS["pipeline"]))
    try:
        call = Call("image")
        fits = episode.add_words(chat.template("pipeline_image_search"))
        for kind in ("image", "text"):
            if fits:
                result = yield call
                fits = episode.add_result(call, result, chat.template(f"pipeline_after_{kind}_search"))
            if not fits:
                episode.stop = Stop.MAX_TOKENS
                return episode
            text = yield from _speak(episode, cfg, step, temperature)
            if episode.stop:
                return episode
            call = Call("text", query_in(text) or question.text)
        episode.stop = Stop.ANSWERED if has_answer(text) else Stop.NO_ACTION
    except Aborted:
        episode.stop = Stop.ABORTED
    return episode


def query_in(text: str) -> str:
    """The query of a turn that was to end in a text search; without one, what it says apart from reasoning and tags."""
    call = parse_call(text)
    if call and call.kind == "text":
        return call.query
    said = re.sub(r"<reason>.*?</reason>", " ", text, flags=re.DOTALL)
    return " ".join(re.sub(r"</?\w+>", " ", said).split())


def replay(r: dict, question: Question, chat: Chat, search) -> Episode:
    """The conversation of a record (`Episode.record`), put together anew to be imitated: what the model said is
    tokenised from its text, and is all that is `sampled`.

    Records hold no pictures: image searches are made again, and must find what they found then; text results are the
    recorded ones. Raises ValueError saying why a conversation cannot be had.
    """
    said = [turn["text"] for turn in r["turns"] if turn["role"] == "model"]
    if r["stop"] != Stop.ANSWERED.value or len(r["calls"]) + 1 != len(said):
        raise ValueError("ended without an answer")
    episode = Episode.start(question, chat, r["sample"])
    for number, text in enumerate(said):
        ids = [*chat.encode(text), chat.im_end]
        if len(ids) > episode.room():
            raise ValueError("longer than max_tokens")
        episode.add_reply(Reply("", ids, [0.0] * len(ids), "stop", 0))
        if number < len(r["calls"]) and not episode.add_result(*_recall(r["calls"][number], question, search)):
            raise ValueError("longer than max_tokens")
    episode.stop = Stop.ANSWERED
    return episode


def _recall(recorded, question, search):
    """(call, result) of a recorded search."""
    call = Call(recorded["kind"], recorded["query"])
    shown = [(hit["title"], hit["url"], hit["text"]) for hit in recorded["hits"]]
    if call.kind == "text" or recorded["status"] != "ok":
        return call, Result(recorded["status"], tuple(Hit(*hit) for hit in shown), recorded["error"])
    result = search.search(call, question)
    if [(hit.title, hit.url, hit.text) for hit in result.hits] != shown:
        raise ValueError("its image search finds something else in this search")
    return call, result


def run(
    questions: list[Question],
    engine,
    search,
    chat: Chat,
    cfg: Config,
    *,
    samples: int = 1,
    step: int = 0,
    temperature: float = 1.0,
    ordered: bool = False,
    progress: Callable[[Episode], None] | None = None,
    mode: str = "agent",
    seconds: Counter | None = None,
) -> list[Episode]:
    """Hold `samples` conversations about each question; episodes come back question by question, sample by sample.

    mode: agent (searches on demand), direct (one turn, no search is offered), pipeline (always both searches).

    search: anything with search(call, question) -> Result. ordered: calls run beside one engine step, which is then
    followed by all their results in request order, so that the engine sees the same batches each time (exact reruns);
    otherwise each result goes back as soon as it is there. progress(episode) is called at the end of each conversation.
    seconds["tools"], if given, grows by the time in which all that was done is wait for searches.
    Where ranks share an engine, the leading one gets the episodes and the others none.
    """
    if group := getattr(engine, "group", None):
        if dist.get_rank(group):
            follow(engine, group)
            return []
        engine = Leader(engine, group)
    hold = converse if mode == "agent" else converse_always_searching
    if mode == "direct":
        cfg, hold = replace(cfg, max_turns=1), partial(converse, template=chat.template(FIRST_PROMPTS[mode]))
    driver = _Driver(engine, search, ordered, cfg)
    conversations = [
        (question, hold(question, chat, cfg, sample=sample, step=step, temperature=temperature))
        for question in questions
        for sample in range(samples)
    ]
    pool = ThreadPoolExecutor(cfg.tool_threads)
    try:
        return driver.run(conversations, pool, progress)
    finally:
        if seconds is not None:
            seconds["tools"] += driver.waited
        pool.shutdown(wait=False, cancel_futures=True)  # a search that hangs must not hold up the others
        engine.abort(list(driver.generating))  # Ctrl-C or an error: leave the engine empty
        if group:
            engine.dismiss()


def share(items: list, cfg: Config) -> list:
    """This rank's part of what all ranks do together: every n-th item, for the n engines; none for a follower."""
    rank, size = dist.get_rank(), cfg.tensor_parallel
    return [] if rank % size else items[rank // size :: dist.get_world_size() // size]


class _Driver:
    """The loop of `run`: conversations wait for the engine (`generating`) or for a search (`calling`)."""

    def __init__(self, engine, search, ordered, cfg):
        self.engine, self.search, self.ordered, self.cfg = engine, search, ordered, cfg
        self.generating: dict[str, int] = {}
        self.calling: dict[Future, int] = {}
        self.due: list[Future] = []  # ordered: the calls that are to be answered next
        self.episodes: dict[int, Episode] = {}
        self.requests, self.waited = 0, 0.0

    def run(self, conversations, pool, progress):
        self.conversations, self.pool, self.progress = conversations, pool, progress
        deadline = time.monotonic() + self.cfg.rollout_deadline if self.cfg.rollout_deadline else None
        waiting = deque(range(len(conversations)))
        while waiting or self.generating or self.calling:
            if deadline and time.monotonic() > deadline:
                return self.stop(waiting)
            while waiting and len(self.generating) + len(self.calling) < self.cfg.concurrency:
                self.advance(waiting.popleft(), None)
            if self.generating:
                for reply in self.engine.step():
                    self.advance(self.generating.pop(reply.request_id), reply)
            self.collect(deadline)
        return self.in_order()

    def in_order(self):
        return [self.episodes[index] for index in range(len(self.conversations))]

    def advance(self, index, answer):
        """Send a conversation what it waited for, and start what it asks for next."""
        question, conversation = self.conversations[index]
        try:
            wish = conversation.throw(answer) if isinstance(answer, Aborted) else conversation.send(answer)
        except StopIteration as end:
            self.episodes[index] = end.value
            if self.progress:
                self.progress(end.value)
            return
        if isinstance(wish, Call):
            self.calling[self.pool.submit(self.search.search, wish, question)] = index
        else:
            name = f"{self.requests}"
            self.requests += 1
            self.generating[name] = index
            self.engine.submit(name, wish.prompt_ids, wish.images, wish.sampling)

    def collect(self, deadline):
        """Hand over the results that are there (ordered: that are due); wait for one only if the engine has nothing to
        do."""
        if not self.calling:
            return
        started = time.monotonic()
        patience = None if deadline is None else max(0.0, deadline - started)
        if self.ordered:
            due = self.due if self.generating else self.calling
            done, _ = wait(due, patience)
            self.due = [future for future in self.calling if future not in done]
        else:
            done, _ = wait(self.calling, 0 if self.generating else patience, FIRST_COMPLETED)
        self.waited += time.monotonic() - started
        for future in [f for f in self.calling if f in done]:  # in the order of their submission
            self.advance(self.calling.pop(future), future.result())

    def stop(self, waiting):
        """The deadline has passed: what is unfinished is aborted and keeps the tokens it has."""
        for reply in self.engine.abort(list(self.generating)):
            self.advance(self.generating.pop(reply.request_id), reply)
        for index in waiting:
            next(self.conversations[index][1])  # up to its first wish, which nobody will grant
        for index in [*self.calling.values(), *waiting]:
            self.advance(index, Aborted())
        return self.in_order()


def evaluate(
    questions: list[Question], engine, search, chat: Chat, cfg: Config, *, temperature: float, step: int = 0,
    progress: str = "", ordered: bool = True, guard=lambda hold: hold(), samples: int = 1, mode: str = "agent",
    done: dict | None = None, keep: Callable[[dict], None] = lambda r: None,
) -> list[dict]:  # fmt: skip
    """`samples` conversations about each question, the questions spread over the ranks; all records, on every rank, in
    order.

    guard: called with the rollout as a function, so that a caller can interrupt it before ranks have to meet again.
    mode: see `rollout.run`. done: (question id, sample) -> records that need not be made again, the same on all ranks
    (a question goes again unless all of its samples are there). keep: called with each record as it is finished.
    """
    cfg = dataclasses.replace(cfg, rollout_deadline=0.0)  # an evaluation is about all questions, the slow ones too
    done = done or {}
    mine = share([q for q in questions if not all((q.id, sample) in done for sample in range(samples))], cfg)

    def finished(episode):
        bar.update()
        if episode.stop != Stop.ABORTED:
            keep(record(episode, score_episode(episode, cfg)))

    quiet = not progress or dist.get_rank() > 0
    with tqdm(total=len(mine) * samples, desc=progress, disable=quiet, leave=False) as bar:
        hold = lambda: run(  # noqa: E731
            mine, engine, search, chat, cfg, samples=samples, step=step, temperature=temperature, ordered=ordered,
            progress=finished, mode=mode,
        )  # fmt: skip
        episodes = guard(hold)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [record(e, score_episode(e, cfg)) for e in episodes])
    records = done | {key_of(r): r for part in parts for r in part}
    return [records[q.id, sample] for q in questions for sample in range(samples)]


def rollout_metrics(episodes: list[Episode], scores, cfg: Config, device) -> dict[str, float]:
    """Global means over the step's conversations, aborted ones counted and left out of the means."""
    done = [(e, s) for e, s in zip(episodes, scores, strict=True) if e.stop != Stop.ABORTED]
    calls = [call for e, _ in done for call, _ in e.calls]
    sums = {
        "reward": sum(s.reward for _, s in done),
        "accuracy": sum(s.correct for _, s in done),
        "format": sum(s.format_ok for _, s in done),
        "search_ratio": len(calls) / max(1, min(cfg.max_image_searches + cfg.max_text_searches, cfg.max_turns - 1)),
        "image": sum(any(c.kind == "image" for c, _ in e.calls) for e, _ in done),
        "text": sum(any(c.kind == "text" for c, _ in e.calls) for e, _ in done),
        "turns": sum(len(e.turns) for e, _ in done),
        "tokens": sum(len(e.tokens) for e, _ in done),
        "tool_failures": sum(r.status == "error" for e in episodes for _, r in e.calls),
        **search_metrics([result for e in episodes for _, result in e.calls]),
        **{f"stop/{stop.value}": sum(e.stop == stop for e in episodes) for stop in Stop},
        "done": len(done),
    }
    sums = all_sum(sums, device)
    n = max(sums.pop("done"), 1.0)
    return {
        k: v if k.startswith(("stop/", "tool_", "errors/", "search/", "seconds/")) else v / n for k, v in sums.items()
    }


def search_metrics(results) -> dict[str, float]:
    """Sums: errors by kind, what was used, and seconds waited for the web."""
    used = {f.name: sum(getattr(r.usage, f.name) for r in results) for f in dataclasses.fields(Usage)}
    return {
        **{f"errors/{kind}": sum(r.error_kind == kind for r in results) for kind in ERROR_KINDS},
        "search/calls": len(results),
        "seconds/search": used.pop("seconds"),
        **{f"search/{name}": value for name, value in used.items()},
    }


class SearchDown(Exception):
    """Most searches of a step failed: its conversations say nothing about the policy."""


def check_searches(episodes: list[Episode], cfg: Config, device) -> None:
    """Raise SearchDown, on all ranks, if more than max_failed_searches of the step's searches failed, and more than a
    few. What the model asked wrongly is not counted."""
    kinds = Counter(r.error_kind for e in episodes for _, r in e.calls if r.error_kind != "bad_call")
    sums = all_sum({kind: kinds[kind] for kind in ("", *ERROR_KINDS)}, device)
    calls, failed = sum(sums.values()), sum(sums.values()) - sums.pop("")
    if failed >= FEW_FAILURES and failed > cfg.max_failed_searches * calls:
        said = ", ".join(f"{kind} {n:.0f}" for kind, n in sums.items() if n)
        raise SearchDown(f"{failed:.0f} of {calls:.0f} searches failed ({said}): more than max_failed_searches")


FEW_FAILURES = 5  # by themselves no reason to stop
