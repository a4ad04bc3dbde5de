"""How an offline text index scales: builds one of synthetic documents (Zipfian words) and times queries.

    python benchmarks/million_docs.py [DOCUMENTS] [FOLDER]      # default 1000000, in a temporary folder

Prints a line of JSON: seconds to build, sizes, peak memory, and the median and 99th percentile of the latency of text
searches (5 results; 200 queries of 2 to 8 words drawn from the documents' distribution, some of which find nothing if
documents are few; a warm cache, one thread).
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
WORDS, LENGTH = 200_000, 100  # words in the vocabulary; in a document, on average


def vocabulary():
    return np.array([np.base_repr(n * 7919 + 1_000_003, 36).lower() for n in range(WORDS)])


def write(path, count, names, rng):
    with open(path, "w") as file:
        for start in range(0, count, 10_000):
            lengths = rng.poisson(LENGTH, min(10_000, count - start)) + 1
            words = iter(names[draw(rng, int(lengths.sum()))].tolist())
            for n, length in enumerate(lengths, start):
                text = [next(words) for _ in range(length)]
                doc = {"id": n, "title": " ".join(text[:5]), "text": " ".join(text)}
                file.write(json.dumps({**doc, "url": f"https://x.example/{n}"}) + "\n")


def draw(rng, size):
    """Ranks of words by Zipf's law with exponent 1: inverse of its cumulative distribution."""
    return np.minimum(np.exp(rng.random(size) * np.log(WORDS)).astype(int), WORDS - 1)


def main(count, folder):
    from search.index import SearchDB

    rng, names = np.random.default_rng(0), vocabulary()
    docs, index = folder / "docs.jsonl", folder / "search.sqlite"
    write(docs, count, names, rng)
    started = time.monotonic()
    command = [sys.executable, "-m", "search", "index", "--docs", docs, "--out", index]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    built = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    queries = [" ".join(names[draw(rng, int(rng.integers(2, 9)))]) for _ in range(200)]
    db, seconds, found = SearchDB(index), [], 0
    for query in queries:
        started = time.monotonic()
        found += bool(db.text(query, 5))
        seconds.append(time.monotonic() - started)
    figures = {
        "documents": count,
        "text_mb": round(os.path.getsize(docs) / 1e6),
        "build_seconds": round(built),
        "index_mb": round(os.path.getsize(index) / 1e6),
        "peak_build_gb": round(peak, 2),
        "queries_with_results": found,
        "median_ms": round(1000 * float(np.median(seconds)), 1),
        "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 1),
        "peak_query_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    where = sys.argv[2] if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        main(count, Path(folder).resolve())
