//! The places from which a worker fetches weights: object stores and HTTP servers, both with ranges.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use axum::http::{StatusCode, header};
use futures_util::StreamExt;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};
use reqwest::Response;
use url::Url;

use super::StoreToken;
use crate::config::WeightsPlace;
use crate::util::bucket;
use crate::util::{disk, http};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for the next bytes of a response.
const SILENCE: Duration = Duration::from_secs(30);
/// Size in bytes of the ranges in which an object is requested, so that an interruption on a slow link costs little.
const RANGE_BYTES: usize = 1 << 20;
/// Number of ranges of an object that are requested concurrently.
const CONCURRENT_RANGES: usize = 8;

/// Failure of a download.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    pub(super) why: anyhow::Error,
}

/// Kind of a failure, which decides what is tried next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// The same download may succeed later, from where it stopped.
    Interrupted,
    /// The file is missing, or its content is not the announced one.
    Unusable,
    /// The server refuses this worker until a person acts.
    Refused,
}

impl Failure {
    pub(super) fn new(kind: FailureKind, why: anyhow::Error) -> Self {
        Self { kind, why }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(FailureKind::Interrupted, error)
    }
}

/// A place of weights.
pub(super) enum Origin {
    /// Folder on an HTTP server.
    Http { client: reqwest::Client, base: Url, token: Option<StoreToken> },
    /// Folder in an object store.
    Objects { store: Arc<dyn ObjectStore>, prefix: Key, url: String },
}

impl Origin {
    /// Opens a place. Nothing is requested yet.
    ///
    /// # Errors
    /// If the URL cannot be used.
    pub(super) fn open(place: &WeightsPlace, token: Option<StoreToken>) -> Result<Self> {
        match place {
            WeightsPlace::Folder(folder) => bail!("internal error: {} is not fetched", folder.display()),
            WeightsPlace::Bucket(url) => {
                let (store, prefix) = bucket::open(url, "--store")?;
                Ok(Self::Objects { store, prefix, url: url.clone() })
            }
            WeightsPlace::Http(base) => {
                let client = http::builder().connect_timeout(CONNECT).read_timeout(SILENCE).build();
                Ok(Self::Http { client: client.context("cannot set up HTTP")?, base: base.clone(), token })
            }
        }
    }

    /// Returns the content of the small file `file` of the folder `name`, of at most `most` bytes.
    pub(super) async fn read(&self, name: &str, file: &str, most: usize) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Http { .. } => Ok(http::body(self.get(name, file, 0).await?, most).await?),
            Self::Objects { store, prefix, .. } => {
                let found =
                    store.get(&prefix.clone().join(name).join(file)).await.map_err(|error| self.failed(error))?;
                if found.meta.size > most as u64 {
                    return Err(Failure::new(FailureKind::Unusable, anyhow!("{file} has more than {most} bytes")));
                }
                Ok(found.bytes().await.map_err(|error| self.failed(error))?.to_vec())
            }
        }
    }

    /// Fetches the file `file` of the folder `name` to the path `to`, from where an earlier download stopped. `received` is
    /// called with the number of bytes of each part. What was received before a failure stays in the file.
    pub(super) async fn append(
        &self,
        name: &str,
        file: &str,
        to: &Path,
        received: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Failure> {
        let cannot = |error| disk::cannot("write", to, error);
        let mut out = OpenOptions::new().create(true).append(true).open(to).map_err(cannot)?;
        let have = out.metadata().map_err(cannot)?.len();
        match self {
            Self::Http { .. } => {
                let mut response = self.get(name, file, have).await?;
                match response.status() {
                    // There is nothing after what was received. The checksum decides whether that is the file.
                    StatusCode::RANGE_NOT_SATISFIABLE => return Ok(()),
                    StatusCode::PARTIAL_CONTENT if starts_at(&response, have) => {}
                    // The server does not send ranges.
                    StatusCode::OK => out.set_len(0).map_err(cannot)?,
                    status => {
                        out.set_len(0).map_err(cannot)?;
                        return Err(anyhow!(
                            "{self} answers a request for the bytes of {file} from {have} on with others ({status})"
                        )
                        .into());
                    }
                }
                while let Some(chunk) = response
                    .chunk()
                    .await
                    .map_err(reqwest::Error::without_url)
                    .with_context(|| format!("the download of {name}/{file} from {self} was interrupted"))?
                {
                    write(&mut out, to, &chunk)?;
                    received(chunk.len() as u64);
                }
            }
            Self::Objects { store, prefix, .. } => {
                let key = prefix.clone().join(name).join(file);
                let size = store.head(&key).await.map_err(|error| self.failed(error))?.size;
                let have = if have > size { 0 } else { have };
                out.set_len(have).map_err(cannot)?;
                let fetch = |start: u64| {
                    let (key, end) = (&key, size.min(start + RANGE_BYTES as u64));
                    async move {
                        let options =
                            GetOptions { range: Some(GetRange::Bounded(start..end)), ..GetOptions::default() };
                        let mut from = store.get_opts(key, options).await?.into_stream();
                        let mut bytes = Vec::new();
                        while let Some(chunk) = from.next().await {
                            let chunk = chunk?;
                            received(chunk.len() as u64);
                            bytes.extend_from_slice(&chunk);
                        }
                        Ok(bytes)
                    }
                };
                let ranges = (have..size).step_by(RANGE_BYTES).map(fetch);
                let mut parts = futures_util::stream::iter(ranges).buffered(CONCURRENT_RANGES);
                while let Some(part) = parts.next().await {
                    write(&mut out, to, &part.map_err(|error| self.failed(error))?)?;
                }
            }
        }
        out.sync_all().map_err(cannot)?;
        Ok(())
    }

    /// Requests a file of an HTTP server from byte `from` on. The response is one of success, or says that there is nothing
    /// from that byte on.
    async fn get(&self, name: &str, file: &str, from: u64) -> Result<Response, Failure> {
        let Self::Http { client, base, token } = self else {
            return Err(anyhow!("internal error: {self} is not an HTTP server").into());
        };
        let mut url = base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend([name, file]);
        }
        let mut request = client.get(url);
        if let Some(StoreToken(token)) = token {
            request = request.bearer_auth(token);
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let response = request
            .send()
            .await
            .map_err(reqwest::Error::without_url)
            .with_context(|| format!("{self} does not answer"))?;
        let refused = |why: String| Err(Failure::new(FailureKind::Refused, anyhow!(why)));
        match response.status() {
            StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => Ok(response),
            StatusCode::UNAUTHORIZED if token.is_none() => {
                refused(format!("{self} requires a bearer token; name its environment variable with --token-env"))
            }
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                refused(format!("{self} refuses this worker ({status}); correct the token of --token-env"))
            }
            StatusCode::MISDIRECTED_REQUEST => refused(format!(
                "{self} does not accept that host name; use its IP address, or add the name to serve.hosts of the run"
            )),
            status if status.is_redirection() => {
                let secret = token.as_ref().map(|StoreToken(token)| token.to_ascii_lowercase()).unwrap_or_default();
                let is_secret = |text: &str| !secret.is_empty() && text.to_ascii_lowercase().contains(&secret);
                let target = http::redirect_target(&response, is_secret);
                refused(format!(
                    "{self} redirects to {target} ({status}), which is not followed; if the address is right, give it with --store"
                ))
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                let why = anyhow!("{self} does not have {name}/{file} ({})", response.status());
                Err(Failure::new(FailureKind::Unusable, why))
            }
            status if status.is_success() => Ok(response),
            status => Err(anyhow!("{self} answers {status} for {name}/{file}").into()),
        }
    }

    fn failed(&self, error: object_store::Error) -> Failure {
        use object_store::Error::{NotFound, PermissionDenied, Unauthenticated};
        let kind = match &error {
            NotFound { .. } => FailureKind::Unusable,
            PermissionDenied { .. } | Unauthenticated { .. } => FailureKind::Refused,
            _ => FailureKind::Interrupted,
        };
        let remedy = if kind == FailureKind::Refused { "; correct the credentials in the environment" } else { "" };
        Failure::new(kind, anyhow!("{self}: {}{remedy}", bucket::flat_error(error)))
    }
}

impl std::fmt::Display for Origin {
    /// Writes the address without secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Http { base, .. } => f.write_str(&http::shown(base, |_| false)),
            Self::Objects { url, .. } => f.write_str(url),
        }
    }
}

fn write(out: &mut File, to: &Path, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|error| disk::cannot("write", to, error))
}

/// Returns whether the body of `response` is the range of a file that begins at byte `from`.
fn starts_at(response: &Response, from: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.parse::<u64>().ok());
    start == Some(from)
}
