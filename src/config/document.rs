//! A configuration file as a tree of values with their line numbers, and the mistakes found in it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use crate::util::suggest::nearest;

/// Maximum number of mistakes that a report lists; further ones are counted.
const MAX_LISTED: usize = 50;
/// Maximum number of characters of one mistake's text.
const LONGEST: usize = 1000;
/// Maximum number of characters of a key's path in a report.
const LONGEST_PATH: usize = 100;

/// One mistake in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// File and line, or `--set`.
    pub place: String,
    /// Path of the key, such as `learner.eta`.
    pub key: String,
    /// Description of the mistake, with the remedy.
    pub message: String,
}

/// All mistakes of a configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    pub(super) fn single(place: &str, key: &str, message: &str) -> Self {
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

/// The origin of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// On this line of the file, counted from 1.
    Line(usize),
    /// By an override of the command line.
    Set,
}

/// A value and its place.
#[derive(Debug, Clone)]
pub(super) struct DocumentNode {
    pub(super) kind: Kind,
    pub(super) place: Place,
    /// The text of an override. A key of type string takes it verbatim.
    pub(super) text: Option<String>,
    /// The reason why the text of an override is not a TOML value, if known.
    pub(super) syntax_error: Option<String>,
}

/// The forms of a value.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    Leaf(Value),
    List(Vec<DocumentNode>),
    Table(BTreeMap<String, DocumentNode>),
}

impl DocumentNode {
    /// Creates the node of an override's value, with all values inside it.
    pub(super) fn set(value: Value) -> Self {
        let kind = match value {
            Value::Table(table) => Kind::Table(table.into_iter().map(|(key, value)| (key, Self::set(value))).collect()),
            Value::Array(list) => Kind::List(list.into_iter().map(Self::set).collect()),
            leaf => Kind::Leaf(leaf),
        };
        Self { kind, place: Place::Set, text: None, syntax_error: None }
    }

    /// Creates the node of a value of the file that begins at `line`.
    fn of_file(value: Value, spans: Option<&Spanned<DeValue<'_>>>, line: usize, lines: &Lines) -> Self {
        let kind = match (value, spans.map(Spanned::get_ref)) {
            (Value::Table(table), spans) => {
                let spans = match spans {
                    Some(DeValue::Table(spans)) => Some(spans),
                    _ => None,
                };
                Kind::Table(members(table, spans, line, lines))
            }
            (Value::Array(list), spans) => {
                let items = list.into_iter().enumerate().map(|(i, value)| {
                    let spans = match spans {
                        Some(DeValue::Array(spans)) => spans.get(i),
                        _ => None,
                    };
                    let line = spans.map_or(line, |span| lines.of(span.span().start));
                    Self::of_file(value, spans, line, lines)
                });
                Kind::List(items.collect())
            }
            (leaf, _) => Kind::Leaf(leaf),
        };
        Self { kind, place: Place::Line(line), text: None, syntax_error: None }
    }

    /// Returns the value of `key` in a table, or `None` if absent or not a table.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match &self.kind {
            Kind::Table(table) => table.get(key),
            _ => None,
        }
    }

    /// Returns the value without places.
    pub(super) fn value(&self) -> Value {
        match &self.kind {
            Kind::Leaf(value) => value.clone(),
            Kind::List(list) => Value::Array(list.iter().map(Self::value).collect()),
            Kind::Table(table) => Value::Table(table.iter().map(|(key, node)| (key.clone(), node.value())).collect()),
        }
    }

    /// The name of its type in TOML.
    pub(super) fn type_name(&self) -> &'static str {
        match &self.kind {
            Kind::Leaf(value) => value.type_str(),
            Kind::List(_) => "array",
            Kind::Table(_) => "table",
        }
    }
}

fn members(table: Table, spans: Option<&DeTable<'_>>, line: usize, lines: &Lines) -> BTreeMap<String, DocumentNode> {
    let found: BTreeMap<&str, _> = spans
        .into_iter()
        .flat_map(|spans| spans.iter())
        .map(|(key, value)| (key.get_ref().as_ref(), (key, value)))
        .collect();
    let member = |(key, value): (String, Value)| {
        let spans = found.get(key.as_str());
        let line = spans.map_or(line, |(key, _)| lines.of(key.span().start));
        let node = DocumentNode::of_file(value, spans.map(|(_, value)| *value), line, lines);
        (key, node)
    };
    table.into_iter().map(member).collect()
}

/// Byte offsets of the beginnings of a text's lines.
struct Lines(Vec<usize>);

impl Lines {
    fn new(text: &str) -> Self {
        Self(std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect())
    }

    /// Returns the line of the byte at `offset`, counted from 1.
    fn of(&self, offset: usize) -> usize {
        self.0.partition_point(|start| *start <= offset)
    }
}

/// A parsed file with overrides, and the mistakes found in it so far.
pub(super) struct Document {
    origin: String,
    /// Paths of the keys that the command does not use.
    unused: &'static [&'static str],
    pub(super) root: DocumentNode,
    found: RefCell<Found>,
}

#[derive(Default)]
struct Found {
    errors: Vec<(usize, ConfigError)>,
    /// Number of mistakes beyond the listed ones.
    more: usize,
}

impl Document {
    /// Parses `text`. `origin` is its name in reports.
    ///
    /// # Errors
    /// Returns the first TOML syntax error.
    pub(super) fn new(text: &str, origin: &str) -> Result<Self, ConfigErrors> {
        let lines = Lines::new(text);
        let table = text.parse::<Table>().map_err(|error| {
            let line = error.span().map_or(1, |span| lines.of(span.start));
            ConfigErrors::single(
                &format!("{origin}:{line}"),
                "",
                &format!("is not TOML: {}", cut(error.message(), LONGEST)),
            )
        })?;
        let spans = DeTable::parse(text).ok();
        let members = members(table, spans.as_ref().map(Spanned::get_ref), 1, &lines);
        let root = DocumentNode { kind: Kind::Table(members), place: Place::Line(1), text: None, syntax_error: None };
        Ok(Self { origin: origin.into(), unused: &[], root, found: RefCell::default() })
    }

    /// Sets the keys that the command does not use: they may be missing, and the files that they name may not exist.
    pub(super) fn with_unused(self, unused: &'static [&'static str]) -> Self {
        Self { unused, ..self }
    }

    /// Returns whether the command uses the key at `path`.
    pub(super) fn is_used(&self, path: &str) -> bool {
        !self.unused.contains(&path)
    }

    /// Returns whether no mistake was found at any of `keys`.
    pub(super) fn sound(&self, keys: &[&str]) -> bool {
        !self.found.borrow().errors.iter().any(|(_, error)| keys.contains(&error.key.as_str()))
    }

    /// Records a mistake at `path`, such as `labeler.members[0].type`.
    pub(super) fn error(&self, path: &str, message: &str) {
        let (line, place) = match self.place(path) {
            Some(Place::Line(line)) => (line, format!("{}:{line}", self.origin)),
            Some(Place::Set) => (0, "--set".to_owned()),
            None => (0, self.origin.clone()),
        };
        self.record(line, place, path, message);
    }

    /// Records a mistake of an override.
    pub(super) fn error_in_override(&self, path: &str, message: &str) {
        self.record(0, "--set".to_owned(), path, message);
    }

    fn record(&self, line: usize, place: String, path: &str, message: &str) {
        let mut found = self.found.borrow_mut();
        if found.errors.len() >= MAX_LISTED {
            found.more += 1;
            return;
        }
        // A report names a section's key; a path inside the key's value becomes part of the message.
        let (key, inside) = parts(path);
        let colon = if inside.is_empty() { "" } else { ": " };
        let message = cut(&format!("{inside}{colon}{message}"), LONGEST);
        found.errors.push((line, ConfigError { place, key: cut(key, LONGEST_PATH), message }));
    }

    /// Returns the place of the value at `path`, or of the innermost existing value around it.
    fn place(&self, path: &str) -> Option<Place> {
        let (mut node, mut place) = (&self.root, None);
        for step in path.split(['.', '[']).map(|step| step.trim_end_matches(']')) {
            let next = match &node.kind {
                Kind::Table(table) => table.get(step),
                Kind::List(list) => step.parse::<usize>().ok().and_then(|i| list.get(i)),
                Kind::Leaf(_) => None,
            };
            let Some(next) = next else { break };
            (node, place) = (next, Some(next.place));
        }
        place
    }

    /// Returns `config` if no mistake was recorded.
    ///
    /// # Errors
    /// Returns all mistakes, in the order of the file.
    pub(super) fn finish<T>(self, config: T) -> Result<T, ConfigErrors> {
        let Found { mut errors, more } = self.found.into_inner();
        errors.sort_by_key(|(line, _)| *line);
        if more > 0 {
            let message = format!("and {more} more mistakes");
            errors.push((usize::MAX, ConfigError { place: self.origin, key: String::new(), message }));
        }
        let errors: Vec<ConfigError> = errors.into_iter().map(|(_, error)| error).collect();
        if errors.is_empty() { Ok(config) } else { Err(ConfigErrors(errors)) }
    }
}

/// Divides a path into the section's key and the path inside its value, such as `policy.model` and `scratch.hidden`, or
/// `labeler.members` and `[0].type`.
fn parts(path: &str) -> (&str, &str) {
    let Some(key) = path.find('.').map(|dot| dot + 1) else { return (path, "") };
    match path[key..].find(['.', '[']) {
        Some(end) => (&path[..key + end], path[key + end..].trim_start_matches('.')),
        None => (path, ""),
    }
}

/// Truncates a text to at most `most` characters, with an ellipsis.
pub(super) fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// Returns `; did you mean "…"?` with the nearest of `known`, or a list of all of them if none is near.
pub(super) fn suggestion(word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some(name) => format!("; did you mean \"{name}\"?"),
        None => format!("; the known names are {}", known.join(", ")),
    }
}
