//! Statistics of evaluations: shares and means with confidence intervals, length-controlled win rates, position bias,
//! and tables.

pub mod interval;
pub mod length_control;
pub mod position;
pub mod table;

pub use interval::Estimate;
pub use table::Table;

#[cfg(test)]
mod testing {
    //! Reference values of an independent implementation (tests/fixtures/README.md).
    use serde_json::Value;

    /// Returns the reference cases called `name`.
    pub fn reference(name: &str) -> Vec<Value> {
        let text = include_str!("../../tests/fixtures/eval/reference.json");
        let mut all: Value = serde_json::from_str(text).unwrap();
        let cases = all[name].take().as_array().cloned().unwrap();
        assert!(!cases.is_empty());
        cases
    }

    pub fn numbers(list: &Value) -> Vec<f64> {
        list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    pub fn near(case: &Value, ours: &[(&str, f64)], tolerance: f64) {
        for (key, ours) in ours {
            let theirs = case[*key].as_f64().unwrap();
            assert!((ours - theirs).abs() < tolerance, "{key}: {ours} against {theirs}");
        }
    }
}
