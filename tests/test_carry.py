"""Carry-over: what is unfinished goes on in the next step. Nothing is lost, trained twice, split or too old."""

import math
import random
import threading
import time
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import SHORT_RUN, SHORT_WORLD, guesser, on_two_ranks, question, replace
from test_rollout import ANSWER, IMAGE, TEXT, Search, numbered
from test_train import started

import config
import grpo
import policy
import train
from chat import Chat
from checkpoint import Stopper
from config import InputError
from data import Stop, read_jsonl
from rollout import Rollout, evaluate, share, turn_seed
from tools import limits
from toy.lessons import ScriptedEngine

CARRY = ["--importance_cap=2", "--prompts_per_step=3"]


class Versioned(ScriptedEngine):
    """A turn takes a few steps and has the version of the weights that it began with; new weights need it empty."""

    def __init__(self, chat, script):
        super().__init__(chat, script)
        self.version, self.drawn, self.left = 0, {}, {}

    def submit(self, request_id, *request):
        seed = request[-1].seed
        self.drawn.setdefault(seed, []).append(self.version)
        self.left[request_id] = random.Random(seed).randrange(1, 5)
        super().submit(request_id, *request)

    def step(self):
        time.sleep(0.001)
        self.left = {request[0]: self.left[request[0]] - 1 for request in self.queue}
        ready = [request for request in self.queue if not self.left[request[0]]]
        self.queue = [request for request in self.queue if self.left[request[0]]]
        return [replace(self._reply(*r), version=self.version) for r in ready]

    def load_weights(self, named_tensors, version):
        assert not self.queue
        self.version = version


def chatty(prompt, images, sampling):
    """Searches until its turns or calls are used up, names a picture that is not there (which no tool sees, so that the
    next turn follows at once), or answers."""
    die = random.Random(sampling.seed).random()
    return IMAGE if die < 0.2 else TEXT if die < 0.65 else "<search><img_9></search>" if die < 0.8 else ANSWER


def slow(call, about):
    time.sleep(random.choice([0, 0.002, 0.01, 0.05]))


def steps_of(rollout, questions, steps, size, between=lambda step: None, first=0, **how):
    """[(episodes, asked)] of `steps` steps, with the questions of step s at questions[s * size :]."""
    ahead, asked, found = rollout.cfg.steps_ahead, first, []
    for step in range(first, steps):
        now = range(asked, min(step + ahead + 1, steps))
        asked = now.stop
        pairs = [(s, q) for s in now for q in questions[s * size : (s + 1) * size]]
        how |= dict(step=step, quota=size, asked=[s for s, _ in pairs])
        found.append(rollout.run([q for _, q in pairs], **how))
        between(step)
        rollout.engine.load_weights([], step + 1)
    return found


@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_nothing_is_lost_or_split_or_too_old_over_many_steps(cfg, folder, device, most):
    """Whole groups, each once; each turn has the version with which it was drawn, none that is too old; budgets hold
    across steps; a tool is called once for each call of a conversation; a validation in between disturbs nothing."""
    steps, size, samples = 25, 3, 4
    cfg = replace(cfg, carry_over=most, importance_cap=2.0, concurrency=40, max_tokens=170)
    chat, search = Chat(folder, cfg), Search(slow)
    rollout = Rollout(Versioned(chat, chatty), search, chat, cfg)
    rollout.engine.abort, validated = lambda ids: not ids or pytest.fail("a turn was thrown away"), []

    def validate(step):
        if step % 5 == 2:
            held = Rollout(rollout.engine, Search(), chat, cfg)  # as train.py's: another rollout, the same engine
            validated.append(evaluate(held, numbered(3), temperature=0.0, step=1000 + step))

    questions = [question(i % 7) for i in range(steps * size)]  # a question is asked again while it is carried
    found = steps_of(rollout, questions, steps, size, validate, samples=samples)
    seen, ages, drawn = Counter(), Counter(), rollout.engine.drawn
    for step, episodes in enumerate(found):
        groups = dict.fromkeys(e.group for e in episodes)
        assert [(*e.group, e.sample) for e in episodes] == [(*g, sample) for g in groups for sample in range(samples)]
        assert len(groups) == size
        for e in episodes:
            assert e.stop != Stop.ABORTED and len(e.tokens) <= cfg.max_tokens and len(e.turns) <= cfg.max_turns
            called = Counter(call.tool for call, _ in e.calls)
            assert all(n <= limits(cfg).get(tool, n) for tool, n in called.items())
            versions, seeds = [t.version for t in e.turns], [turn_seed(0, *e.group, e.sample, n) for n in range(3)]
            assert [[v] for v in versions] == [drawn[seed] for seed in seeds[: len(versions)]]
            assert step - most <= versions[0]
            ages[step - versions[0]] += 1
            seen[*e.group, e.sample] += 1
    assert seen == Counter((i // size, q.id, sample) for i, q in enumerate(questions) for sample in range(samples))
    made = Counter((e.question.id, call) for episodes in found for e in episodes for call, _ in e.calls)
    assert Counter(search.calls) == Counter({key: n for key, n in made.items() if not key[1].picture})
    assert any(call.picture for _, call in made)
    assert ages[0] and sum(ages.values()) - ages[0] > 100 and not rollout.groups and not rollout.conversations
    assert [[r["question_id"] for r in records] for records in validated] == [["q0", "q1", "q2"]] * 5


def test_at_the_deadline_the_oldest_groups_are_aborted_and_the_others_stay(cfg, folder):
    cfg = replace(cfg, carry_over=2, importance_cap=2.0, concurrency=40, rollout_deadline=0.5)
    chat, released, hung = Chat(folder, cfg), threading.Event(), []

    def hang(call, about):
        if about.id in ("q0", "q3"):  # of the first step and of the one after it
            hung.append(about.id)
            released.wait(20)

    rollout = Rollout(
        Versioned(chat, lambda p, i, s: TEXT if "<information>" not in p else ANSWER), Search(hang), chat, cfg
    )
    questions = numbered(12)
    first = rollout.run(questions[:4], samples=2, quota=3, asked=[0, 0, 0, 1])
    assert [e.group for e in first] == [(0, f"q{i // 2}") for i in range(6)]
    assert [e.stop for e in first] == [Stop.ABORTED] * 2 + [Stop.ANSWERED] * 4
    released.set()
    (*second, last) = rollout.run(questions[4:5], samples=2, step=1, quota=2)
    assert [e.group for e in (*second, last)] == [(1, "q3")] * 2 + [(1, "q4")] * 2
    assert {e.stop for e in (*second, last)} == {Stop.ANSWERED} and Counter(hung) == {"q0": 2, "q3": 2}


@pytest.mark.parametrize("carry_over", [0, 2])
def test_calls_that_hang_hold_up_neither_later_ones_nor_the_end_of_the_process(cfg, folder, carry_over):
    """As many calls hang as there may be at once; at the deadline they are given up."""
    cfg = replace(cfg, carry_over=carry_over, importance_cap=2.0, concurrency=4, rollout_deadline=0.4)
    chat, released, threads = Chat(folder, cfg), threading.Event(), []

    def hang(call, about):
        threads.append(threading.current_thread())
        if about.id in ("q0", "q1"):
            released.wait(20)

    engine = Versioned(chat, lambda prompt, *_: TEXT if "<information>" not in prompt else ANSWER)
    rollout, questions = Rollout(engine, Search(hang), chat, cfg), numbered(4)
    quota = 2 if carry_over else None
    first = rollout.run(questions[:2], samples=2, quota=quota)
    assert [e.stop for e in first] == [Stop.ABORTED] * 4 and len(threads) == 4
    rollout.cfg = replace(cfg, rollout_deadline=10.0)
    second = rollout.run(questions[2:], samples=2, step=1, quota=quota)
    assert [e.stop for e in second] == [Stop.ANSWERED] * 4 and not released.is_set()
    assert all(thread.daemon for thread in threads)  # for others Python waits, in the end
    released.set()


# ---------------------------------------------------------------------------------------------------- whole training


def carrying(monkeypatch, path, world, *more):
    """A run of six steps with random slow searches and a scripted engine."""
    more = [f"--run_dir={path}", "--carry_over=2", "--steps=6", "--concurrency=99", *CARRY, *more]
    whole = started(monkeypatch, *SHORT_WORLD, f"--toy_dir={world[2].toy_dir}", *SHORT_RUN, *more)
    engine = Versioned(whole.chat, guesser(whole.chat, [*whole.train, *whole.val]).script)
    whole.engine = whole.rollout.engine = engine
    whole.rollout.search = Search(slow)
    whole.first_look = lambda episodes: None  # a script's log-probs are made up
    return whole


def check_run(whole, path, steps=6):
    """Each question of each step was trained on once, in a whole group; the records of each step."""
    cfg, found = whole.cfg, [[*read_jsonl(path / "rollouts" / f"step-{step:06d}.jsonl")] for step in range(steps)]
    seen = Counter((r["asked"], r["question_id"], r["sample"]) for records in found for r in records)
    expected = [(s, q.id) for s in range(steps) for q in train.questions_of_step(whole.train, s, cfg)]
    assert seen == Counter((*group, sample) for group in expected for sample in range(cfg.samples_per_prompt))
    for records in found:
        groups = defaultdict(list)
        for r in records:
            groups[r["asked"], r["question_id"]].append(r)
        assert len(groups) == cfg.prompts_per_step
        for group in groups.values():  # compared with each other alone
            rewards = torch.tensor([r["reward"] for r in group], dtype=torch.float64)
            values = grpo.group_advantages(rewards, [0] * len(rewards)).tolist()
            assert [r["advantage"] for r in group] == pytest.approx(values)
    return found


def test_a_run_that_is_interrupted_asks_again_what_was_carried(monkeypatch, tmp_path, world):
    """With validations in between, and Ctrl-C in the middle of a rollout."""
    path = tmp_path / "run"
    whole = carrying(monkeypatch, path, world, "--eval_every=1", "--save_every=0")
    drive = whole.rollout._drive

    def interrupting():
        if whole.state["step"] == 3:
            assert len(whole.rollout.groups) == 6  # carried, and just asked
            whole.stopper._handle(None, None)
        drive()

    whole.rollout._drive = interrupting
    with pytest.raises(Stopper.Stopped):
        whole.loop()
    whole.save()
    whole.dir.lock.close()
    (saved,) = (path / "checkpoints").glob("step-000003")
    elsewhere = carrying(monkeypatch, tmp_path / "other", world, f"--resume={saved}", "--prompts_per_step=4")
    assert elsewhere.state["carried"] == [] and elsewhere.first == 3
    again = carrying(monkeypatch, path, world, "--eval_every=1", "--resume=auto")
    carried = again.state["carried"]
    assert len(carried) == 3 and again.first == 3
    again.loop()
    check_run(again, path)
    assert again.state["carried"] == [] and not again.rollout.conversations
    steps = [entry for entry in read_jsonl(path / "metrics.jsonl") if entry["phase"] == "train"]
    assert all(0 <= m["stale/steps"] <= m["stale/steps_max"] <= 2 for m in steps) and steps[3]["stale/share"] == 0
    assert 0 < max(m["stale/share"] for m in steps) <= 1


def two_ranks(rank, store, folder, results):
    """Steps of three questions, two on the first rank; in the middle the run is resumed."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    cfg = config.Config(threads=1, carry_over=3, importance_cap=2.0, prompts_per_step=3, samples_per_prompt=2, steps=12)
    chat, about = Chat(folder, cfg), numbered(7)
    run = SimpleNamespace(cfg=cfg, train=about, questions={q.id: q for q in about}, state={"carried": []}, first=0)
    trained, engine = [], Versioned(chat, chatty)
    for step in range(cfg.steps):
        if step in (0, 5):
            run.first, rollout = step, Rollout(engine, Search(slow), chat, cfg)
        run.rollout, run.stopper = rollout, SimpleNamespace(rollout=lambda call: call())
        run.questions_ahead = partial(train.Run.questions_ahead, run)
        episodes = train.Run.roll_out(run, about[:3], step)
        numbers = dict(zip(dict.fromkeys(e.group for e in episodes), share(range(3), cfg), strict=True))
        samples = train.rate(episodes, numbers, step, cfg)
        here = train.rebalance(samples, 3, run.questions, chat, cfg)
        trained += [(step, s.number, *s.episode.group, s.episode.sample) for s in here]
        run.state["carried"] = sorted(policy.all_gather([(g.step, g.question.id) for g in rollout.groups]))
        engine.load_weights([], step + 1)
    results.put((rank, trained, run.state["carried"]))
    dist.destroy_process_group()


def test_on_two_ranks_each_has_its_own_quota(folder, tmp_path):
    first, second = on_two_ranks(two_ranks, folder, tmp_path)
    trained, cfg = first[1] + second[1], config.Config(seed=0, prompts_per_step=3)
    assert first[2] == second[2] == []
    about = [(s, q.id) for s in range(12) for q in train.questions_of_step(numbered(7), s, cfg)]
    assert Counter(row[2:] for row in trained) == Counter((*group, sample) for group in about for sample in range(2))
    for step in range(12):
        places = defaultdict(set)
        for _, number, *group, _ in (row for row in trained if row[0] == step):
            places[number].add(tuple(group))
        assert sorted(places) == [0, 1, 2] and all(len(groups) == 1 for groups in places.values())


# ------------------------------------------------------------------------------------------------------------ loss


def test_the_loss_of_tokens_that_older_weights_drew():
    """Against a plain loop over tokens: the gradient is min(w, cap) x advantage unless the clip around the policy that
    sampled takes it. Tokens of the step's own weights are treated as without carry-over."""
    cfg = config.Config(carry_over=2, importance_cap=2.0, entropy_coef=0.0, clip_low=0.2, clip_high=0.3)
    ratios = [1.0, 1.25, 1.4, 0.5, 0.9, 3.0, 0.7, 1.1, 9.0, 1e-4]
    advantages = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -2.0, -1.0, -1.0]
    old = [5, 5, 5, 5, 5, 5, 5, 5, 6, 6]  # the last two are of the step's own weights
    sampled = torch.linspace(-3, -0.5, len(ratios))
    logp = (sampled + torch.tensor(ratios).log()).requires_grad_()
    batch = SimpleNamespace(
        old_logp=None, ref_logp=None, sampler_logp=sampled, version=torch.tensor(old), extra_count=0.0,
        advantage=torch.tensor(advantages), sequence=torch.zeros(len(ratios), dtype=torch.long),
        episodes=[SimpleNamespace()], split=lambda values: [values],
    )  # fmt: skip
    loss, count, stats = train.batch_loss(cfg, 6, batch, logp, torch.zeros(len(ratios)))
    loss.backward()
    for r, a, version, grad in zip(ratios, advantages, old, logp.grad.tolist(), strict=True):
        clipped = version < 6 and ((a > 0 and r > 1.3) or (a < 0 and r < 0.8))
        assert grad == pytest.approx(0.0 if clipped else -a * min(r, 2.0), rel=1e-4)
    figures = {"stale/tokens": 8, "stale/truncated": 1, "stale/ratio": pytest.approx(sum(ratios[:8])), "clip_high": 1}
    assert count == 10 and {name: float(stats[name]) for name in figures} == figures
    assert len(batch.episodes[0].logp_gap) == 2 and float(stats["mismatch/truncated"]) == 1
    assert float(stats["mismatch/mean"]) == pytest.approx(math.log(9) - math.log(1e-4), rel=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        dict(deterministic=True), dict(refill_groups=1), dict(loss="sft"), dict(reward="judge"),
        dict(ratio="sequence"), dict(importance_cap=0.0),
    ],
)  # fmt: skip
def test_what_makes_no_sense_with_carry_over_is_refused(given):
    options = dict(carry_over=1, importance_cap=2.0)
    assert not policy.is_deterministic(config.Config(**options), torch.device("cpu"))
    with pytest.raises(InputError, match=f"carry_over.*{next(iter(given))}"):
        config.Config(**options | given)
