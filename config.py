"""Every option, once: a frozen flat dataclass, its presets, and the command line made from it.

    torchrun train.py                                          # preset toy: the defaults below
    torchrun --nproc_per_node 8 train.py --preset qwen2.5-vl-7b --train_files train.parquet --search_index web.sqlite

`--key value` or `--key=value` sets any field. A preset is applied first, the command line after it. Options are checked
when they are constructed, so a Config that exists is one that can run. What only one command needs (eval.py, the toy
world) is another `Options` class beside that command; `parse` reads several of them from one command line.
"""

import argparse
import dataclasses
import difflib
import fcntl
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, get_args


class InputError(ValueError):
    """Something the user gave is wrong. `run_main` prints it as one line and exits with code 2."""


TRAINED_AS = "trained_as.json"  # in an exported folder: the options that belong to the model
SEARCHES = ("offline", "live", "record", "replay")
SEARCH_ENGINES = ("serpapi", "serper")
LOSS_NORMS = ("tokens", "sequence", "constant")  # the second is the paper's, the third Dr. GRPO's
ADVANTAGES = ("grpo", "dr_grpo", "rloo", "decoupled", "mastered", "gdpo", "bn_grpo")  # `rollout.advantages`
LEFT_OUT = ("truncated", "failed_tools", "zero_variance")  # at a limit of tokens; a tool failed; group's rewards equal
OFFLOADS = ("none", "reference", "all")
RANGES = {
    "above 0": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "0 or at least 1": lambda value: value == 0 or value >= 1,
}


def option(default, help: str, allowed: str | tuple[str, ...] = "", *, marks: str = ""):
    """A field of an `Options` class.

    allowed: a range of RANGES, or the texts to choose from. marks: words of these:
        resume   a resumed run may set it to another value
        neutral  it does not change what a conversation is: an interrupted evaluation may continue with another value
        model    it belongs to the trained model: an export keeps it, and eval.py takes it from there
    """
    return field(default=default, metadata={"help": help, "allowed": allowed, "marks": marks.split()})


class Options:
    """Base of the frozen dataclasses that `parse` reads. Raises InputError for a value of the wrong type or range."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = _checked(f.name, getattr(self, f.name), f.type, f.metadata["allowed"])
            object.__setattr__(self, f.name, value)


# The authors' script: 32 questions x 4 conversations on 8 GPUs (MMSearch-R1, arXiv 2506.20670, and its code).
_QWEN = (
    dict(model="Qwen/Qwen2.5-VL-7B-Instruct", engine="vllm", run_dir="runs/qwen2.5-vl-7b", prompts="prompts")
    | dict(min_pixels=512 * 512, max_pixels=672 * 672 * 2, thumb_min_pixels=112 * 112, thumb_max_pixels=224 * 224)
    | dict(max_prompt_tokens=4096, max_tokens_per_turn=2048, max_tokens=8192, max_tokens_per_batch=16384)
    | dict(prompts_per_step=32, samples_per_prompt=4, steps=100, concurrency=32, save_every=10, eval_every=10)
    | dict(tool_results=(), per_search_penalty=False, kl_coef=0.001, entropy_coef=0.0, loss_norm="sequence")
    | dict(lr=2e-6, adam_beta2=0.999, weight_decay=0.01, schedule="sigmoid", val_limit=256)
    | dict(gradient_checkpointing=True, offload="reference", threads=0, importance_cap=2.0)
)
# A vision token of Qwen3-VL is 32 x 32 pixels, and its image processor makes 64 of a picture, or more.
_QWEN3 = _QWEN | dict(thumb_min_pixels=256 * 256, thumb_max_pixels=288 * 288)
_3B = _QWEN | dict(model="Qwen/Qwen2.5-VL-3B-Instruct", run_dir="runs/qwen2.5-vl-3b")
_4B = _QWEN3 | dict(model="Qwen/Qwen3-VL-4B-Instruct", run_dir="runs/qwen3-vl-4b")
_LORA = dict(lora_rank=16, lr=2e-5, max_tokens_per_batch=8192)  # the rate: see LORA_ALPHA in policy.py
# the paper: 512 questions x 8 conversations, mini-batches of 128 questions, 32 GPUs, best at step 50
_PAPER = dict(prompts_per_step=512, samples_per_prompt=8, updates_per_step=4, val_limit=0)
PRESETS = {
    "toy": {},
    "toy-crop": dict(run_dir="runs/toy-crop", prompts="prompts/toy-crop", toy_crop=True, max_pixels=112 * 112)
    | dict(tool_limits=("text_search=0", "crop=1"), advantage="dr_grpo", search_penalty=0.2, entropy_coef=0.01, lr=2e-4)
    | dict(steps=160, eval_every=40, toy_pretrain_steps=420, toy_teach_steps=180, toy_warmup_steps=160),  # docs/toy.md
    "toy-json": dict(run_dir="runs/toy-json", dialect="json", toy_json=True, max_tokens=320),
    "toy-qwen3": dict(run_dir="runs/toy-qwen3", toy_backbone="qwen3_vl"),
    "qwen2.5-vl-3b": _3B,
    "qwen2.5-vl-3b-24gb": _3B | _LORA | dict(run_dir="runs/qwen2.5-vl-3b-24gb", concurrency=16),
    "qwen2.5-vl-7b": _QWEN,
    "qwen2.5-vl-7b-decoupled": _QWEN | dict(advantage="mastered", run_dir="runs/qwen2.5-vl-7b-decoupled"),
    "qwen2.5-vl-7b-paper": _QWEN | _PAPER | dict(schedule="constant", steps=50, run_dir="runs/qwen2.5-vl-7b-paper"),
    "qwen3-vl-4b": _4B,
    "qwen3-vl-4b-24gb": _4B | _LORA | dict(run_dir="runs/qwen3-vl-4b-24gb", concurrency=8, offload="all"),
    "qwen3-vl-8b": _QWEN3 | dict(model="Qwen/Qwen3-VL-8B-Instruct", run_dir="runs/qwen3-vl-8b"),
}


@dataclass(frozen=True)
class Config(Options):
    """The options of a run. Defaults are the preset `toy`, which is what `torchrun train.py` runs."""

    # -- run
    preset: str = option("toy", "values applied before the rest of the command line", tuple(PRESETS), marks="model")
    run_dir: str = option("runs/toy", "folder for all that the run writes", marks="resume neutral")
    seed: int = option(0, "seed of everything random in the run", "at least 0")
    steps: int = option(70, "optimisation steps", "at least 0", marks="resume")
    resume: str = option("", "'auto': the newest checkpoint in run_dir; or a checkpoint's path", marks="resume neutral")
    accept_changes: bool = option(False, "resume although a file that the run read has changed", marks="resume neutral")
    overwrite: bool = option(False, "start again: delete run_dir (eval.py: out)", marks="resume neutral")
    device: str = option("auto", "where to run; auto: a GPU if there is one", ("auto", "cpu", "cuda"))
    deterministic: bool | None = option(None, "same seed, same bits; auto: CPU, no vLLM, web, clock", marks="resume")
    threads: int = option(1, "CPU threads a process (0: cores / processes)", "at least 0", marks="resume neutral")
    log: str = option("", "also log to this package", ("", "tensorboard", "wandb"), marks="resume neutral")
    shard_size: int = option(0, "ranks that share a copy of the weights, HSDP across them (0: all)", "at least 0")

    # -- model
    model: str = option("toy", "'toy' (built on first use), a Hugging Face folder, or a hub id")
    dtype: str = option("auto", "compute type (master weights: fp32); auto: bf16 on a GPU", ("auto", "fp32", "bf16"))
    attention: str = option("auto", "kernel; auto: the best available", ("auto", "flash", "varlen", "segments"))
    freeze_vision: bool = option(False, "do not train the vision tower, nor adapters on it")
    lora_rank: int = option(0, "train adapters (LoRA) of this rank on linear layers (0: all weights)", "at least 0")
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass to save memory")

    # -- data
    train_files: tuple[str, ...] = option((), "questions: PATH or NAME=PATH, see docs/data.md (none: the toy world's)")
    val_files: tuple[str, ...] = option((), "the same, for validation (none: the toy world's, or no validation)")
    skip_bad_rows: bool = option(False, "leave bad rows out and count them, instead of stopping at the first")
    prompts: str = option("prompts/toy", "folder of the prompt files (see prompts/)", marks="model")
    min_pixels: int = option(56 * 56, "pixels of a question's image, at least", "above 0", marks="model")
    max_pixels: int = option(84 * 84, "pixels of a question's image, at most", "above 0", marks="model")
    thumb_min_pixels: int = option(28 * 28, "pixels of a thumbnail in a result, at least", "above 0", marks="model")
    thumb_max_pixels: int = option(32 * 32, "pixels of a thumbnail in a result, at most", "above 0", marks="model")
    max_prompt_tokens: int = option(120, "questions with longer prompts are dropped", "above 0", marks="model")

    # -- rollout
    engine: str = option("torch", "torch: in this process, no extra install; vllm: for GPUs", ("torch", "vllm"))
    tensor_parallel: int = option(1, "ranks that share one vLLM engine", "above 0")
    prompts_per_step: int = option(14, "questions a step, over all ranks", "above 0")
    samples_per_prompt: int = option(8, "conversations about each question: the group of GRPO", "above 0")
    refill_groups: int = option(0, "replace a question of equal rewards, up to n times (0: off)", "at least 0")
    carry_over: int = option(0, "unfinished conversations go on in up to n further steps (0: off)", "at least 0")
    dialect: str = option("tags", "calls in the paper's tags, or in Qwen's JSON", ("tags", "json"), marks="model")
    max_turns: int = option(3, "turns of the model in a conversation", "above 0", marks="model")
    tool_limits: tuple[str, ...] = option((), "calls in a conversation, TOOL=N (else the tools' own)", marks="model")
    tool_results: tuple[str, ...] = option(("image_search=3", "text_search=3"), "results of a call", marks="model")
    max_tokens_per_turn: int = option(32, "tokens the model may generate in a turn", "above 0", marks="model")
    max_result_tokens: int = option(0, "tokens of a result (0: as many as leave room)", "at least 0", marks="model")
    max_tokens: int = option(250, "tokens of a conversation, results and images included", "above 0", marks="model")
    temperature: float = option(1.0, "sampling temperature in training, also that of the log-probs", "above 0")
    concurrency: int = option(256, "conversations in a rank's engine at once", "above 0", marks="resume neutral")
    rollout_deadline: float = option(0.0, "seconds until a rollout is aborted (0: none)", "at least 0", marks="resume")

    # -- search
    search_index: str = option("", "offline index, from `python -m search index` (none: the toy world's)")
    search: str = option("offline", "offline, live (web), record, replay, or a service's URL", marks="resume")
    search_cache: str = option("", "file of recorded results, for record and replay", marks="resume")
    search_budget: int = option(0, "live searches of a run (0: no limit)", "at least 0", marks="resume neutral")
    search_deadline: float = option(120.0, "seconds for a search and its retries", "above 0", marks="resume neutral")
    search_language: str = option("en", "language of live search results, two letters")
    search_engine: str = option("serpapi", "of live search: serpapi or serper, or NAME=ADDRESS", marks="resume")
    reader_url: str = option("https://r.jina.ai", "reads pages; key, if any: JINA_API_KEY", marks="resume")
    summarizer_url: str = option("", "OpenAI-compatible URL, http://host/v1 (none: best sentences)", marks="resume")
    summarizer_model: str = option("Qwen/Qwen3-32B", "the model there; key, if any: SUMMARIZER_API_KEY")
    image_host: str = option("", "URL of a folder of pictures, or a command that uploads one", marks="resume neutral")
    allow_hosts: tuple[str, ...] = option((), "name:port of results that may be private", marks="resume neutral")

    # -- reward
    search_penalty: float = option(0.1, "share of a right answer's score that searching costs", "from 0 to 1")
    per_search_penalty: bool = option(True, "take the penalty once for each search (the paper: once)")
    penalty_ramp_steps: int = option(0, "raise the penalty from -p to +p over this many steps (0: off)", "at least 0")
    format_weight: float = option(0.1, "alpha: weight of the format in the reward", "from 0 to 1")
    match: str = option("em", "equal to an answer, equal as Unicode, or containing it", ("em", "em_unicode", "sub_em"))
    reward: str = option("match", "by --match, or where it fails by a judge model", ("match", "judge"), marks="neutral")
    any_order: bool = option(False, "accept well-formed tool calls in any number and order as good format")

    # -- loss
    loss: str = option("grpo", "learn from rewards, or imitate the conversations in train_files", ("grpo", "sft"))
    advantage: str = option("grpo", "how rewards are compared within a group: docs/training.md", ADVANTAGES)
    economy_weight: float = option(1.0, "decoupled, mastered, gdpo: weight of saving searches", "at least 0")
    clip_low: float = option(0.2, "lower clip of the ratio: 1 - clip_low", "from 0 to 1")
    clip_high: float = option(0.2, "upper clip of the ratio: 1 + clip_high", "at least 0")
    ratio: str = option("token", "importance ratio of a token, or of the sequence (GSPO)", ("token", "sequence"))
    leave_out: tuple[str, ...] = option((), "conversations that the update leaves out, of these kinds", LEFT_OUT)
    fatal_failures: int = option(0, "do not train from n failed calls in a row on (0: off)", "at least 0")
    loss_norm: str = option("tokens", "mean over tokens; of sequences' means; of sums / constant", LOSS_NORMS)
    kl_coef: float = option(0.0, "weight of the KL to the starting model (0: no reference model)", "at least 0")
    kl_kind: str = option("k3", "estimator of the KL", ("k1", "k2", "k3"))
    entropy_coef: float = option(0.03, "weight of the entropy bonus", "at least 0")
    updates_per_step: int = option(1, "mini-batches that a step's questions are split into, an update each", "above 0")
    epochs_per_step: int = option(1, "passes over a step's conversations", "above 0")
    importance_cap: float = option(0.0, "weigh tokens by trainer / sampler, up to this (0: off)", "0 or at least 1")
    trust_bound: float = option(0.0, "mask conversations of a mean ratio beyond 1/x to x (0: off)", "0 or at least 1")

    # -- optimiser
    lr: float = option(3e-4, "learning rate of AdamW", "above 0")
    adam_beta2: float = option(0.99, "AdamW's beta 2 (beta 1 is 0.9)", "from 0 to below 1")
    weight_decay: float = option(0.0, "AdamW's weight decay", "at least 0")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", "above 0")
    schedule: str = option("constant", "learning rate over the steps", ("constant", "cosine", "sigmoid"))
    warmup_steps: int = option(0, "steps of linear learning-rate warm-up", "at least 0")
    max_tokens_per_batch: int = option(8192, "tokens of a packed batch: one forward and backward pass", "above 0")
    offload: str = option("none", "to CPU memory: the reference model, or all but activations", OFFLOADS)

    # -- evaluation and checkpoints
    eval_every: int = option(35, "steps between validations (0: only before and after)", "at least 0", marks="resume")
    val_limit: int = option(0, "validate on n questions, evenly spaced (0: all)", "at least 0", marks="resume")
    save_every: int = option(20, "steps between checkpoints (0: only at the end)", "at least 0", marks="resume")
    keep_last: int = option(2, "checkpoints kept", "above 0", marks="resume")

    def __post_init__(self):
        super().__post_init__()
        _check_combinations(self)

    @property
    def steps_ahead(self) -> int:
        """With carry-over, questions are asked so many steps early: so old are groups on average, half of the most."""
        return (self.carry_over + 1) // 2


# ------------------------------------------------------------------------------------------------------- checks
def need(ok, message: str) -> None:
    """Raise InputError with the message unless ok."""
    if not ok:
        raise InputError(message)


def _checked(name, value, kind, allowed):
    """The value as its field's type, an int as a float, a list as a tuple. Raises InputError if it is not allowed."""
    if type(value) is int:
        need(abs(value) < 2**63, f"{name} must be below 2**63")
        value = float(value) if kind is float else value
    value = tuple(value) if isinstance(value, list) else value
    values, kinds = value if isinstance(value, tuple) else (value,), get_args(kind) or (kind,)
    fits = isinstance(value, tuple) == (kind == tuple[str, ...]) and all(type(v) in kinds for v in values)
    need(fits, f"{name}={value!r}: expected {getattr(kind, '__name__', kind)}")
    need(type(value) is not float or math.isfinite(value), f"{name}={value}: expected a finite number")
    if isinstance(allowed, tuple):
        need({*values} <= {*allowed}, f"{name}={value!r}: choose one of {', '.join(allowed)}")
    elif allowed:
        need(RANGES[allowed](value), f"{name}={value}: must be {allowed}")
    return value


def _check_combinations(c):
    need(c.samples_per_prompt > 1, "samples_per_prompt=1: a group of one has no advantage; give at least 2")
    waits = max(c.search_deadline, c.rollout_deadline)
    need(waits <= 10**6, f"search_deadline, rollout_deadline: {waits} is more than a million")
    for name in ("tool_limits", "tool_results"):  # which tools there are is known to `tools`
        for pair in getattr(c, name):
            need(re.fullmatch(r"\w+=[0-9]{1,9}", pair), f"{name}: {pair!r} is not TOOL=NUMBER")
    for low, high in (("min_pixels", "max_pixels"), ("thumb_min_pixels", "thumb_max_pixels")):
        need(getattr(c, low) <= getattr(c, high), f"{low} is above {high}")  # `Chat` knows which sizes are possible
    most, batch = c.max_tokens, c.max_tokens_per_batch
    need(c.max_tokens_per_turn < most, "max_tokens_per_turn must be below max_tokens")
    need(c.max_prompt_tokens < most, "max_prompt_tokens must be below max_tokens: no room for a reply")
    need(batch >= most, f"max_tokens_per_batch={batch} cannot hold a conversation of max_tokens={most}")
    whole = c.prompts_per_step % c.updates_per_step == 0
    need(whole, f"updates_per_step={c.updates_per_step} does not divide prompts_per_step={c.prompts_per_step}")
    vllm, parallel = c.engine == "vllm", c.tensor_parallel
    need(vllm or parallel == 1, f"tensor_parallel={parallel} is for --engine vllm; the in-process engine is not split")
    need(not (c.deterministic and vllm), "deterministic needs --engine torch: the last bits of vLLM depend on timing")
    local = c.search in ("offline", "replay")
    need(local or not c.deterministic, "deterministic needs --search offline or replay: the web never repeats")
    need(not c.deterministic or c.reward == "match", "deterministic needs --reward match: a judge may change its mind")
    need(c.loss == "grpo" or c.reward == "match", "loss=sft chooses conversations by --match: reward=judge is for grpo")
    timed = c.deterministic and c.rollout_deadline
    need(not timed, "deterministic and rollout_deadline exclude each other: a clock never stops twice at one token")
    need(c.reward == "match" or not c.refill_groups, "refill_groups needs --reward match: verdicts may come too late")
    clashes = dict(deterministic=c.deterministic, refill_groups=c.refill_groups, ratio=c.ratio == "sequence")
    for name, given in (clashes | dict(loss=c.loss == "sft", reward=c.reward == "judge")).items():
        need(not (c.carry_over and given), f"carry_over and {name}={getattr(c, name)} exclude each other")
    need(c.importance_cap or not c.carry_over, "carry_over needs --importance_cap, for older weights; 2 is usual")
    need(not (c.resume and c.overwrite), "resume and overwrite exclude each other")
    fast = c.attention in ("flash", "varlen")
    need(not fast or c.device != "cpu", f"attention={c.attention} needs a GPU, and device is cpu")
    need(not fast or c.dtype != "fp32", f"attention={c.attention} computes in bf16, and dtype is fp32")
    cached = c.search_cache or c.search not in ("record", "replay")
    need(cached, f"search={c.search} needs --search_cache, the file of recorded results")
    if c.search not in SEARCHES:
        need("://" in c.search, f"search: choose one of {', '.join(SEARCHES)}, or give a service's URL")
        check_url("search", c.search)
    check_url("reader_url", c.reader_url, required=True)
    check_url("summarizer_url", c.summarizer_url)
    engine, elsewhere, address = c.search_engine.partition("=")
    need(engine in SEARCH_ENGINES, f"search_engine: expected one of {', '.join(SEARCH_ENGINES)}, or NAME=ADDRESS")
    check_url("search_engine", address, required=bool(elsewhere))
    check_url("image_host", c.image_host if "://" in c.image_host else "")


def check_url(name: str, url: str, required: bool = False) -> None:
    """Raise InputError unless it is a plain http(s) URL, or empty and not required."""
    sound = re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url)
    # the value is not shown: it may hold a password
    need(sound or not (url or required), f"{name}: expected http(s)://host[:port][/path], no user, password or query")


# ------------------------------------------------------------------------------------------------- command line
def parse(argv: list[str] | None = None, *kinds: type[Options], as_trained: bool = False):
    """The command line as options (argv: without the program's name; None: sys.argv[1:]).

    kinds: the `Options` classes whose fields are read (default: Config). as_trained: an exported folder given as
    --model overrides the preset with what it was trained with; the command line overrides both. Returns one object of
    each kind: a single one as it is, several as a tuple. Raises InputError.
    """
    kinds = kinds or (Config,)
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    layout = partial(argparse.HelpFormatter, max_help_position=34, width=120)
    style = dict(usage=f"{name} [--key value | --key=value] ...", formatter_class=layout)
    parser = argparse.ArgumentParser(**style, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = partial(need, False)
    for kind in kinds:
        group = parser.add_argument_group(kind.__doc__.split(".")[0])
        for f in dataclasses.fields(kind):
            group.add_argument(f"--{f.name}", help=_help(f), **_reading(f.type))
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        word, names = unknown[0].split("=")[0], [f.name for kind in kinds for f in dataclasses.fields(kind)]
        near = difflib.get_close_matches(word.lstrip("-"), names, n=1)
        raise InputError(f"unknown argument {word!r}; " + (f"did you mean --{near[0]}?" if near else "see --help"))
    given = vars(known)
    trained = {"val_limit": 0} | _trained_as(given.get("model", "")) if as_trained else {}  # a preset's is for training
    defaults = PRESETS.get(given.get("preset"), {}) | trained
    of_world = PRESETS.get(given.get("preset", trained.get("preset")), {})  # an export remembers its toy world
    for name in ("tool_limits", "tool_results"):  # what is given of one tool leaves the others as they are
        if name in given:
            given[name] = [*defaults.get(name, getattr(Config, name)), *given[name]]
    made = [from_dict(kind, {**(defaults if kind is Config else of_world), **given}) for kind in kinds]
    return made[0] if len(made) == 1 else tuple(made)


def _trained_as(model: str) -> dict:
    """The options that an exported folder was trained with; none of another model. Raises InputError."""
    path = Path(model) / TRAINED_AS
    if not model or not path.is_file():
        return {}
    try:
        options = json.loads(path.read_text())
        options = {name: options[name] for name in marked("model", Config) if name in options}
        return options | {"prompts": str(Path(model) / options["prompts"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not what train.py wrote; remove it to give the options yourself") from None


def save(path: str | Path, *options: Options) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(as_dict(*options), indent=1) + "\n")


def as_dict(*options: Options) -> dict:
    """The fields of all of them as JSON values (tuples are lists)."""
    return json.loads(json.dumps({name: value for o in options for name, value in dataclasses.asdict(o).items()}))


def from_dict(kind: type[Options], values: dict) -> Options:
    """The fields that `kind` has, from a dictionary that may hold others. Raises InputError."""
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def marked(mark: str, *kinds: type[Options]) -> set[str]:
    """The names of the fields with a mark (see `option`)."""
    return {f.name for kind in kinds for f in dataclasses.fields(kind) if mark in f.metadata["marks"]}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write a file to, and then renames it to `path`, which is whole or as it was before.
    Raises InputError if it cannot be written."""
    temporary = Path(f"{path}.tmp")
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a folder; a device would be replaced by a file
            raise OSError("there is something else than a file")
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def lock(path: str | Path) -> IO:
    """Lock a file or folder that is to be written, until the returned file is closed or the process ends, however it
    ends. Raises InputError if another process holds the lock, and says which."""
    real = Path(os.path.realpath(path))  # one lock, whichever link leads to it
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        file = open(real.with_name(f".{real.name}.lock"), "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"{path} is in use by {file.read().strip() or 'another process'}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot write beside it ({error.strerror})") from None
    with suppress(OSError):  # on a full disk it is locked without a name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
    return file


def run_main(main) -> None:
    """Call main(); bad input becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # JSON can hold half a surrogate pair, which has no bytes
    try:
        return main()
    except InputError as error:
        message = str(error)
    except OSError as error:  # a name too long, a full disk, no permission: wherever it comes up
        if error.errno is None:  # not the system's: a mistake in the code
            raise
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    rank = os.environ.get("RANK", "0")
    if rank != "0":  # where rank 0 says the same, torchrun ends this process before it repeats it
        time.sleep(5)
    said = " ".join(message.splitlines())
    print("error:" if rank == "0" else f"error (rank {rank}):", said, file=sys.stderr)
    sys.exit(2)


def _reading(kind):
    """How argparse reads a field of this type."""
    if kind == tuple[str, ...]:
        return dict(nargs="+", action="extend", metavar="TEXT")
    if bool in (kind, *get_args(kind)):
        words = {"auto": None} | dict.fromkeys(("true", "1", "yes", "on"), True)
        words |= dict.fromkeys(("false", "0", "no", "off"), False)  # other words stay text, which `_checked` refuses
        return dict(nargs="?", const=True, metavar="BOOL", type=lambda text: words.get(text.lower(), text))
    return dict(type=kind, metavar={str: "TEXT", int: "INT", float: "FLOAT"}[kind])


def _help(f):
    """The line of --help: meaning, choices and default."""
    allowed = f.metadata["allowed"]
    listed = f" ({', '.join(c or 'none' for c in allowed)})" if isinstance(allowed, tuple) else ""
    default = {None: "auto", "": "-", (): "-"}.get(f.default, f.default)
    default = " ".join(default) if isinstance(default, tuple) else default
    return f"{f.metadata['help']}{listed} [{default}]".replace("%", "%%")
