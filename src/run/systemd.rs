//! What a service manager is told (sd_notify): ready, alive, stopping. Without one, nothing is.

use sd_notify::NotifyState;

/// The graph runs.
pub(super) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The watchdog's sign: the run makes progress.
pub(super) fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// The run ends; its checkpoint may take a while.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("the service manager could not be told: {error}");
    }
}
