//! Settings of the process that must stand before the first tensor and the first thread.

/// `mi_option_purge_delay` of mimalloc.h, which the crate does not name.
const PURGE_DELAY: std::ffi::c_int = 15;

/// Settles threads and memory for a program that computes; call it first of all.
///
/// Elementwise operations of candle share one process-wide pool, where two actors would queue for each other; one
/// thread each keeps them apart. Matrix products run on the pool of the actor that asks. The allocator, if it is
/// mimalloc, keeps freed pages for ten seconds: a training step frees and takes the same gigabytes each time, and
/// touching fresh pages costs more than the arithmetic between; what a checkpoint or an evaluation took once goes
/// back. Variables of the environment have the last word on all of it.
pub fn prepare() {
    for (name, value) in [("CANDLE_NUM_THREADS", "1"), ("RAYON_NUM_THREADS", "2")] {
        if std::env::var_os(name).is_none() {
            // SAFETY: no other thread runs yet.
            unsafe { std::env::set_var(name, value) };
        }
    }
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: sets a number in the allocator's options; no other thread runs yet.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 10_000) };
    }
}
