//! Writes checkpoints beside the run: whoever hands one over goes on at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};
use crossbeam::channel::{Sender, bounded};

use super::{CheckpointFormat, CheckpointStore, Snapshot, Written};

/// A thread with one checkpoint at a time. While it has one, the next is not taken.
pub struct Writer {
    snapshots: Option<Sender<Snapshot>>,
    busy: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// A writer that puts checkpoints of `form` on `shelf`, and says of each how it went.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        shelf: Arc<CheckpointStore>,
        form: Arc<CheckpointFormat>,
        tell: impl Fn(&Result<Written>) + Send + 'static,
    ) -> Result<Self> {
        let (sender, snapshots) = bounded::<Snapshot>(1);
        let busy = Arc::new(AtomicBool::new(false));
        let working = Arc::clone(&busy);
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            for snapshot in snapshots {
                let put = std::panic::AssertUnwindSafe(|| shelf.put(&form, &snapshot));
                let mut written = std::panic::catch_unwind(put)
                    .unwrap_or_else(|_| Err(anyhow!("writing the checkpoint of step {} panicked", snapshot.step())));
                // What it holds of the optimizer is let go before the next step asks.
                drop(snapshot);
                tell(&written);
                if let Ok(Written { path, .. }) = &mut written
                    && let Err(error) = shelf.copy(path)
                {
                    tell(&Err(error));
                }
                working.store(false, Ordering::SeqCst);
            }
        })?;
        Ok(Self { snapshots: Some(sender), busy, thread: Some(thread) })
    }

    /// Whether a checkpoint is being written.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }

    /// Hands `snapshot` over; false, and it is dropped, while another is being written.
    pub fn put(&self, snapshot: Snapshot) -> bool {
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

    /// Waits until what was handed over is written.
    pub fn finish(&mut self) {
        self.snapshots = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it was told when it came.
            let _ = thread.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.finish();
    }
}
