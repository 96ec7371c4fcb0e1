//! Types of the keys of a model's JSON files: a value of another type is rejected instead of replaced by a default.

use anyhow::{Result, bail};
use serde_json::Value;

/// Type that the value of a key must have. Absent keys and null are always accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// A whole number from zero.
    Whole,
    /// A number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// A string.
    Text,
    /// A list of strings.
    Texts,
    /// An object.
    Object,
    /// A token id, or a list of token ids.
    Ids,
}

impl Type {
    fn has(self, value: &Value) -> bool {
        let id = |value: &Value| value.as_u64().is_some_and(|id| u32::try_from(id).is_ok());
        match self {
            Self::Whole => value.is_u64(),
            Self::Number => value.is_number(),
            Self::Boolean => value.is_boolean(),
            Self::Text => value.is_string(),
            Self::Texts => value.as_array().is_some_and(|list| list.iter().all(Value::is_string)),
            Self::Object => value.is_object(),
            Self::Ids => value.as_array().map_or_else(|| id(value), |list| list.iter().all(id)),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Whole => "a whole number from 0 up",
            Self::Number => "a number",
            Self::Boolean => "true or false",
            Self::Text => "a text",
            Self::Texts => "a list of texts",
            Self::Object => "an object",
            Self::Ids => "a token id or a list of them",
        }
    }
}

/// Checks that each of `keys` in `json` has its type.
///
/// # Errors
/// If a value has another type; the error names the first such key, its value and the expected type.
pub fn check(json: &Value, keys: &[(&str, Type)]) -> Result<()> {
    for (key, expected) in keys {
        let value = &json[*key];
        if !value.is_null() && !expected.has(value) {
            let mut text = value.to_string();
            if text.chars().count() > 100 {
                text = text.chars().take(100).chain(['…']).collect();
            }
            bail!("{key} is {text}, and must be {}", expected.words());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_of_another_type_is_rejected_by_its_key() {
        for (expected, right, wrong) in [
            (Type::Whole, vec![json!(0), json!(7), json!(null)], vec![json!(-1), json!(7.0), json!("7"), json!(true)]),
            (Type::Number, vec![json!(1.5), json!(-3)], vec![json!("500000"), json!([1])]),
            (Type::Boolean, vec![json!(true)], vec![json!("true"), json!(1)]),
            (Type::Text, vec![json!("silu")], vec![json!(3), json!({})]),
            (Type::Texts, vec![json!([]), json!(["a"])], vec![json!("a"), json!(["a", 1])]),
            (Type::Object, vec![json!({})], vec![json!("{}"), json!([])]),
            (Type::Ids, vec![json!(3), json!([3, 4])], vec![json!(-1), json!([3, "4"]), json!(1u64 << 32), json!("3")]),
        ] {
            for value in right {
                assert!(check(&json!({ "key": value }), &[("key", expected)]).is_ok(), "{expected:?} {value}");
            }
            for value in wrong {
                let error = check(&json!({ "key": value }), &[("key", expected)]).unwrap_err().to_string();
                assert!(error.starts_with(&format!("key is {value}, and must be")), "{error}");
            }
        }
        let long = check(&json!({ "key": "é".repeat(10_000) }), &[("key", Type::Whole)]).unwrap_err().to_string();
        assert!(long.len() < 400, "{long}");
    }
}
