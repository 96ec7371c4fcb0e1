//! Tests of preference pairs in common formats.

use serde_json::json;

use super::*;

fn read(row: &Value) -> Result<PreferencePair> {
    pair(3, row, "prompt", &mut Notes::default())
}

fn conversation(list: &[(&str, &str)]) -> Value {
    json!(list.iter().map(|(role, text)| json!({ "role": role, "content": text })).collect::<Vec<_>>())
}

/// Checks that the row is a pair of the answers "a" and "b" to `prompt`.
#[track_caller]
fn is_pair(row: &Value, prompt: &str, [first, second]: [&str; 2]) {
    let pair = read(row).unwrap_or_else(|error| panic!("{row}: {error}"));
    let found = (pair.dialogue.text(), pair.first.clone(), pair.second.clone());
    assert_eq!(found, (prompt.to_owned(), first.to_owned(), second.to_owned()), "{row}");
}

#[test]
fn pairs_are_read_in_every_format() {
    let messages = |text: &str| conversation(&[("user", "hi"), ("assistant", text)]);
    let share_gpt = |text: &str| json!([{ "from": "human", "value": "hi" }, { "from": "gpt", "value": text }]);
    for (row, expected) in [
        (json!({ "chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b" }), Some(1.0)),
        (json!({ "chosen": messages("a"), "rejected": messages("b") }), Some(1.0)),
        (json!({ "chosen": share_gpt("a"), "rejected": share_gpt("b") }), Some(1.0)),
        (json!({ "prompt": "hi", "chosen": "a", "rejected": "b" }), Some(1.0)),
        (json!({ "prompt": "hi", "chosen": messages("a"), "rejected": messages("b") }), Some(1.0)),
        (json!({ "prompt": "hi", "first": "a", "second": "b", "preference": 0.25 }), Some(0.25)),
        (json!({ "prompt": "hi", "first": "a", "second": "b", "preference": " 0.25" }), Some(0.25)),
        (json!({ "prompt": "hi", "first": "a", "second": "b" }), None),
        (json!({ "prompt": "hi", "first": messages("a"), "second": messages("b") }), None),
        (
            json!({ "prompt": "hi", "chosen": conversation(&[("assistant", "a")]), "rejected": { "role": "assistant", "content": "b" } }),
            Some(1.0),
        ),
        (
            json!({ "prompt": conversation(&[("user", "hi")]), "chosen": conversation(&[("assistant", "a")]), "rejected": "b" }),
            Some(1.0),
        ),
    ] {
        is_pair(&row, "hi", ["a", "b"]);
        assert_eq!(read(&row).unwrap().preference, expected);
    }
}

#[test]
fn complete_dialogues_as_answers_lose_no_context() {
    let messages = |text: &str| conversation(&[("user", "hi"), ("assistant", text)]);
    let long = |text: &str| {
        conversation(&[("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "hi"), ("assistant", text)])
    };
    let text = |text: &str| format!("\n\nHuman: u1\n\nAssistant: a1\n\nHuman: hi\n\nAssistant: {text}");
    let (context, turns) =
        ("system: s\n\nHuman: u1\n\nAssistant: a1\n\nHuman: hi", "Human: u1\n\nAssistant: a1\n\nHuman: hi");
    for empty in [json!(""), json!(null), json!([])] {
        is_pair(&json!({ "prompt": empty, "chosen": messages("a"), "rejected": messages("b") }), "hi", ["a", "b"]);
    }
    // The prompt column has the last turn, the first one, all of them, or all except the system message.
    for prompt in [
        json!("hi"),
        json!("u1"),
        conversation(&[("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "hi")]),
        conversation(&[("user", "u1"), ("assistant", "a1"), ("user", "hi")]),
    ] {
        is_pair(&json!({ "prompt": prompt, "chosen": long("a"), "rejected": long("b") }), context, ["a", "b"]);
    }
    // The prompt column has more than the dialogues.
    let prompt = conversation(&[("system", "s"), ("user", "hi")]);
    is_pair(
        &json!({ "prompt": prompt, "chosen": messages("a"), "rejected": messages("b") }),
        "system: s\n\nHuman: hi",
        ["a", "b"],
    );
    // Texts in turns with a prompt column, in turns or not.
    for prompt in [json!("\n\nHuman: u1\n\nAssistant: a1\n\nHuman: hi\n\nAssistant:"), json!("hi"), json!("u1")] {
        is_pair(&json!({ "prompt": prompt, "chosen": text("a"), "rejected": text("b") }), turns, ["a", "b"]);
    }
    // Dialogues of different lengths: the turns after the first answer are part of the answer.
    let more = conversation(&[("user", "hi"), ("assistant", "a1"), ("user", "more"), ("assistant", "a2")]);
    is_pair(
        &json!({ "prompt": "hi", "chosen": more, "rejected": messages("b") }),
        "hi",
        ["a1\n\nHuman: more\n\nAssistant: a2", "b"],
    );
}

#[test]
fn a_system_message_is_taken_from_its_column_once() {
    let dialogue = |text: &str| conversation(&[("system", "s"), ("user", "hi"), ("assistant", text)]);
    for name in ["system", "system_prompt"] {
        is_pair(
            &json!({ name: "s", "prompt": "hi", "chosen": "a", "rejected": "b" }),
            "system: s\n\nHuman: hi",
            ["a", "b"],
        );
        is_pair(
            &json!({ name: "s", "chosen": dialogue("a"), "rejected": dialogue("b") }),
            "system: s\n\nHuman: hi",
            ["a", "b"],
        );
        is_pair(&json!({ name: " ", "prompt": "hi", "chosen": "a", "rejected": "b" }), "hi", ["a", "b"]);
    }
    let error =
        read(&json!({ "system": "t", "chosen": dialogue("a"), "rejected": dialogue("b") })).unwrap_err().to_string();
    assert!(error.contains("field \"system\" is another system message"), "{error}");
}

/// Expected values from TRL's `extract_prompt`.
#[test]
fn the_common_prefix_of_two_texts_is_the_prompt() {
    is_pair(
        &json!({ "chosen": "The sky is blue.", "rejected": "The sky is green." }),
        "The sky is",
        [" blue.", " green."],
    );
    is_pair(&json!({ "chosen": "Über: ä", "rejected": "Über: ö" }), "Über:", [" ä", " ö"]);
    is_pair(&json!({ "chosen": "Q\nA: yes", "rejected": "Q\nA: no" }), "Q\nA:", [" yes", " no"]);
    is_pair(&json!({ "chosen": "black", "rejected": "blue" }), "bl", ["ack", "ue"]);
    let error = read(&json!({ "chosen": "yes", "rejected": "no" })).unwrap_err().to_string();
    assert!(error.contains("nothing in common"), "{error}");
}

#[test]
fn the_prompt_may_be_in_the_configured_field() {
    let row = json!({ "question": "hi", "chosen": "a", "rejected": "b" });
    let found = pair(0, &row, "question", &mut Notes::default()).unwrap();
    assert_eq!(found.dialogue, Dialogue::single("hi"));
    // A field of the answers is never used as the prompt.
    let dialogue = |text: &str| conversation(&[("user", "hi"), ("assistant", text)]);
    let row = json!({ "chosen": dialogue("a"), "rejected": dialogue("b") });
    assert_eq!(pair(0, &row, "chosen", &mut Notes::default()).unwrap().dialogue, Dialogue::single("hi"));
}

#[test]
fn a_row_that_is_not_a_pair_is_refused_with_the_reason() {
    let messages = |text: &str| conversation(&[("user", "hi"), ("assistant", text)]);
    for (row, words) in [
        (json!({ "text": "x" }), "is not a preference pair"),
        (json!({ "prompt": "x", "completion": "y", "label": true }), "it rates one answer"),
        (json!({ "instruction": "x", "completions": [] }), "several answers with their scores"),
        (json!({ "chosen": "\n\nHuman: hi\n\nAssistant: a" }), "no field \"rejected\""),
        (
            json!({ "chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: ho\n\nAssistant: b" }),
            "from turn 1 on",
        ),
        (json!({ "chosen": "\n\nHuman: hi", "rejected": "\n\nHuman: hi" }), "do not diverge at an assistant turn"),
        (json!({ "prompt": "hi", "first": "a", "second": "b", "preference": 1.5 }), "not a probability"),
        (json!({ "prompt": "hi", "first": "a", "second": "b", "preference": "nan" }), "not a probability"),
        (json!({ "prompt": "hi", "chosen": 3, "rejected": "b" }), "field \"chosen\" is the number 3"),
        (json!({ "prompt": "hi", "chosen": "a", "rejected": "b", "first": "c", "second": "d" }), "two pairs"),
        (json!({ "question": "hi", "chosen": "a", "rejected": "b" }), "set data.prompt_field = \"question\""),
        (
            json!({ "prompt": "OTHER", "chosen": messages("a"), "rejected": messages("b") }),
            "field \"prompt\" is another prompt",
        ),
        (
            json!({ "prompt": conversation(&[("system", "t"), ("user", "ho")]), "chosen": messages("a"), "rejected": messages("b") }),
            "another prompt",
        ),
        (
            json!({ "prompt": "hi", "chosen": messages("a"), "rejected": "b" }),
            "is a complete dialogue and the other one is not",
        ),
        (
            json!({ "prompt": "hi", "chosen": conversation(&[("assistant", "a1"), ("assistant", "a2")]), "rejected": conversation(&[("assistant", "b")]) }),
            "two turns of the assistant in a row",
        ),
        (
            json!({ "chosen": conversation(&[("user", "hi"), ("assistant", "a"), ("user", "x")]), "rejected": messages("b") }),
            "do not end with the assistant's turn",
        ),
        (
            json!({ "chosen": conversation(&[("system", "s"), ("user", "hi"), ("assistant", "a")]), "rejected": messages("b") }),
            "from turn 1 on",
        ),
        (
            json!({ "prompt": "hi", "chosen": conversation(&[("system", "s"), ("user", "hi"), ("assistant", "a")]), "rejected": messages("b") }),
            "from turn 1 on",
        ),
        (
            json!({ "prompt": messages("x"), "chosen": "a", "rejected": "b" }),
            "field \"prompt\" ends with the assistant's turn",
        ),
        (
            json!({ "chosen": conversation(&[("assistant", "a")]), "rejected": conversation(&[("assistant", "b")]) }),
            "have no prompt",
        ),
        (json!({ "prompt": "hi", "chosen": ["a"], "rejected": ["b"] }), "field \"chosen\" has a text as its message 1"),
    ] {
        let error = format!("{:#}", read(&row).expect_err(&row.to_string()));
        assert!(error.contains(words), "{row}: {error}");
    }
}

#[test]
fn pairs_of_equal_or_empty_answers_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.jsonl");
    let rows = |answers: &[[&str; 2]]| -> String {
        answers.iter().map(|[a, b]| format!("{}\n", json!({ "prompt": "p", "chosen": a, "rejected": b }))).collect()
    };
    let empty = [["a", "a"], ["a", " a\n"], ["a", " "], ["", "b"]];
    std::fs::write(&path, rows(&[&empty[..], &[["a", "b"]]].concat())).unwrap();
    let pairs = Preferences::read(&path, &PairOptions::default()).unwrap();
    assert_eq!((pairs.len(), pairs.get(0).unwrap().row), (1, 4));
    let counted = PairOptions { keep_equal: true, ..PairOptions::default() };
    assert_eq!(Preferences::read(&path, &counted).unwrap().len(), 3);
    std::fs::write(&path, rows(&empty)).unwrap();
    let error = Preferences::read(&path, &PairOptions::default()).err().unwrap().to_string();
    let words =
        ["no pair to read", "2 rows: left out, since both answers are the same", "2 rows: left out, since an answer"];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn an_answer_that_repeats_a_long_prompt_is_noted() {
    let prompt = "Why is the sky blue on a day like this?";
    let mut notes = Notes::default();
    let row = json!({ "prompt": prompt, "chosen": format!("{prompt} a"), "rejected": format!("{prompt} b") });
    pair(0, &row, "prompt", &mut notes).unwrap();
    assert!(notes.lines().next().unwrap().contains("begin with the prompt's own text"));
}

#[test]
fn a_file_is_refused_with_its_bad_rows_or_read_without_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.jsonl");
    std::fs::write(&path, "{\"prompt\": \"p\", \"first\": \"a\", \"second\": \"b\"}\n{\"a\": 1}\n").unwrap();
    let labeled = PairOptions { labeled: true, ..PairOptions::default() };
    let error = Preferences::read(&path, &labeled).err().unwrap().to_string();
    assert!(error.contains("pairs.jsonl:1: no field \"preference\"") && error.contains("pairs.jsonl:2"), "{error}");
    let skip = PairOptions { on_bad: OnBad::Skip, ..PairOptions::default() };
    assert_eq!(Preferences::read(&path, &skip).unwrap().len(), 1);
    // If no row is left, the faulty rows are the error.
    let skip = PairOptions { labeled: true, ..skip };
    assert!(Preferences::read(&path, &skip).err().unwrap().to_string().contains("pairs.jsonl:2"));
}
