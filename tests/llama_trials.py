"""Trials of runs whose judge is a real llama.cpp server that refuses, is stopped, slowed down and replaced during the run.

    pip install xllamacpp
    python tests/llama_trials.py target/release/preceptor JUDGE.gguf OTHER.gguf

Prints a line for each trial and ends with status 1 if one failed. Takes some minutes on two cores.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PROGRAM, JUDGE, OTHER = sys.argv[1:4]
CONFIG = Path(__file__).parent.parent / "configs/offline.toml"
PORT, NODE = 8192, 9492
SERVE = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
p.n_ctx, p.n_parallel, p.cpuparams.n_threads, p.cpuparams_batch.n_threads = 2048, 2, 1, 1
p.api_keys = ["right"]
server = xllamacpp.Server(p)
time.sleep(36000)
"""


def serve(model):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, model, str(PORT)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1)
            return server
        except OSError:
            time.sleep(0.2)
    raise SystemExit("llama.cpp did not start")


def stop(server):
    server.send_signal(signal.SIGKILL)
    server.wait()


class Run:
    """A training run in a separate directory."""

    def __init__(self, key="right", resume=False, directory=None, outage=3600):
        self.dir = Path(directory or tempfile.mkdtemp())
        remote = (
            f'{{ url = "http://127.0.0.1:{PORT}/v1", model = "judge", api_key_env = "JUDGE_KEY", retries = 2,'
            f" breaker_cooldown_s = 1, outage_s = {outage}, timeout_s = 20 }}"
        )
        sets = [
            "labeler.type=direct", f"labeler.remote={remote}", f'labeler.cache="{self.dir}/labels"', "run.steps=6",
            "learner.batch_groups=2", "rollout.group_size=2", "rollout.max_new_tokens=8", "learner.eta=0",
            f'serve.listen="127.0.0.1:{NODE}"',
        ]
        command = [PROGRAM, "train", str(CONFIG), "--run-dir", str(self.dir / "run")]
        command += ["--resume"] if resume else []
        for one in sets:
            command += ["--set", one]
        self.log = self.dir / "log"
        environment = dict(os.environ, JUDGE_KEY=key)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log.open("a"), env=environment)

    def steps(self):
        path = self.dir / "run/metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, what, holds, seconds=300):
        end = time.time() + seconds
        while not holds():
            if time.time() > end or (self.process.poll() is not None and not holds()):
                raise AssertionError(f"{what} did not come; the log ends:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def ready(self):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{NODE}/readyz", timeout=2).read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return ""

    def end(self, status=0):
        got = self.process.wait(timeout=600)
        assert got == status, f"status {got} and not {status}:\n{self.log.read_text()[-2000:]}"

    def is_complete(self):
        steps = self.steps()
        masked = [step["groups/masked"] for step in steps]
        assert masked == [0] * 6, f"masked groups by step: {masked}"


@contextlib.contextmanager
def served(model):
    server = serve(model)
    try:
        yield server
    finally:
        stop(server)


def resumed(run):
    """Resumes `run` with a judge that answers, and expects all steps."""
    with served(JUDGE):
        again = Run(resume=True, directory=run.dir)
        again.end(0)
        again.is_complete()


def wrong_key():
    with served(JUDGE):
        run = Run(key="wrong")
        run.end(2)
        assert "401" in run.log.read_text() and "Invalid API Key" in run.log.read_text(), run.log.read_text()
        assert run.steps() == [], "nothing is spent"
        again = Run(directory=run.dir)
        again.end(0)
        again.is_complete()


def with_stopped_judge():
    """Returns a run whose judge was stopped after two steps."""
    with served(JUDGE):
        run = Run()
        run.until("a step", lambda: len(run.steps()) >= 2)
    run.until("the cause", lambda: "could not be reached" in run.ready())
    return run


def stopped():
    run = with_stopped_judge()
    before = len(run.steps())
    time.sleep(5)
    assert len(run.steps()) <= before + 1, "the run stands still"
    with served(JUDGE):
        run.end(0)
        run.is_complete()


def slowed():
    with served(JUDGE) as server:
        run = Run()
        run.until("a step", lambda: len(run.steps()) >= 2)
        server.send_signal(signal.SIGSTOP)
        run.until("the cause", lambda: "did not answer within labeler.remote.timeout_s" in run.ready())
        server.send_signal(signal.SIGCONT)
        run.end(0)
        run.is_complete()


def swapped():
    run = with_stopped_judge()
    with served(OTHER):
        run.until("the cause", lambda: "answers as model" in run.ready())
    with served(JUDGE):
        run.end(0)
        run.is_complete()


def away_for_good():
    with served(JUDGE):
        run = Run(outage=8)
        run.until("a step", lambda: len(run.steps()) >= 2)
    run.end(1)
    assert "checkpoint" in run.log.read_text()
    resumed(run)


def terminated_while_it_waits():
    run = with_stopped_judge()
    began = time.time()
    run.process.send_signal(signal.SIGTERM)
    run.end(143)
    took = time.time() - began
    assert took < 30 and list((run.dir / "run/checkpoints").glob("step-*")), f"{took:.0f} s"
    resumed(run)


failed = 0
for trial in [wrong_key, stopped, slowed, swapped, away_for_good, terminated_while_it_waits]:
    began = time.time()
    try:
        trial()
        print(f"{trial.__name__}: ok, {time.time() - began:.0f} s", flush=True)
    except Exception as error:  # noqa: BLE001
        failed += 1
        print(f"{trial.__name__}: FAILED: {error}", flush=True)
sys.exit(1 if failed else 0)
