//! Texts of tokens, in the spellings that servers send.

use serde_json::Value;

/// Returns the text of a token, from its bytes if the server sends them, which are exact, or else from its spelling.
pub fn text(token: &Value, bytes: &Value) -> Option<String> {
    let spelled = token.as_str().map(plain);
    let bytes = bytes.as_array().filter(|bytes| !bytes.is_empty());
    let bytes: Option<Vec<u8>> = bytes
        .and_then(|bytes| bytes.iter().map(|byte| byte.as_u64().and_then(|byte| u8::try_from(byte).ok())).collect());
    // The bytes may be an incomplete character, which is not a text; then the spelling is used.
    bytes.and_then(|bytes| String::from_utf8(bytes).ok()).or(spelled)
}

/// Returns the text of a token spelled as in a vocabulary: byte-level BPE writes a space as `Ġ` and a line feed as `Ċ`,
/// SentencePiece writes a space as `▁` and a byte as `<0x31>`.
pub fn plain(token: &str) -> String {
    let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(u8::is_ascii) {
        return char::from(byte).to_string();
    }
    token.replace(['Ġ', '▁'], " ").replace('Ċ', "\n")
}

/// Returns whether the server sends token numbers instead of texts (vLLM's `--return-tokens-as-token-ids`).
pub fn is_number(token: &str) -> bool {
    token.strip_prefix("token_id:").is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_are_read_in_the_spellings_of_all_vocabularies() {
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
