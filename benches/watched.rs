//! Cost of observing a run: the offline run alone, and while it is scraped every second and a page is open.
//!
//! ```text
//! cargo bench --bench watched            # --seconds 20 --pairs 5
//! ```
//!
//! The two alternate. The compared figure is the median over all pairs of the steps per second, without the first tenth of
//! the steps.

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
    let mut scrapes = Vec::new();
    for pair in 0..pairs {
        // The order within a pair alternates, too.
        for watched in [pair % 2 == 0, pair % 2 == 1] {
            let (rate, times) = run(watched, Duration::from_secs(seconds));
            rates[usize::from(watched)].push(rate);
            scrapes.extend(times);
            println!("{} {rate:.3} steps/s", if watched { "watched" } else { "alone  " });
        }
    }
    let [alone, watched] = rates.map(median);
    println!("alone {alone:.3} steps/s, watched {watched:.3}: {:+.2} %", 100.0 * (watched / alone - 1.0));
    println!("median time of {} scrapes: {:.2} ms", scrapes.len(), 1e3 * median(scrapes.clone()));
}

fn number(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs the offline configuration for `time`. Returns its steps per second, and the time of each scrape in seconds.
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
            // An open page polls every two seconds, and requests history and samples after each new step.
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
    let stopped = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill starts");
    assert!(stopped.success() && child.wait().expect("it ends").success());
    let text = std::fs::read_to_string(dir.path().join("run/metrics.jsonl")).expect("the run's metrics");
    let at = |line: &str| -> f64 {
        let step: Value = serde_json::from_str(line).expect("a line of JSON");
        step["time/run_seconds"].as_f64().expect("a time")
    };
    let lines: Vec<&str> = text.lines().collect();
    // The first steps warm up the caches.
    let (first, last) = (lines.len() / 10, lines.len() - 1);
    let rate = (last - first) as f64 / (at(lines[last]) - at(lines[first]));
    (rate, watcher.join().expect("the observing thread does not panic"))
}

fn get(address: &str, path: &str) {
    let Ok(mut stream) = TcpStream::connect(address) else { return };
    let sent = write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = Vec::new();
    // A node that is stopping does not answer.
    let _ = sent.and_then(|()| stream.read_to_end(&mut answer));
}
