"""Media behind urls are fetched once, from where they may be, and training finds them on the disk."""

import http.server
import io
import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from lib.media.fetch import Fetcher, FetchError, is_public
from lib.run.errors import StageError
from tests.test_data import CHAT, REPLACE, TYPED, kit  # noqa: F401 - a fixture


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Site(http.server.BaseHTTPRequestHandler):
    """Serves what its path says, and remembers who asked."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        name = self.path.strip("/")
        status = {"gone": 404, "broken": 500, "away": 302, "out": 302, "file": 302}.get(name, 200)
        if name == "twice" and self.asked.count(self.path) < 2:
            status = 503
        if name == "slow":
            threading.Event().wait(0.6)
        data = b"<html>no" if name in ("page", "gone", "broken") else png(name if name == "blue" else "red")
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "image/png")
        self.send_header("Content-Length", str(len(data) + 9 * (name == "cut")))
        if status == 302:
            self.send_header("Location", {"away": "/red", "out": "http://169.254.0.1/x", "file": "file:///etc/hosts"}[name])
        self.end_headers()
        self.wfile.write(b"" if name == "empty" else data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """The address of a server here."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("lib.media.fetch.time.sleep", lambda seconds: None)
    Site.asked.clear()


def fetcher(folder: Path, **knobs) -> Fetcher:
    knobs = {"timeout_seconds": 5, "max_bytes": 10_000, "retries": 2, "hosts": ("127.0.0.1",)} | knobs
    return Fetcher(folder, **knobs)


def test_each_url_is_fetched_once_and_each_content_kept_once(site, tmp_path):
    urls = [f"{site}/{name}" for name in ("red", "same", "blue", "red", "away")]
    for _ in range(2):
        fetcher(tmp_path).fetch_all(urls)
    assert sorted(Site.asked) == ["/away", "/blue", "/red", "/red", "/same"]     # a red one by the redirect
    paths = [fetcher(tmp_path).path_of(url)[0] for url in urls]
    assert [path.read_bytes() for path in paths] == [png(), png(), png("blue"), png(), png()]
    assert len(set(paths)) == 2 and fetcher(tmp_path).path_of(urls[0])[1] == "HTTP 200, image/png"


@pytest.mark.parametrize("name, knobs, why, asked", [
    ("gone", {}, "HTTP 404, text/html, it starts with b'<html>no'", 1),
    ("broken", {}, "HTTP 500, text/html, it starts with b'<html>no'", 3),
    ("broken", {"retries": 0}, "HTTP 500, text/html, it starts with b'<html>no'", 1),
    ("red", {"max_bytes": 20}, "HTTP 200, image/png: over url_max_mib, 1.90735e-05 MiB", 1),
    ("cut", {}, f"HTTP 200, image/png: cut off after {len(png())} bytes", 3),
    ("red", {"hosts": ()}, "127.0.0.1 is no public host; url_hosts can allow it", 0),
    ("out", {}, "169.254.0.1 is no public host; url_hosts can allow it", 1),
    ("file", {}, "HTTP 302, image/png, it starts with ", 1),
    ("slow", {"timeout_seconds": 0.1, "retries": 1}, "timed out", 2),
])
def test_a_url_that_gives_nothing_says_why_and_is_tried_again_where_that_may_help(name, knobs, why, asked, site, tmp_path):
    one = fetcher(tmp_path, **knobs)
    one.fetch_all([f"{site}/{name}"])
    with pytest.raises(FetchError) as caught:
        one.path_of(f"{site}/{name}")
    assert str(caught.value).startswith(why) and len(Site.asked) == asked


def test_a_server_that_fails_once_is_asked_again(site, tmp_path):
    one = fetcher(tmp_path)
    one.fetch_all([f"{site}/twice"])
    assert one.path_of(f"{site}/twice")[0].read_bytes() == png() and Site.asked == ["/twice"] * 2


def test_a_failure_is_tried_again_by_the_next_run(site, tmp_path):
    fetcher(tmp_path, hosts=()).fetch_all([f"{site}/red"])
    fetcher(tmp_path).fetch_all([f"{site}/red"])
    assert fetcher(tmp_path).path_of(f"{site}/red")[0].read_bytes() == png()


@pytest.mark.parametrize("url", ["http://", "http:///x", "http://[::1", "http://a b/c", "http://\udcff/", "http://127.0.0.1:0/"])
def test_a_url_that_is_none_says_why(url, tmp_path):
    one = fetcher(tmp_path, retries=0)
    one.fetch_all([url])
    with pytest.raises(FetchError):
        one.path_of(url)


@pytest.mark.parametrize("ip, public", [
    ("8.8.8.8", True), ("2001:4860:4860::8888", True), ("127.0.0.1", False), ("10.0.0.1", False), ("::1", False),
    ("169.254.169.254", False), ("::ffff:127.0.0.1", False), ("fe80::1%eth0", False), ("224.0.0.1", False),
    ("0.0.0.0", False),
])
def test_only_addresses_of_the_public_internet_are_public(ip, public):
    assert is_public(ip) == public


def test_02_fetches_media_of_columns_and_parts_and_later_stages_need_no_network(kit, site):  # noqa: F811
    part = {"role": "user", "content": [{"type": "image", "url": f"{site}/blue"}, {"type": "text", "text": "What?"}]}
    rows = [CHAT | {"image": f"{site}/red"}, TYPED | {"images": [{"path": f"{site}/red"}]},
            {"messages": [part, CHAT["messages"][1]]}, CHAT | {"url": f"{site}/never"}]
    kit.run("url_hosts=[127.0.0.1]", rows=rows)
    assert sorted(Site.asked) == ["/blue", "/red"]
    paths = [sample["media"][0]["path"] for sample in kit.samples()[:3]]
    assert [Path(path).read_bytes() for path in paths] == [png(), png(), png("blue")]
    assert all(Path(path).parent == Path("run/media") for path in paths)
    kit.script("02_data").main(["run", "--force"])
    assert len(Site.asked) == 2


@pytest.mark.parametrize("name, overrides, reason", [
    ("page", ["url_hosts=[127.0.0.1]"], "HTTP 200, text/html: not a picture (it starts with b'<html>no')"),
    ("gone", ["url_hosts=[127.0.0.1]"], "HTTP 404, text/html, it starts with b'<html>no'"),
    ("red", [], "127.0.0.1 is no public host; url_hosts can allow it"),
])
def test_a_row_whose_url_gives_no_picture_is_a_reject_with_url_status_type_and_bytes(name, overrides, reason, kit, site):  # noqa: F811
    bad = CHAT | {"image": f"{site}/{name}"}
    with pytest.raises(StageError) as caught:
        kit.run(*overrides, rows=[CHAT, bad, bad])
    assert caught.value.what == f"data.jsonl:2: {site}/{name}: {reason} (and 1 more bad row)"
    assert caught.value.fix.startswith(REPLACE.partition(";")[0])
    assert len({reject["reason"] for reject in kit.rejects()}) == 1 and json.dumps(kit.rejects())
