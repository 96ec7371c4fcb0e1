//! Win rate of one policy over another, or over references, judged in both orders.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::judge;
use crate::config::Config;
use crate::lm::tokens::Tokenizer;
use crate::pipeline::label::Pairing;
use crate::pipeline::label::guard::without_control;
use crate::pipeline::label::stage::Wants;
use crate::pipeline::setup::JudgeSet;
use crate::rl::statistics::length_control::{Comparison, length_controlled};
use crate::rl::statistics::table::Cell;
use crate::rl::statistics::{Table, interval};
use crate::tools::batch_label::Questions;
use crate::types::{Completion, Finish, Group, Preference, Prompt, Verdict};

/// Two answers to each prompt of a list; the three lists have the same length.
pub struct AnswerPairs {
    /// The prompts, tokenised by `tokenizer`.
    pub prompts: Vec<Prompt>,
    /// Answers of the model whose wins are counted.
    pub a: Vec<String>,
    /// Answers of the other model, or references.
    pub b: Vec<String>,
    /// Tokenizer for answer lengths, and for judges that read tokens.
    pub tokenizer: Tokenizer,
    /// True if the prompts were rendered by the chat template, so that answers end with its end-of-turn token.
    pub chat: bool,
}

/// Result of judging [`AnswerPairs`].
pub struct WinRate {
    /// Outcome per prompt with a verdict: 1 for a win of A, 0 for a loss, ½ for a tie.
    pub outcomes: Vec<f64>,
    /// The result as a table.
    pub table: Table,
}

impl Questions for AnswerPairs {
    fn group(&self, i: usize) -> Result<Group> {
        let completion = |text: &str| -> Result<Completion> {
            let text = without_control(text, &self.tokenizer.control_tokens()).into_owned();
            let mut ids = self.tokenizer.encode_answer(&text)?;
            ids.extend(self.tokenizer.end(self.chat));
            let (logprobs, versions) = (vec![0.0; ids.len()], vec![0; ids.len()]);
            Ok(Completion { ids, logprobs, versions, finish: Finish::Eos, text })
        };
        Ok(Group {
            prompt: self.prompts[i].clone(),
            completions: vec![completion(&self.a[i])?, completion(&self.b[i])?],
        })
    }
}

/// Judges every pair in both orders and returns the win rate. If the judge prefers the same position both times, it has
/// no preference between the answers, and the pair is a tie. Equal answers and a probability of exactly ½ are ties too.
///
/// # Errors
/// If the labeler fails more often than its restart budget allows, or gives no verdict on any pair.
pub fn win_rate(config: &Config, judges: &JudgeSet, answers: AnswerPairs, title: &str) -> Result<WinRate> {
    let answers = Arc::new(answers);
    let count = answers.prompts.len();
    let temperature = config.labeler.methods.first().map_or(1.0, |method| method.pair_temperature);
    let wants = Wants::Preferences { pairing: Pairing::Adjacent, temperature };
    let labels = judge(config, &judges.backends, answers.clone(), count, wants, "judging")?;
    let (mut outcomes, mut compared) = (Vec::new(), Vec::new());
    let (mut abstained, mut failed) = (0, 0);
    for (i, labels) in labels.iter().enumerate() {
        let Some(preference) = labels.preferences.first() else { continue };
        match &preference.verdict {
            Verdict::Label(p) => {
                let win = outcome(preference, *p, answers.a[i] == answers.b[i]);
                outcomes.push(win);
                let length = |text: &str| -> Result<f64> { Ok(answers.tokenizer.encode(text)?.len().max(1) as f64) };
                compared.push(Comparison { win, length: length(&answers.a[i])?, other: length(&answers.b[i])? });
            }
            Verdict::Abstention(_) => abstained += 1,
            Verdict::Failure(_) => failed += 1,
        }
    }
    let share = |value: f64| outcomes.iter().filter(|win| **win == value).count();
    let mean_length =
        |length: fn(&Comparison) -> f64| compared.iter().map(length).sum::<f64>() / compared.len().max(1) as f64;
    outcomes.first().context("the judge gave no verdict on any pair")?;
    let controlled = match length_controlled(&compared) {
        Ok(found) => Cell::Share(found.rate),
        Err(error) => Cell::Text(format!("{error:#}")),
    };
    let mut table = Table::new(
        title,
        &[
            ("prompts", ""),
            ("win rate", "%"),
            ("length-controlled", "%"),
            ("wins", ""),
            ("ties", ""),
            ("losses", ""),
            ("abstained", ""),
            ("failed", ""),
            ("tokens of A", ""),
            ("tokens of B", ""),
        ],
    );
    table.push(vec![
        Cell::Integer(count as i64),
        Cell::Share(interval::mean(&outcomes)),
        controlled,
        Cell::Integer(share(1.0) as i64),
        Cell::Integer(share(0.5) as i64),
        Cell::Integer(share(0.0) as i64),
        Cell::Integer(abstained),
        Cell::Integer(failed),
        Cell::Number(mean_length(|comparison| comparison.length)),
        Cell::Number(mean_length(|comparison| comparison.other)),
    ]);
    Ok(WinRate { outcomes, table })
}

/// Returns 1 for a win of the first answer, 0 for a loss, and ½ for a tie: equal texts, a judge that prefers the same
/// position in both orders, or a probability of exactly ½.
pub fn outcome(preference: &Preference, p: f64, same: bool) -> f64 {
    if same || preference.flipped() == Some(true) || p == 0.5 { 0.5 } else { f64::from(u8::from(p > 0.5)) }
}
