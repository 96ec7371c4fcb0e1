//! The host names that a node accepts, against DNS rebinding: a foreign web page can make its own host name resolve to
//! this machine and then read the node's responses. The browser's `Host` header still carries the page's name.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::PROBES;

/// Accepted host names in addition to IP addresses and `localhost`, in lower case.
#[derive(Clone)]
pub(super) struct Hosts(Arc<[String]>);

impl Hosts {
    pub(super) fn new(names: &[String]) -> Self {
        Self(names.iter().map(|name| name.to_ascii_lowercase()).collect())
    }

    /// Returns the first host name for which a request must be refused, or `None`. Each host in the request's URI and
    /// `Host` headers must be an IP address, `localhost` or an accepted name. A request without any does not come from
    /// a browser.
    fn refused(&self, uri: &Uri, headers: &HeaderMap) -> Option<String> {
        let header = headers.get_all(header::HOST).iter();
        let header = header.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        let mut named = uri.authority().map(ToString::to_string).into_iter().chain(header);
        named.find(|authority| !self.is_known(authority))
    }

    fn is_known(&self, authority: &str) -> bool {
        let Some(host) = host(authority) else { return false };
        let host = host.to_ascii_lowercase();
        if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            return inner.parse::<Ipv6Addr>().is_ok();
        }
        let name = host.strip_suffix('.').unwrap_or(&host);
        name.parse::<Ipv4Addr>().is_ok() || name == "localhost" || self.0.iter().any(|known| known == name)
    }
}

/// Returns the host of `host:port`, or `None` if the port is not a number.
fn host(authority: &str) -> Option<&str> {
    let after_brackets = authority.rfind(']').map_or(0, |at| at + 1);
    match authority[after_brackets..].find(':') {
        None => Some(authority),
        Some(at) => {
            let (host, port) = authority.split_at(after_brackets + at);
            port[1..].bytes().all(|byte| byte.is_ascii_digit()).then_some(host)
        }
    }
}

/// Answers requests for unknown host names with 421, except for health probes.
pub(super) async fn guard(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    if PROBES.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    match hosts.refused(request.uri(), request.headers()) {
        None => next.run(request).await,
        Some(name) => {
            let plain = |c: &char| c.is_ascii_alphanumeric() || "-_.:[]".contains(*c);
            let name: String = name.chars().take(100).filter(plain).collect();
            let text = format!(
                "this node does not accept the host name {name:?}; it accepts IP addresses, localhost and the names listed in serve.hosts: add the name there if it is this node's\n"
            );
            (StatusCode::MISDIRECTED_REQUEST, text).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_localhost_and_listed_names_are_accepted() {
        let hosts = Hosts::new(&["Node.example".into()]);
        for known in [
            "127.0.0.1",
            "127.0.0.1:9464",
            "10.0.0.7:80",
            "[::1]",
            "[::1]:9464",
            "localhost",
            "LOCALHOST:9464",
            "localhost.",
            "node.example",
            "NODE.EXAMPLE:9464",
            "node.example.:1",
        ] {
            assert!(hosts.is_known(known), "{known}");
        }
        for other in [
            "",
            "rebind.test",
            "rebind.test:9464",
            "node.example.evil.test",
            "evil-node.example",
            "localhost.evil.test",
            "127.0.0.1.evil.test",
            "127.0.0.1@evil.test",
            "[::1].evil.test",
            "[::1",
            "::1",
            "1.2.3.4:evil.test",
            "node.example:9464:1",
            "localhost evil.test",
            "a.localhost",
        ] {
            assert!(!hosts.is_known(other), "{other}");
        }
    }

    #[test]
    fn every_host_name_of_a_request_is_checked() {
        let hosts = Hosts::new(&[]);
        let refused = |uri: &str, names: &[&str]| {
            let mut headers = HeaderMap::new();
            for name in names {
                headers.append(header::HOST, name.parse().unwrap());
            }
            hosts.refused(&uri.parse().unwrap(), &headers)
        };
        assert_eq!(refused("/status", &[]), None);
        assert_eq!(refused("/status", &["localhost"]), None);
        assert_eq!(refused("/status", &["localhost", "rebind.test"]).as_deref(), Some("rebind.test"));
        assert_eq!(refused("http://rebind.test/status", &["localhost"]).as_deref(), Some("rebind.test"));
        assert_eq!(refused("http://127.0.0.1:1/status", &["rebind.test"]).as_deref(), Some("rebind.test"));
    }
}
