//! Parser of template files: TOML with the line of each key, and a list of the mistakes found.

use std::cell::RefCell;
use std::fmt;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::util::suggest::nearest;

/// Maximum number of mistakes that an error lists.
const MAX_LISTED: usize = 50;

/// All mistakes of a template file, in line order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(Vec<(usize, String)>);

impl Mistakes {
    /// Returns `value` if `found` is empty. A mistake is a line number, counted from 1, and a message; line 0 refers to
    /// the file itself.
    ///
    /// # Errors
    /// If `found` is not empty; the error holds all of it.
    pub fn unless<T>(mut found: Vec<(usize, String)>, value: T) -> Result<T, Self> {
        found.sort();
        if found.is_empty() { Ok(value) } else { Err(Self(found)) }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", if self.0.len() == 1 { "a mistake:" } else { "mistakes:" })?;
        for (line, message) in self.0.iter().take(MAX_LISTED) {
            match line {
                0 => write!(f, "\n  {message}")?,
                line => write!(f, "\n  line {line}: {message}")?,
            }
        }
        let more = self.0.len().saturating_sub(MAX_LISTED);
        if more > 0 { write!(f, "\n  and {more} more mistakes") } else { Ok(()) }
    }
}

impl std::error::Error for Mistakes {}

/// A string value of the file and its line.
#[derive(Debug, Clone, Default)]
pub struct Text {
    /// The string.
    pub text: String,
    /// Line of its key, counted from 1.
    pub line: usize,
}

/// Parser state: the mistakes found so far.
pub struct Reading {
    /// Byte offset of each line's start.
    starts: Vec<usize>,
    found: RefCell<Vec<(usize, String)>>,
}

/// Reader of one table of a template file.
#[derive(Clone, Copy)]
pub struct Section<'a> {
    reading: &'a Reading,
    table: &'a DeTable<'a>,
    /// Prefix of the keys' names in messages, such as `pairwise.`.
    prefix: &'a str,
    /// Line of the table's name; 0 for the root table.
    pub line: usize,
}

impl Reading {
    /// Parses `text`; TOML syntax errors are recorded as mistakes.
    pub fn new(text: &str) -> (Self, Spanned<DeTable<'_>>) {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let reading = Self { starts, found: RefCell::default() };
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let line = error.span().map_or(0, |span| reading.line(span.start));
            reading.mistake(line, format!("is not TOML: {}", error.message()));
        }
        (reading, table)
    }

    fn line(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset)
    }

    /// Records a mistake.
    pub fn mistake(&self, line: usize, message: String) {
        self.found.borrow_mut().push((line, message));
    }

    /// Returns the mistakes.
    pub fn into_mistakes(self) -> Vec<(usize, String)> {
        self.found.into_inner()
    }

    /// Returns the root table as a section that allows the keys `known`.
    pub fn root<'a>(&'a self, table: &'a DeTable<'a>, known: &[&str]) -> Section<'a> {
        let section = Section { reading: self, table, prefix: "", line: 0 };
        section.refuse_others(known);
        section
    }
}

impl<'a> Section<'a> {
    fn get(&self, key: &str) -> Option<(usize, &'a DeValue<'a>)> {
        let (name, value) = self.table.iter().find(|(name, _)| name.get_ref() == key)?;
        Some((self.reading.line(name.span().start), value.get_ref()))
    }

    fn refuse_others(&self, known: &[&str]) {
        for (name, _) in self.table.iter().filter(|(name, _)| !known.contains(&name.get_ref().as_ref())) {
            let meant = match nearest(name.get_ref(), known) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("known are {}", known.join(", ")),
            };
            let line = self.reading.line(name.span().start);
            self.reading
                .mistake(line, format!("{}{} is not a key of a template set; {meant}", self.prefix, name.get_ref()));
        }
    }

    fn wrong(&self, line: usize, key: &str, value: &DeValue<'_>, wanted: &str) {
        let prefix = self.prefix;
        self.reading.mistake(line, format!("{prefix}{key} is of the type {}, and must be {wanted}", value.type_str()));
    }

    /// Returns the text under `key`, if present.
    pub fn text(&self, key: &str) -> Option<Text> {
        let (line, value) = self.get(key)?;
        if let DeValue::String(text) = value {
            return Some(Text { text: text.to_string(), line });
        }
        self.wrong(line, key, value, "a text");
        // The key is present, so its absence is not reported as a second mistake.
        Some(Text { text: String::new(), line: 0 })
    }

    /// Returns the text under `key`; records a mistake if it is missing.
    pub fn needed(&self, key: &str) -> Text {
        self.text(key).unwrap_or_else(|| {
            self.reading.mistake(self.line, format!("{}{key} is missing", self.prefix));
            Text::default()
        })
    }

    /// Returns the flag under `key`, if present.
    pub fn flag(&self, key: &str) -> Option<bool> {
        let (line, value) = self.get(key)?;
        if let DeValue::Boolean(flag) = value {
            return Some(*flag);
        }
        self.wrong(line, key, value, "true or false");
        Some(false)
    }

    /// Returns the integer under `key` and its line; records a mistake and returns zeros if it is missing or not an
    /// integer.
    pub fn number(&self, key: &str) -> (i64, usize) {
        let Some((line, value)) = self.get(key) else {
            self.reading.mistake(self.line, format!("{}{key} is missing", self.prefix));
            return (0, 0);
        };
        match value {
            DeValue::Integer(number) => {
                (i64::from_str_radix(number.as_str(), number.radix()).unwrap_or(i64::MAX), line)
            }
            other => {
                self.wrong(line, key, other, "a whole number");
                (0, 0)
            }
        }
    }

    /// Returns the table under `key`, if present, allowing the keys `known`; `prefix` is prepended to its keys in
    /// messages.
    pub fn table(&self, key: &str, prefix: &'a str, known: &[&str]) -> Option<Self> {
        let (line, value) = self.get(key)?;
        let DeValue::Table(table) = value else {
            self.wrong(line, key, value, "a table");
            return None;
        };
        let section = Self { table, prefix, line, ..*self };
        section.refuse_others(known);
        Some(section)
    }

    /// Returns the tables of the list under `key`, each allowing the keys `known`.
    pub fn tables(&self, key: &str, prefix: &'a str, known: &[&str]) -> Vec<Self> {
        let Some((line, value)) = self.get(key) else { return Vec::new() };
        let DeValue::Array(list) = value else {
            self.wrong(line, key, value, "a list of tables");
            return Vec::new();
        };
        let mut found = Vec::new();
        for item in list.iter() {
            let DeValue::Table(table) = item.get_ref() else {
                self.wrong(line, key, item.get_ref(), "a list of tables");
                continue;
            };
            let section = Self { table, prefix, line: self.reading.line(item.span().start), ..*self };
            section.refuse_others(known);
            found.push(section);
        }
        found
    }

    /// Records a mistake at `line`.
    pub fn mistake(&self, line: usize, message: String) {
        self.reading.mistake(line, message);
    }
}
