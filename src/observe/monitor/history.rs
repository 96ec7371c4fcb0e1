//! The history of a run's metrics, thinned with age so that its size is bounded.

use std::collections::VecDeque;

use serde_json::{Value, json};

/// Metrics that are kept, by their names in `metrics.jsonl`. The last two are computed here and by evaluations.
const COLUMNS: &[&str] = &[
    "step",
    "time/run_seconds",
    "score/mean",
    "reward/mean",
    "kl/mean",
    "entropy/mean",
    "length/mean",
    "gradient/norm",
    "loss/policy",
    "learning_rate",
    "staleness/mean",
    "staleness/max",
    "ratio/effective",
    "ratio/clipped",
    "repetition/mean",
    "preference/margin",
    "preference/accuracy",
    "judge/mean",
    "time/step_seconds",
    TRAINED_RATE,
    "win_rate",
];

/// Column of the trained tokens per second since the previous step.
const TRAINED_RATE: &str = "rate/trained_tokens";

/// Maximum number of steps that are kept.
const MAX_STEPS: usize = 600;

/// Metrics of at most 600 steps for the page's curves, one row per step, oldest first.
#[derive(Default)]
pub struct History {
    rows: VecDeque<Vec<Value>>,
    /// Time at which the last step ended, in seconds of the run's clock.
    last: Option<f64>,
}

impl History {
    /// Appends the record of a step. It replaces an earlier record of the same step and all later ones.
    pub fn push(&mut self, record: &Value) {
        let step = record["step"].as_u64().unwrap_or_default();
        while self.rows.back().is_some_and(|row| row[0].as_u64().unwrap_or_default() >= step) {
            self.rows.pop_back();
        }
        let now = record["time/run_seconds"].as_f64();
        // The run's clock restarts in each process.
        let since = now.zip(self.last).map(|(now, last)| now - last).filter(|since| *since > 0.0);
        self.last = now.or(self.last);
        let rate = since.zip(record["tokens"].as_f64()).map(|(since, tokens)| tokens / since);
        let figure = |name: &&str| match *name {
            TRAINED_RATE => json!(rate),
            name => record.get(name).cloned().unwrap_or(Value::Null),
        };
        self.rows.push_back(COLUMNS.iter().map(figure).collect());
        if self.rows.len() > MAX_STEPS {
            self.thin();
        }
    }

    /// Sets the win rate of a step's weights over the initial ones.
    pub fn evaluated(&mut self, step: u64, win_rate: f64) {
        // If the step was thinned out, the next kept step gets its win rate.
        if let Some(row) = self.rows.iter_mut().find(|row| row[0].as_u64() >= Some(step))
            && let Some(column) = COLUMNS.iter().position(|column| *column == "win_rate")
        {
            row[column] = json!(win_rate);
        }
    }

    /// Removes every second step of the older half.
    fn thin(&mut self) {
        let older = self.rows.len() / 2;
        let mut at = 0;
        self.rows.retain(|_| {
            at += 1;
            at > older || at % 2 == 1
        });
    }

    /// Returns an object with the column names (`columns`) and the rows (`rows`).
    pub fn to_json(&self) -> Value {
        json!({ "columns": COLUMNS, "rows": self.rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(history: &History) -> Vec<u64> {
        history.rows.iter().map(|row| row[0].as_u64().unwrap()).collect()
    }

    #[test]
    fn the_history_is_bounded_keeps_both_ends_and_thins_old_steps() {
        let mut history = History::default();
        for step in 1..=100_000u64 {
            history.push(&json!({ "step": step, "time/run_seconds": 0.5 * step as f64, "tokens": 8 }));
        }
        let steps = steps(&history);
        assert!(steps.len() <= MAX_STEPS);
        assert_eq!((steps[0], steps[steps.len() - 1]), (1, 100_000));
        let gaps: Vec<u64> = steps.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps[gaps.len() - MAX_STEPS / 4..].iter().all(|gap| *gap == 1), "{gaps:?}");
        assert_eq!(history.rows.back().unwrap()[COLUMNS.len() - 2], json!(16.0));
    }

    #[test]
    fn a_repeated_step_replaces_itself_and_later_steps() {
        let mut history = History::default();
        for step in [1, 2, 3, 2] {
            history.push(&json!({ "step": step }));
        }
        assert_eq!(steps(&history), [1, 2]);
    }
}
