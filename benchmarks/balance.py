"""Tokens over ranks and packed batches: what `train.assign_ranks` and `policy.pack` save, on synthetic lengths.

    python benchmarks/balance.py [--out runs/balance.json]          # arithmetic only: no model, seconds

A step of 64 questions x 8 conversations on 8 ranks, with one update and with four. The conversations of zero-variance
groups (all earned the same) need not be run. Lengths, in tokens:

uniform      500 to 4,000, each conversation by itself
long tail    log-normal, median 1,200, 99th percentile 5,700, at most 8,192; half of the variance (of the logarithm)
             belongs to the question: its picture and what it takes to answer it
toy          the toy world's: 34, 79 or 128, a few more or less, for no search, one and two; questions that need no
             search are searched for by 1 conversation in 8, others by 7 in 8

Waiting: what share of the ranks' time is waiting, if a token takes a fixed time and ranks meet after each mini-batch
(the maximum over the ranks, summed over the mini-batches), with
    by number       question n on rank n mod 8, where its conversations were sampled
    assign_ranks    `train.assign_ranks`
    at best         no rank does less than the mean or than the largest question, which stays in one piece
As FSDP's ranks meet in each packed batch (of at most 16,384 tokens), the first two are also given with the maximum
taken batch by batch.

Padding: what share of the tokens that are run is padding, for the conversations to run of one rank under
`assign_ranks`, with
    8 each      micro-batches of 8 conversations, padded to the longest of each
    as fit      as many as fit into 16,384 tokens, padding included
    sorted      the same, after sorting them by length (they then leave the order of the questions)
    pack        packed batches by `policy.pack`, which are as long as what is in them; `filled` is how much of 16,384
                that is

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
from train import assign_ranks  # noqa: E402

RANKS, QUESTIONS, SAMPLES, BATCH_TOKENS, SEEDS = 8, 64, 8, 16384, range(5)
SHAPE = (QUESTIONS, SAMPLES)


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


def waiting(lengths, varied, updates) -> dict[str, float]:
    """Shares of waiting, in per cent; varied [questions]: which groups are not zero-variance groups."""
    loads = group_loads(lengths, varied)
    per_update = QUESTIONS // updates
    places = {
        "by number": {number: origin for number, _, origin in loads},
        "assign_ranks": assign_ranks(loads, per_update, RANKS),
    }
    best = 0
    for start in range(0, QUESTIONS, per_update):
        tokens = [load for _, load, _ in loads[start : start + per_update]]
        best += max(sum(tokens) / RANKS, max(tokens))
    busy = sum(load for _, load, _ in loads) / RANKS
    shares = {name: 1 - busy / slowest(loads, per_update, place) for name, place in places.items()}
    shares["at best"] = 1 - busy / best
    for name, place in places.items():
        shares[f"{name}, batches"] = 1 - busy / batch_by_batch(lengths, varied, per_update, place)
    return {name: 100 * share for name, share in shares.items()}


def group_loads(lengths, varied) -> list[tuple[int, int, int]]:
    """(number, tokens to run, rank where it was sampled) of each question."""
    return [(n, int(lengths[n].sum() * varied[n]), n % RANKS) for n in range(QUESTIONS)]


def slowest(loads, per_update, place) -> int:
    """Tokens of the rank with the most, summed over the mini-batches."""
    total = Counter()
    for number, load, _ in loads:
        total[number // per_update, place[number]] += load
    parts = range(QUESTIONS // per_update)
    return sum(max(total[part, rank] for rank in range(RANKS)) for part in parts)


def batch_by_batch(lengths, varied, per_update, place) -> int:
    """The same, summed over the packed batches."""
    longest = Counter()
    for start in range(0, QUESTIONS, per_update):
        for rank in range(RANKS):
            mine = [n for n in range(start, start + per_update) if place[n] == rank and varied[n]]
            for number, batch in enumerate(packed(lengths[mine].ravel())):
                longest[start, number] = max(longest[start, number], sum(batch))
    return sum(longest.values())


# ------------------------------------------------------------------------------------------------------- padding


def packed(lengths) -> list[list[int]]:
    """The lengths in each batch of `policy.pack`."""
    episodes = [SimpleNamespace(tokens=range(length)) for length in lengths.tolist()]
    return policy.pack(episodes, None, None, BATCH_TOKENS)


def lengths_of(episodes, *_) -> list[int]:
    return [len(episode.tokens) for episode in episodes]


policy.pack_batch = lengths_of  # which conversations are in a batch is all that is asked here


def as_fit(lengths) -> list[list[int]]:
    """Micro-batches, in order, of as many as fit into BATCH_TOKENS when padded."""
    batches = [[]]
    for length in lengths.tolist():
        if max([*batches[-1], length]) * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(length)
    return batches


def padding(lengths, varied) -> dict[str, float]:
    """Shares of padding in what all ranks run, in per cent, and how full the packed batches are."""
    place = assign_ranks(group_loads(lengths, varied), QUESTIONS, RANKS)
    batches = defaultdict(list)
    for rank in range(RANKS):
        mine = lengths[[n for n in range(QUESTIONS) if place[n] == rank and varied[n]]].ravel()
        batches["8 each"] += [mine[i : i + 8].tolist() for i in range(0, len(mine), 8)]
        batches["as fit"] += as_fit(mine)
        batches["sorted"] += as_fit(np.sort(mine))
        batches["pack"] += packed(mine)
    tokens = int(lengths[varied].sum())
    shares = {}
    for kind in ("8 each", "as fit", "sorted"):
        shares[kind] = 1 - tokens / sum(max(batch) * len(batch) for batch in batches[kind])
    shares["pack"] = 1 - tokens / sum(map(sum, batches["pack"]))
    shares["filled"] = tokens / (BATCH_TOKENS * len(batches["pack"]))
    return {kind: 100 * share for kind, share in shares.items()}


# -------------------------------------------------------------------------------------------------------- report


def over_seeds(figures, name, zero_variance, *rest) -> dict[str, list[float]]:
    """[mean, least, most] of each figure; lengths depend neither on the share of zero-variance groups nor on the
    number of updates."""
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        lengths = LENGTHS[name](rng)
        varied = rng.permutation(QUESTIONS) >= round(zero_variance * QUESTIONS)
        found.append(figures(lengths, varied, *rest))
    return {key: [f(one[key] for one in found) for f in (mean, min, max)] for key in found[0]}


def show(title, rows):
    print(f"\n{title}")
    print(" " * 36, *(head.rjust(21) for head in rows[0]["figures"]))
    for row in rows:
        where = ", ".join(f"{row[k]}" for k in row if k != "figures")
        cells = ["{:.1f} ({:.1f} - {:.1f})".format(*f).rjust(21) for f in row["figures"].values()]
        print(where.ljust(36), *cells)


def main(args):
    waits, pads = [], []
    for name in LENGTHS:
        for share in (0.0, 0.25, 0.5):
            for updates in (1, 4):
                row = {"lengths": name, "zero variance": f"{share:.0%} zero variance", "updates": f"updates: {updates}"}
                waits.append({**row, "figures": over_seeds(waiting, name, share, updates)})
        pads.append({"lengths": name, "figures": over_seeds(padding, name, 0.25)})
    show("share of the ranks' time that is waiting, per cent", waits)
    show("padding share of what is run, per cent (25% zero variance)", pads)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"waiting": waits, "padding": pads}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/balance.json")
    main(parser.parse_args())
