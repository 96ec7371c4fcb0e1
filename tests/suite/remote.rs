//! Tests of remote judges against a server that misbehaves.

use std::time::Duration;

use preceptor::config::{Evidence, RemoteApi, RemoteJudge};
use preceptor::pipeline::label::backend::{Ask, Backend, Decoding, NoAnswer, Usage};
use preceptor::pipeline::remote::Remote;

use crate::common::{metrics, stderr, train};
use crate::mock_judge::{Act, MockJudge, varied};

fn judge(mock: &MockJudge) -> RemoteJudge {
    RemoteJudge {
        url: mock.url.clone(),
        model: "mock".into(),
        // A long time-out: an answer that arrives is awaited however busy the machine is.
        timeout_s: 120.0,
        backoff_s: 0.005,
        max_backoff_s: 0.02,
        breaker_cooldown_s: 0.05,
        price_prompt: 1000.0,
        price_completion: 5000.0,
        ..RemoteJudge::default()
    }
}

fn ask(answers: &[&str]) -> Ask {
    Ask { prompt: "Which?".into(), answers: answers.iter().map(|one| (*one).to_owned()).collect() }
}

fn good() -> Act {
    Act::Tokens(vec![("1", 0.75), (" 2", 0.125), ("2", 0.0625), ("The", 0.01)])
}

#[track_caller]
fn close(weights: &[f64], expected: &[f64]) {
    assert_eq!(weights.len(), expected.len());
    assert!(weights.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{weights:?} against {expected:?}");
}

#[test]
fn probabilities_are_read_from_both_apis() {
    for api in [RemoteApi::Chat, RemoteApi::Completions] {
        let mock = MockJudge::start(|_, _, _| good());
        let remote = Remote::new(RemoteJudge { api, ..judge(&mock) }).unwrap();
        let mut usage = Usage::default();
        let replies = remote.weigh(&[ask(&["1", "2"]), ask(&["2", "3"])], &mut usage);
        close(replies[0].as_ref().unwrap(), &[0.75, 0.1875]);
        close(replies[1].as_ref().unwrap(), &[0.1875, 0.0]);
        assert_eq!((usage.requests, usage.prompt_tokens, usage.completion_tokens), (2, 20, 2));
        // 20 tokens at 1,000 per million and 2 at 5,000 per million.
        assert!((usage.cost - 0.03).abs() < 1e-12);
    }
}

#[test]
fn ten_is_distinguished_from_one_with_any_tokens() {
    // Digits are tokens: the token after 1 is asked for, and only in that case.
    let mock = MockJudge::start(|_, _, body| {
        let begun = body["messages"].as_array().unwrap().last().unwrap()["role"] == "assistant";
        if begun { Act::Tokens(vec![(".", 0.5), ("0", 0.25)]) } else { Act::Tokens(vec![("1", 0.8), ("2", 0.1)]) }
    });
    let replies = Remote::new(judge(&mock)).unwrap().weigh(&[ask(&["1", "2", "10"])], &mut Usage::default());
    close(replies[0].as_ref().unwrap(), &[0.6, 0.1, 0.2]);
    assert_eq!(mock.served("ok"), 2);
    let mock = MockJudge::start(|_, _, _| Act::Tokens(vec![("1", 0.5), ("10", 0.25), ("2", 0.1)]));
    let replies = Remote::new(judge(&mock)).unwrap().weigh(&[ask(&["1", "2", "10"])], &mut Usage::default());
    close(replies[0].as_ref().unwrap(), &[0.5, 0.1, 0.25]);
    assert_eq!(mock.served("ok"), 1);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn each_misbehaviour_is_counted_and_retried() {
    for act in [
        Act::Status(500, "", "{}"),
        Act::Status(429, "Retry-After: 0\r\n", "{}"),
        Act::Body(String::new()),
        Act::Body("<html>busy</html>".into()),
        Act::Body("{\"choices\": [{\"message\": {\"content\": \"1\"}, \"logprobs\": {\"content\": [{\"top_logprobs\": [{\"token\": \"1\", \"logprob\": null}]}]}}]}".into()),
        Act::Body(" ".repeat(100_000)),
        Act::CloseMidBody,
        Act::Hang,
        Act::Slow(Duration::from_millis(5), Box::new(Act::Status(503, "", ""))),
    ] {
        let first = act.clone();
        let mock = MockJudge::start(move |number, _, _| if number == 0 { first.clone() } else { good() });
        // An answer that never arrives is waited for until the time-out; the next one must arrive within the same time.
        let timeout_s = if matches!(act, Act::Hang) { 10.0 } else { 120.0 };
        let remote = Remote::new(RemoteJudge { max_response_bytes: 50_000, timeout_s, ..judge(&mock) }).unwrap();
        let mut usage = Usage::default();
        let replies = remote.weigh(&[ask(&["1", "2"])], &mut usage);
        close(replies[0].as_ref().unwrap_or_else(|refusal| panic!("{act:?}: {refusal}")), &[0.75, 0.1875]);
        assert_eq!(usage.requests, 2);
        for outcome in preceptor::pipeline::remote::retry::ExchangeOutcome::NAMES {
            assert_eq!(remote.stats().of(outcome), mock.served(outcome), "{act:?}: {outcome}");
        }
    }
}

#[test]
fn a_persistent_failure_is_reported_with_its_reason_and_never_the_key() {
    // SAFETY: no other test reads or writes this variable.
    unsafe { std::env::set_var("PRECEPTOR_TEST_KEY", "sesame-0815") };
    for (act, tries, words) in [
        (Act::Status(401, "", "bad key sesame"), 1, "api_key_env"),
        (Act::Status(404, "", "no such model"), 1, "labeler.remote.url"),
        (Act::Status(400, "", "{\"error\": \"prompt too long\"}"), 1, "prompt too long"),
        (Act::Status(402, "", "{\"error\": {\"message\": \"no credit\"}}"), 1, "no quota left (402: no credit)"),
        (
            Act::Status(429, "", "{\"error\": {\"code\": \"insufficient_quota\", \"message\": \"pay first\"}}"),
            1,
            "no quota left (429: pay first)",
        ),
        (Act::Status(500, "", "{\"detail\": \"out of memory\"}"), 3, "failed (500: out of memory)"),
        (Act::Status(429, "", "slow down"), 3, "limits the rate of requests (429: slow down)"),
        (Act::Hang, 3, "did not answer within labeler.remote.timeout_s"),
    ] {
        let always = act.clone();
        let mock = MockJudge::start(move |_, _, _| always.clone());
        // A short time-out is used only for the server that never answers.
        let timeout_s = if matches!(act, Act::Hang) { 0.1 } else { 120.0 };
        let settings = RemoteJudge {
            api_key_env: Some("PRECEPTOR_TEST_KEY".into()),
            retries: 2,
            timeout_s,
            outage_s: 0.0,
            ..judge(&mock)
        };
        let remote = Remote::new(settings).unwrap();
        let mut usage = Usage::default();
        let reply = remote.weigh(&[ask(&["1", "2"])], &mut usage).remove(0);
        let Err(NoAnswer::Failure(why)) = reply else { panic!("{act:?}: {reply:?}") };
        assert!(why.contains(words) && !why.contains("sesame-0815"), "{act:?}: {why}");
        assert!(why.contains(&format!("{}/chat/completions", mock.url)), "the address asked is named: {why}");
        assert_eq!(usage.requests, tries, "{act:?}");
    }
    let missing = RemoteJudge { api_key_env: Some("PRECEPTOR_NO_SUCH_KEY".into()), ..RemoteJudge::default() };
    assert!(Remote::new(missing).err().unwrap().to_string().contains("PRECEPTOR_NO_SUCH_KEY"));
}

#[test]
fn a_judge_without_log_probabilities_is_asked_for_votes() {
    let mock = MockJudge::start(|number, _, body| {
        if body["temperature"] == 0.0 {
            return Act::Text("1");
        }
        Act::Text(["2.", "1", " 2", "I cannot say", "2"][number as usize % 5])
    });
    let remote = Remote::new(judge(&mock)).unwrap();
    let first = remote.weigh(&[ask(&["1", "2"])], &mut Usage::default()).remove(0).unwrap();
    close(&first, &[0.25, 0.75]);
    assert_eq!(mock.served("ok"), 8, "three questions for log-probabilities, five votes");
    remote.weigh(&[ask(&["1", "2"])], &mut Usage::default());
    assert_eq!(mock.served("ok"), 13, "log-probabilities are not requested again");
    let strict = RemoteJudge { evidence: Evidence::Logprobs, ..judge(&mock) };
    let reply = Remote::new(strict).unwrap().weigh(&[ask(&["1", "2"])], &mut Usage::default()).remove(0);
    assert!(matches!(reply, Err(NoAnswer::Abstention(_))), "{reply:?}");
}

#[test]
fn a_slow_answer_is_superseded_by_a_second_request() {
    let mock = MockJudge::start(|number, _, _| if number == 0 { Act::Hang } else { good() });
    let settings = RemoteJudge { hedge_after_s: Some(0.05), timeout_s: 60.0, ..judge(&mock) };
    let remote = Remote::new(settings).unwrap();
    assert!(remote.weigh(&[ask(&["1", "2"])], &mut Usage::default())[0].is_ok());
    assert_eq!((remote.stats().of("ok"), remote.stats().of("hedged_away")), (1, 1));
}

#[test]
fn a_judge_that_is_down_for_a_while_is_waited_for() {
    let mock = MockJudge::start(|number, _, _| if number < 12 { Act::Status(502, "", "") } else { good() });
    let settings = RemoteJudge { breaker_failures: 4, retries: 15, ..judge(&mock) };
    let remote = Remote::new(settings).unwrap();
    let replies = remote.weigh(&vec![ask(&["1", "2"]); 6], &mut Usage::default());
    assert!(replies.iter().all(Result::is_ok), "{replies:?}");
    assert_eq!(remote.stats().of("http_5xx"), 12);
    // Without waiting time it is a failure with that reason.
    let mock = MockJudge::start(|_, _, _| Act::Status(502, "", ""));
    let settings = RemoteJudge { breaker_failures: 1, breaker_cooldown_s: 30.0, outage_s: 0.0, ..judge(&mock) };
    let reply = Remote::new(settings).unwrap().weigh(&[ask(&["1", "2"])], &mut Usage::default()).remove(0);
    let why = reply.unwrap_err().to_string();
    assert!(
        why.contains("failed (502)") && why.contains("outage_s = 0"),
        "there is no waiting time, and the cause is reported: {why}"
    );
}

/// A judge is unavailable for longer than any question may take: the run pauses, reports it, and loses nothing.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_judge_that_is_down_for_some_time_pauses_the_run_and_masks_no_group() {
    let failed = std::sync::OnceLock::new();
    let mock = MockJudge::start(move |number, _, body| {
        if number < 40 {
            return varied(body, "9", "1");
        }
        let since = failed.get_or_init(std::time::Instant::now).elapsed();
        if since > Duration::from_secs(12) { varied(body, "9", "1") } else { Act::Status(503, "", "") }
    });
    let dir = tempfile::tempdir().unwrap();
    let remote = |more: &str| {
        format!(
            "labeler.remote={{ url = \"{}\", model = \"mock\", timeout_s = 60, backoff_s = 0.005, max_backoff_s = 0.02, retries = 0, deadline_s = 5, breaker_failures = 1, breaker_cooldown_s = 0.3{more} }}",
            mock.url
        )
    };
    let cache = format!("labeler.cache=\"{}\"", dir.path().join("labels").display());
    let patient = remote("");
    let overrides = [
        "labeler.type=direct",
        &patient,
        &cache,
        "labeler.retries=0",
        "supervision.stall_after_s=4",
        "supervision.restart_after_s=8",
    ];
    let output = train(dir.path(), &overrides);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    let steps = metrics(&dir.path().join("run"));
    assert!(steps.iter().all(|step| step["groups/masked"] == 0), "{text}");
    assert!(mock.served("http_5xx") > 3, "the judge was down");
    assert!(text.contains("the run waits for it") && text.contains("answers again"), "{text}");
    assert!(!text.contains("restarting the graph"), "a run that waits for a judge does not count as hung: {text}");
}

#[test]
fn concurrent_requests_stay_within_the_limit() {
    // The first three wait for one another, and a little longer for a fourth.
    let together = std::sync::Arc::new(std::sync::Barrier::new(3));
    let mock = MockJudge::start(move |number, _, _| {
        let slow = Act::Slow(Duration::from_millis(200), Box::new(good()));
        if number < 3 { Act::Meet(std::sync::Arc::clone(&together), Box::new(slow)) } else { good() }
    });
    let remote = Remote::new(RemoteJudge { concurrency: 3, ..judge(&mock) }).unwrap();
    let replies = remote.weigh(&vec![ask(&["1", "2"]); 12], &mut Usage::default());
    assert!(replies.iter().all(Result::is_ok));
    assert_eq!(mock.most_at_once(), 3);
}

#[test]
fn texts_are_generated_concurrently_and_returned_in_order() {
    let mock = MockJudge::start(|_, _, body| Act::Text(if body["messages"][0]["content"] == "a" { "A" } else { "B" }));
    let decoding = Decoding { max_tokens: 9, temperature: 0.7, top_k: Some(40), seed: 1 };
    let replies = Remote::new(judge(&mock)).unwrap().write(&["a".into(), "b".into()], &decoding, &mut Usage::default());
    assert_eq!(replies, [Ok("A".to_owned()), Ok("B".to_owned())]);
}

/// A complete run with a judge that fails more than three times in ten and hangs once in a hundred.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_run_with_a_failing_judge_completes_and_its_counts_match_the_judges() {
    let mock = MockJudge::start(|number, _, _| {
        // A fixed pattern with the intended shares of faults.
        match (number * 7919 + 13) % 100 {
            0..=14 => Act::Status(500, "", ""),
            15..=19 => Act::Status(429, "Retry-After: 0\r\n", ""),
            20..=24 => Act::Body("{".into()),
            25..=29 => Act::CloseMidBody,
            // Only one in a hundred, since each takes as long as a busy machine may need for an answer.
            30 => Act::Hang,
            31..=34 => Act::Status(502, "", ""),
            n => Act::Tokens(vec![("7", 0.5), ("1", if n % 2 == 0 { 0.25 } else { 0.05 })]),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let remote = format!(
        "labeler.remote={{ url = \"{}\", model = \"mock\", timeout_s = 10, backoff_s = 0.005, max_backoff_s = 0.02, retries = 1, breaker_cooldown_s = 0.05, price_prompt = 1.0 }}",
        mock.url
    );
    let cache = format!("labeler.cache=\"{}\"", dir.path().join("labels").display());
    let overrides = ["labeler.type=direct", &remote, &cache, "labeler.retries=1", "labeler.workers=2", "run.steps=6"];
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let run = dir.path().join("run");
    assert_eq!(metrics(&run).len(), 6);
    let text = std::fs::read_to_string(run.join("metrics.prom")).unwrap();
    let value = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64)
    };
    mock.settle();
    for outcome in preceptor::pipeline::remote::retry::ExchangeOutcome::NAMES {
        let counted = value(&format!("preceptor_judge_requests_total{{outcome=\"{outcome}\"}}"));
        assert_eq!(counted, mock.served(outcome), "{outcome} in\n{text}");
    }
    assert!(mock.served("timeout") > 0 && mock.served("http_5xx") > 0);
    // No failure became a number: every score is one of the two scores that the judge gave.
    let expected = [(7.0 * 0.5 + 0.25) / 0.75, (7.0 * 0.5 + 0.05) / 0.55].map(|rating: f64| (rating - 5.5) / 4.5);
    let samples = std::fs::read_to_string(run.join("samples.jsonl")).unwrap();
    let mut labeled = 0;
    for line in samples.lines() {
        let sample: serde_json::Value = serde_json::from_str(line).unwrap();
        let verdict = &sample["verdict"];
        match verdict["label"].as_f64() {
            Some(label) => {
                labeled += 1;
                assert!(expected.iter().any(|one| (one - label).abs() < 1e-9), "{line}");
            }
            // A question that failed twice while others were answered.
            None => assert!(verdict["abstention"].is_string() && sample["reward"].is_null(), "{line}"),
        }
    }
    assert!(labeled > 0);
}
