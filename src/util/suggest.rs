//! The name that a misspelt word was meant to be.

/// No name that is looked for is as long.
const LONGEST: usize = 64;

/// The name that `word` was most likely meant to be.
pub fn nearest<'a>(word: &str, names: &[&'a str]) -> Option<&'a str> {
    // By the share of the longer word that has to change, so that "sha" means "sha256" and not "pip".
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
    fn a_misspelt_name_is_the_one_with_the_smallest_share_of_edits() {
        let names = ["pip", "sha256", "temperature"];
        for (word, expected) in
            [("temprature", Some("temperature")), ("sha", Some("sha256")), ("pipp", Some("pip")), ("colour", None)]
        {
            assert_eq!(nearest(word, &names), expected, "{word}");
        }
        assert_eq!(nearest(&"x".repeat(100), &["x"]), None);
    }
}
