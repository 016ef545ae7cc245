"""An OpenAI-compatible endpoint that answers by a rule: a real HTTP server on this machine, for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Reply:
    """What the server sends. body: as it is; text: in the form of the API. hang: nothing at all is sent."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    hang: bool = False


@dataclass
class Server:
    """url: up to /v1. seen: (path, body) of all requests that came, in order."""

    url: str
    seen: list[tuple[str, Body]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serving(rule: Callable[[str, Body], Reply | str]) -> Iterator[Server]:
    """A server on a free port; rule(path, body) answers, path being "chat/completions" or "completions"."""
    closing = threading.Event()
    server = Server("")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = self.path.removeprefix("/v1/")
            with lock:
                server.seen.append((path, body))
                server.headers.append(dict(self.headers))
            reply = rule(path, body)
            reply = reply if isinstance(reply, Reply) else Reply(reply)
            if reply.hang:
                closing.wait()
                self.close_connection = True
                return
            content = reply.body if reply.body is not None else _response(path, body, reply)
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        closing.set()
        http.shutdown()
        http.server_close()
        thread.join()


def _response(path: str, body: Body, reply: Reply) -> bytes:
    said = (
        {"message": {"role": "assistant", "content": reply.text}} if "chat" in path else {"text": reply.text}
    )
    prompt = body.get("prompt") or " ".join(turn["content"] for turn in body["messages"])
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(reply.text.split())}
    return json.dumps(
        {"choices": [{"index": 0, "finish_reason": reply.finish_reason} | said], "usage": usage}
    ).encode()
