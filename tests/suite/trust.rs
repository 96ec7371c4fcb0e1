//! What strangers may do: servers that redirect, clients that hold connections, names that are not the node's, text with
//! control characters.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use preceptor::config::RemoteJudge;
use preceptor::label::backend::{Ask, Backend, Refusal, Usage};
use preceptor::remote::Remote;

use crate::common::{preceptor, stderr};
use crate::mock_judge::{Act, MockJudge};

const KEY: &str = "sk-trust-0123456789-abcdef";
const TOKEN: &str = "tk-trust-9876543210-zyxwvu";

/// A server that answers every GET as `answer` says of its path, and keeps the heads of the requests.
struct Server {
    address: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(answer: impl Fn(&str, TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let (log, answer) = (Arc::clone(&heads), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                std::thread::spawn(move || {
                    let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                    let path = head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
                    log.lock().unwrap().push(head.join("\n"));
                    answer(&path, stream);
                });
            }
        });
        Self { address, heads }
    }
}

fn respond(mut stream: TcpStream, status: &str, headers: &str, body: &str) {
    // The client may be gone already.
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
}

fn leaked(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

#[test]
fn a_judge_that_redirects_gets_no_question_and_no_key_to_another_address() {
    // SAFETY: no other test reads or writes this variable.
    unsafe { std::env::set_var("PRECEPTOR_TRUST_KEY", KEY) };
    // The second server redirects once more, to itself: that is where a key comes back that was removed once.
    let other = MockJudge::start(|_, path, _| {
        if path.ends_with("/y") {
            Act::Tokens(vec![("1", 0.75), ("2", 0.25)])
        } else {
            Act::Status(307, "Location: /y\r\n", "")
        }
    });
    let port = other.url.trim_end_matches("/v1").to_owned();
    let named = port.replace("127.0.0.1", "localhost");
    let secret = format!("http://{KEY}.test/{KEY}?key={KEY}");
    for (status, location, words) in [
        (307, format!("{port}/x"), format!("redirects to {port}/x (status 307)")),
        (302, format!("{named}/x?token=hush"), format!("redirects to {named}/x (status 302)")),
        (308, "/v1/chat/completions".to_owned(), "/v1/chat/completions (status 308)".to_owned()),
        (307, "file:///etc/passwd".to_owned(), "redirects to file:///etc/passwd".to_owned()),
        (301, secret, "contains the secret".to_owned()),
        (303, String::new(), "redirects to http://127.0.0.1".to_owned()),
    ] {
        let headers = leaked(format!("Location: {location}\r\n"));
        let mock = MockJudge::start(move |_, _, _| Act::Status(status, headers, ""));
        let judge = RemoteJudge {
            url: mock.url.clone(),
            model: "m".into(),
            api_key_env: Some("PRECEPTOR_TRUST_KEY".into()),
            retries: 0,
            outage_s: 0.0,
            ..RemoteJudge::default()
        };
        let remote = Remote::new(judge).unwrap();
        let question = Ask { prompt: "Which?".into(), answers: vec!["1".into(), "2".into()] };
        let reply = remote.weigh(&[question], &mut Usage::default()).remove(0);
        let Err(Refusal::Failure(why)) = reply else { panic!("{location}: {reply:?}") };
        assert!(why.contains(&words) && why.contains("labeler.remote.url"), "{location}: {why}");
        assert!(!why.to_lowercase().contains("0123456789") && !why.contains("hush"), "{why}");
        assert_eq!((remote.stats().of("http_3xx"), mock.served("http_3xx")), (1, 1), "it is asked once and counted");
    }
    assert_eq!((other.served("ok"), other.served("http_3xx")), (0, 0), "the other server was asked");
}

/// Runs `preceptor top` on `address` with a bearer token, and returns its exit status and what it wrote.
fn top(address: &str) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut program = preceptor(dir.path());
    program.args(["top", address, "--once", "--token-env", "PRECEPTOR_TRUST_TOKEN"]);
    let output = program.env("PRECEPTOR_TRUST_TOKEN", TOKEN).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &stderr(&output))
}

#[test]
fn top_gives_its_token_to_the_address_that_it_was_given_alone() {
    let other = Server::start(|path, stream| {
        if path == "/y" {
            respond(stream, "200 OK", "", "{}")
        } else {
            respond(stream, "302 Found", "Location: /y\r\n", "")
        }
    });
    for host in [other.address.clone(), other.address.replace("127.0.0.1", "localhost")] {
        let location = format!("Location: http://{host}/x?secret={TOKEN}\r\n");
        let node = Server::start(move |_, stream| respond(stream, "302 Found", &location, ""));
        let (done, text) = top(&node.address);
        assert!(!done && text.contains(&format!("redirects to http://{host}/x")), "{text}");
        assert!(!text.contains("9876543210"), "{text}");
        assert!(node.heads.lock().unwrap().iter().all(|head| head.contains(TOKEN)), "the node itself is asked with it");
    }
    assert_eq!(other.heads.lock().unwrap().len(), 0, "another address was asked");
}

#[test]
fn top_reads_a_bounded_answer_and_shows_no_control_characters() {
    let endless = Server::start(|_, mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        while stream.write_all(&[b' '; 1 << 16]).is_ok() {}
    });
    let (done, text) = top(&endless.address);
    assert!(!done && text.contains("more than") && text.contains("bytes"), "{text}");
    let hostile = Server::start(|_, stream| {
        let text = "\\u001b]52;c;cHduZWQ=\\u0007\\u009b2J\\r\\u001b[31mEVIL";
        let body = format!(
            r#"{{"run":"{text}","phase":"{text}","plan":{{"mode":"{text}"}},"diagnosis":{{"headline":"{text}"}},"graph":{{"stages":[{{"name":"{text}"}}],"edges":[{{"name":"{text}"}}]}}}}"#
        );
        respond(stream, "200 OK", "", &body);
    });
    let (done, text) = top(&hostile.address);
    assert!(done && text.contains("EVIL"), "{text}");
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    let refusing = Server::start(|_, stream| respond(stream, "200 OK", "", "\u{1b}[2J"));
    let (done, text) = top(&refusing.address);
    assert!(!done && text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    for (address, words) in [("http://user:pass@127.0.0.1:1", "--token-env"), ("file:///etc/passwd", "is no address")] {
        let (done, text) = top(address);
        assert!(!done && text.contains(words) && !text.contains("pass@"), "{text}");
    }
}

/// One request to `address`, and the whole answer.
pub fn ask(address: &str, head: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let _ = write!(stream, "{head}\r\n\r\n");
    let mut text = Vec::new();
    // A connection that is reset has said what it had to say.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}
