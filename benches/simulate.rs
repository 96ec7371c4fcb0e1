//! Simulation of runs with 1,000 and 10,000 workers, as a page with tables:
//!
//! ```text
//! cargo bench --bench simulate            # everything; writes benches/SIMULATION.md
//! cargo bench --bench simulate -- goal    # the rows of 10⁵ groups with 10,000 workers only
//! ```

// The suite's test uses other parts of it.
#[allow(dead_code)]
#[path = "simulate/fleet.rs"]
mod fleet;

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fleet::{Lengths, Outcome, Setting, Violation, cost, simulate};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Speed of a worker's link in bits per second.
const LINK: f64 = 200e6;
/// Size in bytes of a version of a model of 8 billion parameters: adapters of rank 16, and all weights in bf16.
const ADAPTERS: (&str, f64) = ("adapters", 84e6);
const WEIGHTS: (&str, f64) = ("all weights", 16e9);

/// A row of a table.
struct Row {
    setting: Setting,
    weights: (&'static str, f64),
    /// What differs from the first table.
    label: &'static str,
}

fn main() {
    // Only `cargo bench` measures; `cargo test --benches` has nothing to check here.
    let arguments: Vec<String> = std::env::args().collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let began = Instant::now();
    if arguments.iter().any(|argument| argument == "goal") {
        let rows = goal();
        let table = table(&rows, &outcomes(&rows), true);
        println!("{table}\n{:.0} s, {:.0} s of processor time", began.elapsed().as_secs_f64(), cpu_s());
        return;
    }
    let goal_rows = goal();
    let goal_outcomes = outcomes(&goal_rows);
    let (goal_s, goal_cpu_s) = (began.elapsed().as_secs_f64(), cpu_s());
    let (rows, variants) = (rows(), variants());
    let (outcomes_of_rows, outcomes_of_variants) = (outcomes(&rows), outcomes(&variants));
    let seconds = began.elapsed().as_secs_f64();
    let mut page = include_str!("simulate/page.txt").to_owned();
    for (mark, text) in [
        ("{goal}\n", table(&goal_rows, &goal_outcomes, true) + "\n"),
        ("{rows}\n", table(&rows, &outcomes_of_rows, false) + "\n"),
        ("{variants}\n", table(&variants, &outcomes_of_variants, true) + "\n"),
        ("{costs}\n", costs()),
        ("{goal seconds}", format!("{goal_s:.0}")),
        ("{goal processor}", format!("{goal_cpu_s:.0}")),
        ("{seconds}", format!("{seconds:.0}")),
        ("{processor}", format!("{:.0}", cpu_s())),
        ("{machine}", machine()),
    ] {
        page = page.replace(mark, &text);
    }
    println!("{page}");
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/SIMULATION.md"), page).expect("the page is written");
}

/// Returns the setting of the issue with 1,000 workers and groups of 16 completions, or 10,000 and 64.
fn setting(workers: usize, eta: u64) -> Setting {
    Setting {
        workers,
        eta,
        batch: 512,
        group: if workers > 1000 { 64 } else { 16 },
        part: 1,
        steps: eta + 24,
        warm_up: eta + 8,
        step: Duration::from_secs(120),
        lease: Duration::from_secs(60),
        capacity: 1.25,
        lengths: Lengths { median: 620.0, sigma: 1.0, longest: 4096.0 },
        deaths: 0.05,
        cuts: 0.001,
        slow: (0.05, 10.0),
        slowest: Some(3.0),
        resumed: false,
        transfer: Duration::ZERO,
        seed: 1,
        violation: Violation::None,
    }
}

fn row(setting: Setting, weights: (&'static str, f64), label: &'static str) -> Row {
    let transfer = Duration::from_secs_f64(8.0 * weights.1 / LINK);
    Row { setting: Setting { transfer, ..setting }, weights, label }
}

/// Returns the rows of 10⁵ groups.
fn goal() -> Vec<Row> {
    let goal = Setting { steps: 196, ..setting(10_000, 4) };
    let resumed = Setting { resumed: true, ..goal.clone() };
    vec![row(goal, ADAPTERS, "sampled again after a death"), row(resumed, ADAPTERS, "continued after a death")]
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for workers in [1000, 10_000] {
        for weights in [ADAPTERS, WEIGHTS] {
            rows.extend([0, 1, 4, 8].map(|eta| row(setting(workers, eta), weights, "")));
        }
    }
    rows
}

/// Returns the rows that show what limits the rate.
fn variants() -> Vec<Row> {
    let (few, many) = (setting(1000, 4), setting(10_000, 4));
    let group = |setting: &Setting, group: usize| Setting { group, ..setting.clone() };
    vec![
        row(few.clone(), ADAPTERS, "as above"),
        row(Setting { part: 16, ..few.clone() }, ADAPTERS, "a message is a group"),
        row(Setting { slowest: None, ..few.clone() }, ADAPTERS, "slow workers take work"),
        row(Setting { part: 16, slowest: None, ..few }, ADAPTERS, "both"),
        row(many.clone(), ADAPTERS, "as above"),
        row(Setting { deaths: 0.0, cuts: 0.0, ..many.clone() }, ADAPTERS, "no worker dies"),
        row(Setting { slowest: None, ..many.clone() }, ADAPTERS, "slow workers take work"),
        row(Setting { part: 64, ..many.clone() }, ADAPTERS, "a message is a group"),
        row(group(&many, 32), ADAPTERS, "32 completions in a group"),
        row(Setting { resumed: true, ..group(&many, 32) }, ADAPTERS, "the same, work is continued"),
        row(Setting { resumed: true, ..group(&many, 16) }, ADAPTERS, "16, work is continued"),
        row(Setting { resumed: true, ..many }, ADAPTERS, "64, work is continued"),
    ]
}

/// Simulates all rows, on as many threads as there are cores.
fn outcomes(rows: &[Row]) -> Vec<Outcome> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(vec![Outcome::default(); rows.len()]));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((i, row)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, rows.get(i)?)))
                {
                    let outcome = simulate(&row.setting);
                    eprintln!("{} of {}: {outcome:?}", i + 1, rows.len());
                    results.lock().expect("no thread panics")[i] = outcome;
                }
            });
        }
    });
    results.into_inner().expect("no thread panics")
}

fn table(rows: &[Row], outcomes: &[Outcome], labels: bool) -> String {
    let (label, line) = if labels { ("| | ", "|---") } else { ("", "") };
    let mut text = format!(
        "{label}| workers | group | weights | η | rate | done again | staleness, largest and mean | groups | lost | doubled | late results | weights per step |\n\
         {line}|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    );
    text = text.replacen("| | | ", "| | ", 1);
    for (row, outcome) in rows.iter().zip(outcomes) {
        let setting = &row.setting;
        if labels {
            write!(text, "| {} ", row.label).expect("a string is writable");
        }
        write!(text, "| {} | {} | {} | {} ", setting.workers, setting.group, row.weights.0, setting.eta)
            .expect("a string is writable");
        if outcome.stalled {
            writeln!(text, "| no group in an hour | – | – | {} | – | – | – | – |", outcome.groups)
                .expect("a string is writable");
            continue;
        }
        let per_step = outcome.transfers as f64 * row.weights.1 / outcome.steps.max(1) as f64;
        writeln!(
            text,
            "| {:.1} % | {:.1} % | {}, {:.2} | {} | {} | {} | {} | {} |",
            100.0 * outcome.share,
            100.0 * outcome.redone,
            outcome.oldest,
            outcome.age,
            outcome.groups,
            outcome.lost + outcome.foreign,
            outcome.doubled,
            outcome.repeated,
            size(per_step),
        )
        .expect("a string is writable");
    }
    text
}

/// Returns the table of the coordinator's cost.
fn costs() -> String {
    let mut text = String::from(
        "| group | completions in a message | coordinator, per group | prompts, per group | completions, per group |\n|---|---|---|---|---|\n",
    );
    for (group, part) in [(16, 1), (16, 16), (64, 1)] {
        let cost = cost(&Setting { group, part, batch: 64, ..setting(1000, 4) }, 20);
        let micros = cost.time.as_secs_f64() * 1e6;
        let (prompts, completions) = (size(cost.bytes.0 as f64), size(cost.bytes.1 as f64));
        writeln!(text, "| {group} | {part} | {micros:.0} µs | {prompts} | {completions} |")
            .expect("a string is writable");
    }
    text
}

fn size(bytes: f64) -> String {
    match bytes {
        bytes if bytes >= 1e12 => format!("{:.1} TB", bytes / 1e12),
        bytes if bytes >= 1e9 => format!("{:.0} GB", bytes / 1e9),
        bytes if bytes >= 1e6 => format!("{:.1} MB", bytes / 1e6),
        bytes => format!("{:.1} kB", bytes / 1e3),
    }
}

/// Returns the processor time of this process in seconds.
fn cpu_s() -> f64 {
    preceptor::util::process::usage().map_or(f64::NAN, |usage| usage.cpu_s)
}

/// Returns the name of the processor.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} cores of {}", name.map_or("an unknown processor", |(_, name)| name))
}
