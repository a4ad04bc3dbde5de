"""Evaluation: figures against an independent recount, the command on toy questions and real photos, one question."""

import json
import math
import sys
from collections import Counter

import pytest
from conftest import ROOT, SHORT_WORLD, picture, question, replace

import config
import eval as evaluation
import results
from data import Codec, Hit, Result, Stop
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
    codec = Codec(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    questions = [question(i) for i in range(6)]
    key = {codec.picture(q.images[0]).key: q.id for q in questions}

    def script(prompt, images, sampling):
        return SCRIPTS[key[images[0].key]][prompt.count("<|im_start|>assistant") - 1]

    episodes = run(questions, ScriptedEngine(codec, script), OneHit(), codec, codec.cfg)
    return [evaluation.record(e, evaluation.score_episode(e, codec.cfg)) for e in episodes], codec.cfg


def test_figures_against_a_recount(records):
    records, cfg = records
    figures = evaluation.summarize(records, cfg)["all"]
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
    figures = evaluation.summarize([*records[:4], aborted], cfg)["all"]
    assert figures["n"] == 4 and figures["accuracy"] == 3 / 4 and figures["stops"]["aborted"] == 1
    assert evaluation.summarize([aborted], cfg)["all"]["n"] == 0


def test_by_data_source(records):
    records, cfg = records
    for i, r in enumerate(records):
        r["data_source"] = "ab"[i % 2]
    summary = evaluation.summarize(records, cfg)
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
    for p in results.wilson(right, n):
        assert abs(right / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        config.run_main(evaluation.main)


def test_the_command_on_the_toy_world(world, tmp_path, capsys):
    place, cfg = world
    out = tmp_path / "out.jsonl"
    here = [*SHORT_WORLD, f"--toy_dir={cfg.toy_dir}", "--threads=1", "--val_limit=12", f"--out={out}"]
    main(*here)
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 12 and "accuracy (95 %)" in printed and str(out) in printed
    counted = Counter(r["data_source"] for r in records)
    for source, n in counted.items():
        assert f"{source} {n:5d}" in " ".join(printed.split("\n")) or f" {n:5d}  " in printed
    first = out.read_bytes()
    main(*here)
    assert out.read_bytes() == first  # greedy, the same twice


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


def test_the_searches_of_one_question_are_shown(folder, cfg, capsys):
    codec = Codec(folder, replace(cfg, max_tokens=600, max_tokens_per_turn=100))
    turns = iter(SCRIPTS["q2"])
    engine = ScriptedEngine(codec, lambda *_: next(turns))
    evaluation.ask(question(1), engine, OneHit(), codec, codec.cfg)
    printed = capsys.readouterr().out
    assert "image search: ok" in printed and "text search for 'bako founder': ok" in printed
    assert "- bako <http://x>: founder gami" in printed and "answer    bako" in printed


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
    base = {"stop": "answered", "correct": True, "reward": 1.0, "format_ok": True, "turns": [], "data_source": "x"}
    call = {"kind": "image", "status": "ok"}
    records = [{**base, "calls": [call]}, {**base, "calls": []}]
    assert evaluation.summarize(records, replace(cfg, max_turns=2))["all"]["search_ratio"] == 0.5
    assert evaluation.summarize(records, replace(cfg, max_turns=3))["all"]["search_ratio"] == 0.25
