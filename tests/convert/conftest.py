"""A small Hugging Face Hub on the loopback interface, for the real client to talk to."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class _Http(ThreadingHTTPServer):
    request_queue_size = 64  # the client connects many times at once, and waits a second when refused


class HubServer:
    """Speaks as much of the Hub's file API as downloads need, and can be told to misbehave.

    Attributes:
        repos: Repo id -> revision -> path -> content. Commits follow from the contents.
        gated: Repo ids that list their files but do not give them.
        status: Answer everything with this HTTP status.
        cuts: Path of a file -> how many more times to close the connection in the middle of it.
        requests: What was asked for, as "METHOD /path" in order.
        tokens: The `Authorization` that came with each of these.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.status: int | None = None
        self.cuts: Counter[str] = Counter()
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self._http = _Http(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """From now on connections are refused."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def downloads(self) -> list[str]:
        """The files that were got, sorted, without their repository and revision."""
        got = (re.search("^GET .*/resolve/[^/]+/(.*)", request) for request in self.requests)
        return sorted(match[1] for match in got if match)

    def commit(self, repo_id: str, revision: str = "main") -> str:
        return hashlib.sha1(repr((repo_id, self.repos[repo_id][revision])).encode()).hexdigest()

    def find(self, repo_id: str, revision: str) -> str | None:
        """The commit that a branch name or commit means."""
        for name in self.repos[repo_id]:
            if revision in (name, self.commit(repo_id, name)):
                return name
        return None

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                hub.tokens.append(self.headers.get("Authorization"))
                api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
                file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                if hub.status is not None:
                    return self.answer(hub.status)
                match = api or file
                if not match or match[1] not in hub.repos:
                    return self.answer(401, code="RepoNotFound")  # as the Hub does unless one is logged in
                repo_id = match[1]
                name = hub.find(repo_id, (match[3] if api else match[2]) or "main")
                if name is None:
                    return self.answer(404, code="RevisionNotFound")
                files = hub.repos[repo_id][name]
                commit = hub.commit(repo_id, name)
                if file:
                    return self.give(repo_id, file[3], files, commit)
                oids = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
                if match[2] == "tree":
                    tree = [
                        {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
                        for path, oid in oids.items()
                    ]
                    return self.answer(200, json.dumps(tree).encode())
                siblings = [{"rfilename": path} for path in files]
                info = {"id": repo_id, "sha": commit, "siblings": siblings}
                return self.answer(200, json.dumps(info).encode())

            def give(self, repo_id: str, path: str, files: dict[str, bytes], commit: str) -> None:
                if repo_id in hub.gated:
                    return self.answer(401, code="GatedRepo")
                if path not in files:
                    return self.answer(404, code="EntryNotFound")
                content = files[path]
                begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
                etag = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
                if begin:
                    headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                cut = self.command == "GET" and hub.cuts[path] > 0
                hub.cuts[path] -= cut
                self.answer(206 if begin else 200, content[begin:], cut=cut, **headers)

            def answer(self, status: int, content: bytes = b"", code: str = "", cut: bool = False, **headers: str):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[: len(content) // 2] if cut else content)

            def log_message(self, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that the client is pointed at, with a cache of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = HubServer()
    # The client reads its settings from the environment once, when it is imported.
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield server
    close_session()
    if server._thread.is_alive():
        server.stop()
