//! Direct feedback: the judge rates a completion from 1 to 10 (Lee et al. 2023, d-RLAIF).

use anyhow::{Context, Result};
use minijinja::context;

use super::{Judge, Labeler, Labels};
use crate::model::Pack;
use crate::rollout::{Group, Verdict};
use crate::seed;
use crate::tokens::chat::Message;

/// The rating prompt that is used when the configuration has none.
pub const TEMPLATE: &str = "\
You rate how well a short summary tells what a text says. A rating of 1 means the summary is useless: it is wrong, \
off the point or unreadable. A rating of 10 means that it could not be better: true to the text, clear, and with \
all that matters.

TEXT: {{ prompt }}

SUMMARY: {{ completion }}

Answer with the rating alone, a whole number from 1 to 10.

SCORE:";

/// Below this total probability of the ten ratings, the judge is not rating at all.
const LEAST_MASS: f64 = 1e-3;

/// s = Σ_i i·P(i) over i = 1…10, P read from the judge's next-token distribution and renormalised over the ten,
/// then mapped to [−1, 1] by (s − 5.5)/4.5.
pub struct Direct {
    judge: Judge,
    environment: minijinja::Environment<'static>,
    template: u64,
    ratings: Vec<Vec<u32>>,
}

impl Direct {
    /// Prepares the template (`{{ prompt }}`, `{{ completion }}`) and the ratings' tokens.
    ///
    /// # Errors
    /// A template that does not parse, or a tokenizer that cannot write digits.
    pub fn new(judge: Judge, template: Option<&str>) -> Result<Self> {
        let template = template.unwrap_or(TEMPLATE).to_owned();
        let hash = seed::text(&template);
        let mut environment = minijinja::Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        environment.add_template_owned("direct", template).context("labeler.instruction is not a valid template")?;
        let prefix = judge.tokenizer.encode("SCORE:")?;
        let ratings = (1..=10)
            .map(|rating| {
                // Tokenised behind the ending, so that a leading space merges as it would in the prompt.
                let ids = judge.tokenizer.encode(&format!("SCORE: {rating}"))?;
                let shared = prefix.iter().zip(&ids).take_while(|(a, b)| a == b).count();
                Ok(ids[shared..].to_vec())
            })
            .collect::<Result<Vec<_>>>()?;
        // In a chat the answer opens a new turn: nothing stands before the number.
        let ratings = if judge.chat {
            (1..=10).map(|rating| judge.tokenizer.encode(&rating.to_string())).collect::<Result<Vec<_>>>()?
        } else {
            ratings
        };
        Ok(Self { judge, environment, template: hash, ratings })
    }

    fn ask(&self, prompt: &str, completion: &str) -> Result<Vec<u32>> {
        let text = self
            .environment
            .get_template("direct")
            .and_then(|template| template.render(context! { prompt, completion }))
            .context("labeler.instruction cannot be filled in")?;
        if !self.judge.chat {
            return self.judge.tokenizer.encode(&text);
        }
        let messages = [Message { role: "user".into(), content: text }];
        self.judge.tokenizer.encode(&self.judge.tokenizer.render_chat(&messages, true)?)
    }
}

impl Labeler for Direct {
    fn name(&self) -> &'static str {
        "direct"
    }

    fn template(&self) -> u64 {
        self.template
    }

    fn model(&self) -> u64 {
        self.judge.identity
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        let verdicts = group
            .completions
            .iter()
            .map(|completion| {
                let prompt = self.ask(&group.prompt.text, completion.text.trim())?;
                let room = self.judge.model.config().context;
                if prompt.len() + 4 > room {
                    return Ok(Verdict::Abstention(format!(
                        "the rating prompt of {} tokens exceeds the judge's context of {room}",
                        prompt.len()
                    )));
                }
                let pack = Pack::new(&prompt, &self.ratings);
                let logprobs = pack.split(&self.judge.model.logprobs(&pack, 1.0)?.0.to_vec1()?);
                Ok(rate(&self.ratings, &logprobs))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Labels { verdicts, logprobs: None })
    }
}

/// Expected rating from the log-probabilities of each rating's tokens.
///
/// Where one rating's tokens begin another's (`1` begins `10` when digits are tokens), the longer one's
/// probability is taken off the shorter one's, since "1" then means "1 and no 0".
fn rate(ratings: &[Vec<u32>], logprobs: &[Vec<f32>]) -> Verdict {
    let whole: Vec<f64> =
        logprobs.iter().map(|tokens| tokens.iter().map(|p| f64::from(*p)).sum::<f64>().exp()).collect();
    let exact: Vec<f64> = (0..ratings.len())
        .map(|i| {
            let longer: f64 = (0..ratings.len())
                .filter(|j| *j != i && ratings[*j].len() > ratings[i].len() && ratings[*j].starts_with(&ratings[i]))
                .map(|j| whole[j])
                .sum();
            (whole[i] - longer).max(0.0)
        })
        .collect();
    let mass: f64 = exact.iter().sum();
    // Asked of the probabilities themselves: `max` above would turn what is not a number into zero.
    if !whole.iter().all(|p| p.is_finite()) {
        return Verdict::Failure("the judge's log-probabilities are not finite".into());
    }
    if mass < LEAST_MASS {
        return Verdict::Abstention(format!(
            "the judge gives the ratings 1 to 10 a probability of {mass:.1e} together"
        ));
    }
    let expected: f64 = exact.iter().enumerate().map(|(i, p)| (i + 1) as f64 * p / mass).sum();
    Verdict::Label((expected - 5.5) / 4.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(p: f64) -> f32 {
        p.ln() as f32
    }

    #[test]
    fn ten_is_taken_off_one_when_they_share_a_token() {
        // Tokens are digits; P(1) = 0.4, of which a quarter goes on to 0; P(9) = 0.1; the others nothing.
        let ratings: Vec<Vec<u32>> = (1..=10).map(|i| if i == 10 { vec![1, 0] } else { vec![i] }).collect();
        let mut logprobs: Vec<Vec<f32>> = (1..=9).map(|_| vec![f32::NEG_INFINITY]).collect();
        logprobs[0] = vec![log(0.4)];
        logprobs[8] = vec![log(0.1)];
        logprobs.push(vec![log(0.4), log(0.25)]);
        let expected = (1.0 * 0.3 + 9.0 * 0.1 + 10.0 * 0.1) / 0.5;
        let Verdict::Label(score) = rate(&ratings, &logprobs) else { panic!("no label") };
        assert!((score - (expected - 5.5) / 4.5).abs() < 1e-6);
    }

    #[test]
    fn a_judge_that_rates_nothing_abstains_and_a_broken_one_fails() {
        let ratings: Vec<Vec<u32>> = (1..=10).map(|i| vec![i]).collect();
        assert_eq!(rate(&ratings, &vec![vec![-30.0]; 10]).kind(), "abstention");
        assert_eq!(rate(&ratings, &vec![vec![f32::NAN]; 10]).kind(), "failure");
    }
}
