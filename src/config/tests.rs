//! Tests of the reader, the writer and the declarations.

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use toml::{Table, Value};

use super::types::Shape;
use super::*;

const MINIMAL: &str =
    "[run]\nname = \"x\"\nsteps = 3\n[data]\npath = \"Cargo.toml\"\n[policy]\nmodel = { scratch = {} }\n";

fn read(text: &str, overrides: &[&str]) -> Result<Config, ConfigErrors> {
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    parse(text, "x.toml", Path::new(env!("CARGO_MANIFEST_DIR")), &overrides)
}

/// Parses `MINIMAL` plus `more`, and expects one error line for each of `expected`, in order, that begins with it.
#[track_caller]
fn check(more: &str, expected: &[&str]) {
    let errors = read(&format!("{MINIMAL}{more}"), &[]).expect_err("it should be refused");
    let lines: Vec<String> = errors.0.iter().map(|e| format!("{}: {}: {}", e.place, e.key, e.message)).collect();
    assert_eq!(lines.len(), expected.len(), "{lines:#?}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line:?} does not begin with {expected:?}");
    }
}

#[test]
fn mistakes_beyond_fifty_are_counted_and_long_messages_are_truncated() {
    let many: String = (0..50_000).map(|i| format!("k{i} = 1\n")).collect();
    let began = crate::util::process::thread_seconds();
    let errors = read(&format!("{MINIMAL}[learner]\n{many}"), &[]).unwrap_err();
    assert_eq!((errors.0.len(), errors.0[50].message.as_str()), (51, "and 49950 more mistakes"));
    let long = "x".repeat(100_000);
    let errors = read(&format!("{MINIMAL}[learner]\neta = \"{long}\"\n{long} = 1\n"), &[]).unwrap_err();
    assert!(errors.to_string().len() < 3000, "{errors}");
    let deep = format!("learner{}=1", ".a".repeat(50_000));
    let errors = read(MINIMAL, &[&deep]).unwrap_err().to_string();
    assert!(errors.contains("is not section.key=value") && errors.len() < 500, "{errors}");
    assert!(
        crate::util::process::thread_seconds() - began < 20.0,
        "the time must not grow with mistakes times file size, or with the square of the number of keys"
    );
}

#[test]
fn excessive_sizes_are_refused() {
    for (section, key) in [
        ("learner", "batch_groups"),
        ("learner", "eta"),
        ("learner", "epochs"),
        ("learner", "minibatches"),
        ("rollout", "capacity"),
        ("rollout", "group_size"),
        ("rollout", "max_new_tokens"),
        ("reward", "capacity"),
        ("labeler", "rationale_tokens"),
        ("reward_model", "batch_pairs"),
        ("reward_model", "warm_up_groups"),
        ("sft", "steps"),
        ("sft", "batch"),
    ] {
        let error = read(&format!("{MINIMAL}[{section}]\n{key} = 9223372036854775807\n"), &[]).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(&format!("{section}.{key}: 9223372036854775807 is out of range")), "{error}");
    }
    for (key, set) in [
        ("heads", "policy.model.scratch.heads=9223372036854775807"),
        ("hidden", "policy.model.scratch.hidden=9223372036854775807"),
        ("rank", "policy.lora.rank=9223372036854775807"),
        ("resolve_timeout_s", "policy.resolve_timeout_s=9223372036854775807"),
        ("steps", "run.steps=9223372036854775807"),
        ("max_prompt_tokens", "data.max_prompt_tokens=9223372036854775807"),
    ] {
        let error = read(MINIMAL, &[set]).unwrap_err().to_string();
        assert!(error.contains(&format!("{key}: 9223372036854775807 is out of range")), "{error}");
    }
}

#[test]
fn each_mistake_is_reported_with_its_place_and_remedy() {
    check("[learner]\netta = 1\n", &["x.toml:9: learner.etta: unknown key; did you mean \"eta\"?"]);
    check("[lerner]\neta = 1\n", &["x.toml:8: lerner: unknown section; did you mean \"learner\"?"]);
    check("[learner]\neta = \"1\"\n", &["x.toml:9: learner.eta: \"1\" is not a non-negative integer"]);
    check("[learner]\neta = -1\n", &["x.toml:9: learner.eta: -1 is not a non-negative integer"]);
    check("[rollout]\ntemperature = 0\n", &["x.toml:9: rollout.temperature: 0 is out of range; it must be above 0"]);
    for (key, value) in [("cot", "true"), ("shots", "2"), ("rationales", "3"), ("both_orders", "false")] {
        let line = format!("[labeler]\n{key} = {value}\nrationale_temperature = 0.5\n");
        check(&line, &[&format!("x.toml:9: labeler.{key}: serves type = \"pairwise\" only")]);
    }
    check("[labeler]\ntype = \"direct\"\nlength_normalise = true\n", &["x.toml:10: labeler.length_normalise"]);
    check(
        "[labeler]\ntype = \"direct\"\nunconditional_weight = 0\n",
        &["x.toml:10: labeler.unconditional_weight: serves type = \"likelihood\" only"],
    );
    check("[labeler]\nunconditional_weight = 1.5\n", &["x.toml:9: labeler.unconditional_weight: 1.5 is out of range"]);
    check(
        "[learner]\nalgorithm = \"rlo\"\n",
        &[
            "x.toml:9: learner.algorithm: \"rlo\" is not one of rloo, reinforce, ppo, grpo, online-dpo; did you mean \"rloo\"?",
        ],
    );
    check("[rollout]\nslots = 65\n", &["x.toml:9: rollout.slots: is 65, but a rollout actor on a CPU has at most 64"]);
    check(
        "[learner]\n# off-policy\ncorrection = \"none\"\n",
        &["x.toml:10: learner.correction: \"none\" with learner.eta = 1"],
    );
    check("[evaluation]\nevery_steps = 5\n", &["x.toml:9: evaluation.every_steps: needs held-out prompts"]);
    for weights in ["bf16", "q8_0"] {
        check(
            &format!("[rollout]\nweights = \"{weights}\"\n[learner]\neta = 0\ncorrection = \"none\"\n"),
            &[&format!("x.toml:12: learner.correction: \"none\" with rollout.weights = \"{weights}\" would train")],
        );
    }
    check(
        "[reward]\nreference = false\n",
        &["x.toml:9: reward.reference: must be true: reward.kl_coef = 0.05 needs it; set that to 0"],
    );
    check(
        "lora = { ranks = 2, targets = [\"q\"] }\n",
        &["x.toml:8: policy.lora: targets: \"q\" is not one of q_proj", "x.toml:8: policy.lora: ranks: unknown key"],
    );
    check("[serve]\nlisten = \"0.0.0.0:1\"\n", &["x.toml:9: serve.listen: 0.0.0.0:1 can be reached"]);
    // A value in place of a variable's name may be the secret, so it is not repeated.
    let secret = "[serve]\nlisten = \"0.0.0.0:1\"\ntoken_env = \"sk-0123\"\n";
    check(secret, &["x.toml:10: serve.token_env: must be the name of an environment variable"]);
    let secret = "[labeler]\ntype = \"direct\"\nremote = { url = \"http://me:sk-0@h\", model = \"m\" }\n";
    check(
        secret,
        &["x.toml:10: labeler.remote: url: contains a user name or a password, which would be written to logs"],
    );
    let secret =
        "[labeler]\ntype = \"direct\"\nremote = { url = \"http://h\", model = \"m\", api_key_env = \"sk-0\" }\n";
    check(secret, &["x.toml:10: labeler.remote: api_key_env: must be the name of an environment variable"]);
    check("[serve]\nhosts = [\"http://a.test\"]\n", &["x.toml:9: serve.hosts: \"http://a.test\" is not a host name"]);
    check("[serve]\nlisten = \"here\"\n", &["x.toml:9: serve.listen: \"here\" is not IP:PORT"]);
    check("[supervision]\nbackoff_s = -1\n", &["x.toml:9: supervision.backoff_s: -1 is out of range"]);
    check(
        "[[labeler.members]]\ntype = \"direct\"\n[labeler]\n",
        &["x.toml:8: labeler.members: are allowed in a panel only"],
    );
    check(
        "[labeler]\ntype = \"panel\"\n[[labeler.members]]\ntype = \"direct\"\nshot = 1\n",
        &["x.toml:12: labeler.members: [0].shot: unknown key; did you mean \"shots\"?"],
    );
    check("[labeler]\ntype = \"panel\"\n", &["x.toml:8: labeler.members: is missing or empty"]);
    check(
        "[learner]\nalgorithm = \"online-dpo\"\n",
        &["x.toml:9: learner.algorithm: \"online-dpo\" learns from pairs"],
    );
    check(
        "[labeler]\ntemplates = \"poems\"\n",
        &["x.toml:9: labeler.templates: \"poems\" is not one of summarization"],
    );
    check(
        "[labeler]\ntype = \"direct\"\nremote = { url = \"h\", api = \"char\" }\n",
        &[
            "x.toml:10: labeler.remote: url: \"h\" is not a URL",
            "x.toml:10: labeler.remote: model: is missing",
            "x.toml:10: labeler.remote: api: \"char\" is not one of chat, completions; did you mean \"chat\"?",
        ],
    );
    check(
        "[labeler]\nremote = { url = \"http://h\", model = \"m\" }\n",
        &["x.toml:9: labeler.remote: serves type = \"direct\" and \"pairwise\" only"],
    );
    check("labeler = 3\n", &["x.toml:8: policy.labeler: unknown key"]);
}

#[test]
fn all_mistakes_are_reported_at_once_and_none_twice() {
    check(
        "[rollout]\ntemprature = 1\ngroup_size = 1\n[learner]\neta = \"zero\"\ncorrection = \"none\"\n",
        &["x.toml:9: rollout.temprature", "x.toml:10: rollout.group_size", "x.toml:12: learner.eta"],
    );
    let errors = read("", &[]).expect_err("required keys are missing");
    let keys: Vec<&str> = errors.0.iter().map(|error| error.key.as_str()).collect();
    assert_eq!(keys, ["run.name", "run.steps", "data.path", "policy.model"]);
    let errors = read("[run\n", &[]).expect_err("not TOML");
    assert_eq!(errors.0[0].place, "x.toml:1");
}

#[test]
fn overrides_are_applied_before_validation() {
    let config = read(MINIMAL, &["learner.eta=0", "learner.correction=none", "run.name=other"]).unwrap();
    assert_eq!((config.learner.eta, config.run.name.as_str()), (0, "other"));
    assert_eq!(read(MINIMAL, &["policy.model={ scratch = { hidden = 128 } }"]).unwrap(), {
        read(MINIMAL, &["policy.model.scratch.hidden=128"]).unwrap()
    });
    for (text, expected) in [
        ("learner.eta=-1", "--set: learner.eta"),
        ("eta", "--set: \"eta\""),
        ("learner.etta=1", "--set: learner.etta"),
        ("learner.eta=1\nlr=2", "--set: learner.eta: its value is followed by another line"),
        ("learner.eta=1\n[learner]\nlr = 2", "--set: learner.eta: its value is followed by another line"),
        ("learner.eta=1 # one", "--set: learner.eta: its value is followed by a comment"),
        ("run.steps.x=1", "--set: run.steps: run.steps has the type integer and no keys below it"),
        ("run.name=", "--set: run.name"),
    ] {
        let errors = read(MINIMAL, &[text]).expect_err("it should be refused").to_string();
        assert!(errors.contains(expected), "{errors}");
    }
}

#[test]
fn the_resolved_configuration_reads_back_unchanged() {
    let more = "[labeler]\nmodel = [\"a.gguf\", { pip = \"m==1\" }, { hub = \"o/n\", revision = \"r\" }]\nchat = false\n[reward]\nclip = 0\n";
    let panel = "[labeler]\ntype = \"panel\"\npairs = \"all\"\n[[labeler.members]]\ntype = \"pairwise\"\ncot = true\n[[labeler.members]]\nweight = 2\ntype = \"direct\"\nremote = { url = \"http://h/v1\", model = \"m\", hedge_after_s = 2 }\n";
    let lora = "lora = { rank = 4, targets = [\"v_proj\"] }\n";
    for more in ["", lora, more, panel] {
        let text = format!("{MINIMAL}{more}");
        let config = read(&text, &[]).unwrap();
        assert_eq!(read(&config.to_toml(), &[]).unwrap(), config);
    }
}

/// `[labeler]` with a remote judge, as a table.
const REMOTE: &str = "labeler.remote={ url = \"http://127.0.0.1:1/v1\", model = \"m\" }";

/// Returns the value of the key at `path` in a resolved configuration.
fn value_at(config: &Config, path: &str) -> Option<Value> {
    let mut value = Value::Table(config.to_toml().parse::<Table>().unwrap());
    for step in path.split('.') {
        value = value.get(step)?.clone();
    }
    Some(value)
}

/// Returns overrides under which the key at `path` is allowed.
fn around(path: &str) -> Vec<&'static str> {
    match path {
        _ if path.starts_with("labeler.remote") => vec!["labeler.type=direct", REMOTE],
        "labeler.members" => vec!["labeler.type=panel"],
        _ if path.starts_with("evaluation.labeler.remote") => {
            vec!["evaluation.labeler.type=direct", "evaluation.labeler.remote={ url = \"http://h/v1\", model = \"m\" }"]
        }
        "evaluation.labeler.members" => vec!["evaluation.labeler.type=panel"],
        "evaluation.labeler.rationales" => vec!["evaluation.labeler.rationale_temperature=0.5"],
        _ if path.starts_with("evaluation.labeler.") => vec!["evaluation.labeler={}"],
        "learner.minibatches" => vec!["learner.batch_groups=1000000"],
        "rollout.servers" => vec!["rollout.engine=vllm"],
        "cluster.nats" => vec!["rollout.engine=workers"],
        "cluster.part" => vec!["rollout.engine=workers", "cluster.nats=nats://h:1"],
        "labeler.engine" => vec!["rollout.engine=workers", "cluster.nats=nats://h:1"],
        "cluster.tls_certificate" => vec!["cluster.tls_key=key.pem"],
        "cluster.tls_key" => vec!["cluster.tls_certificate=certificate.pem"],
        "rollout.devices" => vec!["rollout.workers=8"],
        "learner.devices" => vec!["policy.device=cuda:0"],
        "evaluation.every_steps" => vec!["data.holdout=0.5"],
        "labeler.rationales" => vec!["labeler.rationale_temperature=0.5"],
        "labeler.max_cost" => vec!["labeler.type=direct", REMOTE, "labeler.remote.price_prompt=1.0"],
        "reward.reference" | "rollout.weights" => vec!["reward.kl_coef=0"],
        _ => Vec::new(),
    }
}

#[test]
fn the_documented_default_of_each_key_is_the_reader_s_default() {
    let mut compared = 0;
    for (path, key) in keys() {
        let Some(default) = &key.default_value else { continue };
        let mut overrides = around(path);
        overrides.retain(|text| text.split('=').next() != Some(path.as_str()));
        if path == "rollout.servers" {
            // Without servers, this process samples.
            overrides.clear();
        }
        if path.starts_with("policy.lora.") {
            overrides.push("policy.lora={}");
        }
        let config = read(MINIMAL, &overrides).unwrap();
        assert_eq!(value_at(&config, path).as_ref(), Some(default), "{path}");
        compared += 1;
    }
    assert!(compared > 120, "{compared}");
    // Defaults that depend on another key.
    for (set, path, expected) in [
        ("learner.algorithm=rloo", "learner.clip", "0.0"),
        ("learner.algorithm=ppo", "learner.clip", "0.2"),
        ("learner.algorithm=grpo", "learner.clip", "0.2"),
        ("learner.clip=0.3", "learner.clip_high", "0.3"),
        ("learner.algorithm=ppo", "learner.average", "\"token-mean\""),
        ("learner.algorithm=grpo", "learner.average", "\"sequence-mean\""),
        ("learner.algorithm=rloo", "learner.average", "\"sequence-sum\""),
        ("learner.algorithm=ppo", "learner.whiten_advantages", "true"),
        ("learner.algorithm=grpo", "learner.whiten_advantages", "false"),
        ("reward.kl=loss", "reward.kl_estimator", "\"k3\""),
        ("reward.kl=reward", "reward.kl_estimator", "\"k1\""),
        ("policy.lora={ rank = 3 }", "policy.lora.alpha", "6.0"),
    ] {
        let config = read(MINIMAL, &[set]).unwrap();
        assert_eq!(value_at(&config, path).unwrap().to_string(), expected, "{set} {path}");
    }
}

#[test]
fn each_key_has_a_description_and_a_valid_example() {
    for (path, key) in keys() {
        assert!(key.doc.ends_with('.') && key.doc.contains(char::is_uppercase), "{path}: {:?}", key.doc);
        let example = key.example.as_ref().unwrap_or_else(|| panic!("{path} has no example"));
        let set = format!("{path}={example}");
        let mut overrides = around(path);
        overrides.push(&set);
        if let Err(errors) = read(MINIMAL, &overrides) {
            // Files that an example names do not exist here.
            let missing = errors.0.iter().all(|error| error.message.contains("there is no file"));
            assert!(missing, "{set}: {errors}");
        }
    }
}

/// Returns a random value for a key, which is not always valid: every third time the example, else one of its type.
fn random(key: &Key, rng: &mut ChaCha8Rng) -> Value {
    if let Some(example) = key.example.as_ref().filter(|_| rng.random_range(0..3) == 0) {
        return format!("v = {example}").parse::<Table>().unwrap().remove("v").unwrap();
    }
    let texts = ["Cargo.toml", "a b", "ä \"quoted\"\n\\", "7", "cpu", "q_proj", "node.example", "X_1", "http://h/v1"];
    let text = |rng: &mut ChaCha8Rng| Value::String(texts[rng.random_range(0..texts.len())].to_owned());
    // Files that exist.
    if key.name == "ca_file" {
        return Value::String("Cargo.toml".to_owned());
    }
    if matches!(key.shape, Shape::Data) {
        let one = "v = \"Cargo.toml\"";
        let text = if rng.random() { one } else { "v = [\"Cargo.*\", { hub = \"o/n\", split = \"test\" }]" };
        return text.parse::<Table>().unwrap()["v"].clone();
    }
    let low = key.range.and_then(|range| range.low).map_or(0.0, |(low, _)| low);
    let high = key.range.and_then(|range| range.high).map_or(low + 100.0, |(high, _)| high);
    match &key.shape {
        Shape::Boolean => Value::Boolean(rng.random()),
        Shape::Whole => Value::Integer(rng.random_range(low..=high) as i64),
        Shape::Number => Value::Float(rng.random_range(low..=high)),
        Shape::Text => text(rng),
        Shape::Texts => Value::Array((0..rng.random_range(0..3)).map(|_| text(rng)).collect()),
        Shape::Wholes => Value::Array((0..3).map(|_| Value::Integer(rng.random_range(0..1000))).collect()),
        Shape::NamedTexts => "v = { x-a = \"b\" }".parse::<Table>().unwrap()["v"].clone(),
        Shape::Anything => "v = { a = [1, { b = 0.5 }], c = true }".parse::<Table>().unwrap()["v"].clone(),
        Shape::Word(words) => Value::String(words[rng.random_range(0..words.len())].0.to_owned()),
        Shape::Data => Value::String("Cargo.toml".to_owned()),
        Shape::Model(_) => {
            "v = [{ pip = \"m==1\", file = \"f\" }, { path = \"/p\" }]".parse::<Table>().unwrap()["v"].clone()
        }
        Shape::Table(keys) => Value::Table(keys().iter().map(|key| (key.name.to_owned(), random(key, rng))).collect()),
        Shape::Tables(keys) => {
            let member = |rng: &mut ChaCha8Rng| {
                // Without the keys that name files.
                let left_out = ["templates", "preamble", "remote"];
                let keys = keys().into_iter().filter(|key| !left_out.contains(&key.name));
                Value::Table(keys.map(|key| (key.name.to_owned(), random(&key, rng))).collect())
            };
            Value::Array((0..2).map(|_| member(rng)).collect())
        }
    }
}

/// Builds each configuration key by key from random values, and keeps the accepted values.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_random_configuration_reads_back_unchanged() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut ever = std::collections::HashSet::new();
    for round in 0..60 {
        let mut sets: Vec<String> = match round % 3 {
            0 => vec![],
            1 => vec![
                "labeler.type=\"pairwise\"".into(),
                REMOTE.into(),
                "evaluation.labeler.type=\"pairwise\"".into(),
                format!("evaluation.{REMOTE}"),
                "rollout.engine=\"workers\"".into(),
                "cluster.nats=\"nats://h:1\"".into(),
                "cluster.tls_certificate=\"c\"".into(),
                "cluster.tls_key=\"k\"".into(),
            ],
            _ => vec![
                "labeler.type=\"panel\"".into(),
                "labeler.members=[{ type = \"direct\" }]".into(),
                "evaluation.labeler={ type = \"panel\", members = [{ type = \"direct\" }] }".into(),
            ],
        };
        let mut kept: Vec<(&str, Value)> = Vec::new();
        // Two passes, because some keys are only accepted together with others.
        for (path, key) in keys().iter().chain(keys()) {
            if rng.random_range(0..3) == 0 || path == "labeler.type" {
                continue;
            }
            let value = random(key, &mut rng);
            sets.push(format!("{path}={value}"));
            let given: Vec<&str> = sets.iter().map(String::as_str).collect();
            if read(MINIMAL, &given).is_ok() {
                kept.retain(|(known, _)| *known != path && !known.starts_with(&format!("{path}.")));
                kept.push((path, value));
            } else {
                sets.pop();
            }
        }
        let given: Vec<&str> = sets.iter().map(String::as_str).collect();
        let config = read(MINIMAL, &given).unwrap();
        for text in [config.to_toml(), config.to_file()] {
            assert_eq!(read(&text, &[]).unwrap(), config, "{text}");
        }
        for (path, value) in kept {
            let written = value_at(&config, path);
            let resolved = matches!(value, Value::String(_)) && written.as_ref().is_some_and(Value::is_str);
            // Paths are written as absolute paths, and a table includes the defaults of absent keys.
            let model = matches!(key(path).unwrap().shape, Shape::Model(_));
            if !model && !resolved && !value.is_table() && !value.is_array() {
                assert_eq!(written.as_ref(), Some(&value), "{path}");
            }
            ever.insert(path);
        }
    }
    let never: Vec<&str> = keys().iter().map(|(path, _)| path.as_str()).filter(|path| !ever.contains(path)).collect();
    assert_eq!(never, ["labeler.type"], "no random value was accepted of {never:?}");
}

#[test]
fn the_printed_configuration_has_every_key() {
    let file = read(MINIMAL, &["labeler.type=direct", REMOTE, "policy.lora={}"]).unwrap().to_file();
    for (path, key) in keys() {
        let (around, name) = path.rsplit_once('.').unwrap();
        let inside = around.contains('.');
        let named =
            |line: &str| line.starts_with(&format!("{name} = ")) || line.starts_with(&format!("# {name}: not set"));
        let there = if inside {
            file.contains(&format!("{name} = ")) || key.default_value.is_none()
        } else {
            file.lines().any(named)
        };
        assert!(there || path == "labeler.members", "{path} is not in {file}");
    }
}

#[test]
fn an_override_is_read_by_the_type_of_its_key() {
    let set = |overrides: &[&str]| read(MINIMAL, overrides);
    let config = set(&["run.name=7", "data.system=true", "data.instruction={{ prompt }} # 1"]).unwrap();
    assert_eq!(
        (config.run.name.as_str(), config.data.system.as_deref(), config.data.instruction.as_str()),
        ("7", Some("true"), "{{ prompt }} # 1")
    );
    assert_eq!(set(&["data.system=\"quoted\""]).unwrap().data.system.as_deref(), Some("quoted"));
    assert_eq!(set(&["policy.model=3"]).unwrap().policy.model, set(&["policy.model=\"3\""]).unwrap().policy.model);
    let panel = [
        "labeler.type=panel",
        "labeler.members=[{ type = \"pairwise\" }]",
        "labeler.members.0.weight=2",
        "labeler.members[1].type=direct",
    ];
    let labeler = set(&panel).unwrap().labeler;
    let members: Vec<_> = labeler.methods.iter().map(|method| (method.kind, method.weight)).collect();
    assert_eq!(members, [(LabelerKind::Pairwise, 2.0), (LabelerKind::Direct, 1.0)]);
    let (members, more) = (&panel[..2], |one| [&panel[..2], &[one][..]].concat());
    assert!(set(members).is_ok());
    for (overrides, expected) in [
        (
            more("labeler.members.7.weight=2"),
            "--set: labeler.members: labeler.members has 1 elements; the next index is 1",
        ),
        (
            more("labeler.members.first.weight=2"),
            "--set: labeler.members: labeler.members is a list; address its elements by index",
        ),
        (more("labeler.members.0.wait=2"), "--set: labeler.members: [0].wait: unknown key; did you mean \"weight\"?"),
        (vec!["policy.model.scrach.hidden=8"], "--set: policy.model: scrach: cannot be given together with scratch"),
        (
            vec!["policy.model.scratch.hiden=8"],
            "--set: policy.model: scratch.hiden: unknown key; did you mean \"hidden\"?",
        ),
        (vec!["rollout.stop=[a, b]"], "--set 'rollout.stop=[\"a\", \"b\"]'"),
        (vec!["rollout.stop=END"], "--set 'rollout.stop=[\"a\", \"b\"]'"),
        (vec!["labeler.remote={ url = http://h }"], "--set 'labeler.remote={ url = \"…\" }'"),
        (vec!["policy.model={ pip = m==1 }"], "--set 'policy.model={ pip = \"name==version\" }'"),
    ] {
        let errors = set(&overrides).expect_err("it should be refused").to_string();
        assert!(errors.contains(expected), "{overrides:?}: {errors}");
    }
}

#[test]
fn a_secret_in_place_of_a_variable_name_is_never_repeated() {
    for value in ["\"sk-0123\"", "[\"sk-0123\"]", "{ key = \"sk-0123\" }"] {
        for more in [
            format!("[serve]\ntoken_env = {value}\n"),
            format!(
                "[labeler]\ntype = \"direct\"\nremote = {{ url = \"http://h\", model = \"m\", api_key_env = {value} }}\n"
            ),
        ] {
            let errors = read(&format!("{MINIMAL}{more}"), &[]).unwrap_err().to_string();
            assert!(!errors.contains("sk-0123"), "{errors}");
        }
    }
    let url = "[labeler]\ntype = \"direct\"\nremote = { url = \"me:sk-0123@h\", model = \"m\" }\n";
    let errors = read(&format!("{MINIMAL}{url}"), &[]).unwrap_err().to_string();
    assert!(!errors.contains("sk-0123"), "{errors}");
}

#[test]
fn a_mistake_is_reported_at_its_own_line() {
    check("lora.rnak = 3\n", &["x.toml:8: policy.lora: rnak: unknown key"]);
    check("[learner]\n\"eta\" = \"1\"\n", &["x.toml:9: learner.eta: \"1\" is not a non-negative integer"]);
    check(
        "[data.more]\n[rollout]\nstop = [\n\"[learner]\",\n1]\n[learner]\neta = \"1\"\n",
        &["x.toml:8: data.more: unknown key", "x.toml:10: rollout.stop", "x.toml:14: learner.eta"],
    );
    check(
        "[labeler]\ntype = \"panel\"\n[[labeler.members]]\n[[labeler.members]]\nweight = 0\n[labeler.members.remote]\nurl = \"h\"\nmodel = \"m\"\n",
        &[
            "x.toml:12: labeler.members: [1].weight: 0 is out of range",
            "x.toml:13: labeler.members: [1].remote: serves type",
            "x.toml:14: labeler.members: [1].remote.url: \"h\" is not a URL",
        ],
    );
}

#[test]
fn keys_that_servers_cannot_follow_are_refused() {
    let errors = |rollout: &str, more: &str| {
        read(&format!("{MINIMAL}{more}\n[rollout]\n{rollout}\n"), &[])
            .err()
            .map_or(String::new(), |errors| errors.to_string())
    };
    let served = "engine = \"vllm\"\nservers = [\"http://h:1\"]\n";
    for (rollout, more, words) in [
        ("top_k = 5", "", "rollout.top_k: is not available"),
        ("top_p = 0.9", "", "rollout.top_p: is not available"),
        ("min_p = 0.1", "", "rollout.min_p: is not available"),
        ("repetition_penalty = 1.1", "", "rollout.repetition_penalty: is not available"),
        ("weights = \"bf16\"", "", "rollout.weights: has no effect"),
        ("workers = 2", "", "rollout.workers: has no effect"),
        ("slots = 4", "", "rollout.slots: is 4, but the 8 completions of a group"),
        ("", "lora = {}\n[sft]\nsteps = 2", "sft.steps: fine-tunes the weights below the adapters"),
        (
            "",
            "[learner]\ncorrection = \"none\"\neta = 0\nclip = 0.0",
            "learner.correction: \"none\" with rollout.engine",
        ),
    ] {
        let errors = errors(&format!("{served}{rollout}"), more);
        assert!(errors.contains(words), "{rollout} {more}: {errors}");
    }
    assert_eq!(errors(&format!("{served}slots = 512"), ""), "");
    for (rollout, words) in [
        ("slots = 65", "on a CPU has at most 64"),
        ("servers = [\"http://h:1\"]", "rollout.servers: has no effect with rollout.engine = \"local\""),
        ("engine = \"vllm\"", "rollout.servers: is missing"),
        ("engine = \"vllm\"\nservers = [\"http://h:1\", \"http://h:1/v1\"]", "lists http://h:1 twice"),
        ("engine = \"vllm\"\nservers = [\"h:1\"]", "must begin with http://"),
    ] {
        let errors = errors(rollout, "");
        assert!(errors.contains(words), "{rollout}: {errors}");
    }
}

#[test]
fn workers_require_a_nats_server_and_nothing_of_rollouts_here() {
    let errors = |rollout: &str, cluster: &str| {
        read(&format!("{MINIMAL}\n[rollout]\n{rollout}\n[cluster]\n{cluster}\n"), &[])
            .err()
            .map_or(String::new(), |errors| errors.to_string())
    };
    let (engine, nats) = ("engine = \"workers\"\n", "nats = \"nats://broker:4222\"\n");
    assert_eq!(errors(&format!("{engine}slots = 512\nweights = \"bf16\"\ntop_k = 5"), nats), "");
    for (rollout, cluster, words) in [
        (engine, "", "cluster.nats: is missing"),
        ("", nats, "cluster.nats: \"nats://broker:4222\" has no effect with rollout.engine = \"local\""),
        (engine, "nats = \"broker:4222\"", "cluster.nats: must begin with nats://"),
        (engine, "nats = \"nats://me:secret@broker\"", "cluster.nats: must not contain a password"),
        (engine, "nats = \"nats://a:1,nats://:4\"", "has no host name"),
        ("engine = \"workers\"\nworkers = 2", nats, "rollout.workers: has no effect"),
        ("engine = \"workers\"\nslots = 4", nats, "rollout.slots: is 4"),
        ("engine = \"workers\"\nservers = [\"http://h:1\"]", nats, "rollout.servers: has no effect"),
        (engine, "nats = \"nats://b:1\"\nrun = \"a.b\"", "cluster.run: \"a.b\" must consist of"),
        (engine, "nats = \"nats://b:1\"\ntls_key = \"k\"", "cluster.tls_certificate: is missing"),
        (engine, "nats = \"nats://b:1\"\nlease_s = 1", "cluster.lease_s"),
        (engine, "nats = \"nats://b:1\"\npart = 0", "cluster.part: must be 1 at least"),
        (engine, "nats = \"nats://b:1\"\nslowest = 1.0", "cluster.slowest: must be 0 or 1.5 at least"),
        ("[labeler]\nengine = \"workers\"", "", "cluster.nats: is missing; with labeler.engine"),
        ("[labeler]\nengine = \"workers\"\ndevice = \"cuda:0\"", nats, "labeler.device: has no effect"),
        ("[labeler]\nengine = \"workers\"", "nats = \"nats://b:1\"\npart = 2", "cluster.part: has no effect"),
        (
            "[labeler]\nengine = \"workers\"\ntype = \"direct\"\nremote = { url = \"http://h:1/v1\", model = \"j\" }",
            nats,
            "labeler.engine: is \"workers\", but no judge",
        ),
        (
            "engine = \"workers\"\ngroup_size = 64\nslots = 64\nmax_new_tokens = 4096",
            nats,
            "rollout.max_new_tokens: 4096 tokens in each of 64 completions",
        ),
    ] {
        let errors = errors(rollout, cluster);
        assert!(errors.contains(words), "{rollout} {cluster}: {errors}");
    }
    let without_labels =
        ["run.mode=human", "reward_model.pairs=Cargo.toml", "labeler.engine=workers", "cluster.nats=nats://h:1"];
    let errors = read(MINIMAL, &without_labels).unwrap_err().to_string();
    assert!(errors.contains("labeler.engine: is \"workers\", but this run asks no labeler"), "{errors}");
}

/// A command that does not read the prompts accepts a configuration whose data are missing, and still refuses a value
/// that names no data.
#[test]
fn data_that_a_command_does_not_use_may_be_missing() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |more: &str, unused| parse_partial(&format!("{MINIMAL}{more}"), ("x.toml", folder), &[], unused);
    let pairs = "[reward_model]\npairs = \"none.jsonl\"\n";
    let error = read(pairs, &[]).unwrap_err().to_string();
    assert!(error.contains("reward_model.pairs: there is no file or folder"), "{error}");
    let config = read(pairs, &["data.path", "reward_model.pairs"]).unwrap();
    assert_eq!(config.reward_model.pairs.unwrap().to_string(), folder.join("none.jsonl").display().to_string());
    assert!(read("[reward_model]\npairs = 1\n", &["reward_model.pairs"]).is_err());
}
