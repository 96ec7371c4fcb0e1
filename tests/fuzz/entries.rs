//! Entry points of the fuzz targets, one for each kind of input. Included by the targets and by the test that replays their
//! corpora. For any input a function must return soon and with little memory. A refused input is not a finding; a panic
//! is.
#![allow(dead_code, reason = "each target uses one of these")]

use std::path::{Path, PathBuf};

use candle_core::Device;
use preceptor::config;
use preceptor::lm::model::bert::BertConfig;
use preceptor::lm::model::config::Head;
use preceptor::lm::model::{Decoder, ModelConfig, Weights};
use preceptor::lm::source::ModelFiles;
use preceptor::lm::tokens::Tokenizer;
use preceptor::lm::tokens::chat::Message;
use preceptor::pipeline::data::{
    Dataset, Dialogue, ModelBounds, Notes, OnBad, OnLong, PairOptions, Preferences, PromptFormat, ReadOptions, Rows,
    Split,
};
use preceptor::pipeline::label::templates::TemplateSet;
use preceptor::pipeline::remote::answer;
use preceptor::pipeline::remote::reading::{Listed, split_prefixes, votes};
use preceptor::pipeline::remote::wire::Request;

/// Entry point of a target. Returns whether the input was accepted.
pub type Entry = fn(&[u8]) -> bool;

/// All targets, by the names of their corpora.
pub const ALL: [(&str, Entry); 8] = [
    ("config", config),
    ("rows", rows),
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("model_config", model_config),
    ("tokenizer", tokenizer),
    ("template", template),
    ("judge", judge),
];

/// Reads a run's configuration, with an override after each NUL. Checks that a valid one is equal after it was written and
/// read again.
pub fn config(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.split('\0');
    let (toml, overrides) = (parts.next().unwrap_or_default(), parts.map(str::to_owned).collect::<Vec<_>>());
    // The seeds name the Cargo.toml of this folder as their data.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let _ = TemplateSet::parse(toml);
    match config::parse(toml, "fuzz.toml", folder, &overrides) {
        Ok(config) => {
            let written = config.to_toml();
            let again = config::parse(&written, "fuzz.toml", folder, &[]);
            assert_eq!(again.as_ref(), Ok(&config), "{written}");
            true
        }
        Err(errors) => {
            assert!(errors.to_string().len() < 100_000, "the error text is too long");
            false
        }
    }
}

/// Reads a data set in JSON lines, which may be gzipped, as prompts and as pairs.
pub fn rows(data: &[u8]) -> bool {
    let gzipped = data.starts_with(&[0x1f, 0x8b]);
    let file = Scratch::new(&[(if gzipped { "rows.jsonl.gz" } else { "rows.jsonl" }, data)]);
    let path = file.only();
    let mut used = false;
    if let Ok(rows) = Rows::open(&path) {
        for i in 0..rows.len() {
            let Ok(Some(row)) = rows.get(i) else { continue };
            let dialogue = |field: &str| Dialogue::read(&row[field], &mut Notes::default());
            if let (Ok(chosen), Ok(rejected)) = (dialogue("chosen"), dialogue("rejected")) {
                let _ = chosen.split_common(rejected);
            }
            let _ = Dialogue::from_json(&row["prompt"]).map(|dialogue| dialogue.text());
        }
    }
    for labeled in [true, false] {
        let split = Split { holdout: 0.5, ..Split::default() };
        let on_bad = if labeled { OnBad::Error } else { OnBad::Skip };
        let options = PairOptions { split, labeled, on_bad, ..PairOptions::default() };
        let Ok(pairs) = Preferences::read(&path, &options) else { continue };
        for i in 0..pairs.len() {
            let pair = pairs.get(i).expect("a pair that was read is read again");
            assert!(pair.preference.is_none_or(|p| (0.0..=1.0).contains(&p)));
            assert_ne!(pair.first.trim(), pair.second.trim());
            used = true;
        }
    }
    let format = PromptFormat {
        special_tokens: true,
        field: "prompt".into(),
        reference_field: "reference".into(),
        instruction: "{{ prompt }}".into(),
        chat: data.len().is_multiple_of(2),
        system: None,
    };
    let options = ReadOptions {
        format,
        limit: 64,
        remedy: String::new(),
        on_long: OnLong::Skip,
        on_bad: OnBad::Skip,
        split: Split::default(),
        needs_references: false,
        model: ModelBounds { context: 128, vocabulary: 259 },
    };
    let read = |rows| Dataset::read(rows, options, &BYTES.with(Tokenizer::clone));
    if let Ok(data) = Rows::open(&path).and_then(read) {
        let order = data.order(0);
        for seq in 0..data.len() {
            assert!(data.prompt(seq as u64, &order).expect("a prompt that was read is read again").ids.len() <= 64);
            used = true;
        }
    }
    used
}

/// Reads a GGUF file: header, tensors, tokenizer.
pub fn gguf(data: &[u8]) -> bool {
    let file = Scratch::new(&[("model.gguf", data)]);
    let path = file.only();
    let mut used = false;
    if let Ok((config, weights)) = Weights::from_gguf(&path, &Device::Cpu) {
        used = Decoder::new(&config, &weights).is_ok();
        let _ = config.parameters();
        let _ = config.to_json(Head::Language);
    }
    if let Ok(tokenizer) = Tokenizer::from_files(&ModelFiles::Gguf(path)) {
        exercise(&tokenizer);
        used = true;
    }
    used
}

/// Reads a `model.safetensors`.
pub fn safetensors(data: &[u8]) -> bool {
    let dir = Scratch::new(&[("model.safetensors", data)]);
    let Ok(weights) = Weights::read_directory(&dir.path, &Device::Cpu) else { return false };
    let _ = weights.parameters();
    weights.fingerprint().is_ok()
}

/// Reads a model's `config.json`, and the same bytes as the index of a model in several parts.
pub fn model_config(data: &[u8]) -> bool {
    let dir = Scratch::new(&[("config.json", data), ("model.safetensors.index.json", data)]);
    let mut used = BertConfig::from_directory(&dir.path).is_ok();
    for head in [Head::Language, Head::Scalar] {
        if let Ok(config) = ModelConfig::from_directory_as(&dir.path, head) {
            let _ = config.parameters();
            let _ = config.to_json(head);
            let _ = Decoder::new(&config, &Weights::default());
            used = true;
        }
    }
    let _ = Weights::read_directory(&dir.path, &Device::Cpu);
    used
}

/// Reads a `tokenizer.json`, and after a NUL a `tokenizer_config.json`.
pub fn tokenizer(data: &[u8]) -> bool {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let mut files = vec![("tokenizer.json", parts.next().unwrap_or_default())];
    files.extend(parts.next().map(|config| ("tokenizer_config.json", config)));
    let dir = Scratch::new(&files);
    let Ok(tokenizer) = Tokenizer::from_files(&ModelFiles::Directory(dir.path.clone())) else { return false };
    exercise(&tokenizer);
    true
}

/// Renders a chat template, with a message of the conversation after each NUL.
pub fn template(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.split('\0');
    let source = parts.next().unwrap_or_default().to_owned();
    let Ok(tokenizer) = BYTES.with(Tokenizer::clone).with_chat_template(source) else { return false };
    let mut messages: Vec<Message> = parts
        .enumerate()
        .map(|(i, content)| Message {
            role: ["system", "user", "assistant"][if i == 0 { 0 } else { 2 - i % 2 }].into(),
            content: content.into(),
        })
        .collect();
    if messages.is_empty() {
        messages.push(Message { role: "user".into(), content: "Hi <b>".into() });
    }
    [false, true].map(|answer| tokenizer.render_chat(&messages, answer).is_ok()) == [true, true]
}

/// Reads the body of a judge server's response.
pub fn judge(data: &[u8]) -> bool {
    let answers = ["1", "2", "10"].map(str::to_owned);
    let mut used = false;
    for top_logprobs in [5, 0] {
        let request = Request::first_token("which?", None, top_logprobs);
        let Ok(answer) = answer::read(data, &request) else { continue };
        used = true;
        let (sum, overflowed) = answer.prompt_tokens.overflowing_add(answer.completion_tokens);
        assert!(!overflowed && sum < 1 << 40, "no server reads or writes {sum} tokens");
        let _ = votes(&[answer.text], &answers);
        let Some(tokens) = answer.first_token else { continue };
        let mut listed = Listed(tokens.clone());
        if let Some((space, p)) = listed.space_before(&answers).map(|(space, p)| (space.to_owned(), p)) {
            listed.add_after_space(&space, p, Listed(tokens));
        }
        let Ok(weights) = listed.weights(&answers) else { continue };
        assert!(weights.iter().all(|weight| (0.0..=1.1).contains(weight)), "{weights:?}");
        for (shorter, longer) in split_prefixes(&answers) {
            let rest = &answers[longer][listed.spelling(&answers[shorter]).trim_start().len()..];
            assert!((0.0..=1.1).contains(&listed.exactly(rest)));
        }
    }
    used
}

/// Encodes and decodes texts with a tokenizer, renders a conversation, and saves the tokenizer.
fn exercise(tokenizer: &Tokenizer) {
    for text in ["", "Hello, world 123", " <s>naïve\u{301} — 漢字 🎉\n\t</s>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"]
    {
        let Ok(ids) = tokenizer.encode_document(text) else { continue };
        let _ = tokenizer.decode(&ids);
    }
    let some: Vec<u32> = (0..40).chain([u32::MAX]).collect();
    let _ = tokenizer.decode(&some);
    let messages = [Message { role: "user".into(), content: "Hi".into() }];
    let _ = tokenizer.render_chat(&messages, true);
    let dir = Scratch::new(&[]);
    let _ = tokenizer.save(&dir.path);
}

thread_local! {
    static BYTES: Tokenizer = Tokenizer::bytes();
}

/// Temporary folder with files, in memory if the system has `/dev/shm`. It is removed on drop.
struct Scratch {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Scratch {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let dir = tempfile::tempdir_in(parent).expect("a folder can be created");
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).expect("a file can be written");
        }
        Self { path: dir.path().to_owned(), _dir: dir }
    }

    /// Returns the path of the only file of this folder.
    fn only(&self) -> PathBuf {
        let entry = std::fs::read_dir(&self.path).expect("the folder exists").next();
        entry.expect("it has a file").expect("it can be listed").path()
    }
}
