"""What an endpoint's answers become: a reply, or one line that tells no key and moves no cursor."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from evaluation import endpoint
from evaluation.endpoint import Endpoint, Refused, check_url

KEY = 'sk-se/cret"key'
REPLY = {"choices": [{"message": {"content": "Score: 3"}}]}


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with what a test sets: raw bytes, or status, headers and body; `{key}` is the header it was sent."""

    raw: bytes | None = None
    answers: list[tuple[int, dict[str, str], bytes]] = []  # noqa: RUF012 - the last one again and again
    requests: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:  # noqa: N802
        Service.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if Service.raw is not None:
            self.wfile.write(Service.raw)
            self.close_connection = True
            return
        code, headers, body = Service.answers.pop(0) if len(Service.answers) > 1 else Service.answers[0]
        sent = self.headers.get("Authorization", "")
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value.replace("{key}", sent))
        self.end_headers()
        self.wfile.write(body.replace(b"{key}", sent.encode()).replace(b"{json}", json.dumps(sent).encode()))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Service.raw, Service.answers, Service.requests = None, [], []
    server = http.server.HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def said(error: BaseException) -> str:
    """An error's text, which is one line, with those of its causes that a traceback would show."""
    assert str(error).isprintable()
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


@pytest.mark.parametrize(
    "raw",
    [
        b"hello world\r\n\r\n",  # no HTTP
        b"HTTP/1.0 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",  # a line that is too long
        b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{",  # the end is missing
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"",
        b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.0 200 OK\r\n\r\n\xff",
        b"HTTP/1.0 200 OK\r\n\r\n[]",
        b'HTTP/1.0 200 OK\r\n\r\n{"choices": [{"message": {"content": null}}]}',
        b"HTTP/1.0 500 No\r\nContent-Length: 1000\r\n\r\nhalf",
    ],
)
def test_what_is_no_chat_completion_is_an_error_in_one_line(url: str, raw: bytes):
    Service.raw = raw
    with pytest.raises(OSError) as error:  # noqa: PT011 - each says something else
        Endpoint(url, "m").ask([])
    assert said(error.value)


def test_an_endless_answer_is_not_read(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "LARGEST", 1 << 20)
    Service.answers = [(200, {}, b" " * (2 << 20) + json.dumps(REPLY).encode())]
    with pytest.raises(OSError, match="answered with more than 1 MiB"):
        Endpoint(url, "m").ask([])


@pytest.mark.parametrize("place", [b"{key}", b"{json}", b"{key}" + b"." * 1000, b"." * 290 + b"{key}"])
def test_the_key_is_in_no_error_and_in_no_reply(url: str, place: bytes):
    service = Endpoint(url, "m", key=KEY)
    assert KEY not in repr(service)
    Service.answers = [(401, {}, b"bad key " + place)]
    with pytest.raises(Refused, match="answered 401: bad key") as error:
        service.ask([])
    assert "se/cret" not in said(error.value)
    Service.answers = [
        (200, {}, json.dumps({"choices": [{"message": {"content": f"Bearer {KEY}, Score: 3"}}]}).encode())
    ]
    assert service.ask([]) == "Bearer ***, Score: 3"
    Service.raw = f"{KEY}\r\n\r\n".encode()
    with pytest.raises(OSError, match="no whole answer") as broken:
        service.ask([])
    assert "se/cret" not in said(broken.value)


def test_control_characters_are_written_out_and_errors_kept_short(url: str):
    Service.answers = [(500, {}, b"\x1b[31mRED\x1b]0;title\x07\r\nmore" + b"x" * 1000)]
    with pytest.raises(OSError, match="answered 500") as error:
        Endpoint(url, "m").ask([])
    assert r"\x1b[31mRED\x1b]0;title\x07 more" in said(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "place", ["ftp://127.0.0.1:1/x", "file:///etc/hosts", "http://127.0.0.1:1/{key}", "http://[::1"]
)
def test_no_redirect_is_followed(url: str, place: str):
    Service.answers = [(302, {"Location": place}, b"")]
    with pytest.raises(Refused, match="answered 302: ask at its new address") as error:
        Endpoint(url, "m", key=KEY).ask([])
    assert "se/cret" not in said(error.value)
    assert len(Service.requests) == 1


def test_parameters_that_a_service_does_not_take_are_left_out(url: str):
    service = Endpoint(url, "m")
    unknown = b"Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    only_one = b"'temperature' does not support 0.5 with this model."
    Service.answers = [(400, {}, unknown), (400, {}, only_one), (200, {}, json.dumps(REPLY).encode())]
    assert service.ask([]) == "Score: 3"
    assert service.ask([]) == "Score: 3"
    sent = [{name for name in request if name not in ("model", "messages")} for request in Service.requests]
    assert sent == [
        {"max_tokens", "temperature"},
        {"max_completion_tokens", "temperature"},
        {"max_completion_tokens"},
        {"max_completion_tokens"},  # it is remembered
    ]
    Service.answers = [(400, {}, unknown)]
    with pytest.raises(OSError, match="answered 400"):
        service.ask([])


@pytest.mark.parametrize("key", ["sk-\nsecret", "sk-secret\r", "sk-secret…"])
def test_keys_that_no_header_takes_are_not_quoted(key: str):
    with pytest.raises(ValueError, match="no HTTP header takes") as error:
        Endpoint("http://localhost/v1", "m", key=key)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["host/v1", "ftp://host/v1", "http://localhost:80a0/v1", "http://localhost:99999/v1", "http://localhost:8000/v 1",
     "http:///v1", "http://[::1/v1", "http://exämple:1/v1", "http://host/v1\n", "http://host/v1?a=b", "http://host/#"],
)  # fmt: skip
def test_addresses_that_are_none(url: str):
    with pytest.raises(ValueError, match="begin with http|is no base of a service") as error:
        Endpoint(url, "m")
    assert str(error.value).isprintable()


def test_addresses_without_passwords():
    for url in ("http://localhost:8000/v1", "https://api.example.com/v1/", "http://[::1]:8000"):
        check_url(url)
    with pytest.raises(ValueError, match="leave user name and password out") as error:
        check_url("http://user:secret@host/v1")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["https://host/v1?key=AIza-secret", "https://host/v1#secret", "host/v1?key=secret", "ftp://host/?secret#secret",
     "http://host:x/v1?key=secret", "http://user:secret@host/v1?key=secret"],
)  # fmt: skip
def test_what_follows_an_address_is_not_quoted(url: str):
    with pytest.raises(ValueError, match=r"host.*\.\.\.'|user name") as error:
        check_url(url)
    assert "secret" not in str(error.value)


def test_a_new_address_is_named_without_its_secrets(url: str):
    Service.answers = [(302, {"Location": "https://me:secret@host/v2?session=secret#secret"}, b"")]
    with pytest.raises(Refused, match=r"its new address instead, https://host/v2\.\.\.$") as error:
        Endpoint(url, "m").ask([])
    assert "secret" not in str(error.value)
