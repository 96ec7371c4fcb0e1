//! The `preceptor` command.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h, which the crate does not name.
const PURGE_DELAY: std::ffi::c_int = 15;

fn main() -> ExitCode {
    keep_memory();
    preceptor::cli::main()
}

/// Tells the allocator to keep freed pages: a training step frees and takes the same gigabytes each time, and
/// touching fresh pages costs more than the arithmetic between. `MIMALLOC_PURGE_DELAY` has the last word.
fn keep_memory() {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: sets a number in the allocator's options; no other thread runs yet.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    }
}
