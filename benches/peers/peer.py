"""Counterpart of benches/peers.rs with PyTorch, transformers and TRL: the same work, shapes, token ids and output. run.py
calls it. Alone, in an environment with the packages of requirements.txt:

    python peer.py WORK --model tiny|smollm2 [--threads N] [--repeats R]
"""

import argparse
import json
import math
import os
import resource
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

GROUP, PROMPT, ANSWER, BLANK, SEQUENCE, BATCH = 8, 64, 64, 16, 128, 4
# Minimum seconds of a repeat, as in peers.rs.
MIN_SECONDS = 2.0

SHAPES = {
    "tiny": dict(
        hidden_size=256, intermediate_size=704, vocab_size=4096, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    ),
    "smollm2": dict(
        hidden_size=576, intermediate_size=1536, vocab_size=49152, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=2048,
    ),
}
SEQUENCES = {"tiny": 8, "smollm2": 4}


def build(name):
    torch.manual_seed(1)
    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config = LlamaConfig(**SHAPES[name], **tokens, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=10000.0)
    return LlamaForCausalLM(config).float().eval()


def words(model, place, length):
    return [i * 61 % model.config.vocab_size for i in range(place * length, (place + 1) * length)]


def train(model, repeats, args):
    rows = [[0, *words(model, k + 1, SEQUENCE - 1)] for k in range(SEQUENCES[args.model])]
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
    ids = torch.tensor([words(model, k // GROUP, PROMPT) for k in range(width)])
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
    blank = words(model, 0, BLANK)

    def batch(prompt, k):
        answers = [words(model, 1 + k * GROUP + i, ANSWER) for i in range(GROUP)]
        return torch.tensor([[*prompt, *answer] for answer in answers])

    batches = [(batch(words(model, k, PROMPT), k), batch(blank, k)) for k in range(groups)]

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
    prompts = [" ".join(f"w{i}" for i in words(model, k, PROMPT)) for k in range(64)]

    def mean_id(completion_ids, **_):
        assert all(len(ids) == ANSWER for ids in completion_ids)
        return [sum(ids) / len(ids) for ids in completion_ids]

    marks = []

    class StepTimes(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(mark())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0, num_iterations=1,
            num_generations=GROUP, per_device_train_batch_size=rows,
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


def mark():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt


class Figures:
    def __init__(self, units, unit):
        self.units, self.unit, self.wall_s, self.cpu_s, self.minor_faults = units, unit, [], [], []

    def add(self, before, after):
        self.wall_s.append(after[0] - before[0])
        self.cpu_s.append(after[1] - before[1])
        self.minor_faults.append(after[2] - before[2])


def repeat(repeats, units, unit, work):
    work()
    began = time.perf_counter()
    work()
    times = math.ceil(MIN_SECONDS / (time.perf_counter() - began))
    figures = Figures(units * times, unit)
    for _ in range(repeats):
        before = mark()
        for _ in range(times):
            work()
        figures.add(before, mark())
    return figures


def peak_rss_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def main():
    parser = argparse.ArgumentParser()
    works = {"train": train, "generate-1": generate, "generate-8": generate, "generate-32": generate, "label": label,
             "grpo": grpo, "grpo-whole": grpo}
    parser.add_argument("work", choices=works)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    figures = works[args.work](build(args.model), args.repeats, args)
    line = dict(work=args.work, model=args.model, threads=args.threads, peak_rss_kib=peak_rss_kib())
    print(json.dumps(line | vars(figures)), flush=True)


if __name__ == "__main__":
    main()
