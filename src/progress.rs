//! What a person sees while it runs: a bar on a terminal, plain lines elsewhere.

use std::io::Write;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Says a line on standard error. A reader that has gone away costs the line and nothing else, where `eprintln!` would panic.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::progress::say(format_args!($($text)*)) };
}

/// As [`say!`](crate::say).
pub fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{text}");
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
        let terminal = console_is_terminal();
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
        if self.terminal {
            self.bar.println(text);
        } else {
            say!("{text}");
        }
    }

    /// Where the bar stands.
    pub fn at(&self, units: u64) {
        self.bar.set_position(units);
    }

    /// What the bar says beside itself.
    pub fn message(&self, text: String) {
        self.bar.set_message(text);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn console_is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}
