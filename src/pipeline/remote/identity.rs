//! Identity of a judge in label files, and the hash of its configuration in label cache keys.

use crate::config::{Evidence, RemoteApi, RemoteJudge};
use crate::pipeline::label::shape::{Parts, Shape};
use crate::util::seed;

/// Returns the judge's identity in label files. It includes the address. Label cache keys of earlier versions of the
/// program include it, so it must never change.
pub fn identity(judge: &RemoteJudge) -> u64 {
    seed::text(&[judge.url.as_str(), &judge.model, api(judge), judge.system.as_deref().unwrap_or_default()].join("\0"))
}

/// Returns hashes of all settings that affect the judge's answers. The address is not included: a server that moved is
/// the same judge.
///
/// A new configuration key that changes requests must be added here, as a part that is absent at the key's default. If
/// it is set, `earlier` is `None`, since no earlier version sent it.
pub fn shape(judge: &RemoteJudge) -> Shape {
    let usual = RemoteJudge::default();
    let thinking = (judge.thinking_tokens != usual.thinking_tokens).then(|| judge.thinking_tokens.to_string());
    let listed = (judge.top_logprobs != usual.top_logprobs && judge.evidence != Evidence::Votes)
        .then(|| judge.top_logprobs.to_string());
    let plain = judge.extra_body.is_empty() && judge.chat_template_kwargs.is_empty() && thinking.is_none();
    let written = Parts::of("server")
        .with("model", &judge.model)
        .with("api", api(judge))
        .with_some("system", judge.system.as_deref())
        .with_some("extra_body", set(&judge.extra_body).as_deref())
        .with_some("chat_template_kwargs", set(&judge.chat_template_kwargs).as_deref())
        .with_some("thinking_tokens", thinking.as_deref());
    let evidence = match judge.evidence {
        Evidence::Auto => "auto",
        Evidence::Logprobs => "logprobs",
        Evidence::Votes => "votes",
    };
    // Without votes, their number has no effect.
    let votes = (judge.evidence != Evidence::Logprobs).then(|| judge.votes.to_string());
    let weighed = written.clone().with("evidence", evidence).with_some("votes", votes.as_deref());
    let weighed = weighed.with_some("top_logprobs", listed.as_deref());
    let plain = plain && listed.is_none();
    Shape { weighed: weighed.digest(), written: written.digest(), earlier: plain.then(|| identity(judge)) }
}

/// Returns a table as text, or `None` if it is empty.
fn set(table: &toml::Table) -> Option<String> {
    (!table.is_empty()).then(|| table.to_string())
}

fn api(judge: &RemoteJudge) -> &'static str {
    match judge.api {
        RemoteApi::Chat => "chat",
        RemoteApi::Completions => "completions",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge() -> RemoteJudge {
        RemoteJudge { url: "http://a/v1".into(), model: "m".into(), ..RemoteJudge::default() }
    }

    #[test]
    fn every_setting_that_affects_answers_changes_the_shape_and_the_address_does_not() {
        let base = shape(&judge());
        let moved = shape(&RemoteJudge { url: "https://b:1/v1".into(), api_key_env: Some("K".into()), ..judge() });
        assert_eq!((moved.weighed, moved.written), (base.weighed, base.written));
        assert_ne!(moved.earlier, base.earlier, "earlier versions included the address in their keys");
        let table = || toml::Table::from_iter([("a".to_owned(), toml::Value::from(1))]);
        let changed: [(&str, RemoteJudge, bool); 10] = [
            ("extra_body", RemoteJudge { extra_body: table(), ..judge() }, true),
            ("chat_template_kwargs", RemoteJudge { chat_template_kwargs: table(), ..judge() }, true),
            ("thinking_tokens", RemoteJudge { thinking_tokens: 7, ..judge() }, true),
            ("model", RemoteJudge { model: "n".into(), ..judge() }, true),
            ("api", RemoteJudge { api: RemoteApi::Completions, ..judge() }, true),
            ("system", RemoteJudge { system: Some("s".into()), ..judge() }, true),
            ("empty system", RemoteJudge { system: Some(String::new()), ..judge() }, true),
            ("evidence", RemoteJudge { evidence: Evidence::Votes, ..judge() }, false),
            ("votes", RemoteJudge { votes: judge().votes + 1, ..judge() }, false),
            ("top_logprobs", RemoteJudge { top_logprobs: 40, ..judge() }, false),
        ];
        for (name, other, texts_too) in changed {
            let other = shape(&other);
            assert_ne!(other.weighed, base.weighed, "{name}");
            assert_eq!(other.written != base.written, texts_too, "{name}");
        }
        let exact = RemoteJudge { evidence: Evidence::Logprobs, ..judge() };
        assert_eq!(shape(&RemoteJudge { votes: 9, ..exact.clone() }), shape(&exact), "there are no votes");
    }

    /// Expected values from existing caches and label files.
    #[test]
    fn hashes_are_stable_across_versions() {
        let identity = |judge: RemoteJudge| format!("{:016x}", identity(&judge));
        let url = "http://127.0.0.1:18327/v1".to_owned();
        let fixture =
            RemoteJudge { url, model: "judge".into(), system: Some("Be fair.".into()), ..RemoteJudge::default() };
        assert_eq!(identity(fixture), "65d33972e478c24c", "as in tests/fixtures/formats/served/labels.jsonl");
        let shape = shape(&judge());
        let hex = |digest: [u8; 32]| digest[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            (hex(shape.weighed).as_str(), hex(shape.written).as_str()),
            ("3b890596c2813658", "dc66471be714127a")
        );
    }
}
