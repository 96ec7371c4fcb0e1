//! A strict reader of TOML that goes on after a mistake.

use std::fmt;

use toml::{Table, Value};

use super::choice::Choice;
use crate::nearest::nearest;

/// Most mistakes that are told one by one: a person reads no more, and each is looked for in the whole file.
const MOST_TOLD: usize = 50;
/// Most characters of what is said of one.
const LONGEST: usize = 1000;
/// Most names in the path of an override.
const DEEPEST: usize = 8;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// File and line, or `--set`.
    pub place: String,
    /// Path of the key, such as `learner.eta`.
    pub key: String,
    /// What is wrong and what to do.
    pub message: String,
}

/// All mistakes of a configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    pub(super) fn one(place: &str, key: &str, message: &str) -> Self {
        Self(vec![ConfigError { place: place.into(), key: key.into(), message: message.into() }])
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = if self.0.len() == 1 { "a mistake" } else { "mistakes" };
        write!(f, "the configuration has {many}:")?;
        for ConfigError { place, key, message } in &self.0 {
            let colon = if key.is_empty() { "" } else { ": " };
            write!(f, "\n  {place}: {key}{colon}{message}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A parsed file with overrides, and the mistakes found in it so far.
pub(super) struct Document {
    origin: String,
    text: String,
    root: Table,
    overridden: Vec<String>,
    sections: Vec<&'static str>,
    errors: Vec<(usize, ConfigError)>,
    /// Mistakes that are counted and not told.
    more: usize,
}

impl Document {
    pub(super) fn new(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigErrors> {
        let root = text.parse::<Table>().map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            ConfigErrors::one(
                &format!("{origin}:{line}"),
                "",
                &format!("is not TOML: {}", cut(error.message(), LONGEST)),
            )
        })?;
        let mut document = Self {
            origin: origin.into(),
            text: text.into(),
            root,
            overridden: Vec::new(),
            sections: Vec::new(),
            errors: Vec::new(),
            more: 0,
        };
        for text in overrides {
            document.set(text);
        }
        Ok(document)
    }

    fn set(&mut self, text: &str) {
        let parts = text.split_once('=').map(|(path, value)| (path.trim(), value.trim()));
        let named =
            |path: &str| (2..=DEEPEST).contains(&path.split('.').count()) && !path.split('.').any(str::is_empty);
        let Some((path, value)) = parts.filter(|(path, _)| named(path)) else {
            let message = format!("{:?} is not section.key=value, such as learner.eta=0", cut(text, 100));
            self.errors.push((0, ConfigError { place: "--set".into(), key: String::new(), message }));
            return;
        };
        let key = path.split('.').take(2).collect::<Vec<_>>().join(".");
        let value = match overriding(value) {
            Ok(value) => value,
            Err(message) => {
                self.errors.push((0, ConfigError { place: "--set".into(), key: cut(&key, 100), message }));
                return;
            }
        };
        let (mut table, mut keys) = (&mut self.root, path.split('.').peekable());
        let mut above = Vec::new();
        while let Some(name) = keys.next() {
            if keys.peek().is_none() {
                table.insert(name.to_owned(), value);
                break;
            }
            above.push(name);
            let inner = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
            let kind = inner.type_str();
            let Value::Table(inner) = inner else {
                let message = format!(
                    "{} has the type {kind} and no keys below it; override it as a whole",
                    cut(&above.join("."), 100)
                );
                self.errors.push((0, ConfigError { place: "--set".into(), key: cut(&key, 100), message }));
                return;
            };
            table = inner;
        }
        self.overridden.push(key);
    }

    /// Whether nothing was found wrong with any of `keys`.
    pub(super) fn sound(&self, keys: &[&str]) -> bool {
        !self.errors.iter().any(|(_, error)| keys.contains(&error.key.as_str()))
    }

    /// Takes a section out; an absent one reads as empty.
    pub(super) fn section(&mut self, name: &'static str) -> Section<'_> {
        self.sections.push(name);
        let table = match self.root.remove(name) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                self.error(name, &format!("is a {}, not a section; write [{name}]", other.type_str()));
                Table::new()
            }
        };
        Section { document: self, name, inside: None, table, known: Vec::new() }
    }

    /// The value of a key before its section is read.
    pub(super) fn peek(&self, section: &str, key: &str) -> Option<&Value> {
        self.root.get(section)?.get(key)
    }

    /// A table within a key's value, read as a section of its own. The key stays to be taken by its section.
    pub(super) fn nested(&mut self, section: &'static str, key: &'static str, inner: &'static str) -> Section<'_> {
        let table = self.peek(section, key).and_then(|value| value.get(inner)).and_then(Value::as_table).cloned();
        if table.is_none() {
            self.error(&format!("{section}.{key}"), &format!("{inner} is no table; write {inner} = {{ … }}"));
        }
        Section {
            document: self,
            name: section,
            inside: Some((key, inner.to_owned())),
            table: table.unwrap_or_default(),
            known: Vec::new(),
        }
    }

    /// Element `i` of the list of tables `section.key`, read as a section of its own.
    pub(super) fn item(&mut self, section: &'static str, key: &'static str, i: usize, value: Value) -> Section<'_> {
        let table = match value {
            Value::Table(table) => table,
            other => {
                self.error(&format!("{section}.{key}"), &format!("[{i}] is a {}, not a table", other.type_str()));
                Table::new()
            }
        };
        Section { document: self, name: section, inside: Some((key, format!("[{i}]"))), table, known: Vec::new() }
    }

    /// Notes a mistake at `key`.
    pub(super) fn error(&mut self, key: &str, message: &str) {
        if self.errors.len() >= MOST_TOLD {
            self.more += 1;
            return;
        }
        let (line, place) = self.place(key);
        self.errors.push((line, ConfigError { place, key: cut(key, 100), message: cut(message, LONGEST) }));
    }

    fn place(&self, key: &str) -> (usize, String) {
        if self.overridden.iter().any(|overridden| overridden == key) {
            return (0, "--set".into());
        }
        let (section, name) = key.split_once('.').map_or((key, None), |(section, name)| (section, Some(name)));
        let mut inside = None;
        for (number, line) in self.text.lines().enumerate() {
            let line = line.trim();
            if let Some(header) = header(line) {
                // A list of tables has a header of its own for each; the first is the list's place.
                if header.strip_prefix('[').and_then(|name| name.strip_suffix(']')) == Some(key) {
                    inside = Some(number + 1);
                    break;
                }
                if header == section {
                    inside = Some(number + 1);
                    if name.is_none() {
                        break;
                    }
                    continue;
                }
                if inside.is_some() {
                    break;
                }
            }
            let (Some(_), Some(name)) = (inside, name) else { continue };
            if line.strip_prefix(name).is_some_and(|rest| rest.trim_start().starts_with('=')) {
                inside = Some(number + 1);
                break;
            }
        }
        let line = inside.unwrap_or(0);
        (line, if line > 0 { format!("{}:{line}", self.origin) } else { self.origin.clone() })
    }

    /// The configuration, if nothing is wrong.
    pub(super) fn finish<T>(mut self, config: T) -> Result<T, ConfigErrors> {
        let unknown: Vec<String> = self.root.keys().cloned().collect();
        for name in unknown {
            let sections = self.sections.clone();
            self.error(&name, &format!("unknown section{}", suggestion(&name, &sections)));
        }
        self.errors.sort_by_key(|(line, _)| *line);
        if self.more > 0 {
            let message = format!("and {} mistakes more", self.more);
            self.errors.push((usize::MAX, ConfigError { place: self.origin.clone(), key: String::new(), message }));
        }
        if self.errors.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors(self.errors.into_iter().map(|(_, e)| e).collect()))
        }
    }
}

/// The value that an override gives a key.
fn overriding(text: &str) -> Result<Value, String> {
    let document = || format!("v = {text}").parse::<Table>().ok();
    match (text.parse::<toml_edit::Value>(), document()) {
        (Ok(_), Some(mut table)) if table.len() == 1 => Ok(table.remove("v").unwrap_or(Value::Boolean(false))),
        // A document, but not one value: the rest would be ignored.
        (_, Some(table)) if table.len() > 1 => {
            Err("its value is followed by another line, which would be ignored; give each key a --set of its own"
                .into())
        }
        (Err(_), Some(_)) => {
            Err("its value is followed by a comment, which would be ignored; put a text with # in quotes".into())
        }
        // What is no TOML value is a text: quotes are a nuisance in a shell.
        _ => Ok(Value::String(text.to_owned())),
    }
}

/// One section, read key by key.
pub(super) struct Section<'a> {
    document: &'a mut Document,
    name: &'static str,
    /// For a table within a key's value: the key, and what the table is called in it.
    inside: Option<(&'static str, String)>,
    table: Table,
    known: Vec<&'static str>,
}

impl Section<'_> {
    /// The value of `key` as it stands, taken out.
    pub(super) fn raw(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.table.remove(key)
    }

    /// A table within this section under `key`, read as a section of its own; `None` where there is none.
    pub(super) fn inner(&mut self, key: &'static str) -> Option<Section<'_>> {
        let table = match self.raw(key)? {
            Value::Table(table) => table,
            other => {
                self.error(key, &format!("is a {}, not a table; write {key} = {{ … }}", other.type_str()));
                return None;
            }
        };
        let inside = match &self.inside {
            None => (key, String::new()),
            Some((outer, inner)) => (*outer, format!("{inner}.{key}")),
        };
        Some(Section { document: self.document, name: self.name, inside: Some(inside), table, known: Vec::new() })
    }

    /// The value of `key`, left where it is.
    pub(super) fn peek(&self, key: &str) -> Option<&Value> {
        self.table.get(key)
    }

    /// Whether `key` is there.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Notes a mistake at `key`.
    pub(super) fn error(&mut self, key: &str, message: &str) {
        match &self.inside {
            None => self.document.error(&format!("{}.{key}", self.name), message),
            // Its place is that of the key that holds it.
            Some((outer, inner)) => {
                let dot = if inner.is_empty() { "" } else { "." };
                self.document.error(&format!("{}.{outer}", self.name), &format!("{inner}{dot}{key}: {message}"));
            }
        }
    }

    /// The value of `key`, or `default` where it is absent or wrong.
    pub(super) fn get<T: Read>(&mut self, key: &'static str, default: T) -> T {
        self.optional(key).unwrap_or(default)
    }

    /// As [`Self::get`], refusing values for which `valid` does not hold; `rule` says what it asks.
    pub(super) fn checked<T: Read + fmt::Display>(
        &mut self,
        key: &'static str,
        default: T,
        rule: &str,
        valid: impl Fn(&T) -> bool,
    ) -> T {
        match self.optional::<T>(key) {
            Some(value) if !valid(&value) => {
                self.error(key, &format!("{value} is out of range; it must be {rule}"));
                default
            }
            Some(value) => value,
            None => default,
        }
    }

    /// The value of `key`, which must be there.
    pub(super) fn required<T: Read + Default>(&mut self, key: &'static str, what: &str) -> T {
        if !self.has(key) {
            self.known.push(key);
            self.error(key, &format!("is missing; give {what}"));
            return T::default();
        }
        self.get(key, T::default())
    }

    /// The value of `key`, if it is there and of the right type.
    pub(super) fn optional<T: Read>(&mut self, key: &'static str) -> Option<T> {
        let value = self.raw(key)?;
        match T::read(&value) {
            Some(value) => Some(value),
            None => {
                self.error(key, &format!("{value} is no {}", T::EXPECTED));
                None
            }
        }
    }

    /// One of a few words.
    pub(super) fn choice<T: Choice>(&mut self, key: &'static str, default: T) -> T {
        let Some(word) = self.optional::<String>(key) else { return default };
        if let Some((_, choice)) = T::WORDS.iter().find(|(name, _)| *name == word) {
            return *choice;
        }
        let names: Vec<&str> = T::WORDS.iter().map(|(name, _)| *name).collect();
        let hint = suggestion(&word, &names);
        self.error(key, &format!("{word:?} is none of {}{hint}", names.join(", ")));
        default
    }
}

impl Drop for Section<'_> {
    /// What was not asked for is unknown.
    fn drop(&mut self) {
        for key in std::mem::take(&mut self.table).keys() {
            let hint = suggestion(key, &self.known);
            self.error(key, &format!("unknown key{hint}"));
        }
    }
}

/// A type that a key may have.
pub(super) trait Read: Sized {
    const EXPECTED: &'static str;
    fn read(value: &Value) -> Option<Self>;
}

impl Read for bool {
    const EXPECTED: &'static str = "true or false";
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl Read for String {
    const EXPECTED: &'static str = "text in quotes";
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
}

impl Read for f64 {
    const EXPECTED: &'static str = "number";
    fn read(value: &Value) -> Option<Self> {
        value.as_float().or_else(|| value.as_integer().map(|n| n as f64)).filter(|number| number.is_finite())
    }
}

impl Read for Vec<String> {
    const EXPECTED: &'static str = "list of texts";
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(String::read).collect()
    }
}

impl Read for Vec<u32> {
    const EXPECTED: &'static str = "list of whole numbers from zero up";
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(u32::read).collect()
    }
}

macro_rules! read_whole {
    ($($type:ty),*) => {$(
        impl Read for $type {
            const EXPECTED: &'static str = "whole number from zero up";
            fn read(value: &Value) -> Option<Self> {
                value.as_integer().and_then(|n| n.try_into().ok())
            }
        }
    )*};
}

read_whole!(u64, usize, u32);

/// The section that a line opens; none for a line that merely begins with a bracket, inside an array.
fn header(line: &str) -> Option<&str> {
    let name = line.split('#').next()?.trim().strip_prefix('[')?.strip_suffix(']')?.trim();
    name.chars().all(|c| c.is_alphanumeric() || "_-.[]".contains(c)).then_some(name)
}

/// The beginning of a text, of at most so many characters.
fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}

/// `; did you mean "…"?` with the nearest of `known`, or all of them when none is near.
fn suggestion(word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some(name) => format!("; did you mean \"{name}\"?"),
        None => format!("; known are {}", known.join(", ")),
    }
}
