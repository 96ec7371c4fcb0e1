//! Attention masks of a flat batch of tokens that holds many sequences.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Result, Tensor};

/// Attention mask of a tree of tokens: each token attends to its ancestors, to itself, and to all tokens that are
/// cached before the batch.
///
/// The mask is stored as runs, stretches of rows of which each continues the previous one, so that no `[T, T]` matrix
/// is needed. A token's position is the number of tokens that it attends to besides itself. A window hides tokens that
/// are too many positions back.
#[derive(Debug)]
pub struct TreeMask {
    cached: usize,
    runs: Vec<Run>,
    /// Dense masks computed so far, by window.
    dense: Mutex<Vec<(usize, Tensor)>>,
}

/// A stretch of consecutive rows in which each row's parent is the previous row.
#[derive(Debug, Clone)]
pub(super) struct Run {
    /// Rows of the run.
    pub(super) rows: Range<usize>,
    /// Columns visible to all rows of the run, in order of position, as ranges.
    visible: Vec<Range<usize>>,
    /// Number of these columns, which is the position of the first row.
    pub(super) first: usize,
}

impl Run {
    /// Iterates over the visible columns by position, including those of the run's own rows.
    pub(super) fn columns(&self, cached: usize) -> impl Iterator<Item = usize> {
        self.visible.iter().cloned().flatten().chain(self.rows.start + cached..self.rows.end + cached)
    }
}

impl TreeMask {
    /// Creates the mask of rows with the given parents, each before its children; `None` for a row that follows the
    /// cached tokens.
    ///
    /// # Panics
    /// If a parent does not precede its child.
    pub fn new(cached: usize, parents: impl IntoIterator<Item = Option<usize>>) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for (row, parent) in parents.into_iter().enumerate() {
            assert!(parent.is_none_or(|parent| parent < row), "the parent of row {row} does not precede it");
            match runs.last_mut() {
                Some(run) if parent == Some(row - 1) => run.rows.end += 1,
                _ => {
                    let mut visible = Vec::new();
                    match parent
                        .and_then(|parent| runs.iter().find(|run| run.rows.contains(&parent)).zip(parent.into()))
                    {
                        None if cached > 0 => visible.push(0..cached),
                        None => {}
                        Some((run, parent)) => {
                            visible.clone_from(&run.visible);
                            visible.push(run.rows.start + cached..parent + 1 + cached);
                        }
                    }
                    let first = visible.iter().map(ExactSizeIterator::len).sum();
                    runs.push(Run { rows: row..row + 1, visible, first });
                }
            }
        }
        Self { cached, runs, dense: Mutex::default() }
    }

    /// Returns the number of cached tokens, which are the columns before those of the rows.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Returns the number of rows, `T`.
    pub fn rows(&self) -> usize {
        self.runs.last().map_or(0, |run| run.rows.end)
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Returns the additive mask `[T, cached + T]`: 0 for visible columns, −∞ elsewhere. It is computed once per window
    /// and device.
    ///
    /// # Errors
    /// If the device cannot hold it.
    pub fn dense(&self, window: Option<usize>, device: &Device) -> Result<Tensor> {
        let window = window.unwrap_or(usize::MAX);
        let mut masks = self.dense.lock().unwrap_or_else(PoisonError::into_inner);
        let known = masks.iter().find(|(wide, mask)| *wide == window && mask.device().same_device(device));
        if let Some((_, mask)) = known {
            return Ok(mask.clone());
        }
        let width = self.cached + self.rows();
        let mut mask = vec![f32::NEG_INFINITY; self.rows() * width];
        for run in &self.runs {
            let columns: Vec<usize> = run.columns(self.cached).collect();
            for (i, row) in run.rows.clone().enumerate() {
                let end = run.first + i + 1;
                for column in &columns[end.saturating_sub(window)..end] {
                    mask[row * width + column] = 0.0;
                }
            }
        }
        let mask = Tensor::from_vec(mask, (self.rows(), width), device)?;
        masks.push((window, mask.clone()));
        Ok(mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible(mask: &TreeMask, window: Option<usize>) -> Vec<Vec<usize>> {
        let dense = mask.dense(window, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        dense.iter().map(|row| (0..row.len()).filter(|column| row[*column] == 0.0).collect()).collect()
    }

    #[test]
    fn a_token_attends_to_its_ancestors_and_itself() {
        // Tokens 0 1 2, then 3 4 after 1, 5 after 4, 6 after 0, and 7 from the start.
        let parents = [None, Some(0), Some(1), Some(1), Some(3), Some(4), Some(0), None];
        let mask = TreeMask::new(0, parents);
        let all = [
            vec![0],
            vec![0, 1],
            vec![0, 1, 2],
            vec![0, 1, 3],
            vec![0, 1, 3, 4],
            vec![0, 1, 3, 4, 5],
            vec![0, 6],
            vec![7],
        ];
        assert_eq!(visible(&mask, None), all);
        let last_two: Vec<Vec<usize>> = all.iter().map(|row| row[row.len().saturating_sub(2)..].to_vec()).collect();
        assert_eq!(visible(&mask, Some(2)), last_two);
        assert_eq!(mask.runs().iter().map(|run| run.first).collect::<Vec<_>>(), [0, 2, 1, 0]);
    }

    #[test]
    fn cached_tokens_come_first() {
        let mask = TreeMask::new(2, [None, Some(0), None, Some(0)]);
        assert_eq!(visible(&mask, None), [vec![0, 1, 2], vec![0, 1, 2, 3], vec![0, 1, 4], vec![0, 1, 2, 5]]);
        assert_eq!(visible(&mask, Some(1)), [vec![2], vec![3], vec![4], vec![5]]);
    }
}
