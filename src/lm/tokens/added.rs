//! Added tokens that a model's other files have besides those of `tokenizer.json`, as `transformers` 5 adds them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;
use tokenizers::AddedToken;

use super::optional_json;
use crate::lm::validate;

/// Keys of `tokenizer_config.json` that name one special token each.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Adds tokens to `tokenizer` that `tokenizer.json` does not list: the tokens of `added_tokens_decoder` in `config` (the
/// content of `tokenizer_config.json`), or else those of `added_tokens.json` in `dir`; special tokens that the vocabulary
/// has; and `extra_special_tokens`, or else `additional_special_tokens`. A token that the vocabulary lacks gets the next
/// free id.
///
/// # Errors
/// If the tokenizer cannot use a token; the error names it.
pub(super) fn add(tokenizer: &mut tokenizers::Tokenizer, config: &Value, dir: &Path) -> Result<()> {
    let mut tokens = decoder(config, dir)?;
    let mut listed: Vec<String> =
        tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    listed.extend(tokens.iter().map(|token| token.content.clone()));
    let in_vocabulary = |token: &AddedToken| tokenizer.token_to_id(&token.content).is_some();
    let named = NAMED.iter().filter_map(|name| described(&config[*name], true)).filter(in_vocabulary);
    let extra = match &config["extra_special_tokens"] {
        Value::Null => &config["additional_special_tokens"],
        given => given,
    };
    let extra: Vec<&Value> = match extra {
        Value::Array(list) => list.iter().collect(),
        Value::Object(by_name) => by_name.values().collect(),
        _ => Vec::new(),
    };
    let special: Vec<AddedToken> = named.chain(extra.into_iter().filter_map(|token| described(token, true))).collect();
    for token in special {
        if !listed.contains(&token.content) {
            listed.push(token.content.clone());
            tokens.push(token);
        }
    }
    for token in &tokens {
        validate::tokenizer::check_added(&token.content, token.lstrip)
            .with_context(|| format!("an added token of {} cannot be used", dir.display()))?;
    }
    tokenizer
        .add_tokens(tokens)
        .map_err(|error| anyhow!("the added tokens of {} cannot be used: {error}", dir.display()))?;
    Ok(())
}

/// Returns the tokens of `added_tokens_decoder`, or of `added_tokens.json`, in the order of their ids.
fn decoder(config: &Value, dir: &Path) -> Result<Vec<AddedToken>> {
    let mut by_id: BTreeMap<u64, AddedToken> = BTreeMap::new();
    if let Value::Object(decoder) = &config["added_tokens_decoder"] {
        for (id, token) in decoder {
            let id = id.parse().with_context(|| {
                format!(
                    "added_tokens_decoder in {} has the key {id:?}, which is not a token id",
                    dir.join("tokenizer_config.json").display()
                )
            })?;
            by_id.extend(described(token, false).map(|token| (id, token)));
        }
    } else if let Value::Object(ids) = optional_json(&dir.join("added_tokens.json"))? {
        let is_special = |content: &str| {
            NAMED.iter().any(|name| described(&config[*name], true).is_some_and(|token| token.content == content))
        };
        for (content, id) in ids {
            let special = is_special(&content);
            by_id.insert(id.as_u64().unwrap_or(u64::MAX), AddedToken::from(content, special));
        }
    }
    Ok(by_id.into_values().collect())
}

/// Returns the token that a value of `tokenizer_config.json` describes: a text, or an object with its content and flags.
fn described(value: &Value, special: bool) -> Option<AddedToken> {
    let flag = |name: &str, absent: bool| value[name].as_bool().unwrap_or(absent);
    match value {
        Value::String(content) => Some(AddedToken::from(content.as_str(), special)),
        Value::Object(_) => {
            let special = special || flag("special", false);
            let token = AddedToken::from(value["content"].as_str()?, special)
                .single_word(flag("single_word", false))
                .lstrip(flag("lstrip", false))
                .rstrip(flag("rstrip", false))
                .normalized(flag("normalized", !special));
            Some(token)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::Tokenizer;

    /// The expected ids are those of `transformers` 5.24 (`PreTrainedTokenizerFast`) for the same files.
    #[test]
    fn tokens_of_other_files_than_tokenizer_json_are_recognized() {
        let vocab: serde_json::Map<_, _> = ["a", "b", "<", ">", "x", "<x>"]
            .iter()
            .enumerate()
            .map(|(id, token)| ((*token).to_owned(), json!(id)))
            .collect();
        let description = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [] },
        });
        let flags = json!({ "content": "<x>", "special": true, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false });
        let nothing = json!(null);
        for (config, added, expected) in [
            (json!({}), &nothing, vec![0, 2, 4, 3, 1]),
            (json!({ "added_tokens_decoder": { "5": flags } }), &nothing, vec![0, 5, 1]),
            (json!({ "additional_special_tokens": ["<x>"] }), &nothing, vec![0, 5, 1]),
            (json!({ "extra_special_tokens": { "sys_token": "<x>" } }), &nothing, vec![0, 5, 1]),
            (json!({ "pad_token": "<x>" }), &nothing, vec![0, 5, 1]),
            (json!({ "pad_token": { "content": "<x>", "lstrip": false } }), &nothing, vec![0, 5, 1]),
            (json!({}), &json!({ "<x>": 5 }), vec![0, 5, 1]),
            // A new token gets the next id.
            (json!({ "extra_special_tokens": ["x>"] }), &nothing, vec![0, 2, 6, 1]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let write = |name: &str, value: &serde_json::Value| {
                std::fs::write(dir.path().join(name), value.to_string()).unwrap();
            };
            write("tokenizer.json", &description);
            write("tokenizer_config.json", &config);
            if !added.is_null() {
                write("added_tokens.json", added);
            }
            let tokenizer = Tokenizer::from_directory(dir.path()).unwrap();
            assert_eq!(tokenizer.encode("a<x>b").unwrap(), expected, "{config} {added}");
            // A checkpoint's tokenizer gives the same.
            let out = tempfile::tempdir().unwrap();
            tokenizer.save(out.path()).unwrap();
            assert_eq!(Tokenizer::from_directory(out.path()).unwrap().encode("a<x>b").unwrap(), expected, "{config}");
        }
    }
}
