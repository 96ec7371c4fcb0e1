//! SentencePiece vocabularies in GGUF (Llama 2, Mistral, Gemma), which have scores instead of merges.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::bytes::{Added, added_tokens};

/// Character that SentencePiece writes for a space.
const SPACE: &str = "▁";

/// Returns the `tokenizer.json` of a BPE vocabulary that merges the piece with the highest score first and falls back
/// to bytes. With `prefix`, a space is put before a text.
pub(super) fn scored_bpe(
    tokens: &[String],
    scores: &[f32],
    unknown: Option<&String>,
    added: &[Added],
    prefix: bool,
) -> Value {
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let mut normalizers = vec![spaces];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(added),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges(tokens, scores),
        },
    })
}

/// Returns every way to split a piece into two others, pieces with the highest scores first: SentencePiece merges any
/// two neighbours whose union is a piece, by its score.
fn merges<'a>(tokens: &'a [String], scores: &[f32]) -> Vec<[&'a str; 2]> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut all = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(a), Some(b)) = (ids.get(left), ids.get(right)) {
                all.push((*score, *a, *b, [left, right]));
            }
        }
    }
    all.sort_by(|(x, a, b, _), (y, c, d, _)| y.total_cmp(x).then((a, b).cmp(&(c, d))));
    all.into_iter().map(|(_, _, _, pair)| pair).collect()
}
