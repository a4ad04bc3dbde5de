"""One SQLite file that answers searches offline: text by BM25, pictures by what they look like.

    python searchdb.py index --docs docs.jsonl --images images.jsonl --out search.sqlite
    python searchdb.py stats search.sqlite

Both inputs are JSON lines; either may be left out. A document is {"title", "text", "url"?, "id"?}, a picture
{"image", "title", "url"?, "id"?}, where image is a path that starts at the folder of the JSONL file.

A text search ranks by SQLite's FTS5 (BM25 over title and text). An image search compares a handmade embedding of the
pixels (`embed`) with all the others: no model to download, good at finding the same thing pictured again, blind to
meaning. To use another embedding, change `embed` and raise INDEX_VERSION.

Legend: N pictures of an index, D numbers of an embedding.
"""

import argparse
import io
import json
import re
import secrets
import sqlite3
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import InputError, run_main
from data import Hit, decode_image

APPLICATION_ID = 0x4D4D5331  # in the file's header: tells an index from other SQLite files
INDEX_VERSION = 1  # rises when the tables or `embed` change
MAX_QUERY_WORDS = 64  # different words of a query that count; a model may well say ten thousand
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
"""


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


def _thumbnail(image: Image.Image) -> bytes:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(buffer, "PNG" if max(small.size) <= LOSSLESS_SIDE else "JPEG", quality=90)  # PNG knows no quality
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ search


class SearchDB:
    """An index, open for reading; any number of threads may search at once. Raises InputError if `path` holds none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._idle: deque[sqlite3.Connection] = deque()  # each search borrows one: no two threads share a connection
        self._closed = False
        if not self.path.is_file():
            raise InputError(f"{path}: no such search index; `python searchdb.py index` builds one")
        version = _index_version(self.path)
        if version != INDEX_VERSION:
            what = "not a search index" if version is None else f"a search index in version {version} of the format"
            raise InputError(f"{path}: {what}, expected version {INDEX_VERSION}; `python searchdb.py index` builds one")
        try:
            self._rowids, self._embeddings = self._load_embeddings()
        except (sqlite3.DatabaseError, ValueError) as error:  # ValueError: an embedding of another length
            self.close()
            raise InputError(f"{path}: damaged search index ({error}); build it again") from None

    def _load_embeddings(self):
        """int64 [N], float32 [N, D]; filled row by row, so that nothing is held twice."""
        with self._connection() as db:
            ((count, size),) = db.execute("SELECT count(*), max(length(embedding)) FROM images")
            rowids, embeddings = np.empty(count, np.int64), np.empty((count, (size or 0) // 4), np.float32)
            for n, (rowid, blob) in enumerate(db.execute("SELECT rowid, embedding FROM images ORDER BY rowid")):
                rowids[n], embeddings[n] = rowid, np.frombuffer(blob, np.float32)
        return rowids, embeddings

    @contextmanager
    def _connection(self):
        if self._closed:
            raise ValueError(f"{self.path}: this SearchDB is closed")
        try:
            db = self._idle.pop()
        except IndexError:
            # Python ties a connection to the thread that opened it; ours only pass from one thread to the next.
            db = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        try:
            yield db
        finally:
            self._idle.append(db)

    def text(self, query: str, k: int) -> list[Hit]:
        """The k best documents that hold any of the query's words, best first (equals: in the order they were indexed).

        Any string is a valid query: operators and quotes mean nothing, no words find nothing, words after the first
        MAX_QUERY_WORDS different ones are left out. Raises sqlite3.DatabaseError if the file cannot be read.
        """
        match = _match_expression(query)
        if not match:
            return []
        sql = "SELECT title, url, text FROM docs WHERE docs MATCH ? ORDER BY bm25(docs), rowid LIMIT ?"
        with self._connection() as db:
            return [Hit(title, url=url, text=text) for title, url, text in db.execute(sql, (match, k))]

    def image(self, data: bytes, k: int) -> list[Hit]:
        """The k pictures that look most like the encoded picture `data`, with thumbnails, best first (equals: in the
        order they were indexed). Raises InputError if `data` is not a picture, sqlite3.DatabaseError as `text` does."""
        query = embed(data)
        if not len(self._rowids):
            return []
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

    def close(self):
        """Close the file. No search may be under way; later ones raise ValueError."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


def _match_expression(query: str) -> str:
    """The query's words, quoted and OR-ed. Only letters and digits get through, so nothing in it is FTS5 syntax."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", query).lower())
    return " OR ".join(f'"{word}"' for word in list(dict.fromkeys(words))[:MAX_QUERY_WORDS])


def _index_version(path):
    """The version of the index at `path`, read from SQLite's file header; None if it is something else."""
    try:
        with open(path, "rb") as file:
            header = file.read(72)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    ours = header.startswith(b"SQLite format 3\0") and header[68:] == APPLICATION_ID.to_bytes(4, "big")
    return int.from_bytes(header[60:64], "big") if ours else None


# ------------------------------------------------------------------------------------------------------- build


def build(path: str | Path, docs: Iterable[dict] = (), images: Iterable[dict] = (), *, skip_bad_rows=False) -> int:
    """Write an index to `path`, in place of an older one; returns how many bad rows were left out.

    docs: {title, text, url?, id?}; images: {image: encoded bytes or a path, title, url?, id?}; both are read once, row
    by row. `path` appears when all is written; a build that is killed leaves at most `path`.XXXXXXXX.tmp behind. Raises
    InputError naming row and field (skip_bad_rows leaves such rows out), or saying why it cannot write `path`.
    """
    docs = ((f"docs row {n}", row) for n, row in enumerate(docs, 1))
    images = ((f"images row {n}", row) for n, row in enumerate(images, 1))
    return _build(Path(path), docs, images, Path(), skip_bad_rows)


def _build(path, docs, images, folder, skip_bad_rows):
    """As `build`; rows come as (where, dict or a line of JSON), paths start at `folder`."""
    if path.is_dir() or (path.exists() and _index_version(path) is None):
        raise InputError(f"{path}: exists and is not a search index; choose another name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with closing(sqlite3.connect(temporary)) as db:
            db.executescript(SCHEMA)
            bad = _insert(db, "docs(title, text, url, id)", _doc_values, docs, skip_bad_rows)
            columns = "images(title, url, id, thumbnail, embedding)"
            bad += _insert(db, columns, lambda row: _image_values(row, folder), images, skip_bad_rows)
            db.execute("INSERT INTO docs(docs) VALUES ('optimize')")
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


def _image_values(row, folder):
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
    return *strings, _thumbnail(image), _embed(image).tobytes()


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


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> None:
    """The command line (argv: without the program's name). Raises InputError."""
    parser = _Parser(prog="searchdb.py", description="Build and inspect an offline search index.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="build an index from JSONL files", allow_abbrev=False)
    index.add_argument("--docs", type=Path, help="JSONL file of documents: title, text, url, id")
    index.add_argument("--images", type=Path, help="JSONL file of pictures: image (a path), title, url, id")
    index.add_argument("--out", type=Path, required=True, help="the index; an older one is replaced")
    index.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out and count them")
    stats = commands.add_parser("stats", help="say what an index holds", allow_abbrev=False)
    stats.add_argument("out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.command == "index":
        _index(args)
    with closing(SearchDB(args.out)) as db:
        count = db.stats()
    print(f"{args.out}: {count['docs']:,} documents, {count['images']:,} images, {count['bytes'] / 1e6:.1f} MB")


def _index(args):
    files = [file for file in (args.docs, args.images) if file]
    if not files:
        raise InputError("give --docs, --images or both")
    for file in files:
        if not file.is_file():  # before the work, not after half of it
            raise InputError(f"{file}: no such file")
    folder = args.images.parent if args.images else Path()
    bad = _build(args.out, _json_lines(args.docs), _json_lines(args.images), folder, args.skip_bad_rows)
    if bad:
        print(f"left out {bad:,} bad rows")


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
