//! Chat templates of Hugging Face models: Jinja, rendered by minijinja, without file access.

mod json;
mod python;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Object};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::{Deserialize, Serialize};

use crate::util::read_bounded;
use crate::util::template;

/// Message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the message.
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

    /// Enumerates the keys in the order in which Python code writes them, in which `tojson` prints them too.
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Str(&["role", "content"])
    }
}

/// Tag that begins the reasoning in most models' answers.
pub(super) const OPENS_REASONING: &str = "<think>";

/// Parsed chat template.
pub(super) struct Template {
    /// Source, in the model's own form.
    pub(super) source: String,
    environment: Environment<'static>,
}

impl Template {
    /// Parses `source` for the environment in which `transformers` renders chat templates.
    ///
    /// # Errors
    /// If it is not valid Jinja; the error names the line.
    pub(super) fn new(source: String) -> Result<Self> {
        template::check(&source).context("the model's chat template cannot be read")?;
        let mut environment = template::environment();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        python::add_to(&mut environment);
        environment.add_function("raise_exception", |text: String| -> Result<String, Error> { Err(refusal(text)) });
        environment.add_function("strftime_now", |state: &State<'_, '_>, format: String| {
            let pinned = state.lookup(NOW).and_then(|seconds| u64::try_from(seconds).ok());
            strftime(&format, pinned.unwrap_or_else(now))
        });
        environment.add_filter("tojson", json::to_json);
        // Line ends are normalised as by Jinja.
        let text = read_bounded::line_feeds(without_generation_blocks(&source));
        environment.add_template_owned("chat_template", text).context("the model's chat template cannot be read")?;
        Ok(Self { source, environment })
    }

    /// Returns whether the model reasons before its answers, according to the template: it has a switch for reasoning
    /// (`enable_thinking`), or opens a reasoning block.
    pub(super) fn thinks(&self) -> bool {
        self.source.contains("enable_thinking") || self.source.contains(OPENS_REASONING)
    }

    /// Renders the template; with `answer`, up to the beginning of the model's answer. Without `thinking`, a template's
    /// switch for reasoning is off. `special` holds the special tokens by the names that templates use.
    ///
    /// The template sees the same variables as in `transformers`: `messages`, `add_generation_prompt`, `tools` and
    /// `documents` (none), the special tokens, and `variables`.
    ///
    /// # Errors
    /// If the template rejects the conversation, uses an undefined variable, or exceeds its budget.
    pub(super) fn render(
        &self,
        messages: &[Message],
        answer: bool,
        thinking: bool,
        special: &[(&'static str, String)],
        variables: &Variables,
    ) -> Result<String> {
        let (count, bytes) = (messages.len(), messages.iter().map(|message| message.content.len()).sum());
        let messages: Value = messages.iter().cloned().map(Value::from_object).collect();
        let mut context: BTreeMap<&str, Value> = BTreeMap::from([
            ("messages", messages),
            ("add_generation_prompt", answer.into()),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        context.extend(special.iter().map(|(name, token)| (*name, token.as_str().into())));
        context.extend(variables.named.iter().map(|(name, value)| (name.as_str(), value.clone())));
        if !thinking {
            context.insert("enable_thinking", false.into());
        }
        if let Some(now) = variables.now {
            context.insert(NOW, now.into());
        }
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(template::budget(count, bytes)));
        template::fill(environment, "chat_template", context.into())
            .context("the model's chat template cannot be filled in")
    }
}

/// Name of the variable that holds the time for `strftime_now`.
const NOW: &str = "preceptor_now";

/// Variables of a chat template besides the conversation and the special tokens.
#[derive(Debug, Clone, Default)]
pub struct Variables {
    named: BTreeMap<String, Value>,
    now: Option<u64>,
}

impl Variables {
    /// Creates variables from `named` (`chat_template_kwargs`) and the time that `strftime_now` returns, in seconds
    /// since 1970; `None` for the current time.
    pub fn new(named: &toml::Table, now: Option<u64>) -> Self {
        let named = named.iter().map(|(name, value)| (name.clone(), value_of(value))).collect();
        Self { named, now }
    }
}

/// Converts a TOML value for a template. A date becomes text.
fn value_of(value: &toml::Value) -> Value {
    match value {
        toml::Value::String(text) => text.as_str().into(),
        toml::Value::Integer(number) => (*number).into(),
        toml::Value::Float(number) => (*number).into(),
        toml::Value::Boolean(truth) => (*truth).into(),
        toml::Value::Datetime(time) => time.to_string().into(),
        toml::Value::Array(list) => list.iter().map(value_of).collect(),
        toml::Value::Table(table) => {
            table.iter().map(|(name, value)| (name.clone(), value_of(value))).collect::<BTreeMap<_, _>>().into()
        }
    }
}

/// Replaces `{% generation %}` blocks by blocks that do not change the text. They mark assistant messages for loss
/// masks, and Jinja does not know them. Variables that are set within one are not visible after it, as in
/// `transformers`. Comments, raw blocks and string literals are not changed.
fn without_generation_blocks(source: &str) -> String {
    let (mut out, mut rest, mut raw) = (String::new(), source, false);
    while let Some(at) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = match &tag[..2] {
            "{%" => code_end(tag, "%}"),
            "{{" if !raw => code_end(tag, "}}"),
            "{#" if !raw => tag.find("#}").map(|end| end + 2),
            _ => Some(2),
        };
        let (tag, behind) = tag.split_at(end.unwrap_or(tag.len()));
        let inner = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}")).unwrap_or_default();
        match (inner.trim_matches(['-', '+']).trim(), raw) {
            ("generation", false) => out.push_str(&tag.replacen("generation", "with", 1)),
            ("endgeneration", false) => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            (word, _) => {
                let toggles = if raw { word == "endraw" } else { word == "raw" };
                raw ^= toggles;
                // In a raw block only its end is a tag.
                let step = if raw && !toggles { 2 } else { tag.len() };
                out.push_str(&tag[..step]);
                rest = &rest[at + step..];
                continue;
            }
        }
        rest = behind;
    }
    out + rest
}

/// Returns the position after `close` in `code`, which opens with two characters; string literals are skipped.
fn code_end(code: &str, close: &str) -> Option<usize> {
    let (mut quote, mut escaped) = (None, false);
    for (at, c) in code.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None if code[at..].starts_with(close) => return Some(at + close.len()),
            None => {}
        }
    }
    None
}

fn refusal(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, text.into())
}

/// Returns the current time in seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Formats a UTC date with those directives of C's `strftime` that templates use.
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

/// Returns year, month and day in the Gregorian calendar, given the days since 1970.
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
        let special = [("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
        Template::new(template.to_owned())?.render(messages, answer, true, &special, &Variables::default())
    }

    #[test]
    fn renders_python_flavoured_templates() {
        let template = "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n    {%- else %}\n{{ m.content | trim }}{{ eos_token }}\n    {%- endif %}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        let messages = [message("user", " a "), message("assistant", "b"), message("user", "c")];
        // Derived manually from Jinja's rules for trim_blocks and lstrip_blocks.
        assert_eq!(render(template, &messages, true).unwrap(), "<s>[a]b</s>[c]>");
        assert_eq!(render(template, &messages[..1], false).unwrap(), "<s>[a]");
    }

    #[test]
    fn loops_break_and_slices_work() {
        let template = "{% for m in messages[1:] %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content.split('/')[-1] }}{% if not loop.last %},{% endif %}{% endfor %}{{ messages[-1].role.startswith('as') }}\n";
        let messages = [message("system", "x"), message("user", "a/b"), message("assistant", "c")];
        // One trailing newline of a template is removed, as in Jinja.
        assert_eq!(render(template, &messages, false).unwrap(), "b,True");
    }

    #[test]
    fn generation_blocks_do_not_change_the_text() {
        let template = "{% for m in messages %}{%- generation -%}\n {{ m.content }} generation\n{%- endgeneration -%}\n;\n{% endfor %}";
        let messages = [message("assistant", "a"), message("assistant", "b")];
        // As `transformers` renders it.
        assert_eq!(render(template, &messages, false).unwrap(), "a generation;\nb generation;\n");
        for (template, expected) in [
            (
                "{% raw %}{% generation %}{{ x }}{% endgeneration %}{% endraw %}",
                "{% generation %}{{ x }}{% endgeneration %}",
            ),
            (
                "{{ '{% generation %}' }}{# {% generation %} #}{{ \"it's {% endgeneration %}\" }}",
                "{% generation %}it's {% endgeneration %}",
            ),
            ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
            ("{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% endgeneration %}{{ n.x }}", "2"),
            ("{%+ generation +%} a{%endgeneration%}", " a"),
        ] {
            assert_eq!(render(template, &[], false).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn json_is_formatted_as_by_python() {
        let messages = [message("user", "a<b> 'é' \"q\"")];
        // The output of json.dumps(messages, ensure_ascii=False), without and with indent=2.
        let expected = r#"[{"role": "user", "content": "a<b> 'é' \"q\""}]"#;
        assert_eq!(render("{{ messages | tojson }}", &messages, false).unwrap(), expected);
        let expected = "{\n  \"role\": \"user\",\n  \"content\": \"x\"\n}";
        let plain = [message("user", "x")];
        let literal = "{{ [1, -2.5, true, none, {}] | tojson(ensure_ascii=false) }}";
        assert_eq!(render(literal, &plain, false).unwrap(), "[1, -2.5, true, null, {}]");
        assert_eq!(render("{{ messages[0] | tojson(indent=2) }}", &plain, false).unwrap(), expected);
    }

    /// The expected texts are those of `transformers` 5.
    #[test]
    fn python_methods_tests_and_numbers_are_as_in_transformers() {
        for (template, expected) in [
            (
                "{% for k, v in {'b':1,'a':2}.items() %}{{k}}{{v}}{% endfor %}{{ {'name': 1, 'arguments': 2} | tojson }}",
                "b1a2{\"name\": 1, \"arguments\": 2}",
            ),
            (
                "{{ 'x' is sequence }}{{ {} is sequence }}{{ [] is sequence }}{{ 3 is sequence }}{{ none is sequence }}",
                "TrueTrueTrueFalseFalse",
            ),
            ("{{ 'x' is iterable }}{{ {} is iterable }}{{ 3 is iterable }}", "TrueTrueFalse"),
            (
                "{{ 'é😀\"\\\\n' | tojson(ensure_ascii=True) }}{{ 'é😀\\x7f' | tojson(True) }}",
                "\"\\u00e9\\ud83d\\ude00\\\"\\\\n\"\"\\u00e9\\ud83d\\ude00\\u007f\"",
            ),
            (
                "{{ {'a': [1, {'b': 2}], 'c': [], 'd': {}} | tojson(indent=2) }}",
                "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ],\n  \"c\": [],\n  \"d\": {}\n}",
            ),
            ("{{ {'a': [1, 2]} | tojson(indent='\\t') }}", "{\n\t\"a\": [\n\t\t1,\n\t\t2\n\t]\n}"),
            ("{{ {'a': [1, 2], 'b': 'c'} | tojson(separators=(',', ':')) }}", "{\"a\":[1,2],\"b\":\"c\"}"),
            (
                "{{ {'b': 1, 'a': {'d': 1, 'c': 2}} | tojson(sort_keys=True, indent=1) }}",
                "{\n \"a\": {\n  \"c\": 2,\n  \"d\": 1\n },\n \"b\": 1\n}",
            ),
            ("{{ {2: 1, none: 4, 0.5: 5} | tojson }}", "{\"2\": 1, \"null\": 4, \"0.5\": 5}"),
            (
                "{{ [1e20, 1e16, 123456789012345680.0, 1e15, 1e-7, 0.0001, 0.00012, 1.5e-5, 100.0, 0.1, -0.0, 3.14] | tojson }}",
                "[1e+20, 1e+16, 1.2345678901234568e+17, 1000000000000000.0, 1e-07, 0.0001, 0.00012, 1.5e-05, 100.0, 0.1, -0.0, 3.14]",
            ),
            (
                "{{ 1e20 }} {{ 1e-7 }} {{ 0.0001 }} {{ 1e15 }} {{ 2.0 }} {{ [1e-7, 'a', {'b': 1e22}] }} {{ 1e16 | string }}",
                "1e+20 1e-07 0.0001 1000000000000000.0 2.0 [1e-07, 'a', {'b': 1e+22}] 1e+16",
            ),
            (
                "{{ 'a,b,c'.rsplit(',', 1) }} {{ 'a b  c '.rsplit() }} {{ ' a b c '.rsplit(none, 1) }} {{ 'abc'.rsplit('x') }}",
                "['a,b', 'c'] ['a', 'b', 'c'] [' a b', 'c'] ['abc']",
            ),
            ("{{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'abc'.removeprefix('x') }}", "bc ab abc"),
            ("{{ 'aéc'.index('c') }} {{ 'abcb'.rindex('b') }} {{ [1, 2, 3].index(2) }}", "2 3 1"),
            (
                "{{ 'a=b=c'.partition('=') | join('|') }} {{ 'a=b=c'.rpartition('=') | join('|') }} {{ 'abc'.partition('=') | join('|') }}",
                "a|=|b=c a=b|=|c abc||",
            ),
            (
                "{{ 'ab'.center(5, '*') }} {{ 'ab'.center(7) }}| {{ 'abc'.center(6) }}| {{ '7'.zfill(3) }} {{ '-7'.zfill(4) }} {{ 'a'.ljust(3, '.') }}{{ 'a'.rjust(3, '.') }}",
                "**ab*    ab  |  abc  | 007 -007 a....a",
            ),
            ("{{ 'aBc'.swapcase() }} {{ 'ABC'.casefold() }}", "AbC abc"),
            (
                "{{ 'a' is callable }}{{ range is callable }}{{ raise_exception is callable }}{{ [] is callable }}",
                "FalseTrueTrueFalse",
            ),
            (
                "{{ ['a', \"it's\", 'q\"q'] }} {{ {'a': none, 'b': true} }}",
                "['a', \"it's\", 'q\"q'] {'a': None, 'b': True}",
            ),
            ("a\r\nb{{ 1 }}\rc", "a\nb1\nc"),
        ] {
            let rendered = render(template, &[], false).unwrap_or_else(|error| panic!("{template}: {error:#}"));
            assert_eq!(rendered, expected, "{template}");
        }
    }

    #[test]
    fn a_template_sees_the_same_variables_as_in_transformers() {
        let named = "enable_thinking = true\nlevel = 3\ntags = [\"a\", \"b\"]".parse().unwrap();
        let variables = Variables::new(&named, Some(86_400));
        let render = |source: &str, thinking| {
            let special = [("pad_token", "<pad>".to_owned())];
            Template::new(source.to_owned()).unwrap().render(&[], true, thinking, &special, &variables).unwrap()
        };
        let source = "{{ tools is none }}{{ documents is none }}{{ bos_token is defined }}{{ pad_token }}{{ level + 1 }}{{ tags[1] }}{{ enable_thinking }}{{ strftime_now('%d %b %Y') }}";
        assert_eq!(render(source, true), "TrueTrueFalse<pad>4bTrue02 Jan 1970");
        assert_eq!(render("{{ enable_thinking }}", false), "False");
    }

    #[test]
    fn dates_are_gregorian() {
        // The expected texts are those of `date -u -d @SECONDS` of GNU coreutils.
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

    /// Each template of a line or two would run forever, or exhaust the memory or the stack.
    #[test]
    fn an_endless_template_is_an_error() {
        let doubled = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}";
        let nested = |depth: usize, step: &str, end: &str| {
            format!(
                "{{% set ns = namespace(x=[1]) %}}{{% for i in range({depth}) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"
            )
        };
        for (template, word) in [
            (
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".to_owned(),
                "may never end",
            ),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(), "recursion"),
            ("{{ 'x' * 999999999999 }}".into(), "may never end"),
            (
                "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
                    .into(),
                "may never end",
            ),
            ("{{ messages | batch(999999999999, 1) | list }}".into(), "may never end"),
            ("{{ 'x' | indent(999999999999, true) }}".into(), "may never end"),
            (format!("{doubled}{{{{ ns.x | tojson }}}}"), "may never end"),
            (format!("{doubled}{{{{ ns.x }}}}"), "may never end"),
            (format!("{doubled}{{{{ ns.x == ns.y }}}}"), "may never end"),
            ("{{ [1] | tojson(indent=999999999999) }}".into(), "indent = 999999999999 is more than 64"),
            ("{{ [1] | tojson(indent=18446744073709551615) }}".into(), "indent"),
            (nested(2500, "[ns.x]", "{{ ns.x | tojson }}"), "64 deep"),
            (nested(2500, "[ns.x]", "{{ raise_exception('taken apart') }}"), "taken apart"),
            (nested(2500, "{'a': ns.x}", "{{ raise_exception('taken apart') }}"), "taken apart"),
            (nested(2500, "ns.x[0:]", "{{ ns.x | list }}{{ raise_exception('taken apart') }}"), "taken apart"),
            (
                nested(2500, "ns.x | map('string')", "{{ ns.x | list }}{{ raise_exception('taken apart') }}"),
                "taken apart",
            ),
            (
                "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{{ x.count('y') }}{% endfor %}".into(),
                "may never end",
            ),
            ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}".into(), "writes too much"),
            ("x".repeat(template::LONGEST + 1), "has 65537 bytes"),
        ] {
            let error =
                format!("{:#}", render(&template, &[message("user", &"a".repeat(600))], true).expect_err(&template));
            assert!(error.contains(word) && error.len() < 1000, "{template}: {error}");
        }
        // A long conversation has a budget for more steps, which can build values too deep for a thread's default
        // stack.
        for step in ["[ns.x]", "{'a': ns.x}"] {
            let template = nested(99_999, step, "{{ raise_exception('taken apart') }}");
            let error = format!("{:#}", render(&template, &[message("user", &"a".repeat(8 << 20))], true).unwrap_err());
            assert!(error.contains("taken apart"), "{error}");
        }
        let error = render("{{ raise_exception('x' * 100000) }}", &[], true).unwrap_err();
        assert!(format!("{error:#}").len() < 1000);
    }

    #[test]
    fn a_long_conversation_is_not_an_error() {
        let template = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}";
        let messages: Vec<Message> =
            (0..5000).map(|i| message(["user", "assistant"][i % 2], &"word ".repeat(20))).collect();
        assert!(render(template, &messages, true).unwrap().len() > 500_000);
        let long = [message("user", &"x".repeat(8 << 20))];
        assert!(render(template, &long, true).unwrap().len() > 8 << 20);
    }

    #[test]
    fn templates_cannot_read_files() {
        for tag in
            ["include 'Cargo.toml'", "import 'Cargo.toml' as x", "from 'Cargo.toml' import x", "extends 'Cargo.toml'"]
        {
            let error = format!("{:#}", render(&format!("{{% {tag} %}}"), &[], false).expect_err(tag));
            assert!(error.contains("Cargo.toml") && error.contains("template not found"), "{tag}: {error}");
        }
    }

    #[test]
    fn template_errors_are_reported() {
        for (template, word) in [
            ("{{ raise_exception('no system message') }}", "no system message"),
            ("{% include 'Cargo.toml' %}", "filled in"),
            ("{% if %}", "cannot be read"),
            ("{{ messages.nothing() }}", "nothing"),
            ("{{ '%s' % 'x' }}", "Python's formatting with % is not supported: write ~"),
        ] {
            let error = format!("{:#}", render(template, &[], false).expect_err(template));
            assert!(error.contains(word), "{template}: {error}");
        }
    }
}
