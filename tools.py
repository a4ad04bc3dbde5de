"""Search, as the model asks for it and as it is answered.

The protocol: a turn of the model ends in one action,

    <search><img></search>                 search with the question's first image
    <text_search>query</text_search>       search with words
    <answer>the answer</answer>            no search: the conversation is over

`parse_call` reads the action; an object with `search(call, question) -> Result` answers it (`open_search` makes the one
that the configuration asks for):

    OfflineSearch   a local index                              --search offline
    WebSearch       the web: SerpApi (Google, Google Lens), pages through Jina Reader, a summariser    --search live
    CachedSearch    the same and every result kept             --search record
                    only what was kept                         --search replay
    RemoteSearch    a service that owns all that               --search_url

To search somewhere else, write another class with that method: it must be safe to call from many threads, and return
the failures one has to expect (no network, a broken picture) as `Result("error", error=..., error_kind=...)`: an error
must never look like an empty result.

    python tools.py serve --search record --search_cache cache.sqlite --serve_address 0.0.0.0:8100
    python tools.py images --files train.parquet --out DIR      # the questions' pictures, to be served at a public URL

Whoever can reach the service can spend its budget: let it listen on a private network only.
"""

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from tqdm import tqdm

from config import Config, InputError, parse, run_main
from data import Call, Hit, Question, Result, Usage, decode_image, load_questions, read_prompt
from searchdb import THUMBNAIL_SIDE, WEB_IMAGE_BYTES, SearchCache, SearchDB, canonical, request_key, web_thumbnail
from web import Client, Failure, Limit, Meter, clean, inline_text, is_web_url, passages, plain_text, sentences

KEYS = ("SERPAPI_API_KEY", "JINA_API_KEY", "SUMMARIZER_API_KEY")  # of the environment
MAX_SENTENCES = 5  # of a page's summary, as in the paper
MAX_JSON_BYTES = 8_000_000
MAX_TITLE, MAX_TEXT, MAX_QUERY = 300, 3000, 1000  # characters

# An action runs from an opening tag, the last if there are several, to the first closing tag after it, over lines too.
ACTIONS = {
    "image": re.compile(r"<search><img>()</search>"),
    "text": re.compile(r"<text_search>((?:(?!<text_search>).)*?)</text_search>", re.DOTALL),
    "answer": re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL),
}


def parse_call(text: str) -> Call | None:
    """The search that a turn of the model asks for; None if its last complete action is an answer, or if there is none.

    >>> parse_call("<reason>Whose flag?</reason> <text_search> flag of Nauru </text_search>")
    Call(kind='text', query='flag of Nauru')
    """
    kind, content = _last_action(text)
    return Call(kind, content.strip()) if kind in ("image", "text") else None


def has_answer(text: str) -> bool:
    """True if the last complete action of a turn is an answer."""
    return _last_action(text)[0] == "answer"


def _last_action(text: str) -> tuple[str | None, str]:
    """(kind, what is between its tags) of the complete action that ends last; (None, "") if there is none."""
    found = [(match.end(), kind, match[1]) for kind, action in ACTIONS.items() for match in action.finditer(text)]
    return max(found)[1:] if found else (None, "")


class OfflineSearch:
    """Searches in a local index. `search` may be called from any number of threads."""

    def __init__(self, db: SearchDB, *, image_results: int = 5, text_results: int = 5):
        """image_results, text_results: hits of a search, at most."""
        self.db = db
        self.image_results = image_results
        self.text_results = text_results

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call. What one has to expect to fail (the file, the picture) gives status "error"."""
        try:
            _check_call(call, question)
            hits = self._hits(call, question)
        except sqlite3.ProgrammingError:  # ours, not the file's
            raise
        except Failure as failure:
            return Result("error", error=str(failure), error_kind=failure.kind)
        except (InputError, sqlite3.DatabaseError) as error:
            kind = "bad_call" if isinstance(error, InputError) else "index"
            return Result("error", error=f"{type(error).__name__}: {error}", error_kind=kind)
        return Result("ok", hits=tuple(hits)) if hits else Result("no_results")

    def _hits(self, call: Call, question: Question) -> list[Hit]:
        if call.kind == "image":
            return self.db.image(question.images[0], self.image_results)
        return self.db.text(call.query, self.text_results)


def _check_call(call: Call, question: Question) -> None:
    """Raise Failure for a search that nobody can make."""
    if call.kind not in ("image", "text"):
        raise ValueError(f"no search of kind {call.kind!r}")
    if call.kind == "image" and not question.images:
        raise Failure("bad_call", "the question has no image")
    if call.kind == "text" and not clean(call.query, MAX_QUERY):
        raise Failure("bad_call", "the query is empty")


# ----------------------------------------------------------------------------------------------------- the web


class WebSearch:
    """Searches the web as it is now. `search` may be called from any number of threads, takes at most search_deadline
    seconds, and always returns a Result. Formats as their providers document them: serpapi.com/google-lens-api,
    serpapi.com/search-api, serpapi.com/search-errors, jina.ai/reader, and OpenAI's chat completions."""

    def __init__(self, cfg: Config):
        ranks = int(os.environ.get("WORLD_SIZE", 1))  # each has a share of what is limited for all
        self.cfg, self.prompt = cfg, summarizer_prompt(cfg)
        self.keys = {name: os.environ.get(name, "").strip() for name in KEYS}
        self.client = Client(
            cfg.connect_timeout, cfg.read_timeout, cfg.search_retries, cfg.retry_pause, cfg.allow_hosts
        )  # fmt: skip
        self.limits = {
            "serpapi": Limit(cfg.serpapi_in_flight, cfg.serpapi_per_second / ranks),
            "reader": Limit(cfg.reader_in_flight, cfg.reader_per_second / ranks),
            "summarizer": Limit(cfg.summarizer_in_flight, cfg.summarizer_per_second / ranks),
            "pictures": Limit(64),
        }
        self.budget = -(-cfg.search_budget // ranks)
        self.spent, self._lock = 0, threading.Lock()
        self._uploaded: dict[str, str] = {}

    def check(self) -> None:
        """Ask each provider once whether it takes its key. Raises InputError."""
        cfg, deadline = self.cfg, time.monotonic() + self.cfg.search_deadline
        if not self.keys["SERPAPI_API_KEY"]:
            raise InputError(f"search={cfg.search} needs a key of serpapi.com in the environment, SERPAPI_API_KEY")
        ask = partial(self.client.fetch_json, meter=Meter(), deadline=deadline, max_bytes=MAX_JSON_BYTES, ours=True)
        account = f"{cfg.serpapi_url}/account.json?{urlencode({'api_key': self.keys['SERPAPI_API_KEY']})}"
        try:
            left = ask(account, self.limits["serpapi"], what="SerpApi (SERPAPI_API_KEY)").get("total_searches_left")
            if self.keys["JINA_API_KEY"]:
                self._read("https://example.com", Meter(), deadline)
            if cfg.summarizer_url:
                self._check_summarizer(ask)
        except Failure as failure:
            raise InputError(f"search={cfg.search}: {self._redact(str(failure))}") from None
        if isinstance(left, int) and left < (cfg.search_budget or 1):
            wanted = f"search_budget is {cfg.search_budget:,}" if cfg.search_budget else "none can be made"
            print(f"warning: SerpApi's account has {left:,} searches left; {wanted}", file=sys.stderr)

    def _check_summarizer(self, ask):
        try:
            key, what = self.keys["SUMMARIZER_API_KEY"], "summariser (summarizer_url, SUMMARIZER_API_KEY)"
            ask(f"{self.cfg.summarizer_url}/models", self.limits["summarizer"], what=what, bearer=key)
        except Failure as failure:
            if "HTTP 404" not in str(failure) and "HTTP 405" not in str(failure):  # some do not list their models
                raise

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call, whatever happens: never an exception."""
        started, meter = time.monotonic(), Meter()
        deadline = started + self.cfg.search_deadline
        try:
            _check_call(call, question)
            hits = self._image(question, meter, deadline) if call.kind == "image" else self._text(call, meter, deadline)
            result = Result("ok", tuple(hits)) if hits else Result("no_results")
        except Failure as failure:
            result = Result("error", error=self._redact(str(failure)), error_kind=failure.kind)
        except Exception as error:  # hostile answers find mistakes in code; they are counted and end no rollout
            said = self._redact(f"{type(error).__name__}: {clean(str(error), 200)}")
            result = Result("error", error=said, error_kind="internal")
        return dataclasses.replace(result, usage=self._usage(meter, time.monotonic() - started))

    def _usage(self, meter, seconds):
        cfg, sums = self.cfg, meter.sums
        millions = (sums["page_tokens"] * cfg.price_reader + sums["tokens"] * cfg.price_summarizer) / 1e6
        cost = sums["searches"] * cfg.price_search + millions
        return Usage(
            sums["searches"], sums["pages"], sums["bytes"], sums["tokens"], cost=round(cost, 9), seconds=seconds
        )  # fmt: skip

    def _redact(self, text):
        for key in filter(None, self.keys.values()):
            text = text.replace(key, "***")
        return text

    def _spend(self):
        with self._lock:
            if self.budget and self.spent >= self.budget:
                raise Failure("budget", f"search_budget is used up ({self.budget} live searches)")
            self.spent += 1

    # -- pictures

    def _image(self, question, meter, deadline):
        picture = self.public_url(question, deadline)
        asked = {"engine": "google_lens", "type": "visual_matches", "url": picture, "hl": self.cfg.search_language}
        matches = self._ask_engine(asked, "visual_matches", ("title", "link", "thumbnail"), meter, deadline)

        def work(match):
            options = dict(what="thumbnail", max_bytes=WEB_IMAGE_BYTES, types=("image/*",))
            data = self.client.fetch(match["thumbnail"], self.limits["pictures"], meter, deadline, **options)
            try:
                data = web_thumbnail(data)
            except InputError as error:
                said = str(error).removeprefix("field images: ")
                raise Failure("bad_response", f"thumbnail: {said}") from None
            meter.add(pages=1)
            return Hit(match["title"], match["link"], image=data)

        return self._first(matches, self.cfg.image_results, work)

    def public_url(self, question: Question, deadline: float) -> str:
        """Where the search engine can see a question's first image. Raises Failure (no_url)."""
        if is_web_url(question.image_url):
            return question.image_url
        data = question.images[0]
        try:
            name = picture_name(data)
        except InputError as error:
            raise Failure("bad_call", str(error).removeprefix("field images: ")) from None
        if self.cfg.image_base_url:
            return f"{self.cfg.image_base_url.rstrip('/')}/{name}"
        if not self.cfg.image_upload:
            raise Failure("no_url", "the image is only bytes; --image_base_url or --image_upload makes it public")
        if name not in self._uploaded:
            self._uploaded[name] = self._upload(name, data, deadline)
        return self._uploaded[name]

    def _upload(self, name, data, deadline):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_bytes(data)
            command = [*shlex.split(self.cfg.image_upload), str(Path(folder) / name)]
            patience = max(0.1, deadline - time.monotonic())
            try:
                done = subprocess.run(command, capture_output=True, timeout=patience, stdin=subprocess.DEVNULL)
            except subprocess.TimeoutExpired:
                raise Failure("timeout", "image_upload: the command did not end in time") from None
            except OSError as error:
                raise Failure("no_url", f"image_upload: {error.strerror}") from None
        url = (done.stdout.decode(errors="replace").split() or [""])[-1]
        if done.returncode or not is_web_url(url):
            raise Failure("no_url", f"image_upload: exit code {done.returncode}, and no URL at the end of its output")
        return url

    # -- words

    def _text(self, call, meter, deadline):
        query = clean(call.query, MAX_QUERY)
        asked = {"engine": "google", "q": query, "hl": self.cfg.search_language}
        found = self._ask_engine(asked, "organic_results", ("title", "link"), meter, deadline)

        def work(result):
            page = self._read(result["link"], meter, deadline)
            if self.cfg.summarizer_url:
                text = self._summarize(query, result["title"], page, meter, deadline)
            else:
                text = passages(page, query, MAX_SENTENCES)
            return Hit(result["title"], result["link"], clean(text, MAX_TEXT))

        return self._first(found, self.cfg.text_results, work)

    def _read(self, url, meter, deadline):
        """A page as text, its first page_characters."""
        answer = self.client.fetch_json(
            self.cfg.reader_url, self.limits["reader"], meter, deadline, what="reader", max_bytes=MAX_JSON_BYTES,
            payload={"url": url}, bearer=self.keys["JINA_API_KEY"], ours=True,
        )  # fmt: skip
        data = answer.get("data")
        if not isinstance(data, dict) or not isinstance(data.get("content"), str):
            raise Failure("bad_response", "reader: no content")
        usage = data.get("usage")
        meter.add(page_tokens=_count(usage.get("tokens")) if isinstance(usage, dict) else 0)
        if "returned error" in str(data.get("warning")):  # of the page itself: what follows is an error page's text
            raise Failure("refused", f"reader: {clean(data['warning'], 100)}")
        # Four times as much is enough to find that many characters of text in; hostile pages are not parsed beyond.
        limit = self.cfg.page_characters
        page = clean(plain_text(data["content"][: 4 * limit]), limit)
        if not page:
            raise Failure("bad_response", "reader: an empty page")
        meter.add(pages=1)
        return page

    def _summarize(self, query, title, page, meter, deadline):
        values = {"query": query, "title": title, "page": page}
        content = re.sub(r"\{(query|title|page)\}", lambda hole: values[hole[1]], self.prompt)
        answer = self.client.fetch_json(
            f"{self.cfg.summarizer_url}/chat/completions", self.limits["summarizer"], meter, deadline,
            what="summariser", max_bytes=MAX_JSON_BYTES, bearer=self.keys["SUMMARIZER_API_KEY"], ours=True,
            payload={
                "model": self.cfg.summarizer_model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": 1024,
            },
        )  # fmt: skip
        usage = answer.get("usage")
        meter.add(tokens=_count(usage.get("total_tokens")) if isinstance(usage, dict) else 0)
        try:
            said = answer["choices"][0]["message"]["content"]
            summary = clean(plain_text(said.rpartition("</think>")[2][: 10 * MAX_TEXT]), 10 * MAX_TEXT)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failure("bad_response", "summariser: no message") from None
        if not summary or summary.startswith("<think>"):
            raise Failure("bad_response", "summariser: an empty message")
        return " ".join(sentences(summary)[:MAX_SENTENCES])

    # -- both

    def _ask_engine(self, asked, field, needed, meter, deadline):
        """What SerpApi lists under `field`: dictionaries whose `needed` entries are harmless text."""
        self._spend()
        query = urlencode({**asked, "api_key": self.keys["SERPAPI_API_KEY"]})
        answer = self.client.fetch_json(
            f"{self.cfg.serpapi_url}/search.json?{query}", self.limits["serpapi"], meter, deadline,
            what="SerpApi", max_bytes=MAX_JSON_BYTES, ours=True,
        )  # fmt: skip
        meta, error, found = answer.get("search_metadata"), answer.get("error"), answer.get(field, [])
        status = meta.get("status") if isinstance(meta, dict) else None
        if status == "Success" and isinstance(error, str) and "returned any results" in error:
            error, found = None, []  # documented as the way to say so
        if error is not None or status == "Error":
            raise Failure("server", f"SerpApi: {clean(error, 200) or 'no reason given'}")
        if status != "Success" or not isinstance(found, list):
            raise Failure("bad_response", "SerpApi: not in the documented form")
        meter.add(searches=1)
        rows = [_sound(row, needed) for row in found]
        if rows and not any(rows):
            raise Failure("bad_response", "SerpApi: no result in the documented form")
        return [row for row in rows if row]

    def _first(self, items, count, work):
        """work(item) of the first `count` items that succeed, in parallel, one that fails replaced by the next; in the
        items' order. Raises Failure if there are items and all fail."""
        hits, failures, rest = {}, [], iter(enumerate(items))
        with ThreadPoolExecutor(count) as pool:
            running = {pool.submit(work, item): n for n, item in islice(rest, count)}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                    n = running.pop(future)
                    try:
                        hits[n] = future.result()
                    except Failure as failure:
                        failures.append(failure)
                        running |= {pool.submit(work, item): n for n, item in islice(rest, 1)}
        if failures and not hits:
            kind = Counter(f.kind for f in failures).most_common(1)[0][0]
            example = next(f for f in failures if f.kind == kind)
            raise Failure(kind, f"none of {len(failures)} results could be had: {example}")
        return [hits[n] for n in sorted(hits)]


def _sound(row, needed):
    """The needed entries of a search engine's row, made harmless; None if it lacks one."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in needed):
        return None
    if not all(is_web_url(row[name]) for name in needed if name != "title"):
        return None
    return {name: clean(inline_text(row[name]), MAX_TITLE) if name == "title" else row[name] for name in needed}


def _count(number):
    return max(0, number) if isinstance(number, int) and not isinstance(number, bool) else 0


def summarizer_prompt(cfg: Config) -> str:
    """The request to the summariser. Raises InputError."""
    text = read_prompt(Path(cfg.summarizer_prompt))
    for hole in ("{query}", "{page}"):
        if hole not in text:
            raise InputError(f"{cfg.summarizer_prompt}: expected {hole}")
    return text


def picture_name(data: bytes) -> str:
    """The file name under which a picture is looked for at image_base_url: its sha256, and its format."""
    decode_image(data)
    format = Image.open(io.BytesIO(data)).format.lower()
    return f"{hashlib.sha256(data).hexdigest()}.{'jpg' if format in ('jpeg', 'mpo') else format}"


# ------------------------------------------------------------------------------------------------- kept results


class CachedSearch:
    """Keeps what `inner` finds and finds it again (record); without one, finds only what was kept (replay).

    Calls that ask the same while the first of them is under way wait for its answer: the conversations of a group cost
    one search. A kept error is what a replay answers; a recording tries again.
    """

    def __init__(self, cache: SearchCache, inner: WebSearch | None, cfg: Config):
        self.cache, self.inner, self.cfg = cache, inner, cfg
        self._version = hashlib.sha256(summarizer_prompt(cfg).encode()).hexdigest()[:16]
        self._pending: dict[str, Future] = {}
        self._lock = threading.Lock()

    def request(self, call: Call, question: Question) -> dict:
        """All that the answer to a call depends on, but the day: the key of the cache."""
        cfg = self.cfg
        if call.kind == "image":
            asked = {"image": hashlib.sha256(question.images[0]).hexdigest(), "engine": "google_lens"}
            asked |= {"k": cfg.image_results, "thumbnail_side": THUMBNAIL_SIDE}
        else:
            asked = {"query": clean(call.query, MAX_QUERY), "engine": "google", "k": cfg.text_results}
            asked |= {"characters": cfg.page_characters, "summarizer": "passages"}
            if cfg.summarizer_url:
                asked |= {"summarizer": cfg.summarizer_model, "prompt": self._version}
        return {"kind": call.kind, "language": cfg.search_language, **asked}

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call, kept or new; without an inner search what was not kept is an error that says so."""
        try:
            _check_call(call, question)
            request = self.request(call, question)
            kept = self._kept(request, question)
            if kept and (self.inner is None or kept.status != "error"):
                return dataclasses.replace(kept, usage=Usage(cached=1))
            if self.inner is None:
                raise Failure("not_recorded", f"nothing is kept in {self.cache.path.name} for this {call.kind} search")
            return self._once(request_key(canonical(request)), request, call, question)
        except Failure as failure:
            return Result("error", error=str(failure), error_kind=failure.kind)
        except sqlite3.ProgrammingError:  # ours, not the file's
            raise
        except sqlite3.DatabaseError as error:
            return Result("error", error=f"{type(error).__name__}: {error}", error_kind="index")

    def _kept(self, request, question):
        kept = self.cache.get(request, count=self.inner is not None)
        if kept is None and request["kind"] == "image" and question.data_id:
            kept = self.cache.get({"data_id": question.data_id})  # from FVQA's own cache
            kept = kept and dataclasses.replace(kept, hits=kept.hits[: self.cfg.image_results])
        return kept

    def _once(self, key, request, call, question):
        with self._lock:
            pending = self._pending.get(key)
            first = pending is None
            if first:
                pending = self._pending[key] = Future()
        if not first:
            return dataclasses.replace(pending.result(), usage=Usage(cached=1))
        try:
            if kept := self.cache.get(request, count=False):  # by one that was under way when this call looked
                if kept.status != "error":
                    pending.set_result(kept)
                    return dataclasses.replace(kept, usage=Usage(cached=1))
            found = self.inner.search(call, question)
            result = dataclasses.replace(self.cache.put(request, found), usage=found.usage)
            pending.set_result(result)
            return result
        except BaseException as error:
            pending.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._pending[key]


# ------------------------------------------------------------------------------------------------- the service


class RemoteSearch:
    """Asks a running `tools.py serve`. While that is restarted, calls try again until their deadline."""

    def __init__(self, cfg: Config):
        self.url, self.limit = cfg.search_url.rstrip("/"), Limit(cfg.tool_threads)
        self.patience = 2 * cfg.search_deadline + 60  # the service's own deadline, and a restart
        self.client = Client(cfg.connect_timeout, cfg.search_deadline + 30, 1000, cfg.retry_pause)

    def check(self, patience: float = 60.0) -> None:
        """Raise InputError unless a service answers within so many seconds."""
        try:
            self._ask("/health", patience)
        except Failure as failure:
            raise InputError(f"search_url={self.url}: {failure}; `python tools.py serve` starts one") from None

    def search(self, call: Call, question: Question) -> Result:
        """The service's answer, or why there is none."""
        image = base64.b64encode(question.images[0]).decode() if call.kind == "image" and question.images else None
        payload = {"kind": call.kind, "query": clean(call.query, MAX_QUERY), "image": image}
        payload |= {"image_url": question.image_url, "data_id": question.data_id}
        try:
            return result_from_json(self._ask("/search", self.patience, payload))
        except Failure as failure:
            return Result("error", error=str(failure), error_kind=failure.kind)

    def _ask(self, path, patience, payload=None):
        options = dict(what="search service", max_bytes=8 * MAX_JSON_BYTES, payload=payload, ours=True)
        return self.client.fetch_json(self.url + path, self.limit, Meter(), time.monotonic() + patience, **options)


def result_to_json(result: Result) -> dict:
    """A result as the service sends it."""
    hits = [{**vars(hit), "image": hit.image and base64.b64encode(hit.image).decode()} for hit in result.hits]
    return {**vars(result), "hits": hits, "usage": dataclasses.asdict(result.usage)}


def result_from_json(sent: dict) -> Result:
    """What `result_to_json` made. Raises Failure (bad_response)."""
    try:
        hits = tuple(Hit(**{**hit, "image": hit["image"] and base64.b64decode(hit["image"])}) for hit in sent["hits"])
        return Result(**{**sent, "hits": hits, "usage": Usage(**sent["usage"])})
    except (KeyError, TypeError, ValueError):
        raise Failure("bad_response", "search service: not a result; is it of another version?") from None


class SearchServer(ThreadingHTTPServer):
    """A search behind HTTP: POST /search {kind, query, image (base64), image_url, data_id}, GET /health."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 1024, True

    def __init__(self, address: str, search):
        host, _, port = address.rpartition(":")
        self.search, self.calls = search, Counter()
        try:
            super().__init__((host, int(port)), _Handler)
        except OSError as error:
            raise InputError(f"serve_address={address}: cannot listen there ({error.strerror})") from None


class _Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds of silence of a client

    def do_GET(self):
        self._send({"calls": dict(self.server.calls)} if self.path == "/health" else None)

    def do_POST(self):
        try:
            length = int(self.headers.get("Content-Length", -1))
            if self.path != "/search" or not 0 <= length <= 8 * MAX_JSON_BYTES:
                raise ValueError
            call, question = _call_from_json(json.loads(self.rfile.read(length)))
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._send(None, 400)
        result = self.server.search.search(call, question)
        self.server.calls[result.error_kind or result.status] += 1
        self._send(result_to_json(result))

    def _send(self, answer, status=404):
        body = json.dumps(answer or {"error": "not understood"}).encode()
        self.send_response(200 if answer is not None else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Queries are nobody's business."""


def _call_from_json(sent):
    image, url, id = sent["image"], sent["image_url"], sent["data_id"]
    if sent["kind"] not in ("image", "text") or not all(isinstance(v, str | None) for v in (image, url, id)):
        raise ValueError
    images = () if image is None else (base64.b64decode(image, validate=True),)
    question = Question(id="asked", text="", images=images, image_url=url, data_id=id)
    return Call(sent["kind"], str(sent["query"])), question


# --------------------------------------------------------------------------------------------------- start-up


def open_search(cfg: Config, index: str | Path = ""):
    """The search that the configuration asks for; index: the offline one's file. Raises InputError if a file or a key
    is missing or wrong, or nobody answers."""
    if cfg.search_url:
        search = RemoteSearch(cfg)
        search.check()
        return search
    if cfg.search == "offline":
        return OfflineSearch(SearchDB(index), image_results=cfg.image_results, text_results=cfg.text_results)
    web = WebSearch(cfg) if cfg.searches_web else None
    if web:
        web.check()
    if cfg.search == "live":
        return web
    return CachedSearch(SearchCache(cfg.search_cache, write=web is not None), web, cfg)


def check_questions(questions: list[Question], cfg: Config) -> None:
    """Raise InputError if image search would be live and could not be shown a question's image."""
    if not cfg.searches_web or not cfg.max_image_searches or cfg.image_base_url or cfg.image_upload:
        return
    hidden = sum(bool(q.images) and not is_web_url(q.image_url) for q in questions)
    if hidden:
        raise InputError(
            f"the images of {hidden} of {len(questions)} questions have no URL, and a live image search needs one: "
            "serve what `python tools.py images` writes and give its --image_base_url, or an --image_upload command "
            "(or --max_image_searches 0)"
        )


def estimate(conversations: int, cfg: Config) -> str:
    """What the searches of so many conversations may come to, at most, as a line; "" if none is live."""
    if not cfg.searches_web:
        return ""
    most = conversations * min(cfg.max_image_searches + cfg.max_text_searches, cfg.max_turns - 1)
    limit = f"search_budget={cfg.search_budget:,} ends them earlier" if 0 < cfg.search_budget < most else "no budget"
    limit = "within search_budget" if cfg.search_budget >= most else limit
    cost = f"{most * cfg.price_search:,.2f} at price_search={cfg.price_search}"
    return f"live search: at most {most:,} searches in {conversations:,} conversations, {cost}; {limit}"


def main(argv: list[str] | None = None) -> None:
    """`serve` and `images`; argv without the program's name. Raises InputError."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command not in ("serve", "images"):
        raise InputError("give a command: `python tools.py serve` or `python tools.py images`, then settings (--help)")
    cfg = parse(rest)
    _serve(cfg) if command == "serve" else _write_images(cfg)


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


if __name__ == "__main__":
    run_main(main)
