"""HTTP that cannot hang, cannot be flooded and cannot be led astray: urllib3 with connections of our own.

What comes from the web is hostile: an answer may never end, unpack to gigabytes, or redirect to the machine's own
services. So every request has a deadline that covers all of it (the handshake, slow headers and a stream of single
bytes included), a limit of bytes and a list of content types; and a name is resolved once, its addresses are checked,
and the connection goes to an address that was checked, at every hop of a redirect. Where an answer repeats the key that
it was asked with, the key is taken out before anything else looks at the answer.

Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY) are used for endpoints that the user configured, and for
nothing else: behind a proxy, nobody could check an address.
"""

import functools
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.client import HTTPException
from typing import ClassVar
from urllib.parse import urljoin, urlsplit

from requests import PreparedRequest, Request
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import HTTPError
from urllib3.util.connection import create_connection
from urllib3.util.retry import Retry
from urllib3.util.timeout import Timeout

from config import need
from search.calls import Failure
from search.text import clean, plain_text
from tools import spawn

MAX_REDIRECTS = 4
LONGEST_PAUSE = 30.0  # seconds between two attempts, at most, unless Retry-After asks for more
MAX_ADDRESSES = 8  # of a name, that are tried
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # all that is given out for the public internet
# In there, and in IPv4, what leads elsewhere although Python (some of its versions) calls it global: a cloud's metadata
# service, 6to4's relay, Teredo and other protocols, documentation, 6to4.
SPECIAL = "192.0.0.0/24 192.88.99.0/24 2001::/23 2001:db8::/32 2002::/16 3fff::/20"
SPECIAL = tuple(map(ipaddress.ip_network, SPECIAL.split()))
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones
JSON_TYPES, IMAGE_TYPES = ("application/json",), ("image/*",)
MAX_JSON_BYTES = 8_000_000
MAX_URL = 2000  # characters
MAX_COUNT = 10**9  # numbers in answers are cut to this
PRIVATE_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")  # of no public name the end
MIN_KEY = 8  # characters of a key that is a secret
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
    key: str = field(default="", repr=False)
    key_as: tuple[str, ...] = ("Authorization", "Bearer {}")  # the header that holds the key; (): the URL does
    max_bytes: int = MAX_JSON_BYTES  # of an answer, on the wire and unpacked
    types: tuple[str, ...] = JSON_TYPES  # content types
    allow_hosts: tuple[str, ...] = ()  # of those not ours (name:port): hosts that may have private addresses
    quota: str = ""  # in the message of an error: nothing is left, and no pause helps
    refused: set[str] = field(default_factory=set)  # settings that a chat endpoint does not take

    # The same for all clients; one that needs other values sets them on itself.
    connect_timeout: ClassVar[float] = 5.0  # seconds
    read_timeout: ClassVar[float] = 30.0  # seconds of silence
    retries: ClassVar[int] = 3  # attempts beyond the first
    pause: ClassVar[float] = 1.0  # seconds before the second attempt, about; they double

    def __post_init__(self):
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings hold URLs, and so keys

    def fetch(self, url: str, job: Job, payload: dict | None = None, read: Callable = bytes, again: str = ""):
        """read(the body) of a GET, or of a POST of the payload as JSON; a Failure that `read` raises is tried again if
        its kind may pass. again: added to the URL of all attempts but the first. Raises Failure."""
        for attempt in itertools.count(1):
            try:
                with self.limit.slot(job.deadline):
                    body = self._follow(url + again if attempt > 1 else url, job, payload)
                return read(body)
            except Failure as failure:
                pause = min(self.pause * 2.0 ** (attempt - 1) * random.uniform(0.5, 1), LONGEST_PAUSE)
                pause = max(pause, failure.retry_after)
                last = attempt > self.retries or time.monotonic() + pause >= job.deadline
                if last or failure.kind not in RETRIED:
                    failure.args = (f"{self.what}: {failure}" + (f" ({attempt} attempts)" if attempt > 1 else ""),)
                    raise failure from None
                time.sleep(pause)

    def fetch_json(self, url: str, job: Job, payload: dict | None = None, read: Callable = dict, again: str = ""):
        """As `fetch`, for an answer that has to be a JSON object, which `read` gets."""

        def parsed(body):
            answer = None
            with suppress(ValueError, RecursionError):
                answer = json.loads(body)
            if not isinstance(answer, dict):
                raise Failure("bad_response", "not a JSON object")
            return read(answer)

        return self.fetch(url, job, payload, parsed, again)

    def chat(self, url: str, job: Job, model: str, content: str | list, **settings) -> str:
        """What the model of an OpenAI-compatible endpoint answers to a message, without its thoughts. A setting that
        the endpoint refuses (new models do: temperature, max_tokens) is left out from then on. Raises Failure."""
        settings = {name: value for name, value in settings.items() if name not in self.refused}
        payload = {"model": model, "messages": [{"role": "user", "content": content}], **settings}
        try:
            answer = self.fetch_json(f"{url}/chat/completions", job, payload)
        except Failure as failure:
            named = {name for name in settings if name in failure.said}
            if failure.reason not in ("HTTP 400", "HTTP 422") or not named:
                raise
            others = {name: value for name, value in settings.items() if name not in named}
            said = self.chat(url, job, model, content, **others)
            if named - self.refused:
                print(f"{self.what}: {', '.join(sorted(named))} is refused, and left out", file=sys.stderr)
                self.refused |= named
            return said
        job.add(tokens=tokens_in(answer.get("usage"), "total_tokens"))
        try:
            said = answer["choices"][0]["message"]["content"].rpartition("</think>")[2].strip()
        except (KeyError, IndexError, TypeError, AttributeError):
            note = clean(str(answer.get("error") or ""), 200)  # some proxies say so with status 200
            raise Failure("bad_response", f"{self.what}: no text in the reply", note) from None
        return "" if said.startswith("<think>") else said  # a thought that was cut is no answer

    def _follow(self, url, job, payload):
        """The body of the answer, of a redirect's target if the endpoint is not ours."""
        base, secret = "", {}
        if self.key and self.key_as:
            secret = {self.key_as[0]: self.key_as[1].format(self.key).encode()}
        for _ in range(MAX_REDIRECTS + 1):
            request = _prepared(base, url, self.types, secret, payload)
            url, body = self._send(request, job)
            if url is None:
                return body
            if self.ours:
                raise Failure("bad_response", "it redirects; give the address that it redirects to")
            base = request.url
        raise Failure("bad_response", f"more than {MAX_REDIRECTS} redirects")

    def _send(self, request, job):
        """(where it redirects to or None, body) of one request. It takes of requests no more than the way through
        proxies: a Session reads the bodies of redirects without a limit, keeps cookies, looks for logins in ~/.netrc.
        """
        proxies = get_environ_proxies(request.url) if self.ours else {}
        patience = Timeout(connect=min(self.connect_timeout, job.left()), read=self.read_timeout)
        try:
            with closing(HTTPAdapter()) as adapter, ExitStack() as cleanup:
                pool = adapter.get_connection_with_tls_context(request, True, proxies)
                proxied, make = select_proxy(request.url, proxies) is not None, pool.ConnectionCls

                def connection(**options):
                    made = make(**options)
                    to_proxy = made._new_conn if proxied else None
                    made._new_conn = functools.partial(self._connect, made, to_proxy, job, cleanup)
                    return made

                pool.ConnectionCls = connection
                if pool.scheme == "https":
                    pool.conn_kw["ssl_context"] = tls_context()
                options = {"retries": False, "redirect": False, "assert_same_host": False, "preload_content": False}
                asked = request.method, adapter.request_url(request, proxies), request.body, request.headers
                with pool.urlopen(*asked, timeout=patience, **options) as raw:
                    answer = self._answer(raw, job)
            if time.monotonic() >= job.deadline:
                raise TimeoutError  # it may have been cut at a place that looks like an end
            return answer
        except (OSError, HTTPError, HTTPException, ValueError) as error:  # ssl's and requests' errors are OSErrors
            cause = error
            while cause.__context__:  # their messages hold URLs: the name of the first one says enough
                cause = cause.__context__
            late = time.monotonic() >= job.deadline or isinstance(cause, TimeoutError)
            if late:  # whatever the cut at the deadline looked like
                raise Failure("timeout", TimeoutError.__name__) from None
            kind = "bad_response" if isinstance(error, ValueError) else "connection"
            raise Failure(kind, type(cause).__name__) from None

    def _connect(self, connection, to_proxy, job, cleanup):
        """A socket to the proxy or to the connection's host, which ends at the deadline whatever is under way."""
        try:
            sock = _in_time(job, to_proxy) if to_proxy else self._reached(connection, job)
        except (OSError, UnicodeError) as error:  # urllib3 would take a reset for one after the connection was made
            kind = "timeout" if isinstance(error, TimeoutError) else "connection"
            raise Failure(kind, type(error).__name__, note=getattr(error, "strerror", None) or "") from None
        watched = sock.dup()  # TLS takes the descriptor of `sock` for its own
        cleanup.callback(watched.close)
        guard = threading.Timer(job.left(), cut, [watched])
        guard.daemon = True
        guard.start()
        cleanup.callback(guard.cancel)
        return sock

    def _reached(self, connection, job):
        """A socket to the first that answers of the host's addresses that may be connected to: public ones, or any."""
        host, port = connection.host, connection.port
        private = self.ours or f"{host}:{port}" in self.allow_hosts
        infos = _in_time(job, functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
        addresses = [info[4][0] for info in infos if private or is_public(info[4][0])]
        failure = Failure("blocked", "it leads to a private address")
        for address in addresses[:MAX_ADDRESSES]:
            patience = min(connection.timeout, job.left())
            try:
                return create_connection((address, port), patience, socket_options=connection.socket_options)
            except OSError as error:
                failure = error
        raise failure

    def _answer(self, raw, job):
        """(where it redirects to or None, body) of an answer that has begun."""
        headers, status = raw.headers, raw.status
        if status in (301, 302, 303, 307, 308) and headers.get("Location"):
            return headers["Location"], b""
        if headers.get("Content-Encoding", "").strip().lower() not in ("", "identity", "gzip"):
            raise Failure("bad_response", "unknown content encoding")
        if status != 200:
            note = ""
            with suppress(HTTPError):
                said = plain_text(_read(raw, job, 10_000).decode(errors="replace")).encode(errors="replace")
                note = clean(" ".join(self._redacted(said).decode().split()), 300)
            kind = {408: "timeout", 429: "rate_limit"}.get(status, "server" if status >= 500 else "refused")
            if self.quota and self.quota in note.lower():
                kind = "quota"
            raise Failure(kind, f"HTTP {status}", note, _seconds(headers.get("Retry-After")))
        kind = headers.get("Content-Type", "").split(";")[0].strip().lower()
        if not any(fnmatch(kind, allowed) for allowed in self.types):
            shown = self._redacted(kind.encode()).decode(errors="replace")
            raise Failure("bad_response", "content type", note=repr(clean(shown, 60) or "unknown"))
        body = _read(raw, job, self.max_bytes)
        if max(len(body), raw.tell()) > self.max_bytes:
            raise Failure("bad_response", f"more than {self.max_bytes:,} bytes")
        return None, self._redacted(body)

    def _redacted(self, data: bytes) -> bytes:
        """An answer without the key: as it is, URL-encoded, escaped as in JSON, or with breaks in between. A short one
        is what a server without keys makes its clients send, and may be a word of the answer ("EMPTY")."""
        if len(self.key) < MIN_KEY:
            return data
        forms = (rb"(?:\\?%s|%%%02x|\\u00%02x)" % (re.escape(bytes([c])), c, c) for c in self.key.encode())
        return re.sub(rb"(?:\s|\\[nrt])*".join(forms), b"***", data, flags=re.IGNORECASE)


def cut(sock: socket.socket) -> None:
    """End a connection that another thread may be waiting for."""
    with suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)


# the machine's certificates (or those that SSL_CERT_FILE names), loaded once
tls_context = functools.cache(ssl.create_default_context)


def _prepared(base: str, url: str, types=(), secret=(), payload=None) -> PreparedRequest:
    """A request of a URL, which may be relative to a base. Raises Failure (blocked) if it is not http or https."""
    headers = {"User-Agent": AGENT, "Accept": ", ".join(types), "Accept-Encoding": "gzip", "Connection": "close"}
    headers.update(secret)
    try:
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", url):  # some of them would be left out; halves of characters
            raise ValueError
        method = "GET" if payload is None else "POST"
        request = Request(method, urljoin(base, url), headers, json=payload).prepare()
    except (ValueError, OSError):  # requests' InvalidURL is one, its InvalidJSONError the other
        raise Failure("blocked", "not a URL") from None
    if not request.url.startswith(("http://", "https://")):
        raise Failure("blocked", "not an http or https address")
    return request


def is_web_url(url) -> bool:
    """True for a sound http or https URL; where it leads is checked when it is fetched."""
    try:
        return isinstance(url, str) and len(url) <= MAX_URL and bool(_prepared("", url))
    except Failure:
        return False


def page_url(url: str) -> str:
    """The address of a page that the model names, in the form in which it is requested. Raises Failure (bad_call) if
    it is no http or https URL, or plainly leads to a private address: a reader may run in the user's own network. (What
    a name stands for, only the reader knows.)"""
    if not is_web_url(url.strip()):
        raise Failure("bad_call", "not an http or https address")
    url = _prepared("", url.strip()).url
    parts = urlsplit(url)
    host = parts.hostname.rstrip(".")
    with suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f000001, 2130706433: browsers read them so
    try:
        public = is_public(host)
    except ValueError:  # a name
        public = "." in host and not host.endswith(PRIVATE_NAMES)
    if not public or "@" in parts.netloc:
        raise Failure("bad_call", "it leads to a private address" if not public else "an address with a password")
    return url


def _in_time(job, function):
    """function(), or TimeoutError at the job's deadline: nothing else ends the wait for a name server."""
    return spawn(function).result(job.left())


def is_public(address: str) -> bool:
    """True for what the public internet routes; not for local, multicast or reserved addresses."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6 and (ip.ipv4_mapped or ip in NAT64):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    routed = ip.is_global and not ip.is_multicast and not any(ip in block for block in SPECIAL)
    return routed and (ip.version == 4 or ip in GLOBAL_IPV6)


def _read(raw, job, max_bytes):
    """The body, unpacked; a little more than max_bytes if that, or what came over the wire, is more."""
    body = bytearray()
    while max(len(body), raw.tell()) <= max_bytes and (piece := raw.read(65536, decode_content=True)):
        body += piece
    job.add(bytes=raw.tell())
    return bytes(body)


def tokens_in(usage, name: str) -> int:
    """A number that an answer states in its `usage`; 0 if it states none."""
    number = usage.get(name) if isinstance(usage, dict) else 0
    return min(max(0, number), MAX_COUNT) if isinstance(number, int) else 0


def key_of(name: str) -> str:
    """The key in an environment variable; "" if there is none. Raises InputError, which does not show it."""
    key = os.environ.get(name, "").strip()
    sound = key.isascii() and key.isprintable() and " " not in key
    need(sound, f"{name} in the environment is no key: expected printable ASCII characters without spaces")
    return key


def _seconds(retry_after):
    """Retry-After, which is seconds or a date, in seconds from now; 0 if it is neither."""
    try:
        return Retry().parse_retry_after(retry_after or "")
    except (HTTPError, ValueError, TypeError, OverflowError):
        return 0.0
