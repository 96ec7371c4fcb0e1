//! JSON in templates, as Python writes it, within the template's fuel.

use std::io;

use anyhow::Result;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use serde::ser::Error as _;
use serde::{Serialize, Serializer};
use serde_json::ser::{Formatter, PrettyFormatter};

use super::refusal;
use crate::template::BYTES_PER_STEP;

/// Deepest that values may lie in each other.
const DEEPEST: usize = 64;
/// Most spaces of a step of indentation.
const WIDEST: usize = 64;

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it: minijinja's own filter escapes for HTML.
pub(super) fn to_json(state: &State, value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(options.get("indent")?);
    // Accepted for Python's sake: this is how it is always written.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let written = match indent {
        Some(indent) if indent > WIDEST => return Err(refusal(format!("indent = {indent} is more than {WIDEST}"))),
        Some(indent) => {
            let indent = " ".repeat(indent);
            json(state, value, PrettyFormatter::with_indent(indent.as_bytes()))
        }
        None => json(state, value, Spaced),
    };
    written.map(Value::from_safe_string).map_err(|error| match error.downcast_ref::<serde_json::Error>() {
        // Nothing else fails when it is written.
        Some(error) if error.is_io() => ErrorKind::OutOfFuel.into(),
        _ => refusal(format!("cannot be written as JSON: {error}")),
    })
}

fn json(state: &State, value: &Value, formatter: impl Formatter) -> Result<String> {
    let mut out = Paid { state, bytes: Vec::new() };
    Plain(value.clone(), 0).serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
    Ok(String::from_utf8(out.bytes)?)
}

/// Pays for what is written: a list that holds another twice, and so on, is short to build and endless to write.
struct Paid<'a, 'template, 'env> {
    state: &'a State<'template, 'env>,
    bytes: Vec<u8>,
}

impl io::Write for Paid<'_, '_, '_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.state.consume_fuel((buffer.len() as u64).div_ceil(BYTES_PER_STEP)).map_err(io::Error::other)?;
        self.bytes.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A template's value for serde, and how deep it lies in others.
struct Plain(Value, usize);

impl Serialize for Plain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(value, depth) = self;
        if *depth > DEEPEST {
            return Err(S::Error::custom(format!("its values lie more than {DEEPEST} deep in each other")));
        }
        let inner = |value: Value| Plain(value, depth + 1);
        let iterated = || value.try_iter().map_err(S::Error::custom);
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => serializer.serialize_unit(),
            ValueKind::Bool => serializer.serialize_bool(value.is_true()),
            ValueKind::Number if value.is_integer() => {
                serializer.serialize_i64(i64::try_from(value.clone()).map_err(S::Error::custom)?)
            }
            ValueKind::Number => serializer.serialize_f64(f64::try_from(value.clone()).map_err(S::Error::custom)?),
            ValueKind::String => serializer.serialize_str(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => serializer.collect_seq(iterated()?.map(inner)),
            ValueKind::Map => {
                let entry = |key: Value| Ok((key.to_string(), inner(value.get_item(&key)?)));
                let entries: Result<Vec<_>, Error> = iterated()?.map(entry).collect();
                serializer.collect_map(entries.map_err(S::Error::custom)?)
            }
            other => Err(S::Error::custom(format!("a {other} has no JSON form"))),
        }
    }
}

/// One line, with a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
