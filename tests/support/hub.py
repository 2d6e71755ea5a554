"""A Hugging Face hub in this process: as much of its protocol as downloading needs, and what can go wrong."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each with its files. Answers as huggingface.co does to the official client.

    `cut` names a file whose first answers end after so many bytes, as a broken connection does.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.gated: set[str] = set()
        self.tokens = {"hf_good": True, "hf_other": False}
        """Known tokens, and whether their account may read what is gated."""
        self.cut: dict[str, list[int]] = {}
        self.statuses: dict[str, int] = {}
        """Statuses to answer with, by the repository."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and Range of every request."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.requests.append((self.command, self.path, self.headers.get("Range")))
                parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
                if parts[:2] == ["api", "models"]:
                    self.about("/".join(parts[2:4]), parts[4:])
                elif "resolve" in parts:
                    self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
                else:
                    self.refuse(404, "RepoNotFound")

            def may_read(self, name: str) -> bool:
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                if name in hub.statuses:
                    self.refuse(hub.statuses[name])
                elif token and token not in hub.tokens:
                    self.refuse(401, None, "Invalid credentials in Authorization header")
                elif name not in hub.repositories:
                    self.refuse(404 if token else 401, "RepoNotFound")
                elif name in hub.gated and not hub.tokens.get(token):
                    self.refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
                else:
                    return True
                return False

            def about(self, name: str, what: list[str]) -> None:
                if what[:1] != ["tree"] and name in hub.gated:  # the hub tells anyone what a gated repository holds
                    pass
                elif not self.may_read(name):
                    return
                files = hub.repositories[name]
                if len(what) > 1 and what[1] not in ("main", COMMIT):
                    self.refuse(404, "RevisionNotFound", f"Invalid rev id: {what[1]}")
                elif what[:1] == ["tree"]:
                    self.answer([{"type": "file", "path": path, **described(files[path])} for path in files])
                else:
                    siblings = [{"rfilename": path, **described(files[path])} for path in files]
                    self.answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})

            def file(self, name: str, revision: str, path: str) -> None:
                if not self.may_read(name):
                    return
                content = hub.repositories[name].get(path)
                if content is None or revision not in ("main", COMMIT):
                    self.refuse(404, "RevisionNotFound" if content is not None else "EntryNotFound")
                    return
                first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
                body = content[first:]
                self.send_response(206 if self.headers.get("Range") else 200)
                self.send_header("Content-Length", str(len(body)))
                if self.headers.get("Range"):
                    self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if hub.cut.get(path):
                    self.wfile.write(body[: hub.cut[path].pop(0)])
                    self.close_connection = True
                    return
                self.wfile.write(body)

            def answer(self, found: object) -> None:
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def refuse(self, status: int, code: str | None = None, message: str = "no") -> None:
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", message)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler


def described(content: bytes) -> dict[str, Any]:
    """Return what the hub says of a file."""
    return {"size": len(content), "oid": hashlib.sha1(content).hexdigest(), "blobId": hashlib.sha1(content).hexdigest()}
