//! Tests that runs written by an earlier version (tests/fixtures/formats) can be resumed to their end and replayed, and
//! that its label cache still answers.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::common::{copy, fixture, metrics, preceptor, stderr, trained};

/// Number of learner steps of each run, except that of `fine-tuning`.
const STEPS: u64 = 24;

/// Number of groups per step.
const BATCH: u64 = 2;

/// Creates a directory with the model, the data, and, unless `name` is empty, the run of that name as `run`.
fn laid_out(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let formats = fixture("formats");
    copy(&formats.join("model"), &dir.path().join("model"));
    for file in ["data.jsonl", "pairs.jsonl"] {
        std::fs::copy(formats.join(file), dir.path().join(file)).unwrap();
    }
    if !name.is_empty() {
        copy(&formats.join(name), &dir.path().join("run"));
    }
    dir
}

/// Trains in `dir/RUN` with the fixture's own resolved configuration.
fn train(dir: &Path, name: &str, run: &str, resume: bool) -> Output {
    let mut command = preceptor(dir);
    command.arg("train").arg(fixture("formats").join(name).join("config.toml")).args(["--run-dir", run]);
    command.args(resume.then_some("--resume")).output().unwrap()
}

fn replay(dir: &Path, more: &[&str]) -> Output {
    preceptor(dir).args(["replay", "run"]).args(more).output().unwrap()
}

/// Returns whether this machine and program compute the same bits as those that wrote the fixtures. Another processor
/// type or kernel may not; then both of the compared steps must be computed here.
fn computes_the_same_bits() -> bool {
    static SAME: OnceLock<bool> = OnceLock::new();
    *SAME.get_or_init(|| {
        let dir = laid_out("direct");
        let output = replay(dir.path(), &["--until", "1"]);
        let text = stderr(&output);
        assert!(output.status.success() || text.contains("error: step 1 gives weights"), "{text}");
        output.status.success()
    })
}

/// Returns the checkpoints of `run`, oldest first.
fn checkpoints(run: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// Resumes the run called `name` to its end of `steps` steps and replays it. At η = 0 the result must equal that of a
/// run that this program executes without interruption.
fn is_read(name: &str, steps: u64, synchronous: bool) {
    let dir = laid_out(name);
    let run = dir.path().join("run");
    let before = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let output = train(dir.path(), name, "run", true);
    let text = stderr(&output);
    assert!(output.status.success(), "{name}: {text}");
    assert!(text.contains("resuming  run/") && !text.contains("the run starts at step 0"), "{name}: {text}");
    assert_eq!(trained(&run), (0..BATCH * steps).collect::<Vec<_>>(), "{name}");
    let after = metrics(&run);
    assert_eq!(after.len() as u64, steps, "{name}");
    for (i, step) in after.iter().enumerate() {
        assert_eq!(step["step"], i + 1, "{name}");
    }
    // The lines of the steps up to the checkpoint are from the earlier version, including their times.
    let written = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let from: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("resuming  run/checkpoints/step-"))
        .map_or(0, |step| step.parse().unwrap());
    let lines = |text: &str| text.lines().take(from).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(lines(&written), lines(&before), "{name}");

    let output = replay(dir.path(), &[]);
    let (said, error) = (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output));
    if computes_the_same_bits() {
        assert!(output.status.success() && said.starts_with(&format!("{steps} steps, weights ")), "{name}: {error}");
    } else {
        assert!(output.status.success() || error.contains("gives weights"), "{name}: {error}");
    }
    if synchronous && computes_the_same_bits() {
        let output = train(dir.path(), name, "uninterrupted", false);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let uninterrupted = dir.path().join("uninterrupted");
        assert_eq!(after, metrics(&uninterrupted), "{name}");
        let last = |run: &Path| checkpoints(run).pop().unwrap();
        for file in ["model.safetensors", "resume/optimizer.safetensors"] {
            let read = |run: &Path| std::fs::read(last(run).join(file)).unwrap();
            assert!(read(&run) == read(&uninterrupted), "{file} of {name} differs from that of an unbroken run");
        }
    }
}

#[test]
fn an_earlier_asynchronous_run_with_groups_under_way_is_read() {
    is_read("direct", STEPS, false);
    let run = fixture("formats/direct");
    // Checks that the fixture has the intended content.
    let about = std::fs::read_to_string(checkpoints(&run).pop().unwrap().join("preceptor.json")).unwrap();
    let about: serde_json::Value = serde_json::from_str(&about).unwrap();
    assert!(about["groups"]["generated"].as_u64() > Some(0) && about["groups"]["labeled"].as_u64() > Some(0));
}

#[test]
fn an_earlier_run_with_a_reward_model_is_read() {
    is_read("distilled", STEPS, true);
}

#[test]
fn earlier_fine_tuning_under_way_and_its_result_are_read() {
    is_read("fine-tuning", 3, true);
    is_read("reference", STEPS, true);
}

#[test]
fn earlier_runs_with_a_value_model_and_of_preferences_are_read() {
    is_read("ppo", STEPS, true);
    is_read("preference", STEPS, true);
}

#[test]
fn an_earlier_run_resumes_from_its_earlier_checkpoint() {
    let dir = laid_out("preference");
    let run = dir.path().join("run");
    let first = checkpoints(&run).remove(0);
    let config = fixture("formats/preference/config.toml");
    let mut command = preceptor(dir.path());
    command.arg("train").arg(config).arg(format!("--resume={}", first.display()));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(trained(&run), (0..BATCH * STEPS).collect::<Vec<_>>());
}

/// Unpacks the label cache of an earlier version, `formats/PACKED`, into the folder `cache` of `dir`.
fn earlier_cache(dir: &Path, packed: &str) {
    let cache = dir.join("cache");
    std::fs::create_dir(&cache).unwrap();
    let packed = std::fs::File::open(fixture("formats").join(packed)).unwrap();
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    std::fs::write(cache.join("labels.redb"), bytes).unwrap();
}

/// Runs `label` with that cache and the labeler keys `sets`, with the output file `output`.
fn label(dir: &Path, output: &str, sets: &[&str]) -> Command {
    let mut command = preceptor(dir);
    command.args(["--log", "info", "label"]).arg(fixture("formats/tiny.toml"));
    command.args(["--input", "pairs.jsonl", "--output", output]);
    for set in sets.iter().chain(&["type=pairwise", "cache=/proc/self/cwd/cache"]) {
        command.args(["--set", &format!("labeler.{set}")]);
    }
    command
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn labels_of_an_earlier_cache_are_not_asked_for_again() {
    let dir = laid_out("");
    earlier_cache(dir.path(), "labels/labels.redb.gz");
    let output = label(dir.path(), "labels.jsonl", &["model=/proc/self/cwd/model"]).output().unwrap();
    let said = stderr(&output);
    assert!(output.status.success() && said.contains("0 questions to the judge, 6 from the cache"), "{said}");
    assert_eq!(text(&dir.path().join("labels.jsonl")), text(&fixture("formats/labels/labels.jsonl")));
}

/// The earlier keys include the server's address, at which no server listens now.
#[test]
fn labels_of_an_earlier_server_are_imported_once_by_concurrent_processes_and_found_after_it_moved() {
    let dir = laid_out("");
    earlier_cache(dir.path(), "served/labels.redb.gz");
    let before = std::fs::read(dir.path().join("cache/labels.redb")).unwrap();
    let label = |output: &str, port: u16| {
        let remote = format!(
            "remote={{ url = \"http://127.0.0.1:{port}/v1\", model = \"judge\", system = \"Be fair.\", probe = false, retries = 0, deadline_s = 1, outage_s = 0 }}"
        );
        let mut command = label(dir.path(), output, &["cot=true", &remote]);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let together: Vec<Child> = (0..4).map(|i| label(&format!("{i}.jsonl"), 18327)).collect();
    let mut imports = 0;
    for (i, child) in together.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        let said = stderr(&output);
        assert!(output.status.success() && said.contains("0 questions to the judge, 12 from the cache"), "{said}");
        assert_eq!(text(&dir.path().join(format!("{i}.jsonl"))), text(&fixture("formats/served/labels.jsonl")));
        imports += said.matches("12 labels of the earlier label cache").count();
    }
    assert_eq!(imports, 1);
    let output = label("moved.jsonl", 18328).wait_with_output().unwrap();
    let said = stderr(&output);
    assert!(output.status.success() && said.contains("0 questions to the judge, 12 from the cache"), "{said}");
    assert!(before == std::fs::read(dir.path().join("cache/labels.redb")).unwrap(), "the earlier file changed");
}
