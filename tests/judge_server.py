"""A served judge on loopback that answers by a rule or misbehaves on request: a real HTTP server for the tests."""

import base64
import contextlib
import io
import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

FAULTS = (
    "drop",
    "hang",
    "400",
    "429",
    "500",
    "html",
    "truncated",
    "no logprobs",
    "no choices",
    "two choices",
    "missing",
    "some missing",
    "-inf",
    "nan",
    "low mass",
    "thinks",
)


def rule(picture):
    """The score of the server's judge: how bright the edit is, between two digits."""
    return float(np.asarray(picture.convert("RGB"), float).mean() / 255)


class JudgeServer:
    """`with JudgeServer() as server`: server.url; `faults` are used up one a request, then `always`, then it answers."""

    def __init__(self, delay=0.0, models=("judge",), port=0):
        self.faults, self.always, self.delay, self.models, self.port = (
            [],
            None,
            delay,
            list(models),
            port,
        )
        self.open, self.requests, self.pictures, self.busy, self.most_busy, self.lock = (
            [],
            [],
            [],
            0,
            0,
            threading.Lock(),
        )

    def __enter__(self):
        self.http = ThreadingHTTPServer(
            ("127.0.0.1", self.port), type("Handler", (Handler,), {"judge": self})
        )
        self.http.daemon_threads, self.port = True, self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        for (
            connection
        ) in self.open:  # else its threads would go on answering what is connected already
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, body, fault):
        """The completion as a dict, spoiled by `fault`."""
        parts = [part for turn in body["messages"] for part in turn["content"]]
        shown = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        shown = [
            Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
            for url in shown
        ]
        self.pictures.append(shown)
        mark = 5 * rule(shown[-1])
        low, share = int(min(mark, 4)), mark - int(min(mark, 4))
        p = {str(digit): 1e-9 for digit in range(6)} | {
            str(low): 0.98 * (1 - share) + 1e-9,
            str(low + 1): 0.98 * share + 1e-9,
        }
        p |= {"Yes": 0.006, "no": 0.002}
        if fault in ("missing", "low mass"):
            p = {"The": 0.7, "I": 0.2} | ({} if fault == "missing" else {str(low): 0.05})
        if fault == "some missing":
            p = {"3": 0.4, "4": 0.2, "The": 0.3}
        if fault == "thinks":
            p = {"<think>": 0.99, "4": 0.005}
        text = max(p, key=p.get)
        words = [{"token": word, "logprob": math.log(share)} for word, share in p.items()]
        if fault in ("-inf", "nan"):
            words[0]["logprob"] = float(fault)
        content = [{"token": text, "logprob": math.log(p[text]), "top_logprobs": words}]
        text = text if body.get("max_tokens") == 1 else "It was moved."
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": content}
            if body.get("logprobs") and fault != "no logprobs"
            else None,
        }
        return {"id": "x", "choices": [choice] * {"no choices": 0, "two choices": 2}.get(fault, 1)}


class Handler(BaseHTTPRequestHandler):
    protocol_version, judge = "HTTP/1.1", None

    def setup(self):
        super().setup()
        self.judge.open.append(self.connection)

    def log_message(self, *_):
        pass

    def send(self, status, text, headers=(), cut=0):
        self.send_response(status)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(text.encode()) + cut)),
            *headers,
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())
        if cut:
            self.close_connection = True

    def do_GET(self):
        self.send(200, json.dumps({"data": [{"id": name} for name in self.judge.models]}))

    def do_POST(self):
        judge, body = self.judge, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.requests.append(
                {
                    "path": self.path,
                    "body": body,
                    "headers": dict(self.headers),
                    "time": time.monotonic(),
                }
            )
            fault = judge.faults.pop(0) if judge.faults else judge.always
            judge.busy += 1
            judge.most_busy = max(judge.most_busy, judge.busy)
        try:
            time.sleep(3 if fault == "hang" else judge.delay)
            if fault == "drop":
                self.close_connection = True
            elif fault == "400":
                self.send(
                    400,
                    json.dumps(
                        {
                            "error": {
                                "message": f"the picture is refused, {self.headers.get('Authorization')}"
                            }
                        }
                    ),
                )
            elif fault in ("429", "500"):
                self.send(int(fault), "busy", [("Retry-After", "1")] if fault == "429" else [])
            elif fault == "html":
                self.send(200, "<html><body>starting up</body></html>")
            elif fault == "truncated":
                self.send(200, json.dumps(judge.answer(body, None))[:100], cut=50)
            else:
                self.send(200, json.dumps(judge.answer(body, fault)))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with judge.lock:
                judge.busy -= 1
