//! A file of templates as TOML whose keys know their lines, and the mistakes found in it.

use std::cell::RefCell;
use std::fmt;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::util::suggest::nearest;

/// Most mistakes that an error lists.
const MOST_LISTED: usize = 50;

/// All mistakes of a file of templates, in the order of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(Vec<(usize, String)>);

impl Mistakes {
    /// Returns `value` if `found` is empty. A mistake is a line, counted from 1, and what is wrong there; line 0 stands for
    /// the whole file.
    ///
    /// # Errors
    /// All of `found` at once.
    pub fn unless<T>(mut found: Vec<(usize, String)>, value: T) -> Result<T, Self> {
        found.sort();
        if found.is_empty() { Ok(value) } else { Err(Self(found)) }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", if self.0.len() == 1 { "a mistake:" } else { "mistakes:" })?;
        for (line, message) in self.0.iter().take(MOST_LISTED) {
            match line {
                0 => write!(f, "\n  {message}")?,
                line => write!(f, "\n  line {line}: {message}")?,
            }
        }
        let more = self.0.len().saturating_sub(MOST_LISTED);
        if more > 0 { write!(f, "\n  and {more} mistakes more") } else { Ok(()) }
    }
}

impl std::error::Error for Mistakes {}

/// A text of the file and its line.
#[derive(Debug, Clone, Default)]
pub struct Text {
    /// The text.
    pub text: String,
    /// The line of its key, counted from 1.
    pub line: usize,
}

/// The mistakes found so far.
pub struct Reading {
    /// Where each line begins.
    starts: Vec<usize>,
    found: RefCell<Vec<(usize, String)>>,
}

/// A table of the file.
#[derive(Clone, Copy)]
pub struct Section<'a> {
    reading: &'a Reading,
    table: &'a DeTable<'a>,
    /// What its keys' names begin with, such as `pairwise.`.
    prefix: &'a str,
    /// The line of its name; 0 for the whole file.
    pub line: usize,
}

impl Reading {
    /// Parses `text`; what is not TOML is among the mistakes.
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

    /// The mistakes.
    pub fn into_mistakes(self) -> Vec<(usize, String)> {
        self.found.into_inner()
    }

    /// The whole file as a section, with the keys `known`.
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

    /// The text under `key`, if it is there.
    pub fn text(&self, key: &str) -> Option<Text> {
        let (line, value) = self.get(key)?;
        if let DeValue::String(text) = value {
            return Some(Text { text: text.to_string(), line });
        }
        self.wrong(line, key, value, "a text");
        // It is there, so that no second mistake is found for its absence.
        Some(Text { text: String::new(), line: 0 })
    }

    /// The text under `key`, which must be there.
    pub fn needed(&self, key: &str) -> Text {
        self.text(key).unwrap_or_else(|| {
            self.reading.mistake(self.line, format!("{}{key} is missing", self.prefix));
            Text::default()
        })
    }

    /// The flag under `key`, if it is there.
    pub fn flag(&self, key: &str) -> Option<bool> {
        let (line, value) = self.get(key)?;
        if let DeValue::Boolean(flag) = value {
            return Some(*flag);
        }
        self.wrong(line, key, value, "true or false");
        Some(false)
    }

    /// The whole number under `key`, which must be there, and its line; 0 after a mistake.
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

    /// The table under `key` with the keys `known`, if it is there; `prefix` begins the names of its keys.
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

    /// The tables of the list under `key`, each with the keys `known`.
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
