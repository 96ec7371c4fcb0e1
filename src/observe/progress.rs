//! What a person sees while it runs: a bar on a terminal, plain lines elsewhere.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::util::terminal::{plain, plain_json};

/// Says a line on standard error. A reader that has gone away costs the line and nothing else, where `eprintln!` would panic.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::observe::progress::say(format_args!($($text)*)) };
}

/// Whether lines are for machines.
static MACHINES: AtomicBool = AtomicBool::new(false);

/// From now on each line is a JSON object with `timestamp`, `level`, `message`, `event`, and `figures` where there are
/// any; and no bar is shown.
pub fn for_machines() {
    MACHINES.store(true, Ordering::Relaxed);
}

/// As [`say!`](crate::say).
pub fn say(text: std::fmt::Arguments<'_>) {
    tell("line", &text.to_string(), None);
}

/// A line that says that something happened, of a kind, with its figures for machines.
fn tell(event: &str, text: &str, figures: Option<&Value>) {
    let mut line = plain(text).into_owned();
    if MACHINES.load(Ordering::Relaxed) {
        let timestamp = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let mut object = json!({ "timestamp": timestamp, "level": "INFO", "event": event, "message": text });
        if let Some(figures) = figures {
            object["figures"] = figures.clone();
        }
        line = plain_json(&object.to_string()).into_owned();
    }
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Progress of one phase. Lines of finished steps stay; the bar below them moves. Clones show the same bar.
#[derive(Clone)]
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// For a phase of `of` units of work, which are called `unit`.
    pub fn new(phase: &str, unit: &str, of: u64) -> Self {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr()) && !MACHINES.load(Ordering::Relaxed);
        let target = if terminal { ProgressDrawTarget::stderr_with_hz(4) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(of), target);
        let style = ProgressStyle::with_template(&format!(
            "{{spinner}} {phase} [{{bar:30}}] {{pos}}/{{len}} {unit}  {{elapsed}} elapsed, {{eta}} left  {{msg}}",
        ));
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Self { bar, terminal }
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        self.put("line", text, None);
    }

    /// The line of a finished step, which stays, and its figures.
    pub fn step(&self, text: &str, figures: &Value) {
        self.put("step", text, Some(figures));
    }

    fn put(&self, event: &str, text: &str, figures: Option<&Value>) {
        if self.terminal {
            self.bar.println(plain(text));
        } else {
            tell(event, text, figures);
        }
    }

    /// Where the bar stands.
    pub fn at(&self, units: u64) {
        self.bar.set_position(units);
    }

    /// What the bar says beside itself.
    pub fn message(&self, text: String) {
        self.bar.set_message(plain(&text).into_owned());
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
