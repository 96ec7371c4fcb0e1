//! Tokens that end a completion.

use anyhow::Result;

use super::Tokenizer;
use super::chat::Message;

/// Answer that is rendered to find the text after it. No template changes this word.
const ANSWER: &str = "Certainly";

impl Tokenizer {
    /// Returns the token that ends an answer, if the model has one: in a chat the token that the template writes after
    /// an answer, otherwise the token that ends a document.
    pub fn end(&self, chat: bool) -> Option<u32> {
        self.turn_end.filter(|_| chat).or(self.special.eos.first().copied())
    }

    /// Returns the text of the token that ends a completion, if only the chat template defines one.
    pub fn template_end_token(&self) -> Option<String> {
        let end = self.turn_end.filter(|end| self.special.eos == [*end] && !self.named_end)?;
        self.inner.id_to_token(end)
    }

    /// Returns the token that the model's chat template writes after an answer: an added token, preceded at most by
    /// spaces. `None` if the template writes no such token, or there is no template.
    pub(super) fn detect_turn_end(&self) -> Option<u32> {
        let written = |question: &str| -> Result<String> {
            let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
            self.render_chat(&[message("user", question), message("assistant", ANSWER)], false)
        };
        let text = written("Hi").ok()?;
        let after = &text[text.rfind(ANSWER)? + ANSWER.len()..];
        let id = *self.encode(after.trim_start()).ok()?.first()?;
        let is_added = self.inner.get_added_tokens_decoder().contains_key(&id);
        (is_added && Some(id) != self.special.bos).then_some(id)
    }
}
