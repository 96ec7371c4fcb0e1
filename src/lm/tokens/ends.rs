//! The tokens that end a completion.

use anyhow::Result;

use super::Tokenizer;
use super::chat::Message;

/// An answer whose end in the template is looked at. No template changes it.
const ANSWER: &str = "Certainly";

impl Tokenizer {
    /// The token that an answer ends with, if the model has one: in a chat that which the model's template writes after an
    /// answer, elsewhere that which ends a document.
    pub fn end(&self, chat: bool) -> Option<u32> {
        self.turn_end.filter(|_| chat).or(self.special.eos.first().copied())
    }

    /// The token that ends a completion, as it is written, where the chat template alone says that one does.
    pub fn end_by_template_alone(&self) -> Option<String> {
        let end = self.turn_end.filter(|end| self.special.eos == [*end] && !self.named_end)?;
        self.inner.id_to_token(end)
    }

    /// The token that the model's chat template writes after an answer: an added token, after spaces at most. `None` where the
    /// template writes no such token, or there is no template.
    pub(super) fn found_turn_end(&self) -> Option<u32> {
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
