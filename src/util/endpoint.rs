//! Parsing of the base URL of a server with the OpenAI API, in all common forms.

use url::{Host, Url};

/// Base URL of a server, up to the version: `http://127.0.0.1:8080/v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Scheme, host, port and path without a slash at the end.
    base: String,
    /// Query parameters of the URL.
    pub query: Vec<(String, String)>,
    /// The API that the end of the URL names, if any: true for `/chat/completions`, false for `/completions`.
    pub chat: Option<bool>,
}

impl Endpoint {
    /// Parses a URL. The path of an endpoint (`/chat/completions`, `/completions`) and slashes at its end are removed;
    /// a query is kept.
    ///
    /// # Errors
    /// Returns a description of the mistake, which does not repeat text that may contain a password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let shown = if text.contains('@') { "the address".to_owned() } else { format!("{text:?}") };
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(format!("{shown} contains a space or a line end"));
        }
        let authority = text.split("://").last().unwrap_or_default().split(['/', '?', '#']).next().unwrap_or_default();
        if authority.contains('@') {
            return Err("contains a user name or a password, which would be written to logs and to the run's directory; give the key by api_key_env".into());
        }
        let Some((scheme, rest)) = text.split_once("://").filter(|(scheme, _)| ["http", "https"].contains(scheme))
        else {
            return Err(format!("{shown} is not a URL; it must begin with http:// or https://"));
        };
        if rest.starts_with("http:") || rest.starts_with("https:") || rest.starts_with('/') {
            return Err(format!("{shown} has no host after {scheme}://"));
        }
        let colons = authority.matches(':').count();
        if colons > 1 && !authority.starts_with('[') {
            return Err(format!("{shown} is not a URL; write an IPv6 address in brackets, as http://[::1]:8080/v1"));
        }
        let url = Url::parse(text).map_err(|error| format!("{shown} is not a URL: {error}"))?;
        if url.fragment().is_some() {
            return Err(format!("{shown} has a fragment (#…), which is never sent to a server; remove it"));
        }
        match url.host() {
            None => return Err(format!("{shown} has no host")),
            Some(Host::Domain(name)) if name.is_empty() || name.starts_with('.') || name.contains("..") => {
                return Err(format!("{shown} has no valid host"));
            }
            Some(_) => {}
        }
        let mut path: Vec<&str> = url.path().split('/').filter(|part| !part.is_empty()).collect();
        let chat = match path.as_slice() {
            [.., "chat", "completions"] => Some((true, 2)),
            [.., "completions"] => Some((false, 1)),
            [.., last @ ("models" | "embeddings" | "responses" | "messages" | "generate")] => {
                return Err(format!(
                    "{shown} ends with /{last}, which is another endpoint; give the URL up to the version, such as http://127.0.0.1:8080/v1"
                ));
            }
            _ => None,
        };
        path.truncate(path.len() - chat.map_or(0, |(_, parts)| parts));
        let origin = url[..url::Position::BeforePath].to_owned();
        let base = std::iter::once(origin.as_str()).chain(path).collect::<Vec<_>>().join("/");
        let query = url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
        Ok(Self { base, query, chat: chat.map(|(chat, _)| chat) })
    }

    /// Returns scheme, host and port.
    pub fn origin(&self) -> &str {
        let authority = self.base.find("://").map_or(0, |at| at + 3);
        let end = self.base[authority..].find('/').map_or(self.base.len(), |at| authority + at);
        &self.base[..end]
    }

    /// Returns the URL of `path` below this one, without a query.
    pub fn join(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
    }

    /// Returns the URL with `/v1` appended, or `None` if it has a version or a deployment already.
    pub fn versioned(&self) -> Option<Self> {
        let version =
            |part: &str| part.len() > 1 && part.starts_with('v') && part[1..].starts_with(|c: char| c.is_ascii_digit());
        let path = self.base.split("://").last().unwrap_or_default().split('/').skip(1);
        let known = path.into_iter().any(|part| version(part) || part == "deployments");
        (!known).then(|| Self { base: format!("{}/v1", self.base), ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_parsed_in_every_common_form() {
        for (text, base, query, chat) in [
            ("http://h/v1", "http://h/v1", 0, None),
            ("http://h/v1/", "http://h/v1", 0, None),
            ("http://h:80//v1///", "http://h/v1", 0, None),
            ("https://h:8443", "https://h:8443", 0, None),
            ("http://h/v1/chat/completions", "http://h/v1", 0, Some(true)),
            ("http://h/v1/chat/completions/", "http://h/v1", 0, Some(true)),
            ("http://h/v1/completions", "http://h/v1", 0, Some(false)),
            ("http://[::1]:8080/v1", "http://[::1]:8080/v1", 0, None),
            ("http://127.0.0.1:8080/api/v1", "http://127.0.0.1:8080/api/v1", 0, None),
            (
                "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-06-01",
                "https://x.openai.azure.com/openai/deployments/d",
                1,
                Some(true),
            ),
        ] {
            let endpoint = Endpoint::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(
                (endpoint.join("x"), endpoint.query.len(), endpoint.chat),
                (format!("{base}/x"), query, chat),
                "{text}"
            );
            let (scheme, rest) = base.split_once("://").unwrap();
            assert_eq!(endpoint.origin(), format!("{scheme}://{}", rest.split('/').next().unwrap()), "{text}");
        }
    }

    #[test]
    fn an_unusable_url_is_refused_with_the_reason() {
        for (text, words) in [
            ("", "must begin with http://"),
            ("localhost:8000/v1", "must begin with http://"),
            ("ftp://h/v1", "must begin with http://"),
            ("htp://h/v1", "must begin with http://"),
            ("http:/h/v1", "must begin with http://"),
            ("http://", "is not a URL"),
            ("http:///v1", "has no host after http://"),
            ("http://http://h/v1", "has no host after http://"),
            (" http://h/v1", "contains a space"),
            ("http://h/v1 ", "contains a space"),
            ("http://h:port/v1", "invalid port"),
            ("http://::1:8080/v1", "in brackets, as http://[::1]:8080/v1"),
            ("http://h/v1#/chat", "has a fragment"),
            ("http://h/v1/models", "ends with /models"),
            ("http://me:secret@h/v1", "contains a user name or a password"),
            ("me:secret@h/v1", "contains a user name or a password"),
        ] {
            let error = Endpoint::parse(text).unwrap_err();
            assert!(error.contains(words) && !error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn a_version_is_added_only_if_missing() {
        let versioned = |text: &str| Endpoint::parse(text).unwrap().versioned().map(|endpoint| endpoint.join("x"));
        assert_eq!(versioned("http://h:1").as_deref(), Some("http://h:1/v1/x"));
        assert_eq!(versioned("http://h/openai").as_deref(), Some("http://h/openai/v1/x"));
        for text in ["http://h/v1", "https://h/v1beta/openai", "https://h/openai/deployments/d", "http://h/api/v3"] {
            assert_eq!(versioned(text), None, "{text}");
        }
    }
}
