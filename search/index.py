"""The offline search: an SQLite file of documents, found by BM25, and of pictures, found by what they look like.

A document is {"title", "text", "url"?, "id"?}, a picture {"image", "title", "url"?, "id"?}. Text search is SQLite's
FTS5 over title and text; image search compares embeddings (search/embedding.py). An index is built once and only read
from then on; any number of threads and processes may.

Legend: N pictures of an index, D numbers of an embedding.
"""

import json
import re
import secrets
import sqlite3
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import InputError, need
from data import Call, Hit, Question, Result, decode_image
from search.calls import Failure, failed, method_for
from search.embedding import LOSSLESS_SIDE, Encoder, embed_image, thumbnail
from tools import TOOLS, picture_of

APPLICATION_ID = 0x4D4D5331  # in the file's header: tells an index from other SQLite files
INDEX_VERSION = 2  # rises when the tables or `embed` change; version 1, which had no table `settings`, is read, too
MAX_QUERY_WORDS = 64  # different words of a query that count; a model may well say ten thousand
LARGE_INDEX = 100_000  # documents from which on words that a tenth of them hold are left out of queries


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


class SQLiteFile:
    """A SQLite file that any number of threads may use at once. Raises InputError if `path` is not one of ours."""

    what, build, application, versions = "", "", 0, ()

    def __init__(self, path: str | Path, options: str = "mode=ro"):
        self.path, self._options = Path(path), options
        self._idle: deque[sqlite3.Connection] = deque()  # each use borrows one: no two threads share a connection
        self._closed = False
        need(self.path.is_file(), f"{path}: no such {self.what}; {self.build}")
        application, self.version = file_header(self.path)
        if application != self.application or self.version not in self.versions:
            version = f"in version {self.version} of the format"
            said = f"a {self.what} {version}" if application == self.application else f"not a {self.what}"
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


class SearchDB(SQLiteFile):
    """An index, open for reading."""

    what, build = "search index", "`python -m search index` builds one"
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
        self._embed = Encoder(self.embedding) if self.embedding and len(self._rowids) else embed_image

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


def file_header(path):
    """(application id, version) in SQLite's file header; (None, 0) of another file."""
    try:
        with open(path, "rb") as file:
            header = file.read(72)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    if len(header) < 72 or not header.startswith(b"SQLite format 3\0"):
        return None, 0
    return int.from_bytes(header[68:], "big"), int.from_bytes(header[60:64], "big")


def build(path: str | Path, docs=(), images=(), *, skip_bad_rows: bool = False, image_embedding: str = "") -> int:
    """Write an index to `path`, in place of an older one; returns how many bad rows were left out.

    image_embedding: a vision encoder of transformers, by name or folder (default: of the pixels, see `embed`).

    docs: {title, text, url?, id?}; images: {image: encoded bytes or a path, title, url?, id?}; both are read once, row
    by row. `path` appears when all is written; a build that is killed leaves at most `path`.XXXXXXXX.tmp behind. Raises
    InputError naming row and field (skip_bad_rows leaves such rows out), or saying why it cannot write `path`.
    """
    docs = ((f"docs row {n}", row) for n, row in enumerate(docs, 1))
    images = ((f"images row {n}", row) for n, row in enumerate(images, 1))
    return build_from(Path(path), docs, images, Path(), skip_bad_rows, image_embedding)


def build_from(path: Path, docs, images, folder: Path, skip_bad_rows: bool, image_embedding: str) -> int:
    """As `build`; rows come as (where, dict or a line of JSON), paths start at `folder`."""
    if path.is_dir() or (path.exists() and file_header(path)[0] != APPLICATION_ID):
        raise InputError(f"{path}: exists and is not a search index; choose another name")
    need(path.parent.is_dir(), f"{path}: there is no folder {path.parent}")
    embedder = embed_image
    if image_embedding:
        embedder = Encoder(image_embedding, building=True)
        if Path(image_embedding).is_dir():
            image_embedding = str(Path(image_embedding).absolute())  # found from anywhere
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with closing(sqlite3.connect(temporary)) as db:
            db.executescript(SCHEMA)
            columns = "docs(title, text, url, id)"
            bad = _insert(db, columns, lambda row: _strings(row, "title", "text"), docs, skip_bad_rows)
            columns = "images(title, url, id, thumbnail, embedding)"
            bad += _insert(db, columns, lambda row: _image_values(row, folder, embedder), images, skip_bad_rows)
            db.execute("INSERT INTO settings VALUES ('image_embedding', ?)", (image_embedding,))
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
    for where, row in tqdm(rows, f"index {columns.split('(')[0]}", unit=" rows", leave=False, disable=None):
        try:
            db.execute(sql, values(_as_dict(row)))
        except InputError as error:
            if not skip_bad_rows:
                raise InputError(f"{where}: {error}") from None
            bad += 1
    return bad


def _common_words(db):
    """Words that over a tenth of the documents of a large index hold: every query with one would rank them all, for
    seconds, and their weight in BM25 is small."""
    ((count,),) = db.execute("SELECT count(*) FROM docs")
    if count < LARGE_INDEX:
        return ""
    db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, docs, row)")
    return " ".join(word for (word,) in db.execute("SELECT term FROM temp.words WHERE doc > ?", (count // 10,)))


def _image_values(row, folder, embedder):
    strings, data = _strings(row, "title"), row.get("image")
    if isinstance(data, str | Path):
        try:
            data = (folder / data).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"field image: cannot read {row['image']!r} ({error})") from None
    need(isinstance(data, bytes), "field image: expected the path of a picture")
    try:
        image = decode_image(data)
    except InputError as error:
        raise InputError(f"field image: {error}") from None
    format = "PNG" if max(image.size) <= LOSSLESS_SIDE else "JPEG"
    return *strings, thumbnail(image, format), embedder(image).astype(np.float32).tobytes()


def _as_dict(row):
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from None
    need(isinstance(row, dict), "expected a JSON object")
    return row


def _strings(row, *required):
    """The row's required fields, url and id."""
    values = []
    for field in (*required, "url", "id"):
        value = row.get(field)
        if field not in required:
            value = "" if value is None else str(value) if field == "id" else value
        if not isinstance(value, str):
            raise InputError(f"field {field}: expected a string, not {repr(value)[:40]}")
        if re.search("[\ud800-\udfff]", value):  # JSON can spell half a character
            raise InputError(f"field {field}: not valid Unicode")
        values.append(value)
    return values


class OfflineSearch:
    """Searches in a local index. `search` may be called from any number of threads."""

    def __init__(self, db: SearchDB, results: dict[str, int] | None = None):
        """results: tool -> hits of a call, at most (None: the tools' own numbers)."""
        self.db = db
        self.results = results or {name: tool.results for name, tool in TOOLS.items()}
        self.methods = {"image_search": self._image_search, "text_search": self._text_search}

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call. What one has to expect to fail (the file, the picture) gives status "error"."""
        try:
            hits = method_for(call, question, self.methods)(call, question)
        except sqlite3.ProgrammingError:  # ours, not the file's
            raise
        except Failure as failure:
            return failed(failure)
        except (InputError, sqlite3.DatabaseError) as error:
            kind = "bad_call" if isinstance(error, InputError) else "index"
            return Result("error", error=f"{type(error).__name__}: {error}", error_kind=kind)
        return Result("ok", hits=tuple(hits)) if hits else Result("no_results")

    def _image_search(self, call, question):
        return self.db.image(picture_of(call, question), self.results[call.tool])

    def _text_search(self, call, question):
        return self.db.text(call.query, self.results[call.tool])
