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
import math
import random
import resource
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import search
import toy
from analysis.curves import plot
from analysis.results import read_results
from chat import Chat, drop_overlong
from checkpoint import RunDir, Stopper, check_log, export_hf, load_state
from config import Config, InputError, parse, run_main
from data import Episode, Stop, load_questions, write_jsonl
from engines import EngineDied, engine_limits, make_engine
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
    PackedBatch,
    adamw,
    all_sum,
    all_to_all,
    compute_dtype,
    equal_counts,
    full_weights,
    imitation_loss,
    init_distributed,
    is_deterministic,
    load_policy,
    logprobs,
    pack,
    update,
)
from reward import ramped_penalty, record, score_episode, summarize
from rollout import SearchDown, check_searches, evaluate, replay, rollout_metrics, run, share


@dataclass
class Batch:
    """What one update sees on this rank."""

    rows: list[PackedBatch]
    advantages: torch.Tensor  # float32 [N], of the episodes in the rows
    names: list[str]  # of those episodes
    uncounted: float  # what the conversations that need not be run add to the denominator
    old: list[torch.Tensor] | None = None  # [S] of each row: log-probs before the first update
    ref: list[torch.Tensor] | None = None  # [S] of each row: log-probs of the reference model


def train_step(
    policy, reference, optimizer, episodes: list[Episode], advantages, parts, chat, cfg, device,
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
            episodes, advantages, policy, chat, cfg, device,
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
            loss = partial(batch_loss, batch, cfg, gaps)
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


def make_batch(chosen: list[int], episodes, advantages, policy, chat, cfg: Config, device) -> Batch:
    """Pack the chosen episodes; the idle ones are in the denominator, but not run."""
    idle = [i for i in chosen if has_no_gradient(advantages[i], cfg)]
    active = [i for i in chosen if i not in idle]
    rows = pack([episodes[i] for i in active], chat, policy, cfg.max_tokens_per_batch)
    uncounted = sum(sum(episodes[i].sampled) for i in idle) if cfg.loss_norm == "tokens" else len(idle)
    names = [episode_name(episodes[i]) for i in active]
    return Batch(equal_counts(rows, chat, device), advantages[active], names, uncounted)


def has_no_gradient(advantage: float, cfg: Config) -> bool:
    """Without an advantage there is no gradient, unless KL or entropy bonus have one, or the log-probs decide whether
    the conversation counts."""
    return advantage == 0 and not (cfg.kl_coef or cfg.entropy_coef or cfg.trust_bound)


def episode_name(episode: Episode) -> str:
    """Tells the step's conversations apart."""
    return f"{episode.question_id} sample {episode.sample}"


def batch_loss(batch: Batch, cfg: Config, gaps: dict[str, torch.Tensor], number: int, row: PackedBatch, logp, entropy):
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


def balance(episodes: list[Episode], advantages: list[float], numbers, questions, chat, cfg: Config):
    """Spread the step's conversations over the ranks by what there is to train on: [(episode, advantage)], this rank's
    new part, in the order of the questions. A question's conversations stay together, because they share an image.

    numbers: question id -> place in the step; questions: by id. All ranks must call it.
    """
    groups = defaultdict(list)
    for episode, advantage in zip(episodes, advantages, strict=True):
        groups[numbers[episode.question_id]].append((episode, advantage))
    if dist.get_world_size() == 1:
        return [pair for number in sorted(groups) for pair in groups[number]]
    load = lambda pairs: sum(len(e.tokens) for e, a in pairs if not has_no_gradient(a, cfg))  # noqa: E731
    loads = [(number, load(pairs), dist.get_rank()) for number, pairs in groups.items()]
    goal = spread(gather(loads), len(numbers) // cfg.updates_per_step, dist.get_world_size())
    outbox = [[] for _ in range(dist.get_world_size())]
    for number, pairs in groups.items():
        if goal[number] != dist.get_rank():
            outbox[goal[number]] += [(number, e.serialize(), a) for e, a in pairs]
    here = [(n, e, a) for n, pairs in groups.items() if goal[n] == dist.get_rank() for e, a in pairs]
    for part in all_to_all(outbox):
        here += [(n, Episode.deserialize(parcel, questions, chat), a) for n, parcel, a in part]
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


def load_conversations(cfg: Config, chat: Chat, search, toy_files: tuple[str, ...]) -> tuple[list[Episode], Counter]:
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
                episode = replay(r, question, chat, search)
            except ValueError as error:
                left_out[str(error)] += 1
                continue
            if score_episode(episode, cfg).reward < cfg.sft_min_reward:
                left_out[f"earned less than {cfg.sft_min_reward}"] += 1
            else:
                episodes.append(episode)
    return episodes, left_out


def signal_metrics(advantages: dict[int, float], cfg: Config, device) -> dict[str, float]:
    """What the rewards tell, over all ranks: mean |advantage|, and the share of groups in which all earned the same."""
    groups = defaultdict(list)
    for index, advantage in advantages.items():
        groups[index // cfg.samples_per_prompt].append(advantage)
    sums = {
        "advantage": sum(map(abs, advantages.values())),
        "zero_variance_groups": sum(not any(group) for group in groups.values()),
        "n": len(advantages),
        "groups": len(groups),
    }
    sums = all_sum(sums, device)
    return {
        "advantage_abs": sums["advantage"] / max(sums["n"], 1.0),
        "zero_variance_groups": sums["zero_variance_groups"] / max(sums["groups"], 1.0),
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
        self.cfg, self.chat, self.search = (
            cfg,
            Chat(folder, cfg),
            search.open_search(cfg, cfg.search_index or toy.locate(cfg).index),
        )
        train_files, val_files = toy.question_files(cfg)
        if cfg.loss == "sft":
            self.train = self._conversations((str(world.train), str(world.val)))
        else:
            self.train = self._questions(train_files, "training")
        self.val = self._questions(val_files, "validation")[: cfg.val_limit or None] if val_files else []
        asked = [e.question for e in self.train] if cfg.loss == "sft" else self.train
        limits = engine_limits(folder, cfg, self.device, [*asked, *self.val])
        if rank == 0:
            print(f"engine {cfg.engine}: {limits}", file=sys.stderr)
        search.check_questions([*asked, *self.val], cfg)
        self.policy = load_policy(folder, self.chat, cfg, self.device, offload=cfg.offload_optimizer)
        self.questions = {q.id: q for q in asked}
        self.reference = None
        if cfg.kl_coef:
            self.reference = load_policy(
                folder, self.chat, cfg, self.device, trainable=False, offload=cfg.offload_reference
            )  # fmt: skip
        self.optimizer = adamw(self.policy, cfg, self.device)
        self.engine = make_engine(folder, self.chat, cfg, self.device, limits)
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
            if line := search.estimate(self._how_many(), cfg):
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
        questions, dropped = drop_overlong(loaded, self.chat)
        if dropped and not quiet:
            print(
                f"dropped {dropped} {what} questions over max_prompt_tokens={self.cfg.max_prompt_tokens}",
                file=sys.stderr,
            )
        if not questions:
            raise InputError(f"no {what} question is left of {len(loaded)} in {', '.join(files)}")
        return questions

    def _conversations(self, toy_files):
        episodes, left_out = load_conversations(self.cfg, self.chat, self.search, toy_files)
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
                self.val, self.engine, self.search, self.chat, self.cfg, temperature=temperature, step=step,
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
        export_hf(self.dir.path / name, self.policy, self.chat, compute_dtype(self.cfg, self.device))

    def rollout(self, step: int) -> list[Episode]:
        """This rank's conversations of the step."""
        mine = share(questions_of_step(self.train, step, self.cfg), self.cfg)
        with tqdm(
            total=len(mine) * self.cfg.samples_per_prompt, desc="rollout", leave=False, disable=dist.get_rank() != 0
        ) as bar:  # fmt: skip
            hold = lambda: run(  # noqa: E731
                mine, self.engine, self.search, self.chat, self.cfg, samples=self.cfg.samples_per_prompt, step=step,
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
        mine = balance(chosen, signals, numbers, self.questions, self.chat, cfg)
        # Mini-batches are runs of the step's questions.
        parts = [numbers[e.question_id] * cfg.updates_per_step // len(numbers) for e, _ in mine]
        gaps = {}
        write = lambda: self._write_rollouts(step, episodes, scores, advantages, gaps)  # noqa: E731
        try:
            learned = train_step(
                self.policy, self.reference, self.optimizer, [e for e, _ in mine], torch.tensor([a for _, a in mine]),
                parts, self.chat, cfg, self.device, gaps,
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
        rows = equal_counts(pack(mine, self.chat, self.policy, cfg.max_tokens_per_batch), self.chat, self.device)
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
        if cfg.drop_zero_variance_groups:
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
        rows = equal_counts(
            pack(episodes, self.chat, self.policy, self.cfg.max_tokens_per_batch), self.chat, self.device
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
        text += f"{episode.chat.show(context)}⟦{episode.chat.show(said)}⟧"
        position = turn.end
    return text + episode.chat.show(episode.tokens[position:])


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
