"""A Hub on 127.0.0.1 for the real `huggingface_hub` client: models only, the plain LFS path, and faults on request.

Two ports: one is the Hub, the other the storage to which large files are redirected, as the real one does; a token that
arrives at the storage is a leak. `Hub.faults` holds what goes wrong next.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class Fault:
    """Something that goes wrong with the next `times` requests whose "METHOD /path", and range if one is asked for,
    `pattern` is found in.

    `kind`: "status" (answers `status` with `headers`), "reset" (a TCP reset before the answer), "cut" (the answer ends
    after `at` bytes), "cut-reset" (the same with a TCP reset), "flip" (a bit of the body is another), "lost" (what was
    asked for is done, and the answer does not arrive), "echo" (a 400 that repeats the request's headers), or a function
    that is called with the hub before the request is served.
    """

    pattern: str
    kind: str | Callable[["Hub"], None]
    times: int = 1
    status: int = 500
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    at: int = 100


@dataclasses.dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, tuple[bytes, bool]]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    pull_requests: list[str] = dataclasses.field(default_factory=list)  # titles; the n-th is refs/pr/n

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {name: content for name, (content, _) in self.commits[self.commit(revision)].items()}

    def commit(self, revision: str) -> str:
        return self.refs.get(revision, revision)

    def add(self, files: dict[str, tuple[bytes, bool]], ref: str = "main") -> str:
        commit = secrets.token_hex(20)
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


class Hub:
    """The state of the server, and what was asked of it."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.sent: list[bytes] = []  # every request, without its Authorization header
        self.leaks: list[str] = []
        self.token: str | None = None
        self.gitignore: set[str] = set()
        self.regular: set[str] = set()
        self.ranges = True
        self.sizes: dict[str, int] = {}  # of files, to be lied about
        self.lock = threading.RLock()
        self.commits = 0
        self.url = self.storage = ""
        self.naps: list[float] = []

    def connect(self, setattr: Callable[..., None], url: str | None = None) -> None:
        """Points the client here (or at `url`): these constants are HF_ENDPOINT as it was when it was imported."""
        from huggingface_hub import constants

        url = url or self.url
        setattr(constants, "ENDPOINT", url)
        setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    def put(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        """A commit with exactly these files."""
        stored = {name: (content, is_large(name)) for name, content in files.items()}
        for content, large in stored.values():
            if large:
                self.large[hashlib.sha256(content).hexdigest()] = content
        return self.repos.setdefault(repo, Repo()).add(stored, ref)

    def fault(self, pattern: str, kind: str | Callable[["Hub"], None], **options: Any) -> None:
        self.faults.append(Fault(pattern, kind, **options))

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", "tokenizer.json"))


def etag(content: bytes, large: bool) -> str:
    return hashlib.sha256(content).hexdigest() if large else blob_id(content)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), hub, storage) for storage in (False, True)]
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], hub: Hub, storage: bool):
        super().__init__(address, _Handler)
        self.hub = hub
        self.is_storage = storage

    def handle_error(self, request, client_address):
        pass  # A client that was killed.


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None):
        self.status = status
        self.headers = ({"X-Error-Code": code} if code else {}) | (headers or {})
        self.body = json.dumps({"error": message or code or str(status)}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: without this the second waits 40 ms for the client.
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def serve(self) -> None:
        hub = self.server.hub
        parts = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(parts.query)
        path = urllib.parse.unquote(parts.path)
        body = self.read_body()
        request = " ".join([self.command, path, *filter(None, [self.headers.get("Range")])])
        with hub.lock:
            hub.requests.append(request)
            others = {k: v for k, v in self.headers.items() if k.lower() != "authorization"}
            hub.sent.append(f"{self.path} {others}".encode() + body)
            if self.server.is_storage and "Authorization" in self.headers:
                hub.leaks.append(f"{self.command} {path}")
        fault = hub.next_fault(request)
        if fault is not None and callable(fault.kind):
            fault.kind(hub)
            fault = None
        kind = "" if fault is None else fault.kind
        if fault is not None and kind == "reset":
            self.reset()
            return
        try:
            if fault is not None and kind == "status":
                raise _Refusal(fault.status, headers=fault.headers)
            if kind == "echo":
                raise _Refusal(400, message=f"you sent {dict(self.headers)}")
            with hub.lock:
                status, headers, answer = self.route(path, body)
        except _Refusal as refusal:
            status, headers, answer = refusal.status, refusal.headers, refusal.body
        if kind == "lost":
            self.reset()
            return
        if kind == "flip" and answer:
            middle = len(answer) * 3 // 4
            answer = answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and kind in ("cut", "cut-reset"):
            self.wfile.write(answer[: fault.at])
            self.wfile.flush()
            self.reset() if kind == "cut-reset" else self.end()
            return
        self.wfile.write(answer)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:  # The client has gone in the middle.
            raise ConnectionError
        return body

    def reset(self) -> None:
        """A TCP reset instead of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        os.close(self.connection.detach())

    def end(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # --- The protocol ---

    def route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.server.is_storage:
            return self.stored(path, body)
        if path == "/api/agent-harnesses":
            return self.json({"standardEnvVars": [], "harnesses": {}})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create_repo(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(found[1], write=True)
            return self.batch(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self.resolve(self.repo(found[1]), found[2], found[3])
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path)
        if not found:
            raise _Refusal(404)
        name, rest = found[1], found[2] or "/revision/main"
        repo = self.repo(name, write=self.command != "GET")
        verb, _, argument = rest[1:].partition("/")
        if verb == "revision":
            return self.info(name, repo, argument)
        if verb == "tree":
            return self.tree(repo, argument)
        if verb == "preupload":
            return self.preupload(repo, argument, json.loads(body))
        if verb == "commit":
            return self.commit(name, repo, argument, [json.loads(line) for line in body.splitlines()])
        if verb == "branch":
            if argument in repo.refs:
                raise _Refusal(409)
            repo.refs[argument] = repo.refs["main"]
            return self.json({})
        if verb == "discussions":
            listed = [
                {
                    "title": title,
                    "num": i,
                    "author": {"name": "someone"},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "open",
                    "repo": {"name": name, "type": "model"},
                    "isPullRequest": True,
                }
                for i, title in enumerate(repo.pull_requests, 1)
            ]
            return self.json({"discussions": listed[::-1], "count": len(listed), "start": 0})
        raise _Refusal(404)

    def json(self, data: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(data).encode()

    def repo(self, name: str, write: bool = False) -> Repo:
        hub = self.server.hub
        known = hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if name not in hub.repos or (hub.repos[name].private and not known):
            raise _Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        if write and not known:
            raise _Refusal(403, message="You have no write access")
        return hub.repos[name]

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]]:
        commit = repo.commit(revision)
        if commit not in repo.commits:
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit, repo.commits[commit]

    def create_repo(self, data: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        hub = self.server.hub
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            raise _Refusal(401, message="Invalid username or password.")
        name = f"{data['organization']}/{data['name']}"
        answer = {"url": f"{hub.url}/{name}"}
        if name in hub.repos:
            return self.json(answer | {"error": "You already created this model repo"}, 409)
        hub.put(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        hub.repos[name].private = data.get("visibility") == "private" or bool(data.get("private"))
        return self.json(answer)

    def info(self, name: str, repo: Repo, revision: str) -> tuple[int, dict[str, str], bytes]:
        hub, (commit, files) = self.server.hub, self.files(repo, revision)
        siblings = []
        for path, (content, large) in files.items():
            row: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                row |= {"size": len(content), "blobId": blob_id(content)}
                if large:
                    sha = hashlib.sha256(content).hexdigest()
                    row["lfs"] = {"sha256": sha, "size": hub.sizes.get(path, len(content)), "pointerSize": 134}
            siblings.append(row)
        return self.json({"id": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def tree(self, repo: Repo, revision: str) -> tuple[int, dict[str, str], bytes]:
        rows = []
        for path, (content, large) in self.files(repo, revision)[1].items():
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if large:
                row["lfs"] = {"oid": etag(content, True), "size": len(content), "pointerSize": 134}
            rows.append(row)
        return self.json(rows)

    def resolve(self, repo: Repo, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        commit, files = self.files(repo, revision)
        if path not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content, large = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(content, large)}"', "Accept-Ranges": "bytes"}
        if large:
            sha = etag(content, True)
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
            location = f"{self.server.hub.storage}/{sha}?X-Amz-Signature={secrets.token_hex(8)}"
            return 302, headers | {"Location": location}, b""
        return self.ranged(content, headers)

    def ranged(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted or not self.server.hub.ranges:
            return 200, headers | {"Content-Length": str(len(content))}, content
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content) - 1) + 1, len(content))
        if start >= len(content):
            raise _Refusal(416, headers={"Content-Range": f"bytes */{len(content)}"})
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}", "Content-Length": str(stop - start)}
        return 206, headers, content[start:stop]

    def preupload(self, repo: Repo, revision: str, data: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        hub = self.server.hub
        _, files = self.files(repo, revision)
        ignored = hub.gitignore if "gitIgnore" not in data else set()
        rows = []
        for file in data["files"]:
            name = file["path"]
            mode = "lfs" if is_large(name) and name not in hub.regular else "regular"
            row = {"path": name, "uploadMode": mode, "shouldIgnore": name in ignored}
            if name in files:
                row["oid"] = etag(*files[name])
            rows.append(row)
        return self.json({"files": rows})

    def batch(self, data: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        hub = self.server.hub
        objects = []
        for wanted in data["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.large:
                href = f"{hub.storage}/{wanted['oid']}?X-Amz-Signature={secrets.token_hex(8)}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        return self.json({"transfer": "basic", "objects": objects})

    def stored(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        hub, oid = self.server.hub, path[1:]
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise _Refusal(400, message="BadDigest")
            hub.large[oid] = body
            return 200, {}, b""
        if oid not in hub.large:
            raise _Refusal(404)
        return self.ranged(hub.large[oid], {"ETag": f'"{secrets.token_hex(16)}"'})

    def commit(
        self, name: str, repo: Repo, revision: str, lines: list[dict[str, Any]]
    ) -> tuple[int, dict[str, str], bytes]:
        hub = self.server.hub
        parent, files = self.files(repo, revision)
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            raise _Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.large:
                    raise _Refusal(400, message="LFS pointer pointed to a file that does not exist")
                files[value["path"]] = hub.large[value["oid"]], True
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400)
        hub.commits += 1
        answer = {}
        if "create_pr" in self.query:
            repo.pull_requests.append(header["summary"])
            number = len(repo.pull_requests)
            commit = repo.add(files, f"refs/pr/{number}")
            answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/{number}"
        else:
            commit = repo.add(files, revision)
        return self.json(answer | {"commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}"})
