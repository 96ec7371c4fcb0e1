//! What a person reads: standard output, and text in which no control character of a model or a server is left. A leaf.

use std::borrow::Cow;
use std::fmt;
use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result};

/// Prints a line on standard output, control characters escaped, and returns an error where it cannot be written.
#[macro_export]
macro_rules! out {
    ($($text:tt)*) => { $crate::util::terminal::print(&format!($($text)*)) };
}

/// Prints a line of JSON on standard output, and returns an error where it cannot be written.
#[macro_export]
macro_rules! out_json {
    ($value:expr) => {
        $crate::util::terminal::print_json(&$value)
    };
}

/// Exit status of a program whose reader of standard output went away: 128 and the number of SIGPIPE, as a shell reports
/// it of programs that end by that signal.
pub const CLOSED: u8 = 141;

/// Standard output has no reader any more.
#[derive(Debug)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output was closed by its reader")
    }
}

impl std::error::Error for Closed {}

/// `text` as a terminal may be given it: control characters, but for line feeds and tabs, become escapes such as `\\u{1b}`.
pub fn plain(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c == '\n' || c == '\t')
}

/// `text` with its control characters escaped, but for those that `keep` names.
fn escaped(text: &str, keep: impl Fn(char) -> bool) -> Cow<'_, str> {
    let harmful = |c: char| c.is_control() && !keep(c);
    if !text.contains(harmful) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if harmful(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    Cow::Owned(safe)
}

/// A JSON text in which the control characters that JSON allows in a string (delete, and those of Unicode's second block)
/// are escaped too.
pub fn plain_json(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        // The others stand between values, as line ends.
        if matches!(c, '\u{7f}'..='\u{9f}') { safe += &format!("\\u{:04x}", u32::from(c)) } else { safe.push(c) }
    }
    Cow::Owned(safe)
}

/// Prints `text` and a line feed on standard output; control characters are escaped.
///
/// # Errors
/// [`Closed`] where nobody reads it any more; what else keeps it from being written.
pub fn print(text: &str) -> Result<()> {
    write(&plain(text))
}

/// Prints `value` as JSON and a line feed on standard output.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &impl fmt::Display) -> Result<()> {
    write(&plain_json(&value.to_string()))
}

fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Closed.into()),
        other => other.context("cannot write to standard output"),
    }
}

/// Standard error for log lines, without the control characters of what they tell.
#[derive(Debug, Clone, Copy)]
pub struct LogLines {
    /// Whether lines are JSON.
    pub json: bool,
    /// Whether the log has colours of its own. The library that makes them escapes those that it is given.
    pub colours: bool,
}

impl Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let safe = match (self.json, self.colours) {
            (true, _) => plain_json(&text),
            (_, colours) => escaped(&text, |c| c == '\n' || c == '\t' || (colours && c == '\u{1b}')),
        };
        std::io::stderr().lock().write_all(safe.as_bytes()).map(|()| bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// Whether standard error may be coloured: it is a terminal, and `NO_COLOR` is not set.
pub fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_become_escapes_and_text_stays() {
        assert_eq!(
            escaped("\u{1b}[2ma\r\u{1b}[0m", |c| c == '\u{1b}'),
            "\u{1b}[2ma\\r\u{1b}[0m",
            "a log's own colours"
        );
        let text = "a\tb\nä – 漢\u{a0}";
        assert_eq!(plain(text), text);
        assert_eq!(plain("\u{1b}[31m\u{9b}2J\r\u{7f}\0\u{85}"), "\\u{1b}[31m\\u{9b}2J\\r\\u{7f}\\u{0}\\u{85}");
    }

    #[test]
    fn json_stays_json_of_the_same_value() {
        let value = serde_json::json!({ "text": "\u{1b}[2J\u{9b}\u{7f}\n" });
        let text = value.to_string();
        let safe = plain_json(&text);
        assert!(!safe.contains(char::is_control), "{safe:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }
}
