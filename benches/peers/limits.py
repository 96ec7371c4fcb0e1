"""Time that work takes at the machine's limits: its products at the measured speed of products, and the bytes that it has to
read at the measured speed of memory. A prompt that several completions share is counted once, on every side."""

from shapes import ANSWER, BATCH, BLANK, GROUP, PROMPT, SEQUENCE, SEQUENCES, SHAPES

# Bytes of a weight; q8_0 has a scale of 4 bytes for 32 weights in Preceptor's memory (of 2 bytes in llama.cpp's).
BYTES = {"f32": 4.0, "bf16": 2.0, "q8_0": 1.125}


class Limits:
    """Highest measured speeds of the machine, by any program."""

    def __init__(self, lines):
        self.products, self.read = {}, {}
        for line in lines:
            job = line["job"]
            if job["work"] == "products":
                rates = [rate for name, rates in line.items() if "x" in name and isinstance(rates, dict)
                         for rate in rates.values() if isinstance(rate, float)]
                self.products[job["threads"]] = max([self.products.get(job["threads"], 0.0), *rates])
            if job["work"] == "memory":
                self.read[job["threads"]] = max(self.read.get(job["threads"], 0.0), line["read"])

    def seconds(self, threads, flops, bytes=0.0):
        """Returns the time of work that is bound by one of the two limits."""
        return max(flops / self.products[threads], bytes / self.read[threads]) / 1e9


class Shape:
    def __init__(self, name):
        shape = SHAPES[name]
        d, width = shape["hidden_size"], shape["head_dim"]
        heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.name, self.layers = name, shape["num_hidden_layers"]
        self.matrices = self.layers * (d * width * 2 * (heads + kv_heads) + 3 * d * shape["intermediate_size"])
        self.head = shape["vocab_size"] * d
        # Products of one query with one key and with one value, in all layers.
        self.pair = 4 * heads * width * self.layers
        # Bytes of a token's keys and values in f32.
        self.cached = 8 * kv_heads * width * self.layers

    def forward(self, tokens, predicted, pairs):
        """Returns the products of a pass over `tokens` tokens with `pairs` pairs of a query and a key."""
        return 2 * self.matrices * tokens + 2 * self.head * predicted + self.pair * pairs

    def group(self, prompt, answer, completions):
        """Returns the products of a pass over completions that share a prompt."""
        own = answer - 1
        pairs = prompt * (prompt + 1) / 2 + completions * (own * prompt + own * (own + 1) / 2)
        return self.forward(prompt + completions * own, completions * answer, pairs)

    def step(self, limits, threads, weights, context, sequences, prompts, own=0):
        """Returns the time of a decode step of sequences after shared prompts of `context` tokens and `own` of their own."""
        flops = self.forward(sequences, sequences, sequences * (context + own))
        cached = self.cached * (prompts * context + sequences * own)
        return limits.seconds(threads, flops, BYTES[weights] * (self.matrices + self.head) + cached)


def bound(limits, job, units):
    """Returns the seconds of `units` units of a job at the machine's limits, or None if the work has no bound."""
    work, threads, length = job["work"], job["threads"], job["length"]
    shape = Shape(job["model"])

    def sampled(width):
        prompts = -(-width // GROUP)
        prefill = limits.seconds(threads, prompts * shape.group(PROMPT, 1, 1))
        steps = (shape.step(limits, threads, job["weights"], PROMPT, width, prompts, own) for own in range(1, ANSWER))
        return prefill + sum(steps)

    gradient = 3 * shape.group(PROMPT, ANSWER, GROUP)
    name, _, width = work.rpartition("-")
    if work == "train":
        sequences = SEQUENCES[job["model"]]
        each = 3 * shape.group(1, SEQUENCE - 1, 1)
        return units / (sequences * SEQUENCE) * limits.seconds(threads, sequences * each)
    if work == "gradients":
        return units / (GROUP * ANSWER) * limits.seconds(threads, gradient)
    if name == "generate":
        return units / (int(width) * ANSWER) * sampled(int(width))
    if name == "decode":
        return units / int(width) * shape.step(limits, threads, job["weights"], length, int(width), 1, 8)
    if work == "label":
        flops = shape.group(PROMPT, ANSWER, GROUP) + shape.group(BLANK, ANSWER, GROUP)
        return units / GROUP * limits.seconds(threads, flops)
    if work.startswith("grpo"):
        return units / (BATCH * GROUP) * (sampled(BATCH * GROUP) + limits.seconds(threads, BATCH * gradient))
    half = length // 2
    if work == "score-long":
        return units / half * limits.seconds(threads, shape.group(half, half, 1))
    if work == "gradient-long":
        return units / (2 * half) * limits.seconds(threads, 3 * shape.group(half, half, 2))
    return None
