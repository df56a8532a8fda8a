"""A real HTTP server on 127.0.0.1 for the scorers that ask one, and the small media they are given."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from pipeline.config.schema import RewardConfig
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.runner import build_reward


class Server:
    """Answers each POST with `reply(path, payload, number)` -> (status, body) and keeps what it was sent."""

    def __init__(self, reply):
        self.seen, self.headers, lock = [], [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append(payload)
                    outer.headers.append(dict(self.headers))
                    number = len(outer.seen)
                status, body = reply(self.path, payload, number)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    if status == 302:
                        self.send_header("Location", "/elsewhere")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client did not wait

            def log_message(self, *_args):
                pass

        class Quick(ThreadingHTTPServer):
            request_queue_size = 128  # beyond it a connection waits a second
            daemon_threads = True

        self.http = Quick(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def levels(*values, frames=1):
    """Takes of constant grey."""
    pixels = (
        np.zeros((len(values), frames, 6, 8, 3), np.uint8) + np.asarray(values, np.uint8)[:, None, None, None, None]
    )
    return Media(frames=pixels, fps=8.0)


def items(*texts, **extra):
    return [PromptItem(index=i, text=text, **extra) for i, text in enumerate(texts)]


def picture(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def run(scorer, media, prompts, seed=None, **args):
    runner = build_reward("r", RewardConfig(scorer=scorer, args=args))
    client = runner.scorer.client if scorer == "http" else runner.scorer.chat.client
    client.pause_s = 0.01
    return runner.run(media, prompts, seed)
