//! HTTP exchanges with inference servers, and the classes of their failures.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use axum::http::{HeaderMap, HeaderValue};
use serde_json::Value;

use crate::pipeline::remote::key::Key;
use crate::util::endpoint::Endpoint;
use crate::util::http;

/// Maximum number of bytes of an answer.
const MAX_BODY: usize = 256 << 20;

/// Failure of an exchange with a server.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum Fault {
    /// The server cannot be reached, closed the connection, did not answer in time, or reports an internal error.
    #[error("{0}")]
    Down(String),
    /// The server does not know the model or adapter that was named, so it has lost or removed it.
    #[error("{0}")]
    Lost(String),
    /// The server refuses the request; it would refuse a repetition too.
    #[error("{0}")]
    Refused(String),
    /// The answer breaks the protocol, or cannot be trained on.
    #[error("{0}")]
    Invalid(String),
}

/// HTTP client of one server.
pub(super) struct Http {
    client: reqwest::Client,
    base: String,
    headers: HeaderMap,
    key: Option<Key>,
}

impl Http {
    /// Prepares requests to the server at `url`, with the API key from the environment variable `key_env`.
    ///
    /// # Errors
    /// If the URL is invalid, the variable has no value, or TLS cannot be set up.
    pub(super) fn new(url: &str, key_env: Option<&str>) -> Result<Self> {
        let endpoint = Endpoint::parse(url).map_err(|why| anyhow!("the address of a rollout server: {why}"))?;
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        let key = key_env.map(|name| Key::from_env(name, "the setting api_key_env", url)).transpose()?;
        if let Some(key) = &key {
            headers.insert("authorization", key.bearer()?);
        }
        let client = http::builder().connect_timeout(Duration::from_secs(10)).build().context("cannot set up HTTP")?;
        Ok(Self { client, base: endpoint.origin().to_owned(), headers, key })
    }

    /// Returns scheme, host and port of the server.
    pub(super) fn origin(&self) -> &str {
        &self.base
    }

    /// Sends a GET request for `path`, such as `/health`, and returns the JSON answer, or null for an empty body.
    pub(super) async fn get(&self, path: &str, timeout: Duration) -> Result<Value, Fault> {
        self.exchange(self.client.get(format!("{}{path}", self.base)), path, timeout).await
    }

    /// Sends a POST request with the JSON `body`, and returns the JSON answer. A body that is not JSON becomes a string.
    pub(super) async fn post(&self, path: &str, body: &Value, timeout: Duration) -> Result<Value, Fault> {
        let request = self.client.post(format!("{}{path}", self.base)).body(body.to_string());
        self.exchange(request, path, timeout).await
    }

    async fn exchange(&self, request: reqwest::RequestBuilder, path: &str, timeout: Duration) -> Result<Value, Fault> {
        let down = |error: reqwest::Error| {
            let why = match error.is_timeout() {
                true => format!("no answer within {:.0} s", timeout.as_secs_f64()),
                false => innermost(&error),
            };
            Fault::Down(format!("{path}: {why}"))
        };
        let response = request.headers(self.headers.clone()).timeout(timeout).send().await.map_err(down)?;
        let status = response.status().as_u16();
        let bytes = http::body(response, MAX_BODY).await.map_err(|error| Fault::Down(format!("{path}: {error:#}")))?;
        let bytes = self.key.iter().fold(bytes, |bytes, key| key.hide(bytes));
        if (200..300).contains(&status) {
            if bytes.is_empty() {
                return Ok(Value::Null);
            }
            // Servers answer some administrative requests with plain text. JSON has no NaN, so it is refused here.
            return match serde_json::from_slice(&bytes) {
                Ok(value) => Ok(value),
                Err(error) if bytes.starts_with(b"{") || bytes.starts_with(b"[") => {
                    Err(Fault::Invalid(format!("{path}: the answer is not valid JSON: {error}")))
                }
                Err(_) => Ok(Value::String(String::from_utf8_lossy(&bytes).into_owned())),
            };
        }
        let words = format!("{path}: status {status}: {}", message(&bytes));
        Err(match status {
            404 => Fault::Lost(words),
            408 | 425 | 429 | 500.. => Fault::Down(words),
            _ => Fault::Refused(words),
        })
    }
}

/// Returns the message of an error answer, in one line of limited length.
fn message(bytes: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(bytes) {
        Ok(value) => {
            let inner = [&value["error"]["message"], &value["error"], &value["message"], &value["detail"]];
            inner.into_iter().find_map(|text| text.as_str().map(str::to_owned)).unwrap_or_else(|| value.to_string())
        }
        Err(_) => String::from_utf8_lossy(bytes).into_owned(),
    };
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// Returns the innermost cause of an error, which names what failed without the URL.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
