//! Tests of rows of files in each format, valid and damaged.

use std::io::Write;

use serde_json::json;

use super::*;

fn written(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[track_caller]
fn check(name: &str, bytes: &[u8], expected: &[Result<Option<&str>, &str>]) {
    let (_dir, path) = written(name, bytes);
    let rows = Rows::open(&path).unwrap();
    assert_eq!(rows.len(), expected.len(), "{name}");
    for (i, expected) in expected.iter().enumerate() {
        match (rows.get(i), expected) {
            (Ok(row), Ok(text)) => {
                assert_eq!(row.as_ref().map(|row| row["a"].as_str().unwrap()), *text);
            }
            (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
            (got, expected) => panic!("row {i}: {got:?}, not {expected:?}"),
        }
    }
}

/// Checks that the file is refused with `words`.
#[track_caller]
fn refused(name: &str, bytes: &[u8], words: &str) {
    let (_dir, path) = written(name, bytes);
    let error = format!("{:#}", Rows::open(&path).err().unwrap_or_else(|| panic!("{name} was opened")));
    assert!(error.contains(name) && error.contains(words), "{error}");
}

fn places(name: &str, bytes: &[u8]) -> Vec<String> {
    let (dir, path) = written(name, bytes);
    let rows = Rows::open(&path).unwrap();
    let folder = format!("{}/", dir.path().display());
    (0..rows.len()).map(|i| rows.place(i).replace(&folder, "")).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ::zstd::encode_all(bytes, 3).unwrap()
}

#[test]
fn rows_beyond_one_block_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("many.jsonl");
    let count = 2 * Offsets::BLOCK + 1;
    let text: String = (0..count).map(|i| format!("{{\"a\": {i}}}\n")).collect();
    std::fs::write(&path, text).unwrap();
    let rows = Rows::open(&path).unwrap();
    assert_eq!(rows.len(), count);
    for i in [0, Offsets::BLOCK - 2, Offsets::BLOCK - 1, Offsets::BLOCK, Offsets::BLOCK + 1, count - 1] {
        assert_eq!(rows.get(i).unwrap().unwrap()["a"], i);
    }
}

#[test]
fn rows_are_read_by_number() {
    let text = b"{\"a\": \"x\"}\n\n{\"a\": \"y\"}\nnope\n[1]\n{\"a\": \"last\"}";
    let expected =
        [Ok(Some("x")), Ok(None), Ok(Some("y")), Err("not JSON"), Err("not a JSON object"), Ok(Some("last"))];
    check("plain.jsonl", text, &expected);
    check("packed.jsonl.gz", &gzip(text), &expected);
    check("packed.jsonl.zst", &zstd(text), &expected);
    // A compressed file is recognised by its first bytes.
    check("renamed.jsonl", &gzip(text), &expected);
    check("empty.jsonl", b"", &[]);
    check("bytes.jsonl", b"\xff\n{\"a\": \"x\"}\n", &[Err("UTF-8"), Ok(Some("x"))]);
    check("list-first.jsonl", b"[1]\n{\"a\": \"x\"}\n", &[Err("not a JSON object"), Ok(Some("x"))]);
}

#[test]
fn byte_order_marks_and_carriage_returns_are_not_part_of_a_row() {
    let marked = b"\xef\xbb\xbf{\"a\": \"x\"}\r\n\r\n\xef\xbb\xbf{\"a\": \"y\"}\r\n";
    check("marked.jsonl", marked, &[Ok(Some("x")), Ok(None), Ok(Some("y"))]);
    check("marked.json", b"\xef\xbb\xbf[\r\n{\"a\": \"x\"}\r\n]\r\n", &[Ok(Some("x"))]);
    check("marked.csv", b"\xef\xbb\xbfa,b\r\nx,1\r\n", &[Ok(Some("x"))]);
    refused("wide.jsonl", b"\xff\xfe{\0\"\0", "it is UTF-16; write it again in UTF-8");
}

#[test]
fn an_error_about_half_a_surrogate_pair_says_so() {
    for half in [r"\ud83d", r"\ude00", r"\ud83dx", r"\ud83d\n"] {
        let row = format!("{{\"a\": \"cut {half}\"}}\n");
        check("cut.jsonl", row.as_bytes(), &[Err("half of a surrogate pair")]);
    }
    check("nan.jsonl", b"{\"a\": \"x\", \"score\": NaN}", &[Err("NaN is not a number of JSON")]);
    check("whole.jsonl", br#"{"a": "\ud83d\ude00"}"#, &[Ok(Some("😀"))]);
}

#[test]
fn a_row_beyond_the_size_limit_is_refused_without_reading_it() {
    let long = format!("{{\"a\": \"{}\"}}\n{{\"a\": \"x\"}}\n", "x".repeat(LONGEST as usize));
    check("long.jsonl", long.as_bytes(), &[Err("the row has 8388618 bytes, the limit is 8388608"), Ok(Some("x"))]);
}

#[test]
fn a_json_array_is_read_element_by_element() {
    let text =
        b" [ {\"a\": \"x,]\\\"\"},\n\n{\"a\": \"y\", \"b\": [[1], {\"c\": \"}\"}]}\n, 3, \"z]\", {\"a\": \"last\"} ]\n";
    let expected = [
        Ok(Some("x,]\"")),
        Ok(Some("y")),
        Err("not a JSON object, but the number 3"),
        Err("not a JSON object, but a text"),
        Ok(Some("last")),
    ];
    check("array.json", text, &expected);
    check("array.json.gz", &gzip(text), &expected);
    check("array.jsonl", text, &expected);
    check("none.json", b"[]", &[]);
    assert_eq!(
        places("array.json", text),
        ["array.json:1", "array.json:3", "array.json:4", "array.json:4", "array.json:4"]
    );
    refused("cut.json", b"[{\"a\": \"x\"},\n{\"a\": ", "the list is not closed; the file was cut off after line 2");
    refused("comma.json", b"[{\"a\": \"x\"},\n]", "a superfluous comma in line 2");
    refused("behind.json", b"[{\"a\": \"x\"}]\n{}", "text after the end of the list, in line 2");
    // JSON lines are also accepted in a file named .json; an object that spans several lines is not a data set.
    check("lines.json", b"{\"a\": \"x\"}\n{\"a\": \"y\"}\n", &[Ok(Some("x")), Ok(Some("y"))]);
    refused("object.json", b"{\n  \"data\": []\n}\n", "must hold a list of objects");
}

#[test]
fn tables_are_read_record_by_record() {
    let text = b"a,b\nx,1\n\"two\nlines, \"\"quoted\"\"\",2\n\n,3\nshort\nlast,\n";
    let expected = [
        Ok(Some("x")),
        Ok(Some("two\nlines, \"quoted\"")),
        Ok(Some("")),
        Err("the record has 1 values and the header 2 columns"),
        Ok(Some("last")),
    ];
    check("table.csv", text, &expected);
    check("table.csv.gz", &gzip(text), &expected);
    assert_eq!(places("table.csv", text), ["table.csv:2", "table.csv:3", "table.csv:6", "table.csv:7", "table.csv:8"]);
    check("tabs.tsv", b"a\tb\nx, y\t1\n", &[Ok(Some("x, y"))]);
    check("open.csv", b"b,a\n1,x\n2,\"y\n3,z\n", &[Ok(Some("x")), Err("a text in quotes is not closed")]);
    check("header.csv", b"a,b\n", &[]);
    refused("twice.csv", b"a,b,a\nx,1,2\n", "names the column \"a\" twice");
    refused("semicolons.csv", b"a;b\nx;1\n", "its header is separated by semicolons");
    refused("nothing.csv", b"", "begins with the names of its columns");
}

#[test]
fn a_list_of_messages_in_a_table_is_read_as_a_list() {
    let (_dir, path) = written("m.csv", b"a,b\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"hi\"\"}]\",[1]\n");
    let row = Rows::open(&path).unwrap().get(0).unwrap().unwrap();
    assert_eq!(row, json!({ "a": [{ "role": "user", "content": "hi" }], "b": "[1]" }));
}

#[test]
fn files_that_are_not_data_are_refused_with_their_type() {
    for (name, bytes, words) in [
        ("a.arrow", &b"ARROW1\0\0"[..], "an Arrow file"),
        ("a.jsonl.xz", b"\xfd7zXZ\0\0", "compressed by xz"),
        ("a.jsonl.bz2", b"BZh91AY", "compressed by bzip2"),
        ("a.xlsx", b"PK\x03\x04", "a spreadsheet"),
        ("a.bin", b"ab\0c", "it holds zero bytes"),
        ("no.parquet", b"PAR1 nothing", "parquet"),
        ("text.parquet", b"{\"a\": \"x\"}\n", "not a readable parquet file"),
    ] {
        refused(name, bytes, words);
    }
    let half = gzip(&b"{\"a\": \"x\"}\n".repeat(100));
    refused("half.jsonl.gz", &half[..half.len() / 2], "cannot read");
    let half = zstd(&b"{\"a\": \"x\"}\n".repeat(100));
    refused("half.jsonl.zst", &half[..half.len() / 2], "cannot read");
}

#[test]
fn rows_of_several_files_are_numbered_consecutively() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &[u8]| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    file("b.csv", b"a\nc1\nc2\n");
    file("a.jsonl", b"{\"a\": \"l1\"}\n{\"a\": \"l2\"}\n");
    file("empty.jsonl", b"");
    file("sub/z.json.gz", &gzip(b"[{\"a\": \"j1\"}]"));
    file("README.md", b"not data");
    file("sub/Z2.CSV", b"a\nC3\n");
    file(".hidden.jsonl", b"{}");
    let texts = |path: &Path| -> Vec<String> {
        let rows = Rows::open(path).unwrap();
        (0..rows.len()).map(|i| rows.get(i).unwrap().unwrap()["a"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(dir.path()), ["l1", "l2", "c1", "c2", "C3", "j1"]);
    assert_eq!(texts(&dir.path().join("*.csv")), ["c1", "c2"]);
    assert_eq!(texts(&dir.path().join("**/*.json*")), ["l1", "l2", "j1"]);
    let rows = Rows::open(dir.path()).unwrap();
    assert!(rows.place(3).ends_with("b.csv:3") && rows.place(5).ends_with("z.json.gz:1"), "{}", rows.place(3));
}
