//! A small table that can be rendered as text, Markdown and JSON.

use serde_json::{Value, json};

use super::interval::Estimate;

/// Text of a missing number.
const NOTHING: &str = "–";

/// A table: a title, named columns, rows of cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    title: String,
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

#[derive(Debug, Clone, PartialEq)]
struct Column {
    name: String,
    unit: String,
}

/// A cell of a table.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// Text, aligned left.
    Text(String),
    /// An integer.
    Integer(i64),
    /// A share with its interval, printed in per cent; in JSON as fractions.
    Share(Estimate),
    /// A number, printed with four significant digits; in JSON in full. A non-finite number is shown as missing.
    Number(f64),
}

impl Table {
    /// Creates a table without rows. `columns` are pairs of name and unit; the unit may be empty.
    pub fn new(title: &str, columns: &[(&str, &str)]) -> Self {
        let column = |(name, unit): &(&str, &str)| Column { name: (*name).into(), unit: (*unit).into() };
        Self { title: title.into(), columns: columns.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// If the row does not have one cell per column.
    pub fn push(&mut self, row: Vec<Cell>) {
        assert_eq!(row.len(), self.columns.len(), "a row of the table {:?} must have one cell per column", self.title);
        self.rows.push(row);
    }

    /// Returns the table as text for a terminal: the title, then aligned columns, two spaces apart.
    pub fn text(&self) -> String {
        let (head, body) = (self.head(), self.body());
        let width = |i: usize| body.iter().map(|row| &row[i]).chain([&head[i]]).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..head.len()).filter_map(width).collect();
        let line = |cells: &[String]| {
            let padded = cells.iter().enumerate().map(|(i, cell)| {
                let width = widths[i];
                if self.is_text(i) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let rule: Vec<String> = widths.iter().map(|width| "─".repeat(*width)).collect();
        let title = Some(self.title.clone()).filter(|title| !title.is_empty());
        let lines = title.into_iter().chain([line(&head), rule.join("  ")]).chain(body.iter().map(|row| line(row)));
        lines.map(|line| line + "\n").collect()
    }

    /// Returns the table in GitHub's Markdown, with the title in bold above.
    pub fn markdown(&self) -> String {
        let escape = |cell: &String| cell.replace('\\', "\\\\").replace('|', "\\|").replace('\n', " ");
        let line = |cells: &[String]| format!("| {} |\n", cells.iter().map(escape).collect::<Vec<_>>().join(" | "));
        let rule = (0..self.columns.len()).map(|i| if self.is_text(i) { ":--|" } else { "--:|" });
        let title = if self.title.is_empty() { String::new() } else { format!("**{}**\n\n", self.title) };
        let body: String = self.body().iter().map(|row| line(row)).collect();
        format!("{title}{}|{}\n{body}", line(&self.head()), rule.collect::<String>())
    }

    /// Returns the table as JSON: an array with one object per row, keyed by the columns' names, with unrounded
    /// numbers. A share is an object of `value`, `low`, `high` and `count`.
    pub fn json(&self) -> Value {
        let object = |row: &Vec<Cell>| {
            let cells = self.columns.iter().zip(row).map(|(column, cell)| (column.name.clone(), cell.json()));
            Value::Object(cells.collect())
        };
        Value::Array(self.rows.iter().map(object).collect())
    }

    fn head(&self) -> Vec<String> {
        let name = |column: &Column| {
            if column.unit.is_empty() { column.name.clone() } else { format!("{} ({})", column.name, column.unit) }
        };
        self.columns.iter().map(name).collect()
    }

    fn body(&self) -> Vec<Vec<String>> {
        self.rows.iter().map(|row| row.iter().map(Cell::shown).collect()).collect()
    }

    /// Returns whether a column contains text, which is aligned left.
    fn is_text(&self, column: usize) -> bool {
        self.rows.iter().any(|row| matches!(row[column], Cell::Text(_)))
    }
}

impl Cell {
    /// Formats the cell for people.
    fn shown(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Integer(number) => number.to_string(),
            Self::Share(Estimate { value: Some(value), low, high, .. }) => {
                format!("{:.1} [{:.1}, {:.1}]", value * 100.0, low * 100.0, high * 100.0)
            }
            Self::Number(number) if number.is_finite() => significant(*number),
            Self::Share(_) | Self::Number(_) => NOTHING.into(),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Integer(number) => json!(number),
            Self::Share(share) => json!(share),
            Self::Number(number) => json!(number),
        }
    }
}

/// Formats a finite number with four significant digits; digits before the decimal point are never dropped.
fn significant(number: f64) -> String {
    let size = number.abs();
    if size == 0.0 {
        return "0".into();
    }
    if !(1e-4..1e9).contains(&size) {
        return format!("{number:.3e}");
    }
    let decimals = (3 - size.log10().floor() as i32).max(0) as usize;
    format!("{number:.decimals$}")
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<usize> for Cell {
    fn from(number: usize) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Cell {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<Estimate> for Cell {
    fn from(share: Estimate) -> Self {
        Self::Share(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl::statistics::interval::share;

    fn table() -> Table {
        let mut table = Table::new("Labelers", &[("model", ""), ("pairs", ""), ("alignment", "%"), ("cost", "s")]);
        table.push(vec!["tiny".into(), 20usize.into(), share(7, 20).into(), 0.012_345_6.into()]);
        table.push(vec!["a|b – ü".to_owned().into(), 0usize.into(), share(0, 0).into(), f64::NAN.into()]);
        table
    }

    #[test]
    fn text_columns_are_aligned() {
        let expected = "\
Labelers
model    pairs      alignment (%)  cost (s)
───────  ─────  ─────────────────  ────────
tiny        20  35.0 [18.1, 56.7]   0.01235
a|b – ü      0                  –         –
";
        assert_eq!(table().text(), expected);
    }

    #[test]
    fn markdown_follows_github() {
        let expected = "\
**Labelers**

| model | pairs | alignment (%) | cost (s) |
|:--|--:|--:|--:|
| tiny | 20 | 35.0 [18.1, 56.7] | 0.01235 |
| a\\|b – ü | 0 | – | – |
";
        assert_eq!(table().markdown(), expected);
    }

    #[test]
    fn json_has_unrounded_numbers() {
        let expected = json!([
            {
                "model": "tiny", "pairs": 20, "cost": 0.012_345_6,
                "alignment": { "value": 0.35, "low": share(7, 20).low, "high": share(7, 20).high, "count": 20 },
            },
            {
                "model": "a|b – ü", "pairs": 0, "cost": null,
                "alignment": { "value": null, "low": 0.0, "high": 1.0, "count": 0 },
            },
        ]);
        assert_eq!(table().json(), expected);
    }

    #[test]
    fn a_table_without_title_and_rows_has_only_a_head() {
        let empty = Table::new("", &[("a", ""), ("b", "s")]);
        assert_eq!(empty.text(), "a  b (s)\n─  ─────\n");
        assert_eq!(empty.markdown(), "| a | b (s) |\n|--:|--:|\n");
        assert_eq!(empty.json(), json!([]));
    }

    #[test]
    fn lines_have_no_trailing_spaces() {
        let mut notes = Table::new("", &[("n", ""), ("note", "")]);
        notes.push(vec![1usize.into(), "x".into()]);
        assert_eq!(notes.text(), "n  note\n─  ────\n1  x\n");
    }

    #[test]
    fn numbers_have_four_significant_digits() {
        for (number, expected) in [
            (0.0, "0"),
            (1.0, "1.000"),
            (-0.5, "-0.5000"),
            (12.345_6, "12.35"),
            (123_456.7, "123457"),
            (0.000_123_456, "0.0001235"),
            (0.000_012_345, "1.234e-5"),
            (1.5e12, "1.500e12"),
        ] {
            assert_eq!(significant(number), expected);
        }
    }
}
