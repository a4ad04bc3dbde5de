"""A process for test_cache.py whose eight threads hammer a cache: python hammer.py CACHE SEED ROUNDS."""

import hashlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor

from data import Hit, Result
from search.cache import SearchCache


def asked(n, kind="text"):
    return {"kind": kind, "query": f"q{n}"}


def hammered(n):
    """A result of n alone, with pictures that several results share."""
    data = [hashlib.sha256(bytes([i])).digest() * 300 for i in (n % 7, n)]
    return Result("ok", tuple(Hit(f"{n} {i}", image=d) for i, d in enumerate(data)))


def main(path, seed, rounds):
    cache = SearchCache(path, write=True)

    def work(thread):
        rng = random.Random(f"{seed} {thread}")
        for _ in range(int(rounds)):
            n = rng.randrange(200)
            assert cache.put(asked(n), hammered(n)) == hammered(n) == cache.get(asked(n), count=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


if __name__ == "__main__":
    main(*sys.argv[1:])
