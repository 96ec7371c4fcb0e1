//! Tests of template sets.

use super::*;

#[test]
fn every_built_in_set_is_complete_and_balanced() {
    for (name, _) in BUILT_IN {
        let set = TemplateSet::find(name).unwrap();
        assert_eq!((set.task.as_str(), set.inverted), (*name, *name == "harmless"));
        let firsts = set.exemplars.iter().filter(|exemplar| exemplar.answer == 1).count();
        assert_eq!((set.exemplars.len(), firsts), (4, 2), "{name}: the exemplars must have as many answers 1 as 2");
        assert!(set.rating().unwrap().ask("text", "answer").unwrap().ends_with("SCORE:"));
    }
}

#[test]
fn a_comparison_follows_the_layout_of_its_set() {
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
fn every_setting_of_a_comparison_changes_its_hash() {
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
fn an_invalid_set_is_refused_with_the_line_and_the_reason() {
    let text = BUILT_IN[0].1;
    for (from, to, key, words) in [
        (
            "inverted = false",
            "inverted = \"no\"",
            "inverted",
            "inverted is of the type string, and must be true or false",
        ),
        ("ending = ", "endings = ", "endings", "pairwise.endings is not a key of a template set; did you mean ending?"),
        ("answer = 2", "answer = 3", "answer = 3", "exemplar 2 answers 3"),
        ("{{ second }}", "two", "sample", "does not mention {{ second }}"),
        ("{{ prompt }}", "{{ text }}", "sample", "cannot be filled in"),
        ("[marks]", "[marks", "[marks", "is not TOML"),
    ] {
        let changed = text.replace(from, to);
        let error = format!("{:#}", TemplateSet::parse(&changed).unwrap_err());
        let line = 1 + changed.lines().take_while(|line| !line.starts_with(key)).count();
        assert!(error.contains(words) && error.contains(&format!("line {line}: ")), "{to}, {line}: {error}");
    }
    let set = TemplateSet::find("helpful").unwrap();
    assert!(set.comparison(&Preamble::Base, 5, false).unwrap_err().to_string().contains("labeler.shots = 5"));
    assert!(TemplateSet::find("no/such.toml").unwrap_err().to_string().contains("summarization, helpful, harmless"));
}

#[test]
fn all_mistakes_of_a_file_are_reported_together_with_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own.toml");
    let text = "task = 3\ncolour = \"red\"\n[pairwise]\nsample = \"{{ first }} {{ other }}\"\n[[exemplars]]\nprompt = \"p\"\nfirst = \"f\"\nsecond = \"s\"\nanswer = 7\n";
    std::fs::write(&path, text).unwrap();
    let question = Question::Comparison { preamble: Preamble::Detailed, shots: 1, cot: true };
    let error = format!("{:#}", TemplateSet::find_for(path.to_str().unwrap(), &question).unwrap_err());
    for part in [
        "own.toml has: mistakes:",
        "\n  inverted is missing",
        "\n  preambles.detailed is missing; labeler.preamble = \"detailed\" needs it",
        "\n  [marks] is missing",
        "\n  pairwise.rationale is missing; labeler.cot = true needs it",
        "\n  exemplar 1 has no rationale",
        "\n  line 1: task is of the type integer, and must be a text",
        "\n  line 2: colour is not a key of a template set; known are task",
        "\n  line 3: pairwise.ending is missing",
        "\n  line 4: pairwise.sample does not mention {{ second }}",
        "\n  line 4: pairwise.sample: a labeler's template cannot be filled in",
        "\n  line 9: exemplar 1 answers 7, not 1 or 2",
    ] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    assert_eq!(error.lines().count(), 12, "{error}");
}

#[test]
fn a_set_with_the_sections_of_one_labeler_works_for_that_labeler() {
    let rating = TemplateSet::parse("[direct]\ntemplate = \"Rate {{ completion }}:\"").unwrap();
    assert_eq!(rating.rating().unwrap().ask("p", "c").unwrap(), "Rate c:");
    let error = rating.comparison(&Preamble::Base, 0, false).unwrap_err().to_string();
    assert!(error.contains("[pairwise] is missing") && error.contains("preambles.base is missing"), "{error}");
    let text = "inverted = true\n[pairwise]\nsample = \"A {{ first }}\\nB {{ second }}\"\nending = \"Worse=\"";
    let comparing = TemplateSet::parse(text).unwrap();
    let comparison = comparing.comparison(&Preamble::Own("Judge.".into()), 0, false).unwrap();
    assert_eq!(comparison.ask("p", "a", "b", None).unwrap(), "Judge.\n\nA a\nB b\n\nWorse=");
    assert!(comparing.rating().unwrap_err().to_string().contains("[direct] is missing"));
    for (text, words) in [
        ("task = \"x\"", "[pairwise] and [direct] are missing"),
        (
            "[direct]\ntemplate = \"{{ completion }}\"\n[marks]\nopen = \"\"\nclose = \"\"\nfollow = \"\"",
            "marks belongs to comparisons",
        ),
    ] {
        let error = TemplateSet::parse(text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Ordinary texts give the same prompts as versions of the program without guards: the template with the texts filled
/// in.
#[test]
fn ordinary_texts_leave_the_prompt_unchanged() {
    let texts = [
        "A short summary.",
        "In summary - it rained.\n\n- first point: rain\n- second: sun\n\n1. Preferred by all\n2. x < y | z > w",
        "Human: thanks\n\nAssistant: Rating: 10 <p>HTML</p> [1] `a <| b`",
        "naïve façade — \u{1f389}\r\n\ttext",
    ];
    for (name, _) in BUILT_IN {
        let set = TemplateSet::find(name).unwrap();
        let (pairwise, direct) = (set.pairwise.as_ref().unwrap(), set.direct.as_ref().unwrap());
        let comparison = set.comparison(&Preamble::Base, 0, false).unwrap();
        for (first, second) in texts.iter().zip(texts.iter().rev()) {
            let asked = comparison.ask("Summary 1 - prompts may hold it", first, second, None).unwrap();
            let plain = pairwise.fill(["Summary 1 - prompts may hold it", first, second]).unwrap();
            assert_eq!(asked, format!("{}\n\n{plain}\n\n{}", set.base.as_ref().unwrap(), pairwise.ending));
            assert_eq!(set.rating().unwrap().ask("text", first).unwrap(), direct.fill("text", first).unwrap());
        }
    }
}
