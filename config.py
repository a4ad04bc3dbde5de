"""Every knob, once: one frozen, flat dataclass, its presets, and the command line made from it.

    torchrun train.py                                          # preset toy: the defaults below
    torchrun --nproc_per_node 8 train.py --preset qwen2.5-vl-7b --train_files train.parquet --search_index web.sqlite

`--key value` or `--key=value` sets any field; a preset is applied first, the command line after it. The whole
configuration is checked when it is constructed, so a Config that exists is one that can run.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints
from urllib.parse import urlsplit


class InputError(ValueError):
    """Something the user gave is wrong. `run_main` prints it as one line and exits with code 2."""


MODES = ("agent", "direct", "pipeline")
JUDGES = ("em", "sub_em", "llm")
SEARCHES = ("offline", "live", "record", "replay")


def _knob(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings. Defaults are the preset `toy`, which is what `torchrun train.py` runs. Raises InputError."""

    # -- run
    preset: str = _knob("toy", "named set of values, applied before the rest of the command line")
    run_dir: str = _knob("runs/toy", "folder for config, metrics, rollouts, checkpoints and exports")
    seed: int = _knob(0, "seed of everything random in the run")
    steps: int = _knob(100, "GRPO steps")
    resume: str = _knob("", "'auto': the newest checkpoint in run_dir, if any; or the path of a checkpoint")
    overwrite: bool = _knob(False, "start anew: delete what is in run_dir (eval.py: the results in out)")
    device: str = _knob("auto", "where to run; auto: a GPU if there is one", ("auto", "cpu", "cuda"))
    deterministic: bool | None = _knob(
        None, "same seed, same bits; calls answered in order (default: on a CPU without vLLM, web or deadline)"
    )
    threads: int = _knob(1, "CPU threads a process; more help larger models only (0: cores / processes)")
    dist_timeout: float = _knob(30.0, "minutes a rank waits for the others before it gives up")
    log: str = _knob(
        "", "also log to this, beside metrics.jsonl (its package must be there)", ("", "tensorboard", "wandb")
    )
    plan: bool = _knob(False, "print how much memory a run with these settings needs, and do nothing else")
    gpus: int = _knob(0, "--plan: how many GPUs there are (0: those of this machine, at least one)")
    gpu_memory: float = _knob(80.0, "--plan: GiB of each of them")
    shard_size: int = _knob(0, "ranks that share one copy of the weights, HSDP across them (0: all ranks)")

    # -- model
    model: str = _knob("toy", "'toy' (built on first use), a Hugging Face folder, or a hub id")
    dtype: str = _knob("auto", "compute type, masters stay fp32; auto: bf16 on a GPU", ("auto", "fp32", "bf16"))
    attention: str = _knob("auto", "attention kernel; auto: the best there is", ("auto", "flash", "varlen", "segments"))
    freeze_vision: bool = _knob(False, "do not train the vision tower")
    gradient_checkpointing: bool = _knob(False, "recompute layers in backward to save memory")

    # -- data
    train_files: tuple[str, ...] = _knob((), "questions: PATH in veRL layout or BENCHMARK=PATH (none: the toy world's)")
    val_files: tuple[str, ...] = _knob((), "the same, for validation (none: the toy world's, or no validation)")
    skip_bad_rows: bool = _knob(False, "leave bad rows out and count them, instead of stopping at the first")
    prompts: str = _knob("prompts/toy", "folder of the prompt files (see prompts/)")
    min_pixels: int = _knob(56 * 56, "pixels of a question's image, at least (smaller ones are enlarged)")
    max_pixels: int = _knob(84 * 84, "pixels of a question's image, at most (larger ones are shrunk)")
    thumb_min_pixels: int = _knob(28 * 28, "pixels of a thumbnail in a search result, at least")
    thumb_max_pixels: int = _knob(28 * 28, "pixels of a thumbnail in a search result, at most")
    max_prompt_tokens: int = _knob(120, "longer prompts are dropped and counted, tokens")

    # -- rollout
    engine: str = _knob("torch", "torch: in this process, no extra install; vllm: for GPUs", ("torch", "vllm"))
    tensor_parallel: int = _knob(1, "ranks that share one vLLM engine; the questions go to groups of them")
    prompts_per_step: int = _knob(14, "questions a step, over all ranks")
    samples_per_prompt: int = _knob(8, "conversations a question: the group of GRPO")
    max_turns: int = _knob(3, "turns of the model in a conversation")
    max_image_searches: int = _knob(1, "image searches in a conversation")
    max_text_searches: int = _knob(2, "text searches in a conversation")
    max_tokens_per_turn: int = _knob(32, "tokens the model may say in a turn")
    max_tokens: int = _knob(250, "tokens of a conversation in all, prompt, results and image tokens included")
    temperature: float = _knob(1.0, "sampling temperature in training, and the one log-probs are taken at")
    concurrency: int = _knob(256, "conversations a rank holds in the engine at once")
    tool_threads: int = _knob(16, "search calls a rank makes at once")
    rollout_deadline: float = _knob(0.0, "seconds for a rollout; what is unfinished then is aborted (0: no limit)")

    # -- search
    search_index: str = _knob("", "index of the offline search, from searchdb.py (none: the toy world's)")
    image_results: int = _knob(3, "hits of an image search shown to the model")
    text_results: int = _knob(3, "hits of a text search shown to the model")
    search: str = _knob("offline", "the index, the web, the web and kept, or only what was kept", SEARCHES)
    search_cache: str = _knob("", "file of kept results, for record and replay")
    search_url: str = _knob("", "a running `tools.py serve`, which then answers in the way that it was told")
    serve_address: str = _knob("127.0.0.1:8100", "host:port that `tools.py serve` listens on")
    search_budget: int = _knob(0, "live searches a run may make, split over the ranks (0: no limit)")
    search_deadline: float = _knob(120.0, "seconds for a search in all, retries included")
    connect_timeout: float = _knob(5.0, "seconds to wait for a connection")
    read_timeout: float = _knob(30.0, "seconds of silence after which an answer is given up")
    search_retries: int = _knob(3, "further attempts after time-outs, broken connections, 429 and 5xx")
    retry_pause: float = _knob(1.0, "seconds before the second attempt; doubles, with jitter; Retry-After is honoured")
    max_failed_searches: float = _knob(0.5, "stop training when a larger share of a step's searches failed")
    search_language: str = _knob("en", "language of live search results, two letters")
    serpapi_url: str = _knob("https://serpapi.com", "live search engine; its key: SERPAPI_API_KEY")
    serpapi_in_flight: int = _knob(16, "searches at once")
    serpapi_per_second: float = _knob(10.0, "searches begun a second, split over the ranks (0: no limit)")
    reader_url: str = _knob("https://r.jina.ai", "what reads pages; its key, if any: JINA_API_KEY")
    reader_in_flight: int = _knob(32, "pages read at once")
    reader_per_second: float = _knob(8.0, "pages begun a second, split over the ranks (0: no limit)")
    page_characters: int = _knob(30_000, "characters of a page that are read, from its beginning")
    summarizer_url: str = _knob(
        "", "OpenAI-compatible base URL, as http://host:8000/v1 (none: best-matching sentences)"
    )
    summarizer_model: str = _knob("Qwen/Qwen3-32B", "the model there; its key, if any: SUMMARIZER_API_KEY")
    summarizer_prompt: str = _knob("prompts/summarize.txt", "file with the request to the summariser")
    summarizer_in_flight: int = _knob(64, "summaries at once")
    summarizer_per_second: float = _knob(0.0, "summaries begun a second, split over the ranks (0: no limit)")
    image_base_url: str = _knob("", "public URL of the folder that `tools.py images` wrote, for image search")
    image_upload: str = _knob("", "or a command: gets a picture's path as last argument, prints its public URL")
    allow_hosts: tuple[str, ...] = _knob((), "hosts (name:port) of results that may have private addresses")
    price_search: float = _knob(0.01, "price of a live search, for the accounts")
    price_reader: float = _knob(0.05, "price of a million tokens of read pages")
    price_summarizer: float = _knob(0.0, "price of a million tokens of the summariser, read or written")

    # -- reward
    search_penalty: float = _knob(0.1, "share of a right answer's score lost by having searched")
    per_search_penalty: bool = _knob(True, "take the penalty once for each search (the paper: once)")
    penalty_ramp_steps: int = _knob(0, "let the penalty rise linearly from -p to +p over this many steps (0: off)")
    format_weight: float = _knob(0.1, "alpha: weight of the format in the reward")
    match: str = _knob("em", "em: exact match; sub_em: an accepted answer inside the prediction", ("em", "sub_em"))
    any_order: bool = _knob(False, "accept well-formed searches in any number and order as good format")

    # -- loss
    loss: str = _knob(
        "grpo", "what is learned from: rewards, or conversations (JSONL) in train_files to imitate", ("grpo", "sft")
    )
    sft_min_reward: float = _knob(0.5, "sft: leave out conversations that earn less")
    clip_low: float = _knob(0.2, "lower clip of the ratio: 1 - clip_low")
    clip_high: float = _knob(0.2, "upper clip of the ratio: 1 + clip_high")
    ratio: str = _knob("token", "importance ratio of a token, or of the sequence (GSPO)", ("token", "sequence"))
    normalize_advantages: bool = _knob(True, "divide advantages by the group's standard deviation")
    leave_one_out: bool = _knob(False, "compare a conversation with the mean of the others of its group (RLOO)")
    drop_dead_groups: bool = _knob(False, "leave groups of equal rewards out of the denominator, too (DAPO)")
    train_on_truncated: bool = _knob(True, "train on conversations cut by a limit of tokens (DAPO: not)")
    loss_norm: str = _knob(
        "tokens", "mean over all tokens; of per-sequence means (paper); of sums over a constant (Dr. GRPO)",
        ("tokens", "sequence", "constant"),
    )  # fmt: skip
    kl_coef: float = _knob(0.0, "weight of the KL to the starting model (0: no reference model is kept)")
    kl_kind: str = _knob("k3", "estimator of the KL", ("k1", "k2", "k3"))
    entropy_coef: float = _knob(0.03, "bonus for entropy")
    updates_per_step: int = _knob(1, "mini-batches that a step's questions are split into, an update each")
    epochs_per_step: int = _knob(1, "times a step's conversations are gone through")
    train_on_failed_tools: bool = _knob(True, "train on conversations in which a search failed")
    importance_cap: float = _knob(0.0, "weigh tokens by trainer / sampler probability, at most this, e.g. 2 (0: off)")
    trust_bound: float = _knob(0.0, "mask conversations whose mean ratio is outside 1/x to x, e.g. 1.01 (0: off)")
    max_mismatch: float = _knob(
        0.5, "stop at the first step if sampler and trainer log-probs differ by more, mean nats"
    )

    # -- optimiser
    lr: float = _knob(2e-4, "learning rate of AdamW")
    adam_beta1: float = _knob(0.9, "AdamW's beta 1")
    adam_beta2: float = _knob(0.99, "AdamW's beta 2")
    weight_decay: float = _knob(0.0, "AdamW's weight decay")
    max_grad_norm: float = _knob(1.0, "gradients are clipped to this norm")
    schedule: str = _knob("constant", "learning rate over the steps", ("constant", "cosine", "sigmoid"))
    warmup_steps: int = _knob(0, "steps of linear learning-rate warm-up")
    sigmoid_midpoint: float = _knob(45.0, "w of the sigmoid schedule: the step at which the rate has fallen half-way")
    min_lr_factor: float = _knob(0.05, "floor of the cosine and sigmoid schedules, as a share of lr")
    max_tokens_per_batch: int = _knob(8192, "tokens of a packed row: one forward and backward pass")
    offload_optimizer: bool = _knob(False, "keep masters and optimiser state in CPU memory")
    offload_reference: bool = _knob(False, "keep the reference model in CPU memory between its passes")

    # -- evaluation and checkpoints
    eval_every: int = _knob(50, "steps between validations (0: only before and after)")
    val_limit: int = _knob(0, "validate on the first n questions (0: all)")
    save_every: int = _knob(20, "steps between checkpoints (0: only at the end)")
    keep_last: int = _knob(2, "checkpoints kept")
    plot: tuple[str, ...] = _knob((), "train nothing: draw the curves of these run directories into a PNG (matplotlib)")

    # -- eval.py
    files: tuple[str, ...] = _knob((), "questions to evaluate on, PATH or BENCHMARK=PATH; loss sft: those talked about")
    image: str = _knob("", "ask about this picture")
    question: str = _knob("", "the question to ask about it")
    eval_temperature: float = _knob(0.0, "temperature of eval.py (0: greedy; several samples: temperature)")
    out: str = _knob("", "where eval.py writes its conversations (default: eval.jsonl in the model's folder)")
    mode: str = _knob("agent", "no tools, always search (the paper's baseline), or on demand", MODES)
    samples: int = _knob(0, "conversations a question (0: one; 8 with --label)")
    judges: tuple[str, ...] = _knob((), f"second opinions on the answers: {', '.join(JUDGES)}")
    judge_url: str = _knob("https://api.openai.com/v1", "OpenAI-compatible endpoint of the llm judge (JUDGE_API_KEY)")
    judge_model: str = _knob("gpt-4o", "the llm judge")
    judge_cache: str = _knob("runs/judge.sqlite", "verdicts of the llm judge, so that none is paid for twice")
    judge_concurrency: int = _knob(8, "questions to the llm judge at once")
    judge_timeout: float = _knob(60.0, "seconds the llm judge may take to answer")
    label: bool = _knob(False, "label questions by the searches they need; --out is then a parquet file")
    balance: float = _knob(0.0, "with --label: also a subset with this share of questions that need a search (0: none)")

    # -- toy world
    toy_dir: str = _knob("runs/toy-world", "where the toy world is built and kept")
    toy_seed: int = _knob(0, "seed of the toy world: its names, facts, pictures and which of them are known")
    toy_pretrain_steps: int = _knob(320, "steps that teach the toy model to see and to copy")
    toy_teach_steps: int = _knob(120, "steps that teach it the known entities")
    toy_warmup_steps: int = _knob(240, "steps of supervised warm-up on scripted conversations")
    toy_named: int = _knob(0, "things of which it is taught the name alone: a fifth kind, for a text search at once")
    toy_beliefs: bool = _knob(True, "the scripted policy says what it believes before it acts")

    def __post_init__(self):
        _check_types(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def searches_index(self) -> bool:
        """True if searches are answered by a local index."""
        return self.search == "offline" and not self.search_url

    @property
    def searches_web(self) -> bool:
        """True if this process itself asks the web."""
        return self.search in ("live", "record") and not self.search_url


SECTIONS = {  # the first field of each section of --help
    "preset": "run",
    "model": "model",
    "train_files": "data",
    "engine": "rollout",
    "search_index": "search",
    "search_penalty": "reward",
    "loss": "loss",
    "lr": "optimiser",
    "eval_every": "evaluation and checkpoints",
    "files": "eval.py",
    "toy_dir": "toy world",
}

# The script of the authors: 32 questions x 4 conversations on 8 GPUs (MMSearch-R1, arXiv 2506.20670, and its code).
_QWEN = dict(
    model="Qwen/Qwen2.5-VL-7B-Instruct",
    engine="vllm",
    run_dir="runs/qwen2.5-vl-7b",
    prompts="prompts",
    gradient_checkpointing=True,
    steps=100,
    min_pixels=512 * 512,
    max_pixels=672 * 672 * 2,
    thumb_min_pixels=112 * 112,
    thumb_max_pixels=224 * 224,
    max_prompt_tokens=4096,
    max_tokens_per_turn=2048,
    max_tokens=8192,
    concurrency=32,
    max_tokens_per_batch=16384,
    prompts_per_step=32,
    samples_per_prompt=4,
    image_results=5,
    text_results=5,
    per_search_penalty=False,
    kl_coef=0.001,
    entropy_coef=0.0,
    loss_norm="sequence",
    lr=2e-6,
    adam_beta2=0.999,
    weight_decay=0.01,
    schedule="sigmoid",
    offload_reference=True,
    save_every=10,
    eval_every=10,
)
PRESETS = {
    "toy": {},
    "qwen2.5-vl-3b": {**_QWEN, "model": "Qwen/Qwen2.5-VL-3B-Instruct", "run_dir": "runs/qwen2.5-vl-3b"},
    "qwen2.5-vl-7b": _QWEN,
    # the paper: 512 questions x 8 conversations, mini-batches of 128 questions, 32 GPUs, best at step 50
    "qwen2.5-vl-7b-paper": {
        **_QWEN,
        "run_dir": "runs/qwen2.5-vl-7b-paper",
        "prompts_per_step": 512,
        "samples_per_prompt": 8,
        "updates_per_step": 4,
        "schedule": "constant",
        "steps": 50,
    },
}


def _check_types(cfg):
    for name, kind in get_type_hints(Config).items():
        value = getattr(cfg, name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(cfg, name, value := float(value))
        if kind == tuple[str, ...]:
            if isinstance(value, list):
                object.__setattr__(cfg, name, value := tuple(value))
            ok = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        else:
            kinds = get_args(kind) or (kind,)
            ok = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if not ok:
            raise InputError(f"{name}={value!r}: expected {getattr(kind, '__name__', kind)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}={value}: expected a finite number")


def _need(ok, message):
    if not ok:
        raise InputError(message)


def _choices(f):
    return tuple(PRESETS) if f.name == "preset" else f.metadata["choices"]


POSITIVE = """
    toy_pretrain_steps toy_teach_steps toy_warmup_steps prompts_per_step samples_per_prompt max_turns
    max_tokens_per_turn max_tokens max_prompt_tokens concurrency tensor_parallel tool_threads image_results text_results
    updates_per_step epochs_per_step max_tokens_per_batch keep_last min_pixels thumb_min_pixels lr temperature
    gpu_memory max_grad_norm dist_timeout sigmoid_midpoint max_mismatch judge_concurrency judge_timeout search_deadline
    connect_timeout read_timeout retry_pause page_characters serpapi_in_flight reader_in_flight summarizer_in_flight
"""
NOT_NEGATIVE = """
    seed steps threads shard_size max_image_searches max_text_searches rollout_deadline penalty_ramp_steps clip_high
    kl_coef entropy_coef weight_decay warmup_steps eval_every val_limit save_every eval_temperature toy_seed samples
    search_budget search_retries serpapi_per_second reader_per_second summarizer_per_second price_search price_reader
    price_summarizer gpus toy_named
"""
SHARES = "search_penalty format_weight min_lr_factor clip_low balance sft_min_reward max_failed_searches"


def _check_ranges(cfg):
    for f in dataclasses.fields(cfg):
        value, choices = getattr(cfg, f.name), _choices(f)
        _need(not choices or value in choices, f"{f.name}={value!r}: choose one of {', '.join(choices or ())}")
    for name in POSITIVE.split():
        _need(getattr(cfg, name) > 0, f"{name}={getattr(cfg, name)}: must be above 0")
    for name in NOT_NEGATIVE.split():
        _need(getattr(cfg, name) >= 0, f"{name}={getattr(cfg, name)}: must not be negative")
    for name in ("importance_cap", "trust_bound"):
        value = getattr(cfg, name)
        _need(value == 0 or value >= 1, f"{name}={value}: must be 0 (off) or at least 1")
    for name in SHARES.split():
        _need(0 <= getattr(cfg, name) <= 1, f"{name}={getattr(cfg, name)}: must be between 0 and 1")
    for name in ("adam_beta1", "adam_beta2"):
        _need(0 <= getattr(cfg, name) < 1, f"{name}={getattr(cfg, name)}: must be from 0 to below 1")
    _need(max(cfg.seed, cfg.toy_seed) < 2**63, "seed and toy_seed must be below 2**63")
    _need(cfg.toy_named <= 48, f"toy_named={cfg.toy_named}: at most 48, or too few things are left to be unknown")


def _check_combinations(cfg):
    _need(cfg.samples_per_prompt > 1, "samples_per_prompt=1: a group of one has no advantage; give at least 2")
    for low, high in (("min_pixels", "max_pixels"), ("thumb_min_pixels", "thumb_max_pixels")):
        cells = getattr(cfg, high) // 784  # a picture's sides are multiples of 28 pixels
        _need(getattr(cfg, low) <= cells * 784, f"{low} to {high}: no multiple of 28 * 28 = 784 pixels lies between")
    _need(cfg.max_tokens_per_turn < cfg.max_tokens, "max_tokens_per_turn must be below max_tokens")
    _need(cfg.max_prompt_tokens < cfg.max_tokens, "max_prompt_tokens must be below max_tokens: nothing could be said")
    _need(
        cfg.max_tokens_per_batch >= cfg.max_tokens,
        f"max_tokens_per_batch={cfg.max_tokens_per_batch} cannot hold a conversation of max_tokens={cfg.max_tokens}",
    )
    _need(
        cfg.prompts_per_step % cfg.updates_per_step == 0,
        f"updates_per_step={cfg.updates_per_step} does not divide prompts_per_step={cfg.prompts_per_step}",
    )
    cells = cfg.min_pixels // 784
    _need(cells < cfg.max_tokens, f"a picture of min_pixels={cfg.min_pixels} takes {cells} tokens, max_tokens is less")
    _need(
        cfg.tensor_parallel == 1 or cfg.engine == "vllm",
        f"tensor_parallel={cfg.tensor_parallel} is for --engine vllm; the in-process engine is not split",
    )
    _need(
        not (cfg.deterministic and cfg.engine == "vllm"),
        "deterministic needs --engine torch: vLLM's batches, and so the last bits, depend on timing",
    )
    _need(not (cfg.resume and cfg.overwrite), "resume and overwrite exclude each other")
    _need(cfg.question or not cfg.image, "image needs a question to go with it")
    _need(not (cfg.files and cfg.question), "give either files to evaluate on or a question to ask, not both")
    for judge in cfg.judges:
        _need(judge in JUDGES, f"judges: no judge {judge!r}; choose from {', '.join(JUDGES)}")
    address = urlsplit(cfg.judge_url)
    _need(address.scheme in ("http", "https") and address.hostname, f"judge_url={cfg.judge_url!r}: not an http(s) URL")
    _need("@" not in address.netloc, "judge_url: no user or password in it, please; the key goes in JUDGE_API_KEY")
    _need(not cfg.label or cfg.mode == "agent", f"label needs a model that may search: mode={cfg.mode} cannot tell")
    fast = cfg.attention in ("flash", "varlen")
    _need(not fast or cfg.device != "cpu", f"attention={cfg.attention} needs a GPU, and device is cpu")
    _need(not fast or cfg.dtype != "fp32", f"attention={cfg.attention} computes in bf16, and dtype is fp32")
    _need(
        not (cfg.deterministic and cfg.rollout_deadline),
        "deterministic and rollout_deadline exclude each other: a clock never cuts twice at the same place",
    )
    _need(
        cfg.search_url or cfg.search_cache or cfg.search not in ("record", "replay"),
        f"search={cfg.search} needs --search_cache, the file of kept results",
    )
    _check_urls(cfg)
    _need(
        cfg.preset == "toy" or cfg.mode == "direct" or cfg.plan or not cfg.searches_index or cfg.search_index,
        f"preset {cfg.preset} needs --search_index (python searchdb.py index builds one), or another --search",
    )


def _check_urls(cfg):
    for name in "search_url serpapi_url reader_url summarizer_url image_base_url".split():
        value = getattr(cfg, name)
        _need(
            re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", value)
            or not value
            and name not in ("serpapi_url", "reader_url"),
            f"{name}={value!r}: expected http(s)://host[:port][/path], without user, password or query",
        )
    host, _, port = cfg.serve_address.rpartition(":")
    _need(host and port.isdigit() and int(port) < 65536, f"serve_address={cfg.serve_address!r}: expected host:port")


def parse(argv: list[str] | None = None) -> Config:
    """The command line as a Config (argv: without the program's name; None: sys.argv[1:]). Raises InputError."""
    parser = _Parser(
        allow_abbrev=False,
        formatter_class=_Help,
        usage="%(prog)s [--key value | --key=value] ...",
        description="nanoMMSearch: settings of train.py, eval.py and toy.py, with their choices and [defaults]",
    )
    hints, group = get_type_hints(Config), None
    for f in dataclasses.fields(Config):
        if f.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[f.name])
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=_help(f), **_reading(hints[f.name]))
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0].lstrip("-")
        near = difflib.get_close_matches(key, hints, n=1)
        raise InputError(
            f"unknown argument {unknown[0]!r}" + (f"; did you mean --{near[0]}?" if near else "; see --help")
        )
    given = vars(known)
    preset = given.get("preset", "toy")
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r}: choose one of {', '.join(PRESETS)}")
    return Config(**{**PRESETS[preset], **given})


def save(cfg: Config, path: str | Path) -> None:
    """Write the configuration as JSON, atomically."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    os.replace(temporary, path)


def run_main(main) -> None:
    """Call main(); bad input becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank sees the same input; one of them says so
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=120)


def _reading(kind):
    """How argparse reads a field of this type."""
    if kind == tuple[str, ...]:
        return dict(nargs="+", action="extend", metavar="FILE")
    if bool in (kind, *get_args(kind)):
        return dict(nargs="?", const=True, metavar="BOOL", type=_bool if kind is bool else _bool_or_auto)
    return dict(type=kind, metavar={str: "TEXT", int: "INT", float: "FLOAT"}[kind])


def _bool(text):
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _bool_or_auto(text):
    return None if text.lower() == "auto" else _bool(text)


def _help(f):
    """The line of --help: meaning, choices and default."""
    choices = f" ({', '.join(_choices(f))})" if _choices(f) else ""
    default = {None: "auto", "": "-", (): "-"}.get(f.default, f.default)
    return f"{f.metadata['help']}{choices} [{default}]".replace("%", "%%")
