"""Rollouts with slow tools: seconds under three schedules, and how near they are to what engine and tools allow.

    python benchmarks/slow_tools.py [--quick] [--out runs/slow_tools.json]                    # in-process engine
    python benchmarks/slow_tools.py --engine asleep                                           # one that needs no core
    python benchmarks/slow_tools.py --carry_over 4 8                                          # steps, one after another
    python benchmarks/slow_tools.py train --carry_over 4 --importance_cap 2 ...               # train.py, searches slow
    PYTHONPATH=tests/shim python benchmarks/slow_tools.py --engine vllm              # vLLM, its CPU build

All sample the same conversations: a tiny random model that ends a turn by chance and is taken to have asked for a
search, three turns, two calls. A call takes no time, or a log-normal one (median 0.5 s, 99th percentile 8 s), drawn for
the conversation and its turn; a turn has random numbers of its own, too. So each schedule samples the same tokens
(checked) and waits for the same calls. The prefix cache is emptied before each run.

free     `rollout.run`, unordered, with as many threads as conversations
barrier  the turns of all conversations, then all their calls at once; the next turn when the last result has arrived
serial   the same with one call after another: what GRPOTrainer does in `_tool_call_loop` of trl 1.16.0
         (trl/trainer/grpo_trainer.py). It goes through the conversations that called, in the order of the batch; a
         synchronous tool is called on the spot, asynchronous calls of one turn are gathered and awaited before the next
         conversation; then `_generate_single_turn` is given all of them. It is the better case for trl: with
         `transformers.generate` the whole prompts would be run again in every turn. A custom `rollout_func` and trl's
         experimental AsyncGRPOTrainer work differently, and are not what is compared here.

bound    an event simulation of `free` in which nothing takes time but calls and steps of the engine: it never waits
         while anything can be run, and results go in at the next step. A step costs what a fit to the measured steps of
         the same run says (so much for its forward passes, each running turn, each new one; the first is as measured).
         No schedule that does not hold turns back to fill a batch can do better. (What scattered cache lines cost the
         engine under `free` is in those steps; `bound by all steps` in the output has them from all runs.)

The engine `asleep` stands for vLLM on a GPU: it only sleeps through its steps, 20 ms, 0.1 ms more for a running turn
and 1 ms for a new one. (The in-process engine runs new turns in a pass of their own before the running ones, so results
that come in one by one cost it more than those that come together; few of them wait for others, `engines.PATIENCE`.)

`serial` is measured with 8 conversations and simulated for more (marked ~), where it would take minutes: `simulated` in
the output has what the simulation says of every measured run, for comparison. Repeats draw other latencies; ratios are
taken in each, and given as median (least - most). The last columns are the simulated ratios over 100 further draws.
"""

import argparse
import heapq
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import engines  # noqa: E402
import policy  # noqa: E402
import rollout  # noqa: E402
from chat import Chat, Episode  # noqa: E402
from config import Config, run_main  # noqa: E402
from data import Call, Hit, Question, Result  # noqa: E402
from toy import model as toy_model  # noqa: E402

SIZES, TURNS, MEDIAN, P99 = (8, 16, 64, 256), 3, 0.5, 8.0
SPREAD = math.log(P99 / MEDIAN) / statistics.NormalDist().inv_cdf(0.99)
SERIAL_UP_TO = 8  # conversations; a serial run with more is simulated
GROUPS, SAMPLES, COUNTED = 8, 8, 8  # of a step with --carry_over; steps that are counted
STOP_SHARE = 16  # a turn ends at each token by a chance of about one in this many


# ------------------------------------------------------------------------------------------------- the same work


class Work:
    """The engine, and questions for conversations with it."""

    def __init__(self, folder: Path, engine: str, most: int):
        self.cfg = Config(
            threads=1, engine="vllm" if engine == "vllm" else "torch", deterministic=False, concurrency=most,
            max_turns=TURNS, max_tokens_per_turn=48, max_tokens=256,
            prompts=str(ROOT / "prompts/toy"),
        )  # fmt: skip
        toy_model.save_random_model(folder, seed=0)
        self.chat = Chat(folder, self.cfg)
        self.chat.stop_ids = (*self.chat.stop_ids, *range(300, 300 + len(self.chat.tokenizer) // STOP_SHARE))
        rollout.parse_calls = always_search
        Image.new("RGB", (60, 50), "teal").save(folder / "picture.png")
        picture = (folder / "picture.png").read_bytes()
        self.questions = [Question(f"{n}", "what is it called?", (picture,)) for n in range(most)]
        device = policy.init_distributed(self.cfg)
        self.weights = list(policy.full_weights(policy.load_policy(folder, self.chat, self.cfg, device)))
        make = Asleep if engine == "asleep" else partial(engines.make_engine, str(folder))
        self.engine = make(self.chat, self.cfg, device, self.questions)


def always_search(text: str, dialect: str) -> list[Call]:
    """Stands for `tools.parse_calls`: every turn asks for a search, whatever it says."""
    return [Call("text_search", "it")]


class Asleep:
    """An engine that sleeps as long as a GPU might compute; how long a turn gets is drawn from the turn's seed."""

    def __init__(self, chat, *_):
        self.word = chat.encode("a")[:1]
        self.new, self.running = [], []  # [request, tokens of its turn, steps to go]

    def submit(self, request_id, prompt, images, sampling):
        length = math.ceil(np.random.default_rng(sampling.seed).exponential(STOP_SHARE))
        length = min(length, sampling.max_tokens)
        self.new.append([request_id, length, length])

    def step(self):
        running, new = len(self.running), len(self.new)
        time.sleep(0.02 + 0.0001 * running + 0.001 * new)
        turns, self.new = self.running + self.new, []
        for turn in turns:
            turn[2] -= 1
        self.running = [turn for turn in turns if turn[2]]
        done = [turn for turn in turns if not turn[2]]
        return [engines.Reply(name, self.word * length, [0.0] * length, "stop", 0) for name, length, _ in done]

    def abort(self, request_ids):
        return []

    def load_weights(self, named_tensors, version):
        """It has none."""

    def close(self):
        """It holds nothing."""


def draw_waits(count: int, seed: int, slow: bool) -> list[list[float]]:
    """Seconds of each conversation's calls."""
    if not slow:
        return [[0.0] * (TURNS - 1)] * count
    waits = []
    for number in range(count):
        draws = [np.random.default_rng((seed, number, turn)) for turn in range(TURNS - 1)]
        waits.append([float(draw.lognormal(math.log(MEDIAN), SPREAD)) for draw in draws])
    return waits


class SlowSearch:
    """Finds the same page after the seconds that belong to the conversation (one about each question) and its turn."""

    def __init__(self, waits):
        self.waits, self.calls = waits, Counter()

    def search(self, call, question):
        turn = self.calls[question.id]
        self.calls[question.id] += 1
        time.sleep(self.waits[int(question.id)][turn])
        return Result("ok", (Hit("a page", text="about it, " * 4),))


class Meter:
    """An engine that times another's steps: (turns running before, new turns, seconds), and sums the thread's CPU time
    in them. A turn that was cut at its limit counts as finished, so that every conversation has all its turns."""

    def __init__(self, engine):
        self.engine, self.steps, self.running, self.new, self.cpu = engine, [], 0, 0, 0.0
        self.abort = engine.abort

    def submit(self, *request):
        self.new += 1
        self.engine.submit(*request)

    def step(self):
        started, cpu = time.perf_counter(), time.thread_time()
        replies = self.engine.step()
        self.steps.append((self.running, self.new, time.perf_counter() - started))
        self.cpu += time.thread_time() - cpu
        self.running, self.new = self.running + self.new - len(replies), 0
        return [replace(reply, finish_reason="stop") for reply in replies]


# ----------------------------------------------------------------------------------------------------- schedules


def turn_by_turn(questions, engine, search, chat, cfg, each) -> list[Episode]:
    """Barriers after the turns and after the calls; each(function, questions) applies it to those that called."""
    conversations = {q.id: rollout.converse(q, chat, cfg) for q in questions}
    requests = {q.id: next(conversations[q.id]) for q in questions}
    episodes = {}
    while requests:
        for name, request in requests.items():
            engine.submit(name, request.prompt, request.images, request.sampling)
        replies = {}
        while len(replies) < len(requests):
            replies |= {reply.request_id: reply for reply in engine.step()}
        calls = {}
        for name in requests:  # in the order of the batch
            answer = send(conversations[name], replies[name])
            if isinstance(answer, Call):
                calls[name] = answer
            else:
                episodes[name] = answer
        asked = [q for q in questions if q.id in calls]
        results = list(each(lambda q, calls=calls: search.search(calls[q.id], q), asked))
        requests = {q.id: send(conversations[q.id], result) for q, result in zip(asked, results, strict=True)}
    return [episodes[q.id] for q in questions]


def send(conversation, answer):
    """What the conversation asks for next, or its episode."""
    try:
        return conversation.send(answer)
    except StopIteration as end:
        return end.value


def barrier(questions, *rest):
    with ThreadPoolExecutor(len(questions)) as pool:
        return turn_by_turn(questions, *rest, pool.map)


SCHEDULES = {"free": rollout.run, "barrier": barrier, "serial": partial(turn_by_turn, each=map)}


@dataclass
class Measured:
    seconds: float
    outside: float  # CPU seconds of the driving thread outside of the engine's steps
    steps: list[tuple[int, int, float]]
    said: list[list[int]]  # tokens of each conversation
    lengths: list[list[int]]  # tokens of each of its turns


def measure(schedule: str, work: Work, waits) -> Measured:
    work.engine.load_weights(work.weights, 0)  # which empties the prefix cache
    meter = Meter(work.engine)
    started, cpu = time.perf_counter(), time.thread_time()
    episodes = SCHEDULES[schedule](work.questions[: len(waits)], meter, SlowSearch(waits), work.chat, work.cfg)
    seconds, outside = time.perf_counter() - started, time.thread_time() - cpu - meter.cpu
    lengths = [[turn.end - turn.start for turn in e.turns] for e in episodes]
    assert all(len(turns) == TURNS for turns in lengths)
    return Measured(seconds, outside, meter.steps, [e.tokens for e in episodes], lengths)


# ---------------------------------------------------------------------------------------------------- simulation


def fit_steps(runs: list[Measured]):
    """cost(step's number, turns running, new turns) -> seconds, by least squares over the steps of the runs; and the
    weights of `step_features`."""
    first = statistics.mean(run.steps[0][2] for run in runs)
    steps = [step for run in runs for step in run.steps[1:]]
    matrix = np.array([step_features(running, new) for running, new, _ in steps], float)
    seconds = np.array([seconds for *_, seconds in steps])
    weights = np.linalg.lstsq(matrix, seconds, rcond=None)[0].tolist()

    def cost(number, running, new):
        if number == 0:
            return first
        parts = [weight * float(x) for weight, x in zip(weights, step_features(running, new), strict=True)]
        return max(0.0, math.fsum(parts))

    return cost, weights


def step_features(running: int, new: int) -> tuple:
    return running > 0, running, new > 0, new


def simulate(schedule: str, lengths, waits, cost) -> float:
    """Seconds that the conversations take if only steps and calls do."""
    clock, number, running = 0.0, 0, 0
    ready = [(0.0, index, 0) for index in range(len(lengths))]  # a heap: since when, conversation, turn
    ends = defaultdict(list)  # step -> the turns that end with it
    asked = []  # turns whose calls have not been made yet
    while ready or running:
        if not running:
            clock = max(clock, ready[0][0])
        new = 0
        while ready and ready[0][0] <= clock:
            _, index, turn = heapq.heappop(ready)
            ends[number + lengths[index][turn]].append((index, turn))
            new += 1
        clock += cost(number, running, new)
        number += 1
        done = ends.pop(number, [])
        running += new - len(done)
        asked += [(index, turn) for index, turn in done if turn + 1 < TURNS]
        if schedule == "free" or not running:
            called = [waits[index][turn] for index, turn in asked]
            if schedule == "barrier":
                called = [max(called, default=0.0)] * len(called)
            elif schedule == "serial":
                called = [sum(called)] * len(called)
            for (index, turn), seconds in zip(asked, called, strict=True):
                heapq.heappush(ready, (clock + seconds, index, turn + 1))
            asked = []
    return clock


def further_draws(lengths, slow, cost, draws=100):
    """Simulated ratios to `free` over other latencies: median and 5th to 95th percentile."""
    ratios = defaultdict(list)
    for seed in range(1000, 1000 + draws if slow else 1001):
        waits = draw_waits(len(lengths), seed, slow)
        seconds = {schedule: simulate(schedule, lengths, waits, cost) for schedule in SCHEDULES}
        for schedule in ("barrier", "serial"):
            ratios[schedule].append(seconds[schedule] / seconds["free"])
    return {schedule: np.quantile(values, (0.5, 0.05, 0.95)).tolist() for schedule, values in ratios.items()}


# ---------------------------------------------------------------------------------------------------- carry-over


class SearchAnyone:
    """Finds the same page after log-normal seconds, drawn for the number of the call about the question, or at once."""

    def __init__(self, seed, slow):
        self.seed, self.slow, self.calls = seed, slow, defaultdict(itertools.count)

    def search(self, call, question):
        if self.slow:
            draw = random.Random(f"{self.seed} {question.id} {next(self.calls[question.id])}")
            time.sleep(draw.lognormvariate(math.log(MEDIAN), SPREAD))
        return Result("ok", (Hit("a page", text="about it, " * 4),))


def step_seconds(work: Work, carry_over: int, slow: bool, seed: int, update: float) -> list[float]:
    """Seconds of steps in the steady state: a rollout, `update` seconds asleep in place of the trainer, while calls go
    on, then the weights once more, which empties the prefix cache."""
    cfg = replace(work.cfg, carry_over=carry_over, importance_cap=2.0)
    held = rollout.Rollout(Meter(work.engine), SearchAnyone(seed, slow), work.chat, cfg)
    seconds, asked, warm = [], 0, carry_over + 1
    work.engine.load_weights(work.weights, 0)
    cycle = cfg.steps_ahead + 1  # with instant tools one step in so many does all the work: count whole cycles
    for step in range(warm + -(-COUNTED // cycle) * cycle):
        started = time.perf_counter()
        now = range(asked, step + cfg.steps_ahead + 1)
        pairs = [(s, replace(q, id=f"{s} {q.id}")) for s in now for q in work.questions[:GROUPS]]
        how = dict(quota=GROUPS, asked=[s for s, _ in pairs]) if carry_over else {}
        episodes = held.run([q for _, q in pairs], samples=SAMPLES, step=step, **how)
        assert len(episodes) == GROUPS * SAMPLES and all(len(e.turns) == TURNS for e in episodes)
        time.sleep(update)
        work.engine.load_weights(work.weights, step + 1)
        asked, seconds = now.stop, [*seconds, time.perf_counter() - started]
    return seconds[warm:]


def carry_table(args) -> None:
    """Mean seconds of a step, and of three repeats the ratios, each repeat with other latencies."""
    print(json.dumps(machine()), f"engine {args.engine}, updates of {args.update} s", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), args.engine, GROUPS * SAMPLES * (1 + (max(args.carry_over) + 1) // 2))
        step_seconds(work, 0, False, 0, 0.0)  # warm
        for seed in range(1 if args.quick else 3):
            how = dict(seed=seed, update=args.update)
            instant, together = (statistics.mean(step_seconds(work, 0, slow, **how)) for slow in (False, True))
            print(f"instant {instant:.2f} s a step, slow {together:.2f}", flush=True)
            for most in args.carry_over:
                at_once, slow = (statistics.mean(step_seconds(work, most, slow, **how)) for slow in (False, True))
                cells = f"instant {at_once:.2f}, slow {slow:.2f}; to instant without it {slow / instant:.2f}"
                ratios = f"with it {slow / at_once:.2f}, faster than without {together / slow:.2f} times"
                print(f"  --carry_over {most}: {cells}, {ratios}; load {os.getloadavg()[0]:.1f}", flush=True)
        work.engine.close()


def train_slowly(argv: list[str]) -> None:
    """train.py, the searches in its index as slow as above."""
    import train
    from search.index import OfflineSearch

    answer = OfflineSearch.search

    def answer_late(self, call, question):
        time.sleep(random.lognormvariate(math.log(MEDIAN), SPREAD))
        return answer(self, call, question)

    OfflineSearch.search, sys.argv = answer_late, ["train.py", *argv]
    run_main(train.main)


# -------------------------------------------------------------------------------------------------------- report


def repeat(work: Work, count: int, slow: bool, seed: int) -> dict:
    """All schedules once on the same latencies."""
    waits = draw_waits(count, seed, slow)
    schedules = [name for name in SCHEDULES if name != "serial" or count <= SERIAL_UP_TO]
    runs = {name: measure(name, work, waits) for name in schedules}
    fits = {name: fit_steps([run]) for name, run in runs.items()}
    fits.setdefault("serial", fits["barrier"])  # they take the same steps
    lengths = runs["free"].lengths
    simulated = {name: simulate(name, lengths, waits, fits[name][0]) for name in SCHEDULES}
    cost, weights = fit_steps(list(runs.values()))
    seconds = {name: run.seconds for name, run in runs.items()}
    in_engine = {name: sum(s for *_, s in run.steps) for name, run in runs.items()}
    result = {
        "seconds": {"serial": simulated["serial"], **seconds},
        "bound": simulated["free"],
        "bound by all steps": simulate("free", lengths, waits, cost),
        "simulated": simulated,
        "in_engine": in_engine,
        "cpu_outside_engine": {name: run.outside for name, run in runs.items()},
        "steps": {name: len(run.steps) for name, run in runs.items()},
        "step_cost": dict(zip(("decode", "a running turn", "admit", "a new turn"), weights, strict=True)),
        "same_tokens": statistics.mean(a == b for a, b in zip(runs["free"].said, runs["barrier"].said, strict=True)),
        "sampled": sum(map(sum, lengths)),
        "longest_wait": max(map(sum, waits)),
    }
    return result | {"further_draws": further_draws(lengths, slow, cost)}


def summary(count: int, slow: bool, repeats: list[dict]) -> dict:
    """A line of the table: median, least and most over the repeats."""
    values = defaultdict(list)
    for r in repeats:
        seconds = r["seconds"]
        for name in SCHEDULES:
            values[name].append(seconds[name])
        values["bound"].append(r["bound"])
        values["free / bound"].append(seconds["free"] / r["bound"])
        for name in ("barrier", "serial"):
            values[f"{name} / free"].append(seconds[name] / seconds["free"])
    return {
        "conversations": count,
        "tools": "slow" if slow else "0 s",
        **{name: [statistics.median(found), min(found), max(found)] for name, found in values.items()},
        "serial_is_measured": count <= SERIAL_UP_TO,
        "repeats": repeats,
    }


COLUMNS = ("free", "bound", "barrier", "serial", "free / bound", "barrier / free", "serial / free")


def show(case: dict) -> str:
    cells = [f"{case['conversations']:>5}", f"{case['tools']:>5}"]
    for name in COLUMNS:
        mark = "~" if name.startswith("serial") and not case["serial_is_measured"] else ""
        middle, low, high = case[name]
        cells.append(f"{mark}{middle:.2f} ({low:.2f} - {high:.2f})".rjust(25))
    draws = case["repeats"][-1]["further_draws"]
    cells += ["{:.2f} ({:.2f} - {:.2f})".format(*draws[name]).rjust(25) for name in ("barrier", "serial")]
    return " ".join(cells)


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


def main(args):
    sizes, repeats = (SIZES[::2], 1) if args.quick else (SIZES, 3)
    report = {"machine": machine(), "engine": args.engine, "median": MEDIAN, "p99": P99, "cases": []}
    print(json.dumps(report["machine"]), f"engine {args.engine}", sep="\n")
    heads = [*COLUMNS, "draws: barrier / free", "draws: serial / free"]
    print("count tools", *(head.rjust(25) for head in heads), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), args.engine, max(sizes))
        measure("free", work, draw_waits(sizes[0], 0, slow=False))  # warm
        for slow in (False, True):
            for count in sizes:
                results = [repeat(work, count, slow, seed) for seed in range(repeats)]
                report["cases"].append(summary(count, slow, results))
                print(show(report["cases"][-1]), flush=True)
        work.engine.close()
    report["machine"]["load after"] = os.getloadavg()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
    print(f"{out}: all repeats, seconds in the engine, simulated seconds of each schedule")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.exit(train_slowly(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("torch", "asleep", "vllm"), default="torch")
    parser.add_argument("--quick", action="store_true", help="8 and 64 conversations, once: a minute or two")
    parser.add_argument("--out", default="runs/slow_tools.json")
    parser.add_argument("--carry_over", type=int, nargs="+", help="instead: steps of 64 conversations")
    parser.add_argument("--update", type=float, default=0.0, help="of these steps: seconds of the trainer")
    args = parser.parse_args()
    carry_table(args) if args.carry_over else main(args)
