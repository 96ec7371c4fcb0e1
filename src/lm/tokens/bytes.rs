//! Byte-level tokens: each byte is a token, written as the printable character that GPT-2's table assigns to it.

use serde_json::{Map, Value, json};

use super::{Special, Tokenizer};

/// ChatML, without line breaks in the template.
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const SPECIAL: [&str; 3] = ["<|pad|>", "<|im_start|>", "<|im_end|>"];

/// Token that is recognised in a text before the text is split.
pub(super) struct Added {
    pub(super) id: u32,
    pub(super) content: String,
    /// True if it is omitted from decoded text.
    pub(super) special: bool,
}

pub(super) fn tokenizer() -> Tokenizer {
    let mut vocab: Map<String, Value> =
        (0..=255u8).map(|byte| (character(byte).to_string(), json!(u32::from(byte)))).collect();
    let mut added = Vec::new();
    for (id, token) in (256..).zip(SPECIAL) {
        vocab.insert(token.into(), json!(id));
        added.push(Added { id, content: token.into(), special: true });
    }
    let special = Special { bos: Some(257), eos: vec![258], pad: Some(256), unk: None };
    let pre = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let description = byte_level_bpe(vocab, &[], &added, &pre);
    Tokenizer::from_json(&description, Some(TEMPLATE.to_owned()), special)
        .expect("the byte tokenizer is fixed and valid")
}

/// Returns the `tokenizer.json` of a byte-level BPE. Each merge is written `left right`.
pub(super) fn byte_level_bpe(
    vocab: Map<String, Value>,
    merges: &[String],
    added: &[Added],
    pre_tokenizer: &Value,
) -> Value {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(added),
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

/// Returns the `added_tokens` of a `tokenizer.json`.
pub(super) fn added_tokens(added: &[Added]) -> Vec<Value> {
    let one = |Added { id, content, special }: &Added| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special })
    };
    added.iter().map(one).collect()
}

/// Returns the character of a byte: printable bytes map to themselves, the others to characters from U+0100 on, in
/// order.
fn character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(0x100 + before).expect("68 characters from U+0100 up exist")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::tokens::chat::Message;

    #[test]
    fn every_byte_is_a_token() {
        let tokenizer = tokenizer();
        for text in ["Hello, world\n", "naïve façade — 12345", "\u{0}\t漢字 🎉"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>());
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
        assert_eq!(tokenizer.vocab_size(), 259);
    }

    #[test]
    fn chat_tokens_are_recognised() {
        let tokenizer = tokenizer();
        let text = tokenizer.render_chat(&[Message { role: "user".into(), content: "a".into() }], true).unwrap();
        assert_eq!(text, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(ids.iter().filter(|id| **id >= 256).count(), 3);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "user\na\nassistant\n");
    }
}
