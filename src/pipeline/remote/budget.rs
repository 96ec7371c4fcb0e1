//! Limit on a run's spending on remote judges (`labeler.max_cost`).

use crate::util::mutex::lock;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Spending limit shared by all remote judges of a run, in the currency of the configured prices.
///
/// An exchange starts only if its maximum cost is within the remaining budget, so that the limit is not exceeded. The
/// amount spent is stored in a file, from which later processes of the same run continue.
pub struct Budget {
    limit: f64,
    file: Option<PathBuf>,
    spent: Mutex<Spent>,
    exhausted: AtomicBool,
}

#[derive(Default)]
struct Spent {
    settled: f64,
    reserved: f64,
    /// True if the last write to the file failed, so that the failure is logged once.
    unwritten: bool,
}

/// Reservation of the maximum cost of one exchange. Unless it is settled, all of it counts as spent: the server may
/// charge for an exchange that was abandoned.
pub struct Reserved {
    budget: Arc<Budget>,
    most: f64,
    cost: Option<f64>,
}

impl Budget {
    /// Creates a budget of `limit`, less the amount recorded in `file`.
    ///
    /// # Errors
    /// If the file exists and does not contain a non-negative number.
    pub fn open(limit: f64, file: Option<PathBuf>) -> anyhow::Result<Arc<Self>> {
        let settled = match file.as_ref().map(std::fs::read_to_string) {
            Some(Ok(text)) => text.trim().parse::<f64>().ok().filter(|spent| spent.is_finite() && *spent >= 0.0).ok_or_else(|| {
                anyhow::anyhow!(
                    "{} must contain the amount spent on judges so far, as a number, but contains {:?}; write the amount into it",
                    file.iter().map(|path| path.display().to_string()).collect::<String>(),
                    text.chars().take(40).collect::<String>()
                )
            })?,
            Some(Err(error)) if error.kind() != std::io::ErrorKind::NotFound => {
                anyhow::bail!(
                    "cannot read {}: {error}",
                    file.iter().map(|path| path.display().to_string()).collect::<String>()
                )
            }
            Some(Err(_)) | None => 0.0,
        };
        let spent = Mutex::new(Spent { settled, ..Spent::default() });
        Ok(Arc::new(Self { limit, file, spent, exhausted: AtomicBool::new(false) }))
    }

    /// Reserves `most`, the maximum cost of one exchange.
    ///
    /// # Errors
    /// A message, if that exceeds the remaining budget.
    pub fn reserve(self: &Arc<Self>, most: f64) -> Result<Reserved, String> {
        let mut spent = self.lock();
        if spent.settled + spent.reserved + most > self.limit {
            self.exhausted.store(true, Ordering::SeqCst);
            return Err(format!(
                "labeler.max_cost = {} is used up: {:.6} was spent, and the next question could cost {most:.6} more; raise it to continue",
                self.limit, spent.settled
            ));
        }
        spent.reserved += most;
        Ok(Reserved { budget: Arc::clone(self), most, cost: None })
    }

    /// Returns the amount spent so far, including by earlier processes of the run.
    pub fn spent(&self) -> f64 {
        self.lock().settled
    }

    /// Returns whether an exchange was refused because the budget was insufficient.
    pub fn exhausted(&self) -> bool {
        self.exhausted.load(Ordering::SeqCst)
    }

    fn settle(&self, reserved: f64, cost: f64) {
        let mut spent = self.lock();
        spent.reserved = (spent.reserved - reserved).max(0.0);
        spent.settled += cost;
        let Some(file) = &self.file else { return };
        if cost == 0.0 {
            return;
        }
        // Written to a temporary file and renamed, so that a process that is killed leaves a complete file.
        let aside = file.with_extension("partial");
        let written =
            std::fs::write(&aside, format!("{}\n", spent.settled)).and_then(|()| std::fs::rename(&aside, file));
        match written {
            Ok(()) => spent.unwritten = false,
            Err(error) => {
                crate::observe::telemetry::disk_error();
                if !std::mem::replace(&mut spent.unwritten, true) {
                    tracing::error!("cannot write the amount spent on judges to {}: {error}", file.display());
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Spent> {
        lock(&self.spent)
    }
}

impl Reserved {
    /// Ends the exchange with its `cost`; `None` charges the complete reservation.
    pub fn settle(mut self, cost: Option<f64>) {
        self.cost = cost;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.settle(self.most, self.cost.unwrap_or(self.most));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_under_way_counts_at_its_maximum_cost_until_it_is_settled() {
        let budget = Budget::open(1.0, None).unwrap();
        let (a, b) = (budget.reserve(0.5).unwrap(), budget.reserve(0.25).unwrap());
        assert!(budget.reserve(0.5).err().unwrap().contains("labeler.max_cost = 1"));
        assert!(budget.exhausted());
        a.settle(Some(0.125));
        assert_eq!(budget.spent(), 0.125);
        // An abandoned exchange is charged in full.
        drop(b);
        assert_eq!(budget.spent(), 0.375);
        budget.reserve(0.5).unwrap().settle(Some(0.0));
        assert_eq!(budget.spent(), 0.375);
    }

    #[test]
    fn a_later_process_continues_from_the_amount_spent() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("judge-cost.txt");
        Budget::open(1.0, Some(file.clone())).unwrap().reserve(0.75).unwrap().settle(Some(0.625));
        let later = Budget::open(1.0, Some(file.clone())).unwrap();
        assert_eq!(later.spent(), 0.625);
        assert!(later.reserve(0.5).is_err());
        std::fs::write(&file, "much").unwrap();
        assert!(Budget::open(1.0, Some(file)).err().unwrap().to_string().contains("\"much\""));
    }
}
