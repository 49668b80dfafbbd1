"""A model behind an OpenAI-compatible endpoint: one conversation, one reply; the key is never shown nor kept."""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

LARGEST = 4 << 20  # bytes of an answer that are read
MOST_SAID = 300  # characters of what a service says that are shown
SHORTEST_SECRET = 4  # a shorter key is a stand-in such as "x", and is part of many words
REFUSALS = (401, 403, 404)  # key or address are wrong: asking again changes nothing
MOST_TOKENS = 512
MOST_WITH_THOUGHT = 4096  # services that want the newer parameter count what the model thinks, too


class Refused(ValueError):  # noqa: N818 - what the service did
    """The service knows neither the key nor the address, or sends elsewhere."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would drop the question and may lead to another service or kind of address."""

    def http_error_302(self, *args: Any) -> None:
        """None: the answer becomes an `HTTPError`."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # type: ignore[assignment]


OPENER = urllib.request.build_opener(NoRedirect)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where to ask: an OpenAI-compatible service.

    url: its base, such as "https://host/v1"; the path /chat/completions is added.
    key: sent as a bearer token if not empty; replaced by *** in replies and errors.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    temperature: float = 1.0
    timeout: float = 120.0
    _left_out: set[str] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        if not fits_header(self.key):
            raise ValueError("the key holds a character that no HTTP header takes, such as a line break")

    def ask(self, messages: Sequence[dict[str, Any]]) -> str:
        """The reply to a conversation.

        Raises `OSError` when the service does not answer as it should, and `Refused` when it never will.
        """
        try:
            body = self._post(messages)
        except http.client.HTTPException as error:  # its text may quote what the service sent, so it is no cause
            raise OSError(self.told(f"{self.url} gave no whole answer ({type(error).__name__}: {error})")) from None
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            why = self.told(f"{type(error).__name__}: {error}")
            raise OSError(f"{self.url} gave no chat completion ({why})") from None
        if not isinstance(content, str):
            raise OSError(f"{self.url} gave no chat completion (its content is no text)")
        return self.hide(content)

    def _post(self, messages: Sequence[dict[str, Any]]) -> bytes:
        """Body of the answer; when the service does not know a parameter the question is sent again without it."""
        while True:
            try:
                with OPENER.open(self._request(messages), timeout=self.timeout) as response:
                    body = response.read(LARGEST + 1)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(LARGEST).decode(errors="replace")
                if error.code == 400 and self._leave_out(said):
                    continue
                if 300 <= error.code < 400:
                    said = f"ask at its new address instead, {without_secrets(str(error.headers.get('Location')))}"
                kind = Refused if error.code in REFUSALS or error.code < 400 else OSError
                raise kind(f"{self.url} answered {error.code}: {self.told(said)}") from None
            if len(body) > LARGEST:
                raise OSError(f"{self.url} answered with more than {LARGEST >> 20} MiB, which is no chat completion")
            return body

    def _request(self, messages: Sequence[dict[str, Any]]) -> urllib.request.Request:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        if "max_tokens" in self._left_out:
            body["max_completion_tokens"] = MOST_WITH_THOUGHT
        else:
            body["max_tokens"] = MOST_TOKENS
        if "temperature" not in self._left_out:
            body["temperature"] = self.temperature
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        return request

    def _leave_out(self, said: str) -> bool:
        """Whether an error names a parameter that can be left out; it then is, from now on."""
        for name in ("max_tokens", "temperature"):
            if name in said and name not in self._left_out:
                self._left_out.add(name)
                log.info("%s does not take %s, which is left out from now on", self.url, name)
                return True
        return False

    def hide(self, text: str) -> str:
        """The text without the key, also as JSON writes it."""
        if len(self.key) < SHORTEST_SECRET:
            return text
        for form in (self.key, json.dumps(self.key)[1:-1], self.key.replace("/", "\\/")):
            text = text.replace(form, "***")
        return text

    def told(self, text: str) -> str:
        """What a service said, fit for a log: one short line of printable characters, without the key."""
        line = " ".join(self.hide(text).split())
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        return line if len(line) <= MOST_SAID else line[:MOST_SAID] + "..."


def fits_header(text: str) -> bool:
    """Whether a text can be sent in an HTTP header: printable characters of Latin-1."""
    return text.isprintable() and all(ord(character) < 256 for character in text)


def without_secrets(url: str) -> str:
    """An address to be shown: user name and password, and all from "?" or "#" on, may be secrets."""
    shown, *secret = re.split(r"[?#]", re.sub(r"//[^/]*@", "//", url), maxsplit=1)
    return shown + ("..." if secret else "")


def check_url(url: str) -> None:
    """Raise `ValueError` for what is no base of a service: http or https, a host, perhaps a port and a path."""
    if "@" in url:  # not quoted: what is before it may be a password
        raise ValueError("the service's address holds an @: leave user name and password out of it")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{without_secrets(url)!r}: begin with http:// or https://")
    try:
        parts = urllib.parse.urlsplit(url)
        well_formed = bool(parts.hostname) and parts.port != 0  # a port that is no number raises
    except ValueError:
        well_formed = False
    if not well_formed or not url.isascii() or not url.isprintable() or any(c in url for c in " ?#"):
        raise ValueError(f"{without_secrets(url)!r} is no base of a service: it has a host, perhaps a port and a path, "
                         "in ASCII without spaces, '?' and '#', such as http://localhost:8000/v1")  # fmt: skip
