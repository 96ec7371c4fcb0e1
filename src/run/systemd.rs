//! Notifications to the service manager (sd_notify). Without a service manager, they do nothing.

use sd_notify::NotifyState;

/// Notifies that the graph has started.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Notifies the watchdog that the run makes progress.
pub(super) fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// Notifies that the run ends, which may take a while.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("cannot notify the service manager: {error}");
    }
}
