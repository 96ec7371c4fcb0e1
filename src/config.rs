//! What a user writes: TOML, parsed once, strictly, validated whole.
//!
//! Every mistake of a file is told in one report, with its place, the key's path and the remedy. Each key is
//! documented at its field below.

mod choice;
mod labeling;
mod operation;
mod read;
mod read_labeling;
mod reader;
mod sections;
mod write;

use std::path::Path;

pub use choice::Choice;
pub use labeling::{Evidence, Labeler, LabelerKind, Method, Pairs, RemoteApi, RemoteJudge};
pub use operation::{Checkpoint, Control, Evaluation, Guard, GuardAction, Serve, Supervision, WeightDtype};
pub use reader::{ConfigError, ConfigErrors};
pub use sections::{
    AlgorithmKind, AverageKind, CorrectionKind, Data, DpoLoss, KlEstimator, KlPlace, LabelForm, Learner, LoraConfig,
    MatmulPrecision, Mode, OnLong, Policy, PolicyModel, Reward, RewardModel, RewardScaling, Rollout, RolloutWeights,
    Run, Schedule, Scratch, Sft, UpdateMode, ValueKind,
};

use crate::bounded;
use reader::Document;

/// A run's configuration, valid as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The run itself.
    pub run: Run,
    /// The prompts.
    pub data: Data,
    /// The model that is trained.
    pub policy: Policy,
    /// Generation.
    pub rollout: Rollout,
    /// AI feedback.
    pub labeler: Labeler,
    /// From feedback to reward.
    pub reward: Reward,
    /// The reward model, where the mode has one.
    pub reward_model: RewardModel,
    /// Supervised fine-tuning first.
    pub sft: Sft,
    /// Gradient steps.
    pub learner: Learner,
    /// Win rates while it learns.
    pub evaluation: Evaluation,
    /// How much is under way at once, while it runs.
    pub controller: Control,
    /// Bounds within which the run is healthy.
    pub guard: Guard,
    /// What is kept.
    pub checkpoint: Checkpoint,
    /// The HTTP endpoints.
    pub serve: Serve,
    /// What happens when something fails.
    pub supervision: Supervision,
}

/// Reads the file at `path` with `overrides` (`section.key=value`) applied. Paths in it are relative to its folder.
///
/// # Errors
/// All mistakes at once.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config, ConfigErrors> {
    let origin = path.display().to_string();
    let text = bounded::text(path, bounded::WRITTEN).map_err(|error| {
        ConfigErrors::one(&origin, "", &format!("cannot be read: {error}; see configs/ for files that work"))
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    // In full, so that the resolved configuration means the same from wherever it is read.
    let folder = std::path::absolute(folder.join(".")).unwrap_or_else(|_| folder.to_owned());
    parse(&text, &origin, &folder, overrides)
}

/// As [`load`], from text; `origin` names it in errors, `folder` is what paths are relative to.
///
/// # Errors
/// All mistakes at once.
pub fn parse(text: &str, origin: &str, folder: &Path, overrides: &[String]) -> Result<Config, ConfigErrors> {
    let mut document = Document::new(text, origin, overrides)?;
    let config = Config {
        run: read::run(&mut document),
        data: read::data(&mut document, folder),
        policy: read::policy(&mut document, folder),
        rollout: read::rollout(&mut document),
        labeler: read_labeling::labeler(&mut document, folder),
        reward: read::reward(&mut document),
        reward_model: read::reward_model(&mut document, folder),
        sft: read::sft(&mut document),
        learner: read::learner(&mut document),
        evaluation: read::evaluation(&mut document),
        controller: read::controller(&mut document),
        guard: read::guard(&mut document),
        checkpoint: read::checkpoint(&mut document),
        serve: read::serve(&mut document),
        supervision: read::supervision(&mut document),
    };
    config.check(&mut document);
    document.finish(config)
}

impl Config {
    /// Whether the learner makes up for tokens that were drawn by other weights than it has, or bears them. A preference loss
    /// is known to bear older samples (Noukhovitch et al. 2024); a clip against the weights that sampled bounds what they do,
    /// as PPO always did.
    pub fn bears_other_weights(&self) -> bool {
        let learner = &self.learner;
        learner.correction != CorrectionKind::None
            || learner.clip > 0.0
            || learner.algorithm == AlgorithmKind::OnlineDpo
    }

    /// Whether all that samples does so on the CPU, in what it computes in best.
    pub fn samples_as_a_cpu_likes(&self) -> bool {
        let (policy, devices) = (&self.policy, &self.rollout.devices);
        let places = if devices.is_empty() { std::slice::from_ref(&policy.device) } else { devices };
        policy.dtype == WeightDtype::F32 && places.iter().all(|place| place == "cpu")
    }

    /// What no single key can tell.
    fn check(&self, document: &mut Document) {
        let pairs = self.learner.algorithm == AlgorithmKind::OnlineDpo;
        if document.sound(&["run.mode", "learner.algorithm"]) && pairs != (self.run.mode == Mode::Preference) {
            let remedy = if pairs {
                "\"online-dpo\" learns from pairs; set run.mode = \"preference\""
            } else {
                "run.mode = \"preference\" has no rewards to learn from; set \"online-dpo\""
            };
            document.error("learner.algorithm", remedy);
        }
        if document.sound(&["run.mode", "reward_model.pairs"])
            && self.run.mode == Mode::Human
            && self.reward_model.pairs.is_none()
        {
            document.error("reward_model.pairs", "is missing; run.mode = \"human\" learns from a file of preferences");
        }
        if self.evaluation.every_steps > 0 && document.sound(&["evaluation.every_steps", "data.holdout", "run.mode"]) {
            if self.data.holdout == 0.0 {
                let remedy = "needs prompts that are not learned from; set data.holdout, to 0.05 perhaps";
                document.error("evaluation.every_steps", remedy);
            }
            if self.run.mode == Mode::Human {
                document.error("evaluation.every_steps", "needs a labeler, and run.mode = \"human\" has none");
            }
        }
        if document.sound(&["labeler.max_cost"]) && self.labeler.max_cost > 0.0 {
            let priced = |judge: &RemoteJudge| judge.price_prompt > 0.0 || judge.price_completion > 0.0;
            if !self.labeler.methods.iter().filter_map(|method| method.remote.as_ref()).any(priced) {
                document.error(
                    "labeler.max_cost",
                    "bounds nothing: no remote judge has a price; set price_prompt and price_completion in labeler.remote",
                );
            }
        }
        let steps = self.learner.minibatches as u64;
        if document.sound(&["learner.batch_groups", "learner.minibatches"]) && steps > self.learner.batch_groups {
            document.error(
                "learner.minibatches",
                &format!(
                    "{steps} is more than learner.batch_groups = {}; a minibatch is at least a group",
                    self.learner.batch_groups
                ),
            );
        }
        let uncorrected = !self.bears_other_weights();
        if document.sound(&["rollout.weights", "learner.correction"])
            && uncorrected
            && self.rollout.weights != RolloutWeights::F32
        {
            document.error(
                "learner.correction",
                &format!(
                    "\"none\" with rollout.weights = \"{}\" would learn from tokens of other weights as if they were its own; set \"tis\"",
                    self.rollout.weights.word()
                ),
            );
        }
        let uncorrected = uncorrected && self.learner.eta > 0;
        if document.sound(&["rollout.weights", "rollout.devices", "policy.device", "policy.dtype"])
            && self.rollout.weights != RolloutWeights::F32
            && !self.samples_as_a_cpu_likes()
        {
            document.error(
                "rollout.weights",
                &format!(
                    "\"{}\" samples on the CPU beside weights in f32; set it to \"f32\", which samples with the weights as they are",
                    self.rollout.weights.word()
                ),
            );
        }
        if document.sound(&["reward.reference", "reward.kl_coef", "learner.algorithm"]) && !self.reward.reference {
            let charged = match pairs {
                true => Some("learner.algorithm = \"online-dpo\" learns by it".to_owned()),
                false => (self.reward.kl_coef > 0.0)
                    .then(|| format!("reward.kl_coef = {} charges for it; set it to 0", self.reward.kl_coef)),
            };
            if let Some(why) = charged {
                document.error("reward.reference", &format!("must be true: {why}"));
            }
        }
        let rollout = &self.rollout;
        if document.sound(&["rollout.workers", "rollout.devices"]) && rollout.devices.len() > rollout.workers {
            document.error(
                "rollout.devices",
                &format!(
                    "names {} places for {} rollout.workers; the last would have nothing to do",
                    rollout.devices.len(),
                    rollout.workers
                ),
            );
        }
        if document.sound(&["learner.eta", "learner.correction"]) && uncorrected {
            document.error(
                "learner.correction",
                &format!(
                    "\"none\" with learner.eta = {} would learn from tokens of older weights as if they were new; set \"tis\", or eta = 0",
                    self.learner.eta
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str =
        "[run]\nname = \"x\"\nsteps = 3\n[data]\npath = \"Cargo.toml\"\n[policy]\nmodel = { scratch = {} }\n";

    fn read(text: &str, overrides: &[&str]) -> Result<Config, ConfigErrors> {
        let overrides: Vec<String> = overrides.iter().map(|one| (*one).to_owned()).collect();
        parse(text, "x.toml", Path::new(env!("CARGO_MANIFEST_DIR")), &overrides)
    }

    /// Parses `MINIMAL` plus `more` and expects exactly the lines that begin with each of `expected`, in order.
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
    fn many_mistakes_are_counted_and_long_ones_cut() {
        let many: String = (0..50_000).map(|i| format!("k{i} = 1\n")).collect();
        let began = crate::process::thread_seconds();
        let errors = read(&format!("{MINIMAL}[learner]\n{many}"), &[]).unwrap_err();
        assert_eq!((errors.0.len(), errors.0[50].message.as_str()), (51, "and 49950 mistakes more"));
        let long = "x".repeat(100_000);
        let errors = read(&format!("{MINIMAL}[learner]\neta = \"{long}\"\n{long} = 1\n"), &[]).unwrap_err();
        assert!(errors.to_string().len() < 3000, "{errors}");
        let deep = format!("learner{}=1", ".a".repeat(50_000));
        let errors = read(MINIMAL, &[&deep]).unwrap_err().to_string();
        assert!(errors.contains("is not section.key=value") && errors.len() < 500, "{errors}");
        assert!(
            crate::process::thread_seconds() - began < 20.0,
            "each mistake is looked for in the whole file, or each key in all others"
        );
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
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
    fn each_mistake_is_told_with_its_place_and_remedy() {
        check("[learner]\netta = 1\n", &["x.toml:9: learner.etta: unknown key; did you mean \"eta\"?"]);
        check("[lerner]\neta = 1\n", &["x.toml:8: lerner: unknown section; did you mean \"learner\"?"]);
        check("[learner]\neta = \"1\"\n", &["x.toml:9: learner.eta: \"1\" is no whole number"]);
        check("[learner]\neta = -1\n", &["x.toml:9: learner.eta: -1 is no whole number"]);
        check(
            "[rollout]\ntemperature = 0\n",
            &["x.toml:9: rollout.temperature: 0 is out of range; it must be above 0"],
        );
        check(
            "[learner]\nalgorithm = \"rlo\"\n",
            &[
                "x.toml:9: learner.algorithm: \"rlo\" is none of rloo, reinforce, ppo, grpo, online-dpo; did you mean \"rloo\"?",
            ],
        );
        check("[rollout]\nslots = 65\n", &["x.toml:9: rollout.slots: 65 is out of range; it must be from 1 to 64"]);
        check(
            "[learner]\n# off-policy\ncorrection = \"none\"\n",
            &["x.toml:10: learner.correction: \"none\" with learner.eta = 1"],
        );
        check("[evaluation]\nevery_steps = 5\n", &["x.toml:9: evaluation.every_steps: needs prompts that are not"]);
        for weights in ["bf16", "q8_0"] {
            check(
                &format!("[rollout]\nweights = \"{weights}\"\n[learner]\neta = 0\ncorrection = \"none\"\n"),
                &[&format!("x.toml:12: learner.correction: \"none\" with rollout.weights = \"{weights}\" would learn")],
            );
        }
        check(
            "[reward]\nreference = false\n",
            &["x.toml:9: reward.reference: must be true: reward.kl_coef = 0.05 charges for it; set it to 0"],
        );
        check(
            "lora = { ranks = 2, targets = [\"q\"] }\n",
            &["x.toml:8: policy.lora: targets: \"q\" is none of q_proj", "x.toml:8: policy.lora: ranks: unknown key"],
        );
        check("[serve]\nlisten = \"0.0.0.0:1\"\n", &["x.toml:9: serve.listen: 0.0.0.0:1 can be reached"]);
        // What stands where a variable's name belongs may be the secret, and is not repeated.
        let secret = "[serve]\nlisten = \"0.0.0.0:1\"\ntoken_env = \"sk-0123\"\n";
        check(secret, &["x.toml:10: serve.token_env: is no name of an environment variable; it names the variable"]);
        let secret = "[labeler]\ntype = \"direct\"\nremote = { url = \"http://me:sk-0@h\", model = \"m\" }\n";
        check(
            secret,
            &["x.toml:10: labeler.remote: url: holds a user's name or a password, which would stand in logs"],
        );
        let secret =
            "[labeler]\ntype = \"direct\"\nremote = { url = \"http://h\", model = \"m\", api_key_env = \"sk-0\" }\n";
        check(secret, &["x.toml:10: labeler.remote: api_key_env: is no name of an environment variable; it names the"]);
        check(
            "[serve]\nhosts = [\"http://a.test\"]\n",
            &["x.toml:9: serve.hosts: \"http://a.test\" is no name of a host"],
        );
        check("[serve]\nlisten = \"here\"\n", &["x.toml:9: serve.listen: \"here\" is no address"]);
        check("[supervision]\nbackoff_s = -1\n", &["x.toml:9: supervision.backoff_s: -1 is out of range"]);
        check(
            "[[labeler.members]]\ntype = \"direct\"\n[labeler]\n",
            &["x.toml:8: labeler.members: stand in a panel only"],
        );
        check(
            "[labeler]\ntype = \"panel\"\n[[labeler.members]]\ntype = \"direct\"\nshot = 1\n",
            &["x.toml:10: labeler.members: [0].shot: unknown key; did you mean \"shots\"?"],
        );
        check("[labeler]\ntype = \"panel\"\n", &["x.toml:8: labeler.members: is missing or empty"]);
        check(
            "[learner]\nalgorithm = \"online-dpo\"\n",
            &["x.toml:9: learner.algorithm: \"online-dpo\" learns from pairs"],
        );
        check(
            "[labeler]\ntemplates = \"poems\"\n",
            &["x.toml:9: labeler.templates: \"poems\" is none of summarization"],
        );
        check(
            "[labeler]\ntype = \"direct\"\nremote = { url = \"h\", api = \"char\" }\n",
            &[
                "x.toml:10: labeler.remote: url: \"h\" is no address",
                "x.toml:10: labeler.remote: model: is missing",
                "x.toml:10: labeler.remote: api: \"char\" is none of chat, completions; did you mean \"chat\"?",
            ],
        );
        check(
            "[labeler]\nremote = { url = \"http://h\", model = \"m\" }\n",
            &["x.toml:9: labeler.remote: serves type = \"direct\" and \"pairwise\" only"],
        );
        check("labeler = 3\n", &["x.toml:8: policy.labeler: unknown key"]);
    }

    #[test]
    fn all_mistakes_are_told_at_once_and_none_twice() {
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
    fn the_resolved_configuration_reads_back_as_itself() {
        let more = "[labeler]\nmodel = [\"a.gguf\", { pip = \"m==1\" }, { hub = \"o/n\", revision = \"r\" }]\nchat = false\n[reward]\nclip = 0\n";
        let panel = "[labeler]\ntype = \"panel\"\npairs = \"all\"\n[[labeler.members]]\ntype = \"pairwise\"\ncot = true\n[[labeler.members]]\nweight = 2\ntype = \"direct\"\nremote = { url = \"http://h/v1\", model = \"m\", hedge_after_s = 2 }\n";
        let lora = "lora = { rank = 4, targets = [\"v_proj\"] }\n";
        for more in ["", lora, more, panel] {
            let text = format!("{MINIMAL}{more}");
            let config = read(&text, &[]).unwrap();
            assert_eq!(read(&config.to_toml(), &[]).unwrap(), config);
        }
    }
}
