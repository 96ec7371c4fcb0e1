//! Preceptor's side of the comparison with PyTorch, transformers, TRL and llama.cpp: one kind of work on random weights,
//! with a warm-up and timed repeats, printed as one line of JSON. `benches/peers/run.py` runs it and its counterparts in
//! turn and writes the page of results:
//!
//! ```text
//! python3 benches/peers/run.py --help
//! ```
//!
//! Alone: `cargo bench --bench peers -- WORK --model tiny|smollm2 [--threads N] [--repeats R] [--length L] [--eta E]
//! [--replicas N] [--learner-threads N] [--checkpointing true|false] [--precision highest|high|medium]
//! [--weights f32|bf16|q8_0]`; `--length` applies to `sample`, `score-long` and `gradient-long`, `--weights` to all work that
//! samples.

#[path = "peers/figures.rs"]
mod figures;
#[path = "peers/length.rs"]
mod length;
#[path = "peers/limits.rs"]
mod limits;
#[path = "common/shapes.rs"]
mod shapes;

use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::Device;
use figures::{Figures, Mark, peak_rss_kib, repeat};
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
use preceptor::pipeline::learn::collective::{Collective, SharedWeights};
use preceptor::pipeline::learn::replicas::{Replicas, Sums};
use preceptor::pipeline::learn::{Done, Observer, TrainState};
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
    let length = || Ok::<_, anyhow::Error>(number("--length", 1024)? as usize);
    let figures = match work.as_str() {
        "products" => limits::products(threads as usize)?,
        "memory" => limits::memory(threads as usize)?,
        "train" => pool.install(|| subject.train(weights, repeats))?,
        "gradients" => pool.install(|| subject.gradients(weights, number("--replicas", threads)? as usize, repeats))?,
        "generate-1" => pool.install(|| subject.generate(&weights, 1, repeats))?,
        "generate-8" => pool.install(|| subject.generate(&weights, 8, repeats))?,
        "generate-32" => pool.install(|| subject.generate(&weights, 32, repeats))?,
        "decode-1" => pool.install(|| length::decode(&*subject.sampled(&weights)?, 1, length()?, repeats))?,
        "decode-8" => pool.install(|| length::decode(&*subject.sampled(&weights)?, 8, length()?, repeats))?,
        "score-long" => pool.install(|| length::score(&weights, length()?, repeats))?,
        "gradient-long" => pool.install(|| length::gradient(weights, length()?, repeats))?,
        "label" => pool.install(|| subject.label(weights, repeats))?,
        // With two threads the rollout and the learner work concurrently, and the learner has two replicas, because it has
        // more work. With one thread they alternate.
        "grpo" => {
            let eta = number("--eta", u64::from(threads > 1))?;
            let learner = Learner {
                replicas: number("--replicas", threads)?,
                threads: number("--learner-threads", 1)?,
                checkpointing: match options.get("--checkpointing").and_then(Value::as_str) {
                    Some("true") => true,
                    None | Some("false") => false,
                    Some(other) => bail!("--checkpointing is true or false, not {other:?}"),
                },
            };
            subject.grpo(weights, eta, learner, repeats)?
        }
        "overlap" => subject.overlap(&weights, repeats)?,
        _ => bail!("there is no work {work:?}; run.py --help lists all works"),
    };
    let mut line = json!({ "peak_rss_kib": peak_rss_kib()? });
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

    /// Measures the gradients of two groups, on `replicas` replicas of one thread each.
    fn gradients(&self, weights: Arc<Decoder>, replicas: usize, repeats: u64) -> Result<Map<String, Value>> {
        let packs = [0, 1].map(|place| {
            let completions: Vec<Vec<u32>> = (0..GROUP).map(|k| self.words(1 + place * GROUP + k, ANSWER)).collect();
            Pack::new(&self.words(place, PROMPT), &completions)
        });
        let (model, params) = weights.trainable(true)?;
        drop(weights);
        let model = Arc::new(model);
        let sums = |_| Arc::new(Mutex::new(vec![Gradients::new(&params)]));
        let sums: Vec<_> = (0..replicas).map(sums).collect();
        let mut learner = Replicas::start(sums.clone(), 1, packs.len())?;
        repeat(repeats, packs.len() * GROUP * ANSWER, "tokens", || {
            for (place, pack) in packs.iter().enumerate() {
                let (model, pack) = (Arc::clone(&model), pack.clone());
                let job = move |sums: &mut Sums| {
                    let (logprobs, _) = model.logprobs(&pack, 1.0)?;
                    Ok(backward(&logprobs.sum_all()?, &mut [&mut sums[0]])?)
                };
                learner.submit(place % replicas, Box::new(job));
            }
            while let Some(result) = learner.take() {
                result?;
            }
            SharedWeights.reduce(&sums)?;
            Ok(sums[0].lock().map_err(|_| anyhow!("a replica panicked"))?[0].zero()?)
        })
    }

    /// Returns the model with its weights in the number format of sampling.
    fn sampled(&self, weights: &Arc<Decoder>) -> Result<Arc<Decoder>> {
        match self.rollout_weights.as_str() {
            "f32" => Ok(Arc::clone(weights)),
            "bf16" => Ok(Arc::new(weights.quantized(Format::Bf16)?)),
            "q8_0" => Ok(Arc::new(weights.quantized(Format::Q8)?)),
            other => bail!("{other:?} is none of f32, bf16, q8_0"),
        }
    }

    /// Measures the sampling of `width` completions, eight per prompt.
    fn generate(&self, weights: &Arc<Decoder>, width: usize, repeats: u64) -> Result<Map<String, Value>> {
        let weights = &self.sampled(weights)?;
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
        let judge = Arc::new(Judge { model: weights, tokenizer: Tokenizer::bytes(), identity: 0, chat: false });
        let labeler = Likelihood { judge, length_normalise: false, unconditional_weight: 1.0, temperature: 1.0 };
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
    fn grpo(&self, mut weights: Arc<Decoder>, eta: u64, learner: Learner, repeats: u64) -> Result<Map<String, Value>> {
        Arc::get_mut(&mut weights)
            .context("the weights have several owners")?
            .checkpoint_activations(learner.checkpointing);
        // η more steps follow, so that each timed step includes the generation of one batch.
        let run = self.run(weights, eta, learner, 1 + repeats + eta)?;
        let mut figures = Figures::new(BATCH * GROUP, "samples");
        run.steps.windows(2).take(repeats as usize).for_each(|pair| figures.add(&pair[0], &pair[1]));
        Ok(figures.done())
    }

    /// Measures complete runs of `steps` with one thread each for rollout and learner: at η = 1, where they work
    /// concurrently, and at η = 0, where each waits for the other, so that its busy time is the time of its work alone.
    fn overlap(&self, weights: &Arc<Decoder>, steps: u64) -> Result<Map<String, Value>> {
        let learner = Learner { replicas: 1, threads: 1, checkpointing: false };
        let run = |eta, steps| self.run(Arc::clone(weights), eta, learner, steps);
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

    /// Runs the real node until it has taken all steps.
    fn run(&self, weights: Arc<Decoder>, eta: u64, learner: Learner, steps: u64) -> Result<Run> {
        let dir = tempfile::tempdir()?;
        let marks = Arc::new(Mutex::new(Vec::new()));
        let node = self.node(weights, dir.path(), [eta, steps], learner, &marks)?;
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
        [eta, steps]: [u64; 2],
        learner: Learner,
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
            format!("learner.replicas={}", learner.replicas),
            format!("learner.threads={}", learner.threads),
            format!("learner.activation_checkpointing={}", learner.checkpointing),
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
        let state = TrainState::new(&weights, AdamWConfig::default(), None, None)?;
        Ok(Node {
            cell: Arc::new(SnapshotCell::new(0, identity, Arc::clone(state.published()))),
            state: Arc::new(Mutex::new(state)),
            observer: Arc::new(Mutex::new(StepTimes(Arc::clone(marks)))),
            ledger: SharedLedger::default(),
            limits: AdjustableLimits::default(),
            reward_model: None,
            fleet: None,
            coordinator: std::sync::OnceLock::new(),
            labelers: Box::new(move |_: &Config, _: &Prepared| Ok(Box::new(MeanId) as Box<dyn Labeler>)),
            prepared: Arc::new(Prepared {
                policy: None,
                identity,
                tokenizer,
                backends: vec![],
                evaluation_backends: Vec::new(),
                worker_judges: None,
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

/// Settings of the learner.
#[derive(Clone, Copy)]
struct Learner {
    replicas: u64,
    /// Threads of each replica.
    threads: u64,
    /// Whether the backward pass recomputes the activations.
    checkpointing: bool,
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
