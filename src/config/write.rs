//! The resolved configuration, every key written out; it parses back to itself.

use toml::{Table, Value};

use super::choice::Choice;
use super::{Config, Method, PolicyModel, RemoteJudge};
use crate::source::{Candidate, ModelRef};

impl Config {
    /// As TOML. Paths are written in full, so that the text means the same wherever it is put.
    pub fn to_toml(&self) -> String {
        let mut root = Table::new();
        for (name, section) in [
            ("run", self.run_table()),
            ("data", self.data_table()),
            ("policy", self.policy_table()),
            ("rollout", self.rollout_table()),
            ("labeler", self.labeler_table()),
            ("reward", self.reward_table()),
            ("reward_model", self.reward_model_table()),
            ("sft", self.sft_table()),
            ("learner", self.learner_table()),
            ("evaluation", self.evaluation_table()),
            ("controller", self.controller_table()),
            ("guard", self.guard_table()),
            ("checkpoint", self.checkpoint_table()),
            ("serve", self.serve_table()),
            ("supervision", self.supervision_table()),
        ] {
            root.insert(name.into(), Value::Table(section));
        }
        root.to_string()
    }

    fn run_table(&self) -> Table {
        let run = &self.run;
        let mut table = table([
            ("name", text(&run.name)),
            ("mode", word(run.mode)),
            ("seed", whole(run.seed)),
            ("steps", whole(run.steps)),
            ("tensorboard", Value::Boolean(run.tensorboard)),
            ("samples_max_bytes", whole(run.samples_max_bytes)),
            ("samples_keep", whole(run.samples_keep as u64)),
        ]);
        optional(&mut table, "dir", run.dir.as_ref().map(|dir| text(dir.display())));
        table
    }

    fn data_table(&self) -> Table {
        let data = &self.data;
        let mut table = table([
            ("path", text(data.path.display())),
            ("prompt_field", text(&data.prompt_field)),
            ("reference_field", text(&data.reference_field)),
            ("holdout", Value::Float(data.holdout)),
            ("instruction", text(&data.instruction)),
            ("chat", Value::Boolean(data.chat)),
            ("shuffle", Value::Boolean(data.shuffle)),
            ("max_prompt_tokens", whole(data.max_prompt_tokens as u64)),
            ("on_long", word(data.on_long)),
        ]);
        optional(&mut table, "system", data.system.as_ref().map(text));
        table
    }

    fn policy_table(&self) -> Table {
        let model = match &self.policy.model {
            PolicyModel::Reference(reference) => model_ref(reference),
            PolicyModel::Scratch(scratch) => Value::Table(table([(
                "scratch",
                Value::Table(table([
                    ("hidden", whole(scratch.hidden as u64)),
                    ("layers", whole(scratch.layers as u64)),
                    ("heads", whole(scratch.heads as u64)),
                    ("kv_heads", whole(scratch.kv_heads as u64)),
                    ("intermediate", whole(scratch.intermediate as u64)),
                    ("context", whole(scratch.context as u64)),
                    ("seed", whole(scratch.seed)),
                    ("init_std", Value::Float(scratch.init_std)),
                ])),
            )])),
        };
        let mut all = table([
            ("model", model),
            ("device", text(&self.policy.device)),
            ("dtype", word(self.policy.dtype)),
            ("matmul_precision", word(self.policy.matmul_precision)),
            ("resolve_timeout_s", whole(self.policy.resolve_timeout_s)),
        ]);
        let lora = self.policy.lora.as_ref().map(|lora| {
            let targets = lora.targets.iter().map(text).collect();
            Value::Table(table([
                ("rank", whole(lora.rank as u64)),
                ("alpha", Value::Float(lora.alpha)),
                ("targets", Value::Array(targets)),
            ]))
        });
        optional(&mut all, "lora", lora);
        all
    }

    fn rollout_table(&self) -> Table {
        let rollout = &self.rollout;
        table([
            ("workers", whole(rollout.workers as u64)),
            ("devices", Value::Array(rollout.devices.iter().map(text).collect())),
            ("threads", whole(rollout.threads as u64)),
            ("group_size", whole(rollout.group_size as u64)),
            ("slots", whole(rollout.slots as u64)),
            ("max_new_tokens", whole(rollout.max_new_tokens as u64)),
            ("temperature", Value::Float(rollout.temperature)),
            ("top_k", whole(rollout.top_k as u64)),
            ("top_p", Value::Float(rollout.top_p)),
            ("min_p", Value::Float(rollout.min_p)),
            ("repetition_penalty", Value::Float(rollout.repetition_penalty)),
            ("stop", Value::Array(rollout.stop.iter().map(text).collect())),
            ("stop_ids", Value::Array(rollout.stop_ids.iter().map(|id| whole(u64::from(*id))).collect())),
            ("weights", word(rollout.weights)),
            ("update", word(rollout.update)),
            ("capacity", whole(rollout.capacity as u64)),
        ])
    }

    fn labeler_table(&self) -> Table {
        let labeler = &self.labeler;
        let mut table = table([
            ("workers", whole(labeler.workers as u64)),
            ("threads", whole(labeler.threads as u64)),
            ("pairs", word(labeler.pairs)),
            ("retries", whole(u64::from(labeler.retries))),
            ("max_cost", Value::Float(labeler.max_cost)),
            ("capacity", whole(labeler.capacity as u64)),
        ]);
        table.insert("cache_entries".into(), whole(labeler.cache_entries));
        optional(&mut table, "device", labeler.device.as_ref().map(text));
        optional(&mut table, "cache", labeler.cache.as_ref().map(|path| text(path.display())));
        if labeler.panel {
            table.insert("type".into(), text("panel"));
            let members = labeler.methods.iter().map(|method| Value::Table(method_table(method))).collect();
            table.insert("members".into(), Value::Array(members));
        } else {
            table.extend(labeler.methods.iter().flat_map(method_table));
        }
        table
    }

    fn reward_model_table(&self) -> Table {
        let model = &self.reward_model;
        let mut table = table([
            ("warm_up_groups", whole(model.warm_up_groups)),
            ("epochs", whole(model.epochs)),
            ("online", Value::Boolean(model.online)),
            ("lr", Value::Float(model.lr)),
            ("head_lr", Value::Float(model.head_lr)),
            ("batch_pairs", whole(model.batch_pairs as u64)),
            ("max_grad_norm", Value::Float(model.max_grad_norm)),
            ("labels", word(model.labels)),
            ("holdout", Value::Float(model.holdout)),
        ]);
        optional(&mut table, "device", model.device.as_ref().map(text));
        optional(&mut table, "model", model.model.as_ref().map(model_ref));
        optional(&mut table, "pairs", model.pairs.as_ref().map(|path| text(path.display())));
        table
    }

    fn sft_table(&self) -> Table {
        let sft = &self.sft;
        table([("steps", whole(sft.steps)), ("batch", whole(sft.batch)), ("lr", Value::Float(sft.lr))])
    }

    fn reward_table(&self) -> Table {
        let reward = &self.reward;
        table([
            ("kl_coef", Value::Float(reward.kl_coef)),
            ("kl", word(reward.kl)),
            ("kl_estimator", word(reward.kl_estimator)),
            ("reference", Value::Boolean(reward.reference)),
            ("scale", word(reward.scale)),
            ("clip", Value::Float(reward.clip.unwrap_or(0.0))),
            ("length_penalty", Value::Float(reward.length_penalty)),
            ("missing_eos_penalty", Value::Float(reward.missing_eos_penalty)),
            ("threads", whole(reward.threads as u64)),
            ("capacity", whole(reward.capacity as u64)),
        ])
    }

    fn learner_table(&self) -> Table {
        let learner = &self.learner;
        table([
            ("algorithm", word(learner.algorithm)),
            ("clip", Value::Float(learner.clip)),
            ("clip_high", Value::Float(learner.clip_high)),
            ("average", word(learner.average)),
            ("advantage_std", Value::Boolean(learner.advantage_std)),
            ("gamma", Value::Float(learner.gamma)),
            ("gae_lambda", Value::Float(learner.gae_lambda)),
            ("value_model", word(learner.value_model)),
            ("value_clip", Value::Float(learner.value_clip)),
            ("whiten_rewards", Value::Boolean(learner.whiten_rewards)),
            ("whiten_advantages", Value::Boolean(learner.whiten_advantages)),
            ("entropy_coef", Value::Float(learner.entropy_coef)),
            ("dpo_beta", Value::Float(learner.dpo_beta)),
            ("dpo_labels", word(learner.dpo_labels)),
            ("dpo_loss", word(learner.dpo_loss)),
            ("batch_groups", whole(learner.batch_groups)),
            ("epochs", whole(learner.epochs)),
            ("minibatches", whole(learner.minibatches as u64)),
            ("eta", whole(learner.eta)),
            ("threads", whole(learner.threads as u64)),
            ("lr", Value::Float(learner.lr)),
            ("min_lr", Value::Float(learner.min_lr)),
            ("warmup_steps", whole(learner.warmup_steps)),
            ("schedule", word(learner.schedule)),
            ("adam_beta1", Value::Float(learner.adam_beta1)),
            ("adam_beta2", Value::Float(learner.adam_beta2)),
            ("adam_eps", Value::Float(learner.adam_eps)),
            ("weight_decay", Value::Float(learner.weight_decay)),
            ("max_grad_norm", Value::Float(learner.max_grad_norm)),
            ("value_lr", Value::Float(learner.value_lr)),
            ("correction", word(learner.correction)),
            ("truncation", Value::Float(learner.truncation)),
            ("mask_ratio", Value::Float(learner.mask_ratio)),
            ("max_nonfinite_steps", whole(u64::from(learner.max_nonfinite_steps))),
            ("micro_batch", whole(learner.micro_batch as u64)),
            ("activation_checkpointing", Value::Boolean(learner.activation_checkpointing)),
        ])
    }

    fn evaluation_table(&self) -> Table {
        let evaluation = &self.evaluation;
        table([
            ("every_steps", whole(evaluation.every_steps)),
            ("prompts", whole(evaluation.prompts as u64)),
            ("threads", whole(evaluation.threads as u64)),
        ])
    }

    fn controller_table(&self) -> Table {
        let controller = &self.controller;
        table([("enabled", Value::Boolean(controller.enabled)), ("every_s", Value::Float(controller.every_s))])
    }

    fn guard_table(&self) -> Table {
        let guard = &self.guard;
        table([
            ("action", word(guard.action)),
            ("max_kl", Value::Float(guard.max_kl)),
            ("min_entropy", Value::Float(guard.min_entropy)),
            ("max_masked", Value::Float(guard.max_masked)),
            ("steps", whole(guard.steps)),
            ("unlabeled_steps", whole(guard.unlabeled_steps)),
        ])
    }

    fn checkpoint_table(&self) -> Table {
        let checkpoint = &self.checkpoint;
        let mut table = table([
            ("every_minutes", Value::Float(checkpoint.every_minutes)),
            ("every_steps", whole(checkpoint.every_steps)),
            ("keep", whole(checkpoint.keep as u64)),
            ("dtype", word(checkpoint.dtype)),
            ("retry_s", Value::Float(checkpoint.retry_s)),
            ("journal", Value::Boolean(checkpoint.journal)),
            ("journal_max_bytes", whole(checkpoint.journal_max_bytes)),
        ]);
        optional(&mut table, "best", checkpoint.best.as_ref().map(text));
        optional(&mut table, "mirror", checkpoint.mirror.as_ref().map(text));
        table
    }

    fn serve_table(&self) -> Table {
        let mut table = table([("enabled", Value::Boolean(self.serve.enabled)), ("listen", text(self.serve.listen))]);
        optional(&mut table, "token_env", self.serve.token_env.as_ref().map(text));
        table.insert("hosts".into(), Value::Array(self.serve.hosts.iter().map(text).collect()));
        table
    }

    fn supervision_table(&self) -> Table {
        let supervision = &self.supervision;
        table([
            ("max_restarts", whole(u64::from(supervision.max_restarts))),
            ("backoff_s", Value::Float(supervision.backoff_s)),
            ("max_backoff_s", Value::Float(supervision.max_backoff_s)),
            ("stall_after_s", Value::Float(supervision.stall_after_s)),
            ("restart_after_s", Value::Float(supervision.restart_after_s)),
            ("halt_grace_s", Value::Float(supervision.halt_grace_s)),
            ("drain_s", Value::Float(supervision.drain_s)),
        ])
    }
}

fn method_table(method: &Method) -> Table {
    let mut table = table([
        ("type", word(method.kind)),
        ("weight", Value::Float(method.weight)),
        ("length_normalise", Value::Boolean(method.length_normalise)),
        ("pair_temperature", Value::Float(method.pair_temperature)),
        ("templates", text(&method.templates)),
        ("preamble", text(&method.preamble)),
        ("shots", whole(method.shots as u64)),
        ("both_orders", Value::Boolean(method.both_orders)),
        ("cot", Value::Boolean(method.cot)),
        ("rationale_tokens", whole(method.rationale_tokens as u64)),
        ("rationales", whole(method.rationales as u64)),
        ("rationale_temperature", Value::Float(method.rationale_temperature)),
    ]);
    optional(&mut table, "model", method.model.as_ref().map(model_ref));
    optional(&mut table, "chat", method.chat.map(Value::Boolean));
    optional(&mut table, "remote", method.remote.as_ref().map(|judge| Value::Table(remote_table(judge))));
    table
}

fn remote_table(judge: &RemoteJudge) -> Table {
    let mut table = table([
        ("url", text(&judge.url)),
        ("model", text(&judge.model)),
        ("api", word(judge.api)),
        ("evidence", word(judge.evidence)),
        ("votes", whole(judge.votes as u64)),
        ("concurrency", whole(judge.concurrency as u64)),
        ("requests_per_minute", whole(judge.requests_per_minute)),
        ("tokens_per_minute", whole(judge.tokens_per_minute)),
        ("timeout_s", Value::Float(judge.timeout_s)),
        ("connect_timeout_s", Value::Float(judge.connect_timeout_s)),
        ("deadline_s", Value::Float(judge.deadline_s)),
        ("retries", whole(u64::from(judge.retries))),
        ("probe", Value::Boolean(judge.probe)),
        ("any_model", Value::Boolean(judge.any_model)),
        ("backoff_s", Value::Float(judge.backoff_s)),
        ("max_backoff_s", Value::Float(judge.max_backoff_s)),
        ("breaker_failures", whole(u64::from(judge.breaker_failures))),
        ("breaker_cooldown_s", Value::Float(judge.breaker_cooldown_s)),
        ("outage_s", Value::Float(judge.outage_s)),
        ("price_prompt", Value::Float(judge.price_prompt)),
        ("price_completion", Value::Float(judge.price_completion)),
        ("max_response_bytes", whole(judge.max_response_bytes as u64)),
    ]);
    optional(&mut table, "api_key_env", judge.api_key_env.as_ref().map(text));
    optional(&mut table, "system", judge.system.as_ref().map(text));
    optional(&mut table, "hedge_after_s", judge.hedge_after_s.map(Value::Float));
    table
}

fn word(choice: impl Choice) -> Value {
    text(choice.word())
}

fn table<const N: usize>(pairs: [(&str, Value); N]) -> Table {
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn optional(table: &mut Table, name: &str, value: Option<Value>) {
    if let Some(value) = value {
        table.insert(name.into(), value);
    }
}

fn text(value: impl ToString) -> Value {
    Value::String(value.to_string())
}

fn whole(value: u64) -> Value {
    Value::Integer(value.try_into().unwrap_or(i64::MAX))
}

fn model_ref(reference: &ModelRef) -> Value {
    Value::Array(reference.0.iter().map(candidate).collect())
}

fn candidate(candidate: &Candidate) -> Value {
    let mut out = Table::new();
    let (pairs, main): (&[(&str, &Option<String>)], _) = match candidate {
        Candidate::Path(path) => (&[], ("path", text(path.display()))),
        Candidate::Hub { repo, revision, file } => (&[("revision", revision), ("file", file)], ("hub", text(repo))),
        Candidate::Pip { requirement, sha256, file } => {
            (&[("sha256", sha256), ("file", file)], ("pip", text(requirement)))
        }
    };
    out.insert(main.0.into(), main.1);
    for (name, value) in pairs {
        optional(&mut out, name, value.as_ref().map(text));
    }
    Value::Table(out)
}
