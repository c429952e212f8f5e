"""A Hugging Face hub on loopback, in memory: the endpoints that pushing and loading use.

It answers as the real one: branches move by commits alone, large files are objects named by their
SHA-256 that are sent ahead, in one piece or in several, and a model card's metadata is checked.
"""

from __future__ import annotations

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
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_canary0123456789token"
READ_TOKEN = "hf_canary0123456789reads"
OWNER = "someone"
LARGE = (".h5", ".safetensors", ".keras", ".model")
PIECE_BYTES = 16 << 10
"""Larger objects are sent in several pieces."""
PAGE_LENGTH = 5

Tree = dict[str, bytes | str]
"""Content of each file, or the SHA-256 of a large one."""


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Tree]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def head(self, branch: str = "main") -> Tree:
        return self.branches[branch][-1]

    def content(self, name: str, branch: str = "main") -> bytes:
        held = self.head(branch)[name]
        return self.objects[held] if isinstance(held, str) else held

    def contents(self, branch: str = "main") -> dict[str, bytes]:
        """All files as anybody who downloads them sees them."""
        return {name: self.content(name, branch) for name in self.head(branch)}


@dataclass
class FakeHub:
    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each."""
    received: list[str] = field(default_factory=list)
    """SHA-256 of each large object that was sent whole."""
    seen: bytearray = field(default_factory=bytearray)
    """All bodies but large objects', and all paths."""
    answer: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and message for requests whose path matches a pattern."""
    pieces: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, files: Tree | None = None, *, private: bool = False) -> Repo:
        tree: Tree = {".gitattributes": b"*.h5 filter=lfs\n", **(files or {})}
        repo = Repo(private=private, branches={"main": [tree]})
        self.repos[name] = repo
        return repo


def commit_id(repo: Repo, branch: str) -> str:
    trees = repo.branches[branch]
    text = repr([sorted(tree.items()) for tree in trees])
    return hashlib.sha1(text.encode()).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: str) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        split = urlsplit(self.path)
        path = unquote(split.path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(length)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.seen += self.path.encode()
            if not path.startswith("/objects/"):
                self.hub.seen += body
            try:
                for pattern, (status, message) in self.hub.answer.items():
                    if re.search(pattern, f"{self.command} {path}"):
                        raise _RefusedError(status, message)
                answer = self._answer(path, parse_qs(split.query), body)
            except _RefusedError as refused:
                headers = {"X-Error-Message": refused.message}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                content = json.dumps({"error": refused.message, **refused.body}).encode()
                if refused.message.startswith("<"):  # of a proxy between
                    headers, content = {}, refused.message.encode()
                self._send(refused.status, content, headers)
                return
        if isinstance(answer, tuple):
            self._send(200, *answer)
        else:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, owner: str) -> None:
        if self._token() not in (TOKEN, READ_TOKEN):
            raise _RefusedError(401, "Invalid username or password.")
        if self._token() == READ_TOKEN or owner != OWNER:
            raise _RefusedError(
                403, "Forbidden: you must use a write token to upload to a repository."
            )

    def _repo(self, name: str) -> Repo:
        found = self.hub.repos.get(name)
        hidden = found is not None and found.private and self._token() not in (TOKEN, READ_TOKEN)
        if found is None or hidden:
            if not self._token():
                raise _RefusedError(401, "Invalid username or password.")
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        return found

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.startswith("/objects/"):
            return self._object(path.removeprefix("/objects/").split("/"), body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._may_write(match[1].split("/")[0])
            return self._batch(self._repo(match[1]), match[1], json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repo(match[1]), match[2], match[3])
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)/(.+))?", path)
        if match is None:
            raise _RefusedError(404, f"no such endpoint: {path}")
        name, verb, rest = match[1], match[2], match[3]
        repo = self._repo(name)
        if verb is None or verb == "revision":
            branch = self._branch(repo, rest or "main")
            return {"id": name, "sha": commit_id(repo, branch), "private": repo.private}
        if verb == "tree":
            return self._tree(repo, rest, query, path)
        self._may_write(name.split("/")[0])
        if verb == "branch":
            if rest in repo.branches:
                raise _RefusedError(409, "Reference already exists")
            repo.branches[rest] = [dict(repo.head())]
            return {}
        if verb == "preupload":
            return self._preupload(repo, rest, json.loads(body))
        if verb == "commit":
            return self._commit(repo, name, rest, body)
        raise _RefusedError(404, f"no such endpoint: {path}")

    def _branch(self, repo: Repo, revision: str) -> str:
        for branch in repo.branches:
            if revision in (branch, commit_id(repo, branch)):
                return branch
        raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _create(self, asked: dict[str, Any]) -> Any:
        self._may_write(asked["organization"])
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            url = f"{self.hub.endpoint}/{name}"
            raise _RefusedError(409, "You already created this model repo", url=url)
        self.hub.add(name, private=asked.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/{name}"}

    def _validate(self, card: str) -> Any:
        head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        metadata = yaml.safe_load(head[1]) if head else None
        if not isinstance(metadata, dict):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        known = {"apache-2.0", "mit", "other", "llama3.2"}
        if metadata.get("license", "other") not in known:
            raise _RefusedError(400, '"license" must be one of the known ones')
        return {"errors": [], "warnings": []}

    def _entry(self, repo: Repo, name: str, held: bytes | str) -> dict[str, Any]:
        if isinstance(held, bytes):
            return {"type": "file", "path": name, "size": len(held), "oid": git_blob(held)}
        size = len(repo.objects[held])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{held}\nsize {size}\n"
        lfs = {"oid": held, "size": size, "pointerSize": len(pointer)}
        oid = git_blob(pointer.encode())
        return {"type": "file", "path": name, "size": size, "oid": oid, "lfs": lfs}

    def _tree(self, repo: Repo, revision: str, query: dict[str, list[str]], path: str) -> Any:
        tree = repo.head(self._branch(repo, revision))
        start = int(query.get("cursor", ["0"])[0])
        names = sorted(tree)
        page = [self._entry(repo, name, tree[name]) for name in names[start : start + PAGE_LENGTH]]
        headers = {"Content-Type": "application/json"}
        if start + PAGE_LENGTH < len(names):
            following = f"{self.hub.endpoint}{path}?recursive=True&cursor={start + PAGE_LENGTH}"
            headers["Link"] = f'<{following}>; rel="next"'
        return json.dumps(page).encode(), headers

    def _preupload(self, repo: Repo, branch: str, asked: dict[str, Any]) -> Any:
        tree, ignored = repo.head(branch), repo.head(branch).get(".gitignore", b"")
        assert isinstance(ignored, bytes)
        files = []
        for file in asked["files"]:
            held = tree.get(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": file["path"] in ignored.decode().split(),
                    "oid": git_blob(held) if isinstance(held, bytes) else held,
                }
            )
        return {"files": files}

    def _batch(self, repo: Repo, name: str, asked: dict[str, Any]) -> Any:
        objects = []
        for one in asked["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in repo.objects:
                url = f"{self.hub.endpoint}/objects/{name}/{one['oid']}"
                upload: dict[str, Any] = {"href": f"{url}/whole?X-Amz-Signature=secret"}
                if one["size"] > PIECE_BYTES:
                    pieces = range(1, -(-one["size"] // PIECE_BYTES) + 1)
                    header = {str(n): f"{url}/{n}?X-Amz-Signature=secret" for n in pieces}
                    upload = {
                        "href": f"{url}/complete",
                        "header": {"chunk_size": str(PIECE_BYTES), **header},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _object(self, path: list[str], body: bytes) -> Any:
        repo, oid, piece = self.hub.repos["/".join(path[:2])], path[2], path[3]
        if piece == "verify":
            if oid not in repo.objects:
                raise _RefusedError(404, "object not found")
            return {}
        if piece.isdigit():
            self.hub.pieces.setdefault(oid, {})[int(piece)] = body
            return b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        content = body
        if piece == "complete":
            sent = self.hub.pieces[oid]
            content = b"".join(sent[part["partNumber"]] for part in json.loads(body)["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            raise _RefusedError(400, "sha256 mismatch")
        repo.objects[oid] = content
        self.hub.received.append(oid)
        return {}

    def _commit(self, repo: Repo, name: str, branch: str, body: bytes) -> Any:
        tree = dict(repo.head(branch))
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    if value.get("parentCommit", commit_id(repo, branch)) != commit_id(
                        repo, branch
                    ):
                        raise _RefusedError(412, "A commit has happened since. Please refresh.")
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in repo.objects:
                        raise _RefusedError(400, f"LFS pointer to {value['oid']} without an object")
                    tree[value["path"]] = value["oid"]
                case "deletedFile":
                    del tree[value["path"]]
                case other:
                    raise _RefusedError(400, f"unknown operation {other}")
        repo.branches[branch].append(tree)
        oid = commit_id(repo, branch)
        return {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid}

    def _resolve(self, repo: Repo, revision: str, name: str) -> Any:
        branch = self._branch(repo, revision)
        if name not in repo.head(branch):
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        content = repo.content(name, branch)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return content, {"ETag": etag, "X-Repo-Commit": commit_id(repo, branch)}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub for the block."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
