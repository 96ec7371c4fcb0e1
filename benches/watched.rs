//! What it costs a run to be looked at: the offline run by itself, and while it is scraped each second and a page is open.
//!
//! ```text
//! cargo bench --bench watched            # --seconds 20 --pairs 5
//! ```
//!
//! The two take turns; what is compared is steps a second between the first step and the last, medians of all pairs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

fn main() {
    // Only `cargo bench` measures; `cargo test --benches` has nothing to check here.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let (seconds, pairs) = (number("--seconds", 20), number("--pairs", 5));
    let mut rates = [Vec::new(), Vec::new()];
    let mut asked = Vec::new();
    for pair in 0..pairs {
        // Who goes first takes turns, too.
        for watched in [pair % 2 == 0, pair % 2 == 1] {
            let (rate, times) = run(watched, Duration::from_secs(seconds));
            rates[usize::from(watched)].push(rate);
            asked.extend(times);
            println!("{} {rate:.3} steps/s", if watched { "watched" } else { "alone  " });
        }
    }
    let [alone, watched] = rates.map(median);
    println!("alone {alone:.3} steps/s, watched {watched:.3}: {:+.2} %", 100.0 * (watched / alone - 1.0));
    println!("a scrape took {:.2} ms in the median, of {}", 1e3 * median(asked.clone()), asked.len());
}

fn number(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Steps a second of a run, and how long each scrape took, in seconds.
fn run(watched: bool, time: Duration) -> (f64, Vec<f64>) {
    let dir = tempfile::tempdir().expect("a folder for the run");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/offline.toml");
    let mut child = Command::new(env!("CARGO_BIN_EXE_preceptor"))
        .arg("train")
        .arg(config)
        .arg("--run-dir")
        .arg(dir.path().join("run"))
        .args(
            ["run.steps=1000000", "serve.listen=127.0.0.1:0", "learner.lr=1e-6"].iter().flat_map(|one| ["--set", one]),
        )
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines().map_while(Result::ok);
    let serving = lines.find(|line| line.contains("http://")).expect("the node serves");
    let address =
        serving.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("an address").to_owned();
    std::thread::spawn(move || lines.for_each(drop));
    let over = Arc::new(AtomicBool::new(!watched));
    let ended = Arc::clone(&over);
    let watcher = std::thread::spawn(move || {
        let (mut times, mut second) = (Vec::new(), 0u32);
        while !ended.load(Ordering::SeqCst) {
            let began = Instant::now();
            get(&address, "/metrics");
            times.push(began.elapsed().as_secs_f64());
            // An open page asks every other second, and for all of it where each time there is a new step.
            if second.is_multiple_of(2) {
                ["/status", "/history", "/samples"].into_iter().for_each(|path| get(&address, path));
            }
            second += 1;
            std::thread::sleep(Duration::from_secs(1).saturating_sub(began.elapsed()));
        }
        times
    });
    std::thread::sleep(time);
    over.store(true, Ordering::SeqCst);
    let stopped =
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("it can be told to stop");
    assert!(stopped.success() && child.wait().expect("it ends").success());
    let text = std::fs::read_to_string(dir.path().join("run/metrics.jsonl")).expect("the run's metrics");
    let at = |line: &str| -> f64 {
        let step: Value = serde_json::from_str(line).expect("a line of JSON");
        step["time/run_seconds"].as_f64().expect("a time")
    };
    let lines: Vec<&str> = text.lines().collect();
    // The first ones warm caches up.
    let (first, last) = (lines.len() / 10, lines.len() - 1);
    let rate = (last - first) as f64 / (at(lines[last]) - at(lines[first]));
    (rate, watcher.join().expect("who watches does not fail"))
}

fn get(address: &str, path: &str) {
    let Ok(mut stream) = TcpStream::connect(address) else { return };
    let asked = write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = Vec::new();
    // A node that is stopping answers no more.
    let _ = asked.and_then(|()| stream.read_to_end(&mut answer));
}
