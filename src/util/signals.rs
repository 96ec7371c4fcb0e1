//! Handling of the termination signals SIGINT (Ctrl-C), SIGTERM and SIGHUP.
//!
//! [`listen`] installs the handler at the start of the process, so that no signal is lost between two phases, and so
//! that the program can be terminated as process 1 of a container, for which the kernel discards signals without a
//! handler. By default the program exits immediately with status 128 + signal. A command that must save data holds a
//! [`Deferred`] and awaits [`after`].

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Once};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tokio::sync::watch;

use crate::status;

/// The signals received so far.
#[derive(Debug, Clone, Copy, Default)]
struct Received {
    first: Option<i32>,
    last: i32,
    count: u64,
}

static RECEIVED: LazyLock<watch::Sender<Received>> = LazyLock::new(|| watch::Sender::new(Received::default()));

/// Number of existing [`Deferred`] values.
static DEFERRED: AtomicUsize = AtomicUsize::new(0);

/// Error of a command that was interrupted by a signal.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Interrupted {
    /// Number of the signal.
    pub signal: i32,
    /// Message with the interrupted work and the way to continue.
    pub text: String,
}

impl Interrupted {
    /// Returns the error for the first signal received.
    pub fn new(text: impl Into<String>) -> Self {
        Self { signal: received().unwrap_or(SIGINT), text: text.into() }
    }
}

/// Guard while which signals do not end the program.
#[derive(Debug)]
pub struct Deferred(());

impl Drop for Deferred {
    fn drop(&mut self) {
        DEFERRED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Installs the handler, once per process. If SIGHUP was ignored at the start (`nohup`), it stays ignored.
pub fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let signals = [SIGINT, SIGTERM].into_iter().chain((!is_ignored(SIGHUP)).then_some(SIGHUP));
        let listening = signal_hook::iterator::Signals::new(signals).and_then(|mut signals| {
            let each = move || signals.forever().for_each(take);
            std::thread::Builder::new().name("signals".into()).spawn(each)
        });
        // With SIGXFSZ handled, writing beyond the file size limit (ulimit -f) fails like writing to a full disk. The
        // flag itself is not used.
        let limited = signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop);
        if let Err(error) = listening.map(drop).and(limited) {
            status!("warning: cannot install signal handlers: {error}");
        }
    });
}

/// Lets the caller handle signals, including earlier ones, while it holds the returned guard.
pub fn defer() -> Deferred {
    DEFERRED.fetch_add(1, Ordering::SeqCst);
    listen();
    Deferred(())
}

/// Returns the first received signal.
pub fn received() -> Option<i32> {
    RECEIVED.borrow().first
}

/// Returns the number of signals received so far.
pub fn count() -> u64 {
    RECEIVED.borrow().count
}

/// Waits until more than `count` signals were received, and returns the last of them.
pub async fn after(count: u64) -> i32 {
    let mut receiver = RECEIVED.subscribe();
    match receiver.wait_for(|received| received.count > count).await {
        Ok(received) => received.last,
        // The sender is never dropped, because it is a static.
        Err(_) => std::future::pending().await,
    }
}

/// Returns the name of `signal`, such as SIGTERM.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

fn take(signal: i32) {
    // This is read before the signal is published: a command that reacts to it may end, and drop its guard, at once.
    let deferred = DEFERRED.load(Ordering::SeqCst) > 0;
    RECEIVED.send_modify(|received| {
        received.first.get_or_insert(signal);
        received.last = signal;
        received.count += 1;
    });
    if !deferred {
        status!("interrupted by {}", name(signal));
        // An error, for example of a closed standard output, is irrelevant at exit.
        let _ = std::io::stdout().flush();
        std::process::exit(128 + signal);
    }
}

/// Returns whether the process ignores `signal`, by `proc(5)`.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or_default();
    mask >> (signal - 1) & 1 == 1
}
