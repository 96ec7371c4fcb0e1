//! Accuracy of a reward model: the share of pairs that it ranks as labeled.

use anyhow::{Result, ensure};

use crate::observe::progress::Progress;
use crate::pipeline::data::pairs::PairSet;
use crate::pipeline::reward::RewardModel;
use crate::pipeline::reward::trainer::agreement;
use crate::rl::statistics::table::Cell;
use crate::rl::statistics::{Table, interval};

/// Scores both answers of the first `limit` pairs and returns the table of the accuracy. A margin of zero counts as one
/// half; pairs with a label of ½ are skipped.
///
/// # Errors
/// If a pair can no longer be read, or all pairs are ties.
pub fn reward_accuracy(model: &RewardModel, pairs: &PairSet, limit: usize, title: &str) -> Result<Table> {
    let count = pairs.len().min(limit);
    let progress = Progress::new("scoring", "pairs", count as u64);
    let (mut right, mut margins, mut longer) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..count {
        let labeled = pairs.labeled(i as u64)?;
        progress.at(i as u64 + 1);
        let p = labeled
            .feedback
            .iter()
            .flat_map(|feedback| &feedback.preferences)
            .find_map(|preference| preference.probability());
        let Some(p) = p.filter(|p| *p != 0.5) else { continue };
        let ids: Vec<&[u32]> = labeled.group.completions.iter().map(|completion| completion.ids.as_slice()).collect();
        let scores = model.scores(&labeled.group.prompt.ids, &ids)?.to_vec1::<f32>()?;
        let margin = f64::from(scores[0]) - f64::from(scores[1]);
        right.push(agreement(margin, p));
        margins.push(if p > 0.5 { margin } else { -margin });
        longer.push(agreement(ids[0].len() as f64 - ids[1].len() as f64, p));
    }
    progress.finish();
    ensure!(
        !right.is_empty(),
        "each of the {count} pairs is a tie (a probability of ½): none says which answer is better"
    );
    let mut table = Table::new(
        title,
        &[("pairs", ""), ("accuracy", "%"), ("mean margin", ""), ("\"longer wins\" on the same pairs", "%")],
    );
    let mean = margins.iter().sum::<f64>() / margins.len().max(1) as f64;
    table.push(vec![
        Cell::Integer(right.len() as i64),
        Cell::Share(interval::mean(&right)),
        Cell::Number(mean),
        Cell::Share(interval::mean(&longer)),
    ]);
    Ok(table)
}
