"""python -m search COMMAND: build and ask an index, look after recorded results, serve a search to other machines.

    index --docs DOCS.jsonl --images IMAGES.jsonl --out INDEX    build an index; either input may be left out
    ask INDEX --text WORDS | --image FILE [--count N]            show what a search in it returns
    stats FILE                                                   what an index or a cache holds: counts, ages, sizes
    verify CACHE                                                 check every hash of a cache
    export CACHE --out SNAPSHOT.parquet                          write a cache as a parquet file, to publish
    import SNAPSHOT.parquet --out CACHE                          add an exported file to a cache
    import-fvqa PICKLE --out CACHE [--live]                      add FVQA's image-search cache to a cache
    serve --address HOST:PORT [options of train.py]              answer the searches of other machines
    images --files QUESTIONS.parquet --out DIR                   write questions' pictures, to be served for live search

`python -m search COMMAND --help` lists a command's options.
"""

import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import Config, InputError, Options, option, parse, run_main
from data import Call, Hit, Question, decode_image, load_questions
from search import open_search
from search.cache import CACHE_ID, SearchCache, export, import_parquet
from search.fvqa import fetching_client, import_fvqa
from search.index import OfflineSearch, SearchDB, build_from, file_header
from search.live import picture_name
from search.service import SearchServer


@dataclass(frozen=True)
class FileOptions(Options):
    """What is read."""

    file: str = option("", "the file; its name alone may stand first: COMMAND FILE")

    def __post_init__(self):
        super().__post_init__()
        if not self.file:
            raise InputError("give the FILE after the command")


@dataclass(frozen=True)
class CopyOptions(FileOptions):
    """What is read, and what is written."""

    out: str = option("", "the file that is written")

    def __post_init__(self):
        super().__post_init__()
        if not self.out:
            raise InputError("give --out, the file that is written")


def stats(argv):
    path = parse(argv, FileOptions).file
    if Path(path).is_file() and file_header(path)[0] == CACHE_ID:
        with closing(SearchCache(path)) as cache:
            print(f"{path}: {_cache_line(cache.stats())}")
    else:
        print(_index_line(path))


def _cache_line(s):
    counts = ", ".join(f"{n:,} {name}" for name, n in s["counts"].items()) or "empty"
    oldest, newest = (time.strftime("%Y-%m-%d", time.gmtime(s[name])) for name in ("oldest", "newest"))
    return (
        f"{s['results']:,} results ({counts}), {oldest} to {newest}; found again {s['found']:,} "
        f"times (hit rate {s['hit_rate']:.0%}); {s['images']:,} images, {s['image_bytes'] / 1e6:.1f} MB; "
        f"file {s['bytes'] / 1e6:.1f} MB"
    )


def _index_line(path):
    with closing(SearchDB(path)) as db:
        count = db.stats()
    return f"{path}: {count['docs']:,} documents, {count['images']:,} images, {count['bytes'] / 1e6:.1f} MB"


def verify(argv):
    path = parse(argv, FileOptions).file
    problems = 0
    with closing(SearchCache(path)) as cache:
        for line in cache.verify():
            problems += 1
            print(line)
    if problems:
        raise InputError(f"{path}: {problems:,} problems")
    print(f"{path}: every hash is right")


def export_cache(argv):
    options = parse(argv, CopyOptions)
    with closing(SearchCache(options.file)) as cache:
        print(f"{options.out}: {export(cache, options.out):,} results")


def import_cache(argv):
    options = parse(argv, CopyOptions)
    with closing(SearchCache(options.out, write=True)) as cache:
        print(f"{options.out}: {import_parquet(options.file, cache):,} results read from {options.file}")


@dataclass(frozen=True)
class FVQAOptions(CopyOptions):
    """What is read, and what is written."""

    live: bool = option(False, "fetch pictures that are given as URLs")


def import_fvqa_cache(argv):
    options = parse(argv, FVQAOptions)
    with closing(SearchCache(options.out, write=True)) as cache:
        count, missing = import_fvqa(options.file, cache, fetching_client() if options.live else None)
    print(f"{options.out}: {count:,} entries read from {options.file}, {len(missing):,} pictures missing")
    if missing:
        listed = Path(f"{options.out}.missing.tsv")
        listed.write_text("".join(f"{id}\t{url}\n" for id, url in missing), errors="replace")
        hint = "" if options.live else "; --live fetches them"
        print(f"missing pictures (data_id, URL) are listed in {listed}{hint}")


@dataclass(frozen=True)
class IndexOptions(Options):
    """What an index is built from."""

    docs: str = option("", "JSONL file of documents: title, text, url, id")
    images: str = option("", "JSONL file of pictures: image (a path), title, url, id")
    out: str = option("", "the index; an older one is replaced")
    skip_bad_rows: bool = option(False, "leave bad rows out and count them")
    image_embedding: str = option("", "vision encoder of transformers, by name or folder (none: of the pixels)")


def index(argv):
    options = parse(argv, IndexOptions)
    files = [file for file in (options.docs, options.images) if file]
    if not files or not options.out:
        raise InputError("give --docs, --images or both, and --out")
    for file in files:
        if not Path(file).is_file():  # before the work, not after half of it
            raise InputError(f"{file}: no such file")
    folder = Path(options.images).parent
    docs, images = _json_lines(options.docs), _json_lines(options.images)
    bad = build_from(Path(options.out), docs, images, folder, options.skip_bad_rows, options.image_embedding)
    if bad:
        print(f"left out {bad:,} bad rows")
    print(_index_line(options.out))


def _json_lines(path) -> Iterator[tuple[str, bytes]]:
    """The file's lines that are not blank, as (where, line); none if there is no file."""
    if not path:
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line


@dataclass(frozen=True)
class AskOptions(FileOptions):
    """What is asked of an index."""

    text: str = option("", "search with these words")
    image: str = option("", "search with this picture")
    count: int = option(5, "results, at most", "above 0")


def ask(argv):
    options = parse(argv, AskOptions)
    if bool(options.text) == bool(options.image):
        raise InputError("give --text WORDS or --image FILE")
    picture = None
    if options.image:
        try:
            picture = Path(options.image).read_bytes()
        except OSError as error:
            raise InputError(f"{options.image}: cannot read it ({error.strerror})") from None
    call = Call("image_search", image=picture) if picture is not None else Call("text_search", options.text)
    with closing(SearchDB(options.file)) as db:
        result = OfflineSearch(db, {call.tool: options.count}).search(call, Question("asked", ""))
    if result.status == "error":
        raise InputError(result.error)
    for rank, hit in enumerate(result.hits, 1):
        print(f"{rank}. {hit.title}\n   {hit.url or '(no URL)'}\n   {_shown(hit)}")
    if not result.hits:
        print("nothing found")


def _shown(hit: Hit) -> str:
    """The first line of a hit's text, or the size of its thumbnail."""
    if hit.image is not None:
        width, height = decode_image(hit.image).size
        return f"thumbnail of {width} x {height} pixels"
    return hit.text.strip().partition("\n")[0][:200]


@dataclass(frozen=True)
class ServeOptions(Options):
    """Where the service listens. What it searches is said by the options of a run, below."""

    address: str = option("127.0.0.1:8100", "HOST:PORT; there is no password: private networks only")


def serve(argv):
    options, cfg = parse(argv, ServeOptions, Config)
    if cfg.search_url:
        raise InputError("a service cannot ask another one: leave out --search_url")
    search = open_search(cfg, cfg.search_index)
    with SearchServer(options.address, search) as server:
        budget = f", at most {cfg.search_budget:,} live searches" if cfg.search_budget else ""
        print(f"serving search ({cfg.search}{budget}) on http://{options.address}; Ctrl-C ends it", flush=True)
        if cfg.searches_web and not cfg.image_host:
            print("image search only for questions with an image URL: no --image_host")
        server.serve_forever()


@dataclass(frozen=True)
class ImagesOptions(Options):
    """Whose pictures are written, and where."""

    files: tuple[str, ...] = option((), "question files")
    out: str = option("", "folder that is written")
    skip_bad_rows: bool = option(False, "leave bad rows out and count them")


def images(argv):
    options = parse(argv, ImagesOptions)
    if not options.files or not options.out:
        raise InputError("give --files (question files) and --out (a folder)")
    out, written = Path(options.out), set()
    try:
        out.mkdir(parents=True, exist_ok=True)
        questions = load_questions(options.files, skip_bad_rows=options.skip_bad_rows)
        for question in tqdm(questions, desc="images", disable=None):
            for image in question.images[:1]:
                name = picture_name(image)
                (out / name).write_bytes(image)
                written.add(name)
    except OSError as error:
        raise InputError(f"{out}: cannot write ({error.strerror})") from None
    print(f"{len(written)} pictures in {out}; serve it and give its URL as --image_host")


COMMANDS = {
    "index": index, "ask": ask, "stats": stats, "verify": verify, "export": export_cache, "import": import_cache,
    "import-fvqa": import_fvqa_cache, "serve": serve, "images": images,
}  # fmt: skip
WITH_FILE = ("ask", "stats", "verify", "export", "import", "import-fvqa")  # COMMAND FILE means COMMAND --file FILE


def main(argv: list[str] | None = None) -> None:
    """Run a command (argv: without the program's name). Raises InputError."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        return print(__doc__)
    if name not in COMMANDS:
        raise InputError(f"{name!r} is no command; choose one of {', '.join(COMMANDS)}")
    if name in WITH_FILE and rest and not rest[0].startswith("-"):
        rest = ["--file", *rest]
    try:
        COMMANDS[name](rest)
    except sqlite3.DatabaseError as error:
        raise InputError(f"search {name}: a file cannot be read or written ({error})") from None


if __name__ == "__main__":
    run_main(main)
