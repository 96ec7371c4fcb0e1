//! The declaration of a key: its type, default, range, documentation and effect on a resumed run.

use std::fmt;
use std::path::Path;

use toml::Value;

use super::choice::Choice;
use super::document::{Document, DocumentNode, suggestion};
use super::types::{KeyType, Shape};

/// The effect on a resumed run of a value that differs from the checkpoint's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// The run is refused, because the checkpoint's state depends on the old value.
    Fixed,
    /// The run is refused unless the change is accepted by name (`--accept-change KEY`), because its labels would come
    /// from another judge.
    AcceptChange,
    /// The run is resumed and the change is logged. The key affects speed, placement or safety limits, or its content
    /// is verified by a checksum instead (the data, the model that the policy starts from).
    Changeable,
}

/// Bounds of a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Range {
    /// The lower bound, and true if it is inclusive.
    pub(super) low: Option<(f64, bool)>,
    /// The upper bound, and true if it is inclusive.
    pub(super) high: Option<(f64, bool)>,
    /// An additional allowed value outside the bounds.
    pub(super) or: Option<f64>,
    /// A unit, or the meaning of a value, printed after the bounds.
    note: &'static str,
}

impl Range {
    fn has(&self, number: f64) -> bool {
        let above = |(low, itself): (f64, bool)| number > low || (itself && number == low);
        let below = |(high, itself): (f64, bool)| number < high || (itself && number == high);
        self.or == Some(number) || (self.low.is_none_or(above) && self.high.is_none_or(below))
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.low, self.high) {
            (Some((low, true)), Some((high, true))) => write!(f, "from {low} to {high}")?,
            (Some((low, true)), Some((high, false))) => write!(f, "from {low} to below {high}")?,
            (Some((low, false)), Some((high, true))) => write!(f, "above {low}, at most {high}")?,
            (Some((low, false)), Some((high, false))) => write!(f, "above {low}, below {high}")?,
            (Some((0.0, true)), None) => write!(f, "from 0 up")?,
            (Some((low, true)), None) => write!(f, "at least {low}")?,
            (Some((low, false)), None) => write!(f, "above {low}")?,
            (None, Some((high, true))) => write!(f, "at most {high}")?,
            (None, Some((high, false))) => write!(f, "below {high}")?,
            (None, None) => {}
        }
        self.or.iter().try_for_each(|or| write!(f, ", or {or}"))?;
        write!(f, "{}", self.note)
    }
}

/// The treatment of a key that is not given.
#[derive(Debug, Clone)]
enum Absent {
    /// The configuration is refused. The text describes the value to give.
    Refused(&'static str),
    /// The key has its default.
    Default,
    /// The key has its default, which depends on other keys as the text describes.
    Depends(String),
}

/// Validates a value, and returns the error message of an invalid one.
type Check<T> = fn(&T) -> Result<(), String>;
/// Resolves a value in a configuration of the given folder, or returns the error message of an invalid one.
type Resolve<T> = fn(T, &Path) -> Result<T, String>;

/// The type, default, range and checks of one key. Built by [`is`], [`required`], [`unset`], [`by`] or [`depends`].
pub(super) struct Spec<T> {
    /// The default. For a required key, a placeholder that is used after a mistake.
    pub(super) value: T,
    absent: Absent,
    range: Option<Range>,
    example: Option<&'static str>,
    check: Option<Check<T>>,
    resolve: Option<Resolve<T>>,
}

/// Returns the specification of a key with the default `value`.
pub(super) fn is<T>(value: T) -> Spec<T> {
    Spec { value, absent: Absent::Default, range: None, example: None, check: None, resolve: None }
}

/// Returns the specification of a required key. `what` describes the value to give, in the error message.
pub(super) fn required<T: Default>(what: &'static str) -> Spec<T> {
    Spec { absent: Absent::Refused(what), ..is(T::default()) }
}

/// Returns the specification of an optional key. `meaning` describes the behaviour without it.
pub(super) fn unset<T>(meaning: &str) -> Spec<Option<T>> {
    Spec { absent: Absent::Depends(meaning.to_owned()), ..is(None) }
}

/// Returns the specification of a key with the default `value`, which depends on other keys as `meaning` describes.
pub(super) fn depends<T>(value: T, meaning: &str) -> Spec<T> {
    Spec { absent: Absent::Depends(meaning.to_owned()), ..is(value) }
}

/// Returns the specification of a key whose default depends on the key `name`, whose value is `choice`: the default is
/// the value of `choice` in `cases`, or else `otherwise`.
pub(super) fn by<C: Choice, T: KeyType>(name: &str, choice: C, cases: &[(C, T)], otherwise: T) -> Spec<T> {
    let text = |value: &T| format!("`{}`", value.write().map_or(String::new(), |value| value.to_string()));
    let mut meaning = String::new();
    for (case, value) in cases {
        meaning += &format!("{} if `{name}` is `{}`, ", text(value), case.word());
    }
    meaning += &format!("else {}", text(&otherwise));
    let value = cases.iter().find(|(case, _)| *case == choice).map_or(otherwise, |(_, value)| value.clone());
    depends(value, &meaning)
}

impl<T> Spec<T> {
    fn bounds(&mut self) -> &mut Range {
        self.range.get_or_insert(Range { low: None, high: None, or: None, note: "" })
    }

    /// Refuses numbers below `low`.
    pub(super) fn from(mut self, low: impl Into<f64>) -> Self {
        self.bounds().low = Some((low.into(), true));
        self
    }

    /// Refuses `low` and numbers below it.
    pub(super) fn above(mut self, low: impl Into<f64>) -> Self {
        self.bounds().low = Some((low.into(), false));
        self
    }

    /// Refuses numbers above `high`.
    pub(super) fn to(mut self, high: impl Into<f64>) -> Self {
        self.bounds().high = Some((high.into(), true));
        self
    }

    /// Refuses `high` and numbers above it.
    pub(super) fn below(mut self, high: impl Into<f64>) -> Self {
        self.bounds().high = Some((high.into(), false));
        self
    }

    /// Accepts `value` besides the numbers within the bounds.
    pub(super) fn or(mut self, value: impl Into<f64>) -> Self {
        self.bounds().or = Some(value.into());
        self
    }

    /// Adds a text that is printed after the bounds.
    pub(super) fn note(mut self, note: &'static str) -> Self {
        self.bounds().note = note;
        self
    }

    /// Sets the value that the documentation shows, in TOML.
    pub(super) fn example(mut self, example: &'static str) -> Self {
        self.example = Some(example);
        self
    }

    /// Refuses values for which `check` returns an error message.
    pub(super) fn check(mut self, check: Check<T>) -> Self {
        self.check = Some(check);
        self
    }

    /// Replaces a given value by the result of `resolve` for it and the configuration's folder.
    pub(super) fn resolve(mut self, resolve: Resolve<T>) -> Self {
        self.resolve = Some(resolve);
        self
    }
}

/// A key's declaration, for the reference page, the schema and the comparison of a resumed run.
#[derive(Debug, Clone)]
pub struct Key {
    /// The key's name within its section.
    pub name: &'static str,
    /// The effect of a change on a resumed run.
    pub resume: Resume,
    pub(super) doc: String,
    /// True if the value names the place of a secret. Messages then do not repeat the value.
    pub(super) secret: bool,
    pub(super) shape: Shape,
    pub(super) required: bool,
    /// The default in words, as Markdown.
    pub(super) default: String,
    /// The default, unless it depends on other keys.
    pub(super) default_value: Option<Value>,
    pub(super) range: Option<Range>,
    pub(super) example: Option<String>,
}

impl Key {
    pub(super) fn new<T: KeyType>(
        name: &'static str,
        doc: &[&str],
        (resume, secret): (Resume, bool),
        spec: &Spec<T>,
    ) -> Self {
        let value = match spec.absent {
            Absent::Default => spec.value.write(),
            Absent::Refused(_) | Absent::Depends(_) => None,
        };
        let default = match &spec.absent {
            Absent::Refused(_) => "none; the key is required".to_owned(),
            Absent::Default => value.as_ref().map_or("not set".to_owned(), |value| format!("`{value}`")),
            Absent::Depends(meaning) => meaning.clone(),
        };
        let required = matches!(spec.absent, Absent::Refused(_));
        let example = spec.example.map(str::to_owned).or_else(|| value.as_ref().map(ToString::to_string));
        let (shape, range) = (T::shape(), spec.range);
        Self { name, resume, doc: lines(doc), secret, shape, required, default, default_value: value, range, example }
    }

    /// Returns the keys inside the key's value. Empty if the value is not a table.
    pub fn inner(&self) -> Vec<Self> {
        match self.shape {
            Shape::Table(keys) => keys(),
            _ => Vec::new(),
        }
    }
}

/// Joins the lines of a doc comment.
pub(super) fn lines(doc: &[&str]) -> String {
    doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// A group of keys that are read from one table.
pub(super) trait Section: Sized {
    /// Reads all keys from the reader's table.
    fn read_keys(reader: &mut Reader<'_>) -> Self;
    /// Appends all keys with their values, or with `None` for a key without a value.
    fn write_keys(&self, fields: &mut Fields);
    /// Returns the declarations of all keys.
    fn keys() -> Vec<Key>;
    /// Returns the section's purpose, for the documentation.
    fn about() -> String;
}

/// Keys with their values, in the order of their declaration.
pub(super) type Fields = Vec<(&'static str, Option<Value>)>;

/// Reads the keys of one table and refuses all others.
pub(super) struct Reader<'a> {
    pub(super) document: &'a Document,
    /// The folder that paths are relative to.
    pub(super) folder: &'a Path,
    node: Option<&'a DocumentNode>,
    path: String,
    known: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    /// Creates a reader of the table `node` at `path`. Without a table, all keys are absent.
    pub(super) fn new(document: &'a Document, folder: &'a Path, node: Option<&'a DocumentNode>, path: &str) -> Self {
        Self { document, folder, node, path: path.to_owned(), known: Vec::new() }
    }

    /// Reads all keys of a section, and reports unknown keys.
    pub(super) fn section<S: Section>(mut self) -> S {
        let section = S::read_keys(&mut self);
        let keys = match self.node.map(|node| &node.kind) {
            Some(super::document::Kind::Table(table)) => table.keys().collect(),
            _ => Vec::new(),
        };
        for key in keys.into_iter().filter(|key| !self.known.contains(&key.as_str())) {
            self.error(key, &format!("unknown key{}", suggestion(key, &self.known)));
        }
        section
    }

    /// Reads and validates the key `name`. After a mistake, which is recorded, returns the default.
    pub(super) fn key<T: KeyType>(&mut self, name: &'static str, secret: bool, spec: Spec<T>) -> T {
        let Some(input) = self.input(name, secret) else {
            if let Absent::Refused(what) = spec.absent
                && self.document.is_used(&format!("{}.{name}", self.path))
            {
                self.error(name, &format!("is missing; give {what}"));
            }
            return spec.value;
        };
        let Some(value) = T::read(&input) else { return spec.value };
        if let (Some(range), Some(number)) = (spec.range, value.number())
            && !range.has(number)
        {
            let given = value.write().map_or(String::new(), |value| match value {
                // Prints a float without a fraction as an integer.
                Value::Float(number) => number.to_string(),
                other => other.to_string(),
            });
            self.error(name, &format!("{given} is out of range; it must be {range}"));
            return spec.value;
        }
        let checked = spec.check.map_or(Ok(()), |check| check(&value));
        let resolved = checked.and_then(|()| match spec.resolve {
            Some(resolve) => resolve(value, self.folder),
            None => Ok(value),
        });
        resolved.unwrap_or_else(|message| {
            self.error(name, &message);
            spec.value
        })
    }

    /// Returns the value of `name`, and marks the key as known.
    pub(super) fn input(&mut self, name: &'static str, secret: bool) -> Option<Input<'a>> {
        self.known.push(name);
        let node = self.node?.get(name)?;
        Some(Input {
            document: self.document,
            folder: self.folder,
            node,
            path: format!("{}.{name}", self.path),
            secret,
        })
    }

    /// Returns the value of `name`, if the file or an override gives one, without marking the key as known.
    pub(super) fn peek(&self, name: &str) -> Option<&'a DocumentNode> {
        self.node?.get(name)
    }

    /// Records a mistake at `name`.
    pub(super) fn error(&self, name: &str, message: &str) {
        self.document.error(&format!("{}.{name}", self.path), message);
    }
}

/// A value to read, with its context.
pub(super) struct Input<'a> {
    pub(super) document: &'a Document,
    pub(super) folder: &'a Path,
    pub(super) node: &'a DocumentNode,
    pub(super) path: String,
    pub(super) secret: bool,
}

impl Input<'_> {
    /// Records a mistake at the value.
    pub(super) fn error<T>(&self, message: &str) -> Option<T> {
        self.document.error(&self.path, message);
        None
    }

    /// Records that the value does not have the type `expected`. `quoted` is an example of the type in TOML.
    pub(super) fn mistyped<T>(&self, expected: &str, quoted: &str) -> Option<T> {
        if let Some(syntax_error) = &self.node.syntax_error {
            return self.error(syntax_error);
        }
        let value = if self.secret { "the value".to_owned() } else { self.node.value().to_string() };
        let mut message = format!("{value} is not {expected}");
        if self.node.text.is_some() && quoted.contains('"') {
            message += &self.quoting(quoted);
        }
        self.error(&message)
    }

    /// Returns advice on the quotes of an override: a shell removes them unless the complete argument is quoted.
    pub(super) fn quoting(&self, quoted: &str) -> String {
        format!("; strings inside it need quotes, and the argument too: --set '{}={quoted}'", self.path)
    }
}
