#!/usr/bin/env python3
"""Compares Preceptor with PyTorch, transformers, TRL and llama.cpp: the same work on the same machine, each side in a
separate process, in turn. Writes benches/RESULTS.md and benches/results.json with medians, and with each figure as a share
of the machine's limit, which is measured in the same run.

  products       matrix products in f32, GFLOP/s: by Preceptor's kernels and by PyTorch
  memory         reading and copying memory, GB/s
  train          an optimizer step on complete sequences: forward, backward, clip by global norm, AdamW; 8 x 128 tokens
                 (tiny) or 4 x 128 (smollm2)
  gradients      the gradients of two groups of 8 completions, 64 + 64 tokens; Preceptor has a replica for each thread
  decode-N       a decode step of N sequences that share a prompt of --length tokens
  generate-N     N completions of 64 tokens after prompts of 64, temperature 0.9; for 8 and 32 in groups of 8 that share a
                 prompt, as in reinforcement learning: Preceptor computes the prompt once, the others for each completion
  label          64 likelihood labels, log P(answer | prompt) - log P(answer | blank), in groups of 8; 64 + 64 tokens
  grpo           GRPO steps on 32 completions, groups of 8, no KL: Preceptor's node and trl.GRPOTrainer. On one thread the
                 node's actors alternate (eta = 0), on two they work concurrently (eta = 1). The trainer uses batches of 8
                 completions, which is faster than all at once and takes half the memory
  grpo-whole     the same with a trainer that uses all 32 completions at once
  grpo-checkpointed
                 as grpo, with activation checkpointing on both sides, and with one replica of the learner
  overlap        only Preceptor: the time of a run at eta = 1 divided by the longer of its generation and its learning
  score-long     log-probabilities of a completion of --length / 2 tokens after a prompt of as many. llama.cpp reads the
                 tokens but computes no logits of them
  gradient-long  the gradient of such completions: Preceptor has two that share the prompt, PyTorch has one row

Each measurement is appended to a file when it ends (--results), and one that the file has is not repeated, so that an
interrupted comparison resumes where it stopped. The page is written from the file.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = ROOT / "target" / "peers"
MODELS = ["tiny", "smollm2"]
WORKS = ["products", "memory", "train", "gradients", "decode-1", "decode-8", "generate-1", "generate-8", "generate-32",
         "label", "grpo", "grpo-whole", "grpo-checkpointed", "overlap", "score-long", "gradient-long"]
FORMATS = ["f32", "bf16", "q8_0"]
# Program that prints the versions of the other programs.
VERSIONS = """
import json
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ["torch", "transformers", "trl", "xllamacpp"]}))
"""
OVERLAP_STEPS = 20
# Context of a decode step in the comparison of number formats.
CONTEXT = 128


@dataclass(frozen=True)
class Job:
    """A process that measures one kind of work of one side."""

    side: str
    work: str
    model: str
    threads: int
    round: int = 0
    length: int = 0
    weights: str = "f32"
    precision: str = "highest"

    def options(self, repeats):
        """Returns the arguments of the process."""
        work = self.work
        if self.side == "preceptor":
            work = work.removesuffix("-whole").removesuffix("-checkpointed")
        # The repeats of `overlap` are the steps of its runs.
        repeats = OVERLAP_STEPS if self.work == "overlap" else repeats
        options = [work, "--model", self.model, "--threads", self.threads, "--repeats", repeats]
        if self.length:
            options += ["--length", self.length]
        if self.weights != "f32":
            options += ["--weights", self.weights]
        if self.precision != "highest":
            options += ["--precision", self.precision]
        if self.side == "preceptor" and self.work == "grpo-checkpointed":
            options += ["--replicas", 1, "--learner-threads", self.threads, "--checkpointing", "true"]
        return [str(option) for option in options]


def plan(args):
    """Returns all jobs, those that are compared next to each other."""
    jobs = []

    def compare(work, model, threads, sides, rounds=args.rounds, **settings):
        for round in range(rounds):
            for side in sides:
                side, changed = side if isinstance(side, tuple) else (side, {})
                jobs.append(Job(side, work, model, threads, round, **(settings | changed)))

    for threads in args.threads:
        compare("products", "tiny", threads, ["preceptor", "pytorch"], rounds=1)
        compare("memory", "tiny", threads, ["preceptor", "pytorch"], rounds=1)
    formats = [(side, {"weights": weights}) for weights in FORMATS for side in ["preceptor", "llama.cpp"]]
    # Formats of the rollout's weights with which Preceptor is fastest: with a tile unit (Intel AMX), products of bf16.
    fast = {"precision": "medium", "weights": "bf16"} if has_tile_unit() else {"weights": "q8_0"}
    for model in args.models:
        compare("train", model, 1, ["preceptor", "pytorch"])
        for threads in args.threads:
            compare("gradients", model, threads, ["preceptor", "pytorch"])
        compare("decode-1", model, 1, ["pytorch", *formats], length=CONTEXT)
        for width in [1, 8, 32]:
            compare(f"generate-{width}", model, 1, ["pytorch", *formats])
        compare("label", model, 1, ["preceptor", "pytorch"])
        # A step of TRL on SmolLM2 takes minutes with one thread.
        for threads in args.threads if model == "tiny" else args.threads[-1:]:
            others = [("preceptor", fast)] if model == "tiny" else []
            compare("grpo", model, threads, ["preceptor", *others, "pytorch"])
        compare("grpo-checkpointed", model, args.threads[-1], ["preceptor", "pytorch"])
        if model == "tiny":
            compare("grpo-whole", model, args.threads[-1], ["pytorch"])
            compare("overlap", model, 2, ["preceptor"])
    for length in args.lengths:
        for work in ["decode-1", "decode-8", "score-long", "gradient-long"]:
            sides = ["preceptor", "pytorch"] + (["llama.cpp"] if work in ["decode-1", "score-long"] else [])
            compare(work, args.models[-1], 1, sides, rounds=1, length=length)
    return [job for job in jobs if job.work in args.works]


def main():
    args = arguments()
    machine, results = Machine(), Results(args.results, args.again)
    if not args.page:
        binary, python = build(), args.python or environment()
        commands = {"preceptor": [binary], "pytorch": [python, HERE / "peer.py"], "llama.cpp": [python, HERE / "llama.py"]}
        commit = measured_commit()
        versions = json.loads(output(python, "-c", VERSIONS))
        jobs, began = plan(args), time.monotonic()
        for done, job in enumerate(jobs):
            if results.has(job):
                continue
            if args.minutes and time.monotonic() - began > 60 * args.minutes:
                print("the time is over; the same command makes the other measurements", file=sys.stderr)
                break
            print(f"{done + 1}/{len(jobs)} {job.side} {' '.join(job.options(args.repeats))}", file=sys.stderr, flush=True)
            line = measure([*commands[job.side], *job.options(args.repeats)])
            results.add(job, line | {"commit": commit, "versions": versions, "machine": machine.fields})
    page.write(results.lines, ROOT / "benches", [vars(job) for job in plan(args) if not results.has(job)])


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Stop other programs first: a third busy thread slows down two threads that wait for each other. Everything "
        "takes two hours on two cores, `--quick` some minutes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = lambda known: lambda text: [one if one in known else parser.error(f"{one!r} is none of {', '.join(known)}")
                                         for one in text.split(",")]
    numbers = lambda text: [int(one) for one in text.split(",")]
    add = parser.add_argument
    add("--quick", action="store_true", help="only the tiny model, contexts of 1 and 2 k, one round and one repeat")
    add("--works", type=listed(WORKS), default=WORKS, metavar="A,B", help="kinds of work of the list above (default: all)")
    add("--models", type=listed(MODELS), default=MODELS, metavar="A,B",
        help="tiny: 4.0 M parameters; smollm2: the shape of SmolLM2-135M; random weights (default: both)")
    add("--threads", type=numbers, default=[1, 2], metavar="N,M", help="threads of each side (default: 1,2)")
    add("--lengths", type=numbers, default=[1024, 2048, 4096, 8192], metavar="N,M",
        help="lengths of long sequences, of the last of --models (default: 1024,2048,4096,8192)")
    add("--rounds", type=int, default=3, help="number of alternations of the sides (default: 3)")
    add("--repeats", type=int, default=1, help="timed repeats in each process, after a warm-up (default: 1)")
    add("--minutes", type=float, metavar="M", help="start no measurement after this time; the same command resumes")
    add("--again", action="store_true", help="repeat measurements that the file has; the new ones replace them")
    add("--page", action="store_true", help="measure nothing: only write the page from the file")
    add("--results", type=Path, default=TARGET / "results.jsonl", metavar="FILE",
        help="file of the measurements, one line each (default: target/peers/results.jsonl)")
    add("--python", help="Python interpreter of an environment with the packages of requirements.txt; by default an "
        "environment is created in target/peers, which takes 6 GB")
    args = parser.parse_args()
    if args.quick:
        args.models, args.lengths, args.rounds, args.repeats = ["tiny"], [1024, 2048], 1, 1
    return args


class Machine:
    """Description of the machine."""

    def __init__(self):
        cpu = Path("/proc/cpuinfo").read_text()
        field = lambda name: next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith(name)), "?")
        memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
        system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
        flags = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "amx_tile": "AMX"}
        self.fields = {
            "cpu": f"{field('model name')} (family {field('cpu family')}, model {field('model')})",
            "instructions": [name for flag, name in flags.items() if flag in field("flags").split()],
            "cores": os.cpu_count(),
            "memory_gib": round(memory / (1 << 20), 1),
            "system": f"{system}, Linux {platform.release()}",
            "rustc": output("rustc", "--version"),
        }


class Results:
    """Measurements in a file of JSON lines. The last line of a job counts."""

    def __init__(self, path, again):
        self.path, self.lines, self.known = path, [], {}
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]
        here = Machine().fields
        for line in self.lines:
            if line["machine"]["cpu"] != here["cpu"] or line["machine"]["cores"] != here["cores"]:
                sys.exit(f"{path} has measurements of another machine ({line['machine']['cpu']}, "
                         f"{line['machine']['cores']} cores): remove it, or name another file by --results")
            self.known[Job(**line["job"])] = line
        if again:
            self.known = {}

    def has(self, job):
        return job in self.known

    def add(self, job, line):
        line = {"job": vars(job)} | line
        self.lines.append(line)
        self.known[job] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            print(json.dumps(line), file=file)


def measure(command):
    """Runs a process and returns the last line of its output, with the share of CPUs that other processes used."""
    command = [str(part) for part in command]
    before = others()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wall, used = (after - earlier for after, earlier in zip(others(), before))
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}")
    if used > 0.1 * wall:
        print(f"warning: other processes used {used / wall:.1f} CPUs during this measurement", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1]) | {"others_cpus": round(used / wall, 2)}


def others():
    """Returns the time, and the CPU seconds of the machine without those of this program's children."""
    with open("/proc/stat") as stat:
        user, nice, system = map(int, stat.readline().split()[1:4])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def has_tile_unit():
    return " amx_tile" in Path("/proc/cpuinfo").read_text()


def environment():
    """Creates the Python environment of the other programs, if it does not exist, and returns its interpreter."""
    python = TARGET / "bin" / "python"
    wanted = (HERE / "requirements.txt").read_text()
    stamp = TARGET / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(TARGET, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-r", HERE / "requirements.txt"], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python


def build():
    """Builds the bench and returns the path of its binary."""
    command = ["cargo", "bench", "--bench", "peers", "--no-run", "--message-format=json-render-diagnostics"]
    messages = [json.loads(line) for line in output(*command).splitlines()]
    return next(one["executable"] for one in messages if one.get("target", {}).get("name") == "peers")


def measured_commit():
    """Returns the commit of the working tree, marked if files other than the results differ from it."""
    changed = output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benches/RESULTS.md",
                     ":!benches/results.json")
    return output("git", "rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")


def output(*command):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
