//! Prompts for judges: template sets, built-in or the user's own, each identified by a hash.

mod reading;
#[cfg(test)]
mod tests;

use std::path::Path;

use anyhow::{Context, Result, bail};
use minijinja::context;

use super::guard::{Guard, without_control};
use crate::util::read_bounded;
use crate::util::seed;
use crate::util::template;
use reading::{Mistakes, Reading, Section, Text};

/// Template sets that are included in the program, by name.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("summarization", include_str!("templates/summarization.toml")),
    ("helpful", include_str!("templates/helpful.toml")),
    ("harmless", include_str!("templates/harmless.toml")),
];

/// Placeholders for the prompt, first and second text while a template's lines are analysed. Private-use characters
/// that no template contains.
const PLACEHOLDERS: [&str; 3] = ["\u{e000}", "\u{e001}", "\u{e002}"];

/// The prompt templates of one task. The built-in files in `src/pipeline/label/templates/` explain each key. A section
/// may be absent if no question needs it; building a question that needs an absent section is an error.
#[derive(Debug, Clone)]
pub struct TemplateSet {
    /// Description of the task; empty if the file has none.
    pub task: String,
    /// True if the answer of a comparison names the worse text, so that its probability is inverted.
    pub inverted: bool,
    base: Option<String>,
    detailed: Option<String>,
    pairwise: Option<Pairwise>,
    marks: Option<Marks>,
    direct: Option<Direct>,
    exemplars: Vec<Exemplar>,
    /// Control tokens of the judge's tokenizer.
    control: Vec<String>,
}

#[derive(Debug, Clone)]
struct Pairwise {
    sample: String,
    ending: String,
    rationale: Option<String>,
    guard: Guard,
}

#[derive(Debug, Clone)]
struct Marks {
    open: String,
    close: String,
    follow: String,
}

#[derive(Debug, Clone)]
struct Direct {
    template: String,
    guard: Guard,
}

#[derive(Debug, Clone)]
struct Exemplar {
    prompt: String,
    first: String,
    second: String,
    answer: u8,
    rationale: Option<String>,
}

/// Introduction that tells a judge its task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Preamble {
    /// The judge's role and its answer format.
    #[default]
    Base,
    /// The base preamble preceded by definitions of the quality criteria.
    Detailed,
    /// The user's own text.
    Own(String),
}

impl Preamble {
    /// Returns the preamble named `name`, or reads the file at that path.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn find(name: &str) -> Result<Self> {
        Ok(match name {
            "base" => Self::Base,
            "detailed" => Self::Detailed,
            path => {
                let text = read_bounded::prose(Path::new(path), read_bounded::WRITTEN);
                Self::Own(text.with_context(|| format!("cannot read the preamble {path}"))?)
            }
        })
    }
}

/// Type of question that a labeler asks; determines the sections that a template set needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// A rating of one completion.
    Rating,
    /// A comparison of two completions.
    Comparison {
        /// Introduction of the judge.
        preamble: Preamble,
        /// Number of exemplars before the question.
        shots: usize,
        /// True if a rationale is asked for first.
        cot: bool,
    },
}

impl TemplateSet {
    /// Returns the built-in set named `name`, or reads the file at that path.
    ///
    /// # Errors
    /// If `name` is neither a built-in set nor a readable file, or the file has mistakes; the error lists all of them
    /// with their lines.
    pub fn find(name: &str) -> Result<Self> {
        Self::read(name, None)
    }

    /// Returns the set as [`Self::find`] does, and checks that it can ask `question`.
    ///
    /// # Errors
    /// The same as for [`Self::find`]. Sections that `question` needs and the set lacks are listed among the mistakes.
    pub fn find_for(name: &str, question: &Question) -> Result<Self> {
        Self::read(name, Some(question))
    }

    fn read(name: &str, question: Option<&Question>) -> Result<Self> {
        let checked = |text: &str| {
            let (set, mut mistakes) = Self::parts(text);
            mistakes
                .extend(question.iter().flat_map(|question| set.missing_parts(question)).map(|message| (0, message)));
            Mistakes::unless(mistakes, set)
        };
        if let Some((_, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return checked(text).with_context(|| format!("the built-in template set {name} has"));
        }
        let path = Path::new(name);
        let names: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
        let text = read_bounded::prose(path, read_bounded::WRITTEN).with_context(|| {
            format!("labeler.templates = {name:?} is neither one of {} nor a readable file", names.join(", "))
        })?;
        checked(&text).with_context(|| format!("the template set {} has", path.display()))
    }

    /// Returns a hash of the content of the built-in set `name`, or of the file at that path; comments and layout do not
    /// count.
    ///
    /// # Errors
    /// The same as for [`Self::find`].
    pub fn content_hash(name: &str) -> Result<u64> {
        Self::find(name)?;
        let built_in = BUILT_IN.iter().find(|(built_in, _)| *built_in == name).map(|(_, text)| (*text).to_owned());
        let text = match built_in {
            Some(text) => text,
            None => read_bounded::prose(Path::new(name), read_bounded::WRITTEN)?,
        };
        Ok(seed::text(&text.parse::<toml::Table>()?.to_string()))
    }

    /// Parses a template set from TOML.
    ///
    /// # Errors
    /// If the text has mistakes; the error lists all of them with their lines.
    pub fn parse(text: &str) -> Result<Self> {
        let (set, mistakes) = Self::parts(text);
        Ok(Mistakes::unless(mistakes, set)?)
    }

    /// Parses `text` into a set and the list of its mistakes.
    fn parts(text: &str) -> (Self, Vec<(usize, String)>) {
        let (reading, table) = Reading::new(text);
        let known = ["task", "inverted", "preambles", "pairwise", "marks", "direct", "exemplars"];
        let root = reading.root(table.get_ref(), &known);
        let preambles = root.table("preambles", "preambles.", &["base", "detailed"]);
        let preamble = |key: &str| preambles.and_then(|section| section.text(key)).map(|text| text.text);
        let marks = root.table("marks", "marks.", &["open", "close", "follow"]);
        let compared = root.table("pairwise", "pairwise.", &["sample", "ending", "rationale"]);
        let rated = root.table("direct", "direct.", &["template"]);
        let keys = ["prompt", "first", "second", "answer", "rationale"];
        let exemplars = root.tables("exemplars", "exemplars.", &keys);
        for (section, name) in [(preambles, "preambles"), (marks, "marks"), (exemplars.first().copied(), "exemplars")] {
            if let (Some(section), None) = (section, compared) {
                section.mistake(section.line, format!("{name} belongs to comparisons, and [pairwise] is missing"));
            }
        }
        if compared.is_none() && rated.is_none() {
            root.mistake(0, "[pairwise] and [direct] are missing; a template set needs one of them at least".into());
        }
        let inverted = root.flag("inverted");
        if compared.is_some() && inverted.is_none() {
            root.mistake(0, "inverted is missing; give true if the answer of a comparison names the worse one".into());
        }
        let marks = marks.map(|section| Marks {
            open: section.needed("open").text,
            close: section.needed("close").text,
            follow: section.needed("follow").text,
        });
        let set = Self {
            task: root.text("task").map(|text| text.text).unwrap_or_default(),
            inverted: inverted.unwrap_or(false),
            base: preamble("base"),
            detailed: preamble("detailed"),
            pairwise: compared.map(|section| Pairwise::read(section, marks.as_ref())),
            marks,
            direct: rated.map(Direct::read),
            exemplars: exemplars.iter().enumerate().map(|(i, section)| Exemplar::read(i, *section)).collect(),
            control: Vec::new(),
        };
        (set, reading.into_mistakes())
    }

    /// Returns a message for each part that `question` needs and the set lacks.
    fn missing_parts(&self, question: &Question) -> Vec<String> {
        let mut lacking = Vec::new();
        let (preamble, shots, cot) = match question {
            Question::Rating => {
                if self.direct.is_none() {
                    lacking.push("[direct] is missing; labeler.type = \"direct\" needs its template".to_owned());
                }
                return lacking;
            }
            Question::Comparison { preamble, shots, cot } => (preamble, *shots, *cot),
        };
        match &self.pairwise {
            None => {
                lacking.push("[pairwise] is missing; labeler.type = \"pairwise\" needs its sample and ending".into())
            }
            Some(pairwise) if cot && pairwise.rationale.is_none() => {
                lacking.push("pairwise.rationale is missing; labeler.cot = true needs it".into());
            }
            Some(_) => {}
        }
        for (name, text, wanted) in
            [("base", &self.base, Preamble::Base), ("detailed", &self.detailed, Preamble::Detailed)]
        {
            if *preamble == wanted && text.is_none() {
                lacking.push(format!("preambles.{name} is missing; labeler.preamble = \"{name}\" needs it"));
            }
        }
        if shots > 0 && self.marks.is_none() {
            lacking.push("[marks] is missing; labeler.shots above 0 needs its open, close and follow".into());
        }
        if shots > self.exemplars.len() {
            let set = if self.task.is_empty() { String::new() } else { format!(" {}", self.task) };
            lacking.push(format!("labeler.shots = {shots}, but the template set{set} has {}", self.exemplars.len()));
        }
        for (i, _) in
            self.exemplars.iter().take(shots).enumerate().filter(|(_, exemplar)| cot && exemplar.rationale.is_none())
        {
            lacking.push(format!("exemplar {} has no rationale; labeler.cot = true needs it", i + 1));
        }
        lacking
    }

    fn has(&self, question: &Question) -> Result<()> {
        let lacking = self.missing_parts(question);
        if lacking.is_empty() { Ok(()) } else { bail!("{}", lacking.join("; ")) }
    }

    /// Sets the control tokens of the judge's tokenizer, which become plain text in prompts and completions. Control
    /// tokens of common forms are replaced for every judge.
    pub fn without_control(mut self, control: Vec<String>) -> Self {
        self.control = control;
        self
    }

    /// Returns the lines and names that a completion may imitate: the line before a comparison's answer, such as
    /// `Preferred Summary=`; the line before a rating, such as `SCORE:`; and the labels of the two compared texts, such
    /// as `Summary 1 -`. A set without a section gets common defaults.
    pub fn fields(&self) -> Fields {
        let last = |text: &str| text.lines().last().unwrap_or_default().to_owned();
        let mut fields = Fields {
            ending: "Preferred Response=".into(),
            rating: "SCORE:".into(),
            names: ["Response 1 -".into(), "Response 2 -".into()],
        };
        if let Some(direct) = &self.direct {
            fields.rating = last(&direct.template);
        }
        if let Some(pairwise) = &self.pairwise {
            fields.ending = last(&pairwise.ending);
            let sample = pairwise.fill(PLACEHOLDERS).unwrap_or_default();
            for (name, place) in fields.names.iter_mut().zip(&PLACEHOLDERS[1..]) {
                let before = sample.lines().find_map(|line| Some(line.split_once(place)?.0.trim()));
                if let Some(before) = before.filter(|before| !before.is_empty()) {
                    *name = before.to_owned();
                }
            }
        }
        fields
    }

    /// Returns the template for ratings.
    ///
    /// # Errors
    /// If the set has no template for ratings.
    pub fn rating(&self) -> Result<Rating> {
        self.has(&Question::Rating)?;
        let direct = self.direct.clone().context("[direct] is missing")?;
        Ok(Rating { direct, control: self.control.clone() })
    }

    /// Returns the template for comparisons with this preamble and the first `shots` exemplars; with `cot`, a rationale
    /// is asked for first.
    ///
    /// # Errors
    /// If `shots` exceeds the number of exemplars, or another required part of the set is missing.
    pub fn comparison(&self, preamble: &Preamble, shots: usize, cot: bool) -> Result<Comparison> {
        self.has(&Question::Comparison { preamble: preamble.clone(), shots, cot })?;
        let pairwise = self.pairwise.clone().context("[pairwise] is missing")?;
        let rationale = pairwise.rationale.clone().unwrap_or_default();
        let mut head = match preamble {
            Preamble::Base => self.base.clone().unwrap_or_default(),
            Preamble::Detailed => self.detailed.clone().unwrap_or_default(),
            Preamble::Own(text) => text.trim_end().to_owned(),
        };
        head.push_str("\n\n");
        if let Some(marks) = self.marks.as_ref().filter(|_| shots > 0) {
            for exemplar in &self.exemplars[..shots] {
                let sample = pairwise.fill([&exemplar.prompt, &exemplar.first, &exemplar.second])?;
                let why = exemplar.rationale.as_deref().unwrap_or_default();
                let thought = if cot { format!("{rationale} {why}\n\n") } else { String::new() };
                head.push_str(&format!(
                    "{}\n{sample}\n\n{thought}{}{}\n{}\n\n",
                    marks.open, pairwise.ending, exemplar.answer, marks.close
                ));
            }
            head.push_str(&format!("{}\n\n", marks.follow));
        }
        Ok(Comparison { pairwise, rationale, inverted: self.inverted, control: self.control.clone(), head, cot })
    }
}

/// Parts of a template set that a completion may imitate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fields {
    /// Line before the answer of a comparison.
    pub ending: String,
    /// Line before a rating.
    pub rating: String,
    /// Labels of the first and the second text of a comparison.
    pub names: [String; 2],
}

impl Pairwise {
    fn read(section: Section<'_>, marks: Option<&Marks>) -> Self {
        let (sample, ending, rationale) =
            (section.needed("sample"), section.needed("ending"), section.text("rationale"));
        let mut read = Self {
            sample: sample.text.clone(),
            ending: ending.text,
            rationale: rationale.map(|rationale| rationale.text),
            guard: Guard::default(),
        };
        let filled = checked(section, "pairwise.sample", &sample, &["first", "second"], || read.fill(PLACEHOLDERS));
        read.guard.add_filled(&filled, &PLACEHOLDERS, false);
        read.guard.add(&read.ending, true);
        read.guard.add(read.rationale.as_deref().unwrap_or_default(), true);
        for text in marks.iter().flat_map(|marks| [&marks.open, &marks.close, &marks.follow]) {
            read.guard.add(text, false);
        }
        read
    }

    fn fill(&self, [prompt, first, second]: [&str; 3]) -> Result<String> {
        render(&self.sample, context! { prompt, first, second })
    }
}

impl Direct {
    fn read(section: Section<'_>) -> Self {
        let template = section.needed("template");
        let mut read = Self { template: template.text.clone(), guard: Guard::default() };
        let [prompt, completion, _] = PLACEHOLDERS;
        let filled = checked(section, "direct.template", &template, &["completion"], || read.fill(prompt, completion));
        read.guard.add_filled(&filled, &PLACEHOLDERS, true);
        read
    }

    fn fill(&self, prompt: &str, completion: &str) -> Result<String> {
        render(&self.template, context! { prompt, completion })
    }
}

impl Exemplar {
    fn read(i: usize, section: Section<'_>) -> Self {
        let (answer, line) = section.number("answer");
        if line > 0 && !matches!(answer, 1 | 2) {
            section.mistake(line, format!("exemplar {} answers {answer}, not 1 or 2", i + 1));
        }
        Self {
            prompt: section.needed("prompt").text,
            first: section.needed("first").text,
            second: section.needed("second").text,
            answer: u8::try_from(answer).unwrap_or(0),
            rationale: section.text("rationale").map(|text| text.text),
        }
    }
}

/// Returns the template `key` filled in by `fill`. If it does not mention one of `wanted` or cannot be filled in, a
/// mistake is recorded. A missing template (line 0) is not reported again.
fn checked(
    section: Section<'_>,
    key: &str,
    template: &Text,
    wanted: &[&str],
    fill: impl FnOnce() -> Result<String>,
) -> String {
    if template.line == 0 {
        return String::new();
    }
    for name in wanted.iter().filter(|name| !template.text.contains(**name)) {
        section.mistake(template.line, format!("{key} does not mention {{{{ {name} }}}}"));
    }
    fill().unwrap_or_else(|error| {
        section.mistake(template.line, format!("{key}: {error:#}"));
        String::new()
    })
}

/// Prompt template that asks for a rating of one completion.
#[derive(Debug, Clone)]
pub struct Rating {
    direct: Direct,
    control: Vec<String>,
}

impl Rating {
    /// Returns the question about one completion, which cannot imitate the surrounding template; see [`Guard::quoted`].
    ///
    /// # Errors
    /// If the template cannot be filled in.
    pub fn ask(&self, prompt: &str, completion: &str) -> Result<String> {
        let (prompt, completion) = (without_control(prompt, &self.control), without_control(completion, &self.control));
        self.direct.fill(&prompt, &self.direct.guard.quoted(&completion))
    }

    /// Returns a hash of the template.
    pub fn hash(&self) -> u64 {
        seed::text(&self.direct.template)
    }
}

/// Prompt template that asks which of two completions is better.
#[derive(Debug, Clone)]
pub struct Comparison {
    pairwise: Pairwise,
    /// Request for a rationale; empty if the set has none.
    rationale: String,
    inverted: bool,
    control: Vec<String>,
    head: String,
    /// True if a rationale is asked for first.
    pub cot: bool,
}

impl Comparison {
    /// Returns a hash of everything in the prompt except the compared texts.
    pub fn hash(&self) -> u64 {
        let pairwise = &self.pairwise;
        let rationale = if self.cot { self.rationale.as_str() } else { "" };
        let direction = if self.inverted { "worse" } else { "better" };
        seed::text(&[self.head.as_str(), &pairwise.sample, rationale, &pairwise.ending, direction].join("\0"))
    }

    /// Returns whether the answer names the worse text.
    pub fn inverted(&self) -> bool {
        self.inverted
    }

    /// Returns the template filled with the two texts, which cannot imitate it; see [`Guard::quoted`].
    fn sample(&self, prompt: &str, first: &str, second: &str) -> Result<String> {
        let [prompt, first, second] = [prompt, first, second].map(|text| without_control(text, &self.control));
        let guard = &self.pairwise.guard;
        self.pairwise.fill([&prompt, &guard.quoted(&first), &guard.quoted(&second)])
    }

    /// Returns the prompt that asks for a rationale.
    ///
    /// # Errors
    /// If the template cannot be filled in.
    pub fn think(&self, prompt: &str, first: &str, second: &str) -> Result<String> {
        Ok(format!("{}{}\n\n{}", self.head, self.sample(prompt, first, second)?, self.rationale))
    }

    /// Returns the prompt whose answer is `1` or `2`, including `rationale` if given.
    ///
    /// # Errors
    /// If the template cannot be filled in.
    pub fn ask(&self, prompt: &str, first: &str, second: &str, rationale: Option<&str>) -> Result<String> {
        let ending = &self.pairwise.ending;
        Ok(match rationale {
            Some(text) => {
                let text = without_control(text.trim(), &self.control);
                format!("{} {text}\n\n{ending}", self.think(prompt, first, second)?)
            }
            None => format!("{}{}\n\n{ending}", self.head, self.sample(prompt, first, second)?),
        })
    }
}

fn render(source: &str, values: minijinja::Value) -> Result<String> {
    template::fill_text(source, values).context("a labeler's template cannot be filled in")
}
