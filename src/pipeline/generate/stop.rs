//! Stop strings, texts that end a completion.

use anyhow::Result;

use crate::lm::tokens::Tokenizer;

/// Detector of stop strings in sampled tokens.
#[derive(Debug)]
pub struct Stop {
    strings: Vec<String>,
    tokenizer: Tokenizer,
    /// Number of tokens that can contain the end of the longest string.
    window: usize,
}

impl Stop {
    /// Creates a detector for `strings`, none of which is empty; `None` without strings.
    pub fn new(strings: &[String], tokenizer: &Tokenizer) -> Option<Self> {
        let longest = strings.iter().map(String::len).max()?;
        // A token has at least one byte; the additional ones complete a character that begins before the window.
        Some(Self { strings: strings.to_vec(), tokenizer: tokenizer.clone(), window: longest + 4 })
    }

    /// Returns the stop strings.
    pub fn strings(&self) -> &[String] {
        &self.strings
    }

    /// Returns whether `ids` end with a stop string, or with a token that contains the end of one.
    pub fn ends(&self, ids: &[u32]) -> bool {
        let tail = &ids[ids.len().saturating_sub(self.window)..];
        self.tokenizer.decode(tail).is_ok_and(|text| self.strings.iter().any(|stop| text.contains(stop)))
    }

    /// Returns `text` up to the first stop string.
    pub fn cut<'a>(&self, text: &'a str) -> &'a str {
        let at = self.strings.iter().filter_map(|stop| text.find(stop.as_str())).min();
        &text[..at.unwrap_or(text.len())]
    }
}

/// Returns a completion's text for judges, without special tokens and without the stop string and text after it.
///
/// # Errors
/// If an id is unknown to the tokenizer.
pub fn text(tokenizer: &Tokenizer, ids: &[u32], stop: Option<&Stop>) -> Result<String> {
    let text = tokenizer.decode(ids)?;
    Ok(stop.map_or(text.as_str(), |stop| stop.cut(&text)).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_is_found_across_tokens_and_removed() {
        let tokenizer = Tokenizer::bytes();
        assert!(Stop::new(&[], &tokenizer).is_none());
        let stop = Stop::new(&["\n\n".into(), "END".into()], &tokenizer).unwrap();
        let ids = tokenizer.encode("one\n two EN").unwrap();
        assert!(!stop.ends(&ids));
        let ended = tokenizer.encode("one\n two END").unwrap();
        assert!(stop.ends(&ended));
        assert_eq!(text(&tokenizer, &ended, Some(&stop)).unwrap(), "one\n two ");
        assert_eq!(text(&tokenizer, &ended, None).unwrap(), "one\n two END");
        assert_eq!(stop.cut("a\n\nbEND"), "a");
    }
}
