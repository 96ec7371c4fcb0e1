//! A mock server with OpenAI's API that misbehaves as instructed and counts its responses.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// Response to one request.
#[derive(Debug, Clone)]
pub enum Act {
    /// The next token's distribution, as tokens and probabilities.
    Tokens(Vec<(&'static str, f64)>),
    /// A text without log-probabilities.
    Text(&'static str),
    /// This status, with these headers and body.
    Status(u16, &'static str, &'static str),
    /// A body of status 200, sent unchanged.
    Body(String),
    /// These bytes with status 200, sent unchanged.
    Bytes(Vec<u8>),
    /// Closes the connection without an answer.
    Close,
    /// Sends the beginning of an answer, and then closes the connection.
    CloseMidBody,
    /// Never answers.
    Hang,
    /// Pauses, then continues with the inner act.
    Slow(Duration, Box<Act>),
    /// Waits at the barrier for other requests under way, then continues with the inner act.
    Meet(Arc<Barrier>, Box<Act>),
}

impl Act {
    /// Returns the outcome as which the client must count the response.
    fn name(&self) -> &'static str {
        match self {
            Self::Tokens(_) | Self::Text(_) => "ok",
            Self::Status(429, ..) => "rate_limited",
            Self::Status(500.., ..) => "http_5xx",
            Self::Status(300..=399, ..) => "http_3xx",
            Self::Status(..) => "http_4xx",
            Self::Body(_) => "malformed",
            Self::Bytes(_) => "ok",
            Self::CloseMidBody | Self::Close => "connection",
            Self::Hang => "timeout",
            Self::Slow(_, act) | Self::Meet(_, act) => act.name(),
        }
    }
}

type Plan = dyn Fn(u64, &str, &Value) -> Act + Send + Sync;

/// The mock server; it ends with the test's process.
pub struct MockJudge {
    pub url: String,
    served: Arc<Mutex<BTreeMap<&'static str, u64>>>,
    most_at_once: Arc<AtomicUsize>,
    /// Number of accepted connections that have not ended.
    open: Arc<AtomicUsize>,
}

/// An answer whose probabilities are a function of the question: `first` has 0.1 to 0.9, and `second` the rest.
pub fn varied(body: &Value, first: &'static str, second: &'static str) -> Act {
    let p = 0.1 + 0.8 * (preceptor::util::seed::text(&body["messages"].to_string()) % 1000) as f64 / 1000.0;
    Act::Tokens(vec![(first, p), (second, 1.0 - p)])
}

impl MockJudge {
    /// Serves on a free port; `plan` is given the request's number, its path and its body.
    pub fn start(plan: impl Fn(u64, &str, &Value) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let served: Arc<Mutex<BTreeMap<&'static str, u64>>> = Arc::default();
        let most_at_once: Arc<AtomicUsize> = Arc::default();
        let open: Arc<AtomicUsize> = Arc::default();
        let connections = Arc::clone(&open);
        let (counts, most, plan) =
            (Arc::clone(&served), Arc::clone(&most_at_once), Arc::<Plan>::from(Box::new(plan) as Box<Plan>));
        std::thread::spawn(move || {
            let number = Arc::new(Mutex::new(0));
            let at_once = Arc::new(AtomicUsize::new(0));
            for stream in listener.incoming().flatten() {
                let (counts, most, plan) = (Arc::clone(&counts), Arc::clone(&most), Arc::clone(&plan));
                let (number, at_once) = (Arc::clone(&number), Arc::clone(&at_once));
                connections.fetch_add(1, Ordering::SeqCst);
                let open = Open(Arc::clone(&connections));
                std::thread::spawn(move || {
                    let _open = open;
                    let Some((path, body)) = read(&stream) else { return };
                    let now = at_once.fetch_add(1, Ordering::SeqCst) + 1;
                    most.fetch_max(now, Ordering::SeqCst);
                    let mut act = {
                        let mut number = number.lock().unwrap();
                        *number += 1;
                        plan(*number - 1, &path, &body)
                    };
                    *counts.lock().unwrap().entry(act.name()).or_default() += 1;
                    loop {
                        act = match act {
                            Act::Slow(pause, then) => {
                                std::thread::sleep(pause);
                                *then
                            }
                            Act::Meet(barrier, then) => {
                                barrier.wait();
                                *then
                            }
                            other => break act = other,
                        };
                    }
                    // Counted before the answer is sent: a client that has it may ask again at once.
                    at_once.fetch_sub(1, Ordering::SeqCst);
                    play(&act, &stream, &path);
                });
            }
        });
        Self { url, served, most_at_once, open }
    }

    /// Waits until all requests that were sent before have been counted and answered. Clients that ended must not have
    /// left requests that are never answered.
    pub fn settle(&self) {
        // Connections are accepted in order: once this one is, all earlier ones were.
        let address = self.url.trim_start_matches("http://").trim_end_matches("/v1");
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let _ = stream.read(&mut [0]);
        while self.open.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }

    /// Returns the number of responses that the client must count as `outcome`.
    pub fn served(&self, outcome: &str) -> u64 {
        self.served.lock().unwrap().get(outcome).copied().unwrap_or(0)
    }

    /// Returns the maximum number of concurrent requests.
    pub fn most_at_once(&self) -> usize {
        self.most_at_once.load(Ordering::SeqCst)
    }
}

/// Counts a connection until it ends.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn read(stream: &TcpStream) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split_whitespace().nth(1)?.to_owned();
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((path, serde_json::from_slice(&body).ok()?))
}

fn play(act: &Act, stream: &TcpStream, path: &str) {
    let chat = path.ends_with("chat/completions");
    let usage = json!({ "prompt_tokens": 10, "completion_tokens": 1 });
    match act {
        Act::Tokens(tokens) => {
            let log = |p: f64| json!(p.ln());
            let choice = if chat {
                let top: Vec<Value> =
                    tokens.iter().map(|(token, p)| json!({ "token": token, "logprob": log(*p) })).collect();
                let content = json!([{ "token": tokens[0].0, "logprob": log(tokens[0].1), "top_logprobs": top }]);
                json!({ "message": { "role": "assistant", "content": tokens[0].0 }, "logprobs": { "content": content } })
            } else {
                let top: serde_json::Map<String, Value> =
                    tokens.iter().map(|(token, p)| ((*token).to_owned(), log(*p))).collect();
                json!({ "text": tokens[0].0, "logprobs": { "top_logprobs": [top] } })
            };
            respond(stream, 200, "", &json!({ "choices": [choice], "usage": usage }).to_string());
        }
        Act::Text(text) => {
            let choice = if chat { json!({ "message": { "content": text } }) } else { json!({ "text": text }) };
            respond(stream, 200, "", &json!({ "choices": [choice], "usage": usage }).to_string());
        }
        Act::Status(status, headers, body) => respond(stream, *status, headers, body),
        Act::Body(body) => respond(stream, 200, "", body),
        Act::Bytes(body) => {
            let mut stream = stream;
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(body);
        }
        Act::Close => {}
        Act::CloseMidBody => {
            let mut stream = stream;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"choices\": [");
        }
        // Until the client gives up and closes the connection.
        Act::Hang => drop(std::io::copy(&mut { stream }, &mut std::io::sink())),
        Act::Slow(..) | Act::Meet(..) => unreachable!("the wait is over"),
    }
}

fn respond(mut stream: &TcpStream, status: u16, headers: &str, body: &str) {
    let text = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n{body}",
        body.len()
    );
    // The client may have disconnected already.
    let _ = stream.write_all(text.as_bytes());
}
