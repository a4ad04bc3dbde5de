"""Reading the model's calls, by hand; and the offline search: hits, nothing found, failures, several threads."""

import dataclasses
import io
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

import tools
from config import Config
from data import Call, Hit, Question, Result, decode_image, load_questions
from reward import extract_answer
from search.index import OfflineSearch, SearchDB, build
from tools import TOOLS, parse_calls

IMAGE, ANSWER = Call("image_search"), "answer"
IMG = "<search><img></search>"


def text(query):
    return Call("text_search", query)


@pytest.mark.parametrize(
    "turn, action",
    [
        # one action
        (f"<reason>r</reason> {IMG}", IMAGE),
        ("<text_search>flag of Nauru</text_search>", text("flag of Nauru")),
        ("<reason>r</reason><answer>Nauru</answer>", ANSWER),
        ("<answer></answer>", ANSWER),
        # white space and lines
        ("<text_search>\n two\nlines \n</text_search>\n\n", text("two\nlines")),
        ("<answer>\nNauru\n</answer>", ANSWER),
        ("<text_search></text_search>", text("")),
        ("<text_search> \n </text_search>", text("")),
        # several: the one that ends last
        (f"{IMG} <text_search>q</text_search>", text("q")),
        (f"<text_search>q</text_search> {IMG}", IMAGE),
        (f"<answer>a</answer> {IMG}", IMAGE),
        (f"{IMG} <answer>a</answer>", ANSWER),
        ("<text_search>q</text_search> <answer>a</answer>", ANSWER),
        ("<answer>a</answer> <text_search>q</text_search>", text("q")),
        ("<text_search>q</text_search><text_search>r</text_search>", text("r")),
        # nested: the outer one ends last
        (f"<answer>{IMG}</answer>", ANSWER),
        (f"<text_search>{IMG}</text_search>", text(IMG)),
        ("<text_search><answer>a</answer></text_search>", text("<answer>a</answer>")),
        ("<answer><text_search>q</text_search></answer>", ANSWER),
        ("<text_search>a <text_search>b</text_search>", text("b")),
        ("<text_search>a <text_search>b</text_search></text_search>", text("b")),
        ("<answer>a <text_search>b</answer> c</text_search>", text("b</answer> c")),  # crossed
        # not complete, or only pieces
        ("", None),
        ("Nauru.", None),
        ("<reason>r</reason>", None),
        ("<text_search>q", None),
        ("q</text_search>", None),
        ("</text_search>q<text_search>", None),
        ("<answer>a", None),
        ("<answer>a</text_search>", None),
        ("<search><img>", None),
        ("<search></search>", None),
        ("<search> <img> </search>", None),
        ("<img></search>", None),
        ("<search>q</search>", None),
        ("<text_search >q</text_search>", None),
        ("<Answer>a</Answer>", None),
        (f"{IMG[:-1]}", None),
        (f"{IMG} <text_search>q", IMAGE),
        ("<text_search>q</text_search> <answer>a", text("q")),
        (f"<answer>a</answer> {IMG[:-1]}", ANSWER),
        ("<text_search>q</text_search> </text_search>", text("q")),
        ("<answer>a</answer></search>", ANSWER),
        ("<text_search>a < b & c > d <img> <|im_end|></text_search>", text("a < b & c > d <img> <|im_end|>")),
    ],
)
def test_parse_call(turn, action):
    assert parse_calls(turn) == ([action] if isinstance(action, Call) else [])
    if not parse_calls(turn):
        assert (extract_answer(turn) is not None) == (action == ANSWER)


@pytest.mark.parametrize("piece", ["<text_search>", "</text_search>", "<answer>", IMG[:-1], "<text_search>a</answer>"])
def test_parse_call_takes_linear_time(piece):
    start = time.perf_counter()
    parse_calls(piece * 50_000)
    assert time.perf_counter() - start < 2


def picture(colour, side=64):
    image = Image.new("RGB", (side, side), "white")
    image.paste(colour, (side // 4, side // 4, side // 2, side // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = ["red", "green", "blue", "yellow", "black", "orange", "purple"]


@pytest.fixture
def path(tmp_path):
    docs = ({"title": c, "text": f"all about {c}", "url": f"u/{c}"} for c in COLOURS)
    build(tmp_path / "i.sqlite", docs, ({"title": c, "image": picture(c), "url": f"p/{c}"} for c in COLOURS))
    return tmp_path / "i.sqlite"


@pytest.fixture
def db(path):
    with closing(SearchDB(path)) as db:
        yield db


def ask(*images):
    return Question(id="q", text="What colour?", images=images)


def test_image_search_looks_for_the_first_image(db):
    result = OfflineSearch(db, {"image_search": 3}).search(IMAGE, ask(picture("blue", 90), picture("red")))
    assert (result.status, result.error, len(result.hits)) == ("ok", "", 3)
    assert (result.hits[0].title, result.hits[0].url, result.hits[0].text) == ("blue", "p/blue", "")
    assert Image.open(io.BytesIO(result.hits[0].image)).size == (64, 64)


def test_text_search_looks_for_the_query(db):
    result = OfflineSearch(db, {"text_search": 2}).search(text("Yellow?"), ask())
    assert [(hit.title, hit.url, hit.text) for hit in result.hits] == [("yellow", "u/yellow", "all about yellow")]
    assert OfflineSearch(db, {"text_search": 2}).search(text("about"), ask()).hits == tuple(db.text("about", 2))


def test_five_results_unless_told_otherwise(db):
    search = OfflineSearch(db)
    assert [len(search.search(call, ask(picture("red"))).hits) for call in (IMAGE, text("about"))] == [5, 5]


def test_nothing_found_is_not_an_error(db, tmp_path):
    assert OfflineSearch(db).search(text("mauve"), ask()) == Result("no_results")
    assert OfflineSearch(db).search(text("?!"), ask()) == Result("no_results")
    build(tmp_path / "empty")
    with closing(SearchDB(tmp_path / "empty")) as empty:
        assert OfflineSearch(empty).search(IMAGE, ask(picture("red"))) == Result("no_results")


@pytest.mark.parametrize(
    "call, question, why",
    [
        (IMAGE, ask(), "the question has no image"),
        (IMAGE, ask(b"no picture", picture("red")), "not a whole picture"),
        (text(""), ask(), "the query is empty"),
        (text(" \n"), ask(), "the query is empty"),
    ],
)
def test_failures_are_said(db, call, question, why):
    result = OfflineSearch(db).search(call, question)
    assert (result.status, result.hits, result.error_kind) == ("error", (), "bad_call")
    assert why in result.error


def test_a_file_damaged_under_way_is_an_error_not_an_empty_result(path, db):
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    result = OfflineSearch(db).search(text("red"), ask())
    assert (result.status, result.hits, result.error_kind) == ("error", (), "index")
    assert result.error.startswith("DatabaseError: ")


def test_the_samples_of_a_question_cost_one_search(db, monkeypatch):
    asked = []
    monkeypatch.setattr(db, "text", lambda query, k: asked.append(query) or [Hit(query)])
    search = OfflineSearch(db)
    found = [search.search(text(query), ask()) for query in ("red", "red", "blue", "red")]
    assert asked == ["red", "blue"] and [result.hits[0].title for result in found] == ["red", "red", "blue", "red"]


def test_samples_that_ask_at_once_share_a_search_and_its_failure(db, monkeypatch):
    asked = []

    def slow(data, k):
        asked.append(data)
        time.sleep(0.2)
        if len(asked) == 1:
            raise sqlite3.DatabaseError("damaged")
        return [Hit("red")]

    monkeypatch.setattr(db, "image", slow)
    search, about = OfflineSearch(db), ask(picture("red"))
    with ThreadPoolExecutor(8) as pool:
        for calls, status in ((1, "error"), (2, "ok"), (2, "ok")):  # what failed is tried again
            found = {result.status for result in pool.map(lambda _: search.search(IMAGE, about), range(8))}
            assert found == {status} and len(asked) == calls


class Broken:
    """A database whose searches raise."""

    def __init__(self, error):
        self.error = error

    def text(self, query, k):
        raise self.error

    image = text


def test_an_unreadable_file_is_an_error():
    result = OfflineSearch(Broken(sqlite3.OperationalError("disk I/O error"))).search(text("red"), ask())
    assert result == Result("error", error="OperationalError: disk I/O error", error_kind="index")


@pytest.mark.parametrize("error", [sqlite3.ProgrammingError, KeyError, ValueError, TypeError])
def test_mistakes_in_the_code_surface(error):
    with pytest.raises(error):
        OfflineSearch(Broken(error("a bug"))).search(text("red"), ask())


@pytest.mark.parametrize("tool", ["video_search", "image", ""])
def test_a_tool_that_is_not_known_is_a_typed_result(db, tool):
    result = OfflineSearch(db).search(Call(tool, "red"), ask(picture("red")))
    assert (result.status, result.hits, result.error_kind) == ("error", (), "bad_call") and repr(tool) in result.error


def test_a_tool_that_a_search_does_not_answer_is_a_typed_result(db, monkeypatch):
    """A new tool of the table, which no search has a method for."""
    monkeypatch.setitem(TOOLS, "look_up", dataclasses.replace(TOOLS["text_search"], tags=("<look>", "</look>")))
    result = OfflineSearch(db).search(Call("look_up", "red"), ask(picture("red")))
    assert (result.status, result.hits, result.error_kind) == ("error", (), "bad_call") and "look up" in result.error


def test_a_call_s_own_picture_goes_before_the_question_s(db):
    search = OfflineSearch(db, {"image_search": 1})
    for q in (ask(picture("red")), ask()):
        assert search.search(Call("image_search", picture="img_2", image=picture("green")), q).hits[0].title == "green"


def test_closed_files_surface(db):
    db.close()
    with pytest.raises(ValueError, match="closed"):
        OfflineSearch(db).search(text("red"), ask())


def test_threads(db):
    search = OfflineSearch(db, {"image_search": 1, "text_search": 1})
    calls = [(call, c) for c in COLOURS for call in (IMAGE, text(c))] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda job: search.search(job[0], ask(picture(job[1]))), calls))
    assert [result.hits[0].title for result in results] == [c for _, c in calls]


FIFTY = Path(tools.__file__).parents[1] / "shared" / "data" / "fvqa50"


@pytest.mark.skipif(not FIFTY.is_dir(), reason="the fifty real questions are not beside the repository")
def test_the_fifty_real_questions_and_what_their_searches_returned(tmp_path):
    """They load, and an index of the recorded pages finds a question's own pages by the query that was asked for it."""
    questions = load_questions([FIFTY / "questions.parquet"])
    assert len(questions) == 50 and all(len(q.images) == 1 and q.answers and q.data_id for q in questions)
    assert all(max(decode_image(q.images[0]).size) > 100 and q.image_url is None for q in questions)
    searches = [json.loads(line) for line in (FIFTY / "searches.jsonl").read_text().splitlines()]
    asked = [s["text_search"] for s in searches if s.get("text_search")]
    assert len(asked) == 30 and {s["data_id"] for s in searches} <= {q.data_id for q in questions}
    pages = [hit for a in asked for hit in a["hits"]]
    build(tmp_path / "index.sqlite", pages)
    search = OfflineSearch(SearchDB(tmp_path / "index.sqlite"), tools.results(Config(tool_results=())))
    found = 0
    for a in asked:
        result = search.search(Call("text_search", a["query"]), questions[0])
        own = {hit["url"] for hit in a["hits"]}
        found += bool(own & {hit.url for hit in result.hits})
    assert found >= 27
