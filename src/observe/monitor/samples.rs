//! A group of each recent step with its labels and rewards, for the page and `/samples`.

use std::collections::VecDeque;

use serde_json::{Value, json};

use crate::types::Rewarded;

/// Number of groups that are kept.
const CAPACITY: usize = 24;

/// Fields of a line that all completions of a group share.
const COMMON: &[&str] = &["step", "group", "row", "prompt", "labeler", "reward_model", "masked"];

/// The first group of each of the last 24 learner steps, newest last, as the objects that [`lines`] returns for it.
#[derive(Default)]
pub struct Samples(VecDeque<Vec<Value>>);

impl Samples {
    /// Appends a group, given by its [`lines`], and removes the oldest if there are too many.
    pub fn push(&mut self, lines: Vec<Value>) {
        if self.0.len() == CAPACITY {
            self.0.pop_front();
        }
        self.0.push_back(lines);
    }

    /// Returns the groups as a JSON array, newest first. A group is an object with the fields that its completions share
    /// (step, number, prompt, labeler and so on) and the array `completions`.
    pub fn to_json(&self) -> Value {
        self.0.iter().rev().filter_map(|lines| group(lines)).collect()
    }
}

fn group(lines: &[Value]) -> Option<Value> {
    let mut group = lines.first()?.as_object()?.clone();
    group.retain(|key, _| COMMON.contains(&key.as_str()));
    let own = |line: &Value| {
        let mut own = line.as_object()?.clone();
        own.retain(|key, _| !COMMON.contains(&key.as_str()));
        if let Some(text) = own.remove("completion") {
            own.insert("text".into(), text);
        }
        Some(Value::Object(own))
    };
    group.insert("completions".into(), lines.iter().filter_map(own).collect());
    Some(Value::Object(group))
}

/// Returns one JSON object for each completion of a group, the lines of `samples.jsonl`. `step` is the number of the
/// learner step whose batch the group belongs to.
pub fn lines(step: &Value, group: &Rewarded) -> Vec<Value> {
    let line = |(i, completion): (usize, &crate::types::Completion)| {
        json!({
            "step": step,
            "group": group.group.prompt.seq,
            "row": group.group.prompt.row,
            "prompt": group.group.prompt.text,
            "completion": completion.text,
            "finish": completion.finish,
            "tokens": completion.ids.len(),
            "versions": [completion.oldest_version(), completion.versions.iter().max()],
            "labeler": group.feedback.as_ref().map(|feedback| &feedback.labeler),
            "verdict": group.feedback.as_ref().and_then(|feedback| feedback.verdicts.get(i)),
            "preferences": preferences(group, i),
            "score": group.scores.get(i),
            "reward_model": group.reward_model,
            "reward": group.rewards.get(i),
            "masked": group.masked,
        })
    };
    group.group.completions.iter().enumerate().map(line).collect()
}

/// Returns the judge's comparisons of completion `i`: the index of the other completion, and P(`i` is better).
fn preferences(group: &Rewarded, i: usize) -> Vec<Value> {
    let all = group.feedback.iter().flat_map(|feedback| &feedback.preferences);
    let mine = all.filter(|one| one.first == i || one.second == i);
    mine.map(|one| {
        let with = if one.first == i { one.second } else { one.first };
        let p = one.probability().map(|p| if one.first == i { p } else { 1.0 - p });
        json!({ "with": with, "better": p, "flipped": one.flipped(), "refused": p.is_none().then_some(&one.verdict) })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_listed_newest_first_and_the_oldest_is_removed() {
        let mut samples = Samples::default();
        for step in 1..=CAPACITY + 1 {
            let line = |text: &str| json!({ "step": step, "prompt": "p", "completion": text, "reward": 0.5 });
            samples.push(vec![line("a"), line("b")]);
        }
        let listed = samples.to_json();
        assert_eq!(listed.as_array().unwrap().len(), CAPACITY);
        assert_eq!(
            listed[0],
            json!({ "step": CAPACITY + 1, "prompt": "p",
                "completions": [{ "text": "a", "reward": 0.5 }, { "text": "b", "reward": 0.5 }] })
        );
        assert_eq!(listed[CAPACITY - 1]["step"], 2);
    }
}
