//! Tests with real processes that nothing of a run is destroyed before its replacement is verified, and that disk
//! failures and signals lose nothing.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::common::{PATIENCE, config, copy, metrics, preceptor, resume, stderr, train, training};
use crate::running::Running;

fn resume_from(dir: &Path, overrides: &[&str], checkpoint: &str) -> Output {
    training(dir, overrides).arg(format!("--resume=run/checkpoints/{checkpoint}")).output().unwrap()
}

/// Returns every file below `dir` with its bytes; for a link, its target.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_owned();
            if path.is_symlink() {
                all.insert(name, std::fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes());
            } else if path.is_dir() {
                all.insert(name, Vec::new());
                open.push(path);
            } else {
                all.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    all
}

/// Returns the names of the differences between two trees.
fn differences(a: &BTreeMap<PathBuf, Vec<u8>>, b: &BTreeMap<PathBuf, Vec<u8>>) -> Vec<PathBuf> {
    a.keys().chain(b.keys()).filter(|name| a.get(*name) != b.get(*name)).cloned().collect()
}

fn steps(dir: &Path) -> usize {
    std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap_or_default().lines().count()
}

/// Settings of the runs that are rewound.
const STEPWISE: [&str; 4] = ["run.steps=4", "learner.eta=0", "checkpoint.every_steps=1", "checkpoint.keep=9"];

/// Runs four complete steps with a checkpoint after each.
fn stepwise(overrides: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &[&STEPWISE[..], overrides].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    // A step may end while the previous checkpoint is still being written; the checkpoints that the tests name must
    // exist.
    for step in [1, 4] {
        assert!(dir.path().join(format!("run/checkpoints/step-00000{step}")).exists());
    }
    dir
}

#[test]
fn a_refused_resume_changes_no_file() {
    let dir = stepwise(&[]);
    let run = dir.path().join("run");
    let rows = std::fs::read_to_string(config("data/posts.jsonl")).unwrap();
    std::fs::write(dir.path().join("posts.jsonl"), rows.replacen("the", "teh", 1)).unwrap();
    let data = format!("data.path=\"{}\"", dir.path().join("posts.jsonl").display());
    let before = tree(&run);
    let refused = |what: &str, why: &str, output: Output| {
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(why), "{what}: {text}");
        let changed = differences(&before, &tree(&run));
        assert!(changed.is_empty(), "{what} changed {changed:?}");
    };
    for (override_, why) in [
        ("run.seed=3", "run.seed: was 0, is now 3"),
        ("policy.model.scratch.seed=9", "the model that the policy starts from"),
        (data.as_str(), "the data set is not the one"),
        ("data.path=\"none.jsonl\"", "none.jsonl"),
    ] {
        let overrides = [&STEPWISE[..], &["run.steps=6", override_]].concat();
        refused(override_, why, resume_from(dir.path(), &overrides, "step-000001"));
        refused(override_, why, resume(dir.path(), &overrides));
    }
    refused("a typo", "does not exist", resume_from(dir.path(), &STEPWISE, "step-000077"));
    // A file that is longer in the checkpoint than on disk is detected before anything is truncated.
    let metrics = std::fs::read(run.join("metrics.jsonl")).unwrap();
    std::fs::write(run.join("metrics.jsonl"), &metrics[..10]).unwrap();
    let before = tree(&run);
    let output = resume_from(dir.path(), &STEPWISE, "step-000001");
    assert!(stderr(&output).contains("metrics.jsonl has 10 bytes"), "{}", stderr(&output));
    assert!(differences(&before, &tree(&run)).is_empty());
    std::fs::write(run.join("metrics.jsonl"), &metrics).unwrap();
    // Damage found on the way is not set aside either.
    std::fs::write(run.join("checkpoints/step-000004/preceptor.json"), "").unwrap();
    let before = tree(&run);
    let output = resume(dir.path(), &[&STEPWISE[..], &["run.seed=3"]].concat());
    assert!(stderr(&output).contains("run.seed: was 0"), "{}", stderr(&output));
    assert!(differences(&before, &tree(&run)).is_empty());
}

/// At whatever point the process was killed, the run can be resumed, and ends with the same results.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_process_killed_while_it_rewinds_a_run_leaves_a_run_that_can_be_resumed() {
    let uninterrupted = stepwise(&[]);
    let expected = metrics(&uninterrupted.path().join("run"));
    let weights = |dir: &Path| std::fs::read(dir.join("run/checkpoints/step-000004/model.safetensors")).unwrap();
    let points = ["rewind.commit=", "rewind.renamed=", "rewind.renamed=1*off->", "rewind.cut=", "rewind.cut=2*off->"];
    for point in points {
        let killed = tempfile::tempdir().unwrap();
        copy(&uninterrupted.path().join("run"), &killed.path().join("run"));
        let mut command = training(killed.path(), &STEPWISE);
        command.arg("--resume=run/checkpoints/step-000001").env("FAILPOINTS", format!("{point}sleep(3600000)"));
        let mut running = Running::start(command);
        running.says("policy    ");
        let begun =
            if point == "rewind.commit=" { "run/.rewind.partial/rewind.json" } else { "run/.rewind/rewind.json" };
        running.until("the run is not rewound", || killed.path().join(begun).exists());
        // Everything before this point can be repeated safely.
        std::thread::sleep(Duration::from_millis(20));
        running.signal("-KILL");
        running.child.wait().unwrap();
        for how in ["--resume", "step-000001", "step-000004"] {
            let dir = tempfile::tempdir().unwrap();
            copy(&killed.path().join("run"), &dir.path().join("run"));
            let output = if how == "--resume" {
                resume(dir.path(), &STEPWISE)
            } else {
                let output = resume_from(dir.path(), &STEPWISE, how);
                // Once the rewind is decided, the later checkpoint has another name, which is reported.
                match stderr(&output).split_once("it was set aside as ") {
                    Some((_, name)) => {
                        let name = Path::new(name.trim()).file_name().unwrap().to_str().unwrap().to_owned();
                        resume_from(dir.path(), &STEPWISE, &name)
                    }
                    None => output,
                }
            };
            assert!(output.status.success(), "{point} {how}: {}", stderr(&output));
            assert_eq!(metrics(&dir.path().join("run")), expected, "{point} {how}");
            assert!(weights(dir.path()) == weights(uninterrupted.path()), "{point} {how}");
            for left in [".rewind", ".rewind.partial"] {
                assert!(!dir.path().join("run").join(left).exists(), "{point} {how}: {left}");
            }
        }
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_checkpoint_that_was_set_aside_is_resumed_with_its_own_steps() {
    let dir = stepwise(&["evaluation.every_steps=1", "evaluation.prompts=2", "data.holdout=0.5"]);
    let evaluated = ["evaluation.every_steps=1", "evaluation.prompts=2", "data.holdout=0.5"];
    let overrides = [&STEPWISE[..], &evaluated].concat();
    let run = dir.path().join("run");
    let (first, journal) = (metrics(&run), std::fs::read(run.join("journal.bin")).unwrap());
    // The history diverges: another learning rate from step 1 on.
    let other = [&overrides[..], &["learner.lr=5e-2"]].concat();
    let output = resume_from(dir.path(), &other, "step-000001");
    assert!(output.status.success(), "{}", stderr(&output));
    let second = metrics(&run);
    assert!(first != second && first[0] == second[0]);
    let output = resume_from(dir.path(), &overrides, "step-000004.superseded-1");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(metrics(&run), first);
    assert!(std::fs::read(run.join("journal.bin")).unwrap().starts_with(&journal));
    let output = resume_from(dir.path(), &other, "step-000004.superseded-2");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(metrics(&run), second);
    let output = preceptor(dir.path()).args(["replay", "run"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Damages the given checkpoint.
type Spoil<'a> = &'a dyn Fn(&Path);

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn only_a_wrong_checksum_is_damage() {
    let sound = stepwise(&[]);
    let spoiled = |spoil: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        copy(&sound.path().join("run"), &dir.path().join("run"));
        spoil(&dir.path().join("run/checkpoints/step-000004"));
        dir
    };
    let about = |checkpoint: &Path, change: &dyn Fn(String) -> String| {
        let path = checkpoint.join("preceptor.json");
        std::fs::write(&path, change(std::fs::read_to_string(&path).unwrap())).unwrap();
    };
    // Every kind of damage is detected by the checksums, and the checkpoint before is used.
    let damage: [(&str, Spoil<'_>); 7] = [
        ("empty", &|at| about(at, &|_| String::new())),
        ("half", &|at| about(at, &|text| text[..text.len() / 2].to_owned())),
        ("another format by one bit", &|at| about(at, &|text| text.replace("\"format\": 1", "\"format\": 5"))),
        ("a key by one bit", &|at| about(at, &|text| text.replace("\"format\"", "\"fospat\""))),
        ("missing", &|at| std::fs::remove_file(at.join("preceptor.json")).unwrap()),
        ("a folder", &|at| {
            std::fs::remove_file(at.join("model.safetensors")).unwrap();
            std::fs::create_dir(at.join("model.safetensors")).unwrap();
        }),
        ("a shorter list", &|at| {
            let list = std::fs::read_to_string(at.join("SHA256SUMS")).unwrap();
            let shorter: String =
                list.lines().filter(|line| !line.contains("optimizer")).map(|line| format!("{line}\n")).collect();
            std::fs::write(at.join("SHA256SUMS"), shorter).unwrap();
        }),
    ];
    for (what, spoil) in damage {
        let dir = spoiled(spoil);
        let output = resume(dir.path(), &STEPWISE);
        let text = stderr(&output);
        assert!(output.status.success() && text.contains("the previous checkpoint is used"), "{what}: {text}");
        assert!(dir.path().join("run/checkpoints/step-000004.damaged-1").exists(), "{what}");
        assert_eq!(metrics(&dir.path().join("run")), metrics(&sound.path().join("run")), "{what}");
    }
    // A file that a person created there.
    let dir = spoiled(&|at| std::fs::write(at.join("model.gguf"), "GGUF").unwrap());
    let output = resume(dir.path(), &STEPWISE);
    assert!(output.status.success() && stderr(&output).contains("step-000004\n"), "{}", stderr(&output));
    // A file that cannot be read, here a link to itself: however often it is tried, nothing is changed.
    for name in ["model.safetensors", "preceptor.json", "SHA256SUMS", "resume/optimizer.safetensors"] {
        let dir = spoiled(&|at| {
            std::fs::remove_file(at.join(name)).unwrap();
            std::os::unix::fs::symlink(Path::new(name).file_name().unwrap(), at.join(name)).unwrap();
        });
        let before = tree(&dir.path().join("run"));
        for _ in 0..2 {
            let output = resume(dir.path(), &STEPWISE);
            let text = stderr(&output);
            assert!(!output.status.success() && text.contains("cannot read") && text.contains(name), "{name}: {text}");
            assert!(text.contains("nothing was changed"), "{text}");
            let changed = differences(&before, &tree(&dir.path().join("run")));
            assert!(changed.is_empty(), "{name}: {changed:?}");
        }
    }
}

#[test]
fn a_run_whose_checkpoints_are_missing_is_not_started_over_its_history() {
    let overrides = ["run.steps=3", "checkpoint.every_steps=1", "checkpoint.keep=2"];
    let dir = tempfile::tempdir().unwrap();
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    let run = dir.path().join("run");
    let checkpoints = || std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path());
    let refused_twice = |parts: &[&str]| {
        let before = tree(&run);
        for _ in 0..2 {
            let output = resume(dir.path(), &overrides);
            let text = stderr(&output);
            assert!(!output.status.success() && parts.iter().all(|part| text.contains(part)), "{text}");
            let changed = differences(&before, &tree(&run));
            assert!(changed.is_empty(), "{changed:?}");
        }
    };
    for path in checkpoints() {
        std::fs::write(path.join("model.safetensors"), "").unwrap();
    }
    refused_twice(&["can be used, and nothing was changed", "restore an undamaged copy"]);
    // The state that an earlier version left.
    for path in checkpoints() {
        let name = format!("{}.damaged-1", path.file_name().unwrap().to_str().unwrap());
        std::fs::rename(&path, path.with_file_name(name)).unwrap();
    }
    refused_twice(&["step-000003.damaged-1", "metrics.jsonl", "journal.bin", "move the directory away"]);
    std::fs::remove_dir_all(run.join("checkpoints")).unwrap();
    refused_twice(&["metrics.jsonl", "journal.bin"]);
    std::fs::remove_file(run.join("metrics.jsonl")).unwrap();
    std::fs::remove_file(run.join("samples.jsonl")).unwrap();
    refused_twice(&["journal.bin"]);
    let output = train(dir.path(), &overrides);
    assert!(stderr(&output).contains("run already holds a run"), "{}", stderr(&output));
}

#[test]
fn a_run_killed_before_its_first_checkpoint_starts_again() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["run.steps=100000", "checkpoint.every_minutes=0"];
    let mut running = Running::start(training(dir.path(), &overrides));
    running.until("it makes no steps", || steps(dir.path()) >= 2);
    running.signal("-KILL");
    running.child.wait().unwrap();
    let output = resume(dir.path(), &["run.steps=3"]);
    assert!(output.status.success() && stderr(&output).contains("the run starts at step 0"), "{}", stderr(&output));
    assert_eq!(steps(dir.path()), 3);
    assert!(!dir.path().join("run/first-checkpoint.pending").exists());
}

/// All writes at the end of a run or of fine-tuning wait for disk space, including the logs.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn a_disk_that_is_full_at_the_end_is_waited_for() {
    let tuned = ["sft.steps=3", "sft.batch=2", "sft.lr=1e-3", "checkpoint.every_minutes=0"];
    for point in ["files.flush", "checkpoint.fill", "reference.fill"] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = training(dir.path(), &[&["run.steps=2"][..], &tuned].concat());
        command.env("FAILPOINTS", format!("{point}=2*return(no room)->off"));
        let output = command.output().unwrap();
        let text = stderr(&output);
        assert!(output.status.success(), "{point}: {text}");
        assert!(text.matches("no room (injected").count() == 2 && text.contains("retrying in"), "{point}: {text}");
        assert_eq!(steps(dir.path()), 2, "{point}");
        let left: Vec<_> = tree(&dir.path().join("run"))
            .into_keys()
            .filter(|name| name.to_string_lossy().contains(".partial"))
            .collect();
        assert!(left.is_empty(), "{point}: {left:?}");
    }
    // Without a retry time it is an error, and no partial file remains.
    let dir = tempfile::tempdir().unwrap();
    let mut command = training(dir.path(), &[&["checkpoint.retry_s=0"][..], &tuned].concat());
    let output = command.env("FAILPOINTS", "reference.fill=return(no room)").output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("no room"), "{}", stderr(&output));
    assert!(!dir.path().join("run/.reference.partial").exists() && !dir.path().join("run/reference").exists());
}

#[test]
fn fine_tuning_interrupted_on_a_full_disk_is_saved_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = ["sft.steps=60", "sft.batch=2", "sft.lr=1e-3", "checkpoint.every_minutes=0"];
    let mut command = training(dir.path(), &tuned);
    command.env("FAILPOINTS", "sft.step=sleep(20);checkpoint.fill=1*return(no room)->off");
    let mut running = Running::start(command);
    running.says("fine-tuning   4/60");
    running.signal("-TERM");
    let (status, text) = running.end();
    assert!(!status.success() && text.contains("no room"), "{text}");
    assert!(text.contains("--resume continues from run/fine-tuning/checkpoints/step-0000"), "{text}");
}

/// A phase that is held at a failpoint, and the expected effect of a signal.
struct Held {
    point: &'static str,
    fault: &'static str,
    overrides: &'static [&'static str],
    /// Expected output before the signal is sent.
    line: &'static str,
    /// File in the run's directory that exists once the phase is held.
    file: &'static str,
    /// Expected output at the end.
    end: &'static str,
    /// Expected output when the run is resumed.
    next: &'static str,
}

const TUNED: &[&str] = &["sft.steps=3", "sft.batch=2", "sft.lr=1e-3"];

const HELD: [Held; 5] = [
    Held {
        point: "prepare.load",
        fault: "sleep(3600000)",
        overrides: &[],
        line: "run       run",
        file: "run.lock",
        end: "the run's directory is unchanged",
        next: "the run starts at step 0",
    },
    Held {
        point: "sft.step",
        fault: "1*off->2*sleep(1500)",
        overrides: TUNED,
        line: "fine-tuning   1/3",
        file: "phases.jsonl",
        end: "interrupted during supervised fine-tuning",
        next: "resuming  run/fine-tuning",
    },
    Held {
        point: "reference.fill",
        fault: "1*sleep(3000)->off",
        overrides: TUNED,
        line: "fine-tuning   3/3",
        file: ".reference.partial",
        end: "interrupted after supervised fine-tuning; --resume continues from run/reference",
        next: "reference run/reference",
    },
    Held {
        point: "checkpoint.fill",
        fault: "1*sleep(3000)->off",
        overrides: &["run.mode=distilled", "reward_model.warm_up_groups=2", "reward_model.batch_pairs=2"],
        line: "reward model ranks",
        file: "checkpoints/.step-000000.partial",
        end: "interrupted after 0 steps",
        next: "step-000000",
    },
    Held {
        point: "learn.forward",
        fault: "4*off->sleep(250)",
        overrides: &[],
        line: "step   1/4",
        file: "metrics.jsonl",
        end: "interrupted after",
        next: "run/checkpoints/step-00000",
    },
];

#[test]
#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]
fn signals_are_handled_in_every_phase() {
    for (i, Held { point, fault, overrides, line, file, end, next }) in HELD.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let served = ["checkpoint.every_minutes=0", "serve.enabled=true", "serve.listen=127.0.0.1:0"];
        let overrides = [overrides, &served].concat();
        let mut held = training(dir.path(), &overrides);
        held.env("FAILPOINTS", format!("{point}={fault}"));
        let mut running = Running::start(held);
        let serving = running.says("serving   http://");
        let address = serving.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
        running.says(line);
        running.until("it is not held", || dir.path().join("run").join(file).exists());
        // The server must answer while the phase is held.
        assert!(healthy(&address), "{point}");
        // Under `nohup` the tests ignore SIGHUP, and so does the program.
        let hang_up = if ignores_hang_up() { "-TERM" } else { "-HUP" };
        running.signal(["-TERM", hang_up, "-INT"][i % 3]);
        let (status, text) = running.end();
        assert!(text.contains(end), "{point}: {text}");
        assert!(status.code().is_some(), "{point}: it was killed by the signal: {text}");
        let output = resume(dir.path(), &[&overrides[..], &["serve.enabled=false"]].concat());
        assert!(output.status.success() && stderr(&output).contains(next), "{point}: {}", stderr(&output));
        assert_eq!(steps(dir.path()), 4, "{point}");
    }
}

/// Returns whether this process ignores SIGHUP, by `proc(5)`.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1
}

fn healthy(address: &str) -> bool {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.starts_with("HTTP/1.1 200")
}

#[test]
fn checkpoint_files_have_the_permissions_of_the_umask() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = [
        "run.steps=1",
        "run.mode=distilled",
        "reward_model.warm_up_groups=2",
        "policy.lora={ rank = 2 }",
        "checkpoint.dtype=bf16",
    ];
    let inner = training(dir.path(), &overrides);
    let mut outer = Command::new("sh");
    outer.current_dir(dir.path()).args(["-c", "umask 027; exec \"$@\"", "sh"]);
    let output = outer.arg(inner.get_program()).args(inner.get_args()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let run = dir.path().join("run");
    let files: Vec<PathBuf> = tree(&run).into_keys().map(|name| run.join(name)).filter(|path| path.is_file()).collect();
    assert!(
        files.iter().filter(|path| path.extension().is_some_and(|one| one == "safetensors")).count() >= 5,
        "{files:?}"
    );
    for path in files {
        let mode = path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o640, "{}", path.display());
    }
}

#[test]
fn a_run_whose_directory_is_moved_keeps_its_weights() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(training(dir.path(), &["run.steps=100000", "checkpoint.every_minutes=0"]));
    running.until("it makes no steps", || steps(dir.path()) >= 1);
    std::fs::rename(dir.path().join("run"), dir.path().join("moved")).unwrap();
    running.signal("-TERM");
    let (_, text) = running.end();
    let path = text.lines().find_map(|line| line.strip_prefix("checkpoint ")).unwrap_or_else(|| panic!("{text}"));
    assert!(dir.path().join(path).join("model.safetensors").exists(), "{text}");
}

#[test]
fn a_run_whose_lock_file_was_removed_is_not_shared() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = ["run.steps=100000", "checkpoint.every_minutes=0"];
    let mut running = Running::start(training(dir.path(), &overrides));
    running.until("it makes no steps", || steps(dir.path()) >= 1);
    std::fs::remove_file(dir.path().join("run/run.lock")).unwrap();
    let output = resume(dir.path(), &overrides);
    assert!(stderr(&output).contains("another process works on the run in run"), "{}", stderr(&output));
    running.signal("-TERM");
    running.end();
}

#[test]
fn special_files_and_invalid_names_are_refused_without_waiting() {
    for name in ["metrics.jsonl", "samples.jsonl", "journal.bin", "run.lock"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        assert!(Command::new("mkfifo").arg(dir.path().join("run").join(name)).status().unwrap().success());
        let (status, text) = Running::start(training(dir.path(), &[])).end();
        assert!(!status.success() && text.contains(&format!("{name} is not a regular file")), "{name}: {text}");
    }
    let dir = tempfile::tempdir().unwrap();
    let output =
        preceptor(dir.path()).arg("train").arg(config("offline.toml")).args(["--set", "run.name="]).output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("run.name"), "{}", stderr(&output));
    assert!(!dir.path().join("runs").exists());
}

#[test]
fn a_file_size_limit_is_an_error_like_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let inner = training(dir.path(), &["run.steps=40", "checkpoint.retry_s=0", "checkpoint.every_minutes=0"]);
    let mut outer = Command::new("sh");
    outer.current_dir(dir.path()).args(["-c", "ulimit -f 16; exec \"$@\"", "sh"]);
    let output = outer.arg(inner.get_program()).args(inner.get_args()).output().unwrap();
    let text = stderr(&output);
    assert!(output.status.code().is_some() && !output.status.success(), "{:?}: {text}", output.status);
    assert!(text.contains("training continues") && text.contains("File too large"), "{text}");
}

#[test]
fn the_marker_of_a_run_without_checkpoints_is_removed_with_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(training(dir.path(), &["run.steps=100000", "checkpoint.every_steps=3"]));
    let pending = dir.path().join("run/first-checkpoint.pending");
    running.says("checkpoint run");
    running.until("the marker stays", || !pending.exists());
    running.signal("-TERM");
    running.end();
    let last = std::fs::read_dir(dir.path().join("run/checkpoints")).unwrap().last().unwrap().unwrap().path();
    let about = std::fs::read_to_string(last.join("preceptor.json")).unwrap();
    assert!(serde_json::from_str::<Value>(&about).unwrap()["step"].as_u64() > Some(0));
}

#[test]
fn a_mirror_does_not_restore_a_checkpoint_that_was_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = format!("checkpoint.mirror=\"file://{}/mirror\"", dir.path().display());
    let overrides = [&STEPWISE[..], &[&mirror]].concat();
    let output = train(dir.path(), &overrides);
    assert!(output.status.success(), "{}", stderr(&output));
    // The run ends before the step of the checkpoint that was set aside.
    let shorter = [&overrides[..], &["run.steps=2", "learner.schedule=constant"]].concat();
    let output = resume_from(dir.path(), &shorter, "step-000001");
    assert!(output.status.success(), "{}", stderr(&output));
    let output = resume(dir.path(), &overrides);
    let text = stderr(&output);
    assert!(output.status.success() && !text.contains("brought"), "{text}");
    assert!(text.contains("resuming  run/checkpoints/step-000002"), "{text}");
    assert_eq!(steps(dir.path()), 4);
}
