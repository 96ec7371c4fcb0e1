//! Features of Python and Jinja that chat templates use and minijinja lacks: methods, tests, and the format of numbers.

use std::fmt::Write;

use minijinja::value::{ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

use super::refusal;
use crate::util::template;

/// Largest depth of a value whose floats are written in Python's format.
const MAX_DEPTH: usize = 64;

/// Adds the methods and tests to `environment`, and formats values as Python does.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(emit);
    // In Jinja every value with a length and an index is a sequence, including texts and mappings.
    environment.add_test("sequence", |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_test("iterable", |value: &Value| value.kind() == ValueKind::String || value.try_iter().is_ok());
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_filter("string", |state: &State<'_, '_>, value: &Value| {
        template::affordable(state, value)?;
        Ok::<_, Error>(if value.kind() == ValueKind::String { value.clone() } else { Value::from(text(value)) })
    });
}

fn emit(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    template::affordable(state, value)?;
    if has_float(value, 0) {
        return out.write_str(&text(value)).map_err(|error| refusal(error.to_string()));
    }
    minijinja::escape_formatter(out, state, value)
}

fn is_float(value: &Value) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

fn has_float(value: &Value, depth: usize) -> bool {
    match value.kind() {
        ValueKind::Number => is_float(value),
        ValueKind::Seq => {
            depth < MAX_DEPTH && value.try_iter().is_ok_and(|mut all| all.any(|item| has_float(&item, depth + 1)))
        }
        ValueKind::Map => {
            let of = |key: Value| value.get_item(&key).is_ok_and(|item| has_float(&item, depth + 1));
            depth < MAX_DEPTH && value.try_iter().is_ok_and(|mut keys| keys.any(of))
        }
        _ => false,
    }
}

/// Returns Python's `str(value)`.
fn text(value: &Value) -> String {
    if value.kind() == ValueKind::String { value.to_string() } else { representation(value, 0) }
}

/// Returns Python's `repr(value)`, which differs from minijinja's only for floats.
fn representation(value: &Value, depth: usize) -> String {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Number if is_float(value) => f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float),
        ValueKind::Seq if depth < MAX_DEPTH => {
            let all: Vec<String> = items().map(|item| representation(&item, depth + 1)).collect();
            format!("[{}]", all.join(", "))
        }
        ValueKind::Map if depth < MAX_DEPTH => {
            let pair = |key: Value| {
                let value = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", representation(&key, depth + 1), representation(&value, depth + 1))
            };
            format!("{{{}}}", items().map(pair).collect::<Vec<_>>().join(", "))
        }
        ValueKind::String => format!("{value:?}"),
        _ => value.to_string(),
    }
}

/// Returns Python's `repr` of a float: the shortest digits that parse to the same number, with an exponent below 10⁻⁴
/// and from 10¹⁶ on.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = number.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Calls a Python method and consumes fuel for the size of its inputs: minijinja charges only for results.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let size = |value: &Value| value.as_str().map(str::len).or(value.len()).unwrap_or(0);
    let all = size(value) + arguments.iter().map(size).sum::<usize>();
    state.consume_fuel(all as u64 / 16)?;
    let own = match (value.as_str(), value.kind()) {
        (Some(text), _) => text_method(state, text, name, arguments)?,
        (None, ValueKind::Seq) if name == "index" => {
            let (sought,): (&Value,) = from_args(arguments)?;
            let place = value.try_iter()?.position(|item| item == *sought);
            Some(place.map(Value::from).ok_or_else(|| refusal(format!("{sought} is not in the list")))?)
        }
        _ => None,
    };
    match own {
        Some(value) => Ok(value),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

/// Calls a method of a text that minijinja-contrib lacks; returns `None` for other methods.
fn text_method(state: &State<'_, '_>, text: &str, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    // Python counts characters.
    let characters = |bytes: usize| text[..bytes].chars().count();
    let absent = |sought: &str| refusal(format!("the text {sought:?} is not found"));
    let found = match name {
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(arguments)?;
            let most =
                most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<&str> = match separator {
                Some("") => return Err(refusal("the separator of rsplit is empty")),
                Some(separator) => text.rsplitn(most, separator).collect(),
                None => split_at_space(text, most),
            };
            parts.reverse();
            parts.into_iter().map(Value::from).collect()
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "index" | "rindex" => {
            let (sought,): (&str,) = from_args(arguments)?;
            let place = if name == "index" { text.find(sought) } else { text.rfind(sought) };
            Value::from(characters(place.ok_or_else(|| absent(sought))?))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let parts = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match parts {
                Some((before, after)) => [before, separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            parts.into_iter().map(Value::from).collect()
        }
        "casefold" => text.to_lowercase().into(),
        "swapcase" => {
            let swapped =
                |c: char| if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() };
            text.chars().map(swapped).collect::<Vec<String>>().concat().into()
        }
        "zfill" | "ljust" | "rjust" | "center" => padded(state, text, name, arguments)?.into(),
        _ => return Ok(None),
    };
    Ok(Some(found))
}

/// Splits `text` into words from the last one on, into at most `most` parts; the last part is the remaining text.
fn split_at_space(text: &str, most: usize) -> Vec<&str> {
    let (mut parts, mut left) = (Vec::new(), text.trim_end());
    while !left.is_empty() {
        let cut = if parts.len() + 1 < most { left.rfind(char::is_whitespace) } else { None };
        let word = cut.map_or(0, |at| at + left[at..].chars().next().map_or(0, char::len_utf8));
        parts.push(&left[word..]);
        left = left[..word].trim_end();
    }
    parts
}

/// Pads `text` to a number of characters.
fn padded(state: &State<'_, '_>, text: &str, name: &str, arguments: &[Value]) -> Result<String, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(arguments)?;
    let fill = if name == "zfill" { "0" } else { fill.unwrap_or(" ") };
    let missing = width.saturating_sub(text.chars().count());
    if fill.chars().count() != 1 {
        return Err(refusal(format!("{name} needs a single fill character")));
    }
    state.consume_fuel(missing as u64 / template::BYTES_PER_STEP)?;
    if state.fuel_levels().is_some_and(|(_, left)| left.saturating_mul(64) < missing as u64) {
        return Err(ErrorKind::OutOfFuel.into());
    }
    let (left, right) = match name {
        "ljust" => (0, missing),
        // CPython divides an odd number in this way.
        "center" => {
            let left = missing / 2 + (missing & width & 1);
            (left, missing - left)
        }
        _ => (missing, 0),
    };
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) if name == "zfill" => (&text[..1], digits),
        _ => ("", text),
    };
    let mut out = String::with_capacity(text.len() + missing * fill.len());
    let _ = write!(out, "{sign}{}{digits}{}", fill.repeat(left), fill.repeat(right));
    Ok(out)
}
