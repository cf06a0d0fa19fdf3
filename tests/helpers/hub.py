"""A hub on this machine: as much of huggingface.co's protocol as uploads and downloads of a model need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_stub"


class Hub:
    """Repositories by name: branch -> file -> contents, and what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # uploaded beside commits, by digest
        self.asked: list[str] = []
        self.url = ""

    def files(self, name: str, branch: str) -> dict[str, bytes] | None:
        branches = self.repositories.get(name, {})
        found = branches.get(branch)
        return found if found is not None else next((files for files in branches.values() if commit_of(files) == branch), None)


def commit_of(files: dict[str, bytes]) -> str:
    whole = hashlib.sha1()
    for name in sorted(files):
        whole.update(name.encode() + hashlib.sha1(files[name]).digest())
    return whole.hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(tree).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.hub.asked.append(f"{self.command} {path}")
        writes = self.command != "HEAD" and self.command != "GET" and not path.startswith("/large/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        for pattern, action in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return action(self, found.groupdict(), body, query)
        return self.refuse(404, "EntryNotFound", f"nothing at {path}")

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    # What is asked.

    def create(self, _: Any, body: bytes, __: Any) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}", "name": name}, 409)
        self.hub.repositories[name], self.hub.private[name] = {"main": {}}, asked.get("visibility") == "private"
        return self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, _: Any, body: bytes, __: Any) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.DOTALL)
        tree = yaml.safe_load(header[1]) if header else None
        if not isinstance(tree, dict):
            return self.answer({"errors": [{"message": "a card begins with metadata"}], "warnings": []}, 400)
        return self.answer({"errors": [], "warnings": []})

    def branch(self, at: Any, _: bytes, __: Any) -> None:
        branches = self.hub.repositories[at["name"]]
        if at["branch"] in branches:
            return self.refuse(409, "RevisionExists", "Reference already exists")
        branches[at["branch"]] = dict(branches["main"])
        return self.answer({})

    def before_upload(self, at: Any, body: bytes, __: Any) -> None:
        each = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": each, "commitOid": commit_of(self.hub.files(at["name"], at["branch"]) or {})})

    def where_to_put(self, _: Any, body: bytes, __: Any) -> None:
        objects = [
            each | {"actions": {"upload": {"href": f"{self.hub.url}/large/{each['oid']}", "header": {}}}}
            for each in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, at: Any, body: bytes, __: Any) -> None:
        if hashlib.sha256(body).hexdigest() != at["digest"]:
            return self.refuse(400, "BadDigest", "the contents are not those that were announced")
        self.hub.large[at["digest"]] = body
        return self.answer({})

    def commit(self, at: Any, body: bytes, query: Any) -> None:
        files = self.hub.repositories[at["name"]].setdefault(at["branch"], {})
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = commit_of(files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{at['name']}/commit/{oid}", "hookOutput": ""})

    def info(self, at: Any, _: bytes, __: Any) -> None:
        files = self.found(at)
        if files is not None:
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.answer({"_id": at["name"], "id": at["name"], "modelId": at["name"], "sha": commit_of(files), "siblings": siblings})

    def tree(self, at: Any, _: bytes, __: Any) -> None:
        files = self.found(at)
        if files is not None:
            each = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()} for name, body in files.items()
            ]
            self.answer(each)

    def download(self, at: Any, _: bytes, __: Any) -> None:
        files = self.found(at)
        if files is None:
            return None
        if at["file"] not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        body = files[at["file"]]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
        return self.send(body, 200, headers)

    def found(self, at: Any) -> dict[str, bytes] | None:
        if at["name"] not in self.hub.repositories:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        files = self.hub.files(at["name"], at.get("branch") or "main")
        if files is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {at['branch']}")
        return files


_REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<branch>.+)", Handler.before_upload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.where_to_put),
    (r"PUT /large/(?P<digest>\w+)", Handler.put),
    (rf"POST /api/models/{_REPO}/commit/(?P<branch>.+)", Handler.commit),
    (rf"GET /api/models/{_REPO}/tree/(?P<branch>[^/]+).*", Handler.tree),
    (rf"GET /api/models/{_REPO}(/revision/(?P<branch>.+))?", Handler.info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<branch>[^/]+)/(?P<file>.+)", Handler.download),
]


@contextmanager
def running() -> Iterator[Hub]:
    """Give a hub that listens on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
