//! The course of a run's figures, thinned with age so that it never grows beyond a page.

use std::collections::VecDeque;

use serde_json::{Value, json};

/// Figures that are kept, by their names in `metrics.jsonl`; the last two come from elsewhere.
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

/// Tokens trained a second since the step before.
const TRAINED_RATE: &str = "rate/trained_tokens";

/// Steps that are kept at most.
const MOST: usize = 600;

/// Rows of figures by step, oldest first.
#[derive(Default)]
pub struct History {
    rows: VecDeque<Vec<Value>>,
    /// When the last step ended, by the run's clock.
    last: Option<f64>,
}

impl History {
    /// Takes in the record of a step. One that was told before, with all after it, is replaced.
    pub fn push(&mut self, record: &Value) {
        let step = record["step"].as_u64().unwrap_or_default();
        while self.rows.back().is_some_and(|row| row[0].as_u64().unwrap_or_default() >= step) {
            self.rows.pop_back();
        }
        let now = record["time/run_seconds"].as_f64();
        // The run's clock begins anew in each process.
        let since = now.zip(self.last).map(|(now, last)| now - last).filter(|since| *since > 0.0);
        self.last = now.or(self.last);
        let rate = since.zip(record["tokens"].as_f64()).map(|(since, tokens)| tokens / since);
        let figure = |name: &&str| match *name {
            TRAINED_RATE => json!(rate),
            name => record.get(name).cloned().unwrap_or(Value::Null),
        };
        self.rows.push_back(COLUMNS.iter().map(figure).collect());
        if self.rows.len() > MOST {
            self.thin();
        }
    }

    /// The weights of a step were judged against the first ones.
    pub fn evaluated(&mut self, step: u64, win_rate: f64) {
        // A step that was thinned out is told at the one after it.
        if let Some(row) = self.rows.iter_mut().find(|row| row[0].as_u64() >= Some(step))
            && let Some(column) = COLUMNS.iter().position(|column| *column == "win_rate")
        {
            row[column] = json!(win_rate);
        }
    }

    /// Leaves out every second step of the older half.
    fn thin(&mut self) {
        let older = self.rows.len() / 2;
        let mut at = 0;
        self.rows.retain(|_| {
            at += 1;
            at > older || at % 2 == 1
        });
    }

    /// Names of the columns, and the rows.
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
    fn it_stays_small_keeps_both_ends_and_thins_what_is_old() {
        let mut history = History::default();
        for step in 1..=100_000u64 {
            history.push(&json!({ "step": step, "time/run_seconds": 0.5 * step as f64, "tokens": 8 }));
        }
        let steps = steps(&history);
        assert!(steps.len() <= MOST);
        assert_eq!((steps[0], steps[steps.len() - 1]), (1, 100_000));
        let gaps: Vec<u64> = steps.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps[gaps.len() - MOST / 4..].iter().all(|gap| *gap == 1), "{gaps:?}");
        assert_eq!(history.rows.back().unwrap()[COLUMNS.len() - 2], json!(16.0));
    }

    #[test]
    fn a_step_that_is_told_again_takes_its_place() {
        let mut history = History::default();
        for step in [1, 2, 3, 2] {
            history.push(&json!({ "step": step }));
        }
        assert_eq!(steps(&history), [1, 2]);
    }
}
