"""A hub of our own for tests: what huggingface_hub asks, answered by http.server from folders on this machine."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)
REFUSALS = {  # of a model's name: status and X-Error-Code, as the real hub answers
    "gated/unknown": (401, "GatedRepo"), "gated/no": (403, "GatedRepo"), "nobody/nothing": (401, "RepoNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """head: what main is. models: id -> folder. asked: (method, path) of all requests.

    mood: file -> how it is sent the next times, "cut" in the middle or "broken".
    """

    head = COMMIT
    models: dict[str, Path] = {}
    asked: list[tuple[str, str]] = []
    mood: dict[str, list[str]] = {}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        """A file, or what the repository holds; other requests are refused as the real hub does."""
        Hub.asked.append((self.command, self.path))
        words = self.path.partition("?")[0].strip("/").split("/")
        api = words[0] == "api"
        model, kind, revision, *rest = ["/".join(words[2:4] if api else words[:2]), *words[4 if api else 2:], "", ""]
        name = "/".join(filter(None, rest))
        if model in REFUSALS:
            return self.refuse(*REFUSALS[model])
        if model not in Hub.models:
            return self.refuse(401, "RepoNotFound")
        if revision not in REVISIONS:
            return self.refuse(404, "RevisionNotFound")
        folder = Hub.models[model]
        if kind == "tree" and not name:
            files = [path for path in sorted(folder.iterdir()) if path.is_file()]
            content = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            return self.send(json.dumps(content).encode())
        if kind != "resolve" or not (folder / name).is_file():
            return self.refuse(404, "EntryNotFound")
        moods = Hub.mood.get(name, []) if self.command == "GET" else []
        self.send((folder / name).read_bytes(), moods.pop(0) if moods else "")

    def refuse(self, status: int, code: str) -> None:
        """Send a refusal, with the header by which huggingface_hub tells them apart."""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", Hub.head)                 # so that a file's absence is kept, too
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content: bytes, mood: str = "") -> None:
        """Send the content; half of it where the mood is "cut", a refusal where it is "broken"."""
        if mood == "broken":
            return self.refuse(503, "Broken")
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", Hub.head)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:len(content) // 2] if mood == "cut" else content)
        self.close_connection = True

    def log_message(self, *words):
        """Log nothing: a test prints what matters."""


def serve() -> ThreadingHTTPServer:
    """A running hub; its address is http://127.0.0.1:PORT."""
    Hub.head, Hub.models, Hub.asked, Hub.mood = COMMIT, {}, [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    return server
