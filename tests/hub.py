"""A stand-in of the Hub's HTTP interface: as much of it as uploads and downloads of small files need."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

COMMIT = "0a1b" * 10


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repos (`dict`): Files by path of "models/OWNER/NAME" and "datasets/OWNER/NAME".
        created (`list[dict]`): Requests for new repositories.
        commits (`list[dict[str, bytes]]`): Files of each commit.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.commits: list[dict[str, bytes]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, folder: Path) -> None:
        self.repos[repo] = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@contextmanager
def run_hub() -> Iterator[Hub]:
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.answer(b"", 404, X_Error_Code=code, X_Error_Message=self.path)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            self.server.created.append(wanted)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.answer_json({"url": f"{self.server.endpoint}/{name}", "id": name, "name": name})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer_json({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif found := re.match(r"/api/(models/[^/]+/[^/]+)/commit/", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.server.commits.append(files)
            self.server.repos.setdefault(found[1], {}).update(files)
            url = f"{self.server.endpoint}/{found[1].partition('/')[2]}/commit/{COMMIT}"
            self.answer_json({"commitUrl": url, "commitOid": COMMIT})
        elif found := re.match(r"/api/((?:models|datasets)/[^/]+/[^/]+)/paths-info/", self.path):
            paths = json.loads(body)["paths"] if body.startswith("{") else []
            files = self.server.repos.get(found[1], {})
            self.answer_json([entry(name, files[name]) for name in paths if name in files])
        else:
            self.missing("RepoNotFound")

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            files = self.server.repos.get(found[1])
            if files is None:
                return self.missing("RepoNotFound")
            name = found[1].partition("/")[2]
            siblings = [{"rfilename": file, "size": len(files[file])} for file in files]
            return self.answer_json({"id": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            files = self.server.repos.get(found[1])
            if files is None:
                return self.missing("RepoNotFound")
            inside = [name for name in files if not found[2] or name.startswith(f"{found[2]}/")]
            return self.answer_json([entry(name, files[name]) for name in inside])
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = self.server.repos.get(f"{found[1] or 'models/'}{found[2]}")
            if files is None:
                return self.missing("RepoNotFound")
            if found[3] not in files:
                return self.missing("EntryNotFound")
            content = files[found[3]]
            return self.answer(content, ETag=f'"{digest(content)}"', X_Repo_Commit=COMMIT)
        self.missing("RepoNotFound")

    do_HEAD = do_GET


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
