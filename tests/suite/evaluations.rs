//! Tests of evaluations during a run: their judge, the checkpoint that they keep, and early stopping.

use serde_json::Value;

use crate::common::{metrics, resume, stderr, train};
use crate::mock_judge::{Act, MockJudge};

#[test]
fn win_rates_are_measured_during_training_and_a_policy_ties_with_itself() {
    let dir = tempfile::tempdir().unwrap();
    let evaluated = |run: &str, overrides: &[&str]| -> Vec<Value> {
        let dir = dir.path().join(run);
        std::fs::create_dir(&dir).unwrap();
        let evaluation = ["data.holdout=0.2", "evaluation.every_steps=2", "evaluation.prompts=6"];
        let output = train(&dir, &[&evaluation[..], overrides].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(stderr(&output).contains("win rate of step"), "{}", stderr(&output));
        let text = std::fs::read_to_string(dir.join("run/evaluations.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let still = evaluated("still", &["learner.lr=1e-12", "learner.value_lr=1e-12"]);
    assert!(!still.is_empty() && still.iter().all(|one| one["win_rate"] == 0.5 && one["verdicts"] == 6), "{still:?}");
    assert!(still.iter().all(|one| one["length"] == one["length_first"]), "{still:?}");
    // At the last step only: there may or may not be time for an earlier one on this machine. With an odd number of prompts
    // no policy wins half of them.
    let moved = evaluated("moved", &["learner.lr=0.01", "evaluation.every_steps=4", "evaluation.prompts=7"]);
    let last = &moved[moved.len() - 1];
    assert!(last["win_rate"].as_f64().is_some_and(|rate| (0.0..=1.0).contains(&rate) && rate != 0.5), "{moved:?}");
    assert!(moved.len() == 1 && last["step"] == 4, "{moved:?}");
}

/// A judge that answers every question with "1" for certain: the first of two, in both orders.
fn first_is_better() -> MockJudge {
    MockJudge::start(|_, _, _| Act::Tokens(vec![("1", 0.9), ("2", 0.1)]))
}

#[test]
fn evaluations_are_judged_by_evaluation_labeler() {
    let dir = tempfile::tempdir().unwrap();
    let judge = first_is_better();
    let labeler = format!(
        "evaluation.labeler={{ type = \"pairwise\", remote = {{ url = \"{}\", model = \"other\", probe = false }} }}",
        judge.url
    );
    let cache = format!("labeler.cache=\"{}\"", dir.path().join("labels").display());
    let mut overrides = vec![
        "data.holdout=0.2",
        "evaluation.every_steps=4",
        "evaluation.prompts=6",
        "learner.lr=0.01",
        &cache,
        &labeler,
    ];
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    // Both orders of each pair are asked unless an answer is cached. A judge that prefers a position prefers no answer.
    let asked = judge.served("ok");
    assert!((1..=12).contains(&asked), "{asked}");
    let run = dir.path().join("run");
    let text = std::fs::read_to_string(run.join("evaluations.jsonl")).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(last["win_rate"] == 0.5 && last["verdicts"] == 6 && last["failed"] == 0, "{last}");
    // The labels of the run come from the run's own labeler.
    assert!(metrics(&run).iter().all(|step| step["groups/masked"] == 0));
    let other = labeler.replace("\"other\"", "\"another\"");
    overrides.pop();
    overrides.extend([other.as_str(), "run.steps=5"]);
    let refused = resume(dir.path(), &overrides);
    let words = stderr(&refused);
    assert!(
        refused.status.code() == Some(2) && words.contains("--accept-change evaluation.labeler.remote.model"),
        "{words}"
    );
}

#[test]
fn a_failed_evaluation_judge_is_reported_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let judge = MockJudge::start(|_, _, _| Act::Status(400, "", "{\"error\": {\"message\": \"no such deployment\"}}"));
    let labeler = format!(
        "evaluation.labeler={{ type = \"direct\", remote = {{ url = \"{}\", model = \"m\", probe = false, outage_s = 0 }} }}",
        judge.url
    );
    let cache = format!("labeler.cache=\"{}\"", dir.path().join("labels").display());
    let output =
        train(dir.path(), &["data.holdout=0.2", "evaluation.every_steps=4", "evaluation.prompts=3", &cache, &labeler]);
    let words = stderr(&output);
    assert!(output.status.success(), "{words}");
    assert!(words.contains("step 4 has no win rate: no verdict") && words.contains("no such deployment"), "{words}");
    assert!(words.contains("failed on 3"), "{words}");
}

#[test]
fn the_checkpoint_with_the_highest_win_rate_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = [
        "data.holdout=0.2",
        "evaluation.every_steps=1",
        "evaluation.prompts=4",
        "learner.lr=0.01",
        "run.steps=8",
        "checkpoint.best=win_rate",
        "checkpoint.keep=1",
    ];
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let run = dir.path().join("run");
    let text = std::fs::read_to_string(run.join("evaluations.jsonl")).unwrap();
    let rates: Vec<(u64, f64)> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| (line["step"].as_u64().unwrap(), line["win_rate"].as_f64().unwrap()))
        .collect();
    let steps: Vec<u64> = std::fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .filter_map(|entry| preceptor::run::checkpoint::store::step(&entry.unwrap().path()))
        .collect();
    let best = |rates: &mut dyn Iterator<Item = &(u64, f64)>| rates.map(|(_, rate)| *rate).fold(0.0, f64::max);
    let kept = best(&mut rates.iter().filter(|(step, _)| steps.contains(step)));
    // Evaluations may be under way while the last checkpoint is written, so that more than one checkpoint may be kept.
    // An evaluation whose checkpoint was skipped, because the previous one was still being written, keeps none.
    // The last one may be the best.
    assert!(steps.contains(&8) && (1..=3).contains(&steps.len()), "{steps:?} of {rates:?}");
    assert!(kept > 0.0, "{steps:?} of {rates:?}");
}

#[test]
fn a_run_whose_win_rate_does_not_rise_ends_early_and_can_be_continued() {
    let dir = tempfile::tempdir().unwrap();
    let still = [
        "data.holdout=0.2",
        "evaluation.every_steps=1",
        "evaluation.prompts=2",
        "learner.lr=1e-12",
        "learner.value_lr=1e-12",
        "run.steps=100000",
        "evaluation.patience=2",
        "checkpoint.journal=false",
    ];
    let output = train(dir.path(), &still);
    let words = stderr(&output);
    assert!(output.status.success(), "{words}");
    assert!(words.contains("ended early at step") && words.contains("for 2 evaluations"), "{words}");
    let run = dir.path().join("run");
    let taken = metrics(&run).len();
    let again = resume(dir.path(), &still);
    assert!(again.status.success() && stderr(&again).contains("ended early"), "{}", stderr(&again));
    assert_eq!(metrics(&run).len(), taken);
    let mut patient = still.to_vec();
    patient.retain(|one| !one.starts_with("evaluation.patience") && !one.starts_with("run.steps"));
    let steps = format!("run.steps={}", taken + 1);
    patient.push(&steps);
    let more = resume(dir.path(), &patient);
    assert!(more.status.success(), "{}", stderr(&more));
    assert_eq!(metrics(&run).len(), taken + 1);
}

#[test]
fn win_rate_keys_without_evaluations_and_unknown_metrics_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (override_, words) in [
        ("checkpoint.best=win_rate", "checkpoint.best: \"win_rate\" needs the win rates of evaluations"),
        ("evaluation.patience=3", "evaluation.patience: needs the win rates of evaluations"),
        ("checkpoint.best=scor/mean", "is not a figure of metrics.jsonl; did you mean \"score/mean\"?"),
    ] {
        let output = train(dir.path(), &[override_]);
        assert!(output.status.code() == Some(2) && stderr(&output).contains(words), "{}", stderr(&output));
    }
}
