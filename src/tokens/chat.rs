//! Chat templates, as Hugging Face models carry them: Jinja, in minijinja, without file access.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Kwargs, Object, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::ser::Error as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::ser::{Formatter, PrettyFormatter};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Object for Message {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "role" => Some(self.role.as_str().into()),
            "content" => Some(self.content.as_str().into()),
            _ => None,
        }
    }

    /// The order in which Python code writes these keys, and so `tojson` prints them.
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Str(&["role", "content"])
    }
}

/// A template, parsed once.
pub(super) struct Template {
    /// As the model carries it.
    pub(super) source: String,
    environment: Environment<'static>,
}

impl Template {
    /// Parses `source` for the environment that `transformers` renders chat templates in.
    ///
    /// # Errors
    /// Syntax that is no Jinja; names the line.
    pub(super) fn new(source: String) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<String, Error> { Err(refusal(text)) });
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned("chat_template", without_generation_blocks(&source))
            .context("the model's chat template cannot be read")?;
        Ok(Self { source, environment })
    }

    /// Fills the template in; with `answer`, up to where the model's answer begins.
    ///
    /// # Errors
    /// A template that refuses the conversation, or uses what is not there.
    pub(super) fn render(&self, messages: &[Message], answer: bool, bos: &str, eos: &str) -> Result<String> {
        let messages: Vec<Value> = messages.iter().cloned().map(Value::from_object).collect();
        let context = context! { messages, add_generation_prompt => answer, bos_token => bos, eos_token => eos };
        self.environment
            .get_template("chat_template")
            .and_then(|template| template.render(context))
            .context("the model's chat template cannot be filled in")
    }
}

/// `{% generation %}` marks what an assistant said, for masks made elsewhere. It does nothing to the text, and is no
/// Jinja: it becomes a block that is always taken.
fn without_generation_blocks(source: &str) -> String {
    let mut pieces = source.split("{%");
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        out.push_str("{%");
        let tag = piece.split_once("%}").map_or("", |(tag, _)| tag.trim_matches(['-', '+']).trim());
        match tag {
            "generation" => out.push_str(&piece.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&piece.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(piece),
        }
    }
    out
}

fn refusal(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, text.into())
}

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it: minijinja's own filter escapes for HTML.
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(options.get("indent")?);
    // Accepted for Python's sake: this is how it is always written.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let written = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent);
            json(value, PrettyFormatter::with_indent(indent.as_bytes()))
        }
        None => json(value, Spaced),
    };
    written.map(Value::from_safe_string).map_err(|error| refusal(format!("cannot be written as JSON: {error}")))
}

fn json(value: &Value, formatter: impl Formatter) -> Result<String> {
    let mut bytes = Vec::new();
    Plain(value.clone()).serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(String::from_utf8(bytes)?)
}

/// A template's value for serde.
struct Plain(Value);

impl Serialize for Plain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = &self.0;
        let iterated = || value.try_iter().map_err(S::Error::custom);
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => serializer.serialize_unit(),
            ValueKind::Bool => serializer.serialize_bool(value.is_true()),
            ValueKind::Number if value.is_integer() => {
                serializer.serialize_i64(i64::try_from(value.clone()).map_err(S::Error::custom)?)
            }
            ValueKind::Number => serializer.serialize_f64(f64::try_from(value.clone()).map_err(S::Error::custom)?),
            ValueKind::String => serializer.serialize_str(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => serializer.collect_seq(iterated()?.map(Plain)),
            ValueKind::Map => {
                let entry = |key: Value| Ok((key.to_string(), Plain(value.get_item(&key)?)));
                let entries: Result<Vec<_>, Error> = iterated()?.map(entry).collect();
                serializer.collect_map(entries.map_err(S::Error::custom)?)
            }
            other => Err(S::Error::custom(format!("a {other} has no JSON form"))),
        }
    }
}

/// One line, with a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The date in UTC, by the directives of C's `strftime` that templates use.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (year, month, day) = date(seconds / 86_400);
    let weekday = DAYS[(seconds / 86_400 % 7) as usize];
    let name = MONTHS[month as usize - 1];
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => write!(out, "{year:04}"),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('B') => write!(out, "{name}"),
            Some('b') => write!(out, "{}", &name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('H') => write!(out, "{hour:02}"),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('%') => write!(out, "%"),
            other => {
                let name = other.map_or(String::new(), String::from);
                return Err(refusal(format!("strftime_now does not know %{name}; it knows Y m d B b A a H M S")));
            }
        }
        .map_err(|error| refusal(error.to_string()))?;
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970, by the Gregorian calendar.
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    fn render(template: &str, messages: &[Message], answer: bool) -> Result<String> {
        Template::new(template.to_owned())?.render(messages, answer, "<s>", "</s>")
    }

    #[test]
    fn renders_python_flavoured_templates() {
        let template = "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n    {%- else %}\n{{ m.content | trim }}{{ eos_token }}\n    {%- endif %}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        let messages = [message("user", " a "), message("assistant", "b"), message("user", "c")];
        // Worked out by hand from Jinja's rules for trim_blocks and lstrip_blocks.
        assert_eq!(render(template, &messages, true).unwrap(), "<s>[a]b</s>[c]>");
        assert_eq!(render(template, &messages[..1], false).unwrap(), "<s>[a]");
    }

    #[test]
    fn loops_break_and_slices_work() {
        let template = "{% for m in messages[1:] %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content.split('/')[-1] }}{% if not loop.last %},{% endif %}{% endfor %}{{ messages[-1].role.startswith('as') }}\n";
        let messages = [message("system", "x"), message("user", "a/b"), message("assistant", "c")];
        // One trailing newline of a template is not part of it, as in Jinja.
        assert_eq!(render(template, &messages, false).unwrap(), "b,True");
    }

    #[test]
    fn generation_blocks_leave_the_text_alone() {
        let template = "{% for m in messages %}{%- generation -%}\n {{ m.content }} generation\n{%- endgeneration -%}\n;\n{% endfor %}";
        let messages = [message("assistant", "a"), message("assistant", "b")];
        // As `transformers` renders it.
        assert_eq!(render(template, &messages, false).unwrap(), "a generation;\nb generation;\n");
    }

    #[test]
    fn json_is_pythons() {
        let messages = [message("user", "a<b> 'é' \"q\"")];
        // What json.dumps(messages, ensure_ascii=False) writes, without and with indent=2.
        let expected = r#"[{"role": "user", "content": "a<b> 'é' \"q\""}]"#;
        assert_eq!(render("{{ messages | tojson }}", &messages, false).unwrap(), expected);
        let expected = "{\n  \"role\": \"user\",\n  \"content\": \"x\"\n}";
        let plain = [message("user", "x")];
        let literal = "{{ [1, -2.5, true, none, {}] | tojson(ensure_ascii=false) }}";
        assert_eq!(render(literal, &plain, false).unwrap(), "[1, -2.5, true, null, {}]");
        assert_eq!(render("{{ messages[0] | tojson(indent=2) }}", &plain, false).unwrap(), expected);
    }

    #[test]
    fn dates_are_gregorian() {
        // `date -u -d @SECONDS` of GNU coreutils.
        for (seconds, expected) in [
            (0, "Thu 01 Jan 1970 00:00:00"),
            (951_782_399, "Mon 28 Feb 2000 23:59:59"),
            (951_827_696, "Tue 29 Feb 2000 12:34:56"),
            (4_107_542_400, "Mon 01 Mar 2100 00:00:00"),
        ] {
            assert_eq!(strftime("%a %d %b %Y %H:%M:%S", seconds).unwrap(), expected);
        }
        assert_eq!(strftime("%A, %B %d 100%%", 86_400).unwrap(), "Friday, January 02 100%");
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q"));
        assert_eq!(render("{{ strftime_now('%Y') | length }}", &[], false).unwrap(), "4");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (template, word) in [
            ("{{ raise_exception('no system message') }}", "no system message"),
            ("{% include 'Cargo.toml' %}", "filled in"),
            ("{% if %}", "cannot be read"),
            ("{{ messages.nothing() }}", "nothing"),
        ] {
            let error = format!("{:#}", render(template, &[], false).expect_err(template));
            assert!(error.contains(word), "{template}: {error}");
        }
    }
}
