"""The cache of results: content keys, checked hashes, threads, processes and a kill, parquet, FVQA's pickle."""

import collections
import contextlib
import copyreg
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, picture, question
from hammer import asked, hammered
from local_web import LocalWeb, wait_until
from PIL import Image, PngImagePlugin, TiffImagePlugin

from config import Config, InputError
from data import Call, Hit, Result
from search import __main__ as search_main
from search import embedding as search_embedding
from search import open_search
from search.cache import CachedSearch, SearchCache, canonical, snapshot_rows
from search.fvqa import fetching_client, import_fvqa
from search.index import SearchDB, build, sha256

JPEG = picture(1, format="JPEG")


def result(n=0, status="ok"):
    hits = (Hit(f"t{n}", f"https://x.example/{n}", "ä\x00\n東京", JPEG), Hit("no picture"))
    return (
        Result(status, hits)
        if status == "ok"
        else Result(status, error="why" * (status == "error"), error_kind="server" * (status == "error"))
    )


@pytest.fixture
def cache(tmp_path):
    with closing(SearchCache(tmp_path / "c.sqlite", write=True)) as cache:
        yield cache


def problems(path):
    with closing(SearchCache(path)) as cache:
        return list(cache.verify())


def test_what_is_put_is_got(cache):
    for n, status in enumerate(("ok", "no_results", "error")):
        assert cache.get(asked(n)) is None
        assert cache.put(asked(n), result(n, status)) == result(n, status) == cache.get(asked(n))
    assert cache.get({"query": "q0", "kind": "text"}) == result(0)  # the order of a request's parts means nothing
    with cache._connection() as db:
        assert db.execute("SELECT count(*) FROM images").fetchone() == (1,)  # equal pictures are kept once
    assert list(cache.verify()) == []


def test_the_first_answer_stays_unless_it_is_an_error(cache):
    assert cache.put(asked(0), result(0, "error")) == result(0, "error")
    assert cache.put(asked(0), result(1)) == result(1)
    assert cache.put(asked(0), result(2)) == result(1)
    assert cache.put(asked(0), result(2, "error")) == result(1)


def test_statistics(cache):
    assert cache.stats()["results"] == 0 and cache.stats()["hit_rate"] == 0
    for n in range(3):
        cache.put(asked(n, "image" if n else "text"), result(n))
    cache.put(asked(9), result(9, "error"))
    for _ in range(4):
        cache.get(asked(1, "image"), count=True)
    cache.get(asked(9), count=True)  # an error that is found is no help
    stats = cache.stats()
    assert stats["counts"] == {"image ok": 2, "text error": 1, "text ok": 1}
    assert (stats["found"], stats["hit_rate"], stats["images"], stats["image_bytes"]) == (4, 0.5, 1, len(JPEG))
    assert stats["oldest"] <= stats["newest"] <= time.strftime("%Y-%m-%d", time.gmtime())


def test_reading_changes_nothing_and_needs_no_writable_folder(tmp_path, cache):
    cache.put(asked(0), result())
    cache.close()
    before = (tmp_path / "c.sqlite").read_bytes()
    with closing(SearchCache(tmp_path / "c.sqlite")) as reader:
        assert reader.get(asked(0)) == result()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.put(asked(1), result())
    os.chmod(tmp_path, 0o500)
    try:
        with closing(SearchCache(tmp_path / "c.sqlite")) as reader:
            assert reader.get(asked(0)) == result()
    finally:
        os.chmod(tmp_path, 0o700)
    assert (tmp_path / "c.sqlite").read_bytes() == before


@pytest.mark.parametrize(
    "sql, found",
    [
        ("UPDATE images SET data = x'00'", "bytes have another hash"),
        ("UPDATE results SET status = CAST(status AS BLOB)", "content has another hash"),
        ("UPDATE results SET created = 'long ago', result = '{}'", "content has another hash"),
        ("UPDATE results SET result = replace(result, 't0', 't1')", "content has another hash"),
        ("UPDATE results SET status = 'no_results'", "content has another hash"),
        ("UPDATE results SET request = replace(request, 'q0', 'q1')", "request has another hash"),
        ("DELETE FROM images", "is missing"),
    ],
)
def test_what_was_changed_is_found_by_verify_and_by_reading(tmp_path, cache, sql, found):
    search = open_search(Config(search="replay", search_cache=str(cache.path)))
    call = Call("text_search", "q0")
    cache.put(search.request(call, question(0)), result())
    with cache._connection() as db:
        db.execute(sql)
    assert any(found in line for line in cache.verify())
    read = search.search(call, question(0))  # which does not read the request
    assert read == result() if "request" in found else read.error_kind == "index"
    with pytest.raises(InputError):
        search_main.main(["export", str(cache.path), "--out", str(tmp_path / "s.parquet")])
    search_main.main(["stats", str(cache.path)])


def test_a_recording_looks_again_where_nothing_was_found(cache):
    """Once in a process; and a failure does not take the place of what was kept, nor does nothing of something."""

    class Scripted:
        found, asked = [Result("no_results"), result(0, "error"), result(1), Result("no_results")], 0

        def search(self, call, question):
            self.asked += 1
            return self.found[self.asked - 1]

    def searched(inner):
        search = CachedSearch(cache, inner, Config(search="record", search_cache="c"))
        return search.search(Call("text_search", "q"), question(0))

    web = Scripted()
    once = CachedSearch(cache, web, Config(search="record", search_cache="c"))
    for _ in range(3):
        assert once.search(Call("text_search", "q"), question(0)) == Result("no_results")
    assert web.asked == 1 and searched(None) == Result("no_results")  # a replay
    assert searched(web) == Result("no_results") and web.asked == 2  # the second is an error
    assert searched(web) == result(1) == searched(None) == searched(web) and web.asked == 3


def test_damage_is_an_error_not_an_empty_result(cache):
    cache.put(asked(0), result())
    for sql in ("UPDATE results SET result = '{}'", "UPDATE results SET result = '['"):
        with cache._connection() as db:
            db.execute(sql)
        with pytest.raises(sqlite3.DatabaseError, match="damaged"):
            cache.get(asked(0))
        assert any("another hash" in line for line in cache.verify())


def test_any_flipped_bit_is_found_or_does_nothing(tmp_path, cache):
    """Of a cache, an index and a snapshot: what is read after it is what was there, or an error; no command fails
    with anything but a line; and where a read differs, `verify` says so."""
    kept = [(canonical(asked(n)), 1e9, result(n, ("ok", "no_results", "error")[n % 3])) for n in range(20)]
    cache.put_all(kept)
    cache.close()
    search_main.main(["export", str(cache.path), "--out", str(tmp_path / "s.parquet")])
    docs = [{"title": f"t{n}", "text": f"word{n % 5} 東京 {n}", "url": f"u{n}"} for n in range(30)]
    build(tmp_path / "i.sqlite", docs, [{"image": picture(n), "title": f"p{n}"} for n in range(3)])

    def read_cache(path):
        with closing(SearchCache(path)) as opened:
            return [opened.get(asked(n)) for n in range(20)]

    def read_index(path):
        with closing(SearchDB(path)) as opened:
            return [opened.text(query, 9) for query in ("word1", "東京", "7")], opened.image(picture(1), 3)

    def read_snapshot(path):
        return [row for row in snapshot_rows(path)]

    rng, changed = random.Random(0), collections.Counter()
    for name, read in (("c.sqlite", read_cache), ("i.sqlite", read_index), ("s.parquet", read_snapshot)):
        sound, expected = (tmp_path / name).read_bytes(), read(tmp_path / name)
        for _ in range(80):
            damaged = bytearray(sound)
            damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
            path = tmp_path / f"damaged-{name}"
            path.write_bytes(damaged)
            verified = True
            for command in ("verify", "stats"):
                try:
                    search_main.main([command, str(path)])
                except InputError as error:
                    verified &= command != "verify"
                    assert "\n" not in str(error)
            try:
                found = read(path)
            except (sqlite3.DatabaseError, InputError):
                continue
            if found != expected and name == "c.sqlite":  # what is lost is looked up again
                found = [a if b is None else b for a, b in zip(expected, found, strict=True)]
            changed[name] += found != expected and verified
            assert found == expected or name == "i.sqlite"  # FTS5's own tables are checked by `verify` alone
    assert not +changed


def test_two_processes_of_eight_threads_and_one_is_killed(tmp_path):
    path = tmp_path / "c.sqlite"
    command = [sys.executable, str(ROOT / "tests" / "hammer.py"), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    victim = subprocess.Popen([*command, "1", "100000"], env=environment)
    other = subprocess.Popen([*command, "2", "40"], env=environment)
    wal = path.with_name("c.sqlite-wal")
    assert wait_until(lambda: wal.exists() and wal.stat().st_size > 200_000, 60)  # both are in the middle of it
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL and other.wait(120) == 0
    assert problems(path) == []
    with closing(SearchCache(path, write=True)) as cache:
        kept = [n for n in range(200) if cache.get(asked(n))]
        assert len(kept) > 50 and all(cache.get(asked(n)) == hammered(n) for n in kept)
        cache.put(asked(1000), result())  # and it can be written on
    assert problems(path) == [] and not list(tmp_path.glob("*.tmp"))


def test_a_cache_that_many_make_at_once_is_made_once(tmp_path):
    start = threading.Barrier(8)

    def make(n):
        start.wait()
        with closing(SearchCache(tmp_path / "c.sqlite", write=True)) as cache:
            return cache.put(asked(n), result(n))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(8))) == [result(n) for n in range(8)]
    with closing(SearchCache(tmp_path / "c.sqlite")) as cache:
        assert cache.stats()["results"] == 8


# --- files, command line, parquet -----------------------------------------------------------------------------------


def command(*args):
    run = subprocess.run([sys.executable, "-m", "search", *map(str, args)], capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


def test_the_command_line_of_a_cache(tmp_path, cache):
    for n in range(3):
        cache.put(asked(n), result(n))
    path, parquet = tmp_path / "c.sqlite", tmp_path / "snapshot.parquet"
    code, out, err = command("verify", path)
    assert (code, err) == (0, "") and "every hash is right" in out
    with cache._connection() as db:
        db.execute("DELETE FROM images")
    code, out, err = command("verify", path)
    assert code == 2 and out.count("\n") == 3 and err == f"error: {path}: 3 problems\n"
    search_main.main(["stats", str(path)])
    with pytest.raises(InputError, match="is missing"):
        search_main.main(["export", str(path), "--out", str(parquet)])
    assert not list(tmp_path.glob("*.parquet*"))


def test_statistics_in_a_line(tmp_path, cache, capsys):
    cache.put(asked(0), result())
    cache.get(asked(0), count=True)
    search_main.main(["stats", str(tmp_path / "c.sqlite")])
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "1 results (1 text ok)" in line and "hit rate 50%" in line and "1 images" in line


def test_parquet_and_back(tmp_path, cache, capsys):
    kept = {n: result(n, ("ok", "no_results", "error")[n % 3]) for n in range(600)}
    cache.put_all([(canonical(asked(n)), 1e9 + n, r) for n, r in kept.items()])
    parquet = tmp_path / "snapshot.parquet"
    search_main.main(["export", str(tmp_path / "c.sqlite"), "--out", str(parquet)])
    table = pq.read_table(parquet)
    assert table.num_rows == 600
    row = next(row for row in table.to_pylist() if json.loads(row["request"]) == asked(3))
    assert row["hits"][0] == {
        "title": "t3", "url": "https://x.example/3", "text": "ä\x00\n東京", "image": JPEG, "full_size": False,
    }  # fmt: skip
    assert (row["status"], row["created"]) == ("ok", 1e9 + 3)
    again = tmp_path / "again.sqlite"
    search_main.main(["import", str(parquet), "--out", str(again)])
    assert "600 results" in capsys.readouterr().out and problems(again) == []
    with closing(SearchCache(again)) as copy:
        assert list(copy.rows()) == list(cache.rows())
        assert all(copy.get(asked(n)) == r for n, r in kept.items())
    search_main.main(["export", str(again), "--out", str(tmp_path / "b.parquet")])
    assert (tmp_path / "b.parquet").read_bytes() == parquet.read_bytes()


def test_imports_add_and_do_not_replace(tmp_path, cache):
    cache.put(asked(0), result(0))
    search_main.main(["export", str(tmp_path / "c.sqlite"), "--out", str(tmp_path / "s.parquet")])
    with closing(SearchCache(tmp_path / "d.sqlite", write=True)) as other:
        other.put(asked(0), result(7))
        other.put(asked(1), result(1))
        search_main.main(["import", str(tmp_path / "s.parquet"), "--out", str(tmp_path / "d.sqlite")])
        assert [other.get(asked(n)) for n in (0, 1)] == [result(7), result(1)]


def test_bad_files_are_one_line(tmp_path, cache):
    cache.put(asked(0), result())
    good = tmp_path / "good.parquet"
    search_main.main(["export", str(tmp_path / "c.sqlite"), "--out", str(good)])
    (tmp_path / "text").write_text("x" * 200)
    rows = pq.read_table(good).to_pylist()
    schema = pq.read_schema(good)
    bad = [
        {"request": "[1, 2"},
        {"request": '{"a":  1}'},
        {"status": "fine"},
        {"hits": None},
        {"error": None, "created": None},
    ]
    for n, change in enumerate(bad):
        pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], **change}], schema), tmp_path / f"bad{n}.parquet")
        with pytest.raises(InputError, match=f"bad{n}.parquet.*row 2: not an exported"):
            search_main.main(["import", str(tmp_path / f"bad{n}.parquet"), "--out", str(tmp_path / "d.sqlite")])
        assert not list(tmp_path.glob("d.sqlite*"))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    for args, why in (
        (["import", "text", "--out", "d.sqlite"], "not a readable parquet"),
        (["import", "none", "--out", "d.sqlite"], "none"),
        (["import", "other.parquet", "--out", "d.sqlite"], "not an exported cache"),
        (["import", "good.parquet", "--out", "text"], "not a search cache"),
        (["import", "good.parquet", "--out", "none/c.sqlite"], "cannot make"),
        (["export", "text", "--out", "x.parquet"], "not a search cache"),
        (["export", "none", "--out", "x.parquet"], "no such search cache"),
        (["export", "c.sqlite", "--out", "none/x.parquet"], "cannot write"),
        (["import", "..", "--out", "d.sqlite"], "not a file"),
        (["import", "good.parquet", "--out", ".."], "not a file"),
        (["export", "c.sqlite", "--out", "/dev/null"], "/dev/null: not a file"),
        (["import-fvqa", "/dev/zero", "--out", "d.sqlite"], "/dev/zero: not a file"),
        (["stats", "x" * 300], "name too long"),
        (["export", "c.sqlite", "--out", "x" * 254], "name too long"),
        (["import", "good.parquet", "--out", "x" * 254], "cannot make|name too long"),
        (["verify", "text"], "not a readable parquet"),
        (["stats", "text"], "not a search index"),
    ):  # fmt: skip
        before = {*tmp_path.iterdir()}
        args = [str(tmp_path / a) if n in (1, 3) else a for n, a in enumerate(args)]
        with pytest.raises((InputError, OSError), match=f"(?i){why}") as error:
            search_main.main(args)
        assert "\n" not in str(error.value) and {*tmp_path.iterdir()} == before  # no empty cache


def test_an_index_is_no_cache_and_a_cache_no_index(tmp_path, cache):
    build(tmp_path / "i.sqlite", [{"title": "a", "text": "b"}])
    with pytest.raises(InputError, match="not a search cache"):
        SearchCache(tmp_path / "i.sqlite")
    with pytest.raises(InputError, match="not a search index"):
        SearchDB(tmp_path / "c.sqlite")
    with pytest.raises(InputError, match="not a search index"):
        build(tmp_path / "c.sqlite", [])


# --- FVQA's pickle --------------------------------------------------------------------------------------------------


def pil(data):
    return Image.open(io.BytesIO(data))


def write_pickle(path, content, protocol=None):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_fvqa_s_pickle_with_pictures(tmp_path, cache, protocol):
    png = pil(picture(2))
    png.info["note"] = PngImagePlugin.iTXt("a note", "en", "note")
    palette = pil(picture(3)).quantize(64, dither=Image.Dither.NONE)
    exif = pil(JPEG)
    exif.info |= {"dpi": (TiffImagePlugin.IFDRational(72, 1), 72.0), "exif": exif.getexif(), "icc": bytearray(b"x")}
    pictures = [exif, png, palette, pil(JPEG).convert("RGBA"), pil(JPEG).convert("L")]
    entry = {"tool_returned_web_title_list": [f"t{n}" for n in range(6)], "tool_returned_images_urls": pictures}
    content = {"fvqa_1": entry, "fvqa_2": {**entry, "tool_returned_images_urls": []}}
    arrays = [np.asarray(pil(JPEG)), np.asfortranarray(np.asarray(pil(JPEG).convert("L"))), b"", None, "u"]
    titles = np.array([f"t{n}" for n in range(5)])
    pictures_array = np.empty(5, object)
    pictures_array[:] = arrays[:2] + [JPEG] + arrays[3:]
    content[np.str_("fvqa_3")] = {
        "tool_returned_web_title_list": titles,
        "tool_returned_images_urls": pictures_array,
    }
    path = write_pickle(tmp_path / "p", collections.OrderedDict(content), protocol)
    assert import_fvqa(path, cache) == (3, [("fvqa_3", ""), ("fvqa_3", "u")])
    shown = cache.get({"data_id": "fvqa_3"}).hits
    assert [hit.title for hit in shown] == list(titles) and [hit.image is None for hit in shown] == 3 * [False] + 2 * [
        True
    ]
    for hit, mode in zip(shown, ("RGB", "L", "RGB"), strict=False):
        assert hit.image == search_embedding.thumbnail(pil(JPEG).convert(mode).convert("RGB"))
    kept = cache.get({"data_id": "fvqa_1"})
    assert kept.status == "ok" and [hit.title for hit in kept.hits] == [f"t{n}" for n in range(5)]
    for hit, image in zip(kept.hits, pictures, strict=True):
        assert pil(hit.image).format == "JPEG" and hit.image == search_embedding.thumbnail(image.convert("RGB"))
    assert cache.get({"data_id": "fvqa_2"}) == Result("no_results")
    assert list(cache.verify()) == []


def test_fvqa_s_urls_are_fetched_if_live_and_listed_if_not(tmp_path, cache, capsys):
    with LocalWeb(lambda path, _: "html" if "bad" in path else None) as server:
        urls = [
            f"{server.url}/thumb/1.jpg",
            f"{server.url}/thumb/bad.jpg",
            "file:///etc/passwd",
            "http://10.0.0.1/x.jpg",
        ]
        entry = {"tool_returned_web_title_list": list("abcd"), "tool_returned_images_urls": urls}
        path = write_pickle(tmp_path / "p", {7: entry})
        search_main.main(["import-fvqa", str(path), "--out", str(tmp_path / "offline.sqlite")])
        out = capsys.readouterr().out
        assert "1 entries" in out and "4 pictures missing" in out and "--live" in out and not server.log
        listed = (tmp_path / "offline.sqlite.missing.tsv").read_text().splitlines()
        assert listed == [f"7\t{url}" for url in urls]
        client = fetching_client(allow_hosts=(server.host,))
        client.retries, client.connect_timeout = 0, 1.0
        assert import_fvqa(path, cache, client) == (1, [("7", url) for url in urls[1:]])
    hits = cache.get({"data_id": "7"}).hits
    assert [hit.title for hit in hits] == list("abcd") and [hit.image is None for hit in hits] == [False] + 3 * [True]


def test_fvqa_as_json_with_pictures_in_files(tmp_path, cache):
    """Paths were written elsewhere, and lead out of the folder of the JSON file in no case."""
    folder = tmp_path / "here" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (folder / "1.jpg").write_bytes(JPEG)
    (folder / "text.jpg").write_text("none")
    os.mkfifo(folder / "pipe")
    paths = [
        "images/1.jpg",
        "/elsewhere/data/images/1.jpg",
        "../../x/images/1.jpg",
        "../secret.jpg",
        None,
        "pipe",
        3,
        "text.jpg",
    ]
    entry = {"tool_returned_web_title": [f"標題{n}" for n in range(8)], "cached_images_path": paths}
    file = tmp_path / "here" / "cache.json"
    file.write_text("\ufeff" + json.dumps({"fvqa_train_1": entry, "fvqa_train_2": {**entry, "cached_images_path": []}}))
    count, missing = import_fvqa(file, cache)
    hits = cache.get({"data_id": "fvqa_train_1"}).hits
    assert count == 2 and [hit.title for hit in hits] == entry["tool_returned_web_title"]
    assert [hit.image for hit in hits] == 3 * [search_embedding.web_thumbnail(JPEG)] + 5 * [None]
    assert missing == [("fvqa_train_1", path) for path in ("../secret.jpg", "", "pipe", "", "text.jpg")]


def shared(n):
    value = []
    for _ in range(n):
        value = [value, value]
    return value


def nested(n, kind=tuple):
    value = kind()
    for _ in range(n):
        value = kind((value,))
    return value


def as_pickle(titles=b"](X\1\0\0\0te", pictures=b"]", id=b"X\1\0\0\0x"):
    names = [
        b"X" + len(name).to_bytes(4, "little") + name
        for name in (b"tool_returned_web_title_list", b"tool_returned_images_urls")
    ]
    return b"\x80\2}" + id + b"}(" + names[0] + titles + names[1] + pictures + b"us."


COLLIDING = b"".join(b"\x8a\x12" + (n * (2**61 - 1)).to_bytes(18, "little") + b"N" for n in range(20_000))
HOSTILE = {
    "no state": as_pickle(pictures=b"](cPIL.Image\nImage\n)\x81e"),
    "no state, by name": as_pickle(pictures=b"](cPIL.Image\nImage\ne"),
    "long id": as_pickle(id=b"\x8b\xff\xff\0\0" + b"\1" * 65535),
    "long decimal": as_pickle(titles=b"]I" + b"9" * 5000 + b"\na"),
    "surrogates": as_pickle(id=b"X\3\0\0\0\xed\xa0\xbd"),
    "surrogates in a picture's name": as_pickle(pictures=b"](X\3\0\0\0\xed\xa0\xbde"),
    "deep lists": as_pickle(pictures=b"]" * 200_000 + b"a" * 199_999),
    "a deep key": as_pickle(pictures=b"}" + b")" + b"\x85" * 200_000 + b"Ns"),
    "colliding keys": as_pickle(pictures=b"}(" + COLLIDING + b"u"),
    "memo": as_pickle(pictures=b"]r\0\0\0\x10"),
    "a large array of bytes": as_pickle(pictures=b"\x96" + (2**50).to_bytes(8, "little")),
    "numbers as an array": as_pickle(pictures=b"](cnumpy\nndarray\n)\x81e"),
    "sets": as_pickle(pictures=b"\x8f"),
    "cut off": as_pickle()[:-3],
    "json, deep": b'{"x":' + b"[" * 200_000,
    "json, half a character": b'{"\\ud83d": {"tool_returned_web_title": [], "cached_images_path": []}}',
    "json, a list": b"[1]",
    "json, a long number": b'{"x": ' + b"9" * 5000 + b"}",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_for_fvqa_are_refused_in_a_line_and_at_once(tmp_path, name):
    (tmp_path / "p").write_bytes(HOSTILE[name])
    started = time.monotonic()
    try:
        search_main.main(["import-fvqa", str(tmp_path / "p"), "--out", str(tmp_path / "c.sqlite")])
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 400 and not (tmp_path / "c.sqlite").exists()
    else:
        assert name in ("surrogates in a picture's name", "deep lists", "memo")  # nobody looks at these
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("content", [shared(100), [shared(100)] * 3, nested(900), {"k": shared(100)}])
def test_lists_that_hold_each_other_take_no_time(tmp_path, cache, content):
    entry = {"tool_returned_web_title_list": content, "tool_returned_images_urls": content, "other": content}
    started = time.monotonic()
    with contextlib.suppress(InputError):
        import_fvqa(write_pickle(tmp_path / "p", {"x": entry}), cache)
    assert time.monotonic() - started < 5


def test_fvqa_answers_by_data_id_where_the_picture_is_unknown(tmp_path):
    entry = {"tool_returned_web_title_list": list("abcde"), "tool_returned_images_urls": [pil(JPEG)] * 5}
    path = write_pickle(tmp_path / "p", {"train_1": entry})
    search_main.main(["import-fvqa", str(path), "--out", str(tmp_path / "c.sqlite")])
    search = open_search(
        Config(search="replay", search_cache=str(tmp_path / "c.sqlite"), tool_results=("image_search=3",))
    )
    known = question(0)
    object.__setattr__(known, "data_id", "train_1")
    result = search.search(Call("image_search"), known)
    assert [hit.title for hit in result.hits] == ["a", "b", "c"] and result.usage.cached == 1
    assert search.search(Call("image_search"), question(1)).error_kind == "not_recorded"
    with closing(SearchCache(tmp_path / "c.sqlite", write=True)) as cache:  # the content goes first
        cache.put(search.request(Call("image_search"), known), Result("no_results"))
    assert search.search(Call("image_search"), known) == Result("no_results")


class Run:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


HARMFUL = [
    Run(os.system, "touch {mark}"),
    Run(eval, "open('{mark}', 'w')"),
    Run(exec, "open('{mark}', 'w')"),
    Run(getattr, "x", "upper"),
    Run(Image.open, "{mark}"),
    Run(subprocess.Popen, ["touch", "{mark}"]),
    Run(copyreg._reconstructor, subprocess.Popen, object, None),
    Run(open, "{mark}", "w"),
    Run(__import__, "os"),
    Run(collections.deque),
    Run(np.fromfile, "{mark}"),
    random.Random(0),
]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("number", range(len(HARMFUL)))
def test_a_pickle_that_is_a_program_is_refused(tmp_path, cache, number, protocol):
    harmful, mark = HARMFUL[number], tmp_path / "mark"
    if isinstance(harmful, Run):
        function, args = harmful.reduced
        args = [a.format(mark=mark) if isinstance(a, str) else a for a in args]
        harmful = Run(function, *[[x.format(mark=mark) for x in a] if isinstance(a, list) else a for a in args])
    entry = {"tool_returned_web_title_list": ["t"], "tool_returned_images_urls": [harmful]}
    path = write_pickle(tmp_path / "p", {"x": entry}, protocol)
    with pytest.raises(InputError, match="not a pickle of plain data") as error:
        import_fvqa(path, cache)
    assert "\n" not in str(error.value) and not mark.exists() and cache.stats()["results"] == 0


@pytest.mark.parametrize(
    "content, why",
    [
        ([1, 2], "expected a dictionary"),
        ({"x": 3}, "entry x: unreadable .expected a dictionary"),
        ({"x": {}}, "two lists"),
        ({"x": {"tool_returned_web_title_list": "t", "tool_returned_images_urls": []}}, "two lists"),
        (b"no pickle", "not a pickle"),
        (None, "No such file"),
    ],
)
def test_a_pickle_of_something_else_is_one_line(tmp_path, cache, content, why):
    path = tmp_path / "p"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_pickle(path, content)
    with pytest.raises((InputError, OSError), match=why):
        import_fvqa(path, cache)


def test_a_pickled_picture_that_lies_is_refused(tmp_path, cache):
    """A state of Pillow's with too few bytes, of a billion pixels, with an unknown mode, that is no state."""

    class Lie(Image.Image):
        def __init__(self, state):
            self.state = state

        def __reduce_ex__(self, protocol):
            return copyreg._reconstructor, (Image.Image, object, None), self.state

    sound = [{}, "RGB", (2, 2), None, b"\0" * 12]
    for place, value in ((4, b"\0"), (2, (50_000, 20_000)), (1, "XYZ"), (2, (0, 0)), (2, "ab"), (4, 7)):
        state = list(sound)
        state[place] = value
        entry = {"tool_returned_web_title_list": ["t"], "tool_returned_images_urls": [Lie(state)]}
        with pytest.raises(InputError, match="entry x: unreadable"):
            import_fvqa(write_pickle(tmp_path / "p", {"x": entry}), cache)
    entry = {"tool_returned_web_title_list": ["t"], "tool_returned_images_urls": [Lie(sound)]}
    assert import_fvqa(write_pickle(tmp_path / "p", {"x": entry}), cache) == (1, [])


def test_fvqa_s_entries_are_about_the_question_s_own_picture(tmp_path):
    """Not about a part of it that was cut out."""
    entry = {"tool_returned_web_title_list": ["a"], "tool_returned_images_urls": [pil(JPEG)]}
    search_main.main(
        ["import-fvqa", str(write_pickle(tmp_path / "p", {"train_1": entry})), "--out", str(tmp_path / "c")]
    )
    search = open_search(Config(search="replay", search_cache=str(tmp_path / "c")))
    known = dataclasses.replace(question(0), data_id="train_1")
    assert search.search(Call("image_search"), known).status == "ok"
    assert search.search(Call("image_search", image=picture(7)), known).error_kind == "not_recorded"


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_are_content():
    assert sha256([canonical({"b": 1, "a": "ä"})]) == hashlib.sha256('{"a":"ä","b":1}'.encode()).hexdigest()


def test_what_earlier_versions_recorded_is_still_found(tmp_path):
    """Keys that the version before the table of tools computed (commit e1f4955)."""
    about = dataclasses.replace(question(0), images=(b"a picture",))
    image, text = Call("image_search"), Call("text_search", "who is the founder?")
    threes = ("image_search=3", "text_search=3")
    for call, changes, key in (
        (image, {}, "e252cbb5fe4aca27dbd230bb268fd3b36e572f868607a9515b64d1d1d496253c"),
        (text, {}, "32c9f28e5dd12a97621a83d5bdcea5376373d06fe8c4128e486a623dce24c11e"),
        (
            text,
            {"summarizer_url": "http://x/v1", "tool_results": ("text_search=5",)},
            "a7594cf045cc80ea7f9858b2d243f5968a2e45415d24e05449d2ca347e62cae0",
        ),
    ):
        cfg = Config(search="replay", search_cache=str(tmp_path / "c"), **{"tool_results": threes, **changes})
        SearchCache(tmp_path / "c", write=True).close()
        assert sha256([canonical(open_search(cfg).request(call, about))]) == key


def test_a_picture_at_full_size_stays_one(tmp_path, cache):
    """Through the file, parquet and back; and rows of files that know nothing of it are thumbnails."""
    kept = Result("ok", (Hit("small", image=JPEG), Hit("large", image=JPEG, full_size=True)))
    assert cache.put(asked(0), kept) == kept and [h.full_size for h in cache.get(asked(0)).hits] == [False, True]
    with cache._connection() as db:
        ((content,),) = db.execute("SELECT result FROM results").fetchall()
    assert [hit.get("full_size") for hit in json.loads(content)["hits"]] == [None, True]
    search_main.main(["export", str(tmp_path / "c.sqlite"), "--out", str(tmp_path / "s")])
    search_main.main(["import", str(tmp_path / "s"), "--out", str(tmp_path / "d.sqlite")])
    with closing(SearchCache(tmp_path / "d.sqlite")) as copy:
        assert copy.get(asked(0)) == kept
    old = pq.read_table(tmp_path / "s").to_pylist()
    for hit in old[0]["hits"]:
        del hit["full_size"]
    pq.write_table(pa.Table.from_pylist(old), tmp_path / "old")
    search_main.main(["import", str(tmp_path / "old"), "--out", str(tmp_path / "e.sqlite")])
    with closing(SearchCache(tmp_path / "e.sqlite")) as copy:
        assert copy.get(asked(0)) == Result("ok", tuple(dataclasses.replace(h, full_size=False) for h in kept.hits))
