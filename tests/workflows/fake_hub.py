"""A Hugging Face Hub of one dataset repository on this machine, as far as huggingface_hub asks for one."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


class Repo:
    """commits: sha -> {path: bytes}; heads: branch -> sha. `fail` may raise, given method and path of a request."""

    def __init__(self, name):
        self.name, self.private, self.commits, self.heads = name, False, {}, {}
        self.fail = lambda method, path: None
        self.damage = {}  # path -> bytes that are sent instead
        self.seen = []
        self.lock = threading.Lock()
        self.made = False

    def make(self, private):
        self.made, self.private = True, private
        self.commit("main", {".gitattributes": b""})

    def commit(self, branch, files):
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.heads[branch] = sha
        return sha

    def files(self, revision="main"):
        return self.commits[self.heads.get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repo: Repo

    def log_message(self, *_):
        pass

    def answer(self, status, value=None, data=None, headers=()):
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer(404, {"error": code}, headers=[("X-Error-Code", code), ("X-Error-Message", code)])

    def handle_any(self):
        repo, url = self.repo, urlparse(self.path)
        path = unquote(url.path)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        try:
            repo.fail(self.command, path)
        except PermissionError as error:
            return self.answer(403, {"error": str(error)})
        with repo.lock:
            repo.seen.append((self.command, path))
            return self.route(repo, path, body, parse_qs(url.query))

    do_GET = do_HEAD = do_POST = handle_any

    def route(self, repo, path, body, query):
        api = f"/api/datasets/{repo.name}"
        if path == "/api/repos/create":
            said = json.loads(body)
            owner = repo.name.partition("/")[0]
            if f"{said.get('organization') or owner}/{said['name']}" != repo.name:
                return self.answer(403, {"error": "not yours"})
            if repo.made:
                return self.answer(409, {"error": "there already", "url": path})
            repo.make(bool(said.get("private")) or said.get("visibility") == "private")
            return self.answer(200, {"url": f"http://{self.headers['Host']}/datasets/{repo.name}"})
        if not repo.made or not path.startswith((api, f"/datasets/{repo.name}/resolve/")):
            return self.missing("RepoNotFound")
        if path.startswith(f"{api}/branch/"):
            branch = path.rpartition("/")[2]
            if branch in repo.heads:
                return self.answer(409, {"error": "there already"})
            repo.heads[branch] = repo.heads["main"]
            return self.answer(200, {})
        if path in (api, f"{api}/revision/{path.rpartition('/')[2]}"):
            revision = "main" if path == api else path.rpartition("/")[2]
            sha = repo.heads.get(revision, revision)
            if sha not in repo.commits:
                return self.missing("RevisionNotFound")
            return self.answer(200, {"id": repo.name, "sha": sha, "private": repo.private})
        if path.startswith(f"{api}/tree/"):
            files = repo.files(path.removeprefix(f"{api}/tree/").partition("/")[0])
            listed = [{"type": "file", "path": one, "size": len(data), "oid": "0"} for one, data in files.items()]
            return self.answer(200, [{"type": "directory", "path": "shards", "oid": "0"}, *listed])
        if path.startswith(f"{api}/preupload/"):
            named = json.loads(body)["files"]
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in named]
            return self.answer(200, {"files": files})
        if path.startswith(f"{api}/commit/"):
            return self.take(repo, path.rpartition("/")[2], [json.loads(line) for line in body.splitlines()])
        revision, _, name = path.removeprefix(f"/datasets/{repo.name}/resolve/").partition("/")
        files = repo.files(revision)
        if name not in files:
            return self.missing("EntryNotFound")
        data = repo.damage.get(name, files[name])
        sha = repo.heads.get(revision, revision)
        headers = [("ETag", f'"{hashlib.sha256(data).hexdigest()}"'), ("X-Repo-Commit", sha)]
        return self.answer(200, data=data, headers=headers)

    def take(self, repo, branch, lines):
        header, files = lines[0]["value"], dict(repo.files(branch))
        if header.get("parentCommit") not in (None, repo.heads[branch]):
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(line)
        sha = repo.commit(branch, files)
        return self.answer(
            200, {"commitUrl": f"http://{self.headers['Host']}/datasets/{repo.name}/commit/{sha}", "commitOid": sha}
        )


@contextmanager
def serving(repo):
    handler = type("Bound", (Handler,), {"repo": repo})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
