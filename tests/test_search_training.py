"""Training on live search that fails: typed in the metrics, aborted conversations outside the baseline, a stop when
most searches fail; accounts in the evaluation's table."""

import dataclasses
import json
import random
import signal
import sys

import pytest
import torch
from conftest import SHORT_WORLD, question, replace
from local_web import SERPAPI, LocalWeb, hurry, settings
from safetensors.torch import load_file

import config
import eval as evaluation
import policy
import reward
import rollout
import tools
import toy
import train
from analysis import figures
from analysis.imitation import ImitationOptions
from analysis.judge import JudgeOptions
from chat import Chat, Episode
from data import Call, Hit, Result, Usage
from rollout import run
from toy.lessons import ScriptedEngine

FAULTS = {"hang": "timeout", "429": "rate_limit", "500": "server", "truncated": "bad_response", "cut": "connection"}


def one_in_five(path, number):
    draw = random.Random(f"{path} {number}")
    return draw.choice(list(FAULTS)) if "/search.json" in path and draw.random() < 0.2 else None


class Talker(ScriptedEngine):
    """Searches by picture, then by words, then answers, rightly half of the time; one turn in ten is aborted."""

    def __init__(self, chat, questions):
        super().__init__(chat, self.say)
        self.answers = {chat.picture(q.images[0]).key: q.answers[0] for q in questions}

    def say(self, prompt, images, sampling):
        turn, draw = prompt.count("<|im_start|>assistant"), random.Random(sampling.seed)
        if turn == 1:
            return "<reason>x</reason><search><img></search>"
        if turn == 2:
            return f"<reason>x</reason><text_search>q{sampling.seed % 1000}</text_search>"
        right = draw.random() < 0.5
        return f"<reason>x</reason><answer>{self.answers[images[0].key] if right else 'nobody'}</answer>"

    def step(self):
        replies = super().step()
        lost = [sum(r.ids) % 10 == 0 for r in replies]
        return [replace(r, finish_reason="abort") if gone else r for r, gone in zip(replies, lost, strict=True)]

    def load_weights(self, named_tensors, version):
        for _ in named_tensors:  # on every rank
            pass


def options_of(values):
    """A dictionary of options as a command line."""
    given = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return [word for name, words in given.items() for word in (f"--{name}", *map(str, words))]


def live_run(world, server, tmp_path, monkeypatch, *more):
    monkeypatch.setenv("SERPAPI_API_KEY", SERPAPI)
    monkeypatch.delenv("JINA_API_KEY", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its Ctrl-C
    hurry(monkeypatch, retries=0, read_timeout=2.0)  # a busy machine is slow, too
    arguments = [
        *SHORT_WORLD, f"--toy_dir={world[2].toy_dir}", "--threads=1", f"--run_dir={tmp_path / 'run'}", "--steps=2",
        "--prompts_per_step=6", "--samples_per_prompt=4", "--val_limit=2", "--max_tokens=900",
        "--tool_results", "image_search=1", "text_search=1", *options_of(settings(server)), *more,
    ]  # fmt: skip
    whole = train.Run(*config.parse(arguments, config.Config, toy.Recipe, JudgeOptions, ImitationOptions))
    whole.engine = whole.rollout.engine = Talker(whole.chat, [*whole.train, *whole.val])
    whole.first_look = lambda episodes: None  # a script's log-probs are made up
    return whole


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_toy_preset_trains_while_one_search_in_five_fails(world, tmp_path, monkeypatch, capsys):
    with LocalWeb(one_in_five) as server:
        live_run(world, server, tmp_path, monkeypatch).loop()
    assert "live search: at most" in capsys.readouterr().err
    steps = [line for line in read(tmp_path / "run/metrics.jsonl") if line["phase"] == "train"]
    assert len(steps) == 2
    for number, metrics in enumerate(steps):
        rollouts = read(tmp_path / f"run/rollouts/step-{number:06d}.jsonl")
        calls = [call for r in rollouts for call in r["calls"]]
        kinds = {k.removeprefix("errors/"): v for k, v in metrics.items() if k.startswith("errors/")}
        assert kinds == {kind: sum(c["error_kind"] == kind for c in calls) for kind in kinds}
        assert sum(kinds.values()) == metrics["tool_failures"] == sum(c["status"] == "error" for c in calls)
        assert {kind for kind, n in kinds.items() if n} <= set(FAULTS.values())
        for name in ("searches", "pages", "bytes", "cost"):
            assert metrics[f"search/{name}"] == pytest.approx(sum(c["usage"][name] for c in calls)) and calls
        assert metrics["search/calls"] == len(calls) and metrics["search/searches"] == len(calls) - sum(kinds.values())
        aborted = [r for r in rollouts if r["stop"] == "aborted"]
        assert len(aborted) == metrics["stop/aborted"]
        assert all(r["reward"] is None and r["advantage"] is None for r in aborted)
        for id in {r["question_id"] for r in rollouts}:  # the others are compared with each other alone
            group = [r for r in rollouts if r["question_id"] == id and r["stop"] != "aborted"]
            rewards = torch.tensor([r["reward"] for r in group], dtype=torch.float64)
            if len(group) > 1 and rewards.max() > rewards.min():
                expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
                assert [r["advantage"] for r in group] == pytest.approx(expected.tolist(), abs=1e-4)
    assert sum(m["stop/aborted"] for m in steps) > 0
    assert sum(m["tool_failures"] for m in steps) / sum(m["search/calls"] for m in steps) == pytest.approx(
        0.2, abs=0.12
    )
    before, after = load_file(world[0].model / "model.safetensors"), load_file(tmp_path / "run/final/model.safetensors")
    assert max(float((before[n] - w).abs().max()) for n, w in after.items()) > 1e-5  # it has learned from the others


def test_a_run_stops_when_most_searches_fail_and_can_be_resumed(world, tmp_path, monkeypatch):
    """The search engine goes down in the second step: one line, a checkpoint of the first."""

    def down(path, number):
        return "500" if "/search.json" in path and server.down else None

    real = train.Run
    with LocalWeb(down) as server:
        server.down = False
        whole = live_run(world, server, tmp_path, monkeypatch, "--save_every=0", "--search_budget=10000")
        step = whole.step

        def then_down(number):
            server.down = number == 1
            return step(number)

        whole.step = then_down
        monkeypatch.setattr(sys, "argv", ["train.py"])
        monkeypatch.setattr(train, "Run", lambda *_: whole)
        with pytest.raises(SystemExit) as exit:
            train.main()
        whole.dir.lock.close()
        monkeypatch.setattr(train, "Run", real)
        again = live_run(world, server, tmp_path, monkeypatch, "--resume=auto", "--search_budget=10000")
        assert again.web.spent == whole.web.spent > 20  # those of the step that failed, too
    message = str(exit.value)
    assert message.startswith("error: step 1: ") and "server" in message and "--resume auto" in message
    assert "\n" not in message and [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    assert [line["step"] for line in read(tmp_path / "run/metrics.jsonl") if line["phase"] == "train"] == [0]


def failed(kind, count, ok):
    bad = [(Call("text_search", "x"), Result("error", error="why", error_kind=kind))] * count
    return [*bad, *[(Call("text_search", "x"), Result("no_results"))] * ok]


@pytest.mark.parametrize(
    "calls, share, stops",
    [
        (failed("timeout", 6, 5), 0.5, True),
        (failed("timeout", 5, 5), 0.5, False),  # half is not most
        (failed("timeout", 4, 0), 0.5, False),  # too few to tell
        (failed("bad_call", 20, 0), 0.5, False),  # the model's own
        (failed("budget", 20, 1), 0.5, True),
        (failed("timeout", 20, 0), 1.0, False),
        (failed("timeout", 6, 20), 0.2, True),
        ([], 0.5, False),
    ],
)
def test_when_a_step_s_searches_stop_the_run(chat, device, monkeypatch, calls, share, stops):
    assert rollout.MAX_FAILED_CALLS == 0.5
    monkeypatch.setattr(rollout, "MAX_FAILED_CALLS", share)
    episode = Episode(question(), chat, calls=calls)
    try:
        rollout.check_calls([episode], device)
        assert not stops
    except rollout.SearchDown as error:
        assert stops and calls[0][1].error_kind in str(error)


class Priced:
    """Answers with known accounts; every second call comes from what is kept."""

    calls = 0

    def search(self, call, question):
        self.calls += 1
        kept = self.calls % 2 == 0
        usage = Usage(cached=1) if kept else Usage(1, 2, 3000, 400, cost=0.03, seconds=1.5)
        return Result("ok", (Hit("bako"),), usage=usage)


def test_accounts_in_records_and_in_the_table(folder, cfg):
    chat = Chat(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    engine = Talker(chat, [question(n) for n in range(6)])
    engine.step = lambda: ScriptedEngine.step(engine)
    episodes = run([question(n) for n in range(6)], engine, Priced(), chat, chat.cfg, ordered=True)
    records = [reward.record(e, reward.score_episode(e, cfg)) for e in episodes]
    usage = [call["usage"] for r in records for call in r["calls"]]
    assert len(usage) == 12 and sum(u["cached"] for u in usage) == 6
    found = figures.summarize(records, cfg)["all"]
    assert found["cost"] == pytest.approx(6 * 0.03 / 6) and found["cached"] == 0.5 and found["errors"] == {}
    assert found["usage"]["pages"] == 12 and found["usage"]["tokens"] == 2400 and found["usage"]["seconds"] == 9
    heads, line = figures.table({"all": found}).splitlines()
    assert "cost" in heads and "cached" in heads and "0.030" in line and "0.500" in line


def test_eval_takes_all_four_ways(world, tmp_path, monkeypatch, capsys):
    """One question about a picture, live, recorded, replayed with the server gone; and the table of a replay."""
    place, _, recipe = world
    monkeypatch.setenv("SERPAPI_API_KEY", SERPAPI)
    monkeypatch.delenv("JINA_API_KEY", raising=False)
    hurry(monkeypatch)
    (tmp_path / "photo.png").write_bytes(question(1).images[0])
    here = [*SHORT_WORLD, f"--toy_dir={recipe.toy_dir}", "--threads=1", f"--model={place.model}", "--max_tokens=900"]
    asked = [*here, f"--image={tmp_path / 'photo.png'}", "--question=who founded it?"]
    monkeypatch.setattr(evaluation, "make_engine", lambda folder, chat, *_: Talker(chat, [question(1)]))
    monkeypatch.setattr(Talker, "step", ScriptedEngine.step)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        config.run_main(evaluation.main)
        return capsys.readouterr().out

    with LocalWeb() as server:
        values = settings(server, search_cache=tmp_path / "c.sqlite")
        del values["search"]
        online = options_of(values)
        shown = [main(*asked, *online, f"--search={way}") for way in ("live", "record")]
    shown.append(main(*asked, "--search=replay", f"--search_cache={tmp_path / 'c.sqlite'}"))
    assert "image search: ok" in shown[0] and "text search" in shown[0] and "pages.example" in shown[0]
    assert shown[0] == shown[1] == shown[2]
    assert "image search: ok" in main(*asked, "--search=offline")
    assert policy.is_deterministic(config.Config(search="replay", search_cache="c"), torch.device("cpu"))
    for changing in (dict(search="live"), dict(reward="judge")):
        assert not policy.is_deterministic(config.Config(**changing), torch.device("cpu"))


def test_tools_that_do_not_search_hide_no_dead_search(folder, cfg, device, monkeypatch):
    """Nine calculations that succeed beside nine searches that fail: the searches are down."""
    free = dataclasses.replace(tools.TOOLS["text_search"], answer=lambda call, question, search: Result("ok"))
    monkeypatch.setitem(tools.TOOLS, "calculator", free)
    episode = Episode.start(question(), Chat(folder, replace(cfg, tool_limits=("calculator=0",))))
    for _ in range(9):
        episode.calls.append((Call("calculator", "1+1"), Result("ok")))
        episode.calls.append((Call("text_search", "x"), Result("error", error_kind="timeout")))
    with pytest.raises(rollout.SearchDown, match="9 of 9 searches failed"):
        rollout.check_calls([episode], device)
