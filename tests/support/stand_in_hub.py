"""A hub on 127.0.0.1 that speaks the protocol of uploads: repositories, upload modes, large files, commits."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """`files`: what was committed, by name. `tokens`: the Authorization headers that came. `refuse`: a status that all
    requests are answered with."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repos: list[dict] = []
        self.tokens: set[str] = set()
        self.refuse = 0
        large: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = b""
                    while size := int(self.rfile.readline(), 16):
                        parts += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return parts
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def answer(self, status: int, value: object = None) -> None:
                data = b"" if value is None else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_PUT(self) -> None:
                large[self.path.rpartition("/")[2]] = self.body()
                self.answer(200)

            def do_POST(self) -> None:
                body = self.body()
                hub.tokens.add(self.headers.get("Authorization", ""))
                if hub.refuse:
                    self.answer(hub.refuse, {"error": f"not with {self.headers.get('Authorization')}"})
                elif self.path == "/api/repos/create":
                    hub.repos.append(json.loads(body))
                    self.answer(200, {"url": f"{hub.url}/o/n", "id": "o/n"})
                elif self.path == "/api/validate-yaml":
                    self.answer(200, {"warnings": [], "errors": []})
                elif "/preupload/" in self.path:
                    names = [file["path"] for file in json.loads(body)["files"]]
                    modes = [
                        {"path": n, "uploadMode": "lfs" if n.endswith(".safetensors") else "regular"} for n in names
                    ]
                    self.answer(200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
                elif self.path.endswith("/info/lfs/objects/batch"):
                    wanted = json.loads(body)["objects"]
                    objects = [
                        {**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}", "header": {}}}}
                        for o in wanted
                    ]
                    self.answer(200, {"transfer": "basic", "objects": objects})
                elif "/commit/" in self.path:
                    for line in body.decode().splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                        elif entry["key"] == "lfsFile":
                            hub.files[entry["value"]["path"]] = large[entry["value"]["oid"]]
                    self.answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": f"{hub.url}/o/n/commit/c"})
                else:
                    self.answer(404, {"error": self.path})

            def log_message(self, *_args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
