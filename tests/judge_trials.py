"""Compares labels of judges behind a real llama.cpp server and a real vLLM with labels of a local judge with the same
weights. A judge with a thinking template is asked with thinking off and on.

    pip install xllamacpp gguf safetensors
    python tests/judge_trials.py target/release/preceptor JUDGE.gguf PAIRS.jsonl [--vllm VLLM] [--pairs 100] [--work DIR]

JUDGE.gguf is a model of the Llama architecture with a chat template, such as SmolLM2; PAIRS.jsonl is an input of `preceptor
label`; VLLM is the command `vllm` (0.32 or newer) of the environment in which the script runs. The weights are served in f32: with
quantised weights llama.cpp also rounds activations, which changes logits by about 0.2. Prints a line for each trial with the
largest and the mean difference of all scores and probabilities, and ends with status 1 if one failed. Takes half an hour on
two cores; --work keeps the created models and the labels, and --only selects the trials whose names contain a text.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from safetensors.numpy import load_file

ARGUMENTS = argparse.ArgumentParser()
ARGUMENTS.add_argument("program", type=Path)
ARGUMENTS.add_argument("judge", type=Path)
ARGUMENTS.add_argument("pairs_file", type=Path, metavar="PAIRS")
ARGUMENTS.add_argument("--vllm")
ARGUMENTS.add_argument("--pairs", type=int, default=100)
ARGUMENTS.add_argument("--work", type=Path)
ARGUMENTS.add_argument("--only", default="")
ARGS = ARGUMENTS.parse_args()

CONFIG = Path(__file__).resolve().parent.parent / "configs/offline.toml"
PROGRAM, PAIRS = ARGS.program.resolve(), ARGS.pairs_file.resolve()
WORK = (ARGS.work or Path(tempfile.mkdtemp())).resolve()
PORT = 8194
# Both servers list as many alternatives as requested.
LISTED = 200
TOLERANCE = 0.02
QUESTION = "Text: {text}\n1: {first}\n2: {second}\nWhich one fits the text? Answer 1 or 2."
# Like Qwen3's template: the model opens a block of thought, or the prompt closes it if thinking is disabled.
THINKING = """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}"""
LLAMA = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
p.n_ctx, p.n_parallel, p.cpuparams.n_threads, p.cpuparams_batch.n_threads = 8192, 2, 2, 2
if len(sys.argv) > 3:
    p.chat_template, p.use_jinja = open(sys.argv[3]).read(), True
    p.default_template_kwargs = {"enable_thinking": "true"}
server = xllamacpp.Server(p)
time.sleep(36000)
"""


def run(*command, log):
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=WORK, capture_output=True, text=True)
    (WORK / log).write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"{command} ended with {done.returncode}; its log ends:\n{(done.stdout + done.stderr)[-2000:]}"
    return done.stderr


def gguf(path, tensors):
    """Writes the judge's GGUF with `tensors` (name → f32 array) as its weights."""
    if path.exists():
        return
    reader = GGUFReader(ARGS.judge)
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], of)
    writer.add_uint32("general.file_type", 0)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensors(tensor), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def own(tensor):
    plain = tensor.tensor_type == GGMLQuantizationType.F32
    return tensor.data if plain else dequantize(tensor.data, tensor.tensor_type)


def of_checkpoint(directory):
    """Returns the weights of a Hugging Face directory under GGUF's names. GGUF has the rows of q and k in another order."""
    weights = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def tensor(named):
        if not named.name.startswith("blk."):
            return weights[{"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[named.name]]
        _, layer, part, _ = named.name.split(".")
        found = weights[f"model.layers.{layer}.{parts[part]}.weight"]
        if part in heads:
            found = found.reshape(heads[part], 2, -1, found.shape[1]).swapaxes(1, 2).reshape(found.shape)
        return found

    return tensor


def exported():
    """Returns the judge as a Hugging Face directory: the checkpoint of a run that does not change the weights."""
    directory = WORK / "judge"
    if not directory.exists():
        sets = [f'policy.model="{WORK}/judge.gguf"', "run.steps=1", "learner.lr=1e-30", "learner.value_lr=1e-30", *SMALL]
        run(PROGRAM, "train", CONFIG, "--run-dir", "export", *[x for s in sets for x in ("--set", s)], log="export.log")
        shutil.copytree(WORK / "export/checkpoints/step-000001", directory, ignore=shutil.ignore_patterns("resume", "reward_model", "value*"))
    return directory


SMALL = [
    "learner.batch_groups=1", "rollout.group_size=2", "rollout.slots=2", "rollout.max_new_tokens=4", "learner.eta=0",
    "serve.enabled=false", "data.max_prompt_tokens=400", "learner.algorithm=rloo", "reward.kl_coef=0.05",
    "labeler.type=likelihood",
]  # fmt: skip


def thinker():
    """Returns the judge, fine-tuned to think before it answers, as a directory with a thinking template and as GGUF."""
    directory = WORK / "thinker"
    if not directory.exists():
        words = ["river", "bread", "stone", "cloud", "violin", "garden", "lamp", "harbour", "clock", "winter"]
        with (WORK / "thoughts.jsonl").open("w") as file:
            for i in range(64):
                right, wrong = words[i % 10], words[(i * 7 + 3) % 10 if (i * 7 + 3) % 10 != i % 10 else (i + 1) % 10]
                first, second, answer = (right, wrong, 1) if i % 2 else (wrong, right, 2)
                prompt = QUESTION.format(text=f"It is about a {right}.", first=f"A {first}.", second=f"A {second}.")
                reference = f"<think>\nThe text is about a {right}.\n</think>\n\n{answer}"
                file.write(json.dumps({"prompt": prompt, "reference": reference}) + "\n")
        sets = [
            f'policy.model="{WORK}/judge.gguf"', f'data.path="{WORK}/thoughts.jsonl"', "data.instruction={{ prompt }}",
            'data.reference_field="reference"', "data.chat=true", "run.steps=1", "learner.lr=1e-30",
            "learner.value_lr=1e-30", "sft.steps=40", "sft.batch=4", "sft.lr=1e-4", *SMALL,
        ]  # fmt: skip
        run(PROGRAM, "train", CONFIG, "--run-dir", "think", *[x for s in sets for x in ("--set", s)], log="think.log")
        partial = WORK / "thinker.partial"
        shutil.copytree(WORK / "think/reference", partial)
        tokenizer = json.loads((partial / "tokenizer_config.json").read_text())
        tokenizer.pop("chat_template", None)
        (partial / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        (partial / "chat_template.jinja").write_text(THINKING)
        partial.rename(directory)
    (WORK / "thinking.jinja").write_text(THINKING)
    gguf(WORK / "thinker.gguf", of_checkpoint(directory))
    return directory


class Server:
    """Runs a server until the end of the block."""

    def __init__(self, *command):
        self.command = [str(part) for part in command]

    def __enter__(self):
        self.log = (WORK / "server.log").open("w")
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)
        for _ in range(1500):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1)
                return self
            except OSError:
                assert self.process.poll() is None, f"the server ended:\n{(WORK / 'server.log').read_text()[-2000:]}"
                time.sleep(0.2)
        raise AssertionError("the server did not start")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def llama(model, *template):
    return Server(sys.executable, "-c", LLAMA, model, PORT, *template)


def vllm(directory):
    return Server(
        ARGS.vllm, "serve", directory, "--served-model-name", "judge", "--host", "127.0.0.1", "--port", PORT, "--dtype",
        "float32", "--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "4", "--max-logprobs", LISTED,
    )  # fmt: skip


def labels(name, *sets, pairs=None):
    """Labels the pairs. Returns the rows by pair, and the log."""
    output = WORK / f"{name}.jsonl"
    command = [PROGRAM, "--log", "info", "label", CONFIG, "--input", PAIRS, "--output", output, "--limit", pairs or ARGS.pairs]
    log = run(*command, *[x for s in sets for x in ("--set", s)], log=f"{name}.log")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return {row["pair"]: row for row in rows if row["pair"] < (pairs or ARGS.pairs)}, log


def here(model, kind, chat):
    name = f"here-{Path(model).stem}-{kind}-{'chat' if chat else 'completions'}"
    settings = [f"labeler.type={kind}", f'labeler.model="{model}"', f"labeler.chat={json.dumps(chat)}", "labeler.threads=2"]
    return labels(name, *settings)[0]


def there(server, kind, api, more="", pairs=None):
    name = f"there-{server}-{kind}-{api}"
    remote = f'{{ url = "http://127.0.0.1:{PORT}/v1", model = "judge", api = "{api}", concurrency = 4, top_logprobs = {LISTED}{more} }}'
    return labels(name, f"labeler.type={kind}", f"labeler.remote={remote}", f'labeler.cache="{WORK}/{name}"', pairs=pairs)


def compare(ours, theirs):
    """Returns the differences of all scores, or of the probabilities in both orders."""
    assert ours.keys() == theirs.keys(), f"{len(ours)} and {len(theirs)} pairs"
    differences = []
    for pair, row in ours.items():
        figures = [row.get("scores") or row["orders"] for row in (row, theirs[pair])]
        assert all(both and None not in both for both in figures), f"pair {pair}: {figures}"
        differences += [abs(a - b) for a, b in zip(*figures)]
    worst, mean = max(differences), sum(differences) / len(differences)
    words = f"{len(ours)} pairs, largest difference {worst:.4f}, mean {mean:.5f}"
    assert worst <= TOLERANCE, f"{words}, allowed {TOLERANCE}"
    return words


FAILED = []


def trial(name, what):
    if ARGS.only not in name:
        return
    began = time.time()
    try:
        print(f"{name}: ok, {what()}, {time.time() - began:.0f} s", flush=True)
    except Exception as error:  # noqa: BLE001
        FAILED.append(name)
        print(f"{name}: FAILED: {error}", flush=True)


def agrees(server, kind, api, model):
    return lambda: compare(here(model, kind, api == "chat"), there(server, kind, api)[0])


def thinks(server, directory):
    """Compares labels of the thinking judge: with thinking disabled, which is the default, and with thinking enabled."""

    def off():
        theirs, log = there(f"{server}-off", "pairwise", "chat")
        assert "enable_thinking = false" in log, log[-2000:]
        return compare(here(directory, "pairwise", True), theirs)

    def on():
        few = min(10, ARGS.pairs)
        more = ", chat_template_kwargs = { enable_thinking = true }, thinking_tokens = 64"
        theirs, log = there(f"{server}-on", "pairwise", "chat", more, few)
        assert "has room for" in log, log[-2000:]
        labeled = [row for row in theirs.values() if row["preference"] is not None]
        assert len(labeled) * 2 > few, f"{len(labeled)} labels of {few} pairs:\n{log[-2000:]}"
        return f"{len(labeled)} labels of {few} pairs, from votes after reasoning"

    trial(f"{server}, thinking off", off)
    trial(f"{server}, thinking on", on)


WORK.mkdir(parents=True, exist_ok=True)
os.environ.setdefault("PRECEPTOR_CACHE", str(WORK / "cache"))
gguf(WORK / "judge.gguf", own)
SERVERS = [("llama.cpp", lambda: llama(WORK / "judge.gguf"), lambda: llama(WORK / "thinker.gguf", WORK / "thinking.jinja"))]
if ARGS.vllm:
    SERVERS.append(("vLLM", lambda: vllm(exported()), lambda: vllm(thinker())))
for server, plain, thinking in SERVERS:
    names = [f"{server} {api}, {kind}" for api in ("chat", "completions") for kind in ("pairwise", "direct")]
    if any(ARGS.only in name for name in names):
        with plain():
            for api in ("chat", "completions"):
                for kind in ("pairwise", "direct"):
                    trial(f"{server} {api}, {kind}", agrees(server, kind, api, WORK / "judge.gguf"))
    if any(ARGS.only in f"{server}, thinking {word}" for word in ("off", "on")):
        directory = thinker()
        with thinking():
            thinks(server, directory)
sys.exit(1 if FAILED else 0)
