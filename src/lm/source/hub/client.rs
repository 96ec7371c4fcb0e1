//! HTTP requests to a hub. Redirects are followed, because hubs store large files on other servers, but the token is
//! sent only to the scheme, host and port of the hub. Header values are validated before use.

use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, LOCATION, RANGE};
use reqwest::{Response, StatusCode};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::time::timeout;
use url::Url;

use super::cache::{Kind, is_name};
use crate::lm::source::Unavailable;
use crate::util::http;
use crate::util::read_bounded;

/// Largest number of consecutive redirects.
const MAX_REDIRECTS: usize = 10;

/// Time within which a hub must accept a connection; an unreachable hub should cost only seconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns whether a server that answers with this status may answer differently later.
fn may_be_temporary(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

/// Client for one repository at one revision.
pub(super) struct Client {
    http: reqwest::Client,
    endpoint: Url,
    token: Option<String>,
    kind: Kind,
    repo: String,
    revision: String,
    /// Time that the hub may send nothing.
    patience: Duration,
}

/// Metadata of a file, requested before its download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Commit to which the revision refers.
    pub(super) commit: String,
    /// ETag, which is the name of the content.
    pub(super) etag: String,
    /// Size in bytes.
    pub(super) size: u64,
}

impl Client {
    /// Creates a client for the hub at `endpoint`. Requests carry `token` if it is given.
    ///
    /// # Errors
    /// If the endpoint is not an address, or the token contains invalid characters.
    pub(super) fn new(
        endpoint: &str,
        token: Option<String>,
        kind: Kind,
        repo: &str,
        revision: &str,
        patience: Duration,
    ) -> Result<Self> {
        let address = Url::parse(endpoint.trim_end_matches('/')).ok();
        let address = address.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let endpoint = address.with_context(|| {
            format!("HF_ENDPOINT = {endpoint:?} is not an address; write it as https://huggingface.co")
        })?;
        ensure!(
            token.as_ref().is_none_or(|token| token.bytes().all(|byte| byte.is_ascii_graphic())),
            "the hub's token (HF_TOKEN, or the file that `hf auth login` wrote) contains a space, a line break or another character that is invalid in a token"
        );
        let http = http::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("preceptor/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("the hub's client cannot be set up")?;
        Ok(Self { http, endpoint, token, kind, repo: repo.to_owned(), revision: revision.to_owned(), patience })
    }

    /// Returns the names of the files in the repository.
    ///
    /// # Errors
    /// If the hub does not answer, does not have the repository, or answers in an unknown format.
    pub(super) async fn files(&self) -> Result<Vec<String>> {
        let url = self.url(&["api", self.kind.plural()], &["revision", &self.revision], &[])?;
        let answer = timeout(self.patience.min(CONNECT_TIMEOUT), self.get(url, None)).await;
        let (answer, _) = answer
            .map_err(|_| {
                Unavailable::temporary(format!(
                    "the hub did not answer within {:?}",
                    self.patience.min(CONNECT_TIMEOUT)
                ))
            })?
            .context("the hub cannot be asked")?;
        let status = answer.status();
        // The hub gives these answers to clients that may not know whether the repository exists.
        let closed = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND);
        let hint = if closed { "; a private or gated repository needs HF_TOKEN" } else { "" };
        if may_be_temporary(status) {
            return Err(Unavailable::temporary(format!("the hub does not list it: {status}")));
        }
        ensure!(status.is_success(), "the hub does not list it: {status}{hint}");
        let body = timeout(self.patience.max(CONNECT_TIMEOUT), http::body(answer, read_bounded::DESCRIPTION as usize));
        let body = body.await.map_err(|_| self.silent())??;
        let listed: Value = serde_json::from_slice(&body).context("the hub's list of files is not JSON")?;
        let siblings = listed["siblings"].as_array().context("the hub's list of files has no siblings")?;
        Ok(siblings.iter().filter_map(|sibling| sibling["rfilename"].as_str().map(str::to_owned)).collect())
    }

    /// Requests the metadata of the file `name`.
    ///
    /// # Errors
    /// If the hub does not answer, or a header is missing or invalid.
    pub(super) async fn metadata(&self, name: &str) -> Result<Metadata> {
        let asked = self.get(self.file(name)?, Some(0..1));
        let (answer, headers) = timeout(self.patience, asked).await.map_err(|_| self.silent())??;
        // An empty file has no first byte.
        let found = answer.status().is_success() || answer.status() == StatusCode::RANGE_NOT_SATISFIABLE;
        if !found {
            return Err(self.refused(answer.status()));
        }
        let text = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        let etag = text("x-linked-etag").or_else(|| text(ETAG.as_str()));
        let etag = etag.with_context(|| format!("{} sends no ETag header", self.host()))?;
        let commit = text("x-repo-commit");
        let commit = commit.with_context(|| format!("{} sends no X-Repo-Commit header; is it a hub?", self.host()))?;
        let metadata = Metadata {
            commit: self.checked("X-Repo-Commit", commit.trim())?,
            etag: self.checked("ETag", etag.trim().trim_start_matches("W/").trim_matches('"'))?,
            size: size(&answer).with_context(|| format!("{} does not report the size of {name}", self.host()))?,
        };
        Ok(metadata)
    }

    /// Validates a header value that becomes part of a path.
    fn checked(&self, header: &str, value: &str) -> Result<String> {
        let shown: String = value.chars().take(80).collect();
        ensure!(
            is_name(value),
            "{} sends the header {header}: {shown:?}, which is not a file name (letters, digits and -_.+=~, at most 128 of them); nothing was written",
            self.host()
        );
        Ok(value.to_owned())
    }

    /// Downloads the file `name` to `to`, resuming an interrupted download, and reports the size of every part to
    /// `moved`.
    ///
    /// # Errors
    /// If the hub stops sending, sends more or less than announced, or sends content that does not match its ETag; if
    /// the file cannot be written.
    pub(super) async fn fetch(&self, name: &str, of: &Metadata, to: &Path, mut moved: impl FnMut(u64)) -> Result<()> {
        let cannot = || format!("cannot write {}", to.display());
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(to).with_context(cannot)?;
        let (mut hash, mut done) = hashed(&mut file, of.size)?;
        if done > of.size {
            file.set_len(0).with_context(cannot)?;
            (hash, done) = (Sha256::new(), 0);
        }
        moved(done);
        if done < of.size {
            let asked = self.get(self.file(name)?, Some(done..u64::MAX));
            let (mut answer, _) = timeout(self.patience, asked).await.map_err(|_| self.silent())??;
            match answer.status() {
                StatusCode::PARTIAL_CONTENT => {
                    let from = range(answer.headers()).map(|(from, _)| from);
                    ensure!(from == Some(done), "{} sent another range than the requested one", self.host());
                }
                // A server that does not support ranges sends the complete file.
                StatusCode::OK => {
                    file.set_len(0).with_context(cannot)?;
                    (hash, done) = (Sha256::new(), 0);
                }
                status => return Err(self.refused(status)),
            }
            loop {
                let part = timeout(self.patience, answer.chunk()).await.map_err(|_| self.silent())?;
                let Some(part) = part
                    .map_err(reqwest::Error::without_url)
                    .context("the response ended early; try again, the received part is kept")?
                else {
                    break;
                };
                done += part.len() as u64;
                ensure!(done <= of.size, "{} sends more than the {} bytes that it announced", self.host(), of.size);
                hash.update(&part);
                file.write_all(&part).with_context(cannot)?;
                moved(part.len() as u64);
            }
        }
        ensure!(
            done == of.size,
            "{} sent {done} bytes of the {} that it announced; try again, the received part is kept",
            self.host(),
            of.size
        );
        file.sync_all().with_context(cannot)?;
        // The ETag of a large file is the checksum of its content.
        if of.etag.len() == 64 && of.etag.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            if !digest.eq_ignore_ascii_case(&of.etag) {
                std::fs::remove_file(to).with_context(cannot)?;
                bail!("{name} is damaged: its sha256 is {digest}, and {} names it {}; try again", self.host(), of.etag);
            }
        }
        Ok(())
    }

    /// Sends a GET request and follows redirects. Returns the last answer, and the merged headers of the answers that
    /// the hub itself gave.
    async fn get(&self, url: Url, part: Option<std::ops::Range<u64>>) -> Result<(Response, HeaderMap)> {
        let (mut url, mut at_hub, mut own) = (url, true, HeaderMap::new());
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.http.get(url.clone());
            if let Some(part) = &part {
                let end = if part.end == u64::MAX { String::new() } else { (part.end - 1).to_string() };
                request = request.header(RANGE, format!("bytes={}-{end}", part.start));
            }
            if let Some(token) = self.token.as_ref().filter(|_| at_hub) {
                request = request.bearer_auth(token);
            }
            // The address may come from a redirect and contain a secret.
            let answer = request.send().await.map_err(reqwest::Error::without_url);
            let answer = answer.with_context(|| format!("{} cannot be reached", self.host()))?;
            if at_hub {
                own.extend(answer.headers().clone().into_iter().filter_map(|(name, value)| Some((name?, value))));
            }
            if !answer.status().is_redirection() || answer.status() == StatusCode::NOT_MODIFIED {
                return Ok((answer, own));
            }
            let token = self.token.as_deref().unwrap_or_default().to_ascii_lowercase();
            let is_secret = |text: &str| !token.is_empty() && text.to_ascii_lowercase().contains(&token);
            let target = http::redirect_target(&answer, is_secret);
            let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            let next = next.with_context(|| format!("{} redirects to {target}", self.host()))?;
            let sound = match next.scheme() {
                "https" => true,
                "http" => url.scheme() == "http",
                _ => false,
            };
            ensure!(sound, "{} redirects to {target}, which is less secure; the redirect is not followed", self.host());
            // After one redirect to another server the token is not sent again, even if a redirect leads back.
            at_hub &= origin(&next) == origin(&self.endpoint);
            url = next;
        }
        bail!("{} redirects more than {MAX_REDIRECTS} times", self.host())
    }

    fn silent(&self) -> anyhow::Error {
        Unavailable::temporary(format!(
            "the hub sent nothing for {:?}; try again, the received part is kept",
            self.patience
        ))
    }

    fn refused(&self, status: StatusCode) -> anyhow::Error {
        let words = format!("{} answers {status}", self.host());
        if may_be_temporary(status) { Unavailable::temporary(words) } else { anyhow!(words) }
    }

    /// Returns the hub's address for error messages.
    fn host(&self) -> String {
        format!("the hub {}", http::shown(&self.endpoint, |_| false).trim_end_matches('/'))
    }

    fn file(&self, name: &str) -> Result<Url> {
        // Addresses of models have no plural before the repository.
        let before: &[&str] = if self.kind == Kind::Model { &[] } else { &[self.kind.plural()] };
        self.url(before, &["resolve", &self.revision], &name.split('/').collect::<Vec<_>>())
    }

    fn url(&self, before: &[&str], after: &[&str], path: &[&str]) -> Result<Url> {
        let mut url = self.endpoint.clone();
        let repo: Vec<&str> = self.repo.split('/').collect();
        let mut segments = url.path_segments_mut().map_err(|()| anyhow!("HF_ENDPOINT is not an address"))?;
        // A slash in a revision becomes %2F.
        segments.pop_if_empty().extend(before).extend(repo).extend(after).extend(path);
        drop(segments);
        Ok(url)
    }
}

fn origin(url: &Url) -> (String, String, Option<u16>) {
    (url.scheme().to_owned(), url.host_str().unwrap_or_default().to_owned(), url.port_or_known_default())
}

/// Returns the first byte of a partial answer, and the complete size of the file.
fn range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (part, size) = text.split_once('/')?;
    Some((part.split_once('-')?.0.trim().parse().ok()?, size.trim().parse().ok()?))
}

/// Returns the complete size of a file whose first byte was requested.
fn size(answer: &Response) -> Option<u64> {
    if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
        return Some(0);
    }
    if answer.status() == StatusCode::PARTIAL_CONTENT {
        return Some(range(answer.headers())?.1);
    }
    answer.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Returns the running checksum and the length of a file's content, reading at most one buffer (1 MiB) more than `most`
/// bytes.
fn hashed(file: &mut (impl Read + Seek), most: u64) -> Result<(Sha256, u64)> {
    file.seek(SeekFrom::Start(0))?;
    let (mut hash, mut length, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    while length <= most {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        length += n as u64;
    }
    Ok((hash, length))
}
