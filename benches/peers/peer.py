"""Counterpart of benches/peers.rs with PyTorch, transformers and TRL: the same work, shapes, token ids and output. run.py
calls it. Alone, in an environment with the packages of requirements.txt:

    python peer.py WORK --model tiny|smollm2 [--threads N] [--repeats R] [--length L]
"""

import argparse
import json
import os
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from figures import Figures, mark, once, peak_rss_kib, repeat
from shapes import ANSWER, BATCH, BLANK, GROUP, PROMPT, SEQUENCE, SEQUENCES, SHAPES, words

def build(name):
    torch.manual_seed(1)
    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config = LlamaConfig(**SHAPES[name], **tokens, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=10000.0)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).float().eval()


def train(model, repeats, args):
    rows = [[0, *words(args.model, k + 1, SEQUENCE - 1)] for k in range(SEQUENCES[args.model])]
    ids = torch.tensor(rows)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def work():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return repeat(repeats, ids.numel(), "tokens", work)


def generate(model, repeats, args):
    width = int(args.work.removeprefix("generate-"))
    ids = torch.tensor([words(args.model, k // GROUP, PROMPT) for k in range(width)])
    mask = torch.ones_like(ids)
    settings = dict(
        do_sample=True, temperature=0.9, top_k=0, min_new_tokens=ANSWER, max_new_tokens=ANSWER, pad_token_id=0,
        use_cache=True,
    )

    def work():
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, **settings)
        assert out.shape == (width, PROMPT + ANSWER)

    return repeat(repeats, width * ANSWER, "tokens", work)


def label(model, repeats, args):
    groups = 8
    blank = words(args.model, 0, BLANK)

    def batch(prompt, k):
        answers = [words(args.model, 1 + k * GROUP + i, ANSWER) for i in range(GROUP)]
        return torch.tensor([[*prompt, *answer] for answer in answers])

    batches = [(batch(words(args.model, k, PROMPT), k), batch(blank, k)) for k in range(groups)]

    def total(ids):
        # The head is applied to the positions that predict the answer, and to no others.
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=ANSWER + 1).logits[:, :-1]
        chosen = torch.log_softmax(logits, -1).gather(-1, ids[:, -ANSWER:, None])
        return chosen.squeeze(-1).sum(-1)

    def work():
        with torch.inference_mode():
            return [(total(given) - total(alone)).tolist() for given, alone in batches]

    return repeat(repeats, groups * GROUP, "labels", work)


def grpo(model, repeats, args):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    # Completions per forward pass of the trainer.
    rows = BATCH * GROUP if args.work == "grpo-whole" else GROUP
    vocab = {f"w{i}": i for i in range(model.config.vocab_size)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0", pad_token="w0", padding_side="left")
    prompts = [" ".join(f"w{i}" for i in words(args.model, k, PROMPT)) for k in range(64)]

    def mean_id(completion_ids, **_):
        assert all(len(ids) == ANSWER for ids in completion_ids)
        return [sum(ids) / len(ids) for ids in completion_ids]

    marks = []

    class StepTimes(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(mark())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=args.work == "grpo-checkpointed",
            beta=0.0, num_iterations=1, num_generations=GROUP, per_device_train_batch_size=rows,
            gradient_accumulation_steps=BATCH * GROUP // rows, max_completion_length=ANSWER, temperature=0.9,
            # No end token is sampled.
            generation_kwargs={"min_new_tokens": ANSWER}, learning_rate=1e-6, max_steps=1 + repeats,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )
        data = Dataset.from_dict({"prompt": prompts})
        trainer = GRPOTrainer(
            model, mean_id, config, train_dataset=data, processing_class=tokenizer, callbacks=[StepTimes()],
        )
        trainer.train()
    figures = Figures(BATCH * GROUP, "samples")
    for before, after in zip(marks, marks[1:]):
        figures.add(before, after)
    return figures


def products(_model, _repeats, args):
    """Measures products in GFLOP/s, as limits.rs does."""
    shapes = [(1024, 1024, 1024), (2048, 2048, 2048), (1024, 576, 1536), (1024, 1536, 576), (512, 576, 49152)]
    rates = {}
    for m, k, n in shapes:
        x, w = torch.rand(m, k), torch.rand(n, k)
        seconds = fastest(lambda: torch.mm(x, w.T))
        rates[f"{m}x{k}x{n}"] = {"split": 2 * m * k * n / seconds / 1e9}
    return rates


def memory(_model, _repeats, args):
    """Measures memory in GB/s, as limits.rs does, on `--threads` threads."""
    source = torch.ones(args.threads * (512 << 20) // 4)
    target = torch.zeros_like(source)
    size = 4 * source.numel()
    return {"read": size / fastest(source.sum) / 1e9, "copy": 2 * size / fastest(lambda: target.copy_(source)) / 1e9}


def fastest(work):
    """Returns the seconds of one run of `work`: those of the fastest of five repeats, each of at least 0.2 s."""

    def run(times):
        began = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - began

    run(1)
    times = max(1, round(0.2 / run(1)))
    return min(run(times) for _ in range(5)) / times


def loss_of(model, ids, answer):
    """Returns the sum of the log-probabilities of the last `answer` tokens of each row."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(-1, ids[:, -answer:, None]).sum()


def gradients(model, repeats, args):
    """Computes the gradients of two groups, each a batch of 8 rows with the prompt repeated."""

    def group(place):
        answers = [words(args.model, 1 + place * GROUP + k, ANSWER) for k in range(GROUP)]
        return torch.tensor([[*words(args.model, place, PROMPT), *answer] for answer in answers])

    groups = [group(0), group(1)]

    def work():
        for ids in groups:
            loss_of(model, ids, ANSWER).backward()
        model.zero_grad(set_to_none=False)

    return repeat(repeats, 2 * GROUP * ANSWER, "tokens", work)


def decode(model, repeats, args):
    """Samples after a context of `length` tokens, as `generate` does: each row has a copy of the prompt's keys and values."""
    width, steps = int(args.work.removeprefix("decode-")), 16
    shape = SHAPES[args.model]
    context = torch.rand(width, shape["num_key_value_heads"], args.length, shape["head_dim"])

    def work():
        cache = DynamicCache(config=model.config)
        for layer in range(shape["num_hidden_layers"]):
            cache.update(context, context, layer)
        ids = torch.ones(width, 1, dtype=torch.long)
        before = mark()
        for _ in range(steps):
            logits = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            ids = torch.multinomial(torch.softmax(logits / 0.9, -1), 1)
        return before, mark()

    figures = Figures(width * steps, "tokens")
    with torch.inference_mode():
        work()
        for _ in range(repeats):
            figures.add(*work())
    return figures


def long_row(args):
    """Returns a row with a prompt of `length / 2` tokens and a completion of the same length."""
    return torch.tensor([words(args.model, 0, args.length)])


def score_long(model, repeats, args):
    ids = long_row(args)

    def work():
        with torch.inference_mode():
            return loss_of(model, ids, args.length // 2).item()

    with torch.inference_mode():
        loss_of(model, ids[:, :256], 128)
    return once(repeats, args.length // 2, "tokens", work)


def gradient_long(model, repeats, args):
    """Computes the gradient of one row; those of a group's other rows take as long."""
    ids = long_row(args)

    def work():
        loss_of(model, ids, args.length // 2).backward()
        model.zero_grad(set_to_none=False)

    loss_of(model, ids[:, :256], 128).backward()
    return once(repeats, args.length // 2, "tokens", work)


def main():
    parser = argparse.ArgumentParser()
    works = {"products": products, "memory": memory, "train": train, "gradients": gradients, "generate-1": generate,
             "generate-8": generate, "generate-32": generate, "decode-1": decode, "decode-8": decode,
             "score-long": score_long, "gradient-long": gradient_long, "label": label, "grpo": grpo,
             "grpo-whole": grpo, "grpo-checkpointed": grpo}
    parser.add_argument("work", choices=works)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    figures = works[args.work](build(args.model), args.repeats, args)
    fields = figures if isinstance(figures, dict) else vars(figures)
    print(json.dumps(dict(peak_rss_kib=peak_rss_kib()) | fields), flush=True)


if __name__ == "__main__":
    main()
