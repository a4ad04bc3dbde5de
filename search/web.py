"""HTTP that cannot hang, cannot be flooded and cannot be led astray; and text from the web, made harmless.

What comes from the web is hostile: an answer may never end, unpack to gigabytes, or redirect to the machine's own
services. So every request has a deadline that covers all of it (a stream of single bytes included), a limit of bytes,
a list of content types; and a name is resolved once, its addresses are checked, and the connection goes to the address
that was checked, on every hop of a redirect.

It stands on the standard library's HTTP and not on a client package because those three things (the address that was
checked is the one used; one deadline for all of a request; retries that end at it) have to be decided below where such
packages can be told. Proxies of the environment are not used: behind one, nobody could check addresses.
"""

import email.utils
import html
import http.client
import ipaddress
import json
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

MAX_REDIRECTS = 4


LONGEST_PAUSE = 30.0  # seconds between two attempts, at most, unless Retry-After asks for more


NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones


JSON_TYPES = ("application/json",)


AGENT = "nanoMMSearch"


class Failure(Exception):
    """A request that came to nothing. kind: one of data.ERROR_KINDS; its message holds no URL and no secret."""

    def __init__(self, kind: str, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


RETRIED = ("timeout", "connection", "rate_limit", "server")


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


class Meter:
    """Sums of what a call used; pages of one call are read by several threads."""

    def __init__(self):
        self.sums, self._lock = Counter(), threading.Lock()

    def add(self, **amounts: float) -> None:
        with self._lock:
            self.sums.update(amounts)


@dataclass(frozen=True)
class Client:
    """How to ask: seconds to connect, seconds of silence while reading, attempts beyond the first, the first pause
    between attempts in seconds (it doubles), and hosts (name:port) that may have private addresses."""

    connect_timeout: float = 5.0
    read_timeout: float = 30.0
    retries: int = 3
    pause: float = 1.0
    allow_hosts: tuple[str, ...] = ()

    def fetch(
        self, url: str, limit: Limit, meter: Meter, deadline: float, *, what: str, max_bytes: int,
        types: tuple[str, ...] = JSON_TYPES, payload: dict | None = None, bearer: str = "", ours: bool = False,
    ) -> bytes:  # fmt: skip
        """The body of a GET, or of a POST if there is a payload (sent as JSON). Raises Failure.

        what: names the other side in messages. ours: an endpoint that the user configured: it may have a private
        address, and a redirect is an error (it would carry the key elsewhere). deadline: on time.monotonic().
        """
        for attempt in range(self.retries + 1):
            try:
                with limit.slot(deadline):
                    return self._follow(url, meter, deadline, max_bytes, types, payload, bearer, ours)
            except Failure as failure:
                pause = min(self.pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                pause = max(pause, failure.retry_after or 0.0)
                hopeless = time.monotonic() + pause >= deadline
                if failure.kind not in RETRIED or attempt == self.retries or hopeless:
                    tries = f" ({attempt + 1} attempts)" if attempt else ""
                    raise Failure(failure.kind, f"{what}: {failure}{tries}") from None
                time.sleep(pause)
        raise AssertionError("unreachable")

    def fetch_json(self, *args, **options) -> dict:
        """As `fetch`, for an answer that has to be a JSON object."""
        body = self.fetch(*args, **options)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise Failure("bad_response", f"{options['what']}: not JSON") from None
        if not isinstance(answer, dict):
            raise Failure("bad_response", f"{options['what']}: not a JSON object")
        return answer

    def _follow(self, url, meter, deadline, max_bytes, types, payload, bearer, ours):
        for _ in range(MAX_REDIRECTS + 1):
            try:
                location, body = self._request(url, meter, deadline, max_bytes, types, payload, bearer, ours)
            except (OSError, http.client.HTTPException, zlib.error) as error:  # ssl's errors are OSErrors
                late = time.monotonic() >= deadline or isinstance(error, TimeoutError)
                raise Failure("timeout" if late else "connection", type(error).__name__) from None
            if location is None:
                return body
            if ours:
                raise Failure("bad_response", "it redirects; give the address that it redirects to")
            url = urljoin(url, location)
        raise Failure("bad_response", f"more than {MAX_REDIRECTS} redirects")

    def _request(self, url, meter, deadline, max_bytes, types, payload, bearer, ours):
        """(where it redirects to or None, body) of one request."""
        scheme, host, port, target = _parts(url)
        private = ours or f"{host}:{port}" in self.allow_hosts
        address = _address(host, port, private)
        patience = max(0.001, min(self.connect_timeout, deadline - time.monotonic()))
        channel = socket.create_connection((address, port), patience)
        guard, connection = None, http.client.HTTPConnection(host, port)
        try:
            if scheme == "https":
                channel = _tls().wrap_socket(channel, server_hostname=host, do_handshake_on_connect=False)
            guard = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [channel])
            guard.daemon = True
            guard.start()  # what it cuts ends whatever read is under way, in handshakes and headers too
            if scheme == "https":
                channel.do_handshake()
            channel.settimeout(self.read_timeout)
            connection.sock = channel
            headers = {"User-Agent": AGENT, "Accept": ", ".join(types), "Accept-Encoding": "gzip"}
            headers |= {"Connection": "close"} | ({"Authorization": f"Bearer {bearer}"} if bearer else {})
            if payload is None:
                connection.request("GET", target, headers=headers)
            else:
                headers["Content-Type"] = "application/json"
                connection.request("POST", target, json.dumps(payload).encode(), headers)
            with connection.getresponse() as response:
                answer = self._answer(response, meter, max_bytes, types)
            if time.monotonic() >= deadline:
                raise TimeoutError  # it may have been cut at a place that looks like an end
            return answer
        finally:
            if guard:
                guard.cancel()
            channel.close()

    def _answer(self, response, meter, max_bytes, types):
        status, location = response.status, response.headers.get("Location")
        if status in (301, 302, 303, 307, 308) and location:
            return location, b""
        if status != 200:
            said = _read(response, meter, 10_000, strict=False)
            raise _refusal(status, response.headers.get("Retry-After"), said)
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if not any(kind == t or (t.endswith("/*") and kind.startswith(t[:-1])) for t in types):
            raise Failure("bad_response", f"content type {clean(kind, 60) or 'unknown'!r}")
        return None, _read(response, meter, max_bytes)


def _parts(url):
    """(scheme, host, port, target) of a URL. Raises Failure if it is not a sound http or https one."""
    try:
        if re.search(r"[\x00-\x1f\x7f]", url):  # urlsplit would leave some of them out
            raise ValueError
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host = host.encode("idna").decode() if not host.isascii() else host
    except ValueError:
        raise Failure("blocked", "not a URL") from None
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", host):
        raise Failure("blocked", "not an http or https address")
    target = quote(parts.path or "/", safe="/%:=~+!$,;'@()*&") + (
        f"?{quote(parts.query, safe='/%:=&?~+!$,;@()*[]')}" if parts.query else ""
    )
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), target


def is_web_url(url) -> bool:
    """True for a sound http or https URL; where it leads is checked when it is fetched."""
    try:
        return isinstance(url, str) and len(url) <= 2000 and bool(_parts(url))
    except Failure:
        return False


def _address(host, port, private):
    """An address of the host that may be connected to: public, unless `private`. Raises Failure."""
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise Failure("connection", f"unknown host ({type(error).__name__})") from None
    allowed = [address for address in found if private or is_public(address)]
    if not allowed:
        raise Failure("blocked", "it leads to a private address")
    return allowed[0]


def is_public(address: str) -> bool:
    """False for loopback, private, link-local, multicast, reserved addresses, and for IPv6 ones that stand for such."""
    ip = ipaddress.ip_address(address.split("%")[0])
    every = [ip]
    if ip.version == 6:
        every += [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        every += [ipaddress.ip_address(int(ip) & 0xFFFFFFFF)] if ip in NAT64 else []
    return all(one.is_global and not one.is_multicast for one in every if one is not None)


def _tls():
    """The machine's certificates, loaded once."""
    global _context
    if _context is None:
        _context = ssl.create_default_context()
    return _context


_context: ssl.SSLContext | None = None


def _cut(channel):
    try:
        socket.socket.shutdown(channel, socket.SHUT_RDWR)  # not ssl's: it would change what the reader is using
    except OSError:
        pass  # closed already


def _read(response, meter, max_bytes, strict=True):
    """The body, at most max_bytes on the wire and unpacked. strict: raise Failure if there is more."""
    packed = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packed not in ("identity", "gzip", ""):
        raise Failure("bad_response", "unknown content encoding")
    unpack = zlib.decompressobj(31) if packed == "gzip" else None
    body, wire = bytearray(), 0
    while len(body) <= max_bytes and wire <= max_bytes:
        piece = response.read1(65536)
        if not piece:
            break
        wire += len(piece)
        body += unpack.decompress(piece, max_bytes + 1 - len(body)) if unpack else piece
    meter.add(bytes=wire)
    if strict and (len(body) > max_bytes or wire > max_bytes):
        raise Failure("bad_response", f"more than {max_bytes:,} bytes")
    if strict and (response.length or (unpack and not unpack.eof)):
        raise Failure("connection", "the answer was cut short")
    return bytes(body[:max_bytes])


def _refusal(status, retry_after, said):
    """The Failure of a status that is not 200."""
    note = _said(said)
    message = f"HTTP {status}" + (f": {note}" if note else "")
    if status == 429:
        used_up = "run out of searches" in note.lower()  # SerpApi's: no pause helps
        return Failure("quota" if used_up else "rate_limit", message, _seconds(retry_after))
    if status >= 500:
        return Failure("server", message, _seconds(retry_after))
    if status == 408:
        return Failure("timeout", message)
    return Failure("refused", message)


def _said(body):
    """The message of an error's JSON body, as SerpApi, Jina and OpenAI's interface write it; "" if there is none."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error", answer.get("readableMessage", answer.get("message")))
    error = error.get("message") if isinstance(error, dict) else error
    return clean(error, 200) if isinstance(error, str) else ""


def _seconds(retry_after):
    """Retry-After, which is seconds or a date, in seconds from now; None if it is neither."""
    if not retry_after:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def clean(text, limit: int) -> str:
    """Text of a page or title as one harmless string: no control characters, no halves of characters, white space
    squeezed (a line break stays one), at most `limit` characters. Anything but a string is ""."""
    if not isinstance(text, str):
        return ""
    text = text[: 4 * limit].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = re.sub(r"(?:[^\S\n]|[\x00-\x09\x0b-\x1f\x7f-\x9f])+", " ", text)
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()[:limit].rstrip()


def plain_text(page: str) -> str:
    """A page as text: HTML loses its tags, scripts and styles; Markdown keeps the words of its links, not images."""
    if re.search(r"<(?:!doctype|html|head|body|script|style|div|p|table|span|a)\b", page[:100_000], re.IGNORECASE):
        page = _without_tags(page)
    page = re.sub(r"!\[[^\[\]\n]{0,500}\]\([^()\n]{0,2000}\)", " ", page)
    return re.sub(r"\[([^\[\]\n]{1,500})\]\([^()\n]{0,2000}\)", r"\1", page)


def inline_text(text) -> str:
    """A title or snippet, whose tags and entities are taken away."""
    if not isinstance(text, str):
        return ""
    return html.unescape(re.sub(r"</?(?:b|i|em|strong|span|br|p|div|script|style|a)\b[^<>]{0,500}>", " ", text[:5000]))


def _without_tags(page):
    """HTML as text, in linear time whatever it holds (the standard library's parser takes minutes for some pages)."""
    parts, at = [], 0
    while (start := page.find("<!--", at)) >= 0 and (end := page.find("-->", start)) >= 0:
        parts.append(page[at:start])
        at = end + 3
    pieces, hidden, text = TAG.split("".join(parts) + page[at:]), "", []
    for before, close, name in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        text.append("" if hidden else before)
        name = name.lower()
        if hidden:
            hidden = "" if close and name == hidden else hidden
        elif name in ("script", "style", "noscript", "template") and not close:
            hidden = name
        text.append("\n" if name in ("p", "br", "div", "li", "tr", "h1", "h2", "h3") else " ")
    return html.unescape("".join(text))


TAG = re.compile(r"<(/?)!?([a-zA-Z][a-zA-Z0-9]*)\b[^<>]{0,2000}>")


SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])|\n+")


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its end mark; what is longer than 500 characters is cut into pieces."""
    found = (s.strip() for s in SENTENCE_END.split(text))
    return [s[at : at + 500] for s in found for at in range(0, len(s), 500)]


def passages(text: str, query: str, count: int) -> str:
    """The `count` sentences that fit the query best, in their order: each word of the query counts more the fewer
    sentences hold it. The first sentences, if none holds a word."""
    found = [(s, set(_words(s))) for s in sentences(text)]
    wanted = set(_words(query))
    holders = Counter(word for _, words in found for word in words & wanted)
    score = [sum(1 / holders[word] for word in words & wanted) for _, words in found]
    best = sorted(range(len(found)), key=lambda n: (-score[n], n))[:count]
    return " ".join(found[n][0] for n in sorted(n for n in best if score[n] or not any(score)))


def _words(text):
    return re.findall(r"\w+", text.lower())
