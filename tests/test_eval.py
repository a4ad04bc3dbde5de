"""Evaluation: figures against an independent recount, the command on toy questions and real photos, one question."""

import json
import math
import os
import re
import shutil
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHORT_WORLD, guesser, picture, question, replace
from safetensors.torch import load_file, save_file
from test_judge import Server, asked, says
from test_results import changed

import backbone
import checkpoint
import config
import eval as evaluation
import policy
import reward
import rollout
from analysis import figures, results
from analysis.__main__ import main as analysis_main
from chat import Chat
from config import InputError
from data import Hit, Result, Stop, load_questions, write_questions
from rollout import run
from toy.lessons import ScriptedEngine


class OneHit:
    """A search that finds one thing, and fails when asked for 'fail'."""

    def search(self, call, question):
        if call.query == "fail":
            return Result("error", error="Timeout: 10 s")
        image = picture(7, 40, 40) if call.tool == "image_search" else None
        return Result("ok", (Hit("bako", "http://x", "founder gami" * (call.tool == "text_search"), image),))


IMAGE, ANSWER = "<reason>?</reason><search><img></search>", "<reason>!</reason><answer> bako</answer>"
TEXT = "<reason>?</reason><text_search>{}</text_search>"
SCRIPTS = {  # the turns of each question, and how it ends
    "q0": [ANSWER],
    "q1": [IMAGE, ANSWER],
    "q2": [IMAGE, TEXT.format("bako founder"), ANSWER],
    "q3": [TEXT.format("fail"), "<reason>!</reason><answer> tilo</answer>"],
    "q4": ["I do not know"],
    "q5": [IMAGE, IMAGE],
}


@pytest.fixture
def records(folder, cfg):
    chat = Chat(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    questions = [question(i) for i in range(6)]
    key = {chat.picture(q.images[0]).key: q.id for q in questions}

    def script(prompt, images, sampling):
        return SCRIPTS[key[images[0].key]][prompt.count("<|im_start|>assistant") - 1]

    episodes = run(questions, ScriptedEngine(chat, script), OneHit(), chat, chat.cfg)
    return [reward.record(e, reward.score_episode(e, chat.cfg)) for e in episodes], chat.cfg


def test_figures_against_a_recount(records):
    records, cfg = records
    found = figures.summarize(records, cfg)["all"]
    assert found["n"] == 6 and found["accuracy"] == 3 / 6
    assert found["search_ratio"] == pytest.approx((0 + 1 + 2 + 1 + 0 + 1) / (6 * 2))
    shares = found["image_search"], found["text_search"], found["combined"]
    assert shares == pytest.approx((3 / 6, 2 / 6, 1 / 6))
    assert found["format"] == pytest.approx(4 / 6)
    assert found["turns"] == pytest.approx((1 + 2 + 3 + 2 + 1 + 2) / 6)
    assert found["tool_failures"] == 1
    assert found["stops"] == {"answered": 4, "no_action": 1, "tool_limit": 1}
    # toy preset: a tenth off for each search
    assert [r["reward"] for r in records] == pytest.approx([1.0, 0.91, 0.829, 0.1, 0.0, 0.0])


def test_aborted_conversations_are_counted_apart(records):
    records, cfg = records
    aborted = {**records[4], "stop": Stop.ABORTED.value, "reward": None}
    found = figures.summarize([*records[:4], aborted], cfg)["all"]
    assert found["n"] == 4 and found["accuracy"] == 3 / 4 and found["stops"]["aborted"] == 1
    assert figures.summarize([aborted], cfg)["all"]["n"] == 0


def test_by_data_source(records):
    records, cfg = records
    for i, r in enumerate(records):
        r["data_source"] = "ab"[i % 2]
    summary = figures.summarize(records, cfg)
    assert list(summary) == ["a", "b", "all"] and summary["a"]["n"] == summary["b"]["n"] == 3
    text = figures.table(summary)
    assert len(text.splitlines()) == 4 and "0.500" in text


def test_records_are_readable_and_hold_no_pictures(records):
    records, _ = records
    for r in records:
        line = json.dumps(r)
        assert len(line) < 4000 and "\\u0000" not in line
        assert [t["text"] for t in r["turns"] if t["role"] == "model"] == SCRIPTS[r["question_id"]]
    assert [c["tool"] for c in records[2]["calls"]] == ["image_search", "text_search"]
    assert records[3]["calls"][0]["status"] == "error" and "failed" in records[3]["turns"][2]["text"]


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (5, 10), (50, 100), (1, 1)])
def test_wilson(right, n):
    """The interval's ends are the shares p that solve |right/n - p| = 1.96 sqrt(p (1 - p) / n)."""
    for p in figures.wilson(right, n):
        assert abs(right / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        config.run_main(evaluation.main)


@pytest.fixture(scope="module")
def here(world):
    """The command line of an evaluation in the short world."""
    return [*SHORT_WORLD, f"--toy_dir={world[2].toy_dir}", "--threads=1"]


@pytest.fixture
def guessing(monkeypatch):
    """eval.py with an engine that is right now and then; the short world's model never is."""

    monkeypatch.setattr(evaluation, "make_engine", lambda folder, chat, cfg, _, questions: guesser(chat, questions))


def read(path):
    """(header, records) of a result file."""
    header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    return header["header"], records


def test_the_command_on_the_toy_world(here, tmp_path, capsys):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    main(*here, "--val_limit=12", f"--out={first}")
    printed = capsys.readouterr().out
    header, records = read(first)
    assert len(records) == 12 and "accuracy (95 %)" in printed and f"12 conversations in {first}" in printed
    for source, n in Counter(r["data_source"] for r in records).items():
        line = next(line for line in printed.splitlines() if line.startswith(source))
        assert line.removeprefix(source).split()[0] == str(n)
    assert header["config"]["mode"] == "agent" and header["config"]["samples"] == 1
    assert {"model_id", "question_ids", "prompts_id", "search_id", "code"} == header.keys() - {"config"}
    assert all(header.values()) and not header.keys() & header["config"].keys()
    main(*here, "--val_limit=12", f"--out={second}", "--concurrency=200")
    assert second.read_bytes() == first.read_bytes()  # greedy, the same twice


def test_an_interrupted_evaluation_resumes_where_it_stopped(here, tmp_path, capsys, monkeypatch):
    """A search breaks down, and with it the evaluation; the next one only holds the conversations that are missing."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    common = [*here, "--val_limit=10", "--samples=2", "--max_turns=2", "--concurrency=4"]
    main(*common, f"--out={whole}")
    held = []

    def counted(*args, **more):
        episode = yield from converse(*args, **more)
        if len(held) == broken_after:
            raise OSError("the machine is on fire")
        held.append((episode.question.id, episode.sample))
        return episode

    converse, broken_after = rollout.converse, 11
    monkeypatch.setattr(rollout, "converse", counted)
    with pytest.raises(OSError, match="on fire"):
        main(*common, f"--out={out}")
    assert not out.exists()
    part = [json.loads(line) for line in (tmp_path / "out.jsonl.part0").read_text().splitlines()]
    kept = {(r["question_id"], r["sample"]) for r in part[1:]}
    assert kept == set(held) and len(kept) == 11
    whole_questions = {q for q, _ in kept if {(q, 0), (q, 1)} <= kept}
    held.clear()
    broken_after = None
    capsys.readouterr()
    main(*common, f"--out={out}")
    assert "warning" not in capsys.readouterr().err
    assert {q for q, _ in held} == {r["question_id"] for r in read(whole)[1]} - whole_questions
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path / "out.jsonl.part0").exists()
    held.clear()
    main(*common, f"--out={out}")  # all is there: nothing is held again
    assert not held and out.read_bytes() == whole.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(*common, f"--out={out}", "--max_tokens_per_turn=5")
    assert "max_tokens_per_turn=32, and this is max_tokens_per_turn=5: give another --out" in capsys.readouterr().err
    main(*common, f"--out={out}", "--max_tokens_per_turn=5", "--overwrite")
    assert read(out)[0]["config"]["max_tokens_per_turn"] == 5


def test_an_interrupted_evaluation_under_another_version_of_the_code_is_a_warning(here, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    main(*here, "--val_limit=4", f"--out={whole}")
    header, records = read(whole)
    before = results.ResultFile(out, {**header, "code": "v1 0123456789"})
    before.add(records[0])
    before.close()
    capsys.readouterr()
    main(*here, "--val_limit=4", f"--out={out}")
    printed = capsys.readouterr()
    assert f"warning: {out}: resumed with code {header['code']}, begun with v1 0123456789" in printed.err
    assert "1 of them from before" in printed.out
    assert read(out) == ({**header, "code": " + ".join(sorted([header["code"], "v1 0123456789"]))}, records)


def test_results_of_other_weights_are_not_resumed(here, world, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(world[0].model, model)
    main(*here, f"--model={model}", "--val_limit=1")
    before = (model / "eval.jsonl").read_bytes()
    weights = load_file(model / "model.safetensors")
    save_file({n: w * 1.01 for n, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        main(*here, f"--model={model}", "--val_limit=1")
    assert "eval.jsonl: holds an evaluation with model_id=" in capsys.readouterr().err
    assert (model / "eval.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    """A model trained with larger pictures, fewer searches and prompts of its own."""
    place, cfg, _ = world
    prompts, folder = tmp_path_factory.mktemp("mine") / "prompts", tmp_path_factory.mktemp("export") / "final"
    shutil.copytree(ROOT / "prompts" / "toy", prompts)
    asked = prompts / "question.txt"
    asked.write_text(asked.read_text().replace("think", "find"))
    cfg = replace(cfg, max_pixels=112 * 112, tool_limits=("text_search=1",), prompts=str(prompts), lr=0.5)
    chat = Chat(place.model, cfg)
    model = policy.load_policy(place.model, chat, cfg, policy.init_distributed(cfg))
    checkpoint.export_hf(folder, model, chat)
    shutil.rmtree(prompts)  # the export has its own
    return folder, chat


def test_an_export_brings_the_options_it_was_trained_with(here, export, tmp_path):
    folder, trained = export
    kept = json.loads((folder / "trained_as.json").read_text())
    assert kept.keys() == config.marked("model", config.Config) and kept["max_pixels"] == 112 * 112
    ours, out = trained.prompts_id("agent"), tmp_path / "out.jsonl"
    main(*here, f"--model={folder}", "--val_limit=2", f"--out={out}")
    header, records = read(out)
    found = header["config"]
    assert (found["max_pixels"], found["tool_limits"], found["lr"]) == (
        112 * 112,
        ["image_search=1", "text_search=1", "crop=0", "visit=0"],
        config.Config.lr,
    )
    assert found["prompts"] == str(folder / "prompts") and header["prompts_id"] == ours
    assert all("find" in r["turns"][0]["text"] for r in records)
    options = ["--max_pixels=7056", "--prompts=prompts/toy"]
    main(*here, f"--model={folder}", "--val_limit=2", f"--out={tmp_path / 'b.jsonl'}", *options)
    header, records = read(tmp_path / "b.jsonl")
    found = header["config"]
    assert found["max_pixels"] == 7056
    assert found["tool_limits"] == ["image_search=1", "text_search=1", "crop=0", "visit=0"]
    assert found["prompts"] == "prompts/toy" and header["prompts_id"] != ours
    # a preset comes before what the model was trained with
    argv = [f"--model={folder}", "--preset=qwen2.5-vl-7b"]
    cfg = config.parse(argv, as_trained=True)
    assert (cfg.max_pixels, cfg.lr) == (112 * 112, 2e-6) and config.parse(argv).max_pixels == 672 * 672 * 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "trained_as.json: not what train.py wrote"),
        ("[1]", "trained_as.json: not what train.py wrote"),
        ('{"max_pixels": 7056}', "trained_as.json: not what train.py wrote"),  # no prompts
        ('{"max_pixels": 7056, "prompts": 3}', "trained_as.json: not what train.py wrote"),
        ('{"max_pixels": "large", "prompts": "prompts"}', "max_pixels='large': expected int"),
        ('{"max_pixels": 7056, "prompts": "nowhere"}', "nowhere"),
    ],
)
def test_a_damaged_trained_as_is_one_line(here, export, content, said, tmp_path, capfd):
    shutil.copytree(export[0], tmp_path / "final")
    (tmp_path / "final" / "trained_as.json").write_text(content)
    with pytest.raises(SystemExit) as exit:
        main(*here, f"--model={tmp_path / 'final'}", "--val_limit=2", f"--out={tmp_path / 'out.jsonl'}")
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit.value.code == 2 and len(errors) == 1 and said in errors[0]


def test_the_model_itself_in_all_modes(here, tmp_path):
    """The toy model holds its conversations in each mode; what it says is in the short world neither here nor there."""
    for mode in ("direct", "pipeline"):
        main(*here, "--val_limit=4", f"--mode={mode}", f"--out={tmp_path / mode}.jsonl")
        header, records = read(tmp_path / f"{mode}.jsonl")
        assert header["config"]["mode"] == mode and len(records) == 4
        assert all(bool(r["calls"]) == (mode == "pipeline") for r in records)


def test_the_three_modes_and_their_comparison(here, guessing, tmp_path, capsys):
    """Modes, tables and compare agree with a recount from the JSONL."""
    out = {mode: tmp_path / f"{mode}.jsonl" for mode in ("agent", "direct", "pipeline")}
    found = {}
    for mode, path in out.items():
        main(*here, "--val_limit=30", f"--mode={mode}", "--samples=3", f"--out={path}")
        printed = capsys.readouterr().out
        analysis_main(["judge", str(path), "--judges", "em", "sub_em"])
        capsys.readouterr()
        header, records = read(path)
        found[mode] = records
        assert header["config"]["mode"] == mode and len(records) == 90
        done = [r for r in records if r["stop"] != "aborted"]
        total = next(line for line in printed.splitlines() if line.startswith("all ")).split()
        calls = sum(len(r["calls"]) for r in done)
        right = sum(r["correct"] for r in done) / len(done)
        assert (int(total[1]), float(total[2])) == (len(done), pytest.approx(right, abs=6e-4))
        assert float(total[4]) == pytest.approx(calls / (2 * len(done)), abs=6e-4)
        assert all(r["judged"]["em"] == r["correct"] for r in records)
    for r in found["direct"]:
        assert not r["calls"] and sum(t["role"] == "model" for t in r["turns"]) == 1
    for r in found["pipeline"]:
        assert [c["tool"] for c in r["calls"]] == ["image_search", "text_search"]
        assert r["stop"] in ("answered", "no_action")
        assert "<search><img></search>" in r["turns"][0]["text"]
    analysis_main(["compare", str(out["direct"]), str(out["agent"])])
    printed = capsys.readouterr().out

    def share(mode):
        per = {}
        for r in found[mode]:
            per.setdefault(r["question_id"], []).append(r["correct"])
        return {q: sum(v) / len(v) for q, v in per.items()}

    a, b = share("direct"), share("agent")
    total = next(line for line in printed.splitlines() if line.startswith("all ")).split()
    means = [sum(x.values()) / len(x) for x in (a, b)]
    assert [float(x) for x in total[2:4]] == pytest.approx(means, abs=6e-4)
    assert float(total[4]) == pytest.approx(means[1] - means[0], abs=6e-4)
    assert total[-2:] == [str(sum(b[q] > a[q] for q in a)), str(sum(b[q] < a[q] for q in a))]
    free = [r for r in found["agent"] if a[r["question_id"]] >= 0.5]
    over = sum(bool(r["calls"]) for r in free) / len(free)
    assert f"over-search   {over:.3f} of {len(free)}" in printed and 0 < over < 1
    needed = [r for r in found["agent"] if a[r["question_id"]] < 0.5]
    under = sum(not r["calls"] for r in needed) / len(needed)
    assert f"under-search  {under:.3f} of {len(needed)}" in printed


def test_an_llm_judge_beside_the_match(here, guessing, tmp_path, capsys, monkeypatch):
    """The command with a judge that fails over the answers of four letters, the right ones, and denies all others."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")

    def answers(body, _):
        return (400, {}, b"") if len(asked(body)["response"]) == 4 else says("no")

    server, out = Server(answers), tmp_path / "out.jsonl"
    options = [f"--judge_url={server.url}", f"--judge_cache={tmp_path / 'c.sqlite'}"]
    command = ["judge", str(out), "--judges", "em", "llm", *options]
    main(*here, "--val_limit=20", f"--out={out}")
    capsys.readouterr()
    analysis_main(command)
    printed, records = capsys.readouterr().out, read(out)[1]
    failed = [r for r in records if len(r["answer"]) == 4]
    assert 0 < len(failed) < 20 and all(r["judged"] == {"em": True, "llm": None} for r in failed)
    assert all(r["judged"] == {"em": False, "llm": False} for r in records if r not in failed)
    line = next(line for line in printed.splitlines() if line.startswith("all ") and "llm" in line)
    assert line.split()[1:5] == ["llm", str(20 - len(failed)), str(len(failed)), "0.000"]
    assert f"em and llm agree on {20 - len(failed)} of {20 - len(failed)}" in printed
    assert f"not judged: HTTP 400 {len(failed)}" in printed and "sk-very-secret" not in out.read_text() + printed
    server.reply = lambda *_: says("yes")  # asked again, it says what it could not say before, and only that
    analysis_main(command)
    assert [r["judged"]["llm"] for r in read(out)[1]] == [r in failed for r in records]
    analysis_main(["compare", str(out), str(out), "--judge=llm"])
    assert f"20  {len(failed) / 20:.3f}" in capsys.readouterr().out
    server.shutdown()
    server.server_close()


def test_labelling(folder, cfg, tmp_path, capsys):
    """Scripted conversations: the labels, the pass rates and the balanced subset as parquet in veRL layout."""
    chat = Chat(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    write_questions(tmp_path / "q.parquet", [question(i) for i in range(6)], {})
    questions = load_questions([tmp_path / "q.parquet"])
    number = {chat.picture(q.images[0]).key: i for i, q in enumerate(questions)}

    def script(prompt, images, sampling):
        return SCRIPTS[f"q{number[images[0].key]}"][prompt.count("<|im_start|>assistant") - 1]

    episodes = run(questions, ScriptedEngine(chat, script), OneHit(), chat, chat.cfg, samples=2)
    records = [reward.record(e, reward.score_episode(e, chat.cfg)) for e in episodes]
    header = {"config": {"mode": "agent", "files": [str(tmp_path / "q.parquet")]}}
    results.ResultFile(tmp_path / "r.jsonl", header).finish(records)
    analysis_main(["label", str(tmp_path / "r.jsonl"), f"--out={tmp_path / 'l.parquet'}", "--balance=0.5"])
    assert "3 of 6 questions never answered right" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "l.parquet").to_pylist()
    both = "image_search+text_search"
    assert [(r["label"], r["pass_rate"]) for r in rows] == [("search_free", 1.0), ("image_search", 1.0), (both, 1.0)]
    back = load_questions([tmp_path / "l.parquet"])
    assert [vars(q) | {"id": 0} for q in back] == [vars(q) | {"id": 0} for q in questions[:3]]
    few = pq.read_table(tmp_path / "l.balanced.parquet").to_pylist()
    assert [r["label"] == "search_free" for r in few] == [True, False]


def test_the_label_command(here, world, guessing, tmp_path, capsys):
    """From an evaluation with eight conversations about each question to labels and their balanced subset."""
    rows = pq.read_table(world[0].train).slice(0, 30).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    file, out = tmp_path / "r.jsonl", tmp_path / "l.parquet"
    main(*here, "--files", tmp_path / "train.parquet", "--samples=8", f"--out={file}")
    header, records = read(file)
    assert header["config"]["eval_temperature"] == 1.0 and len(records) == 8 * 30
    capsys.readouterr()
    analysis_main(["label", str(file), f"--out={out}", "--balance=0.5"])
    printed, expected = capsys.readouterr().out, {}
    for i, row in enumerate(rows):
        right = [r for r in records if r["question_id"] == f"train.parquet:{i}" and r["correct"]]
        called = [{c["tool"] for c in r["calls"]} for r in right]
        both = "image_search+text_search"
        need = "search_free" if set() in called else "image_search" if {"image_search"} in called else both
        if right:
            expected[row["data_id"]] = (need, len(right) / 8)
    table = pq.read_table(out).to_pylist()
    assert {r["data_id"]: (r["label"], r["pass_rate"]) for r in table} == expected and len(expected) < 31
    few = [r["label"] for r in pq.read_table(tmp_path / "l.balanced.parquet").to_pylist()]
    rare = min(sum(need == "search_free" for need, _ in expected.values()), len(table) - few.count("search_free"))
    assert len({need for need, _ in expected.values()}) > 1 and f"{len(few)} questions in" in printed
    assert few.count("search_free") * 2 == len(few) and rare
    with pytest.raises(InputError, match="label needs --out NAME.parquet"):
        analysis_main(["label", str(file), "--out=x.jsonl"])


def test_the_command_on_real_photos(here, world, tmp_path, capsys):
    photos = ROOT.parent / "shared" / "data" / "mini_data.pq"
    if not photos.exists():
        pytest.skip("the five real photos are not at hand")
    main(*here, f"--model={world[0].model}", "--files", photos, f"--out={tmp_path / 'out.jsonl'}")
    assert "mmsearch_r1/infoseek_train_split  5" in capsys.readouterr().out


def test_one_question(here, world, tmp_path, capsys):
    (tmp_path / "photo.png").write_bytes(picture(3, 300, 200))
    here = [*here, f"--model={world[0].model}"]
    main(*here, f"--image={tmp_path / 'photo.png'}", "--question=what is it called?")
    printed = capsys.readouterr().out
    assert "turn 1" in printed and "answer" in printed and "stop:" in printed
    main(*here, f"--image={tmp_path / 'photo.png'}", "--question=what is it called?", "--mode=pipeline")
    printed = capsys.readouterr().out
    assert printed.index("image search: ok") < printed.index("turn 1")


def ask(chat, script, mode="agent"):
    """Hold and print a conversation about question 1, as eval.py does."""
    holder = rollout.Rollout(ScriptedEngine(chat, script), OneHit(), chat, chat.cfg)
    evaluation.ask(holder, question(1), evaluation.EvalOptions(mode=mode))


def test_the_searches_of_one_question_are_shown(folder, cfg, capsys):
    chat = Chat(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    turns = iter(SCRIPTS["q2"])
    ask(chat, lambda *_: next(turns))
    printed = capsys.readouterr().out
    assert "image search: ok" in printed and "text search for 'bako founder': ok" in printed
    assert "- bako <http://x>: founder gami" in printed and "answer    bako" in printed


def test_the_searches_of_the_pipeline_are_shown_where_they_were_made(folder, cfg, capsys):
    chat = Chat(folder, replace(cfg, max_tokens=900, max_tokens_per_turn=100))
    turns = iter(["<text_search>bako founder</text_search>", "<answer>gami</answer>"])
    ask(chat, lambda *_: next(turns), "pipeline")
    printed = capsys.readouterr().out
    order = ["image search: ok", "turn 1", "text search for 'bako founder': ok", "turn 2", "answer    gami"]
    places = [printed.index(part) for part in order]
    assert places == sorted(places)
    chat = Chat(folder, replace(cfg, max_tokens=60, max_prompt_tokens=59, max_tokens_per_turn=20))
    ask(chat, lambda *_: "-", "pipeline")
    assert "(stop: max_tokens)" in capsys.readouterr().out  # there was no room for the model's first turn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--files", "nowhere.parquet"], "nowhere.parquet: no such file"),
        (["--max_prompt_tokens=5"], "no evaluation question is left of"),
        (["--model", "no/such/model", "--files", "x"], "no/such/model"),
        (["--image", "nowhere.png", "--question", "what?"], "nowhere.png: cannot read it (No such file"),
        (["--image", "README.md", "--question", "what?"], "README.md: cannot read it (not a whole picture"),
    ],
)
def test_bad_input(here, world, arguments, said, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        main(*here, f"--model={world[0].model}", *arguments)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit.value.code == 2 and len(errors) == 1 and said in errors[0]


@pytest.mark.parametrize(
    ("file", "place", "value", "said"),
    [
        ("config.json", "text_config", None, "config.json"), ("config.json", "vision_config", ..., "config.json"),
        ("config.json", "text_config/num_attention_heads", 0, "num_attention_heads is 0"),
        ("config.json", "text_config/num_hidden_layers", 10**12, "`num_hidden_layers` (1000000000000)"),
        ("config.json", "vision_config/depth", 10**12, "depth is 1000000000000"),
        ("config.json", "text_config/dtype", 0.5, "dtype is 0.5"),
        ("config.json", "vision_config/spatial_merge_size", "two", "spatial_merge_size"),
        ("config.json", "text_config/rope_parameters/mrope_section", [4, None, 6], "mrope_section is"),
        ("config.json", "text_config/rope_parameters", ..., "mrope_section is"),
        ("config.json", "vision_config/rope_parameters/rope_theta", 0, "rope_theta is 0"),
        ("config.json", "text_config/vocab_size", 704, "shapes are not those of its config.json"),
        ("preprocessor_config.json", "patch_size", 0, "sizes are"),
        ("preprocessor_config.json", "merge_size", "two", "sizes are"),
        ("preprocessor_config.json", "temporal_patch_size", 10**12, "sizes are"),
        ("preprocessor_config.json", "size/longest_edge", "long", "cannot read a Qwen-VL image processor"),
        ("preprocessor_config.json", "image_mean", [0.5], "cannot read a Qwen-VL image processor"),
        ("preprocessor_config.json", "image_std/0", 0, "pixels that are no numbers"),
        ("preprocessor_config.json", "image_mean/1", None, "pixels that are no numbers"),
        ("tokenizer_config.json", "model_max_length", {}, "cannot read a Qwen-VL tokenizer"),
        ("tokenizer.json", "model/vocab", {}, "tokenizer"), ("tokenizer.json", "pre_tokenizer", 0, "tokenizer"),
    ],
)  # fmt: skip
def test_a_damaged_model_folder_is_one_line(folder, cfg, tmp_path, file, place, value, said):
    path = shutil.copytree(folder, tmp_path / "model")
    (path / file).write_text(json.dumps(changed(json.loads((path / file).read_text()), place, value)))
    with pytest.raises(InputError, match=re.escape(str(path))) as error:
        Chat(path, cfg)
        backbone.read_model(path)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("more", ["--samples=2", "--out=x.jsonl", "--overwrite"])
def test_what_a_question_that_is_asked_has_no_use_for_is_refused(here, more, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(*here, "--question", "what is it called?", more)
    assert f"{more.strip('-').split('=')[0]} is for question files" in capfd.readouterr().err


@pytest.mark.parametrize("out", ["folder", "pipe", "/dev/full", "x" * 250, "model.safetensors/r.jsonl"])
def test_an_out_that_cannot_be_written_is_one_line_before_the_work(here, world, tmp_path, out, capfd, monkeypatch):
    """--overwrite deletes none of them either."""
    monkeypatch.setattr(evaluation, "load_rollout", pytest.fail)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    shutil.copy(world[0].model / "model.safetensors", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(*here, "--val_limit=2", "--overwrite", "--out", tmp_path / out)
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and ("not a file" in said or "cannot write" in said)
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo() and os.path.exists("/dev/full")


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_two_evaluations_do_not_write_one_file(here, guessing, tmp_path, more, capfd):
    """The second ends with a line that says who is at it, also under another name of the folder; a judge likewise."""
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    main(*here, "--val_limit=2", "--out", tmp_path / "r.jsonl")
    before = (tmp_path / "r.jsonl").read_bytes()
    with config.lock(tmp_path / "r.jsonl"):
        with pytest.raises(SystemExit, match="2"):
            main(*here, "--val_limit=2", "--out", tmp_path / "link" / "r.jsonl", *more)
        assert f"link/r.jsonl is in use by process {os.getpid()} on " in capfd.readouterr().err
        with pytest.raises(InputError, match="is in use"):
            analysis_main(["judge", str(tmp_path / "r.jsonl"), "--judges", "em"])
    assert (tmp_path / "r.jsonl").read_bytes() == before
    main(*here, "--val_limit=2", "--out", tmp_path / "r.jsonl", *more)


def test_search_ratio_counts_calls_over_calls_allowed(cfg):
    """With two turns only one call fits, whatever the limits are."""
    base = {
        "question_id": "q",
        "sample": 0,
        "stop": "answered",
        "correct": True,
        "reward": 1.0,
        "format_ok": True,
        "turns": [],
        "data_source": "x",
    }
    call = {"tool": "image_search", "status": "ok"}
    records = [{**base, "calls": [call]}, {**base, "calls": []}]
    assert figures.summarize(records, replace(cfg, max_turns=2))["all"]["search_ratio"] == 0.5
    assert figures.summarize(records, replace(cfg, max_turns=3))["all"]["search_ratio"] == 0.25


def test_the_pipeline_needs_both_searches(here, capsys):
    with pytest.raises(SystemExit):
        main(*here, "--mode=pipeline", "--tool_limits", "image_search=0")
    assert "mode=pipeline makes both searches" in capsys.readouterr().err
