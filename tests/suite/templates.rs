//! Tests of public chat templates against `transformers`.

use preceptor::lm::source::ModelFiles;
use preceptor::lm::tokens::Tokenizer;
use preceptor::lm::tokens::chat::{Message, Variables};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::common::fixture;

/// Reads the templates, which are not part of this project, from the folder that `PRECEPTOR_TEMPLATES` names.
#[test]
#[ignore = "needs public templates in the folder PRECEPTOR_TEMPLATES; tests/fixtures/templates/make.py collects them"]
fn public_chat_templates_render_as_in_transformers() {
    let folder = std::env::var_os("PRECEPTOR_TEMPLATES").expect("PRECEPTOR_TEMPLATES is not set");
    let text = std::fs::read_to_string(fixture("templates/expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    Tokenizer::bytes().save(dir.path()).unwrap();
    let config = dir.path().join("tokenizer_config.json");
    let mut named: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    named["bos_token"] = "<|im_start|>".into();
    std::fs::write(&config, named.to_string()).unwrap();
    let tokenizer = Tokenizer::from_files(&ModelFiles::Directory(dir.path().to_owned())).unwrap();
    // 29 November 2026, as in the script.
    let tokenizer = tokenizer.with_variables(Variables::new(&toml::Table::new(), Some(1_795_910_400)));
    let digest = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut differing = Vec::new();
    for template in expected["templates"].as_array().unwrap() {
        let name = template["name"].as_str().unwrap();
        let path = std::path::Path::new(&folder).join(format!("{name}.jinja"));
        let source = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(digest(source.as_bytes()), template["sha256"], "{name} is another template");
        let tokenizer =
            tokenizer.clone().with_chat_template(source).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        for (i, dialogue) in expected["dialogues"].as_array().unwrap().iter().enumerate() {
            let turn = |turn: &Value| Message {
                role: turn[0].as_str().unwrap().to_owned(),
                content: turn[1].as_str().unwrap().to_owned(),
            };
            let messages: Vec<Message> = dialogue.as_array().unwrap().iter().map(turn).collect();
            let answer = messages.last().is_some_and(|last| last.role == "user");
            let ours = tokenizer.render_chat(&messages, answer);
            let hash = ours.as_ref().ok().map(|text| digest(text.as_bytes()));
            if hash.as_deref() != template["texts"][i].as_str() {
                differing.push(format!("{name}, conversation {i}: {ours:?}"));
            }
        }
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}
