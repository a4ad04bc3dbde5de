"""Live search against a local web: documented formats, every fault typed and in bounded time, keys that stay secret;
recording and replaying; the service; what start-up refuses."""

import dataclasses
import hashlib
import http.server
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
from conftest import ROOT, picture, question
from local_web import EVIL, JINA, NUMBERS, SERPAPI, SERPER, SUMMARIZER, LocalWeb, hurry, settings, wait_until
from PIL import Image

import search
from chat import Chat, Episode
from config import Config, InputError
from data import ERROR_KINDS, Call, Hit, Question, Result, Usage
from rollout import run
from search import __main__ as search_main
from search import engine as search_engine
from search import index as search_index
from search import live as search_live
from search import open_search
from search import service as search_service
from search.calls import Failure
from search.engine import SerpApi, Serper
from search.index import build
from search.live import WebSearch
from search.service import RemoteSearch, SearchServer, result_from_json, result_to_json
from search.text import PAGE_SENTENCES
from search.web import Client, Job
from toy.lessons import ScriptedEngine

IMAGE, FOUNDER = Call("image_search"), Call("text_search", "who is the founder?")
SECRETS = (SERPAPI, SERPER, JINA, SUMMARIZER)
KEYS = (SerpApi.key, Serper.key, search_live.READER_KEY, search_live.SUMMARIZER_KEY)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name, value in zip(KEYS, SECRETS, strict=True):
        monkeypatch.setenv(name, value)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    hurry(monkeypatch)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def server():
    with LocalWeb() as server:
        yield server


@pytest.fixture(params=search_live.ENGINES)
def engine(request, server):
    """The search engine that the server's settings name: a test that takes it runs with each."""
    server.engine = request.param
    return search_live.ENGINES[request.param]


def live(server, **changes):
    return WebSearch(Config(**settings(server, **changes)))


def summarized(server):
    return {"summarizer_url": f"{server.url}/v1/", "summarizer_model": "summariser"}  # a slash at the end is no matter


ONE_EACH = {"tool_results": ("image_search=1", "text_search=1")}


@contextmanager
def proxy(url):
    """A forwarding HTTP proxy that sends everything to `url`: (its address, what it was asked)."""
    asked = []

    class Forward(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            with urllib.request.urlopen(url + "/" + self.path.split("/", 3)[3]) as answer:
                body = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forward) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(urllib.request, "urlopen", opener.open)  # which would ask this proxy again
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def only(part, fault, times=99):
    """A fault of the first requests of each path that holds `part`."""
    return lambda path, number: fault if part in path and number <= times else None


# ------------------------------------------------------------------------------------------------ what works


def test_image_search_is_google_lens_with_thumbnails(server, engine):
    result = live(server).search(IMAGE, question(3))
    assert (result.status, len(result.hits), result.error_kind) == ("ok", 3, "")
    sha = hashlib.sha256(question(3).images[0]).hexdigest()
    asked, headers, payload = server.log[0]
    if engine is Serper:
        assert (asked, payload) == ("/serper/lens", {"url": f"https://pictures.example/{sha}.png", "hl": "en"})
        assert headers["X-API-KEY"] == SERPER and "Authorization" not in headers
    else:
        assert f"engine=google_lens&type=visual_matches&url=https%3A%2F%2Fpictures.example%2F{sha}.png&hl=en" in asked
    for n, hit in enumerate(result.hits):
        assert hit.title.endswith(f"& more {n}") and "<b>" not in hit.title and hit.url == f"https://pages.example/{n}"
        image = Image.open(io.BytesIO(hit.image))
        assert (image.format, image.size) == ("JPEG", (90, 60))
    assert (result.usage.searches, result.usage.pages, result.usage.cached) == (1, 3, 0)
    assert result.usage.cost == {SerpApi: 0.01, Serper: 0.003}[engine]
    assert result.usage.bytes > 3 * 500 and result.usage.seconds > 0


def test_a_question_s_own_url_goes_first(server):
    asked = dataclasses.replace(question(), image_url="https://museum.example/a b.jpg")
    live(server).search(IMAGE, asked)
    assert "url=https%3A%2F%2Fmuseum.example%2Fa+b.jpg" in server.log[0][0]


def test_text_search_reads_pages_and_picks_their_best_sentences(server, engine):
    result = live(server).search(FOUNDER, question())
    assert [hit.url for hit in result.hits] == [f"https://pages.example/{n}/{FOUNDER.query[:20]}" for n in range(3)]
    assert all(f"The founder is F{n}." in hit.text and "x.example" not in hit.text for n, hit in enumerate(result.hits))
    reads = [(headers, payload) for path, headers, payload in server.log if path == "/read"]
    assert sorted(payload["url"] for _, payload in reads) == sorted(hit.url for hit in result.hits)
    assert all(h["Authorization"] == f"Bearer {JINA}" and "application/json" in h["Accept"] for h, _ in reads)
    path, _, payload = server.searched()[0]
    if engine is Serper:
        assert (path, payload) == ("/serper/search", {"q": FOUNDER.query, "hl": "en"})
    assert result.usage.cost == pytest.approx({SerpApi: 0.01, Serper: 0.001}[engine] + 3 * 1000 * 0.05 / 1e6)
    assert (result.usage.searches, result.usage.pages, result.usage.tokens) == (1, 3, 0)


def test_pages_are_summarised_towards_the_query_in_five_sentences(server, monkeypatch):
    monkeypatch.setattr(search_live, "SUMMARIZER_PRICE", 2.0)
    monkeypatch.setattr(search_live, "PAGE_CHARACTERS", 20)
    search = live(server, **summarized(server))
    result = search.search(FOUNDER, question())
    assert [hit.text for hit in result.hits] == [" ".join(f"Sentence {n}." for n in range(5))] * 3
    asked = [payload for path, _, payload in server.log if path == "/v1/chat/completions"]
    assert all(p["temperature"] == 0 and p["model"] == "summariser" for p in asked) and len(asked) == 3
    content = asked[0]["messages"][0]["content"]
    assert FOUNDER.query in content and "# Page" in content and "founders" not in content  # the first 20 characters
    assert result.usage.tokens == 600 and result.usage.cost == pytest.approx(0.01 + 0.00015 + 600 * 2 / 1e6)


def test_a_page_s_text_fills_no_hole_of_the_prompt(server, tmp_path):
    """A query that is itself a hole stays a query."""
    live(server, **summarized(server)).search(Call("text_search", "{page}"), question())
    content = [payload for path, _, payload in server.log if path.startswith("/v1/chat")][0]["messages"][0]["content"]
    assert "Question: {page}" in content


def test_a_page_that_fails_is_replaced_by_the_next(server):
    server.fault = lambda path, _: "page" if "pages.example/0" in path or "pages.example/2" in path else None
    result = live(server).search(FOUNDER, question())
    assert [hit.url.split("/")[3] for hit in result.hits] == ["1", "3", "4"]
    server.fault = only("-1.jpg", "html")
    assert [hit.url[-1] for hit in live(server).search(IMAGE, question()).hits] == ["0", "2", "3"]
    server.fault = lambda path, _: "page" if "/read" in path and "pages.example/5" not in path else None
    result = live(server).search(FOUNDER, question())
    assert result.status == "ok" and len(result.hits) == 1  # fewer than k are still an answer


def test_nothing_found_is_no_error_and_an_error_is_not_nothing_found(server, engine):
    search = live(server)
    assert search.search(Call("text_search", "nothing"), question()) == Result("no_results")
    server.fault = only("/read", "page")
    result = search.search(FOUNDER, question())
    assert (result.status, result.hits, result.error_kind) == ("error", (), "refused")
    assert "6 results" in result.error


@pytest.mark.parametrize("call", [IMAGE, FOUNDER], ids=["image", "text"])
@pytest.mark.parametrize("name, fault", [
    ("serpapi", "no field"), ("serpapi", "null field"), ("serpapi", "processing"), ("serper", "no field"),
    ("serper", "null field"),
])  # fmt: skip
def test_an_answer_without_its_results_is_asked_for_again(server, tmp_path, call, name, fault):
    """It says nothing about what there is: never "no results", and never kept as that."""
    server.engine = name
    server.fault = only(server.searches, fault, times=2)
    search = record(server, tmp_path / "c.sqlite")
    result = search.search(call, question())
    billed = 1 if fault == "processing" else 3
    assert (result.status, len(result.hits), result.usage.searches) == ("ok", 3, billed)
    assert search.inner.spent == billed
    assert ["no_cache=true" in path for path, *_ in server.searched()] == [False] + [name == "serpapi"] * 2
    server.fault = only(server.searches, fault)
    result = search.search(dataclasses.replace(call, query="other"), question(7))
    assert (result.status, result.error_kind) == ("error", "server") and "4 attempts" in result.error
    server.fault = only(server.searches, "no rows")
    assert search.search(Call("text_search", "empty"), question()) == Result("no_results")


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_answers_are_bounded(server, number):
    server.fault = lambda path, _: number
    result = live(server, **summarized(server)).search(FOUNDER, question())
    assert result.status == "ok" and 0 <= result.usage.tokens <= 3 * 10**9 and 0.01 <= result.usage.cost < 1000


def test_one_hostile_result_spoils_no_search(server, engine, monkeypatch):
    server.fault = only(server.searches, "half link")
    for call in (IMAGE, FOUNDER):
        assert [hit.url.split("/")[3] for hit in live(server).search(call, question()).hits] == ["1", "2", "3"]
    server.fault = lambda *_: None

    def broken(page, query, count):
        raise OverflowError(page)

    working = search_live.passages
    monkeypatch.setattr(search_live, "passages", lambda page, *a: (broken if "F0." in page else working)(page, *a))
    assert [hit.url.split("/")[3] for hit in live(server).search(FOUNDER, question()).hits] == ["1", "2", "3"]
    monkeypatch.setattr(search_live, "passages", broken)
    result = live(server).search(FOUNDER, question())
    assert (result.status, result.error_kind) == ("error", "internal") and "test_live.py, line" in result.error


@pytest.mark.parametrize("refused", ["temperature", "max_tokens"])
def test_a_summariser_that_refuses_a_setting_is_asked_without(server, capfd, refused):
    server.fault = only("/v1/chat", f"no {refused}")
    search = live(server, **summarized(server), **ONE_EACH)
    for _ in range(2):
        assert search.search(FOUNDER, question()).status == "ok"
    asked = [payload for path, _, payload in server.log if path == "/v1/chat/completions"]
    assert [refused in payload for payload in asked] == [True, False, False]
    assert capfd.readouterr().err == f"summariser: {refused} is refused, and left out\n"


def test_an_upload_command_makes_a_picture_public(server, tmp_path):
    script = tmp_path / "up load.py"
    script.write_text("import sys; print('uploading'); print('https://up.example/' + sys.argv[-1].split('/')[-1])")
    search = live(server, image_host=f"{sys.executable} '{script}'")
    assert search.search(IMAGE, question()).status == "ok"
    assert "url=https%3A%2F%2Fup.example%2F" in server.log[0][0]
    with ThreadPoolExecutor(8) as pool:  # the samples of a group ask together: it is uploaded once
        script.write_text(
            f"import time; open({str(tmp_path / 'n')!r}, 'a').write('x'); time.sleep(0.3); print('https://a.b')"
        )
        assert {r.status for r in pool.map(lambda _: search.search(IMAGE, question(1)), range(8))} == {"ok"}
        assert (tmp_path / "n").read_text() == "x"
    for body, kind in (("print('file:///etc/passwd')", "no_url"), ("raise SystemExit(3)", "no_url")):
        script.write_text(body)
        assert search.search(IMAGE, question(2)).error_kind == kind
    assert live(server, image_host="").search(IMAGE, question()).error_kind == "no_url"


# ------------------------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize(
    "fault, kind",
    [
        ("429", "rate_limit"),
        ("429 later", "rate_limit"),  # an hour from now: no use waiting
        ("500", "server"),
        ("503", "server"),
        ("quota", "quota"),
        ("truncated", "bad_response"),
        ("cut", "connection"),
        ("wrong types", "bad_response"),
        ("list", "bad_response"),
        ("html", "bad_response"),
        ("huge", "bad_response"),
        ("gzip bomb", "bad_response"),
        ("redirects", "bad_response"),
        ("loopback", "bad_response"),
        ("hang", "timeout"),
        ("drip", "timeout"),
    ],
)
def test_every_fault_of_a_search_engine_is_typed(server, engine, monkeypatch, fault, kind):
    test_every_fault_is_typed(server, monkeypatch, server.searches, fault, kind)


@pytest.mark.parametrize(
    "part, fault, kind",
    [
        ("/read", "wrong types", "bad_response"),
        ("/read", "hang", "timeout"),
        ("/read", "huge", "bad_response"),
        ("/v1/chat", "wrong types", "bad_response"),
        ("/v1/chat", "500", "server"),
        ("/thumb", "redirects", "bad_response"),
        ("/thumb", "loopback", "blocked"),
        ("/thumb", "bomb", "bad_response"),
        ("/thumb", "html", "bad_response"),
        ("/thumb", "huge", "bad_response"),
        ("/thumb", "drip", "timeout"),
    ],
)
def test_every_fault_is_typed(server, monkeypatch, part, fault, kind):
    server.fault = only(part, fault)
    silence, deadline = (0.2, 1.5) if fault in ("hang", "drip") else (10.0, 60.0)  # only these are about the clock
    hurry(monkeypatch, retries=1, read_timeout=silence)
    search = live(server, search_deadline=deadline, **ONE_EACH, **summarized(server))
    result = search.search(IMAGE if part == "/thumb" else FOUNDER, question())
    assert (result.status, result.error_kind, result.hits) == ("error", kind, ()), result.error
    assert result.error and not any(secret in result.error for secret in SECRETS)


def test_a_redirect_never_reaches_a_private_address(server):
    with closing(socket.create_server(("127.0.0.1", 0))) as private:
        private.settimeout(0.2)
        server.elsewhere = f"http://localhost:{private.getsockname()[1]}/latest/meta-data"
        server.fault = only("/thumb", "loopback")
        assert live(server).search(IMAGE, question()).error_kind == "blocked"
        with pytest.raises(TimeoutError):
            private.accept()


@pytest.mark.parametrize("fault", ["hang", "429", "500", "503", "cut"])
def test_what_passes_is_tried_again(server, engine, monkeypatch, fault):
    server.fault = only("", fault, times=2)
    hurry(monkeypatch, read_timeout=0.5 if fault == "hang" else 10.0)
    search = live(server, **ONE_EACH, **summarized(server))
    assert search.search(FOUNDER, question()).status == "ok"
    assert set(server.asked.values()) == {3}
    server.asked.clear()
    monkeypatch.setattr(Client, "retries", 1)
    live(server).search(FOUNDER, question())
    assert set(server.asked.values()) == {2}


def test_what_does_not_pass_is_not_tried_again(server, engine):
    for fault in ("truncated", "quota", "html"):
        server.asked.clear()
        server.fault = only(server.searches, fault)
        live(server).search(FOUNDER, question())
        assert set(server.asked.values()) == {1}


def test_hostile_text_is_harmless_text(server, engine, chat):
    server.fault = lambda *_: "evil"
    for call in (IMAGE, FOUNDER):
        for changes in ({}, summarized(server)):
            result = live(server, **changes).search(call, question())
            for text in (text for hit in result.hits for text in (hit.title, hit.url, hit.text)):
                assert "\x00" not in text and "alert" not in text.replace("alert(1)", "") and "<script>" not in text
                text.encode()  # no half characters
            assert any("<|im_end|>" in hit.title + hit.text for hit in result.hits)
            roomy = Chat(chat.folder, dataclasses.replace(chat.cfg, max_tokens=8000))
            asked = Episode(question(), roomy, tokens=[chat.im_end])
            ids, pictures, _ = chat.result_turn(call, result, asked)
            turn = Result("ok", tuple(dataclasses.replace(h, title="", text="", url="") for h in result.hits))
            bare, _, _ = chat.result_turn(call, turn, asked)
            for special in (chat.im_end, chat.image_pad, chat.vision_start):  # it opened no turn, added no image
                assert ids.count(special) == bare.count(special)
    assert "<script>" in EVIL


def test_a_thousand_calls_among_faults_end_typed_and_leave_nothing_behind(monkeypatch):
    """One search in five hangs; other requests are refused, broken, endless, hostile. 24 threads."""
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    others = ["429", "500", "truncated", "cut", "wrong types", "list", "redirects", "loopback", "bomb", "evil", "drip"]
    others += ["no field", "null field", "half link", "vast"]

    def fault(path, number):
        draw = random.Random(f"{path} {number}")
        if "/search.json" in path and draw.random() < 0.2:
            return "hang"
        return draw.choice(others) if draw.random() < 0.2 else None

    with LocalWeb(fault) as server:
        hurry(monkeypatch, read_timeout=0.4, retries=2)
        monkeypatch.setattr(search_engine, "IN_FLIGHT", 64)
        monkeypatch.setattr(search_live, "READER_IN_FLIGHT", 64)
        search = live(server, search_deadline=4.0, **ONE_EACH)
        calls = [IMAGE if n % 2 else Call("text_search", f"query {n}") for n in range(1000)]
        one = question()
        with ThreadPoolExecutor(24) as pool:
            futures = [pool.submit(search.search, call, one) for call in calls]
            results = [future.result() for future in futures]
    kinds = Counter(r.error_kind or r.status for r in results)
    assert all(r.status in ("ok", "error") and (r.status == "error") == (r.error_kind in ERROR_KINDS) for r in results)
    assert {"ok", "timeout", "bad_response"} <= set(kinds) and kinds["internal"] == 0, kinds
    assert max(r.usage.seconds for r in results) < 30  # of a deadline of four seconds, on a busy machine
    assert wait_until(lambda: set(threading.enumerate()) <= threads)
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


def test_the_budget_ends_live_calls_cleanly(server, engine, monkeypatch):
    search = live(server, search_budget=3)
    kinds = [search.search(Call("text_search", f"q{n}"), question()).error_kind for n in range(5)]
    assert kinds == ["", "", "", "budget", "budget"]
    assert len(server.searched()) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")  # two ranks share it
    search = live(server, search_budget=3)
    assert [search.search(FOUNDER, question()).error_kind for _ in range(3)] == ["", "", "budget"]


def test_a_budget_goes_on_where_an_earlier_run_ended(server, engine, tmp_path):
    build(tmp_path / "i.sqlite")
    for n, changes in enumerate(({}, {"search": "record", "search_cache": str(tmp_path / "c.sqlite")})):
        cfg = Config(**settings(server, search_budget=3, **changes))
        first = search.web_part(open_search(cfg))
        first.search(Call("text_search", f"a{n}"), question())
        resumed = open_search(cfg)
        search.web_part(resumed).spent = first.spent
        calls = [Call("text_search", f"{n} {m}") for m in range(3)]
        assert [resumed.search(call, question()).error_kind for call in calls] == ["", "", "budget"]
        assert search.web_part(resumed).spent == 3
    for other in (replay(tmp_path / "c.sqlite"), open_search(Config(), tmp_path / "i.sqlite")):
        assert search.web_part(other) is None


def test_limits_hold_for_all_threads_together(server, monkeypatch):
    """Two in flight, and twenty begun a second: ten searches need at least 9/20 of a second."""
    at_once, most, lock = [0], [0], threading.Lock()

    def count(path, number):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1

    server.fault = count
    monkeypatch.setattr(search_engine, "IN_FLIGHT", 2)
    monkeypatch.setattr(search_engine, "PER_SECOND", 20.0)
    search = live(server)
    started = time.monotonic()
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda n: search.search(Call("text_search", f"nothing {n}"), question()), range(10)))
    assert time.monotonic() - started > 9 / 20 and most[0] <= 2
    monkeypatch.setattr(search_engine, "PER_SECOND", 0.0)
    search = live(server)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda n: search.search(Call("text_search", f"nothing {n}"), question()), range(10)))
    assert most[0] == 2


def test_keys_appear_nowhere(server, engine, tmp_path, capfd, caplog):
    """Not in errors, even if a provider echoes them, not in the cache, not on the terminal."""
    cfg = Config(**settings(server, search="record", search_cache=str(tmp_path / "c.sqlite"), **summarized(server)))
    search = open_search(cfg)
    search.search(FOUNDER, question())
    search.inner.engine.client.key = "wrong-but-secret"  # the server repeats it in its message
    result = search.search(Call("text_search", "another"), question())
    assert result.error_kind == "refused" and "***" in result.error and "wrong-but-secret" not in result.error
    server.fault = only(server.searches, "odd headers")  # urllib3 would warn, and name the URL
    assert search.search(Call("text_search", "a third"), question()).status == "error"
    search.cache.close()
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir()) + json.dumps(dataclasses.asdict(cfg)).encode()
    shown = capfd.readouterr()
    for secret in (*SECRETS, "wrong-but-secret"):
        assert secret.encode() not in written and secret not in shown.out + shown.err + caplog.text


def test_proxies_of_the_environment_are_for_endpoints_of_the_user_alone(server, monkeypatch):
    """The search engine is known to the proxy alone; thumbnails are fetched without it, from addresses that were
    checked."""
    with proxy(server.url) as (address, asked):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, address)
        search = live(server, search_engine="serpapi=http://engine.invalid")
        assert search.search(IMAGE, question()).status == "ok"
        assert [url.partition("?")[0] for url in asked] == ["http://engine.invalid/search.json"]
        assert search.search(Call("text_search", "nothing"), question()).status == "no_results"
        monkeypatch.setenv("NO_PROXY", "engine.invalid")
        monkeypatch.setenv("no_proxy", "engine.invalid")
        result = search.search(IMAGE, question(2))
        assert (result.error_kind, len(asked)) == ("connection", 2)
        monkeypatch.setattr(search.pictures, "allow_hosts", ())
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.delenv("no_proxy")
        assert search.search(IMAGE, question(3)).error_kind == "blocked"  # the proxy could reach them


# ------------------------------------------------------------------------------------------------- start-up


def refused(function, *args) -> str:
    with pytest.raises(InputError) as error:
        function(*args)
    assert not any(secret in str(error.value) for secret in SECRETS)
    return str(error.value)


def test_keys_are_checked_once_at_start_up(server, engine, monkeypatch, capfd):
    cfg = Config(**settings(server, **summarized(server)))
    open_search(cfg)
    account = {SerpApi: "/account.json", Serper: "/serper/account"}[engine]
    assert sorted(p.split("?")[0] for p, *_ in server.log) == sorted([account, "/read", "/v1/models"])
    status = {SerpApi: "401", Serper: "403"}[engine]
    names = (engine.key, *KEYS[2:])
    for name, words in zip(names, (f"{engine.__name__} {status}", "reader 401", "summariser 401"), strict=True):
        with monkeypatch.context() as patch:
            patch.setenv(name, "not-the-key")
            message = refused(open_search, cfg)
            assert all(word in message for word in words.split()) and "not-the-key" not in message
        with monkeypatch.context() as patch:
            patch.setenv(name, SECRETS[0] + "\n" + SECRETS[1])
            assert name in refused(open_search, cfg)
    open_search(dataclasses.replace(cfg, search_budget=6000))
    assert "5,958 searches" in capfd.readouterr().err
    down = dataclasses.replace(cfg, search_engine=f"{server.engine}=http://127.0.0.1:9")
    assert "connection" in refused(open_search, down).lower()


def test_a_key_of_another_search_engine_is_recognised(server, engine, monkeypatch):
    """In place of the engine's, missing, or under the other's name; no value is shown."""
    cfg = Config(**settings(server))
    name, other = next(pair for pair in search_live.ENGINES.items() if pair[1] is not engine)
    mine, others = "0aF9" * (engine.key_digits // 4), "1bE8" * (other.key_digits // 4)
    for given, of_other, words in (
        (None, None, ()),
        (None, others, (f"there is {other.key}", f"--search_engine {name}")),
        (None, "unlike-either", (f"there is {other.key}", f"--search_engine {name}")),
        (None, mine, (f"in {other.key}", f"name it {engine.key}")),
        (others, None, (f"key of {other.site}", f"name it {other.key}", f"--search_engine {name}")),
        (others, others, (f"key of {other.site}", f"--search_engine {name}")),
        (mine, others, ("HTTP 40",)),  # a wrong one of the right form
    ):
        for variable, value in ((engine.key, given), (other.key, of_other)):
            monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable, raising=False)
        message = refused(open_search, cfg)
        assert all(word in message for word in (*words, engine.key)) and mine not in message and others not in message
        assert ("form of a key" in message) == any("key of" in word or "name it" in word for word in words)
        assert ("search_engine" in message) == any("search_engine" in word for word in words)


def test_images_without_an_address_are_refused_at_start_up(server):
    questions = [question(0), dataclasses.replace(question(1), image_url="https://a.example/b.jpg")]
    bytes_only = Config(**settings(server, image_host=""))
    message = refused(search.check_questions, questions, bytes_only)
    assert "1 of 2" in message and "--image_host" in message and "command" in message
    for changes in (
        dict(image_host="https://x.example"), dict(image_host="up"), dict(tool_limits=("image_search=0",)),
    ):  # fmt: skip
        search.check_questions(questions, dataclasses.replace(bytes_only, **changes))
    search.check_questions(questions[1:], bytes_only)
    search.check_questions(questions, Config())


def test_searches_are_estimated_before_a_run(monkeypatch):
    monkeypatch.setattr(SerpApi, "prices", {"image_search": 0.02, "text_search": 0.01})
    assert search.estimate(100, Config()) == ""
    line = search.estimate(100, Config(search="live"))
    assert "at most 200 searches" in line and "4.00" in line and "no budget" in line
    assert "ends them earlier" in search.estimate(100, Config(search="live", search_budget=199))
    assert "within" in search.estimate(100, Config(search="live", search_budget=200))
    assert "100 searches" in search.estimate(100, Config(search="live", max_turns=2))
    assert "0.60 at 0.003 each" in search.estimate(100, Config(search="live", search_engine="serper"))


def test_pictures_are_written_under_the_names_that_image_search_asks_for(tmp_path, server):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt": [{"role": "user", "content": "who?"}],
            "reward_model": {"ground_truth": "bako"},
            "images": [{"bytes": b}],
        }
        for b in (picture(1), picture(2, format="JPEG"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    search_main.main(["images", "--files", str(tmp_path / "q.parquet"), "--out", str(tmp_path / "out")])
    base = live(server)
    for n, row in enumerate(rows):
        url = base.public_url(IMAGE, Question("q", "", images=(row["images"][0]["bytes"],)), Job(1))
        name = url.removeprefix("https://pictures.example/")
        assert name.endswith((".png", ".jpg")[n])
        assert (tmp_path / "out" / name).read_bytes() == row["images"][0]["bytes"]
    with pytest.raises(InputError, match="command"):
        search_main.main(["sing"])
    with pytest.raises(InputError, match="--files"):
        search_main.main(["images"])


# --------------------------------------------------------------------------------------------- record, replay


def record(server, path, **changes):
    return open_search(Config(**settings(server, search="record", search_cache=str(path), **changes)))


def replay(path, **changes):
    return open_search(Config(search="replay", search_cache=str(path), **changes))


TWO = {"tool_results": ("image_search=3", "text_search=2")}
TURNS = [
    "<reason>?</reason><search><img></search>",
    "<reason>?</reason><text_search>{}</text_search>",
    "<reason>!</reason><answer>bako</answer>",
]


def episodes(search, folder, cfg):
    """Conversations of twelve questions, three samples each, that search by image and by words."""
    chat = Chat(folder, dataclasses.replace(cfg, max_tokens=900, max_tokens_per_turn=100))
    questions = [question(n) for n in range(12)]
    number = {chat.picture(q.images[0]).key: n for n, q in enumerate(questions)}

    def script(prompt, images, sampling):
        n = number[images[0].key]
        return TURNS[prompt.count("<|im_start|>assistant") - 1].format("nothing" if n == 3 else f"founder {n}")

    return run(questions, ScriptedEngine(chat, script), search, chat, chat.cfg, samples=3)


@pytest.mark.parametrize("engine", search_live.ENGINES)
def test_record_then_replay_gives_identical_episodes_with_the_server_gone(tmp_path, folder, cfg, monkeypatch, engine):
    monkeypatch.setattr(Client, "retries", 0)
    path = tmp_path / "c.sqlite"
    with LocalWeb(lambda path, _: "500" if "founder 7" in path or "-2.jpg" in path else None) as server:
        server.engine = engine
        search = record(server, path, **TWO)
        first = episodes(search, folder, cfg)
        asked = len(server.searched())
        assert asked <= 12 + 12 + 2  # one for each image and query, however many samples; errors are tried again
        search.cache.close()
    again = episodes(replay(path, search_engine=engine, **TWO), folder, cfg)
    assert {r.status for e in first for _, r in e.calls} == {"ok", "no_results", "error"}
    for a, b in zip(first, again, strict=True):
        assert (a.tokens, a.sampled, a.calls, a.stop) == (b.tokens, b.sampled, b.calls, b.stop)
        assert [p.data for p in a.images] == [p.data for p in b.images]
        for p, q in zip(a.images, b.images, strict=True):
            assert bool((a.chat.pixels([p]) == b.chat.pixels([q])).all())
    used = [r.usage for e in again for _, r in e.calls]
    assert all(u == Usage(cached=1) for u in used)


def test_a_miss_in_a_replay_is_an_error_that_says_so(server, tmp_path):
    path = tmp_path / "c.sqlite"
    record(server, path).search(FOUNDER, question())
    search = replay(path)
    assert search.search(FOUNDER, question()).status == "ok"
    engines = [search.request(call, question())["engine"] for call in (IMAGE, FOUNDER)]
    assert engines == ["google_lens", "google"]  # as in caches from before there was another engine
    others = [TWO, {"search_language": "fr"}, {"summarizer_url": "http://x/v1"}, {"search_engine": "serper"}]
    for call, changes in ((IMAGE, {}), (Call("text_search", "?"), {}), *((FOUNDER, other) for other in others)):
        result = replay(path, **changes).search(call, question())
        assert (result.status, result.error_kind) == ("error", "not_recorded") and "c.sqlite" in result.error
    assert search.search(Call("text_search", " "), question()).error_kind == "bad_call"
    with pytest.raises(InputError, match="no such search cache"):
        replay(tmp_path / "none.sqlite")


def test_a_recording_finds_what_it_has_and_tries_errors_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "retries", 0)
    search = record(server, tmp_path / "c.sqlite")
    server.fault = only("/search.json", "500", times=1)
    assert search.search(FOUNDER, question()).error_kind == "server"
    assert replay(tmp_path / "c.sqlite").search(FOUNDER, question()).error_kind == "server"
    found = search.search(FOUNDER, question())
    assert found.status == "ok" and found.usage.searches == 1
    kept = search.search(FOUNDER, question())
    assert kept == found and kept.usage == Usage(cached=1)
    server.fault = lambda *_: None
    first = search.search(IMAGE, question())
    assert [search.search(IMAGE, question()), replay(tmp_path / "c.sqlite").search(IMAGE, question())] == [first] * 2
    stats = search.cache.stats()
    assert (stats["results"], stats["found"], stats["hit_rate"]) == (2, 2, 0.5)  # the replays did not count


def test_calls_that_ask_the_same_at_once_cost_one_search(server, tmp_path):
    server.fault = lambda *_: time.sleep(0.05)
    search = record(server, tmp_path / "c.sqlite")
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: search.search(FOUNDER, question()), range(16)))
    assert len(set(results)) == 1 and sum("/search.json" in p for p, *_ in server.log) == 1
    assert sum(r.usage.cached for r in results) == 15 and sum(r.usage.searches for r in results) == 1


def test_a_call_that_comes_when_another_is_done_costs_nothing(server, tmp_path):
    """However late it comes after the other began: what is kept is looked up when nobody else asks the same."""
    search = record(server, tmp_path / "c.sqlite")
    looked, get = [], search.cache.get

    def slow(*args, **options):
        looked.append(get(*args, **options))
        time.sleep(0.1)
        return looked[-1]

    search.cache.get = slow
    with ThreadPoolExecutor(8) as pool:
        futures = []
        for _ in range(8):
            futures.append(pool.submit(search.search, FOUNDER, question()))
            time.sleep(0.05)
        results = [future.result() for future in futures]
    assert sum("/search.json" in p for p, *_ in server.log) == 1 and looked.count(None) == 1
    assert len(set(results)) == 1 and sum(r.usage.searches for r in results) == 1


def test_a_call_with_a_picture_of_its_own(server, tmp_path):
    """A part of a picture, say: shown from where a command makes it public, not from the question's URL, kept under its
    own bytes, and carried to the service. The folder of the questions' pictures does not hold it."""
    known = dataclasses.replace(question(), image_url="https://museum.example/a.jpg")
    crop = Call("image_search", picture="img_1", box=(0.0, 250.0, 500.0, 1000.0), image=picture(9))
    for about in (known, question(images=2)):
        result = live(server).search(crop, about)
        assert (result.error_kind, result.usage.searches) == ("no_url", 0) and "--image_host" in result.error
    whole = dataclasses.replace(crop, box=None, image=known.images[0])  # named, but the question's own
    assert live(server).search(whole, question()).status == "ok"
    server.log.clear()
    (tmp_path / "up.py").write_text("import sys; print('https://up.example/' + sys.argv[1].split('/')[-1])")
    host = f"{sys.executable} {tmp_path / 'up.py'}"
    service = Service(record(server, tmp_path / "c.sqlite", image_host=host))
    try:
        search = open_search(Config(search=service.url))
        first, whole = search.search(crop, known), search.search(IMAGE, known)
    finally:
        service.close()
    hidden = hashlib.sha256(picture(9)).hexdigest()
    asked = [path for path, *_ in server.log if "/search.json" in path]
    assert f"up.example%2F{hidden}.png" in asked[0] and "museum.example" in asked[1] and len(asked) == 2
    there = replay(tmp_path / "c.sqlite")
    assert [there.search(call, known) for call in (crop, IMAGE)] == [first, whole]
    assert there.search(dataclasses.replace(crop, image=picture(8)), known).error_kind == "not_recorded"
    assert there.search(crop, Question("q", "no picture of its own")) == first


def test_the_service_hands_every_part_of_a_call_on():
    calls = []

    class Listening:
        def search(self, call, about):
            calls.append((call, call.image, about.images, about.image_url, about.data_id))
            return Result("ok", (Hit("t", "u", "x", picture(3), full_size=True),))

    service = Service(Listening())
    crop = Call("image_search", picture="img_2", box=(1.0, 2.0, 3.0, 4.5), url="https://x.example/a", image=picture(9))
    known = dataclasses.replace(question(), image_url="https://a.example/b.jpg", data_id="d")
    try:
        results = [RemoteSearch(Config(search=service.url)).search(call, known) for call in (crop, IMAGE, FOUNDER)]
    finally:
        service.close()
    rest = (known.image_url, "d")
    assert calls == [(crop, picture(9), (), *rest), (IMAGE, None, known.images, *rest), (FOUNDER, None, (), *rest)]
    assert results == [Listening().search(IMAGE, known)] * 3 and results[0].hits[0].full_size


@pytest.mark.parametrize("tool", ["video_search", "text", ""])
def test_a_tool_that_is_not_known_is_a_typed_result_everywhere(server, tmp_path, tool):
    recording = record(server, tmp_path / "c.sqlite")
    service = Service(recording)
    try:
        searches = [
            recording.inner,
            recording,
            replay(tmp_path / "c.sqlite"),
            RemoteSearch(Config(search=service.url)),
        ]
        server.log.clear()
        for search in searches:
            result = search.search(Call(tool, "who?", image=picture(1)), question())
            assert (result.status, result.error_kind) == ("error", "bad_call") and repr(tool) in result.error
    finally:
        service.close()
    assert not server.log and recording.cache.stats()["results"] == 0


def test_what_cannot_be_kept_is_an_error(server, tmp_path):
    search = record(server, tmp_path / "c.sqlite")
    with search.cache._connection() as db:
        db.execute("DROP TABLE images")
    assert search.search(IMAGE, question()).error_kind == "index"
    search.cache.close()
    with pytest.raises(ValueError, match="closed"):
        search.search(IMAGE, question())


# ------------------------------------------------------------------------------------------------ visits of pages

PAGE = "https://pages.example/4/founders"


def visit(url=PAGE, goal="who is the founder?"):
    return Call("visit", goal, url=url)


def test_a_visit_reads_the_page_that_it_names(server, monkeypatch):
    """For its goal: the sentences that fit it, or what the summariser says of it. Without a goal: its beginning."""
    search = live(server, search_budget=1)
    result = search.search(visit(f" {PAGE}\n"), question())
    text = "# Page 4\nIt is about founders. The founder is F4."
    assert result == Result("ok", (Hit("Page 4", PAGE, "It is about founders. The founder is F4."),))
    used = result.usage
    assert (used.searches, used.pages, used.cost) == (0, 1, 1000 * search_live.READER_PRICE / 1e6)
    assert search.spent == 0 and [path for path, *_ in server.log] == ["/read"] and server.log[0][2] == {"url": PAGE}
    (hit,) = search.search(visit(goal=" "), question()).hits
    assert hit.text == " ".join(text.split())
    told = live(server, **summarized(server))
    (hit,), used = (result := told.search(visit(), question())).hits, result.usage
    assert (hit.title, hit.text) == ("Page 4", "Sentence 0. Sentence 1. Sentence 2. Sentence 3. Sentence 4.")
    assert used.tokens == 200 and "who is the founder?" in str(server.log[-1][2])
    assert told.search(visit(goal=""), question()).hits[0].text == " ".join(text.split())
    server.fault = lambda path, number: "evil"
    (hit,) = search.search(visit(), question()).hits
    assert len(hit.text) <= 500 * PAGE_SENTENCES and "\x00" not in hit.text


def test_a_visit_is_recorded_under_page_goal_and_how_it_is_read(server, tmp_path):
    path = tmp_path / "c.sqlite"
    recording = record(server, path)
    found = recording.search(visit(), question())
    assert found.usage.pages == 1 and recording.search(visit(goal="who is\tthe founder? "), question()) == found
    request = recording.request(visit(), question())
    assert (request["kind"], request["engine"], request["url"]) == ("page", "reader", PAGE)
    there = replay(path, search_engine="serper")
    assert there.search(visit(), question()) == found and there.search(visit(), question()).usage == Usage(cached=1)
    for call in (visit(PAGE + "?a"), visit(goal="else"), visit(goal=""), visit(PAGE.replace("https", "http"))):
        assert there.search(call, question()).error_kind == "not_recorded"
    summary = {"summarizer_url": "http://x/v1"}
    assert replay(path, **summary).search(visit(), question()).error_kind == "not_recorded"
    recording.search(visit(goal=""), question())
    assert replay(path, **summary).search(visit(goal=""), question()).status == "ok"  # nothing was to be summarised
    assert "page ok" in recording.cache.stats()["counts"]


@pytest.mark.parametrize(
    "fault, kind",
    [("page", "refused"), ("500", "server"), ("hang", "timeout"), ("html", "bad_response"), ("huge", "bad_response")],
)
def test_a_page_that_cannot_be_read_is_typed(server, monkeypatch, fault, kind):
    hurry(monkeypatch, retries=1, read_timeout=0.2)
    server.fault = lambda path, number: fault
    assert live(server, search_deadline=3.0).search(visit(), question()).error_kind == kind


LINKS = {  # what the reader is asked for, None: nothing
    None: [
        "", " ", "x", "nauru.example", "/etc/passwd", "//a.example/", "javascript:alert(1)", "file:///etc/passwd",
        "data:text/html,<b>", "ftp://a.example/", "gopher://a.example/", "mailto:a@a.example", "about:blank", "http:",
        "http://", "http:///", "https://?q", "http://#", "ws://a.example/", "http://a.example:99999/", "http://[::1",
        "http://a.example:port/", "https://user:word@a.example/", "https://google.com@10.0.0.1/", "http://localhost/",
        "http://LOCALHOST.:80/", "http://127.0.0.1:8000/v1", "http://127.1/", "http://2130706433/", "http://0x7f.1/",
        "http://0177.0.0.1/", "http://0/", "http://10.1.2.3/", "http://192.168.0.1/", "http://172.16.0.1/", "http://[::1]/",
        "http://169.254.169.254/latest/meta-data", "http://[fd00::1]/", "http://[::ffff:10.0.0.1]/", "http://router/",
        "http://metadata.google.internal./", "http://①②⑦.0.0.1/", "http://a。local/", "http://a.example/\x00",
        "http://a.example/a\nb", "http://a.ex\tample/", "http://a.example/\ud83d", "https://a.example/" + "x" * 50_000,
        "http://.example/", "https://bücher。example/", "http://%31%32%37.0.0.1/", "http://%00%31/", "http://[64:ff9b::a00:1]/",
        "<img>", "img_1", "'; DROP TABLE docs",
    ],
    "https://a.example/": ["https://a.example", "  https://a.example/ ", "HTTPS://A.Example/"],
    "https://xn--bcher-kva.example/": ["https://bücher.example", "https://xn--bcher-kva.example/", "https://BÜCHER.example"],
    "https://a.example/%E2%82%AC%20x": ["https://a.example/€ x", "https://a.example/%E2%82%AC%20x"],
    "https://a.example:8443/b?c=d#e": ["https://a.example:8443/b?c=d#e"],
    "http://8.8.8.8/": ["http://8.8.8.8"],
}  # fmt: skip


@pytest.mark.parametrize("link, asked", [(link, asked) for asked, links in LINKS.items() for link in links])
def test_every_link_ends_typed(server, tmp_path, link, asked):
    """Offline nothing is found under it; live it is refused, or the reader is asked for it; so it is by the service."""
    build(tmp_path / "i.sqlite", [{"title": "a", "text": "b", "url": u} for u in ("", "https://b.example/")])
    with closing(search_index.SearchDB(tmp_path / "i.sqlite")) as db:
        result = search_index.OfflineSearch(db).search(visit(link), question())
        assert result.status == "no_results" or (not link.strip() and result.error_kind == "bad_call")
    service = Service(record(server, tmp_path / "c.sqlite"))
    try:
        for search in (live(server), RemoteSearch(Config(search=service.url))):
            server.log.clear()
            result = search.search(visit(link), question())
            assert [payload["url"] for _, _, payload in server.log] == ([asked] if asked else [])
            assert (result.status, result.error_kind) == (("ok", "") if asked else ("error", "bad_call"))
    finally:
        service.close()


# -------------------------------------------------------------------------------------------------- the service


class Service:
    """`python -m search serve` in threads of this process."""

    def __init__(self, search, address="127.0.0.1:0"):
        self.server = SearchServer(address, search)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_the_service_gives_the_same_results(server, tmp_path):
    service = Service(record(server, tmp_path / "c.sqlite", search_budget=3))
    search = open_search(Config(search=service.url))
    try:
        assert isinstance(search, RemoteSearch)
        here = [
            search.search(call, question())
            for call in (IMAGE, FOUNDER, Call("text_search", "nothing"), Call("text_search", " "))
        ]
        there = replay(tmp_path / "c.sqlite")
        assert here == [
            there.search(call, question())
            for call in (IMAGE, FOUNDER, Call("text_search", "nothing"), Call("text_search", ""))
        ]
        assert here[0].usage.searches == 1 and search.search(IMAGE, question()).usage == Usage(cached=1)
        assert search.search(Call("text_search", "one more"), question()).error_kind == "budget"  # one for all clients
    finally:
        service.close()


def test_a_restart_of_the_service_costs_retries_not_calls(server, tmp_path):
    inner = record(server, tmp_path / "c.sqlite")
    service = Service(inner)
    address = service.url.removeprefix("http://")
    search = open_search(Config(search=service.url))
    results = []
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(search.search, Call("text_search", f"q{n % 5}"), question()) for n in range(20)]
        service.close()
        futures += [pool.submit(search.search, Call("text_search", f"q{n % 5}"), question()) for n in range(5)]
        time.sleep(0.2)
        service = Service(inner, address)
        results = [future.result(30) for future in futures]
    service.close()
    assert {r.status for r in results} == {"ok"}


def test_the_service_refuses_nonsense_and_goes_on(server, tmp_path):
    service = Service(record(server, tmp_path / "c.sqlite"))
    try:
        call = {"tool": "image_search", "query": "", "picture": "", "box": None, "image": None}
        about = {"image": None, "image_url": None, "data_id": None}
        odd = [{"call": {**call, name: value}, "question": about} for name, value in (
            ("tool", 3), ("image", "?"), ("image", 3), ("query", None), ("box", 3), ("box", ["x"]), ("colour", "red"),
            ("box", [10**400]), ("box", {"0": 1}), ("query", ["x"]), ("tool", "x" * 50_000), ("picture", "\ud83d"),
            ("url", 3), ("url", None), ("url", "x" * 50_000), ("url", "\ud83d"),
        )]  # fmt: skip
        odd += [
            {"call": call, "question": {**about, "image": "?"}},
            {"call": call, "question": {**about, "data_id": 3}},
            {"call": call, "question": {**about, "data_id": "\udc00"}},
            {"call": call, "question": {**about, "image_url": "x" * 10**6}},
        ]
        odd += [{"call": call}, {"call": [], "question": about}]
        for body in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000, *(json.dumps(o).encode() for o in odd)):
            with closing(socket.create_connection(service.server.server_address, 5)) as raw:
                raw.sendall(b"POST /search HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                assert raw.makefile("rb").readline().split()[1] == b"400"
        assert service.server.held == 0
        search = RemoteSearch(Config(search=service.url))
        assert search.search(IMAGE, Question("q", "", images=(b"no picture",))).error_kind == "bad_call"
        assert search.search(FOUNDER, question()).status == "ok"
    finally:
        service.close()


POST = b"POST /search HTTP/1.0\r\nContent-Length: %d\r\n\r\n"
HEALTH = b"GET /health HTTP/1.0\r\n\r\n"
LONG = {"tool": "text_search", "query": "long " * 10**6, "picture": "", "box": None, "image": None}
LONG = json.dumps({"call": LONG, "question": {"image": None, "image_url": None, "data_id": None}}).encode()


def ask_raw(service, head, body=b""):
    """The status line of the service's answer to a request, b"" without one."""
    with closing(socket.create_connection(service.server.server_address, 30)) as raw:
        try:
            raw.sendall(head + body)
            return raw.makefile("rb").readline()
        except OSError:
            return b""


@contextmanager
def two_calls_under_way():
    """(a service whose search is answering two long requests, go on with them, a thread pool, the queries so far)."""
    inside, go, queries = threading.Semaphore(0), threading.Event(), []

    class Slow:
        def search(self, call, about):
            queries.append(call.query)
            inside.release()
            go.wait(30)
            return Result("no_results")

    service = Service(Slow())
    try:
        with ThreadPoolExecutor(6) as pool:
            two = [pool.submit(ask_raw, service, POST % len(LONG), LONG) for _ in range(2)]
            assert inside.acquire(timeout=20) and inside.acquire(timeout=20)
            yield service, go.set, pool, queries
            go.set()
            assert all(b" 200 " in future.result(30) for future in two)
        assert wait_until(lambda: service.server.held == 0)
    finally:
        go.set()
        service.close()


def test_what_clients_make_the_service_hold_is_bounded(monkeypatch):
    monkeypatch.setattr(search_service, "MAX_HELD", 2 * len(LONG) + 10)
    with two_calls_under_way() as (service, go_on, pool, queries):
        assert b" 400 " in ask_raw(service, POST % (search_service.MAX_REQUEST + 1))
        assert b" 503 " in ask_raw(service, POST % len(LONG))
        assert service.server.held == 2 * len(LONG) and max(map(len, queries)) <= 4000
        third = pool.submit(RemoteSearch(Config(search=service.url)).search, FOUNDER, question())
        time.sleep(0.3)
        assert not third.done()
        go_on()
        assert third.result(60).status == "no_results"  # it came again


def test_connections_beyond_the_service_s_limit_wait(monkeypatch):
    monkeypatch.setattr(search_service, "MAX_CONNECTIONS", 2)
    with two_calls_under_way() as (service, go_on, pool, _):
        waiting = pool.submit(ask_raw, service, HEALTH)
        time.sleep(0.3)
        assert not waiting.done()
        go_on()
        assert b" 200 " in waiting.result(30)


def test_a_request_has_a_time_to_arrive(monkeypatch):
    monkeypatch.setattr(search_service, "ARRIVAL", 0.5)
    with two_calls_under_way() as (service, *_):
        started = time.monotonic()
        for dripping in (b"POST /sea", POST % 100, HEALTH[:-2]):
            assert ask_raw(service, dripping) == b""
        assert time.monotonic() - started < 15  # and those that have arrived are answered


def test_a_picture_too_large_for_the_service_is_not_sent():
    large = dataclasses.replace(question(), images=(bytes(search_service.MAX_PICTURE + 1),))
    result = RemoteSearch(Config(search="http://127.0.0.1:9")).search(IMAGE, large)
    assert result.error_kind == "bad_call" and "bytes" in result.error


@pytest.mark.parametrize(
    "changes",
    [{"status": 3}, {"error": None}, {"hits": [1]}, {"hits": None}, {"usage": {}}, {"usage": {"cost": 10**400}},
     {"usage": {"cost": float("nan")}}, {"usage": {"searches": "1"}}, {"error": "\ud83d"}, {"more": 1}],
)  # fmt: skip
def test_what_is_no_result_is_a_bad_response(changes):
    sent = result_to_json(Result("ok", (Hit("t", "u", "x", picture(3)),)))
    assert result_from_json(sent).status == "ok"
    usage = {**sent["usage"], **(changes["usage"] or {"odd": 1})} if "usage" in changes else sent["usage"]
    with pytest.raises(Failure, match="not a result"):
        result_from_json({**sent, **changes, "usage": usage})


def test_the_command_serves_until_ctrl_c(tmp_path):
    """`python -m search serve`, in a process of its own."""
    build(tmp_path / "i.sqlite", [{"title": "t", "text": "about founders"}])
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "search", "serve", "--address", address, f"--search_index={tmp_path}/i.sqlite"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it
    with subprocess.Popen(command, cwd=ROOT, **pipes, **heard) as process:
        try:
            assert process.stdout.readline() == f"serving search (offline) on http://{address}; Ctrl-C ends it\n"
            client = open_search(Config(search=f"http://{address}"))
            found = client.search(Call("text_search", "founders"), question())
            process.send_signal(signal.SIGINT)
            assert (process.wait(30), process.stderr.read()) == (130, "")
        finally:
            process.kill()  # a test that fails would wait for it
    assert [hit.title for hit in found.hits] == ["t"]


def test_serve_says_what_is_wrong(tmp_path):
    build(tmp_path / "i.sqlite")
    index = f"--search_index={tmp_path}/i.sqlite"
    for args, why in (
        (["--search", "http://127.0.0.1:9"], "cannot ask another"),
        (["--address", "nowhere", index], "address=nowhere: cannot listen"),
        (["--address", "127.0.0.1:99999", index], "cannot listen"),
        (["--addres", "127.0.0.1:99", index], "did you mean --address"),
        ([], "no such search index"),
    ):
        with pytest.raises(InputError, match=why):
            search_main.main(["serve", *args])


def test_no_service_is_one_line_at_start_up(server):
    """Nobody there; somebody else there."""
    with pytest.raises(InputError, match="python -m search serve"):
        RemoteSearch(Config(search="http://127.0.0.1:9")).check(0.3)
    with pytest.raises(InputError, match="404"):
        RemoteSearch(Config(search=server.url)).check()
    with pytest.raises(InputError, match="cannot listen"):
        SearchServer(server.host, None)


def test_calls_wait_for_their_turn_before_their_deadline_begins(server, monkeypatch):
    """At most CALLS at once over all ranks: others would spend their deadline in waiting for the provider's rate."""
    monkeypatch.setattr(search_live, "CALLS", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    search = live(server, search_deadline=0.5)
    running, most = [], []

    def slow(call, question, job):
        running.append(call)
        most.append(len(running))
        time.sleep(0.3)
        running.remove(call)
        assert job.left() > 0.01
        return []

    monkeypatch.setattr(search_live, "method_for", lambda *_: slow)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: search.search(FOUNDER, question()), range(4)))
    assert {r.status for r in results} == {"no_results"} and max(most) == 1
