#!/usr/bin/env python3
"""Measures the start of a run with a model of 1.5 billion parameters: the time from `preceptor train` to the first sampled
token, by phase.

It writes the files of a model with the shape of Qwen2.5-1.5B and random weights (bf16, two shards, 3.1 GB) to a temporary
folder, starts a run of adapters from them, reads its phase and metrics every 20 ms, stops it after the first token, and
removes the files. The first start reads files that were just written and are in the page cache; `--cold` first makes the
kernel drop these pages.

    cargo build --release
    python3 benches/startup.py [--binary target/release/preceptor] [--repeats N] [--cold]
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 1536, 8960, 28, 12, 2, 151_936
WIDTH = HIDDEN // HEADS
BLOCK = 16 << 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--binary", type=Path, default=ROOT / "target" / "release" / "preceptor", help="default: target/release/preceptor")
    add("--folder", type=Path, help="folder of the temporary files (default: that of the system)")
    add("--repeats", type=int, default=3, help="number of starts (default: 3)")
    add("--cold", action="store_true", help="drop the model's pages from the page cache before each start")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run; may be repeated")
    args = parser.parse_args()
    if not args.binary.exists():
        sys.exit(f"{args.binary} does not exist: build it by cargo build --release, or name it by --binary")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        write_model(folder / "model")
        write_run(folder)
        for _ in range(args.repeats):
            if args.cold:
                drop_pages(folder / "model")
            print(json.dumps(start(args, folder)), flush=True)


def write_model(folder):
    """Writes the model's files: a configuration, two shards of weights, an index, and a tokenizer of bytes."""
    folder.mkdir()
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY,
        max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, hidden_act="silu",
        torch_dtype="bfloat16", bos_token_id=None, eos_token_id=256,
    )
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json")
    kv = KV_HEADS * WIDTH
    layer = {
        "input_layernorm.weight": [HIDDEN], "post_attention_layernorm.weight": [HIDDEN],
        "self_attn.q_proj.weight": [HIDDEN, HIDDEN], "self_attn.q_proj.bias": [HIDDEN],
        "self_attn.k_proj.weight": [kv, HIDDEN], "self_attn.k_proj.bias": [kv],
        "self_attn.v_proj.weight": [kv, HIDDEN], "self_attn.v_proj.bias": [kv],
        "self_attn.o_proj.weight": [HIDDEN, HIDDEN], "mlp.gate_proj.weight": [INTERMEDIATE, HIDDEN],
        "mlp.up_proj.weight": [INTERMEDIATE, HIDDEN], "mlp.down_proj.weight": [HIDDEN, INTERMEDIATE],
    }
    tensors = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    tensors |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    total, shards, filled = sum(map(size, tensors.values())), [{}, {}], 0
    for name, shape in tensors.items():
        shards[2 * filled >= total][name] = shape
        filled += size(shape)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        write_shard(folder / name, shard)
        index |= dict.fromkeys(shard, name)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def size(shape):
    """Returns the bytes of a tensor in bf16."""
    count = 2
    for length in shape:
        count *= length
    return count


def write_shard(path, tensors):
    """Writes random numbers whose magnitudes are between 2^-8 and 2^-6."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size(shape)]}
        offset += size(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # A number's second byte has its sign and the upper bits of its exponent.
    block = bytearray(random.Random(1).randbytes(BLOCK))
    block[1::2] = bytes(0xBC if byte & 1 else 0x3C for byte in block[1::2])
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, BLOCK):
            file.write(block[: min(BLOCK, offset - start)])


def write_tokenizer(path):
    """Writes a tokenizer whose tokens are bytes, in the alphabet of byte-level tokenizers, and an end token."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    end = {"id": 256, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {letter: byte for byte, letter in letters.items()}, "merges": []},
    }
    path.write_text(json.dumps(content))


def write_run(folder):
    """Writes the configuration of a run that trains adapters; a group ends with its first token."""
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Describe a quiet morning by the sea."}) + "\n")
    (folder / "run.toml").write_text(f"""\
[run]
name = "startup"
steps = 1
[data]
path = {json.dumps(str(folder / "prompts.jsonl"))}
prompt_field = "prompt"
chat = false
[policy]
model = {json.dumps(str(folder / "model"))}
lora = {{ rank = 8 }}
[rollout]
group_size = 2
slots = 2
max_new_tokens = 1
[labeler]
type = "likelihood"
[learner]
batch_groups = 1
[serve]
listen = "127.0.0.1:0"
""")


def start(args, folder):
    """Starts the run and returns the seconds until each phase and the first token."""
    run = folder / "run"
    command = [args.binary, "train", folder / "run.toml", "--run-dir", run, *(f"--set={one}" for one in args.set)]
    began = time.monotonic()
    since = lambda: round(time.monotonic() - began, 3)
    log = folder / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    phases, address, tokens = {}, None, None
    while tokens is None and process.poll() is None:
        printed = log.read_text()
        found = re.search(r"http://(\S+?)/", printed)
        if found and not address:
            address, phases["server answers"] = found[1], since()
        if "ready in" in printed:
            phases.setdefault("model and data are loaded", since())
        if address:
            try:
                phases.setdefault(json.loads(get(address, "/status"))["phase"], since())
                count = re.search(r"^preceptor_generated_tokens_total (\S+)", get(address, "/metrics"), re.MULTILINE)
                tokens = since() if count and float(count[1]) > 0 else None
            except (OSError, urllib.error.URLError):
                pass
        time.sleep(0.02)
    if tokens is None:
        sys.exit(f"the run ended before its first token:\n{log.read_text()}")
    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(["rm", "-r", run], check=True)
    return phases | {"first token": tokens, "peak_mib": int(peak[1]) // 1024}


def get(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
        return answer.read().decode()


def drop_pages(folder):
    """Makes the kernel drop the pages of the model's files."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
