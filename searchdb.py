"""SQLite files for search: the offline index (text by BM25, pictures by what they look like), and the cache of results.

    python searchdb.py index --docs docs.jsonl --images images.jsonl --out search.sqlite
    python searchdb.py stats FILE                                       # of an index or a cache: counts, ages, sizes
    python searchdb.py verify FILE                                      # checks every hash of a cache
    python searchdb.py export CACHE --out snapshot.parquet              # a frozen snapshot, to publish
    python searchdb.py import snapshot.parquet --out cache.sqlite
    python searchdb.py import-fvqa PICKLE --out cache.sqlite            # FVQA's image-search cache

Both inputs of `index` are JSON lines; either may be left out. A document is {"title", "text", "url"?, "id"?}, a picture
{"image", "title", "url"?, "id"?}, where image is a path that starts at the folder of the JSONL file.

A text search ranks by SQLite's FTS5 (BM25 over title and text). An image search compares embeddings: by default a
handmade one of the pixels (`embed`: no model to download, good at finding the same thing pictured again, blind to
meaning), with --image_embedding a vision encoder of transformers, by name or folder (CLIP, SigLIP, DINOv2 ...).

The cache keeps what live searches returned, pictures included, under the hash of what was asked. It is in WAL mode: any
number of threads and processes of one machine may use it (a network file system's locks are not enough for that:
`tools.py serve` is for several machines), and one that is killed leaves it sound.

Legend: N pictures of an index, D numbers of an embedding.
"""

import argparse
import collections
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import InputError, run_main
from data import Hit, Result, decode_image, first_line
from web import Client, Failure, Limit, Meter, clean, is_web_url

APPLICATION_ID = 0x4D4D5331  # in the file's header: tells an index from other SQLite files
INDEX_VERSION = 2  # rises when the tables or `embed` change; version 1, which had no table `settings`, is read, too
CACHE_ID, CACHE_VERSION = 0x4D4D5343, 1  # the same for a cache
MAX_QUERY_WORDS = 64  # different words of a query that count; a model may well say ten thousand
LARGE_INDEX = 100_000  # documents from which on words that a tenth of them hold are left out of queries
THUMBNAIL_SIDE = 336  # pixels, at most
LOSSLESS_SIDE = 112  # pixels: thumbnails up to here are PNG, larger ones JPEG

# A build that fails is thrown away whole: it needs no journal.
SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {INDEX_VERSION};
PRAGMA journal_mode = OFF;
CREATE VIRTUAL TABLE docs USING
    fts5(title, text, url UNINDEXED, id UNINDEXED, tokenize = 'unicode61 remove_diacritics 2');
CREATE TABLE images(title TEXT, url TEXT, id TEXT, thumbnail BLOB, embedding BLOB);
CREATE TABLE settings(name TEXT PRIMARY KEY, value TEXT);
"""
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
WEB_FORMATS = ("JPEG", "PNG", "GIF", "WEBP")  # of thumbnails that are fetched; Pillow's other readers are less tried
WEB_PIXELS = 20_000_000  # of a fetched thumbnail; more is a decompression bomb
WEB_IMAGE_BYTES = 8_000_000


# --------------------------------------------------------------------------------------------------- embedding


def embed(data: bytes) -> np.ndarray:
    """What an encoded picture looks like: float32 [D = 204] of length 1, so that a dot product of two is their cosine.

    Two coarse grids over the part of the picture that stands out (which makes it indifferent to where the thing is and
    how large): 6 x 6 mean colours, and 4 x 4 strengths of texture, across and down. Raises InputError if the bytes are
    not a picture.
    """
    return _embed(decode_image(data))


def _embed(image: Image.Image) -> np.ndarray:
    pixels = _grid(image, 24, _salient_box(image))
    change = np.zeros((24, 24, 6), np.float32)  # between cells two apart; squares of it do not tell where a stripe lies
    change[:, 2:, :3] = pixels[:, 2:] - pixels[:, :-2]
    change[2:, :, 3:] = pixels[2:] - pixels[:-2]
    parts = (_pool(pixels, 6) - 0.5, 2 * np.sqrt(_pool(change**2, 4)))
    vector = np.concatenate([part.ravel() / np.sqrt(np.float32(part.size)) for part in parts])
    return vector / max(np.linalg.norm(vector), np.float32(1e-6))


def _grid(image, cells, box=None):
    """float32 [cells, cells, 3]: mean colours, 0 to 1, of a box (left, top, right, bottom; pixels and fractions)."""
    return np.asarray(image.resize((cells, cells), Image.Resampling.BOX, box=box), np.float32) / 255


def _pool(grid, cells):
    """[H, H, C] to [cells, cells, C]: means of square blocks."""
    return grid.reshape(cells, len(grid) // cells, cells, len(grid) // cells, -1).mean((1, 3))


def _salient_box(image):
    """The box around what differs from the border's colour: its centre of mass, 2.2 standard deviations each way."""
    cells = 28  # coarse enough to average noise away
    colours = _grid(image, cells)
    border = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    weight = ((colours - np.median(border, axis=0)) ** 2).sum(-1) + 1e-6  # of a flat picture, all is salient
    weight /= weight.sum()
    at = (np.arange(cells) + 0.5) / cells
    across, down = weight.sum(0), weight.sum(1)
    x, y = across @ at, down @ at
    reach = 2.2 * max(np.sqrt((across @ (at - x) ** 2 + down @ (at - y) ** 2) / 2), 1 / cells)
    box = np.clip([x - reach, y - reach, x + reach, y + reach], 0, 1)
    return tuple(box * [*image.size, *image.size])


def web_thumbnail(data: bytes) -> bytes:
    """A fetched picture as the JPEG that is shown and kept. Raises InputError if it is none, or too large."""
    return _thumbnail(decode_image(data, WEB_FORMATS, WEB_PIXELS))


def _thumbnail(image: Image.Image, format: str = "JPEG") -> bytes:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(buffer, format, quality=90)  # PNG knows no quality
    return buffer.getvalue()


class Encoder:
    """A vision encoder of transformers, by hub name or folder: a picture to float32 [D] of length 1.

    It runs on the CPU, so that searching takes no memory of a training GPU; building an index may use one.
    """

    def __init__(self, name: str, device: str = "cpu"):
        import torch
        from transformers import AutoImageProcessor, AutoModel

        try:
            self.processor = AutoImageProcessor.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        except Exception as error:  # on what it cannot load, transformers raises about anything
            raise InputError(f"image_embedding {name!r}: cannot load it ({first_line(error)})") from None
        self.device, self.torch, self.lock = device, torch, threading.Lock()

    def __call__(self, image: Image.Image) -> np.ndarray:
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        with self.lock, self.torch.inference_mode():
            joint = getattr(self.model, "get_image_features", None)  # of models that also read text
            out = joint(pixel_values=pixels) if joint else self.model(pixel_values=pixels)
        if not isinstance(out, self.torch.Tensor):
            pooled = getattr(out, "pooler_output", None)
            out = out.last_hidden_state.mean(1) if pooled is None else pooled
        vector = out.flatten().float().cpu().numpy()
        return vector / max(np.linalg.norm(vector), np.float32(1e-6))


# ------------------------------------------------------------------------------------------------------ search


class _File:
    """A SQLite file that any number of threads may use at once. Raises InputError if `path` is not one of ours."""

    what, build, application, versions = "", "", 0, ()

    def __init__(self, path: str | Path, options: str = "mode=ro"):
        self.path, self._options = Path(path), options
        self._idle: deque[sqlite3.Connection] = deque()  # each use borrows one: no two threads share a connection
        self._closed = False
        if not self.path.is_file():
            raise InputError(f"{path}: no such {self.what}; {self.build}")
        application, self.version = _header(self.path)
        if application != self.application or self.version not in self.versions:
            said = f"a {self.what} in version {self.version} of the format"
            said = said if application == self.application else f"not a {self.what}"
            raise InputError(f"{path}: {said}, expected version {self.versions[-1]}; {self.build}")

    @contextmanager
    def _connection(self):
        if self._closed:
            raise ValueError(f"{self.path}: this {type(self).__name__} is closed")
        try:
            db = self._idle.pop()
        except IndexError:
            # Python ties a connection to the thread that opened it; ours only pass from one thread to the next.
            uri = f"{self.path.absolute().as_uri()}?{self._options}"
            db = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=60, isolation_level=None)
        try:
            yield db
        finally:
            self._idle.append(db)

    def close(self):
        """Close the file. No use of it may be under way; later ones raise ValueError."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class SearchDB(_File):
    """An index, open for reading."""

    what, build = "search index", "`python searchdb.py index` builds one"
    application, versions = APPLICATION_ID, (1, INDEX_VERSION)

    def __init__(self, path: str | Path):
        super().__init__(path)
        try:
            self.embedding = self._setting("image_embedding")
            self._common = frozenset(self._setting("common_words").split())
            self._rowids, self._embeddings = self._load_embeddings()
        except (sqlite3.DatabaseError, ValueError) as error:  # ValueError: an embedding of another length
            self.close()
            raise InputError(f"{path}: damaged search index ({error}); build it again") from None
        self._embed = Encoder(self.embedding) if self.embedding and len(self._rowids) else _embed

    def _setting(self, name):
        if self.version == 1:
            return ""
        with self._connection() as db:
            found = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return found[0] if found else ""

    def _load_embeddings(self):
        """int64 [N], float32 [N, D]; filled row by row, so that nothing is held twice."""
        with self._connection() as db:
            ((count, size),) = db.execute("SELECT count(*), max(length(embedding)) FROM images")
            rowids, embeddings = np.empty(count, np.int64), np.empty((count, (size or 0) // 4), np.float32)
            for n, (rowid, blob) in enumerate(db.execute("SELECT rowid, embedding FROM images ORDER BY rowid")):
                rowids[n], embeddings[n] = rowid, np.frombuffer(blob, np.float32)
        return rowids, embeddings

    def text(self, query: str, k: int) -> list[Hit]:
        """The k best documents that hold any of the query's words, best first (equals: in the order they were indexed).

        Any string is a valid query: operators and quotes mean nothing, no words find nothing, words after the first
        MAX_QUERY_WORDS different ones are left out, and in an index of LARGE_INDEX documents those that a tenth of them
        hold, if the query has others. Raises sqlite3.DatabaseError if the file cannot be read.
        """
        match = _match_expression(query, self._common)
        if not match:
            return []
        sql = "SELECT title, url, text FROM docs WHERE docs MATCH ? ORDER BY bm25(docs), rowid LIMIT ?"
        with self._connection() as db:
            return [Hit(title, url=url, text=text) for title, url, text in db.execute(sql, (match, k))]

    def image(self, data: bytes, k: int) -> list[Hit]:
        """The k pictures that look most like the encoded picture `data`, with thumbnails, best first (equals: in the
        order they were indexed). Raises InputError if `data` is not a picture, sqlite3.DatabaseError as `text` does."""
        query = self._embed(decode_image(data))
        if not len(self._rowids):
            return []
        if len(query) != self._embeddings.shape[1]:
            raise InputError(f"image_embedding {self.embedding!r}: not the model that {self.path} was built with")
        # einsum adds up each row in the same order, so equal pictures score equally; BLAS promises no such thing.
        scores = np.einsum("nd,d->n", self._embeddings, query)
        best = self._rowids[np.argsort(-scores, kind="stable")[:k]]
        sql = "SELECT title, url, thumbnail FROM images WHERE rowid = ?"
        with self._connection() as db:
            rows = [db.execute(sql, (rowid,)).fetchone() for rowid in best.tolist()]
        return [Hit(title, url=url, image=thumbnail) for title, url, thumbnail in rows]

    def thumbnails(self, pages: set[tuple[str, str]]) -> Iterator[bytes]:
        """The thumbnails of all pictures with one of these (title, url). Raises sqlite3.DatabaseError like `text`."""
        with self._connection() as db:
            rows = [row for row, *page in db.execute("SELECT rowid, title, url FROM images") if tuple(page) in pages]
            for row in rows:  # apart from the pages: most thumbnails need not be read
                yield from db.execute("SELECT thumbnail FROM images WHERE rowid = ?", (row,)).fetchone()

    def stats(self) -> dict[str, int]:
        """How much there is: docs, images, bytes (of the file)."""
        with self._connection() as db:
            ((docs,),) = db.execute("SELECT count(*) FROM docs")
        return {"docs": docs, "images": len(self._rowids), "bytes": self.path.stat().st_size}


def _match_expression(query: str, common: frozenset[str] = frozenset()) -> str:
    """The query's words, quoted and OR-ed, without common ones if there are others. Only letters and digits get
    through, so nothing in it is FTS5 syntax."""
    words = dict.fromkeys(re.findall(r"[^\W_]+", unicodedata.normalize("NFC", query).lower()))
    words = [word for word in words if word not in common] or list(words)
    return " OR ".join(f'"{word}"' for word in words[:MAX_QUERY_WORDS])


def _header(path):
    """(application id, version) in SQLite's file header; (None, 0) of another file."""
    try:
        with open(path, "rb") as file:
            header = file.read(72)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    if len(header) < 72 or not header.startswith(b"SQLite format 3\0"):
        return None, 0
    return int.from_bytes(header[68:], "big"), int.from_bytes(header[60:64], "big")


# ------------------------------------------------------------------------------------------------------- build


def build(
    path: str | Path, docs: Iterable[dict] = (), images: Iterable[dict] = (), *, skip_bad_rows=False, image_embedding=""
) -> int:  # fmt: skip
    """Write an index to `path`, in place of an older one; returns how many bad rows were left out.

    image_embedding: a vision encoder of transformers, by name or folder (default: of the pixels, see `embed`).

    docs: {title, text, url?, id?}; images: {image: encoded bytes or a path, title, url?, id?}; both are read once, row
    by row. `path` appears when all is written; a build that is killed leaves at most `path`.XXXXXXXX.tmp behind. Raises
    InputError naming row and field (skip_bad_rows leaves such rows out), or saying why it cannot write `path`.
    """
    docs = ((f"docs row {n}", row) for n, row in enumerate(docs, 1))
    images = ((f"images row {n}", row) for n, row in enumerate(images, 1))
    return _build(Path(path), docs, images, Path(), skip_bad_rows, image_embedding)


def _build(path, docs, images, folder, skip_bad_rows, image_embedding):
    """As `build`; rows come as (where, dict or a line of JSON), paths start at `folder`."""
    if path.is_dir() or (path.exists() and _header(path)[0] != APPLICATION_ID):
        raise InputError(f"{path}: exists and is not a search index; choose another name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    embedder = _encoder(image_embedding) if image_embedding else _embed
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with closing(sqlite3.connect(temporary)) as db:
            db.executescript(SCHEMA)
            bad = _insert(db, "docs(title, text, url, id)", _doc_values, docs, skip_bad_rows)
            columns = "images(title, url, id, thumbnail, embedding)"
            bad += _insert(db, columns, lambda row: _image_values(row, folder, embedder), images, skip_bad_rows)
            db.execute("INSERT INTO settings VALUES ('image_embedding', ?)", (_full_name(image_embedding),))
            db.execute("INSERT INTO docs(docs) VALUES ('optimize')")
            db.execute("INSERT INTO settings VALUES ('common_words', ?)", (_common_words(db),))
            db.commit()  # the only one; returns when the bytes are on the disk
        temporary.replace(path)
    except sqlite3.OperationalError as error:
        raise InputError(f"{path}: cannot write the index ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return bad


def _insert(db, columns, values, rows, skip_bad_rows):
    sql, bad = f"INSERT INTO {columns} VALUES ({', '.join('?' * len(columns.split(',')))})", 0
    with tqdm(rows, desc=f"index {columns.split('(')[0]}", unit=" rows", leave=False, disable=None) as progress:
        for where, row in progress:
            try:
                db.execute(sql, values(_as_dict(row)))
            except InputError as error:
                if not skip_bad_rows:
                    raise InputError(f"{where}: {error}") from None
                bad += 1
    return bad


def _doc_values(row):
    return _strings(row, "title", "text")


def _common_words(db):
    """Words that over a tenth of the documents of a large index hold: every query with one would rank them all, for
    seconds, and their weight in BM25 is small."""
    ((count,),) = db.execute("SELECT count(*) FROM docs")
    if count < LARGE_INDEX:
        return ""
    db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, docs, row)")
    return " ".join(word for (word,) in db.execute("SELECT term FROM temp.words WHERE doc > ?", (count // 10,)))


def _encoder(name):
    import torch

    return Encoder(name, "cuda" if torch.cuda.is_available() else "cpu")


def _full_name(name):
    """A folder's name from anywhere; a hub name as it is."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def _image_values(row, folder, embedder):
    strings, data = _strings(row, "title"), row.get("image")
    if isinstance(data, str | Path):
        try:
            data = (folder / data).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"field image: cannot read {row['image']!r} ({error})") from None
    if not isinstance(data, bytes):
        raise InputError("field image: expected the path of a picture")
    try:
        image = decode_image(data)
    except InputError as error:  # names the field of a question
        raise InputError(f"field image: {str(error).removeprefix('field images: ')}") from None
    format = "PNG" if max(image.size) <= LOSSLESS_SIDE else "JPEG"
    return *strings, _thumbnail(image, format), embedder(image).astype(np.float32).tobytes()


def _as_dict(row):
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError("expected a JSON object")
    return row


def _strings(row, *required):
    """The row's required fields, url and id."""
    values = []
    for field in (*required, "url", "id"):
        value = row.get(field)
        if value is None and field not in required:
            value = ""
        value = str(value) if field == "id" else value
        if not isinstance(value, str):
            raise InputError(f"field {field}: expected a string, not {repr(value)[:40]}")
        if re.search("[\ud800-\udfff]", value):  # JSON can spell half a character
            raise InputError(f"field {field}: not valid Unicode")
        values.append(value)
    return values


# ------------------------------------------------------------------------------------------------------- cache


def request_key(request: str) -> str:
    """The key of a request, which is canonical JSON (see `canonical`)."""
    return hashlib.sha256(request.encode()).hexdigest()


def canonical(request: dict) -> str:
    """A request as JSON that is always written the same."""
    return json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class SearchCache(_File):
    """What live searches returned, open for reading, or also for writing. Methods raise sqlite3.DatabaseError if the
    file cannot be read or written, or holds nonsense."""

    what, build = "search cache", "`--search record` writes one"
    application, versions = CACHE_ID, (CACHE_VERSION,)

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
        key = request_key(canonical(request))
        with self._connection() as db:
            row = db.execute("SELECT status, result FROM results WHERE key = ?", (key,)).fetchone()
            if row and count and row[0] != "error":
                with self._writing:
                    db.execute("UPDATE results SET used = used + 1 WHERE key = ?", (key,))
            return row and _load_result(*row, partial(_image, db))

    def put(self, request: dict, result: Result) -> Result:
        """Keep a result, unless one that is no error is there already; returns what is now kept, so that everybody who
        asks the same at the same time goes on with the same answer."""
        self.put_all([(canonical(request), time.time(), result)])
        return self.get(request)

    def put_all(self, rows: Iterable[tuple[str, float, Result]]) -> None:
        """Keep many (request, time, result), all or none."""
        with self._connection() as db, self._writing:
            db.execute("BEGIN IMMEDIATE")
            try:
                for request, created, result in rows:
                    _insert_result(db, request, created, result)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise

    def rows(self) -> Iterator[tuple[str, float, Result]]:
        """All of it, as put_all takes it, in the order of the keys."""
        with self._connection() as db:
            for request, created, *row in db.execute(
                "SELECT request, created, status, result FROM results ORDER BY key"
            ):
                yield request, created, _load_result(*row, partial(_image, db))

    def stats(self) -> dict:
        """results, by kind and status; found: times one was found again; hit_rate: of all searches, those that found
        one; oldest, newest: seconds since 1970; images, image_bytes; bytes of the file."""
        sql = "SELECT status, json_extract(request, '$.kind'), count(*), sum(used), min(created), max(created)"
        with self._connection() as db:
            rows = db.execute(f"{sql} FROM results GROUP BY 1, 2 ORDER BY 2, 1").fetchall()
            ((images, image_bytes),) = db.execute("SELECT count(*), coalesce(sum(length(data)), 0) FROM images")
        total, found = sum(row[2] for row in rows), sum(row[3] for row in rows)
        return {
            "results": total,
            "counts": {f"{kind or 'other'} {status}": n for status, kind, n, *_ in rows},
            "found": found,
            "hit_rate": found / max(found + total, 1),
            "oldest": min((row[4] for row in rows), default=0.0),
            "newest": max((row[5] for row in rows), default=0.0),
            "images": images,
            "image_bytes": image_bytes,
            "bytes": self.path.stat().st_size,
        }

    def verify(self) -> Iterator[str]:
        """What is wrong with the file, a line each; nothing if every hash is right."""
        with self._connection() as db:
            yield from (line for (line,) in db.execute("PRAGMA integrity_check") if line != "ok")
            known = set()
            for hash, data in db.execute("SELECT hash, data FROM images"):
                known.add(hash)
                if hashlib.sha256(data).hexdigest() != hash:
                    yield f"image {hash}: its bytes have another hash"
            for key, request, *row, sha256 in db.execute("SELECT key, request, status, result, sha256 FROM results"):
                if request_key(request) != key:
                    yield f"result {key}: its request has another hash"
                if _sha256(request, *row) != sha256:
                    yield f"result {key}: its content has another hash"
                else:
                    lost = [h["image"] for h in json.loads(row[1])["hits"] if h["image"] and h["image"] not in known]
                    yield from (f"result {key}: image {hash} is missing" for hash in lost)


def _make_cache(path):
    """An empty cache; of several processes that make it at once, one does."""
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with closing(sqlite3.connect(temporary)) as db:
            db.executescript(CACHE_SCHEMA)
        os.link(temporary, path)  # unlike a rename, it never replaces what another process has made and begun to fill
    except FileExistsError:
        pass
    except (OSError, sqlite3.OperationalError) as error:
        raise InputError(f"{path}: cannot make this search cache ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _insert_result(db, request, created, result):
    hits, images = [], {}
    for hit in result.hits:
        hash = hit.image and hashlib.sha256(hit.image).hexdigest()
        images |= {hash: hit.image} if hash else {}
        hits.append({"title": hit.title, "url": hit.url, "text": hit.text, "image": hash})
    content = json.dumps({"error": result.error, "error_kind": result.error_kind, "hits": hits}, ensure_ascii=False)
    db.executemany("INSERT OR IGNORE INTO images VALUES (?, ?)", images.items())
    db.execute(
        "INSERT INTO results(key, request, status, result, sha256, created) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT(key) DO UPDATE SET status = excluded.status, result = excluded.result, sha256 = excluded.sha256, "
        "created = excluded.created WHERE results.status = 'error'",
        (request_key(request), request, result.status, content, _sha256(request, result.status, content), created),
    )


def _sha256(request, status, result):
    return hashlib.sha256("\0".join((request, status, result)).encode()).hexdigest()


def _image(db, hash):
    row = db.execute("SELECT data FROM images WHERE hash = ?", (hash,)).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"image {hash} is missing")
    return row[0]


def _load_result(status, content, image):
    try:
        content = json.loads(content)
        hits = (Hit(h["title"], h["url"], h["text"], h["image"] and image(h["image"])) for h in content["hits"])
        return Result(status, tuple(hits), content["error"], content["error_kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise sqlite3.DatabaseError(f"a kept result is damaged ({type(error).__name__})") from None


def export(cache: SearchCache, path: str | Path) -> int:
    """Write a cache as plain parquet: request, created, status, error, error_kind, hits [{title, url, text, image}].
    Returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, temporary, count = pa.string(), Path(f"{path}.{secrets.token_hex(4)}.tmp"), 0
    hit = pa.struct({"title": text, "url": text, "text": text, "image": pa.binary()})
    names = ("request", "status", "error", "error_kind")
    schema = pa.schema({**dict.fromkeys(names, text), "created": pa.float64(), "hits": pa.list_(hit)})
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for part in _batches(cache.rows(), 256):
                table = [
                    {"request": request, "created": created, **vars(r), "hits": [vars(h) for h in r.hits]}
                    for request, created, r in part
                ]
                writer.write_table(pa.Table.from_pylist(table, schema))
                count += len(table)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write it ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def import_parquet(path: str | Path, cache: SearchCache) -> int:
    """Add the rows of an exported file to a cache, all or none; returns their number. Raises InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0

    def rows():
        nonlocal count
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    count += 1
                    yield _row(row)

    try:
        cache.put_all(rows())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}, row {count}: not an exported cache ({type(error).__name__}: {error})") from None
    return count


def _row(row):
    if canonical(json.loads(row["request"])) != row["request"] or row["status"] not in ("ok", "no_results", "error"):
        raise ValueError("request or status")
    hits = []
    for hit in row["hits"]:
        if hit["image"] is not None:
            decode_image(hit["image"])
        hits.append(Hit(str(hit["title"]), str(hit["url"]), str(hit["text"]), hit["image"]))
    return row["request"], float(row["created"]), Result(row["status"], tuple(hits), row["error"], row["error_kind"])


def _batches(rows, size):
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# -------------------------------------------------------------------------------------------------------- FVQA


def import_fvqa(
    path: str | Path, cache: SearchCache, client: Client | None = None
) -> tuple[int, list[tuple[str, str]]]:
    """Add FVQA's image-search cache, a pickle {data_id: {"tool_returned_web_title_list": [title],
    "tool_returned_images_urls": [URL or PIL image]}}; returns the number of entries and (data_id, URL) of the pictures
    that are missing: all that are given as URLs without a client, those that cannot be fetched with one.

    A pickle is a program; this one is read by a reader that knows plain containers, strings and pictures, and refuses
    everything else. Raises InputError. Hits without a picture keep their title. In a replay an entry answers image
    searches about questions with its data_id where nothing is kept under the picture itself.
    """
    try:
        with open(path, "rb") as file:
            entries = _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except Exception as error:  # on broken files pickle raises about anything
        raise InputError(f"{path}: not a pickle of plain data ({str(error) or type(error).__name__})") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected a dictionary by data_id")
    limit, missing, now = Limit(16), [], time.time()
    fetch = partial(_fetch_picture, client, limit) if client else lambda url: None

    def rows(pool):
        for id, entry in tqdm(entries.items(), desc="import", unit=" entries", leave=False, disable=None):
            titles, pictures = _fvqa_entry(path, id, entry)
            urls = [p for p in pictures if isinstance(p, str)]
            fetched = dict(zip(urls, pool.map(fetch, urls), strict=True))
            missing.extend((str(id), url) for url in urls if fetched[url] is None)
            hits = tuple(
                Hit(clean(title, 300), image=fetched[p] if isinstance(p, str) else p)
                for title, p in zip(titles, pictures, strict=False)
            )
            yield canonical({"data_id": str(id)}), now, Result("ok" if hits else "no_results", hits)

    with ThreadPoolExecutor(16) as pool:
        for part in _batches(rows(pool), 64):  # what was fetched is kept, should the rest be interrupted
            cache.put_all(part)
    return len(entries), missing


def _fvqa_entry(path, id, entry):
    """(titles, pictures as JPEG bytes or URLs) of an entry, one of each for each hit."""
    if not isinstance(entry, dict) or not isinstance(id, str | int):
        raise InputError(f"{path}, entry {str(id)[:40]}: expected a dictionary under a data_id")
    titles, pictures = entry.get("tool_returned_web_title_list"), entry.get("tool_returned_images_urls")
    if not isinstance(titles, list | tuple) or not isinstance(pictures, list | tuple):
        raise InputError(f"{path}, entry {str(id)[:40]}: expected two lists, of titles and of pictures or URLs")
    try:
        return titles, [p.jpeg() if isinstance(p, _PickledImage) else str(p)[:2000] for p in pictures]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}, entry {str(id)[:40]}: a picture that cannot be read ({error})") from None


def _fetch_picture(client, limit, url):
    try:
        if not is_web_url(url):
            return None
        return web_thumbnail(
            client.fetch(
                url,
                limit,
                Meter(),
                time.monotonic() + 60,
                what="picture",
                max_bytes=WEB_IMAGE_BYTES,
                types=("image/*",),
            )
        )
    except (Failure, InputError):
        return None


class _PickledImage:
    """Stands in for PIL images of a pickle: takes their state, and makes a picture only of what is sound."""

    def __setstate__(self, state):
        self.state = state

    def jpeg(self) -> bytes:
        _, mode, size, palette, data = self.state[:5]  # as Pillow writes it
        width, height = size
        if not 0 < width * height <= WEB_PIXELS or max(size) > 200 * min(size):
            raise ValueError(f"{width} x {height} pixels")
        image = Image.frombytes(mode, (width, height), data)
        if mode in ("P", "PA") and palette:
            image.putpalette(palette)
        return _thumbnail(image.convert("RGB"))


class _Ignored(str):
    """Stands in for what pictures carry along: notes in a PNG, fractions in EXIF."""

    def __setstate__(self, state):
        pass


def _reconstruct(cls, base, state):
    """What `copyreg._reconstructor` does, for pictures and their notes alone (protocols 0 and 1)."""
    if (cls, base) not in ((_PickledImage, object), (_Ignored, str)):
        raise pickle.UnpicklingError("only pictures may be reconstructed")
    return cls() if base is object else cls(state)


class _Unpickler(pickle.Unpickler):
    """Knows plain containers, strings, numbers, bytes and PIL images; anything else is refused before it runs."""

    allowed: dict[tuple[str, str], Callable | type] = {
        ("builtins", "object"): object,
        ("builtins", "unicode"): str,
        ("builtins", "str"): str,
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("builtins", "bytearray"): bytearray,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("copyreg", "_reconstructor"): _reconstruct,
        ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),  # bytes, in protocol 2
        ("PIL.PngImagePlugin", "iTXt"): _Ignored,
    }

    def find_class(self, module, name):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if module.split(".")[0] == "PIL" and (name == "Image" or name.endswith("ImageFile")):
            return _PickledImage
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not allowed")
        return self.allowed[module, name]


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> None:
    """The command line (argv: without the program's name). Raises InputError."""
    parser = _Parser(prog="searchdb.py", description="Search indexes and caches of search results.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, allow_abbrev=False)
    index = add("index", help="build an index from JSONL files")
    index.add_argument("--docs", type=Path, help="JSONL file of documents: title, text, url, id")
    index.add_argument("--images", type=Path, help="JSONL file of pictures: image (a path), title, url, id")
    index.add_argument("--out", type=Path, required=True, help="the index; an older one is replaced")
    index.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out and count them")
    model = "vision encoder of transformers, by name or folder (default: a handmade embedding, no download)"
    index.add_argument("--image_embedding", default="", metavar="MODEL", help=model)
    for name, help in (("stats", "say what an index or a cache holds"), ("verify", "check every hash of a cache")):
        add(name, help=help).add_argument("file", type=Path, metavar="FILE")
    for name, help in (
        ("export", "write a cache as parquet"),
        ("import", "add an exported parquet file to a cache"),
        ("import-fvqa", "add FVQA's image-search cache, a pickle, to a cache"),
    ):
        command = add(name, help=help)
        command.add_argument("file", type=Path, metavar="FILE")
        command.add_argument("--out", type=Path, required=True, help="what is written")
    command.add_argument("--live", action="store_true", help="fetch pictures that are given as URLs")
    args = parser.parse_args(argv)
    command = {"index": _index, "stats": _stats, "verify": _verify, "export": _export, "import": _import}
    try:
        command.get(args.command, _import_fvqa)(args)
    except sqlite3.DatabaseError as error:
        raise InputError(f"{getattr(args, 'file', args.out)}: cannot be read or written ({error})") from None


def _stats(args):
    if args.file.is_file() and _header(args.file)[0] == CACHE_ID:
        with closing(SearchCache(args.file)) as cache:
            print(f"{args.file}: {_describe(cache.stats())}")
    else:
        _describe_index(args.file)


def _describe(s):
    counts = ", ".join(f"{n:,} {name}" for name, n in s["counts"].items()) or "empty"
    day = lambda t: time.strftime("%Y-%m-%d", time.gmtime(t))  # noqa: E731
    return (
        f"{s['results']:,} results ({counts}), {day(s['oldest'])} to {day(s['newest'])}; found again {s['found']:,} "
        f"times (hit rate {s['hit_rate']:.0%}); {s['images']:,} images, {s['image_bytes'] / 1e6:.1f} MB; "
        f"file {s['bytes'] / 1e6:.1f} MB"
    )


def _verify(args):
    with closing(SearchCache(args.file)) as cache:
        wrong = Counter()
        for line in cache.verify():
            wrong.update(["problems"])
            print(line)
    if wrong:
        raise InputError(f"{args.file}: {wrong.total():,} problems")
    print(f"{args.file}: every hash is right")


def _export(args):
    with closing(SearchCache(args.file)) as cache:
        print(f"{args.out}: {export(cache, args.out):,} results")


def _import(args):
    with closing(SearchCache(args.out, write=True)) as cache:
        print(f"{args.out}: {import_parquet(args.file, cache):,} results read from {args.file}")


def _import_fvqa(args):
    with closing(SearchCache(args.out, write=True)) as cache:
        count, missing = import_fvqa(args.file, cache, Client() if args.live else None)
    print(f"{args.out}: {count:,} entries read from {args.file}, {len(missing):,} pictures missing")
    if missing:
        listed = Path(f"{args.out}.missing.tsv")
        listed.write_text("".join(f"{id}\t{url}\n" for id, url in missing), errors="replace")
        print(
            f"missing pictures (data_id, URL) are listed in {listed}" + ("" if args.live else "; --live fetches them")
        )


def _index(args):
    files = [file for file in (args.docs, args.images) if file]
    if not files:
        raise InputError("give --docs, --images or both")
    for file in files:
        if not file.is_file():  # before the work, not after half of it
            raise InputError(f"{file}: no such file")
    folder = args.images.parent if args.images else Path()
    docs, images = _json_lines(args.docs), _json_lines(args.images)
    bad = _build(args.out, docs, images, folder, args.skip_bad_rows, args.image_embedding)
    if bad:
        print(f"left out {bad:,} bad rows")
    _describe_index(args.out)


def _describe_index(path):
    with closing(SearchDB(path)) as db:
        count = db.stats()
    print(f"{path}: {count['docs']:,} documents, {count['images']:,} images, {count['bytes'] / 1e6:.1f} MB")


def _json_lines(path) -> Iterator[tuple[str, bytes]]:
    """The file's lines that are not blank, as (where, line); none if there is no file."""
    if path is None:
        return
    try:
        with open(path, "rb") as file:
            yield from ((f"{path}, line {n}", line) for n, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


if __name__ == "__main__":
    run_main(main)
