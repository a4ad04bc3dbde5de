"""GRPO for a vision-language model that learns when and how to search (MMSearch-R1, arXiv 2506.20670).

    torchrun train.py                                  # the toy world, on a laptop (plain `python train.py` is the
    same)
    torchrun --nproc_per_node 2 train.py               # two processes, FSDP2
    torchrun --nproc_per_node 8 train.py --preset qwen2.5-vl-7b --train_files F... --val_files F... --search_index DB

A step holds conversations about some questions, scores them, and makes them more or less likely by how they compare
with the others about the same question:

    episodes = run(questions, engine, search)          # rollout.py: multi-turn, with real searches
    rewards  = score(episodes)                         # reward.py
    update(policy, policy_loss(logp, advantages))      # grpo.py, policy.py
    engine.load_weights(full_weights(policy))

    python train.py --loss sft --train_files conversations.jsonl     # a cold start: imitate what eval.py has written

Deviations from the paper are listed in the README. --help lists every setting.
"""

import dataclasses
import importlib
import json
import math
import os
import random
import resource
import secrets
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import config
import tools
import toy
from config import Config, InputError, parse, run_main
from data import ERROR_KINDS, Codec, Episode, Stop, Usage, drop_overlong, load_questions, path_of
from eval import evaluate, open_search, question_files, record, score_episode, summarize
from grpo import (
    group_advantages,
    kl_penalty,
    mismatch,
    policy_loss,
    token_weights,
    truncated_importance,
    trusted_sequences,
)
from policy import (
    NonFinite,
    Row,
    adamw,
    all_max,
    all_sum,
    compute_dtype,
    even_rows,
    export_hf,
    full_weights,
    imitation_loss,
    init_distributed,
    is_deterministic,
    load_policy,
    load_state,
    logprobs,
    pack,
    read_state,
    save_state,
    swap,
    update,
)
from results import read_jsonl, read_results, write_jsonl
from reward import ramped_penalty
from rollout import EngineDied, engine_limits, make_engine, replay, run, share

# ---------------------------------------------------------------------------------------------------- one step


@dataclass
class Batch:
    """What one update sees on this rank."""

    rows: list[Row]
    advantages: torch.Tensor  # float32 [N], of the episodes in the rows
    names: list[str]  # of those episodes
    uncounted: float  # what the conversations that need not be run add to the denominator
    old: list[torch.Tensor] | None = None  # [S] of each row: log-probs before the first update
    ref: list[torch.Tensor] | None = None  # [S] of each row: log-probs of the reference model


def train_step(
    policy, reference, optimizer, episodes: list[Episode], advantages, parts, codec, cfg, device,
    gaps: dict[str, torch.Tensor] | None = None,
) -> dict:  # fmt: skip
    """Update the policy on this rank's conversations, together with the other ranks; returns the step's global metrics.

    advantages: float32 [N]; parts: which of the updates_per_step mini-batches each episode is in. gaps, if given, is
    filled with those of the episodes that are run: episode_name -> trainer's minus sampler's log-prob [S], nats.
    Raises NonFinite.
    """
    gaps = {} if gaps is None else gaps
    batches = [
        make_batch(
            [i for i, its_part in enumerate(parts) if its_part == part],
            episodes, advantages, policy, codec, cfg, device,
        )
        for part in range(cfg.updates_per_step)
    ]  # fmt: skip
    started = time.monotonic()
    for batch in batches:
        # With one update the old log-probs are the new ones, detached; with several they are computed before the first.
        if cfg.updates_per_step * cfg.epochs_per_step > 1:
            batch.old = logprobs(policy, batch.rows, cfg.temperature, device)
        if reference:
            batch.ref = logprobs(reference, batch.rows, cfg.temperature, device)
    totals, seconds = Counter(), time.monotonic() - started
    for _ in range(cfg.epochs_per_step):
        for batch in batches:
            loss = partial(row_loss, batch, cfg, gaps)
            try:
                sums = update(policy, optimizer, batch.rows, loss, cfg, device, entropy_grad=cfg.entropy_coef > 0)
            except NonFinite as error:  # on all ranks
                names = gather([batch.names[i] for i in error.episodes]) or gather(batch.names)
                raise NonFinite(f"{error} ({', '.join(names[:8])}{' ...' if len(names) > 8 else ''})", []) from None
            totals.update({**sums, "updates": 1, "loss": sums["loss"] / max(sums["count"], 1.0)})
    per_token = {name: totals[name] / totals["tokens"] for name in PER_TOKEN if totals["tokens"] and name in totals}
    return {
        "loss": totals["loss"] / totals["updates"],
        "grad_norm": totals["grad_norm"] / totals["updates"],
        "trained_tokens": totals["tokens"] / cfg.epochs_per_step,
        **per_token,
        **gap_metrics(list(gaps.values())),
        "seconds/logprobs": seconds,
    }


def gap_metrics(gaps: list[torch.Tensor]) -> dict[str, float]:
    """gaps: [S] of each conversation, trainer's minus sampler's log-prob. The largest of all ranks, and percentiles of
    the ratio of the two probabilities (1 where they agree)."""
    gaps = np.concatenate([np.zeros(0, np.float32), *gather([gap.numpy() for gap in gaps])])
    if not len(gaps):
        return {"mismatch/max": 0.0}
    low, middle, high = np.exp(np.quantile(gaps, (0.01, 0.5, 0.99)))
    shares = {"mismatch/ratio_p1": low, "mismatch/ratio_p50": middle, "mismatch/ratio_p99": high}
    return {"mismatch/max": float(np.abs(gaps).max()), **{name: float(value) for name, value in shares.items()}}


PER_TOKEN = (
    "ratio", "clip_low", "clip_high", "approx_kl", "kl", "entropy", "mismatch/mean", "mismatch/k3", "mismatch/masked",
    "mismatch/truncated",
)  # fmt: skip


def gather(items: list) -> list:
    """The lists of all ranks, joined."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def make_batch(chosen: list[int], episodes, advantages, policy, codec, cfg: Config, device) -> Batch:
    """Pack the chosen episodes; the idle ones are in the denominator, but not run."""
    idle = [i for i in chosen if is_idle(advantages[i], cfg)]
    active = [i for i in chosen if i not in idle]
    rows = pack([episodes[i] for i in active], codec, policy, cfg.max_tokens_per_batch)
    uncounted = sum(sum(episodes[i].sampled) for i in idle) if cfg.loss_norm == "tokens" else len(idle)
    names = [episode_name(episodes[i]) for i in active]
    return Batch(even_rows(rows, codec, device), advantages[active], names, uncounted)


def is_idle(advantage: float, cfg: Config) -> bool:
    """Without an advantage there is no gradient, unless KL or entropy bonus have one, or the log-probs decide whether
    the conversation counts."""
    return advantage == 0 and not (cfg.kl_coef or cfg.entropy_coef or cfg.trust_bound)


def episode_name(episode: Episode) -> str:
    """Tells the step's conversations apart."""
    return f"{episode.question_id} sample {episode.sample}"


def row_loss(batch: Batch, cfg: Config, gaps: dict[str, torch.Tensor], number: int, row: Row, logp, entropy):
    """(loss, count, stats) of a row for `policy.update`: sums over its sampled tokens, logp and entropy [S]."""
    old_logp = batch.old[number].to(logp.device) if batch.old else logp.detach()
    advantages = batch.advantages[row.episodes].to(logp.device).index_select(0, row.sequence)  # [S]
    ratio_of = row.sequence if cfg.ratio == "sequence" else None
    loss, stats = policy_loss(
        logp, old_logp, advantages, clip_low=cfg.clip_low, clip_high=cfg.clip_high, sequence_ids=ratio_of
    )
    if batch.ref:
        kl = kl_penalty(logp, batch.ref[number].to(logp.device), cfg.kl_kind)
        loss, stats["kl"] = loss + cfg.kl_coef * kl, kl.sum()
    loss = loss - cfg.entropy_coef * entropy
    gap = mismatch(old_logp, row.sampler_logp)
    lengths = torch.bincount(row.sequence, minlength=len(row.episodes)).tolist()
    parts = (old_logp - row.sampler_logp).cpu().split(lengths)
    gaps |= zip([batch.names[i] for i in row.episodes], parts, strict=True)
    stats |= {"entropy": entropy.sum(), "mismatch/mean": gap["abs_sum"], "mismatch/k3": gap["k3_sum"]}
    keep = None
    if cfg.trust_bound:
        keep = trusted_sequences(old_logp, row.sampler_logp, row.sequence, cfg.trust_bound)
        stats["mismatch/masked"] = (~keep).sum()
    if cfg.importance_cap:
        weight = truncated_importance(old_logp, row.sampler_logp, cfg.importance_cap)
        loss, stats["mismatch/truncated"] = loss * weight, (weight >= cfg.importance_cap).sum()
    weights, count = token_weights(row.sequence, cfg.loss_norm, keep, cfg.max_turns * cfg.max_tokens_per_turn)
    return (loss * weights).sum(), count + (batch.uncounted if number == 0 else 0), stats


def balance(episodes: list[Episode], advantages: list[float], numbers, questions, codec, cfg: Config):
    """Spread the step's conversations over the ranks by what there is to train on: [(episode, advantage)], this rank's
    new part, in the order of the questions. A question's conversations stay together, because they share an image.

    numbers: question id -> place in the step; questions: by id. All ranks must call it.
    """
    groups = defaultdict(list)
    for episode, advantage in zip(episodes, advantages, strict=True):
        groups[numbers[episode.question_id]].append((episode, advantage))
    if dist.get_world_size() == 1:
        return [pair for number in sorted(groups) for pair in groups[number]]
    load = lambda pairs: sum(len(e.tokens) for e, a in pairs if not is_idle(a, cfg))  # noqa: E731
    loads = [(number, load(pairs), dist.get_rank()) for number, pairs in groups.items()]
    goal = spread(gather(loads), len(numbers) // cfg.updates_per_step, dist.get_world_size())
    outbox = [[] for _ in range(dist.get_world_size())]
    for number, pairs in groups.items():
        if goal[number] != dist.get_rank():
            outbox[goal[number]] += [(number, e.parcel(), a) for e, a in pairs]
    here = [(n, e, a) for n, pairs in groups.items() if goal[n] == dist.get_rank() for e, a in pairs]
    for part in swap(outbox):
        here += [(n, Episode.unpack(parcel, questions, codec), a) for n, parcel, a in part]
    return [(e, a) for _, e, a in sorted(here, key=lambda item: (item[0], item[1].sample))]


def spread(loads: list[tuple[int, int, int]], part: int, ranks: int) -> dict[int, int]:
    """(number, load, where it is) of each group -> the rank that it goes to, the largest first and to the rank that has
    least so far; mini-batch by mini-batch (`part` numbers each), as ranks meet at the end of each."""
    goal, total = {}, Counter()
    for number, load, origin in sorted(loads, key=lambda item: (item[0] // part, -item[1], item[0])):
        place = min(range(ranks), key=lambda rank: (total[number // part, rank], rank != origin, rank))
        goal[number] = place
        total[number // part, place] += load
    return goal


def load_conversations(cfg: Config, codec: Codec, search, toy_files: tuple[str, ...]) -> tuple[list[Episode], Counter]:
    """The conversations in cfg.train_files that earn sft_min_reward or more, and why others are left out: reason -> how
    many.

    A record names its question; the questions, with their pictures, are those in cfg.files, else in the files that the
    header of the results names, else in toy_files. Pictures that a search found come from `search`. Raises InputError
    if a record's question is not there, or is another one.
    """
    episodes, left_out, loaded = [], Counter(), {}
    for path in cfg.train_files:
        header, records = read_results(path)
        settings = header.get("config", {})
        if settings.get("mode", "agent") != "agent":
            raise InputError(f"{path}: conversations of mode {settings['mode']}: only the agent's can be imitated")
        files = tuple(cfg.files or settings.get("files") or toy_files)
        if files not in loaded:
            loaded[files] = {q.id: q for q in load_questions(files, skip_bad_rows=cfg.skip_bad_rows, progress=False)}
        for r in tqdm(records, f"reading {path}", leave=False, disable=dist.get_rank() != 0):
            question = loaded[files].get(r["question_id"])
            if question is None or question.text != r["question"]:
                where = f"question {r['question_id']} is not in {', '.join(files)}"
                raise InputError(f"{path}: {where}: say with --files what it is about")
            try:
                episode = replay(r, question, codec, search)
            except ValueError as error:
                left_out[str(error)] += 1
                continue
            if score_episode(episode, cfg).reward < cfg.sft_min_reward:
                left_out[f"earned less than {cfg.sft_min_reward}"] += 1
            else:
                episodes.append(episode)
    return episodes, left_out


def rollout_metrics(episodes: list[Episode], scores, cfg: Config, device) -> dict[str, float]:
    """Global means over the step's conversations, aborted ones counted and left out of the means."""
    done = [(e, s) for e, s in zip(episodes, scores, strict=True) if e.stop != Stop.ABORTED]
    calls = [call for e, _ in done for call, _ in e.calls]
    sums = {
        "reward": sum(s.reward for _, s in done),
        "accuracy": sum(s.correct for _, s in done),
        "format": sum(s.format_ok for _, s in done),
        "search_ratio": len(calls) / max(1, min(cfg.max_image_searches + cfg.max_text_searches, cfg.max_turns - 1)),
        "image": sum(any(c.kind == "image" for c, _ in e.calls) for e, _ in done),
        "text": sum(any(c.kind == "text" for c, _ in e.calls) for e, _ in done),
        "turns": sum(len(e.turns) for e, _ in done),
        "tokens": sum(len(e.tokens) for e, _ in done),
        "tool_failures": sum(r.status == "error" for e in episodes for _, r in e.calls),
        **search_metrics([result for e in episodes for _, result in e.calls]),
        **{f"stop/{stop.value}": sum(e.stop == stop for e in episodes) for stop in Stop},
        "done": len(done),
    }
    sums = all_sum(sums, device)
    n = max(sums.pop("done"), 1.0)
    return {
        k: v if k.startswith(("stop/", "tool_", "errors/", "search/", "seconds/")) else v / n for k, v in sums.items()
    }


def search_metrics(results) -> dict[str, float]:
    """Sums: errors by kind, what was used, and seconds waited for the web."""
    used = {f.name: sum(getattr(r.usage, f.name) for r in results) for f in dataclasses.fields(Usage)}
    return {
        **{f"errors/{kind}": sum(r.error_kind == kind for r in results) for kind in ERROR_KINDS},
        "search/calls": len(results),
        "seconds/search": used.pop("seconds"),
        **{f"search/{name}": value for name, value in used.items()},
    }


class SearchDown(Exception):
    """Most searches of a step failed: its conversations say nothing about the policy."""


def check_searches(episodes: list[Episode], cfg: Config, device) -> None:
    """Raise SearchDown, on all ranks, if more than max_failed_searches of the step's searches failed, and more than a
    few. What the model asked wrongly is not counted."""
    kinds = Counter(r.error_kind for e in episodes for _, r in e.calls if r.error_kind != "bad_call")
    sums = all_sum({kind: kinds[kind] for kind in ("", *ERROR_KINDS)}, device)
    calls, failed = sum(sums.values()), sum(sums.values()) - sums.pop("")
    if failed >= FEW_FAILURES and failed > cfg.max_failed_searches * calls:
        said = ", ".join(f"{kind} {n:.0f}" for kind, n in sums.items() if n)
        raise SearchDown(f"{failed:.0f} of {calls:.0f} searches failed ({said}): more than max_failed_searches")


FEW_FAILURES = 5  # by themselves no reason to stop


def signal_metrics(advantages: dict[int, float], cfg: Config, device) -> dict[str, float]:
    """What the rewards tell, over all ranks: mean |advantage|, and the share of groups in which all earned the same."""
    groups = defaultdict(list)
    for index, advantage in advantages.items():
        groups[index // cfg.samples_per_prompt].append(advantage)
    sums = {
        "advantage": sum(map(abs, advantages.values())),
        "dead_groups": sum(not any(group) for group in groups.values()),
        "n": len(advantages),
        "groups": len(groups),
    }
    sums = all_sum(sums, device)
    return {
        "advantage_abs": sums["advantage"] / max(sums["n"], 1.0),
        "dead_groups": sums["dead_groups"] / max(sums["groups"], 1.0),
    }


def learning_rate(step: int, cfg: Config) -> float:
    """The rate at a step, counted from 0."""
    low, rest = cfg.min_lr_factor, 1 - cfg.min_lr_factor
    factor = {
        "constant": 1.0,
        "cosine": low + rest * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(cfg.steps, 1)))),
        "sigmoid": low + rest / (1 + math.exp(min(50.0, (step - cfg.sigmoid_midpoint) / (0.1 * cfg.sigmoid_midpoint)))),
    }[cfg.schedule]
    return cfg.lr * factor * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))


def questions_of_step(questions: list, step: int, cfg: Config) -> list:
    """The step's questions (or conversations): every epoch is a new permutation, of which an incomplete last batch is
    left out."""
    size = min(cfg.prompts_per_step, len(questions))
    epoch, batch = divmod(step, len(questions) // size)
    order = random.Random(f"{cfg.seed} epoch {epoch}").sample(range(len(questions)), len(questions))
    return [questions[i] for i in order[batch * size : (batch + 1) * size]]


# ------------------------------------------------------------------------------------------------ run directory


class RunDir:
    """config.json, metrics.jsonl, rollouts/, checkpoints/step-N, and the exports best/ and final/. Rank 0 writes."""

    def __init__(self, cfg: Config):
        """Look what is there, change nothing. Raises InputError, on all ranks, if this run may not go there."""
        self.cfg, self.path = cfg, Path(cfg.run_dir)
        self.metrics, self.rollouts = self.path / "metrics.jsonl", self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.resume_from = self._find_checkpoint()
        self.elsewhere = self.resume_from and self.resume_from.parent.resolve() != self.checkpoints.resolve()
        self.used = self.path.is_dir() and any(p.name != "config.json.tmp" for p in self.path.iterdir())
        if self.used:
            self._check_used()

    def _find_checkpoint(self) -> Path | None:
        if self.cfg.resume not in ("", "auto"):
            read_state(self.cfg.resume)
            return Path(self.cfg.resume)
        found = self.saved() if self.cfg.resume else []
        return found[-1] if found else None

    def _check_used(self):
        cfg = self.cfg
        if not (cfg.resume or cfg.overwrite):
            raise InputError(
                f"{self.path} is not empty: give --resume auto to go on, --overwrite to start anew, or --run_dir"
            )
        try:
            before = json.loads((self.path / "config.json").read_text())
            before["run_dir"]  # a model folder has a config.json, too
        except (OSError, ValueError, KeyError, TypeError):
            message = f"{self.path} is not empty and holds no run of this program; give another --run_dir"
            raise InputError(message) from None
        if self.elsewhere and self.saved():
            raise InputError(f"{self.path} is not empty and {self.resume_from} is another run's: give a new --run_dir")
        inputs = [cfg.model, cfg.search_index, cfg.search_cache, cfg.toy_dir]
        inputs += map(path_of, (*cfg.train_files, *cfg.val_files))
        inside = [f for f in inputs if f and self.path.resolve() in Path(f).resolve().parents]
        if cfg.overwrite and inside:
            raise InputError(f"--overwrite would delete {inside[0]}, which this run reads: give another --run_dir")
        now = json.loads(json.dumps(dataclasses.asdict(cfg)))
        changed = [k for k in now if k not in MAY_CHANGE and k in before and now[k] != before[k]]
        if cfg.resume and changed:
            name = changed[0]
            raise InputError(f"{self.path} was started with {name}={before[name]!r}, this is {name}={now[name]!r}")

    def prepare(self) -> None:
        """Make the directory ready: all of it new, or cut back to the checkpoint. Rank 0's part; the others wait."""
        if dist.get_rank() == 0:
            try:
                self._prepare()
            except OSError as error:
                raise InputError(f"{self.path}: cannot write ({error.strerror})") from None
        dist.barrier()

    def _prepare(self):
        if self.used and self.cfg.overwrite:
            old = self.path.with_name(f".{self.path.name}.removed")  # killed half-way, this must not look like a run
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.path, old)
            shutil.rmtree(old)
        self.path.mkdir(parents=True, exist_ok=True)
        config.save(self.cfg, self.path / "config.json")
        self.rollouts.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        self.metrics.touch()
        self.also_log = open_log(self.cfg, self.path)
        state = read_state(self.resume_from) if self.resume_from else {"step": 0, "metrics_bytes": 0}
        self._cut_back(state["step"], 0 if self.elsewhere else state["metrics_bytes"])

    def _cut_back(self, step, metrics_bytes):
        """Forget what came after the checkpoint: it will happen again."""
        os.truncate(self.metrics, metrics_bytes)
        for file in self.rollouts.glob("*-[0-9]*.jsonl*"):
            if int(file.name.split(".")[0].split("-")[1]) >= step or file.suffix == ".tmp":
                file.unlink()
        for folder in self.checkpoints.glob("step-*"):
            if folder.suffix == ".tmp" or int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)

    def saved(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [p for p in self.checkpoints.glob("step-*") if (p / "state.json").exists() and p.suffix != ".tmp"]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def log(self, entry: dict) -> None:
        if dist.get_rank() == 0:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(entry) + "\n")
            self.also_log(entry["step"], dict(flat({k: v for k, v in entry.items() if k not in ("step", "phase")})))

    def position(self) -> int:
        """Bytes of metrics.jsonl so far (rank 0's to know: other nodes may not see the file)."""
        return self.metrics.stat().st_size if dist.get_rank() == 0 else 0

    def read_log(self) -> list[dict]:
        return list(read_jsonl(self.metrics))

    def save(self, step: int, policy, optimizer, state: dict) -> None:
        """A checkpoint after `step` steps, unless it is there; then all but the last keep_last and the best one go."""
        path = self.checkpoints / f"step-{step:06d}"
        if not path.exists():
            save_state(path, policy, optimizer, state)
        if dist.get_rank() == 0:
            best = self.checkpoints / f"step-{state['best']['step']:06d}"
            for old in self.saved()[: -self.cfg.keep_last]:
                if old != best:
                    shutil.rmtree(old)
        dist.barrier()


def check_log(cfg: Config) -> None:
    """Raises InputError if the package that cfg.log needs is not there."""
    needed = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    try:
        if cfg.log:
            importlib.import_module(needed[cfg.log])
    except ImportError:
        raise InputError(f"log={cfg.log}: its package is not installed: pip install {cfg.log}") from None


def open_log(cfg: Config, folder: Path):
    """A function (step, {name: number}) that logs to cfg.log as well. wandb takes its mode from WANDB_MODE (offline:
    nothing leaves the machine); a resumed run goes on in the one it was."""
    if cfg.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def log(step, figures):
            for name, value in figures.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return log
    if cfg.log == "wandb":
        import wandb

        name = folder / "wandb.id"
        if not name.exists():
            name.write_text(secrets.token_hex(4))
        run = wandb.init(
            project="nanoMMSearch", name=folder.name, dir=folder, id=name.read_text(), resume="allow",
            config=dataclasses.asdict(cfg),
        )  # fmt: skip
        return lambda step, figures: run.log(figures, step=step)
    return lambda step, figures: None


def flat(figures: dict, prefix: str = ""):
    """Nested figures as pairs: {"greedy": {"all": {"n": 3}}} -> ("greedy/all/n", 3); what is no number is left out."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


# What a resumed run may set otherwise than the run it goes on with.
MAY_CHANGE = set(
    "resume overwrite run_dir steps save_every keep_last eval_every val_limit dist_timeout threads concurrency "
    "tool_threads rollout_deadline files image question eval_temperature out toy_dir "
    "log mode samples judges judge_url judge_model judge_cache judge_concurrency judge_timeout label balance "
    "search search_cache search_url serve_address search_budget search_deadline connect_timeout read_timeout "
    "search_retries retry_pause max_failed_searches serpapi_url serpapi_in_flight serpapi_per_second reader_url "
    "reader_in_flight reader_per_second summarizer_url summarizer_in_flight summarizer_per_second image_base_url "
    "image_upload allow_hosts price_search price_reader price_summarizer".split()
)


class Stopper:
    """SIGINT and SIGTERM: a rollout is left at once, anything else is finished; then all ranks agree to stop."""

    class Stopped(Exception):
        """All ranks leave."""

    class Interrupted(BaseException):  # no `except Exception` may swallow it
        """This rank's rollout is left."""

    def __init__(self, device, at_once: bool = True):
        """at_once: whether a rollout may be left in the middle; ranks that share an engine have to finish it."""
        self.device, self.at_once, self.asked, self.in_rollout = device, at_once, False, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.asked:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one kills
        self.asked = True
        if self.in_rollout:
            self.in_rollout = False  # once: what cleans up after it is not interrupted again
            raise self.Interrupted

    def rollout(self, hold):
        """hold() -> its value; raises Stopped on all ranks if any of them was asked to stop, and NonFinite likewise."""
        value, failed = None, False
        try:
            self.in_rollout = self.at_once
            if not self.asked:
                value = hold()
        except self.Interrupted:
            pass
        except NonFinite:
            failed = True
        finally:
            self.in_rollout = False
        if all_max(self.asked, self.device):
            raise self.Stopped
        if all_max(failed, self.device):
            raise NonFinite("the policy's logits are not finite while sampling", [])
        return value


# ------------------------------------------------------------------------------------------------------ the run


class Run:
    """Everything a run holds, and its phases."""

    def __init__(self, cfg: Config):
        check_log(cfg)
        if cfg.loss == "sft" and not cfg.train_files:
            raise InputError("loss=sft needs --train_files: JSONL files of conversations, as eval.py writes them")
        if cfg.mode != "agent":
            raise InputError(f"mode={cfg.mode} is for eval.py: training is of search on demand")
        self.device = init_distributed(cfg)
        self.ordered = is_deterministic(cfg, self.device)
        self.dir = RunDir(cfg)
        if cfg.model == "toy" or not cfg.train_files or (cfg.searches_index and not cfg.search_index):
            toy.ensure(cfg)
        world, rank = toy.locate(cfg), dist.get_rank()
        folder = str(world.model) if cfg.model == "toy" else cfg.model
        self.cfg, self.codec, self.search = cfg, Codec(folder, cfg), open_search(cfg)
        train_files, val_files = question_files(cfg)
        if cfg.loss == "sft":
            self.train = self._conversations((str(world.train), str(world.val)))
        else:
            self.train = self._questions(train_files, "training")
        self.val = self._questions(val_files, "validation")[: cfg.val_limit or None] if val_files else []
        asked = [e.question for e in self.train] if cfg.loss == "sft" else self.train
        limits = engine_limits(folder, cfg, self.device, [*asked, *self.val])
        if rank == 0:
            print(f"engine {cfg.engine}: {limits}", file=sys.stderr)
        tools.check_questions([*asked, *self.val], cfg)
        self.policy = load_policy(folder, self.codec, cfg, self.device, offload=cfg.offload_optimizer)
        self.questions = {q.id: q for q in asked}
        self.reference = None
        if cfg.kl_coef:
            self.reference = load_policy(
                folder, self.codec, cfg, self.device, trainable=False, offload=cfg.offload_reference
            )  # fmt: skip
        self.optimizer = adamw(self.policy, cfg, self.device)
        self.engine = make_engine(folder, self.codec, cfg, self.device, limits)
        self.seconds = Counter()  # of the last rollout's waiting for tools, of the last checkpoint
        self.state = {
            "step": 0, "metrics_bytes": 0, "threads": torch.get_num_threads(), "best": {"step": -1, "accuracy": -1.0}
        }  # fmt: skip
        if self.dir.resume_from:
            self._resume()
        self.dir.prepare()
        self.stopper = Stopper(self.device, cfg.tensor_parallel == 1)
        if rank == 0:
            print(
                f"{len(self.train)} {'conversations' if cfg.loss == 'sft' else 'training questions'} and "
                f"{len(self.val)} validation questions; {self.dir.path}",
                file=sys.stderr,
            )
            if line := tools.estimate(self._how_many(), cfg):
                print(line, file=sys.stderr)

    def _how_many(self):
        """How many conversations this run will hold."""
        steps = self.cfg.steps - self.state["step"]
        validations = 2 + (steps - 1) // self.cfg.eval_every if self.cfg.eval_every else 2
        a_step = min(self.cfg.prompts_per_step, len(self.train)) * self.cfg.samples_per_prompt
        if self.cfg.loss == "sft":  # its conversations have been held
            a_step = 0
        return steps * a_step + validations * 2 * len(self.val)  # greedy and sampled

    def _questions(self, files, what):
        quiet = dist.get_rank() != 0
        loaded = load_questions(files, skip_bad_rows=self.cfg.skip_bad_rows, progress=not quiet)
        questions, dropped = drop_overlong(loaded, self.codec)
        if dropped and not quiet:
            print(
                f"dropped {dropped} {what} questions over max_prompt_tokens={self.cfg.max_prompt_tokens}",
                file=sys.stderr,
            )
        if not questions:
            raise InputError(f"no {what} question is left of {len(loaded)} in {', '.join(files)}")
        return questions

    def _conversations(self, toy_files):
        episodes, left_out = load_conversations(self.cfg, self.codec, self.search, toy_files)
        why = "; ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
        if why and dist.get_rank() == 0:
            print(f"conversations left out: {why}", file=sys.stderr)
        if not episodes:
            raise InputError(
                f"no conversation to imitate in {', '.join(self.cfg.train_files)}" + f" ({why})" * bool(why)
            )
        return episodes

    def _resume(self):
        saved = load_state(self.dir.resume_from, self.policy, self.optimizer)
        if self.ordered and saved["threads"] != self.state["threads"]:
            raise InputError(
                f"{self.dir.resume_from} was made with {saved['threads']} threads a process, this run has "
                f"{self.state['threads']}: give --threads {saved['threads']}, or --deterministic false"
            )
        own = ("metrics_bytes", "best") if self.dir.elsewhere else ()
        self.state |= {key: saved[key] for key in self.state if key not in own}

    def evaluate(self, step: int) -> None:
        """Validation, greedy and at the training temperature; the best model by greedy accuracy is exported."""
        entry, records, started = {"step": step, "phase": "eval"}, [], time.monotonic()
        for name, temperature in (("greedy", 0.0), ("sampled", self.cfg.temperature)):
            part = evaluate(
                self.val, self.engine, self.search, self.codec, self.cfg, temperature=temperature, step=step,
                progress=f"validation, {name}", ordered=self.ordered, guard=self.stopper.rollout,
            )  # fmt: skip
            entry[name] = summarize(part, self.cfg)
            records += [{"mode": name, **r} for r in part]
        self.dir.log(entry | {"seconds/evaluation": time.monotonic() - started})
        if dist.get_rank() == 0:
            write_jsonl(self.dir.rollouts / f"eval-{step:06d}.jsonl", records)
        if entry["greedy"]["all"]["accuracy"] > self.state["best"]["accuracy"]:
            self.state["best"] = {"step": step, "accuracy": entry["greedy"]["all"]["accuracy"]}
            self._export("best")
            if step:
                self.save(step)

    def save(self, step: int) -> None:
        started = time.monotonic()
        self.dir.save(step, self.policy, self.optimizer, self.state)
        self.seconds["checkpoint"] = time.monotonic() - started

    def _export(self, name):
        """As a Hugging Face folder, in the type that log-probs were computed in."""
        export_hf(self.dir.path / name, self.policy, self.codec, compute_dtype(self.cfg, self.device))

    def rollout(self, step: int) -> list[Episode]:
        """This rank's conversations of the step."""
        mine = share(questions_of_step(self.train, step, self.cfg), self.cfg)
        with tqdm(
            total=len(mine) * self.cfg.samples_per_prompt, desc="rollout", leave=False, disable=dist.get_rank() != 0
        ) as bar:  # fmt: skip
            hold = lambda: run(  # noqa: E731
                mine, self.engine, self.search, self.codec, self.cfg, samples=self.cfg.samples_per_prompt, step=step,
                temperature=self.cfg.temperature, ordered=self.ordered, progress=lambda _: bar.update(),
                seconds=self.seconds,
            )  # fmt: skip
            return self.stopper.rollout(hold)

    def step(self, step: int) -> dict:
        """One step of GRPO; returns its metrics."""
        cfg, started = self.cfg, time.monotonic()
        self.seconds["tools"] = 0.0
        episodes = self.rollout(step)
        check_searches(episodes, cfg, self.device)
        rolled_out = time.monotonic()
        penalty = ramped_penalty(cfg.search_penalty, step, cfg.penalty_ramp_steps)
        scores = [score_episode(e, cfg, penalty) for e in episodes]
        if self.device.type == "cuda":
            self.engine.sleep()  # its cache's memory is needed for the update
        if step == self.first:
            self._first_look(episodes)
        advantages, kept = self._advantages(episodes, scores)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        numbers = {q.id: n for n, q in enumerate(questions_of_step(self.train, step, cfg))}
        chosen, signals = [episodes[i] for i in kept], [advantages[i] for i in kept]
        mine = balance(chosen, signals, numbers, self.questions, self.codec, cfg)
        # Mini-batches are runs of the step's questions.
        parts = [numbers[e.question_id] * cfg.updates_per_step // len(numbers) for e, _ in mine]
        gaps = {}
        write = lambda: self._write_rollouts(step, episodes, scores, advantages, gaps)  # noqa: E731
        try:
            learned = train_step(
                self.policy, self.reference, self.optimizer, [e for e, _ in mine], torch.tensor([a for _, a in mine]),
                parts, self.codec, cfg, self.device, gaps,
            )  # fmt: skip
        except NonFinite:  # on all ranks
            write()  # to be looked at
            raise
        self.optimizer.zero_grad(set_to_none=True)  # the rollout has other uses for the memory
        write()
        updated = time.monotonic()
        self.engine.load_weights(full_weights(self.policy), version=step + 1)
        self.engine.wake()
        signal = signal_metrics(advantages, cfg, self.device)
        rolled = rollout_metrics(episodes, scores, cfg, self.device)
        metrics = {"step": step, "phase": "train", **rolled, **signal, **learned}
        finished = time.monotonic()
        tokens = metrics["tokens"] * min(cfg.prompts_per_step, len(self.train)) * cfg.samples_per_prompt
        return metrics | {
            "lr": learning_rate(step, cfg),
            "seconds/rollout": rolled_out - started,
            "seconds/tools": self.seconds["tools"],
            "seconds/update": updated - rolled_out - learned["seconds/logprobs"],
            "seconds/sync": finished - updated,
            "seconds/checkpoint": self.seconds["checkpoint"],
            "tokens_per_second": tokens / (finished - started),
            "memory_gb": peak_memory_gb(self.device),
        }

    def imitate(self, step: int) -> dict:
        """One supervised step; returns its metrics."""
        cfg, started = self.cfg, time.monotonic()
        mine = questions_of_step(self.train, step, cfg)[dist.get_rank() :: dist.get_world_size()]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        rows = even_rows(pack(mine, self.codec, self.policy, cfg.max_tokens_per_batch), self.codec, self.device)
        plain = dataclasses.replace(cfg, temperature=1.0)  # what a model says is learned as it is, whatever is sampled
        sums = update(self.policy, self.optimizer, rows, partial(imitation_loss, cfg.loss_norm), plain, self.device)
        if self.val:
            self.engine.load_weights(full_weights(self.policy), version=step + 1)
        seconds = time.monotonic() - started
        return {
            "step": step,
            "phase": "train",
            "loss": sums["loss"] / max(sums["count"], 1.0),
            "nll": sums["nll"] / max(sums["tokens"], 1.0),
            "grad_norm": sums["grad_norm"],
            "trained_tokens": sums["tokens"],
            "lr": learning_rate(step, cfg),
            "seconds/update": seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            "memory_gb": peak_memory_gb(self.device),
        }

    def _advantages(self, episodes, scores) -> tuple[dict[int, float], list[int]]:
        """The advantage of each conversation (by its index) that its group is compared by, and which of them train."""
        cfg = self.cfg
        compared = [i for i, e in enumerate(episodes) if self._compares(e)]
        rewards = torch.tensor([scores[i].reward for i in compared], dtype=torch.float64)
        groups = [i // cfg.samples_per_prompt for i in compared]
        values = group_advantages(rewards, groups, cfg.normalize_advantages, cfg.leave_one_out)
        advantages = dict(zip(compared, values.tolist(), strict=True))
        kept = compared
        if not cfg.train_on_truncated:
            kept = [i for i in kept if episodes[i].stop not in (Stop.TRUNCATED_TURN, Stop.MAX_TOKENS)]
        if cfg.drop_dead_groups:
            alive = {i // cfg.samples_per_prompt for i in compared if advantages[i]}
            kept = [i for i in kept if i // cfg.samples_per_prompt in alive]
        return advantages, kept

    def _compares(self, episode):
        failed = any(result.status == "error" for _, result in episode.calls)
        return episode.stop != Stop.ABORTED and (self.cfg.train_on_failed_tools or not failed)

    def _first_look(self, episodes):
        """Show a conversation with its mask, and make sure that sampler and trainer agree before the first update."""
        if dist.get_rank() == 0:
            shown = max(episodes, key=lambda e: len(e.turns))
            print(
                f"\na conversation; the policy is trained on what is between the brackets:\n{marked(shown)}\n",
                file=sys.stderr,
            )
        rows = even_rows(
            pack(episodes, self.codec, self.policy, self.cfg.max_tokens_per_batch), self.codec, self.device
        )
        logps = logprobs(self.policy, rows, self.cfg.temperature, self.device)
        gaps = [mismatch(logp, row.sampler_logp) for logp, row in zip(logps, rows, strict=True)]
        sums = all_sum({k: sum(float(g[k]) for g in gaps) for k in ("abs_sum", "tokens")}, self.device)
        gap = sums["abs_sum"] / max(sums["tokens"], 1.0)
        if not gap <= self.cfg.max_mismatch:
            raise InputError(
                f"sampler and trainer disagree about the same tokens by {gap:.3f} nats on average (max_mismatch="
                f"{self.cfg.max_mismatch}): check that both hold the same weights, dtype, image sizes and chat template"
            )

    def _write_rollouts(self, step, episodes, scores, advantages, gaps):
        # Conversations were trained on where there was room.
        gaps = dict(gather([(name, gap.abs().sum().item() / max(1, len(gap))) for name, gap in gaps.items()]))
        mine = [
            {**record(e, s), "step": step, "advantage": advantages.get(i), "logp_gap": gaps.get(episode_name(e))}
            for i, (e, s) in enumerate(zip(episodes, scores, strict=True))
        ]
        parts = [None] * dist.get_world_size()
        dist.gather_object(mine, parts if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            write_jsonl(self.dir.rollouts / f"step-{step:06d}.jsonl", [r for part in parts for r in part])

    def loop(self) -> None:
        cfg = self.cfg
        self.first = self.state["step"]
        self.engine.load_weights(full_weights(self.policy), version=self.first)
        bar = tqdm(range(self.first, cfg.steps + 1), initial=self.first, total=cfg.steps, disable=dist.get_rank() != 0)
        for step in bar:
            last = step == cfg.steps
            try:
                if self.val and (last or step == 0 or (cfg.eval_every and step % cfg.eval_every == 0)):
                    self.evaluate(step)
                if last:
                    break
                metrics = self.imitate(step) if cfg.loss == "sft" else self.step(step)
            except NonFinite as error:
                message = f"error: step {step}: {error}. The last checkpoint is as it was."
                sys.exit(message if dist.get_rank() == 0 else 1)
            except EngineDied as error:
                again = "the last checkpoint is as it was, --resume auto goes on from it"
                sys.exit(f"error: step {step}: {error}; {again}")
            except SearchDown as error:
                if step:
                    self.save(step)
                message = f"error: step {step}: {error}. --resume auto goes on from here."
                sys.exit(message if dist.get_rank() == 0 else 1)
            self.dir.log(metrics)
            self.state |= {"step": step + 1, "metrics_bytes": self.dir.position()}
            names = ("nll",) if cfg.loss == "sft" else ("reward", "accuracy", "search_ratio")
            shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in names)
            phases = [name for name in ("rollout", "tools", "update") if f"seconds/{name}" in metrics]
            spent = " ".join(f"{name} {metrics[f'seconds/{name}']:.1f}" for name in phases)
            bar.set_postfix_str(f"{shown}, {metrics['tokens_per_second']:.0f} tokens/s, s: {spent}")
            if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                self.save(step + 1)
        self._export("final")
        if dist.get_rank() == 0:
            bar.close()
            print(before_and_after(self.dir.read_log()))
            print(f"model: {self.dir.path / 'final'}   metrics: {self.dir.metrics}")


def marked(episode: Episode) -> str:
    """The conversation as text, what the policy sampled (and is trained on) in brackets."""
    text, position = "", 0
    for turn in episode.turns:
        context, said = episode.tokens[position : turn.start], episode.tokens[turn.start : turn.end]
        text += f"{episode.codec.show(context)}⟦{episode.codec.show(said)}⟧"
        position = turn.end
    return text + episode.codec.show(episode.tokens[position:])


def peak_memory_gb(device) -> float:
    """Of the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def before_and_after(log: list[dict]) -> str:
    """The table at the end: first and last validation, by kind of question."""
    evals = [entry for entry in log if entry["phase"] == "eval"]
    if not evals:
        return "no validation questions"
    lines = []
    for mode in ("greedy", "sampled"):
        first, last = evals[0][mode], evals[-1][mode]
        width = max(map(len, first))
        lines.append(f"{mode:{width}}  accuracy        image search    text search     format")
        for kind in first:
            cells = [f"{first[kind][k]:.2f} -> {last[kind][k]:.2f}" for k in ("accuracy", "image", "text", "format")]
            lines.append(f"{kind:{width}}  " + "    ".join(cells))
        lines.append("")
    return "\n".join(lines)


PLOTTED = (
    "reward accuracy search_ratio format turns tokens loss entropy grad_norm mismatch/mean lr tokens_per_second".split()
)


def plot(runs: tuple[str, ...]) -> Path:
    """Draw the curves of runs over each other (dashed: greedy validation) into curves.png in the first one's folder.
    Needs matplotlib. Raises InputError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(15, 9), layout="constrained")
    charts = dict(zip(PLOTTED, figure.subplots(3, 4).flat, strict=True))
    for number, folder in enumerate(runs):
        log = list(read_jsonl(Path(folder) / "metrics.jsonl"))
        for key, axes in charts.items():
            axes.set_title(key)
            trained = [(e["step"], e[key]) for e in log if e["phase"] == "train" and e.get(key) is not None]
            judged = [(e["step"], e["greedy"]["all"].get(key)) for e in log if e["phase"] == "eval"]
            judged = [point for point in judged if point[1] is not None]
            axes.plot([p[0] for p in trained], [p[1] for p in trained], color=f"C{number}", label=folder)
            axes.plot([p[0] for p in judged], [p[1] for p in judged], "o--", color=f"C{number}", markersize=3)
    lines, labels = charts["reward"].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center")
    path = Path(runs[0]) / "curves.png"
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({error.strerror})") from None
    return path


def main() -> None:
    cfg = parse(sys.argv[1:])
    if cfg.plot:
        print(plot(cfg.plot))
        return
    if cfg.plan:
        from plan import plan as memory_plan

        print(memory_plan(cfg))
        return
    run = Run(cfg)
    try:
        run.loop()
    except Stopper.Stopped:
        step = run.state["step"]
        if step:
            run.save(step)
        if dist.get_rank() == 0:
            print(f"\nstopped after {step} steps; --resume auto goes on from there", file=sys.stderr)
    run.engine.close()
    if dist.is_initialized():  # vLLM ends it by itself
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
