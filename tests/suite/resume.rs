//! Tests with real processes of runs that are killed, resumed, refused and replayed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use crate::common::{PATIENCE, config, metrics, preceptor, resume, stderr, train, trained, training, wait_until};
use crate::mock_judge::{MockJudge, varied};

/// Starts a small run in `dir/run` and kills it once `after` steps are in its metrics and a checkpoint exists. Its
/// source of prompts hangs after four steps or more, so that the run cannot end before it is killed.
fn killed(dir: &Path, overrides: &[&str], after: usize) {
    let mut command = training(dir, overrides);
    command.env("FAILPOINTS", "prompts.next=24*off->sleep(3600000)");
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    wait_until("steps and a checkpoint", || {
        let steps = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap_or_default().lines().count();
        let checkpoints = std::fs::read_dir(dir.join("run/checkpoints")).into_iter().flatten().flatten();
        let complete = checkpoints.filter(|entry| entry.file_name().to_string_lossy().starts_with("step-")).count();
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be killed");
        steps >= after && complete > 0
    });
    // SIGKILL.
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Returns every tensor file below `dir`, by name.
fn tensors(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "safetensors") {
                all.insert(path.strip_prefix(dir).unwrap().to_owned(), std::fs::read(&path).unwrap());
            }
        }
    }
    all
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn at_eta_zero_a_killed_and_resumed_run_equals_an_uninterrupted_one() {
    let distilled = ["run.mode=distilled", "reward_model.batch_pairs=7", "reward_model.warm_up_groups=6"];
    let preference = ["run.mode=preference", "learner.algorithm=online-dpo", "labeler.pairs=all"];
    let ppo = ["learner.algorithm=ppo", "learner.epochs=2", "learner.minibatches=2", "learner.value_model=model"];
    for overrides in [
        &[][..],
        &[&distilled[..], &["checkpoint.dtype=bf16", "rollout.workers=2", "labeler.workers=2"]].concat(),
        &[&preference[..], &["policy.lora={ rank = 4 }"]].concat(),
        &[&ppo[..], &["checkpoint.dtype=bf16", "reward.kl=loss", "learner.whiten_advantages=true"]].concat(),
        &["policy.lora={ rank = 4 }", "sft.steps=3", "sft.batch=2", "sft.lr=1e-2"],
        &["sft.steps=3", "sft.batch=2", "sft.lr=1e-3", "learner.algorithm=grpo"],
        &[&distilled[..], &ppo[..], &["policy.dtype=bf16", "policy.lora={ rank = 4 }", "rollout.slots=1"]].concat(),
    ] {
        let common = ["run.steps=9", "learner.eta=0", "checkpoint.every_steps=2", "checkpoint.keep=9"];
        let overrides = [&common[..], overrides].concat();
        let (uninterrupted, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let output = train(uninterrupted.path(), &overrides);
        assert!(output.status.success(), "{overrides:?}: {}", stderr(&output));
        killed(broken.path(), &overrides, 3);
        let output = resume(broken.path(), &overrides);
        assert!(output.status.success(), "{overrides:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("resuming  run/checkpoints/step-00000"), "{}", stderr(&output));
        let (uninterrupted, broken) = (uninterrupted.path().join("run"), broken.path().join("run"));
        assert_eq!(metrics(&uninterrupted), metrics(&broken), "{overrides:?}");
        for file in ["samples.jsonl", "phases.jsonl", "journal.bin"] {
            let read = |run: &Path| std::fs::read(run.join(file)).unwrap();
            assert!(read(&uninterrupted) == read(&broken), "{file} of {overrides:?}");
        }
        let last = "checkpoints/step-000009";
        let (a, b) = (tensors(&uninterrupted.join(last)), tensors(&broken.join(last)));
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (name, bytes) in &a {
            assert!(b[name] == *bytes, "{} differs, {overrides:?}", name.display());
        }
        assert_eq!(trained(&broken), (0..36).collect::<Vec<_>>());
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_killed_asynchronous_run_trains_each_prompt_once_within_its_staleness_bound() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["run.steps=12", "learner.eta=3", "checkpoint.every_steps=1", "rollout.workers=2"];
    for after in [2, 5, 8] {
        let mut overrides = overrides.to_vec();
        if after > 2 {
            // `killed` starts the program again, which resumes the run.
            let mut command = training(dir.path(), &overrides);
            // A step takes more than half a second, so that several seconds remain in which to kill it.
            command.arg("--resume").env("FAILPOINTS", "prompts.next=sleep(150)");
            let mut child = command.stderr(Stdio::null()).spawn().unwrap();
            wait_until("steps of the resumed run", || {
                assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be killed");
                metrics_lines(dir.path()) >= after
            });
            child.kill().unwrap();
            child.wait().unwrap();
        } else {
            overrides.push("checkpoint.keep=3");
            killed(dir.path(), &overrides, after);
        }
    }
    let output = resume(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let run = dir.path().join("run");
    assert_eq!(trained(&run), (0..48).collect::<Vec<_>>());
    let steps = metrics(&run);
    assert_eq!(steps.len(), 12);
    for (i, step) in steps.iter().enumerate() {
        assert_eq!(step["step"], i + 1);
        assert!(step["staleness/max"].as_u64().unwrap() <= 3, "{step}");
    }
}

fn metrics_lines(dir: &Path) -> usize {
    std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap_or_default().lines().count()
}

#[test]
fn a_run_is_replayed_bit_for_bit_resumed_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["run.steps=8", "learner.eta=4", "rollout.workers=2"];
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    // More steps at another learning rate: the journal records from which step on.
    let longer = ["run.steps=12", "learner.eta=4", "rollout.workers=2", "learner.lr=5e-4"];
    let output = resume(dir.path(), &longer);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("changed   learner.lr: 0.001 → 0.0005"), "{}", stderr(&output));
    let about = std::fs::read_to_string(dir.path().join("run/checkpoints/step-000012/preceptor.json")).unwrap();
    let about: Value = serde_json::from_str(&about).unwrap();
    let expected = format!("12 steps, weights {}, as in the run\n", about["policy"].as_str().unwrap());
    for i in 0..3 {
        let output = preceptor(dir.path()).args(["replay", "run", "--output", &format!("again-{i}")]).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        let read = |path: &str| std::fs::read(dir.path().join(path).join("model.safetensors")).unwrap();
        assert!(read(&format!("again-{i}")) == read("run/checkpoints/step-000012"));
    }
    let half = preceptor(dir.path()).args(["replay", "run", "--until", "5"]).output().unwrap();
    assert!(String::from_utf8_lossy(&half.stdout).starts_with("5 steps"), "{}", stderr(&half));
    // A falsified journal is detected: one bit of a reward is changed, and the checksum corrected.
    let journal = dir.path().join("run/journal.bin");
    let entries: Vec<_> =
        preceptor::run::journal::Journal::open(&dir.path().join("run")).unwrap().map(Result::unwrap).collect();
    let mut bytes = Vec::new();
    for entry in entries {
        use preceptor::run::journal;
        bytes.extend(match entry {
            journal::Entry::Config(text) => journal::encode_config(&text).unwrap(),
            journal::Entry::Accepted(accepted) => journal::encode_accepted(&accepted).unwrap(),
            journal::Entry::Closed(step) => journal::encode_closed(u64::from_le_bytes(step)).unwrap(),
            journal::Entry::Step(mut step) => {
                if step.step == 3 {
                    step.batch[0].rewards[0] += 0.5;
                }
                journal::encode_step(step.step, step.fingerprint, &step.batch).unwrap()
            }
        });
    }
    std::fs::write(&journal, bytes).unwrap();
    let output = preceptor(dir.path()).args(["replay", "run"]).output().unwrap();
    assert!(!output.status.success());
    assert!(stderr(&output).contains("error: step 3 gives weights"), "{}", stderr(&output));
}

#[test]
fn a_run_is_not_resumed_with_another_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.jsonl");
    std::fs::copy(config("data/posts.jsonl"), &data).unwrap();
    let data_path = format!("data.path=\"{}\"", data.display());
    let overrides = ["run.steps=2", "checkpoint.every_steps=1", &data_path];
    let refused = |overrides: &[&str], parts: &[&str]| {
        let output = resume(dir.path(), overrides);
        let text = stderr(&output);
        assert!(!output.status.success() && text.matches("error: ").count() == 1, "{text}");
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    };
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let again = train(dir.path(), &overrides);
    assert!(stderr(&again).contains("already holds a run; continue it with --resume"), "{}", stderr(&again));
    refused(
        &[&overrides[..], &["run.seed=3", "learner.algorithm=rloo", "learner.lr=0.5"]].concat(),
        &["run.seed: was 0, is now 3", "learner.algorithm: was \"reinforce\", is now \"rloo\"", "restore them"],
    );
    refused(&[&overrides[..], &["policy.model.scratch.seed=9"]].concat(), &["the model that the policy starts from"]);
    let rows = std::fs::read_to_string(&data).unwrap();
    std::fs::write(&data, rows.replacen("the", "teh", 1)).unwrap();
    refused(&overrides, &["the data set is not the one"]);
    std::fs::write(&data, rows).unwrap();

    // Damage is reported, and the checkpoint before is used; another format is not damage.
    let run = dir.path().join("run");
    let weights = run.join("checkpoints/step-000002/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let output = resume(dir.path(), &overrides);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("step-000002/model.safetensors is damaged") && text.contains("step-000001\n"), "{text}");
    assert!(run.join("checkpoints/step-000002.damaged-1").exists());
    let about = run.join("checkpoints/step-000002/preceptor.json");
    let text = std::fs::read_to_string(&about).unwrap();
    std::fs::write(&about, text.replace("\"format\": 1", "\"format\": 7")).unwrap();
    let sums = run.join("checkpoints/step-000002/SHA256SUMS");
    let sealed = std::fs::read(&sums).unwrap();
    preceptor::run::checkpoint::sums::write_sums(&run.join("checkpoints/step-000002")).unwrap();
    refused(&overrides, &["is in format 7, and this program reads format 1", "resume with preceptor 0.1.0"]);
    std::fs::write(&about, text).unwrap();
    std::fs::write(&sums, sealed).unwrap();

    // Resumes from a named checkpoint. Later ones are set aside, but only once the run may continue.
    let other = [&overrides[..], &["run.seed=3"]].concat();
    let output = training(dir.path(), &other).arg("--resume=run/checkpoints/step-000001").output().unwrap();
    assert!(!output.status.success() && run.join("checkpoints/step-000002").exists(), "{}", stderr(&output));
    let output = training(dir.path(), &overrides).arg("--resume=run/checkpoints/step-000001").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(run.join("checkpoints/step-000002.superseded-1").exists(), "{}", stderr(&output));
    assert_eq!(metrics(&run).len(), 2);
    let output = training(dir.path(), &overrides).arg("--resume=run/samples.jsonl").output().unwrap();
    assert!(stderr(&output).contains("is not a checkpoint of a run"), "{}", stderr(&output));
}

/// Labels after the checkpoint must come from the same judge as before, unless the user accepts the change.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_changed_judge_is_refused_until_accepted_and_the_journal_replays_across_the_change() {
    let dir = tempfile::tempdir().unwrap();
    let mock = MockJudge::start(|_, _, body| varied(body, "7", "2"));
    let templates = dir.path().join("templates.toml");
    let set = include_str!("../../src/pipeline/label/templates/summarization.toml");
    std::fs::write(&templates, set).unwrap();
    let settings = |model: &str, steps: u64| -> Vec<String> {
        let remote = format!("labeler.remote={{ url = \"{}\", model = \"{model}\" }}", mock.url);
        let own = format!("labeler.templates=\"{}\"", templates.display());
        let cache = format!("labeler.cache=\"{}\"", dir.path().join("labels").display());
        vec!["labeler.type=direct".into(), remote, own, cache, format!("run.steps={steps}")]
    };
    let run = |model: &str, steps: u64, more: &[&str]| -> Output {
        let settings = settings(model, steps);
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        training(dir.path(), &settings).args(more).output().unwrap()
    };
    let refused = |output: &Output, parts: &[&str]| {
        let text = stderr(output);
        assert!(!output.status.success(), "{text}");
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    };
    let output = run("a", 2, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let uninterrupted = std::fs::read(dir.path().join("run/journal.bin")).unwrap();

    // The server has another model.
    let output = run("b", 4, &["--resume"]);
    let key = "labeler.remote.model";
    refused(&output, &[&format!("{key}: was \"a\", is now \"b\""), &format!("--accept-change {key}")]);
    refused(&run("b", 4, &["--resume", "--accept-change", "labeler.remote.url"]), &[key]);
    refused(&run("b", 4, &["--resume", "--accept-change", "run.seed"]), &["run.seed", "cannot be accepted"]);
    refused(&run("b", 4, &["--accept-change", key]), &["--resume"]);
    assert_eq!(std::fs::read(dir.path().join("run/journal.bin")).unwrap(), uninterrupted, "a refusal changes nothing");
    let output = run("b", 4, &["--resume", "--accept-change", key, "--accept-change", "labeler.shots"]);
    let text = stderr(&output);
    assert!(output.status.success() && text.contains(&format!("accepted  {key}: \"a\" → \"b\"")), "{text}");
    assert!(text.contains("labeler.shots: nothing to accept"), "{text}");

    // The same file with other content, and with only another comment.
    std::fs::write(&templates, format!("# A note.\n{set}")).unwrap();
    let output = run("b", 6, &["--resume"]);
    assert!(output.status.success(), "{}", stderr(&output));
    std::fs::write(&templates, set.replace("SCORE:", "MARK:")).unwrap();
    refused(&run("b", 8, &["--resume"]), &["labeler.templates: was content", "--accept-change labeler.templates"]);
    let output = run("b", 8, &["--resume", "--accept-change", "labeler"]);
    assert!(output.status.success(), "{}", stderr(&output));

    // A checkpoint of a version that did not record the contents can be resumed.
    std::fs::write(&templates, set).unwrap();
    let checkpoint = dir.path().join("run/checkpoints/step-000008");
    let about = checkpoint.join("preceptor.json");
    let mut description: Value = serde_json::from_str(&std::fs::read_to_string(&about).unwrap()).unwrap();
    assert!(description.as_object_mut().unwrap().remove("judge").is_some());
    std::fs::write(&about, description.to_string()).unwrap();
    std::fs::remove_file(checkpoint.join("SHA256SUMS")).unwrap();
    preceptor::run::checkpoint::sums::write_sums(&checkpoint).unwrap();
    let output = run("b", 10, &["--resume"]);
    assert!(output.status.success(), "{}", stderr(&output));

    let run = dir.path().join("run");
    let noted: Vec<(u64, Vec<String>)> = preceptor::run::journal::Journal::open(&run)
        .unwrap()
        .filter_map(|entry| match entry.unwrap() {
            preceptor::run::journal::Entry::Accepted(one) => {
                Some((one.step, one.changes.into_iter().map(|(key, ..)| key).collect()))
            }
            _ => None,
        })
        .collect();
    assert_eq!(noted, [(2, vec![key.to_owned()]), (6, vec!["labeler.templates".to_owned()])]);
    let phases = std::fs::read_to_string(run.join("phases.jsonl")).unwrap();
    assert_eq!(phases.matches("\"accepted\"").count(), 2, "{phases}");
    let output = preceptor(dir.path()).args(["replay", "run"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("10 steps"), "{output:?}");
}

/// File size limits: samples are rotated, a full journal is closed and replays up to that step, and a resumed run
/// truncates both at its checkpoint.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn size_limited_files_stay_within_limits_and_are_truncated_by_a_resumed_run() {
    let (dir, uninterrupted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bounds = ["run.samples_max_bytes=6000", "run.samples_keep=2", "checkpoint.journal_max_bytes=9000"];
    let common = ["learner.eta=0", "checkpoint.every_steps=1", "checkpoint.keep=20"];
    let bounded = |steps: &'static str| [&common[..], &bounds, &[steps]].concat();
    let output = train(dir.path(), &bounded("run.steps=12"));
    let text = stderr(&output);
    assert!(output.status.success() && text.contains("checkpoint.journal_max_bytes = 9000: step"), "{text}");
    let run = dir.path().join("run");
    let samples = |run: &Path| -> Vec<(u64, String)> {
        let names = ["samples.jsonl.2", "samples.jsonl.1", "samples.jsonl"];
        let texts = names.map(|name| std::fs::read_to_string(run.join(name)).unwrap_or_default());
        let lines = texts.iter().flat_map(|text| text.lines());
        let step = |line: &str| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap();
        lines.map(|line| (step(line), line.to_owned())).collect()
    };
    for name in ["samples.jsonl", "samples.jsonl.1", "samples.jsonl.2"] {
        let size = std::fs::metadata(run.join(name)).unwrap().len();
        assert!(size < 6000 + 4000, "{name} has {size} bytes");
    }
    assert!(!run.join("samples.jsonl.3").exists());
    let closed = std::fs::metadata(run.join("journal.bin")).unwrap().len();
    let output = preceptor(dir.path()).args(["replay", "run"]).output().unwrap();
    let steps: u64 = String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap().parse().unwrap();
    assert!(output.status.success() && (1..12).contains(&steps), "{}", stderr(&output));
    assert!(
        stderr(&output).contains(&format!("step {} and later ones are not in it", steps + 1)),
        "{}",
        stderr(&output)
    );

    // From the last checkpoint on, the journal stays closed even if its limit is raised.
    let longer = [&bounded("run.steps=14")[..], &["checkpoint.journal_max_bytes=0"]].concat();
    let output = resume(dir.path(), &longer);
    assert!(output.status.success() && stderr(&output).contains("journal   was full before"), "{}", stderr(&output));
    assert_eq!(std::fs::metadata(run.join("journal.bin")).unwrap().len(), closed);

    // From an earlier checkpoint, the run ends like one that was not interrupted.
    let early = ["--resume=run/checkpoints/step-000001"];
    let output = training(dir.path(), &bounded("run.steps=12")).args(early).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let output = train(uninterrupted.path(), &bounded("run.steps=12"));
    assert!(output.status.success(), "{}", stderr(&output));
    let other = uninterrupted.path().join("run");
    assert_eq!(metrics(&run), metrics(&other));
    let (cut, uninterrupted) = (samples(&run), samples(&other));
    assert_eq!(cut.last(), uninterrupted.last());
    assert!(cut.iter().all(|line| line.0 <= 1 || uninterrupted.contains(line)), "{cut:?}");
    let mut steps: Vec<u64> = cut.iter().map(|(step, _)| *step).collect();
    steps.dedup();
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]), "{steps:?}");
    let output = preceptor(dir.path()).args(["replay", "run"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn two_processes_do_not_share_a_run_and_one_without_a_checkpoint_starts_from_the_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["run.steps=100000"];
    let mut child = training(dir.path(), &overrides).arg("--resume").stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the first step", || metrics_lines(dir.path()) >= 1);
    let other = resume(dir.path(), &overrides);
    assert!(stderr(&other).contains("another process works on the run in run"), "{}", stderr(&other));
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143), "{text}");
    assert!(
        text.contains("no checkpoint yet; the run starts at step 0") && text.contains("interrupted after"),
        "{text}"
    );
}

#[test]
fn closing_the_reader_of_standard_error_does_not_affect_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = training(dir.path(), &["run.steps=6"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success());
    assert_eq!(metrics(&dir.path().join("run")).len(), 6);
}

#[test]
fn a_run_whose_machine_is_lost_resumes_from_its_mirror() {
    let (dir, uninterrupted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mirror = format!("checkpoint.mirror=\"file://{}/mirror\"", dir.path().display());
    let tuned = ["learner.eta=0", "checkpoint.every_steps=1", "sft.steps=3", "sft.batch=2", "sft.lr=1e-3"];
    let short = [&tuned[..], &["run.steps=3", &mirror]].concat();
    let long = [&tuned[..], &["run.steps=6", &mirror]].concat();
    let output = train(dir.path(), &short);
    assert!(output.status.success(), "{}", stderr(&output));
    std::fs::remove_dir_all(dir.path().join("run")).unwrap();
    let output = resume(dir.path(), &long);
    let text = stderr(&output);
    assert!(output.status.success() && text.contains("fetched   run/checkpoints/step-000003"), "{text}");
    assert!(text.contains("fetched   run/reference") && !text.contains("fine-tuning"), "it is not tuned again: {text}");
    assert!(train(uninterrupted.path(), &long[..long.len() - 1]).status.success());
    let run = dir.path().join("run");
    assert_eq!(metrics(&run), metrics(&uninterrupted.path().join("run"))[3..]);
    let weights = |run: &Path| std::fs::read(run.join("checkpoints/step-000006/model.safetensors")).unwrap();
    assert!(weights(&run) == weights(&uninterrupted.path().join("run")));
    let output = resume(dir.path(), &[&tuned[..], &["run.steps=9", "checkpoint.mirror=ftp://host/a"]].concat());
    assert!(
        stderr(&output).contains("error: checkpoint.mirror = \"ftp://host/a\" cannot be used"),
        "{}",
        stderr(&output)
    );
}

/// A step that takes longer than a service manager waits is abandoned, and its groups are in the checkpoint.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_step_that_outlasts_the_deadline_is_abandoned_without_losing_its_groups() {
    let (dir, uninterrupted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // The step cannot end before the deadline, but its third group can be reached before it.
    let overrides = ["run.steps=3", "learner.eta=0", "supervision.drain_s=4", "supervision.halt_grace_s=60"];
    let mut attempts = 0;
    let text = loop {
        let mut child = training(dir.path(), &overrides)
            // From the second step's third group on, each group takes eight seconds.
            .env("FAILPOINTS", "learn.forward=6*off->sleep(8000)")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_until("the first step", || metrics_lines(dir.path()) >= 1);
        assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(143), "{text}");
        attempts += 1;
        // On a busy machine the signal may arrive before the first step is complete, and the run then ends without a second step.
        if attempts == 5 || text.contains("the step takes longer") {
            break text;
        }
        std::fs::remove_dir_all(dir.path().join("run")).unwrap();
    };
    assert!(
        text.contains("the step takes longer than supervision.drain_s") && text.contains("interrupted after 1 steps"),
        "{text}"
    );
    let about = std::fs::read_to_string(dir.path().join("run/checkpoints/step-000001/preceptor.json")).unwrap();
    let groups = &serde_json::from_str::<Value>(&about).unwrap()["groups"];
    assert!(groups["rewarded"].as_u64().unwrap() >= 2, "the step's groups are kept: {groups}");
    let output = resume(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(train(uninterrupted.path(), &overrides).status.success());
    assert_eq!(metrics(&dir.path().join("run")), metrics(&uninterrupted.path().join("run")));
}

/// Fine-tuning that is killed and then stopped does not repeat finished steps, and gives the same results.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn interrupted_fine_tuning_resumes_with_the_same_result() {
    for adapters in [&[][..], &["policy.lora={ rank = 4 }"]] {
        let tuned = ["sft.steps=60", "sft.batch=2", "sft.lr=1e-3", "run.steps=2", "learner.eta=0"];
        let overrides = [&tuned[..], &["checkpoint.every_steps=1"], adapters].concat();
        let (uninterrupted, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let output = train(uninterrupted.path(), &overrides);
        assert!(output.status.success(), "{}", stderr(&output));
        let run = broken.path().join("run");
        let far = |steps: usize| {
            let lines = std::fs::read_to_string(run.join("phases.jsonl")).unwrap_or_default().lines().count();
            let complete = |entry: std::io::Result<std::fs::DirEntry>| {
                entry.unwrap().file_name().to_string_lossy().starts_with("step-")
            };
            lines >= steps && run.join("fine-tuning/checkpoints").read_dir().is_ok_and(|mut all| all.any(complete))
        };
        let broken_off = |how: &str, steps: usize, resumes: bool| -> String {
            let mut command = training(broken.path(), &overrides);
            if resumes {
                command.arg("--resume");
            }
            // After some steps each takes half a second, so that half a minute remains in which to interrupt it.
            let command = command.env("FAILPOINTS", "sft.step=8*off->sleep(500)");
            let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
            wait_until("steps of fine-tuning", || {
                assert!(child.try_wait().unwrap().is_none(), "it ended before it was interrupted");
                far(steps)
            });
            assert!(Command::new("kill").args([how, &child.id().to_string()]).status().unwrap().success());
            let output = child.wait_with_output().unwrap();
            assert!(!output.status.success() && !run.join("reference").exists(), "{}", stderr(&output));
            stderr(&output)
        };
        broken_off("-KILL", 8, false);
        let text = broken_off("-TERM", 12, true);
        assert!(text.contains("resuming  run/fine-tuning/checkpoints/step-0000"), "{text}");
        assert!(
            text.contains("interrupted during supervised fine-tuning; --resume continues from run/fine-tuning"),
            "{text}"
        );
        let again = train(broken.path(), &overrides);
        assert!(stderr(&again).contains("run already holds a run"), "{}", stderr(&again));
        let output = resume(broken.path(), &overrides);
        let text = stderr(&output);
        assert!(output.status.success() && text.contains("resuming  run/fine-tuning/checkpoints/step-0000"), "{text}");
        assert!(run.join("reference").exists() && !run.join("fine-tuning").exists());
        let uninterrupted = uninterrupted.path().join("run");
        for file in ["phases.jsonl", "reference/model.safetensors", "checkpoints/step-000002/model.safetensors"] {
            let read = |run: &Path| std::fs::read(run.join(file)).unwrap();
            assert!(read(&uninterrupted) == read(&run), "{file} {adapters:?}");
        }
        assert_eq!(metrics(&uninterrupted), metrics(&run));
    }
}

/// On a disk that does not recover, the second signal abandons a checkpoint that is being written.
#[test]
fn a_checkpoint_that_never_ends_is_abandoned_at_the_second_signal() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["run.steps=3", "learner.eta=0", "checkpoint.every_steps=1"];
    let mut child = training(dir.path(), &overrides)
        .env("FAILPOINTS", "checkpoint.fill=1*off->sleep(3600000)")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let errors = BufReader::new(child.stderr.take().unwrap());
    let said: Arc<Mutex<String>> = Arc::default();
    let heard = Arc::clone(&said);
    let reader = std::thread::spawn(move || {
        for line in errors.lines() {
            *heard.lock().unwrap() += &format!("{}\n", line.unwrap());
        }
    });
    wait_until("the third step", || {
        assert!(child.try_wait().unwrap().is_none(), "it ended before its last checkpoint");
        metrics_lines(dir.path()) >= 3
    });
    // A signal that arrives before the training has ended asks it to stop; only one during the checkpoint gets the offer.
    // The process may end between a check and a signal.
    let end = |child: &Child| {
        std::thread::sleep(Duration::from_millis(100));
        let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).stderr(Stdio::null()).status();
    };
    wait_until("the offer to leave the checkpoint", || {
        end(&child);
        said.lock().unwrap().contains("press Ctrl-C again to abandon it")
    });
    let mut status = None;
    wait_until("the end", || {
        end(&child);
        status = child.try_wait().unwrap();
        status.is_some()
    });
    reader.join().unwrap();
    let (status, text) = (status.unwrap(), said.lock().unwrap().clone());
    assert!(!status.success() && text.contains("stopped before its last checkpoint was written"), "{text}");
    let output = resume(dir.path(), &overrides);
    assert!(output.status.success() && stderr(&output).contains("step-000001"), "{}", stderr(&output));
    assert_eq!(metrics(&dir.path().join("run")).len(), 3);
}

#[test]
fn a_service_manager_is_notified_when_the_run_is_ready_alive_and_stopping() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut child =
        training(dir.path(), &["run.steps=100000"]).env("NOTIFY_SOCKET", &path).stderr(Stdio::null()).spawn().unwrap();
    let (mut said, mut asked) = (Vec::new(), false);
    let mut buffer = [0; 4096];
    while !said.iter().any(|line| line == "STOPPING=1") {
        let n = socket.recv(&mut buffer).expect("the run sends a notification");
        said.extend(String::from_utf8_lossy(&buffer[..n]).lines().map(str::to_owned));
        if !asked && said.iter().any(|line| line == "WATCHDOG=1") {
            assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
            asked = true;
        }
    }
    assert_eq!(said[0], "READY=1");
    assert_eq!(child.wait().unwrap().code(), Some(143), "128 + SIGTERM");
}
