//! Suggestions for misspelt names.

/// Maximum length of a word in bytes; longer words get no suggestion.
const LONGEST: usize = 64;

/// Returns the name that is most similar to `word`, or `None` if none is similar.
pub fn nearest<'a>(word: &str, names: &[&'a str]) -> Option<&'a str> {
    // The distance is relative to the length of the longer word, so that "sha" suggests "sha256" and not "pip".
    if word.len() > LONGEST {
        return None;
    }
    let share = |name: &str| strsim::levenshtein(word, name) * 100 / word.len().max(name.len());
    names.iter().copied().min_by_key(|name| share(name)).filter(|name| share(name) <= 50)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suggestion_has_the_smallest_relative_edit_distance() {
        let names = ["pip", "sha256", "temperature"];
        for (word, expected) in
            [("temprature", Some("temperature")), ("sha", Some("sha256")), ("pipp", Some("pip")), ("colour", None)]
        {
            assert_eq!(nearest(word, &names), expected, "{word}");
        }
        assert_eq!(nearest(&"x".repeat(100), &["x"]), None);
    }
}
