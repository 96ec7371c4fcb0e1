//! Progress output on standard error: a progress bar on a terminal, else plain lines or JSON objects.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::util::terminal::{plain, plain_json};

/// Prints a line on standard error. If standard error is closed, the line is lost; `eprintln!` would panic.
#[macro_export]
macro_rules! status {
    ($($text:tt)*) => { $crate::observe::progress::say(format_args!($($text)*)) };
}

/// True if lines are printed as JSON objects.
static JSON: AtomicBool = AtomicBool::new(false);

/// Switches to JSON output for the rest of the process: each line is an object with `timestamp`, `level`, `message`,
/// `event`, and optionally `figures`, and no bar is shown.
pub fn use_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// Prints a line on standard error. Called through [`status!`](crate::status).
pub fn say(text: std::fmt::Arguments<'_>) {
    print_event("line", &text.to_string(), None);
}

/// Prints the line of an event. `event` is its kind and `figures` its data, which only JSON output contains.
fn print_event(event: &str, text: &str, figures: Option<&Value>) {
    let mut line = plain(text).into_owned();
    if JSON.load(Ordering::Relaxed) {
        let timestamp = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let mut object = json!({ "timestamp": timestamp, "level": "INFO", "event": event, "message": text });
        if let Some(figures) = figures {
            object["figures"] = figures.clone();
        }
        line = plain_json(&object.to_string()).into_owned();
    }
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Progress display of one phase: permanent lines of finished steps, and below them a bar. Clones share the bar.
#[derive(Clone)]
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// Creates the display of the phase `phase` with `of` units of work, such as `prompts`.
    pub fn new(phase: &str, unit: &str, of: u64) -> Self {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr()) && !JSON.load(Ordering::Relaxed);
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

    /// Prints `text` as a line that remains on standard error, above the bar.
    pub fn line(&self, text: &str) {
        self.print("line", text, None);
    }

    /// Prints `text` as the line of a finished step, like [`Self::line`]. With `--log json` the line is an object that
    /// also has the step's `figures`.
    pub fn step(&self, text: &str, figures: &Value) {
        self.print("step", text, Some(figures));
    }

    fn print(&self, event: &str, text: &str, figures: Option<&Value>) {
        if self.terminal {
            self.bar.println(plain(text));
        } else {
            print_event(event, text, figures);
        }
    }

    /// Sets the number of finished units, the position of the bar.
    pub fn at(&self, units: u64) {
        self.bar.set_position(units);
    }

    /// Sets the text next to the bar.
    pub fn message(&self, text: String) {
        self.bar.set_message(plain(&text).into_owned());
    }

    /// Removes the bar from the terminal.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
