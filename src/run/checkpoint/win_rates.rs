//! The win rates of a run by step, as far as they are known: they choose the best checkpoint, and when a run has stopped
//! improving.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Win rates by step, shared by those who note and those who read them. Clones are the same list.
#[derive(Debug, Clone, Default)]
pub struct WinRates(Arc<Mutex<Course>>);

#[derive(Debug, Default)]
struct Course {
    /// Step and win rate from 0 to 1, oldest first.
    known: Vec<(u64, f64)>,
    /// Steps that are being evaluated.
    pending: Vec<u64>,
}

impl WinRates {
    /// Replaces the list by `known`, steps and win rates of an earlier process, oldest first.
    pub fn begin_with(&self, known: Vec<(u64, f64)>) {
        self.course().known = known;
    }

    /// Notes that `step` is being evaluated.
    pub fn begins(&self, step: u64) {
        self.course().pending.push(step);
    }

    /// Notes the win rate of `step`; none where the evaluation gave none.
    pub fn evaluated(&self, step: u64, win_rate: Option<f64>) {
        let mut course = self.course();
        course.known.extend(win_rate.map(|win_rate| (step, win_rate)));
        course.pending.retain(|pending| *pending != step);
    }

    /// The win rates that are known, by step, oldest first.
    pub fn known(&self) -> Vec<(u64, f64)> {
        self.course().known.clone()
    }

    /// The latest win rate with its step.
    pub fn latest(&self) -> Option<(u64, f64)> {
        self.course().known.last().copied()
    }

    /// Of `steps`, those whose checkpoints are kept: the one with the highest win rate (of equal ones the first), and those
    /// that are being evaluated.
    pub fn kept(&self, steps: &[u64]) -> Vec<u64> {
        let course = self.course();
        let known = course.known.iter().filter(|(step, _)| steps.contains(step));
        let best = known.fold(None, higher).map(|(step, _)| step);
        best.into_iter().chain(course.pending.iter().copied().filter(|step| steps.contains(step))).collect()
    }

    /// Why a run should end of which no win rate was higher than the best for `patience` evaluations; none where there are
    /// fewer, or where `patience` is 0.
    pub fn exhausted(&self, patience: u64) -> Option<String> {
        let course = self.course();
        let (step, best) = course.known.iter().fold(None, higher)?;
        let since = course.known.iter().filter(|(other, _)| *other > step).count() as u64;
        (patience > 0 && since >= patience).then(|| {
            format!(
                "the win rate has not risen above {:.1} %, that of step {step}, for {since} evaluations (evaluation.patience = {patience})",
                100.0 * best
            )
        })
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The higher of two win rates; of equal ones the first.
fn higher(best: Option<(u64, f64)>, one: &(u64, f64)) -> Option<(u64, f64)> {
    best.filter(|best| best.1 >= one.1).or(Some(*one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_and_the_one_under_evaluation_are_kept() {
        let course = WinRates::default();
        course.begin_with(vec![(10, 0.4), (20, 0.7), (30, 0.7), (40, 0.5)]);
        assert_eq!(course.kept(&[10, 20, 30, 40]), [20]);
        assert_eq!(course.kept(&[10, 30]), [30]);
        course.begins(50);
        assert_eq!(course.kept(&[10, 50]), [10, 50]);
        course.evaluated(50, Some(0.9));
        assert_eq!((course.kept(&[20, 50]), course.latest()), (vec![50], Some((50, 0.9))));
        course.begins(60);
        course.evaluated(60, None);
        assert_eq!(course.kept(&[20, 50, 60]), [50]);
    }

    #[test]
    fn a_run_ends_after_as_many_evaluations_without_gain_as_the_patience() {
        let course = WinRates::default();
        assert_eq!(course.exhausted(1), None);
        for (step, rate) in [(10, 0.5), (20, 0.6), (30, 0.6)] {
            course.evaluated(step, Some(rate));
        }
        assert_eq!((course.exhausted(0), course.exhausted(2)), (None, None));
        assert!(course.exhausted(1).unwrap().contains("60.0 %, that of step 20, for 1 evaluations"));
        course.evaluated(40, Some(0.61));
        assert_eq!(course.exhausted(1), None);
    }
}
