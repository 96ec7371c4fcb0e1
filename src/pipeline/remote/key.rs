//! A judge's API key, which goes into one header and nowhere else.

use anyhow::{Context, Result, ensure};
use axum::http::HeaderValue;
use sha2::{Digest, Sha256};

use super::wire::rewritten;

/// Shorter keys are what servers without keys are given (`EMPTY`, `none`): they are no secrets, and may be a part of
/// what a judge says.
const SECRET: usize = 8;

/// What stands where a server repeated the key.
const HIDDEN: &str = "[API key]";

/// An API key. It has no `Debug` and no `Display`, so that it cannot be printed.
pub struct Key {
    value: String,
    /// As it stands in a text, and as JSON writes it.
    spellings: Vec<String>,
}

impl Key {
    /// The secret in the environment variable `name`, which `place` in the configuration names; `url` is for whom.
    ///
    /// # Errors
    /// A variable that is not set, or that holds what no header may. Never repeats what it holds.
    pub fn from_env(name: &str, place: &str, url: &str) -> Result<Self> {
        let value = std::env::var_os(name).filter(|value| !value.is_empty()).with_context(|| {
            format!("the environment variable {name} ({place}) is not set; it must hold the API key of {url}")
        })?;
        let value = value.into_string().unwrap_or_default();
        ensure!(
            !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic()),
            "the environment variable {name} ({place}) holds a space, a line's end or another character that no API key has; set it to the key alone"
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

    /// The value of an `Authorization` header with the key as a bearer token. Libraries do not print it.
    pub(super) fn bearer(&self) -> Result<HeaderValue> {
        sensitive(&format!("Bearer {}", self.value))
    }

    /// The value of a header that is the secret itself. Libraries do not print it.
    pub(super) fn plain(&self) -> Result<HeaderValue> {
        sensitive(&self.value)
    }

    /// The SHA-256 of the key.
    pub(super) fn digest(&self) -> Vec<u8> {
        Sha256::digest(self.value.as_bytes()).to_vec()
    }

    /// What a server sent, without the key where it repeats it: error texts do, and they end in logs and samples.
    pub(super) fn hide(&self, body: Vec<u8>) -> Vec<u8> {
        let body = self.replace(body);
        // What is spelled with escapes is plain text once it is read.
        match rewritten(&body) {
            Some(plain) => {
                let hidden = self.replace(plain.clone());
                if hidden == plain { body } else { hidden }
            }
            None => body,
        }
    }

    /// Whether `text` contains the key, in whatever case: an address has its host in lower case.
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
    fn a_key_is_hidden_however_it_is_spelled() {
        assert_eq!(hide("sk-0123456789", "no sk-0123456789, sk-0123456789"), "no [API key], [API key]");
        assert_eq!(hide("sk-0123456789", r#"{"a": "\u0073k-0123456789"}"#), r#"{"a":"[API key]"}"#);
        assert_eq!(hide("sk-\"01234567", r#"{"a": "sk-\"01234567"}"#), r#"{"a": "[API key]"}"#);
        let kept = r#"{"a": "\u00e9", "b": 1.50}"#;
        assert_eq!(hide("sk-0123456789", kept), kept, "what has no key in it stays as it was");
    }

    #[test]
    fn what_is_no_secret_is_left_alone() {
        assert_eq!(hide("EMPTY", "EMPTY"), "EMPTY");
        assert_eq!(hide("1", "{\"text\": \"1\"}"), "{\"text\": \"1\"}");
    }
}
