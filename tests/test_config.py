"""The configuration: presets, command line, types, impossible combinations, and the one line that bad input earns."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from typing import get_args, get_type_hints

import pytest
from conftest import ROOT

import config
import policy
import search.__main__ as search_commands
import tools
import toy
from analysis.compare import CompareOptions
from analysis.curves import CurvesOptions
from analysis.imitation import ImitationOptions
from analysis.judge import JudgeOptions, JudgesOptions
from analysis.labels import LabelOptions
from analysis.plan import PlanOptions
from analysis.report import ReportOptions
from config import PRESETS, SEARCH_ENGINES, Config, InputError, from_dict, marked, parse, run_main, save
from eval import EvalOptions
from search.live import ENGINES
from search.service import SearchServer

COMMANDS = search_commands.FVQAOptions, search_commands.IndexOptions, search_commands.AskOptions
KINDS = (
    Config, EvalOptions, toy.Recipe, JudgesOptions, ImitationOptions, LabelOptions, CompareOptions, PlanOptions,
    ReportOptions, CurvesOptions, search_commands.ServeOptions, search_commands.ImagesOptions, *COMMANDS,
)  # fmt: skip
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]
NUMBERS = [(kind, field) for kind, field in FIELDS if get_type_hints(kind)[field.name] in (int, float)]
CHOICES = [(kind, field) for kind, field in FIELDS if isinstance(field.metadata["allowed"], tuple)]
needed = {  # what an object cannot be made without, or a field not be set without
    search_commands.FVQAOptions: {"file": "f", "out": "o"},
    search_commands.AskOptions: {"file": "f"},
    (EvalOptions, "image"): {"question": "q"},
    (Config, "carry_over"): {"importance_cap": 2.0},
    (Config, "tensor_parallel"): {"engine": "vllm"},
}


def each(pairs):
    """Parameters kind and field of a test, with readable ids."""
    ids = [f"{kind.__name__}.{field.name}" for kind, field in pairs]
    return pytest.mark.parametrize(("kind", "field"), pairs, ids=ids)


def made(kind, **values):
    """An object of this kind, with what it needs."""
    others = [needed.get(kind, {}), *(needed.get((kind, name), {}) for name in values)]
    return kind(**{name: value for other in others for name, value in other.items()} | values)


def refused(*argv, kind=Config, **values) -> str:
    """The message with which a command line, or a construction, is refused."""
    with pytest.raises(InputError) as error:
        parse(list(argv), kind) if argv else made(kind, **values)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def another(kind, field):
    """(text on the command line, value) of a field, valid and not its default."""
    hint, default, allowed = get_type_hints(kind)[field.name], field.default, field.metadata["allowed"]
    kinds = get_args(hint) or (hint,)
    if field.name == "preset":
        return "qwen2.5-vl-3b", "qwen2.5-vl-3b"
    if field.name == "judges":
        return "llm", ("llm",)
    if field.name == "search_engine":
        return "serper", "serper"
    if isinstance(allowed, tuple):
        value = next(c for c in reversed(allowed) if c != default)
        return value, (value,) if isinstance(default, tuple) else value
    if bool in kinds:
        return str(not default).lower(), not default
    if int in kinds:
        value = default - 1 if field.name == "thumb_min_pixels" else default + 1
        return str(value), value
    if field.name in ("importance_cap", "trust_bound"):
        return "1.5", 1.5
    if float in kinds:
        return "0.375", 0.375
    if field.name in ("tool_limits", "tool_results"):
        return "crop=3", ("crop=3",)
    if hint == tuple[str, ...]:
        return "some file.pq", ("some file.pq",)
    if field.name.endswith("_url") or field.name == "search":
        return "http://host:8000/v1", "http://host:8000/v1"
    return "some text", "some text"


# ----------------------------------------------------------------------------------------------------- presets


def test_the_default_is_the_preset_toy():
    assert parse([]) == Config() == parse(["--preset", "toy"]) and PRESETS["toy"] == {}


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("toy")])
def test_presets_construct_with_an_index_and_say_so_without(name):
    cfg = parse([f"--preset={name}", "--search_index=web.sqlite"])
    assert cfg.preset == name and cfg.run_dir == f"runs/{name}"
    assert all(getattr(cfg, key) == value for key, value in PRESETS[name].items())
    assert not toy.answers_searches(cfg)
    with pytest.raises(InputError, match=f"preset {name} needs --search_index"):
        toy.answers_searches(parse([f"--preset={name}"]))


def test_the_recipe_of_the_script_and_of_the_paper():
    script, paper = (
        parse([f"--preset={name}", "--search_index=i"]) for name in ("qwen2.5-vl-7b", "qwen2.5-vl-7b-paper")
    )
    assert (script.prompts_per_step, script.samples_per_prompt, script.lr, script.kl_coef) == (32, 4, 2e-6, 0.001)
    assert (script.max_prompt_tokens, script.max_tokens_per_turn, script.max_tokens) == (4096, 2048, 8192)
    assert (script.min_pixels, script.max_pixels) == (512**2, 672**2 * 2)
    assert (script.schedule, policy.SIGMOID_MIDPOINT, policy.MIN_LR_FACTOR) == ("sigmoid", 45, 0.05)
    assert (script.search_penalty, script.format_weight, script.per_search_penalty) == (0.1, 0.1, False)
    assert (script.max_turns, tools.limits(script)) == (3, {"image_search": 1, "text_search": 2, "crop": 0, "visit": 0})
    assert tools.results(script) == {"image_search": 5, "text_search": 5, "crop": 1, "visit": 1}
    assert (script.clip_low, script.clip_high, script.temperature, script.entropy_coef) == (0.2, 0.2, 1.0, 0.0)
    assert (paper.prompts_per_step, paper.samples_per_prompt, paper.updates_per_step) == (512, 8, 512 // 128)
    assert (paper.schedule, paper.steps, paper.eval_every, paper.val_limit) == ("constant", 50, 10, 0)


def test_an_evaluation_asks_all_questions_whatever_the_preset_validates_on():
    preset = ["--preset=qwen2.5-vl-7b", "--search_index=i"]
    assert parse(preset).val_limit == 256 and parse(preset, as_trained=True).val_limit == 0
    assert parse([*preset, "--val_limit=9"], as_trained=True).val_limit == 9


@pytest.mark.parametrize(
    "argv", [["--steps=7", "--preset=qwen2.5-vl-7b"], ["--preset", "qwen2.5-vl-7b", "--steps", "7"]]
)
def test_the_command_line_goes_over_the_preset_wherever_it_stands(argv):
    cfg = parse([*argv, "--search_index=i"])
    assert (cfg.steps, cfg.lr) == (7, 2e-6)


def test_preset_folders_of_prompts_exist():
    for name in PRESETS:
        assert (ROOT / parse([f"--preset={name}", "--search_index=i"]).prompts / "question.txt").is_file()


# ------------------------------------------------------------------------------------------------ command line


@each(FIELDS)
@pytest.mark.parametrize("joined", [True, False], ids=["--key=value", "--key value"])
def test_every_field_can_be_set_both_ways_and_changes_nothing_else(kind, field, joined):
    text, value = another(kind, field)
    others = {**needed.get(kind, {}), **needed.get((kind, field.name), {})}
    others.pop(field.name, None)
    argv = [f"--{field.name}={text}"] if joined else [f"--{field.name}", text]
    options = parse([*argv, *(f"--{key}={others[key]}" for key in others)], kind)
    found = getattr(options, field.name)
    if field.name in ("tool_limits", "tool_results"):  # what is given is added to what is there
        value = (*field.default, *value)
    assert found == value != field.default and type(found) is type(value)
    if field.name == "preset":
        others |= PRESETS[value]
    assert options == kind(**{**others, field.name: value})


def test_several_kinds_of_options_from_one_command_line():
    cfg, options, recipe = parse(["--samples=2", "--toy_seed=3", "--steps=4"], Config, EvalOptions, toy.Recipe)
    assert (cfg, options, recipe) == (Config(steps=4), EvalOptions(samples=2), toy.Recipe(toy_seed=3))
    assert "--samples" in refused("--samples=2") and "--steps" in refused("--steps=2", kind=EvalOptions)
    names = [field.name for kind in (Config, EvalOptions, toy.Recipe) for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))
    values = config.as_dict(cfg, options, recipe)
    assert values.keys() == set(names) and from_dict(Config, values) == cfg and from_dict(toy.Recipe, values) == recipe


@pytest.mark.parametrize("text, value", [(t, True) for t in ("true", "1", "yes", "on", "True", "ON")]
                         + [(t, False) for t in ("false", "0", "no", "off", "False", "OFF")])  # fmt: skip
def test_forms_of_a_bool(text, value):
    assert parse(["--any_order", text]).any_order is value
    assert parse([f"--deterministic={text}"]).deterministic is value


def test_a_bool_alone_is_true_and_auto_is_the_default_of_the_one_that_has_it():
    assert parse(["--skip_bad_rows", "--deterministic", "--steps=3"]) == Config(
        skip_bad_rows=True, deterministic=True, steps=3
    )
    assert parse(["--deterministic=auto"]).deterministic is None
    assert "skip_bad_rows" in refused("--skip_bad_rows=auto")


def test_several_files():
    assert parse(["--train_files", "a.pq", "b.pq", "--steps=1"]).train_files == ("a.pq", "b.pq")
    assert parse(["--train_files=a.pq", "--train_files", "b.pq", "c.pq"]).train_files == ("a.pq", "b.pq", "c.pq")
    assert "train_files" in refused("--train_files")


def test_numbers_as_people_write_them():
    assert parse(["--lr", "3e-4"]).lr == 3e-4
    lr = parse(["--lr=1"]).lr
    assert lr == 1.0 and type(lr) is float and type(Config(lr=1).lr) is float
    assert "entropy_coef=-1.0" in refused("--entropy_coef", "-1")  # a value, not an option


@pytest.mark.parametrize("argv, key, hint", [
    (["--lrr", "3"], "--lrr", "--lr?"),
    (["--train-files=a"], "--train-files", "--train_files?"),
    (["--max_token", "3"], "--max_token", "--max_tokens?"),  # no abbreviations
    (["--learning_rate_of_everything=3"], "--learning_rate_of_everything", "--help"),
    (["stray"], "stray", "--help"),
    (["--steps", "3", "4"], "4", "--help"),
])  # fmt: skip
def test_unknown_arguments_are_named_and_the_nearest_suggested(argv, key, hint):
    message = refused(*argv)
    assert key in message and message.endswith(hint)


@pytest.mark.parametrize("argv", [
    ["--steps", "three"], ["--steps=3.5"], ["--steps=1e3"], ["--steps="], ["--steps"], ["--lr=fast"], ["--lr", "0,1"],
    ["--any_order=maybe"], ["--run_dir"], ["--preset"],
])  # fmt: skip
def test_wrong_types_on_the_command_line_name_the_field(argv):
    assert argv[0].split("=")[0].removeprefix("--") in refused(*argv)


def test_help_lists_every_field_with_default_and_meaning_in_groups(capsys):
    kinds = {"The options of a run": Config, "The options of an evaluation": EvalOptions, "The toy world": toy.Recipe}
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], *kinds.values())
    assert stop.value.code == 0
    text = capsys.readouterr().out
    parts = re.split(r"^(\S.*):$", text, flags=re.M)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert max(map(len, text.splitlines())) <= 120
    for group, kind in kinds.items():
        for field in dataclasses.fields(kind):
            entry = re.search(rf"^  --{field.name} .*?(?=^  -|\Z)", groups[group], re.M | re.S)
            assert entry, f"{field.name} is not in group {group}"
            words = " ".join(entry[0].split())
            default = {None: "auto", "": "-", (): "-"}.get(field.default, field.default)
            default = " ".join(default) if isinstance(default, tuple) else default
            assert " ".join(field.metadata["help"].split()) in words and words.endswith(f"[{default}]")
            allowed = field.metadata["allowed"]
            for choice in allowed if not isinstance(allowed, str) else ():
                assert choice in words.replace("- ", "-")  # a line may end at a hyphen


# -------------------------------------------------------------------------------------------- what is refused


@each(FIELDS)
def test_wrong_types_at_construction_name_the_field(kind, field):
    hint = get_type_hints(kind)[field.name]
    kinds = get_args(hint) or (hint,)
    wrong = [object(), b"x", {}] + ([] if str in kinds else ["x"]) + ([] if bool in kinds else [True])
    wrong += [] if type(None) in kinds else [None]
    wrong += [1.5] if float not in kinds else [float("nan"), float("inf"), -float("inf")]
    wrong += [[1], "a.pq"] if hint == tuple[str, ...] else [["x"]]
    for value in wrong:
        assert field.name in refused(kind=kind, **{field.name: value})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@each([(kind, field) for kind, field in NUMBERS if get_type_hints(kind)[field.name] is float])
def test_every_float_must_be_finite(kind, field, text):
    assert f"{field.name}=" in refused(f"--{field.name}={text}", kind=kind)


POSITIVE = (
    "prompts_per_step samples_per_prompt max_turns max_tokens_per_turn max_tokens max_prompt_tokens concurrency "
    "tensor_parallel updates_per_step epochs_per_step max_tokens_per_batch keep_last "
    "min_pixels max_pixels thumb_min_pixels thumb_max_pixels lr temperature max_grad_norm "
    "toy_pretrain_steps toy_teach_steps toy_warmup_steps gpu_memory search_deadline samples count "
    "judge_threads"
).split()
SHARES = "search_penalty format_weight clip_low balance sft_min_reward".split()


@each(NUMBERS)
def test_every_number_has_a_lower_bound_and_shares_an_upper_one(kind, field):
    name = field.name
    assert name in refused(kind=kind, **{name: -1})
    if name in POSITIVE:
        assert name in refused(kind=kind, **{name: 0})
    else:
        assert getattr(made(kind, **{name: 0}), name) == 0
    if name in SHARES:
        assert name in refused(kind=kind, **{name: 1.01}) and getattr(made(kind, **{name: 1}), name) == 1
    if name == "adam_beta2":
        assert name in refused(**{name: 1.0})
    if name in ("seed", "toy_seed") and kind is not LabelOptions:
        largest = 2**63 - 1
        assert name in refused(kind=kind, **{name: largest + 1})
        assert getattr(made(kind, **{name: largest}), name) == largest
    if name == "toy_named":
        assert name in refused(kind=kind, toy_named=49) and made(kind, toy_named=48).toy_named == 48


@each(CHOICES)
def test_choices(kind, field):
    message, allowed = refused(f"--{field.name}=other", kind=kind), field.metadata["allowed"]
    several = isinstance(field.default, tuple)
    assert field.name in message and all(choice in message for choice in allowed)
    for choice in allowed:
        value = (choice,) if several else choice
        assert getattr(made(kind, **{field.name: value}), field.name) == value


def needs_index(**values):
    """What train.py asks of the configuration before it opens the search."""
    toy.answers_searches(Config(**values))


def limits(**values):
    """What is asked of the configuration before the first conversation."""
    cfg = Config(**values)
    numbers = (tools.limits(cfg), tools.results(cfg))
    return tuple({name: of[name] for name in ("image_search", "text_search")} for of in numbers)


@pytest.mark.parametrize("words, check, values", [
    ("samples_per_prompt", Config, dict(samples_per_prompt=1)),
    ("min_pixels max_pixels", Config, dict(min_pixels=7057, max_pixels=7056)),
    ("thumb_min_pixels thumb_max_pixels", Config, dict(thumb_min_pixels=1025)),
    ("max_tokens_per_turn max_tokens", Config, dict(max_tokens_per_turn=250)),
    ("max_prompt_tokens max_tokens", Config, dict(max_prompt_tokens=250)),
    ("max_tokens_per_batch max_tokens", Config, dict(max_tokens_per_batch=249)),
    ("updates_per_step prompts_per_step", Config, dict(updates_per_step=3)),
    ("updates_per_step prompts_per_step", Config, dict(updates_per_step=40)),
    ("tensor_parallel vllm", Config, dict(tensor_parallel=2)),
    ("deterministic torch", Config, dict(deterministic=True, engine="vllm")),
    ("resume overwrite", Config, dict(resume="auto", overwrite=True)),
    ("image question", EvalOptions, dict(image="a.jpg")),
    ("files question", EvalOptions, dict(files=("a.pq",), question="what?")),
    ("files question", EvalOptions, dict(files=("a.pq",), question="what?", image="a.jpg")),
    ("attention device", Config, dict(attention="flash", device="cpu")),
    ("attention device", Config, dict(attention="varlen", device="cpu")),
    ("attention dtype", Config, dict(attention="flash", dtype="fp32")),
    ("deterministic rollout_deadline", Config, dict(deterministic=True, rollout_deadline=5.0)),
    ("deterministic web", Config, dict(deterministic=True, search="live")),
    ("deterministic web", Config, dict(deterministic=True, search="record", search_cache="c")),
    ("deterministic web", Config, dict(deterministic=True, search="http://host:1")),
    ("deterministic match judge", Config, dict(deterministic=True, reward="judge")),
    ("sft match judge", Config, dict(loss="sft", reward="judge")),
    ("search_deadline million", Config, dict(search_deadline=1.1e6)),
    ("rollout_deadline million", Config, dict(rollout_deadline=10**18)),
    ("lr 2**63", Config, dict(lr=10**400)),
    ("steps 2**63", Config, dict(steps=10**30)),
    ("tool_limits nonsense", Config, dict(tool_limits=("nonsense",))),
    ("tool_results crop=x", Config, dict(tool_results=("image_search=1", "crop=x"))),
    ("search_index", needs_index, dict(preset="qwen2.5-vl-7b")),
    ("judges em llm", JudgesOptions, dict(judges=("em", "gpt"))),
    ("judge_url", JudgesOptions, dict(judge_url="ftp://judge/v1")),
    ("judge_url password", JudgesOptions, dict(judge_url="https://me:secret@judge/v1")),
    ("judge_url", JudgesOptions, dict(judge_url="")),
    ("record search_cache", Config, dict(search="record")),
    ("replay search_cache", Config, dict(search="replay")),
    ("reader_url", Config, dict(reader_url="")),
    ("search offline replay URL", Config, dict(search="localhost:8100")),
    ("search password", Config, dict(search="http://me:secret@host:8100")),
    ("search_engine", Config, dict(search_engine="serpapi=https://name:word@host")),  # no secrets in config.json
    ("search_engine", Config, dict(search_engine="serper=https://host/?api_key=x")),
    ("search_engine", Config, dict(search_engine="serper=")),
    ("search_engine serpapi serper", Config, dict(search_engine="bing")),
    ("image_host", Config, dict(image_host="ftp://host")),
    ("tool_limits image_search", limits, dict(tool_limits=("image_search=-1",))),
    ("tool_limits text_search", limits, dict(tool_limits=("zoom=1",))),
    ("tool_results text_search=0.5", limits, dict(tool_results=("text_search=0.5",))),
    ("tool_results text_search", limits, dict(tool_results=("text_search",))),
    ("address", SearchServer, dict(address="localhost", search=None)),
    ("address", SearchServer, dict(address="localhost:99999", search=None)),
])  # fmt: skip
def test_impossible_combinations(words, check, values):
    with pytest.raises(InputError) as error:
        check(**values)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words.split())


@pytest.mark.parametrize("check, values", [
    (Config, dict(samples_per_prompt=2)), (Config, dict(min_pixels=784, max_pixels=784)),
    (Config, dict(min_pixels=785, max_pixels=1568)), (Config, dict(max_tokens_per_turn=249)),
    (Config, dict(max_prompt_tokens=249)), (Config, dict(max_tokens_per_batch=250)),
    (Config, dict(updates_per_step=14)), (Config, dict(resume="auto")), (EvalOptions, dict(question="what?")),
    (EvalOptions, dict(question="what?", image="a.jpg")), (Config, dict(attention="flash", dtype="bf16")),
    (Config, dict(attention="segments", device="cpu", dtype="fp32")), (Config, dict(rollout_deadline=5.0)),
    (Config, dict(rollout_deadline=5.0, deterministic=False)), (Config, dict(tensor_parallel=2, engine="vllm")),
    (Config, dict(search="http://node0:8100")),
    (Config, dict(search="replay", search_cache="c")), (Config, dict(summarizer_url="http://127.0.0.1:8000/v1")),
    (Config, dict(deterministic=True, search="replay", search_cache="c")),
    (Config, dict(image_host="upload --to host")), (Config, dict(image_host="https://host/pictures")),
    (Config, dict(search_engine="serper")), (Config, dict(search_engine="serpapi=http://127.0.0.1:8000/search")),
])  # fmt: skip
def test_possible_combinations_at_the_edge(check, values):
    assert dataclasses.asdict(check(**values)).items() >= values.items()


@pytest.mark.parametrize("values, toy_index", [
    (dict(), True), (dict(search_index="i"), False), (dict(search="live"), False),
    (dict(preset="qwen2.5-vl-7b", search_index="i"), False), (dict(preset="qwen2.5-vl-7b", search="live"), False),
    (dict(preset="qwen2.5-vl-7b", search="http://node0:8100"), False),
])  # fmt: skip
def test_who_answers_searches(values, toy_index):
    assert toy.answers_searches(Config(**values)) is toy_index


def test_search_engines_have_the_names_that_the_option_takes():
    assert SEARCH_ENGINES == tuple(ENGINES)


def test_limits_and_results_of_tools():
    assert limits() == ({"image_search": 1, "text_search": 2}, {"image_search": 3, "text_search": 3})
    chosen = dict(tool_limits=("text_search=0", "image_search=4"), tool_results=("text_search=7",))
    assert limits(**chosen) == ({"image_search": 4, "text_search": 0}, {"image_search": 5, "text_search": 7})


@pytest.mark.parametrize("mark, names", [
    ("resume", "resume accept_changes overwrite run_dir steps save_every keep_last eval_every val_limit "
               "threads deterministic concurrency rollout_deadline log search search_cache "
               "search_budget search_deadline search_engine reader_url summarizer_url image_host allow_hosts toy_dir "
               "judge_url judge_cache judge_threads"),
    ("neutral", "run_dir resume accept_changes overwrite threads log concurrency toy_dir "
                "search_budget search_deadline image_host allow_hosts out reward"),
    ("model", "preset prompts min_pixels max_pixels thumb_min_pixels thumb_max_pixels max_prompt_tokens dialect "
              "max_turns tool_limits tool_results max_tokens_per_turn max_result_tokens max_tokens"),
])  # fmt: skip
def test_marks(mark, names):
    """What a resumed run may change, what an interrupted evaluation may continue with, what an export keeps."""
    kinds = (Config, toy.Recipe, JudgeOptions) if mark == "resume" else (Config, EvalOptions, toy.Recipe)
    assert marked(mark, *kinds) == set(names.split())


def test_every_mark_is_known():
    assert {mark for _, field in FIELDS for mark in field.metadata["marks"]} == {"resume", "neutral", "model"}


def test_a_config_is_frozen_and_copies_are_checked_again():
    cfg = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1.0
    with pytest.raises(InputError):
        dataclasses.replace(cfg, lr=-1.0)
    assert hash(cfg) == hash(Config())


def test_no_field_holds_a_secret():
    """config.json is written into the run directory: keys and passwords come from the environment."""
    words = {word for _, field in FIELDS for word in field.name.split("_")}
    assert words.isdisjoint({"key", "keys", "secret", "password", "credential", "credentials", "auth", "token", "api"})


# --------------------------------------------------------------------------------------------- save, run_main


def test_save_round_trips_and_replaces_in_one_go(tmp_path, monkeypatch):
    path, cfg = tmp_path / "config.json", Config(train_files=("ä.pq", "b"), deterministic=False, lr=1e-7, run_dir="x\n")
    save(path, cfg)
    assert Config(**json.loads(path.read_text())) == cfg and os.listdir(tmp_path) == ["config.json"]
    before = path.read_bytes()

    def killed(source, target):
        assert str(target) == str(path) and path.read_bytes() == before  # nothing was written in place
        assert Config(**json.loads(open(source).read())) == Config()
        raise KeyboardInterrupt

    monkeypatch.setattr(config.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, Config())
    assert path.read_bytes() == before


def leave(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    return stop.value.code


def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch):
    assert leave(InputError("a.pq: \nnot good\r\n  at all")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "error: a.pq:  not good   at all\n"
    assert leave(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "1")  # gives rank 0 the time to say it, and then says it: it may be the only one
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert leave(InputError("x")) == 2 and waited == [5]
    assert capsys.readouterr() == ("", "error (rank 1): x\n")


def test_other_errors_surface():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_main(main)


def test_the_command_line_of_a_script():
    done = subprocess.run(
        [sys.executable, "eval.py", "--lrr", "3"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown argument '--lrr'; did you mean --lr?\n"


def test_what_is_given_of_one_tool_leaves_the_others_as_they_are():
    cfg = parse(["--tool_results", "text_search=1", "--tool_limits", "image_search=0"])
    assert tools.results(cfg) == {**tools.results(Config()), "text_search": 1}
    assert tools.limits(cfg) == {**tools.limits(Config()), "image_search": 0}
    assert tools.results(parse(["--preset=qwen2.5-vl-7b", "--tool_results=text_search=1"]))["image_search"] == 5
    assert tools.results(Config(tool_results=("text_search=1",)))["image_search"] == 5  # the tool's own
