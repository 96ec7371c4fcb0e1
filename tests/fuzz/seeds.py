"""Writes the seeds of the fuzz targets into tests/fuzz/corpus: small inputs of every form, valid and hostile. Findings of
the fuzzer are in the same folders under other names, and are kept. Run at the root: python3 tests/fuzz/seeds.py"""

import gzip
import json
import pathlib
import re
import struct

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CORPUS = ROOT / "tests/fuzz/corpus"


def seed(target, name, data):
    data = data if isinstance(data, bytes) else data.encode()
    assert len(data) < 4096, (target, name, len(data))
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    (CORPUS / target / name).write_bytes(data)


def configs():
    for path in sorted((ROOT / "configs").glob("*.toml")):
        lines = (re.sub(r"\s+#.*", "", line.rstrip()) for line in path.read_text().splitlines())
        text = "\n".join(line for line in lines if line and not line.startswith("#"))
        # The data file is replaced by the Cargo.toml of the fuzzed crate, which exists.
        text = re.sub(r'"data/[^"]*"', '"Cargo.toml"', text)
        seed("config", path.stem, text)
    whole = '[run]\nname = "x"\nsteps = 3\n[data]\npath = "Cargo.toml"\n[policy]\nmodel = { scratch = {} }\n'
    seed("config", "overrides", whole + "\0learner.eta=0\0rollout.stop=[\"a\"]\0policy.lora.rank=4\0x=y\0serve.listen=0.0.0.0:1")
    remote = 'remote = { url = "http://h/v1", model = "m", api_key_env = "KEY", hedge_after_s = 2 }\n'
    seed("config", "panel", whole + '[labeler]\ntype = "panel"\n[[labeler.members]]\ntype = "direct"\n' + remote)
    seed("config", "served", whole + '[serve]\nlisten = "0.0.0.0:9464"\ntoken_env = "TOKEN"\n')
    seed("config", "mistakes", whole + '[lerner]\neta = -1\n[learner]\netta = 1\nlr = nan\nclip = "x"\nbatch_groups = 9223372036854775807\n')
    seed("config", "models", whole.replace("{ scratch = {} }", '["a.gguf", { pip = "m==1", sha256 = "ab" }, { hub = "o/n", revision = "r", file = "f.gguf" }]'))


def rows():
    turns = lambda *texts: [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]
    lines = lambda *objects: "\n".join(json.dumps(one, ensure_ascii=False) for one in objects)
    seed("rows", "prompts", lines({"prompt": "hi", "reference": "ho"}, {"prompt": turns("a", "b", "c")}, {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}))
    seed("rows", "hh", lines({"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}, {"chosen": turns("x", "y"), "rejected": turns("x", "z")}))
    seed("rows", "pairs", lines({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "first": "a", "second": "b", "preference": 0.25}, {"prompt": "p", "first": "a", "second": "b", "preference": None}))
    seed("rows", "broken", b'{"prompt": "fine"}\n\nnot json\n[1]\n{"prompt": 3}\n\xff\xfe\n{"first": 1, "second": 2}\n{"preference": 7, "first": "", "second": ""}')
    seed("rows", "nested", '{"prompt": ' + "[" * 200 + "]" * 200 + "}")
    seed("rows", "turns", lines({"prompt": "\n\nHuman: a\n\nHuman: b", "chosen": "\n\n\nHuman: x"}, {"prompt": "\n\nHuman:" * 200}))
    seed("rows", "array", b'[{"prompt": "a,]"},\n {"prompt": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]}]')
    seed("rows", "parts", lines({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, {"prompt": {"role": ["user"], "content": ["b"]}}, {"system": "s", "prompt": "p", "chosen": turns("p", "x"), "rejected": turns("p", "y")}, {"chosen": "The sky is blue.", "rejected": "The sky is green."}))
    seed("rows", "packed", gzip.compress(lines({"prompt": "hi"}, {"prompt": "ho"}).encode(), mtime=0))
    seed("rows", "half", gzip.compress(b'{"prompt": "hi"}\n' * 50, mtime=0)[:40])


U32, I32, F32, BOOL, TEXT, LIST, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value, wide=True):
    data = value.encode()
    return struct.pack("<Q" if wide else "<I", len(data)) + data


def value(kind, one):
    pack = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
    if kind == TEXT:
        return text(one)
    if kind == LIST:
        inner, items = one
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack(pack[kind], one)


def gguf(entries, tensors, version=3, tail=None):
    data = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    for key, (kind, one) in entries.items():
        data += text(key) + struct.pack("<I", kind) + value(kind, one)
    offset, body = 0, b""
    for name, (shape, kind, raw) in tensors.items():
        data += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        data += struct.pack("<IQ", kind, offset)
        raw += b"\0" * (-len(raw) % 32)
        offset += len(raw)
        body += raw
    return data + b"\0" * (-len(data) % 32) + (body if tail is None else tail)


def ggufs():
    tokens = ["1", "2", "3", "'", "S", "e", "12", "123", "'S", "<user>", "<|end|>"]
    own = {"context_length": (U32, 64), "embedding_length": (U32, 4), "block_count": (U32, 1), "feed_forward_length": (U32, 4), "attention.head_count": (U32, 2), "attention.head_count_kv": (U32, 1), "attention.layer_norm_rms_epsilon": (F32, 1e-5), "rope.freq_base": (F32, 1e4)}
    model = {"general.architecture": (TEXT, "llama")} | {f"llama.{key}": one for key, one in own.items()}
    bpe = {"model": (TEXT, "gpt2"), "pre": (TEXT, "smollm"), "tokens": (LIST, (TEXT, tokens)), "token_type": (LIST, (I32, [1] * 9 + [4, 3])), "merges": (LIST, (TEXT, ["1 2", "12 3", "' S"])), "eos_token_id": (U32, 10)}
    bpe = {f"tokenizer.ggml.{key}": one for key, one in bpe.items()}
    pieces = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "▁a", "ab"]
    spm = {"model": (TEXT, "llama"), "tokens": (LIST, (TEXT, pieces)), "scores": (LIST, (F32, [-float(i) for i in range(9)])), "token_type": (LIST, (I32, [2, 3, 3, 6, 1, 1, 1, 1, 1])), "bos_token_id": (U32, 1), "eos_token_id": (U32, 2), "unknown_token_id": (U32, 0), "add_space_prefix": (BOOL, True)}
    spm = {f"tokenizer.ggml.{key}": one for key, one in spm.items()}
    template = {"tokenizer.chat_template": (TEXT, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")}
    f32 = lambda *shape: (shape, 0, struct.pack("<f", 0.5) * __import__("math").prod(shape))
    tensors = {"token_embd.weight": f32(11, 4), "output_norm.weight": f32(4)}
    layer = {"attn_norm": (4,), "attn_q": (4, 4), "attn_k": (2, 4), "attn_v": (2, 4), "attn_output": (4, 4), "ffn_norm": (4,), "ffn_gate": (4, 4), "ffn_up": (4, 4), "ffn_down": (4, 4)}
    tensors |= {f"blk.0.{name}.weight": f32(*shape) for name, shape in layer.items()}
    seed("gguf", "llama", gguf(model | bpe | template, tensors))
    seed("gguf", "spm", gguf(model | spm, {"token_embd.weight": f32(9, 4), "output.weight": f32(9, 4), "rope_freqs.weight": f32(1)}))
    seed("gguf", "q8", gguf(model | bpe, {"token_embd.weight": ((11, 32), 8, b"\x01" * 34 * 11)}))
    seed("gguf", "q4k", gguf(model, {"token_embd.weight": ((2, 256), 12, b"\x01" * 144 * 2)}))
    gemma = {key.replace("llama.", "gemma2."): one for key, one in model.items()} | {"general.architecture": (TEXT, "gemma2"), "gemma2.attention.sliding_window": (U32, 8)}
    seed("gguf", "gemma", gguf(gemma | spm, tensors))
    for pre in ["llama-bpe", "qwen2", "gpt-2"]:
        seed("gguf", pre, gguf(bpe | {"tokenizer.ggml.pre": (TEXT, pre)}, {}))
    # Regressions: panics of the libraries, and allocations of a size that the header states.
    seed("gguf", "alignment", gguf(model | {"general.alignment": (U32, 0)}, tensors))
    seed("gguf", "scalar", gguf(model | bpe, {"token_embd.weight": ((), 0, b"\0" * 4)}))
    seed("gguf", "overflow", gguf(model, {"token_embd.weight": ((1 << 32, 1 << 32), 0, b"")}))
    seed("gguf", "layers", gguf(gemma | {"gemma2.block_count": (U64, 1 << 60)}, tensors))
    seed("gguf", "merges", gguf(bpe | {"tokenizer.ggml.merges": (LIST, (TEXT, ["123 'S"]))}, {}))
    seed("gguf", "counts", b"GGUF" + struct.pack("<IQQ", 3, 1 << 29, 1 << 29))
    seed("gguf", "list", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", LIST, 0, 1 << 29))
    seed("gguf", "old", b"GGUF" + struct.pack("<III", 1, 1, 0) + text("w", False) + struct.pack("<IIIQ", 1, 4, 0, 0) + b"\0" * 64)


def safetensors():
    def file(header, data=b""):
        header = json.dumps(header) if isinstance(header, dict) else header
        return struct.pack("<Q", len(header)) + header.encode() + data

    one = lambda dtype, shape, start, end: {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    seed("safetensors", "two", file({"__metadata__": {"format": "pt"}, "a": one("F32", [2, 2], 0, 16), "b": one("BF16", [3], 16, 22)}, b"\0" * 22))
    for dtype, size in [("F16", 2), ("F64", 8), ("I64", 8), ("U8", 1), ("F8_E4M3", 1), ("I32", 4), ("U32", 4), ("I16", 2)]:
        seed("safetensors", dtype.lower(), file({"a": one(dtype, [2], 0, 2 * size)}, b"\x3f" * 2 * size))
    seed("safetensors", "f4", file({"a": one("F4", [2], 0, 1)}, b"\0"))
    seed("safetensors", "bool", file({"a": one("BOOL", [2], 0, 2)}, b"\0\0"))
    seed("safetensors", "scalar", file({"a": one("F32", [], 0, 4)}, b"\0" * 4))
    seed("safetensors", "empty", file({"a": one("F32", [0, 1 << 40, 1 << 40], 0, 0)}))
    seed("safetensors", "gap", file({"a": one("F32", [1], 4, 8)}, b"\0" * 8))
    seed("safetensors", "long", struct.pack("<Q", 1 << 62) + b"{}")
    seed("safetensors", "short", struct.pack("<Q", 50) + b"{}")
    seed("safetensors", "no-json", file("[[[["))


def model_configs():
    for name in ["gemma2", "gemma3", "llama3", "llama-linear", "mistral", "qwen2", "qwen2-window", "qwen3"]:
        seed("model_config", name, (ROOT / f"tests/fixtures/families/{name}/config.json").read_text())
    seed("model_config", "bert", (ROOT / "tests/fixtures/bert/config.json").read_text())
    gemma = json.loads((ROOT / "tests/fixtures/families/gemma3/config.json").read_text())
    seed("model_config", "scorer", json.dumps(gemma | {"architectures": ["Gemma3TextForSequenceClassification"]}))
    # Regressions: unbounded memory.
    seed("model_config", "layers", json.dumps(gemma | {"num_hidden_layers": 1 << 60, "layer_types": None}))
    seed("model_config", "heads", json.dumps(gemma | {"num_attention_heads": 1 << 63, "num_key_value_heads": 1 << 62, "head_dim": 1 << 62}))
    seed("model_config", "index", json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "../x", "c": 3}}))


def tokenizers():
    added = lambda id, content, **more: {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | more
    bpe = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [added(9, "<s>"), added(10, "</s>", lstrip=True, rstrip=True, single_word=True)], "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+(?!\S)|\s+"}, "behavior": "Isolated", "invert": False}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}, "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [9], "tokens": ["<s>"]}}}]}, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": {"H": 0, "e": 1, "l": 2, "o": 3, "a": 4, "b": 5, "ll": 6, "aa": 7, "ab": 8}, "merges": ["l l", "a a", "a b"]}}
    named = json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]})
    write = lambda name, one, config="": seed("tokenizer", name, json.dumps(one, ensure_ascii=False) + ("\0" + config if config else ""))
    write("bpe", bpe, named)
    spm = bpe | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}, "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
    spm["model"] = bpe["model"] | {"unk_token": "H", "fuse_unk": True, "byte_fallback": True, "merges": [["l", "l"]], "ignore_merges": False}
    write("spm", spm)
    bert = bpe | {"added_tokens": [added(0, "[UNK]")], "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}, "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}, "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3, "na": 4, "##ive": 5}}}
    write("bert", bert)
    write("word-level", bpe | {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"hello": 0, "?": 1}, "unk_token": "?"}})
    write("metaspace", spm | {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}, "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}})
    # Regressions: panics of the library.
    write("strip", spm | {"decoder": {"type": "Strip", "content": "l", "start": 3, "stop": 3}})
    write("merge", bpe | {"model": bpe["model"] | {"merges": ["ll aa"]}})
    write("prefix", bpe | {"model": bpe["model"] | {"continuing_subword_prefix": "é#"}})
    write("length", bpe | {"pre_tokenizer": {"type": "FixedLength", "length": 0}})
    write("precompiled", bpe | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}})
    missing = json.loads(json.dumps(bpe["post_processor"]["processors"][1]) .replace('"id": "<s>", "type_id"', '"id": "<x>", "type_id"'))
    write("template", bpe | {"post_processor": missing})
    write("spaces", bpe | {"added_tokens": [added(9, "o", rstrip=True), added(10, " ", lstrip=True)]})
    write("ids", bpe | {"added_tokens": [added(4294967295, "x")]})


def templates():
    chatml = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    seed("template", "chatml", chatml + "\0be kind\0hi\0hello\0why?")
    seed("template", "llama", "{{- bos_token }}\n{%- if messages[0].role == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}\n{{- strftime_now('%d %b %Y') }}{{ system }}{%- for m in messages %}{%- if not (loop.index0 % 2 == 0) == (m.role == 'user') %}{{ raise_exception('roles') }}{%- endif %}{{- m.content.split('</think>')[-1].strip() ~ eos_token }}{%- endfor %}\0s\0u\0a")
    seed("template", "namespace", "{% set ns = namespace(n=0, last=none) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% if m.role == 'user' and ns.last is none %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.n }} {{ ns.last }} {{ messages | map(attribute='role') | join(', ') }}\0\0a\0b")
    seed("template", "macro", "{% macro turn(m, end='') -%}{{ m.role | upper }}: {{ m.content | replace('a', 'b') }}{{ end }}{%- endmacro %}{% for m in messages %}{{ turn(m, end=';' if loop.last else ',') }}{% endfor %}{% generation %}x{% endgeneration %}")
    seed("template", "json", "{{ messages | tojson }}{{ {'a': [1, -2.5, none, true], 'b': {}} | tojson(indent=2) }}{{ messages | length }}")
    seed("template", "methods", "{% for m in messages %}{{ m.content.upper().lower().title().lstrip('h').rstrip().startswith('a') }}{{ m.content.count('i') }}{{ m.items() | list }}{{ m.get('x', 'y') }}{{ '{} {:>4}'.format(1, 2) }}{{ '%s|%5.2f' | format('a', 1.5) }}{% endfor %}")
    seed("template", "filters", "{{ [3, 1, 2] | sort | reverse | list }}{{ 'a b c' | split | unique | batch(2) | list }}{{ range(5) | sum }}{{ dict(a=1) | dictsort }}{{ 'x' * 5 }}{{ 'abc'[::-1] }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 'a' in 'abc' }}{{ x is defined }}{{ 'é' | indent(2, true) }}{{ [1, 2] | slice(2) | list }}")
    seed("template", "recursive", "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}[{{ loop(x) }}]{% else %}{{ x }}{% break %}{% endif %}{% endfor %}")
    seed("template", "include", "{% include 'Cargo.toml' %}")
    # Regressions: endless loops, unbounded memory, stack overflow.
    seed("template", "endless", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    seed("template", "doubled", "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}")
    seed("template", "nested", "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ 1 }}")
    seed("template", "lazy", "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = ns.x[0:] %}{% endfor %}{{ ns.x | list }}")
    seed("template", "indent", "{{ [1] | tojson(indent=18446744073709551615) }}")
    seed("template", "wide", "{{ messages | batch(9999999999, 1) | list }}{{ 'x' | indent(9999999999, true) }}")


def judges():
    choice = lambda **one: json.dumps({"choices": [one], "usage": {"prompt_tokens": 9, "completion_tokens": 1}})
    seed("judge", "chat", choice(message={"role": "assistant", "content": "1"}, logprobs={"content": [{"token": "1", "logprob": -0.1, "top_logprobs": [{"token": "1", "logprob": -0.1}, {"token": " 10", "logprob": -3.5}]}]}))
    seed("judge", "completions", choice(text=" 2", logprobs={"top_logprobs": [{" 1": -0.7, " 2": -0.8, " ": -9e99}]}))
    seed("judge", "space", choice(text=" ", logprobs={"top_logprobs": [{" ": -0.1, "1": -4}]}))
    seed("judge", "plain", choice(message={"content": "(2) since"}))
    seed("judge", "null", choice(message={"content": None}, logprobs=None))
    seed("judge", "error", json.dumps({"error": {"message": "overloaded"}}))
    # Regressions: overflowing counts, and probabilities above one.
    seed("judge", "usage", choice(text="1").replace("9", str((1 << 64) - 1)))
    seed("judge", "mass", choice(message={"content": "1"}, logprobs={"content": [{"top_logprobs": [{"token": "1", "logprob": 0}] * 3}]}))
    seed("judge", "deep", "[" * 500)
    seed("judge", "number", choice(text="1", logprobs={"top_logprobs": [{"1": None, "2": "x"}]}))


configs()
rows()
ggufs()
safetensors()
model_configs()
tokenizers()
templates()
judges()
