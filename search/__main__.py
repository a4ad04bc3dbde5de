"""python -m search COMMAND: build and ask an index, look after recorded results, serve a search to other machines.

    index --docs DOCS.jsonl --images IMAGES.jsonl --out INDEX    build an index; either input may be left out
    ask INDEX --text WORDS | --image FILE [--count N]            show what a search in it returns
    ask INDEX --url URL [--text GOAL]                            show what a visit of a page in it returns
    stats FILE                                                   what an index or a cache holds: counts, ages, sizes
    verify FILE                                                  check every hash of an index, a cache or a snapshot
    export CACHE --out SNAPSHOT.parquet                          write a cache as a parquet file, to publish
    import SNAPSHOT.parquet --out CACHE                          add an exported file to a cache
    import-fvqa FILE --out CACHE [--live]                        add FVQA's image-search cache, a pickle or JSON
    serve --address HOST:PORT [options of train.py]              answer the searches of other machines
    images --files QUESTIONS.parquet --out DIR                   write questions' pictures, to be served for live search

`python -m search COMMAND --help` lists a command's options.
"""

import sqlite3
import sys
from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import Config, InputError, Options, as_dict, need, option, parse, run_main
from data import Call, Question, decode_image, first_line, load_questions
from search import ASKS_WEB, open_search
from search.cache import CACHE_ID, SearchCache, export, snapshot_rows
from search.fvqa import fetching_client, import_fvqa
from search.index import OfflineSearch, SearchDB, build, file_header
from search.live import picture_name
from search.service import SearchServer


@dataclass(frozen=True)
class FileOptions(Options):
    """What is read."""

    file: str = option("", "the file; COMMAND FILE is short for COMMAND --file FILE")


@dataclass(frozen=True)
class CopyOptions(FileOptions):
    """What is read, and what is written."""

    out: str = option("", "the file that is written")


def stats(options):
    path = Path(options.file)
    if file_header(path)[0] != CACHE_ID:
        with closing(SearchDB(path)) as db:
            count = db.stats()
            vectors = f" with vectors of {db.text_embedding}" if count["vectors"] else ""
        size = f"{count['images']:,} images, {count['bytes'] / 1e6:.1f} MB"
        return print(f"{path}: {count['docs']:,} documents{vectors}, {size}")
    with closing(SearchCache(path)) as cache:
        s = cache.stats()
    counts = ", ".join(f"{n:,} {name}" for name, n in s["counts"].items()) or "empty"
    print(
        f"{path}: {s['results']:,} results ({counts}), {s['oldest']} to {s['newest']}; found again {s['found']:,} "
        f"times (hit rate {s['hit_rate']:.0%}); {s['images']:,} images, {s['image_bytes'] / 1e6:.1f} MB; "
        f"file {s['bytes'] / 1e6:.1f} MB"
    )


def verify(options):
    path, problems = Path(options.file), 0
    if file_header(path) == (0, 0):
        deque(snapshot_rows(path), maxlen=0)  # which checks them
    else:
        kind = SearchCache if file_header(path)[0] == CACHE_ID else SearchDB
        with closing(kind(path)) as store:
            for line in store.verify():
                print(line)
                problems += 1
    need(not problems, f"{path}: {problems:,} problems")
    print(f"{path}: every hash is right")


@contextmanager
def _filled(path):
    """A cache that an import fills; a new one in which nothing was kept is taken away again."""
    new = not Path(path).exists()
    with closing(SearchCache(path, write=True)) as cache:
        try:
            yield cache
        except BaseException:
            if new and not cache.stats()["results"]:
                cache.close()  # SQLite takes the files beside it away
                cache.path.unlink()
            raise


def export_cache(options):
    with closing(SearchCache(options.file)) as cache:
        print(f"{options.out}: {export(cache, options.out):,} results")


def import_cache(options):
    with _filled(options.out) as cache:
        print(f"{options.out}: {cache.put_all(snapshot_rows(options.file)):,} results read from {options.file}")


@dataclass(frozen=True)
class FVQAOptions(CopyOptions):
    """What is read, and what is written."""

    live: bool = option(False, "fetch pictures that are given as URLs")


def import_fvqa_cache(options):
    with _filled(options.out) as cache:
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
    text_embedding: str = option("", "sentence encoder of transformers, by name or folder (none: words alone)")


def index(options):
    need(options.docs or options.images, "give --docs, --images or both")
    how = as_dict(options)
    out, docs, images = (how.pop(name) for name in ("out", "docs", "images"))
    if bad := build(out, docs or (), images or (), **how):
        print(f"left out {bad:,} bad rows")
    stats(FileOptions(options.out))


@dataclass(frozen=True)
class AskOptions(FileOptions):
    """What is asked of an index."""

    text: str = option("", "search with these words; with --url: what the page is read for")
    image: str = option("", "search with the picture in this file")
    url: str = option("", "read the page with this URL")
    count: int = option(5, "results, at most", "above 0")


def ask(options):
    asked = bool(options.text or options.url) != bool(options.image)
    need(asked, "give --text WORDS, --image FILE, or --url URL [--text GOAL]")
    tool = "visit" if options.url else "image_search" if options.image else "text_search"
    image = Path(options.image).read_bytes() if options.image else None
    call = Call(tool, options.text, url=options.url, image=image)
    with closing(SearchDB(options.file)) as db:
        result = OfflineSearch(db, {call.tool: options.count}).search(call, Question("asked", ""))
    need(result.status != "error", result.error)
    for rank, hit in enumerate(result.hits, 1):
        shown = hit.text if options.url else hit.text.strip().partition("\n")[0][:200]
        if hit.image is not None:
            shown = "thumbnail of {} x {} pixels".format(*decode_image(hit.image).size)
        print(f"{rank}. {hit.title}\n   {hit.url or '(no URL)'}\n   {shown}")
    if not result.hits:
        print("nothing found")


@dataclass(frozen=True)
class ServeOptions(Options):
    """Where the service listens. What it searches is said by the options of a run, below."""

    address: str = option("127.0.0.1:8100", "HOST:PORT; there is no password: private networks only")


def serve(options, cfg):
    need("://" not in cfg.search, "a service cannot ask another one: its --search must not be a URL")
    with SearchServer(options.address, open_search(cfg, cfg.search_index)) as server:
        budget = f", at most {cfg.search_budget:,} live searches" if cfg.search_budget else ""
        print(f"serving search ({cfg.search}{budget}) on http://{options.address}; Ctrl-C ends it", flush=True)
        if cfg.search in ASKS_WEB and not cfg.image_host:
            print("image search only for questions with an image URL: no --image_host")
        server.serve_forever()


@dataclass(frozen=True)
class ImagesOptions(Options):
    """Whose pictures are written, and where."""

    files: tuple[str, ...] = option((), "question files")
    out: str = option("", "folder that is written")
    skip_bad_rows: bool = option(False, "leave bad rows out and count them")


def images(options):
    out = Path(options.out)
    questions = load_questions(options.files, skip_bad_rows=options.skip_bad_rows, match="em_unicode")  # any answers
    out.mkdir(parents=True, exist_ok=True)
    first = [question.images[0] for question in questions if question.images]
    named = {picture_name(image): image for image in tqdm(first, desc="images", disable=None)}
    for name, image in named.items():
        (out / name).write_bytes(image)
    print(f"{len(named)} pictures in {out}; serve it and give its URL as --image_host")


COMMANDS = {
    "index": (index, IndexOptions),
    "ask": (ask, AskOptions),
    "stats": (stats, FileOptions),
    "verify": (verify, FileOptions),
    "export": (export_cache, CopyOptions),
    "import": (import_cache, CopyOptions),
    "import-fvqa": (import_fvqa_cache, FVQAOptions),
    "serve": (serve, ServeOptions, Config),
    "images": (images, ImagesOptions),
}


def main(argv: list[str] | None = None) -> None:
    """Run a command (argv: without the program's name). Raises InputError."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        return print(__doc__)
    need(name in COMMANDS, f"{name!r} is no command; choose one of {', '.join(COMMANDS)}")
    run, kind, *more = COMMANDS[name]
    if issubclass(kind, FileOptions) and rest and not rest[0].startswith("-"):
        rest = ["--file", *rest]
    options = parse(rest, kind, *more)
    for field, shown in (("file", "FILE after the command"), ("files", "--files"), ("out", "--out")):
        need(more or getattr(options, field, True), f"give {shown}")
    for field in ("file", "docs", "images", "image", "out") if kind is not ImagesOptions else ():  # which has a folder
        path = Path(getattr(options, field, ""))
        if path.name and not path.is_file():
            need(not path.exists(), f"{path}: not a file")  # a device may have no end
            need(field not in ("docs", "images"), f"{path}: no such file")
    try:
        run(*options) if more else run(options)
    except sqlite3.DatabaseError as error:
        raise InputError(f"search {name}: a file cannot be read or written ({first_line(error)})") from None


if __name__ == "__main__":
    run_main(main)
