//! HTTP of the fake inference server, over plain sockets.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

/// A request as the server received it.
#[derive(Debug, Clone)]
pub struct Received {
    pub method: String,
    /// Path without the query.
    pub path: String,
    pub query: String,
    /// Body; null if there is none.
    pub body: Value,
    /// Token of the header `Authorization: Bearer`.
    pub bearer: Option<String>,
}

/// Answer to a request.
#[derive(Debug)]
pub enum Reply {
    Json(u16, Value),
    Text(u16, String),
    /// Sends the first half of this answer, and closes the connection.
    Cut(Value),
    /// Sends nothing until the client disconnects.
    Hang,
    /// Closes the connection.
    Close,
}

impl Reply {
    pub fn ok(body: Value) -> Self {
        Self::Json(200, body)
    }

    /// Returns an error in the form of vLLM's server.
    pub fn error(status: u16, kind: &str, message: &str, param: &str) -> Self {
        let param = if param.is_empty() { Value::Null } else { json!(param) };
        Self::Json(status, json!({ "error": { "message": message, "type": kind, "param": param, "code": status } }))
    }

    /// Returns the answer to a path that the server does not have.
    pub fn not_found() -> Self {
        Self::Json(404, json!({ "detail": "Not Found" }))
    }
}

impl Received {
    /// Returns the value of a parameter of the query.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, v)| v)
    }
}

/// Reads the next request of a connection; `None` once the client has closed it.
pub fn read(reader: &mut BufReader<&TcpStream>) -> Option<Received> {
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let (mut length, mut bearer) = (0, None);
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "authorization" => bearer = value.trim().strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Some(Received { method, path: path.to_owned(), query: query.to_owned(), body, bearer })
}

/// Sends an answer. Returns whether the connection stays open.
pub fn send(mut stream: &TcpStream, reply: &Reply) -> bool {
    let head = |status: u16, kind: &str, length: usize| {
        format!("HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n")
    };
    let text = match reply {
        Reply::Json(status, body) => {
            let body = body.to_string();
            head(*status, "application/json", body.len()) + &body
        }
        Reply::Text(status, body) => head(*status, "text/plain; charset=utf-8", body.len()) + body,
        Reply::Cut(body) => {
            let body = body.to_string();
            let cut: String = body.chars().take(body.chars().count() / 2).collect();
            let _ = stream.write_all((head(200, "application/json", body.len()) + &cut).as_bytes());
            return false;
        }
        Reply::Hang => {
            drop(std::io::copy(&mut stream, &mut std::io::sink()));
            return false;
        }
        Reply::Close => return false,
    };
    stream.write_all(text.as_bytes()).is_ok()
}

/// Returns whether the client has closed the connection.
pub fn is_closed(stream: &TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return true;
    }
    let peeked = stream.peek(&mut [0]);
    let is_open = match &peeked {
        Ok(count) => *count > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    };
    stream.set_nonblocking(false).is_err() || !is_open
}
