"""The offline search: an SQLite file of documents, found by BM25, and of pictures, found by what they look like.

A document is {"title", "text", "url"?, "id"?}, a picture {"image", "title", "url"?, "id"?}. Text search is SQLite's
FTS5 over the terms (search/text.py) of title and text; where documents have embeddings, too, its ranks and those of
the embeddings are fused. Image search compares embeddings (search/embedding.py). An index is built once and only read
from then on, by any number of threads and processes. Every row is read with its hash.

Legend: N pictures or documents of an index, D numbers of an embedding.
"""

import hashlib
import json
import os
import secrets
import sqlite3
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import InputError, need
from data import HALF, Call, Hit, Question, Result, decode_image, refusing
from search.calls import Failure, failed, method_for, shared
from search.embedding import LOSSLESS_SIDE, embed_image, load_encoder, load_text_encoder, thumbnail
from search.text import PAGE_SENTENCES, passages, terms
from tools import TOOLS, picture_of

APPLICATION_ID = 0x4D4D5331  # in the file's header: tells an index from other SQLite files
INDEX_VERSION = 4  # rises when the tables, `embed_image` or `terms` change
MAX_QUERY_TERMS = 64  # different terms of a query that count; a model may well say ten thousand
LARGE_INDEX = 100_000  # documents from which on terms that a tenth of them hold are left out of queries
FUSED = 100  # best documents by words and by embedding, of each, whose ranks are fused
RANK_OFFSET = 60  # of reciprocal rank fusion: how little the first ranks stand out
BATCH, READ = 32, 10_000  # documents that are embedded at once; characters of each: more than are encoded

# A build that fails is thrown away whole: it needs no journal. FTS5 gets terms in a row: to its tokenizer `ascii`, all
# that is not ASCII is a letter.
SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {INDEX_VERSION};
PRAGMA journal_mode = OFF;
CREATE TABLE docs(title TEXT, url TEXT, id TEXT, content TEXT, sha256 TEXT);
CREATE TABLE images(title TEXT, url TEXT, id TEXT, content BLOB, sha256 TEXT, embedding BLOB);
CREATE TABLE vectors(embedding BLOB);  -- of the documents, by rowid; float16, those of images float32
CREATE VIRTUAL TABLE words USING fts5(title, text, content = '', tokenize = 'ascii');
CREATE TABLE settings(name TEXT PRIMARY KEY, value TEXT);
"""


def sha256(values: Iterable) -> str:
    """The hash of texts, numbers and bytes in a row."""
    digest = hashlib.sha256()
    for n, value in enumerate(values):
        data = value if isinstance(value, bytes) else str(value).encode()
        digest.update(b"\0" + data if n else data)
    return digest.hexdigest()


class SQLiteFile:
    """A SQLite file that any number of threads may use at once. Raises InputError if `path` is not one of ours."""

    what, build, application, version = "", "", 0, 0

    def __init__(self, path: str | Path, options: str = "mode=ro"):
        self.path, self._options = Path(path), options
        self._idle: deque[sqlite3.Connection] = deque()  # each use borrows one: no two threads share a connection
        self._closed = False
        need(self.path.is_file(), f"{path}: no such {self.what}; {self.build}")
        application, version = file_header(self.path)
        need(application == self.application, f"{path}: not a {self.what}; {self.build}")
        other = f"a {self.what} in version {version} of the format, expected version {self.version}"
        need(version == self.version, f"{path}: {other}: make it again; {self.build}")

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

    def verify(self) -> Iterator[str]:
        """What is wrong with the file, a line each; nothing if every hash is right."""
        with self._connection() as db:
            yield from (line for (line,) in db.execute("PRAGMA integrity_check") if line != "ok")
            yield from self._wrong_hashes(db)

    def close(self):
        """Close the file. No use of it may be under way; later ones raise ValueError."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class SearchDB(SQLiteFile):
    """An index, open for reading."""

    what, build = "search index", "`python -m search index` builds one"
    application, version = APPLICATION_ID, INDEX_VERSION

    def __init__(self, path: str | Path):
        super().__init__(path)
        kinds = sqlite3.DatabaseError, TypeError  # the second: of a number where bytes should be
        with refusing(f"{path}: damaged search index, build it again", *kinds), self._connection() as db:
            self._settings = dict(db.execute("SELECT name, value FROM settings"))
            self._images, self._vectors = _load_embeddings(db, "images"), _load_embeddings(db, "vectors")
            digest = _head_sum(self._settings, self._images, self._vectors)
            need(self._settings.get("sha256") == digest, "a wrong hash")
        self.embedding, self.text_embedding = self._settings["image_embedding"], self._settings["text_embedding"]
        self._common = frozenset(self._settings["common_terms"].split())
        self._embed = load_encoder(self.embedding) if self.embedding and len(self._images[0]) else embed_image
        self._embed_texts = None
        if len(self._vectors[0]):
            self._embed_texts, probe = load_text_encoder(self.text_embedding)
            built = np.frombuffer(self._settings["text_probe"], np.float32)
            same = len(probe) == len(built) and probe @ built > 0.999  # a GPU and a CPU differ by less
            need(same, f"text_embedding {self.text_embedding!r}: not the model that {self.path} was built with")

    def text(self, query: str, k: int) -> list[Hit]:
        """The k best documents that hold any of the query's terms, best first (equals: in the order they were indexed).
        Any string is a valid query: there are no operators, and no terms find nothing. Of the different terms, the
        first MAX_QUERY_TERMS count, in a large index without common ones if there are others. In an index with
        embeddings of the documents, those with embeddings close to the query's count as much. Raises
        sqlite3.DatabaseError if the file cannot be read or is damaged."""
        query = HALF.sub("\ufffd", query)
        wanted = dict.fromkeys(terms(query))
        wanted = [term for term in wanted if term not in self._common] or list(wanted)
        if not wanted:
            return []
        match = " OR ".join(f'"{term}"' for term in wanted[:MAX_QUERY_TERMS])  # terms are letters and digits alone
        sql = "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid LIMIT ?"
        depth = max(k, FUSED) if self._embed_texts else k
        with self._connection() as db:
            best = [rowid for (rowid,) in db.execute(sql, (match, depth))]
            if self._embed_texts:
                close = _nearest(*self._vectors, self._embed_texts([query])[0], depth)
                best = _fused(best, close)[:k]
            return [_hit(db, "docs", rowid) for rowid in best]

    def page(self, url: str) -> list[Hit]:
        """The documents with this url, as indexed: the parts of a page. Raises sqlite3.DatabaseError as `text` does."""
        if HALF.search(url):
            return []  # SQLite takes none, and no document has one
        with self._connection() as db:
            found = db.execute("SELECT rowid FROM docs WHERE url = ? ORDER BY rowid", (url,)).fetchall()
            return [_hit(db, "docs", rowid) for (rowid,) in found]

    def image(self, data: bytes, k: int) -> list[Hit]:
        """The k pictures that look most like the encoded picture `data`, with thumbnails, best first (equals: in the
        order they were indexed). Raises InputError if `data` is not a picture, sqlite3.DatabaseError as `text` does."""
        query = self._embed(decode_image(data))
        rowids, embeddings = self._images
        if not len(rowids):
            return []
        fits = len(query) == embeddings.shape[1]
        need(fits, f"image_embedding {self.embedding!r}: not the model that {self.path} was built with")
        with self._connection() as db:
            return [_hit(db, "images", rowid) for rowid in _nearest(rowids, embeddings, query, k)]

    def thumbnails(self, pages: set[tuple[str, str]]) -> Iterator[bytes]:
        """The thumbnails of all pictures with one of these (title, url). Raises sqlite3.DatabaseError like `text`."""
        with self._connection() as db:
            rows = [row for row, *page in db.execute("SELECT rowid, title, url FROM images") if tuple(page) in pages]
            for row in rows:  # apart from the pages: most thumbnails need not be read
                yield _hit(db, "images", row).image

    def stats(self) -> dict[str, int]:
        """How much there is: docs, vectors (of documents), images, bytes (of the file)."""
        with self._connection() as db:
            ((docs,),) = db.execute("SELECT count(*) FROM docs")
        vectors, images = len(self._vectors[0]), len(self._images[0])
        return {"docs": docs, "vectors": vectors, "images": images, "bytes": self.path.stat().st_size}

    def _wrong_hashes(self, db):
        for table in ("docs", "images"):
            for rowid, *row, digest in db.execute(f"SELECT rowid, {COLUMNS} FROM {table}"):
                if _row_sum(row) != digest:
                    yield f"row {rowid} of {table} has another hash"
        if _words_sum(db) != self._settings["words"]:
            yield "the index of the words has another hash, or documents are missing"


COLUMNS = "title, url, id, content, sha256"  # of both tables: the row, and its hash


def _hit(db, table, rowid):
    row = db.execute(f"SELECT {COLUMNS} FROM {table} WHERE rowid = ?", (rowid,)).fetchone()
    if row is None or _row_sum(row[:4]) != row[4]:
        raise sqlite3.DatabaseError(f"row {rowid} of {table} is damaged; build the index again")
    title, url, _, content, _ = row
    return Hit(title, url, content) if table == "docs" else Hit(title, url, image=content)


def _row_sum(row):
    """The hash of a row and of its types (one bit tells text from bytes)."""
    return sha256(part for value in row for part in (type(value).__name__, value))


def _load_embeddings(db, table):
    """int64 [N], float32 [N, D]; filled row by row, so that nothing is held twice."""
    kind = np.dtype(np.float16 if table == "vectors" else np.float32)
    sql = f"SELECT count(*), max(length(embedding)), min(length(embedding)) FROM {table}"
    ((count, size, least),) = db.execute(sql)
    need(size == least, "embeddings of different lengths")
    rowids, embeddings = np.empty(count, np.int64), np.empty((count, (size or 0) // kind.itemsize), np.float32)
    for n, (rowid, blob) in enumerate(db.execute(f"SELECT rowid, embedding FROM {table} ORDER BY rowid")):
        rowids[n], embeddings[n] = rowid, np.frombuffer(blob, kind)
    return rowids, embeddings


def _nearest(rowids, embeddings, query, k):
    """The rowids of the k embeddings that are closest to the query's, best first; equals in their order."""
    # einsum adds up each row in the same order, so equal embeddings score equally; BLAS promises no such thing.
    scores = np.einsum("nd,d->n", embeddings, query)
    return rowids[np.argsort(-scores, kind="stable")[:k]].tolist()


def _fused(*rankings):
    """Rankings as one, by reciprocal rank fusion (Cormack, Clarke, Büttcher, SIGIR 2009); equals by rowid."""
    scores = Counter()
    for ranking in rankings:
        scores.update({rowid: 1 / (RANK_OFFSET + rank) for rank, rowid in enumerate(ranking, 1)})
    return sorted(scores, key=lambda rowid: (-scores[rowid], rowid))


def _head_sum(settings, images, vectors):
    """The hash of what is read when an index is opened."""
    names = ("image_embedding", "text_embedding", "text_probe", "common_terms", "words")
    named = (settings.get(name) for name in names)
    loaded = (row.tobytes() for rowids, embeddings in (images, vectors) for row in (rowids, *embeddings))
    return sha256(chain(named, loaded))


def _words_sum(db):
    """The hash of FTS5's own tables, and of the number of documents."""
    counted = db.execute("SELECT count(*) FROM docs")
    tables = (db.execute(f"SELECT * FROM words_{name}") for name in ("config", "data", "docsize", "idx"))
    return sha256(value for rows in (counted, *tables) for row in rows for value in row)


def file_header(path: Path) -> tuple[int, int]:
    """(application id, version) in SQLite's file header; (0, 0) if there is no file, or another one."""
    header = b""
    if path.is_file():
        with open(path, "rb") as file:
            header = file.read(72)
    if not header.startswith(b"SQLite format 3\0"):
        return 0, 0
    return int.from_bytes(header[68:], "big"), int.from_bytes(header[60:64], "big")


def build(
    path: str | Path, docs=(), images=(), *, skip_bad_rows: bool = False, image_embedding="", text_embedding=""
) -> int:
    """Write an index to `path`, in place of an older one; returns how many bad rows were left out.

    docs: {title, text, url?, id?}; images: {image: encoded bytes or a path, title, url?, id?}; of each an iterable or a
    JSONL file, in whose folder paths start. Both are read once, row by row. image_embedding: a vision encoder of
    transformers, by name or folder (default: `embed_image`); text_embedding: a sentence encoder (default: none, words
    alone). `path` appears when all is written; a build that is killed leaves at most `path`.XXXXXXXX.tmp behind. Raises
    InputError naming row and field (skip_bad_rows leaves such rows out), or saying why it cannot write `path`.
    """
    path, folder = Path(path), Path(images).parent if isinstance(images, str | Path) else Path()
    sound = not path.exists() or file_header(path)[0] == APPLICATION_ID
    need(sound, f"{path}: exists and is not a search index; choose another name")
    need(path.parent.is_dir(), f"{path}: there is no folder {path.parent}")
    embedder = load_encoder(image_embedding, building=True) if image_embedding else embed_image
    models = {"image_embedding": image_embedding, "text_embedding": text_embedding}
    settings = {kind: str(Path(name).absolute()) if os.path.isdir(name) else name for kind, name in models.items()}
    encode, probe = load_text_encoder(text_embedding, building=True) if text_embedding else (None, np.empty(0))
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with closing(sqlite3.connect(temporary)) as db:
            db.executescript(SCHEMA)
            bad = _insert(docs, "docs", partial(_add_document, db), skip_bad_rows)
            bad += _insert(images, "images", partial(_add_image, db, folder, embedder), skip_bad_rows)
            if encode:
                _embed_documents(db, encode)
            db.execute("INSERT INTO words(words) VALUES ('optimize')")
            db.execute("CREATE INDEX docs_by_url ON docs(url)")
            db.commit()  # FTS5 has written all of its tables
            settings |= {"common_terms": _common_terms(db), "words": _words_sum(db), "text_probe": probe.tobytes()}
            loaded = _load_embeddings(db, "images"), _load_embeddings(db, "vectors")
            settings["sha256"] = _head_sum(settings, *loaded)
            db.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())
            db.commit()  # returns when the bytes are on the disk
        temporary.replace(path)
    except sqlite3.OperationalError as error:
        raise InputError(f"{path}: cannot write the index ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return bad


def _insert(source, name, add, skip_bad_rows):
    """Add rows: dictionaries, or the lines of a JSONL file that are not blank; returns how many were bad."""
    bad, in_file = 0, isinstance(source, str | Path)
    place = f"{source}, line" if in_file else f"{name} row"
    with open(source, "rb") if in_file else nullcontext(source) as rows:
        for number, row in enumerate(tqdm(rows, f"index {name}", unit=" rows", leave=False, disable=None), 1):
            if in_file and not row.strip():
                continue
            try:
                with refusing("not JSON"):
                    row = json.loads(row) if in_file else row
                need(isinstance(row, dict), "expected a JSON object")
                add(row)
            except InputError as error:
                need(skip_bad_rows, f"{place} {number}: {error}")
                bad += 1
    return bad


def _common_terms(db):
    """Terms of over a tenth of a large index: a query would rank all of these for seconds, and they weigh little."""
    ((count,),) = db.execute("SELECT count(*) FROM docs")
    if count < LARGE_INDEX:
        return ""
    db.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab(main, words, row)")
    return " ".join(term for (term,) in db.execute("SELECT term FROM temp.terms WHERE doc > ?", (count // 10,)))


def _add_document(db, row):
    title, text, url, id = _strings(row, "title", "text")
    indexed = [" ".join(terms(field, letters=True)) for field in (title, text)]
    values = (title, url, id, text)
    db.execute(f"INSERT INTO docs({COLUMNS}) VALUES (?, ?, ?, ?, ?)", (*values, _row_sum(values)))
    db.execute("INSERT INTO words(rowid, title, text) VALUES (last_insert_rowid(), ?, ?)", indexed)


def _add_image(db, folder, embedder, row):
    strings, data = _strings(row, "title"), row.get("image")
    try:
        if isinstance(data, str | Path):
            need((folder / data).is_file(), f"cannot read {data!r}: no such file")
            data = (folder / data).read_bytes()
        need(isinstance(data, bytes), "expected the path of a picture")
        image = decode_image(data)
    except (OSError, InputError) as error:
        raise InputError(f"field image: {error}") from None
    format = "PNG" if max(image.size) <= LOSSLESS_SIDE else "JPEG"
    values = (*strings, thumbnail(image, format))
    embedding = embedder(image).astype(np.float32).tobytes()
    sql = f"INSERT INTO images({COLUMNS}, embedding) VALUES (?, ?, ?, ?, ?, ?)"
    db.execute(sql, (*values, _row_sum(values), embedding))


def _embed_documents(db, encode):
    """The vectors of all documents; of many in a row those of like lengths together, which need little padding."""
    ((count,),) = db.execute("SELECT count(*) FROM docs")
    documents = db.execute(f"SELECT rowid, substr(title || char(10) || content, 1, {READ}) FROM docs ORDER BY rowid")
    with tqdm(total=count, desc="index vectors", unit=" rows", leave=False, disable=None) as progress:
        while rows := documents.fetchmany(32 * BATCH):
            rows.sort(key=lambda row: len(row[1]))
            for at in range(0, len(rows), BATCH):
                rowids, texts = zip(*rows[at : at + BATCH], strict=True)
                vectors = (vector.astype(np.float16).tobytes() for vector in encode(list(texts)))
                db.executemany("INSERT INTO vectors(rowid, embedding) VALUES (?, ?)", zip(rowids, vectors, strict=True))
                progress.update(len(rowids))


def _strings(row, *required):
    """The row's required fields, url and id."""
    given = {"url": "", "id": ""} | {name: value for name, value in row.items() if value is not None}
    values = [*map(given.get, required), given["url"], str(given["id"])]
    for field, value in zip((*required, "url", "id"), values, strict=True):
        need(isinstance(value, str), f"field {field}: expected a string, not {repr(value)[:40]}")
        need(not HALF.search(value), f"field {field}: not valid Unicode")
    return values


class OfflineSearch:
    """Searches in a local index. `search` may be called from any number of threads."""

    def __init__(self, db: SearchDB, results: dict[str, int] | None = None):
        """results: tool -> hits of a call, at most (None: the tools' own numbers)."""
        self.db = db
        self._image, self._text = map(lru_cache(256), (db.image, db.text))  # a question's samples ask alike,
        self._pending: dict[tuple, Future] = {}  # and most of them at once
        self.results = results or {name: tool.results for name, tool in TOOLS.items()}

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call. What one has to expect to fail (the file, the picture) gives status "error"."""
        try:
            hits = method_for(call, question, self)(call, question)
        except (Failure, InputError, sqlite3.DatabaseError) as error:
            return failed(error)
        return Result("ok", hits=tuple(hits)) if hits else Result("no_results")

    def for_image_search(self, call, question):
        asked = picture_of(call, question), self.results[call.tool]
        return shared(self._pending, asked, lambda: self._image(*asked))[0]

    def for_text_search(self, call, question):
        asked = call.query, self.results[call.tool]
        return shared(self._pending, asked, lambda: self._text(*asked))[0]

    def for_visit(self, call, question):
        parts = self.db.page(call.url.strip())
        text = passages("\n".join(part.text for part in parts), call.query, PAGE_SENTENCES)
        return [replace(part, text=text) for part in parts[:1]]
