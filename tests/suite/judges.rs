//! Tests of runs whose judge refuses, is unavailable, abstains or costs too much: a run without labels reports it, and
//! no group is lost.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use preceptor::config::RemoteJudge;
use preceptor::pipeline::label::backend::{Ask, Backend, NoAnswer, Usage};
use preceptor::pipeline::remote::Remote;
use preceptor::pipeline::remote::budget::Budget;
use serde_json::{Value, json};

use crate::common::{config, metrics, preceptor, resume, small, stderr, train, trained, wait_until};
use crate::mock_judge::{Act, MockJudge, varied};

/// A rating that is a function of the question.
fn rating(body: &Value) -> Act {
    varied(body, "9", "1")
}

/// Returns the `--set` value for a judge at `url` without long pauses, with the additional keys `more`.
fn remote(url: &str, more: &str) -> String {
    format!(
        "labeler.remote={{ url = \"{url}\", model = \"mock\", backoff_s = 0.005, max_backoff_s = 0.02, retries = 1, breaker_cooldown_s = 0.05{more} }}"
    )
}

fn cache(dir: &Path) -> String {
    format!("labeler.cache=\"{}\"", dir.join("labels").display())
}

/// A valid answer of 9, with `fields` added to the body and `ending` to its choice.
fn answer(fields: &Value, ending: &Value) -> Act {
    let top = json!([{ "token": "9", "logprob": -0.1 }, { "token": "1", "logprob": -3.0 }]);
    let mut choice = json!({ "message": { "content": "9" }, "logprobs": { "content": [{ "top_logprobs": top }] } });
    choice.as_object_mut().unwrap().extend(ending.as_object().unwrap().clone());
    let mut body = json!({ "choices": [choice] });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    Act::Body(body.to_string())
}

fn question(prompt: &str) -> Ask {
    Ask { prompt: prompt.into(), answers: vec!["1".into(), "9".into()] }
}

#[test]
fn training_and_check_refuse_a_judge_that_refuses_and_quote_its_message() {
    for (act, words) in [
        (Act::Status(401, "", "{\"error\": {\"message\": \"bad key\"}}"), "refused the key (401: bad key)"),
        (Act::Status(403, "", "no entry"), "403: no entry"),
        (Act::Status(404, "", "{\"detail\": \"Not Found\"}"), "knows no such address or model (404: Not Found)"),
        (Act::Status(400, "", "{\"error\": {\"message\": \"Unsupported parameter\"}}"), "400: Unsupported parameter"),
        (Act::Status(422, "", "{\"message\": \"logprobs?\"}"), "422: logprobs?"),
        (Act::Status(501, "", "not here"), "501: not here"),
        (Act::Status(302, "Location: http://other.test/v1\r\n", ""), "http://other.test/v1"),
        (Act::Status(429, "", "{\"error\": {\"type\": \"insufficient_quota\", \"message\": \"pay\"}}"), "429: pay"),
    ] {
        let always = act.clone();
        let mock = MockJudge::start(move |_, _, _| always.clone());
        let dir = tempfile::tempdir().unwrap();
        let overrides = ["labeler.type=direct", &remote(&mock.url, ""), &cache(dir.path())];
        let output = train(dir.path(), &overrides);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{act:?}: {text}");
        assert!(text.contains(words) && text.contains(&format!("{}/chat/completions", mock.url)), "{act:?}: {text}");
        assert!(metrics_of(&dir.path().join("run")).is_empty(), "no step was taken: {text}");
        let mut check = preceptor(dir.path());
        check.arg("check").arg(config("offline.toml")).args(overrides.iter().flat_map(|one| ["--set", one]));
        let output = check.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{act:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{act:?}: {}", stderr(&output));
    }
}

fn metrics_of(run: &Path) -> Vec<Value> {
    if run.join("metrics.jsonl").exists() { metrics(run) } else { Vec::new() }
}

#[test]
fn a_judge_that_is_unreachable_at_the_start_is_a_temporary_failure() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &["labeler.type=direct", &remote(&url, ""), &cache(dir.path())]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("could not be reached") && text.contains(&url), "{text}");
    // With `probe = false` the question at the start is skipped; the run then waits for the judge in its first step.
    let settings = remote(&url, ", probe = false, outage_s = 0.3");
    let output = train(dir.path(), &["labeler.type=direct", &settings, &cache(dir.path())]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the run waits for it") && text.contains("could not be reached"), "{text}");
}

/// From request number `from` on the judge refuses until `repaired`; its answers are functions of the question.
fn refusing(from: u64, act: &Act) -> (MockJudge, Arc<AtomicBool>) {
    let repaired = Arc::new(AtomicBool::new(false));
    let (seen, act) = (Arc::clone(&repaired), act.clone());
    let mock = MockJudge::start(
        move |number, _, body| {
            if number < from || seen.load(Ordering::SeqCst) { rating(body) } else { act.clone() }
        },
    );
    (mock, repaired)
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_run_whose_judge_refuses_keeps_its_groups_and_resumes_with_the_same_result() {
    let sound = MockJudge::start(|_, _, body| rating(body));
    let uninterrupted = tempfile::tempdir().unwrap();
    let output = train(
        uninterrupted.path(),
        &["labeler.type=direct", "learner.eta=0", &remote(&sound.url, ""), &cache(uninterrupted.path())],
    );
    assert!(output.status.success(), "{}", stderr(&output));
    for (act, words) in [
        (Act::Status(401, "", "{\"error\": {\"message\": \"key revoked\"}}"), "401: key revoked"),
        (Act::Status(503, "", "down"), "failed (503: down)"),
        (Act::Status(429, "", "slow"), "limits the rate of requests (429: slow)"),
    ] {
        let (mock, repaired) = refusing(25, &act);
        let dir = tempfile::tempdir().unwrap();
        let settings = remote(&mock.url, ", outage_s = 0.3");
        let overrides = ["labeler.type=direct", "learner.eta=0", &settings, &cache(dir.path())];
        let output = train(dir.path(), &overrides);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{act:?}: {text}");
        assert!(text.contains(words) && text.contains("got no verdict"), "the cause is reported: {text}");
        let run = dir.path().join("run");
        let before = metrics(&run);
        assert!(before.len() < 4 && before.iter().all(|step| step["groups/masked"] == 0), "nothing is spent: {text}");
        repaired.store(true, Ordering::SeqCst);
        let output = resume(dir.path(), &overrides);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(metrics(&run), metrics(&uninterrupted.path().join("run")), "{act:?}");
        let weights = |dir: &Path| std::fs::read(dir.join("run/checkpoints/step-000004/model.safetensors")).unwrap();
        assert!(
            weights(dir.path()) == weights(uninterrupted.path()),
            "{act:?}: other weights than without the refusal"
        );
    }
}

#[test]
fn each_prompt_is_trained_once_across_an_outage_in_an_asynchronous_run() {
    let (mock, repaired) = refusing(25, &Act::Status(403, "", "no"));
    let dir = tempfile::tempdir().unwrap();
    let settings = remote(&mock.url, ", outage_s = 0.3");
    let overrides = ["labeler.type=direct", "learner.eta=4", "labeler.workers=2", &settings, &cache(dir.path())];
    assert_eq!(train(dir.path(), &overrides).status.code(), Some(1));
    repaired.store(true, Ordering::SeqCst);
    let output = resume(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(trained(&dir.path().join("run")), (0..16).collect::<Vec<_>>());
}

#[test]
fn a_question_that_fails_while_others_are_answered_is_an_abstention() {
    for (act, asked) in [
        (Act::Status(400, "", "{\"error\": {\"message\": \"too long\"}}"), 1),
        (Act::Status(403, "", "moderated"), 2),
        (Act::Status(500, "", "cannot"), 6),
        (Act::Body("<html>".into()), 6),
    ] {
        let bad = act.clone();
        let asked_bad = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked_bad);
        let mock = MockJudge::start(move |_, _, body| {
            if body["messages"].to_string().contains("poison") {
                count.fetch_add(1, Ordering::SeqCst);
                return bad.clone();
            }
            rating(body)
        });
        // If it were treated as an outage, the test would wait for an hour.
        let settings = RemoteJudge {
            url: mock.url.clone(),
            model: "mock".into(),
            retries: 2,
            backoff_s: 0.005,
            breaker_failures: 2,
            breaker_cooldown_s: 0.05,
            ..RemoteJudge::default()
        };
        let judge = Remote::new(settings).unwrap();
        let first = judge.weigh(&[question("a"), question("b")], &mut Usage::default());
        assert!(first.iter().all(Result::is_ok), "{first:?}");
        let mut usage = Usage::default();
        let replies = judge.weigh(&[question("poison"), question("c")], &mut usage);
        assert!(replies[1].is_ok(), "{act:?}: a good question is answered: {replies:?}");
        let Err(NoAnswer::Abstention(why)) = &replies[0] else { panic!("{act:?}: {replies:?}") };
        assert!(why.contains("it answers other questions"), "{why}");
        assert_eq!(asked_bad.load(Ordering::SeqCst), asked, "{act:?}");
        // The same holds for a single question: the client repeats one that was answered before, to see whether the
        // judge answers any.
        let alone = judge.weigh(&[question("poison")], &mut Usage::default());
        assert!(matches!(&alone[0], Err(NoAnswer::Abstention(_))), "{act:?}: {alone:?}");
    }
}

#[test]
fn a_rate_limit_masks_no_group() {
    // Two of each three requests are refused for their rate, without a Retry-After.
    let mock = MockJudge::start(|number, _, body| {
        if number % 3 == 0 { rating(body) } else { Act::Status(429, "", "{\"error\": {\"message\": \"slow down\"}}") }
    });
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &["labeler.type=direct", &remote(&mock.url, ""), &cache(dir.path())]);
    assert!(output.status.success(), "{}", stderr(&output));
    let steps = metrics(&dir.path().join("run"));
    assert!(steps.len() == 4 && steps.iter().all(|step| step["groups/masked"] == 0), "{}", stderr(&output));
}

#[test]
fn an_outage_and_its_cause_appear_on_the_page_in_the_metrics_and_in_readyz() {
    let (mock, repaired) = refusing(20, &Act::Status(401, "", "{\"error\": {\"message\": \"key revoked\"}}"));
    let dir = tempfile::tempdir().unwrap();
    let mut command = preceptor(dir.path());
    command.arg("train").arg(config("offline.toml")).args(["--run-dir", "run"]).args(small());
    for one in ["labeler.type=direct", "serve.enabled=true", "serve.listen=\"127.0.0.1:0\"", &remote(&mock.url, "")] {
        command.args(["--set", one]);
    }
    let log = dir.path().join("log");
    command.args(["--set", &cache(dir.path())]).stderr(std::fs::File::create(&log).unwrap()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let read = || std::fs::read_to_string(&log).unwrap();
    let mut address = String::new();
    wait_until("the address", || {
        let found = read().lines().find_map(|line| Some(line.split_once("http://")?.1.split_once('/')?.0.to_owned()));
        address = found.unwrap_or_default();
        !address.is_empty()
    });
    let get = |path: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    wait_until("the outage in /readyz", || get("/readyz").contains("401: key revoked"));
    let ready = get("/readyz");
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains(&mock.url), "{ready}");
    assert!(get("/metrics").contains("\npreceptor_judge_refuses 1\n"));
    let status = get("/status");
    let status: Value = serde_json::from_str(status.split_once("\r\n\r\n").unwrap().1).unwrap();
    let away = &status["judges_away"][0];
    assert!(away["why"].as_str().unwrap().contains("key revoked") && away["refuses"] == true, "{away}");
    repaired.store(true, Ordering::SeqCst);
    assert!(child.wait().unwrap().success(), "{}", read());
    assert!(read().contains("answers again"), "{}", read());
}

#[test]
fn a_judge_that_tells_no_completions_apart_stops_the_run_with_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    let judge = MockJudge::start(|_, _, _| Act::Tokens(vec![("1", 0.9), ("2", 0.1)]));
    let remote = format!("labeler.remote={{ url = \"{}\", model = \"m\", probe = false }}", judge.url);
    let output = train(
        dir.path(),
        &["run.steps=2", "labeler.type=pairwise", "labeler.templates=helpful", "reward.kl_coef=0", &remote],
    );
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("in 2 steps the gradient was zero, because the completions of each group had equal rewards"),
        "{text}"
    );
}

#[test]
fn a_warm_up_on_ties_alone_stops_the_run_with_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    let tie = "{\"prompt\": \"p\", \"first\": \"a\", \"second\": \"b\", \"preference\": 0.5}\n";
    std::fs::write(dir.path().join("ties.jsonl"), tie.repeat(8)).unwrap();
    let pairs = format!("reward_model.pairs={}", dir.path().join("ties.jsonl").display());
    let output = train(dir.path(), &["run.mode=human", &pairs]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("is a tie (a probability of ½)"), "{text}");
}

#[test]
fn a_run_without_labels_stops_with_the_reasons_after_three_steps() {
    let mock = MockJudge::start(|_, _, _| Act::Tokens(vec![("I", 0.9), ("The", 0.1)]));
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["labeler.type=direct", "run.steps=9", &remote(&mock.url, ""), &cache(dir.path())];
    let output = train(dir.path(), &overrides);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert_eq!(metrics(&dir.path().join("run")).len(), 3);
    for words in
        ["did not answer a simple question", "learned nothing", "guard.unlabeled_steps", "the likeliest is \"I\""]
    {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(dir.path().join("run/checkpoints/step-000003").is_dir());
    let output = resume(dir.path(), &overrides);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert_eq!(metrics(&dir.path().join("run")).len(), 4, "steps of the process before count: {}", stderr(&output));
}

#[test]
fn a_warm_up_without_labels_is_an_error_and_writes_no_reward_model() {
    let mock = MockJudge::start(|_, _, _| Act::Tokens(vec![("I", 0.9), ("The", 0.1)]));
    let dir = tempfile::tempdir().unwrap();
    let overrides = [
        "run.mode=distilled",
        "labeler.type=pairwise",
        "reward_model.warm_up_groups=4",
        &remote(&mock.url, ""),
        &cache(dir.path()),
    ];
    let output = train(dir.path(), &overrides);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("was trained on no pair") && text.contains("the likeliest is \"I\""), "{text}");
    assert!(!text.contains("0.0 % of 0"), "{text}");
    assert!(metrics_of(&dir.path().join("run")).is_empty(), "{text}");
}

#[test]
fn all_completions_of_an_odd_group_are_compared_and_trained_on() {
    let mock = MockJudge::start(|_, _, body| varied(body, "1", "2"));
    let dir = tempfile::tempdir().unwrap();
    let output = train(
        dir.path(),
        &["labeler.type=pairwise", "rollout.group_size=3", &remote(&mock.url, ""), &cache(dir.path())],
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let run = dir.path().join("run");
    assert!(metrics(&run).iter().all(|step| step["groups/masked"] == 0 && step["applied"] == true));
}

#[test]
fn a_run_stops_with_a_checkpoint_before_it_exceeds_its_budget() {
    let mock = MockJudge::start(|_, _, body| rating(body));
    let dir = tempfile::tempdir().unwrap();
    // The mock counts 10 prompt tokens and 1 completion token per answer: 0.000015 each.
    let judge = remote(&mock.url, ", price_prompt = 1.0, price_completion = 5.0");
    let overrides = |limit| {
        let limit = format!("labeler.max_cost={limit}");
        vec!["labeler.type=direct".to_owned(), judge.clone(), cache(dir.path()), limit]
    };
    let first = overrides("0.002");
    let output = train(dir.path(), &first.iter().map(String::as_str).collect::<Vec<_>>());
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("labeler.max_cost = 0.002 is used up") && text.contains("checkpoint"), "{text}");
    let spent = mock.served("ok") as f64 * 0.000_015;
    assert!(spent > 0.0 && spent <= 0.002, "{spent}");
    let kept: f64 = std::fs::read_to_string(dir.path().join("run/judge-cost.txt")).unwrap().trim().parse().unwrap();
    assert!(kept <= spent + 1e-12 && kept > 0.0, "{kept} of {spent}");
    // The same limit applies to all processes of a run together.
    let served = mock.served("ok");
    let output = resume(dir.path(), &first.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!((mock.served("ok") - served) as f64 * 0.000_015 + kept <= 0.002 + 0.000_03);
    let output = resume(dir.path(), &overrides("1").iter().map(String::as_str).collect::<Vec<_>>());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(trained(&dir.path().join("run")), (0..16).collect::<Vec<_>>());
    // A limit without a price would have no effect, and is refused.
    let free = [overrides("1")[0].clone(), remote(&mock.url, ""), "labeler.max_cost=1".into()];
    let output = train(dir.path(), &free.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("labeler.max_cost: has no effect"), "{}", stderr(&output));
}

#[test]
fn answers_of_another_model_than_the_first_are_not_labels() {
    let mock = MockJudge::start(|number, _, _| {
        answer(&json!({ "model": if number < 2 { "first" } else { "second" } }), &json!({}))
    });
    let settings = |any_model| RemoteJudge {
        url: mock.url.clone(),
        model: "mock".into(),
        outage_s: 0.0,
        any_model,
        ..RemoteJudge::default()
    };
    let judge = Remote::new(settings(false)).unwrap();
    for expected in [true, true, false] {
        let reply = judge.weigh(&[question("a")], &mut Usage::default()).remove(0);
        assert_eq!(reply.is_ok(), expected, "{reply:?}");
        if let Err(refusal) = reply {
            let why = refusal.to_string();
            assert!(matches!(refusal, NoAnswer::Failure(_)) && why.contains("\"second\" now"), "{why}");
        }
    }
    assert!(judge.stats().of("other_model") > 0);
    let any = Remote::new(settings(true)).unwrap();
    assert!(any.weigh(&[question("a")], &mut Usage::default())[0].is_ok());
}

#[test]
fn one_answer_without_log_probabilities_does_not_switch_to_votes() {
    let mock = MockJudge::start(|number, _, body| if number % 10 == 4 { Act::Text("9") } else { rating(body) });
    let settings =
        RemoteJudge { url: mock.url.clone(), model: "mock".into(), backoff_s: 0.001, ..RemoteJudge::default() };
    let judge = Remote::new(settings).unwrap();
    for i in 0..40 {
        assert!(judge.weigh(&[question(&i.to_string())], &mut Usage::default())[0].is_ok());
    }
    assert_eq!(judge.stats().of("ok"), 40, "each question has exactly one counted answer");
    assert!(mock.served("ok") < 50, "{} questions were asked", mock.served("ok"));
}

#[test]
fn an_answer_that_the_server_marks_as_failed_is_not_a_label() {
    for (end, outcome) in [
        (json!({ "finish_reason": "error", "error": { "code": 502 } }), "http_5xx"),
        (json!({ "finish_reason": "error" }), "malformed"),
        (json!({ "error": { "code": 429 } }), "rate_limited"),
        (json!({ "finish_reason": "content_filter" }), "filtered"),
    ] {
        let act = answer(&json!({}), &end);
        let mock = MockJudge::start(move |_, _, _| act.clone());
        let settings = RemoteJudge {
            url: mock.url.clone(),
            model: "mock".into(),
            retries: 0,
            outage_s: 0.0,
            ..RemoteJudge::default()
        };
        let judge = Remote::new(settings).unwrap();
        let reply = judge.weigh(&[question("a")], &mut Usage::default()).remove(0);
        assert!(matches!(reply, Err(NoAnswer::Failure(_))), "{end}: {reply:?}");
        assert_eq!(judge.stats().of(outcome), 1, "{end}");
    }
}

#[test]
fn a_retry_after_longer_than_the_patience_ends_the_wait() {
    let mock = MockJudge::start(|_, _, _| Act::Status(429, "Retry-After: 36000\r\n", "later"));
    let settings = RemoteJudge {
        url: mock.url.clone(),
        model: "mock".into(),
        outage_s: 0.3,
        deadline_s: 0.3,
        ..RemoteJudge::default()
    };
    let judge = Remote::new(settings).unwrap();
    // If the complete time were waited for, the test would take hours.
    let replies = judge.weigh(&[question("a"), question("b")], &mut Usage::default());
    for reply in &replies {
        let Err(NoAnswer::Failure(why)) = reply else { panic!("{replies:?}") };
        assert!(why.contains("limits the rate of requests (429: later)"), "{why}");
    }
}

#[test]
fn a_question_that_alone_is_rate_limited_is_an_abstention() {
    let mock = MockJudge::start(|_, _, body| {
        let large = body["messages"].to_string().contains("poison");
        if large { Act::Status(429, "", "request too large for the tokens of a minute") } else { rating(body) }
    });
    let settings = RemoteJudge {
        url: mock.url.clone(),
        model: "mock".into(),
        backoff_s: 0.001,
        max_backoff_s: 0.002,
        ..RemoteJudge::default()
    };
    let judge = Remote::new(settings).unwrap();
    assert!(judge.weigh(&[question("a")], &mut Usage::default())[0].is_ok());
    let reply = judge.weigh(&[question("poison")], &mut Usage::default()).remove(0);
    let Err(NoAnswer::Abstention(why)) = reply else { panic!("{reply:?}") };
    assert!(why.contains("request too large"), "{why}");
}

#[test]
fn a_resumed_run_refuses_another_model_as_its_judge() {
    let other = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&other);
    let mock = MockJudge::start(move |_, _, _| {
        answer(&json!({ "model": if seen.load(Ordering::SeqCst) { "second" } else { "first" } }), &json!({}))
    });
    let dir = tempfile::tempdir().unwrap();
    let judge = remote(&mock.url, "");
    let overrides = ["labeler.type=direct", judge.as_str(), &cache(dir.path())];
    // All answers are the same, so that no step changes the weights.
    assert_eq!(train(dir.path(), &[&overrides[..], &["run.steps=2"]].concat()).status.code(), Some(3));
    other.store(true, Ordering::SeqCst);
    let refused = resume(dir.path(), &overrides);
    let text = stderr(&refused);
    assert_eq!(refused.status.code(), Some(2), "{text}");
    for words in ["answered as \"first\"", "answered as \"second\"", "--accept-change labeler.remote.model"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    other.store(false, Ordering::SeqCst);
    assert_eq!(resume(dir.path(), &overrides).status.code(), Some(3));
    assert_eq!(metrics(&dir.path().join("run")).len(), 4);
}

#[test]
fn a_server_that_charges_for_impossible_token_counts_is_held_to_the_budget_from_its_first_answer_on() {
    let usage = json!({ "usage": { "prompt_tokens": 5000, "completion_tokens": 500 } });
    let mock = MockJudge::start(move |_, _, _| answer(&usage, &json!({})));
    // 5,000 prompt tokens at 1 per million and 500 completion tokens at 10 per million: 0.01 per answer.
    let settings = RemoteJudge {
        url: mock.url.clone(),
        model: "mock".into(),
        price_prompt: 1.0,
        price_completion: 10.0,
        ..RemoteJudge::default()
    };
    let budget = Budget::open(0.1, None).unwrap();
    let judge = Remote::within(settings, Some(Arc::clone(&budget))).unwrap();
    let asked: usize =
        (0..30).filter(|i| judge.weigh(&[question(&i.to_string())], &mut Usage::default())[0].is_ok()).count();
    assert!((5..=10).contains(&asked) && budget.spent() <= 0.1 + 1e-9, "{asked} answers cost {}", budget.spent());
}

#[test]
fn labeling_a_file_ends_with_the_cause_when_the_judge_stays_unavailable() {
    let (mock, repaired) = refusing(4, &Act::Status(401, "", "{\"error\": {\"message\": \"key revoked\"}}"));
    let dir = tempfile::tempdir().unwrap();
    let pairs: String =
        (0..400).map(|i| format!("{{\"prompt\": \"p{i}\", \"first\": \"a{i}\", \"second\": \"b{i}\"}}\n")).collect();
    std::fs::write(dir.path().join("pairs.jsonl"), pairs).unwrap();
    let label = || {
        let mut command = preceptor(dir.path());
        command.arg("label").arg(config("offline.toml")).args(["--input", "pairs.jsonl", "--output", "out.jsonl"]);
        for one in ["labeler.type=pairwise", &remote(&mock.url, ", outage_s = 0.2"), &cache(dir.path())] {
            command.args(["--set", one]);
        }
        command.output().unwrap()
    };
    let output = label();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("401: key revoked") && text.contains("run the same command again"), "{text}");
    let refused = mock.served("http_4xx");
    assert!(refused < 200, "no further question is asked once the judge was waited for: {refused}");
    repaired.store(true, Ordering::SeqCst);
    let output = label();
    // The mock's ratings are not choices between 1 and 2, so that all pairs are labels of `1` or abstentions; none is
    // lost.
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(dir.path().join("out.jsonl")).unwrap().lines().count(), 400);
}

#[test]
fn time_without_questions_is_not_an_outage() {
    // A judge that was idle for longer than `outage_s` was not unavailable.
    let mock = MockJudge::start(|number, _, body| if number == 1 { Act::Status(503, "", "") } else { rating(body) });
    let settings = RemoteJudge {
        url: mock.url.clone(),
        model: "mock".into(),
        retries: 0,
        outage_s: 0.5,
        breaker_cooldown_s: 0.01,
        ..RemoteJudge::default()
    };
    let judge = Remote::new(settings).unwrap();
    assert!(judge.weigh(&[question("a")], &mut Usage::default())[0].is_ok());
    std::thread::sleep(Duration::from_secs(1));
    let replies = judge.weigh(&[question("b")], &mut Usage::default());
    assert!(!matches!(replies[0], Err(NoAnswer::Failure(_))), "{replies:?}");
}
