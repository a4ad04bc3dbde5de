"""Tokens over ranks and rows: what `train.spread` and `policy.pack` save, on made-up lengths.

    python benchmarks/balance.py [--out runs/balance.json]          # arithmetic only: no model, seconds

A step of 64 questions x 8 conversations on 8 ranks, with one update and with four. Some groups have no signal (all
earned the same): their conversations need not be run. Lengths, in tokens:

uniform      500 to 4,000, each conversation by itself
long tail    log-normal, median 1,200, 99th percentile 5,700, at most 8,192; half of the variance (of the logarithm)
             belongs to the question: its picture and what it takes to answer it
toy          the toy world's: 34, 79 or 128, a few more or less, for no search, one and two; questions that need no
             search are searched for by 1 conversation in 8, others by 7 in 8

Idle ranks: what share of the ranks' time is waiting, if a token takes a time and ranks meet after each mini-batch (the
maximum over the ranks, added up over the mini-batches), with
    by number   question n on rank n mod 8: where the conversations were held
    spread      `train.spread`
    at best     no rank less than the mean or the largest question, which stays in one piece
As FSDP's ranks meet in each row (of at most 16,384 tokens), the first two also with the maximum taken row by row.

Padding: what share of the tokens run is padding, for the conversations with signal of one rank under `spread`, with
    8 each      micro-batches of 8 conversations, padded to the longest of each
    as fit      of as many as fit into 16,384 tokens, padding included
    sorted      the same, after sorting them by length (they then leave the order of the questions)
    pack        rows by `policy.pack`, which are as long as what is in them; `filled` is how much of 16,384 that is

Means over the seeds 0 to 4 (least - most), in per cent.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import policy  # noqa: E402
from train import spread  # noqa: E402

RANKS, QUESTIONS, SAMPLES, ROW, SEEDS = 8, 64, 8, 16384, range(5)
SHAPE = (QUESTIONS, SAMPLES)
policy.pack_batch = lambda indices, episodes, *_: indices  # which conversations are in a row is all that is asked here


# ------------------------------------------------------------------------------------------------------- lengths


def uniform(rng):
    return rng.integers(500, 4001, SHAPE)


def long_tail(rng):
    own, shared = rng.normal(0, 0.67 / 2**0.5, SHAPE), rng.normal(0, 0.67 / 2**0.5, (QUESTIONS, 1))
    return np.minimum(1200 * np.exp(own + shared), 8192).astype(int)


def toy(rng):
    needs = rng.random((QUESTIONS, 1)) < 0.5
    searched = rng.random(SHAPE) < np.where(needs, 7 / 8, 1 / 8)
    twice = rng.random(SHAPE) < 0.9
    return np.where(searched, np.where(twice, 128, 79), 34) + rng.integers(-3, 4, SHAPE)


LENGTHS = {"uniform": uniform, "long tail": long_tail, "toy": toy}


# --------------------------------------------------------------------------------------------------------- ranks


def idle_ranks(lengths, alive, updates) -> dict[str, float]:
    """Shares of waiting, in per cent; `alive` [questions]: which groups have signal."""
    loads = [(n, int(lengths[n].sum() * alive[n]), n % RANKS) for n in range(QUESTIONS)]
    part = QUESTIONS // updates
    places = {"by number": {n: origin for n, _, origin in loads}, "spread": spread(loads, part, RANKS)}
    best = sum(
        max(mean_load(batch), max(load for _, load, _ in batch))
        for batch in (loads[i : i + part] for i in range(0, QUESTIONS, part))
    )
    busy = sum(load for _, load, _ in loads) / RANKS
    return {
        **{name: percent(1 - busy / slowest(loads, part, place)) for name, place in places.items()},
        "at best": percent(1 - busy / best),
        **{f"{name}, rows": percent(1 - busy / row_by_row(lengths, alive, part, p)) for name, p in places.items()},
    }


def mean_load(batch):
    return sum(load for _, load, _ in batch) / RANKS


def percent(share):
    return 100 * share


def slowest(loads, part, place) -> int:
    """Tokens of the rank with the most, added up over the mini-batches."""
    total = Counter()
    for number, load, _ in loads:
        total[number // part, place[number]] += load
    return sum(max(total[batch, rank] for rank in range(RANKS)) for batch in range(QUESTIONS // part))


def row_by_row(lengths, alive, part, place) -> int:
    """The same, added up over the rows."""
    longest = Counter()
    for start in range(0, QUESTIONS, part):
        for rank in range(RANKS):
            mine = [n for n in range(start, start + part) if place[n] == rank and alive[n]]
            for number, row in enumerate(packed(lengths[mine].ravel())):
                longest[start, number] = max(longest[start, number], sum(row))
    return sum(longest.values())


# ------------------------------------------------------------------------------------------------------- padding


def packed(lengths) -> list[list[int]]:
    """The lengths in each row of `policy.pack`."""
    episodes = [SimpleNamespace(tokens=range(length)) for length in lengths]
    return [[int(lengths[i]) for i in row] for row in policy.pack(episodes, None, None, ROW)]


def as_fit(lengths) -> list[list[int]]:
    """Micro-batches, in order, of as many as fit into ROW tokens when padded."""
    batches = [[]]
    for length in lengths:
        if max([*batches[-1], length]) * (len(batches[-1]) + 1) > ROW:
            batches.append([])
        batches[-1].append(int(length))
    return batches


def padding(lengths, alive) -> dict[str, float]:
    """Shares of padding in what all ranks run, in per cent, and how full the rows are."""
    goal = spread([(n, int(lengths[n].sum() * alive[n]), n % RANKS) for n in range(QUESTIONS)], QUESTIONS, RANKS)
    batches = defaultdict(list)
    for rank in range(RANKS):
        mine = lengths[[n for n in range(QUESTIONS) if goal[n] == rank and alive[n]]].ravel()
        batches["8 each"] += [mine[i : i + 8].tolist() for i in range(0, len(mine), 8)]
        batches["as fit"] += as_fit(mine)
        batches["sorted"] += as_fit(np.sort(mine))
        batches["rows"] += packed(mine)
    tokens = int(lengths[alive].sum())
    run = {kind: sum(max(b) * len(b) for b in batches[kind]) for kind in ("8 each", "as fit", "sorted")}
    run["pack"] = sum(map(sum, batches["rows"]))
    filled = {"filled": percent(tokens / (ROW * len(batches["rows"])))}
    return {kind: percent(1 - tokens / size) for kind, size in run.items()} | filled


# -------------------------------------------------------------------------------------------------------- report


def over_seeds(figures, name, *rest) -> dict[str, list[float]]:
    """[mean, least, most] of each figure; lengths do not depend on the share of dead groups, nor on the updates."""
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        lengths = LENGTHS[name](rng)
        dead, *others = rest
        alive = rng.permutation(QUESTIONS) >= round(dead * QUESTIONS)
        found.append(figures(lengths, alive, *others))
    return {key: [f(one[key] for one in found) for f in (mean, min, max)] for key in found[0]}


def show(title, rows):
    print(f"\n{title}")
    print(" " * 28, *(head.rjust(21) for head in rows[0]["figures"]))
    for row in rows:
        where = ", ".join(f"{row[k]}" for k in row if k != "figures")
        print(where.ljust(28), *("{:.1f} ({:.1f} - {:.1f})".format(*f).rjust(21) for f in row["figures"].values()))


def main(args):
    deads = (0.0, 0.25, 0.5)
    idle = [
        {"lengths": name, "dead": f"{dead:.0%} dead", "updates": f"{updates} updates"[: None if updates > 1 else -1]}
        | {"figures": over_seeds(idle_ranks, name, dead, updates)}
        for name in LENGTHS
        for dead in deads
        for updates in (1, 4)
    ]
    pads = [{"lengths": name, "figures": over_seeds(padding, name, 0.25)} for name in LENGTHS]
    show("idle share of the ranks' time, per cent", idle)
    show("padding share of what is run, per cent (25% dead)", pads)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"idle": idle, "padding": pads}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/balance.json")
    main(parser.parse_args())
