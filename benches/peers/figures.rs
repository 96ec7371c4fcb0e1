//! Measurements of repeated work: wall time, CPU time, page faults and peak memory of the process.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// Minimum seconds of a repeat, which does its work several times if necessary. The kernel counts CPU time in hundredths of
/// a second.
const MIN_SECONDS: f64 = 2.0;

/// Time, and the process's resource usage until then.
pub struct Mark {
    pub at: Instant,
    cpu_s: f64,
    minor_faults: u64,
}

impl Mark {
    /// Returns the time and the resource usage of this moment.
    pub fn now() -> Result<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        // The second field is the program's name in parentheses; the list begins with the third field of proc(5).
        let (_, fields) = stat.rsplit_once(") ").context("/proc/self/stat has an unknown format")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let field = |number: usize| -> Result<u64> { Ok(fields.get(number - 3).context("a field")?.parse()?) };
        let ticks = field(14)? + field(15)?;
        Ok(Self { at: Instant::now(), cpu_s: ticks as f64 / 100.0, minor_faults: field(10)? })
    }
}

/// Returns the peak resident memory of the process in KiB.
pub fn peak_rss_kib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in /proc/self/status")?;
    Ok(peak.trim().trim_end_matches(" kB").parse()?)
}

/// Measurements of the repeats.
pub struct Figures {
    units: usize,
    unit: &'static str,
    wall_s: Vec<f64>,
    cpu_s: Vec<f64>,
    minor_faults: Vec<u64>,
}

impl Figures {
    /// Creates an empty list of repeats, each of which does `units` units of work.
    pub fn new(units: usize, unit: &'static str) -> Self {
        Self { units, unit, wall_s: vec![], cpu_s: vec![], minor_faults: vec![] }
    }

    /// Adds a repeat.
    pub fn add(&mut self, from: &Mark, to: &Mark) {
        self.wall_s.push((to.at - from.at).as_secs_f64());
        self.cpu_s.push(to.cpu_s - from.cpu_s);
        self.minor_faults.push(to.minor_faults - from.minor_faults);
    }

    /// Returns the fields of the output.
    pub fn done(self) -> Map<String, Value> {
        let Self { units, unit, wall_s, cpu_s, minor_faults } = self;
        let fields: [(&str, Value); 5] = [
            ("units", json!(units)),
            ("unit", json!(unit)),
            ("wall_s", json!(wall_s)),
            ("cpu_s", json!(cpu_s)),
            ("minor_faults", json!(minor_faults)),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Runs `work` once as a warm-up, twice if it is short, and then measures `repeats` repeats, each of which runs it for at
/// least [`MIN_SECONDS`].
pub fn repeat(
    repeats: u64,
    units: usize,
    unit: &'static str,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Map<String, Value>> {
    let mut seconds = || {
        let began = Instant::now();
        work().map(|()| began.elapsed().as_secs_f64())
    };
    let first = seconds()?;
    let warm = if first < MIN_SECONDS { seconds()? } else { first };
    let times = (MIN_SECONDS / warm).ceil() as usize;
    let mut figures = Figures::new(units * times, unit);
    for _ in 0..repeats {
        let from = Mark::now()?;
        (0..times).try_for_each(|_| work())?;
        figures.add(&from, &Mark::now()?);
    }
    Ok(figures.done())
}

/// Measures `repeats` single runs of `work`, which takes long, without a warm-up of its own.
pub fn once(
    repeats: u64,
    units: usize,
    unit: &'static str,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Map<String, Value>> {
    let mut figures = Figures::new(units, unit);
    for _ in 0..repeats {
        let from = Mark::now()?;
        work()?;
        figures.add(&from, &Mark::now()?);
    }
    Ok(figures.done())
}
