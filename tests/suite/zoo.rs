//! Behaviours of real servers with the OpenAI API, each with its correct outcome. The page docs/judges.md is generated
//! from the table.

mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use preceptor::config::RemoteJudge;
use preceptor::pipeline::label::backend::{Ask, Backend, Usage};
use preceptor::pipeline::remote::Remote;

use crate::common::is_generated;
use crate::mock_judge::MockJudge;
use table::{Abstains, Documented, Listed, QUESTION, Recorded, Run, Unusable, Votes, Weights, rows};

#[test]
fn each_behaviour_of_a_server_has_its_correct_outcome() {
    let rows = rows();
    assert!(rows.len() >= 60, "{}", rows.len());
    let mut wrong = Vec::new();
    for row in rows {
        let requests = Arc::new(AtomicU64::new(0));
        let (seen, plan) = (Arc::clone(&requests), row.plan);
        let mock = MockJudge::start(move |number, path, body| {
            seen.fetch_add(1, Ordering::SeqCst);
            plan(number, path, body)
        });
        let judge = (row.set)(RemoteJudge {
            url: mock.url.clone(),
            model: "m".into(),
            backoff_s: 0.001,
            max_backoff_s: 0.001,
            breaker_cooldown_s: 0.01,
            ..RemoteJudge::default()
        });
        let remote = Remote::new(judge).unwrap();
        let outcome = match remote.probe() {
            Err(unusable) => Err(format!("unusable: {unusable}")),
            Ok(_) => {
                let ask = Ask { prompt: QUESTION.into(), answers: ["1", "2", "10"].map(str::to_owned).to_vec() };
                remote.weigh(&[ask], &mut Usage::default()).remove(0).map_err(|refusal| refusal.to_string())
            }
        };
        let close =
            |weights: &[f64], expected: [f64; 3]| weights.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3);
        let right = match (&outcome, row.expected) {
            (Ok(weights), Listed) => close(weights, [0.6, 0.3, 0.0]),
            (Ok(weights), Votes) => close(weights, [0.0, 1.0, 0.0]),
            (Ok(weights), Weights(expected)) => close(weights, expected),
            (Err(error), Abstains(words)) => error.starts_with("abstained") && error.contains(words),
            (Err(error), Unusable(words)) => error.starts_with("unusable") && error.contains(words),
            _ => false,
        };
        let asked = requests.load(Ordering::SeqCst);
        if !right || asked > 30 {
            wrong.push(format!("{}: {}: {outcome:?} after {asked} requests", row.server, row.behaviour));
        }
    }
    assert!(wrong.is_empty(), "{} behaviours have another outcome:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn docs_judges_md_matches_the_table() {
    let mut page = String::from(
        "# Judges behind servers\n\n\
         Behaviours of servers with the OpenAI API that the labeler is tested against, each by a mock of it. *run*: the \
         behaviour was tried with the real server; *recorded*: the answers were recorded from it; *documented*: it is in the \
         server's documentation or in public bug reports. Only what was run is known to work with the real server.\n\n\
         At the start the judge is asked two questions (`labeler.remote.probe`). They show how it has to be asked: how many \
         log-probabilities it lists or whether answers are sampled and counted as votes, which fields it refuses, and whether \
         it reasons before it answers. Later only an explicit refusal of a field changes how it is asked.\n\n\
         This page is generated from `tests/suite/zoo/table.rs`; `PRECEPTOR_WRITE=1 cargo test --release --test suite \
         docs_judges_md` writes it again.\n\n\
         | server | behaviour | settings of `labeler.remote` | outcome | source |\n|---|---|---|---|---|\n",
    );
    for row in rows() {
        let outcome = match row.expected {
            Listed | Weights(_) => "labels from log-probabilities".to_owned(),
            Votes => "labels from votes".to_owned(),
            Abstains(words) => format!("no label for the question: “{words}”"),
            Unusable(words) => format!("refused at the start: “{words}”"),
        };
        let source = match row.source {
            Run => "run",
            Recorded => "recorded",
            Documented => "documented",
        };
        let settings = if row.settings.is_empty() { String::new() } else { format!("`{}`", row.settings) };
        page += &format!("| {} | {} | {settings} | {outcome} | {source} |\n", row.server, row.behaviour);
    }
    is_generated("docs/judges.md", &page);
}
