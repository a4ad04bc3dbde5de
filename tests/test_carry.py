"""Carry-over: what is unfinished goes on in the next step. Nothing is lost, trained twice, split or too old."""

import math
import random
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import guesser, on_two_ranks, question, replace
from test_rollout import ANSWER, IMAGE, TEXT, Search, numbered
from test_train import arguments, main_with, parsed, started  # noqa: F401

import config
import policy
import train
from chat import Chat
from config import InputError
from data import Result, Stop, read_jsonl
from rollout import Rollout, evaluate, turn_seed
from tools import limits
from toy.lessons import ScriptedEngine

CARRY = ["--importance_cap=2", "--max_mismatch=1000", "--prompts_per_step=3"]


class Versioned(ScriptedEngine):
    """A turn takes a few steps and has the version of the weights that it began with; new weights need it empty."""

    def __init__(self, chat, script):
        super().__init__(chat, script)
        self.version, self.drawn, self.left = 0, {}, {}

    def submit(self, request_id, *request):
        seed = request[-1].seed
        assert seed not in self.drawn  # no turn is drawn twice
        self.drawn[seed], self.left[request_id] = self.version, random.Random(seed).randrange(1, 5)
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
    """Searches until its turns or calls are used up, asks in vain, or answers."""
    die = random.Random(sampling.seed).random()
    return IMAGE if die < 0.2 else TEXT if die < 0.7 else "<visit>nowhere</visit>" if die < 0.8 else ANSWER


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
    cfg = replace(cfg, carry_over=most, importance_cap=2.0, concurrency=40, tool_threads=40, max_tokens=170)
    chat, search = Chat(folder, cfg), Search(slow)
    rollout = Rollout(Versioned(chat, chatty), search, chat, cfg)
    validated = []

    def validate(step):
        if step % 5 == 2:
            held = Rollout(rollout.engine, Search(), chat, cfg)  # as train.py's: another rollout, the same engine
            validated.append(evaluate(held, numbered(3), temperature=0.0, step=1000 + step))

    questions = [question(i % 7) for i in range(steps * size)]  # a question is asked again while it is carried
    found = steps_of(rollout, questions, steps, size, validate, samples=samples)
    seen, ages = Counter(), Counter()
    for step, episodes in enumerate(found):
        assert [(group, e.sample) for e in episodes for group in [e.group]] == [
            (group, sample) for group in dict.fromkeys(e.group for e in episodes) for sample in range(samples)
        ]
        assert len(episodes) == size * samples
        for e in episodes:
            assert e.stop != Stop.ABORTED and len(e.tokens) <= cfg.max_tokens and len(e.turns) <= cfg.max_turns
            called = Counter(call.tool for call, _ in e.calls)
            assert all(n <= limits(cfg).get(tool, n) for tool, n in called.items())
            versions = [turn.version for turn in e.turns]
            assert versions == [rollout.engine.drawn[turn_seed(0, *e.group, e.sample, n)] for n in range(len(versions))]
            assert step - most <= versions[0]
            ages[step - versions[0]] += 1
            seen[*e.group, e.sample] += 1
    assert seen == Counter((i // size, q.id, sample) for i, q in enumerate(questions) for sample in range(samples))
    made = Counter((e.question.id, call) for episodes in found for e in episodes for call, _ in e.calls)
    assert Counter(search.calls) == Counter({key: n for key, n in made.items() if not key[1].problem})
    assert ages[0] and sum(ages.values()) - ages[0] > 100 and not rollout.groups and not rollout.conversations
    assert [[r["question_id"] for r in records] for records in validated] == [["q0", "q1", "q2"]] * 5
    rollout.close()
