//! Tests of the generated configuration documents.

use preceptor::config::reference;

use crate::common::{is_generated, preceptor};

#[test]
fn the_configuration_reference_follows_from_the_declarations() {
    is_generated("docs/configuration.md", &reference::page());
    is_generated("configs/preceptor.schema.json", &format!("{:#}\n", reference::schema()));
}

#[test]
fn check_prints_the_schema_without_a_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let output = preceptor(dir.path()).args(["check", "--schema"]).output().unwrap();
    assert!(output.status.success());
    let schema: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(schema, reference::schema());
    let output = preceptor(dir.path()).args(["check"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && text.contains("CONFIG"), "{text}");
}
