"""search/service.py"""

import base64
import dataclasses
import json
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from config import Config, InputError
from data import Call, Hit, Question, Result, Usage
from search.live import MAX_JSON_BYTES, MAX_QUERY
from search.web import Client, Failure, Limit, Meter, clean


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
