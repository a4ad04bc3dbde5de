"""The toy world is honest, its search really searches, and its builder can be interrupted."""

import dataclasses
import json
import math
import random
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from conftest import ROOT, SHORT_WORLD

from chat import Chat
from data import Call, Stop, load_questions
from engines import ScriptedEngine
from eval import open_search
from reward import score_episode
from rollout import run
from toy import lessons as toy_lessons
from toy import world as toy_world


@pytest.fixture(scope="module")
def questions(world):
    place, _ = world
    return load_questions([str(place.train)]), load_questions([str(place.val)])


@pytest.fixture(scope="module")
def things():
    return toy_world.make_things(random.Random("world 0"))


def needs_search(question):
    return question.data_source.startswith("unknown")


# ------------------------------------------------------------------------------------------------ honesty


def test_need_cannot_be_read_off_the_wording(questions):
    """A bag-of-words classifier (naive Bayes), trained on the training questions, is near chance on validation."""
    train, val = questions
    counts = {need: Counter(w for q in train if needs_search(q) == need for w in q.text.split()) for need in (0, 1)}
    words = set(counts[0]) | set(counts[1])

    def score(question, need):
        total = sum(counts[need].values()) + len(words)
        return sum(math.log((counts[need][w] + 1) / total) for w in question.text.split())

    right = sum((score(q, 1) > score(q, 0)) == needs_search(q) for q in val)
    assert abs(right / len(val) - 0.5) < 0.1


def test_pictures_give_need_away_only_by_what_they_show(questions):
    """Known and unknown things have the same kinds of shape, colour and pattern, and files of the same size."""
    train, _ = questions
    sizes = defaultdict(list)
    for q in train:
        sizes[needs_search(q)].append(len(q.images[0]))
    means = [sum(s) / len(s) for s in sizes.values()]
    assert abs(means[0] - means[1]) < 0.03 * means[0]


def test_the_kinds_are_balanced_and_everything_can_be_answered(questions):
    for part, size in zip(questions, (400, 60), strict=True):
        assert Counter(q.data_source for q in part) == dict.fromkeys(toy_world.KINDS[:4], size)
        assert all(len(q.answers) == 1 and len(q.images) == 1 for q in part)


def test_validation_s_unknown_things_occur_nowhere_in_training(questions, things, world):
    train, val = questions
    unknown = {q.data_id.split("-")[0] for q in val if needs_search(q)}
    hidden = things[toy_world.KNOWN + toy_world.TAUGHT :]
    assert unknown <= {t.name for t in things[-toy_world.VAL :]}
    assert not unknown & {q.data_id.split("-")[0] for q in train}
    assert not {q.images[0] for q in val} & {q.images[0] for q in train}
    words = [word for t in things for word in (t.name, t.founder, t.city, t.river)]
    assert len(words) == len(set(words))  # a fact never betrays whose it is
    place, cfg = world
    lessons = toy_lessons.Lessons(things, Chat(place.base, cfg), 0)
    assert not {toy_world.look_of(t) for t in hidden} & set(lessons.looks)
    assert not set(hidden) & {*lessons.familiar, *lessons.unknown, *lessons.similar}
    assert len({toy_world.look_of(t) for t in things}) == len(things)
    known = [toy_world.look_of(t) for t in things[: toy_world.KNOWN]]
    assert all(
        toy_world.alike(toy_world.look_of(t), look) < 3 for t in hidden for look in known
    )  # no eye should mistake them
    assert any(toy_world.alike(toy_world.look_of(t), look) == 3 for t in lessons.similar for look in known)


@pytest.mark.parametrize(("named", "beliefs"), [(0, True), (24, True), (0, False)])
def test_the_scripted_policy_is_blind_to_need(world, named, beliefs):
    """Which searches it makes does not depend on what it knows; what it says is well-formed."""
    place, cfg = world
    cfg = dataclasses.replace(cfg, toy_named=named, toy_beliefs=beliefs)
    things = toy_world.make_things(random.Random("world 0"), named)
    chat = Chat(place.base, cfg)
    policy, rng = toy_lessons.SloppyPolicy(chat, cfg), random.Random(0)
    asked = [policy.question(things[i % 96], rng.choice(["name", *toy_world.FACTS]), rng) for i in range(800)]
    episodes = run(asked, ScriptedEngine(chat, policy), open_search_of(world), chat, cfg)
    searched = defaultdict(list)
    for question, episode in zip(asked, episodes, strict=True):
        thing, what = policy.asked[episode.images[0].key]
        searched[thing.belief(what) == "unknown"].append(" ".join(call.kind for call, _ in episode.calls))
        assert episode.stop == Stop.ANSWERED and len(episode.tokens) <= 250
        assert score_episode(episode, cfg).format_ok, question
        first = chat.tokenizer.decode(episode.tokens[episode.turns[0].start : episode.turns[0].end])
        assert f"<reason> {thing.belief(what) if beliefs else 'think'}.</reason>" in first
    assert set(searched[True]) == {"", "image", "image text", *(["text"] if named else [])}
    for searches in set(searched[True]):
        shares = [counts.count(searches) / len(counts) for counts in searched.values()]
        assert abs(shares[0] - shares[1]) < 0.1


def test_a_fifth_kind_knows_the_name_alone(world, tmp_path):
    _, cfg = world
    things = toy_world.make_things(random.Random("world 0"), 12)
    toy_world.write_world(tmp_path, things, dataclasses.replace(cfg, toy_named=12))
    questions = load_questions([str(tmp_path / "val.parquet")])
    assert Counter(q.data_source for q in questions) == dict.fromkeys(toy_world.KINDS, 60)
    by_name = {t.name: t for t in things}
    for q in questions:
        name, what = q.data_id.split("-")
        assert (by_name[name].belief(what) != "unknown") == q.data_source.startswith("known")
        assert by_name[name].named == (not needs_search(q))


def open_search_of(world):
    place, cfg = world
    return open_search(cfg)


# ------------------------------------------------------------------------------------------------- search


def test_image_search_has_to_retrieve_and_mostly_does(world, questions):
    place, cfg = world
    search, val = open_search(cfg), questions[1]
    first = 0
    for q in val:
        result = search.search(Call("image"), q)
        assert result.status == "ok" and len(result.hits) == cfg.image_results
        assert all(hit.image and hit.image != q.images[0] for hit in result.hits)  # another picture of the same thing
        first += result.hits[0].title == q.data_id.split("-")[0]
    assert 0.93 < first / len(val) <= 1.0


def test_text_search_needs_the_name_and_the_fact(world, things):
    _, cfg = world
    search, rng = open_search(cfg), random.Random(1)
    by_name_only = 0
    for thing in rng.sample(things, 60):
        fact = rng.choice(toy_world.FACTS)
        hits = search.search(Call("text", f"{thing.name} {fact}"), None).hits
        assert hits[0].title == f"{thing.name} {fact}" and hits[0].text == getattr(thing, fact)
        assert len(hits) == cfg.text_results  # the others are distractors
        by_name_only += search.search(Call("text", thing.name), None).hits[0].title == f"{thing.name} {fact}"
    assert by_name_only < 40


# ------------------------------------------------------------------------------------------------- building


def test_the_tokenizer_spells_names_in_syllables(world, things):
    place, cfg = world
    chat = Chat(place.model, cfg)
    for thing in things[::50]:
        assert len(chat.encode(f" {thing.name}")) == 2
        assert chat.encode(f" {thing.name}") == chat.encode(f"x {thing.name}")[1:]
    for text in ("Größe: 1.234 €", "日本語", "<answer> bako</answer>"):
        assert chat.tokenizer.decode(chat.encode(text)) == text
    assert len(chat.encode("<reason></reason><answer></answer><search><img></search>")) == 7


def test_building_goes_on_where_it_was_killed(world, tmp_path):
    """Killed while the base is trained: the world is kept, the base made again, and nothing is left over."""
    script = (
        "import os, sys, toy, config\n"
        "make = toy.export_hf\n"
        "toy.export_hf = lambda *a: os.kill(os.getpid(), 9)\n"
        "config.run_main(toy.main)\n"
    )
    args = [*SHORT_WORLD, "--threads=1", f"--toy_dir={tmp_path}"]
    killed = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert {p.name for p in folder.iterdir()} == {"world", "base.building"}
    made = (folder / "world" / "train.parquet").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-m", "toy", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "world" / "train.parquet").stat().st_mtime_ns == made
    assert {p.name for p in folder.iterdir()} == {"world", "base", "model"}
    place, _ = world
    assert (folder / "model" / "model.safetensors").read_bytes() == (place.model / "model.safetensors").read_bytes()


def test_another_seed_is_another_world(things):
    other = toy_world.make_things(random.Random("world 1"))
    assert len({t.name for t in things[: toy_world.KNOWN]} & {t.name for t in other[: toy_world.KNOWN]}) < 5


def test_the_exported_model_is_an_ordinary_one(world):
    place, _ = world
    saved = json.loads((place.model / "config.json").read_text())
    assert saved["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and saved["tie_word_embeddings"]
    assert not re.search("packed|attn", json.dumps(saved))
