//! Lenient JSON parsing for responses of real servers: byte order marks, keep-alive comments, event streams, numbers
//! that JSON does not have, and unpaired surrogates.

use flate2::read::MultiGzDecoder;
use serde_json::{Value, json};
use std::io::Read;

use super::wire::excerpt;

/// Parses a response body.
///
/// # Errors
/// If the body is not JSON. The message describes it: empty, truncated, an HTML page, or something else.
pub fn parse(body: &[u8]) -> Result<Value, String> {
    let text = String::from_utf8_lossy(body);
    let text = without_comments(text.trim_start_matches('\u{feff}'));
    let text = text.trim();
    if text.is_empty() {
        return Err("the body is empty".into());
    }
    if let Some(value) = events(text) {
        return value;
    }
    let first = match serde_json::from_str(text) {
        Ok(value) => return Ok(value),
        Err(error) => error,
    };
    serde_json::from_str(&repaired(text)).map_err(|second| {
        if text.starts_with('<') {
            return format!("the body is an HTML page, not JSON: {}", excerpt(text));
        }
        if first.is_eof() || second.is_eof() {
            return format!("the body is cut off after {} bytes", body.len());
        }
        format!("the body is not JSON: {first}")
    })
}

/// Decompresses a body that begins with gzip's magic bytes, to at most `most` bytes.
///
/// # Errors
/// If the body is larger, damaged or truncated.
pub fn unpacked(body: Vec<u8>, most: usize) -> Result<Vec<u8>, String> {
    if !body.starts_with(&[0x1f, 0x8b]) {
        return Ok(body);
    }
    let mut plain = Vec::new();
    let mut reader = MultiGzDecoder::new(body.as_slice()).take(most as u64 + 1);
    reader.read_to_end(&mut plain).map_err(|error| format!("the body is not valid gzip: {error}"))?;
    if plain.len() > most { Err(format!("the body has more than {most} bytes")) } else { Ok(plain) }
}

/// Returns the message of a JSON error.
pub fn message(value: &Value) -> Option<String> {
    let error = &value["error"];
    // FastAPI's format: a list of mistakes, each with the path of the field.
    let listed = value["detail"].as_array().map(|list| {
        let one = |mistake: &Value| {
            let path = mistake["loc"].as_array().map_or(String::new(), |path| {
                path.iter()
                    .map(|step| step.as_str().map_or_else(|| step.to_string(), str::to_owned))
                    .collect::<Vec<_>>()
                    .join(".")
            });
            format!("{path}: {}", mistake["msg"].as_str().unwrap_or_default())
        };
        list.iter().map(one).collect::<Vec<_>>().join("; ")
    });
    let texts = [&error["message"], error, &value["message"], &value["detail"], value].into_iter();
    texts
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .chain(listed)
        .map(|text| excerpt(&text))
        .find(|text| !text.is_empty())
}

/// Removes leading lines that are comments of an event stream: `: keep-alive`.
fn without_comments(text: &str) -> String {
    let mut rest = text.trim_start();
    while rest.starts_with(':') {
        rest = rest.split_once('\n').map_or("", |(_, rest)| rest).trim_start();
    }
    rest.to_owned()
}

/// Assembles the answer from an event stream (`data: {…}` lines); `None` if the text is not an event stream.
fn events(text: &str) -> Option<Result<Value, String>> {
    let mut data = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(':'));
    let stream = text.starts_with("data:") || text.starts_with("event:") || text.ends_with("[DONE]");
    if !stream {
        return None;
    }
    let mut whole: Option<Value> = None;
    let mut written = String::new();
    for line in data.by_ref() {
        let Some(line) = line.strip_prefix("data:").map(str::trim).or_else(|| line.starts_with('{').then_some(line))
        else {
            continue;
        };
        if line == "[DONE]" {
            break;
        }
        let event: Value = match serde_json::from_str(line).or_else(|_| serde_json::from_str(&repaired(line))) {
            Ok(event) => event,
            Err(error) => return Some(Err(format!("an event of the stream is not JSON: {error}"))),
        };
        add(&mut whole, &mut written, event);
    }
    Some(whole.ok_or_else(|| "the stream has no event".into()))
}

/// Adds an event to the answer: its text is appended, and its log-probabilities are used if none came before.
fn add(whole: &mut Option<Value>, written: &mut String, event: Value) {
    let choice = &event["choices"][0];
    let piece = [&choice["delta"]["content"], &choice["message"]["content"], &choice["text"]]
        .into_iter()
        .find_map(Value::as_str);
    written.push_str(piece.unwrap_or_default());
    let logprobs = choice["logprobs"].clone();
    let reasoning = choice["delta"]["reasoning_content"].clone();
    let finish = choice["finish_reason"].clone();
    let answer = whole.get_or_insert_with(|| {
        let mut answer = event.clone();
        answer["choices"] = json!([{ "message": {} }]);
        answer
    });
    if let Some(usage) = event.get("usage").filter(|usage| !usage.is_null()) {
        answer["usage"] = usage.clone();
    }
    if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
        answer["error"] = error.clone();
    }
    let choice = &mut answer["choices"][0];
    choice["message"]["content"] = json!(written);
    if reasoning.is_string() {
        choice["message"]["reasoning_content"] = reasoning;
    }
    // Many streams begin with an empty delta that has only the role.
    let empty = choice["logprobs"]["content"].as_array().is_none_or(Vec::is_empty)
        && !choice["logprobs"]["top_logprobs"].is_array();
    if !logprobs.is_null() && empty {
        choice["logprobs"] = logprobs;
    }
    if !finish.is_null() {
        choice["finish_reason"] = finish;
    }
}

/// Returns the text with non-JSON numbers as strings (`NaN`, `-Infinity`, `-1e999`), and with a replacement character
/// for each unpaired surrogate.
fn repaired(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at, mut inside) = (String::with_capacity(text.len()), 0, false);
    while at < bytes.len() {
        let rest = &text[at..];
        if inside {
            let (piece, used) = match bytes[at] {
                b'"' => {
                    inside = false;
                    ("\"", 1)
                }
                b'\\' if rest.len() > 1 => escape(rest),
                _ => {
                    let end = rest.find(['"', '\\']).unwrap_or(rest.len());
                    (&rest[..end], end)
                }
            };
            out.push_str(piece);
            at += used.max(1);
            continue;
        }
        let word = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c))).unwrap_or(rest.len());
        if word == 0 {
            let end = rest.chars().next().map_or(1, char::len_utf8);
            inside = rest.starts_with('"');
            out.push_str(&rest[..end]);
            at += end;
            continue;
        }
        let number = rest[..word].parse::<f64>();
        match number {
            Ok(number) if !number.is_finite() => {
                let name = if number.is_nan() {
                    "nan"
                } else if number < 0.0 {
                    "-inf"
                } else {
                    "inf"
                };
                out.push_str(&format!("\"{name}\""));
            }
            _ => out.push_str(&rest[..word]),
        }
        at += word;
    }
    out
}

/// Returns a valid form of an escape inside a string, and the length of the original.
fn escape(rest: &str) -> (&str, usize) {
    let unit = |at: usize| {
        let hex = rest.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(hex, 16).ok()
    };
    match unit(0) {
        Some(0xd800..=0xdbff) if matches!(unit(6), Some(0xdc00..=0xdfff)) => (&rest[..12], 12),
        Some(0xd800..=0xdfff) => ("\\ufffd", 6),
        Some(_) => (&rest[..6], 6),
        None => {
            let end = rest.char_indices().nth(2).map_or(rest.len(), |(end, _)| end);
            (&rest[..end], end)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn surrounding_bytes_and_compression_are_accepted() {
        let value = json!({ "a": "b: \u{e9}", "c": [1, -0.5] });
        let plain = value.to_string();
        for body in [
            plain.clone(),
            format!("\u{feff}{plain}"),
            format!("\n   \n\n{plain}\n\n"),
            format!(": keep-alive\n\n: keep-alive\r\n\r\n{plain}"),
        ] {
            assert_eq!(parse(body.as_bytes()).unwrap(), value, "{body}");
        }
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(plain.as_bytes()).unwrap();
        let packed = packed.finish().unwrap();
        assert_eq!(unpacked(packed.clone(), 1000).unwrap(), plain.as_bytes());
        assert!(unpacked(packed.clone(), 10).unwrap_err().contains("more than 10 bytes"));
        assert!(unpacked(packed[..packed.len() - 9].to_vec(), 1000).unwrap_err().contains("gzip"));
        assert_eq!(unpacked(b"{}".to_vec(), 1).unwrap(), b"{}");
    }

    #[test]
    fn non_json_numbers_and_unpaired_surrogates_are_read() {
        for (body, expected) in [
            ("[NaN, -Infinity, Infinity, -1e999, 1e999, -1.5]", json!(["nan", "-inf", "inf", "-inf", "inf", -1.5])),
            ("[\"NaN -Infinity \\\" \\\\\", NaN]", json!(["NaN -Infinity \" \\", "nan"])),
            ("[\"a\\ud83d b\"]", json!(["a\u{fffd} b"])),
            ("[\"a\\ude00\\ud83d\\ude00\\n\\u00e9\"]", json!(["a\u{fffd}\u{1f600}\n\u{e9}"])),
            ("[\"\\ud83d\\u0041\", true, null]", json!(["\u{fffd}A", true, null])),
        ] {
            assert_eq!(parse(body.as_bytes()).unwrap(), expected, "{body}");
        }
    }

    #[test]
    fn an_event_stream_is_assembled() {
        let body = "data: {\"model\": \"m\", \"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"\"}, \"logprobs\": null}]}\n\n: keep-alive\n\ndata: {\"choices\": [{\"delta\": {\"content\": \"1\"}, \"logprobs\": {\"content\": [{\"token\": \"1\"}]}}]}\n\ndata: {\"choices\": [{\"delta\": {\"content\": \"0\"}, \"logprobs\": {\"content\": [{\"token\": \"0\"}]}, \"finish_reason\": \"length\"}]}\n\ndata: {\"choices\": [], \"usage\": {\"prompt_tokens\": 9}}\n\ndata: [DONE]\n\n";
        let value = parse(body.as_bytes()).unwrap();
        let choice = &value["choices"][0];
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("10"), &json!("length")));
        assert_eq!(choice["logprobs"]["content"][0]["token"], "1");
        assert_eq!((&value["model"], &value["usage"]["prompt_tokens"]), (&json!("m"), &json!(9)));
        // A complete answer followed by the end of a stream.
        let body = "{\"choices\": [{\"message\": {\"content\": \"2\"}}]}\n\ndata: [DONE]\n\n";
        assert_eq!(parse(body.as_bytes()).unwrap()["choices"][0]["message"]["content"], "2");
        assert!(parse(b"data: {\n\n").unwrap_err().contains("an event of the stream is not JSON"));
        assert!(parse(b"data: [DONE]").unwrap_err().contains("no event"));
    }

    #[test]
    fn an_unreadable_body_is_described() {
        for (body, words) in [
            ("", "the body is empty"),
            (": keep-alive\n\n", "the body is empty"),
            ("<!doctype html><html><body>Please log in", "is an HTML page, not JSON: <!doctype html>"),
            ("{\"choices\": [{\"mess", "is cut off after"),
            ("{\"a\": NaN", "is cut off after 9 bytes"),
            ("hello", "is not JSON"),
        ] {
            let error = parse(body.as_bytes()).unwrap_err();
            assert!(error.contains(words), "{body}: {error}");
        }
    }

    #[test]
    fn error_messages_are_found_in_every_format() {
        for (body, expected) in [
            (json!({ "error": { "message": "a" } }), "a"),
            (json!({ "error": "b" }), "b"),
            (json!({ "message": "c" }), "c"),
            (json!({ "detail": "d" }), "d"),
            (
                json!({ "detail": [{ "loc": ["body", "logprobs"], "msg": "Extra inputs are not permitted" }] }),
                "body.logprobs: Extra inputs are not permitted",
            ),
        ] {
            assert_eq!(message(&body).as_deref(), Some(expected));
        }
        assert_eq!(message(&json!({ "x": 1 })), None);
    }
}
