//! Held-out rows, chosen by a hash of their prompt, so that the same prompt is never on both sides.

use crate::util::seed::{self, mix};

/// Part of a data set: all rows, the training rows, or the held-out rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Part {
    /// All rows.
    #[default]
    All,
    /// Training rows.
    Train,
    /// Held-out rows.
    Holdout,
}

/// Fraction of rows that is held out, and the selected part.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Split {
    /// Fraction of distinct prompts held out, from 0 to 1.
    pub holdout: f64,
    /// Selected part.
    pub part: Part,
}

impl Split {
    /// Returns whether a row with this prompt belongs to the selected part. Order and duplicates of rows do not matter.
    pub fn contains(&self, prompt: &str) -> bool {
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
    fn each_prompt_is_on_one_side_and_the_held_out_fraction_is_right() {
        let (train, held) = (Split { holdout: 0.2, part: Part::Train }, Split { holdout: 0.2, part: Part::Holdout });
        let texts: Vec<String> = (0..5000).map(|i| format!("prompt number {i}")).collect();
        assert!(texts.iter().all(|text| train.contains(text) != held.contains(text)));
        let share = texts.iter().filter(|text| held.contains(text)).count() as f64 / 5000.0;
        // Five standard deviations of a share of 0.2 among 5,000.
        assert!((share - 0.2).abs() < 5.0 * (0.2f64 * 0.8 / 5000.0).sqrt(), "{share}");
        assert!(Split::default().contains("anything"));
    }
}
