"""search/live.py"""

import dataclasses
import hashlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from chat import read_prompt
from config import Config, InputError
from data import Call, Hit, Question, Result, Usage, decode_image
from search.embedding import WEB_IMAGE_BYTES, web_thumbnail
from search.web import Client, Failure, Limit, Meter, clean, inline_text, is_web_url, passages, plain_text, sentences

KEYS = ("SERPAPI_API_KEY", "JINA_API_KEY", "SUMMARIZER_API_KEY")  # of the environment


MAX_SENTENCES = 5  # of a page's summary, as in the paper


MAX_JSON_BYTES = 8_000_000


MAX_TITLE, MAX_TEXT, MAX_QUERY = 300, 3000, 1000  # characters


def _check_call(call: Call, question: Question) -> None:
    """Raise Failure for a search that nobody can make."""
    if call.kind not in ("image", "text"):
        raise ValueError(f"no search of kind {call.kind!r}")
    if call.kind == "image" and not question.images:
        raise Failure("bad_call", "the question has no image")
    if call.kind == "text" and not clean(call.query, MAX_QUERY):
        raise Failure("bad_call", "the query is empty")


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
