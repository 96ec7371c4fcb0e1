//! What a judge is asked: template sets, shipped or the user's own, each known by its hash.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use minijinja::context;
use serde::Deserialize;

use crate::{bounded, seed, template};

/// The sets that come with the program.
pub const SHIPPED: &[(&str, &str)] = &[
    ("summarization", include_str!("templates/summarization.toml")),
    ("helpful", include_str!("templates/helpful.toml")),
    ("harmless", include_str!("templates/harmless.toml")),
];

/// Everything a judge may be asked about one task. The shipped files in `src/label/templates/` explain each key.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateSet {
    /// What the set is for.
    pub task: String,
    /// Whether the answer names the worse one, so that its probability is turned round.
    pub inverted: bool,
    preambles: Preambles,
    pairwise: Pairwise,
    marks: Marks,
    direct: Direct,
    #[serde(default)]
    exemplars: Vec<Exemplar>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Preambles {
    base: String,
    detailed: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pairwise {
    sample: String,
    ending: String,
    rationale: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marks {
    open: String,
    close: String,
    follow: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Direct {
    template: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exemplar {
    prompt: String,
    first: String,
    second: String,
    answer: u8,
    rationale: String,
}

/// How a judge is introduced to its task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Preamble {
    /// Who the judge is and what it answers.
    #[default]
    Base,
    /// That, with the axes of quality defined first.
    Detailed,
    /// The user's own text.
    Own(String),
}

impl Preamble {
    /// The one called `name`, or the text of the file at `name`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn find(name: &str) -> Result<Self> {
        Ok(match name {
            "base" => Self::Base,
            "detailed" => Self::Detailed,
            path => {
                let text = bounded::text(Path::new(path), bounded::WRITTEN);
                Self::Own(text.with_context(|| format!("cannot read the preamble {path}"))?)
            }
        })
    }
}

impl TemplateSet {
    /// The set called `name`, or the one in the file at `name`.
    ///
    /// # Errors
    /// A name that is no shipped set and no readable file; names the key that is missing or unknown.
    pub fn find(name: &str) -> Result<Self> {
        if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
            return Self::parse(text).with_context(|| format!("in the shipped template set {name}"));
        }
        let path = Path::new(name);
        let names: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
        let text = bounded::text(path, bounded::WRITTEN).with_context(|| {
            format!("labeler.templates = {name:?} is none of {} and no file that can be read", names.join(", "))
        })?;
        Self::parse(&text).with_context(|| format!("in the template set {}", path.display()))
    }

    /// Hash of the content of the set called `name`, or of the one in the file at `name`; comments and layout do not count.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn content_hash(name: &str) -> Result<u64> {
        Self::find(name)?;
        let shipped = SHIPPED.iter().find(|(shipped, _)| *shipped == name).map(|(_, text)| (*text).to_owned());
        let text = match shipped {
            Some(text) => text,
            None => bounded::text(Path::new(name), bounded::WRITTEN)?,
        };
        Ok(seed::text(&text.parse::<toml::Table>()?.to_string()))
    }

    /// A set from its TOML.
    ///
    /// # Errors
    /// Names the line and key at fault, or the template that does not parse.
    pub fn parse(text: &str) -> Result<Self> {
        let set: Self = toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", error.to_string().trim_end()))?;
        for (i, exemplar) in set.exemplars.iter().enumerate() {
            ensure!(matches!(exemplar.answer, 1 | 2), "exemplar {} answers {}, not 1 or 2", i + 1, exemplar.answer);
        }
        for wanted in ["first", "second"] {
            ensure!(set.pairwise.sample.contains(wanted), "pairwise.sample does not mention {{{{ {wanted} }}}}");
        }
        ensure!(set.direct.template.contains("completion"), "direct.template does not mention {{{{ completion }}}}");
        set.sample("text", "one", "two")?;
        render(&set.direct.template, context! { prompt => "text", completion => "one" })?;
        Ok(set)
    }

    fn sample(&self, prompt: &str, first: &str, second: &str) -> Result<String> {
        render(&self.pairwise.sample, context! { prompt, first, second })
    }

    /// The rating prompt for one completion.
    ///
    /// # Errors
    /// A template that cannot be filled in.
    pub fn rating(&self, prompt: &str, completion: &str) -> Result<String> {
        render(&self.direct.template, context! { prompt, completion })
    }

    /// Hash of the rating prompt.
    pub fn rating_hash(&self) -> u64 {
        seed::text(&self.direct.template)
    }

    /// Comparison prompts with this preamble and the first `shots` exemplars; with `cot`, by a rationale first.
    ///
    /// # Errors
    /// More shots than the set has exemplars.
    pub fn comparison(&self, preamble: &Preamble, shots: usize, cot: bool) -> Result<Comparison> {
        if shots > self.exemplars.len() {
            bail!("labeler.shots = {shots}, but the template set {} has {}", self.task, self.exemplars.len());
        }
        let (pairwise, marks) = (&self.pairwise, &self.marks);
        let mut head = match preamble {
            Preamble::Base => self.preambles.base.clone(),
            Preamble::Detailed => self.preambles.detailed.clone(),
            Preamble::Own(text) => text.trim_end().to_owned(),
        };
        head.push_str("\n\n");
        for one in &self.exemplars[..shots] {
            let sample = self.sample(&one.prompt, &one.first, &one.second)?;
            let thought = if cot { format!("{} {}\n\n", pairwise.rationale, one.rationale) } else { String::new() };
            head.push_str(&format!(
                "{}\n{sample}\n\n{thought}{}{}\n{}\n\n",
                marks.open, pairwise.ending, one.answer, marks.close
            ));
        }
        if shots > 0 {
            head.push_str(&format!("{}\n\n", marks.follow));
        }
        Ok(Comparison { set: self.clone(), head, cot })
    }
}

/// A way to ask which of two is better.
#[derive(Debug, Clone)]
pub struct Comparison {
    set: TemplateSet,
    head: String,
    /// Whether a rationale is asked for first.
    pub cot: bool,
}

impl Comparison {
    /// What tells this prompt from others: everything but the sample that is filled in.
    pub fn hash(&self) -> u64 {
        let pairwise = &self.set.pairwise;
        let rationale = if self.cot { pairwise.rationale.as_str() } else { "" };
        let direction = if self.set.inverted { "worse" } else { "better" };
        seed::text(&[self.head.as_str(), &pairwise.sample, rationale, &pairwise.ending, direction].join("\0"))
    }

    /// Whether the answer names the worse one.
    pub fn inverted(&self) -> bool {
        self.set.inverted
    }

    /// The question that asks for a rationale.
    ///
    /// # Errors
    /// A template that cannot be filled in.
    pub fn think(&self, prompt: &str, first: &str, second: &str) -> Result<String> {
        Ok(format!("{}{}\n\n{}", self.head, self.set.sample(prompt, first, second)?, self.set.pairwise.rationale))
    }

    /// The question that is answered by `1` or `2`, after `rationale` where there is one.
    ///
    /// # Errors
    /// A template that cannot be filled in.
    pub fn ask(&self, prompt: &str, first: &str, second: &str, rationale: Option<&str>) -> Result<String> {
        let ending = &self.set.pairwise.ending;
        Ok(match rationale {
            Some(text) => format!("{} {}\n\n{ending}", self.think(prompt, first, second)?, text.trim()),
            None => format!("{}{}\n\n{ending}", self.head, self.set.sample(prompt, first, second)?),
        })
    }
}

fn render(source: &str, values: minijinja::Value) -> Result<String> {
    template::fill_text(source, values).context("a labeler's template cannot be filled in")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_set_is_whole_and_even_handed() {
        for (name, _) in SHIPPED {
            let set = TemplateSet::find(name).unwrap();
            assert_eq!((set.task.as_str(), set.inverted), (*name, *name == "harmless"));
            let firsts = set.exemplars.iter().filter(|one| one.answer == 1).count();
            assert_eq!((set.exemplars.len(), firsts), (4, 2), "{name}: as many examples for 1 as for 2");
            assert!(set.rating("text", "answer").unwrap().ends_with("SCORE:"));
        }
    }

    #[test]
    fn a_comparison_is_laid_out_as_the_set_says() {
        let set = TemplateSet::find("summarization").unwrap();
        let asked = set.comparison(&Preamble::Own("Judge.".into()), 1, false).unwrap();
        let text = asked.ask("T", "A", "B", None).unwrap();
        let parts: Vec<&str> = text.split("\n\n").collect();
        assert_eq!(parts[0], "Judge.");
        assert!(parts[1].starts_with("----- example -----\nText - My neighbour"), "{text}");
        assert_eq!(parts[2], "Preferred Summary=1\n----- end of example -----");
        assert_eq!(parts[3], "Now judge this one in the same way.");
        assert_eq!(parts[4..], ["Text - T\nSummary 1 - A\nSummary 2 - B", "Preferred Summary="]);
        let thought = set.comparison(&Preamble::Base, 2, true).unwrap();
        let think = thought.think("T", "A", "B").unwrap();
        assert!(think.ends_with("Summary 2 - B\n\nLook at coherence, accuracy, coverage and overall quality in turn, and say in a sentence each which summary does better and why.\n\nRationale:"), "{think}");
        assert_eq!(think.matches("Rationale:").count(), 3);
        let ask = thought.ask("T", "A", "B", Some(" because.\n")).unwrap();
        assert_eq!(ask, format!("{think} because.\n\nPreferred Summary="));
    }

    #[test]
    fn what_changes_a_question_changes_its_hash() {
        let sets = [TemplateSet::find("summarization").unwrap(), TemplateSet::find("harmless").unwrap()];
        let mut hashes = Vec::new();
        for set in &sets {
            for (preamble, shots, cot) in [
                (Preamble::Base, 0, false),
                (Preamble::Detailed, 0, false),
                (Preamble::Base, 2, false),
                (Preamble::Base, 0, true),
            ] {
                hashes.push(set.comparison(&preamble, shots, cot).unwrap().hash());
            }
        }
        let count = hashes.len();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), count);
    }

    #[test]
    fn a_set_that_does_not_work_is_refused_with_the_reason() {
        let text = SHIPPED[0].1;
        for (from, to, words) in [
            ("inverted = false", "inverted = \"no\"", "inverted"),
            ("ending = ", "endings = ", "endings"),
            ("answer = 2", "answer = 3", "exemplar 2 answers 3"),
            ("{{ second }}", "two", "does not mention {{ second }}"),
            ("{{ prompt }}", "{{ text }}", "cannot be filled in"),
        ] {
            let result = TemplateSet::parse(&text.replace(from, to));
            let error = format!("{:#}", result.unwrap_err());
            assert!(error.contains(words), "{to}: {error}");
        }
        let set = TemplateSet::find("helpful").unwrap();
        assert!(set.comparison(&Preamble::Base, 5, false).unwrap_err().to_string().contains("labeler.shots = 5"));
        assert!(
            TemplateSet::find("no/such.toml").unwrap_err().to_string().contains("summarization, helpful, harmless")
        );
    }
}
