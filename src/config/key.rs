//! The declaration of a key: its type, default, range, documentation and effect on a resumed run.

use std::fmt;
use std::path::Path;

use toml::Value;

use super::choice::Choice;
use super::document::{Document, DocumentNode, suggestion};
use super::types::{KeyType, Shape};

/// The effect of a changed value on a run that is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// The run is refused: the checkpoint's state belongs to the old value.
    Fixed,
    /// The run is refused unless the change is accepted by name (`--accept-change KEY`): its labels would come from another
    /// judge.
    AcceptChange,
    /// The run is resumed and the change is logged: it affects speed, placement or caution, or has a checksum of its own
    /// (the data, the model that the policy starts from).
    Changeable,
}

/// Bounds of a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Range {
    /// The lowest value, and whether it is allowed itself.
    pub(super) low: Option<(f64, bool)>,
    /// The highest value, and whether it is allowed itself.
    pub(super) high: Option<(f64, bool)>,
    /// A value outside these bounds that is allowed too.
    pub(super) or: Option<f64>,
    /// A unit, or the meaning of a bound, that follows the bounds in texts.
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

/// How a key without a value is read.
#[derive(Debug, Clone)]
enum Absent {
    /// It is refused; the text says what to give.
    Refused(&'static str),
    /// It has the default.
    Default,
    /// It has the default, which depends on other keys as the text says.
    Depends(String),
}

/// Returns what is wrong with a value.
type Check<T> = fn(&T) -> Result<(), String>;
/// Returns what a value stands for in a configuration of the given folder, or what is wrong with it.
type Resolve<T> = fn(T, &Path) -> Result<T, String>;

/// The type, default, range and checks of one key. Built by [`is`], [`required`], [`unset`], [`by`] or [`depends`].
pub(super) struct Spec<T> {
    /// The default; of a required key, what stands in for it after a mistake.
    pub(super) value: T,
    absent: Absent,
    range: Option<Range>,
    example: Option<&'static str>,
    check: Option<Check<T>>,
    resolve: Option<Resolve<T>>,
}

/// A key with the default `value`.
pub(super) fn is<T>(value: T) -> Spec<T> {
    Spec { value, absent: Absent::Default, range: None, example: None, check: None, resolve: None }
}

/// A key that must be given; `what` says what to give.
pub(super) fn required<T: Default>(what: &'static str) -> Spec<T> {
    Spec { absent: Absent::Refused(what), ..is(T::default()) }
}

/// An optional key; `meaning` says what holds without it.
pub(super) fn unset<T>(meaning: &str) -> Spec<Option<T>> {
    Spec { absent: Absent::Depends(meaning.to_owned()), ..is(None) }
}

/// A key whose default is `value`, which depends on other keys as `meaning` says.
pub(super) fn depends<T>(value: T, meaning: &str) -> Spec<T> {
    Spec { absent: Absent::Depends(meaning.to_owned()), ..is(value) }
}

/// A key whose default is that of `cases` for the word that the key `name` has, else `otherwise`.
pub(super) fn by<C: Choice, T: KeyType>(name: &str, choice: C, cases: &[(C, T)], otherwise: T) -> Spec<T> {
    let text = |value: &T| format!("`{}`", value.write().map_or(String::new(), |value| value.to_string()));
    let mut meaning = String::new();
    for (case, value) in cases {
        meaning += &format!("{} where `{name}` is `{}`, ", text(value), case.word());
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

    /// Adds a text to that of the bounds.
    pub(super) fn note(mut self, note: &'static str) -> Self {
        self.bounds().note = note;
        self
    }

    /// A value to show in the documentation, in TOML.
    pub(super) fn example(mut self, example: &'static str) -> Self {
        self.example = Some(example);
        self
    }

    /// Refuses values for which `check` returns an error, which is the message.
    pub(super) fn check(mut self, check: Check<T>) -> Self {
        self.check = Some(check);
        self
    }

    /// Replaces a given value by what `resolve` returns for it and the configuration's folder.
    pub(super) fn resolve(mut self, resolve: Resolve<T>) -> Self {
        self.resolve = Some(resolve);
        self
    }
}

/// A key's declaration, for the reference page, the schema and the comparison of a resumed run.
#[derive(Debug, Clone)]
pub struct Key {
    /// Its name within its section.
    pub name: &'static str,
    /// The effect of a change on a resumed run.
    pub resume: Resume,
    pub(super) doc: String,
    /// Whether it names the place of a secret, so that no message repeats its value.
    pub(super) secret: bool,
    pub(super) shape: Shape,
    pub(super) required: bool,
    /// In words, as Markdown.
    pub(super) default: String,
    /// Where it depends on nothing else.
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

    /// The keys of the table that is its value, if it is one.
    pub fn inner(&self) -> Vec<Self> {
        match self.shape {
            Shape::Table(keys) => keys(),
            _ => Vec::new(),
        }
    }
}

/// The lines of a doc comment as one text.
pub(super) fn lines(doc: &[&str]) -> String {
    doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// A group of keys that are read from one table.
pub(super) trait Section: Sized {
    /// Reads all keys from the reader's table.
    fn read_keys(reader: &mut Reader<'_>) -> Self;
    /// Appends all keys with their values; a key without a value has none.
    fn write_keys(&self, fields: &mut Fields);
    /// The declarations of all keys.
    fn keys() -> Vec<Key>;
    /// The section's purpose.
    fn about() -> String;
}

/// Keys with their values, in the order of their declaration.
pub(super) type Fields = Vec<(&'static str, Option<Value>)>;

/// Reads the keys of one table and refuses all others.
pub(super) struct Reader<'a> {
    pub(super) document: &'a Document,
    /// What paths of files are relative to.
    pub(super) folder: &'a Path,
    node: Option<&'a DocumentNode>,
    path: String,
    known: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    /// A reader of the table `node` at `path`; without a table, all keys are absent.
    pub(super) fn new(document: &'a Document, folder: &'a Path, node: Option<&'a DocumentNode>, path: &str) -> Self {
        Self { document, folder, node, path: path.to_owned(), known: Vec::new() }
    }

    /// Reads a whole section, and refuses keys that it does not have.
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

    /// Reads `name`.
    pub(super) fn key<T: KeyType>(&mut self, name: &'static str, secret: bool, spec: Spec<T>) -> T {
        let Some(input) = self.input(name, secret) else {
            if let Absent::Refused(what) = spec.absent
                && !self.document.spares(&format!("{}.{name}", self.path))
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
                // Without the fraction of a whole number.
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

    /// The value of `name`, which then counts as known.
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

    /// The value of `name`, if the file or an override gives one.
    pub(super) fn peek(&self, name: &str) -> Option<&'a DocumentNode> {
        self.node?.get(name)
    }

    /// Records a mistake at `name`.
    pub(super) fn error(&self, name: &str, message: &str) {
        self.document.error(&format!("{}.{name}", self.path), message);
    }
}

/// A value that is to be read.
pub(super) struct Input<'a> {
    pub(super) document: &'a Document,
    pub(super) folder: &'a Path,
    pub(super) node: &'a DocumentNode,
    pub(super) path: String,
    pub(super) secret: bool,
}

impl Input<'_> {
    /// Records that the value is wrong, and why.
    pub(super) fn error<T>(&self, message: &str) -> Option<T> {
        self.document.error(&self.path, message);
        None
    }

    /// Records that the value has another type than `expected`; `quoted` is such a value in TOML.
    pub(super) fn mistyped<T>(&self, expected: &str, quoted: &str) -> Option<T> {
        if let Some(fault) = &self.node.fault {
            return self.error(fault);
        }
        let value = if self.secret { "the value".to_owned() } else { self.node.value().to_string() };
        let mut message = format!("{value} is no {expected}");
        if self.node.text.is_some() && quoted.contains('"') {
            message += &self.quoting(quoted);
        }
        self.error(&message)
    }

    /// Advice on the quotes of an override: a shell removes them unless the whole is quoted.
    pub(super) fn quoting(&self, quoted: &str) -> String {
        format!("; texts inside it need quotes of their own: --set '{}={quoted}'", self.path)
    }
}
