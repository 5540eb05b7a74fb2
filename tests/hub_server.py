"""A small server that speaks the hub's API as far as downloads use it, and misbehaves on demand.

with serve({"config.json": b"{}", ...}) as hub:
    hub.faults["config.json"] = ["503", "drop"]       # one for each request, then it behaves
    hub.url, hub.requests                             # [(method, file or "api", range), ...]
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files: dict[str, bytes], repo_id: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.repo_id = files, repo_id
        self.others: dict[str, dict[str, bytes]] = {}  # more repositories, which behave
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: list[str | None] = []
        self.with_sizes = True  # some mirrors list names only
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, name: str) -> str | None:
        with self.lock:
            waiting = self.faults.get(name)
            return waiting.pop(0) if waiting else None

    def gets(self, name: str) -> list[str | None]:
        """Ranges of the GET requests for a file."""
        return [span for method, file, span in self.requests if method == "GET" and file == name]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        for repo_id, files in {
            self.server.repo_id: self.server.files,
            **self.server.others,
        }.items():
            repo = re.escape(repo_id)
            if re.fullmatch(f"/api/models/{repo}(/revision/.*)?", path):
                return self.send_list(repo_id, files, body)
            if match := re.fullmatch(f"/{repo}/resolve/[^/]+/(.*)", path):
                return self.send_file(match[1], files, body)
        self.refuse("404", "api", body, {"X-Error-Code": "RepoNotFound"})

    def note(self, name: str) -> str | None:
        span = self.headers.get("Range")
        with self.server.lock:
            self.server.requests.append((self.command, name, span))
            self.server.tokens.append(self.headers.get("Authorization"))
        return self.server.next_fault(name) if self.command == "GET" else None

    def send_list(self, repo_id: str, files: dict[str, bytes], body: bool) -> None:
        if fault := self.note("api"):
            return self.refuse(fault, "api", body)
        siblings = []
        for name, data in files.items():
            entry = {"rfilename": name}
            if self.server.with_sizes:
                entry |= {"size": len(data), "blobId": git_hash(data)}
                if name.endswith(".safetensors"):
                    sha256 = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        answer = {"id": repo_id, "sha": COMMIT, "siblings": siblings}
        self.reply(200, json.dumps(answer).encode(), body, {"Content-Type": "application/json"})

    def send_file(self, name: str, files: dict[str, bytes], body: bool) -> None:
        fault = self.note(name)
        data = files.get(name)
        if data is None:
            return self.refuse("404", name, body, {"X-Error-Code": "EntryNotFound"})
        if fault and fault.isdigit():
            return self.refuse(fault, name, body)
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if fault == "wrong":
            data = bytes(len(data))
        begin, status = 0, 200
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if span and fault != "whole":
            begin, status = int(span[1]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        data = data[begin:]
        if fault == "drop":  # announces all, sends half, hangs up
            headers["Content-Length"] = str(len(data))
            data, self.close_connection = data[: len(data) // 2], True
        elif fault == "short":  # a proxy that makes half of a file look like all of it
            data = data[: len(data) // 2]
        elif fault == "long":
            data += b"x" * 100
        self.reply(status, data, body, headers)

    def refuse(self, status: str, name: str, body: bool, headers=None) -> None:
        self.reply(int(status), b"{}", body, headers or {})

    def reply(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve(files: dict[str, bytes], repo_id: str = "Qwen/Qwen-1_8B-Chat") -> Iterator[Hub]:
    hub = Hub(files, repo_id)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
