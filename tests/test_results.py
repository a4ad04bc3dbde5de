"""Result files: resuming, headers, and every figure against a recount in other words."""

import itertools
import json
import os
import random
import re
import statistics

import pytest

import config
import data
from analysis import figures as figures_of
from analysis import results
from analysis.results import ResultFile
from config import InputError

HEADER = {"config": {"mode": "agent", "out": "a"}, "model_id": "m", "code": "c"}

CALL = {"tool": "image_search", "query": "", "status": "ok", "error": "", "error_kind": "", "hits": []}


def conversation(question, correct, sample=0, source="x", calls=0, stop="answered", **more):
    return {
        "question_id": f"q{question}", "sample": sample, "data_source": source, "question": f"what is {question}?",
        "answers": ["a"], "answer": "a", "correct": correct, "stop": stop, "turns": [], "reward": float(correct),
        "calls": [CALL] * calls, "format_ok": True, **more,
    }  # fmt: skip


def some(seed, questions=40, samples=1, share=0.5):
    rng = random.Random(seed)
    return [
        conversation(q, rng.random() < share, sample, "xyz"[q % 3], rng.randrange(3))
        for q in range(questions)
        for sample in range(samples)
    ]


# ------------------------------------------------------------------------------------------------ the file


def test_an_interrupted_file_resumes_and_ends_as_the_undisturbed_one(tmp_path):
    records = some(0, 6)
    whole = ResultFile(tmp_path / "whole.jsonl", HEADER)
    whole.finish(records)
    first = ResultFile(tmp_path / "r.jsonl", HEADER)
    for r in (records[4], records[1]):
        first.add(r)
    first.close()
    with open(first.part, "a") as file:
        file.write(json.dumps(records[0])[:50])  # killed while writing
    other = ResultFile(tmp_path / "r.jsonl", HEADER, rank=1)
    other.add(records[5])
    other.close()
    again = ResultFile(tmp_path / "r.jsonl", HEADER)
    assert again.done() == {data.key_of(r): r for r in (records[4], records[1], records[5])}
    again.add(records[0])
    again.add(records[4])  # its question goes again if another of its samples was missing
    again.close()
    assert len(again.done()) == 4
    lines = again.part.read_text().splitlines()
    assert [json.loads(line).get("question_id") for line in lines] == [None, "q4", "q1", "q0", "q4"]
    again.finish(records)
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "whole.jsonl"]
    assert results.read_results(tmp_path / "r.jsonl") == (HEADER, records)
    assert list(ResultFile(tmp_path / "r.jsonl", HEADER).done().values()) == records


def test_a_name_may_hold_the_signs_of_a_pattern(tmp_path):
    for name in ("ev[1].jsonl", "e*.jsonl", "ev1.jsonl"):
        file = ResultFile(tmp_path / name, HEADER)
        file.add(conversation(0, True))
        file.close()
        assert len(file.parts()) == len(file.done()) == 1
    ResultFile(tmp_path / "e*.jsonl", HEADER).finish([])
    assert len(list(tmp_path.iterdir())) == 3 and not (tmp_path / "e*.jsonl.part0").exists()


@pytest.mark.parametrize("content", ["", '{"header": {"con'])
def test_killed_before_the_first_line(tmp_path, content):
    (tmp_path / "r.jsonl.part0").write_text(content)
    file = ResultFile(tmp_path / "r.jsonl", HEADER)
    assert file.done() == {}
    file.add(conversation(0, True))
    file.close()
    assert len(ResultFile(tmp_path / "r.jsonl", HEADER).done()) == 1


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({**HEADER, "model_id": "n"}, "model_id='m'"),
        ({**HEADER, "config": {"mode": "direct", "out": "a"}}, "mode='agent'"),
        ({**HEADER, "config": {"mode": "agent", "out": "b"}}, None),
    ],
)
def test_another_evaluation_is_not_resumed(tmp_path, now, named):
    file = ResultFile(tmp_path / "r.jsonl", HEADER)
    file.add(conversation(0, True))
    file.close()
    other = ResultFile(tmp_path / "r.jsonl", now, neutral={"out"})
    if named is None:
        assert len(other.done()) == 1
        return
    with pytest.raises(InputError, match=named):
        other.done()
    other.clear()
    assert other.done() == {} and not list(tmp_path.iterdir())


def test_another_version_of_the_code_is_a_warning(tmp_path, capsys):
    """The evaluation resumes, and its header names both versions; only rank 0 warns, and a third time, too."""
    path, newer = tmp_path / "r.jsonl", {**HEADER, "code": "d"}
    file = ResultFile(path, HEADER)
    file.add(conversation(0, True))
    file.close()
    assert ResultFile(path, HEADER).done() and capsys.readouterr().err == ""
    resumed = ResultFile(path, newer)
    assert list(resumed.done()) == [("q0", 0)]
    assert capsys.readouterr().err == f"warning: {path}: resumed with code d, begun with c\n"
    assert ResultFile(path, newer, rank=1).done() and capsys.readouterr().err == ""
    resumed.add(conversation(1, True))
    resumed.finish([conversation(0, True), conversation(1, True)])
    assert results.read_results(path)[0] == {**HEADER, "code": "c + d"}
    third = ResultFile(path, {**HEADER, "code": "e"})
    assert len(third.done()) == 2 and "resumed with code e, begun with c, d" in capsys.readouterr().err
    third.finish(some(0, 2))
    assert results.read_results(path)[0]["code"] == "c + d + e"


def test_the_code_version_changes_with_any_file_that_evaluates(tmp_path, monkeypatch):
    for name in ("analysis/results.py", "eval.py", "search/web.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "analysis" / "results.py"))
    versions = [results.code_version()]
    for name in ("eval.py", "search/web.py"):
        (tmp_path / name).write_text("x = 2\n")
        versions.append(results.code_version())
    assert len(set(versions)) == 3 and versions[-1] == results.code_version()


def test_a_file_that_is_no_result_is_left_alone(tmp_path):
    (tmp_path / "notes.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match="cannot read it .line 1 is not JSON"):
        ResultFile(tmp_path / "notes.jsonl", HEADER).done()
    data.write_jsonl(tmp_path / "old.jsonl", some(0, 2))
    with pytest.raises(InputError, match="without the header"):
        ResultFile(tmp_path / "old.jsonl", HEADER).done()
    data.write_jsonl(tmp_path / "twice.jsonl", [conversation(0, True)] * 2)
    with pytest.raises(InputError, match="the same sample number"):
        results.read_results(tmp_path / "twice.jsonl")
    (tmp_path / "foreign.jsonl").write_text(json.dumps(conversation("\u2028\x85", True), ensure_ascii=False) + "\n\n")
    assert len(results.read_results(tmp_path / "foreign.jsonl")[1]) == 1
    (tmp_path / "open.jsonl").write_text(json.dumps(conversation(0, True)))  # its last line has no end
    assert len(results.read_results(tmp_path / "open.jsonl")[1]) == 1
    with pytest.raises(InputError, match="cannot read"):
        results.read_results(tmp_path / "nowhere.jsonl")
    data.write_jsonl(tmp_path / "kinds.jsonl", [conversation(0, True) | {"calls": [{"kind": "image"}]}])
    with pytest.raises(InputError, match=r"line 1: field calls\[0\].tool: not as"):
        results.read_results(tmp_path / "kinds.jsonl")


def test_of_a_validation_the_greedy_half_is_read(tmp_path):
    records = [conversation(0, True, mode="greedy"), conversation(0, False, mode="sampled")]
    data.write_jsonl(tmp_path / "eval-000000.jsonl", records)
    assert results.read_results(tmp_path / "eval-000000.jsonl") == ({}, records[:1])


@pytest.mark.parametrize("size", [0, 1, 2**8, 2**8 + 1, 2**12 - 5, 2**12, 2**12 + 1])
def test_an_id_changes_with_any_byte_of_a_small_file_and_with_the_ends_of_a_large_one(tmp_path, monkeypatch, size):
    monkeypatch.setattr(data, "PIECES", 16)
    monkeypatch.setattr(data, "PIECE", 2**8)
    path, content = tmp_path / "f", bytearray(random.Random(size).randbytes(size))
    path.write_bytes(content)
    ids = [data.file_id(path)]
    for at in {0, size - 1, *range(size if size <= 2**12 else 0)} if size else ():
        content[at] ^= 1
        path.write_bytes(content)
        ids.append(data.file_id(path))
        content[at] ^= 1
    assert len(set(ids)) == len(ids)
    path.write_bytes(content)
    assert data.file_id(path) == ids[0]


def test_the_id_of_a_folder_is_not_changed_by_its_results(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = data.file_id(tmp_path)
    (tmp_path / "eval.jsonl").write_text("x")
    (tmp_path / "eval-direct.jsonl.part0").write_text("x")
    assert data.file_id(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert data.file_id(tmp_path) != before


def changed(record: dict, place: str, value) -> dict:
    """A copy of a record in which the entry at a place, as "calls/0/tool", is another; `...` takes it out."""
    record = json.loads(json.dumps(record))
    inner, *keys = record, *place.split("/")
    for key in keys[:-1]:
        inner = inner[int(key) if isinstance(inner, list) else key]
    key = int(keys[-1]) if isinstance(inner, list) else keys[-1]
    inner[key] = value
    if value is ...:
        del inner[key]
    return record


HIT = {"title": "t", "url": "", "text": "", "image": None}
SOUND = conversation(0, True) | {
    "turns": [{"role": "model", "text": "x"}], "calls": [CALL | {"hits": [HIT], "usage": {"cost": 0.5}}],
    "pictures": ["p"], "judged": {"em": True}, "advantage": None,
}  # fmt: skip
WRONG = {  # place -> values that it cannot have; `...`: missing
    "question_id": (..., None, 3, ["q"], {}), "sample": (..., "0", 0.5, float("nan")), "answers": (None, "a", [1], {}),
    "turns": (..., None, {}, "t", [None], [["x"]]), "turns/0/role": (..., 1), "turns/0/text": (None, 7, ["x"]),
    "calls": (..., None, {"tool": "x"}, [3]), "calls/0/tool": (..., None, {}), "calls/0/hits": (..., "h", [None]),
    "calls/0/hits/0/title": (..., 3), "calls/0/usage/cost": ("1", None, 1e999), "calls/0/box": ([None], "1,2"),
    "stop": (..., None, 4), "correct": (..., None, "yes", 1), "reward": (..., None, "1", float("nan"), 10**200),
    "judged": ([], {"em": "yes"}), "pictures": ("p", [1]), "data_source": (None, []), "mode": (0,),
}  # fmt: skip


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in WRONG.items() for value in values])
def test_a_record_of_another_form_is_a_line_that_names_the_field(tmp_path, place, value):
    path, field = tmp_path / "r.jsonl", re.sub(r"/(\d+)", r"[\1]", place).replace("/", ".")
    lines = [{"header": HEADER}, SOUND, changed(SOUND, place, value) | {"x": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for read in (results.read_results, lambda path: ResultFile(path, HEADER).done()):
        with pytest.raises(
            InputError, match=f"r.jsonl, line 3: field {re.escape(field)}.*: not as eval.py or train.py"
        ):
            read(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert results.read_results(path) == (HEADER, [SOUND])


@pytest.mark.parametrize(
    "first",
    ["3", "null", "[]", '"header"', "[" * 10**5, '{"header": null}', '{"header": [1]}', '{"header": {}}',
     '{"header": {"config": []}}', '{"header": {"config": {"files": "a.parquet"}}}',
     '{"header": {"config": {"mode": 1}}}'],
)  # fmt: skip
def test_a_header_of_another_form_is_a_line(tmp_path, first):
    path = tmp_path / "r.jsonl"
    path.write_text(f"{first}\n{json.dumps(SOUND)}\n")
    for read in (results.read_results, lambda path: ResultFile(path, HEADER).done()):
        with pytest.raises(InputError, match="r.jsonl.*line 1:? .*not"):
            read(path)


def test_what_is_written_has_no_nan(tmp_path):
    file = ResultFile(tmp_path / "r.jsonl", HEADER)
    records = [conversation(0, True, advantage=float("nan"), gap=[float("inf"), -float("inf"), 1e308])]
    file.add(records[0])
    file.close()
    file.finish(records)
    written = [json.loads(line, parse_constant=pytest.fail) for line in file.path.read_text().splitlines()]
    assert (written[1]["advantage"], written[1]["gap"]) == (None, [None, None, 1e308])


@pytest.mark.parametrize("path", ["folder", "pipe", "/dev/zero", "/dev/stdin", "x" * 300, "missing"])
def test_what_is_no_file_is_a_line_at_once(tmp_path, path):
    """Neither read for ever, nor written over, nor a traceback."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / path
    with pytest.raises(InputError, match="cannot read it|not a file"):
        results.read_results(path)
    if path.name != "missing":
        with pytest.raises(InputError, match="not a file|too long"):
            ResultFile(path, HEADER)
            config.lock(path)
        with pytest.raises(InputError, match="cannot write"):
            data.write_jsonl(path, [])
        assert not os.path.isfile(path)
    (tmp_path / "r.jsonl.part0").mkdir()
    with pytest.raises(InputError, match="part0: not a file"):
        ResultFile(tmp_path / "r.jsonl", HEADER).done()


@pytest.mark.parametrize("path", ["missing", "pipe", "/dev/zero", "x" * 300, "nul\0"])
def test_what_has_no_id_is_a_line(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot read it"):
        data.file_id(tmp_path / path)


# ------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("right", "n"), [(0, 4), (1, 4), (3, 7), (5, 5), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, n):
    samples = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = [any(s) for s in itertools.combinations(samples, k)]
        assert figures_of.pass_at_k(right, n, k) == pytest.approx(sum(subsets) / len(subsets))


def test_several_samples_against_a_recount(cfg):
    records = some(1, questions=9, samples=5, share=0.3)
    figures = figures_of.summarize(records, cfg)["all"]
    right = {q: [r["correct"] for r in records if r["question_id"] == f"q{q}"] for q in range(9)}
    assert list(figures["pass"]) == ["1", "2", "4", "5"]
    for k, share in figures["pass"].items():
        chances = [statistics.mean(any(s) for s in itertools.combinations(v, int(k))) for v in right.values()]
        assert share == pytest.approx(statistics.mean(chances))
    assert figures["accuracy"] == pytest.approx(figures["pass"]["1"])
    by_sample = [statistics.mean(v[i] for v in right.values()) for i in range(5)]
    assert figures["spread"] == pytest.approx(statistics.stdev(by_sample))
    assert "pass" not in figures_of.summarize([r for r in records if r["sample"] == 0], cfg)["all"]
    line = next(line for line in figures_of.table({"all": figures}).splitlines() if "pass@k" in line)
    assert f"5: {figures['pass']['5']:.3f}" in line and f"{figures['spread']:.3f}" in line


def test_the_bootstrap_of_a_share_is_the_binomials_interval():
    """200 questions, half right: the percentiles of a binomial share, 0.5 +- 1.96 sqrt(0.25 / 200)."""
    low, high = figures_of.bootstrap([1] * 100 + [0] * 100, [1] * 200)
    assert (low, high) == pytest.approx((0.5 - 0.0693, 0.5 + 0.0693), abs=0.006)
    assert figures_of.bootstrap([1] * 100 + [0] * 100, [1] * 200) == (low, high)


def test_conversations_about_one_question_are_no_independent_evidence():
    """Eight copies of each conversation leave the interval as it is."""
    one = figures_of.accuracy({f"q{i}": [i % 3 == 0] for i in range(60)})
    assert figures_of.accuracy({f"q{i}": [i % 3 == 0] * 8 for i in range(60)}) == pytest.approx(one)
    assert one["accuracy_low"] < 1 / 3 < one["accuracy_high"]


def test_all_right_is_not_certainty():
    figures = figures_of.accuracy({f"q{i}": [True] * 4 for i in range(10)})
    assert figures["accuracy"] == figures["accuracy_high"] == 1.0
    assert figures["accuracy_low"] == pytest.approx(1 / (1 + 1.96**2 / 10))  # Wilson's, of ten
    assert figures_of.accuracy({}) == {"accuracy": 0.0, "accuracy_low": 0.0, "accuracy_high": 1.0}
