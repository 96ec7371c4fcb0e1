//! The types of keys, with their reading, writing and description.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::{Value as Json, json};
use toml::Value;

use super::document::Kind;
use super::key::{Fields, Input, Key, Reader, Section};
use crate::lm::source::{DataRef, ModelRef};
use crate::util::disk::expand_home;

/// The type of a key's value.
pub(super) trait KeyType: Sized + Clone {
    /// Returns the description of the type.
    fn shape() -> Shape;

    /// Reads a value. Records a mistake and returns `None` if it is invalid.
    fn read(input: &Input<'_>) -> Option<Self>;

    /// Returns the value in TOML, or `None` if the key is absent.
    fn write(&self) -> Option<Value>;

    /// Returns the value as a number, to which bounds apply, or `None` if it is not one.
    fn number(&self) -> Option<f64> {
        None
    }
}

/// The description of a type.
#[derive(Debug, Clone)]
pub(super) enum Shape {
    Boolean,
    Whole,
    Number,
    Text,
    Texts,
    Wholes,
    /// One of these words, each with its meaning.
    Word(Vec<(&'static str, &'static str)>),
    /// A table of strings under any names.
    NamedTexts,
    /// A table of any values that JSON can represent.
    Anything,
    /// A reference to a data set: one or several sources of its rows.
    Data,
    /// A reference to a model: one source, or several that are tried in order. For the policy also a new model, with
    /// these keys.
    Model(Option<fn() -> Vec<Key>>),
    /// A table with these keys.
    Table(fn() -> Vec<Key>),
    /// A list of tables with these keys.
    Tables(fn() -> Vec<Key>),
}

impl Shape {
    /// Returns the type in words, as Markdown.
    pub(super) fn words(&self) -> String {
        match self {
            Self::Boolean => "`true` or `false`".into(),
            Self::Whole => "integer".into(),
            Self::Number => "number".into(),
            Self::Text => "string".into(),
            Self::Texts => "list of strings".into(),
            Self::Wholes => "list of integers".into(),
            Self::Word(words) => words.iter().map(|(word, _)| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", "),
            Self::NamedTexts => "table of strings".into(),
            Self::Anything => "table".into(),
            Self::Data => "data set".into(),
            Self::Model(_) => "model".into(),
            Self::Table(_) => "table".into(),
            Self::Tables(_) => "list of tables".into(),
        }
    }

    /// Returns the type in JSON Schema. The caller adds the keys of tables.
    pub(super) fn schema(&self) -> Json {
        match self {
            Self::Boolean => json!({ "type": "boolean" }),
            Self::Whole => json!({ "type": "integer", "minimum": 0 }),
            Self::Number => json!({ "type": "number" }),
            Self::Text => json!({ "type": "string" }),
            Self::Texts => json!({ "type": "array", "items": { "type": "string" } }),
            Self::Wholes => json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } }),
            Self::Word(words) => json!({ "enum": words.iter().map(|(word, _)| *word).collect::<Vec<_>>() }),
            Self::NamedTexts => json!({ "type": "object", "additionalProperties": { "type": "string" } }),
            Self::Anything => json!({ "type": "object" }),
            Self::Data | Self::Model(_) => json!({ "type": ["string", "object", "array"] }),
            Self::Table(_) => json!({ "type": "object" }),
            Self::Tables(_) => json!({ "type": "array", "items": { "type": "object" } }),
        }
    }
}

impl KeyType for bool {
    fn shape() -> Shape {
        Shape::Boolean
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        input.node.value().as_bool().or_else(|| input.mistyped("true or false", "true"))
    }
    fn write(&self) -> Option<Value> {
        Some(Value::Boolean(*self))
    }
}

impl KeyType for f64 {
    fn shape() -> Shape {
        Shape::Number
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let value = input.node.value();
        let number = value.as_float().or_else(|| value.as_integer().map(|n| n as Self));
        number.filter(|number| number.is_finite()).or_else(|| input.mistyped("a finite number", "0.5"))
    }
    fn write(&self) -> Option<Value> {
        Some(Value::Float(*self))
    }
    fn number(&self) -> Option<f64> {
        Some(*self)
    }
}

macro_rules! whole {
    ($($type:ty),*) => {$(
        impl KeyType for $type {
            fn shape() -> Shape {
                Shape::Whole
            }
            fn read(input: &Input<'_>) -> Option<Self> {
                let whole = input.node.value().as_integer().and_then(|n| n.try_into().ok());
                whole.or_else(|| input.mistyped("a non-negative integer", "1"))
            }
            fn write(&self) -> Option<Value> {
                Some(Value::Integer(i64::try_from(*self).unwrap_or(i64::MAX)))
            }
            fn number(&self) -> Option<f64> {
                Some(*self as f64)
            }
        }
    )*};
}

whole!(u64, usize, u32);

impl KeyType for String {
    fn shape() -> Shape {
        Shape::Text
    }
    /// Reads a string. An override needs no quotes: `--set run.name=7` gives the string `7`.
    fn read(input: &Input<'_>) -> Option<Self> {
        match (&input.node.kind, &input.node.text) {
            (Kind::Leaf(Value::String(text)), _) | (Kind::Leaf(_), Some(text)) => Some(text.clone()),
            _ => input.mistyped("a string in quotes", "…"),
        }
    }
    fn write(&self) -> Option<Value> {
        Some(Value::String(self.clone()))
    }
}

impl KeyType for PathBuf {
    fn shape() -> Shape {
        Shape::Text
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let path = String::read(input).map(Self::from)?;
        expand_home(&path).map_or_else(|message| input.error(&message), Some)
    }
    fn write(&self) -> Option<Value> {
        Some(Value::String(self.display().to_string()))
    }
}

impl KeyType for SocketAddr {
    fn shape() -> Shape {
        Shape::Text
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let text = String::read(input)?;
        let example = Self::from(([127, 0, 0, 1], 9464));
        text.parse().ok().or_else(|| input.error(&format!("{text:?} is not IP:PORT; write it as {example}")))
    }
    fn write(&self) -> Option<Value> {
        Some(Value::String(self.to_string()))
    }
}

impl KeyType for Vec<String> {
    fn shape() -> Shape {
        Shape::Texts
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let texts = input.node.value();
        let texts =
            texts.as_array().and_then(|list| list.iter().map(|text| text.as_str().map(str::to_owned)).collect());
        texts.or_else(|| input.mistyped("a list of strings", "[\"a\", \"b\"]"))
    }
    fn write(&self) -> Option<Value> {
        Some(Value::Array(self.iter().map(|text| Value::String(text.clone())).collect()))
    }
}

impl KeyType for Vec<u32> {
    fn shape() -> Shape {
        Shape::Wholes
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let value = input.node.value();
        let whole = |value: &Value| value.as_integer().and_then(|n| n.try_into().ok());
        let list = value.as_array().and_then(|list| list.iter().map(whole).collect());
        list.or_else(|| input.mistyped("a list of non-negative integers", "[1, 2]"))
    }
    fn write(&self) -> Option<Value> {
        Some(Value::Array(self.iter().map(|n| Value::Integer(i64::from(*n))).collect()))
    }
}

impl KeyType for BTreeMap<String, String> {
    fn shape() -> Shape {
        Shape::NamedTexts
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let value = input.node.value();
        let text = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
        let texts = value.as_table().and_then(|table| table.iter().map(text).collect());
        texts.or_else(|| input.mistyped("a table of strings", "{ name = \"text\" }"))
    }
    fn write(&self) -> Option<Value> {
        let texts = self.iter().map(|(name, text)| (name.clone(), Value::String(text.clone())));
        Some(Value::Table(texts.collect()))
    }
}

impl KeyType for toml::Table {
    fn shape() -> Shape {
        Shape::Anything
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let value = input.node.value();
        if has_date(&value) {
            return input
                .error("contains a date or a non-finite number, which JSON cannot represent; write it as a string");
        }
        value.as_table().cloned().or_else(|| input.mistyped("a table", "{ name = \"text\" }"))
    }
    fn write(&self) -> Option<Value> {
        Some(Value::Table(self.clone()))
    }
}

/// Returns whether a value contains a date or a non-finite number, which JSON cannot represent.
fn has_date(value: &Value) -> bool {
    match value {
        Value::Datetime(_) => true,
        Value::Float(number) => !number.is_finite(),
        Value::Array(list) => list.iter().any(has_date),
        Value::Table(table) => table.values().any(has_date),
        _ => false,
    }
}

impl<T: KeyType> KeyType for Option<T> {
    fn shape() -> Shape {
        T::shape()
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        T::read(input).map(Some)
    }
    fn write(&self) -> Option<Value> {
        self.as_ref().and_then(T::write)
    }
    fn number(&self) -> Option<f64> {
        self.as_ref().and_then(T::number)
    }
}

impl KeyType for ModelRef {
    fn shape() -> Shape {
        Shape::Model(None)
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let value = match (&input.node.kind, &input.node.text) {
            (Kind::Leaf(_), Some(text)) if text.starts_with(['{', '[']) => {
                return input.mistyped("a model", "{ pip = \"name==version\" }");
            }
            // Every other override is a path, even if it looks like a number.
            (Kind::Leaf(_), Some(_)) => Value::String(String::read(input)?),
            _ => input.node.value(),
        };
        let model = Self::from_toml(&value);
        let model = model.and_then(|model| model.relative_to(input.folder));
        model.map_or_else(|message| input.error(&message), Some)
    }
    fn write(&self) -> Option<Value> {
        Some(self.to_toml())
    }
}

impl KeyType for DataRef {
    fn shape() -> Shape {
        Shape::Data
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let value = match (&input.node.kind, &input.node.text) {
            (Kind::Leaf(_), Some(text)) if text.starts_with(['{', '[']) => {
                return input.mistyped("a data set", "[\"a.jsonl\", \"b.jsonl\"]");
            }
            // Every other override is a path, even if it looks like a number.
            (Kind::Leaf(_), Some(_)) => Value::String(String::read(input)?),
            _ => input.node.value(),
        };
        let is_used = input.document.is_used(&input.path);
        let data = Self::from_toml(&value).and_then(|data| data.below(input.folder, is_used));
        data.map_or_else(|message| input.error(&message), Some)
    }
    fn write(&self) -> Option<Value> {
        Some(self.to_toml())
    }
}

/// A table whose keys are those of a section.
impl<S: Section + Clone> KeyType for S {
    fn shape() -> Shape {
        Shape::Table(S::keys)
    }
    fn read(input: &Input<'_>) -> Option<Self> {
        let Kind::Table(_) = &input.node.kind else {
            let name = input.path.rsplit('.').next().unwrap_or_default();
            let mut message = format!("is of type {}, not a table; write {name} = {{ … }}", input.node.type_name());
            if let (Some(_), Some(key)) = (&input.node.text, S::keys().first()) {
                message += &input.quoting(&format!("{{ {} = \"…\" }}", key.name));
            }
            return input.error(&message);
        };
        Some(Reader::new(input.document, input.folder, Some(input.node), &input.path).section())
    }
    fn write(&self) -> Option<Value> {
        Some(Value::Table(table(self)))
    }
}

/// Returns the keys of a section that have a value, as a table.
pub(super) fn table(section: &impl Section) -> toml::Table {
    let mut fields = Fields::new();
    section.write_keys(&mut fields);
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}
