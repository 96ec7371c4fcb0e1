//! JSON output of templates, in Python's format and within the template's fuel budget.

use std::io;

use anyhow::Result;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use serde::ser::Error as _;
use serde::{Serialize, Serializer};
use serde_json::ser::Formatter;

use super::python::float;
use super::refusal;
use crate::util::template::BYTES_PER_STEP;

/// Largest depth of nested values.
const MAX_DEPTH: usize = 64;
/// Largest number of bytes per level of indentation.
const MAX_INDENT: usize = 64;

/// Filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)` of chat templates in
/// `transformers`; the options have the meaning that `json.dumps` defines. minijinja's own filter escapes for HTML.
pub(super) fn to_json(state: &State, value: &Value, Rest(given): Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let option = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = given.get(place).cloned().or(options.get::<Option<Value>>(name)?);
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ascii = is_true(option(0, "ensure_ascii")?);
    let indent = option(1, "indent")?.map(|indent| step(&indent)).transpose()?;
    let separators = option(2, "separators")?.map(|pair| pair_of_texts(&pair)).transpose()?;
    let sorted = is_true(option(3, "sort_keys")?);
    if given.len() > 4 {
        return Err(refusal("tojson has four options at most: ensure_ascii, indent, separators, sort_keys"));
    }
    options.assert_all_used()?;
    let (item, key) = separators.unwrap_or_else(|| {
        let item = if indent.is_some() { "," } else { ", " };
        (item.to_owned(), ": ".to_owned())
    });
    let formatter = Python { ascii, indent, item, key, depth: 0, filled: false };
    json(state, &Plain { value: value.clone(), depth: 0, sorted }, formatter).map(Value::from_safe_string).map_err(
        |error| match error.downcast_ref::<serde_json::Error>() {
            // Only the fuel limit makes writing fail.
            Some(error) if error.is_io() => ErrorKind::OutOfFuel.into(),
            _ => refusal(format!("cannot be written as JSON: {error}")),
        },
    )
}

/// Returns one level of indentation: a number of spaces, or a text.
fn step(indent: &Value) -> Result<String, Error> {
    let step = match indent.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let spaces = i64::try_from(indent.clone()).unwrap_or(i64::MAX).max(0) as usize;
            if spaces > MAX_INDENT {
                return Err(refusal(format!("indent = {indent} is more than {MAX_INDENT}")));
            }
            " ".repeat(spaces)
        }
    };
    if step.len() > MAX_INDENT {
        return Err(refusal(format!("indent has {} bytes, more than {MAX_INDENT}", step.len())));
    }
    Ok(step)
}

fn pair_of_texts(pair: &Value) -> Result<(String, String), Error> {
    let texts: Vec<String> = pair.try_iter()?.filter_map(|text| text.as_str().map(str::to_owned)).collect();
    match <[String; 2]>::try_from(texts) {
        Ok([item, key]) if item.len() + key.len() <= MAX_INDENT => Ok((item, key)),
        _ => Err(refusal("separators of tojson are two short texts, such as (',', ':')")),
    }
}

fn json(state: &State, value: &Plain, formatter: impl Formatter) -> Result<String> {
    let mut out = FuelWriter { state, bytes: Vec::new() };
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
    Ok(String::from_utf8(out.bytes)?)
}

/// Writer that consumes fuel for its output: a list that contains another one twice, and so on, is short to build and
/// huge to write.
struct FuelWriter<'a, 'template, 'env> {
    state: &'a State<'template, 'env>,
    bytes: Vec<u8>,
}

impl io::Write for FuelWriter<'_, '_, '_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.state.consume_fuel((buffer.len() as u64).div_ceil(BYTES_PER_STEP)).map_err(io::Error::other)?;
        self.bytes.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serialisable form of a template's value.
struct Plain {
    value: Value,
    /// Nesting depth of the value.
    depth: usize,
    /// True if the keys of mappings are sorted.
    sorted: bool,
}

impl Serialize for Plain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { value, depth, sorted } = self;
        if *depth > MAX_DEPTH {
            return Err(S::Error::custom(format!("its values are nested more than {MAX_DEPTH} deep")));
        }
        let inner = |value: Value| Self { value, depth: depth + 1, sorted: *sorted };
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
                let entry = |key: Value| Ok((name(&key), inner(value.get_item(&key)?)));
                let entries: Result<Vec<_>, Error> = iterated()?.map(entry).collect();
                let mut entries = entries.map_err(S::Error::custom)?;
                if *sorted {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                serializer.collect_map(entries)
            }
            other => Err(S::Error::custom(format!("a {other} has no JSON form"))),
        }
    }
}

/// Returns the key of a mapping as `json.dumps` writes it.
fn name(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => key.is_true().to_string(),
        ValueKind::Number if !key.is_integer() => f64::try_from(key.clone()).map_or_else(|_| key.to_string(), float),
        _ => key.to_string(),
    }
}

/// JSON formatter that writes as Python does.
struct Python {
    /// True if characters beyond ASCII are escaped.
    ascii: bool,
    /// One level of indentation; `None` for output on one line.
    indent: Option<String>,
    /// Separator of items; below, the separator of a key and its value.
    item: String,
    key: String,
    depth: usize,
    /// True if the current list or mapping has an element.
    filled: bool,
}

impl Python {
    fn begin<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        writer.write_all(bracket)
    }

    fn end<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(writer)?;
        }
        self.filled = true;
        writer.write_all(bracket)
    }

    fn part<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.filled = true;
        self.line(writer)
    }

    fn line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.part(writer, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.part(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let plain = |c: char| c.is_ascii() && c != '\x7f';
        if !self.ascii || fragment.chars().all(plain) {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if plain(c) {
                writer.write_all(&[c as u8])?;
                continue;
            }
            c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?;
        }
        Ok(())
    }
}
