"""How large an offline text index can be: builds one of synthetic documents (Zipfian words) and times queries.

    python benchmarks/million_docs.py [DOCUMENTS] [FOLDER]      # default 1000000, in a temporary folder

Prints a line of JSON: seconds to build, sizes, peak memory, median and 99th percentile of the latency of text searches
(5 results; queries of 2 to 8 words drawn from the documents' distribution, a cache that is warm, one thread).
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
WORDS, LENGTH = 200_000, 100  # of the vocabulary; of a document, on average


def write(path, count, rng):
    names = np.array([np.base_repr(n * 7919 + 1_000_003, 36).lower() for n in range(WORDS)])
    with open(path, "w") as file:
        for start in range(0, count, 10_000):
            lengths = rng.poisson(LENGTH, min(10_000, count - start)) + 1
            words = iter(names[draw(rng, int(lengths.sum()))].tolist())
            for n, length in enumerate(lengths, start):
                text = [next(words) for _ in range(length)]
                row = {"id": n, "title": " ".join(text[:5]), "text": " ".join(text), "url": f"https://x.example/{n}"}
                file.write(json.dumps(row) + "\n")


def draw(rng, size):
    """Ranks of words by Zipf's law with exponent 1: inverse of its cumulative distribution."""
    return np.minimum(np.exp(rng.random(size) * np.log(WORDS)).astype(int), WORDS - 1)


def main(count, folder):
    from search.index import SearchDB

    rng = np.random.default_rng(0)
    docs, index = folder / "docs.jsonl", folder / "search.sqlite"
    write(docs, count, rng)
    started = time.monotonic()
    command = [sys.executable, "-m", "search", "index", "--docs", docs, "--out", index]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    built = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    names = [np.base_repr(n * 7919 + 1_000_003, 36).lower() for n in range(WORDS)]
    queries = [" ".join(names[w] for w in draw(rng, int(rng.integers(2, 9)))) for _ in range(200)]
    db, seconds = SearchDB(index), []
    for query in queries:
        started = time.monotonic()
        assert db.text(query, 5)
        seconds.append(time.monotonic() - started)
    print(
        json.dumps(
            {
                "documents": count,
                "text_mb": round(os.path.getsize(docs) / 1e6),
                "build_seconds": round(built),
                "index_mb": round(os.path.getsize(index) / 1e6),
                "peak_build_gb": round(peak, 2),
                "median_ms": round(1000 * float(np.median(seconds)), 1),
                "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 1),
                "peak_query_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        main(count, Path(folder))
