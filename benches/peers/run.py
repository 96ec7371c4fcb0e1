#!/usr/bin/env python3
"""Compares Preceptor with PyTorch, transformers and TRL: the same work on the same machine, each side in a separate
process, alternately. Prints a table of medians.

  train        an optimizer step on complete sequences: forward, backward, clip by global norm, AdamW; 8 x 128 tokens
               (tiny) or 4 x 128 (smollm2)
  generate-N   N completions of 64 tokens after prompts of 64, temperature 0.9; for 8 and 32 in groups of 8 that share a
               prompt, as in reinforcement learning: Preceptor computes the prompt once, transformers for each row
  label        64 likelihood labels, log P(answer | prompt) - log P(answer | blank), in groups of 8; 64 + 64 tokens
  grpo         GRPO steps on 32 completions, groups of 8, no KL: Preceptor's node and trl.GRPOTrainer. On one thread the
               node's actors alternate (eta = 0), on two they work concurrently (eta = 1). The trainer uses batches of 8
               completions, which is faster than all at once and takes half the memory
  grpo-whole   the same with a trainer that uses all 32 completions at once
  overlap      only Preceptor: the time of a run at eta = 1 divided by the longer of its generation and its learning
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORKS = ["train", "generate-1", "generate-8", "generate-32", "label", "grpo", "grpo-whole", "overlap"]
MODELS = ["tiny", "smollm2"]


def main():
    args = arguments()
    binary, python = build(), args.python or environment()
    sink = open(args.json, "a") if args.json else None

    def measure(command, *rest):
        command = [*map(str, command), *map(str, rest)]
        before = others()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wall, used = (after - earlier for after, earlier in zip(others(), before))
        if used > 0.1 * wall:
            print(f"warning: other processes used {used / wall:.1f} CPUs during {' '.join(command[1:])}", file=sys.stderr)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        line = json.loads(done.stdout.splitlines()[-1])
        if sink:
            print(json.dumps({"side": "ours" if command[0] == str(binary) else "theirs"} | line), file=sink, flush=True)
        return line

    print(HEAD, flush=True)
    for model in args.models:
        for work in args.works:
            for threads in args.threads if work != "overlap" else []:
                ours, theirs = [], []
                for _ in range(args.rounds):
                    rest = [work, "--model", model, "--threads", threads, "--repeats", args.repeats,
                            "--precision", args.precision]
                    ours.append(measure([binary], work.removesuffix("-whole"), *rest[1:], "--weights", args.weights))
                    theirs.append(measure([python, HERE / "peer.py"], *rest))
                print(row(work, model, threads, ours, theirs), flush=True)
    if "overlap" in args.works:
        print(f"\n{OVERLAP_HEAD}", flush=True)
        for model in args.models:
            rest = ["overlap", "--model", model, "--repeats", args.overlap_steps, "--precision", args.precision,
                    "--weights", args.weights]
            print(overlap_row(model, [measure([binary], *rest) for _ in range(args.rounds)]), flush=True)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Stop other programs first: a third busy thread slows down two threads that wait for each other. All work on "
        "both models takes hours, most of it grpo and overlap on smollm2; `--models tiny --repeats 2 --rounds 1` is a test "
        "of some minutes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = lambda known: lambda text: [one if one in known else parser.error(f"{one!r} is none of {', '.join(known)}")
                                         for one in text.split(",")]
    numbers = lambda text: [int(one) for one in text.split(",")]
    add = parser.add_argument
    add("--works", type=listed(WORKS), default=WORKS, metavar="A,B", help="kinds of work of the list above (default: all)")
    add("--models", type=listed(MODELS), default=MODELS, metavar="A,B",
        help="tiny: 4.0 M parameters; smollm2: the shape of SmolLM2-135M; random weights (default: both)")
    add("--threads", type=numbers, default=[1, 2], metavar="N,M", help="threads of each side (default: 1,2)")
    add("--rounds", type=int, default=3, help="number of alternations of the two sides (default: 3)")
    add("--repeats", type=int, default=3, help="timed repeats in each process, after a warm-up (default: 3)")
    add("--precision", choices=["highest", "high", "medium"], default="highest",
        help="precision of f32 matrix products on both sides: policy.matmul_precision and "
        "torch.set_float32_matmul_precision (default: highest)")
    add("--weights", choices=["f32", "bf16", "q8_0"], default="f32",
        help="rollout.weights of the node; the other side samples in f32 (default: f32)")
    add("--overlap-steps", type=int, default=20, help="steps of the runs that overlap measures (default: 20)")
    add("--python", help="Python interpreter of an environment with the packages of requirements.txt; by default an "
        "environment is created in target/peers, which takes 6 GB")
    add("--json", metavar="FILE", help="append the output of each process, one line each")
    return parser.parse_args()


def others():
    """Returns the time, and the CPU seconds of the machine without those of this program's children."""
    with open("/proc/stat") as stat:
        user, nice, system = map(int, stat.readline().split()[1:4])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def environment():
    folder = ROOT / "target" / "peers"
    python = folder / "bin" / "python"
    wanted = (HERE / "requirements.txt").read_text()
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-r", HERE / "requirements.txt"], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return python


def build():
    """Builds the bench and returns the path of its binary."""
    command = ["cargo", "bench", "--bench", "peers", "--no-run", "--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    return next(one["executable"] for one in messages if one.get("target", {}).get("name") == "peers")


HEAD = """\
| work | model | threads | unit | per CPU-second: ours | theirs | ratio | wall ms per unit: ours | theirs | ratio \
| peak MiB: ours | theirs | ratio |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def row(work, model, threads, ours, theirs):
    """Returns a table row. Ratios above 1 are in Preceptor's favour: ours to theirs for the rate, else theirs to ours."""
    cells = [work, model, str(threads), ours[0]["unit"]]
    for figure, better in [(rate, 1), (wall_ms, -1), (peak, -1)]:
        a, b = figure(ours), figure(theirs)
        cells += [three(a), three(b), f"{(a / b) ** better:.2f}"]
    return f"| {' | '.join(cells)} |"


def rate(lines):
    return statistics.median(line["units"] / cpu for line in lines for cpu in line["cpu_s"])


def wall_ms(lines):
    return statistics.median(1e3 * wall / line["units"] for line in lines for wall in line["wall_s"])


def peak(lines):
    return statistics.median(line["peak_rss_kib"] / 1024 for line in lines)


OVERLAP_HEAD = """\
| overlap | steps | η = 1: wall s | η = 0: wall s | generation alone s | learning alone s | wall / longer \
| concurrent: generation s | learning s |
|---|---|---|---|---|---|---|---|---|"""


def overlap_row(model, lines):
    """Returns a table row with medians of runs. "alone" is the busy time at η = 0, where the other stage waits."""
    middle = lambda name: statistics.median(line[name] for line in lines)
    wall = statistics.median(line["wall_s"][0] for line in lines)
    names = ["eta0_wall_s", "generation_alone_s", "learning_alone_s"]
    cells = [model, str(lines[0]["units"] // 32), f"{wall:.1f}", *(f"{middle(name):.1f}" for name in names)]
    cells += [f"{middle('ratio'):.2f}", f"{middle('generation_busy_s'):.1f}", f"{middle('learning_busy_s'):.1f}"]
    return f"| {' | '.join(cells)} |"


def three(value):
    """Formats a number with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
