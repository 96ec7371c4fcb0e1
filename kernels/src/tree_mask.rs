//! Who may look at whom in a flat row of tokens that holds many sequences.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Result, Tensor};

/// The mask of a tree of tokens: each sees its ancestors and itself, and all see what is cached before the row.
///
/// Held as runs, stretches of rows in which each continues the one before, so that no `[T, T]` is made for it. A token's
/// position is the number of tokens that it sees besides itself; a window hides those too many positions back.
#[derive(Debug)]
pub struct TreeMask {
    cached: usize,
    runs: Vec<Run>,
    /// Dense forms that were asked for, by window.
    dense: Mutex<Vec<(usize, Tensor)>>,
}

/// A stretch of rows.
#[derive(Debug, Clone)]
pub(super) struct Run {
    /// Its rows.
    pub(super) rows: Range<usize>,
    /// Columns that all of its rows see, in order of position, as ranges.
    seen: Vec<Range<usize>>,
    /// How many these are: the position of its first row.
    pub(super) first: usize,
}

impl Run {
    /// Columns by position, the rows' own among them.
    pub(super) fn columns(&self, cached: usize) -> impl Iterator<Item = usize> {
        self.seen.iter().cloned().flatten().chain(self.rows.start + cached..self.rows.end + cached)
    }
}

impl TreeMask {
    /// The mask of rows whose parents are these, each before its child; `None` for one that follows what is cached.
    ///
    /// # Panics
    /// When a parent does not stand before its child.
    pub fn new(cached: usize, parents: impl IntoIterator<Item = Option<usize>>) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for (row, parent) in parents.into_iter().enumerate() {
            assert!(parent.is_none_or(|parent| parent < row), "row {row} has a parent that does not stand before it");
            match runs.last_mut() {
                Some(run) if parent == Some(row - 1) => run.rows.end += 1,
                _ => {
                    let mut seen = Vec::new();
                    match parent
                        .and_then(|parent| runs.iter().find(|run| run.rows.contains(&parent)).zip(parent.into()))
                    {
                        None if cached > 0 => seen.push(0..cached),
                        None => {}
                        Some((run, parent)) => {
                            seen.clone_from(&run.seen);
                            seen.push(run.rows.start + cached..parent + 1 + cached);
                        }
                    }
                    let first = seen.iter().map(ExactSizeIterator::len).sum();
                    runs.push(Run { rows: row..row + 1, seen, first });
                }
            }
        }
        Self { cached, runs, dense: Mutex::default() }
    }

    /// Columns before the first row's own.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Number of rows, `T`.
    pub fn rows(&self) -> usize {
        self.runs.last().map_or(0, |run| run.rows.end)
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Additive form `[T, cached + T]`: 0 where a row may look, −∞ elsewhere. Made once for each window.
    ///
    /// # Errors
    /// When it cannot be put on the device.
    pub fn dense(&self, window: Option<usize>, device: &Device) -> Result<Tensor> {
        let window = window.unwrap_or(usize::MAX);
        let mut made = self.dense.lock().unwrap_or_else(PoisonError::into_inner);
        let known = made.iter().find(|(wide, mask)| *wide == window && mask.device().same_device(device));
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
        made.push((window, mask.clone()));
        Ok(mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(mask: &TreeMask, window: Option<usize>) -> Vec<Vec<usize>> {
        let dense = mask.dense(window, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        dense.iter().map(|row| (0..row.len()).filter(|column| row[*column] == 0.0).collect()).collect()
    }

    #[test]
    fn a_token_sees_its_ancestors_and_itself() {
        // 0 1 2, then 3 4 after 1, 5 after 4, 6 after 0, and 7 from the start.
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
        assert_eq!(seen(&mask, None), all);
        let last_two: Vec<Vec<usize>> = all.iter().map(|row| row[row.len().saturating_sub(2)..].to_vec()).collect();
        assert_eq!(seen(&mask, Some(2)), last_two);
        assert_eq!(mask.runs().iter().map(|run| run.first).collect::<Vec<_>>(), [0, 2, 1, 0]);
    }

    #[test]
    fn what_is_cached_comes_first() {
        let mask = TreeMask::new(2, [None, Some(0), None, Some(0)]);
        assert_eq!(seen(&mask, None), [vec![0, 1, 2], vec![0, 1, 2, 3], vec![0, 1, 4], vec![0, 1, 2, 5]]);
        assert_eq!(seen(&mask, Some(1)), [vec![2], vec![3], vec![4], vec![5]]);
    }
}
