//! The signals that ask the program to end: SIGINT (Ctrl-C), SIGTERM and SIGHUP.
//!
//! [`listen`] installs their handler at the start of the process, so that no signal is lost between two phases, and so that
//! the program can be ended where it is process 1 of a container, for which the kernel discards signals without a handler.
//! By default the program ends at once with status 128 + signal. A command that has something to keep holds a [`Deferred`]
//! and awaits [`after`].

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Once};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tokio::sync::watch;

use crate::say;

/// The signals received so far.
#[derive(Debug, Clone, Copy, Default)]
struct Received {
    first: Option<i32>,
    last: i32,
    count: u64,
}

static RECEIVED: LazyLock<watch::Sender<Received>> = LazyLock::new(|| watch::Sender::new(Received::default()));

/// Holders of a [`Deferred`].
static DEFERRED: AtomicUsize = AtomicUsize::new(0);

/// An end of the program, or of a part of it, that a signal asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Interrupted {
    /// The number of the signal.
    pub signal: i32,
    /// What was interrupted and how to continue, for a person to read.
    pub text: String,
}

impl Interrupted {
    /// An end by the first signal received.
    pub fn new(text: impl Into<String>) -> Self {
        Self { signal: received().unwrap_or(SIGINT), text: text.into() }
    }
}

/// While one is held, a signal does not end the program.
#[derive(Debug)]
pub struct Deferred(());

impl Drop for Deferred {
    fn drop(&mut self) {
        DEFERRED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Installs the handler, once for the process. SIGHUP keeps being ignored where the process was started so (`nohup`).
pub fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let signals = [SIGINT, SIGTERM].into_iter().chain((!is_ignored(SIGHUP)).then_some(SIGHUP));
        let listening = signal_hook::iterator::Signals::new(signals).and_then(|mut signals| {
            let each = move || signals.forever().for_each(take);
            std::thread::Builder::new().name("signals".into()).spawn(each)
        });
        // Writing beyond the limit of a file's size (ulimit -f) then fails like writing to a full disk. Nobody reads the flag.
        let limited = signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop);
        if let Err(error) = listening.map(drop).and(limited) {
            say!("warning: signals cannot be handled: {error}");
        }
    });
}

/// Lets the caller handle signals, those received before included, as long as it holds the result.
pub fn defer() -> Deferred {
    DEFERRED.fetch_add(1, Ordering::SeqCst);
    listen();
    Deferred(())
}

/// The first signal that was received.
pub fn received() -> Option<i32> {
    RECEIVED.borrow().first
}

/// Number of signals received so far.
pub fn count() -> u64 {
    RECEIVED.borrow().count
}

/// Waits until more than `count` signals were received, and returns the last of them.
pub async fn after(count: u64) -> i32 {
    let mut receiver = RECEIVED.subscribe();
    match receiver.wait_for(|received| received.count > count).await {
        Ok(received) => received.last,
        // The sender is a static.
        Err(_) => std::future::pending().await,
    }
}

/// The name of `signal`, such as SIGTERM.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

fn take(signal: i32) {
    RECEIVED.send_modify(|received| {
        received.first.get_or_insert(signal);
        received.last = signal;
        received.count += 1;
    });
    if DEFERRED.load(Ordering::SeqCst) == 0 {
        say!("interrupted by {}", name(signal));
        // A reader of standard output that has gone away does not matter any more.
        let _ = std::io::stdout().flush();
        std::process::exit(128 + signal);
    }
}

/// Whether the process ignores `signal`, by `proc(5)`.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or_default();
    mask >> (signal - 1) & 1 == 1
}
