//! Tests of common data formats: how the program reads them, and which it refuses.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::{byte_policy, preceptor, stderr, train};

/// Trains one step in `dir` on the rows in `name`, with `overrides`.
fn train_on(dir: &Path, name: &str, rows: impl AsRef<[u8]>, overrides: &[&str]) -> std::process::Output {
    std::fs::write(dir.join(name), rows).unwrap();
    std::fs::remove_dir_all(dir.join("run")).ok();
    let data = format!("data.path={}", dir.join(name).display());
    let few = [
        "run.steps=1",
        "learner.batch_groups=1",
        "learner.minibatches=1",
        "data.holdout=0",
        "data.instruction={{ prompt }}",
    ];
    train(dir, &[&[&*data][..], &few, overrides].concat())
}

/// Returns the prompts of the run in `dir` from samples.jsonl.
fn prompts(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("run/samples.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.map(|row| row["prompt"].as_str().unwrap().to_owned()).collect()
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

#[track_caller]
fn said(output: &std::process::Output, words: &[&str]) {
    let text = stderr(output);
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in: {text}");
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn the_answer_of_a_conversation_is_not_part_of_its_prompt() {
    let list = |messages: Value| lines(&[json!({ "messages": messages })]);
    let user = json!({ "role": "user", "content": "u" });
    let gold = json!({ "role": "assistant", "content": "gold answer" });
    for (rows, prompt) in [
        (list(json!([{ "role": "system", "content": "s" }, user, gold])), "system: s\n\nHuman: u"),
        (list(json!("\n\nHuman: u\n\nAssistant: gold answer")), "u"),
        (list(json!([{ "from": "human", "value": "u" }, { "from": "gpt", "value": "gold answer" }])), "u"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let output = train_on(dir.path(), "a.jsonl", rows, &["data.prompt_field=messages"]);
        assert!(output.status.success(), "{}", stderr(&output));
        said(
            &output,
            &["a.jsonl: 1 row: the conversation ends with the assistant's turn, which is used as the reference answer"],
        );
        assert!(prompts(dir.path()).iter().all(|found| found == prompt), "{:?}", prompts(dir.path()));
    }
}

#[test]
fn fine_tuning_trains_on_the_last_answer_of_a_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let rows = lines(&[
        json!({ "messages": [{ "role": "user", "content": "u" }, { "role": "assistant", "content": "gold" }] }),
    ]);
    let output = train_on(dir.path(), "a.jsonl", rows, &["data.prompt_field=messages", "sft.steps=1", "sft.batch=1"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn bad_rows_are_listed_or_skipped_and_counted() {
    let bad = (0..12).map(|i| json!({ "prompt": [{ "role": "narrator", "content": format!("{i}") }] }));
    let rows: Vec<Value> = std::iter::once(json!({ "prompt": "good" })).chain(bad).collect();
    let dir = tempfile::tempdir().unwrap();
    let output = train_on(dir.path(), "a.jsonl", lines(&rows), &[]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    said(&output, &["a.jsonl:2: ", "\"narrator\"", "a.jsonl:11: ", "and 2 more", "data.on_bad = \"skip\""]);
    assert!(!stderr(&output).contains("a.jsonl:12"));
    let output = train_on(dir.path(), "a.jsonl", lines(&rows), &["data.on_bad=skip"]);
    assert!(output.status.success(), "{}", stderr(&output));
    said(&output, &["12 rows are left out", "a.jsonl:2: ", "and 2 more"]);
    assert!(prompts(dir.path()).iter().all(|prompt| prompt == "good"));
    // If no row is left, the faulty rows are the error.
    let output = train_on(dir.path(), "b.jsonl", lines(&rows[1..]), &["data.on_bad=skip"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    said(&output, &["b.jsonl:1: "]);
}

/// Skipping bad rows does not skip rows that `data.on_long` refuses.
#[test]
fn a_prompt_that_is_too_long_is_not_a_bad_row() {
    let dir = tempfile::tempdir().unwrap();
    let rows = lines(&[json!({ "prompt": "good" }), json!({ "prompt": 7 }), json!({ "prompt": "long ".repeat(200) })]);
    let output = train_on(dir.path(), "a.jsonl", &rows, &["data.on_bad=skip"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    said(&output, &["a.jsonl:3: the prompt has", "data.on_long = \"skip\""]);
    let output = train_on(dir.path(), "a.jsonl", &rows, &["data.on_bad=skip", "data.on_long=skip"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = train_on(dir.path(), "a.jsonl", &rows, &[]);
    said(&output, &["a.jsonl:2: field \"prompt\" is the number 7", "a.jsonl:3: the prompt has"]);
}

#[test]
fn missing_or_empty_fields_are_reported_with_the_key_to_set() {
    for (row, words) in [
        (
            json!({ "question": "q", "answer": "a" }),
            &["no field \"prompt\"", "set data.prompt_field = \"question\""][..],
        ),
        (json!({ "conversations": [{ "from": "human", "value": "hi" }] }), &["data.prompt_field = \"conversations\""]),
        (json!({ "id": 1 }), &["the row has id", "set data.prompt_field"]),
        (json!({ "prompt": "" }), &["is empty"]),
        (json!({ "prompt": null }), &["field \"prompt\" is null"]),
        (json!({ "prompt": 7 }), &["field \"prompt\" is the number 7"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let output = train_on(dir.path(), "a.jsonl", lines(&[row]), &[]);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        said(&output, words);
    }
    let dir = tempfile::tempdir().unwrap();
    said(&train_on(dir.path(), "a.jsonl", "", &[]), &["a.jsonl is empty"]);
}

#[test]
fn a_system_message_of_the_data_is_used_once() {
    let dir = tempfile::tempdir().unwrap();
    let rows = lines(&[json!({ "system": "own", "prompt": "u" })]);
    let output = train_on(dir.path(), "a.jsonl", rows, &["data.system=common"]);
    assert!(output.status.success(), "{}", stderr(&output));
    said(&output, &["1 row: the row's own system message is used, and data.system is not"]);
    assert_eq!(prompts(dir.path())[0], "system: own\n\nHuman: u");
    let output = train_on(dir.path(), "a.jsonl", "{\"prompt\": \"u\"}\n", &["data.system=common", "data.chat=false"]);
    assert_eq!(output.status.code(), Some(2));
    said(&output, &["data.system", "data.chat = false"]);
}

/// The byte tokenizer puts no token before a document, so that an empty prompt has no tokens.
#[test]
fn likelihoods_are_compared_with_the_token_that_begins_or_ends_a_document() {
    let dir = tempfile::tempdir().unwrap();
    let output =
        train_on(dir.path(), "a.jsonl", "{\"prompt\": \"hi\"}\n", &["data.chat=false", "labeler.type=likelihood"]);
    assert!(output.status.success(), "{}", stderr(&output));
    said(&output, &[]);
}

#[test]
fn references_without_tokens_are_refused_and_truncated_ones_are_reported() {
    let rows = |reference: &str| lines(&[json!({ "prompt": "a", "reference": reference })]);
    let fine_tuned = ["sft.steps=1", "sft.batch=1"];
    for empty in ["", " \n"] {
        let dir = tempfile::tempdir().unwrap();
        let output = train_on(dir.path(), "a.jsonl", rows(empty), &fine_tuned);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        said(&output, &["a.jsonl:1", "field \"reference\" is an empty text", "must have words"]);
    }
    let dir = tempfile::tempdir().unwrap();
    let output = train_on(dir.path(), "a.jsonl", rows(&"long ".repeat(400)), &fine_tuned);
    assert!(output.status.success(), "{}", stderr(&output));
    said(&output, &["1 row: the reference answer exceeds the model's context"]);
}

/// A tokenizer with one token more than the embedding has rows.
#[test]
fn tokens_without_a_row_in_the_embedding_are_reported_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let output = train_on(dir.path(), "ok.jsonl", "{\"prompt\": \"hi\"}\n", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let model = dir.path().join("model");
    std::fs::rename(dir.path().join("run/checkpoints/step-000001"), &model).unwrap();
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut added = tokenizer["added_tokens"][0].clone();
    added["id"] = json!(259);
    added["content"] = json!("[PAD]");
    // Special tokens in a reference are plain text, and need no row.
    added["special"] = json!(false);
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let named = format!("policy.model=\"{}\"", model.display());
    let refused = |rows: &[Value], overrides: &[&str], words: &[&str]| {
        let output = train_on(dir.path(), "late.jsonl", lines(rows), &[&[&*named][..], overrides].concat());
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        said(&output, words);
    };
    let words = ["late.jsonl:2", "the token \"[PAD]\" (id 259) has no row in the model's embedding, which has 259"];
    refused(&[json!({ "prompt": "hi" }), json!({ "prompt": "a [PAD] b" })], &["data.chat=false"], &words);
    let references = [json!({ "prompt": "hi", "reference": "x" }), json!({ "prompt": "b", "reference": "a [PAD] b" })];
    refused(&references, &["sft.steps=1"], &words);
}

#[test]
fn files_of_several_formats_form_one_data_set() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("rows")).unwrap();
    std::fs::write(dir.path().join("rows/a.jsonl"), "\u{feff}{\"prompt\": \"from a\"}\r\n").unwrap();
    std::fs::write(dir.path().join("rows/b.csv"), "id,prompt\n1,\"from\nb\"\n").unwrap();
    std::fs::write(dir.path().join("rows/c.json"), "[{\"prompt\": \"from c\"}]").unwrap();
    let folder = dir.path().join("rows");
    let few = ["run.steps=3", "learner.batch_groups=1", "data.holdout=0", "data.instruction={{ prompt }}"];
    let list = format!("[\"{0}/a.jsonl\", \"{0}/b.csv\", \"{0}/c.json\"]", folder.display());
    for path in [folder.display().to_string(), format!("{}/*", folder.display()), list] {
        std::fs::remove_dir_all(dir.path().join("run")).ok();
        let data = format!("data.path={path}");
        let output = train(dir.path(), &[&[&*data][..], &few].concat());
        assert!(output.status.success(), "{path}: {}", stderr(&output));
        let mut found = prompts(dir.path());
        found.sort();
        found.dedup();
        assert_eq!(found, ["from\nb", "from a", "from c"], "{path}");
    }
    let output = train(dir.path(), &["data.path=none/*.csv"]);
    assert_eq!(output.status.code(), Some(2));
    said(&output, &["data.path", "no file matches"]);
}

/// `generate --like` and `label` use the format of the prompts, not the file.
#[test]
fn commands_that_do_not_read_the_prompts_accept_a_configuration_without_them() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = byte_policy(dir.path(), 1);
    let text = format!(
        "[run]\nname = \"x\"\nsteps = 1\n[data]\npath = \"none.jsonl\"\nchat = false\n[policy]\nmodel = \"{}\"\n[reward_model]\npairs = \"labels.jsonl\"\n",
        model.display()
    );
    std::fs::write(dir.path().join("x.toml"), text).unwrap();
    std::fs::write(dir.path().join("pairs.jsonl"), lines(&[json!({ "prompt": "a", "first": "b", "second": "c" })]))
        .unwrap();
    let ran = |arguments: &[&str]| preceptor(dir.path()).args(arguments).output().unwrap();
    let model = model.display().to_string();
    for arguments in [
        &["generate", &model, "hi", "--like", "x.toml", "--max-new-tokens", "2"][..],
        &["label", "x.toml", "--input", "pairs.jsonl", "--output", "labels.jsonl"],
    ] {
        let output = ran(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    }
    std::fs::remove_file(dir.path().join("labels.jsonl")).unwrap();
    let output = ran(&["train", "x.toml"]);
    assert_eq!(output.status.code(), Some(2));
    said(&output, &["data.path: there is no file", "reward_model.pairs: there is no file"]);
}

/// Byte order marks and carriage returns are not passed to models or judges, as in Jinja and in Python's text files.
#[test]
fn a_chat_template_is_read_without_its_byte_order_mark_and_carriage_returns() {
    let dir = tempfile::tempdir().unwrap();
    let output = train_on(dir.path(), "ok.jsonl", "{\"prompt\": \"hi\"}\n", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let model = dir.path().join("run/checkpoints/step-000001");
    let ids = |template: &str| {
        std::fs::write(model.join("chat_template.jinja"), template).unwrap();
        let output =
            preceptor(dir.path()).args(["score", model.to_str().unwrap(), "hi", "--chat", "--json"]).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let plain = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}";
    let expected = ids(plain);
    assert_eq!(ids(&format!("\u{feff}{plain}")), expected);
    assert_eq!(ids(&plain.replace('\n', "\r\n")), expected);
}
