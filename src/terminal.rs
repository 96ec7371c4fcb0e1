//! What a person reads: standard output, and text in which no control character of a model or a server is left. A leaf.

use std::borrow::Cow;
use std::fmt;
use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result};

/// Prints a line on standard output, control characters escaped, and returns an error where it cannot be written.
#[macro_export]
macro_rules! out {
    ($($text:tt)*) => { $crate::terminal::print(&format!($($text)*)) };
}

/// Prints a line of JSON on standard output, and returns an error where it cannot be written.
#[macro_export]
macro_rules! out_json {
    ($value:expr) => {
        $crate::terminal::print_json(&$value)
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
    let harmful = |c: char| c.is_control() && c != '\n' && c != '\t';
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

/// Whether standard error may be coloured: it is a terminal, and `NO_COLOR` is not set.
pub fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_become_escapes_and_text_stays() {
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
