"""Trials of runs whose completions are sampled by a real vLLM server (0.32) on this machine's CPU.

    PYTHON tests/served_trials.py target/release/preceptor VLLM WORK [TRIAL…] [--model MODEL]

PYTHON is the interpreter of the environment in which vLLM is installed, with torch, transformers and safetensors; VLLM is its
command `vllm`. WORK is a folder for models, runs and logs; it may be empty or of an earlier call. TRIAL is the name of a trial
or the beginning of one; without a name the script performs all of them. MODEL is a real model in addition to the two tiny ones that
the script makes: a Hugging Face directory or a GGUF file, such as SmolLM2-135M.

    logprobs    recorded log-probabilities at the temperatures 1 and 0.7, with adapters and with all weights
    adapters    a hand-over of adapters after each step, with a tied and with an untied output head
    weights     a hand-over of all weights after each step, with a tied and with an untied output head
    in-flight   changes of all weights in the middle of completions
    kills       a server that is killed twice with SIGKILL and started again, with adapters and with all weights
    sharing     two runs that use one server with adapters at the same time
    resume      a run that is resumed from an older checkpoint, on a server that has later versions
    judge       a judge on the server that samples, with and without the prefix cache
    worker      a worker hands the server its weights, and the run has no server of its own, with adapters and with all weights; the
                worker is killed once. It needs nats-server
    gains       20 steps on the server and in the process, with four seeds each
    model       log-probabilities and hand-overs of MODEL, with adapters and with all weights
    model-gains 20 steps with MODEL, with two seeds each

After each run on a server, a trial checks that each group was trained on once, that no token is staler than learner.eta, that
`preceptor replay` computes the same weights, and that the recorded log-probability of each token is that of transformers under the
weights of the version which the run recorded for the token. The script prints a line for each trial and a table, and ends with
status 1 if a trial failed. It takes about three quarters of an hour on two cores, with MODEL an hour more.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import journal

ARGUMENTS = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ARGUMENTS.add_argument("program", type=Path)
ARGUMENTS.add_argument("vllm", type=Path)
ARGUMENTS.add_argument("work", type=Path)
ARGUMENTS.add_argument("trials", nargs="*", metavar="TRIAL")
ARGUMENTS.add_argument("--model", type=Path)
ARGS = ARGUMENTS.parse_args()

CONFIG = Path(__file__).resolve().parent.parent / "configs/offline.toml"
PROGRAM, VLLM, WORK = ARGS.program.resolve(), ARGS.vllm.absolute(), ARGS.work.resolve()
PORT, NODE, BROKER = 8197, 9497, 4297
SERVER = f"http://127.0.0.1:{PORT}"
# Largest difference between a recorded log-probability and that of transformers, in nats.
TOLERANCE = 1e-4
BATCH, GROUP = 4, 8
ADAPTERS, WEIGHTS = "adapters", "weights"
# Two runs with two versions each, and one version more for each while a hand-over is under way.
LORAS = 8


# ---------------------------------------------------------------- models


def tiny(head):
    """Returns the directory of a model with random weights and byte tokens, whose output head is `tied` or `untied`."""
    directory = WORK / f"model-{head}"
    if directory.exists():
        return directory
    partial = WORK / f"model-{head}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if head == "tied":
        # vLLM's attention on a CPU needs heads of at least 32 dimensions.
        scratch = "{ hidden = 128, layers = 2, heads = 4, kv_heads = 2, intermediate = 352, context = 1024, seed = 1, init_std = 0.08 }"
        export(f"{{ scratch = {scratch} }}", partial)
    else:
        shutil.copytree(tiny("tied"), partial)
        weights = load_file(partial / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = 0.08 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2))
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    partial.rename(directory)
    return directory


def real():
    """Returns MODEL as a Hugging Face directory with weights in f32."""
    directory = WORK / "model-real"
    if not directory.exists():
        partial = WORK / "model-real.partial"
        shutil.rmtree(partial, ignore_errors=True)
        export(json.dumps(str(ARGS.model.resolve())), partial)
        partial.rename(directory)
    return directory


def export(model, directory):
    """Writes `model` as a Hugging Face directory: the checkpoint of a run that does not change the weights."""
    run = WORK / "export"
    shutil.rmtree(run, ignore_errors=True)
    sets = [
        f"policy.model={model}", "run.steps=1", "learner.lr=1e-30", "learner.algorithm=rloo", "learner.batch_groups=1",
        "rollout.group_size=2", "rollout.slots=2", "rollout.max_new_tokens=2", "learner.eta=0", "serve.enabled=false",
        "data.max_prompt_tokens=400",
    ]  # fmt: skip
    command([PROGRAM, "train", CONFIG, "--run-dir", run, *flags(sets)], "export.log")
    left_out = shutil.ignore_patterns("resume", "reward_model", "value*", "adapter", "preceptor.json", "config.toml", "SHA256SUMS")
    shutil.copytree(run / "checkpoints/step-000001", directory, ignore=left_out)
    shutil.rmtree(run)


# ---------------------------------------------------------------- processes


def flags(sets):
    return [part for one in sets for part in ("--set", one)]


def command(parts, log):
    """Executes a command, writes its output to the file `log`, and returns the output."""
    done = subprocess.run([str(part) for part in parts], cwd=WORK, capture_output=True, text=True)
    text = done.stdout + done.stderr
    (WORK / log).write_text(text)
    assert done.returncode == 0, f"{parts[1]} ended with status {done.returncode}; {log} ends:\n{text[-2000:]}"
    return text


def get(url, timeout=5):
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode()


class Server:
    """A vLLM server. It is a process group of its own, so that its engine ends with it."""

    count = 0

    def __init__(self, model, content, *more):
        self.key = (model, content, *more)
        environment = {
            "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
        }  # fmt: skip
        parts = [
            VLLM, "serve", model, "--served-model-name", "policy", "--host", "127.0.0.1", "--port", PORT, "--dtype", "float32",
            "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "32", "--enable-scale-out", "--logprobs-mode",
            "processed_logprobs", "--max-logprobs", "300",
        ]  # fmt: skip
        if content == ADAPTERS:
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
            parts += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", LORAS, "--max-cpu-loras", LORAS]
        else:
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        self.environment = {**environment, **os.environ}
        self.parts = [str(part) for part in (*parts, *more)]
        self.start()

    def start(self):
        Server.count += 1
        self.log = WORK / f"server-{Server.count}.log"
        began = time.time()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.parts, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        while time.time() < began + 600:
            try:
                get(f"{SERVER}/health", 1)
                return
            except OSError:
                assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-2000:]}"
                time.sleep(0.2)
        raise AssertionError("the server did not start within 600 s")

    def kill(self):
        """Kills the server and its engine with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def adapters(self):
        """Returns the versions of the adapters that the server has."""
        names = [model["id"] for model in json.loads(get(f"{SERVER}/v1/models"))["data"]]
        return sorted(int(name.split("-")[2]) for name in names if name.startswith("policy-"))


RUNNING = None


def serve(model, content, *more):
    """Returns a server with `model`, which is handed `content`. A suitable one that is running is used again."""
    global RUNNING
    if RUNNING and RUNNING.key == (model, content, *more) and RUNNING.process.poll() is None:
        return RUNNING
    if RUNNING:
        RUNNING.stop()
        RUNNING = None
    RUNNING = Server(model, content, *more)
    return RUNNING


class Run:
    """A training run on the server, or with `local` in its own process."""

    def __init__(self, name, model, content, *sets, steps=6, local=False, port=NODE):
        self.name, self.dir, self.model, self.steps, self.port = name, WORK / "runs" / name, model, steps, port
        shutil.rmtree(self.dir, ignore_errors=True)
        self.sets = [
            f'policy.model="{model}"', f"run.name={name}", f"run.steps={steps}", f"learner.batch_groups={BATCH}",
            f"rollout.group_size={GROUP}", "rollout.slots=32", "learner.algorithm=rloo", f"serve.listen=127.0.0.1:{port}",
            "checkpoint.every_steps=1", "checkpoint.keep=100", "checkpoint.dtype=f32", "run.tensorboard=false",
        ]  # fmt: skip
        if not local:
            self.sets += ["rollout.engine=vllm", f'rollout.servers=["{SERVER}"]', "rollout.outage_s=600", "rollout.timeout_s=3600"]
        if content == ADAPTERS:
            self.sets += ["policy.lora={ rank = 8 }", "learner.lr=5e-3"]
        self.sets += sets
        self.canaries, self.began = {}, None

    def start(self, *arguments):
        self.log = WORK / f"{self.name}.log"
        self.began = time.time()
        parts = [PROGRAM, "--log", "info", "train", CONFIG, "--run-dir", self.dir, *flags(self.sets), *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([str(part) for part in parts], cwd=WORK, stdout=log, stderr=log)
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def watch(self):
        """Records the share of each version's change that the canary measured, from the node's metrics."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                lines = get(f"http://127.0.0.1:{self.port}/metrics", 2).splitlines()
                found = {}
                for name in ("version", "canary"):
                    found |= {name: line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"preceptor_rollout_server_{name}{{")}
                if len(found) == 2:
                    self.canaries.setdefault(int(float(found["version"])), float(found["canary"]))
            time.sleep(0.03)

    def end(self, limit=3600):
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = f"none within {limit} s"
        assert status == 0, f"the run {self.name} ended with status {status}; its log ends:\n{self.text()[-2500:]}"
        return self

    def text(self):
        return self.log.read_text()

    def wait(self, steps):
        """Waits until the run has made `steps` steps."""
        while len(self.metrics()) < steps:
            assert self.process.poll() is None, f"the run {self.name} ended early:\n{self.text()[-2500:]}"
            time.sleep(0.02)

    def metrics(self):
        path = self.dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def weights(self, version):
        """Returns a directory with the weights of a version: the checkpoint of its step, or the result of a replay."""
        if version == 0:
            return self.model
        checkpoint = self.dir / f"checkpoints/step-{version:06}"
        if checkpoint.exists():
            return checkpoint
        output = self.dir / f"version-{version}"
        if not output.exists():
            command([PROGRAM, "replay", self.dir, "--until", version, "--output", output], "replay.log")
        return output


# ---------------------------------------------------------------- checks


def logprobs(model, prompt, completion, temperature):
    """Returns transformers' log-probability of each token of a completion, and the mean and the variance that the log-probability of
    a token sampled at its place has."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    scores = torch.log_softmax(logits.double() / temperature, -1)
    mean = (scores.exp() * scores).sum(-1)
    variance = (scores.exp() * scores**2).sum(-1) - mean**2
    return zip(scores.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist(), mean.tolist(), variance.tolist())


def compare(run, temperature, other=None):
    """Compares recorded log-probabilities with transformers', for each token under the weights of its version.

    Returns the largest difference; the mean difference if the weights of the version before, or those of the run `other`, take the
    place of the right ones, which shows that the comparison can distinguish the versions; and the deviation of the mean
    log-probability from its expectation in standard errors, which shows whether tokens were sampled from the distribution."""
    parts = {}
    for _, groups in journal.steps(run.dir):
        for group in groups:
            for one in group["completions"]:
                for version in set(one["versions"]):
                    parts.setdefault(version, []).append((group["prompt"], one))
    worst, wrong, tokens, deviation, variance, previous = 0.0, [], 0, 0.0, 0.0, None

    def recorded(model, version, most=None):
        """Yields the recorded log-probability of each token of a version, with the figures of `logprobs`. Takes at most `most`
        completions."""
        for prompt, one in parts[version][:most]:
            theirs = logprobs(model, prompt, one["ids"], temperature)
            yield from ((a, *b) for a, b, of in zip(one["logprobs"], theirs, one["versions"]) if of == version)

    for version in sorted(parts):
        model = load(run.weights(version))
        for ours, theirs, expected, spread in recorded(model, version):
            worst, tokens = max(worst, abs(ours - theirs)), tokens + 1
            deviation, variance = deviation + theirs - expected, variance + spread
        another = (load(other.weights(version)) if version else None) if other else previous
        if another:
            wrong += [abs(ours - theirs) for ours, theirs, *_ in recorded(another, version, 32)]
        previous = model
    return {
        "worst": worst, "tokens": tokens, "versions": sorted(parts), "wrong": statistics.fmean(wrong) if wrong else math.nan,
        "deviation": deviation / math.sqrt(variance),
    }  # fmt: skip


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def check(run, temperature=0.9, eta=1, other=None):
    """Performs the checks of every run on a server. Returns words with figures, and the comparison of log-probabilities."""
    steps = journal.steps(run.dir)
    assert [step for step, _ in steps] == list(range(1, run.steps + 1)), [step for step, _ in steps]
    trained = [group["seq"] for _, groups in steps for group in groups]
    assert trained == list(range(run.steps * BATCH)), f"groups in order of training: {trained}"
    completions = [(step, one) for step, groups in steps for group in groups for one in group["completions"]]
    stale = [step - 1 - version for step, one in completions for version in one["versions"]]
    assert 0 <= min(stale) and max(stale) <= eta, f"staleness from {min(stale)} to {max(stale)}"
    command([PROGRAM, "replay", run.dir], f"{run.name}-replay.log")
    found = compare(run, temperature, other)
    words = (
        f"{len(completions)} completions, {found['tokens']} tokens of {len(found['versions'])} versions, staleness at most {max(stale)},"
        f" log-probabilities within {found['worst']:.1e} (mean {found['wrong']:.1e} under the weights of another {'run' if other else 'version'}),"
        f" their mean is {found['deviation']:+.1f} standard errors from its expectation"
    )
    assert found["worst"] <= TOLERANCE, words
    assert abs(found["deviation"]) < 4.5, words
    assert math.isnan(found["wrong"]) or found["wrong"] > 10 * TOLERANCE, words
    return words, found


def canaries(run, versions):
    """Returns words with the canary's figures of a run, in which at least `versions` versions were handed over after the first."""
    assert "gets no prompts" not in run.text(), run.text()[-2500:]
    shares = {version: share for version, share in run.canaries.items() if version > 0}
    assert len(shares) >= versions, f"the canary measured the versions {sorted(shares)}"
    undecided = run.text().count("too small to see in its precision")
    return (
        f"{len(shares)} versions handed over, the canary shows {min(shares.values()):.3f} to {max(shares.values()):.3f} of the change,"
        f" {undecided} undecidable"
    )


def seconds(run):
    """Returns the time in seconds that the run took from its first step to its last one."""
    records = run.metrics()
    return records[-1]["time/run_seconds"] - records[0]["time/run_seconds"]


# ---------------------------------------------------------------- trials


def compared(content, temperature):
    serve(tiny("tied"), content)
    run = Run(f"logprobs-{content}-t{round(10 * temperature)}", tiny("tied"), content, f"rollout.temperature={temperature}", steps=7)
    return check(run.start().end(), temperature)[0]


def handed_over(content, head):
    serve(tiny(head), content)
    run = Run(f"{content}-{head}", tiny(head), content, steps=8).start().end()
    return f"{canaries(run, 5)}; {check(run)[0]}"


def in_flight():
    serve(tiny("tied"), WEIGHTS)
    # The server needs longer for a batch of long completions than the learner for a step.
    sets = ["rollout.max_new_tokens=200", "learner.eta=2", "rollout.slots=64", "learner.threads=1", "reward.missing_eos_penalty=0"]
    run = Run("in-flight", tiny("tied"), WEIGHTS, *sets, steps=10).start().end()
    words, _ = check(run, eta=2)
    ones = [one for _, groups in journal.steps(run.dir) for group in groups for one in group["completions"]]
    mixed = [one for one in ones if len(set(one["versions"])) > 1]
    assert mixed, f"no completion has tokens of two versions; {words}"
    assert all(one["versions"] == sorted(one["versions"]) for one in ones), "the versions of a completion decrease"
    most = max(len(set(one["versions"])) for one in ones)
    return f"{len(mixed)} completions with tokens of several versions, up to {most}; {words}; {canaries(run, 5)}"


def kills(content):
    server = serve(tiny("tied"), content)
    run = Run(f"kills-{content}", tiny("tied"), content, "rollout.max_new_tokens=64", steps=10).start()
    down = []
    for after in (2, 5):
        run.wait(after)
        server.kill()
        began = time.time()
        server.start()
        down.append(time.time() - began)
    run.end()
    answers = run.text().count("is down")
    assert answers >= 2, run.text()[-2500:]
    return f"killed after steps 2 and 5, down for {down[0]:.0f} and {down[1]:.0f} s; {check(run)[0]}"


def sharing():
    serve(tiny("tied"), ADAPTERS)
    runs = [
        Run(f"sharing-{i}", tiny("tied"), ADAPTERS, f"run.seed={i}", "rollout.max_new_tokens=48", port=NODE + i, steps=8)
        for i in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.end()
    both = [run.metrics()[-1]["time/unix_seconds"] for run in runs]
    overlap = min(both) - max(run.began for run in runs)
    assert overlap > 0, "the runs were not concurrent"
    found = [check(run, other=other)[0] for run, other in zip(runs, reversed(runs))]
    return f"concurrent for {overlap:.0f} s; first run: {found[0]}; second run: {found[1]}"


def resume(content):
    server = serve(tiny("tied"), content)
    run = Run(f"resume-{content}", tiny("tied"), content, steps=1000).start()
    run.wait(12)
    run.process.kill()
    run.process.wait()
    held = server.adapters() if content == ADAPTERS else [json.loads(get(f"{SERVER}/weight_info"))["weight_version"]]
    latest = max(held) if content == ADAPTERS else int(held[0].split("-")[2])
    assert latest > 10, held
    run.sets.append("run.steps=16")
    run.steps = 16
    run.start("--resume=" + str(run.dir / "checkpoints/step-000010")).end()
    assert "has version 10" in run.text(), run.text()[-2500:]
    words = check(run)[0]
    return f"the run was killed after step 12, and the server held version {latest}; resumed at step 10, trained to 16; {words}"


def judge():
    words = []
    for cached in (True, False):
        flag = "--enable-prefix-caching" if cached else "--no-enable-prefix-caching"
        # On a CPU, vLLM 0.32 adds the adapter in its last slot to requests for the base model that are in a batch with requests for
        # adapters (vllm-project/vllm#48421). The run has fewer versions than there are slots, so that the last one stays empty.
        server = serve(tiny("tied"), ADAPTERS, flag, "--max-loras", "32", "--max-cpu-loras", "32")
        name = f"judge-{'with' if cached else 'without'}"
        # The judge is the server's base model, which no hand-over changes. The model has 259 tokens, all of which are listed.
        remote = f'{{ url = "{SERVER}/v1", model = "policy", api = "completions", concurrency = 8, top_logprobs = 259 }}'
        asked = ["labeler.type=pairwise", "labeler.chat=false", "labeler.preamble=base"]
        cache = WORK / f"runs/{name}-labels"
        shutil.rmtree(cache, ignore_errors=True)
        sets = [*asked, f"labeler.remote={remote}", f'labeler.cache="{cache}"', "rollout.max_new_tokens=16"]
        run = Run(name, tiny("tied"), ADAPTERS, *sets, steps=8).start().end()
        assert server.process.poll() is None, "the server ended"
        groups = [group for _, groups in journal.steps(run.dir) for group in groups]
        verdicts = [verdict for group in groups for _, verdict, _ in group["feedback"]["preferences"]]
        labels = [one for one in verdicts if isinstance(one, float)]
        others = {one[1] for one in verdicts if not isinstance(one, float)}
        assert len(labels) == len(verdicts), f"{len(labels)} labels of {len(verdicts)} pairs: {others}"
        # The time begins with the end of the first step.
        rate = (len(labels) - BATCH * len(groups[0]["feedback"]["preferences"])) / seconds(run)
        words.append(f"{flag}: {len(labels)} labels, {rate:.1f} labels/s, {judged(run, groups, asked)}; {check(run)[0]}")
    return "; ".join(words)


def judged(run, groups, asked):
    """Compares the probabilities in both orders with those of a judge with the same weights in the process. Returns words."""
    rows, theirs = [], {}
    for group in groups:
        for (first, second), _, orders in group["feedback"]["preferences"]:
            a, b = (group["completions"][i]["text"] for i in (first, second))
            # `preceptor label` leaves out pairs with an empty answer.
            if a.strip() and b.strip():
                rows.append({"prompt": group["text"], "chosen": a, "rejected": b})
                theirs[group["text"], a, b] = orders
    pairs, output = WORK / f"{run.name}-pairs.jsonl", WORK / f"{run.name}-here.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output.unlink(missing_ok=True)
    sets = [f'policy.model="{run.model}"', *asked]
    command([PROGRAM, "label", CONFIG, "--input", pairs, "--output", output, *flags(sets)], f"{run.name}-here.log")
    ours = [json.loads(line) for line in output.read_text().splitlines()]
    found = [(row["orders"], theirs[row["prompt"], row["first"], row["second"]]) for row in ours]
    differences = [abs(a - b) for pair in found for a, b in zip(*pair)]
    words = f"{len(ours)} labels within {max(differences):.1e} of a judge in the process"
    assert len(ours) >= 0.9 * len(rows) and max(differences) < 1e-4, words
    return words


@contextlib.contextmanager
def broker(folder):
    """A NATS server with JetStream; yields its address."""
    parts = ["nats-server", "-a", "127.0.0.1", "-p", str(BROKER), "-js", "-sd", str(folder)]
    process = subprocess.Popen(parts, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"nats://127.0.0.1:{BROKER}"
    finally:
        process.kill()
        process.wait()


def start_worker(name, run, address):
    """Starts a worker of a run, for which the server samples."""
    parts = [PROGRAM, "worker", "--join", address, "--run", run.name, "--name", name, "--engine", "vllm", "--server", SERVER]
    parts += ["--weights-dir", WORK / "handed", "--threads", "1"]
    with (WORK / f"{run.name}-{name}.log").open("w") as log:
        return subprocess.Popen([str(part) for part in parts], cwd=WORK, stdout=log, stderr=log)


def of_worker(content):
    serve(tiny("tied"), content)
    name = f"worker-{content}"
    with broker(WORK / name) as address:
        sets = ["rollout.engine=workers", f"cluster.nats={address}", "cluster.lease_s=3"]
        run = Run(name, tiny("tied"), content, *sets, steps=12, local=True).start()
        first = start_worker("first", run, address)
        run.wait(4)
        first.kill()
        first.wait()
        second = start_worker("second", run, address)
        run.end()
        status = second.wait(60)
    told = (WORK / f"{name}-second.log").read_text()
    assert status == 0 and "sampled" in told, f"the worker ended with status {status}:\n{told[-2500:]}"
    left = RUNNING.adapters()
    assert not left, f"the server still has the adapters {left}"
    return check(run)[0]


def gain(run):
    """Returns the gain of the score from the first five steps to the last five, with its standard error over groups."""
    scores = [[statistics.fmean(group["scores"]) for group in groups if group["scores"]] for _, groups in journal.steps(run.dir)]
    first, last = ([score for step in part for score in step] for part in (scores[:5], scores[-5:]))
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
    return statistics.fmean(last) - statistics.fmean(first), error


def gains(model, content, seeds, *sets):
    """Compares the gain of the score of runs on the server and in the process. The 95 % intervals are of the mean over seeds; their width
    comes from the spread between runs, which is larger than the error of each run's gain."""
    words, found = [], {}
    for place in ("server", "process"):
        found[place] = []
        for seed in range(seeds):
            name = f"gains-{model.name}-{place}-{seed}"
            if place == "server":
                serve(model, content)
            run = Run(name, model, content, f"run.seed={seed}", *sets, steps=20, local=place == "process").start().end()
            assert "gets no prompts" not in run.text(), run.text()[-2500:]
            command([PROGRAM, "replay", run.dir], f"{name}-replay.log")
            value, error = gain(run)
            found[place].append(value)
            words.append(f"{place}, seed {seed}: {value:+.2f} ± {1.96 * error:.2f} in {seconds(run):.0f} s")
            print(f"    {words[-1]}", flush=True)
    spread = math.sqrt(statistics.fmean(statistics.variance(values) for values in found.values()))
    half = STUDENT[2 * (seeds - 1)] * spread / math.sqrt(seeds)
    server, process = (statistics.fmean(found[place]) for place in ("server", "process"))
    text = f"on the server {server:+.2f} ± {half:.2f}, in the process {process:+.2f} ± {half:.2f}; {'; '.join(words)}"
    assert abs(server - process) <= 2 * half, f"the intervals do not overlap: {text}"
    return f"{text}; the replays are exact"


# 97.5 % quantiles of Student's t by degrees of freedom.
STUDENT = {2: 4.303, 4: 2.776, 6: 2.447}
REAL = [
    "data.max_prompt_tokens=200", "rollout.max_new_tokens=32", "rollout.group_size=4",
    "data.instruction=Summarize the post in one short sentence.\n\nPost: {{ prompt }}",
]  # fmt: skip


def served_model(content):
    serve(real(), content)
    # The learning rates of configs/served.toml and configs/quickstart.toml.
    rate = "learner.lr=2e-4" if content == ADAPTERS else "learner.lr=1e-5"
    run = Run(f"model-{content}", real(), content, *REAL, rate, steps=8).start().end()
    words = f"{canaries(run, 5)}; {check(run)[0]}"
    shutil.rmtree(run.dir)
    return words


def model_gains():
    sets = [*REAL, "learner.lr=4e-4", "checkpoint.every_steps=0"]
    return gains(real(), ADAPTERS, 2, *sets)


TRIALS = [
    *[(f"logprobs {content} T={t}", lambda c=content, t=t: compared(c, t)) for content in (WEIGHTS, ADAPTERS) for t in (1.0, 0.7)],
    ("adapters tied", lambda: handed_over(ADAPTERS, "tied")),
    ("sharing", sharing),
    ("resume adapters", lambda: resume(ADAPTERS)),
    ("kills adapters", lambda: kills(ADAPTERS)),
    ("adapters untied", lambda: handed_over(ADAPTERS, "untied")),
    ("weights tied", lambda: handed_over(WEIGHTS, "tied")),
    ("in-flight", in_flight),
    ("resume weights", lambda: resume(WEIGHTS)),
    ("gains", lambda: gains(tiny("tied"), WEIGHTS, 4, "learner.lr=3e-4", "checkpoint.every_steps=0")),
    ("kills weights", lambda: kills(WEIGHTS)),
    ("weights untied", lambda: handed_over(WEIGHTS, "untied")),
    ("judge", judge),
    *[(f"worker {content}", lambda c=content: of_worker(c)) for content in (ADAPTERS, WEIGHTS)],
]
if ARGS.model:
    TRIALS += [
        ("model adapters", lambda: served_model(ADAPTERS)),
        ("model weights", lambda: served_model(WEIGHTS)),
        ("model-gains", model_gains),
    ]


def main():
    WORK.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PRECEPTOR_CACHE", str(WORK / "cache"))
    chosen = [one for one in TRIALS if not ARGS.trials or any(one[0].startswith(name) for name in ARGS.trials)]
    assert chosen, f"there is no trial called {ARGS.trials}"
    logging.disable_progress_bar()
    results = []
    try:
        for name, trial in chosen:
            began = time.time()
            try:
                passed, words = True, trial()
            except Exception as error:  # noqa: BLE001
                passed, words = False, f"{type(error).__name__}: {error}"
            results.append((name, passed, time.time() - began, words))
            print(f"{name}: {'ok' if passed else 'FAILED'}, {words}, {results[-1][2]:.0f} s", flush=True)
    finally:
        if RUNNING:
            RUNNING.stop()
    print("\n| trial | result | seconds | figures |\n|---|---|---|---|")
    for name, passed, took, words in results:
        print(f"| {name} | {'passed' if passed else 'failed'} | {took:.0f} | {' '.join(words.split())[:600]} |")
    return 0 if all(passed for _, passed, _, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
