"""One search for several machines: a server around a search, and the client that asks it.

    python -m search serve --address 0.0.0.0:8100 --search record --search_cache c.sqlite      # on one machine
    train.py --search_url http://THAT:8100                                                     # on all of them

POST /search takes {"call": {tool, query, picture, box, image}, "question": {image, image_url, data_id}}, pictures in
base64, and returns a result; GET /health counts the calls so far. There is no password: private networks only.
"""

import base64
import dataclasses
import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from config import Config, InputError
from data import Call, Hit, Question, Result, Usage
from search.calls import MAX_QUERY, Failure, failed
from search.text import clean
from search.web import MAX_JSON_BYTES, Client, Job, Limit
from tools import TOOLS

MAX_BYTES = 8 * MAX_JSON_BYTES  # of a request or a result, pictures included


class RemoteSearch:
    """Asks a running service. While that is restarted, calls try again until their deadline."""

    def __init__(self, cfg: Config):
        self.url = cfg.search_url.rstrip("/")
        self.patience = 2 * cfg.search_deadline + 60  # seconds: the service's own deadline, and a restart
        self.client = Client("search service", Limit(cfg.tool_threads), max_bytes=MAX_BYTES)
        self.client.read_timeout, self.client.retries = cfg.search_deadline + 30, 1000

    def check(self, patience: float = 60.0) -> None:
        """Raise InputError unless a service answers within so many seconds."""
        try:
            self.client.fetch_json(f"{self.url}/health", Job(patience))
        except Failure as failure:
            raise InputError(f"search_url={self.url}: {failure}; `python -m search serve` starts one") from None

    def search(self, call: Call, question: Question) -> Result:
        """The service's answer, or why there is none."""
        asked = {**vars(call), "query": clean(call.query, MAX_QUERY), "image": _encoded(call.image)}
        tool = TOOLS.get(call.tool)
        shown = tool is not None and tool.needs == "picture" and call.image is None and question.images
        about = {"image": _encoded(question.images[0] if shown else None)}
        about |= {"image_url": question.image_url, "data_id": question.data_id}
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
        return Result(**{**sent, "hits": hits, "usage": Usage(**sent["usage"])})
    except (KeyError, TypeError, ValueError):
        raise Failure("bad_response", "search service: not a result; is it of another version?") from None


class SearchServer(ThreadingHTTPServer):
    """A search behind HTTP, at HOST:PORT. Raises InputError if it cannot listen there."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 1024, True

    def __init__(self, address: str, search):
        host, _, port = address.rpartition(":")
        self.search, self.calls = search, Counter()
        try:
            super().__init__((host, int(port)), _Handler)
        except (OSError, ValueError, OverflowError) as error:  # ValueError: no port, OverflowError: none above 65535
            raise InputError(f"address={address}: cannot listen there ({error})") from None


class _Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds of silence of a client

    def do_GET(self):
        self._send({"calls": dict(self.server.calls)} if self.path == "/health" else None)

    def do_POST(self):
        try:
            length = int(self.headers.get("Content-Length", -1))
            if self.path != "/search" or not 0 <= length <= MAX_BYTES:
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
    """(call, question) of a request. Raises ValueError, KeyError or TypeError for anything else."""
    asked, about = sent["call"], sent["question"]
    call = Call(**{**asked, "image": _decoded(asked["image"]), "box": asked["box"] and tuple(map(float, asked["box"]))})
    texts = (call.tool, call.query, call.picture, about["image_url"] or "", about["data_id"] or "")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError
    image = _decoded(about["image"])
    images = () if image is None else (image,)
    return call, Question("asked", "", images, image_url=about["image_url"], data_id=about["data_id"])
