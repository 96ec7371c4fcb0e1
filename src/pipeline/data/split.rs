//! Which rows are held out: a function of what they say, so that the same prompt never stands on both sides.

use crate::util::seed::{self, mix};

/// A part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Part {
    /// Everything.
    #[default]
    All,
    /// What is trained on.
    Train,
    /// What is held out.
    Holdout,
}

/// A share of rows held out, and which side is meant.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Split {
    /// Share of distinct prompts held out, from 0 to 1.
    pub holdout: f64,
    /// Which side.
    pub part: Part,
}

impl Split {
    /// Whether a row with this prompt is on the side that is meant. Order and duplicates of rows do not matter.
    pub fn takes(&self, prompt: &str) -> bool {
        let fraction = (mix(seed::text(prompt)) >> 11) as f64 / (1u64 << 53) as f64;
        match self.part {
            Part::All => true,
            Part::Train => fraction >= self.holdout,
            Part::Holdout => fraction < self.holdout,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_prompt_is_on_one_side_and_the_share_is_kept() {
        let (train, held) = (Split { holdout: 0.2, part: Part::Train }, Split { holdout: 0.2, part: Part::Holdout });
        let texts: Vec<String> = (0..5000).map(|i| format!("prompt number {i}")).collect();
        assert!(texts.iter().all(|text| train.takes(text) != held.takes(text)));
        let share = texts.iter().filter(|text| held.takes(text)).count() as f64 / 5000.0;
        // Five standard deviations of a share of 0.2 among 5,000.
        assert!((share - 0.2).abs() < 5.0 * (0.2f64 * 0.8 / 5000.0).sqrt(), "{share}");
        assert!(Split::default().takes("anything"));
    }
}
