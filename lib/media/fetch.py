"""fetch: media behind urls, each fetched once into a folder of the run, so that training needs no network.

A file is named by the hash of its content; a note, named by the hash of the url, says which file it is. Only
public hosts are asked, also after redirects, at the very address that was checked, and without a proxy, which
could ask others. A recipe can name private hosts that it trusts.

Fork me to: fetch from elsewhere (`Fetcher._download`).
"""
import hashlib
import http.client
import ipaddress
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lib.run.errors import one_line

CONNECTIONS = 16
WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)
SHOWN_BYTES = 24


class FetchError(ValueError):
    """A url that gives no medium: why, in one line without the url."""


class PrivateHost(OSError):
    """A host at an address that isn't public."""


@dataclass(frozen=True)
class Fetcher:
    """Fetches urls into `folder`; hosts: private ones that may be asked; asked: urls that were already."""
    folder: Path
    timeout_seconds: float
    max_bytes: int
    retries: int
    hosts: tuple[str, ...]
    asked: set[str] = field(default_factory=set)

    def fetch_all(self, urls: list[str]) -> None:
        """Fetch every url that isn't in the folder yet. None is asked twice, whether it was had or not."""
        missing = [url for url in dict.fromkeys(urls)
                   if url not in self.asked and "sha256" not in self._read(url)]
        self.asked.update(missing)
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                deque(pool.map(self._fetch, missing), maxlen=0)

    def path_of(self, url: str) -> tuple[Path, str]:
        """(the file with a url's content, how it was served); FetchError with what went wrong otherwise."""
        note = self._read(url)
        if "error" in note:
            raise FetchError(note["error"])
        return self.folder / note["sha256"], note["served"]

    def refuse(self, url: str, why: str) -> None:
        """Note that a url's content is no medium, and why; the next run of the stage fetches it anew."""
        write(self._note(url), json.dumps({"url": url, "error": why}).encode())

    def _read(self, url: str) -> dict:
        """The url's note, {} where there is none."""
        note = self._note(url)
        return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}

    def _note(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode('utf-8', 'backslashreplace')).hexdigest()}.json"

    def _fetch(self, url: str) -> None:
        """Fetch a url; write its content and its note into the folder."""
        try:
            data, served = self._tried(url)
            sha256 = hashlib.sha256(data).hexdigest()
            if not (self.folder / sha256).is_file():
                write(self.folder / sha256, data)
            write(self._note(url), json.dumps({"url": url, "sha256": sha256, "served": served}).encode())
        except FetchError as error:
            self.refuse(url, str(error))

    def _tried(self, url: str) -> tuple[bytes, str]:
        """(content, how it was served, as "HTTP 200, image/png") of a url; FetchError after all tries."""
        for number in range(self.retries + 1):
            try:
                return self._download(url)
            except urllib.error.HTTPError as error:
                why, final = served_as(error, error.read(SHOWN_BYTES)), error.code not in WORTH_ANOTHER_TRY
            except (OSError, http.client.HTTPException, ValueError) as error:
                error = getattr(error, "reason", error)    # urllib wraps what a connection says
                why = one_line(error)
                final = isinstance(error, PrivateHost | FetchError | ValueError)
            if final or number == self.retries:
                raise FetchError(why)
            time.sleep(min(0.2 * 2**number, 10))

    def _download(self, url: str) -> tuple[bytes, str]:
        """(content, how it was served) of a url, asked once."""
        request = urllib.request.Request(url, headers={"User-Agent": "python", "Accept": "*/*"})
        with opener(self.hosts).open(request, timeout=self.timeout_seconds) as answer:
            data = answer.read(self.max_bytes + 1)
            if len(data) > self.max_bytes:
                raise FetchError(f"{served_as(answer)}: over url_max_mib, {self.max_bytes / 2**20:g} MiB")
            if answer.headers.get("Content-Length") not in (None, str(len(data))):
                raise OSError(f"{served_as(answer)}: cut off after {len(data)} bytes")
            return data, served_as(answer)


def served_as(answer, start: bytes | None = None) -> str:
    """The status and type of an answer, and its first bytes if they are given."""
    shown = "" if start is None else f", it starts with {start!r}"
    return f"HTTP {answer.status}, {answer.headers.get_content_type()}{shown}"


def opener(hosts: tuple[str, ...]) -> urllib.request.OpenerDirector:
    """An opener of http and https urls that connects to public hosts, and to these."""

    def connect(address: tuple[str, int], timeout, source=None) -> socket.socket:
        host, port = address
        for *_, (ip, *_) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if host in hosts or is_public(ip):
                return socket.create_connection((ip, port), timeout, source)
        raise PrivateHost(f"{host} is no public host; url_hosts can allow it")

    def checked(kind: type) -> type:
        class Checked(kind):
            def __init__(self, *given, **options):
                super().__init__(*given, **options)
                self._create_connection = connect
        return Checked

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(checked(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(checked(http.client.HTTPSConnection), request, context=self._context)

    director = urllib.request.OpenerDirector()
    for handler in (Http(), Https(), urllib.request.HTTPRedirectHandler(),
                    urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
                    urllib.request.UnknownHandler()):
        director.add_handler(handler)
    return director


def is_public(ip: str) -> bool:
    """Whether an address belongs to the public internet."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_global and not address.is_multicast


def write(path: Path, data: bytes) -> None:
    """Write a file as a whole, even where another process writes the same one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    aside.write_bytes(data)
    aside.replace(path)
