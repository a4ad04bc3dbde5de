"""The simulation of training steps (benchmarks/simulate.py): what it must not lose, and cases that are known."""

import sys
from bisect import bisect_left

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import simulate
from simulate import DECODE, PROMPT, RUNNING, WAYS, Conversation, Machines, Training, Turn, draw_group, gpu_cost


@pytest.mark.parametrize("way", WAYS)
def test_each_group_is_trained_once(way, monkeypatch):
    monkeypatch.setattr(simulate, "WAIT_P99", 300.0)  # some searches outlast several steps
    training = Training(4, 6, way, limit=20, share=0.5 if way == "separate" else 1.0)
    steps = training.run(8)
    trained = sum((step.groups for step in steps), [])
    assert all(len(step.groups) == 6 for step in steps) and len(set(trained)) == len(trained)
    waiting = {*training.left, *training.finished}
    assert set(trained) | waiting == set(range(len(training.began))) and not waiting & set(trained)
    # a conversation that is over, or of a trained group, is nowhere; the others are in one engine each
    inside = []
    for engine in training.machines.engines:
        inside += [conversation.group for *_, conversation in engine.ready]
        inside += [conversation.group for ending in engine.ends.values() for conversation in ending]
    assert {group: inside.count(group) for group in inside} == training.left
    ages = [number - training.began[group] for number, step in enumerate(steps) for group in step.groups]
    assert max(ages) <= {"together": 0, "carry": simulate.OLDEST}.get(way, 8) and (way == "together") == (not any(ages))


@pytest.mark.parametrize("way", WAYS[:2])
def test_with_instant_tools_a_single_gpu_never_waits(way):
    training = Training(1, 3, way, slow=False)
    for step in training.run(4):
        assert step.seconds == pytest.approx(step.busy)
    conversations = [draw_group(group, slow=False) for group in range(len(training.began))]
    assert sum(conversation.total for group in conversations for conversation in group) >= sum(training.tokens.values())


def test_slow_tools_cost_steps_together_more_than_carried_ones():
    seconds = {}
    for way in WAYS[:2]:
        for slow in (False, True):
            steps = Training(8, 16, way, slow=slow).run(7)[2:]
            seconds[way, slow] = sum(step.seconds for step in steps)
    assert seconds["together", True] > 1.15 * seconds["together", False]
    assert seconds["carry", True] < 1.15 * seconds["carry", False]


@pytest.mark.parametrize("way", WAYS)
def test_no_provider_limit_is_passed(way):
    training = Training(4, 6, way, limit=5, share=0.5 if way == "separate" else 1.0)
    calls = sum((step.calls for step in training.run(4)), [])
    assert calls == sorted(calls)
    for n, call in enumerate(calls):
        assert bisect_left(calls, call + 1 - 1e-9) - n <= 5  # begun in the second after any call


def run(machines, conversations, clock=0.0):
    for number, conversation in enumerate(conversations):
        machines.submit(conversation, clock, number % len(machines.engines))
    machines.wake(clock)
    over = []
    while machines.events:
        clock, done = machines.step()
        over += done
    assert sorted(map(id, over)) == sorted(map(id, conversations))
    return clock


def test_one_conversation_takes_its_passes_and_waits():
    seconds = run(Machines(1, gpu_cost), [Conversation([Turn(1000, 50, 3.0), Turn(200, 10, 9.9)])])
    assert seconds == pytest.approx(60 * DECODE + 1200 * PROMPT + 58 * RUNNING + 3.0)  # a new turn does not run yet


def test_new_weights_run_what_was_said_again():
    conversation = Conversation([Turn(1000, 50, 0.0), Turn(200, 10, 0.0)])
    conversation.turn, conversation.cached = 1, 1050
    machines = Machines(1, gpu_cost)
    machines.version = 1
    assert run(machines, [conversation]) == pytest.approx(10 * DECODE + 1250 * PROMPT + 9 * RUNNING)


def test_a_limited_provider_takes_the_calls_one_by_one():
    """All ask at once: the last call begins after (n - 1) / limit, and nothing else takes time."""
    conversations = [Conversation([Turn(0, 1, 2.0), Turn(0, 1, 0.0)]) for _ in range(30)]
    assert run(Machines(3, lambda *_: 1e-9, limit=10), conversations) == pytest.approx(29 / 10 + 2.0)


def test_turns_share_an_engine_and_not_another():
    """Two turns in one engine cost one pass a token; in two engines they do not see each other."""
    two = [Conversation([Turn(0, 20, 0.0)]) for _ in range(2)]
    assert run(Machines(1, gpu_cost), two) == pytest.approx(20 * DECODE + 19 * 2 * RUNNING)
    two = [Conversation([Turn(0, 20, 0.0)]) for _ in range(2)]
    assert run(Machines(2, gpu_cost), two) == pytest.approx(20 * DECODE + 19 * RUNNING)


def test_it_is_the_simulation_of_the_measured_benchmark():
    """benchmarks/slow_tools.py has one of its own for a single engine, written apart: the same seconds."""
    import slow_tools

    waits = slow_tools.draw_waits(24, 3, slow=True)
    lengths = [[1 + (7 * n + 5 * turn) % 40 for turn in range(3)] for n in range(24)]

    def cost(number, running, new):
        return 0.02 * (number == 0) + 0.005 * (running > 0) + 3e-4 * running + 0.008 * (new > 0) + 0.002 * new

    seconds = simulate.rollout_seconds(lengths, waits, cost)
    assert seconds == pytest.approx(slow_tools.simulate("free", lengths, waits, cost))
