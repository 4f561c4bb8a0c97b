"""A Hub on this machine: as much of its HTTP protocol as `huggingface_hub` speaks to push and load, with failures."""

import base64
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

TOKEN, USER = "hf_of_the_tests", "someone"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<type>model|dataset)s/{REPO}"


@dataclass
class Failure:
    """What goes wrong with requests to these paths: an answer with this status, or the connection is cut (None)."""

    path: str  # a regular expression, of "PUT /lfs/..."
    status: int | None
    message: str = ""
    times: int | None = None  # None: always
    after: int = 0  # requests that are served before


@dataclass
class Hub:
    """The state of the server, which the tests read and spoil."""

    server: HTTPServer
    lfs_from: int = 10_000  # bytes; smaller files are part of the commit
    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    private: dict[str, bool] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.expect_request(re.compile(".*")).respond_with_handler(self._answer)

    @property
    def url(self) -> str:
        return self.server.url_for("").rstrip("/")

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that uses this server."""
        settings = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "CI": "1"}
        return os.environ | settings

    def files(self, repo: str, type: str = "model") -> dict[str, bytes]:
        return self.repos[type, repo]

    def fail(self, path: str, status: int | None, message: str = "", *, times: int | None = None, after: int = 0):
        self.failures.append(Failure(path, status, message, times, after))

    def _answer(self, request: Request) -> Response:
        line = f"{request.method} {unquote(request.path)}"
        self.requests.append(line)
        for failure in self.failures:
            if re.search(failure.path, line):
                failure.after -= 1
                if failure.after < 0 and failure.times != 0:
                    failure.times = failure.times and failure.times - 1
                    return self._fail(request, failure)
        # Addresses of uploads are signed, and what is public is read without a token
        open_to_all = re.match(r"(GET|HEAD) |\w+ /lfs/\w+$", line)
        if not open_to_all and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return refused(401, "Invalid credentials in Authorization header")
        for path, serve in ROUTES.items():
            if found := re.fullmatch(path, line):
                return serve(self, request, **found.groupdict())
        return refused(404, f"no such thing: {line}")

    @staticmethod
    def _fail(request: Request, failure: Failure) -> Response:
        if failure.status is not None:
            request.get_data()
            return refused(failure.status, failure.message)
        request.stream.read(1024)  # a part of what was sent
        connection: socket.socket = request.environ["werkzeug.socket"]
        connection.shutdown(socket.SHUT_RDWR)
        return Response()

    # What is served, by its path below

    def who_am_i(self, request: Request) -> Response:
        return answer({"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, request: Request) -> Response:
        asked = request.get_json()
        repo, type = f"{asked['organization'] or USER}/{asked['name']}", asked.get("type", "model")
        there = (type, repo) in self.repos
        self.repos.setdefault((type, repo), {})
        self.private.setdefault(repo, asked.get("visibility") == "private")
        return answer({"url": f"{self.url}/{'datasets/' * (type == 'dataset')}{repo}"}, 409 if there else 200)

    def check_yaml(self, request: Request) -> Response:
        return answer({"errors": [], "warnings": []})

    def preupload(self, request: Request, type: str, repo: str) -> Response:
        there = self.repos[type, repo]
        files = []
        for file in request.get_json()["files"]:
            mode = "lfs" if file["size"] >= self.lfs_from else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if (content := there.get(file["path"])) is not None:
                files[-1]["oid"] = sha256(content) if mode == "lfs" else git_oid(content)
        return answer({"files": files})

    def batch(self, request: Request, repo: str) -> Response:
        objects = []
        for wanted in request.get_json(force=True)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size})
            if oid not in self.objects:
                upload = f"{self.url}/lfs/{oid}"
                objects[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{upload}/verify"}}
        return answer({"transfer": "basic", "objects": objects})

    def put(self, request: Request, oid: str) -> Response:
        content = request.get_data()
        if sha256(content) != oid:
            return refused(400, "the content is not what was announced")
        self.objects[oid] = content
        return Response()

    def verify(self, request: Request, oid: str) -> Response:
        whole = len(self.objects.get(oid, b"")) == request.get_json()["size"]
        return Response() if whole else refused(422, "not whole")

    def commit(self, request: Request, type: str, repo: str) -> Response:
        files = dict(self.repos[type, repo])  # all of a commit or nothing
        for line in request.get_data().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    return refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        self.repos[type, repo] = files
        sha = self._sha(type, repo)
        url = f"{self.url}/{'datasets/' * (type == 'dataset')}{repo}/commit/{sha}"
        return answer({"success": True, "commitOid": sha, "commitUrl": url})

    def info(self, request: Request, type: str, repo: str) -> Response:
        if (type, repo) not in self.repos:
            return refused(404, "Repository not found", "RepoNotFound")
        siblings = [{"rfilename": path} for path in self.repos[type, repo]]
        found = {"id": repo, "sha": self._sha(type, repo), "private": False, "tags": [], "siblings": siblings}
        return answer({**found, "downloads": 0, "likes": 0, "disabled": False, "gated": False})

    def tree(self, request: Request, type: str, repo: str, path: str | None = None) -> Response:
        files, wanted = self.repos.get((type, repo), {}), f"{path}/" if path else ""
        entries = [described(name, files[name]) for name in files if name.startswith(wanted)]
        folders = {name.rpartition("/")[0] for name in files if "/" in name}
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        return answer(entries) if entries or not wanted else refused(404, "Entry not found", "EntryNotFound")

    def auth_check(self, request: Request, type: str, repo: str) -> Response:
        good = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        return Response() if good else refused(401, "Invalid credentials in Authorization header")

    def resolve(self, request: Request, repo: str, path: str, type: str | None = None) -> Response:
        kind = "dataset" if type else "model"
        content = self.repos.get((kind, repo), {}).get(path)
        if content is None:
            return refused(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": self._sha(kind, repo)}
        return Response(content, 200, headers, content_type="application/octet-stream")

    def _sha(self, type: str, repo: str) -> str:
        files = self.repos[type, repo]
        return hashlib.sha1(repr(sorted((name, sha256(files[name])) for name in files)).encode()).hexdigest()


ROUTES: dict[str, Callable[..., Response]] = {
    r"GET /api/whoami-v2": Hub.who_am_i,
    r"POST /api/repos/create": Hub.create,
    r"POST /api/validate-yaml": Hub.check_yaml,
    rf"POST {API}/preupload/main": Hub.preupload,
    rf"POST /(?:datasets/)?{REPO}\.git/info/lfs/objects/batch": Hub.batch,
    r"PUT /lfs/(?P<oid>\w{64})": Hub.put,
    r"POST /lfs/(?P<oid>\w{64})/verify": Hub.verify,
    rf"POST {API}/commit/main": Hub.commit,
    rf"GET {API}(?:/revision/\w+)?": Hub.info,
    rf"GET {API}/auth-check(?:/write)?": Hub.auth_check,
    rf"GET {API}/tree/\w+(?:/(?P<path>.+))?": Hub.tree,
    rf"(?:GET|HEAD) /(?P<type>datasets/)?{REPO}/resolve/\w+/(?P<path>.+)": Hub.resolve,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "prefopt_trl.runtime.hub"]


def answer(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, content_type="application/json")


def refused(status: int, message: str, code: str | None = None) -> Response:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return Response(json.dumps({"error": message}), status, headers, content_type="application/json")


def described(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": git_oid(content), "size": len(content)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
