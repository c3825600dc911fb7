"""A stand-in for the Hub on loopback, for the genuine client: models only, in memory, without Xet.

``with StandInHub() as hub: print(run_client(hub, "import huggingface_hub; ...", tmp_path))``. It
answers as the Hub does where the client looks: status codes, error codes, headers. What it does not
know is answered by 404 and lies in ``hub.unknown``.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


ROOT = Path(__file__).resolve().parents[1]
LARGE = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.arrow", "*.parquet")
DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether it came by LFS."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares with its own file: the SHA-256 for LFS, git's own otherwise."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    description: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """One model repository. Its first commit is the Hub's own."""

    name: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # uploaded by PUT, whether committed or not

    def __post_init__(self):
        self.commit(
            "main",
            "initial commit",
            "",
            {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)},
        )

    def commit(self, branch, title, description, files):
        oid = hashlib.sha1(f"{self.name} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, description, files))
        self.branches[branch] = oid
        return oid

    def at(self, revision):
        """The commit of a branch or of a commit id; None where there is none."""
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def files(self):
        """The files of the main branch, by path."""
        return {path: blob.content for path, blob in self.at("main").files.items()}


class HubError(Exception):
    """An answer that is an error."""

    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = status, {"error": message, **body}, headers


class StandInHub:
    """``endpoint``, ``token`` of the one user ``user``, ``repos`` by name, ``requests`` as they
    came in.

    ``fail("PUT /lfs/user/name/", 403)`` answers whatever starts so by this status; ``times`` limits
    how often. The client tries 429, 500, 502, 503 and 504 again for 23 seconds, and gives up at
    once on others.
    """

    def __init__(self, user="user", token="hf_stand_in"):
        self.user, self.token = user, token
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.faults: list[list] = []
        self.lock = threading.RLock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        # The default poll of half a second would be waited for at the end of every test.
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, start, status, times=None):
        self.faults.append([start, status, times])


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"  # the client keeps its connections

    def log_message(self, *arguments):
        pass

    def _handle(self):
        body = self._body()
        url = urlsplit(self.path)
        line = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            try:
                answer = self._route(line, parse_qs(url.query), body)
            except HubError as error:
                answer = error.answer
        self._send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, body, headers=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, " ".join(str(value).split()))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, line, query, body):
        for fault in self.hub.faults:
            if line.startswith(fault[0]) and fault[2] != 0:
                fault[2] = None if fault[2] is None else fault[2] - 1
                raise HubError(fault[1], "the test asked for this failure")
        # Uploads go to a storage with signed addresses, where the token is not asked for.
        if not line.startswith("PUT /lfs/"):
            self._check_token()
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, line):
                names = {
                    name: unquote(value) for name, value in match.groupdict(default="").items()
                }
                return method(self, query=query, body=body, **names)
        self.hub.unknown.append(line)
        raise HubError(404, f"the stand-in does not know {line}")

    # Who may do what

    def _check_token(self):
        given = self.headers.get("Authorization")
        self.user = self.hub.user if given == f"Bearer {self.hub.token}" else None
        if given and not self.user:
            raise HubError(401, "Invalid credentials in Authorization header")

    def _repo(self, name, write=False):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.user):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self._check_owner(name)
        return repo

    def _check_owner(self, name):
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        if name.split("/")[0] != self.user:
            raise HubError(
                403,
                "You don't have the rights to create a model under the namespace "
                f"{name.split('/')[0]!r}",
            )

    def _commit_at(self, repo, revision):
        commit = repo.at(revision or "main")
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # The interface

    def whoami(self, query, body):
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": "write"}}
        return 200, {
            "type": "user",
            "name": self.user,
            "fullname": self.user,
            "orgs": [],
            "auth": token,
        }

    def create(self, query, body):
        wanted = json.loads(body)
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._check_owner(name)
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if wanted.get("type") not in (None, "model"):
            raise HubError(400, "the stand-in keeps models only")
        if name in self.hub.repos:
            raise HubError(409, "You already created this model repo", **answer)
        self.hub.repos[name] = Repo(name, private=wanted.get("visibility") == "private")
        return 200, answer

    def validate_yaml(self, query, body):
        errors, warnings = card_problems(json.loads(body)["content"])
        return 400 if errors else 200, {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }

    def preupload(self, query, body, repo, revision):
        commit = self._commit_at(self._repo(repo, write=True), revision)
        wanted = json.loads(body)
        ignored = [
            line.strip() for line in wanted.get("gitIgnore", "").splitlines() if line.strip()
        ]

        def describe(path):
            name = path.rsplit("/", 1)[-1]
            blob = commit.files.get(path)
            return {
                "path": path,
                "uploadMode": "lfs"
                if any(fnmatch.fnmatch(name, pattern) for pattern in LARGE)
                else "regular",
                "shouldIgnore": any(
                    fnmatch.fnmatch(path, p) or fnmatch.fnmatch(name, p) for p in ignored
                ),
                "oid": blob.oid if blob else None,
            }

        return 200, {"files": [describe(file["path"]) for file in wanted["files"]]}

    def lfs_batch(self, query, body, repo):
        stored = self._repo(repo, write=True).lfs

        def describe(file):
            if file["oid"] in stored:
                return file
            upload = {"href": f"{self.hub.endpoint}/lfs/{repo}/{file['oid']}?size={file['size']}"}
            verify = {"href": f"{self.hub.endpoint}/lfs/{repo}/verify"}
            return {**file, "actions": {"upload": upload, "verify": verify}}

        return 200, {
            "transfer": "basic",
            "objects": [describe(file) for file in json.loads(body)["objects"]],
        }

    def lfs_put(self, query, body, repo, oid):
        if hashlib.sha256(body).hexdigest() != oid or str(len(body)) != query["size"][0]:
            raise HubError(
                400, f"{len(body)} bytes arrived, which are not those announced as {oid}"
            )
        self.hub.repos[repo].lfs[oid] = body
        return 200, b""

    def lfs_verify(self, query, body, repo):
        wanted = json.loads(body)
        content = self._repo(repo, write=True).lfs.get(wanted["oid"])
        if content is None or len(content) != wanted["size"]:
            raise HubError(404, f"{wanted['oid']} was not uploaded")
        return 200, {}

    def commit(self, query, body, repo, revision):
        name, repo = repo, self._repo(repo, write=True)
        parent = self._commit_at(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                content = repo.lfs.get(value["oid"])
                if content is None:
                    raise HubError(
                        400, f"LFS pointer pointed to a file that does not exist: {value['path']}"
                    )
                files[value["path"]] = Blob(content, lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {
                    p: blob
                    for p, blob in files.items()
                    if not p.startswith(value["path"].rstrip("/") + "/")
                }
        if "README.md" in files and (
            errors := card_problems(files["README.md"].content.decode())[0]
        ):
            raise HubError(400, f"Invalid metadata in README.md: {errors}")
        answer = {}
        if "create_pr" in query:
            number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        elif revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        oid = repo.commit(revision, header["summary"], header.get("description", ""), files)
        return 200, {
            **answer,
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}",
        }

    def branch(self, query, body, repo, branch):
        repo = self._repo(repo, write=True)
        if branch in repo.branches:
            raise HubError(409, f"Reference {branch} already exists")
        repo.branches[branch] = self._commit_at(
            repo, json.loads(body or b"{}").get("startingPoint")
        ).oid
        return 200, {}

    def refs(self, query, body, repo):
        branches = self._repo(repo).branches.items()
        entries = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in branches
        ]
        return 200, {"branches": entries, "converts": [], "tags": []}

    def info(self, query, body, repo, revision=""):
        repo = self._repo(repo)
        commit = self._commit_at(repo, revision)
        return 200, {
            "_id": repo.name,
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "lastModified": DATE,
            "createdAt": DATE,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def tree(self, query, body, repo, revision, folder):
        files = self._commit_at(self._repo(repo), revision).files
        start = f"{folder}/" if folder else ""
        found = {path: blob for path, blob in sorted(files.items()) if path.startswith(start)}
        if folder and not found:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        parents = {str(parent) for path in found for parent in Path(path).parents} - {".", folder}
        folders = sorted(path for path in parents if path.startswith(start))
        entries = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders
        ]
        entries += [self._entry(path, blob) for path, blob in found.items()]
        if query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in str(entry["path"])[len(start) :]]
        return 200, entries

    def paths_info(self, query, body, repo, revision):
        files = self._commit_at(self._repo(repo), revision).files
        form = "form" in self.headers.get("Content-Type", "")
        wanted = parse_qs(body.decode()).get("paths", []) if form else json.loads(body)["paths"]
        return 200, [self._entry(path, files[path]) for path in wanted if path in files]

    @staticmethod
    def _entry(path, blob):
        entry = {"type": "file", "oid": blob.git_oid, "size": len(blob.content), "path": path}
        lfs = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        return {**entry, "lfs": lfs} if blob.lfs else entry

    def resolve(self, query, body, repo, revision, path):
        commit = self._commit_at(self._repo(repo), revision)
        if path not in commit.files:
            missing = HubError(404, "Entry not found", "EntryNotFound")
            missing.answer[2]["X-Repo-Commit"] = commit.oid
            raise missing
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "none"}
        if blob.lfs:
            headers.update(
                {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": len(blob.content)}
            )
        return 200, blob.content, headers


REPO, REVISION = r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
MODEL = rf"/api/models/{REPO}"
ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST {MODEL}/preupload/{REVISION}", _Handler.preupload),
    (rf"POST {MODEL}/commit/{REVISION}", _Handler.commit),
    (rf"POST {MODEL}/branch/(?P<branch>[^/]+)", _Handler.branch),
    (rf"POST {MODEL}/paths-info/{REVISION}", _Handler.paths_info),
    (rf"GET {MODEL}/refs", _Handler.refs),
    (rf"GET {MODEL}/tree/{REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"GET {MODEL}/revision/{REVISION}", _Handler.info),
    (rf"GET {MODEL}", _Handler.info),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (rf"POST /lfs/{REPO}/verify", _Handler.lfs_verify),
    (rf"PUT /lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})", _Handler.lfs_put),
    (rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
]


def card_problems(content):
    """Errors and warnings of the Hub for a model card: here only those for ``base_model``, and for
    metadata that are missing.
    """
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if not block:
        return [], ["empty or missing yaml metadata in repo card"]
    field = re.search(r"^base_model:(.*)((?:\r?\n *- .*)*)", block[1], re.MULTILINE)
    if not field:
        return [], []
    # One value on the line, or a list below it.
    values = [
        line.strip().removeprefix("- ") for line in field[2].splitlines() if line.strip()
    ] or [field[1]]
    names = [value.strip().strip("'\"") for value in values]
    bad = [name for name in names if not re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]{0,95}", name)]
    return [
        f'"base_model" with value "{n}" is not valid. Use a model id from https://hf.co/models.'
        for n in bad
    ], []


def run_client(hub, code, tmp_path, **environment):
    """Runs ``code`` in a fresh interpreter whose Hub is ``hub``; what it prints. The working
    directory is ``tmp_path``.

    Every call starts with an empty cache, so what it loads by name has come from the stand-in.
    ``environment`` adds variables or replaces them: ``run_client(hub, code, tmp_path,
    HF_TOKEN="another")``.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    env = {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": tempfile.mkdtemp(prefix="hf_home_", dir=tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    # They would point into another cache, or to no network at all.
    for name in {
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
    } - set(environment):
        env.pop(name, None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
