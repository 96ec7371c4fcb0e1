//! Hashes of everything except the question that determines a model's answers. They are part of the label cache's keys.

use sha2::{Digest as _, Sha256};

/// A SHA-256 hash.
pub type Digest = [u8; 32];

/// Hashes that determine the answers of one judge: two judges of equal shape answer the same question alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Hash of all inputs that affect the probabilities of given answers
    /// ([`Backend::weigh`](super::backend::Backend::weigh)).
    pub weighed: Digest,
    /// Hash of all inputs that affect free text ([`Backend::write`](super::backend::Backend::write)), except the
    /// decoding settings that are passed with each call.
    pub written: Digest,
    /// The judge's identity in cache keys of earlier versions of the program, used to find their answers; `None` if no
    /// earlier version could ask in this way.
    pub earlier: Option<u64>,
}

/// SHA-256 over named parts. Each part is hashed with the lengths of its name and its value, so that different lists of
/// parts never hash the same bytes. A part added by a later version must be absent at its default
/// ([`Parts::with_some`]), so that the hashes of configurations that do not use it stay the same and cached answers are
/// still found.
#[derive(Clone)]
pub struct Parts(Sha256);

impl Parts {
    /// Starts a hash for a judge of the given kind.
    pub fn of(kind: &str) -> Self {
        Self(Sha256::new()).with("kind", kind)
    }

    /// Adds the part `name` with the value `value`.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        for text in [name, value] {
            self.0.update((text.len() as u64).to_le_bytes());
            self.0.update(text.as_bytes());
        }
        self
    }

    /// Adds a part if `value` is present. An absent value differs from an empty one.
    #[must_use]
    pub fn with_some(self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// Returns the hash of all parts so far.
    pub fn digest(&self) -> Digest {
        self.0.clone().finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_lists_of_parts_have_different_hashes() {
        let digests = [
            Parts::of("k").digest(),
            Parts::of("k").with("a", "bc").digest(),
            Parts::of("k").with("ab", "c").digest(),
            Parts::of("k").with("a", "b").with("c", "").digest(),
            Parts::of("k").with_some("a", Some("")).digest(),
            Parts::of("other").digest(),
        ];
        for (i, one) in digests.iter().enumerate() {
            assert!(!digests[..i].contains(one), "{i}");
        }
        assert_eq!(Parts::of("k").with_some("a", None).digest(), digests[0]);
    }
}
