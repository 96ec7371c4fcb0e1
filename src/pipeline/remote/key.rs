//! API keys of judges, which are sent in one header and appear nowhere else.

use anyhow::{Context, Result, ensure};
use axum::http::HeaderValue;
use sha2::{Digest, Sha256};

use super::wire::rewritten;

/// Minimum length of a key that is treated as a secret. Shorter ones are placeholders for servers without keys
/// (`EMPTY`, `none`) and may occur in a judge's answers.
const SECRET: usize = 8;

/// Replacement for a key that a server repeated.
const HIDDEN: &str = "[API key]";

/// An API key. It implements neither `Debug` nor `Display`, so that it cannot be printed.
pub struct Key {
    value: String,
    /// The key as plain text and as JSON writes it.
    spellings: Vec<String>,
}

impl Key {
    /// Reads the secret from the environment variable `name`, which the configuration key `place` names; `url` is its
    /// server.
    ///
    /// # Errors
    /// If the variable is not set, or has characters that a header cannot hold. The error never contains its value.
    pub fn from_env(name: &str, place: &str, url: &str) -> Result<Self> {
        let value = std::env::var_os(name).filter(|value| !value.is_empty()).with_context(|| {
            format!("the environment variable {name} ({place}) is not set; it must hold the API key of {url}")
        })?;
        let value = value.into_string().unwrap_or_default();
        ensure!(
            !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic()),
            "the environment variable {name} ({place}) holds a space, a line break or another character that API keys do not have; set it to the key alone"
        );
        Ok(Self::new(value))
    }

    pub(super) fn new(value: String) -> Self {
        let written = serde_json::Value::from(value.as_str()).to_string();
        let mut spellings = vec![value.clone(), written.trim_matches('"').to_owned()];
        spellings.dedup();
        if value.len() < SECRET {
            spellings.clear();
        }
        Self { value, spellings }
    }

    /// Returns the value of an `Authorization` header with the key as a bearer token, marked as sensitive so that
    /// libraries do not print it.
    pub(crate) fn bearer(&self) -> Result<HeaderValue> {
        sensitive(&format!("Bearer {}", self.value))
    }

    /// Returns the secret as a header value, marked as sensitive so that libraries do not print it.
    pub(super) fn plain(&self) -> Result<HeaderValue> {
        sensitive(&self.value)
    }

    /// Returns the SHA-256 of the key.
    pub(super) fn digest(&self) -> Vec<u8> {
        Sha256::digest(self.value.as_bytes()).to_vec()
    }

    /// Returns a server's response with the key replaced. Error messages may repeat it, and are written to logs and
    /// samples.
    pub(crate) fn hide(&self, body: Vec<u8>) -> Vec<u8> {
        let body = self.replace(body);
        // A key spelled with JSON escapes would become plain text when the body is parsed.
        match rewritten(&body) {
            Some(plain) => {
                let hidden = self.replace(plain.clone());
                if hidden == plain { body } else { hidden }
            }
            None => body,
        }
    }

    /// Returns whether `text` contains the key, ignoring case, because hosts in addresses are in lower case.
    pub(super) fn is_in(&self, text: &str) -> bool {
        let text = text.to_ascii_lowercase();
        self.spellings.iter().any(|spelling| text.contains(&spelling.to_ascii_lowercase()))
    }

    fn replace(&self, mut body: Vec<u8>) -> Vec<u8> {
        for spelling in &self.spellings {
            let spelling = spelling.as_bytes();
            if !body.windows(spelling.len()).any(|window| window == spelling) {
                continue;
            }
            let (mut out, mut rest) = (Vec::with_capacity(body.len()), body.as_slice());
            while let Some(at) = rest.windows(spelling.len()).position(|window| window == spelling) {
                out.extend_from_slice(&rest[..at]);
                out.extend_from_slice(HIDDEN.as_bytes());
                rest = &rest[at + spelling.len()..];
            }
            out.extend_from_slice(rest);
            body = out;
        }
        body
    }
}

fn sensitive(text: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text).context("a secret has a character that no header may have")?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hide(key: &str, body: &str) -> String {
        String::from_utf8(Key::new(key.into()).hide(body.as_bytes().to_vec())).unwrap()
    }

    #[test]
    fn a_key_is_hidden_in_every_spelling() {
        assert_eq!(hide("sk-0123456789", "no sk-0123456789, sk-0123456789"), "no [API key], [API key]");
        assert_eq!(hide("sk-0123456789", r#"{"a": "\u0073k-0123456789"}"#), r#"{"a":"[API key]"}"#);
        assert_eq!(hide("sk-\"01234567", r#"{"a": "sk-\"01234567"}"#), r#"{"a": "[API key]"}"#);
        let kept = r#"{"a": "\u00e9", "b": 1.50}"#;
        assert_eq!(hide("sk-0123456789", kept), kept, "a body without the key is unchanged");
    }

    #[test]
    fn short_placeholder_keys_are_not_hidden() {
        assert_eq!(hide("EMPTY", "EMPTY"), "EMPTY");
        assert_eq!(hide("1", "{\"text\": \"1\"}"), "{\"text\": \"1\"}");
    }
}
