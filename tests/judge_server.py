"""A served judge on loopback for the tests: it answers by a rule, or misbehaves when it is told."""

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


def rule(picture):
    """The score of the server's judge: how bright the edit is, between two digits."""
    return float(np.asarray(picture.convert("RGB"), float).mean() / 255)


def first_words(mark, fault):
    """{word: probability} of the answer to a mark from 0 to 5, spoiled by a fault."""
    low = int(min(mark, 4))
    p = {str(digit): 1e-9 for digit in range(6)}
    p[str(low)] += 0.98 * (1 - (mark - low))
    p[str(low + 1)] += 0.98 * (mark - low)
    p |= {"Yes": 0.006, "no": 0.002}
    if fault == "missing":
        p = {"The": 0.7, "I": 0.2}
    if fault == "low mass":
        p = {"The": 0.7, "I": 0.2, str(low): 0.05}
    if fault == "some missing":
        p = {"3": 0.4, "4": 0.2, "The": 0.3}
    if fault == "thinks":
        p = {"<think>": 0.99, "4": 0.005}
    if fault == "above one":
        p |= {"2": 0.9, "3": 0.9}
    return p


def listed_words(p, fault):
    """Those words as a reply lists them."""
    words = [{"token": word, "logprob": math.log(share)} for word, share in p.items()]
    if fault == "twice":
        words.append({"token": "3", "logprob": math.log(0.01)})
    if fault in ("-inf", "nan"):
        words[0]["logprob"] = float(fault)
    if fault == "top-k":
        for word in words[:4]:
            word["logprob"] = -9999.0
    if fault == "400 digits":
        words[0]["logprob"] = int("9" * 400)
    return words


REPLIES = {  # that are no completion
    "html": "<html><body>starting up</body></html>",
    "brackets": "[" * 100000,
    "a number": "9" * 400,
    "huge": json.dumps({"choices": ["x" * 2**23]}),
}
STATUSES = {  # status, text, headers
    "429": (429, "busy", [("Retry-After", "1")]),
    "500": (500, "busy"),
    "retry ²": (429, "busy", [("Retry-After", "\u00b2")]),
    "307": (307, "", [("Location", "http://127.0.0.1:9/v1/chat/completions")]),
}


class JudgeServer:
    """`with JudgeServer() as server`: answers at server.url and remembers what it was asked.

    faults: used up one a request, then `always`, then none. written: texts that it replies in
    turn where it may write more than a word, each a text or (text, finish_reason). says and
    believes: rules in place of that and of the digits, (question, pictures) -> a text, or the
    probability of yes.
    """

    def __init__(self, delay=0.0, models=("judge",), port=0):
        self.delay, self.models, self.port = delay, list(models), port
        self.faults, self.always = [], None
        self.written = []
        self.says = self.believes = None
        self.hangs = 3  # seconds
        self.open, self.requests, self.pictures = [], [], []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (Handler,), {"judge": self})
        self.http = Server(("127.0.0.1", self.port), handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        serve = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        serve.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        for connection in self.open:  # else its threads would go on answering what is connected
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, body, fault):
        """The completion as a dict, spoiled by `fault`."""
        shown = []
        question = ""
        for turn in body["messages"]:
            for part in turn["content"]:
                if part["type"] == "text":
                    question += part["text"]
                else:
                    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
                    shown.append(Image.open(io.BytesIO(base64.b64decode(data))))
        with self.lock:
            self.pictures.append(shown)
            written = self.written.pop(0) if self.written else "It was moved."
        p = first_words(5 * rule(shown[-1]), fault)
        if self.believes and body.get("logprobs"):
            share = 0.98 * self.believes(question, shown)
            p = {"yes": share + 1e-9, "Yes": 1e-9, "no": 0.98 - share + 1e-9, "No": 1e-9}
        if self.says and not body.get("logprobs"):
            written = self.says(question, shown)
        text = max(p, key=p.get)
        words = {"content": [{"token": text, "top_logprobs": listed_words(p, fault)}]}
        reason = "length"
        if not body.get("logprobs"):
            words = None
            text, reason = written if isinstance(written, tuple) else (written, "stop")
        message = {"role": "assistant", "content": text}
        if fault == "list text":
            message["content"] = [[["4"]]]
        if fault == "reasoning":
            message |= {"content": None, "reasoning_content": "hm"}
        if fault == "no logprobs":
            words = None
        choice = {"index": 0, "finish_reason": reason, "message": message, "logprobs": words}
        times = {"no choices": 0, "two choices": 2}.get(fault, 1)
        return {"id": "x", "choices": [choice] * times}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # connections that the tests break


class Handler(BaseHTTPRequestHandler):
    protocol_version, judge = "HTTP/1.1", None

    def setup(self):
        super().setup()
        self.judge.open.append(self.connection)

    def log_message(self, *_):
        pass

    def send(self, status, text, headers=(), cut=0):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text.encode()) + cut))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())
        if cut:
            self.close_connection = True

    def drip(self, first):
        """One byte every tenth of a second, for five seconds."""
        self.close_connection = True
        self.wfile.write(first)
        for _ in range(50):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)

    def do_GET(self):
        self.send(200, json.dumps({"data": [{"id": name} for name in self.judge.models]}))

    def do_POST(self):
        judge, body = self.judge, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            request = {"path": self.path, "body": body, "headers": dict(self.headers)}
            judge.requests.append(request | {"time": time.monotonic()})
            fault = judge.faults.pop(0) if judge.faults else judge.always
            judge.busy += 1
            judge.most_busy = max(judge.most_busy, judge.busy)
        try:
            time.sleep(judge.hangs if fault == "hang" else judge.delay)
            self.reply(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with judge.lock:
                judge.busy -= 1

    def reply(self, body, fault):
        text = REPLIES.get(fault)
        if fault == "drop":
            self.close_connection = True
        elif fault in STATUSES:
            self.send(*STATUSES[fault])
        elif fault in ("400", "400 late", "new models") and self.has_refused(body, fault):
            pass
        elif fault in ("slow body", "slow head"):
            line = b"\r\n" if fault == "slow body" else b"X-Slow: "
            self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n" + line)
        elif fault == "truncated":
            self.send(200, json.dumps(self.judge.answer(body, None))[:100], cut=50)
        else:
            self.send(200, text or json.dumps(self.judge.answer(body, fault)))

    def has_refused(self, body, fault):
        """Whether this fault refuses such a request, which it then did."""
        key = self.headers.get("Authorization") or ""
        text = f"the picture is refused, {key}"
        if fault == "400 late":  # what it repeats lies across the end of what is shown
            text = "x" * 150 + key
        if fault == "new models":
            new = {"max_tokens": "max_completion_tokens", "temperature": "1"}
            old = new.keys() & body.keys()
            if not old:
                return False
            text = f"Unsupported value: '{min(old)}' is not supported; use {new[min(old)]}"
        self.send(400, json.dumps({"error": {"message": text}}))
        return True
