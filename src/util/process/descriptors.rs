//! The process's limit of open file descriptors.

/// Maximum value that the limit is raised to.
const ENOUGH: u64 = 65_536;

/// Raises the soft limit of open file descriptors to the hard limit, up to 65,536. Many systems start programs with a
/// soft limit of 1,024, for compatibility with `select`.
pub fn raise_limit() {
    #[cfg(unix)]
    if let Some(mut limit) = read() {
        let wanted = limit.rlim_max.min(ENOUGH as libc::rlim_t);
        if limit.rlim_cur < wanted {
            limit.rlim_cur = wanted;
            // SAFETY: `limit` is a valid rlimit. A refusal leaves the limit as it was.
            unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        }
    }
}

/// Returns the maximum number of open file descriptors of this process, or 1,024 if it is unknown.
pub fn limit() -> usize {
    #[cfg(unix)]
    if let Some(limit) = read() {
        return usize::try_from(limit.rlim_cur.min(ENOUGH as libc::rlim_t)).unwrap_or(usize::MAX);
    }
    1024
}

#[cfg(unix)]
fn read() -> Option<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writing a rlimit.
    let done = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    (done == 0).then_some(limit)
}
