//! Hashes of everything besides the question that shapes a model's answers. The label cache keeps answers by them.

use sha2::{Digest as _, Sha256};

/// A SHA-256 hash.
pub type Digest = [u8; 32];

/// What shapes the answers of one judge: two judges of equal shape answer the same question alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Hash of what shapes the probabilities of given answers ([`Backend::weigh`](super::backend::Backend::weigh)).
    pub weighed: Digest,
    /// Hash of what shapes free text ([`Backend::write`](super::backend::Backend::write)), besides the decoding that is
    /// passed with each call.
    pub written: Digest,
    /// The judge's identity in the keys of earlier programs, whose answers are found by it; `None` where no earlier program
    /// could ask in this way.
    pub earlier: Option<u64>,
}

/// A hash of named parts. Each part is hashed with the lengths of its name and its value, so that parts cannot be mistaken
/// for others. A part that is added by a later program must be absent at its default ([`Parts::with_some`]): the hashes of
/// all configurations that do not use it stay the same, and answers that were kept by them are found.
#[derive(Clone)]
pub struct Parts(Sha256);

impl Parts {
    /// The parts of a judge of this kind.
    pub fn of(kind: &str) -> Self {
        Self(Sha256::new()).with("kind", kind)
    }

    /// These parts and one more.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        for text in [name, value] {
            self.0.update((text.len() as u64).to_le_bytes());
            self.0.update(text.as_bytes());
        }
        self
    }

    /// These parts, and one more where there is a value. An absent value differs from an empty one.
    #[must_use]
    pub fn with_some(self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// The hash of all parts so far.
    pub fn digest(&self) -> Digest {
        self.0.clone().finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cannot_be_mistaken_for_others() {
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
