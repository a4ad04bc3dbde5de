"""Evaluation: figures against an independent recount, the command on toy questions and real photos, one question."""

import json
import math
import shutil
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHORT_WORLD, guesser, picture, question, replace
from safetensors.torch import load_file, save_file
from test_judge import Server, asked, says

import config
import eval as evaluation
import reward
import rollout
import toy
from analysis import labels
from chat import Chat
from data import Hit, Result, Stop, load_questions
from rollout import ScriptedEngine, run


class OneHit:
    """A search that finds one thing, and fails when asked for 'fail'."""

    def search(self, call, question):
        if call.query == "fail":
            return Result("error", error="Timeout: 10 s")
        image = picture(7, 40, 40) if call.kind == "image" else None
        return Result("ok", (Hit("bako", "http://x", "founder gami" * (call.kind == "text"), image),))


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
    figures = reward.summarize(records, cfg)["all"]
    assert figures["n"] == 6 and figures["accuracy"] == 3 / 6
    assert figures["search_ratio"] == pytest.approx((0 + 1 + 2 + 1 + 0 + 1) / (6 * 2))
    assert (figures["image"], figures["text"], figures["both"]) == pytest.approx((3 / 6, 2 / 6, 1 / 6))
    assert figures["format"] == pytest.approx(4 / 6)
    assert figures["turns"] == pytest.approx((1 + 2 + 3 + 2 + 1 + 2) / 6)
    assert figures["tool_failures"] == 1
    assert figures["stops"] == {"answered": 4, "no_action": 1, "tool_limit": 1}
    # toy preset: a tenth off for each search
    assert [r["reward"] for r in records] == pytest.approx([1.0, 0.91, 0.829, 0.1, 0.0, 0.0])


def test_aborted_conversations_are_counted_apart(records):
    records, cfg = records
    aborted = {**records[4], "stop": Stop.ABORTED.value, "reward": None}
    figures = reward.summarize([*records[:4], aborted], cfg)["all"]
    assert figures["n"] == 4 and figures["accuracy"] == 3 / 4 and figures["stops"]["aborted"] == 1
    assert reward.summarize([aborted], cfg)["all"]["n"] == 0


def test_by_data_source(records):
    records, cfg = records
    for i, r in enumerate(records):
        r["data_source"] = "ab"[i % 2]
    summary = reward.summarize(records, cfg)
    assert list(summary) == ["a", "b", "all"] and summary["a"]["n"] == summary["b"]["n"] == 3
    text = evaluation.table(summary)
    assert len(text.splitlines()) == 4 and "0.500" in text


def test_records_are_readable_and_hold_no_pictures(records):
    records, _ = records
    for r in records:
        line = json.dumps(r)
        assert len(line) < 4000 and "\\u0000" not in line
        assert [t["text"] for t in r["turns"] if t["role"] == "model"] == SCRIPTS[r["question_id"]]
    assert [c["kind"] for c in records[2]["calls"]] == ["image", "text"]
    assert records[3]["calls"][0]["status"] == "error" and "failed" in records[3]["turns"][2]["text"]


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (5, 10), (50, 100), (1, 1)])
def test_wilson(right, n):
    """The interval's ends are the shares p that solve |right/n - p| = 1.96 sqrt(p (1 - p) / n)."""
    for p in reward.wilson(right, n):
        assert abs(right / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        config.run_main(evaluation.main)


@pytest.fixture(scope="module")
def here(world):
    """The command line of an evaluation in the short world."""
    return [*SHORT_WORLD, f"--toy_dir={world[1].toy_dir}", "--threads=1"]


@pytest.fixture
def guessing(monkeypatch):
    """eval.py with an engine that is right now and then; the short world's model never is."""

    def engine(folder, chat, cfg, device, questions):
        place = toy.locate(cfg)
        return guesser(chat, load_questions(cfg.files or [place.val, place.train]))

    monkeypatch.setattr(evaluation, "load_engine", engine)


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


def test_an_interrupted_evaluation_goes_on_where_it_stopped(here, tmp_path, capsys, monkeypatch):
    """A search breaks down, and with it the evaluation; the next one only holds the conversations that are missing."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    common = [*here, "--val_limit=10", "--samples=2", "--max_turns=2", "--concurrency=4"]
    main(*common, f"--out={whole}")
    held = []

    def counted(*args, **more):
        episode = yield from converse(*args, **more)
        if len(held) == broken_after:
            raise OSError("the machine is on fire")
        held.append((episode.question_id, episode.sample))
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
    main(*common, f"--out={out}")
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


def test_results_of_other_weights_are_not_gone_on_with(here, world, tmp_path, capsys):
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
        main(*here, "--val_limit=30", f"--mode={mode}", "--samples=3", f"--out={path}", "--judges", "em", "sub_em")
        printed, (header, records) = capsys.readouterr().out, read(path)
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
        assert [c["kind"] for c in r["calls"]] == ["image", "text"] and r["stop"] in ("answered", "no_action")
        assert "<search><img></search>" in r["turns"][0]["text"]
    main("compare", out["direct"], out["agent"])
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
    answers = lambda body, _: (400, {}, b"") if len(asked(body)["response"]) == 4 else says("no")  # noqa: E731
    server, out = Server(answers), tmp_path / "out.jsonl"
    judges = ["--judges", "em", "llm", f"--judge_url={server.url}", f"--judge_cache={tmp_path / 'c.sqlite'}"]
    main(*here, "--val_limit=20", f"--out={out}", *judges)
    printed, records = capsys.readouterr().out, read(out)[1]
    failed = [r for r in records if len(r["answer"]) == 4]
    assert 0 < len(failed) < 20 and all(r["judged"] == {"em": True, "llm": None} for r in failed)
    assert all(r["judged"] == {"em": False, "llm": False} for r in records if r not in failed)
    line = next(line for line in printed.splitlines() if line.startswith("all ") and "llm" in line)
    assert line.split()[1:5] == ["llm", str(20 - len(failed)), str(len(failed)), "0.000"]
    assert f"em and llm agree on {20 - len(failed)} of {20 - len(failed)}" in printed
    assert f"not judged: HTTP 400 {len(failed)}" in printed and "sk-very-secret" not in out.read_text() + printed
    server.reply = lambda *_: says("yes")  # asked again, it says what it could not say before, and only that
    main(*here, "--val_limit=20", f"--out={out}", *judges)
    assert [r["judged"]["llm"] for r in read(out)[1]] == [r in failed for r in records]
    main("compare", out, out, "--judge=llm")
    assert f"20  {len(failed) / 20:.3f}" in capsys.readouterr().out
    server.shutdown()
    server.server_close()


def test_labelling(folder, cfg, tmp_path, capsys):
    """Scripted conversations: the labels, the pass rates and the balanced subset as parquet in veRL layout."""
    chat = Chat(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    cfg = replace(chat.cfg, label=True, out=str(tmp_path / "l.parquet"), balance=0.5)
    questions = [question(i) for i in range(6)]
    key = {chat.picture(q.images[0]).key: q.id for q in questions}

    def script(prompt, images, sampling):
        return SCRIPTS[key[images[0].key]][prompt.count("<|im_start|>assistant") - 1]

    episodes = run(questions, ScriptedEngine(chat, script), OneHit(), chat, cfg, samples=2)
    records = [reward.record(e, reward.score_episode(e, cfg)) for e in episodes]
    labels.write_labels(questions, records, cfg)
    assert "3 of 6 questions never right" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "l.parquet").to_pylist()
    assert [(r["label"], r["pass_rate"]) for r in rows] == [("search-free", 1.0), ("image", 1.0), ("both", 1.0)]
    back = load_questions([str(tmp_path / "l.parquet")])
    assert [vars(q) | {"id": 0} for q in back] == [vars(q) | {"id": 0} for q in questions[:3]]
    few = pq.read_table(tmp_path / "l.balanced.parquet").to_pylist()
    assert [r["label"] == "search-free" for r in few] == [True, False]


def test_the_label_command(here, guessing, tmp_path, capsys):
    rows = pq.read_table(toy.locate(config.parse(here)).train).slice(0, 30).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    files, out = ["--files", tmp_path / "train.parquet"], tmp_path / "l.parquet"
    main(*here, "--label", *files, f"--out={out}", "--balance=0.5")
    printed, (header, records) = capsys.readouterr().out, read(tmp_path / "l.jsonl")
    assert header["config"]["eval_temperature"] == 1.0 and len(records) == 8 * 30
    expected = {}
    for i, row in enumerate(rows):
        right = [r for r in records if r["question_id"] == f"train.parquet:{i}" and r["correct"]]
        kinds = [{c["kind"] for c in r["calls"]} for r in right]
        need = "search-free" if set() in kinds else "image" if {"image"} in kinds else "both"
        if right:
            expected[row["data_id"]] = (need, len(right) / 8)
    table = pq.read_table(out).to_pylist()
    assert {r["data_id"]: (r["label"], r["pass_rate"]) for r in table} == expected and len(expected) < 31
    few = [r["label"] for r in pq.read_table(tmp_path / "l.balanced.parquet").to_pylist()]
    rare = min(sum(need == "search-free" for need, _ in expected.values()), len(table) - few.count("search-free"))
    assert len({need for need, _ in expected.values()}) > 1 and f"{len(few)} questions in" in printed
    assert few.count("search-free") * 2 == len(few) and rare
    with pytest.raises(SystemExit):
        main(*here, "--label", *files, "--out=x.jsonl")
    assert "label needs --out NAME.parquet" in capsys.readouterr().err


def test_the_command_on_real_photos(world, tmp_path, capsys):
    place, cfg = world
    photos = ROOT.parent / "shared" / "data" / "mini_data.pq"
    if not photos.exists():
        pytest.skip("the five real photos are not at hand")
    here = [*SHORT_WORLD, f"--toy_dir={cfg.toy_dir}", "--threads=1"]
    main(*here, f"--model={place.model}", "--files", photos, f"--out={tmp_path / 'out.jsonl'}")
    assert "mmsearch_r1/infoseek_train_split     5" in capsys.readouterr().out


def test_one_question(world, tmp_path, capsys):
    place, cfg = world
    (tmp_path / "photo.png").write_bytes(picture(3, 300, 200))
    here = [*SHORT_WORLD, f"--toy_dir={cfg.toy_dir}", "--threads=1", f"--model={place.model}"]
    main(*here, f"--image={tmp_path / 'photo.png'}", "--question=what is it called?")
    printed = capsys.readouterr().out
    assert "turn 1" in printed and "answer" in printed and "stop:" in printed
    main(*here, f"--image={tmp_path / 'photo.png'}", "--question=what is it called?", "--mode=pipeline")
    printed = capsys.readouterr().out
    assert printed.index("image search: ok") < printed.index("turn 1")


def test_the_searches_of_one_question_are_shown(folder, cfg, capsys):
    chat = Chat(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    turns = iter(SCRIPTS["q2"])
    engine = ScriptedEngine(chat, lambda *_: next(turns))
    evaluation.ask(question(1), engine, OneHit(), chat, chat.cfg)
    printed = capsys.readouterr().out
    assert "image search: ok" in printed and "text search for 'bako founder': ok" in printed
    assert "- bako <http://x>: founder gami" in printed and "answer    bako" in printed


def test_the_searches_of_the_pipeline_are_shown_where_they_were_made(folder, cfg, capsys):
    chat = Chat(folder, replace(cfg, max_tokens=900, max_tokens_per_turn=100, mode="pipeline"))
    turns = iter(["<text_search>bako founder</text_search>", "<answer>gami</answer>"])
    evaluation.ask(question(1), ScriptedEngine(chat, lambda *_: next(turns)), OneHit(), chat, chat.cfg)
    printed = capsys.readouterr().out
    order = ["image search: ok", "turn 1", "text search for 'bako founder': ok", "turn 2", "answer    gami"]
    places = [printed.index(part) for part in order]
    assert places == sorted(places)
    chat = Chat(folder, replace(cfg, max_tokens=60, max_prompt_tokens=59, max_tokens_per_turn=20, mode="pipeline"))
    evaluation.ask(question(1), ScriptedEngine(chat, lambda *_: "-"), OneHit(), chat, chat.cfg)
    assert "(stop: max_tokens)" in capsys.readouterr().out  # there was no room for the model's first turn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--files", "nowhere.parquet"], "nowhere.parquet: no such file"),
        (["--model", "no/such/model", "--files", "x"], "no/such/model"),
        (["--image", "nowhere.png", "--question", "what?"], "nowhere.png: cannot read"),
        (["--image", "README.md", "--question", "what?"], "README.md: not a whole picture"),
    ],
)
def test_bad_input(world, arguments, said, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    place, cfg = world
    here = [*SHORT_WORLD, f"--toy_dir={cfg.toy_dir}", "--threads=1", f"--model={place.model}"]
    with pytest.raises(SystemExit) as exit:
        main(*here, *arguments)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit.value.code == 2 and len(errors) == 1 and said in errors[0]


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
    call = {"kind": "image", "status": "ok"}
    records = [{**base, "calls": [call]}, {**base, "calls": []}]
    assert reward.summarize(records, replace(cfg, max_turns=2))["all"]["search_ratio"] == 0.5
    assert reward.summarize(records, replace(cfg, max_turns=3))["all"]["search_ratio"] == 0.25
