"""Live search: a search engine finds pages and pictures, their texts and thumbnails are fetched at once.

A search with a picture shows the engine a public URL of it, and gives titles with thumbnails. A search with words reads
each page found through Jina Reader (jina.ai/reader), and gives the sentences that fit the query best, or what a
language model (OpenAI's chat completions) says that the page holds for it; a visit reads the one page that it names.
Keys are read from the environment and go nowhere but into requests. Every call ends in a typed result, within
search_deadline seconds.
"""

import dataclasses
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from pathlib import Path

from config import Config, InputError, need
from data import Call, Hit, Question, Result, Usage, decode_image, prompt_path, read_prompt
from search.calls import MAX_QUERY, Failure, failed, method_for, query_of, shared
from search.embedding import WEB_IMAGE_BYTES, web_thumbnail
from search.engine import ENGINES, MAX_TITLE, SearchEngine
from search.text import PAGE_SENTENCES, clean, inline_text, passages, plain_text, sentences
from search.web import IMAGE_TYPES, Client, Job, Limit, is_web_url, key_of, page_url, tokens_in
from tools import picture_of, results, spawn

READER_KEY, SUMMARIZER_KEY = "JINA_API_KEY", "SUMMARIZER_API_KEY"  # in the environment
CALLS = 128  # at once, over all ranks; others wait for their turn, and their deadline begins with it
READER_IN_FLIGHT, READER_PER_SECOND = 32, 8.0  # requests at once; begun a second, over all ranks
SUMMARIZER_IN_FLIGHT, PICTURES_IN_FLIGHT = 64, 64
READER_PRICE, SUMMARIZER_PRICE = 0.05, 0.0  # of a million tokens
PAGE_CHARACTERS = 30_000  # of a page are read
MAX_SENTENCES = 5  # of a page's summary, as in the paper
MAX_TEXT = 3000  # characters


class WebSearch:
    """Searches the web as it is now. `search` may be called from any number of threads."""

    def __init__(self, cfg: Config):
        ranks = int(os.environ.get("WORLD_SIZE", 1))  # each has a share of what is limited for all
        self.cfg, self.prompt, self.results = cfg, summarizer_prompt(), results(cfg)
        self.engine, self.summarizer_url = engine_of(cfg)(cfg, ranks), cfg.summarizer_url.rstrip("/")
        self.reader = Client("reader", Limit(READER_IN_FLIGHT, READER_PER_SECOND / ranks), key=key_of(READER_KEY))
        self.summarizer = Client("summariser", Limit(SUMMARIZER_IN_FLIGHT), key=key_of(SUMMARIZER_KEY))
        wanted = {"max_bytes": WEB_IMAGE_BYTES, "types": IMAGE_TYPES, "allow_hosts": cfg.allow_hosts}
        self.pictures = Client("thumbnail", Limit(PICTURES_IN_FLIGHT), ours=False, **wanted)
        self.budget = -(-cfg.search_budget // ranks)
        self.calls = threading.Semaphore(-(-CALLS // ranks))
        self.spent = 0  # searches that count against it; a resumed run sets what it had spent before
        self._uploaded: dict[str, str] = {}
        self._uploading: dict[str, Future] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Ask each provider once whether it takes its key. Raises InputError."""
        cfg, engine, job = self.cfg, self.engine, Job(self.cfg.search_deadline)
        wanted = f"search={cfg.search} needs a key of {engine.site} in the environment, {engine.key}"
        need(engine.client.key, wanted + mixed_up(engine))
        try:
            asked = engine.key
            left = engine.check(job)
            if self.reader.key:
                asked = READER_KEY
                self._read("https://example.com", job)
            if self.summarizer_url:
                asked = f"summarizer_url, {SUMMARIZER_KEY}"
                self.summarizer.fetch_json(f"{self.summarizer_url}/models", job)
        except Failure as failure:
            unlisted = SUMMARIZER_KEY in asked and failure.reason in ("HTTP 404", "HTTP 405")  # some list no models
            advice = mixed_up(engine) if asked == engine.key and failure.kind == "refused" else ""
            need(unlisted, f"search={cfg.search} ({asked}): {failure}{advice}")
        if left is not None and left < (cfg.search_budget or 1):
            wanted = f"search_budget is {cfg.search_budget:,}" if cfg.search_budget else "there is no search_budget"
            print(f"warning: {engine.site}'s account may last for {left:,} searches only; {wanted}", file=sys.stderr)

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call, whatever happens: never an exception."""
        with self.calls:
            started, job = time.monotonic(), Job(self.cfg.search_deadline)
            try:
                hits = method_for(call, question, self)(call, question, job)
                result = Result("ok", tuple(hits)) if hits else Result("no_results")
            except Exception as error:  # hostile answers find mistakes in code: these are counted, and end no rollout
                result = failed(error)
            used, seconds = job.used, time.monotonic() - started
            with self._lock:
                self.spent += max(0, used["searches"] - 1)  # the first is counted; the engine was asked again
            millions = (used["page_tokens"] * READER_PRICE + used["tokens"] * SUMMARIZER_PRICE) / 1e6
            cost = round(used["cost"] + millions, 9)
            usage = Usage(used["searches"], used["pages"], used["bytes"], used["tokens"], cost=cost, seconds=seconds)
            return dataclasses.replace(result, usage=usage)

    def _spend(self):
        with self._lock:
            if self.budget and self.spent >= self.budget:
                raise Failure("budget", f"search_budget is used up ({self.budget} live searches)")
            self.spent += 1

    # -- with a picture

    def for_image_search(self, call, question, job):
        url = self.public_url(call, question, job)
        self._spend()

        def hit(match):
            try:
                thumbnail = web_thumbnail(self.pictures.fetch(match["thumbnail"], job))
            except InputError as error:
                raise Failure("bad_response", "thumbnail", note=str(error)) from None
            job.add(pages=1)
            return Hit(match["title"], match["link"], image=thumbnail)

        return _first(self.engine.look_for("image_search", url, job), self.results[call.tool], hit)

    def public_url(self, call: Call, question: Question, job: Job) -> str:
        """Where the search engine can see the picture that a call is about. Raises Failure."""
        if call.image is None and is_web_url(question.image_url):
            return question.image_url
        data, host = picture_of(call, question), self.cfg.image_host
        name = picture_name(data)
        if "://" in host:
            if data not in question.images[:1]:
                raise Failure("no_url", "--image_host is a folder, which lacks pictures of a conversation")
            return f"{host.rstrip('/')}/{name}"
        if not host:
            raise Failure("no_url", "the image is only bytes; --image_host makes it public")
        return shared(self._uploading, name, lambda: self._upload(name, data, job))[0]

    def _upload(self, name, data, job):
        if name in self._uploaded:
            return self._uploaded[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            command = [*shlex.split(self.cfg.image_host), str(path)]
            try:
                done = subprocess.run(command, capture_output=True, timeout=job.left(), stdin=subprocess.DEVNULL)
            except (subprocess.TimeoutExpired, OSError) as error:
                raise Failure("no_url", "image_host: the command failed", note=type(error).__name__) from None
        url = (done.stdout.decode(errors="replace").split() or [""])[-1]
        if done.returncode or not is_web_url(url):
            raise Failure("no_url", f"image_host: exit code {done.returncode}, and no URL at the end of its output")
        self._uploaded[name] = url
        return url

    # -- with words

    def for_text_search(self, call, question, job):
        query = query_of(call)
        self._spend()

        def hit(match):
            _, page = self._read(match["link"], job)
            text = self._told(query, match["title"], page, MAX_SENTENCES, job)
            return Hit(match["title"], match["link"], clean(text, MAX_TEXT))

        return _first(self.engine.look_for("text_search", query, job), self.results[call.tool], hit)

    def for_visit(self, call, question, job):
        url, goal = page_url(call.url), clean(call.query, MAX_QUERY)
        title, page = self._read(url, job)
        return [Hit(title, url, self._told(goal, title, page, PAGE_SENTENCES, job))]

    def _read(self, url, job):
        """The title of a page, "" if the reader says none, and its text, its first PAGE_CHARACTERS."""
        data = self.reader.fetch_json(self.cfg.reader_url, job, {"url": url}).get("data")
        if not isinstance(data, dict) or not isinstance(data.get("content"), str):
            raise Failure("bad_response", "reader: no content")
        job.add(page_tokens=tokens_in(data.get("usage"), "tokens"))
        if "returned error" in str(data.get("warning")):  # of the page itself: what follows is an error page's text
            raise Failure("refused", "reader", note=clean(data["warning"], 100))
        # Four times as much is enough to find that many characters of text in; hostile pages are not parsed beyond.
        page = clean(plain_text(data["content"][: 4 * PAGE_CHARACTERS]), PAGE_CHARACTERS)
        if not page:
            raise Failure("bad_response", "reader: an empty page")
        job.add(pages=1)
        return clean(inline_text(data.get("title")), MAX_TITLE), page

    def _told(self, query, title, page, count, job):
        """What a page says about a query: `count` sentences of it, or what a summariser makes of it."""
        if not (self.summarizer_url and query):
            return passages(page, query, count)
        values = {"query": query, "title": title, "page": page}
        content = re.sub(r"\{(query|title|page)\}", lambda hole: values[hole[1]], self.prompt)
        how = dict(temperature=0, max_tokens=1024)
        said = self.summarizer.chat(self.summarizer_url, job, self.cfg.summarizer_model, content, **how)
        summary = clean(plain_text(said[: 10 * MAX_TEXT]), 10 * MAX_TEXT)
        if not summary:
            raise Failure("bad_response", "summariser: an empty message")
        return " ".join(sentences(summary)[:MAX_SENTENCES])


def engine_of(cfg: Config) -> type[SearchEngine]:
    """The search engine that live search asks."""
    return ENGINES[cfg.search_engine.partition("=")[0]]


def mixed_up(engine: SearchEngine) -> str:
    """What to do if the engine's key is missing or refused, where it seems to be that of another one; else ""."""
    for name, other in ENGINES.items():
        if other is type(engine):
            continue
        key, others = engine.client.key, os.environ.get(other.key, "").strip()
        if re.fullmatch(f"[0-9a-fA-F]{{{other.key_digits}}}", key):
            return f"; it has the form of a key of {other.site}: name it {other.key}, and give --search_engine {name}"
        if not key and re.fullmatch(f"[0-9a-fA-F]{{{engine.key_digits}}}", others):
            return f"; the one in {other.key} has the form of a key of {engine.site}: name it {engine.key}"
        if not key and others:
            return f"; there is {other.key}, a key of {other.site}: to use it, give --search_engine {name}"
    return ""


def _first(matches, count, hit):
    """hit(match) of the first `count` matches for which it succeeds, at once, one that fails replaced by the next; in
    the order of the matches. Raises Failure if there are matches and all fail."""
    hits, failures, rest = {}, [], iter(enumerate(matches))
    running = {spawn(hit, match): n for n, match in islice(rest, count)}
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED)[0]:
            n = running.pop(future)
            try:
                hits[n] = future.result()
            except Exception as error:
                failures.append(failed(error))
                running |= {spawn(hit, match): n for n, match in islice(rest, 1)}
    if failures and not hits:
        kinds = [failure.error_kind for failure in failures]
        common = max(failures, key=lambda failure: kinds.count(failure.error_kind))
        raise Failure(common.error_kind, f"none of {len(failures)} results could be had", note=common.error)
    return [hits[n] for n in sorted(hits)]


def summarizer_prompt() -> str:
    """The request to the summariser: prompts/summarize.txt in the working directory, or beside the code."""
    text = read_prompt(prompt_path("prompts/summarize.txt"))
    need("{query}" in text and "{page}" in text, "prompts/summarize.txt: expected {query} and {page}")
    return text


def picture_name(data: bytes) -> str:
    """The file name under which a picture is looked for at image_host: its sha256, and its format."""
    format = decode_image(data).format.lower()
    return f"{hashlib.sha256(data).hexdigest()}.{'jpg' if format in ('jpeg', 'mpo') else format}"
