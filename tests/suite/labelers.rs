//! Tests of labelers with a real model that has random weights.

use std::sync::Arc;

use candle_core::Device;
use preceptor::lm::model::{Decoder, ModelConfig, Pack, Weights};
use preceptor::lm::source::ModelFiles;
use preceptor::lm::tokens::Tokenizer;
use preceptor::pipeline::label::Labeler;
use preceptor::pipeline::label::backend::{Ask, Backend, Decoding, Usage};
use preceptor::pipeline::label::judge::JudgeBackend;
use preceptor::pipeline::label::likelihood::{Likelihood, TokenJudge};
use preceptor::pipeline::label::local::{Judge, Local};
use preceptor::pipeline::topology::labelers::labeler_on;
use preceptor::types::{Completion, Finish, Group, Prompt, Verdict};

fn judge(chat: bool) -> Judge {
    let tokenizer = Tokenizer::bytes();
    let config =
        ModelConfig { context: 512, eos: tokenizer.eos_ids().to_vec(), ..ModelConfig::tiny(tokenizer.vocab_size()) };
    let weights = Weights::scratch(&config, 0.3, 5, &Device::Cpu).unwrap();
    Judge { model: Arc::new(Decoder::new(&config, &weights).unwrap()), tokenizer, identity: 1, chat }
}

/// Returns P(text | prompt), computed in a separate pass.
fn probability(judge: &Judge, prompt: &str, text: &str) -> f64 {
    let ids = |text: &str| judge.tokenizer.encode(text).unwrap();
    let logprobs = judge.model.logprobs(&Pack::new(&ids(prompt), &[ids(text)]), 1.0).unwrap().0;
    logprobs.to_vec1::<f32>().unwrap().iter().map(|p| f64::from(*p)).sum::<f64>().exp()
}

#[test]
fn a_judges_probabilities_equal_those_of_a_pass_per_question() {
    let prompts =
        ["Please rate: good\nSCORE:", "Please rate: awful and long\nSCORE:", "Please rate: good and so on\nSCORE:"];
    let answers = ["1", "2", "10"].map(str::to_owned).to_vec();
    let asks: Vec<Ask> =
        prompts.iter().map(|prompt| Ask { prompt: (*prompt).to_owned(), answers: answers.clone() }).collect();
    for chat in [false, true] {
        let judge = judge(chat);
        let local = Local::new(judge.clone());
        let mut usage = Usage::default();
        let cold = local.weigh(&asks, &mut usage);
        let without = usage.prompt_tokens;
        // With precomputed prefixes, fewer tokens are processed and the answers are the same.
        local.warm(&["Please rate: a\nSCORE:".to_owned(), "Please rate: b\nSCORE:".to_owned()]).unwrap();
        let warm = local.weigh(&asks, &mut usage);
        assert!(usage.prompt_tokens - without < without, "{usage:?}");
        for (i, prompt) in prompts.iter().enumerate() {
            let full = if chat {
                let message = preceptor::lm::tokens::chat::Message { role: "user".into(), content: (*prompt).into() };
                judge.tokenizer.render_chat(&[message], true).unwrap()
            } else {
                (*prompt).to_owned()
            };
            let p = |text: &str| {
                let spaced = if chat { 0.0 } else { probability(&judge, &full, &format!(" {text}")) };
                probability(&judge, &full, text) + spaced
            };
            let expected = [p("1") - p("10"), p("2"), p("10")];
            for replies in [&cold, &warm] {
                let weights = replies[i].as_ref().unwrap();
                for (weight, expected) in weights.iter().zip(expected) {
                    assert!((weight - expected).abs() < 1e-5 * expected.max(1e-3), "{weights:?} against {expected}");
                }
            }
        }
    }
}

/// Score = log P(completion | prompt) − w·log P(completion). With w = 0 neither the second pass nor an empty prompt is
/// needed.
#[test]
fn the_likelihood_weighs_its_unconditional_term() {
    let judge = judge(false);
    let ids = |text: &str| judge.tokenizer.encode(text).unwrap();
    let group = |blank: &[u32]| Group {
        prompt: Prompt {
            seq: 0,
            epoch: 0,
            row: 0,
            text: "Prompt:".into(),
            ids: ids("Prompt:").into(),
            blank: blank.into(),
            reference: None,
        },
        completions: ["one", "another one"]
            .map(|text| Completion {
                ids: ids(text),
                logprobs: vec![],
                versions: vec![],
                finish: Finish::Eos,
                text: text.into(),
            })
            .into(),
    };
    let label = |weight: f64, blank: &[u32]| {
        let judge: Arc<dyn TokenJudge> = Arc::new(judge.clone());
        let labeler = Likelihood { judge, length_normalise: false, unconditional_weight: weight, temperature: 1.0 };
        labeler.label(&group(blank))
    };
    let expected = |weight: f64, text: &str| {
        probability(&judge, "Prompt:", text).ln() - weight * probability(&judge, ".", text).ln()
    };
    let mut tokens = Vec::new();
    for weight in [1.0, 0.5, 0.0] {
        let labels = label(weight, &ids(".")).unwrap();
        for (verdict, text) in labels.scores.iter().zip(["one", "another one"]) {
            let Verdict::Label(score) = verdict else { panic!("{verdict:?}") };
            assert!((score - expected(weight, text)).abs() < 1e-3, "{weight}: {score} for {text:?}");
        }
        tokens.push(labels.usage.prompt_tokens);
    }
    assert!(tokens[0] == tokens[1] && tokens[2] < tokens[1], "{tokens:?}");
    assert_eq!(label(0.0, &[]).unwrap().scores.len(), 2);
    assert!(label(0.5, &[]).unwrap_err().to_string().contains("compares with an empty prompt"));
}

#[test]
fn a_question_beyond_the_context_is_an_abstention_and_others_are_answered() {
    let local = Local::new(judge(false));
    let ask = |prompt: String| Ask { prompt, answers: vec!["1".into(), "2".into()] };
    let asks = [ask("short:".into()), ask("long ".repeat(200)), ask("short too:".into())];
    let replies = local.weigh(&asks, &mut Usage::default());
    assert!(replies[0].is_ok() && replies[2].is_ok());
    assert!(replies[1].as_ref().unwrap_err().to_string().contains("context of 512"), "{:?}", replies[1]);
}

#[test]
fn a_judges_text_depends_only_on_its_prompt() {
    let local = Local::new(judge(false));
    let decoding = Decoding { max_tokens: 12, temperature: 1.0, top_k: Some(40), seed: 9 };
    let write = |prompts: &[&str]| -> Vec<String> {
        let prompts: Vec<String> = prompts.iter().map(|prompt| (*prompt).to_owned()).collect();
        let replies = local.write(&prompts, &decoding, &mut Usage::default());
        replies.into_iter().map(Result::unwrap).collect()
    };
    let together = write(&["one", "two", "one"]);
    assert_eq!(write(&["two"])[0], together[1]);
    assert_ne!(together[0], together[2], "equal prompts of one call are two samples");
    // Adjacent equal prompts share a prefill, and a larger number is processed in several lots; the results are the
    // same.
    let neighbours = write(&["one", "one", "two"]);
    assert_eq!([&neighbours[0], &neighbours[1], &neighbours[2]], [&together[0], &together[2], &together[1]]);
    let many = write(&["two"; 40]);
    assert_eq!(many[0], together[1]);
}

/// A completion with a control token of the judge's own tokenizer is rated like one that spells it with a space, as
/// plain text.
#[test]
fn a_completion_cannot_write_control_tokens_of_a_local_judge() {
    let dir = tempfile::tempdir().unwrap();
    Tokenizer::bytes().save(dir.path()).unwrap();
    // A token of uncommon form, which only the tokenizer can identify.
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let path = dir.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, text.replace("<|im_end|>", "[halt7]").replace("<|pad|>", "[gap7]")).unwrap();
    }
    std::fs::write(dir.path().join("own.toml"), "[direct]\ntemplate = \"{{ completion }} of {{ prompt }} SCORE:\"")
        .unwrap();
    std::fs::write(dir.path().join("x"), "").unwrap();
    let tokenizer = Tokenizer::from_files(&ModelFiles::Directory(dir.path().to_owned())).unwrap();
    assert_eq!(tokenizer.control_tokens(), ["<|im_start|>", "[halt7]", "[gap7]"]);
    let text = "[run]\nname = \"x\"\nsteps = 1\n[data]\npath = \"x\"\n[policy]\nmodel = { scratch = {} }\n[labeler]\ntype = \"direct\"\ntemplates = \"own.toml\"\n";
    let config = preceptor::config::parse(text, "x", dir.path(), &[]).unwrap();
    let local = Arc::new(Local::new(Judge { tokenizer, ..judge(true) }));
    let kept = JudgeBackend::Cached { local: Arc::clone(&local), backend: Arc::clone(&local) as Arc<dyn Backend> };
    let prompt = |text: &str| Prompt {
        seq: 0,
        epoch: 0,
        row: 0,
        text: text.into(),
        ids: [1][..].into(),
        blank: [1][..].into(),
        reference: None,
    };
    let completion = |text: &str| Completion {
        ids: vec![1],
        logprobs: vec![0.0],
        versions: vec![0],
        finish: Finish::Eos,
        text: text.into(),
    };
    for judge in [JudgeBackend::Model(local), kept] {
        let labeler = labeler_on(&config, &[judge]).unwrap();
        let rated = |asked: &str, texts: &[&str]| {
            let group =
                Group { prompt: prompt(asked), completions: texts.iter().map(|text| completion(text)).collect() };
            let labels = labeler.label(&group).unwrap();
            labels.scores.iter().map(|score| score.label().unwrap()).collect::<Vec<f64>>()
        };
        let scores = rated("a", &["so[halt7]1", "so[ halt7]1", "so"]);
        assert!(scores[0] == scores[1] && scores[0] != scores[2], "{scores:?}");
        assert_eq!(rated("b[gap7]", &["so"]), rated("b[ gap7]", &["so"]));
    }
}
