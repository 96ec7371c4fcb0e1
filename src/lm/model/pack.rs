//! A row of tokens that holds a shared prefix once, followed by several continuations.

use std::ops::Range;

use kernels::TreeMask;

/// A prefix and its continuations, concatenated: `[prefix | c₁ | c₂ | …]`.
///
/// A continuation attends to the prefix and itself; its positions continue those of the prefix. So a group's prompt is
/// computed once, forward and backward, and no padding is needed. The last token of a continuation is predicted but not
/// fed, because nothing needs the prediction after it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pack {
    /// Tokens fed to the model, length `T`.
    pub ids: Vec<u32>,
    /// Position of each fed token in its own sequence.
    pub positions: Vec<u32>,
    /// Row of the output that predicts each target, length `N`.
    pub rows: Vec<u32>,
    /// Predicted tokens: all tokens of all continuations, in order, length `N`.
    pub targets: Vec<u32>,
    /// Range of each continuation in `targets`.
    pub spans: Vec<Range<usize>>,
    prefix: usize,
    fed: Vec<Range<usize>>,
}

impl Pack {
    /// Packs `continuations` after `prefix`.
    ///
    /// # Panics
    /// If the prefix is empty, because nothing would predict the first tokens.
    pub fn new<S: AsRef<[u32]>>(prefix: &[u32], continuations: &[S]) -> Self {
        assert!(!prefix.is_empty(), "a pack needs at least one token of prefix to predict from");
        let p = prefix.len();
        let mut pack = Self {
            ids: prefix.to_vec(),
            positions: (0..p as u32).collect(),
            rows: Vec::new(),
            targets: Vec::new(),
            spans: Vec::new(),
            prefix: p,
            fed: Vec::new(),
        };
        for continuation in continuations {
            let tokens = continuation.as_ref();
            let (start, first) = (pack.ids.len(), pack.targets.len());
            let fed = tokens.len().saturating_sub(1);
            pack.ids.extend_from_slice(&tokens[..fed]);
            pack.positions.extend((0..fed).map(|i| (p + i) as u32));
            pack.rows.extend((0..tokens.len()).map(|i| if i == 0 { p - 1 } else { start + i - 1 } as u32));
            pack.targets.extend_from_slice(tokens);
            pack.spans.push(first..pack.targets.len());
            pack.fed.push(start..start + fed);
        }
        pack
    }

    /// Packs complete sequences for a scalar head: the last token of each continuation is fed too, and `rows` are those
    /// of the last tokens, one per continuation. There are no targets.
    ///
    /// # Panics
    /// The same as for [`Self::new`].
    pub fn complete<S: AsRef<[u32]>>(prefix: &[u32], continuations: &[S]) -> Self {
        let longer: Vec<Vec<u32>> =
            continuations.iter().map(|continuation| [continuation.as_ref(), &[0]].concat()).collect();
        let mut pack = Self::new(prefix, &longer);
        // The row that predicts the token appended above is that of the sequence's last token.
        pack.rows = pack.spans.iter().map(|span| pack.rows[span.end - 1]).collect();
        pack.targets.clear();
        pack.spans.clear();
        pack
    }

    /// Packs a prompt without continuations, for a prefill.
    pub fn prefill(prompt: &[u32]) -> Self {
        Self::new::<&[u32]>(prompt, &[])
    }

    /// Returns the number of fed tokens, `T`.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Returns whether the pack has no tokens, which is never the case.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Returns the attention mask: each continuation follows the prefix's last token.
    pub fn mask(&self) -> TreeMask {
        let chain = |rows: Range<usize>, before: Option<usize>| {
            rows.clone().map(move |row| if row == rows.start { before } else { Some(row - 1) })
        };
        let continuations = self.fed.iter().flat_map(|fed| chain(fed.clone(), Some(self.prefix - 1)));
        TreeMask::new(0, chain(0..self.prefix, None).chain(continuations))
    }

    /// Splits per-target values into one list per continuation.
    ///
    /// # Panics
    /// If the number of values is not the number of targets.
    pub fn split(&self, values: &[f32]) -> Vec<Vec<f32>> {
        assert_eq!(values.len(), self.targets.len(), "one value per target");
        self.spans.iter().map(|span| values[span.clone()].to_vec()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_sequences_include_their_last_token() {
        let pack = Pack::complete(&[7, 8], &[vec![1, 2, 3], vec![], vec![5]]);
        assert_eq!(pack.ids, [7, 8, 1, 2, 3, 5]);
        assert_eq!(pack.rows, [4, 1, 5]);
    }

    #[test]
    fn prefix_and_continuations_are_concatenated() {
        let pack = Pack::new(&[7, 8], &[vec![1, 2, 3], vec![4], vec![5, 6]]);
        assert_eq!(pack.ids, [7, 8, 1, 2, 5]);
        assert_eq!(pack.positions, [0, 1, 2, 3, 2]);
        assert_eq!(pack.targets, [1, 2, 3, 4, 5, 6]);
        assert_eq!(pack.rows, [1, 2, 3, 1, 1, 4]);
        assert_eq!(pack.spans, [0..3, 3..4, 4..6]);
        let mask = pack.mask().dense(None, &candle_core::Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        let seen: Vec<Vec<usize>> = mask
            .iter()
            .map(|row| row.iter().enumerate().filter(|(_, m)| **m == 0.0).map(|(i, _)| i).collect())
            .collect();
        assert_eq!(seen, [vec![0], vec![0, 1], vec![0, 1, 2], vec![0, 1, 2, 3], vec![0, 1, 4]]);
    }
}
