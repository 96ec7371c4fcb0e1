//! The process: settings that must stand before the first tensor and the first thread, and what it uses.

mod cgroup;
pub mod descriptors;
pub mod file_system;
pub mod sqlite;

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

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

/// What the process uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Processor time, user and system, in seconds.
    pub cpu_s: f64,
    /// Resident memory.
    pub resident_bytes: u64,
    /// Open file descriptors.
    pub open_fds: usize,
    /// Threads.
    pub threads: usize,
    /// When it began, in seconds since 1970.
    pub started_s: f64,
}

/// Resident memory of this process, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// Processor time of the calling thread in seconds: a measure of work that does not depend on how busy the machine is.
#[cfg(test)]
pub(crate) fn thread_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// What this process uses, where the system tells (Linux, by `proc(5)`).
pub fn usage() -> Option<Usage> {
    /// Linux counts processor time in hundredths of a second, on every architecture it tells it to programs.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // Counted from the third field of the manual, which is the first here.
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    // Once: told from two clocks, it would be another one each time.
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

/// The time in seconds since 1970.
pub fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Memory that may be taken without swapping and within the limits of this process's control groups, where the system tells.
pub fn available_bytes() -> Option<u64> {
    let group = cgroup::limits().memory.map(|memory| memory.free);
    [meminfo("MemAvailable:"), group].into_iter().flatten().min()
}

/// Returns the memory of the machine in bytes, or the limit of this process's control groups where that is lower; `None`
/// where the system does not tell.
pub fn total_bytes() -> Option<u64> {
    [meminfo("MemTotal:"), memory_limit()].into_iter().flatten().min()
}

/// Returns the value in bytes of a line of `/proc/meminfo`.
fn meminfo(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.split_whitespace().next()?.parse::<u64>().ok()?)
}

/// The memory limit of this process's control groups in bytes, where there is one.
pub fn memory_limit() -> Option<u64> {
    cgroup::limits().memory.map(|memory| memory.limit)
}

/// The processor quota of this process's control groups, such as 1.5 cores, where there is one.
pub fn core_quota() -> Option<f64> {
    cgroup::limits().cores
}

/// Cores that this process may use, at least one: those that it may run on, within the quota of its control groups.
pub fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| {
        let machine = std::thread::available_parallelism().map_or(1, usize::from);
        // A fraction of a core is no place for a thread of its own.
        let quota = core_quota().map_or(machine, |quota| quota.floor() as usize);
        machine.min(quota).max(1)
    })
}
