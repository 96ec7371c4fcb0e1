//! Requests to a hub. Redirects are followed, since hubs keep large files on other servers, but the token goes to the
//! scheme, host and port of the hub alone, and what the hub says in headers is checked before it is used.

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

/// Most redirects in a row.
const HOPS: usize = 10;

/// How long a hub may take to show that it is there at all; a place that is not should cost seconds.
const CONTACT: Duration = Duration::from_secs(10);

/// Whether a server that answers with this status may answer otherwise later.
fn may_pass(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

/// One repository at one revision on a hub.
pub(super) struct Client {
    http: reqwest::Client,
    endpoint: Url,
    token: Option<String>,
    kind: Kind,
    repo: String,
    revision: String,
    /// How long the hub may send nothing.
    patience: Duration,
}

/// What a hub says of a file before it is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    /// The commit that the revision stands for.
    pub(super) commit: String,
    /// The name of the content.
    pub(super) etag: String,
    /// Bytes.
    pub(super) size: u64,
}

impl Client {
    /// A client of the hub at `endpoint`, which is asked with `token` if there is one.
    ///
    /// # Errors
    /// An endpoint that is no address.
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
        let endpoint = address
            .with_context(|| format!("HF_ENDPOINT = {endpoint:?} is no address; write it as https://huggingface.co"))?;
        ensure!(
            token.as_ref().is_none_or(|token| token.bytes().all(|byte| byte.is_ascii_graphic())),
            "the hub's token (HF_TOKEN, or the file that `hf auth login` wrote) holds a space, a line's end or another character that no token has"
        );
        let http = http::builder()
            .connect_timeout(CONTACT)
            .user_agent(concat!("preceptor/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("the hub's client cannot be set up")?;
        Ok(Self { http, endpoint, token, kind, repo: repo.to_owned(), revision: revision.to_owned(), patience })
    }

    /// Names of the files in the repository.
    ///
    /// # Errors
    /// A hub that does not answer, knows no such repository, or answers as no hub does.
    pub(super) async fn files(&self) -> Result<Vec<String>> {
        let url = self.url(&["api", self.kind.plural()], &["revision", &self.revision], &[])?;
        let answer = timeout(self.patience.min(CONTACT), self.get(url, None)).await;
        let (answer, _) = answer
            .map_err(|_| {
                Unavailable::passing(format!("the hub did not answer within {:?}", self.patience.min(CONTACT)))
            })?
            .context("the hub cannot be asked")?;
        let status = answer.status();
        // The hub's answers to who may not know whether it is there.
        let closed = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND);
        let hint = if closed { "; a private or gated repository needs HF_TOKEN" } else { "" };
        if may_pass(status) {
            return Err(Unavailable::passing(format!("the hub does not list it: {status}")));
        }
        ensure!(status.is_success(), "the hub does not list it: {status}{hint}");
        let body = timeout(self.patience.max(CONTACT), http::body(answer, read_bounded::DESCRIPTION as usize));
        let body = body.await.map_err(|_| self.silent())??;
        let listed: Value = serde_json::from_slice(&body).context("the hub's list of files is not JSON")?;
        let siblings = listed["siblings"].as_array().context("the hub's list of files has no siblings")?;
        Ok(siblings.iter().filter_map(|one| one["rfilename"].as_str().map(str::to_owned)).collect())
    }

    /// What the hub says of the file `name`.
    ///
    /// # Errors
    /// A hub that does not answer, or headers that are missing or name no file.
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
            size: size(&answer).with_context(|| format!("{} does not say how large {name} is", self.host()))?,
        };
        Ok(metadata)
    }

    /// A header's value that becomes part of a path.
    fn checked(&self, header: &str, value: &str) -> Result<String> {
        let shown: String = value.chars().take(80).collect();
        ensure!(
            is_name(value),
            "{} sends the header {header}: {shown:?}, which is no name of a file (letters, digits and -_.+=~, at most 128 of them); nothing of it was written",
            self.host()
        );
        Ok(value.to_owned())
    }

    /// Fetches the file `name` into `to`, from where an earlier try stopped, and tells `moved` of every part.
    ///
    /// # Errors
    /// A hub that stops sending, sends more or less than it said, or another content than its ETag names; a file that
    /// cannot be written.
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
                    ensure!(from == Some(done), "{} sends another part of it than was asked for", self.host());
                }
                // A server that knows no ranges sends all of it.
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
                    .context("the answer broke off; try again, what has come is kept")?
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
            "{} sent {done} bytes of the {} that it announced; try again, what has come is kept",
            self.host(),
            of.size
        );
        file.sync_all().with_context(cannot)?;
        // Large files are named by the checksum of their content.
        if of.etag.len() == 64 && of.etag.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            if !digest.eq_ignore_ascii_case(&of.etag) {
                std::fs::remove_file(to).with_context(cannot)?;
                bail!("{name} is damaged: its sha256 is {digest}, and {} names it {}; try again", self.host(), of.etag);
            }
        }
        Ok(())
    }

    /// Sends a GET and follows redirects. Returns the last answer, and the headers of the last answer that the hub itself
    /// gave.
    async fn get(&self, url: Url, part: Option<std::ops::Range<u64>>) -> Result<(Response, HeaderMap)> {
        let (mut url, mut at_home, mut own) = (url, true, HeaderMap::new());
        for _ in 0..=HOPS {
            let mut request = self.http.get(url.clone());
            if let Some(part) = &part {
                let end = if part.end == u64::MAX { String::new() } else { (part.end - 1).to_string() };
                request = request.header(RANGE, format!("bytes={}-{end}", part.start));
            }
            if let Some(token) = self.token.as_ref().filter(|_| at_home) {
                request = request.bearer_auth(token);
            }
            // The address may be one that a redirect named, with a secret in it.
            let answer = request.send().await.map_err(reqwest::Error::without_url);
            let answer = answer.with_context(|| format!("{} cannot be reached", self.host()))?;
            if at_home {
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
            ensure!(sound, "{} redirects to {target}, which is not as well protected; it is not followed", self.host());
            // Once elsewhere, the token stays away even if a redirect leads back.
            at_home &= origin(&next) == origin(&self.endpoint);
            url = next;
        }
        bail!("{} redirects more than {HOPS} times", self.host())
    }

    fn silent(&self) -> anyhow::Error {
        Unavailable::passing(format!("the hub sent nothing for {:?}; try again, what has come is kept", self.patience))
    }

    fn refused(&self, status: StatusCode) -> anyhow::Error {
        let words = format!("{} answers {status}", self.host());
        if may_pass(status) { Unavailable::passing(words) } else { anyhow!(words) }
    }

    /// The hub, as errors name it.
    fn host(&self) -> String {
        format!("the hub {}", http::shown(&self.endpoint, |_| false).trim_end_matches('/'))
    }

    fn file(&self, name: &str) -> Result<Url> {
        // Models have no word before their names.
        let before: &[&str] = if self.kind == Kind::Model { &[] } else { &[self.kind.plural()] };
        self.url(before, &["resolve", &self.revision], &name.split('/').collect::<Vec<_>>())
    }

    fn url(&self, before: &[&str], after: &[&str], path: &[&str]) -> Result<Url> {
        let mut url = self.endpoint.clone();
        let repo: Vec<&str> = self.repo.split('/').collect();
        let mut segments = url.path_segments_mut().map_err(|()| anyhow!("HF_ENDPOINT is no address"))?;
        // A slash in a revision becomes %2F.
        segments.pop_if_empty().extend(before).extend(repo).extend(after).extend(path);
        drop(segments);
        Ok(url)
    }
}

fn origin(url: &Url) -> (String, String, Option<u16>) {
    (url.scheme().to_owned(), url.host_str().unwrap_or_default().to_owned(), url.port_or_known_default())
}

/// The first byte and the whole size of what a part belongs to.
fn range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (part, size) = text.split_once('/')?;
    Some((part.split_once('-')?.0.trim().parse().ok()?, size.trim().parse().ok()?))
}

/// The whole size of a file whose first byte was asked for.
fn size(answer: &Response) -> Option<u64> {
    if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
        return Some(0);
    }
    if answer.status() == StatusCode::PARTIAL_CONTENT {
        return Some(range(answer.headers())?.1);
    }
    answer.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The running checksum and the length of what a file holds, up to one byte more than `most`.
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
