"""The toy world is honest, its search really searches, and its builder can be interrupted."""

import dataclasses
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import torch
from conftest import ROOT, SHORT_RUN, SHORT_WORLD

import config
import eval as evaluation
import tools
import toy
import train
from analysis.imitation import ImitationOptions
from analysis.judge import JudgeOptions
from backbone import read_config
from chat import Chat
from config import Config, InputError, marked, parse
from data import Call, Stop, load_questions
from reward import score_episode
from rollout import run
from search.index import OfflineSearch, SearchDB
from tools import results
from toy import Recipe
from toy import build as toy_build
from toy import lessons as toy_lessons
from toy import world as toy_world
from toy.lessons import ScriptedEngine


@pytest.fixture(scope="module")
def questions(world):
    place, _, _ = world
    return load_questions([str(place.train)]), load_questions([str(place.val)])


@pytest.fixture(scope="module")
def crop(tmp_path_factory):
    """A short world of the preset toy-crop: (its places, options of a run, recipe, things)."""
    argv = ["--preset=toy-crop", *SHORT_WORLD, "--threads=1", f"--toy_dir={tmp_path_factory.mktemp('toy')}"]
    cfg, recipe = parse(argv, Config, Recipe)
    place = toy_build.build(toy.locate(recipe).folder, cfg, recipe)
    return place, cfg, recipe, toy_world.make_things(random.Random("world 0"), crop=True)


@pytest.fixture(scope="module")
def things():
    return toy_world.make_things(random.Random("world 0"))


@pytest.fixture(scope="module")
def search(world):
    place, cfg, _ = world
    return OfflineSearch(SearchDB(place.index), results(cfg))


def needs_search(question):
    return question.data_source.startswith("unknown")


# ------------------------------------------------------------------------------------------------ honesty


def guessed_from_words(train, val, needs):
    """How often a bag-of-words classifier (naive Bayes), trained on the training questions, is right on validation."""
    counts = {need: Counter(w for q in train if needs(q) == need for w in q.text.split()) for need in (0, 1)}
    words = set(counts[0]) | set(counts[1])

    def score(question, need):
        total = sum(counts[need].values()) + len(words)
        return sum(math.log((counts[need][w] + 1) / total) for w in question.text.split())

    return sum((score(q, 1) > score(q, 0)) == needs(q) for q in val) / len(val)


def test_need_cannot_be_read_off_the_wording(questions):
    assert abs(guessed_from_words(*questions, needs_search) - 0.5) < 0.1


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
    place, cfg, _ = world
    lessons = toy_lessons.Lessons(things, Chat(place.base, cfg), 0)
    assert not {t.look for t in hidden} & set(lessons.looks)
    assert not set(hidden) & {*lessons.familiar, *lessons.unknown, *lessons.similar}
    assert len({t.look for t in things}) == len(things)
    known = [t.look for t in things[: toy_world.KNOWN]]
    assert all(toy_world.alike(t.look, look) < 3 for t in hidden for look in known)  # no eye should mistake them
    assert any(toy_world.alike(t.look, look) == 3 for t in lessons.similar for look in known)


@pytest.mark.parametrize(("named", "beliefs"), [(0, True), (24, True), (0, False)])
def test_the_scripted_policy_is_blind_to_need(world, search, named, beliefs):
    """Which searches it makes does not depend on what it knows; what it says is well-formed."""
    place, cfg, recipe = world
    things = toy_world.make_things(random.Random("world 0"), named)
    chat = Chat(place.base, cfg)
    policy = toy_lessons.SloppyPolicy(chat, dataclasses.replace(recipe, toy_named=named, toy_beliefs=beliefs))
    rng = random.Random(0)
    asked = [policy.question(things[i % 96], rng.choice(["name", *toy_world.FACTS]), rng) for i in range(800)]
    episodes = run(asked, ScriptedEngine(chat, policy), search, chat, cfg)
    searched = defaultdict(list)
    for question, episode in zip(asked, episodes, strict=True):
        thing, what = policy.asked[episode.images[0].key]
        searched[thing.belief(what) == "unknown"].append(" ".join(call.tool for call, _ in episode.calls))
        assert episode.stop == Stop.ANSWERED and len(episode.tokens) <= 250
        assert score_episode(episode, cfg).format_ok, question
        names = [thing.belief("name")]  # what it takes to be the name, turn by turn
        names += [result.hits[0].title for call, result in episode.calls[:1] if call.tool == "image_search"]
        for name, said in zip(names, episode.responses, strict=False):
            thought = name if what == "name" else f"{name} {thing.belief(what)}"
            assert said.startswith(f"<reason> {thought if beliefs else 'think'}.</reason>")
        if len(episode.calls) == 2 and what != "name":
            hit = episode.calls[1][1].hits[0]
            value = hit.text if hit.title == f"{names[1]} {what}" else "unknown"
            assert episode.responses[2].endswith(f"<answer> {value}</answer>")
    plans = {"", "image_search", "image_search text_search", *(["text_search"] if named else [])}
    assert set(searched[True]) == plans
    for searches in plans:
        shares = [counts.count(searches) / len(counts) for counts in searched.values()]
        assert abs(shares[0] - shares[1]) < 0.1


def test_a_fifth_kind_knows_the_name_alone(world, tmp_path):
    _, _, recipe = world
    things = toy_world.make_things(random.Random("world 0"), 12)
    toy_world.write_world(tmp_path, things, dataclasses.replace(recipe, toy_named=12))
    questions = load_questions([str(tmp_path / "val.parquet")])
    assert Counter(q.data_source for q in questions) == dict.fromkeys(toy_world.KINDS, 60)
    by_name = {t.name: t for t in things}
    for q in questions:
        name, what = q.data_id.split("-")
        assert (by_name[name].belief(what) != "unknown") == q.data_source.startswith("known")
        assert by_name[name].named == (not needs_search(q))


# ------------------------------------------------------------------------------------------------- search


def test_image_search_has_to_retrieve_and_mostly_does(world, search, questions):
    _, cfg, _ = world
    val, first = questions[1], 0
    for q in val:
        result = search.search(Call("image_search"), q)
        assert result.status == "ok" and len(result.hits) == results(cfg)["image_search"]
        assert all(hit.image and hit.image != q.images[0] for hit in result.hits)  # another picture of the same thing
        first += result.hits[0].title == q.data_id.split("-")[0]
    assert 0.93 < first / len(val) <= 1.0


def test_text_search_needs_the_name_and_the_fact(world, search, things):
    _, cfg, _ = world
    rng, by_name_only = random.Random(1), 0
    for thing in rng.sample(things, 60):
        fact = rng.choice(toy_world.FACTS)
        hits = search.search(Call("text_search", f"{thing.name} {fact}"), None).hits
        assert hits[0].title == f"{thing.name} {fact}" and hits[0].text == getattr(thing, fact)
        assert len(hits) == results(cfg)["text_search"]  # the others are distractors
        by_name_only += search.search(Call("text_search", thing.name), None).hits[0].title == f"{thing.name} {fact}"
    assert by_name_only < 40


# ------------------------------------------------------------------------------------------- the world of crops


def among(question):
    return question.data_source.endswith("others")


def test_neither_search_nor_crop_can_be_read_off_the_wording_of_the_world_of_crops(crop):
    train, val = (load_questions([str(file)]) for file in (crop[0].train, crop[0].val))
    for part, size in ((train, 400), (val, 60)):
        assert Counter(q.data_source for q in part) == dict.fromkeys(toy_world.CROP_KINDS, size)
    for needs in (needs_search, among, lambda q: needs_search(q) and among(q)):
        some = [q for q in val if needs(q)]
        balanced = some + [q for q in val if not needs(q)][: len(some)]
        assert abs(guessed_from_words(train, balanced, needs) - 0.5) < 0.1
    for others in (False, True):  # pictures of one kind are of one size
        sizes = [[len(q.images[0]) for q in train if needs_search(q) == need and among(q) == others] for need in (0, 1)]
        means = [sum(s) / len(s) for s in sizes]
        assert abs(means[0] - means[1]) < 0.03 * means[0]


def test_validation_s_unknown_things_are_in_no_lesson_and_no_training_picture_of_the_world_of_crops(crop, monkeypatch):
    place, cfg, _, things = crop
    shown = []
    monkeypatch.setattr(toy_world, "draw", lambda look, rng: shown.append(look) or b"")
    monkeypatch.setattr(toy_world, "draw_four", lambda looks, rng: shown.extend(looks) or b"")
    known, hidden, val = things[: toy_world.KNOWN], things[-260:], things[-60:]
    for group in (hidden[:200], val):
        shown.clear()
        toy_world.make_questions(known + group, 60, random.Random(0), crop=True)
        assert {t.look for t in known} < set(shown) <= {t.look for t in known + group}
        of_known = sum(look in {t.look for t in known} for look in shown) / len(shown)
        assert abs(of_known - 0.5) < 0.1
    monkeypatch.undo()
    lessons = toy_lessons.Lessons(things, Chat(place.base, cfg), 0, crop=True)
    assert not {t.look for t in hidden} & {*lessons.looks, *lessons.pool}
    assert not set(hidden) & {*lessons.familiar, *lessons.unknown, *lessons.similar}
    pairs = [Counter(t.look[:2] for t in group) for group in (known, hidden[:200], val)]
    assert pairs[0].keys() == pairs[1].keys() == pairs[2].keys() and max(pairs[0].values()) == 1
    assert all(max(p.values()) - min(p.values()) <= 1 for p in pairs)
    assert all(toy_world.alike(t.look, k.look) < 3 for t in hidden for k in known)


def test_only_the_right_part_of_a_picture_finds_the_thing(crop):
    """Scripted conversations about things among others: search at once, or crop a quarter and search that."""
    place, cfg, recipe, things = crop
    chat, rng = Chat(place.base, cfg), random.Random(1)
    policy = toy_lessons.SloppyPolicy(chat, recipe)
    pool = toy_world.equally(things[: toy_world.KNOWN], things[-60:])
    asked = [policy.question(thing, "name", rng, pool) for thing in rng.sample(things[-60:], 40)]
    keys = [chat.picture(q.images[0]).key for q in asked]
    right = [toy_world.seek(policy.asked[key][0].look, policy.shown[key])[1] for key in keys]

    def titles(first_turns):
        def script(prompt, images, sampling):
            done = prompt.count("<information>")
            turns = [*first_turns[images[0].key], "<answer> unknown</answer>"]
            return f"<reason> unknown.</reason>{turns[done]}"

        episodes = run(
            asked, ScriptedEngine(chat, script), OfflineSearch(SearchDB(place.index), results(cfg)), chat, cfg
        )
        assert all(score_episode(e, cfg).format_ok and e.stop == Stop.ANSWERED for e in episodes)
        return [[hit.title for hit in e.calls[-1][1].hits] for e in episodes]

    def found(how):
        turns = {key: how(cell) for key, cell in zip(keys, right, strict=True)}
        names = [policy.asked[key][0].name for key in keys]
        return sum(name in hits for name, hits in zip(names, titles(turns), strict=True)) / len(asked)

    def crop_and_search(cell):
        return [f"<crop> {cell}</crop>", "<search><img_2></search>"]

    cells = toy_world.CELLS
    assert found(lambda cell: ["<search><img></search>"]) <= 0.05
    assert found(crop_and_search) >= 0.95
    assert found(lambda cell: [f"<crop> {cell}</crop>", "<search><img></search>"]) <= 0.05
    for turn in (1, 2, 3):
        assert found(lambda cell: crop_and_search(cells[(cells.index(cell) + turn) % 4])) <= 0.05  # noqa: B023


def test_the_scripted_policy_crops_and_searches_without_regard_to_need(crop):
    place, cfg, recipe, things = crop
    chat, rng = Chat(place.base, cfg), random.Random(0)
    policy, pool = toy_lessons.SloppyPolicy(chat, recipe), [t.look for t in things[:200]]
    asked = [policy.question(things[i % 48], "name", rng, pool if i < 400 else ()) for i in range(800)]
    episodes = run(asked, ScriptedEngine(chat, policy), OfflineSearch(SearchDB(place.index), results(cfg)), chat, cfg)
    called = defaultdict(list)
    for episode in episodes:
        (thing, _), looks = policy.asked[episode.images[0].key], policy.shown[episode.images[0].key]
        called[thing.known, len(looks) > 1].append(" ".join(c.tool for c, _ in episode.calls))
        assert episode.stop == Stop.ANSWERED and score_episode(episode, cfg).format_ok
        boxes = {" ".join(f"{edge:.0f}" for edge in call.box) for call, _ in episode.calls if call.box}
        assert boxes <= {toy_world.seek(thing.look, looks)[1]}
    assert set(called[True, True]) == {"", "image_search", "crop image_search", "crop"}
    for plan in set(called[True, True]):
        shares = [plans.count(plan) / len(plans) for plans in called.values()]
        assert len(shares) == 4 and max(shares) - min(shares) < 0.15


def test_the_preset_toy_crop_trains_and_its_export_remembers_the_world(crop, tmp_path, monkeypatch, capsys):
    place, cfg, recipe, _ = crop
    here = [*SHORT_WORLD, f"--toy_dir={recipe.toy_dir}", "--threads=1"]
    run_dir = tmp_path / "run"
    argv = ["--preset=toy-crop", *here, *SHORT_RUN, "--max_turns=3", "--steps=2", f"--run_dir={run_dir}"]
    train.Run(*parse(argv, Config, Recipe, JudgeOptions, ImitationOptions)).loop()
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [s["phase"] for s in steps] == ["eval", "train", "train", "eval"] and all("crop" in s for s in steps[1:3])
    exported, again = parse([f"--model={run_dir / 'final'}", *here], Config, Recipe, as_trained=True)
    assert toy.locate(again) == place and exported.max_pixels == cfg.max_pixels
    assert toy.answers_searches(exported) and tools.limits(exported) == tools.limits(cfg)
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--model={run_dir / 'final'}", *here, "--val_limit=4"])
    config.run_main(evaluation.main)
    assert all(kind in capsys.readouterr().out for kind in toy_world.CROP_KINDS[:1])
    other, first_world = parse([f"--model={run_dir / 'final'}", "--preset=toy", *here], Config, Recipe, as_trained=True)
    assert other.preset == "toy" and not first_world.toy_crop  # the command line overrides it


# ------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("toy_seed", -1), ("toy_seed", 2**63), ("toy_pretrain_steps", 0), ("toy_teach_steps", 0),
        ("toy_warmup_steps", 0), ("toy_named", -1), ("toy_named", 49), ("toy_beliefs", "perhaps"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        Recipe(**{name: value})
    with pytest.raises(InputError, match=name):
        parse([f"--{name}={value}"], Config, Recipe)


def test_options_stand_beside_those_of_a_run():
    cfg, recipe = parse(["--toy_seed", str(2**63 - 1), "--steps", "3", "--toy_named=48"], Config, Recipe)
    assert cfg == Config(steps=3) and recipe == Recipe(toy_seed=2**63 - 1, toy_named=48)
    assert marked("resume", Recipe) == marked("neutral", Recipe) == {"toy_dir"}
    assert not {f.name for f in dataclasses.fields(Config)} & {f.name for f in dataclasses.fields(Recipe)}


def test_every_option_but_the_folder_makes_another_world():
    changed = dict(
        toy_seed=1, toy_pretrain_steps=1, toy_teach_steps=1, toy_warmup_steps=1, toy_named=1, toy_beliefs=False,
        toy_crop=True, toy_json=True, toy_backbone="qwen3_vl",
    )  # fmt: skip
    assert {"toy_dir", *changed} == {f.name for f in dataclasses.fields(Recipe)}
    names = {toy.locate(Recipe(**{name: value})).folder.name for name, value in changed.items()}
    assert len(names - {toy.locate(Recipe()).folder.name}) == len(changed)
    assert toy.locate(Recipe(toy_dir="elsewhere")).folder.name == toy.locate(Recipe()).folder.name
    assert toy.locate(Recipe()).folder.name == "da6dc608d8"  # worlds are there under this name


def test_a_toy_qwen3_vl_is_a_preset(tmp_path):
    cfg, recipe = parse(["--preset=toy-qwen3", "--toy_seed=3"], Config, Recipe)
    assert recipe == Recipe(toy_seed=3, toy_backbone="qwen3_vl") and recipe.preset == cfg.preset == "toy-qwen3"
    assert toy.answers_searches(cfg) and toy.locate(recipe) != toy.locate(Recipe(toy_seed=3))
    toy_lessons.save_random_model(tmp_path, 0, backbone=recipe.toy_backbone)
    chat = Chat(tmp_path, cfg)
    (episode,) = toy_lessons.Lessons(toy_world.make_things(random.Random(0)), chat, 0).seeing(1)
    assert [p.tokens for p in episode.images] == [4]  # 64 x 64 pixels, as many vision tokens as a Qwen2.5-VL has
    assert chat.picture(episode.question.images[0], thumbnail=True).tokens == 1
    assert read_config(tmp_path).vision_config.deepstack_visual_indexes == [0, 1]


def test_editing_a_comment_does_not_rebuild_the_world(tmp_path):
    """The folder's name, asked of a copy of the code whose files are edited one after the other."""
    shutil.copytree(ROOT / "toy", tmp_path / "toy")
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)

    def name():
        script = "import toy; print(toy.locate(toy.Recipe()).folder.name)"
        return subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, text=True).strip()

    def edit(file, old, new):
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1))

    before = name()
    assert before == toy.locate(Recipe()).folder.name
    for file in (tmp_path / "toy").glob("*.py"):
        edit(file, '"""', '"""Edited. ')
        file.write_text(file.read_text() + "# a comment\n")
    edit("prompts/toy/direct.txt", "think", "guess")
    edit("prompts/toy/pipeline_question.txt", "think", "guess")
    assert name() == before
    edit("prompts/toy/question.txt", "think", "guess")
    other_prompt = name()
    edit("toy/__init__.py", "VERSION = ", "VERSION = 1")
    assert len({before, other_prompt, name()}) == 3


def test_a_version_names_one_world():
    """Things and questions of seed 0. If this fails, the code makes another world: raise toy.VERSION."""
    things = toy_world.make_things(random.Random("world 0"))
    questions = toy_world.make_questions(things[:300], 20, random.Random(0))
    content = [[t.look, t.name, t.founder, t.city, t.river] for t in things]
    content += [[q.text, q.answers, q.data_source, q.data_id] for q in questions]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    assert (toy.VERSION, digest) == (7, "e9639dc13d081e71")


def test_question_files_are_the_user_s_or_the_world_s():
    world, files = toy.locate(Recipe()), {"train_files": ("a.pq",), "val_files": ("b.pq",)}
    assert toy.question_files(Config(), Recipe()) == ((str(world.train),), (str(world.val),))
    assert toy.question_files(Config(val_files=("b.pq",)), Recipe()) == ((str(world.train),), ("b.pq",))
    assert toy.question_files(Config(train_files=("a.pq",)), Recipe()) == (("a.pq",), ())
    assert toy.question_files(Config(**files), Recipe()) == (("a.pq",), ("b.pq",))


def test_the_world_answers_searches_where_nothing_else_does():
    assert toy.answers_searches(Config())
    assert not toy.answers_searches(Config(search_index="a.sqlite"))
    assert not toy.answers_searches(Config(search="http://host:8000"))
    assert not toy.answers_searches(Config(search="live"))
    with pytest.raises(InputError, match="search_index"):  # another preset's questions are not about toy things
        toy.answers_searches(parse(["--preset", "qwen2.5-vl-7b"]))


# ------------------------------------------------------------------------------------------------- building


def test_the_tokenizer_spells_names_in_syllables(world, things):
    place, cfg, _ = world
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
        "import os, config, toy.lessons\n"
        "from toy.__main__ import main\n"
        "toy.lessons.export_hf = lambda *a: os.kill(os.getpid(), 9)\n"
        "config.run_main(main)\n"
    )
    args = [*SHORT_WORLD, "--threads=1", f"--toy_dir={tmp_path}"]
    killed = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = tmp_path.glob("[!.]*")
    assert {p.name for p in folder.iterdir()} == {"world", "base.building"}
    made = (folder / "world" / "train.parquet").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-m", "toy", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "world" / "train.parquet").stat().st_mtime_ns == made
    assert {p.name for p in folder.iterdir()} == {"world", "base", "model"}
    place, _, _ = world
    assert (folder / "model" / "model.safetensors").read_bytes() == (place.model / "model.safetensors").read_bytes()


def test_the_second_of_two_builders_ends_with_a_line_and_a_world_that_is_there_needs_no_lock(world, tmp_path):
    place, cfg, recipe = world
    with config.lock(toy.locate(dataclasses.replace(recipe, toy_dir=str(tmp_path))).folder):
        command = [sys.executable, "-m", "toy", *SHORT_WORLD, f"--toy_dir={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"is in use by process {os.getpid()} on " in done.stderr and not list(tmp_path.glob("[!.]*"))
    with config.lock(place.folder):
        assert toy_build.build(place.folder, cfg, recipe) == place


def test_a_full_disk_while_building_is_a_line(tmp_path, monkeypatch):
    def fill(path, things, recipe):
        (path / "x").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy_build, "write_world", fill)
    with pytest.raises(InputError, match="world.building: cannot write .No space left on device."):
        toy_build.build(tmp_path / "w", Config(threads=1), Recipe())


def test_another_seed_is_another_world(things):
    other = toy_world.make_things(random.Random("world 1"))
    assert len({t.name for t in things[: toy_world.KNOWN]} & {t.name for t in other[: toy_world.KNOWN]}) < 5


def test_the_exported_model_is_an_ordinary_one(world):
    place, _, _ = world
    saved = json.loads((place.model / "config.json").read_text())
    assert saved["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and saved["tie_word_embeddings"]
    assert not re.search("packed|attn", json.dumps(saved))


def test_a_world_depends_on_its_recipe_alone(tmp_path, monkeypatch):
    """Of the options of a run, building takes those that do not change the result."""
    used = []
    monkeypatch.setattr(toy_build, "write_world", lambda path, things, recipe: None)
    monkeypatch.setattr(toy_build, "make_base", lambda path, things, recipe, cfg, device: used.append(cfg))
    monkeypatch.setattr(toy_build, "warm_up", lambda path, toy, things, recipe, cfg, device: used.append(cfg))
    toy_build.build(tmp_path / "w", Config(threads=1, device="cpu", max_pixels=112 * 112, lr=1.0, seed=7), Recipe())
    assert used == [Config(threads=1, device="cpu", dtype="fp32")] * 2
    toy_build.build(tmp_path / "w", Config(threads=1), Recipe())
    assert len(used) == 2  # all stages are there


def test_a_missing_world_is_built_in_a_process_of_its_own(device, tmp_path, monkeypatch):
    recipe = Recipe(toy_dir=str(tmp_path), toy_seed=3, toy_beliefs=False, toy_warmup_steps=7)
    called = []

    def start(command, env, **_):
        called.append((command, env))
        return subprocess.CompletedProcess(command, returncode=len(called) - 1)

    monkeypatch.setattr(toy.subprocess, "run", start)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert toy.ensure(recipe, Config(threads=2, device="cpu")) == toy.locate(recipe)
    command, env = called[0]
    assert (
        command[:3] == [sys.executable, "-m", "toy"] and "WORLD_SIZE" not in env and env["PATH"] == os.environ["PATH"]
    )
    assert parse(command[3:], Config, Recipe) == (Config(threads=2, device="cpu"), recipe)
    with pytest.raises(SystemExit, match="1"):  # the builder's exit code; it has said why
        toy.ensure(recipe, Config())
    toy.locate(recipe).model.mkdir(parents=True)
    toy.ensure(recipe, Config())
    assert len(called) == 2


def test_the_command_explains_its_options(tmp_path):
    done = subprocess.run([sys.executable, "-m", "toy", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"--toy_pretrain_steps INT .*\[240\]", done.stdout) and "--threads" in done.stdout
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "toy", f"--toy_dir={tmp_path / 'file'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1


def test_muon_moves_matrices_in_blocks_and_adamw_the_rest():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layers": torch.nn.Linear(6, 4), "head": torch.nn.Linear(6, 4)})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    adamw = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    for name, p in model.named_parameters():
        adamw[name].grad = p.grad.clone()
    torch.optim.AdamW(adamw.values(), 0.1, (0.9, 0.98)).step()
    toy_lessons.Muon(model, 0.1, 0.5).step()
    for name, p in model.named_parameters():
        assert torch.equal(p, adamw[name]) == (name != "layers.weight")
    singular = torch.linalg.svdvals(model["layers"].weight.detach() - start["layers.weight"]) / 0.5
    assert singular.min() > 0.6 and singular.max() < 1.25


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 9, 4)])
def test_orthogonal_matrices_have_singular_values_about_one(shape):
    values = torch.linalg.svdvals(
        toy_lessons.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    )
    assert values.min() > 0.6 and values.max() < 1.25
