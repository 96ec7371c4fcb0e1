//! The win rates of a run by step, which select the best checkpoint and decide whether a run has stopped improving.

use crate::util::mutex::lock;
use std::sync::{Arc, Mutex, MutexGuard};

/// Win rates by step. Clones share the same list.
#[derive(Debug, Clone, Default)]
pub struct WinRates(Arc<Mutex<History>>);

#[derive(Debug, Default)]
struct History {
    /// Steps and win rates from 0 to 1, oldest first.
    known: Vec<(u64, f64)>,
    /// Steps that are being evaluated.
    pending: Vec<u64>,
}

impl WinRates {
    /// Replaces the list by `known`, the steps and win rates of an earlier process, oldest first.
    pub fn restore(&self, known: Vec<(u64, f64)>) {
        self.lock().known = known;
    }

    /// Records that the evaluation of `step` has started.
    pub fn start(&self, step: u64) {
        self.lock().pending.push(step);
    }

    /// Records the result of the evaluation of `step`; `None` if it has no win rate.
    pub fn finish(&self, step: u64, win_rate: Option<f64>) {
        let mut rates = self.lock();
        rates.known.extend(win_rate.map(|win_rate| (step, win_rate)));
        rates.pending.retain(|pending| *pending != step);
    }

    /// Returns all steps with a win rate, oldest first.
    pub fn all(&self) -> Vec<(u64, f64)> {
        self.lock().known.clone()
    }

    /// Returns the latest win rate with its step.
    pub fn latest(&self) -> Option<(u64, f64)> {
        self.lock().known.last().copied()
    }

    /// Selects from `steps` those whose checkpoints are kept: the one with the highest win rate (of equal ones the
    /// first), and those that are being evaluated.
    pub fn retained(&self, steps: &[u64]) -> Vec<u64> {
        let rates = self.lock();
        let known = rates.known.iter().filter(|(step, _)| steps.contains(step));
        let best = known.fold(None, higher).map(|(step, _)| step);
        best.into_iter().chain(rates.pending.iter().copied().filter(|step| steps.contains(step))).collect()
    }

    /// Returns a reason to end the run if no win rate has exceeded the best one for `patience` evaluations. Returns
    /// `None` if there were fewer, or if `patience` is 0.
    pub fn patience_exhausted(&self, patience: u64) -> Option<String> {
        let rates = self.lock();
        let (step, best) = rates.known.iter().fold(None, higher)?;
        let since = rates.known.iter().filter(|(other, _)| *other > step).count() as u64;
        (patience > 0 && since >= patience).then(|| {
            format!(
                "the win rate has not risen above {:.1} %, that of step {step}, for {since} evaluations (evaluation.patience = {patience})",
                100.0 * best
            )
        })
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        lock(&self.0)
    }
}

/// Returns the higher of two win rates; of equal ones the first.
fn higher(best: Option<(u64, f64)>, one: &(u64, f64)) -> Option<(u64, f64)> {
    best.filter(|best| best.1 >= one.1).or(Some(*one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_and_the_one_under_evaluation_are_kept() {
        let rates = WinRates::default();
        rates.restore(vec![(10, 0.4), (20, 0.7), (30, 0.7), (40, 0.5)]);
        assert_eq!(rates.retained(&[10, 20, 30, 40]), [20]);
        assert_eq!(rates.retained(&[10, 30]), [30]);
        rates.start(50);
        assert_eq!(rates.retained(&[10, 50]), [10, 50]);
        rates.finish(50, Some(0.9));
        assert_eq!((rates.retained(&[20, 50]), rates.latest()), (vec![50], Some((50, 0.9))));
        rates.start(60);
        rates.finish(60, None);
        assert_eq!(rates.retained(&[20, 50, 60]), [50]);
    }

    #[test]
    fn a_run_ends_after_patience_evaluations_without_gain() {
        let rates = WinRates::default();
        assert_eq!(rates.patience_exhausted(1), None);
        for (step, rate) in [(10, 0.5), (20, 0.6), (30, 0.6)] {
            rates.finish(step, Some(rate));
        }
        assert_eq!((rates.patience_exhausted(0), rates.patience_exhausted(2)), (None, None));
        assert!(rates.patience_exhausted(1).unwrap().contains("60.0 %, that of step 20, for 1 evaluations"));
        rates.finish(40, Some(0.61));
        assert_eq!(rates.patience_exhausted(1), None);
    }
}
