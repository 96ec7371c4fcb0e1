//! A single HTTP exchange with a server: address, headers, proxy, and the outcome by status and body.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri};
use hyper_util::client::proxy::matcher::Matcher;
use sha2::{Digest, Sha256};

use super::abilities::{Abilities, FieldRefusal, names_extra};
use super::answer::{Answer, ReadError, read};
use super::key::Key;
use super::lenient;
use super::retry::{ExchangeOutcome, retry_after};
use super::wire::{Request, excerpt, reports_quota, sentence};
use crate::config::{RemoteApi, RemoteJudge};
use crate::util::endpoint::Endpoint;
use crate::util::http;
use crate::util::mutex::lock;

/// Maximum number of bytes that are read of an error response's body.
const MAX_ERROR_BODY: usize = 16 << 10;

/// HTTP client of one judge server, with its address, headers and secrets.
pub struct Transport {
    http: reqwest::Client,
    endpoint: Mutex<Endpoint>,
    /// True if the address was configured without a version and `/v1` was appended.
    versioned: Mutex<bool>,
    headers: HeaderMap,
    query: Vec<(String, String)>,
    /// The API key and other secrets, which are removed from everything that the server sends.
    secrets: Vec<Key>,
    /// Proxy of the requests, for error messages.
    proxy: Option<String>,
}

impl Transport {
    /// Prepares requests to `judge`. Nothing is sent yet.
    ///
    /// # Errors
    /// If an environment variable has no value, an address is invalid, certificates cannot be read, or TLS cannot be
    /// set up.
    pub fn new(judge: &RemoteJudge) -> Result<Self> {
        let (mut headers, mut secrets) = (HeaderMap::new(), Vec::new());
        if let Some(name) = &judge.api_key_env {
            let key = Key::from_env(name, "labeler.remote.api_key_env", &judge.url)?;
            headers.insert("authorization", key.bearer()?);
            secrets.push(key);
        }
        for (name, value) in &judge.headers {
            let place = format!("labeler.remote.headers.{name}");
            let name: HeaderName = name.parse().with_context(|| format!("{place} is not a valid name of a header"))?;
            let value = match value.strip_prefix("env:") {
                Some(variable) => {
                    let key = Key::from_env(variable, &place, &judge.url)?;
                    let value = key.plain()?;
                    secrets.push(key);
                    value
                }
                None => {
                    HeaderValue::from_str(value).with_context(|| format!("{place} is not a valid value of a header"))?
                }
            };
            headers.insert(name, value);
        }
        let endpoint = Endpoint::parse(&judge.url).map_err(|why| anyhow!("labeler.remote.url: {why}"))?;
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        // A redirect would send the question, and after a second one the key, to an address that is not configured.
        let mut builder = http::builder()
            .connect_timeout(Duration::from_secs_f64(judge.connect_timeout_s))
            .timeout(Duration::from_secs_f64(judge.timeout_s))
            .pool_max_idle_per_host(judge.concurrency);
        if let Some(path) = &judge.ca_file {
            let place = || format!("labeler.remote.ca_file: {} has no certificates in PEM", path.display());
            let pem = crate::util::read_bounded::text(path, 16 << 20)
                .with_context(|| format!("labeler.remote.ca_file: cannot read {}", path.display()))?;
            let certificates = reqwest::Certificate::from_pem_bundle(pem.as_bytes()).with_context(place)?;
            anyhow::ensure!(!certificates.is_empty(), place());
            builder = certificates.into_iter().fold(builder, reqwest::ClientBuilder::add_root_certificate);
        }
        let proxy = match judge.proxy.as_deref() {
            Some("none") => {
                builder = builder.no_proxy();
                None
            }
            Some(proxy) => {
                builder = builder.proxy(reqwest::Proxy::all(proxy).context("labeler.remote.proxy is not an address")?);
                Some(proxy.to_owned())
            }
            None => proxy_of_the_environment(&endpoint.join("")),
        };
        let http = builder.build().context("cannot set up HTTP for remote judges")?;
        let query = endpoint.query.iter().cloned().chain(judge.query.clone()).collect();
        Ok(Self { http, endpoint: Mutex::new(endpoint), versioned: Mutex::new(false), headers, query, secrets, proxy })
    }

    /// Returns an identifier of the server and the key together, in hexadecimal digits. It does not contain the key,
    /// and the key cannot be computed from it.
    pub fn account(&self) -> String {
        let endpoint = self.endpoint();
        let mut parts = vec![endpoint.origin().as_bytes().to_vec()];
        let mut secrets: Vec<_> = self.secrets.iter().map(Key::digest).collect();
        if secrets.is_empty() {
            // The key may be in the query.
            secrets = self.query.iter().map(|(name, value)| format!("{name}={value}").into_bytes()).collect();
        }
        secrets.sort();
        parts.extend(secrets);
        let lengths_and_parts =
            parts.iter().flat_map(|part| [(part.len() as u64).to_le_bytes().to_vec(), part.clone()]);
        let digest = Sha256::digest(lengths_and_parts.flatten().collect::<Vec<_>>());
        digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Returns the address of requests for error messages: without the query, which may hold a key, and with the proxy,
    /// if any.
    pub fn address(&self, judge: &RemoteJudge) -> String {
        let address = self.endpoint().join(path(judge));
        let also = if *lock(&self.versioned) { " (and without /v1)" } else { "" };
        match &self.proxy {
            Some(proxy) => format!("{address}{also} (through the proxy {proxy})"),
            None => format!("{address}{also}"),
        }
    }

    /// Appends `/v1` to an address without a version. Returns whether that changed it.
    pub fn add_version(&self) -> bool {
        let mut endpoint = lock(&self.endpoint);
        let Some(versioned) = endpoint.versioned() else { return false };
        *endpoint = versioned;
        *lock(&self.versioned) = true;
        true
    }

    fn endpoint(&self) -> Endpoint {
        lock(&self.endpoint).clone()
    }

    /// Sends one request and returns the parsed answer.
    ///
    /// # Errors
    /// The reason why there is no answer.
    pub async fn post(
        &self,
        judge: &RemoteJudge,
        abilities: &Abilities,
        request: &Request,
    ) -> Result<Answer, ExchangeOutcome> {
        let (path, body) = request.body(judge, abilities);
        let post = self.http.post(self.endpoint().join(path)).query(&self.query).headers(self.headers.clone());
        let mut response = post.body(body.to_string()).send().await.map_err(|error| broken(&error))?;
        let status = response.status().as_u16();
        if (300..400).contains(&status) {
            let is_secret = |text: &str| self.secrets.iter().any(|key| key.is_in(text));
            return Err(ExchangeOutcome::Refused(status, http::redirect_target(&response, is_secret)));
        }
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let wait = retry_after(header("retry-after"), header("retry-after-ms"), SystemTime::now());
        let fine = (200..300).contains(&status);
        let most = if fine { judge.max_response_bytes } else { MAX_ERROR_BODY };
        let mut bytes = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
                Ok(None) => break,
                Err(error) if error.is_timeout() => return Err(ExchangeOutcome::Timeout),
                // The outcome of an error response is known from its status.
                Err(_) if !fine => break,
                Err(error) => {
                    let words = format!(
                        "the connection was closed after {} bytes of the body: {}",
                        bytes.len(),
                        innermost(&error)
                    );
                    return Err(ExchangeOutcome::BrokeOff(words));
                }
            }
            if bytes.len() > most {
                if fine {
                    return Err(ExchangeOutcome::Malformed(format!("the body has more than {most} bytes")));
                }
                break;
            }
        }
        let bytes = lenient::unpacked(bytes, most)
            .or_else(|why| if fine { Err(ExchangeOutcome::Malformed(why)) } else { Ok(Vec::new()) })?;
        let bytes = self.secrets.iter().fold(bytes, |bytes, key| key.hide(bytes));
        if fine {
            return read(&bytes, request).map_err(|error| match error {
                ReadError::Malformed(why) => ExchangeOutcome::Malformed(why),
                ReadError::Filtered(why) => ExchangeOutcome::Filtered(why),
                ReadError::Failed(status, why) => ExchangeOutcome::of_status(status, wait, why, status == 402),
            });
        }
        let mut message = sentence(&bytes);
        if let Some(refusal) = FieldRefusal::find(status, &bytes, &body) {
            return Err(ExchangeOutcome::Field(status, message, refusal));
        }
        if let Some(field) = names_extra(&bytes, &judge.extra_body) {
            message += &format!("; {field} is in labeler.remote.extra_body");
        }
        Err(ExchangeOutcome::of_status(status, wait, message, reports_quota(&bytes)))
    }
}

/// Returns the endpoint's path below the address.
fn path(judge: &RemoteJudge) -> &'static str {
    if judge.api == RemoteApi::Completions { "completions" } else { "chat/completions" }
}

/// Returns the proxy that the environment sets for an address, without user name and password.
fn proxy_of_the_environment(address: &str) -> Option<String> {
    let intercept = Matcher::from_env().intercept(&address.parse::<Uri>().ok()?)?;
    let uri = intercept.uri();
    let host = uri.authority().map_or("", |authority| authority.as_str().rsplit('@').next().unwrap_or_default());
    Some(format!(
        "{}://{host}, from the environment; set labeler.remote.proxy = \"none\" to bypass it",
        uri.scheme_str().unwrap_or("http")
    ))
}

/// Returns whether the connection was closed before any response, as servers do with idle connections.
fn was_closed(error: &reqwest::Error) -> bool {
    if error.is_timeout() || error.is_connect() {
        return false;
    }
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        let io = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        if matches!(io, Some(BrokenPipe | ConnectionAborted | ConnectionReset))
            || error.to_string().contains("connection closed before message completed")
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Returns the innermost cause, which is the most specific; the outer ones repeat the address.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    excerpt(&cause.to_string())
}

fn broken(error: &reqwest::Error) -> ExchangeOutcome {
    match error {
        _ if error.is_timeout() => ExchangeOutcome::Timeout,
        _ if was_closed(error) => ExchangeOutcome::Closed(innermost(error)),
        _ => ExchangeOutcome::Connection(innermost(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_one_server_and_one_key_regardless_of_the_path() {
        let account = |url: &str, key: Option<&str>| {
            let mut transport = Transport::new(&RemoteJudge { url: url.into(), ..RemoteJudge::default() }).unwrap();
            transport.secrets.extend(key.map(|key| Key::new(key.into())));
            transport.account()
        };
        let one = account("http://h/v1", Some("sk-0123456789"));
        assert_eq!(one, account("http://H:80/other/chat/completions?a=b", Some("sk-0123456789")));
        assert!(one.len() == 32 && one.chars().all(|c| c.is_ascii_hexdigit()), "{one}");
        for (url, key) in [
            ("http://h/v1", None),
            ("http://h/v1", Some("sk-0123456780")),
            ("http://h:81/v1", Some("sk-0123456789")),
            ("https://h/v1", Some("sk-0123456789")),
        ] {
            assert_ne!(one, account(url, key), "{url}");
        }
        assert_ne!(account("http://h/v1?key=a", None), account("http://h/v1?key=b", None));
    }
}
