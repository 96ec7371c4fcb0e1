//! The HTTP server's connections: their number, their time limits, and the eviction of old ones for new ones.
//!
//! Any client that reaches the port can open connections without a token. Each takes a file descriptor, and checkpoints
//! and judges need descriptors too, so the server limits the number of connections to a small part of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tower_service::Service;

use crate::util::mutex::lock;
use crate::util::process::descriptors;

/// Timeout for a client to send the head of its request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout of a connection, which carries one request, from its first byte to its last; for a long response, from one part of
/// it to the next.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of the head of a request in bytes.
const HEAD_BYTES: usize = 16 << 10;

/// Pause after the system has failed to accept a connection for lack of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Returns the maximum number of concurrent connections: an eighth of the file descriptors that the process may open,
/// from 4 to 256.
pub(super) fn max_connections() -> usize {
    (descriptors::limit() / 8).clamp(4, 256)
}

/// Serves the connections of `listener` with `router`, at most `most` concurrently, until the program ends.
///
/// A connection beyond that evicts the oldest connection whose client has not sent a request, or, if all have sent one,
/// the oldest connection. A client that sends and reads without delay is served in milliseconds, so it is served even
/// while others hold as many connections as they can.
pub(super) async fn accept(listener: TcpListener, router: Router, most: usize) {
    let permits = Arc::new(Semaphore::new(most));
    let open = Arc::new(Open::default());
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("the HTTP server cannot accept a connection: {error}");
                open.close_one();
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if permits.available_permits() == 0 {
            open.close_one();
        }
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let (connection, router) = (open.enter(), router.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = answer(stream, router, &connection.state) => {}
                () = connection.state.close.notified() => {}
                () = expiry(&connection.state) => {}
            }
            drop(connection);
            drop(permit);
        });
    }
}

/// Waits until a connection has reached its timeout.
async fn expiry(state: &State) {
    let mut deadline = Instant::now() + CONNECTION_TIMEOUT;
    loop {
        tokio::time::sleep_until(deadline.into()).await;
        match state.later(deadline) {
            Some(later) => deadline = later,
            None => return,
        }
    }
}

/// Reads one request of `stream` and answers it.
async fn answer(stream: TcpStream, router: Router, state: &Arc<State>) {
    let service = service_fn(|mut request: Request<Incoming>| {
        state.requested.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(Progress(Arc::clone(state)));
        let mut router = router.clone();
        async move { router.call(request).await }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        // One request per connection: an idle connection never holds a permit, and no client sends a request on a
        // connection that is being closed.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!("a connection to the HTTP server failed: {error}");
    }
}

/// The open connections, by age.
#[derive(Default)]
struct Open(Mutex<(u64, BTreeMap<u64, Arc<State>>)>);

#[derive(Default)]
struct State {
    /// True once the client has sent the head of a request.
    requested: AtomicBool,
    /// True once the connection has been asked to close.
    closing: AtomicBool,
    close: Notify,
    /// Time at which the last part of a long response was sent; `None` for other responses.
    progress: Mutex<Option<Instant>>,
}

impl State {
    /// Returns the time until which the connection may stay open after `deadline`, if its response has made progress.
    fn later(&self, deadline: Instant) -> Option<Instant> {
        lock(&self.progress).map(|at| at + CONNECTION_TIMEOUT).filter(|later| *later > deadline)
    }
}

/// Handle by which a long response keeps its connection open. It is an extension of each request.
#[derive(Clone)]
pub(super) struct Progress(Arc<State>);

impl Progress {
    /// Notes that a part of the response was sent.
    pub(super) fn made(&self) {
        *lock(&self.0.progress) = Some(Instant::now());
    }
}

/// Registration of an open connection, which is removed on drop.
struct Connection {
    number: u64,
    state: Arc<State>,
    open: Arc<Open>,
}

impl Open {
    fn enter(self: &Arc<Self>) -> Connection {
        let mut all = lock(&self.0);
        let (number, state) = (all.0, Arc::<State>::default());
        all.0 += 1;
        all.1.insert(number, Arc::clone(&state));
        Connection { number, state, open: Arc::clone(self) }
    }

    /// Asks a connection to close: the oldest that has sent no request, or else the oldest.
    fn close_one(&self) {
        let all = lock(&self.0);
        let mut open = all.1.values().filter(|state| !state.closing.load(Ordering::Relaxed));
        let oldest = open.clone().next();
        if let Some(state) = open.find(|state| !state.requested.load(Ordering::Relaxed)).or(oldest) {
            state.closing.store(true, Ordering::Relaxed);
            state.close.notify_one();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.open.0).1.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_stays_open_while_a_long_response_makes_progress() {
        let open = Arc::new(Open::default());
        let connection = open.enter();
        let began = Instant::now();
        let deadline = began + CONNECTION_TIMEOUT;
        assert_eq!(connection.state.later(deadline), None, "a response without parts has the timeout of a connection");
        *lock(&connection.state.progress) = Some(began + Duration::from_secs(20));
        let later = connection.state.later(deadline).unwrap();
        assert_eq!(later, began + Duration::from_secs(20) + CONNECTION_TIMEOUT);
        assert_eq!(connection.state.later(later), None, "nothing was sent since");
    }

    #[test]
    fn the_oldest_connection_without_a_request_is_evicted_first() {
        let open = Arc::new(Open::default());
        let connections: Vec<Connection> = (0..3).map(|_| open.enter()).collect();
        connections[0].state.requested.store(true, Ordering::Relaxed);
        let closing = || connections.iter().map(|one| one.state.closing.load(Ordering::Relaxed)).collect::<Vec<_>>();
        open.close_one();
        assert_eq!(closing(), [false, true, false]);
        open.close_one();
        assert_eq!(closing(), [false, true, true]);
        open.close_one();
        assert_eq!(closing(), [true, true, true]);
        open.close_one();
        drop(connections);
        assert!(open.0.lock().unwrap().1.is_empty());
    }
}
