//! The bearer token that guards a node's endpoints.

use anyhow::{Context, Result, ensure};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};

use crate::config::Serve;

/// Minimum number of characters of a token, because shorter ones can be guessed.
const MIN_LENGTH: usize = 16;

/// The bearer token that requests must carry. Only its SHA-256 hash is kept, and the type has no `Debug`.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// Reads the token from the environment variable that `serve.token_env` names. Returns `None` if the server is
    /// disabled or no variable is named.
    ///
    /// # Errors
    /// If the variable is not set, or its value is too short or not allowed in a header. The error never contains the
    /// token.
    pub fn from_env(serve: &Serve) -> Result<Option<Self>> {
        let Some(name) = serve.token_env.as_ref().filter(|_| serve.enabled) else { return Ok(None) };
        let value = std::env::var_os(name).filter(|value| !value.is_empty()).with_context(|| {
            format!("the environment variable {name} (serve.token_env) is not set; it must hold the bearer token of this node's endpoints, for example the output of `openssl rand -hex 32`")
        })?;
        let token = value.to_str().filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()));
        let token = token.with_context(|| {
            format!("the environment variable {name} (serve.token_env) holds spaces or other characters that are not allowed in a bearer token; use letters and digits")
        })?;
        ensure!(
            token.len() >= MIN_LENGTH,
            "the environment variable {name} (serve.token_env) holds a token of {} characters, but at least {MIN_LENGTH} are required; `openssl rand -hex 32` generates one",
            token.len()
        );
        Ok(Some(Self::new(token)))
    }

    /// Takes the token `token`.
    pub fn new(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// Returns whether `headers` carry the token. The comparison takes constant time, on hashes.
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        let mut all = headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (all.next(), all.next()) else { return false };
        let Some((scheme, given)) = value.to_str().ok().and_then(|value| value.split_once(' ')) else { return false };
        let given = Self::new(given.trim());
        let difference = self.0.iter().zip(&given.0).fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
        scheme.eq_ignore_ascii_case("bearer") && difference == 0
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn admits(values: &[&str]) -> bool {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        Token::new("0123456789abcdef").admits(&headers)
    }

    #[test]
    fn only_the_exact_token_is_admitted() {
        assert!(admits(&["Bearer 0123456789abcdef"]));
        assert!(admits(&["bearer  0123456789abcdef"]), "the scheme's case is free, and so are spaces after it");
        for wrong in [
            &[][..],
            &["Bearer"],
            &["Bearer "],
            &["0123456789abcdef"],
            &["Basic 0123456789abcdef"],
            &["Bearer 0123456789abcde"],
            &["Bearer 0123456789abcdeF"],
            &["Bearer 0123456789abcdef0"],
            &["Bearer 0123456789abcdef", "Bearer 0123456789abcdef"],
        ] {
            assert!(!admits(wrong), "{wrong:?}");
        }
    }
}
