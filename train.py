"""GRPO for a vision-language model that learns when and how to search (MMSearch-R1, arXiv 2506.20670).

    torchrun train.py                                  # the toy world, on a laptop (`python train.py` is the same)
    torchrun --nproc_per_node 2 train.py               # two processes, FSDP2
    torchrun --nproc_per_node 8 train.py --preset qwen2.5-vl-7b --train_files F... --val_files F... --search_index DB
    python train.py --loss sft --train_files conversations.jsonl     # a cold start: imitate what eval.py has written

A step rolls out conversations about some questions, scores them, and makes them more or less likely by how they compare
with the others about the same question (`Run.step`):

    episodes = rollout.run(questions)                  # rollout.py: multi-turn, with real searches
    samples  = rate(episodes)                          # reward.py, grpo.py: rewards and advantages
    update_policy(model, samples)                      # policy.py, grpo.py: packed batches, loss, optimiser
    engine.load_weights(full_weights(model))

Deviations from the paper are listed in the README. --help lists every option.
"""

import math
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import grpo
import policy
import toy
from chat import Chat, Episode
from checkpoint import RunDir, Stopper, check_log, export_hf, input_ids, load_state, peak_memory_gb
from config import Config, Options, need, parse, run_main
from data import Question, Stop, path_of, prompt_path, read_jsonl, thinned, write_jsonl
from engines import Engine, EngineDied, make_engine
from eval import load_prompts
from policy import NonFinite, PackedBatch, all_gather, all_sum, equal_counts, full_weights, pack, say
from reward import record
from rollout import Refill, Rollout, Sample, SearchDown, check_calls, evaluate, rate, share
from search import check_questions, estimate, open_search, web_part

NOT_PER_TOKEN = ("loss", "count", "grad_norm", "updates", "tokens", "stale/tokens")  # of an update; others are means
MAX_MISMATCH = 0.1  # nats a token, on average, at the first step; a random tiny model in bf16 on a CPU has 0.02


# ------------------------------------------------------------------------------------------- samples and their ranks
def trained(samples: list[Sample], cfg: Config) -> list[Sample]:
    """Those that the update takes into account."""
    chosen = [s for s in samples if s.advantage is not None]
    if cfg.fatal_failures:
        chosen = [s for s in chosen if any(s.episode.trained)]
    if "truncated" in cfg.leave_out:
        chosen = [s for s in chosen if s.episode.stop not in (Stop.TRUNCATED_TURN, Stop.MAX_TOKENS)]
    if "zero_variance" in cfg.leave_out:
        varied = {s.number for s in samples if s.advantage}
        chosen = [s for s in chosen if s.number in varied]
    return chosen


def has_no_gradient(sample: Sample, cfg: Config) -> bool:
    """A zero advantage has no gradient, unless KL or entropy bonus have one, or the log-probs decide whether the
    conversation counts."""
    return sample.advantage == 0 and not (cfg.kl_coef or cfg.entropy_coef or cfg.trust_bound)


def advantage_metrics(samples: list[Sample]) -> dict[str, float]:
    """Over all ranks: the mean |advantage|, and the share of groups in which all earned the same."""
    groups = defaultdict(list)
    for sample in samples:
        if sample.advantage is not None:
            groups[sample.number].append(abs(sample.advantage))
    groups = all_gather(list(groups.values()))
    mean = sum(map(sum, groups)) / max(sum(map(len, groups)), 1)
    zero_variance = sum(not any(group) for group in groups) / max(len(groups), 1)
    return {"advantage_abs": mean, "zero_variance_groups": zero_variance}


def rebalance(
    samples: list[Sample], count: int, questions: dict[str, Question], chat: Chat, cfg: Config
) -> list[Sample]:
    """Spread the step's samples over the ranks by what there is to train on; this rank's new part, in the order of the
    questions. A question's samples stay together, because they share an image. count: questions in the step;
    questions: by id. All ranks must call it."""
    here, rank, ranks = [], dist.get_rank(), dist.get_world_size()
    load = Counter({s.number: 0 for s in samples})
    for s in samples:
        load[s.number] += 0 if has_no_gradient(s, cfg) else len(s.episode.tokens)
    loads = all_gather([(number, tokens, rank) for number, tokens in load.items()])
    target = assign_ranks(loads, count // cfg.updates_per_step, ranks)
    outbox = [[] for _ in range(ranks)]
    for s in samples:
        if target[s.number] == rank:
            here.append(s)
        else:
            outbox[target[s.number]].append((s.number, s.advantage, s.episode.serialize()))
    for received in policy.all_to_all(outbox):
        for number, advantage, sent in received:
            here.append(Sample(Episode.deserialize(sent, questions, chat), number, advantage=advantage))
    return sorted(here, key=lambda s: (s.number, s.episode.sample))


def assign_ranks(loads: list[tuple[int, int, int]], per_update: int, ranks: int) -> dict[int, int]:
    """(number, load, where it is) of each group -> the rank that it goes to, the largest first and to the rank that has
    least so far; mini-batch by mini-batch (`per_update` numbers each), as ranks meet at the end of each."""
    target, total = {}, Counter()
    for number, load, origin in sorted(loads, key=lambda item: (item[0] // per_update, -item[1], item[0])):
        part = number // per_update
        target[number] = min(range(ranks), key=lambda rank: (total[part, rank], rank != origin, rank))
        total[part, target[number]] += load
    return target


# ------------------------------------------------------------------------------------------------------- the update
def update_policy(model, reference, optimizer, samples: list[Sample], count: int, chat: Chat, cfg, device, step=0):
    """Update the policy on this rank's samples, together with the other ranks; returns the step's global metrics.

    count: questions in the step; its updates_per_step mini-batches are runs of them. Each trained episode is given its
    `logp_gap`. step: the version of the weights to begin with. Raises NonFinite.
    """
    mini_batches = []
    for part in range(cfg.updates_per_step):
        chosen = [s for s in samples if s.number * cfg.updates_per_step // count == part]
        mini_batches.append(make_mini_batch(chosen, model, chat, cfg))
    started = time.monotonic()
    for number, batches in enumerate(mini_batches):
        # In a step's first update the old log-probs are the new ones, detached; those of others are computed before it.
        if number or cfg.epochs_per_step > 1:
            for batch, logp in zip(batches, policy.logprobs(model, batches, cfg.temperature, device), strict=True):
                batch.old_logp = logp
        if reference:
            with policy.without_adapters(reference):
                logps = policy.logprobs(reference, batches, cfg.temperature, device)
            for batch, logp in zip(batches, logps, strict=True):
                batch.ref_logp = logp
    seconds = time.monotonic() - started
    totals, loss = Counter(), partial(batch_loss, cfg, step)
    for _ in range(cfg.epochs_per_step):
        for batches in mini_batches:
            sums = policy.update(model, optimizer, batches, loss, cfg, device, entropy_grad=cfg.entropy_coef > 0)
            totals.update({**sums, "updates": 1, "loss": sums["loss"] / max(sums["count"], 1.0)})
    tokens, stale, means = totals["tokens"], totals["stale/tokens"], {}
    tokens_of = {"stale": stale, "mismatch": tokens - stale}  # but a conversation is masked with all of its tokens
    for name, total in totals.items():
        if tokens and name not in NOT_PER_TOKEN:
            of = tokens if name == "mismatch/masked" else tokens_of.get(name.split("/")[0], tokens)
            means[name] = total / max(of, 1.0)
    return {
        "loss": totals["loss"] / totals["updates"],
        "grad_norm": totals["grad_norm"] / totals["updates"],
        "trained_tokens": totals["tokens"] / cfg.epochs_per_step,
        **means,
        **gap_metrics([s.episode for s in samples]),
        "seconds/logprobs": seconds,
    }


def make_mini_batch(samples: list[Sample], model, chat: Chat, cfg: Config) -> list[PackedBatch]:
    """Pack samples; those without a gradient count in the denominator, but are not run."""
    active = [s for s in samples if not has_no_gradient(s, cfg)]
    skipped = [s for s in samples if has_no_gradient(s, cfg)]
    episodes, advantages = [s.episode for s in active], [s.advantage for s in active]
    batches = pack(episodes, chat, model, cfg.max_tokens_per_batch, advantages)
    batches = equal_counts(batches, chat, model)
    batches[0].extra_count = len(skipped)
    if cfg.loss_norm == "tokens":
        batches[0].extra_count = sum(sum(s.episode.trained) for s in skipped)
    return batches


def batch_loss(cfg: Config, step: int, batch: PackedBatch, logp: torch.Tensor, entropy: torch.Tensor):
    """(loss, count, stats) of a packed batch for `policy.update`: sums over its sampled tokens, logp and entropy [S].
    The place where the terms of the loss come together."""
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    stale = batch.version < step  # [S], with carry-over; for these tokens, see `grpo.truncated_importance`
    sampled_logp = torch.where(stale, batch.sampler_logp, old_logp)
    ratio_of = batch.sequence if cfg.ratio == "sequence" else None
    loss, stats = grpo.policy_loss(
        logp, sampled_logp, batch.advantage, clip_low=cfg.clip_low, clip_high=cfg.clip_high, sequence_ids=ratio_of
    )
    if cfg.carry_over:
        loss = loss * (sampled_logp - old_logp).clamp(max=grpo.MAX_LOG_RATIO).exp()
        ratio = (logp.detach() - sampled_logp).exp() * stale
        stats |= {"stale/tokens": stale.sum(), "stale/ratio": ratio.sum()}
        stats["stale/truncated"] = (((old_logp - sampled_logp).exp() > cfg.importance_cap) & stale).sum()
    if batch.ref_logp is not None:
        kl = grpo.kl_penalty(logp, batch.ref_logp, cfg.kl_kind)
        loss, stats["kl"] = loss + cfg.kl_coef * kl, kl.sum()
    loss = loss - cfg.entropy_coef * entropy
    gaps, fresh, sequence = (old_logp - batch.sampler_logp).cpu(), ~stale.cpu(), batch.sequence.cpu()
    for number, episode in enumerate(batch.episodes):
        episode.logp_gap = gaps[fresh & (sequence == number)]
    stats |= {"entropy": entropy.sum(), **grpo.mismatch(sampled_logp, batch.sampler_logp)}
    keep = None
    if cfg.trust_bound:
        keep = grpo.trusted_sequences(old_logp, batch.sampler_logp, batch.sequence, cfg.trust_bound)
        stats["mismatch/masked"] = (~keep).sum()
    if cfg.importance_cap:
        weight = grpo.truncated_importance(old_logp, batch.sampler_logp, cfg.importance_cap)
        loss, stats["mismatch/truncated"] = loss * weight, ((weight >= cfg.importance_cap) & ~stale).sum()
    weights, count = grpo.token_weights(batch.sequence, cfg.loss_norm, keep, cfg.max_turns * cfg.max_tokens_per_turn)
    return (loss * weights).sum(), count + batch.extra_count, stats


def age_metrics(samples: list[Sample], step: int) -> dict[str, float]:
    """How old the conversations to train on are, over all ranks: steps since their first turn was drawn."""
    ages = all_gather([step - s.episode.turns[0].version for s in samples]) or [0]
    share, mean = sum(age > 0 for age in ages) / len(ages), sum(ages) / len(ages)
    return {"stale/share": share, "stale/steps": mean, "stale/steps_max": max(ages)}


def gap_metrics(episodes: list[Episode]) -> dict[str, float]:
    """Trainer's minus sampler's log-prob of the trained tokens: the largest of all ranks, and percentiles of the ratio
    of the two probabilities (1 where they agree)."""
    here = [e.logp_gap.numpy() for e in episodes if e.logp_gap is not None]
    gaps = np.concatenate([np.zeros(0, np.float32), *all_gather(here)])
    if not len(gaps):
        return {"mismatch/max": 0.0}
    names = ("mismatch/ratio_p1", "mismatch/ratio_p50", "mismatch/ratio_p99")
    ratios = np.exp(np.quantile(gaps, (0.01, 0.5, 0.99))).tolist()
    return {"mismatch/max": float(np.abs(gaps).max()), **dict(zip(names, ratios, strict=True))}


def questions_of_step(questions: list, step: int, cfg: Config) -> list:
    """The step's questions (or conversations to imitate): every epoch is a new permutation, of which an incomplete last
    batch is left out."""
    size = min(cfg.prompts_per_step, len(questions))
    size -= size % cfg.updates_per_step  # mini-batches are equally large
    epoch, batch = divmod(step, len(questions) // size)
    order = random.Random(f"{cfg.seed} epoch {epoch}").sample(range(len(questions)), len(questions))
    return [questions[i] for i in order[batch * size : (batch + 1) * size]]


# ----------------------------------------------------------------------------------------------------------- the run
class Run:
    """Everything a run holds, and its phases."""

    def __init__(self, cfg: Config, recipe: toy.Recipe, judge_options: Options, imitation: Options):
        from analysis.judge import JudgedReward

        check_log(cfg)
        conversations = cfg.loss != "sft" or cfg.train_files
        need(conversations, "loss=sft needs --train_files: JSONL files of conversations, as eval.py writes them")
        self.device = policy.init_distributed(cfg)
        self.dir = RunDir(cfg, recipe, judge_options, imitation)
        self.judge = JudgedReward(judge_options, cfg) if cfg.reward == "judge" else None
        world = toy.locate(recipe)
        if cfg.model == "toy" or not cfg.train_files or toy.answers_searches(cfg):
            toy.ensure(recipe, cfg)
        folder = str(world.model) if cfg.model == "toy" else cfg.model
        self.cfg, self.chat = cfg, Chat(folder, cfg)
        index = cfg.search_index or world.index
        self.search = open_search(cfg, index)
        val = self._load_data(recipe, imitation, world)
        self.policy = policy.load_policy(folder, self.chat, cfg, self.device, offload=cfg.offload == "all")
        self.reference = self.policy if cfg.kl_coef else None  # without its adapters
        if cfg.kl_coef and not cfg.lora_rank:
            frozen = dict(trainable=False, offload=cfg.offload != "none", like=self.policy)
            self.reference = policy.load_policy(folder, self.chat, cfg, self.device, **frozen)
        self.optimizer = policy.adamw(self.policy, cfg, self.device)
        self.engine = Engine()  # does nothing, where there is nothing to roll out
        if cfg.loss != "sft" or self.val:
            self.engine = make_engine(folder, self.chat, cfg, self.device, [*self.questions.values(), *self.val])
        ordered = policy.is_deterministic(cfg, self.device)
        self.rollout = Rollout(self.engine, self.search, self.chat, cfg, ordered, self.judge)
        self.checkpoint_seconds = 0.0
        self.state = dict(step=0, metrics_bytes=0, best={"step": -1, "reward": None}, outcomes={}, carried=[])
        searched = index if cfg.search == "offline" else cfg.search_cache if cfg.search == "replay" else ""
        self.inputs |= {"model": folder, "prompts": prompt_path(cfg.prompts), f"search {cfg.search}": searched}
        inputs = input_ids(self.inputs, [*self.questions.values(), *val])
        self.state |= dict(threads=torch.get_num_threads(), inputs=inputs)
        if self.dir.resume_from:
            self._resume(ordered)
        self.first = self.state["step"]
        self.dir.prepare()
        self.web = web_part(self.search)
        if self.web:
            self.web.spent = math.ceil(sum(all_gather([self.dir.spent])) / dist.get_world_size())
        self.stopper = Stopper(cfg.tensor_parallel == 1)
        what = "conversations" if cfg.loss == "sft" else "training questions"
        say(f"{len(self.train)} {what} and {len(self.val)} validation questions; {self.dir.path}")
        say(estimate(self._conversations_to_come(), cfg))
        say(f"the judge: at most {self._conversations_to_come()} verdicts" if self.judge else "")

    def _load_data(self, recipe, imitation, world):
        """train (questions, or episodes to imitate), val, and all that the training is about by id; returns val before
        val_limit."""
        cfg = self.cfg
        train_files, val_files = toy.question_files(cfg, recipe)
        files = {"train_files": train_files, "val_files": val_files, "sft_questions": imitation.sft_questions}
        self.inputs = {f"{role} {n}": path_of(file) for role, group in files.items() for n, file in enumerate(group)}
        if cfg.loss == "sft":
            from analysis.imitation import load_conversations

            toy_files = str(world.train), str(world.val)
            self.train = load_conversations(cfg, imitation, self.chat, self.search, toy_files)
            about = [e.question for e in self.train]
        else:
            self.train = about = load_prompts(train_files, "training", self.chat, cfg)
        val = load_prompts(val_files, "validation", self.chat, cfg) if val_files else []
        self.val = thinned(val, cfg.val_limit)
        what = f"updates_per_step={cfg.updates_per_step}, but there are only {len(about)} questions to train on"
        need(len(about) >= cfg.updates_per_step, what)
        self.questions = {q.id: q for q in about}
        check_questions([*about, *self.val], cfg)
        return val

    def _conversations_to_come(self):
        steps = self.cfg.steps - self.state["step"]
        between = (steps - 1) // self.cfg.eval_every if self.cfg.eval_every else 0
        per_step = min(self.cfg.prompts_per_step, len(self.train)) * self.cfg.samples_per_prompt
        per_step *= 1 + self.cfg.refill_groups if self.cfg.loss != "sft" else 0  # there they are made already
        return steps * per_step + (between + 4) * len(self.val)  # first and last: greedy and sampled

    def _resume(self, ordered):
        saved = load_state(self.dir.resume_from, self.policy, self.optimizer)
        then, now = saved["threads"], self.state["threads"]
        ways = f"give --threads {then}, or --deterministic false"
        need(not ordered or then == now, f"{self.dir.resume_from} was made with {then} threads, this is {now}: {ways}")
        for role, id in self.state["inputs"].items():  # what is not read any more, or only now, is the options' doing
            same = self.cfg.accept_changes or saved["inputs"].get(role, id) == id
            what = f"{self.inputs.get(role, 'a picture of the questions')} has changed since {self.dir.resume_from}"
            need(same, f"{what} was made: --accept_changes true continues")
        self.state["inputs"] = saved["inputs"] | self.state["inputs"]
        own = {"inputs", "threads"} | ({"metrics_bytes", "best", "carried"} if self.dir.elsewhere else set())
        self.state |= {key: saved[key] for key in self.state if key in saved and key not in own}
        carried = self.state["carried"]
        if any(id not in self.questions for _, id in carried):  # other data: begin as a run begins
            carried = self.state["carried"] = []
        say(f"{len(carried)} questions whose conversations were unfinished are asked again" if carried else "")

    def loop(self) -> None:
        cfg = self.cfg
        self.engine.load_weights(self.weights(), version=self.first)
        steps = range(self.first, cfg.steps)
        with tqdm(steps, initial=self.first, total=cfg.steps, disable=dist.get_rank() != 0) as bar:
            for step in bar:
                if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
                    self.validate(step)
                for group in self.optimizer.param_groups:
                    group["lr"] = policy.learning_rate(step, cfg)
                metrics = self.imitate(step) if cfg.loss == "sft" else self.step(step)
                common = {"lr": policy.learning_rate(step, cfg), "memory_gb": peak_memory_gb(self.device)}
                self.dir.log({"step": step, "phase": "train", **metrics, **common})
                self.state |= {"step": step + 1, "metrics_bytes": self.dir.position()}
                if cfg.carry_over:
                    self.state["carried"] = sorted(all_gather([(g.step, g.question.id) for g in self.rollout.groups]))
                bar.set_postfix_str(progress(metrics))
                if step + 1 == cfg.steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                    self.save()
            self.validate(cfg.steps)
        self.export("final")
        if dist.get_rank() == 0:
            from analysis.figures import before_and_after

            print(before_and_after(list(read_jsonl(self.dir.metrics))))
            print(f"model: {self.dir.path / 'final'}   metrics: {self.dir.metrics}")

    def step(self, step: int) -> dict:
        """One step of GRPO; returns its metrics."""
        from analysis.figures import of_step

        cfg, started = self.cfg, time.monotonic()
        own = questions_of_step(self.train, step, cfg)
        refill = Refill(own, self.train, self.state["outcomes"], step, cfg)
        episodes = self.roll_out(refill.questions, step, refill)
        self.dir.count_searches(self.web)
        check_calls(episodes, self.device)
        rolled_out = time.monotonic()
        numbers = refill.numbers
        if cfg.carry_over:  # whichever groups were finished take the places of the step's questions
            numbers = dict(zip(dict.fromkeys(e.group for e in episodes), share(range(len(own)), cfg), strict=True))
        samples = rate(episodes, numbers, step, cfg, self.judge)
        judged = self.judge.figures() if self.judge else {}
        if self.device.type == "cuda":
            self.engine.sleep()  # its cache's memory is needed for the update
        if step == self.first:
            self.first_look(episodes)
        mine = rebalance(trained(samples, cfg), len(own), self.questions, self.chat, cfg)
        models = self.policy, self.reference, self.optimizer
        try:
            learned = update_policy(*models, mine, len(own), self.chat, cfg, self.device, step)
        except NonFinite:  # on all ranks; the conversations are kept, to be looked at
            self.write_rollouts(step, samples, mine)
            raise
        records = self.write_rollouts(step, samples, mine)
        refill.count(records)
        self.optimizer.zero_grad(set_to_none=True)  # the rollout has other uses for the memory
        updated = time.monotonic()
        self.engine.load_weights(self.weights(), version=step + 1)
        self.engine.wake()
        rolled = of_step(records, cfg)
        finished = time.monotonic()
        tokens = sum(r["tokens"] for r in records)
        return {
            **rolled,
            **advantage_metrics(samples),
            **judged,
            **refill.metrics(),
            **learned,
            **(age_metrics(mine, step) if cfg.carry_over else {}),
            "seconds/rollout": rolled_out - started,
            "seconds/tools": self.rollout.waited,
            "seconds/update": updated - rolled_out - learned["seconds/logprobs"],
            "seconds/sync": finished - updated,
            "seconds/checkpoint": self.checkpoint_seconds,
            "tokens_per_second": tokens / (finished - started),
        }

    def weights(self):
        """The policy's, one by one, in the type that the engine computes in."""
        return full_weights(self.policy, policy.compute_dtype(self.cfg, self.device))

    def roll_out(self, questions: list[Question], step: int, refill: Refill | None = None) -> list[Episode]:
        """This rank's conversations of the step; with carry-over, of as many groups that are finished."""
        cfg, mine = self.cfg, share(questions, self.cfg)
        total = None if cfg.carry_over else len(mine) * cfg.samples_per_prompt  # with it, others end, too
        how = dict(samples=cfg.samples_per_prompt, step=step, temperature=cfg.temperature, refill=refill)
        if cfg.carry_over:
            how |= dict(quota=len(mine), refill=None)
            how["asked"], mine = self.questions_ahead(step, len(questions))
        with tqdm(total=total, desc="rollout", leave=False, disable=dist.get_rank() != 0) as bar:
            return self.stopper.rollout(lambda: self.rollout.run(mine, **how, progress=lambda _: bar.update()))

    def questions_ahead(self, step: int, size: int) -> tuple[list[int], list[Question]]:
        """What this rank asks with carry-over, and the step of each: the questions of steps to come; before them, in a
        resumed run, those that were carried. Of each step's `size` groups, a rank has as many as it is to finish."""
        carried = self.state["carried"]
        asked = range(step + len(carried) // size, min(step + self.cfg.steps_ahead + 1, self.cfg.steps))
        batches = [[(s, q) for q in questions_of_step(self.train, s, self.cfg)] for s in asked]
        if step == self.first:
            again = [(s, self.questions[id]) for s, id in carried]
            batches = [again[i : i + size] for i in range(0, len(again), size)] + batches
        pairs = [pair for batch in batches for pair in share(batch, self.cfg)]
        return [s for s, _ in pairs], [q for _, q in pairs]

    def first_look(self, episodes: list[Episode]) -> None:
        """Show a conversation with its mask, and check that sampler and trainer agree before the first update."""
        if episodes:
            shown = max(episodes, key=lambda e: len(e.turns))
            say(f"\na conversation; the policy is trained on what is between the brackets:\n{shown.bracketed()}\n")
        batches = pack(episodes, self.chat, self.policy, self.cfg.max_tokens_per_batch)
        batches = equal_counts(batches, self.chat, self.policy)
        logps = policy.logprobs(self.policy, batches, self.cfg.temperature, self.device)
        gaps = torch.cat(logps) - torch.cat([batch.sampler_logp for batch in batches])
        sums = all_sum({"gap": gaps.abs().sum().item(), "tokens": len(gaps)}, self.device)
        mean = sums["gap"] / max(sums["tokens"], 1.0)
        what = f"sampler and trainer disagree about the same tokens by {mean:.3f} nats on average"
        check = "check that both have the same weights, dtype, image sizes and chat template"
        need(mean <= MAX_MISMATCH, f"{what} (at most {MAX_MISMATCH}): {check}")

    def write_rollouts(self, step: int, samples: list[Sample], trained_here: list[Sample]) -> list[dict]:
        """Write all ranks' conversations to rollouts/step-N.jsonl; returns them. trained_here: has log-prob gaps."""
        episodes = [s.episode for s in trained_here if s.episode.logp_gap is not None and len(s.episode.logp_gap)]
        gaps = dict(all_gather([(e.name, e.logp_gap.abs().mean().item()) for e in episodes]))
        records = []
        for s in samples:
            more = {"step": step, "advantage": s.advantage, "logp_gap": gaps.get(s.episode.name)}
            more |= {"asked": s.episode.step} if self.cfg.carry_over else {}
            records.append({**record(s.episode, s.score), **more})
        records = all_gather(records)
        if dist.get_rank() == 0:
            write_jsonl(self.dir.rollouts / f"step-{step:06d}.jsonl", records)
        return records

    def imitate(self, step: int) -> dict:
        """One supervised step; returns its metrics."""
        cfg, started = self.cfg, time.monotonic()
        self.stopper.rollout(lambda: None)  # there is nothing to leave, but one may be asked to stop
        mine = questions_of_step(self.train, step, cfg)[dist.get_rank() :: dist.get_world_size()]
        batches = pack(mine, self.chat, self.policy, cfg.max_tokens_per_batch)
        batches = equal_counts(batches, self.chat, self.policy)
        if self.device.type == "cuda":
            self.engine.sleep()
        plain = replace(cfg, temperature=1.0)  # what a model says is imitated as it is, whatever the temperature
        loss = partial(policy.imitation_loss, cfg.loss_norm)
        sums = policy.update(self.policy, self.optimizer, batches, loss, plain, self.device)
        seconds = time.monotonic() - started
        return {
            "loss": sums["loss"] / max(sums["count"], 1.0),
            "nll": sums["nll"] / max(sums["tokens"], 1.0),
            "grad_norm": sums["grad_norm"],
            "trained_tokens": sums["tokens"],
            "seconds/update": seconds,
            "tokens_per_second": sums["tokens"] / seconds,
        }

    def validate(self, step: int) -> None:
        """Greedy; before and after the run also at the training temperature. The best by greedy reward is exported."""
        from analysis.figures import summarize

        if not self.val:
            return
        entry, records, started = {"step": step, "phase": "eval"}, [], time.monotonic()
        if self.cfg.loss == "sft" and step > self.first:  # other steps need the engine, and load what they have learned
            self.engine.load_weights(self.weights(), version=step)
            self.engine.wake()
        for name, temperature in (("greedy", 0.0), ("sampled", self.cfg.temperature)):
            if name == "sampled" and 0 < step < self.cfg.steps:
                continue
            how = dict(temperature=temperature, step=step, guard=self.stopper.rollout)
            part = evaluate(self.rollout, self.val, **how, progress=f"validation, {name}")
            entry[name] = summarize(part, self.cfg)
            records += [{"mode": name, **r} for r in part]
        self.dir.count_searches(self.web)
        judged = self.judge.figures() if self.judge else {}
        self.dir.log(entry | judged | {"seconds/evaluation": time.monotonic() - started})
        if dist.get_rank() == 0:
            write_jsonl(self.dir.rollouts / f"eval-{step:06d}.jsonl", records)
        reward, best = entry["greedy"]["all"]["reward"], self.state["best"]["reward"]
        if best is None or reward > best:
            self.state["best"] = {"step": step, "reward": reward}
            self.export("best")
            if step:
                self.save()

    def save(self) -> None:
        """A checkpoint after the steps made so far."""
        started = time.monotonic()
        self.dir.save(self.state["step"], self.policy, self.optimizer, self.state)
        self.checkpoint_seconds = time.monotonic() - started

    def export(self, name: str) -> None:
        """As a Hugging Face folder, in the type that log-probs were computed in."""
        export_hf(self.dir.path / name, self.policy, self.chat, policy.compute_dtype(self.cfg, self.device))


def progress(metrics: dict) -> str:
    """The figures beside the progress bar."""
    shown = [f"{name} {metrics[name]:.3f}" for name in ("nll", "reward", "accuracy", "search_ratio") if name in metrics]
    phases = [name for name in ("rollout", "tools", "update") if f"seconds/{name}" in metrics]
    seconds = " ".join(f"{name} {metrics[f'seconds/{name}']:.1f}" for name in phases)
    return f"{', '.join(shown)}, {metrics['tokens_per_second']:.0f} tokens/s, s: {seconds}"


# ------------------------------------------------------------------------------------------------------- the command
def main() -> None:
    from analysis.imitation import ImitationOptions
    from analysis.judge import JudgeOptions

    run = Run(*parse(sys.argv[1:], Config, toy.Recipe, JudgeOptions, ImitationOptions))
    try:
        run.loop()
    except Stopper.Stopped:
        run.dir.count_searches(run.web)
        if run.state["step"]:
            run.save()
        say(f"\nstopped after {run.state['step']} steps; --resume auto continues from there")
    except (NonFinite, SearchDown, EngineDied, OSError) as error:  # OSError: a file of the run cannot be written
        if isinstance(error, SearchDown) and run.state["step"]:
            run.save()
        alone = isinstance(error, EngineDied | OSError)  # the others come on all ranks
        message = f"error: step {run.state['step']}: {error}; --resume auto continues from the last checkpoint"
        sys.exit(message if alone or dist.get_rank() == 0 else 1)
    run.engine.close()
    if dist.is_initialized():  # vLLM ends it by itself
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
