//! Relations between keys of different sections, which the declarations of single keys cannot express.

use super::document::Document;
use super::{
    AlgorithmKind, Choice, Config, EngineKind, LabelEngine, Mode, RemoteJudge, RolloutWeights, WIN_RATE, operation,
};
use crate::pipeline::generate::MAX_SLOTS;

/// Largest number of tokens of a group whose result is a message of a megabyte at most: of each token, it has the id and the
/// version in up to four bytes, and the log-probability in four.
const MAX_RESULT_TOKENS: usize = 80_000;

impl Config {
    /// Checks the relations between keys of different sections.
    pub(super) fn check(&self, document: &Document) {
        self.check_mode(document);
        self.check_evaluation(document);
        self.check_data_and_labeler(document);
        self.check_minibatches(document);
        self.check_replicas(document);
        self.check_off_policy(document);
        self.check_reference(document);
        self.check_devices(document);
        self.check_engine(document);
    }

    /// Checks that the mode suits the algorithm and has the preferences that it needs.
    fn check_mode(&self, document: &Document) {
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
    }

    /// Checks that evaluations have prompts and a judge, and that keys which need win rates have them.
    fn check_evaluation(&self, document: &Document) {
        if self.evaluation.every_steps > 0 && document.sound(&["evaluation.every_steps", "data.holdout", "run.mode"]) {
            if self.data.holdout == 0.0 {
                let remedy = "needs held-out prompts; set data.holdout, for example to 0.05";
                document.error("evaluation.every_steps", remedy);
            }
            if self.run.mode == Mode::Human && self.evaluation.labeler.is_none() {
                let remedy = "needs a judge, and run.mode = \"human\" has no labeler; set evaluation.labeler";
                document.error("evaluation.every_steps", remedy);
            }
        }
        if self.evaluation.every_steps == 0 && document.sound(&["evaluation.every_steps"]) {
            let needs = "needs the win rates of evaluations; set evaluation.every_steps";
            if self.checkpoint.best.as_deref() == Some(WIN_RATE) {
                document.error("checkpoint.best", &format!("\"{WIN_RATE}\" {needs}"));
            }
            if self.evaluation.patience > 0 {
                document.error("evaluation.patience", needs);
            }
        }
    }

    /// Refuses keys of `[data]` and `[labeler]` that would have no effect.
    fn check_data_and_labeler(&self, document: &Document) {
        if document.sound(&["data.chat", "data.chat_template_kwargs"])
            && !self.data.chat
            && !self.data.chat_template_kwargs.is_empty()
        {
            document.error("data.chat_template_kwargs", "has no effect with data.chat = false; remove it");
        }
        if document.sound(&["labeler.max_cost"]) && self.labeler.max_cost > 0.0 {
            let priced = |judge: &RemoteJudge| judge.price_prompt > 0.0 || judge.price_completion > 0.0;
            let judges =
                self.labeler.methods.iter().chain(self.evaluation.labeler.iter().flat_map(|judge| judge.iter()));
            if !judges.filter_map(|method| method.remote.as_ref()).any(priced) {
                document.error(
                    "labeler.max_cost",
                    "has no effect: no remote judge has a price; set price_prompt and price_completion in labeler.remote",
                );
            }
        }
    }

    /// Checks that the learner's replicas share weights on a CPU, or have devices of which the first is the policy's.
    fn check_replicas(&self, document: &Document) {
        if !document.sound(&["learner.replicas", "learner.devices", "policy.device"]) {
            return;
        }
        let (replicas, devices, device) = (self.learner.replicas, &self.learner.devices, &self.policy.device);
        if let Some(first) = devices.first() {
            if first != device {
                document.error(
                    "learner.devices",
                    &format!("begins with {first:?}, and policy.device is {device:?}; the first replica uses the policy's device"),
                );
            }
            if replicas > 1 && replicas != devices.len() {
                document.error(
                    "learner.replicas",
                    &format!("is {replicas}, but learner.devices lists {}; remove learner.replicas", devices.len()),
                );
            }
        } else if replicas > 1 && device != "cpu" {
            document.error(
                "learner.replicas",
                &format!("is {replicas}, but replicas share weights on a CPU, and policy.device is {device:?}; set learner.devices"),
            );
        }
    }

    /// Checks that each minibatch has a group.
    fn check_minibatches(&self, document: &Document) {
        let steps = self.learner.minibatches as u64;
        if document.sound(&["learner.batch_groups", "learner.minibatches"]) && steps > self.learner.batch_groups {
            document.error(
                "learner.minibatches",
                &format!(
                    "{steps} is more than learner.batch_groups = {}; a minibatch needs at least one group",
                    self.learner.batch_groups
                ),
            );
        }
    }

    /// Checks that tokens of other weights than the policy's are corrected for, and that the rollouts' devices support
    /// their format of weights.
    fn check_off_policy(&self, document: &Document) {
        let uncorrected = !self.tolerates_off_policy();
        if document.sound(&["rollout.weights", "learner.correction"])
            && uncorrected
            && self.rollout.weights != RolloutWeights::F32
        {
            document.error(
                "learner.correction",
                &format!(
                    "\"none\" with rollout.weights = \"{}\" would train on off-policy tokens as if they were on-policy; set \"tis\"",
                    self.rollout.weights.word()
                ),
            );
        }
        if document.sound(&["rollout.weights", "rollout.devices", "policy.device", "policy.dtype"])
            && self.rollout.weights != RolloutWeights::F32
            && !self.rollouts_on_cpu_f32()
        {
            document.error(
                "rollout.weights",
                &format!(
                    "\"{}\" requires rollouts on the CPU and policy.dtype = \"f32\"; set it to \"f32\", which samples with the policy's own weights",
                    self.rollout.weights.word()
                ),
            );
        }
        if document.sound(&["learner.eta", "learner.correction"]) && uncorrected && self.learner.eta > 0 {
            document.error(
                "learner.correction",
                &format!(
                    "\"none\" with learner.eta = {} would train on stale tokens as if they were fresh; set \"tis\", or eta = 0",
                    self.learner.eta
                ),
            );
        }
    }

    /// Checks that the reference policy exists where rewards or the loss use it.
    fn check_reference(&self, document: &Document) {
        if document.sound(&["reward.reference", "reward.kl_coef", "learner.algorithm"]) && !self.reward.reference {
            let charged = match self.learner.algorithm == AlgorithmKind::OnlineDpo {
                true => Some("the loss of learner.algorithm = \"online-dpo\" needs it".to_owned()),
                false => (self.reward.kl_coef > 0.0)
                    .then(|| format!("reward.kl_coef = {} needs it; set that to 0", self.reward.kl_coef)),
            };
            if let Some(why) = charged {
                document.error("reward.reference", &format!("must be true: {why}"));
            }
        }
    }

    /// Checks that servers are listed exactly if they sample, and refuses keys that they cannot follow.
    fn check_engine(&self, document: &Document) {
        let rollout = &self.rollout;
        let served = rollout.engine.is_served();
        self.check_workers(document);
        if document.sound(&["rollout.engine", "rollout.servers"]) && served == rollout.servers.is_empty() {
            let message = match served {
                true => format!("is missing; rollout.engine = \"{}\" samples on servers", rollout.engine.word()),
                false => {
                    format!(
                        "has no effect with rollout.engine = \"{}\"; set engine to \"vllm\" or \"sglang\", or remove it",
                        rollout.engine.word()
                    )
                }
            };
            document.error("rollout.servers", &message);
        }
        if rollout.engine == EngineKind::Workers {
            self.check_without_rollouts("the workers sample", document);
            return;
        }
        if !served {
            let on_cpu = if rollout.devices.is_empty() {
                self.policy.device == "cpu"
            } else {
                rollout.devices.iter().any(|device| device == "cpu")
            };
            if document.sound(&["rollout.slots", "rollout.devices", "policy.device"])
                && on_cpu
                && rollout.slots > MAX_SLOTS
            {
                document.error(
                    "rollout.slots",
                    &format!(
                        "is {}, but a rollout actor on a CPU has at most {MAX_SLOTS}; lower it, or add rollout.workers",
                        rollout.slots
                    ),
                );
            }
            return;
        }
        let word = rollout.engine.word();
        let restricted = [
            ("rollout.top_k", rollout.top_k > 0),
            ("rollout.top_p", rollout.top_p < 1.0),
            ("rollout.min_p", rollout.min_p > 0.0),
            ("rollout.repetition_penalty", rollout.repetition_penalty != 1.0),
        ];
        for (key, _) in restricted.iter().filter(|(key, set)| *set && document.sound(&[key])) {
            document.error(key, &format!("is not available with rollout.engine = \"{word}\": the servers' log-probabilities would be those of the restricted distribution; remove it"));
        }
        if document.sound(&["rollout.weights"]) && rollout.weights != RolloutWeights::F32 {
            document.error(
                "rollout.weights",
                &format!("has no effect with rollout.engine = \"{word}\": the servers sample; remove it"),
            );
        }
        self.check_without_rollouts("the servers sample", document);
        if document.sound(&["rollout.engine", "policy.lora", "sft.steps"])
            && self.policy.lora.is_some()
            && self.sft.steps > 0
        {
            let message = format!(
                "fine-tunes the weights below the adapters, which the servers of rollout.engine = \"{word}\" do not have; fine-tune in another run, and serve and configure its checkpoint"
            );
            document.error("sft.steps", &message);
        }
        if document.sound(&["rollout.engine", "learner.correction"]) && !self.tolerates_off_policy() {
            document.error("learner.correction", &format!("\"none\" with rollout.engine = \"{word}\" would ignore that servers compute other log-probabilities than the learner; set \"tis\""));
        }
    }

    /// Refuses keys of rollouts in this process, which does not sample because of `why`, and slots that no group fits in.
    fn check_without_rollouts(&self, why: &str, document: &Document) {
        let (rollout, word) = (&self.rollout, self.rollout.engine.word());
        let local = [("rollout.devices", !rollout.devices.is_empty()), ("rollout.workers", rollout.workers > 1)];
        for (key, _) in local.iter().filter(|(key, set)| *set && document.sound(&[key])) {
            document.error(key, &format!("has no effect with rollout.engine = \"{word}\": {why}; remove it"));
        }
        if document.sound(&["rollout.slots", "rollout.group_size"]) && rollout.slots < rollout.group_size {
            document.error(
                "rollout.slots",
                &format!(
                    "is {}, but the {} completions of a group are sampled together; raise it",
                    rollout.slots, rollout.group_size
                ),
            );
        }
    }

    /// Checks that a NATS server is named exactly if workers sample, and that the run has a name there.
    fn check_workers(&self, document: &Document) {
        if !document.sound(&["rollout.engine", "cluster.nats", "cluster.run", "run.name"]) {
            return;
        }
        let (workers, cluster) = (self.rollout.engine == EngineKind::Workers, &self.cluster);
        if self.has_workers() && cluster.nats.is_none() {
            let key = if workers { "rollout.engine" } else { "labeler.engine" };
            let message = format!(
                "is missing; with {key} = \"workers\" the node and its workers meet at a NATS server, for example \"nats://127.0.0.1:4222\""
            );
            document.error("cluster.nats", &message);
        }
        if !self.has_workers()
            && let Some(nats) = &cluster.nats
        {
            let message = format!(
                "{nats:?} has no effect with rollout.engine = \"{}\" and labeler.engine = \"{}\"; set one of them to \"workers\", or remove it",
                self.rollout.engine.word(),
                self.labeler.engine.word()
            );
            document.error("cluster.nats", &message);
        }
        if self.labeler.engine == LabelEngine::Workers && document.sound(&["labeler.remote", "labeler.members"]) {
            if self.labeler.methods.iter().all(|method| method.remote.is_some()) {
                document.error("labeler.engine", "is \"workers\", but no judge of the labeler has weights: judges of labeler.remote are asked by the node; remove it");
            }
            if document.sound(&["run.mode", "reward_model.pairs", "evaluation.every_steps"]) && !self.asks_labeler() {
                document.error("labeler.engine", "is \"workers\", but this run asks no labeler: neither training nor evaluations need labels; remove it");
            }
            if self.labeler.device.is_some() {
                document.error(
                    "labeler.device",
                    "has no effect with labeler.engine = \"workers\": a worker has its own --device; remove it",
                );
            }
        }
        if !workers && cluster.part.is_some() {
            document.error("cluster.part", "has no effect: rollout.engine is not \"workers\"; remove it");
        }
        if document.sound(&["cluster.slowest"]) && cluster.slowest > 0.0 && cluster.slowest < 1.5 {
            document
                .error("cluster.slowest", "must be 0 or 1.5 at least; with less, many workers would rest by chance");
        }
        let part = cluster.part.unwrap_or(usize::MAX).min(self.rollout.group_size);
        let tokens = part.saturating_mul(self.rollout.max_new_tokens);
        if workers && document.sound(&["rollout.group_size", "rollout.max_new_tokens"]) && tokens > MAX_RESULT_TOKENS {
            let message = format!(
                "{} tokens in each of {part} completions may give a result of more than 1 MiB, which NATS does not carry; lower it, or set cluster.part so that a piece of work has at most {MAX_RESULT_TOKENS} tokens",
                self.rollout.max_new_tokens
            );
            document.error("rollout.max_new_tokens", &message);
        }
        if self.has_workers()
            && cluster.run.is_none()
            && let Err(error) = operation::check_board(&self.run.name)
        {
            document.error("cluster.run", &format!("is missing, and run.name cannot take its place: {error}"));
        }
    }

    /// Checks that each rollout device has a worker.
    fn check_devices(&self, document: &Document) {
        let rollout = &self.rollout;
        if document.sound(&["rollout.workers", "rollout.devices"]) && rollout.devices.len() > rollout.workers {
            document.error(
                "rollout.devices",
                &format!(
                    "lists {} devices for {} rollout.workers; remove devices or add workers",
                    rollout.devices.len(),
                    rollout.workers
                ),
            );
        }
    }
}
