"""HTTP that cannot hang, cannot be flooded and cannot be led astray: requests, with a transport of our own below it.

What comes from the web is hostile: an answer may never end, unpack to gigabytes, or redirect to the machine's own
services. So every request has a deadline that covers all of it (the handshake, slow headers and a stream of single
bytes included), a limit of bytes and a list of content types; and a name is resolved once, its addresses are checked,
and the connection goes to the address that was checked, at every hop of a redirect.

Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) are used for endpoints that the user configured, and for
nothing else: behind a proxy, nobody could check an address.
"""

import functools
import ipaddress
import itertools
import json
import logging
import math
import re
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import ClassVar
from urllib.parse import urljoin

from requests import PreparedRequest, Request
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util.connection import create_connection
from urllib3.util.retry import RequestHistory, Retry

from search.calls import Failure
from search.text import clean

MAX_REDIRECTS = 4
LONGEST_PAUSE = 30.0  # seconds between two attempts, at most, unless Retry-After asks for more
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones
JSON_TYPES, IMAGE_TYPES = ("application/json",), ("image/*",)
MAX_JSON_BYTES = 8_000_000
AGENT = "nanoMMSearch"
RETRIED = ("timeout", "connection", "rate_limit", "server")  # kinds of failures that may pass


class Limit:
    """At most `in_flight` requests at once and `per_second` begun a second (0: no limit); for all threads together."""

    def __init__(self, in_flight: int, per_second: float = 0.0):
        self._slots = threading.Semaphore(in_flight)
        self._pause = 1 / per_second if per_second else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    @contextmanager
    def slot(self, deadline: float):
        """Wait for a turn. Raises Failure (timeout) if it would not come before the deadline (time.monotonic())."""
        if not self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Failure("timeout", "no free slot before the call's deadline")
        try:
            with self._lock:
                begin = max(time.monotonic(), self._next)
                if begin > deadline:
                    raise Failure("timeout", "no turn before the call's deadline")
                self._next = begin + self._pause
            time.sleep(max(0.0, begin - time.monotonic()))
            yield
        finally:
            self._slots.release()


class Job:
    """One call: when it has to be done (time.monotonic()), and sums of what it used. Several threads may add to it."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.used, self._lock = Counter(), threading.Lock()

    def left(self) -> float:
        """Seconds until the deadline, at least a millisecond (0 means something else to sockets)."""
        return max(0.001, self.deadline - time.monotonic())

    def add(self, **amounts: float) -> None:
        with self._lock:
            self.used.update(amounts)


@dataclass
class Client:
    """Asks one service, or the hosts of search results, over HTTP; any number of threads may."""

    what: str  # names the other side in messages
    limit: Limit
    ours: bool = True  # an endpoint that the user configured: any address, proxies; a redirect (of a key!) is an error
    bearer: str = ""  # key
    max_bytes: int = MAX_JSON_BYTES  # of an answer, on the wire and unpacked
    types: tuple[str, ...] = JSON_TYPES  # content types
    allow_hosts: tuple[str, ...] = ()  # of those not ours (name:port): hosts that may have private addresses
    quota: str = ""  # in the message of a 429: nothing is left, and no pause helps

    # The same for all clients; one that needs other values sets them on itself.
    connect_timeout: ClassVar[float] = 5.0  # seconds
    read_timeout: ClassVar[float] = 30.0  # seconds of silence
    retries: ClassVar[int] = 3  # attempts beyond the first
    pause: ClassVar[float] = 1.0  # seconds before the second attempt, about; they double

    def __post_init__(self):
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings hold URLs, and so keys

    def fetch(self, url: str, job: Job, payload: dict | None = None) -> bytes:
        """The body of a GET, or of a POST of the payload as JSON. Raises Failure."""
        retry = Retry(
            self.retries, backoff_factor=self.pause / 4, backoff_jitter=self.pause / 2, backoff_max=LONGEST_PAUSE,
            history=(RequestHistory(None, None, None, None, None),),  # without one, the first of the pauses would be 0
        )  # fmt: skip
        for attempt in itertools.count(1):
            try:
                with self.limit.slot(job.deadline):
                    return self._follow(url, job, payload)
            except Failure as failure:
                try:
                    retry = retry.increment(error=failure)
                    pause = max(retry.get_backoff_time(), failure.retry_after)
                except MaxRetryError:
                    pause = math.inf
                if failure.kind not in RETRIED or time.monotonic() + pause >= job.deadline:
                    failure.args = (f"{self.what}: {failure}" + (f" ({attempt} attempts)" if attempt > 1 else ""),)
                    raise failure from None
                time.sleep(pause)

    def fetch_json(self, url: str, job: Job, payload: dict | None = None) -> dict:
        """As `fetch`, for an answer that has to be a JSON object."""
        try:
            answer = json.loads(self.fetch(url, job, payload))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise Failure("bad_response", "not a JSON object", note=f"from the {self.what}")
        return answer

    def _follow(self, url, job, payload):
        base = ""
        for _ in range(MAX_REDIRECTS + 1):
            request = _prepared(base, url, self.types, self.bearer, payload)
            url, body = self._send(request, job)
            if url is None:
                return body
            if self.ours:
                raise Failure("bad_response", "it redirects; give the address that it redirects to")
            base = request.url
        raise Failure("bad_response", f"more than {MAX_REDIRECTS} redirects")

    def _send(self, request, job):
        """(where it redirects to or None, body) of one request."""
        transport = _Transport(self, job)
        proxies = get_environ_proxies(request.url) if self.ours else {}
        patience = (min(self.connect_timeout, job.left()), self.read_timeout)
        try:
            with closing(transport), transport.send(request, True, patience, proxies=proxies) as response:
                answer = self._answer(response.raw, job)
            if time.monotonic() >= job.deadline:
                raise TimeoutError  # it may have been cut at a place that looks like an end
            return answer
        except (OSError, HTTPError, HTTPException) as error:  # ssl's and requests' errors are OSErrors
            cause = error
            while cause.__context__:  # their messages hold URLs: the name of the first one says enough
                cause = cause.__context__
            late = time.monotonic() >= job.deadline or isinstance(cause, TimeoutError)
            raise Failure("timeout" if late else "connection", type(cause).__name__) from None

    def _answer(self, raw, job):
        """(where it redirects to or None, body) of an answer that has begun."""
        headers, status = raw.headers, raw.status
        if status in (301, 302, 303, 307, 308) and headers.get("Location"):
            return headers["Location"], b""
        if headers.get("Content-Encoding", "").strip().lower() not in ("", "identity", "gzip"):
            raise Failure("bad_response", "unknown content encoding")
        if status != 200:
            note = _said(raw, job)
            kind = {408: "timeout", 429: "rate_limit"}.get(status, "server" if status >= 500 else "refused")
            if status == 429 and self.quota and self.quota in note.lower():
                kind = "quota"
            raise Failure(kind, f"HTTP {status}", note, _seconds(headers.get("Retry-After")))
        kind = headers.get("Content-Type", "").split(";")[0].strip().lower()
        if not any(kind == t or (t.endswith("/*") and kind.startswith(t[:-1])) for t in self.types):
            raise Failure("bad_response", "content type", note=repr(clean(kind, 60) or "unknown"))
        body = _read(raw, job, self.max_bytes)
        if max(len(body), raw.tell()) > self.max_bytes:
            raise Failure("bad_response", f"more than {self.max_bytes:,} bytes")
        return None, body


class _Transport(HTTPAdapter):
    """The way of one request. Its connection goes to the address that was checked, and is cut at the deadline.

    There is no requests.Session above it: that reads the bodies of redirects without a limit, keeps cookies, and looks
    for logins in ~/.netrc.
    """

    def __init__(self, client: Client, job: Job):
        super().__init__()
        self.client, self.job, self.cleanup = client, job, ExitStack()

    def get_connection_with_tls_context(self, request, verify, proxies=None, cert=None):
        pool = super().get_connection_with_tls_context(request, verify, proxies, cert)
        make, proxied = pool.ConnectionCls, select_proxy(request.url, proxies) is not None

        def connection(**options):
            made = make(**options)
            made._new_conn = functools.partial(self._connect, made, made._new_conn if proxied else None)
            return made

        pool.ConnectionCls = connection
        if pool.scheme == "https":
            pool.conn_kw["ssl_context"] = tls_context()
        return pool

    def cert_verify(self, conn, url, verify, cert):
        """Nothing to add: `tls_context` holds the certificates."""

    def _connect(self, connection, to_proxy):
        """A socket to the proxy or to the connection's host, which ends at the deadline whatever is under way."""
        if to_proxy:
            sock = to_proxy()
        else:
            host, port = connection.host, connection.port
            private = self.client.ours or f"{host}:{port}" in self.client.allow_hosts
            address = _address(host, port, private), port
            try:
                sock = create_connection(address, connection.timeout, socket_options=connection.socket_options)
            except OSError as error:  # urllib3 would take a reset for one after the connection was made
                kind = "timeout" if isinstance(error, TimeoutError) else "connection"
                raise Failure(kind, type(error).__name__) from None
        watched = sock.dup()  # TLS takes the descriptor of `sock` for its own
        self.cleanup.callback(watched.close)
        guard = threading.Timer(self.job.left(), _cut, [watched])
        guard.daemon = True
        guard.start()
        self.cleanup.callback(guard.cancel)
        return sock

    def close(self):
        self.cleanup.close()
        super().close()


def _cut(sock):
    with suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The machine's certificates (or those that SSL_CERT_FILE names), loaded once."""
    return ssl.create_default_context()


def _prepared(base: str, url: str, types=(), bearer="", payload=None) -> PreparedRequest:
    """A request of a URL, which may be relative to a base. Raises Failure (blocked) if it is not http or https."""
    headers = {"User-Agent": AGENT, "Accept": ", ".join(types), "Accept-Encoding": "gzip", "Connection": "close"}
    if bearer:
        headers["Authorization"] = f"Bearer {bearer}".encode()
    try:
        if re.search(r"[\x00-\x1f\x7f]", url):  # some of them would be left out
            raise ValueError
        method = "GET" if payload is None else "POST"
        request = Request(method, urljoin(base, url), headers, json=payload).prepare()
    except ValueError:  # requests' InvalidURL is one
        raise Failure("blocked", "not a URL") from None
    if not request.url.startswith(("http://", "https://")):
        raise Failure("blocked", "not an http or https address")
    return request


def is_web_url(url) -> bool:
    """True for a sound http or https URL; where it leads is checked when it is fetched."""
    try:
        return isinstance(url, str) and len(url) <= 2000 and bool(_prepared("", url))
    except Failure:
        return False


def _address(host, port, private):
    """An address of the host that may be connected to: public, unless `private`. Raises Failure."""
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise Failure("connection", "unknown host", note=type(error).__name__) from None
    for address in found:
        if private or is_public(address):
            return address
    raise Failure("blocked", "it leads to a private address")


def is_public(address: str) -> bool:
    """False for loopback, private, link-local, multicast, reserved addresses, and for IPv6 ones that stand for such."""
    ip = ipaddress.ip_address(address.split("%")[0])
    every = {ip}
    if ip.version == 6:
        every |= {ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())} - {None}
        every |= {ipaddress.ip_address(int(ip) & 0xFFFFFFFF)} if ip in NAT64 else set()
    return all(one.is_global and not one.is_multicast for one in every)


def _read(raw, job, max_bytes):
    """The body, unpacked; a little more than max_bytes if that, or what came over the wire, is more."""
    body = bytearray()
    while max(len(body), raw.tell()) <= max_bytes and (piece := raw.read(65536, decode_content=True)):
        body += piece
    job.add(bytes=raw.tell())
    return bytes(body)


def _said(raw, job):
    """The message in an error's JSON body, as SerpApi, Jina and OpenAI's interface write it; "" if there is none."""
    try:
        answer = json.loads(_read(raw, job, 10_000))
        error = answer.get("error", answer.get("readableMessage", answer.get("message")))
        return clean(error.get("message") if isinstance(error, dict) else error, 200)
    except (HTTPError, ValueError, RecursionError, AttributeError):
        return ""


def _seconds(retry_after):
    """Retry-After, which is seconds or a date, in seconds from now; 0 if it is neither."""
    try:
        return Retry().parse_retry_after(retry_after or "")
    except (HTTPError, ValueError, TypeError, OverflowError):
        return 0.0
