"""A stand-in for the Hugging Face Hub: what huggingface_hub asks of it for datasets, over HTTP.

Written after huggingface_hub's own source (hf_api, _commit_api, lfs, file_download). It keeps
commits as whole trees in memory, large files by their sha256; checks what is uploaded against it;
asks for a token; and can fail on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_test"
SMALL = 1000
"""Files up to so many bytes are kept as they are, larger ones by LFS."""


class Hub:
    """The state of the server."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.refuse_upload: Callable[[int], bool] = lambda _: False
        self.damage: Callable[[str], bool] = lambda _: False

    def files(self, name: str) -> dict[str, bytes]:
        """What a repository's newest commit holds."""
        return self.repos[name]["commits"][-1][1]

    def messages(self, name: str) -> list[str]:
        return [message for _, _, message in self.repos[name]["commits"]]

    def create(self, name: str, private: bool) -> None:
        self.repos[name] = {"private": private, "commits": []}
        self.commit(name, {".gitattributes": b"* text=auto\n"}, "initial commit")

    def commit(self, name: str, files: dict[str, bytes], message: str) -> str:
        commits = self.repos[name]["commits"]
        whole = {**(commits[-1][1] if commits else {}), **files}
        sha = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append((sha, whole, message))
        return sha

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for sha, files, _ in reversed(self.repos[name]["commits"]):
            if revision in ("main", sha):
                return sha, files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, what: str) -> None:
        self._answer(404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound")

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        url = urlsplit(self.path)
        parts = [unquote(p) for p in url.path.strip("/").split("/")]
        with self.hub.lock:
            self._route(parts, parse_qs(url.query), body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.hub
        if parts[0] == "lfs":  # signed addresses need no token
            return self._upload(parts[1], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "who are you?"}, X_Error_Message="who are you?")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        if parts[:2] == ["api", "datasets"]:
            name, what = "/".join(parts[2:4]), parts[4:]
        else:
            assert parts[0] == "datasets", parts
            name, what = "/".join(parts[1:3]).removesuffix(".git"), parts[3:]
        hub.asked[what[0] if what else "info"] += 1
        if name not in hub.repos:
            return self._missing("Repo")
        if what[:2] == ["info", "lfs"]:
            return self._lfs(json.loads(body))
        if what and what[0] == "preupload":
            return self._preupload(name, json.loads(body))
        if what and what[0] == "commit":
            return self._commit(name, body)
        found = hub.at(name, what[1] if len(what) > 1 else "main")
        if found is None:
            return self._missing("Revision")
        sha, files = found
        if not what or what[0] == "revision":
            siblings = [{"rfilename": f} for f in files]
            return self._answer(200, {"id": name, "sha": sha, "siblings": siblings, "tags": []})
        if what[0] == "tree":
            return self._answer(200, [_entry(path, data) for path, data in files.items()])
        assert what[0] == "resolve", what
        return self._resolve(sha, files, "/".join(what[2:]))

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repos
        if not there:
            assert asked["type"] == "dataset"
            self.hub.create(name, asked.get("visibility") == "private" or asked.get("private"))
        host = self.headers["Host"]
        address = {"url": f"http://{host}/datasets/{name}"}
        self._answer(409 if there else 200, address)

    def _preupload(self, name: str, asked: dict[str, Any]) -> None:
        files = self.hub.files(name)
        rows = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["size"] > SMALL else "regular",
                "shouldIgnore": False,
                "oid": _oid(files[f["path"]]) if f["path"] in files else None,
            }
            for f in asked["files"]
        ]
        self._answer(200, {"files": rows})

    def _lfs(self, asked: dict[str, Any]) -> None:
        host = self.headers["Host"]
        objects = []
        for one in asked["objects"]:
            row = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.blobs:
                row["actions"] = {"upload": {"href": f"http://{host}/lfs/{one['oid']}"}}
            objects.append(row)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> None:
        self.hub.asked["upload"] += 1
        if self.hub.refuse_upload(self.hub.asked["upload"]):
            return self._answer(403, {"error": "no more of that"})
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "not what it is called"})
        self.hub.blobs[oid] = body
        return self._answer(200)

    def _commit(self, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line
                files[value["path"]] = self.hub.blobs[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
        sha = self.hub.commit(name, files, lines[0]["value"]["summary"])
        host = self.headers["Host"]
        url = f"http://{host}/datasets/{name}/commit/{sha}"
        self._answer(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def _resolve(self, sha: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._missing("Entry")
        data = files[path]
        etag = _oid(data)
        if self.hub.damage(path):
            data = bytes([data[0] ^ 1]) + data[1:]
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            rest = data[start:]
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._answer(206, rest, **headers)
        return self._answer(200, data, **headers)


def _oid(data: bytes) -> str:
    """As git has it of small files, and LFS of large ones."""
    if len(data) > SMALL:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
    if len(data) > SMALL:
        entry["lfs"] = {"oid": _oid(data), "size": len(data), "pointerSize": 100}
    return entry


@contextmanager
def hub_server() -> Iterator[tuple[Hub, str]]:
    """A server for a while: its state and its address."""
    hub = Hub()
    handler = type("OneHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
