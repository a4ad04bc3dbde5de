"""One search for several machines: a server around a search, and the client that asks it.

    python -m search serve --address 0.0.0.0:8100 --search record --search_cache c.sqlite      # on one machine
    train.py --search http://THAT:8100                                                         # on all of them

POST /search takes {"call": {tool, query, picture, box, url, image}, "question": {image, image_url, data_id}}, pictures
in base64, and returns a result; GET /health counts the calls so far. There is no password: private networks only. What
clients can make it hold is bounded: connections, bytes, the time that a request takes to arrive.
"""

import base64
import dataclasses
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from config import Config, InputError
from data import Call, Hit, Question, Result, Usage, refusing
from search.calls import MAX_QUERY, Failure, failed
from search.text import clean
from search.web import MAX_JSON_BYTES, MAX_URL, Client, Job, Limit, cut, is_web_url
from tools import TOOLS, picture_of

MAX_RESULT = 8 * MAX_JSON_BYTES  # bytes, pictures included
MAX_REQUEST, MAX_HELD = 4 * MAX_JSON_BYTES, 16 * MAX_JSON_BYTES  # bytes: of one, of those that are being answered
MAX_PICTURE = MAX_REQUEST * 3 // 4 - 20_000  # bytes, which base64 lengthens; the rest is for the words
MAX_TEXT = 20_000  # bytes of names, addresses and an id, together; queries are cut
MAX_CONNECTIONS, ARRIVAL = 256, 60.0  # at once, others wait; seconds for a request to arrive


class RemoteSearch:
    """Asks a running service. While that is restarted, calls try again until their deadline."""

    def __init__(self, cfg: Config):
        self.url = cfg.search.rstrip("/")
        self.patience = 2 * cfg.search_deadline + 60  # seconds: the service's own deadline, and a restart
        self.client = Client("search service", Limit(cfg.concurrency), max_bytes=MAX_RESULT)
        self.client.read_timeout, self.client.retries = cfg.search_deadline + 30, 1000

    def check(self, patience: float = 60.0) -> None:
        """Raise InputError unless a service answers within so many seconds."""
        try:
            self.client.fetch_json(f"{self.url}/health", Job(patience))
        except Failure as failure:
            raise InputError(f"search={self.url}: {failure}; `python -m search serve` starts one") from None

    def search(self, call: Call, question: Question) -> Result:
        """The service's answer, or why there is none."""
        asked = {**vars(call), "query": clean(call.query, MAX_QUERY), "image": _encoded(call.image)}
        shown = call.tool in TOOLS and "picture" in TOOLS[call.tool].takes and call.image is None
        picture = picture_of(call, question) if shown else None
        if len(picture or call.image or b"") > MAX_PICTURE:
            return failed(Failure("bad_call", f"the picture has more than {MAX_PICTURE:,} bytes"))
        if len(call.url) > MAX_URL or not call.url.strip().isprintable():
            return failed(Failure("bad_call", f"the address is no line of at most {MAX_URL:,} characters"))
        address = question.image_url if is_web_url(question.image_url) else None
        about = {"image": _encoded(picture), "image_url": address, "data_id": question.data_id}
        try:
            sent = {"call": asked, "question": about}
            return result_from_json(self.client.fetch_json(f"{self.url}/search", Job(self.patience), sent))
        except Failure as failure:
            return failed(failure)


def _encoded(data):
    return data and base64.b64encode(data).decode()


def _decoded(text):
    return None if text is None else base64.b64decode(text, validate=True)


def result_to_json(result: Result) -> dict:
    """A result as the service sends it."""
    hits = [{**vars(hit), "image": _encoded(hit.image)} for hit in result.hits]
    return {**vars(result), "hits": hits, "usage": dataclasses.asdict(result.usage)}


def result_from_json(sent: dict) -> Result:
    """What `result_to_json` made. Raises Failure (bad_response)."""
    try:
        hits = tuple(Hit(**{**hit, "image": _decoded(hit["image"])}) for hit in sent["hits"])
        result = Result(**{**sent, "hits": hits, "usage": Usage(**sent["usage"])})
        texts = [text for hit in hits for text in (hit.title, hit.url, hit.text)]
        "".join([result.status, result.error, result.error_kind, *texts]).encode()  # an error, unless all are text
        if not all(0 <= number < 10**12 for number in vars(result.usage).values()):
            raise ValueError
        return result
    except (KeyError, TypeError, ValueError):
        raise Failure("bad_response", "search service: not a result; is it of another version?") from None


class SearchServer(ThreadingHTTPServer):
    """A search behind HTTP, at HOST:PORT. Raises InputError if it cannot listen there."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 1024, True

    def __init__(self, address: str, search):
        host, _, port = address.rpartition(":")
        self.search, self.calls = search, Counter()
        self.slots, self.held, self.lock = threading.Semaphore(MAX_CONNECTIONS), 0, threading.Lock()
        with refusing(f"address={address}: cannot listen there", OverflowError):  # of what is no port
            super().__init__((host, int(port)), _Handler)

    def process_request(self, request, client_address):
        self.slots.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that is gone
            super().handle_error(request, client_address)

    def hold(self, length: int) -> bool:
        """Count the bytes of a request as held, if they fit beside those of the others; negative: release them."""
        with self.lock:
            fits = self.held + length <= MAX_HELD
            self.held += length if fits else 0
            return fits


class _Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds of silence of a client, and for all of an answer to be taken

    def setup(self):
        super().setup()
        self.guard = threading.Timer(ARRIVAL, cut, [self.connection])
        self.guard.daemon = True
        self.guard.start()

    def finish(self):
        self.guard.cancel()
        super().finish()

    def do_GET(self):
        self._send({"calls": dict(self.server.calls)} if self.path == "/health" else None)

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        length = int(length) if length.isdecimal() and len(length) < 10 else MAX_REQUEST + 1
        if self.path != "/search" or length > MAX_REQUEST:
            return self._send(None, 400)
        if not self.server.hold(length):
            return self._send(None, 503)  # a client of ours asks again
        try:
            answer = self._answer(length)
        finally:
            self.server.hold(-length)
        self._send(answer, 400)

    def _answer(self, length):
        body = self.rfile.read(length)
        self.guard.cancel()
        with self.server.lock:  # JSON takes several times its size while it is read
            asked = _call_from_json(body)
        if asked:
            result = self.server.search.search(*asked)
            with self.server.lock:
                self.server.calls[result.error_kind or result.status] += 1
            return result_to_json(result)

    def _send(self, answer, status=404):
        body = json.dumps(answer or {"error": "not understood"}).encode()
        self.send_response(200 if answer is not None else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Queries are nobody's business."""


def _call_from_json(body):
    """(call, question) of a request; None for anything else."""
    try:
        sent = json.loads(body)
        asked, about = sent["call"], sent["question"]
        image, url, id = _decoded(about["image"]), about["image_url"], about["data_id"]
        box, query = asked["box"] and tuple(map(float, asked["box"][:4])), asked["query"][: 4 * MAX_QUERY]
        call = Call(**{**asked, "query": query, "image": _decoded(asked["image"]), "box": box})
        query.encode()  # an error, unless it is text; so are the others, together
        if len("".join((call.tool, call.picture, call.url, url or "", id or "")).encode()) > MAX_TEXT:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    images = () if image is None else (image,)
    return call, Question("asked", "", images, image_url=url, data_id=id)
