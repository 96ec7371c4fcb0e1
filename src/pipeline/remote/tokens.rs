//! The text of a token, in the spellings that servers send.

use serde_json::Value;

/// The text of a token that is given by its spelling and, where the server sends them, its bytes, which are exact.
pub fn text(token: &Value, bytes: &Value) -> Option<String> {
    let spelled = token.as_str().map(plain);
    let bytes = bytes.as_array().filter(|bytes| !bytes.is_empty());
    let bytes: Option<Vec<u8>> = bytes
        .and_then(|bytes| bytes.iter().map(|byte| byte.as_u64().and_then(|byte| u8::try_from(byte).ok())).collect());
    // A part of a character is not a text; its spelling is as good as any.
    bytes.and_then(|bytes| String::from_utf8(bytes).ok()).or(spelled)
}

/// The text of a token in the spelling of a vocabulary: byte-level BPE writes a space as `Ġ` and a line feed as `Ċ`,
/// SentencePiece a space as `▁` and a byte as `<0x31>`.
pub fn plain(token: &str) -> String {
    let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(u8::is_ascii) {
        return char::from(byte).to_string();
    }
    token.replace(['Ġ', '▁'], " ").replace('Ċ', "\n")
}

/// Whether the server sends numbers of tokens instead of their texts (vLLM's `--return-tokens-as-token-ids`).
pub fn is_number(token: &str) -> bool {
    token.strip_prefix("token_id:").is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_token_is_read_in_the_spelling_of_any_vocabulary() {
        for (token, expected) in [
            ("Ġ1", " 1"),
            ("▁1", " 1"),
            ("▁▁", "  "),
            ("Ċ", "\n"),
            ("<0x31>", "1"),
            ("<0x0A>", "\n"),
            ("1", "1"),
            ("<0xE2>", "<0xE2>"),
            ("<think>", "<think>"),
        ] {
            assert_eq!(plain(token), expected, "{token}");
        }
        for (token, bytes, expected) in [
            (json!("\u{fffd}"), json!([32, 49]), Some(" 1")),
            (json!("Ġ1"), json!([32, 49]), Some(" 1")),
            (json!("Ġ1"), json!(null), Some(" 1")),
            (json!("Ġ1"), json!([]), Some(" 1")),
            (json!("x"), json!([226]), Some("x")),
            (json!("x"), json!([300]), Some("x")),
            (json!(null), json!([49]), Some("1")),
            (json!(16), json!(null), None),
        ] {
            assert_eq!(text(&token, &bytes).as_deref(), expected, "{token} {bytes}");
        }
        assert!(is_number("token_id:16") && !is_number("token_id:") && !is_number("16"));
    }
}
