//! Keys whose value is one of a few words.

use super::labeling::{Evidence, LabelerKind, Pairs, RemoteApi};
use super::operation::{GuardAction, WeightDtype};
use super::sections::{
    AlgorithmKind, AverageKind, CorrectionKind, DpoLoss, KlEstimator, KlPlace, LabelForm, MatmulPrecision, Mode,
    OnLong, RewardScaling, RolloutWeights, Schedule, UpdateMode, ValueKind,
};

/// A value that is written as a word.
pub trait Choice: Copy + PartialEq + 'static {
    /// Every value with its word.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
    }
}

macro_rules! choices {
    ($($name:ident { $($word:literal => $variant:ident),+ })+) => {
        $(impl Choice for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant)),+];
        })+
    };
}

choices! {
    AlgorithmKind {
        "rloo" => Rloo, "reinforce" => Reinforce, "ppo" => Ppo, "grpo" => Grpo, "online-dpo" => OnlineDpo
    }
    AverageKind {
        "sequence-sum" => SequenceSum, "sequence-mean" => SequenceMean, "token-mean" => TokenMean,
        "constant" => Constant
    }
    CorrectionKind {
        "none" => None, "tis" => Tis, "tis-sequence" => TisSequence, "decoupled" => Decoupled
    }
    DpoLoss { "sigmoid" => Sigmoid, "ipo" => Ipo }
    Evidence { "auto" => Auto, "logprobs" => Logprobs, "votes" => Votes }
    GuardAction { "warn" => Warn, "stop" => Stop }
    KlEstimator { "k1" => K1, "k2" => K2, "k3" => K3 }
    KlPlace { "reward" => Reward, "loss" => Loss }
    LabelForm { "soft" => Soft, "hard" => Hard }
    LabelerKind {
        "likelihood" => Likelihood, "direct" => Direct, "pairwise" => Pairwise, "embedding" => Embedding
    }
    MatmulPrecision { "highest" => Highest, "high" => High, "medium" => Medium }
    Mode { "direct" => Direct, "distilled" => Distilled, "preference" => Preference, "human" => Human }
    OnLong { "error" => Error, "skip" => Skip }
    Pairs { "adjacent" => Adjacent, "all" => All }
    RemoteApi { "chat" => Chat, "completions" => Completions }
    RewardScaling { "running" => Running, "none" => None }
    RolloutWeights { "f32" => F32, "bf16" => Bf16, "q8_0" => Q8 }
    Schedule { "constant" => Constant, "linear" => Linear, "cosine" => Cosine }
    UpdateMode { "in-flight" => InFlight, "between-groups" => BetweenGroups }
    ValueKind { "head" => Head, "model" => Model }
    WeightDtype { "f32" => F32, "bf16" => Bf16 }
}
