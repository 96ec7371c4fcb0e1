//! The process: settings that are required before the first tensor and thread, and its resource usage and limits.

mod cgroup;
pub mod descriptors;
pub mod file_system;
pub mod sqlite;

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// `mi_option_purge_delay` of mimalloc.h, for which the crate has no constant.
const PURGE_DELAY: std::ffi::c_int = 15;

/// Configures thread pools and the allocator. Must be called before any other thread is started.
///
/// Candle's elementwise operations share a process-wide pool, in which actors would wait for each other, so each runs
/// on one thread. Matrix products run on the calling actor's pool. The allocator, if it is mimalloc, keeps freed pages
/// for ten seconds: each training step allocates and frees the same gigabytes, and touching fresh pages costs more than
/// the arithmetic; memory of a checkpoint or an evaluation is returned to the system. Environment variables override
/// each setting.
pub fn prepare() {
    let pool = if cores() == 1 { "1" } else { "2" };
    for (name, value) in [("CANDLE_NUM_THREADS", "1"), ("RAYON_NUM_THREADS", pool)] {
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

/// Resource usage of the process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// CPU time (user and system) in seconds.
    pub cpu_s: f64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Number of open file descriptors.
    pub open_fds: usize,
    /// Number of threads.
    pub threads: usize,
    /// Unix time at which the process began, in seconds.
    pub started_s: f64,
}

/// Returns the resident memory of this process in bytes, or `None` if the system does not report it.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// Returns the CPU time of the calling thread in seconds: a measure of work that does not depend on the machine's load.
#[cfg(test)]
pub(crate) fn thread_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// Returns the resource usage of this process (on Linux, from `proc(5)`), or `None` if the system does not report it.
pub fn usage() -> Option<Usage> {
    /// Unit of CPU times in `/proc`: a hundredth of a second on every architecture.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The process name in parentheses may contain any character.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // Fields are numbered as in the manual, whose third field is the first here.
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    // Computed once, because it combines two clocks and would vary.
    static STARTED: OnceLock<f64> = OnceLock::new();
    let started_s = match STARTED.get() {
        Some(started) => *started,
        None => {
            let uptime: f64 = std::fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
            let since_boot = field(22)? / TICKS;
            *STARTED.get_or_init(|| unix_seconds() - uptime + since_boot)
        }
    };
    Some(Usage {
        cpu_s: (field(14)? + field(15)?) / TICKS,
        resident_bytes: resident_bytes()?,
        open_fds: std::fs::read_dir("/proc/self/fd").ok()?.count(),
        threads: field(20)? as usize,
        started_s,
    })
}

/// Returns the Unix time in seconds.
pub fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Returns the memory in bytes that can be allocated without swapping and within the limits of the process's control
/// groups, or `None` if unknown.
pub fn available_bytes() -> Option<u64> {
    let group = cgroup::limits().memory.map(|memory| memory.free);
    [meminfo("MemAvailable:"), group].into_iter().flatten().min()
}

/// Returns the memory of the machine in bytes, or the limit of this process's control groups if that is lower; `None` if
/// the system does not report it.
pub fn total_bytes() -> Option<u64> {
    [meminfo("MemTotal:"), memory_limit()].into_iter().flatten().min()
}

/// Returns the value in bytes of a line of `/proc/meminfo`.
fn meminfo(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.split_whitespace().next()?.parse::<u64>().ok()?)
}

/// Returns the memory limit of this process's control groups in bytes, if any.
pub fn memory_limit() -> Option<u64> {
    cgroup::limits().memory.map(|memory| memory.limit)
}

/// Returns the CPU quota of this process's control groups in cores, such as 1.5, if any.
pub fn core_quota() -> Option<f64> {
    cgroup::limits().cores
}

/// Returns the number of cores that this process may use, at least one: its CPU affinity, limited by the quota of its
/// control groups.
pub fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| {
        let machine = std::thread::available_parallelism().map_or(1, usize::from);
        // A fraction of a core does not justify another thread.
        let quota = core_quota().map_or(machine, |quota| quota.floor() as usize);
        machine.min(quota).max(1)
    })
}
