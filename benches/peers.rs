//! Preceptor's side of the comparison with PyTorch, transformers and TRL: one kind of work on random weights, with a
//! warm-up and timed repeats, printed as one line of JSON. `benches/peers/run.py` runs it and its counterpart `peer.py`
//! alternately and prints the table:
//!
//! ```text
//! python3 benches/peers/run.py --help
//! ```
//!
//! Alone: `cargo bench --bench peers -- WORK --model tiny|smollm2 [--threads N] [--repeats R] [--eta E]
//! [--replicas N] [--learner-threads N] [--precision highest|high|medium] [--weights f32|bf16|q8_0]`; `--weights` applies to `generate`,
//! `grpo` and `overlap`.

#[path = "common/shapes.rs"]
mod shapes;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::Device;
use kernels::{AdamW, AdamWConfig, Format, Gradients, backward};
use preceptor::config::{self, Choice, Config, MatmulPrecision};
use preceptor::lm::model::{Decoder, ModelConfig, Pack, Weights};
use preceptor::lm::source::ModelFiles;
use preceptor::lm::tokens::Tokenizer;
use preceptor::pipeline::data::{Dataset, ModelBounds, OnBad, OnLong, Part, ReadOptions, Split};
use preceptor::pipeline::generate::sampler::Sampling;
use preceptor::pipeline::generate::{Fixed, Request, generate};
use preceptor::pipeline::label::likelihood::Likelihood;
use preceptor::pipeline::label::local::Judge;
use preceptor::pipeline::label::{Labeler, Labels};
use preceptor::pipeline::learn::TrainState;
use preceptor::pipeline::learn::{Done, Observer};
use preceptor::pipeline::setup::{Devices, Prepared, prompt_format};
use preceptor::pipeline::topology::Node;
use preceptor::rl::ledger::SharedLedger;
use preceptor::run::controller::AdjustableLimits;
use preceptor::types::{Completion, Finish, Group, Prompt, Rewarded, Verdict};
use preceptor_actors::{GraphOptions, GraphReport, Outcome, SnapshotCell, spawn_graph};
use serde_json::{Map, Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const GROUP: usize = 8;
const PROMPT: usize = 64;
const ANSWER: usize = 64;
const BLANK: usize = 16;
/// Length of a training sequence in tokens.
const SEQUENCE: usize = 128;
/// Number of groups in a step of reinforcement learning, which are generated concurrently.
const BATCH: usize = 4;
/// Minimum seconds of a repeat, which does its work several times if necessary. The kernel counts CPU time in hundredths of
/// a second.
const MIN_SECONDS: f64 = 2.0;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let (work, mut options) = (arguments.next().unwrap_or_default(), Map::new());
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        options.insert(name, value.into());
    }
    // `cargo test --benches` and `cargo bench` name no model; then nothing is measured.
    let Some(model) = options.get("--model").and_then(Value::as_str) else { return Ok(()) };
    preceptor::util::process::prepare();
    let number = |name: &str, default: u64| {
        options.get(name).and_then(Value::as_str).map_or(Ok(default), str::parse).with_context(|| name.to_owned())
    };
    let precision = options.get("--precision").and_then(Value::as_str).unwrap_or("highest");
    let found = MatmulPrecision::WORDS.iter().find(|(word, _)| *word == precision);
    preceptor::lm::precision::set_matmul_precision(found.with_context(|| format!("no precision {precision:?}"))?.1);
    // The concurrent stages of `overlap` need two threads.
    let threads = if work == "overlap" { 2 } else { number("--threads", 1)? };
    let repeats = number("--repeats", 3)?;
    let rollout_weights = options.get("--weights").and_then(Value::as_str).unwrap_or("f32").to_owned();
    let (subject, weights) = Subject::new(model, rollout_weights)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build()?;
    let figures = match work.as_str() {
        "train" => pool.install(|| subject.train(weights, repeats))?,
        "generate-1" => pool.install(|| subject.generate(&weights, 1, repeats))?,
        "generate-8" => pool.install(|| subject.generate(&weights, 8, repeats))?,
        "generate-32" => pool.install(|| subject.generate(&weights, 32, repeats))?,
        "label" => pool.install(|| subject.label(weights, repeats))?,
        // With two threads the rollout and the learner work concurrently, and the learner has two replicas, because it has
        // more work. With one thread they alternate.
        "grpo" => {
            let eta = number("--eta", u64::from(threads > 1))?;
            let learner = [number("--replicas", threads)?, number("--learner-threads", 1)?];
            subject.grpo(weights, eta, learner, repeats)?
        }
        "overlap" => subject.overlap(&weights, repeats)?,
        _ => bail!("{work:?} is none of train, generate-1, generate-8, generate-32, label, grpo, overlap"),
    };
    let mut line = json!({ "work": work, "model": model, "threads": threads, "peak_rss_kib": peak_rss_kib()? });
    line.as_object_mut().context("an object")?.extend(figures);
    println!("{line}");
    Ok(())
}

/// A measured model.
struct Subject {
    shape: ModelConfig,
    /// Number of sequences in a training step.
    sequences: usize,
    /// Number format of the weights while sampling, as in `rollout.weights`.
    rollout_weights: String,
}

impl Subject {
    /// Returns the model `name` with random weights.
    fn new(name: &str, rollout_weights: String) -> Result<(Self, Arc<Decoder>)> {
        let Some(shape) = shapes::shape(name) else { bail!("{name:?} is neither tiny nor smollm2") };
        let sequences = if name == "tiny" { 8 } else { 4 };
        let model = Arc::new(Decoder::new(&shape, &Weights::scratch(&shape, 0.02, 1, &Device::Cpu)?)?);
        Ok((Self { shape, sequences, rollout_weights }, model))
    }

    /// Returns `length` token ids, which differ for each `place`.
    fn words(&self, place: usize, length: usize) -> Vec<u32> {
        (place * length..(place + 1) * length).map(|i| (i * 61 % self.shape.vocab_size) as u32).collect()
    }

    /// Measures optimizer steps on complete sequences that share only their first token.
    fn train(&self, weights: Arc<Decoder>, repeats: u64) -> Result<Map<String, Value>> {
        let sequences: Vec<Vec<u32>> = (0..self.sequences).map(|k| self.words(k + 1, SEQUENCE - 1)).collect();
        let pack = Pack::new(&[0], &sequences);
        let (model, params) = weights.trainable(true)?;
        let units = self.sequences * SEQUENCE;
        drop(weights);
        let mut gradients = Gradients::new(&params);
        let mut optimizer = AdamW::new(params, AdamWConfig::default())?;
        repeat(repeats, units, "tokens", || {
            let (logprobs, _) = model.logprobs(&pack, 1.0)?;
            backward(&logprobs.mean_all()?.neg()?, &mut [&mut gradients])?;
            let clip = (1.0 / gradients.global_norm()?).min(1.0);
            optimizer.step(&gradients, 1e-6, clip)?;
            Ok(gradients.zero()?)
        })
    }

    /// Measures the sampling of `width` completions, eight per prompt.
    fn generate(&self, weights: &Arc<Decoder>, width: usize, repeats: u64) -> Result<Map<String, Value>> {
        let format = match self.rollout_weights.as_str() {
            "f32" => None,
            "bf16" => Some(Format::Bf16),
            "q8_0" => Some(Format::Q8),
            other => bail!("{other:?} is none of f32, bf16, q8_0"),
        };
        let weights = &format.map_or(Ok(Arc::clone(weights)), |format| weights.quantized(format).map(Arc::new))?;
        let prompts: Vec<Vec<u32>> = (0..width.div_ceil(GROUP)).map(|k| self.words(k, PROMPT)).collect();
        let sampling = Sampling { temperature: 0.9, max_new_tokens: ANSWER, ..Sampling::default() };
        let requests = || -> Vec<Request> {
            prompts.iter().map(|prompt| Request::new(prompt, (0..width.min(GROUP) as u64).collect())).collect()
        };
        repeat(repeats, width * ANSWER, "tokens", || {
            generate(&mut Fixed(Arc::clone(weights)), requests(), &sampling).map(drop)
        })
    }

    /// Measures the likelihood labeler on groups.
    fn label(&self, weights: Arc<Decoder>, repeats: u64) -> Result<Map<String, Value>> {
        let judge = Judge { model: weights, tokenizer: Tokenizer::bytes(), identity: 0, chat: false };
        let labeler = Likelihood { judge, length_normalise: false, temperature: 1.0 };
        let groups: Vec<Group> = (0..8).map(|k| self.group(k)).collect();
        repeat(repeats, groups.len() * GROUP, "labels", || {
            groups.iter().try_for_each(|group| labeler.label(group).map(drop))
        })
    }

    fn group(&self, place: usize) -> Group {
        let completion = |k: usize| Completion {
            ids: self.words(1 + place * GROUP + k, ANSWER),
            logprobs: vec![],
            versions: vec![],
            finish: Finish::Length,
            text: String::new(),
        };
        let (ids, blank) = (self.words(place, PROMPT).into(), self.words(0, BLANK).into());
        let prompt = Prompt { seq: place as u64, epoch: 0, row: place, text: "".into(), ids, blank, reference: None };
        Group { prompt, completions: (0..GROUP).map(completion).collect() }
    }

    /// Measures GRPO steps of the node, each from the end of the previous step to its own end.
    fn grpo(&self, weights: Arc<Decoder>, eta: u64, learner: [u64; 2], repeats: u64) -> Result<Map<String, Value>> {
        // η more steps follow, so that each timed step includes the generation of one batch.
        let run = self.run(weights, eta, learner, 1 + repeats + eta)?;
        let mut figures = Figures::new(BATCH * GROUP, "samples");
        run.steps.windows(2).take(repeats as usize).for_each(|pair| figures.add(&pair[0], &pair[1]));
        Ok(figures.done())
    }

    /// Measures complete runs of `steps` with one thread each for rollout and learner: at η = 1, where they work
    /// concurrently, and at η = 0, where each waits for the other, so that its busy time is the time of its work alone.
    fn overlap(&self, weights: &Arc<Decoder>, steps: u64) -> Result<Map<String, Value>> {
        let run = |eta, steps| self.run(Arc::clone(weights), eta, [1, 1], steps);
        run(0, 1)?;
        let (alternating, concurrent) = (run(0, steps)?, run(1, steps)?);
        let mut figures = Figures::new(steps as usize * BATCH * GROUP, "samples");
        let last = concurrent.steps.last().context("a run has steps")?;
        figures.add(&concurrent.began, last);
        let last = alternating.steps.last().context("a run has steps")?;
        let wall = (last.at - alternating.began.at).as_secs_f64();
        let longest = alternating.busy("rollout").max(alternating.busy("learn"));
        let mut figures = figures.done();
        let ratio = figures["wall_s"][0].as_f64().unwrap_or(f64::NAN) / longest;
        for (name, value) in [
            ("eta0_wall_s", wall),
            ("generation_alone_s", alternating.busy("rollout")),
            ("learning_alone_s", alternating.busy("learn")),
            ("generation_busy_s", concurrent.busy("rollout")),
            ("learning_busy_s", concurrent.busy("learn")),
            ("ratio", ratio),
        ] {
            figures.insert(name.into(), json!(value));
        }
        Ok(figures)
    }

    /// Runs the real node until it has taken all steps, with a learner of `learner` replicas and threads of each.
    fn run(&self, weights: Arc<Decoder>, eta: u64, learner: [u64; 2], steps: u64) -> Result<Run> {
        let dir = tempfile::tempdir()?;
        let marks = Arc::new(Mutex::new(Vec::new()));
        let node = self.node(weights, dir.path(), [eta, learner[0], learner[1], steps], &marks)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let began = Mark::now()?;
        let (outcome, report) = runtime.block_on(async {
            let graph = spawn_graph(GraphOptions::default(), move |builder| node.wire(builder));
            (graph.wait().await, graph.report())
        });
        ensure!(outcome == Outcome::Finished && report.restarts == 0, "the run ended as {outcome:?}");
        let steps = std::mem::take(&mut *marks.lock().map_err(|_| anyhow!("the observer panicked"))?);
        Ok(Run { began, steps, report })
    }

    fn node(
        &self,
        weights: Arc<Decoder>,
        dir: &Path,
        [eta, replicas, learner_threads, steps]: [u64; 4],
        marks: &Arc<Mutex<Vec<Mark>>>,
    ) -> Result<Node> {
        let tokenizer = self.tokenizer(dir)?;
        let prompt = |k| {
            let words: Vec<String> = self.words(k, PROMPT).iter().map(|word| format!("w{word}")).collect();
            format!("{}\n", json!({ "prompt": words.join(" ") }))
        };
        let path = dir.join("prompts.jsonl");
        std::fs::write(&path, (0..64).map(prompt).collect::<String>())?;
        let overrides = [
            format!("data.path={:?}", path.display().to_string()),
            "data.instruction=\"{{ prompt }}\"".into(),
            "data.chat=false".into(),
            format!("run.steps={steps}"),
            format!("learner.eta={eta}"),
            format!("learner.replicas={replicas}"),
            format!("learner.threads={learner_threads}"),
            "learner.algorithm=grpo".into(),
            "learner.lr=1e-6".into(),
            format!("learner.batch_groups={BATCH}"),
            format!("rollout.slots={}", BATCH * GROUP),
            format!("rollout.group_size={GROUP}"),
            format!("rollout.max_new_tokens={ANSWER}"),
            format!("rollout.weights={}", self.rollout_weights),
            "reward.kl_coef=0".into(),
            "reward.reference=false".into(),
        ];
        let offline = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/offline.toml");
        let config = config::load(&offline, &overrides).map_err(|errors| anyhow!("{errors}"))?;
        let options = ReadOptions {
            format: prompt_format(&config),
            limit: PROMPT,
            remedy: String::new(),
            on_long: OnLong::Error,
            on_bad: OnBad::Error,
            split: Split { holdout: 0.0, part: Part::Train },
            needs_references: false,
            model: ModelBounds { context: weights.config().context, vocabulary: weights.config().vocab_size },
        };
        let rows = preceptor::pipeline::setup::rows(&config, &config.data.path, false)?;
        let data = Arc::new(Dataset::read(rows, options, &tokenizer)?);
        let identity = weights.weights().fingerprint()?;
        Ok(Node {
            state: Arc::new(Mutex::new(TrainState::new(&weights, AdamWConfig::default(), None, None)?)),
            cell: Arc::new(SnapshotCell::new(0, identity, weights)),
            observer: Arc::new(Mutex::new(StepTimes(Arc::clone(marks)))),
            ledger: SharedLedger::default(),
            limits: AdjustableLimits::default(),
            reward_model: None,
            fleet: None,
            labelers: Box::new(move |_: &Config, _: &Prepared| Ok(Box::new(MeanId) as Box<dyn Labeler>)),
            prepared: Arc::new(Prepared {
                policy: None,
                identity,
                tokenizer,
                backends: vec![],
                evaluation_backends: Vec::new(),
                budget: None,
                reward_start: None,
                pairs: None,
                data,
                held_out: None,
                origin: "random".into(),
                devices: Devices::one(&Device::Cpu),
            }),
            config,
        })
    }

    /// Returns a tokenizer for the words `w0`, `w1`, …, separated by spaces. None of them ends a completion.
    fn tokenizer(&self, dir: &Path) -> Result<Tokenizer> {
        let vocab: Map<String, Value> = (0..self.shape.vocab_size).map(|i| (format!("w{i}"), json!(i))).collect();
        let model = json!({ "type": "WordLevel", "vocab": vocab, "unk_token": "w0" });
        let description = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null, "model": model,
        });
        std::fs::write(dir.join("tokenizer.json"), description.to_string())?;
        Tokenizer::from_files(&ModelFiles::Directory(dir.to_owned()))
    }
}

/// Measurements of a run.
struct Run {
    began: Mark,
    steps: Vec<Mark>,
    report: GraphReport,
}

impl Run {
    fn busy(&self, role: &str) -> f64 {
        self.report.stages.iter().filter(|stage| stage.role == role).map(|stage| stage.busy_s).sum()
    }
}

/// Labeler whose score is the mean token id. The scores of a group thus differ; a group of equal scores would need no
/// backward pass.
struct MeanId;

impl Labeler for MeanId {
    fn name(&self) -> &'static str {
        "mean-id"
    }

    fn model(&self) -> u64 {
        0
    }

    fn label(&self, group: &Group) -> Result<Labels> {
        let score = |ids: &[u32]| ids.iter().map(|id| f64::from(*id)).sum::<f64>() / ids.len() as f64;
        let scores = group.completions.iter().map(|one| Verdict::Label(score(&one.ids))).collect();
        Ok(Labels { scores, ..Labels::default() })
    }
}

/// Observer that records the end of each step, and checks the lengths and rewards of its groups.
struct StepTimes(Arc<Mutex<Vec<Mark>>>);

impl Observer for StepTimes {
    fn group(&mut self, _done: u64, _of: u64) {}

    fn step(&mut self, done: Done<'_>, _state: &TrainState) -> Result<()> {
        for Rewarded { group, rewards, .. } in done.batch {
            let complete = group.completions.iter().all(|one| one.ids.len() == ANSWER);
            let differ = rewards.iter().any(|reward| *reward != rewards[0]);
            ensure!(
                complete && differ && group.prompt.ids.len() == PROMPT,
                "a group has another size than configured, or equal rewards"
            );
        }
        self.0.lock().map_err(|_| anyhow!("the observer panicked"))?.push(Mark::now()?);
        Ok(())
    }

    fn nonfinite(&mut self, _step: u64, _batch: &[Rewarded]) {}
}

/// Time, and the process's resource usage until then.
struct Mark {
    at: Instant,
    cpu_s: f64,
    minor_faults: u64,
}

impl Mark {
    fn now() -> Result<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        // The second field is the program's name in parentheses; the list begins with the third field of proc(5).
        let (_, fields) = stat.rsplit_once(") ").context("/proc/self/stat has an unknown format")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let field = |number: usize| -> Result<u64> { Ok(fields.get(number - 3).context("a field")?.parse()?) };
        let ticks = field(14)? + field(15)?;
        Ok(Self { at: Instant::now(), cpu_s: ticks as f64 / 100.0, minor_faults: field(10)? })
    }
}

fn peak_rss_kib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in /proc/self/status")?;
    Ok(peak.trim().trim_end_matches(" kB").parse()?)
}

/// Measurements of the repeats.
struct Figures {
    units: usize,
    unit: &'static str,
    wall_s: Vec<f64>,
    cpu_s: Vec<f64>,
    minor_faults: Vec<u64>,
}

impl Figures {
    fn new(units: usize, unit: &'static str) -> Self {
        Self { units, unit, wall_s: vec![], cpu_s: vec![], minor_faults: vec![] }
    }

    fn add(&mut self, from: &Mark, to: &Mark) {
        self.wall_s.push((to.at - from.at).as_secs_f64());
        self.cpu_s.push(to.cpu_s - from.cpu_s);
        self.minor_faults.push(to.minor_faults - from.minor_faults);
    }

    fn done(self) -> Map<String, Value> {
        let Self { units, unit, wall_s, cpu_s, minor_faults } = self;
        let fields: [(&str, Value); 5] = [
            ("units", json!(units)),
            ("unit", json!(unit)),
            ("wall_s", json!(wall_s)),
            ("cpu_s", json!(cpu_s)),
            ("minor_faults", json!(minor_faults)),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Runs `work` twice as a warm-up, and then measures `repeats` repeats, each of which runs it for at least
/// [`MIN_SECONDS`].
fn repeat(
    repeats: u64,
    units: usize,
    unit: &'static str,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Map<String, Value>> {
    work()?;
    let warm = Instant::now();
    work()?;
    let times = (MIN_SECONDS / warm.elapsed().as_secs_f64()).ceil() as usize;
    let mut figures = Figures::new(units * times, unit);
    for _ in 0..repeats {
        let from = Mark::now()?;
        (0..times).try_for_each(|_| work())?;
        figures.add(&from, &Mark::now()?);
    }
    Ok(figures.done())
}
