//! Rules for every HTTP client that carries a secret: redirects are not followed, bodies have a size limit, and
//! addresses given by a server are shown without secrets and control characters.

use anyhow::{Context, Result, ensure};
use reqwest::header::LOCATION;
use reqwest::{ClientBuilder, Response};
use url::Url;

/// Maximum number of characters of an address in an error.
const SHOWN: usize = 200;

/// Returns a builder of clients that do not follow redirects.
///
/// reqwest removes a secret header if the host differs from that of the previous hop, but restores it on the next hop,
/// so that two redirects send it to another host.
pub fn builder() -> ClientBuilder {
    reqwest::Client::builder().redirect(reqwest::redirect::Policy::none())
}

/// Returns the address that `response` redirects to, for an error message: scheme, host, port and path. User names,
/// passwords, queries and fragments are omitted, and so is an address in which `is_secret` finds a secret.
pub fn redirect_target(response: &Response, is_secret: impl Fn(&str) -> bool) -> String {
    let Some(location) = response.headers().get(LOCATION) else {
        return "no address (the response has no Location header)".into();
    };
    let text = String::from_utf8_lossy(location.as_bytes());
    if text.chars().any(char::is_control) {
        return "an address that is not valid".into();
    }
    match response.url().join(&text) {
        Ok(url) => shown(&url, is_secret),
        Err(_) => "an address that is not valid".into(),
    }
}

/// Returns `url` in the form for error messages; see [`redirect_target`].
pub fn shown(url: &Url, is_secret: impl Fn(&str) -> bool) -> String {
    let path = String::from_utf8_lossy(&percent_decoded(url.path())).into_owned();
    let host = url.host_str().unwrap_or_default();
    if [host, url.path(), path.as_str(), url.scheme()].into_iter().any(&is_secret) {
        return "an address that contains the secret of the request".into();
    }
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    let whole = format!("{}://{host}{port}{}", url.scheme(), url.path());
    let mut shown: String = whole.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
    if whole.chars().count() > SHOWN {
        shown.push('…');
    }
    shown
}

/// Decodes the `%xx` escapes of a text.
fn percent_decoded(text: &str) -> Vec<u8> {
    let hex = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let (bytes, mut decoded, mut i) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while i < bytes.len() {
        let pair = bytes.get(i + 1).zip(bytes.get(i + 2)).filter(|_| bytes[i] == b'%');
        match pair.and_then(|(high, low)| Some(hex(*high)? << 4 | hex(*low)?)) {
            Some(byte) => {
                decoded.push(byte);
                i += 3;
            }
            None => {
                decoded.push(bytes[i]);
                i += 1;
            }
        }
    }
    decoded
}

/// Reads the body of `response`.
///
/// # Errors
/// If the connection breaks off, or the body has more than `most` bytes.
pub async fn body(mut response: Response, most: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) =
        response.chunk().await.map_err(reqwest::Error::without_url).context("the response ended early")?
    {
        ensure!(bytes.len() + chunk.len() <= most, "the answer has more than {most} bytes");
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_its_secrets() {
        let show = |text: &str, secret: &str| {
            shown(&Url::parse(text).unwrap(), |part| part.to_lowercase().contains(&secret.to_lowercase()))
        };
        assert_eq!(show("https://u:p@h.test:8443/a/b?k=v#f", "SECRET"), "https://h.test:8443/a/b");
        for holder in ["https://secret.test/", "https://h.test/x/SECRET", "https://h.test/%53ECRET", "secret:/x"] {
            let shown = show(holder, "SECRET");
            assert!(
                !shown.to_lowercase().contains("ecret-") && shown.contains("contains the secret"),
                "{holder}: {shown}"
            );
        }
        let long = show(&format!("https://h.test/{}", "x".repeat(1000)), "SECRET");
        assert_eq!(long.chars().count(), SHOWN + 1);
    }

    #[test]
    fn escapes_are_decoded_and_other_text_is_kept() {
        assert_eq!(percent_decoded("a%41%zz%4"), b"aA%zz%4");
    }
}
