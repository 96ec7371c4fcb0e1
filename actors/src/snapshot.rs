//! Versioned values: published by a pointer swap, pulled by readers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

/// One version of a value. It is immutable and shared by its readers.
#[derive(Debug)]
pub struct Snapshot<T> {
    /// Version, which counts up from zero.
    pub version: u64,
    /// Fingerprint of the value's content, computed by the publisher.
    pub fingerprint: u64,
    /// The value.
    pub value: Arc<T>,
}

impl<T> Clone for Snapshot<T> {
    fn clone(&self) -> Self {
        Self { version: self.version, fingerprint: self.fingerprint, value: Arc::clone(&self.value) }
    }
}

/// Acknowledgement of a reader that it uses a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ack {
    /// Name of the reader.
    pub reader: String,
    /// Version that it uses.
    pub version: u64,
    /// Fingerprint of the value, as computed by the reader.
    pub fingerprint: u64,
    /// Number of versions that it is behind the latest.
    pub lag: u64,
    /// True if the fingerprint is the one with which this version was published.
    pub fingerprint_matches: bool,
}

/// Cell that holds the latest snapshot. Publishing never waits for a reader.
pub struct SnapshotCell<T> {
    inner: Mutex<Inner<T>>,
}

struct Inner<T> {
    latest: Snapshot<T>,
    readers: Vec<Reader>,
}

struct Reader {
    name: String,
    version: u64,
    fingerprint: u64,
    matches: bool,
}

impl<T> SnapshotCell<T> {
    /// Creates a cell with a first snapshot.
    pub fn new(version: u64, fingerprint: u64, value: Arc<T>) -> Self {
        let latest = Snapshot { version, fingerprint, value };
        Self { inner: Mutex::new(Inner { latest, readers: Vec::new() }) }
    }

    /// Makes `value` the latest. A version below the current one is ignored, because it comes from a learner of an
    /// older incarnation.
    pub fn publish(&self, version: u64, fingerprint: u64, value: Arc<T>) {
        let mut inner = self.lock();
        if version >= inner.latest.version {
            let old = std::mem::replace(&mut inner.latest, Snapshot { version, fingerprint, value });
            // Unless a reader still uses it, the old value is freed here, outside the lock.
            drop(inner);
            drop(old);
        }
    }

    /// Returns the latest snapshot.
    pub fn latest(&self) -> Snapshot<T> {
        self.lock().latest.clone()
    }

    /// Returns a reader with this name, which replaces an earlier one of the same name.
    pub fn reader(self: &Arc<Self>, name: &str) -> SnapshotReader<T> {
        self.lock().readers.retain(|reader| reader.name != name);
        SnapshotReader { cell: Arc::clone(self), name: name.to_owned(), running: None }
    }

    /// Returns each reader's last acknowledgement, ordered by name.
    pub fn acks(&self) -> Vec<Ack> {
        let inner = self.lock();
        let mut acks: Vec<Ack> = inner
            .readers
            .iter()
            .map(|reader| Ack {
                reader: reader.name.clone(),
                version: reader.version,
                fingerprint: reader.fingerprint,
                lag: inner.latest.version.saturating_sub(reader.version),
                fingerprint_matches: reader.matches,
            })
            .collect();
        acks.sort_by(|a, b| a.reader.cmp(&b.reader));
        acks
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reader of a [`SnapshotCell`], which acknowledges the versions that it uses.
pub struct SnapshotReader<T> {
    cell: Arc<SnapshotCell<T>>,
    name: String,
    running: Option<u64>,
}

impl<T> SnapshotReader<T> {
    /// Returns the latest snapshot.
    pub fn latest(&self) -> Snapshot<T> {
        self.cell.latest()
    }

    /// Returns the latest snapshot unless this reader has acknowledged its version last.
    pub fn refresh(&self) -> Option<Snapshot<T>> {
        let inner = self.cell.lock();
        (self.running != Some(inner.latest.version)).then(|| inner.latest.clone())
    }

    /// Records that this reader now uses `snapshot`, for whose value it computed `fingerprint`.
    pub fn acknowledge(&mut self, snapshot: &Snapshot<T>, fingerprint: u64) {
        self.running = Some(snapshot.version);
        let mut inner = self.cell.lock();
        inner.readers.retain(|reader| reader.name != self.name);
        inner.readers.push(Reader {
            name: self.name.clone(),
            version: snapshot.version,
            fingerprint,
            matches: fingerprint == snapshot.fingerprint,
        });
    }
}
