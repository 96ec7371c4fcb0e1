//! Validation of `tokenizer.json` before the `tokenizers` library parses it. That library assumes well-formed files: a
//! malformed one makes it panic, read beyond a text's end, or write without end. Only the components of supported
//! models are accepted, and only with values that the library handles.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::util::read_bounded;

/// Largest id of a token; the largest vocabularies have a quarter of a million.
const MAX_ID: u32 = (1 << 24) - 1;
/// Largest number of bytes of one token; those of known models have up to a few hundred.
pub const LONGEST_TOKEN: usize = 1024;
/// Largest number of bytes of a pattern.
const LONGEST_PATTERN: usize = 4096;
/// Largest number of consecutive components of a kind.
const MAX_PARTS: usize = 16;
/// Largest factor by which normalizers or decoders together may lengthen a text.
const MAX_GROWTH: usize = 256;

#[derive(Deserialize)]
struct Description {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    lstrip: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    max_input_chars_per_word: Option<u64>,
}

/// Two tokens that are merged into one, in both formats of the file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// Reads the `tokenizer.json` at `path`.
///
/// # Errors
/// If the file is not supported or invalid; the error names the file and the component.
pub fn read(path: &Path) -> Result<Tokenizer> {
    let text =
        read_bounded::text(path, read_bounded::TOKENIZER).with_context(|| format!("cannot read {}", path.display()))?;
    parse(text.as_bytes()).with_context(|| format!("cannot read {}", path.display()))
}

/// Parses a `tokenizer.json`.
///
/// # Errors
/// If a component is not supported or invalid; the error names it.
pub fn parse(json: &[u8]) -> Result<Tokenizer> {
    check(json)?;
    Tokenizer::from_bytes(json).map_err(|error| anyhow!(error))
}

fn check(json: &[u8]) -> Result<()> {
    let description: Description = match serde_json::from_slice(json) {
        Ok(description) => description,
        // Other kinds of models have other fields.
        Err(error) => {
            let other: Value = serde_json::from_slice(json).context("it is not JSON")?;
            if let Some(kind) = other["model"]["type"].as_str() {
                check_model_type(kind)?;
            }
            return Err(error).context("it is not a description of a tokenizer");
        }
    };
    for (name, part) in [
        ("normalizer", &description.normalizer),
        ("pre_tokenizer", &description.pre_tokenizer),
        ("post_processor", &description.post_processor),
        ("decoder", &description.decoder),
    ] {
        let parts = parts(name, part)?;
        let grown = parts.iter().try_fold(1usize, |grown, part| {
            let kind = kind(name, part)?;
            let factor = check_component(name, kind, part).with_context(|| format!("in its {name} {kind}"))?;
            anyhow::Ok(grown.saturating_mul(factor))
        })?;
        ensure!(grown <= MAX_GROWTH, "its {name} may turn one byte into more than {MAX_GROWTH}");
        let templates = parts.iter().filter(|part| part["type"] != "ByteLevel").count();
        ensure!(name != "post_processor" || templates <= 1, "its post_processor has more than one template");
    }
    description.model.check()?;
    for Added { id, content, lstrip } in &description.added_tokens {
        token(content, *id)?;
        check_added(content, *lstrip)?;
    }
    Ok(())
}

/// Checks that the `tokenizers` library can work with an added token.
///
/// # Errors
/// If it cannot; the error names the token and the reason.
pub fn check_added(content: &str, lstrip: bool) -> Result<()> {
    token(content, 0)?;
    // The library may find the token within spaces that the previous token has consumed, and removes them twice.
    ensure!(
        !(lstrip && content.chars().all(char::is_whitespace)),
        "its added token {content:?} consists of spaces and strips the spaces before it"
    );
    Ok(())
}

/// Checks that a tokenizer's model of the type `kind` can be read.
fn check_model_type(kind: &str) -> Result<()> {
    ensure!(
        ["BPE", "WordPiece", "WordLevel"].contains(&kind),
        "its model is of type {kind}; these can be read: BPE, WordPiece, WordLevel"
    );
    Ok(())
}

impl Model {
    fn check(&self) -> Result<()> {
        let kind = self.kind.as_deref().unwrap_or(if self.merges.is_empty() { "WordPiece" } else { "BPE" });
        check_model_type(kind)?;
        for (content, id) in &self.vocab {
            token(content, *id)?;
        }
        // With dropout a text has different tokens each time.
        ensure!(
            self.dropout.is_none_or(|p| p == 0.0),
            "its model drops merges at random (dropout); set dropout to null"
        );
        ensure!(
            kind != "BPE" || self.continuing_subword_prefix.as_ref().is_none_or(String::is_empty),
            "its model marks the continuation of a word (continuing_subword_prefix), which is not supported in BPE"
        );
        // The cost of a word is quadratic in its length.
        let longest = self.max_input_chars_per_word.unwrap_or(100);
        ensure!(longest <= 1000, "max_input_chars_per_word = {longest} is more than 1000");
        for (i, merge) in self.merges.iter().enumerate() {
            let pair = match merge {
                Merge::Pair(left, right) => Some((left.as_str(), right.as_str())),
                Merge::Line(line) if i == 0 && line.starts_with("#version") => continue,
                Merge::Line(line) => line.split_once(' '),
            };
            let merged = pair.map(|(left, right)| format!("{left}{right}"));
            ensure!(
                merged.as_ref().is_some_and(|merged| self.vocab.contains_key(merged)),
                "merge {} of its model makes {merged:?}, which is not one of its tokens",
                i + 1
            );
        }
        Ok(())
    }
}

fn token(content: &str, id: u32) -> Result<()> {
    ensure!(id <= MAX_ID, "a token has the id {id}; the highest supported id is {MAX_ID}");
    ensure!(content.len() <= LONGEST_TOKEN, "token {id} has {} bytes, the limit is {LONGEST_TOKEN}", content.len());
    Ok(())
}

/// Returns the components of a sequence, the single component, or none.
fn parts<'a>(name: &str, part: &'a Value) -> Result<Vec<&'a Value>> {
    if part.is_null() {
        return Ok(Vec::new());
    }
    if part["type"] != "Sequence" {
        return Ok(vec![part]);
    }
    let list = ["normalizers", "pretokenizers", "processors", "decoders"].iter().find_map(|key| part[key].as_array());
    let list = list.with_context(|| format!("its {name} is a sequence without parts"))?;
    ensure!(list.len() <= MAX_PARTS, "its {name} has {} parts, the limit is {MAX_PARTS}", list.len());
    Ok(list.iter().collect())
}

fn kind<'a>(name: &str, part: &'a Value) -> Result<&'a str> {
    let known: &[&str] = match name {
        "normalizer" => &[
            "BertNormalizer",
            "ByteLevel",
            "Lowercase",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Prepend",
            "Replace",
            "Strip",
            "StripAccents",
        ],
        "pre_tokenizer" => &[
            "BertPreTokenizer",
            "ByteLevel",
            "Digits",
            "Metaspace",
            "Punctuation",
            "Split",
            "Whitespace",
            "WhitespaceSplit",
        ],
        "post_processor" => &["BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"],
        _ => &["ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"],
    };
    let kind = part["type"].as_str().with_context(|| format!("a part of its {name} has no type"))?;
    ensure!(known.contains(&kind), "its {name} {kind} is not supported; these are: {}", known.join(", "));
    Ok(kind)
}

/// Checks one component, and returns the factor by which it may lengthen a text.
fn check_component(name: &str, kind: &str, part: &Value) -> Result<usize> {
    match (name, kind) {
        (_, "Replace") => {
            let length = part["content"].as_str().map_or(0, str::len);
            pattern(&part["pattern"])?;
            // An empty pattern matches before each character.
            Ok(length + 1)
        }
        (_, "Prepend") => Ok(part["prepend"].as_str().map_or(0, str::len) + 1),
        (_, "Split") => pattern(&part["pattern"]).map(|()| 1),
        ("normalizer" | "pre_tokenizer", "ByteLevel") => Ok(2),
        (_, "NFD" | "NFKC" | "NFKD") => Ok(4),
        (_, "Metaspace") => Ok(4),
        ("decoder", "Strip") => {
            // The library counts back beyond a token's beginning.
            ensure!(part["stop"] == 0, "stop = {} is not supported; it must be 0", part["stop"]);
            Ok(1)
        }
        (_, "TemplateProcessing") => template(part).map(|()| 1),
        _ => Ok(1),
    }
}

fn pattern(pattern: &Value) -> Result<()> {
    let text = pattern["String"].as_str().or_else(|| pattern["Regex"].as_str()).context("it has no pattern")?;
    ensure!(text.len() <= LONGEST_PATTERN, "its pattern has {} bytes, the limit is {LONGEST_PATTERN}", text.len());
    Ok(())
}

/// Checks that a template defines each special token that it uses, and contains the text exactly once.
fn template(part: &Value) -> Result<()> {
    let pieces = part["single"].as_array().context("it has no list of pieces (single)")?;
    ensure!(pieces.len() <= MAX_PARTS, "it has {} pieces, the limit is {MAX_PARTS}", pieces.len());
    let mut texts = 0;
    for piece in pieces {
        if let Some(id) = piece["SpecialToken"]["id"].as_str() {
            let token = part["special_tokens"].get(id);
            let count = |key: &str| token.and_then(|token| token[key].as_array()).map_or(0, Vec::len);
            let (ids, tokens) = (count("ids"), count("tokens"));
            ensure!(
                ids > 0 && ids == tokens && ids <= MAX_PARTS,
                "its special token {id:?} has {ids} ids and {tokens} tokens"
            );
        } else if piece["Sequence"]["id"] == "A" {
            texts += 1;
        } else {
            bail!("its piece {piece} is neither a special token nor the text A");
        }
    }
    ensure!(texts == 1, "it has the text {texts} times, and not once");
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn described() -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": [["a", "b"]] },
        })
    }

    /// The library panics or hangs on each of these changes.
    #[test]
    fn descriptions_that_crash_the_library_are_rejected_by_name() {
        check(described().to_string().as_bytes()).unwrap();
        let replace = |content: &str| json!({ "type": "Replace", "pattern": { "String": "" }, "content": content });
        let piece = |id: &str| json!({ "SpecialToken": { "id": id, "type_id": 0 } });
        let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
        let processor = |single: Value| json!({ "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": { "[A]": { "id": "[A]", "ids": [0], "tokens": [] } } });
        let added = |id: u64, content: &str| json!([{ "id": id, "content": content, "single_word": false, "lstrip": true, "rstrip": true, "normalized": false, "special": true }]);
        for (path, value, words) in [
            (
                "/normalizer",
                json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" }),
                "normalizer Precompiled is not supported; these are",
            ),
            (
                "/normalizer",
                json!({ "type": "Sequence", "normalizers": vec![replace("xxxxxxxxxxxxxxx"); 3] }),
                "one byte into more than 256",
            ),
            (
                "/normalizer",
                json!({ "type": "Sequence", "normalizers": vec![json!({ "type": "NFC" }); 17] }),
                "17 parts",
            ),
            (
                "/normalizer",
                json!({ "type": "Sequence", "normalizers": [{ "type": "Sequence", "normalizers": [] }] }),
                "normalizer Sequence is not",
            ),
            ("/pre_tokenizer", json!({ "type": "FixedLength", "length": 0 }), "FixedLength is not supported"),
            (
                "/pre_tokenizer",
                json!({ "type": "Split", "pattern": { "Regex": "x".repeat(5000) }, "behavior": "Isolated", "invert": false }),
                "its pattern has 5000 bytes",
            ),
            ("/post_processor", processor(json!([piece("[B]"), text("A")])), "\"[B]\" has 0 ids"),
            ("/post_processor", processor(json!([piece("[A]"), text("A")])), "\"[A]\" has 1 ids and 0 tokens"),
            ("/post_processor", processor(json!([text("B")])), "neither a special token nor the text A"),
            ("/post_processor", processor(json!([])), "the text 0 times"),
            (
                "/post_processor",
                json!({ "type": "Sequence", "processors": vec![processor(json!([text("A")])); 2] }),
                "more than one template",
            ),
            (
                "/decoder",
                json!({ "type": "Strip", "content": " ", "start": 0, "stop": 9 }),
                "in its decoder Strip: stop = 9",
            ),
            ("/decoder", json!({ "type": "BPEDecoder", "suffix": "" }), "decoder BPEDecoder is not supported"),
            ("/model/type", json!("Unigram"), "type Unigram; these can be read"),
            (
                "/model/merges",
                json!([["ab", "ab"]]),
                "merge 1 of its model makes Some(\"abab\"), which is not one of its tokens",
            ),
            ("/model/merges", json!(["ab"]), "merge 1 of its model makes None"),
            ("/model/continuing_subword_prefix", json!("##"), "continuing_subword_prefix"),
            ("/model/dropout", json!(0.5), "dropout"),
            ("/model/max_input_chars_per_word", json!(100_000), "max_input_chars_per_word = 100000"),
            ("/model/vocab", json!({ "a": 4_294_967_295u32 }), "the id 4294967295"),
            ("/model/vocab", json!({ "x".repeat(2000): 0 }), "token 0 has 2000 bytes"),
            ("/added_tokens", added(4_294_967_295, "a"), "the id 4294967295"),
            ("/added_tokens", added(0, "  "), "consists of spaces"),
        ] {
            let mut changed = described();
            let (parent, key) = path.rsplit_once('/').unwrap();
            changed.pointer_mut(parent).unwrap()[key] = value;
            let error = format!("{:#}", check(changed.to_string().as_bytes()).expect_err(path));
            assert!(error.contains(words), "{path}: {error}");
        }
    }
}
