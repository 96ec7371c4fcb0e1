//! The health of a worker, for its probes and its metrics.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use preceptor_actors::transport::{Depth, Lease, Offered, QueueLimits, Transport, TransportError};

use super::notices::Notices;
use crate::observe::telemetry::worker::WorkerState;
use crate::util::mutex::lock;

/// Time without progress of a worker's main loop after which the worker counts as stalled. Loading the weights of a large
/// model, and a step of many long completions on a CPU, take less.
pub const STALLED: Duration = Duration::from_secs(300);

/// Health of a worker, which its main loop updates.
#[derive(Debug)]
pub struct Health(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Time of the last turn of the main loop; `None` before the first one, while the worker connects to the broker.
    progress: Option<Instant>,
    /// Last failure of the broker, while it lasts. The worker begins without an answer of it.
    outage: Option<String>,
    /// Flag that is false while the connection to the broker is lost; `None` for a transport without a connection.
    link: Option<Arc<AtomicBool>>,
    /// Newest version that was announced, if it is not in use, and the time at which a newer one than that in use was seen.
    announced: Option<(u64, Instant)>,
    state: WorkerState,
}

impl Default for Health {
    fn default() -> Self {
        let outage = Some("the broker was not asked yet".to_owned());
        Self(Mutex::new(State { progress: None, outage, link: None, announced: None, state: WorkerState::default() }))
    }
}

impl Health {
    /// Notes a turn of the main loop.
    pub fn progressed(&self) {
        lock(&self.0).progress = Some(Instant::now());
    }

    /// Sets the numbers of groups that are sampled and that wait for newer weights, and of used and of all slots.
    pub fn working(&self, [sampling, waiting]: [usize; 2], [used, slots]: [usize; 2]) {
        let mut health = lock(&self.0);
        (health.progress, health.state) =
            (Some(Instant::now()), WorkerState { sampling, waiting, used, slots, ..health.state });
    }

    /// Uses `link` as the flag of the connection to the broker. A request of a connection that is lost fails only after seconds.
    pub fn watches(&self, link: Arc<AtomicBool>) {
        lock(&self.0).link = Some(link);
    }

    /// Notes that `version` is the newest one that was announced.
    pub fn announced(&self, version: u64) {
        let mut health = lock(&self.0);
        if health.state.version.is_none_or(|used| used < version) {
            let since = health.announced.map_or_else(Instant::now, |(_, since)| since);
            health.announced = Some((version, since));
        }
    }

    /// Sets the version of the weights in use; `None` if there are none.
    pub fn uses(&self, version: Option<u64>) {
        let mut health = lock(&self.0);
        health.state.version = version;
        // A version that was announced after the one that is now in use is missed from now on.
        health.announced = match (health.announced, version) {
            (Some((newest, _)), Some(version)) if newest > version => Some((newest, Instant::now())),
            _ => None,
        };
    }

    /// Notes an answer of the broker, or its failure.
    fn heard<T>(&self, answer: Result<T, TransportError>) -> Result<T, TransportError> {
        lock(&self.0).outage = match &answer {
            Err(TransportError::Unavailable(why)) => Some(why.clone()),
            _ => None,
        };
        answer
    }

    /// Returns the state for metrics.
    pub fn state(&self) -> WorkerState {
        let health = lock(&self.0);
        let behind = health.announced.map_or(Duration::ZERO, |(_, since)| since.elapsed());
        WorkerState { behind, broker: health.outage().is_none(), ..health.state }
    }

    /// Returns whether the main loop made progress within [`STALLED`].
    ///
    /// # Errors
    /// Says for how long it made none.
    pub fn alive(&self) -> Result<(), String> {
        alive(lock(&self.0).progress.map_or(Duration::ZERO, |at| at.elapsed()))
    }

    /// Returns whether the worker has weights and the broker answers.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn ready(&self) -> Result<(), String> {
        let health = lock(&self.0);
        match health.outage() {
            Some(why) => Err(format!("waits for the broker: {why}")),
            None if health.state.version.is_none() => Err("waits for weights".into()),
            None => Ok(()),
        }
    }
}

impl State {
    /// Returns why the broker does not answer, if it does not.
    fn outage(&self) -> Option<&str> {
        let lost = self.link.as_ref().is_some_and(|link| !link.load(Ordering::SeqCst));
        if lost { Some("the connection is lost") } else { self.outage.as_deref() }
    }
}

fn alive(silence: Duration) -> Result<(), String> {
    match silence > STALLED {
        true => Err(format!("no progress for {} s", silence.as_secs())),
        false => Ok(()),
    }
}

/// A transport, or notices, whose answers set a worker's health.
pub struct Observed<'a, T> {
    inner: &'a T,
    health: &'a Health,
}

impl<'a, T> Observed<'a, T> {
    /// Observes the answers of `inner`.
    pub fn new(inner: &'a T, health: &'a Health) -> Self {
        Self { inner, health }
    }
}

impl<T: Transport> Transport for Observed<'_, T> {
    fn create(&self, queue: &str, limits: QueueLimits) -> Result<(), TransportError> {
        self.health.heard(self.inner.create(queue, limits))
    }

    fn offer(&self, queue: &str, id: &str, body: &[u8]) -> Result<Offered, TransportError> {
        self.health.heard(self.inner.offer(queue, id, body))
    }

    fn pull(&self, queue: &str, most: usize, wait: Duration) -> Result<Vec<Box<dyn Lease>>, TransportError> {
        match self.inner.pull(queue, most, wait) {
            // An empty queue looks like a broker that does not answer.
            Ok(leases) if leases.is_empty() => Ok(leases),
            answer => self.health.heard(answer),
        }
    }

    fn depth(&self, queue: &str) -> Result<Depth, TransportError> {
        self.health.heard(self.inner.depth(queue))
    }

    fn remove(&self, queue: &str) -> Result<(), TransportError> {
        self.health.heard(self.inner.remove(queue))
    }
}

impl<T: Notices> Notices for Observed<'_, T> {
    fn open(&self, board: &str) -> Result<(), TransportError> {
        self.health.heard(self.inner.open(board))
    }

    fn set(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError> {
        self.health.heard(self.inner.set(board, key, value))
    }

    fn get(&self, board: &str, key: &str) -> Result<Option<Vec<u8>>, TransportError> {
        self.health.heard(self.inner.get(board, key))
    }

    /// Passes on what is told. That it was sent says nothing about the broker, which does not answer.
    fn tell(&self, board: &str, key: &str, value: &[u8]) -> Result<(), TransportError> {
        self.inner.tell(board, key, value)
    }

    fn heard(&self, board: &str) -> Result<Vec<(String, Vec<u8>)>, TransportError> {
        self.inner.heard(board)
    }
}

#[cfg(test)]
mod tests {
    use preceptor_actors::transport::MemoryTransport;

    use super::*;
    use crate::pipeline::cluster::MemoryNotices;

    #[test]
    fn a_worker_is_ready_with_weights_and_a_broker_that_answers() {
        let health = Health::default();
        assert!(health.ready().unwrap_err().contains("broker was not asked"));
        let notices = MemoryNotices::default();
        Observed::new(&notices, &health).get("board", "run").unwrap();
        assert_eq!(health.ready(), Err("waits for weights".into()));
        health.uses(Some(3));
        assert_eq!(health.ready(), Ok(()));
        let lost: Result<(), _> = health.heard(Err(TransportError::Unavailable("the cable is out".into())));
        assert!(lost.is_err() && health.ready().unwrap_err().contains("the cable is out") && !health.state().broker);
        // An empty queue proves nothing. A queue that is gone is an answer.
        let transport = MemoryTransport::default();
        let limits = QueueLimits { lease: Duration::from_secs(1), messages: 1, bytes: 1 };
        transport.create("empty", limits).unwrap();
        assert!(Observed::new(&transport, &health).pull("empty", 1, Duration::ZERO).unwrap().is_empty());
        assert!(health.ready().is_err());
        assert!(Observed::new(&transport, &health).pull("q", 1, Duration::ZERO).is_err());
        assert!(health.ready().is_ok() && health.state().broker);
        let link = Arc::new(AtomicBool::new(false));
        health.watches(Arc::clone(&link));
        assert!(health.ready().unwrap_err().contains("the connection is lost") && !health.state().broker);
        link.store(true, Ordering::SeqCst);
        assert_eq!(health.ready(), Ok(()));
        health.uses(None);
        assert_eq!(health.ready(), Err("waits for weights".into()));
    }

    #[test]
    fn a_worker_is_behind_from_the_first_version_that_it_misses() {
        let health = Health::default();
        health.uses(Some(3));
        health.announced(3);
        assert_eq!(health.state().behind, Duration::ZERO);
        health.announced(4);
        let since = lock(&health.0).announced.unwrap().1;
        health.announced(5);
        assert_eq!(lock(&health.0).announced, Some((5, since)));
        assert!(health.state().behind > Duration::ZERO);
        health.uses(Some(4));
        assert!(lock(&health.0).announced.is_some_and(|(version, at)| version == 5 && at > since));
        health.uses(Some(5));
        assert_eq!(health.state().behind, Duration::ZERO);
    }

    #[test]
    fn a_worker_is_alive_while_its_loop_turns() {
        assert_eq!(alive(STALLED), Ok(()));
        assert!(alive(STALLED + Duration::from_secs(1)).unwrap_err().contains("no progress for 301 s"));
        let health = Health::default();
        assert_eq!(health.alive(), Ok(()), "it connects to the broker");
        lock(&health.0).progress = Some(Instant::now().checked_sub(2 * STALLED).unwrap());
        assert!(health.alive().is_err());
        health.progressed();
        assert_eq!(health.alive(), Ok(()));
    }
}
