//! Overrides of the command line: `--set section.key=value`.

use std::collections::BTreeMap;

use toml::{Table, Value};

use super::document::{Document, DocumentNode, Kind, Place, cut};

/// Maximum number of names in the path of an override.
const MAX_DEPTH: usize = 8;
/// Maximum number of characters of a path in a message.
const LONGEST_PATH: usize = 100;

/// Applies the override `text` to the document. List elements are addressed by their index, from 0:
/// `labeler.members.0.weight=2`.
pub(super) fn apply(document: &mut Document, text: &str) {
    let parts = text.split_once('=').map(|(path, value)| (path.trim(), value.trim()));
    let steps = parts.and_then(|(path, value)| Some((steps(path)?, value)));
    let Some((steps, value)) = steps else {
        let message = format!("{:?} is not section.key=value, such as learner.eta=0", cut(text, LONGEST_PATH));
        return document.error_in_override("", &message);
    };
    let key = steps[..2].join(".");
    if let Err(message) = insert(&mut document.root, &steps, value_of(value)) {
        document.error_in_override(&cut(&key, LONGEST_PATH), &message);
    }
}

/// Splits a path into its names, or returns `None` if it is invalid. `members[1]` is the same as `members.1`.
fn steps(path: &str) -> Option<Vec<String>> {
    let path = path.replace('[', ".").replace(']', "");
    let steps: Vec<String> = path.split('.').map(str::to_owned).collect();
    ((2..=MAX_DEPTH).contains(&steps.len()) && !steps.iter().any(String::is_empty)).then_some(steps)
}

/// Parses the value of an override. The node keeps the text, because the type of the key decides between string and
/// TOML.
fn value_of(text: &str) -> DocumentNode {
    let document = format!("v = {text}").parse::<Table>();
    let (value, syntax_error) = match (text.parse::<toml_edit::Value>(), document) {
        (Ok(_), Ok(mut table)) if table.len() == 1 => (table.remove("v"), None),
        (_, Ok(table)) if table.len() > 1 => {
            let syntax_error =
                "its value is followed by another line, which would be ignored; give each key a separate --set";
            (None, Some(syntax_error.to_owned()))
        }
        (Err(_), Ok(_)) => {
            let syntax_error =
                "its value is followed by a comment, which would be ignored; put a string with # in quotes";
            (None, Some(syntax_error.to_owned()))
        }
        _ => (None, None),
    };
    let node = DocumentNode::set(value.unwrap_or_else(|| Value::String(text.to_owned())));
    DocumentNode { text: Some(text.to_owned()), syntax_error, ..node }
}

fn insert(root: &mut DocumentNode, steps: &[String], value: DocumentNode) -> Result<(), String> {
    let mut node = root;
    for (at, step) in steps.iter().enumerate() {
        let above = || cut(&steps[..at].join("."), LONGEST_PATH);
        // A missing value becomes a list if an index follows, else a table.
        let numbered = steps.get(at + 1).is_some_and(|next| next.parse::<usize>().is_ok());
        let new = || {
            let kind = if numbered { Kind::List(Vec::new()) } else { Kind::Table(BTreeMap::new()) };
            DocumentNode { kind, place: Place::Set, text: None, syntax_error: None }
        };
        let kind = node.type_name();
        let next = match &mut node.kind {
            Kind::Table(table) => table.entry(step.clone()).or_insert_with(new),
            Kind::List(list) => {
                let Ok(i) = step.parse::<usize>() else {
                    return Err(format!("{} is a list; address its elements by index, as {}.0", above(), above()));
                };
                if i > list.len() {
                    return Err(format!("{} has {} elements; the next index is {}", above(), list.len(), list.len()));
                }
                if i == list.len() {
                    list.push(new());
                }
                &mut list[i]
            }
            Kind::Leaf(_) => {
                return Err(format!("{} has the type {kind} and no keys below it; override the key itself", above()));
            }
        };
        node = next;
    }
    *node = value;
    Ok(())
}
