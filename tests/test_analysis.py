"""python -m analysis: each command from its command line to what it prints and writes; comparison and labels against a
recount."""

import json
import math
import os
import pickle
import random
import statistics
import subprocess
import sys
from collections import Counter

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, guesser, question, replace
from PIL import Image
from test_cache import Run
from test_judge import Server, asked, says
from test_results import CALL, HEADER, conversation, some

import reward
import tools
from analysis import compare, labels
from analysis.__main__ import COMMANDS, main
from analysis.results import ResultFile, read_results
from chat import Chat, Episode
from config import InputError
from data import Call, Hit, Question, Result, load_questions, picture_key, write_jsonl, write_questions
from rollout import run
from search.index import OfflineSearch, SearchDB

# ---------------------------------------------------------------------------------------------- the command line


def command(*arguments):
    main([str(a) for a in arguments])


def test_help_lists_the_commands(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        printed = capsys.readouterr().out
        assert all(f"\n    {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("report", ["--out", "--limit"]), ("curves", ["--out"]), ("plan", ["--gpus", "--gpu_memory", "--offload"]),
        ("compare", ["--judge"]), ("judge", ["--judges", "--judge_url"]), ("label", ["--out", "--balance", "--seed"]),
        ("prompts", ["--out"]),
    ],
)  # fmt: skip
def test_a_command_lists_its_options(name, options, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and all(f"  {option} " in printed for option in options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("reprot runs/toy", "unknown command 'reprot': choose one of report, curves"),
        ("report", "expected python -m analysis report RUN ..., then options"),
        ("curves --out x.png", "expected python -m analysis curves RUN ..."),
        ("compare a.jsonl", "expected python -m analysis compare A B, then"),
        ("compare a.jsonl b.jsonl c.jsonl", "expected python -m analysis compare A B, then"),
        ("label --out x.parquet r.jsonl", "unknown argument 'r.jsonl'"),
        ("report runs/toy --limt 3", "did you mean --limit?"),
        ("report runs/toy --limit=-1", "limit=-1: must be at least 0"),
        ("label r.jsonl --out x.parquet --balance 1.5", "balance=1.5: must be from 0 to 1"),
        ("prompts --out x", "expected python -m analysis prompts PICKLE ..., then options"),
        ("prompts a b c", "prompts needs --out DIR"),
        ("plan --gpu_memory 0", "gpu_memory=0.0: must be above 0"),
    ],
)
def test_bad_command_lines(arguments, said):
    with pytest.raises(InputError) as error:
        main(arguments.split())
    assert said in str(error.value)


def test_the_program(tmp_path):
    """As a process: what it prints, one line and code 2 for bad input, silence where the reader leaves early."""
    ResultFile(tmp_path / "a.jsonl", HEADER).finish(some(0, 3000))
    start = [sys.executable, "-m", "analysis", "compare", str(tmp_path / "a.jsonl")]
    done = subprocess.run([*start, str(tmp_path / "a.jsonl")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "gained: 0" in done.stdout
    bad = subprocess.run([*start, "no\nwhere"], cwd=ROOT, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.startswith("error: no where: cannot read")
    assert bad.stderr.count("\n") == 1
    for name, right in (("s", True), ("t", False)):
        half = conversation(0, right) | {"question": "half a pair: \ud800"}
        ResultFile(tmp_path / f"{name}.jsonl", HEADER).finish([half])
    command = [*start[:-1], str(tmp_path / "s.jsonl"), str(tmp_path / "t.jsonl")]
    odd = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (odd.returncode, odd.stderr) == (0, "") and "half a pair: \\ud800" in odd.stdout
    command = [sys.executable, "eval.py", "--model", "x" * 300]
    long = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (long.returncode, long.stderr) == (2, f"error: {'x' * 300}/trained_as.json: File name too long\n")
    other = [{**r, "correct": not r["correct"]} for r in some(0, 3000)]
    ResultFile(tmp_path / "b.jsonl", HEADER).finish(other)  # prints a line for each question, more than a pipe holds
    with subprocess.Popen(
        [*start, str(tmp_path / "b.jsonl")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith(b"A  ")
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


# ------------------------------------------------------------------------------------------- comparison


def test_compare_against_a_recount():
    a, b = some(2, 50, share=0.4)[:45], some(3, 50, share=0.7)[5:]
    random.Random(0).shuffle(b)
    found = compare.compare(a, b)
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
    same = compare.compare(b, b)["all"]
    assert (same["difference"], same["low"], same["high"], same["gained"], same["lost"]) == (0, 0, 0, [], [])


def test_several_samples_are_compared_by_their_mean_and_aborted_ones_left_out():
    a = [conversation(0, s == 0, s) for s in range(4)] + [conversation(1, True)]
    b = [conversation(0, s < 2, s) for s in range(4)] + [conversation(1, False, stop="aborted")]
    found = compare.compare(a, b)["all"]
    assert (found["n"], found["a"], found["b"], found["gained"]) == (1, 0.25, 0.5, ["q0"])


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="no question in common"):
        compare.compare(some(0, 2), [conversation(7, True)])
    with pytest.raises(InputError, match="different questions: q0"):
        compare.compare([conversation(0, True)], [conversation(0, True) | {"question": "who?"}])
    with pytest.raises(InputError, match="that llm has judged"):
        compare.compare(some(0, 2), some(0, 2), "llm")


def test_calls_against_need():
    direct = [conversation(q, q < 3) for q in range(5)]  # 0 1 2 need no tool, 3 4 do
    calls = [0, 1, 2, 0, 1]
    records = [conversation(q, True, calls=calls[q]) for q in range(5)] + [conversation(9, True, calls=1)]
    assert compare.search_need(direct, records) == {"over": 2 / 3, "over_n": 3, "under": 1 / 2, "under_n": 2}


def test_the_compare_command(tmp_path, capsys):
    direct, agent = ({**HEADER, "config": {"mode": mode}} for mode in ("direct", "agent"))
    a, b = [conversation(q, q < 3) for q in range(5)], [conversation(q, q > 0, calls=q % 2) for q in range(5)]
    ResultFile(tmp_path / "a.jsonl", direct).finish(a)
    ResultFile(tmp_path / "b.jsonl", agent).finish(b)
    command("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    printed = capsys.readouterr().out
    assert "mode: 'direct' | 'agent'" in printed and "5  0.600  0.800  +0.200" in printed
    assert "gained: 2\n  q3  what is 3?\n  q4" in printed and "lost: 1\n  q0" in printed
    assert "over-search   0.333 of 3" in printed and "under-search  0.500 of 2" in printed
    assert str(ROOT) not in printed
    for name, records in (("a", a), ("b", b)):
        judged = [{**r, "judged": {"llm": None if r["question_id"] == "q4" else True}} for r in records]
        ResultFile(tmp_path / f"{name}.jsonl", agent).finish(judged)
    command("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--judge", "llm")
    assert "4  1.000  1.000  +0.000" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ the curves


def test_the_curves_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, slope in (("a", 0.1), ("b", -0.1)):
        log = [{"step": i, "phase": "train", "reward": slope * i, "loss": None} for i in range(5)]
        log.append({"step": 5, "phase": "eval", "greedy": {"all": {"reward": 1.0, "turns": "text"}}})
        log.append({"step": 6, "phase": "eval", "greedy": None, "sampled": {}, "reward": []})
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "metrics.jsonl", log)
    command("curves", tmp_path / "a", tmp_path / "b")
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "curves.png")
    image = Image.open(tmp_path / "a" / "curves.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(image.width * image.height)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two
    with pytest.raises(InputError, match="nowhere.metrics.jsonl: cannot read"):
        command("curves", tmp_path / "nowhere")
    with pytest.raises(InputError, match="x.xyz: matplotlib writes no such"):
        command("curves", tmp_path / "a", "--out", tmp_path / "x.xyz")


def test_without_matplotlib_the_curves_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="curves needs matplotlib: pip install matplotlib"):
        command("curves", tmp_path)


# ------------------------------------------------------------------------------------------------------ the judges


@pytest.fixture
def evaluated(tmp_path):
    """A result file about twelve questions in a parquet file: two thirds of the answers are right."""
    questions = [question(i, answer="bako") for i in range(12)]
    write_questions(tmp_path / "q.parquet", questions, {})
    header = {**HEADER, "config": {"mode": "agent", "files": [str(tmp_path / "q.parquet")]}}
    records = []
    for i, q in enumerate(load_questions([tmp_path / "q.parquet"])):
        answer = "tilo" if i % 3 == 0 else "bako"
        about = {"question_id": q.id, "question": q.text, "answers": list(q.answers), "answer": answer}
        about["pictures"] = [picture_key(image) for image in q.images]
        records.append({**conversation(i, answer == "bako"), **about})
    path = tmp_path / "r.jsonl"
    ResultFile(path, header).finish(records)
    return path, header, records


def test_the_judge_command(evaluated, tmp_path, capsys, monkeypatch):
    """The judge fails on the right answers and denies all others; asked again, it says what it could not say before,
    and only that. The verdicts are in the file, which is otherwise as it was."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    path, header, records = evaluated
    server = Server(lambda body, _: (400, {}, b"") if asked(body)["response"] == "bako" else says("no"))
    options = ["--judges", "em", "llm", "--judge_url", server.url, "--judge_cache", tmp_path / "c.sqlite"]
    command("judge", path, *options)
    printed, judged = capsys.readouterr().out, read_results(path)
    right = {"em": True, "llm": None}
    wrong = {"em": False, "llm": False}
    assert judged == (header, [{**r, "judged": right if r["correct"] else wrong} for r in records])
    line = next(line for line in printed.splitlines() if line.startswith("all ") and "llm" in line)
    assert line.split()[1:5] == ["llm", "4", "8", "0.000"]
    assert "em and llm agree on 4 of 4" in printed and "not judged: HTTP 400 8" in printed
    assert "sk-very-secret" not in path.read_text() + printed
    assert len(asked_images(server.bodies[0])) == 1  # the question's picture, from the file that the header names
    server.reply = lambda *_: says("yes")
    command("judge", path, *options)
    assert [r["judged"]["llm"] for r in read_results(path)[1]] == [r["correct"] for r in records]
    command("compare", path, path, "--judge=llm")
    assert f"12  {8 / 12:.3f}" in capsys.readouterr().out
    server.shutdown()
    server.server_close()


def asked_images(body):
    return [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]


def test_results_whose_questions_are_gone_are_not_judged(evaluated, tmp_path):
    path, header, records = evaluated
    before = path.read_bytes()
    write_questions(tmp_path / "q.parquet", [question(i) for i in range(11)], {})
    with pytest.raises(InputError, match="question q.parquet:11 is no longer in .*q.parquet"):
        command("judge", path, "--judges", "em")
    for other in (question(0, answer="bako"), question(50, answer="bako"), question(0, answer="tilo")):
        write_questions(tmp_path / "q.parquet", [other, *(question(i, answer="bako") for i in range(1, 12))], {})
        if other == question(0, answer="bako"):
            command("judge", path, "--judges", "em")
            ResultFile(path, header).finish(records)
            continue
        with pytest.raises(
            InputError, match="question q.parquet:0 is no longer in .* another picture or other answers"
        ):
            command("judge", path, "--judges", "em")
    (tmp_path / "q.parquet").unlink()
    with pytest.raises(InputError, match="q.parquet: no such file"):
        command("judge", path, "--judges", "em")
    assert path.read_bytes() == before
    write_jsonl(path, records)  # as train.py writes rollouts
    with pytest.raises(InputError, match="names no question files"):
        command("judge", path, "--judges", "em")
    assert [json.loads(line) for line in path.read_text().splitlines()] == records


# ------------------------------------------------------------------------------------------------------ the labels


IMAGE, TEXT = "image_search", "text_search"


@pytest.mark.parametrize(
    ("did", "label", "pass_rate"),
    [
        ([(IMAGE, True), ("", True), (TEXT, False)], "search_free", 2 / 3),
        ([("", False), (IMAGE, True), (f"{IMAGE} {TEXT}", True)], IMAGE, 2 / 3),
        ([("", False), (f"{TEXT} {TEXT}", True)], TEXT, 1 / 2),
        ([(f"{IMAGE} {TEXT}", True), (TEXT, True)], TEXT, 1),
        ([(TEXT, True), (IMAGE, True)], IMAGE, 1),
        ([(f"{TEXT} {IMAGE}", True), ("", False)], "image_search+text_search", 1 / 2),
        ([("crop", True), (f"{IMAGE} {TEXT}", True)], "crop", 1),
        ([("crop", True), (TEXT, True)], TEXT, 1),
        ([("", False), (IMAGE, False)], None, 0),
        ([("", "aborted"), (IMAGE, True)], IMAGE, 1),
        ([("", "aborted")], None, 0),
    ],
)
def test_the_least_that_a_right_conversation_called(did, label, pass_rate):
    records = []
    for names, right in did:
        r = conversation(0, bool(right), stop="aborted" if right == "aborted" else "answered")
        records.append({**r, "calls": [{"tool": name} for name in names.split()]})
    assert labels.least_needed(records) == (label, pytest.approx(pass_rate))


def test_labels_follow_the_table_of_tools(monkeypatch):
    first = {"crop": tools.TOOLS[IMAGE], **tools.TOOLS}
    monkeypatch.setattr(labels, "TOOLS", first)
    records = [conversation(0, True) | {"calls": [{"tool": name} for name in names]} for names in ([TEXT], ["crop"])]
    assert labels.least_needed(records) == ("crop", 1.0)
    assert (
        labels.label_of({"calls": [{"tool": name} for name in (TEXT, IMAGE, "crop", TEXT)]}) == f"crop+{IMAGE}+{TEXT}"
    )


@pytest.mark.parametrize(("free", "needing", "share"), [(30, 30, 2 / 3), (5, 90, 2 / 3), (90, 5, 0.5), (4, 4, 1.0)])
def test_balance(free, needing, share):
    mixed = ["search_free"] * free + [IMAGE, TEXT, f"{IMAGE}+{TEXT}"] * (needing // 3) + [IMAGE] * (needing % 3)
    random.Random(1).shuffle(mixed)
    chosen = labels.balanced(mixed, share, seed=0)
    assert chosen == sorted(set(chosen)) == labels.balanced(mixed, share, seed=0)
    n = sum(mixed[i] != "search_free" for i in chosen)
    assert n / len(chosen) == pytest.approx(share, abs=0.5 / len(chosen))
    assert n == needing or len(chosen) - n == free  # as large as can be: one kind is used up


def test_the_label_command(evaluated, tmp_path, capsys):
    """Labels, pass rates and the balanced subset as parquet in veRL layout, with the questions as they were."""
    path, header, records = evaluated
    calls = [[], [IMAGE], [TEXT, IMAGE]]  # of right ones about questions 1, 2, 4 ...
    right = [i for i, r in enumerate(records) if r["correct"]]
    for number, i in enumerate(right):
        records[i]["calls"] = [CALL | {"tool": name} for name in calls[number % 3]]
    second = [{**r, "sample": 1, "correct": False} for r in records]
    ResultFile(path, header).finish([*records, *second])
    out = tmp_path / "l.parquet"
    command("label", path, "--out", out, "--balance", "0.5")
    printed = capsys.readouterr().out
    assert "4 of 12 questions never answered right" in printed
    assert "search_free 3, image_search 3, image_search+text_search 2\n" in printed
    rows = pq.read_table(out).to_pylist()
    names = ["search_free", IMAGE, f"{IMAGE}+{TEXT}"]
    assert [(r["label"], r["pass_rate"]) for r in rows] == [(names[n % 3], 0.5) for n in range(8)]
    asked_about = load_questions([tmp_path / "q.parquet"])
    assert [vars(q) | {"id": 0} for q in load_questions([out])] == [vars(asked_about[i]) | {"id": 0} for i in right]
    few = pq.read_table(tmp_path / "l.balanced.parquet").to_pylist()
    assert Counter(r["label"] == "search_free" for r in few) == {True: 3, False: 3}


def test_labels_that_cannot_be_balanced_are_not_half_written(evaluated, tmp_path):
    path, _, _ = evaluated  # nothing was searched for
    with pytest.raises(InputError, match="no question is left to write"):
        command("label", path, "--out", tmp_path / "l.parquet", "--balance", "1")
    assert not list(tmp_path.glob("l*"))


def test_labels_of_rollouts(world, tmp_path):
    """Eight conversations about each of thirty toy questions: the labels against a recount."""
    place, cfg = world[:2]
    questions = load_questions([place.train])[:30]
    write_questions(tmp_path / "q.parquet", questions, {})
    questions, chat = load_questions([tmp_path / "q.parquet"]), Chat(place.model, cfg)
    search = OfflineSearch(SearchDB(place.index))
    episodes = run(questions, guesser(chat, questions), search, chat, cfg, samples=8)
    records = [reward.record(e, reward.score_episode(e, cfg)) for e in episodes]
    header = {"config": {"mode": "agent", "files": [str(tmp_path / "q.parquet")]}}
    ResultFile(tmp_path / "r.jsonl", header).finish(records)
    command("label", tmp_path / "r.jsonl", "--out", tmp_path / "l.parquet", "--balance", "0.5")
    expected = {}
    for q in questions:
        right = [r for r in records if r["question_id"] == q.id and r["correct"]]
        called = [{c["tool"] for c in r["calls"]} for r in right]
        label = "search_free" if set() in called else IMAGE if {IMAGE} in called else f"{IMAGE}+{TEXT}"
        if right:
            expected[q.data_id] = (label, len(right) / 8)
    table = pq.read_table(tmp_path / "l.parquet").to_pylist()
    assert {r["data_id"]: (r["label"], r["pass_rate"]) for r in table} == expected and len(expected) > 20
    few = [r["label"] for r in pq.read_table(tmp_path / "l.balanced.parquet").to_pylist()]
    assert len({label for label, _ in expected.values()}) > 1 and few.count("search_free") * 2 == len(few) > 0


def test_what_cannot_be_labelled(evaluated, tmp_path):
    path, header, records = evaluated
    with pytest.raises(InputError, match="label needs --out NAME.parquet"):
        command("label", path, "--out", tmp_path / "x.jsonl")
    ResultFile(tmp_path / "d.jsonl", {**header, "config": {**header["config"], "mode": "direct"}}).finish(records)
    with pytest.raises(InputError, match="mode direct: labels need results of eval.py in mode agent"):
        command("label", tmp_path / "d.jsonl", "--out", tmp_path / "x.parquet")
    ResultFile(path, header).finish([{**r, "correct": False} for r in records])
    with pytest.raises(InputError, match="no question is left to write"):
        command("label", path, "--out", tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


# -------------------------------------------------------------------------------------------- published prompts

ROUND_1, AFTER_IMAGE, AFTER_TEXT = (
    f"{name}_prompt_qwenvl" for name in ("round_1_user", "after_image_search", "after_text_search")
)
PUBLISHED = {  # sentences of our own, built like the authors'
    ROUND_1: "Look at it.\nSay <answer>x</answer>.\nThis is it:\n<image> ",
    AFTER_IMAGE: "What do you see?\nGo on.",
    AFTER_TEXT: "What “now”?",
}


def published(folder, **contents):
    """The arguments of the command: pickles of texts (or files of bytes) in the order of a shell's *.pkl, and --out."""
    for name, content in {**PUBLISHED, **contents}.items():
        (folder / f"{name}.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return ["prompts", *sorted(folder.glob("*.pkl")), "--out", folder / "a" / "out"]


def test_published_prompts_give_the_ids_of_the_authors_rollout(folder, cfg, tmp_path, capsys):
    """Rendered here as their code does: one text, in which the placeholder of the image is replaced."""
    command(*published(tmp_path))
    assert capsys.readouterr().out.endswith(
        "out: after_image_search.txt, after_text_search.txt, question.txt, search_failed.txt\n"
    )
    chat = Chat(folder, replace(cfg, prompts=str(tmp_path / "a" / "out"), max_tokens=2000))
    tokenizer, asked = chat.tokenizer, question(text="what is it?")
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    first = [{"role": "user", "content": PUBLISHED[ROUND_1] + "what is it?"}]
    text = tokenizer.apply_chat_template(first, tokenize=False, add_generation_prompt=True).replace("<image>", vision)
    assert chat.collapse(chat.prompt(asked)[0]) == tokenizer.encode(text, add_special_tokens=False)
    for tool, after, shown in (
        ("image_search", AFTER_IMAGE, f"{vision} a title\n"),
        ("text_search", AFTER_TEXT, " a title: so\n"),
    ):
        hit = Hit("a title", image=asked.images[0]) if tool == "image_search" else Hit("a title", text="so")
        episode = Episode.start(asked, chat)
        assert episode.add_words("say") and episode.add_result(Call(tool, "q"), Result("ok", (hit,)))
        text = f"Searched results: <information>{shown}</information>\nOriginal user's question: what is it?\n"
        text = f"say<|im_end|>\n<|im_start|>user\n{text}{PUBLISHED[after]}<|im_end|>\n<|im_start|>assistant\n"
        ids = chat.collapse(episode.tokens[len(chat.prompt(asked)[0]) :])
        assert ids == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({ROUND_1: "no place for it"}, "round_1_user_prompt_qwenvl.pkl: expected <image> once in its text"),
        ({ROUND_1: "<image> or <image>"}, "expected <image> once"),
        ({AFTER_TEXT: "now <image>"}, "after_text_search_prompt_qwenvl.pkl: expected <image> nowhere in its text"),
        ({AFTER_IMAGE: "now {results}"}, "it has a placeholder of ours"),
        ({ROUND_1: "<image> {question}"}, "it has a placeholder of ours"),
        ({AFTER_IMAGE: ["a list"]}, "expected a text, not a list"),
        ({AFTER_IMAGE: b'{"a": "JSON"}'}, "expected a text, not a dict"),
        ({AFTER_IMAGE: b"abc"}, "not a pickle of plain data"),
        ({AFTER_IMAGE: b""}, "not a pickle of plain data"),
        ({AFTER_IMAGE: "half a character \ud800"}, "not UTF-8"),
        ({AFTER_IMAGE: pickle.dumps("cut off")[:-4]}, "not a pickle of plain data"),
        ({AFTER_IMAGE: "x" * 70_000}, "after_image_search_prompt_qwenvl.pkl: larger than 65,536 bytes"),
        ({AFTER_IMAGE: b"\x80\x04\x8d" + (2**50).to_bytes(8, "little") + b"x."}, "not a pickle of plain data"),
        ({AFTER_IMAGE: Run(os.system, "touch mark")}, "system, which is not allowed"),
        ({AFTER_IMAGE: Run(eval, "open('mark', 'w')")}, "builtins.eval, which is not allowed"),
        ({AFTER_IMAGE: Question("a class", "of ours")}, "it holds data.Question, which is not allowed"),
        ({"a_fourth": "text"}, "expected 3 pickles, got 4"),
    ],
)
def test_what_are_no_published_prompts(tmp_path, monkeypatch, contents, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        command(*published(tmp_path, **contents))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pkl"}  # nothing was run, nothing written


def test_published_prompts_are_three_and_go_into_a_new_folder(tmp_path):
    name, *pickles, option, out = published(tmp_path)
    for wrong, said in ((pickles[:2], "got 2"), (pickles[:2] * 2, "got 4"), ([*pickles[:2], pickles[0]], "round_1")):
        with pytest.raises(InputError, match=said):
            command(name, *wrong, option, out)
    with pytest.raises(FileNotFoundError):
        command(name, *pickles[:2], tmp_path / "round_1_user_prompt.pkl", option, out)
    assert not out.exists()
    command(name, *pickles, option, out)
    (out / "question.txt").write_text("mine")
    with pytest.raises(InputError, match="exists: give the name of a new folder"):
        command(name, *pickles, option, out)
    assert (out / "question.txt").read_text() == "mine"
