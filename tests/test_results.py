"""Result files: resuming, headers, and every figure against a recount in other words."""

import itertools
import json
import math
import random
import statistics

import pytest
from conftest import ROOT

import data
import eval as evaluation
import reward
from analysis import labels, results
from analysis.results import ResultFile
from config import InputError

HEADER = {"config": {"mode": "agent", "out": "a"}, "model_id": "m", "code": "c"}


def conversation(question, correct, sample=0, source="x", calls=0, stop="answered", **more):
    return {
        "question_id": f"q{question}", "sample": sample, "data_source": source, "question": f"what is {question}?",
        "answers": ["a"], "answer": "a", "correct": correct, "stop": stop, "turns": [], "reward": float(correct),
        "calls": [{"kind": "image", "status": "ok"}] * calls, "format_ok": True, **more,
    }  # fmt: skip


def some(seed, questions=40, samples=1, share=0.5):
    rng = random.Random(seed)
    return [
        conversation(q, rng.random() < share, sample, "xyz"[q % 3], rng.randrange(3))
        for q in range(questions)
        for sample in range(samples)
    ]


# ------------------------------------------------------------------------------------------------ the file


def test_an_interrupted_file_goes_on_and_ends_as_the_undisturbed_one(tmp_path):
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
        ({**HEADER, "code": "d"}, "code='c'"),
    ],
)
def test_another_evaluation_is_not_gone_on_with(tmp_path, now, named):
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


def test_a_file_that_is_no_result_is_left_alone(tmp_path):
    (tmp_path / "notes.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match="line 1: not a conversation"):
        ResultFile(tmp_path / "notes.jsonl", HEADER).done()
    data.write_jsonl(tmp_path / "old.jsonl", some(0, 2))
    with pytest.raises(InputError, match="without the header"):
        ResultFile(tmp_path / "old.jsonl", HEADER).done()
    data.write_jsonl(tmp_path / "twice.jsonl", [conversation(0, True)] * 2)
    with pytest.raises(InputError, match="two conversations"):
        results.read_results(tmp_path / "twice.jsonl")
    (tmp_path / "foreign.jsonl").write_text(json.dumps(conversation("\u2028\x85", True), ensure_ascii=False) + "\n\n")
    assert len(results.read_results(tmp_path / "foreign.jsonl")[1]) == 1
    with pytest.raises(InputError, match="cannot read"):
        results.read_results(tmp_path / "nowhere.jsonl")


def test_of_a_validation_the_greedy_half_is_read(tmp_path):
    records = [conversation(0, True, mode="greedy"), conversation(0, False, mode="sampled")]
    data.write_jsonl(tmp_path / "eval-000000.jsonl", records)
    assert results.read_results(tmp_path / "eval-000000.jsonl") == ({}, records[:1])


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**16 + 1, 2**22 - 5, 2**22, 2**22 + 1])
def test_an_id_changes_with_any_byte_of_a_small_file_and_with_the_ends_of_a_large_one(tmp_path, size):
    path, content = tmp_path / "f", bytearray(random.Random(size).randbytes(size))
    path.write_bytes(content)
    ids = [results.file_id(path)]
    for at in {0, size // 2, size - 1} if size else ():
        content[at] ^= 1
        path.write_bytes(content)
        ids.append(results.file_id(path))
        content[at] ^= 1
    assert len(set(ids)) == len(ids)
    path.write_bytes(content)
    assert results.file_id(path) == ids[0]


def test_the_id_of_a_folder_is_not_changed_by_its_results(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = results.file_id(tmp_path)
    (tmp_path / "eval.jsonl").write_text("x")
    (tmp_path / "eval-direct.jsonl.part0").write_text("x")
    assert results.file_id(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert results.file_id(tmp_path) != before


# ------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("right", "n"), [(0, 4), (1, 4), (3, 7), (5, 5), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, n):
    samples = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = [any(s) for s in itertools.combinations(samples, k)]
        assert reward.pass_at_k(right, n, k) == pytest.approx(sum(subsets) / len(subsets))


def test_several_samples_against_a_recount(cfg):
    records = some(1, questions=9, samples=5, share=0.3)
    figures = reward.summarize(records, cfg)["all"]
    right = {q: [r["correct"] for r in records if r["question_id"] == f"q{q}"] for q in range(9)}
    assert list(figures["pass"]) == ["1", "2", "4", "5"]
    for k, share in figures["pass"].items():
        chances = [statistics.mean(any(s) for s in itertools.combinations(v, int(k))) for v in right.values()]
        assert share == pytest.approx(statistics.mean(chances))
    assert figures["accuracy"] == pytest.approx(figures["pass"]["1"])
    by_sample = [statistics.mean(v[i] for v in right.values()) for i in range(5)]
    assert figures["spread"] == pytest.approx(statistics.stdev(by_sample))
    assert "pass" not in reward.summarize([r for r in records if r["sample"] == 0], cfg)["all"]
    line = next(line for line in evaluation.table({"all": figures}).splitlines() if "pass@k" in line)
    assert f"5: {figures['pass']['5']:.3f}" in line and f"{figures['spread']:.3f}" in line


def test_the_bootstrap_of_a_share_is_the_binomials_interval():
    """200 questions, half right: the percentiles of a binomial share, 0.5 +- 1.96 sqrt(0.25 / 200)."""
    low, high = reward.bootstrap([1] * 100 + [0] * 100, [1] * 200)
    assert (low, high) == pytest.approx((0.5 - 0.0693, 0.5 + 0.0693), abs=0.006)
    assert reward.bootstrap([1] * 100 + [0] * 100, [1] * 200) == (low, high)


def test_conversations_about_one_question_are_no_independent_evidence():
    """Eight copies of each conversation leave the interval as it is."""
    one = reward.accuracy({f"q{i}": [i % 3 == 0] for i in range(60)})
    assert reward.accuracy({f"q{i}": [i % 3 == 0] * 8 for i in range(60)}) == pytest.approx(one)
    assert one["accuracy_low"] < 1 / 3 < one["accuracy_high"]


def test_all_right_is_not_certainty():
    figures = reward.accuracy({f"q{i}": [True] * 4 for i in range(10)})
    assert figures["accuracy"] == figures["accuracy_high"] == 1.0
    assert figures["accuracy_low"] == pytest.approx(1 / (1 + 1.96**2 / 10))  # Wilson's, of ten
    assert reward.accuracy({}) == {"accuracy": 0.0, "accuracy_low": 0.0, "accuracy_high": 1.0}


# ------------------------------------------------------------------------------------------- comparison


def test_compare_against_a_recount():
    a, b = some(2, 50, share=0.4)[:45], some(3, 50, share=0.7)[5:]
    random.Random(0).shuffle(b)
    found = results.compare(a, b)
    for source in "xyz":
        pairs = [(r["correct"], s["correct"]) for r in a for s in b
                 if r["question_id"] == s["question_id"] and r["data_source"] == source]  # fmt: skip
        f = found[source]
        assert f["n"] == len(pairs) and f["a"] == pytest.approx(statistics.mean(p[0] for p in pairs))
        assert f["b"] == pytest.approx(statistics.mean(p[1] for p in pairs))
        assert (len(f["gained"]), len(f["lost"])) == (pairs.count((False, True)), pairs.count((True, False)))
        assert f["difference"] == pytest.approx((len(f["gained"]) - len(f["lost"])) / f["n"])
        assert f["low"] < f["difference"] < f["high"]
    assert found["all"]["n"] == 40 and list(found) == ["x", "y", "z", "all"]
    # the paired interval is near the normal one, and B against itself has no width
    changes = [(q in found["all"]["gained"]) - (q in found["all"]["lost"]) for q in {r["question_id"] for r in a[5:]}]
    half = 1.96 * statistics.pstdev(changes) / math.sqrt(40)
    assert found["all"]["high"] - found["all"]["low"] == pytest.approx(2 * half, rel=0.15)
    same = results.compare(b, b)["all"]
    assert (same["difference"], same["low"], same["high"], same["gained"], same["lost"]) == (0, 0, 0, [], [])


def test_several_samples_are_compared_by_their_mean_and_aborted_ones_left_out():
    a = [conversation(0, s == 0, s) for s in range(4)] + [conversation(1, True)]
    b = [conversation(0, s < 2, s) for s in range(4)] + [conversation(1, False, stop="aborted")]
    found = results.compare(a, b)["all"]
    assert (found["n"], found["a"], found["b"], found["gained"]) == (1, 0.25, 0.5, ["q0"])


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="no question in common"):
        results.compare(some(0, 2), [conversation(7, True)])
    with pytest.raises(InputError, match="different questions: q0"):
        results.compare([conversation(0, True)], [conversation(0, True) | {"question": "who?"}])
    with pytest.raises(InputError, match="that llm has judged"):
        results.compare(some(0, 2), some(0, 2), "llm")


def test_searching_against_need():
    direct = [conversation(q, q < 3) for q in range(5)]  # 0 1 2 need no search, 3 4 do
    calls = [0, 1, 2, 0, 1]
    records = [conversation(q, True, calls=calls[q]) for q in range(5)] + [conversation(9, True, calls=1)]
    assert results.search_need(direct, records) == {"over": 2 / 3, "over_n": 3, "under": 1 / 2, "under_n": 2}


def test_compare_as_the_command_prints_it(tmp_path, capsys):
    direct, agent = ({**HEADER, "config": {"mode": mode}} for mode in ("direct", "agent"))
    a, b = [conversation(q, q < 3) for q in range(5)], [conversation(q, q > 0, calls=q % 2) for q in range(5)]
    ResultFile(tmp_path / "a.jsonl", direct).finish(a)
    ResultFile(tmp_path / "b.jsonl", agent).finish(b)
    evaluation.compare_main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    printed = capsys.readouterr().out
    assert "mode: 'direct' | 'agent'" in printed and "5  0.600  0.800  +0.200" in printed
    assert "gained: 2\n  q3  what is 3?\n  q4" in printed and "lost: 1\n  q0" in printed
    assert "over-search   0.333 of 3" in printed and "under-search  0.500 of 2" in printed
    assert str(ROOT) not in printed


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("did", "need", "share"),
    [
        ([("image", True), ("", True), ("text", False)], "search-free", 2 / 3),
        ([("", False), ("image", True), ("image text", True)], "image", 2 / 3),
        ([("", False), ("text text", True)], "text", 1 / 2),
        ([("image text", True), ("text", True)], "text", 1),
        ([("image text", True), ("", False)], "both", 1 / 2),
        ([("", False), ("image", False)], None, 0),
    ],
)
def test_labels(did, need, share):
    records = [{"correct": right, "calls": [{"kind": kind} for kind in kinds.split()]} for kinds, right in did]
    assert labels.need_of(records) == (need, pytest.approx(share))


@pytest.mark.parametrize(("free", "needed", "share"), [(30, 30, 2 / 3), (5, 90, 2 / 3), (90, 5, 0.5), (4, 4, 1.0)])
def test_balance(free, needed, share):
    labels = ["search-free"] * free + ["image", "text", "both"] * (needed // 3) + ["image"] * (needed % 3)
    random.Random(1).shuffle(labels)
    chosen = labels.balanced(labels, share, seed=0)
    assert chosen == sorted(set(chosen)) == labels.balanced(labels, share, seed=0)
    n = sum(labels[i] != "search-free" for i in chosen)
    assert n / len(chosen) == pytest.approx(share, abs=0.5 / len(chosen))
    assert n == needed or len(chosen) - n == free  # as large as can be: one kind is used up
