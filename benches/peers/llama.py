"""Counterpart of benches/peers.rs with llama.cpp (the package xllamacpp): the same shapes, token ids and output. run.py calls
it. Alone, in an environment with the packages of requirements.txt:

    python llama.py WORK --model tiny|smollm2 [--weights f32|bf16|q8_0] [--threads N] [--repeats R] [--length L]

The model is a GGUF file with random weights, which is written to --files on the first use.
"""

import argparse
import json
import os
import threading
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

from figures import Figures, once, peak_rss_kib, repeat
from shapes import ANSWER, GROUP, PROMPT, SHAPES, words

# Number of decode steps that are measured together, as in length.rs.
STEPS = 16
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def write_model(path, name, weights):
    """Writes random weights as a GGUF file whose matrices have the type `weights`."""
    shape = SHAPES[name]
    d, hidden, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, kv_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16384)
    writer.add_embedding_length(d)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{i}" for i in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(1)

    def matrix(tensor, rows, columns):
        values = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
        kind = TYPES[weights]
        writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(tensor):
        writer.add_tensor(tensor, np.ones(d, dtype=np.float32))

    matrix("token_embd.weight", vocabulary, d)
    norm("output_norm.weight")
    for i in range(shape["num_hidden_layers"]):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        for part, rows, columns in [
            ("attn_q", heads * width, d), ("attn_k", kv_heads * width, d), ("attn_v", kv_heads * width, d),
            ("attn_output", d, heads * width), ("ffn_gate", hidden, d), ("ffn_up", hidden, d), ("ffn_down", d, hidden),
        ]:
            matrix(f"blk.{i}.{part}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Engine:
    def __init__(self, args, sequences, context):
        path = Path(args.files) / f"{args.model}-{args.weights}.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            write_model(partial, args.model, args.weights)
            partial.rename(path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.kv_unified = sequences * context, sequences, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
        params.warmup, params.cache_ram_mib, params.verbosity = False, 0, -1
        self.server = xllamacpp.Server(params)

    def complete(self, prompt, count, **options):
        """Samples `count` tokens after `prompt` and returns the answer with its timings."""
        request = dict(prompt=prompt, n_predict=count, temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, ignore_eos=True)
        answer = self.server.handle_completions(request | options)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise SystemExit(f"llama.cpp: {answer}")
        return answer["timings"]

    def complete_all(self, prompts, count, **options):
        """Samples after all prompts concurrently."""
        timings = [None] * len(prompts)

        def work(i):
            timings[i] = self.complete(prompts[i], count, **options)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return timings


def generate(args):
    """Samples completions of 64 tokens after prompts of 64, each with a sequence of its own."""
    width = int(args.work.removeprefix("generate-"))
    engine = Engine(args, width, PROMPT + ANSWER + 8)
    prompts = [words(args.model, k // GROUP, PROMPT) for k in range(width)]

    def work():
        for timing in engine.complete_all(prompts, ANSWER, cache_prompt=False):
            assert timing["predicted_n"] == ANSWER, timing

    return repeat(args.repeats, width * ANSWER, "tokens", work)


def decode(args):
    """Samples after one prompt of `length` tokens. The times are those that llama.cpp reports for the steps after the first
    token."""
    engine = Engine(args, 1, args.length + 4 * STEPS)
    prompt = words(args.model, 1, args.length)
    engine.complete(prompt, 1, cache_prompt=True)
    engine.complete(prompt, 1 + STEPS, cache_prompt=True)
    figures = Figures(STEPS, "tokens")
    for _ in range(args.repeats):
        timing = engine.complete(prompt, 1 + STEPS, cache_prompt=True)
        assert timing["predicted_n"] == 1 + STEPS and timing["prompt_n"] <= 64, timing
        figures.wall_s.append(timing["predicted_ms"] / 1e3)
        figures.cpu_s.append(args.threads * timing["predicted_ms"] / 1e3)
    return figures


def read(args):
    """Processes a prompt of `length` tokens, without the logits that `score-long` needs for half of them."""
    engine = Engine(args, 1, args.length + 8)
    engine.complete(words(args.model, 0, 256), 1, cache_prompt=False)
    prompt = words(args.model, 1, args.length)
    return once(args.repeats, args.length // 2, "tokens", lambda: engine.complete(prompt, 1, cache_prompt=False))


def main():
    parser = argparse.ArgumentParser()
    works = {"generate-1": generate, "generate-8": generate, "generate-32": generate, "decode-1": decode,
             "score-long": read}
    parser.add_argument("work", choices=works)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--weights", choices=TYPES, default="f32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--files", default=Path(__file__).resolve().parents[2] / "target" / "peers" / "gguf")
    args = parser.parse_args()
    figures = works[args.work](args)
    # The threads of the server do not end by themselves.
    print(json.dumps(dict(peak_rss_kib=peak_rss_kib()) | vars(figures)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
