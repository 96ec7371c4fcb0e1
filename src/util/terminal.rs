//! Standard output and log output, with the control characters in texts of models and servers escaped.

use std::borrow::Cow;
use std::fmt;
use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result};

/// Prints a line on standard output with control characters escaped. Returns an error if it cannot be written.
#[macro_export]
macro_rules! out {
    ($($text:tt)*) => { $crate::util::terminal::print(&format!($($text)*)) };
}

/// Prints a line of JSON on standard output. Returns an error if it cannot be written.
#[macro_export]
macro_rules! out_json {
    ($value:expr) => {
        $crate::util::terminal::print_json(&$value)
    };
}

/// Exit status after standard output was closed by its reader: 128 + SIGPIPE, as shells report for programs that end by
/// that signal.
pub const CLOSED: u8 = 141;

/// Error of writing to a standard output that its reader has closed.
#[derive(Debug)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output was closed by its reader")
    }
}

impl std::error::Error for Closed {}

/// Returns `text` with control characters, except for line feeds and tabs, replaced by escapes such as `\\u{1b}`.
pub fn plain(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c == '\n' || c == '\t')
}

/// Returns `text` with control characters escaped, except for those for which `keep` is true.
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

/// Escapes the control characters that JSON allows unescaped in strings (U+007F to U+009F) in the JSON text `text`.
pub fn plain_json(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        // Other control characters occur only between values, as line ends.
        if matches!(c, '\u{7f}'..='\u{9f}') { safe += &format!("\\u{:04x}", u32::from(c)) } else { safe.push(c) }
    }
    Cow::Owned(safe)
}

/// Prints `text` and a line feed on standard output with control characters escaped.
///
/// # Errors
/// [`Closed`] if the reader has closed standard output, or the I/O error if it cannot be written.
pub fn print(text: &str) -> Result<()> {
    write(&plain(text))
}

/// Prints the JSON value `value` and a line feed on standard output.
///
/// # Errors
/// See [`print()`].
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

/// A writer of log lines to standard error that escapes control characters.
#[derive(Debug, Clone, Copy)]
pub struct LogLines {
    /// True if lines are JSON.
    pub json: bool,
    /// True if the logging library adds colours. It escapes the control characters of its input itself.
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

/// Returns whether standard error may be coloured: it is a terminal, and `NO_COLOR` is not set.
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
            "colours of the logging library are kept"
        );
        let text = "a\tb\nä – 漢\u{a0}";
        assert_eq!(plain(text), text);
        assert_eq!(plain("\u{1b}[31m\u{9b}2J\r\u{7f}\0\u{85}"), "\\u{1b}[31m\\u{9b}2J\\r\\u{7f}\\u{0}\\u{85}");
    }

    #[test]
    fn escaped_json_has_the_same_value() {
        let value = serde_json::json!({ "text": "\u{1b}[2J\u{9b}\u{7f}\n" });
        let text = value.to_string();
        let safe = plain_json(&text);
        assert!(!safe.contains(char::is_control), "{safe:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }
}
