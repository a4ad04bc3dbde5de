"""Recorded results: an SQLite file of what live searches returned, pictures included, by the hash of what was asked.

`--search record` fills one, `--search replay` answers from one. It is in WAL mode: any number of threads and processes
of one machine may use it (a network file system's locks are not enough for that: `python -m search serve` is for
several machines), and one that is killed leaves it sound. All that is read is compared with its hash.
"""

import dataclasses
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from config import Config, need, replacing
from data import Call, Hit, Question, Result, Usage, decode_image, refusing
from search.calls import MAX_QUERY, Failure, failed, method_for, query_of, shared
from search.embedding import THUMBNAIL_SIDE
from search.index import SQLiteFile, sha256
from search.live import PAGE_CHARACTERS, WebSearch, engine_of, summarizer_prompt
from search.text import PAGE_SENTENCES, clean
from search.web import page_url
from tools import TOOLS, picture_of, results, title

CACHE_ID, CACHE_VERSION = 0x4D4D5343, 1  # in the file's header, as those of an index
CACHE_SCHEMA = f"""
PRAGMA application_id = {CACHE_ID};
PRAGMA user_version = {CACHE_VERSION};
PRAGMA journal_mode = WAL;
CREATE TABLE results(
    key TEXT PRIMARY KEY,              -- sha256 of the request
    request TEXT NOT NULL,             -- JSON: what was asked, of whom, how
    status TEXT NOT NULL,
    result TEXT NOT NULL,              -- JSON: error, error_kind, hits {{title, url, text, image: its hash or null}}
    sha256 TEXT NOT NULL,              -- of request, status and result
    created REAL NOT NULL,             -- seconds since 1970
    used INTEGER NOT NULL DEFAULT 0    -- times it was found again
) WITHOUT ROWID;
CREATE TABLE images(hash TEXT PRIMARY KEY, data BLOB NOT NULL);
"""


def canonical(request: dict) -> str:
    """A request as JSON that is always written the same."""
    return json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class SearchCache(SQLiteFile):
    """What live searches returned, open for reading, or also for writing. Methods raise sqlite3.DatabaseError if the
    file cannot be read or written, or holds what nobody put there."""

    what, build = "search cache", "`--search record` writes one"
    application, version = CACHE_ID, CACHE_VERSION

    def __init__(self, path: str | Path, write: bool = False):
        """write: make the file if there is none."""
        if write and not Path(path).exists():
            _make_cache(Path(path))
        # In a folder that cannot be written SQLite can read a WAL database only if told that nobody writes to it.
        frozen = not write and not os.access(Path(path).absolute().parent, os.W_OK)
        super().__init__(path, "mode=rw" if write else "mode=ro&immutable=1" if frozen else "mode=ro")
        self._writing = threading.Lock()  # SQLite would let this process's threads sleep and try again

    def get(self, request: dict, count: bool = False) -> Result | None:
        """The result kept for a request, if any; count: note that it was found again (needs `write`)."""
        key = sha256([canonical(request)])
        with self._connection() as db:
            row = db.execute("SELECT status, result, sha256 FROM results WHERE key = ?", (key,)).fetchone()
            kept = row and _load_result(db, canonical(request), *row)
            if kept and count and kept.status == "ok":
                with self._writing:
                    db.execute("UPDATE results SET used = used + 1 WHERE key = ?", (key,))
            return kept

    def put(self, request: dict, result: Result) -> Result:
        """Keep a result, unless a better one is there already (ok, then no_results, then error); returns what is now
        kept, so that everybody who asks the same at the same time goes on with the same answer."""
        self.put_all([(canonical(request), time.time(), result)])
        return self.get(request)

    def put_all(self, rows: Iterable[tuple[str, float, Result]]) -> int:
        """Keep many (request, time, result), all or none; returns their number."""
        count = 0
        with self._connection() as db, self._writing, db:  # the last commits, or rolls back
            db.execute("BEGIN IMMEDIATE")
            for row in rows:
                _insert_result(db, *row)
                count += 1
        return count

    def rows(self) -> Iterator[tuple[str, float, Result]]:
        """All of it, as put_all takes it, in the order of the keys."""
        with self._connection() as db:
            sql = "SELECT request, CAST(created AS REAL), status, result, sha256 FROM results ORDER BY key"
            for request, created, *row in db.execute(sql):
                yield request, created, _load_result(db, request, *row)

    def stats(self) -> dict:
        """results, by kind and status; found: times one was found again; hit_rate: of all searches, those that found
        one; oldest, newest: days; images, image_bytes; bytes of the file."""
        sql = "SELECT json_extract(request, '$.kind'), status, count(*) FROM results GROUP BY 1, 2 ORDER BY 1, 2"
        days = "date(min(created), 'unixepoch'), date(max(created), 'unixepoch')"
        with self._connection() as db:
            counts = {f"{kind or 'other'} {status}": n for kind, status, n in db.execute(sql)}
            ((total, found, *days),) = db.execute(f"SELECT count(*), total(used), {days} FROM results")
            ((images, image_bytes),) = db.execute("SELECT count(*), total(length(data)) FROM images")
        stats = {"results": total, "counts": counts, "found": int(found), "hit_rate": found / max(found + total, 1)}
        stats |= {"oldest": days[0], "newest": days[1], "images": images, "image_bytes": int(image_bytes)}
        return stats | {"bytes": self.path.stat().st_size}

    def _wrong_hashes(self, db):
        for hash, data in db.execute("SELECT hash, data FROM images"):
            if sha256([data]) != hash:
                yield f"image {hash}: its bytes have another hash"
        for key, request, *row in db.execute("SELECT key, request, status, result, sha256 FROM results"):
            if sha256([request]) != key:
                yield f"result {key}: its request has another hash"
            try:
                _load_result(db, request, *row)
            except sqlite3.DatabaseError as error:
                yield f"result {key}: {error}"


def _make_cache(path):
    """An empty cache; of several processes that make it at once, one does."""
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with refusing(f"{path}: cannot make this search cache", sqlite3.OperationalError), suppress(FileExistsError):
            with closing(sqlite3.connect(temporary)) as db:
                db.executescript(CACHE_SCHEMA)
            os.link(temporary, path)  # unlike a rename, it never replaces what another process has begun to fill
    finally:
        temporary.unlink(missing_ok=True)


def _insert_result(db, request, created, result):
    hits, images = [], {}
    for hit in result.hits:
        hash = hit.image and sha256([hit.image])
        images |= {hash: hit.image} if hash else {}
        hits.append({**vars(hit), "image": hash})
        if not hit.full_size:
            del hits[-1]["full_size"]  # as in files of earlier versions
    content = json.dumps({"error": result.error, "error_kind": result.error_kind, "hits": hits}, ensure_ascii=False)
    db.executemany("INSERT OR IGNORE INTO images VALUES (?, ?)", images.items())
    db.execute(
        "INSERT INTO results(key, request, status, result, sha256, created) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT(key) DO UPDATE SET status = excluded.status, result = excluded.result, sha256 = excluded.sha256, "
        "created = excluded.created WHERE results.status = 'error' "
        "OR (results.status = 'no_results' AND excluded.status = 'ok')",
        (sha256([request]), request, result.status, content, sha256((request, result.status, content)), created),
    )


def _image(db, hash):
    row = db.execute("SELECT data FROM images WHERE hash = ?", (hash,)).fetchone()
    if row is None or sha256(row) != hash:
        raise sqlite3.DatabaseError(f"image {hash} is missing or damaged")
    return row[0]


def _load_result(db, request, status, content, hash):
    if sha256((request, status, content)) != hash or not isinstance(status, str):  # bytes have the same hash
        raise sqlite3.DatabaseError("its content has another hash: the file is damaged")
    try:
        content = json.loads(content)
        hits = [Hit(**{**hit, "image": hit["image"] and _image(db, hit["image"])}) for hit in content["hits"]]
        return Result(status, tuple(hits), content["error"], content["error_kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise sqlite3.DatabaseError(f"a kept result is damaged ({type(error).__name__})") from None


def export(cache: SearchCache, path: str | Path) -> int:
    """Write a cache as plain parquet: request, created, status, error, error_kind, hits [{title, url, text, image,
    full_size}], with the checksums of its pages. Returns the number of rows."""
    text, kept, count = pa.string(), cache.rows(), 0
    hit = pa.struct({"title": text, "url": text, "text": text, "image": pa.binary(), "full_size": pa.bool_()})
    names = ("request", "status", "error", "error_kind")
    schema = pa.schema({**dict.fromkeys(names, text), "created": pa.float64(), "hits": pa.list_(hit)})
    options = {"compression": "zstd", "write_page_checksum": True}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        while part := list(islice(kept, 256)):
            rows = [{"request": q, "created": at, **vars(r), "hits": [*map(vars, r.hits)]} for q, at, r in part]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            count += len(rows)
    return count


def snapshot_rows(path: str | Path) -> Iterator[tuple[str, float, Result]]:
    """The rows of an exported file, as `SearchCache.put_all` takes them. Raises InputError if one is damaged."""
    with refusing(f"{path}: not a readable parquet file of recorded results", pa.ArrowException):
        with pq.ParquetFile(path, page_checksum_verification=True) as table:
            rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                with refusing(f"row {number}: not an exported cache", KeyError, TypeError, AttributeError):
                    yield _row(row)


def _row(row):
    sound = canonical(json.loads(row["request"])) == row["request"] and row["status"] in ("ok", "no_results", "error")
    need(sound, "request or status")
    hits = []
    for hit in row["hits"]:
        if hit["image"] is not None:
            decode_image(hit["image"])
        texts = (str(hit[name]) for name in ("title", "url", "text"))
        hits.append(Hit(*texts, hit["image"], bool(hit.get("full_size"))))
    return row["request"], float(row["created"]), Result(row["status"], tuple(hits), row["error"], row["error_kind"])


class CachedSearch:
    """Keeps what `inner` finds and finds it again (record); without one, finds only what was kept (replay).

    Calls that ask the same while the first of them is under way wait for its answer: the conversations of a group cost
    one search. A kept error or "no results" is what a replay answers; a recording tries again (a search engine may come
    back empty-handed once), but asks only once for what it finds to be nothing.
    """

    def __init__(self, cache: SearchCache, inner: WebSearch | None, cfg: Config):
        self.cache, self.inner, self.cfg, self.results = cache, inner, cfg, results(cfg)
        self._prompt = sha256([summarizer_prompt()])[:16]
        self._pending: dict[str, Future] = {}
        self._empty: set[str] = set()  # requests for which this process has found nothing

    def request(self, call: Call, question: Question) -> dict:
        """All that the answer to a call depends on, but the day: the key of the cache. Raises Failure (bad_call)."""
        asked = method_for(call, question, self)(call, question)
        engines = {**engine_of(self.cfg).names, "visit": "reader"}
        asked |= {"kind": TOOLS[call.tool].key, "engine": engines.get(call.tool, "")}
        return {**asked, "k": self.results[call.tool], "language": self.cfg.search_language}

    def for_image_search(self, call, question):
        return {"image": sha256([picture_of(call, question)]), "thumbnail_side": THUMBNAIL_SIDE}

    def for_text_search(self, call, question):
        return self._page_request(query_of(call))

    def for_visit(self, call, question):
        goal = clean(call.query, MAX_QUERY)
        return {"url": page_url(call.url), "sentences": PAGE_SENTENCES, **self._page_request(goal)}

    def _page_request(self, query):
        """What the text that is told of a page depends on; without a query nothing is summarised."""
        asked = {"query": query, "characters": PAGE_CHARACTERS, "summarizer": "passages"}
        if self.cfg.summarizer_url and query:
            asked |= {"summarizer": self.cfg.summarizer_model, "prompt": self._prompt}
        return asked

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call, kept or new; without an inner search what was not kept is an error that says so."""
        try:
            request = self.request(call, question)
            answer = partial(self._answer, request, call, question)
            if self.inner is None:
                return answer()
            result, mine = shared(self._pending, canonical(request), answer)
            return result if mine else dataclasses.replace(result, usage=Usage(cached=1))
        except (Failure, sqlite3.DatabaseError) as error:
            return failed(error)

    def _answer(self, request, call, question):
        kept = self.cache.get(request, count=self.inner is not None)
        if kept is None and "image" in request and call.image is None and question.data_id:
            kept = self.cache.get({"data_id": question.data_id})  # from FVQA's own cache: of the question's picture
            kept = kept and dataclasses.replace(kept, hits=kept.hits[: self.results[call.tool]])
        if kept and (self.inner is None or kept.status == "ok" or canonical(request) in self._empty):
            return dataclasses.replace(kept, usage=Usage(cached=1))
        if self.inner is None:
            raise Failure("not_recorded", f"nothing is kept in {self.cache.path.name} for this {title(call.tool)}")
        found = self.inner.search(call, question)
        if found.status == "no_results":
            self._empty.add(canonical(request))
        return dataclasses.replace(self.cache.put(request, found), usage=found.usage)
