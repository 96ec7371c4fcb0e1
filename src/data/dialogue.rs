//! What a policy is asked: one message, or several turns of a dialogue.

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use crate::tokens::chat::Message;

/// Turns of a dialogue, oldest first. As a prompt it ends with the user's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialogue {
    /// The turns, at least one.
    pub turns: Vec<Message>,
}

const HUMAN: &str = "\n\nHuman:";
const ASSISTANT: &str = "\n\nAssistant:";

impl Dialogue {
    /// One message of the user's.
    pub fn single(text: &str) -> Self {
        Self { turns: vec![Message { role: "user".into(), content: text.into() }] }
    }

    /// As [`Self::from_json`], for a whole conversation: an assistant's last turn without words is kept, as the answer
    /// that it is.
    ///
    /// # Errors
    /// As [`Self::from_json`].
    pub fn whole_from_json(value: &Value) -> Result<Self> {
        match value {
            Value::String(text) if Self::in_turns(text) => Self::from_turns(text),
            other => Self::from_json(other),
        }
    }

    fn in_turns(text: &str) -> bool {
        text.starts_with(HUMAN) || text.starts_with(HUMAN.trim_start())
    }

    /// From a field of a row: a text, a text in turns (where an empty assistant's turn at the end only opens the answer; `\n\nHuman: …\n\nAssistant: …`), or a list of
    /// `{role, content}`.
    ///
    /// # Errors
    /// Says what the field is instead.
    pub fn from_json(value: &Value) -> Result<Self> {
        match value {
            Value::String(text) if Self::in_turns(text) => {
                let mut dialogue = Self::from_turns(text)?;
                let opens = |turn: &Message| turn.role == "assistant" && turn.content.is_empty();
                if dialogue.turns.len() > 1 && dialogue.turns.last().is_some_and(opens) {
                    dialogue.turns.pop();
                }
                Ok(dialogue)
            }
            Value::String(text) => Ok(Self::single(text)),
            Value::Array(list) => {
                ensure!(!list.is_empty(), "is a dialogue without turns");
                let turns = list.iter().map(message).collect::<Result<_>>()?;
                Ok(Self { turns })
            }
            _ => bail!("is no text and no list of messages"),
        }
    }

    /// From `\n\nHuman: …\n\nAssistant: …`.
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
            turns.push(Message { role: role.into(), content: body[..end].trim().into() });
            rest = &body[end..];
        }
        Ok(Self { turns })
    }

    /// How a judge reads it: the message itself, or its turns, each with who speaks.
    pub fn text(&self) -> String {
        if let [one] = self.turns.as_slice()
            && one.role == "user"
        {
            return one.content.clone();
        }
        let spoken = self.turns.iter().map(|turn| {
            let who = match turn.role.as_str() {
                "user" => "Human",
                "assistant" => "Assistant",
                other => other,
            };
            format!("{who}: {}", turn.content)
        });
        spoken.collect::<Vec<_>>().join("\n\n")
    }

    /// What two conversations share, and how each goes on: the assistant's answer, or where several turns follow, all of
    /// them as text.
    ///
    /// # Errors
    /// When they do not part at an answer of the assistant's.
    pub fn part(self, other: Self) -> Result<(Self, String, String)> {
        let shared = self.turns.iter().zip(&other.turns).take_while(|(a, b)| a == b).count();
        // Conversations that are the same to the end part at their last answer.
        let shared = shared.min(self.turns.len().min(other.turns.len()).saturating_sub(1));
        let rest = |dialogue: &Self| -> Result<String> {
            let rest = &dialogue.turns[shared..];
            match rest.first() {
                Some(first) if first.role == "assistant" => {}
                _ => bail!("do not part at an answer of the assistant's: they differ from turn {} on", shared + 1),
            }
            let told = Self { turns: rest.to_vec() }.text();
            Ok(told.strip_prefix("Assistant:").unwrap_or(&told).trim().to_owned())
        };
        let (first, second) = (rest(&self)?, rest(&other)?);
        ensure!(shared > 0, "have nothing in common: there is no prompt");
        Ok((Self { turns: self.turns[..shared].to_vec() }, first, second))
    }
}

/// Where the next turn begins. What is looked for once is not looked for again: a text may have many turns of one kind.
fn next_turn(body: &str) -> usize {
    let mut breaks = body.match_indices('\n').map(|(at, _)| at);
    breaks.find(|at| [HUMAN, ASSISTANT].iter().any(|mark| body[*at..].starts_with(mark))).unwrap_or(body.len())
}

fn message(value: &Value) -> Result<Message> {
    match (value["role"].as_str(), value["content"].as_str()) {
        (Some(role), Some(content)) => Ok(Message { role: role.into(), content: content.into() }),
        _ => bail!("has a message without role or content"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn turns(value: &Value) -> Vec<(String, String)> {
        Dialogue::from_json(value).unwrap().turns.into_iter().map(|turn| (turn.role, turn.content)).collect()
    }

    #[test]
    fn dialogues_come_in_three_forms() {
        let expected = [("user", "hi"), ("assistant", "hello\n\nthere"), ("user", "why?")]
            .map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(turns(&json!("\n\nHuman: hi\n\nAssistant: hello\n\nthere\n\nHuman: why?\n\nAssistant:")), expected);
        assert_eq!(
            turns(&json!([
                { "role": "user", "content": "hi" },
                { "role": "assistant", "content": "hello\n\nthere" },
                { "role": "user", "content": "why?" }
            ])),
            expected
        );
        assert_eq!(turns(&json!("Human beings are odd")), [("user".to_owned(), "Human beings are odd".to_owned())]);
        for wrong in [json!(3), json!([]), json!([{ "role": "user" }])] {
            assert!(Dialogue::from_json(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn many_turns_of_one_kind_are_read_once() {
        let text = "\n\nHuman: hi\n".repeat(500_000);
        let began = crate::process::thread_seconds();
        assert_eq!(Dialogue::whole_from_json(&json!(text)).unwrap().turns.len(), 500_000);
        // Looking for the other kind from each of them to the end would take minutes of processor time.
        assert!(crate::process::thread_seconds() - began < 20.0);
    }

    #[test]
    fn a_judge_reads_turns_and_an_answer_is_split_off() {
        let dialogue = Dialogue::from_json(&json!("\n\nHuman: hi\n\nAssistant: hello")).unwrap();
        assert_eq!(dialogue.text(), "Human: hi\n\nAssistant: hello");
        let parts = |a: &str, b: &str| {
            let read = |text: &str| Dialogue::whole_from_json(&json!(text)).unwrap();
            read(a).part(read(b)).map(|(shared, a, b)| (shared.text(), a, b))
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
        for (a, b) in
            [("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: ho\n\nAssistant: a"), ("\n\nHuman: hi", "\n\nHuman: hi")]
        {
            assert!(parts(a, b).is_err(), "{a} {b}");
        }
    }
}
