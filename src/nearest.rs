//! The name that a misspelt word was meant to be. A leaf.

/// No name that is looked for is as long.
const LONGEST: usize = 64;

/// The name that `word` was most likely meant to be.
pub fn nearest<'a>(word: &str, names: &[&'a str]) -> Option<&'a str> {
    // By the share of the longer word that has to change, so that "sha" means "sha256" and not "pip".
    if word.len() > LONGEST {
        return None;
    }
    let share = |name: &str| distance(word, name) * 100 / word.len().max(name.len());
    names.iter().copied().min_by_key(|name| share(name)).filter(|name| share(name) <= 50)
}

/// Edits (Levenshtein) from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance() {
        for (a, b, expected) in
            [("", "abc", 3), ("kitten", "sitting", 3), ("eta", "eta", 0), ("temprature", "temperature", 1)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
