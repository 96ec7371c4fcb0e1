//! What a run would take, told before it is started.

use anyhow::Result;

use crate::config::Config;
use crate::prepare::prepare;
use crate::serve::Token;
use crate::topology::labelers::Instrument;
use crate::topology::learning::lora;
use crate::topology::trainer_plan;

/// Checks all that a run would, and trains nothing. Returns lines to print.
///
/// # Errors
/// What a run would stumble over before its first step.
pub fn check(config: &Config) -> Result<Vec<String>> {
    Token::from_env(&config.serve)?;
    let prepared = prepare(config, true)?;
    let shape = prepared.policy.config();
    let parameters = shape.parameters() as f64;
    let trained = match lora(config) {
        None => parameters,
        Some((lora, seed)) => {
            lora.fresh(prepared.policy.weights(), seed, prepared.policy.device())?.parameters() as f64
        }
    };
    let copies = 1 + 1 + 1 + 2 + 2; // policy, batch gradient, step gradient, Adam's two, snapshots
    let judges: f64 = config
        .labeler
        .methods
        .iter()
        .zip(&prepared.instruments)
        .map(|(method, instrument)| match instrument {
            Instrument::Model(local) if method.model.is_some() => local.judge().model.config().parameters() as f64,
            Instrument::Model(_) | Instrument::Asked(_) => 0.0,
            Instrument::Embedder(embedding) => embedding.embedder.parameters() as f64,
        })
        .sum();
    // Weights, gradient, Adam's two moments.
    let reward_model = if trainer_plan(config).is_some() { 4.0 * parameters } else { 0.0 };
    // The reference is there whole; of the policy, what learns.
    let weights = 4.0 * (parameters + trained * f64::from(copies) + judges + reward_model);
    let tokens = prepared.data.longest() + config.rollout.group_size * config.rollout.max_new_tokens;
    let layer = 12 * shape.hidden_size + 4 * shape.intermediate_size;
    let kept = if config.learner.activation_checkpointing {
        shape.layers * shape.hidden_size + layer
    } else {
        shape.layers * layer
    };
    let activations = 4.0 * (tokens * kept) as f64;
    let free = prepared.data.len() as f64;
    let groups = config.run.steps * config.learner.batch_groups;
    Ok(vec![
        format!(
            "policy      {} ({:.1} M parameters, {:.1} M of them learn)",
            prepared.origin,
            parameters / 1e6,
            trained / 1e6
        ),
        format!("data        {} prompts, longest {} tokens", prepared.data.len(), prepared.data.longest()),
        format!("work        {groups} groups of {}, {:.2} epochs", config.rollout.group_size, groups as f64 / free),
        format!(
            "memory      about {:.2} GiB: {:.2} weights and optimizer, up to {:.2} activations",
            (weights + activations) / f64::from(1 << 30),
            weights / f64::from(1 << 30),
            activations / f64::from(1 << 30)
        ),
        format!(
            "staleness   η = {}: a token is at most {} versions old when it is trained",
            config.learner.eta, config.learner.eta
        ),
    ])
}
