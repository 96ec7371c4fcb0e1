#!/usr/bin/env python3
"""A judge for checks, with the OpenAI API: it judges by a fixed rule and fails at configurable rates.

    judge.py [--port 0] [--errors 0.1] [--slow 0.1] [--abstain 0.05] [--outage-after N] [--outage-s S]

Prints its address on one line. Its answer is a function of the question and of the number of earlier questions. In
comparisons it prefers the text with more distinct words, with a bias for the first position; in ratings it scores the
text by a hash of that number. The share `--errors` of its answers is 500 or 429, the share `--slow` is half a second
late, and the share `--abstain` names no answer. After N questions it fails for S seconds, like an unavailable server.
Needs only Python 3.8.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COUNT = itertools.count()
OUTAGE = {"until": None}
LOCK = threading.Lock()


def share(*what):
    """Returns a number from 0 to 1, by a hash of `what`."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def worth(text):
    """Returns the number of distinct words of a text, plus a hundredth of the number of its distinct characters."""
    return len(set(text.split())) + len(set(text)) / 100


def distribution(prompt, abstains):
    """Returns the distribution of the next token as (token, probability), most likely first."""
    if abstains:
        return [("Well", 0.9), ("It", 0.05)]
    first, mark, rest = prompt.rpartition("Summary 1 - ")[2].partition("Summary 2 - ")
    if mark:
        lead = worth(first) - worth(rest.partition("Preferred Summary=")[0])
        p = 1 / (1 + math.exp(-(0.3 + lead)))
        answers = [("1", 0.98 * p), ("2", 0.98 * (1 - p))]
    else:
        mean = 3 + 4 * share(worth(prompt.rpartition("SUMMARY: ")[2]))
        weights = {str(i): math.exp(-((i - mean) ** 2)) for i in range(1, 10)}
        total = sum(weights.values())
        answers = [(token, 0.98 * weight / total) for token, weight in weights.items()]
    return sorted(answers, key=lambda one: -one[1])


class Judge(BaseHTTPRequestHandler):
    """Handler of one exchange. `main` sets `options`."""

    options = None
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = next(COUNT)
        if self.is_down(number):
            return self.answer(503, {"error": {"message": "down"}})
        if share("slow", number) < self.options.slow:
            time.sleep(0.5)
        if share("error", number) < self.options.errors:
            return self.answer(500 if number % 2 else 429, {"error": {"message": "simulated error"}})
        chat = "messages" in body
        begun = chat and body["messages"][-1]["role"] == "assistant"
        asked = [m["content"] for m in body["messages"] if m["role"] == "user"] if chat else [body["prompt"]]
        prompt = asked[0]
        # A rating that begins with "1" may continue with "0".
        abstains = share("abstain", number) < self.options.abstain
        tokens = [(".", 0.7), ("0", 0.2)] if begun else distribution(prompt, abstains)
        log = [{"token": token, "logprob": math.log(p)} for token, p in tokens]
        text = tokens[0][0]
        if chat:
            logprobs = {"content": [{**log[0], "top_logprobs": log}]}
            choice = {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}
        else:
            choice = {"text": text, "logprobs": {"top_logprobs": [{one["token"]: one["logprob"] for one in log}]}}
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": 1}
        return self.answer(200, {"choices": [choice], "usage": usage})

    def is_down(self, number):
        """Returns whether the configured outage is in progress."""
        with LOCK:
            if self.options.outage_after and number >= self.options.outage_after and OUTAGE["until"] is None:
                OUTAGE["until"] = time.monotonic() + self.options.outage_s
            return OUTAGE["until"] is not None and time.monotonic() < OUTAGE["until"]

    def answer(self, status, value):
        body = json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has used the answer to a hedged request

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 (default) for any free port")
    parser.add_argument("--errors", type=float, default=0.1, help="share of answers that are 500 or 429")
    parser.add_argument("--slow", type=float, default=0.1, help="share of answers that are half a second late")
    parser.add_argument("--abstain", type=float, default=0.05, help="share of answers that name none of the choices")
    parser.add_argument("--outage-after", type=int, default=0, help="number of questions before an outage; 0 for none")
    parser.add_argument("--outage-s", type=float, default=4.0, help="duration of the outage in seconds")
    Judge.options = parser.parse_args()
    server = Server(("127.0.0.1", Judge.options.port), Judge)
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
