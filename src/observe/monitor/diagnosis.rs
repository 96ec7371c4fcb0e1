//! Bottleneck diagnosis: the role that limits throughput, by how much, and the settings that would relieve it. A pure
//! function of the roles' time shares.

use preceptor_actors::RoleShare;
use serde::Serialize;

use crate::config::{Choice, Config, EngineKind, LabelEngine, RolloutWeights};
use crate::pipeline::generate::MAX_SLOTS;
use crate::pipeline::served::ServerReport;

/// Minimum busy share of a bottleneck role. Below it, no single role limits throughput.
const MIN_BUSY: f64 = 0.6;

/// Maximum ratio of the busy shares of two roles that limit throughput equally.
const EVEN: f64 = 1.05;

/// Minimum share of the time that prompts, rollout actors and the learner wait if hand-overs to servers limit throughput.
const HAND_OVER_LIMITS: f64 = 0.3;

/// Ratio of the speed of a completion on a server to that on the fastest one, below which the server counts as slow.
const SLOW_SERVER: f64 = 0.5;

/// The bottleneck of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Diagnosis {
    /// The bottleneck role. `None` if the stages wait for one another in turn.
    pub role: Option<String>,
    /// Busy share of the bottleneck role's workers, from 0 to 1.
    pub share: f64,
    /// Factor by which throughput could rise without this bottleneck, until the next role limits it.
    pub gain: f64,
    /// Role that would be the next bottleneck.
    pub next: Option<String>,
    /// Summary in one sentence.
    pub headline: String,
    /// The rollout server that limits, if one does, and the other roles' main states with their time shares.
    pub detail: String,
    /// Proposed changes of the configuration, the most promising first.
    pub settings: Vec<Setting>,
}

/// A proposed change of a configuration key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Path of the key.
    pub key: &'static str,
    /// Current value.
    pub now: String,
    /// Proposed value.
    #[serde(rename = "try")]
    pub attempt: String,
    /// Expected effect of the change.
    pub why: String,
}

/// Returns the bottleneck of a run with the time shares `shares`, on a machine with `cores` cores, whose completions come
/// from `servers` if there are any. `None` before any role has worked.
pub fn diagnose(shares: &[RoleShare], config: &Config, cores: usize, servers: &[ServerReport]) -> Option<Diagnosis> {
    let mut by_work: Vec<&RoleShare> = shares.iter().filter(|share| share.busy > 0.0).collect();
    by_work.sort_by(|a, b| b.busy.total_cmp(&a.busy));
    let (first, rest) = by_work.split_first()?;
    let next = rest.first();
    let gain = next.map_or(1.0 / first.busy, |next| first.busy / next.busy).max(1.0);
    let waiting_roles = shares.iter().filter(|share| share.role != first.role).map(waits);
    let detail: Vec<String> = limiting_server(servers, shares).into_iter().chain(waiting_roles).collect();
    let limits = first.busy >= MIN_BUSY;
    // The busy share is wall time. A role that shares cores with others would be busy for less time on its own cores.
    let used: f64 = shares.iter().map(|share| share.busy * (share.workers * threads(&share.role, config)) as f64).sum();
    let spare = (cores as f64 - used).floor().max(0.0) as usize;
    let percent = |share: f64| (100.0 * share).round();
    let headline = match next {
        _ if !limits => format!(
            "no single bottleneck: no actor works more than {} % of the time, because the actors wait for one another",
            percent(first.busy)
        ),
        Some(next) if gain < EVEN => format!(
            "{} and {} are both bottlenecks: they work {} % and {} % of the time",
            first.role,
            next.role,
            percent(first.busy),
            percent(next.busy)
        ),
        Some(next) => format!(
            "{} is the bottleneck: {} {} % of the time, and no other actor more than {} %",
            first.role,
            if first.workers == 1 { "it works".to_owned() } else { format!("its {} workers work", first.workers) },
            percent(first.busy),
            percent(next.busy)
        ),
        None => {
            format!(
                "{} is the bottleneck: it works {} % of the time, and no other actor works",
                first.role,
                percent(first.busy)
            )
        }
    };
    Some(Diagnosis {
        role: limits.then(|| first.role.clone()),
        share: first.busy,
        gain: if limits { gain } else { 1.0 / first.busy },
        next: next.filter(|_| limits).map(|next| next.role.clone()),
        headline,
        detail: detail.join("; "),
        settings: if limits { relief(first, config, spare) } else { slack(config) },
    })
}

/// Names the server that limits the rate of completions, with the reason: one that is not ready, one that is much slower
/// than another, or the one to which the hand-over of weights takes longest while prompts wait for it.
fn limiting_server(servers: &[ServerReport], shares: &[RoleShare]) -> Option<String> {
    if let Some(out) = servers.iter().find(|server| server.condition != "ready") {
        let why = if out.why.is_empty() { "it has no weights yet" } else { &out.why };
        return Some(format!("{} is {} and samples nothing: {why}", out.name(), out.condition));
    }
    let of = |role: &str| shares.iter().find(|share| share.role == role);
    // Prompts wait for the staleness bound, which opens with a hand-over, and the learner waits for groups.
    let waits = of("prompts").is_some_and(|share| share.admission >= HAND_OVER_LIMITS)
        && of("learn").is_some_and(|share| share.idle >= HAND_OVER_LIMITS)
        && of("rollout").is_some_and(|share| share.idle >= HAND_OVER_LIMITS);
    let took = |server: &&ServerReport| server.hand_over_s.unwrap_or(0.0);
    let handed = servers.iter().filter(|server| server.hand_over_s.is_some());
    if let Some(slow) = handed.max_by(|a, b| took(a).total_cmp(&took(b))).filter(|_| waits) {
        return Some(format!(
            "prompts wait for new weights on the servers: a hand-over to {} takes {:.1} s; raise learner.eta, train adapters (learner.lora), or give rollout.weights_dir a faster disk",
            slow.url,
            took(&slow)
        ));
    }
    // A completion is under way for as long as its tokens take, so that this is the speed of one completion.
    let speed = |server: &&ServerReport| server.tokens_per_s / server.under_way as f64;
    let working = || servers.iter().filter(|server| server.under_way > 0 && server.tokens > 0);
    let slow = working().min_by(|a, b| speed(a).total_cmp(&speed(b)))?;
    let fast = working().max_by(|a, b| speed(a).total_cmp(&speed(b)))?;
    (speed(&slow) < SLOW_SERVER * speed(&fast)).then(|| {
        format!(
            "{} is the slowest: {:.0} tokens/s with {} completions under way, and {} {:.0} tokens/s with {}",
            slow.name(),
            slow.tokens_per_s,
            slow.under_way,
            fast.url,
            fast.tokens_per_s,
            fast.under_way
        )
    })
}

/// Describes the main state of a role that is not the bottleneck.
fn waits(share: &RoleShare) -> String {
    let RoleShare { role, idle, blocked, admission, .. } = share;
    let percent = |share: f64| (100.0 * share).round();
    let most = idle.max(*blocked).max(*admission);
    if share.busy >= most {
        format!("{role} works {} % of the time", percent(share.busy))
    } else if *idle == most {
        format!("{role} waits for input {} % of the time", percent(*idle))
    } else if *blocked == most {
        format!("{role} waits for space in its output queue {} % of the time", percent(*blocked))
    } else {
        format!("{role} waits for the staleness bound {} % of the time", percent(*admission))
    }
}

/// Returns the number of compute threads of one worker of a role.
fn threads(role: &str, config: &Config) -> usize {
    match role {
        "rollout" => config.rollout.threads,
        // The judge computes on its server.
        "label" if is_remote(config) => 0,
        "label" => config.labeler.threads,
        "reward" => config.reward.threads,
        "learn" => config.learner.threads * config.learner.replicas.max(config.learner.devices.len()),
        _ => 0,
    }
}

fn is_remote(config: &Config) -> bool {
    let methods = &config.labeler.methods;
    !methods.is_empty() && methods.iter().all(|method| method.remote.is_some())
}

/// Returns a proposal to change the number at `key`.
fn change(key: &'static str, now: usize, attempt: usize, why: &str) -> Setting {
    Setting { key, now: now.to_string(), attempt: attempt.to_string(), why: why.to_owned() }
}

/// Proposes settings that give the bottleneck role more resources, on a machine with `spare` unused cores.
fn relief(share: &RoleShare, config: &Config, spare: usize) -> Vec<Setting> {
    let role = share.role.as_str();
    let mut settings = match role {
        "rollout" => rollout_relief(config, spare),
        "label" if is_remote(config) => remote_label_relief(config),
        "label" => label_relief(config, spare),
        "reward" if spare > 0 => {
            let threads = config.reward.threads;
            let why = "the reference and the reward model have more threads";
            vec![change("reward.threads", threads, threads + spare, why)]
        }
        "learn" => learn_relief(config, spare),
        _ => Vec::new(),
    };
    if role == "rollout" && config.rollout.engine != EngineKind::Local {
        return settings;
    }
    let may_narrow = config.tolerates_off_policy() && config.rollouts_on_cpu_f32();
    if role == "rollout" && config.rollout.weights == RolloutWeights::F32 && may_narrow {
        settings.push(Setting {
            key: "rollout.weights",
            now: RolloutWeights::F32.word().into(),
            attempt: RolloutWeights::Bf16.word().into(),
            why: "each decode step reads half as many bytes; the importance ratios show the mismatch".into(),
        });
    }
    if spare == 0 && !(role == "label" && is_remote(config)) {
        let key = match role {
            "rollout" => "rollout.threads",
            "label" => "labeler.threads",
            "reward" => "reward.threads",
            _ => "learner.threads",
        };
        let now = threads(role, config);
        let why =
            "all cores are in use: this helps on a machine with more cores, or with threads taken from a waiting actor";
        settings.push(change(key, now, now + 1, why));
    }
    settings
}

fn rollout_relief(config: &Config, spare: usize) -> Vec<Setting> {
    let rollout = &config.rollout;
    if rollout.engine != EngineKind::Local {
        let why = match rollout.engine {
            EngineKind::Workers => {
                "more completions under way on the workers, if they have free slots; otherwise add workers"
            }
            _ => "more completions under way on the servers, if they have room for them; otherwise add servers",
        };
        return vec![change("rollout.slots", rollout.slots, 2 * rollout.slots, why)];
    }
    let mut settings = Vec::new();
    if rollout.slots < MAX_SLOTS {
        let slots = (2 * rollout.slots).min(MAX_SLOTS);
        settings.push(change("rollout.slots", rollout.slots, slots, "more sequences share each read of the weights"));
    }
    if spare > 0 {
        let (workers, threads) = (rollout.workers, rollout.threads);
        settings.push(change("rollout.workers", workers, workers + 1, "another actor samples concurrently"));
        settings.push(change("rollout.threads", threads, threads + spare, "each decode step has more threads"));
    }
    settings
}

fn remote_label_relief(config: &Config) -> Vec<Setting> {
    let labeler = &config.labeler;
    let servers = labeler.methods.iter().filter_map(|method| method.remote.as_ref());
    let most = servers.map(|judge| judge.concurrency).max().unwrap_or(1);
    let workers = labeler.workers;
    vec![
        change("labeler.workers", workers, 2 * workers, "twice as many groups are labeled concurrently"),
        change("labeler.remote.concurrency", most, 2 * most, "more concurrent requests, if the server can serve them"),
    ]
}

fn label_relief(config: &Config, spare: usize) -> Vec<Setting> {
    let labeler = &config.labeler;
    let mut settings = Vec::new();
    if labeler.engine == LabelEngine::Workers {
        let why = "twice as many groups are labeled concurrently, if there are as many workers that label; otherwise add workers";
        settings.push(change("labeler.workers", labeler.workers, 2 * labeler.workers, why));
    } else if spare > 0 {
        let (workers, threads) = (labeler.workers, labeler.threads);
        settings.push(change("labeler.workers", workers, workers + 1, "another labeler judges concurrently"));
        settings.push(change("labeler.threads", threads, threads + spare, "each judgement has more threads"));
    }
    let rationales = labeler.methods.iter().map(|method| method.rationales).max().unwrap_or(1);
    if rationales > 1 {
        let fewer = rationales.div_ceil(2);
        settings.push(change("labeler.rationales", rationales, fewer, "fewer rationales are generated per question"));
    }
    settings
}

fn learn_relief(config: &Config, spare: usize) -> Vec<Setting> {
    let learner = &config.learner;
    let mut settings = Vec::new();
    if learner.activation_checkpointing {
        settings.push(Setting {
            key: "learner.activation_checkpointing",
            now: "true".into(),
            attempt: "false".into(),
            why: "the forward pass is not computed twice, but more memory is used".into(),
        });
    } else if learner.micro_batch > 0 {
        let why = "each forward pass covers a complete group, but more memory is used";
        settings.push(change("learner.micro_batch", learner.micro_batch, 0, why));
    }
    if spare > 0 {
        let (threads, replicas) = (learner.threads, learner.replicas);
        let most = usize::try_from(learner.batch_groups).unwrap_or(usize::MAX);
        if config.policy.device == "cpu" && learner.devices.is_empty() && replicas < most {
            let more = (replicas + spare.div_ceil(threads)).min(most);
            let why = "gradients of more groups are computed at the same time";
            settings.push(change("learner.replicas", replicas, more, why));
        } else {
            settings.push(change("learner.threads", threads, threads + spare, "the gradient has more threads"));
        }
    }
    settings
}

/// Proposes settings with which stages that wait for one another overlap more.
fn slack(config: &Config) -> Vec<Setting> {
    let eta = config.learner.eta;
    let why = if eta == 0 {
        "the next batch is generated while this one is trained on; stale tokens are corrected for"
    } else {
        "a slow group delays its batch less"
    };
    let mut settings =
        vec![Setting { key: "learner.eta", now: eta.to_string(), attempt: (eta + 1).to_string(), why: why.into() }];
    let batch = config.learner.batch_groups;
    if eta > 0 {
        settings.push(Setting {
            key: "learner.batch_groups",
            now: batch.to_string(),
            attempt: (2 * batch).to_string(),
            why: "steps are fewer and larger, so they wait for a slow group less often".into(),
        });
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load;

    fn share(role: &str, busy: f64, blocked: f64, admission: f64) -> RoleShare {
        let idle = 1.0 - busy - blocked - admission;
        RoleShare { role: role.into(), workers: 1, busy, idle, blocked, admission, items_per_s: 1.0 }
    }

    fn config(overrides: &[&str]) -> Config {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/offline.toml");
        load(&path, &overrides.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn a_slow_labeler_is_reported_with_gain_and_settings() {
        let shares = [
            share("prompts", 0.0, 0.1, 0.9),
            share("rollout", 0.3, 0.7, 0.0),
            share("label", 0.96, 0.0, 0.0),
            share("learn", 0.4, 0.0, 0.0),
        ];
        let found = diagnose(&shares, &config(&[]), 4, &[]).unwrap();
        assert_eq!((found.role.as_deref(), found.next.as_deref()), (Some("label"), Some("learn")));
        assert!((found.gain - 2.4).abs() < 1e-9);
        assert!(
            found.headline.contains("label is the bottleneck") && found.headline.contains("96 %"),
            "{}",
            found.headline
        );
        assert!(found.detail.contains("rollout waits for space in its output queue 70 %"), "{}", found.detail);
        assert!(found.detail.contains("prompts waits for the staleness bound 90 %"), "{}", found.detail);
        assert_eq!((found.settings[0].key, found.settings[0].attempt.as_str()), ("labeler.workers", "2"));
        let even = [share("rollout", 0.95, 0.0, 0.0), share("learn", 0.93, 0.0, 0.0)];
        let headline = diagnose(&even, &config(&[]), 4, &[]).unwrap().headline;
        assert_eq!(headline, "rollout and learn are both bottlenecks: they work 95 % and 93 % of the time");
        // Two of two cores are used: more actors would only share them.
        let full = diagnose(&[share("rollout", 0.95, 0.0, 0.0), share("learn", 0.9, 0.0, 0.0)], &config(&[]), 2, &[]);
        let keys: Vec<&str> = full.unwrap().settings.iter().map(|setting| setting.key).collect();
        assert_eq!(keys, ["rollout.slots", "rollout.weights", "rollout.threads"]);
        // Settings that the configuration would refuse, or already has, are not proposed.
        for set in ["learner.correction=none", "policy.dtype=bf16", "rollout.weights=q8_0"] {
            let settings =
                diagnose(&[share("rollout", 0.95, 0.0, 0.0)], &config(&["learner.eta=0", set]), 2, &[]).unwrap();
            assert!(settings.settings.iter().all(|setting| setting.key != "rollout.weights"), "{set}");
        }
    }

    #[test]
    fn more_requests_to_a_server_are_proposed_regardless_of_cores() {
        let remote = ["labeler.type=direct", "labeler.remote={ url = \"http://127.0.0.1:1/v1\", model = \"m\" }"];
        let shares = [share("label", 0.99, 0.0, 0.0), share("rollout", 0.9, 0.0, 0.1), share("learn", 0.9, 0.0, 0.0)];
        let keys: Vec<_> = diagnose(&shares, &config(&remote), 1, &[]).unwrap().settings;
        let keys: Vec<&str> = keys.iter().map(|setting| setting.key).collect();
        assert_eq!(keys, ["labeler.workers", "labeler.remote.concurrency"]);
    }

    #[test]
    fn overlap_is_proposed_for_alternating_stages() {
        let shares = [share("rollout", 0.5, 0.0, 0.5), share("learn", 0.45, 0.0, 0.0)];
        let found = diagnose(&shares, &config(&["learner.eta=0"]), 2, &[]).unwrap();
        assert_eq!((found.role, found.next), (None, None));
        assert_eq!((found.settings[0].key, found.settings[0].attempt.as_str()), ("learner.eta", "1"));
        assert!((found.gain - 2.0).abs() < 1e-9);
        assert_eq!(diagnose(&[share("rollout", 0.0, 0.0, 0.0)], &config(&[]), 2, &[]), None);
    }

    #[test]
    fn the_server_that_limits_is_named() {
        let server = |url: &str, tokens_per_s: f64, hand_over_s: f64| ServerReport {
            url: url.into(),
            condition: "ready",
            why: String::new(),
            version: Some(3),
            under_way: 8,
            completions: 80,
            tokens: 800,
            tokens_per_s,
            canary: Some(1.0),
            hand_over_s: Some(hand_over_s),
        };
        let busy = [share("rollout", 0.97, 0.0, 0.0), share("learn", 0.2, 0.0, 0.0)];
        let detail =
            |servers: &[ServerReport], shares: &[RoleShare]| diagnose(shares, &config(&[]), 2, servers).unwrap().detail;
        let (fast, slow) = (server("http://a:1", 900.0, 0.5), server("http://b:1", 300.0, 9.25));
        let named = detail(&[fast.clone(), slow.clone()], &busy);
        assert!(named.contains("the server http://b:1 is the slowest: 300 tokens/s"), "{named}");
        let even = detail(&[fast.clone(), server("http://c:1", 800.0, 0.5)], &busy);
        assert_eq!(even, "learn waits for input 80 % of the time");
        let waiting = [share("prompts", 0.0, 0.0, 0.9), share("rollout", 0.4, 0.0, 0.0), share("learn", 0.2, 0.0, 0.0)];
        let named = detail(&[fast.clone(), slow.clone()], &waiting);
        assert!(named.contains("a hand-over to http://b:1 takes 9.2 s"), "{named}");
        let away = ServerReport { condition: "down", why: "connection refused".into(), ..slow };
        let named = detail(&[fast, away], &busy);
        assert!(named.contains("http://b:1 is down and samples nothing: connection refused"), "{named}");
    }
}
