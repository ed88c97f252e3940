"""A Hugging Face Hub in memory, on this machine: enough to create, push to, branch, list and pull a model repository.

Files arrive inside the commit (`uploadMode: regular`), so neither LFS nor xet is needed. Routes as huggingface_hub
calls them (https://huggingface.co/spaces/huggingface/openapi).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

Files = dict[str, bytes]


@dataclass
class Repository:
    """Branches by name, each a set of files, and every state that was ever committed by its id."""

    private: bool = False
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        listing = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())
        commit = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.branches[branch] = self.commits[commit] = files
        return commit

    def find(self, revision: str) -> tuple[str, Files] | None:
        """Commit id and files of a branch or commit."""
        if revision in self.branches:
            files = self.branches[revision]
            return self.commit(revision, files), files
        return (revision, self.commits[revision]) if revision in self.commits else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FakeHub"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, status: int, body: Any = None, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what: str) -> None:
        """The Hub says in a header what it did not find; the client makes its exception from it."""
        self.answer(404, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def route(self) -> tuple[str, dict[str, list[str]]]:
        url = urlparse(self.path)
        self.server.log.append((self.command, unquote(url.path)))
        return unquote(url.path).replace("/./", "/"), parse_qs(url.query)  # as RFC 3986 has it

    def do_POST(self) -> None:
        path, query = self.route()
        content = self.body()
        if path == "/api/repos/create":
            wanted = json.loads(content)
            name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            if name in self.server.repositories:
                return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            self.server.repositories[name] = Repository(private=wanted.get("visibility") == "private")
            return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch|paths-info)/(.+)", path)):
            return self.missing("Entry")
        name, action, revision = match.groups()
        if (repository := self.server.repositories.get(name)) is None:
            return self.missing("Repo")
        if action == "branch":
            repository.branches.setdefault(revision, dict(repository.branches["main"]))
            return self.answer(201, {})
        if action == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(content)["files"]]
            return self.answer(200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        if action == "paths-info":
            return self.answer(200, [])
        files = dict(repository.branches[revision])
        for line in content.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "deletedFile":
                files.pop(operation["value"]["path"])
        reply = {"success": True, "hookOutput": ""}
        if query.get("create_pr") == ["1"]:
            revision = "refs/pr/1"
            reply["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/1"
        commit = repository.commit(revision, files)
        self.answer(200, {**reply, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def do_GET(self) -> None:
        path, _ = self.route()
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "tester", "fullname": "tester", "orgs": []})
        patterns = (
            r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)",
            r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>.+))?",
            r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        )
        match = next((m for pattern in patterns if (m := re.fullmatch(pattern, path))), None)
        if match is None or match["name"] not in self.server.repositories:
            return self.missing("Repo")
        found = self.server.repositories[match["name"]].find(match["revision"] or "main")
        if found is None:
            return self.missing("Revision")
        commit, files = found
        oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        if "/tree/" in path:
            rows = [{"type": "file", "path": f, "size": len(files[f]), "oid": oids[f]} for f in files]
            return self.answer(200, rows)
        if "file" not in match.groupdict():
            siblings = [{"rfilename": name} for name in files]
            private = self.server.repositories[match["name"]].private
            return self.answer(
                200, {"id": match["name"], "sha": commit, "private": private, "tags": [], "siblings": siblings}
            )
        if match["file"] not in files:
            return self.missing("Entry")
        headers = {"ETag": f'"{oids[match["file"]]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.answer(200, files[match["file"]], headers, "application/octet-stream")

    do_HEAD = do_GET


class FakeHub(ThreadingHTTPServer):
    """The server; `repositories` by `owner/name`, `log` of (method, path)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.log: list[tuple[str, str]] = []


@contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that serves until the block ends."""
    with FakeHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
