//! Writes checkpoints on a separate thread, while the run continues.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};
use crossbeam::channel::{Sender, bounded};

use super::{CheckpointFormat, CheckpointStore, Snapshot, WrittenCheckpoint};

/// A thread that writes one checkpoint at a time and refuses the next one meanwhile.
pub struct CheckpointWriter {
    snapshots: Option<Sender<Snapshot>>,
    busy: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl CheckpointWriter {
    /// Starts a writer that puts checkpoints of `format` into `store` and their copies into the mirror, and calls
    /// `report` with each result.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        store: Arc<CheckpointStore>,
        format: Arc<CheckpointFormat>,
        report: impl Fn(&Result<WrittenCheckpoint>) + Send + 'static,
    ) -> Result<Self> {
        let (sender, snapshots) = bounded::<Snapshot>(1);
        let busy = Arc::new(AtomicBool::new(false));
        let working = Arc::clone(&busy);
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            for snapshot in snapshots {
                let put = std::panic::AssertUnwindSafe(|| store.put(&format, &snapshot));
                let mut written = std::panic::catch_unwind(put)
                    .unwrap_or_else(|_| Err(anyhow!("writing the checkpoint of step {} panicked", snapshot.step())));
                // The next step may then update the optimizer's moments without copying them.
                drop(snapshot);
                report(&written);
                if let Ok(WrittenCheckpoint { path, .. }) = &mut written
                    && let Err(error) = store.copy(path)
                {
                    report(&Err(error));
                }
                working.store(false, Ordering::SeqCst);
            }
        })?;
        Ok(Self { snapshots: Some(sender), busy, thread: Some(thread) })
    }

    /// Returns whether a checkpoint is being written.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }

    /// Passes `snapshot` to the writer. Returns false and drops the snapshot while another one is being written.
    pub fn submit(&self, snapshot: Snapshot) -> bool {
        let Some(snapshots) = &self.snapshots else { return false };
        if self.busy.swap(true, Ordering::SeqCst) {
            return false;
        }
        let sent = snapshots.try_send(snapshot).is_ok();
        if !sent {
            self.busy.store(false, Ordering::SeqCst);
        }
        sent
    }

    /// Waits until the submitted checkpoint is written.
    pub fn finish(&mut self) {
        self.snapshots = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        self.finish();
    }
}
