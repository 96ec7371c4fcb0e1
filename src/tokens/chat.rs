//! Chat templates, as Hugging Face models carry them: Jinja, in minijinja, without file access.

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Fills `template` in.
pub(super) fn render(template: &str, messages: &[Message], answer: bool, bos: &str, eos: &str) -> Result<String> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |text: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    environment.add_template("chat", template).context("the model's chat template cannot be read")?;
    let messages: Vec<Value> = messages
        .iter()
        .map(|message| context! { role => message.role.as_str(), content => message.content.as_str() })
        .collect();
    environment
        .get_template("chat")
        .and_then(|chat| {
            chat.render(context! { messages, add_generation_prompt => answer, bos_token => bos, eos_token => eos })
        })
        .context("the model's chat template cannot be filled in")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    #[test]
    fn renders_python_flavoured_templates() {
        let template = "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n    {%- else %}\n{{ m.content | trim }}{{ eos_token }}\n    {%- endif %}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        let messages = [message("user", " a "), message("assistant", "b"), message("user", "c")];
        // Worked out by hand from Jinja's rules for trim_blocks and lstrip_blocks.
        assert_eq!(render(template, &messages, true, "<s>", "</s>").unwrap(), "<s>[a]b</s>[c]>");
    }

    #[test]
    fn a_template_may_refuse() {
        let error = render("{{ raise_exception('no system message') }}", &[], false, "", "").unwrap_err();
        assert!(format!("{error:#}").contains("no system message"), "{error:#}");
        assert!(render("{% include 'Cargo.toml' %}", &[], false, "", "").is_err());
    }
}
