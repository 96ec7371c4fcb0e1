//! A tokenizer rebuilt from the metadata of a GGUF file.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::{Content, Value as Gguf};
use serde_json::{Map, Value, json};

use super::bytes::byte_level_bpe;
use super::{Special, Tokenizer};

/// Types of token in GGUF that the text is cut at: control and user-defined.
const SPECIAL_TYPES: [i64; 2] = [3, 4];

/// How Llama 3 cuts text before merging.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Qwen 2 does: digits one by one.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn read(path: &Path) -> Result<Tokenizer> {
    let mut file = File::open(path)?;
    let content = Content::read(&mut file).context("it is not a readable GGUF file")?;
    build(&content.metadata)
}

fn build(metadata: &HashMap<String, Gguf>) -> Result<Tokenizer> {
    let get = |key: &str| metadata.get(key).with_context(|| format!("the key {key} is missing"));
    let model = get("tokenizer.ggml.model")?.to_string()?;
    if model != "gpt2" {
        bail!(
            "tokenizers of kind {model} are not supported in GGUF files; these are: gpt2 (byte-level BPE). A Hugging Face directory of the model works"
        );
    }
    let tokens = strings(get("tokenizer.ggml.tokens")?)?;
    let merges = strings(get("tokenizer.ggml.merges")?)?;
    let types = get("tokenizer.ggml.token_type")?.to_vec()?;
    let special: Vec<(u32, &str)> = tokens
        .iter()
        .zip(types)
        .enumerate()
        .filter(|(_, (_, kind))| integer(kind).is_some_and(|kind| SPECIAL_TYPES.contains(&kind)))
        .map(|(id, (token, _))| (id as u32, token.as_str()))
        .collect();
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let pre =
        get("tokenizer.ggml.pre").and_then(|value| Ok(value.to_string()?.clone())).unwrap_or_else(|_| "default".into());
    let description = byte_level_bpe(vocab, &merges, &special, &pre_tokenizer(&pre)?);
    let id =
        |name: &str| metadata.get(&format!("tokenizer.ggml.{name}_token_id")).and_then(integer).map(|id| id as u32);
    let special =
        Special { bos: id("bos"), eos: id("eos").into_iter().collect(), pad: id("padding"), unk: id("unknown") };
    let template = metadata.get("tokenizer.chat_template").and_then(|value| value.to_string().ok()).cloned();
    Tokenizer::from_json(&description, template, special)
}

/// What cuts text before merging, by the name that GGUF gives it.
fn pre_tokenizer(name: &str) -> Result<Value> {
    let byte_level = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let sequence = |parts: &[Value]| json!({ "type": "Sequence", "pretokenizers": parts });
    Ok(match name {
        "smollm" => sequence(&[json!({ "type": "Digits", "individual_digits": true }), byte_level(true)]),
        "gpt-2" | "gpt2" => byte_level(true),
        "llama-bpe" | "llama3" | "llama-v3" => sequence(&[split(LLAMA3), byte_level(false)]),
        "qwen2" => sequence(&[split(QWEN2), byte_level(false)]),
        other => bail!("the pre-tokenizer {other} is not supported; these are: smollm, gpt-2, llama-bpe, qwen2"),
    })
}

fn strings(value: &Gguf) -> Result<Vec<String>> {
    value.to_vec()?.iter().map(|one| Ok(one.to_string()?.clone())).collect()
}

fn integer(value: &Gguf) -> Option<i64> {
    let signed = value.to_i32().map(i64::from).or_else(|_| value.to_i64());
    signed.or_else(|_| value.to_u32().map(i64::from)).or_else(|_| value.to_u64().map(|n| n as i64)).ok()
}
