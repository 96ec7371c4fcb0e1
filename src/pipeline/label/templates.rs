//! What a judge is asked: template sets, shipped or the user's own, each known by its hash.

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

/// The sets that come with the program.
pub const SHIPPED: &[(&str, &str)] = &[
    ("summarization", include_str!("templates/summarization.toml")),
    ("helpful", include_str!("templates/helpful.toml")),
    ("harmless", include_str!("templates/harmless.toml")),
];

/// Stand for prompt, first and second text while the lines of a template are looked at: no template has them.
const PLACES: [&str; 3] = ["\u{e000}", "\u{e001}", "\u{e002}"];

/// Everything that a judge may be asked about one task. The shipped files in `src/label/templates/` explain each key. A
/// section that no question needs may be missing; whoever asks for a question that needs it gets an error.
#[derive(Debug, Clone)]
pub struct TemplateSet {
    /// What the set is for; empty where a file does not say.
    pub task: String,
    /// Whether the answer of a comparison names the worse one, so that its probability is turned round.
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
                let text = read_bounded::prose(Path::new(path), read_bounded::WRITTEN);
                Self::Own(text.with_context(|| format!("cannot read the preamble {path}"))?)
            }
        })
    }
}

/// What a labeler asks with a template set, which says which sections it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// A rating of one completion.
    Rating,
    /// A comparison of two.
    Comparison {
        /// How the judge is introduced.
        preamble: Preamble,
        /// Exemplars before the question.
        shots: usize,
        /// Whether a rationale is asked for first.
        cot: bool,
    },
}

impl TemplateSet {
    /// The set called `name`, or the one in the file at `name`.
    ///
    /// # Errors
    /// A name that is no shipped set and no readable file; all mistakes of the file, each with its line.
    pub fn find(name: &str) -> Result<Self> {
        Self::read(name, None)
    }

    /// As [`Self::find`], for a labeler that asks `question`.
    ///
    /// # Errors
    /// As [`Self::find`]; what `question` needs and the set lacks is among the mistakes.
    pub fn find_for(name: &str, question: &Question) -> Result<Self> {
        Self::read(name, Some(question))
    }

    fn read(name: &str, question: Option<&Question>) -> Result<Self> {
        let checked = |text: &str| {
            let (set, mut mistakes) = Self::parts(text);
            mistakes.extend(question.iter().flat_map(|question| set.lacks(question)).map(|message| (0, message)));
            Mistakes::unless(mistakes, set)
        };
        if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
            return checked(text).with_context(|| format!("the shipped template set {name} has"));
        }
        let path = Path::new(name);
        let names: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
        let text = read_bounded::prose(path, read_bounded::WRITTEN).with_context(|| {
            format!("labeler.templates = {name:?} is none of {} and no file that can be read", names.join(", "))
        })?;
        checked(&text).with_context(|| format!("the template set {} has", path.display()))
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
            None => read_bounded::prose(Path::new(name), read_bounded::WRITTEN)?,
        };
        Ok(seed::text(&text.parse::<toml::Table>()?.to_string()))
    }

    /// A set from its TOML.
    ///
    /// # Errors
    /// All mistakes, each with its line.
    pub fn parse(text: &str) -> Result<Self> {
        let (set, mistakes) = Self::parts(text);
        Ok(Mistakes::unless(mistakes, set)?)
    }

    /// The set in `text`, and the mistakes of it.
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

    /// What `question` needs and the set has not.
    fn lacks(&self, question: &Question) -> Vec<String> {
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
        for (i, _) in self.exemplars.iter().take(shots).enumerate().filter(|(_, one)| cot && one.rationale.is_none()) {
            lacking.push(format!("exemplar {} has no rationale; labeler.cot = true needs it", i + 1));
        }
        lacking
    }

    fn has(&self, question: &Question) -> Result<()> {
        let lacking = self.lacks(question);
        if lacking.is_empty() { Ok(()) } else { bail!("{}", lacking.join("; ")) }
    }

    /// The same set for a judge whose tokenizer has the control tokens `control`: in prompts and completions they are plain
    /// text. Of control tokens of common forms that holds for any judge.
    pub fn without_control(mut self, control: Vec<String>) -> Self {
        self.control = control;
        self
    }

    /// The line that precedes the answer of a comparison, such as `Preferred Summary=`; the one that precedes a rating, such
    /// as `SCORE:`; and the names under which a comparison shows its two texts, such as `Summary 1 -`. A set without a
    /// section has the words of another one.
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
            let sample = pairwise.fill(PLACES).unwrap_or_default();
            for (name, place) in fields.names.iter_mut().zip(&PLACES[1..]) {
                let before = sample.lines().find_map(|line| Some(line.split_once(place)?.0.trim()));
                if let Some(before) = before.filter(|before| !before.is_empty()) {
                    *name = before.to_owned();
                }
            }
        }
        fields
    }

    /// Questions for a rating.
    ///
    /// # Errors
    /// A set without a template for it.
    pub fn rating(&self) -> Result<Rating> {
        self.has(&Question::Rating)?;
        let direct = self.direct.clone().context("[direct] is missing")?;
        Ok(Rating { direct, control: self.control.clone() })
    }

    /// Comparison prompts with this preamble and the first `shots` exemplars; with `cot`, by a rationale first.
    ///
    /// # Errors
    /// More shots than the set has exemplars, and whatever else of the set this needs and is missing.
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
            for one in &self.exemplars[..shots] {
                let sample = pairwise.fill([&one.prompt, &one.first, &one.second])?;
                let why = one.rationale.as_deref().unwrap_or_default();
                let thought = if cot { format!("{rationale} {why}\n\n") } else { String::new() };
                head.push_str(&format!(
                    "{}\n{sample}\n\n{thought}{}{}\n{}\n\n",
                    marks.open, pairwise.ending, one.answer, marks.close
                ));
            }
            head.push_str(&format!("{}\n\n", marks.follow));
        }
        Ok(Comparison { pairwise, rationale, inverted: self.inverted, control: self.control.clone(), head, cot })
    }
}

/// Words of a template set that a completion may imitate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fields {
    /// The line that precedes the answer of a comparison.
    pub ending: String,
    /// The line that precedes a rating.
    pub rating: String,
    /// What precedes the first and the second text of a comparison.
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
        let filled = checked(section, "pairwise.sample", &sample, &["first", "second"], || read.fill(PLACES));
        read.guard.add_filled(&filled, &PLACES, false);
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
        let [prompt, completion, _] = PLACES;
        let filled = checked(section, "direct.template", &template, &["completion"], || read.fill(prompt, completion));
        read.guard.add_filled(&filled, &PLACES, true);
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

/// The template `key` as `fill` fills it in; empty, and a mistake, where it does not mention one of `wanted` or cannot be
/// filled in. A template that is missing already is no second mistake.
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

/// A way to ask for a rating.
#[derive(Debug, Clone)]
pub struct Rating {
    direct: Direct,
    control: Vec<String>,
}

impl Rating {
    /// The question about one completion, which cannot imitate the template around it: see [`Guard::quoted`].
    ///
    /// # Errors
    /// A template that cannot be filled in.
    pub fn ask(&self, prompt: &str, completion: &str) -> Result<String> {
        let (prompt, completion) = (without_control(prompt, &self.control), without_control(completion, &self.control));
        self.direct.fill(&prompt, &self.direct.guard.quoted(&completion))
    }

    /// What tells this question from others: the template.
    pub fn hash(&self) -> u64 {
        seed::text(&self.direct.template)
    }
}

/// A way to ask which of two is better.
#[derive(Debug, Clone)]
pub struct Comparison {
    pairwise: Pairwise,
    /// The request for a rationale; empty where there is none.
    rationale: String,
    inverted: bool,
    control: Vec<String>,
    head: String,
    /// Whether a rationale is asked for first.
    pub cot: bool,
}

impl Comparison {
    /// What tells this prompt from others: everything but the sample that is filled in.
    pub fn hash(&self) -> u64 {
        let pairwise = &self.pairwise;
        let rationale = if self.cot { self.rationale.as_str() } else { "" };
        let direction = if self.inverted { "worse" } else { "better" };
        seed::text(&[self.head.as_str(), &pairwise.sample, rationale, &pairwise.ending, direction].join("\0"))
    }

    /// Whether the answer names the worse one.
    pub fn inverted(&self) -> bool {
        self.inverted
    }

    /// The two texts in the template, which they cannot imitate: see [`Guard::quoted`].
    fn sample(&self, prompt: &str, first: &str, second: &str) -> Result<String> {
        let [prompt, first, second] = [prompt, first, second].map(|text| without_control(text, &self.control));
        let guard = &self.pairwise.guard;
        self.pairwise.fill([&prompt, &guard.quoted(&first), &guard.quoted(&second)])
    }

    /// The question that asks for a rationale.
    ///
    /// # Errors
    /// A template that cannot be filled in.
    pub fn think(&self, prompt: &str, first: &str, second: &str) -> Result<String> {
        Ok(format!("{}{}\n\n{}", self.head, self.sample(prompt, first, second)?, self.rationale))
    }

    /// The question that is answered by `1` or `2`, after `rationale` where there is one.
    ///
    /// # Errors
    /// A template that cannot be filled in.
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
