"""The configuration: presets, command line, types, impossible combinations, and the one line that bad input earns."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from conftest import ROOT

import config
from config import PRESETS, SECTIONS, Config, InputError, parse, run_main, save

HINTS = get_type_hints(Config)
FIELDS = dataclasses.fields(Config)


def refused(*argv, **values) -> str:
    """The message with which a command line, or a construction, is refused."""
    with pytest.raises(InputError) as error:
        parse(list(argv)) if argv else Config(**values)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def another(field):
    """(text on the command line, value) of a field, valid and not its default."""
    kinds, default = get_args(HINTS[field.name]) or (HINTS[field.name],), field.default
    if field.name == "preset":
        return "qwen2.5-vl-3b", "qwen2.5-vl-3b"
    if field.name == "judges":
        return "llm", ("llm",)
    if field.name == "judge_url":
        return "http://localhost:8000/v1", "http://localhost:8000/v1"
    if field.metadata["choices"]:
        value = next(c for c in reversed(field.metadata["choices"]) if c != default)
        return value, value
    if bool in kinds:
        return str(not default).lower(), not default
    if int in kinds:
        value = default - 1 if field.name == "thumb_min_pixels" else default + 1
        return str(value), value
    if field.name in ("importance_cap", "trust_bound"):
        return "1.5", 1.5
    if float in kinds:
        return "0.375", 0.375
    if HINTS[field.name] == tuple[str, ...]:
        return "some file.pq", ("some file.pq",)
    if field.name.endswith("_url"):
        return "http://host:8000/v1", "http://host:8000/v1"
    if field.name == "serve_address":
        return "0.0.0.0:80", "0.0.0.0:80"
    return "some text", "some text"


NEEDED = {  # by what a field has to be accompanied
    "image": {"question": "q"},
    "preset": {"search_index": "i"},
    "search": {"search_cache": "c"},
    "tensor_parallel": {"engine": "vllm"},
}


# ----------------------------------------------------------------------------------------------------- presets


def test_the_default_is_the_preset_toy():
    assert parse([]) == Config() == parse(["--preset", "toy"]) and PRESETS["toy"] == {}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "toy"])
def test_presets_construct_with_an_index_and_say_so_without(name):
    cfg = parse([f"--preset={name}", "--search_index=web.sqlite"])
    assert cfg.preset == name and cfg.run_dir == f"runs/{name}"
    assert all(getattr(cfg, key) == value for key, value in PRESETS[name].items())
    assert "search_index" in refused("--preset", name)


def test_the_recipe_of_the_script_and_of_the_paper():
    script, paper = (
        parse([f"--preset={name}", "--search_index=i"]) for name in ("qwen2.5-vl-7b", "qwen2.5-vl-7b-paper")
    )
    assert (script.prompts_per_step, script.samples_per_prompt, script.lr, script.kl_coef) == (32, 4, 2e-6, 0.001)
    assert (script.max_prompt_tokens, script.max_tokens_per_turn, script.max_tokens) == (4096, 2048, 8192)
    assert (script.min_pixels, script.max_pixels) == (512**2, 672**2 * 2)
    assert (script.schedule, script.sigmoid_midpoint, script.min_lr_factor) == ("sigmoid", 45, 0.05)
    assert (script.search_penalty, script.format_weight, script.per_search_penalty) == (0.1, 0.1, False)
    assert (script.max_turns, script.max_image_searches, script.max_text_searches) == (3, 1, 2)
    assert (script.clip_low, script.clip_high, script.temperature, script.entropy_coef) == (0.2, 0.2, 1.0, 0.0)
    assert (paper.prompts_per_step, paper.samples_per_prompt, paper.updates_per_step) == (512, 8, 512 // 128)


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


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
@pytest.mark.parametrize("joined", [True, False], ids=["--key=value", "--key value"])
def test_every_field_can_be_set_both_ways_and_changes_nothing_else(field, joined):
    text, value = another(field)
    needed = NEEDED.get(field.name, {})
    argv = [f"--{field.name}={text}"] if joined else [f"--{field.name}", text]
    cfg = parse([*argv, *(f"--{key}={needed[key]}" for key in needed)])
    assert getattr(cfg, field.name) == value != field.default and type(getattr(cfg, field.name)) is type(value)
    others = {**needed, **(PRESETS[value] if field.name == "preset" else {})}
    assert cfg == Config(**{**others, field.name: value})


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
    assert "neither true nor false" in refused("--skip_bad_rows=auto")


def test_several_files():
    assert parse(["--train_files", "a.pq", "b.pq", "--steps=1"]).train_files == ("a.pq", "b.pq")
    assert parse(["--train_files=a.pq", "--train_files", "b.pq", "c.pq"]).train_files == ("a.pq", "b.pq", "c.pq")
    assert "train_files" in refused("--train_files")


def test_numbers_as_people_write_them():
    assert parse(["--lr", "3e-4"]).lr == 3e-4
    lr = parse(["--lr=1"]).lr
    assert lr == 1.0 and type(lr) is float and type(Config(lr=1).lr) is float
    assert "min_lr_factor=-1.0" in refused("--min_lr_factor", "-1")  # a value, not an option


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
    assert argv[0].split("=")[0] in refused(*argv)


def test_help_lists_every_field_with_default_and_meaning_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    parts = re.split(r"^(\S.*):$", text, flags=re.M)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert max(map(len, text.splitlines())) <= 120
    group = None
    for field in FIELDS:
        group = SECTIONS.get(field.name, group)
        entry = re.search(rf"^  --{field.name} .*?(?=^  -|\Z)", groups[group], re.M | re.S)
        assert entry, f"{field.name} is not in group {group}"
        words = " ".join(entry[0].split())
        default = {None: "auto", "": "-", (): "-"}.get(field.default, field.default)
        assert " ".join(field.metadata["help"].split()) in words and words.endswith(f"[{default}]")
        for choice in PRESETS if field.name == "preset" else field.metadata["choices"] or ():
            assert choice in words
    assert set(SECTIONS.values()) <= set(groups)


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_wrong_types_at_construction_name_the_field(field):
    kinds = get_args(HINTS[field.name]) or (HINTS[field.name],)
    wrong = [object(), b"x", {}] + ([] if str in kinds else ["x"]) + ([] if bool in kinds else [True])
    wrong += [] if type(None) in kinds else [None]
    wrong += [1.5] if float not in kinds else [float("nan"), float("inf"), -float("inf")]
    wrong += [[1], "a.pq"] if HINTS[field.name] == tuple[str, ...] else [["x"]]
    for value in wrong:
        assert field.name in refused(**{field.name: value})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("name", [f.name for f in FIELDS if HINTS[f.name] is float])
def test_every_float_must_be_finite(name, text):
    assert f"{name}=" in refused(f"--{name}={text}")


POSITIVE = (
    "prompts_per_step samples_per_prompt max_turns max_tokens_per_turn max_tokens max_prompt_tokens concurrency "
    "tensor_parallel "
    "tool_threads image_results text_results updates_per_step epochs_per_step max_tokens_per_batch keep_last "
    "min_pixels max_pixels thumb_min_pixels thumb_max_pixels lr temperature max_grad_norm dist_timeout "
    "sigmoid_midpoint max_mismatch toy_pretrain_steps toy_teach_steps toy_warmup_steps "
    "judge_concurrency judge_timeout gpu_memory "
    "search_deadline connect_timeout read_timeout retry_pause page_characters serpapi_in_flight reader_in_flight "
    "summarizer_in_flight"
).split()
SHARES = "search_penalty format_weight min_lr_factor clip_low balance sft_min_reward max_failed_searches".split()


def test_every_number_has_a_lower_bound_and_shares_an_upper_one():
    for field in FIELDS:
        if HINTS[field.name] in (int, float):
            assert field.name in refused(**{field.name: -1})
            if field.name in POSITIVE:
                refused(**{field.name: 0})
            else:
                assert getattr(Config(**{field.name: 0}), field.name) == 0
    for name in SHARES:
        assert name in refused(**{name: 1.01}) and getattr(Config(**{name: 1}), name) == 1
    for name in ("adam_beta1", "adam_beta2"):
        assert name in refused(**{name: 1.0})
    for name in ("seed", "toy_seed"):
        assert name in refused(**{name: 2**63}) and getattr(Config(**{name: 2**63 - 1}), name) == 2**63 - 1
    assert "toy_named" in refused(toy_named=49) and Config(toy_named=48).toy_named == 48


@pytest.mark.parametrize("field", [f for f in FIELDS if f.metadata["choices"]], ids=lambda f: f.name)
def test_choices(field):
    message = refused(f"--{field.name}=other")
    assert field.name in message and all(choice in message for choice in field.metadata["choices"])
    for choice in field.metadata["choices"]:
        needed = NEEDED["search"] if field.name == "search" else {}
        assert getattr(Config(**{field.name: choice, **needed}), field.name) == choice
    assert "qwen2.5-vl-7b-paper" in refused("--preset=qwen3") and "qwen2.5-vl-7b" in refused(preset="qwen3")


@pytest.mark.parametrize("words, values", [
    ("samples_per_prompt", dict(samples_per_prompt=1)),
    ("min_pixels max_pixels", dict(min_pixels=7057, max_pixels=7056)),
    ("min_pixels max_pixels", dict(min_pixels=785, max_pixels=1567)),  # no multiple of 784 in between
    ("min_pixels max_pixels", dict(min_pixels=1, max_pixels=783)),
    ("thumb_min_pixels thumb_max_pixels", dict(thumb_min_pixels=785)),
    ("thumb_min_pixels thumb_max_pixels", dict(thumb_min_pixels=1, thumb_max_pixels=783)),
    ("max_tokens_per_turn max_tokens", dict(max_tokens_per_turn=250)),
    ("max_prompt_tokens max_tokens", dict(max_prompt_tokens=250)),
    ("max_tokens_per_batch max_tokens", dict(max_tokens_per_batch=249)),
    ("updates_per_step prompts_per_step", dict(updates_per_step=3)),
    ("updates_per_step prompts_per_step", dict(updates_per_step=40)),
    ("resume overwrite", dict(resume="auto", overwrite=True)),
    ("image question", dict(image="a.jpg")),
    ("files question", dict(files=("a.pq",), question="what?")),
    ("files question", dict(files=("a.pq",), question="what?", image="a.jpg")),
    ("attention device", dict(attention="flash", device="cpu")),
    ("attention device", dict(attention="varlen", device="cpu")),
    ("attention dtype", dict(attention="flash", dtype="fp32")),
    ("deterministic rollout_deadline", dict(deterministic=True, rollout_deadline=5.0)),
    ("search_index", dict(preset="qwen2.5-vl-7b")),
    ("judges em llm", dict(judges=("em", "gpt"))),
    ("judge_url", dict(judge_url="ftp://judge/v1")),
    ("judge_url password", dict(judge_url="https://me:secret@judge/v1")),
    ("label mode", dict(label=True, mode="direct")),
    ("record search_cache", dict(search="record")),
    ("replay search_cache", dict(search="replay")),
    ("reader_url", dict(reader_url="")),
    ("search_url", dict(search_url="localhost:8100")),
    ("serpapi_url", dict(serpapi_url="https://name:word@host")),  # no secrets in config.json
    ("serpapi_url", dict(serpapi_url="https://host/?api_key=x")),
    ("serve_address", dict(serve_address="localhost")),
    ("serve_address", dict(serve_address="localhost:99999")),
])  # fmt: skip
def test_impossible_combinations(words, values):
    message = refused(**values)
    assert all(word in message for word in words.split())


@pytest.mark.parametrize("values", [
    dict(samples_per_prompt=2), dict(min_pixels=784, max_pixels=784), dict(min_pixels=785, max_pixels=1568),
    dict(max_tokens_per_turn=249), dict(max_prompt_tokens=249), dict(max_tokens_per_batch=250),
    dict(updates_per_step=14), dict(resume="auto"), dict(question="what?"), dict(question="what?", image="a.jpg"),
    dict(attention="flash", dtype="bf16"), dict(attention="segments", device="cpu", dtype="fp32"),
    dict(rollout_deadline=5.0), dict(rollout_deadline=5.0, deterministic=False),
    dict(preset="qwen2.5-vl-7b", search_index="i"), dict(preset="qwen2.5-vl-7b", search="live"),
    dict(preset="qwen2.5-vl-7b", search_url="http://node0:8100"), dict(search="record", search_url="http://node0:8100"),
    dict(search="replay", search_cache="c"), dict(summarizer_url="http://127.0.0.1:8000/v1"),
])  # fmt: skip
def test_possible_combinations_at_the_edge(values):
    assert dataclasses.asdict(Config(**values)).items() >= values.items()


def test_a_config_is_frozen_and_copies_are_checked_again():
    cfg = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1.0
    with pytest.raises(InputError):
        dataclasses.replace(cfg, lr=-1.0)
    assert hash(cfg) == hash(Config())


def test_no_field_holds_a_secret():
    """config.json is written into the run directory: keys and passwords come from the environment."""
    words = {word for field in FIELDS for word in field.name.split("_")}
    assert words.isdisjoint({"key", "keys", "secret", "password", "credential", "credentials", "auth", "token", "api"})


# --------------------------------------------------------------------------------------------- save, run_main


def test_save_round_trips_and_replaces_in_one_go(tmp_path, monkeypatch):
    path, cfg = tmp_path / "config.json", Config(train_files=("ä.pq", "b"), deterministic=False, lr=1e-7, run_dir="x\n")
    save(cfg, path)
    assert Config(**json.loads(path.read_text())) == cfg and os.listdir(tmp_path) == ["config.json"]
    before = path.read_bytes()

    def killed(source, target):
        assert str(target) == str(path) and path.read_bytes() == before  # nothing was written in place
        assert Config(**json.loads(open(source).read())) == Config()
        raise KeyboardInterrupt

    monkeypatch.setattr(config.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(Config(), path)
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
    monkeypatch.setenv("RANK", "1")  # rank 0 says it
    assert leave(InputError("x")) == 2
    assert capsys.readouterr() == ("", "")


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
