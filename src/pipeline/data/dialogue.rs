//! Conversations, in the formats used by data sets.

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value};

use super::faults::Notes;
use super::rows::BINARY;
use crate::lm::tokens::chat::Message;

/// Turns of a dialogue, oldest first. A prompt ends with a user turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialogue {
    /// The turns, at least one. Roles are `system` (only for the first turn), `user` and `assistant`.
    pub turns: Vec<Message>,
}

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

/// Role names in data sets, in lower case, and the roles they map to.
const ROLES: [(&str, &str); 17] = [
    ("system", "system"),
    ("developer", "system"),
    ("user", "user"),
    ("human", "user"),
    ("prompter", "user"),
    ("assistant", "assistant"),
    ("gpt", "assistant"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("ai", "assistant"),
    ("chatgpt", "assistant"),
    ("chatbot", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("claude", "assistant"),
    ("gemini", "assistant"),
    ("llm", "assistant"),
];

/// Roles of tool calls, which are not supported.
const TOOL_ROLES: [&str; 6] = ["tool", "function", "function_call", "observation", "ipython", "tool_response"];

impl Dialogue {
    /// Creates a dialogue of one user message.
    pub fn single(text: &str) -> Self {
        Self { turns: vec![message("user", text)] }
    }

    /// Reads a field of a row. Accepted are: a text; a text in turns (`\n\nHuman: …\n\nAssistant: …`); a list of messages
    /// with `role` and `content` or `from` and `value`, whose contents are texts or lists of text parts; such a list as
    /// JSON in a text; a single message; and `{role: […], content: […]}`, which older versions of `datasets` make of a
    /// list of messages.
    ///
    /// # Errors
    /// If the field has another form. The message begins with "is …" or "has …", to follow the field's name.
    pub fn read(value: &Value, notes: &mut Notes) -> Result<Self> {
        let dialogue = match value {
            Value::String(text) if Self::in_turns(text) => Self::from_turns(text)?,
            Value::String(text) => {
                let python =
                    text.trim_start().starts_with("[{'") && ["'role':", "'from':"].iter().any(|key| text.contains(key));
                if let Some(list) = messages_in(text) {
                    notes.add("a text that holds messages as JSON is read as these messages");
                    return Self::read(&Value::Array(list), notes);
                }
                ensure!(!python, "is a list of messages in Python's notation, as one text; write it in JSON");
                Self::single(text)
            }
            Value::Array(list) => {
                ensure!(!list.is_empty(), "is a dialogue without turns");
                let turns =
                    list.iter().enumerate().map(|(i, value)| turn(value, i + 1, notes)).collect::<Result<_>>()?;
                Self { turns }
            }
            Value::Object(fields) if fields.contains_key(BINARY) => bail!("{}", not_text(value)),
            Value::Object(fields) => match transposed(fields) {
                Some(list) => return Self::read(&Value::Array(list), notes),
                None if fields.contains_key("role") || fields.contains_key("from") => {
                    Self { turns: vec![turn(value, 1, notes)?] }
                }
                None => bail!("{}", not_text(value)),
            },
            _ => bail!("{}", not_text(value)),
        };
        let system = dialogue.turns.iter().skip(1).position(|turn| turn.role == "system");
        if let Some(i) = system {
            bail!("has a system message as its message {}; only the first message may be one", i + 2);
        }
        Ok(dialogue)
    }

    fn in_turns(text: &str) -> bool {
        text.starts_with(HUMAN) || text.starts_with(HUMAN.trim_start())
    }

    /// Parses `\n\nHuman: …\n\nAssistant: …`.
    fn from_turns(text: &str) -> Result<Self> {
        let text = if text.starts_with('\n') { text.to_owned() } else { format!("\n\n{text}") };
        let mut turns = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let (role, body) = match (rest.strip_prefix(HUMAN), rest.strip_prefix(ASSISTANT)) {
                (Some(body), _) => ("user", body),
                (_, Some(body)) => ("assistant", body),
                (None, None) => bail!("is a dialogue that does not begin with Human: or Assistant:"),
            };
            let end = next_turn(body);
            turns.push(message(role, body[..end].trim()));
            rest = &body[end..];
        }
        Ok(Self { turns })
    }

    /// Splits off the assistant's last turn, which is the answer to the prompt before it. An empty assistant turn only
    /// opens the answer and is dropped.
    ///
    /// # Errors
    /// If the conversation has no user turn, or none at its end.
    pub fn into_prompt(mut self) -> Result<(Self, Option<String>)> {
        let mut answer = None;
        if self.turns.last().is_some_and(|turn| turn.role == "assistant") {
            let last = self.turns.pop().map(|turn| turn.content).unwrap_or_default();
            answer = (!last.trim().is_empty()).then_some(last);
        }
        match self.turns.last().map(|turn| turn.role.as_str()) {
            Some("user") => {}
            Some("assistant") => bail!("ends with two turns of the assistant; a prompt ends with the user's turn"),
            Some(_) => bail!("has only a system message; a prompt ends with the user's turn"),
            None => bail!("has only a turn of the assistant; a prompt ends with the user's turn"),
        }
        let last = &self.turns[self.turns.len() - 1];
        ensure!(!last.content.trim().is_empty(), "is empty: the user's last turn has no text");
        Ok((self, answer))
    }

    /// Reads a dialogue as [`Self::read`] and [`Self::into_prompt`] do, and drops the answer.
    ///
    /// # Errors
    /// As for those functions.
    pub fn from_json(value: &Value) -> Result<Self> {
        Ok(Self::read(value, &mut Notes::default())?.into_prompt()?.0)
    }

    /// Inserts a system message at the start, unless the dialogue has the same one.
    ///
    /// # Errors
    /// If the dialogue has a different system message.
    pub fn with_system(mut self, system: &str) -> Result<Self> {
        match self.turns.first() {
            Some(first) if first.role == "system" => {
                ensure!(first.content.trim() == system.trim(), "is another system message than that of the dialogue");
            }
            _ => self.turns.insert(0, message("system", system)),
        }
        Ok(self)
    }

    /// Returns whether the first turn is a system message.
    pub fn has_system(&self) -> bool {
        self.turns.first().is_some_and(|turn| turn.role == "system")
    }

    /// Returns the dialogue as text for a judge: a single user message unchanged, or several turns, each with its
    /// speaker.
    pub fn text(&self) -> String {
        if let [one] = self.turns.as_slice()
            && one.role == "user"
        {
            return one.content.clone();
        }
        let lines = self.turns.iter().map(|turn| {
            let speaker = match turn.role.as_str() {
                "user" => "Human",
                "assistant" => "Assistant",
                other => other,
            };
            format!("{speaker}: {}", turn.content)
        });
        lines.collect::<Vec<_>>().join("\n\n")
    }

    /// Splits two conversations into their common turns and the continuation of each, as formatted by
    /// [`Self::as_answer`].
    ///
    /// # Errors
    /// If they do not diverge at an assistant turn.
    pub fn split_common(self, other: Self) -> Result<(Self, String, String)> {
        let shared = self.turns.iter().zip(&other.turns).take_while(|(a, b)| a == b).count();
        // Identical conversations diverge at their last answer.
        let shared = shared.min(self.turns.len().min(other.turns.len()).saturating_sub(1));
        let rest = |dialogue: &Self| -> Result<String> {
            let rest = &dialogue.turns[shared..];
            match rest.first() {
                Some(first) if first.role == "assistant" => {}
                _ => bail!("do not diverge at an assistant turn: they differ from turn {} on", shared + 1),
            }
            Self { turns: rest.to_vec() }.as_answer()
        };
        let (first, second) = (rest(&self)?, rest(&other)?);
        ensure!(shared > 0, "have nothing in common: there is no prompt");
        Ok((Self { turns: self.turns[..shared].to_vec() }, first, second))
    }

    /// Returns the turns that follow a prompt as one answer: the assistant's turn, or all turns as text if there are
    /// several.
    ///
    /// # Errors
    /// If the turns do not begin and end with the assistant's, or two of the assistant's follow each other.
    pub fn as_answer(&self) -> Result<String> {
        let by = |turn: Option<&Message>| turn.is_some_and(|turn| turn.role == "assistant");
        ensure!(by(self.turns.first()), "do not continue the prompt with the assistant's turn");
        ensure!(by(self.turns.last()), "do not end with the assistant's turn");
        let twice = self.turns.windows(2).any(|two| by(two.first()) && by(two.last()));
        ensure!(!twice, "have two turns of the assistant in a row; join them into one message");
        let text = self.text();
        Ok(text.strip_prefix("Assistant:").unwrap_or(&text).trim().to_owned())
    }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

/// Returns the offset of the next turn. The scan is a single pass, because a text may have many turns of one kind.
fn next_turn(body: &str) -> usize {
    let mut breaks = body.match_indices('\n').map(|(at, _)| at);
    breaks.find(|at| [HUMAN, ASSISTANT].iter().any(|mark| body[*at..].starts_with(mark))).unwrap_or(body.len())
}

/// Converts `{role: […], content: […]}` into a list of messages.
fn transposed(fields: &Map<String, Value>) -> Option<Vec<Value>> {
    let lists = fields.iter().map(|(name, value)| Some((name, value.as_array()?))).collect::<Option<Vec<_>>>()?;
    let count = lists.first()?.1.len();
    let named = |name| fields.contains_key(name);
    let sound = (named("role") || named("from")) && lists.iter().all(|(_, list)| list.len() == count);
    let at = |i: usize| Value::Object(lists.iter().map(|(name, list)| ((*name).clone(), list[i].clone())).collect());
    sound.then(|| (0..count).map(at).collect())
}

/// Converts element number `number` of a list into a message.
fn turn(value: &Value, number: usize, notes: &mut Notes) -> Result<Message> {
    let Value::Object(fields) = value else {
        let nested = if value.is_array() { "; a dialogue is one list of messages" } else { "" };
        bail!("has {} as its message {number}{nested}", super::described(value));
    };
    let given = |name: &str| fields.get(name).filter(|value| !value.is_null());
    let (name, role) = ["role", "from"].iter().find_map(|name| Some((*name, given(name)?))).with_context(|| {
        format!(
            "has {} as its message {number}; a message needs role and content, or from and value",
            super::described(value)
        )
    })?;
    let role = role.as_str().with_context(|| format!("has a {name} that is not a text in message {number}"))?;
    let known = role.trim().to_ascii_lowercase();
    ensure!(
        !TOOL_ROLES.contains(&known.as_str()),
        "has a message with the {name} {role:?} (message {number}); tool calls and their results are not read"
    );
    for call in ["tool_calls", "function_call"] {
        let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
        ensure!(
            given(call).is_none_or(empty),
            "has a message with {call} (message {number}); tool calls and their results are not read"
        );
    }
    let (_, role) = ROLES.iter().find(|(name, _)| *name == known).ok_or_else(|| {
        anyhow!("has the {name} {role:?} in message {number}; known are system, user (or human) and assistant (or gpt, model, bot)")
    })?;
    let content = ["content", "value"].iter().find_map(|name| fields.get(*name));
    let content = content.with_context(|| {
        format!(
            "has {} as its message {number}; a message needs role and content, or from and value",
            super::described(value)
        )
    })?;
    for (key, _) in fields.iter().filter(|(_, value)| !value.is_null()) {
        if !["role", "from", "content", "value", "tool_calls"].contains(&key.as_str()) {
            notes.add(format!("{key:?} of messages is not read"));
        }
    }
    Ok(message(role, &text_of(content, number)?))
}

/// Returns the text of a message's content; several parts are joined by line feeds, as in vLLM.
fn text_of(content: &Value, number: usize) -> Result<String> {
    let Value::Array(parts) = content else {
        let text = content.as_str();
        return text.map(str::to_owned).with_context(|| {
            format!("has a message without text (message {number}): its content is {}", super::described(content))
        });
    };
    let part = |part: &Value| -> Result<String> {
        if let Some(text) = part.as_str() {
            return Ok(text.to_owned());
        }
        let kind = part["type"].as_str().unwrap_or("text");
        ensure!(kind == "text", "has a content part of the type {kind:?} in message {number}; only text is read");
        let text = part["text"].as_str().map(str::to_owned);
        text.with_context(|| format!("has a content part without text in message {number}: {}", super::described(part)))
    };
    Ok(parts.iter().map(part).collect::<Result<Vec<_>>>()?.join("\n"))
}

fn not_text(value: &Value) -> String {
    format!("is {}, and must be a text or a list of messages", super::described(value))
}

/// Parses a text that is a JSON list of messages, objects with `role` or `from`; `None` for any other text.
pub(super) fn messages_in(text: &str) -> Option<Vec<Value>> {
    if !text.trim_start().starts_with("[{") {
        return None;
    }
    let list: Vec<Value> = serde_json::from_str(text).ok()?;
    list.iter().all(|message| message.get("role").or(message.get("from")).is_some()).then_some(list)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Dialogue> {
        Dialogue::read(value, &mut Notes::default())
    }

    fn turns(value: &Value) -> Vec<(String, String)> {
        let dialogue = Dialogue::from_json(value).unwrap_or_else(|error| panic!("{value}: {error}"));
        dialogue.turns.into_iter().map(|turn| (turn.role, turn.content)).collect()
    }

    #[test]
    fn dialogues_are_read_in_every_format() {
        let expected = [("user", "hi"), ("assistant", "hello\n\nthere"), ("user", "why?")]
            .map(|(a, b)| (a.to_owned(), b.to_owned()));
        for value in [
            json!(
                r#"[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello\n\nthere"}, {"role": "user", "content": "why?"}]"#
            ),
            json!("\n\nHuman: hi\n\nAssistant: hello\n\nthere\n\nHuman: why?\n\nAssistant:"),
            json!([
                { "role": "user", "content": "hi" },
                { "role": "assistant", "content": "hello\n\nthere", "tool_calls": [], "name": null },
                { "role": "user", "content": [{ "type": "text", "text": "why?" }] }
            ]),
            json!([
                { "from": "human", "value": "hi" },
                { "from": "gpt", "value": "hello\n\nthere" },
                { "from": "human", "value": "why?" }
            ]),
            json!({ "role": ["User", "model", "Human"], "content": ["hi", "hello\n\nthere", "why?"] }),
        ] {
            assert_eq!(turns(&value), expected, "{value}");
        }
        assert_eq!(turns(&json!("Human beings are odd")), [("user".to_owned(), "Human beings are odd".to_owned())]);
        assert_eq!(turns(&json!({ "role": "user", "content": "hi" })), [("user".to_owned(), "hi".to_owned())]);
        let parts =
            json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }]);
        assert_eq!(turns(&parts), [("user".to_owned(), "a\nb".to_owned())]);
    }

    #[test]
    fn a_field_that_is_not_a_dialogue_is_described() {
        let user = json!({ "role": "user", "content": "hi" });
        let call = json!([{ "type": "function", "function": { "name": "f", "arguments": "{}" } }]);
        for (wrong, words) in [
            (json!(3), "is the number 3, and must be a text or a list of messages"),
            (json!(null), "is null"),
            (json!({ "0": "a" }), "is an object with the keys \"0\""),
            (json!({ BINARY: 7 }), "is 7 bytes of binary data"),
            (json!([]), "a dialogue without turns"),
            (
                json!([{ "role": "user" }]),
                "an object with the keys \"role\" as its message 1; a message needs role and content",
            ),
            (json!([{ "speaker": "a", "text": "b" }]), "the keys \"speaker\", \"text\" as its message 1"),
            (
                json!([user, { "role": "user", "content": null }]),
                "a message without text (message 2): its content is null",
            ),
            (json!([[user]]), "has a list as its message 1; a dialogue is one list of messages"),
            (json!(["hi"]), "has a text as its message 1"),
            (
                json!([{ "role": "narrator", "content": "x" }]),
                "has the role \"narrator\" in message 1; known are system",
            ),
            (json!([{ "from": "narrator", "value": "x" }]), "has the from \"narrator\""),
            (json!([user, { "role": "tool", "content": "22 C" }]), "a message with the role \"tool\" (message 2)"),
            (
                json!([user, { "role": "assistant", "content": "", "tool_calls": call }]),
                "a message with tool_calls (message 2)",
            ),
            (json!([user, { "role": "assistant", "content": null, "tool_calls": call }]), "a message with tool_calls"),
            (json!([user, { "role": "system", "content": "x" }]), "a system message as its message 2"),
            (
                json!([{ "role": "user", "content": [{ "type": "text", "text": "hi" }, { "type": "image_url", "image_url": {} }] }]),
                "a content part of the type \"image_url\" in message 1; only text is read",
            ),
            (json!([{ "role": "user", "content": [{ "type": "text" }] }]), "a content part without text in message 1"),
            (json!("[{'role': 'user', 'content': 'hi'}]"), "in Python's notation"),
        ] {
            let error = read(&wrong).expect_err(&wrong.to_string()).to_string();
            assert!(error.contains(words), "{wrong}: {error}");
        }
    }

    #[test]
    fn unread_fields_of_messages_are_noted() {
        let mut notes = Notes::default();
        let list = json!([{ "role": "user", "content": "hi", "name": "Ann", "weight": null }]);
        Dialogue::read(&list, &mut notes).unwrap();
        assert_eq!(notes.lines().collect::<Vec<_>>(), ["1 row: \"name\" of messages is not read"]);
    }

    #[test]
    fn the_final_answer_is_split_off_a_prompt() {
        let said =
            |list: &[(&str, &str)]| Dialogue { turns: list.iter().map(|(role, text)| message(role, text)).collect() };
        let (prompt, answer) = said(&[("system", "s"), ("user", "u"), ("assistant", "gold")]).into_prompt().unwrap();
        assert_eq!((prompt, answer.as_deref()), (said(&[("system", "s"), ("user", "u")]), Some("gold")));
        assert_eq!(said(&[("user", "u"), ("assistant", " ")]).into_prompt().unwrap(), (said(&[("user", "u")]), None));
        let two = said(&[("user", "u"), ("user", "u2")]);
        assert_eq!(two.clone().into_prompt().unwrap(), (two, None));
        for (list, words) in [
            (said(&[("system", "s")]), "has only a system message"),
            (said(&[("assistant", "a")]), "has only a turn of the assistant"),
            (said(&[("system", "s"), ("assistant", "a")]), "has only a system message"),
            (said(&[("user", "u"), ("assistant", "a"), ("assistant", "b")]), "two turns of the assistant"),
            (said(&[("user", " ")]), "is empty"),
            (said(&[("user", ""), ("assistant", "a")]), "is empty"),
        ] {
            let error = list.into_prompt().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn many_turns_of_one_kind_are_read_in_linear_time() {
        let text = "\n\nHuman: hi\n".repeat(500_000);
        let began = crate::util::process::thread_seconds();
        assert_eq!(read(&json!(text)).unwrap().turns.len(), 500_000);
        // Searching for the other kind from each turn to the end would take minutes of processor time.
        assert!(crate::util::process::thread_seconds() - began < 20.0);
    }

    #[test]
    fn dialogues_are_formatted_for_judges_and_split_at_the_answer() {
        let dialogue = read(&json!("\n\nHuman: hi\n\nAssistant: hello")).unwrap();
        assert_eq!(dialogue.text(), "Human: hi\n\nAssistant: hello");
        let parts = |a: &str, b: &str| {
            let read = |text: &str| read(&json!(text)).unwrap();
            read(a).split_common(read(b)).map(|(shared, a, b)| (shared.text(), a, b))
        };
        let owned = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        for (a, b, expected) in [
            ("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nAssistant: b", owned("hi", "a", "b")),
            ("\n\nHuman: hi\n\nAssistant: ", "\n\nHuman: hi\n\nAssistant: b", owned("hi", "", "b")),
            ("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nAssistant: a", owned("hi", "a", "a")),
            (
                "\n\nHuman: hi\n\nAssistant: a\n\nHuman: why?\n\nAssistant: so",
                "\n\nHuman: hi\n\nAssistant: b",
                owned("hi", "a\n\nHuman: why?\n\nAssistant: so", "b"),
            ),
        ] {
            assert_eq!(parts(a, b).unwrap(), expected);
        }
        for (a, b) in [
            ("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: ho\n\nAssistant: a"),
            ("\n\nHuman: hi", "\n\nHuman: hi"),
            ("\n\nHuman: hi\n\nAssistant: a\n\nHuman: x", "\n\nHuman: hi\n\nAssistant: b"),
            ("\n\nHuman: hi\n\nAssistant: a\n\nAssistant: c", "\n\nHuman: hi\n\nAssistant: b"),
        ] {
            assert!(parts(a, b).is_err(), "{a} {b}");
        }
    }
}
