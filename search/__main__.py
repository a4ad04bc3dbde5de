"""search/__main__.py"""

import argparse
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from config import InputError
from data import load_questions
from search import open_search
from search.cache import CACHE_ID, SearchCache, export, import_parquet
from search.fvqa import import_fvqa
from search.index import SearchDB, _build, _header
from search.live import picture_name
from search.service import SearchServer
from search.web import Client


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


def _serve(cfg):
    if cfg.search_url:
        raise InputError("a service cannot ask another one: leave out --search_url")
    search = open_search(cfg, cfg.search_index)
    with SearchServer(cfg.serve_address, search) as server:
        budget = f", at most {cfg.search_budget:,} live searches" if cfg.search_budget else ""
        print(f"serving search ({cfg.search}{budget}) on http://{cfg.serve_address}; Ctrl-C ends it", flush=True)
        if cfg.searches_web and not (cfg.image_base_url or cfg.image_upload):
            print("image search only for questions with an image URL: no --image_base_url, no --image_upload")
        server.serve_forever()


def _write_images(cfg):
    if not cfg.files or not cfg.out:
        raise InputError("give --files (parquet) and --out (a folder)")
    out, written = Path(cfg.out), set()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for q in tqdm(load_questions(cfg.files, skip_bad_rows=cfg.skip_bad_rows), desc="images", disable=None):
            for image in q.images[:1]:
                name = picture_name(image)
                (out / name).write_bytes(image)
                written.add(name)
    except OSError as error:
        raise InputError(f"{out}: cannot write ({error.strerror})") from None
    print(f"{len(written)} pictures in {out}; serve it and give its URL as --image_base_url")
