//! Documents generated from the declarations: the reference page, the JSON Schema, and a configuration with every key.

use std::fmt::Write as _;

use serde_json::{Map, Value as Json, json};
use toml::Value;

use super::key::{Key, Range, Resume};
use super::types::Shape;
use super::{Config, keys};

impl Resume {
    /// Returns the effect of a change in words, for the reference page.
    fn words(self) -> &'static str {
        match self {
            Self::Fixed => "a change is refused",
            Self::AcceptChange => "a change requires `--accept-change`",
            Self::Changeable => "may be changed",
        }
    }
}

/// Returns the reference page `docs/configuration.md`, in Markdown.
pub fn page() -> String {
    let mut page = format!(
        "# Configuration\n\n\
         This page describes all {} keys of a configuration file. A key that a file omits has its default. \
         `preceptor check CONFIG --print` shows every key with its value, `--set SECTION.KEY=VALUE` overrides one key for \
         one run, and `preceptor check --schema` prints a JSON Schema for editors.\n\n\
         `--set` reads the value by the type of the key: a string needs no quotes (`--set run.name=first`), other values are \
         TOML (`--set 'rollout.stop=[\"END\"]'`). List elements are addressed by index, from 0 \
         (`--set labeler.members.0.weight=2`).\n\n\
         *On resume* is the effect of a change on a run that is resumed from a checkpoint. A refused change needs a new run. \
         `--accept-change KEY` accepts a change that gives the run another judge.\n\n\
         This page is generated from the declarations in `src/config`; \
         `PRECEPTOR_WRITE=1 cargo test --release --test suite configuration_reference` regenerates it.\n",
        keys().len()
    );
    for (section, about, keys) in Config::declarations() {
        let _ = write!(page, "\n## `[{section}]`\n\n{about}\n");
        for key in &keys {
            describe(&mut page, section, key);
        }
    }
    page
}

/// Appends the description of `key`, and of the keys inside its value.
fn describe(page: &mut String, section: &str, key: &Key) {
    let path = format!("{section}.{}", key.name);
    let _ = write!(page, "\n### `{path}`\n\n{}\n\n- Type: {}", key.doc, key.shape.words());
    if let Some(range) = key.range {
        let _ = write!(page, ", {range}");
    }
    if key.secret {
        page.push_str(" (messages do not repeat the value)");
    }
    if let Shape::Word(words) = &key.shape {
        for (word, meaning) in words {
            let _ = write!(page, "\n  - `\"{word}\"`: {meaning}");
        }
    }
    let _ = write!(page, "\n- Default: {}\n- On resume: {}", key.default, key.resume.words());
    if let Some(example) = key.example.as_ref().filter(|_| key.default_value.is_none()) {
        let _ = write!(page, "\n- Example: `{} = {example}`", key.name);
    }
    page.push('\n');
    match &key.shape {
        // The keys of `evaluation.labeler` are those of `[labeler]`, where they are described.
        Shape::Table(_) if path == "evaluation.labeler" => {}
        Shape::Table(inner) => inner().iter().for_each(|inner| describe(page, &path, inner)),
        Shape::Model(Some(inner)) => inner().iter().for_each(|inner| describe(page, &format!("{path}.scratch"), inner)),
        _ => {}
    }
}

/// Returns the JSON Schema (draft 7) of a configuration file.
pub fn schema() -> Json {
    let sections = Config::declarations();
    let required: Vec<&str> = sections
        .iter()
        .filter(|(_, _, keys)| keys.iter().any(|key| key.required))
        .map(|(section, _, _)| *section)
        .collect();
    let properties: Map<String, Json> =
        sections.iter().map(|(section, about, keys)| ((*section).to_owned(), object(about, keys))).collect();
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Configuration of preceptor",
        "type": "object",
        "additionalProperties": false,
        "required": required,
        "properties": properties,
    })
}

fn object(about: &str, keys: &[Key]) -> Json {
    let properties: Map<String, Json> = keys.iter().map(|key| (key.name.to_owned(), property(key))).collect();
    let required: Vec<&str> = keys.iter().filter(|key| key.required).map(|key| key.name).collect();
    json!({
        "type": "object",
        "description": about,
        "additionalProperties": false,
        "required": required,
        "properties": properties,
    })
}

fn property(key: &Key) -> Json {
    let mut schema = match &key.shape {
        Shape::Table(inner) => object(&key.doc, &inner()),
        Shape::Tables(inner) => json!({ "type": "array", "items": object("A member of the panel.", &inner()) }),
        Shape::Model(scratch) => model(*scratch),
        shape => shape.schema(),
    };
    let Json::Object(map) = &mut schema else { return schema };
    // `type` also accepts "panel", which is not a method of a single judge.
    if key.name == "type" {
        map.get_mut("enum").and_then(Json::as_array_mut).into_iter().for_each(|words| words.push("panel".into()));
    }
    if let Some(range) = key.range {
        bound(map, range);
    }
    let meanings = match &key.shape {
        Shape::Word(words) => words.iter().map(|(word, meaning)| format!("\n- {word}: {meaning}")).collect(),
        _ => String::new(),
    };
    map.insert("description".into(), Json::String(format!("{}{meanings}\nDefault: {}.", key.doc, key.default)));
    if let Some(default) = key.default_value.as_ref().map(plain) {
        map.insert("default".into(), default);
    }
    schema
}

/// Adds the bounds of a number. An allowed value outside them becomes an alternative (`anyOf`).
fn bound(map: &mut Map<String, Json>, range: Range) {
    let mut bounds = Map::new();
    for (bound, name, exclusive) in
        [(range.low, "minimum", "exclusiveMinimum"), (range.high, "maximum", "exclusiveMaximum")]
    {
        if let Some((value, itself)) = bound {
            bounds.insert(if itself { name } else { exclusive }.into(), number(value));
        }
    }
    match range.or {
        None => map.extend(bounds),
        Some(or) => drop(map.insert("anyOf".into(), json!([bounds, { "const": number(or) }]))),
    }
}

/// Converts a number to JSON, an integral one without a fraction, because some validators compare integers textually.
fn number(value: f64) -> Json {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

fn model(scratch: Option<fn() -> Vec<Key>>) -> Json {
    let text = json!({ "type": "string" });
    let table = |names: &[&str]| {
        let properties: Map<String, Json> = names.iter().map(|name| ((*name).to_owned(), text.clone())).collect();
        json!({ "type": "object", "additionalProperties": false, "required": [names[0]], "properties": properties })
    };
    let one =
        vec![text.clone(), table(&["path"]), table(&["hub", "revision", "file"]), table(&["pip", "sha256", "file"])];
    let list = json!({ "type": "array", "minItems": 1, "items": { "anyOf": one } });
    let new = scratch.map(|keys| {
        let properties = json!({ "scratch": object("A new model.", &keys()) });
        json!({ "type": "object", "additionalProperties": false, "required": ["scratch"], "properties": properties })
    });
    json!({ "anyOf": one.iter().cloned().chain([list]).chain(new).collect::<Vec<_>>() })
}

fn plain(value: &Value) -> Json {
    match value {
        Value::Float(float) => number(*float),
        other => serde_json::to_value(other).unwrap_or_default(),
    }
}

impl Config {
    /// Returns the configuration as a TOML file with every key, in the order of the reference page. A key without a
    /// value is written as a comment that describes the behaviour without it.
    pub fn to_file(&self) -> String {
        let mut text = String::new();
        for (section, fields) in self.sections() {
            let _ = writeln!(text, "{}[{section}]", if text.is_empty() { "" } else { "\n" });
            for (name, value) in fields {
                let _ = match value {
                    Some(value) => writeln!(text, "{name} = {value}"),
                    None => {
                        let without = super::key(&format!("{section}.{name}")).map_or("", |key| key.default.as_str());
                        writeln!(text, "# {name}: not set; {without}")
                    }
                };
            }
        }
        text
    }
}
