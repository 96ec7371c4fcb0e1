//! The place of a run's weights as workers see it: a folder, an object store, or an HTTP server.

use std::fmt;
use std::path::PathBuf;

use url::Url;

/// Place of the weights of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightsPlace {
    /// A folder that this machine sees.
    Folder(PathBuf),
    /// URL of a folder in an object store: `s3://bucket/folder`, `gs://bucket/folder` or `file:///folder`.
    Bucket(String),
    /// URL of a folder on an HTTP server.
    Http(Url),
}

impl WeightsPlace {
    /// Parses a path or a URL.
    ///
    /// # Errors
    /// If it is a URL of another kind, or contains a password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some((scheme, _)) = text.split_once("://") else {
            return if text.is_empty() { Err("is empty".to_owned()) } else { Ok(Self::Folder(text.into())) };
        };
        let url = Url::parse(text).map_err(|error| format!("{text:?} is not a URL: {error}"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(
                "must not contain a user name or a password; name the environment variable of a bearer token with --token-env, and give credentials of object stores in the environment"
                    .to_owned(),
            );
        }
        match scheme {
            "s3" | "gs" if url.has_host() => Ok(Self::Bucket(text.trim_end_matches('/').to_owned())),
            "file" if url.to_file_path().is_ok() => Ok(Self::Bucket(text.trim_end_matches('/').to_owned())),
            "http" | "https" if url.has_host() => Ok(Self::Http(url)),
            "s3" | "gs" | "file" | "http" | "https" => Err(format!(
                "{text:?} names no folder; write s3://bucket/folder, gs://bucket/folder, file:///folder or http://node:9464/weights"
            )),
            _ => Err(format!(
                "{scheme}:// is not supported; give the path of a folder, s3://bucket/folder, gs://bucket/folder, file:///folder or http://node:9464/weights"
            )),
        }
    }
}

impl fmt::Display for WeightsPlace {
    /// Writes the place without the query of a URL, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::Bucket(url) => f.write_str(url),
            Self::Http(url) => {
                let mut shown = url.clone();
                shown.set_query(None);
                shown.set_fragment(None);
                f.write_str(shown.as_str())
            }
        }
    }
}

/// Checks the value of `cluster.store`.
///
/// # Errors
/// If it is not a place to which the node can write.
pub(super) fn check_store(text: &str) -> Result<(), String> {
    match WeightsPlace::parse(text)? {
        WeightsPlace::Folder(_) | WeightsPlace::Bucket(_) => Ok(()),
        WeightsPlace::Http(url) => Err(format!(
            "the node cannot write to {url}; give a folder, s3://bucket/folder or gs://bucket/folder, or remove the key: workers can read the weights from the node's own server with --store http://NODE:PORT/weights"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_folders_buckets_or_servers() {
        let parse = WeightsPlace::parse;
        assert_eq!(parse("/mnt/weights"), Ok(WeightsPlace::Folder("/mnt/weights".into())));
        for bucket in ["s3://bucket/a", "gs://bucket", "file:///mnt/weights"] {
            assert_eq!(parse(&format!("{bucket}/")), Ok(WeightsPlace::Bucket(bucket.into())));
        }
        let shown = parse("https://cdn.test/weights?key=SECRET").unwrap();
        assert_eq!(shown.to_string(), "https://cdn.test/weights");
        assert!(matches!(shown, WeightsPlace::Http(url) if url.query() == Some("key=SECRET")));
        for (text, words) in [
            ("", "is empty"),
            ("s3:///folder", "names no folder"),
            ("ftp://host/a", "ftp:// is not supported"),
            ("http://me:pw@host/weights", "must not contain a user name or a password"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words) && !error.contains("pw"), "{text}: {error}");
        }
    }

    #[test]
    fn a_node_cannot_write_to_an_http_server() {
        assert_eq!(check_store("weights"), Ok(()));
        assert_eq!(check_store("s3://bucket/a"), Ok(()));
        assert!(check_store("http://host/a").unwrap_err().contains("cannot write to http://host/a"));
    }
}
