//! Feedback by comparison: the better of two completions, read from the judge's distribution over `1` and `2` (Lee et
//! al. 2023, §2.1).

use std::sync::Arc;

use anyhow::Result;

use super::backend::{Alive, Ask, Backend, Decoding, NoAnswer, Reply, Usage};
use super::templates::Comparison;
use super::{Labeler, Labels, Pairing, verdict};
use crate::types::{Group, Preference};

/// Minimum total probability of the two answers; below it, the judge is not answering with a choice.
const MIN_MASS: f64 = 1e-3;

/// Chain-of-thought settings: a rationale is generated before the choice, and the choices after several rationales are
/// averaged (self-consistency, Wang et al. 2022).
#[derive(Debug, Clone, PartialEq)]
pub struct ChainOfThought {
    /// Number of rationales per question; their distributions are averaged.
    pub samples: usize,
    /// Sampling settings of the rationales.
    pub decoding: Decoding,
}

/// Labeler by comparison: P(1) = P(`1`)/(P(`1`) + P(`2`)); with both orders, p = ½[p₁₂ + (1 − p₂₁)].
pub struct Pairwise {
    backend: Arc<dyn Backend>,
    comparison: Comparison,
    pairing: Pairing,
    both_orders: bool,
    thought: Option<ChainOfThought>,
}

/// One comparison in display order: the prompt, the first text and the second text.
type Shown<'a> = (&'a str, &'a str, &'a str);

impl Pairwise {
    /// Creates a labeler that asks `comparison` of `backend`. `thought` is used only if the comparison asks for a
    /// rationale.
    ///
    /// # Errors
    /// If the template cannot be filled in, or the prefix cannot be processed by the judge.
    pub fn new(
        backend: Arc<dyn Backend>,
        comparison: Comparison,
        pairing: Pairing,
        both_orders: bool,
        thought: Option<ChainOfThought>,
    ) -> Result<Self> {
        let examples = ["A", "zebra"].map(|text| {
            if comparison.cot { comparison.think(text, text, text) } else { comparison.ask(text, text, text, None) }
        });
        backend.warm(&examples.into_iter().collect::<Result<Vec<_>>>()?)?;
        Ok(Self { backend, comparison, pairing, both_orders, thought })
    }

    /// Returns P(the first shown is better) for each question.
    fn judge(&self, questions: &[Shown], usage: &mut Usage) -> Result<Vec<Reply<f64>>> {
        let samples = self.thought.as_ref().map_or(1, |thought| thought.samples);
        let rationales = self.think(questions, usage)?;
        // One ask per rationale; a question whose rationale failed keeps that reply.
        let mut asks = Vec::new();
        for (i, thought) in rationales.iter().enumerate() {
            let (prompt, first, second) = questions[i / samples];
            if let Ok(rationale) = thought {
                let prompt = self.comparison.ask(prompt, first, second, rationale.as_deref())?;
                asks.push(Ask { prompt, answers: vec!["1".into(), "2".into()] });
            }
        }
        let mut weights = self.backend.weigh(&asks, usage).into_iter();
        let mut choices = rationales.into_iter().map(|thought| match thought {
            Ok(_) => {
                choice(weights.next().unwrap_or_else(|| Err(NoAnswer::Failure("the judge gave no answer".into()))))
            }
            Err(refusal) => Err(refusal),
        });
        let each = questions.iter().map(|_| choices.by_ref().take(samples).collect::<Vec<_>>());
        let turned = |p: f64| if self.comparison.inverted() { 1.0 - p } else { p };
        Ok(each.map(|choices| mean(choices).map(turned)).collect())
    }

    /// Returns `samples` rationales for each question, consecutively; `None` each if the comparison asks for none.
    fn think(&self, questions: &[Shown], usage: &mut Usage) -> Result<Vec<Reply<Option<String>>>> {
        let Some(thought) = self.thought.as_ref().filter(|_| self.comparison.cot) else {
            return Ok(questions.iter().map(|_| Ok(None)).collect());
        };
        let mut prompts = Vec::with_capacity(questions.len() * thought.samples);
        for (prompt, first, second) in questions {
            let prompt = self.comparison.think(prompt, first, second)?;
            prompts.extend((0..thought.samples).map(|_| prompt.clone()));
        }
        let written = self.backend.write(&prompts, &thought.decoding, usage);
        Ok(written.into_iter().map(|reply| reply.map(Some)).collect())
    }
}

impl Labeler for Pairwise {
    fn name(&self) -> &'static str {
        "pairwise"
    }

    fn template(&self) -> u64 {
        self.comparison.hash()
    }

    fn register_liveness(&self, name: &str, alive: &Alive) {
        self.backend.register_liveness(name, alive);
    }

    fn waits(&self) -> bool {
        self.backend.waits()
    }

    fn model(&self) -> u64 {
        self.backend.identity()
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        self.label_many(&[group]).pop().unwrap_or_else(|| Ok(Labels::default()))
    }

    fn label_many(&self, groups: &[&Group]) -> Vec<Result<Labels>> {
        let mut usage = Usage::default();
        let pairs: Vec<(usize, (usize, usize))> = (0..groups.len())
            .flat_map(|g| self.pairing.pairs(groups[g].completions.len()).into_iter().map(move |pair| (g, pair)))
            .collect();
        let mut questions: Vec<Shown> = Vec::new();
        for (g, (first, second)) in &pairs {
            let text = |i: usize| groups[*g].completions[i].text.trim();
            let prompt = groups[*g].prompt.text.trim();
            questions.push((prompt, text(*first), text(*second)));
            if self.both_orders {
                questions.push((prompt, text(*second), text(*first)));
            }
        }
        let mut replies = match self.judge(&questions, &mut usage) {
            Ok(replies) => replies.into_iter(),
            Err(error) => return groups.iter().map(|_| Err(anyhow::anyhow!("{error:#}"))).collect(),
        };
        let mut labels: Vec<Labels> = groups.iter().map(|_| Labels::default()).collect();
        let missing = || Err(NoAnswer::Failure("the judge gave no answer".into()));
        for (g, (first, second)) in pairs {
            let mut next = || replies.next().unwrap_or_else(missing);
            let (reply, orders) = if self.both_orders { averaged(next(), next()) } else { (next(), None) };
            labels[g].preferences.push(Preference { first, second, verdict: verdict(reply), orders });
        }
        // The usage of the complete call is reported with the first group; the caller sums it.
        if let Some(first) = labels.first_mut() {
            first.usage = usage;
        }
        labels.into_iter().map(Ok).collect()
    }
}

/// Returns P(1), renormalised over the two answers.
fn choice(weights: Reply<Vec<f64>>) -> Reply<f64> {
    let weights = weights?;
    let mass: f64 = weights.iter().sum();
    if weights.len() == 2 && mass >= MIN_MASS {
        Ok(weights[0] / mass)
    } else {
        Err(NoAnswer::Abstention(format!("the judge gives the answers 1 and 2 a probability of {mass:.1e} together")))
    }
}

/// Returns the mean over the rationales that led to a choice. If any of them failed, the result is that failure,
/// because asking again may succeed.
fn mean(choices: Vec<Reply<f64>>) -> Reply<f64> {
    let (mut sum, mut count, mut why) = (0.0, 0u32, None);
    for choice in choices {
        match choice {
            Ok(p) => {
                sum += p;
                count += 1;
            }
            Err(failure @ NoAnswer::Failure(_)) => return Err(failure),
            Err(abstention) => why = Some(abstention),
        }
    }
    match why {
        Some(abstention) if count == 0 => Err(abstention),
        _ if count == 0 => Err(NoAnswer::Abstention("no rationale led to a choice".into())),
        _ => Ok(sum / f64::from(count)),
    }
}

/// Returns P(first is better) averaged over both orders, and the value of each order. `swapped` is the reply for the
/// order in which the second text was shown first. If one order has no answer, the result has none: a single order
/// would carry the judge's position bias.
fn averaged(shown: Reply<f64>, swapped: Reply<f64>) -> (Reply<f64>, Option<[f64; 2]>) {
    match (shown, swapped) {
        (Ok(a), Ok(b)) => (Ok(0.5 * (a + 1.0 - b)), Some([a, 1.0 - b])),
        (Err(failure @ NoAnswer::Failure(_)), _) | (_, Err(failure @ NoAnswer::Failure(_))) => (Err(failure), None),
        (Err(abstention), _) | (_, Err(abstention)) => (Err(abstention), None),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use super::*;
    use crate::pipeline::label::shape::Shape;
    use crate::pipeline::label::templates::{Preamble, TemplateSet};
    use crate::types::{Completion, Prompt, Verdict};

    const SET: &str = r#"
task = "test"
inverted = false
[preambles]
base = "Base."
detailed = "Detailed."
[pairwise]
sample = "T {{ prompt }} A {{ first }} B {{ second }}"
ending = "Best="
rationale = "Think:"
[marks]
open = "<"
close = ">"
follow = "Now:"
[direct]
template = "{{ prompt }} {{ completion }} SCORE:"
[[exemplars]]
prompt = "p"
first = "f"
second = "s"
answer = 2
rationale = "r"
"#;

    /// Backend that answers from a table of prompts and returns rationales from a list.
    #[derive(Default)]
    struct Scripted {
        weights: HashMap<String, Reply<Vec<f64>>>,
        rationales: Mutex<Vec<Reply<String>>>,
        asked: Mutex<Vec<String>>,
    }

    impl Backend for Scripted {
        fn identity(&self) -> u64 {
            7
        }

        fn shape(&self) -> Shape {
            unreachable!("no cache is in front of it")
        }

        fn weigh(&self, asks: &[Ask], _usage: &mut Usage) -> Vec<Reply<Vec<f64>>> {
            asks.iter().map(|ask| self.weights[&ask.prompt].clone()).collect()
        }

        fn write(&self, prompts: &[String], _decoding: &Decoding, _usage: &mut Usage) -> Vec<Reply<String>> {
            self.asked.lock().unwrap().extend_from_slice(prompts);
            prompts.iter().map(|_| self.rationales.lock().unwrap().remove(0)).collect()
        }
    }

    fn group(texts: &[&str]) -> Group {
        let completion = |text: &&str| Completion::unsampled(vec![1], *text);
        Group { prompt: Prompt::new(0, "t", [1]), completions: texts.iter().map(completion).collect() }
    }

    fn labels(backend: Scripted, cot: bool, samples: usize, inverted: bool) -> (Labels, Arc<Scripted>) {
        let set = TemplateSet::parse(&SET.replace("inverted = false", &format!("inverted = {inverted}"))).unwrap();
        let comparison = set.comparison(&Preamble::Base, 0, cot).unwrap();
        let decoding = Decoding { max_tokens: 9, temperature: 0.0, top_k: None, seed: 0 };
        let thought = cot.then_some(ChainOfThought { samples, decoding });
        let backend = Arc::new(backend);
        let labeler = Pairwise::new(backend.clone(), comparison, Pairing::Adjacent, true, thought).unwrap();
        (labeler.label(&group(&["x", "y"])).unwrap(), backend)
    }

    fn scripted(weights: &[(&str, Reply<Vec<f64>>)], rationales: &[&str]) -> Scripted {
        Scripted {
            weights: weights.iter().map(|(prompt, reply)| ((*prompt).to_owned(), reply.clone())).collect(),
            rationales: Mutex::new(rationales.iter().map(|text| Ok((*text).to_owned())).collect()),
            asked: Mutex::default(),
        }
    }

    const XY: &str = "Base.\n\nT t A x B y\n\nBest=";
    const YX: &str = "Base.\n\nT t A y B x\n\nBest=";

    #[test]
    fn both_orders_are_averaged() {
        // P(1) = 0.6/0.8 with x first, 0.3/0.4 with y first: the judge prefers the first place both times, p = ½(¾ + 1
        // − ¾).
        let weights = [(XY, Ok(vec![0.6, 0.2])), (YX, Ok(vec![0.3, 0.1]))];
        let (labels, _) = labels(scripted(&weights, &[]), false, 1, false);
        let one = &labels.preferences[0];
        assert!((one.probability().unwrap() - 0.5).abs() < 1e-12);
        assert_eq!(one.flipped(), Some(true));
        let weights = [(XY, Ok(vec![0.6, 0.2])), (YX, Ok(vec![0.1, 0.4]))];
        let (turned, _) = super::tests::labels(scripted(&weights, &[]), false, 1, true);
        // The judge is asked for the worse one, so the same answers mean 1 − ½(¾ + ⅘).
        let one = &turned.preferences[0];
        assert!((one.probability().unwrap() - (1.0 - 0.5 * (0.75 + 0.8))).abs() < 1e-12, "{one:?}");
        assert_eq!(one.flipped(), Some(false));
    }

    #[test]
    fn rationales_come_first_and_their_distributions_are_averaged() {
        let after = |shown: &str, rationale: &str| format!("Base.\n\nT t A {shown}\n\nThink: {rationale}\n\nBest=");
        let texts = [after("x B y", "one"), after("x B y", "two"), after("y B x", "three"), after("y B x", "four")];
        let values = [vec![0.9, 0.1], vec![0.5, 0.5], vec![0.2, 0.8], vec![0.1, 0.3]];
        let weights: Vec<(&str, Reply<Vec<f64>>)> =
            texts.iter().map(String::as_str).zip(values.into_iter().map(Ok)).collect();
        let (labels, backend) = labels(scripted(&weights, &[" one", "two\n", "three", "four"]), true, 2, false);
        // x first: ½(0.9 + 0.5) = 0.7 for x. y first: ½(0.2 + 0.25) = 0.225 for y. p = ½(0.7 + 0.775).
        let one = &labels.preferences[0];
        assert!((one.probability().unwrap() - 0.7375).abs() < 1e-12, "{one:?}");
        assert_eq!(backend.asked.lock().unwrap().len(), 4);
        assert!(backend.asked.lock().unwrap()[0].ends_with("Think:"));
    }

    #[test]
    fn a_pair_with_an_unanswered_order_gets_no_label() {
        let failure: Reply<Vec<f64>> = Err(NoAnswer::Failure("gone".into()));
        let nothing = Ok(vec![1e-5, 1e-5]);
        for (swapped, kind) in [(failure, "failure"), (nothing, "abstention")] {
            let weights = [(XY, Ok(vec![0.6, 0.2])), (YX, swapped)];
            let (labels, _) = labels(scripted(&weights, &[]), false, 1, false);
            assert_eq!(labels.preferences[0].verdict.kind(), kind);
            assert_eq!(labels.preferences[0].flipped(), None);
            assert!(!matches!(labels.preferences[0].verdict, Verdict::Label(_)));
        }
    }
}
