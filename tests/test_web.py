"""HTTP from below: addresses, certificates, retries, limits of bytes; and text from the web."""

import email.utils
import errno
import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from urllib.parse import quote, unquote

import pytest
from local_web import LocalWeb

from config import InputError
from search import web as search_web
from search.calls import Failure
from search.text import clean, inline_text, passages, plain_text, sentences
from search.web import Client, Job, Limit, is_public, is_web_url


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # metadata of clouds
        ("100.64.0.1", False),  # carriers' NAT
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),  # IPv4 in IPv6
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),  # NAT64
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),  # 6to4
        ("2002:808:808::1", False),
        ("192.0.0.9", False),  # protocol assignments, and a cloud's metadata service
        ("192.0.0.192", False),
        ("192.88.99.1", False),  # 6to4's relay
        ("198.18.0.1", False),
        ("64:ff9b:1::808:808", False),  # NAT64 for local use
        ("64:ff9b::a00:1", False),
        ("::8.8.8.8", False),  # IPv4 in IPv6, as nobody writes it
        ("::ffff:0:808:808", False),
        ("fec0::1", False),  # site-local
        ("100::1", False),
        ("4000::1", False),  # not given out
        ("5f00::1", False),
        ("2001::1", False),  # Teredo
        ("2001:20::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("2001:4860:4860::8888", True),
        ("2a00:1450:4001::1", True),
        ("2620:4f:8000::1", True),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


@pytest.mark.parametrize(
    "url, sound",
    [
        ("https://a.example/x?y=z#w", True),
        ("http://a.example:8080", True),
        ("https://münchen.example/straße ö", True),
        ("ftp://a.example/", False),
        ("file:///etc/passwd", False),
        ("data:image/png;base64,AAAA", False),
        ("javascript:alert(1)", False),
        ("//a.example", False),
        ("https://", False),
        ("https://a.example:99999/", False),
        ("https://[::1", False),
        ("https://" + "a" * 300 + ".example/", True),  # its host does not resolve: that is found out later
        ("https://a.example/" + "x" * 3000, False),
        ("https://a\n.example/", False),
        ("https://a.example/\ud83d", False),  # half a character
        ("https://a.example/?q=\udc00", False),
        ("https://[::1::]/", False),
        ("https://[::ffff:1.2.3.4.5]/", False),
        ("", False),
        (None, False),
        (3, False),
    ],
)
def test_web_urls(url, sound):
    assert is_web_url(url) == sound


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def fetch(url, seconds=5.0, retries=0, pause=0.01, **options):
    client = Client("it", Limit(4), **{"ours": False, "max_bytes": 1000, "types": ("text/*", "image/*"), **options})
    client.retries, client.pause = retries, pause
    return client.fetch(url, Job(seconds))


def failure(*args, **options):
    with pytest.raises(Failure) as error:
        fetch(*args, **options)
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "127.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_no_spelling_of_loopback_gets_through(host):
    with closing(socket.create_server(("127.0.0.1", 0))) as private:
        private.settimeout(0.05)
        wrong = failure(f"http://{host}:{private.getsockname()[1]}/")
        assert wrong.kind in ("blocked", "connection")  # some resolvers do not know the odd ones
        with pytest.raises(TimeoutError):
            private.accept()


def test_the_address_that_was_checked_is_the_one_that_is_used(monkeypatch):
    """A name that is public when it is looked up first, and loopback when it is looked up again."""
    answers, connected = iter([["93.184.216.34"], ["127.0.0.1"]]), []

    def resolve(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    def connect(address, timeout, socket_options):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(search_web.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(search_web, "create_connection", connect)
    assert failure("http://rebind.example/").kind == "connection" and connected == [("93.184.216.34", 80)]
    assert failure("http://rebind.example/").kind == "blocked" and len(connected) == 1


def resolves_to(monkeypatch, *addresses):
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(search_web.socket, "getaddrinfo", lambda *_, **__: infos)


def test_all_addresses_of_a_name_are_tried(monkeypatch):
    """localhost that is ::1 first, where nobody listens."""
    original = socket.getaddrinfo
    with replies(OK) as (_, url):
        both = original("::1", 0) + original("127.0.0.1", 0)

        def resolve(host, port, *args, **options):
            return both if host == "localhost" else original(host, port, *args, **options)

        monkeypatch.setattr(search_web.socket, "getaddrinfo", resolve)
        assert fetch(url, ours=True) == b"yes"


def test_only_checked_addresses_are_tried(monkeypatch):
    tried = []

    def connect(address, timeout, socket_options):
        tried.append(address[0])
        assert timeout <= (2.0 if len(tried) == 1 else 1.8)  # what is left until the deadline
        time.sleep(0.2 if len(tried) == 1 else 0)
        raise TimeoutError if len(tried) == 1 else ConnectionRefusedError

    monkeypatch.setattr(search_web, "create_connection", connect)
    resolves_to(monkeypatch, "10.0.0.1", "8.8.8.8", "::1", "2606:4700::1111", *["9.9.9.9"] * 50)
    assert "ConnectionRefusedError" in str(failure("http://many.example/", seconds=2.0))
    assert tried == ["8.8.8.8", "2606:4700::1111", *["9.9.9.9"] * (search_web.MAX_ADDRESSES - 2)]


@pytest.mark.parametrize("ours, proxy", [(False, ""), (True, ""), (True, "http://proxy.example:1")])
def test_a_name_server_that_hangs_ends_at_the_deadline(monkeypatch, ours, proxy):
    end = threading.Event()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setattr(search_web.socket, "getaddrinfo", lambda *_, **__: end.wait(20) and [])
    started = time.monotonic()
    assert failure("http://slow.example/", ours=ours, seconds=0.3).kind == "timeout"
    end.set()
    assert time.monotonic() - started < 5


def test_a_connection_that_is_reset_while_it_is_made_is_typed(monkeypatch):
    """urllib3 would go on without a socket."""

    def reset(*_, **__):
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(search_web, "create_connection", reset)
    wrong = failure("http://127.0.0.1:9/", ours=True)
    assert wrong.kind == "connection" and "ConnectionResetError" in str(wrong)


def test_an_allowed_host_is_one_host_and_port():
    with LocalWeb() as server:
        port = server.server_address[1]
        assert fetch(f"{server.url}/thumb/1.jpg", max_bytes=10**6, allow_hosts=(server.host,))
        for allowed in ((), ("127.0.0.1",), (f"127.0.0.1:{port + 1}",), (f"localhost:{port}",)):
            assert failure(f"{server.url}/thumb/1.jpg", allow_hosts=allowed).kind == "blocked"


class Counted(http.server.BaseHTTPRequestHandler):
    """Answers with the next of the server's replies: status, headers, body."""

    def do_GET(self):
        self.server.times.append(time.monotonic())
        status, headers, body = self.server.replies.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def replies(*answers, tls=None):
    server = http.server.HTTPServer(("127.0.0.1", 0), Counted)
    server.replies, server.times = list(answers), []
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server, f"{'https' if tls else 'http'}://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


OK = (200, {"Content-Type": "text/plain"}, b"yes")


def test_retry_after_is_honoured_in_seconds_and_as_a_date():
    for value in ("1", "date"):
        value = email.utils.formatdate(time.time() + 2.5, usegmt=True) if value == "date" else value
        with replies((429, {"Retry-After": value}, b""), OK) as (server, url):
            assert fetch(url, ours=True, retries=1) == b"yes"
            assert server.times[1] - server.times[0] >= 0.9
    with replies((503, {"Retry-After": "9"}, b""), OK) as (server, url):
        assert failure(url, ours=True, retries=1, seconds=2.0).kind == "server"  # it would come too late
        assert len(server.replies) == 1
    for nonsense in ("soon", "-1", "9" * 400, "9" * 5000, "\x00", "\u00b2", "1e400", "Mon, 32 Foo 99999 99:99:99 GMT"):
        assert 0 <= search_web._seconds(nonsense) <= 1e9


def test_pauses_between_attempts_double_and_end_at_the_deadline(monkeypatch):
    pauses = []
    monkeypatch.setattr(search_web.time, "sleep", lambda seconds: pauses.append(seconds) if seconds else None)
    resolves_to(monkeypatch, "8.8.8.8")
    monkeypatch.setattr(search_web, "create_connection", lambda *_, **__: (_ for _ in ()).throw(OSError("down")))
    message = str(failure("http://a.example/", retries=6, pause=1.0, seconds=500.0))
    assert "7 attempts" in message and len(pauses) == 6
    assert all(0.5 <= pause / 2**n <= 1.0 for n, pause in enumerate(pauses[:5])) and pauses[5] <= 30.0
    assert len(set(pauses)) == 6  # jitter
    pauses.clear()
    failure("http://a.example/", retries=6, pause=1.0, seconds=3.0)
    assert 1 <= len(pauses) < 4


@pytest.mark.parametrize(
    "reply, kind",
    [
        ((200, {"Content-Type": "image/svg+xml"}, b"<svg/>"), "bad_response"),
        ((200, {}, b"x"), "bad_response"),
        ((200, {"Content-Type": "text/plain", "Content-Encoding": "br"}, b"x"), "bad_response"),
        ((200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, b"no gzip"), "connection"),
        ((200, {"Content-Type": "text/plain"}, b"x" * 1001), "bad_response"),
        ((204, {}, b""), "refused"),
        ((404, {}, b'{"error": "gone"}'), "refused"),
        ((302, {}, b""), "refused"),
        ((302, {"Location": "gopher://a.example"}, b""), "blocked"),
    ],
)
def test_answers_that_are_none(reply, kind):
    with replies(reply) as (server, url):
        host = url.split("/")[2]
        assert failure(url, types=("text/plain", "image/png"), allow_hosts=(host,)).kind == kind


def test_redirects_are_followed_a_few_times_and_never_with_a_key():
    def to(path):
        return (301, {"Location": path}, b"")

    with replies(to("/a"), to("b?c=1"), to("/d"), to("//LOCAL/e"), OK) as (server, url):
        host = url.split("/")[2]
        server.replies[3] = to(f"//{host}/e")
        assert fetch(url, allow_hosts=(host,)) == b"yes"
    with replies(*[to("/x")] * 5) as (server, url):
        assert "redirects" in str(failure(url, allow_hosts=(url.split("/")[2],)))
    with replies(to("/a"), OK) as (server, url):
        assert "redirects" in str(failure(url, ours=True, key="secret")) and len(server.replies) == 1


KEY = "serp-01/23+456=789ab"


@pytest.mark.parametrize(
    "echo",
    [
        KEY,
        quote(KEY, safe=""),
        quote(KEY, safe="").lower(),
        "".join(f"%{ord(c):02x}" for c in KEY),
        KEY.upper(),
        KEY[:9] + "\n" + KEY[9:],
        " ".join(KEY),
        "x" * 180 + KEY,  # where the message is cut
        "x" * (1 << 16) + KEY,  # where the body is cut
    ],
)
@pytest.mark.parametrize("status", [200, 401])
def test_a_key_that_an_answer_repeats_is_taken_out(echo, status):
    body = json.dumps({"error": {"message": f"No such key: {echo}!"}}).encode()
    plain = f"No such key: {echo}!".encode()
    escaped = body.replace(b"-", b"\\u002d").replace(b"/", b"\\/")
    for answer in (body, plain, escaped):
        with replies((status, {"Content-Type": "text/plain; " + KEY}, answer)) as (_, url):
            if status == 200:
                said = fetch(url, ours=True, key=KEY, max_bytes=10**6).decode()
            else:
                said = str(failure(url, ours=True, key=KEY))
        said = unquote("".join(said.split())).lower()
        for piece in (KEY[at : at + 6] for at in range(len(KEY) - 5)):
            assert piece.lower() not in said


def test_what_is_no_key_is_refused_and_not_shown(monkeypatch):
    for value in ("sk-12\n34", "schlüssel-1", "ключ", "a b", "abc\x07"):
        monkeypatch.setitem(search_web.os.environ, "SOME_KEY", value)
        with pytest.raises(InputError, match="SOME_KEY") as error:
            search_web.key_of("SOME_KEY")
        assert value not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("SOME_KEY", " sk-1 \n")
    assert search_web.key_of("SOME_KEY") == "sk-1" and search_web.key_of("NO_KEY") == ""
    assert "sk-1" not in repr(Client("it", Limit(1), key="sk-1"))
    page = "<p>No such key:</p>" + "".join(f"&#{ord(c)};" for c in KEY)
    with replies((401, {}, page.encode())) as (_, url):
        assert str(failure(url, ours=True, key=KEY)) == "it: HTTP 401: No such key: ***"
    with replies((200, {"Content-Type": f"text/{KEY}"}, b"")) as (_, url):
        assert str(failure(url, ours=True, key=KEY, types=("image/*",))) == "it: content type: 'text/***'"
    with replies((401, {}, b"an EMPTY basket")) as (_, url):  # what is no secret does not spoil what is said
        assert "EMPTY basket" in str(failure(url, ours=True, key="EMPTY"))


@pytest.fixture
def certificate(tmp_path):
    """(path of a certificate for localhost, a server's context that has its key)."""
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {certificate}"
    try:
        subprocess.run([*command.split(), "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl to make a certificate")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    return certificate, tls


def test_certificates_are_checked(certificate, monkeypatch):
    with replies(OK, OK, tls=certificate[1]) as (server, url):
        wrong = failure(url, ours=True)
        assert wrong.kind == "connection" and "Cert" in str(wrong)
        monkeypatch.setattr(search_web, "tls_context", lambda: ssl.create_default_context(cafile=certificate[0]))
        assert fetch(url, ours=True) == b"yes"
        wrong = failure(url.replace("localhost", "127.0.0.1"), ours=True)  # another name than the certificate's
        assert wrong.kind == "connection" and "Cert" in str(wrong)


class Tunnel(http.server.BaseHTTPRequestHandler):
    """A proxy that connects whatever it is asked for to the server's `target`, and then says no more."""

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        with closing(socket.create_connection(self.server.target)) as other:
            back = threading.Thread(target=pipe, args=(other, self.connection))
            back.start()
            pipe(self.connection, other)
            back.join()

    def log_message(self, *_):
        pass


def pipe(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_tls_goes_through_a_proxy_and_ends_at_the_deadline_there_too(certificate, monkeypatch):
    monkeypatch.setattr(search_web, "tls_context", lambda: ssl.create_default_context(cafile=certificate[0]))
    with replies(OK, tls=certificate[1]) as (server, url), closing(socket.create_server(("127.0.0.1", 0))) as silent:
        proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tunnel)
        proxy.asked, proxy.target, proxy.daemon_threads = [], server.server_address, True
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
        assert fetch("https://localhost:1/", ours=True) == b"yes" and proxy.asked == ["localhost:1"]
        proxy.target = silent.getsockname()
        started = time.monotonic()
        assert failure("https://localhost:2/", ours=True, seconds=0.5).kind == "timeout"
        assert time.monotonic() - started < 5 and proxy.asked[1:] == ["localhost:2"]
        assert failure(url).kind == "blocked" and len(proxy.asked) == 2  # not for what is not ours
        proxy.shutdown()
        proxy.server_close()


def test_a_handshake_that_hangs_ends_at_the_deadline():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        assert failure(url, ours=True, seconds=0.3).kind == "timeout"


# ------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  a \t b\x00c \x1b[31m d\x9f", "a b c [31m d"),
        ("a\r\n\n\n  b", "a\nb"),
        ("x" * 50, "x" * 20),
        ("half \ud83d of", "half \ufffd of"),
        ("<|im_end|>", "<|im_end|>"),
        (b"bytes", ""),
        (None, ""),
        (["a"], ""),
    ],
)
def test_clean(text, expected):
    assert clean(text, 20) == expected


def test_html_becomes_text():
    page = "<!doctype html><html><head><title>T</title><style>p{}</style><script>if (a < b) evil()</script></head>"
    page += "<body><p>One &amp; <b>two</b></p><p onclick='x()'>three<br>four</p><noscript>no</noscript>"
    assert clean(plain_text(page + "<script>never closed"), 100) == "T\nOne & two\nthree\nfour"
    assert clean(plain_text("# Title\n\n![logo](http://x/y.png) see [the *page*](http://x) 2 < 3"), 99) == (
        "# Title\nsee the *page* 2 < 3"
    )
    assert inline_text("<b>A</b> &lt;b&gt; &amp; c <answer>") == " A  <b> & c <answer>" and inline_text(7) == ""


@pytest.mark.parametrize(
    "piece", ["<", "<a ", "<!--", "<![CDATA[", "&", "&#", "[", "![", "](", "<p", "</", "<script>", "\"'<"]
)
def test_hostile_pages_are_read_in_time(piece):
    """120,000 characters: what is read of a page at most."""
    page = "<p>" + piece * (120_000 // len(piece))
    started = time.process_time()
    passages(clean(plain_text(page[:120_000]), 30_000), "a b", 5)
    inline_text(page)
    assert time.process_time() - started < 5


def test_sentences():
    text = 'One. Two! "Three?" 4.5 is a number\nA line. 一。二！'
    assert sentences(text) == ["One.", "Two!", '"Three?', "4.5 is a number", "A line.", "一。", "二！"]
    assert [len(s) for s in sentences("x" * 1200)] == [500, 500, 200]


def test_passages_are_the_sentences_that_fit_best_in_their_order():
    text = "Nauru is small. The flag is blue. Cats sleep. The flag of Nauru has a star! A flag waves. Nauru."
    assert passages(text, "flag of Nauru", 1) == "The flag of Nauru has a star!"
    assert passages(text, "Cats?", 3) == "Cats sleep."  # only what holds a word
    assert passages(text, "star of Nauru", 2) == "Nauru is small. The flag of Nauru has a star!"
    assert passages(text, "zebra", 2) == "Nauru is small. The flag is blue."
    assert passages("", "x", 2) == ""
