//! `preceptor top`: the live page for a terminal. Asks a node as the page does, and draws what it says.

mod view;

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use crossbeam::channel::{Receiver, TryRecvError, bounded};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::{TerminalOptions, Viewport};
use reqwest::StatusCode;
use serde_json::Value;
use url::Url;

use crate::out;
use crate::util::http;

/// Between two questions to the node.
const PAUSE: Duration = Duration::from_secs(1);

/// Most bytes of an answer: a node's history is some hundred kilobytes.
const MOST: usize = 8 << 20;

/// What a node last said.
#[derive(Default)]
struct Said {
    status: Value,
    history: Value,
    /// Why it does not answer, if it does not.
    silence: Option<String>,
}

/// Where the node is, and how to ask it.
pub struct RemoteNode {
    url: Url,
    token: Option<String>,
}

impl RemoteNode {
    /// The node at `url`, such as `http://127.0.0.1:9464`; `http://` may be left out. `token` is its bearer token.
    ///
    /// # Errors
    /// An address that is not valid, is not of HTTP, or has a user name or password in it.
    pub fn at(url: &str, token: Option<String>) -> Result<Self> {
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let url = Url::parse(&full).with_context(|| format!("{url} is no address, such as http://127.0.0.1:9464"))?;
        ensure!(
            matches!(url.scheme(), "http" | "https") && url.has_host(),
            "{} is no address of a node, such as http://127.0.0.1:9464",
            http::shown(&url, |_| false)
        );
        ensure!(
            url.username().is_empty() && url.password().is_none(),
            "the address of {} has a user name or a password in it; a node asks for a bearer token: name the environment variable that holds it by --token-env",
            http::shown(&url, |_| false)
        );
        Ok(Self { url, token })
    }

    async fn ask(&self, client: &reqwest::Client, path: &str) -> Result<Value> {
        let mut request = client.get(self.url.join(path)?);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.with_context(|| format!("{} does not answer", self.url))?;
        match answer.status() {
            StatusCode::UNAUTHORIZED => bail!("{} asks for a bearer token; name its variable by --token-env", self.url),
            StatusCode::MISDIRECTED_REQUEST => bail!(
                "{} does not answer to that name; ask it by its IP address, or add the name to its serve.hosts",
                self.url
            ),
            status if status.is_redirection() => {
                let token = self.token.as_deref().unwrap_or_default().to_ascii_lowercase();
                let is_secret = |text: &str| !token.is_empty() && text.to_ascii_lowercase().contains(&token);
                bail!(
                    "{} redirects to {} ({status}); redirects are not followed, so that the bearer token stays with the address that was given; if that address is right, give it instead",
                    self.url,
                    http::redirect_target(&answer, is_secret)
                )
            }
            status if !status.is_success() => bail!("{} answers {status}; is it a node?", self.url),
            _ => {}
        }
        let bytes =
            http::body(answer, MOST).await.with_context(|| format!("{} does not answer as a node does", self.url))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} does not answer as a node does", self.url))
    }

    async fn look(&self, client: &reqwest::Client, before: &Said) -> Result<Said> {
        let status = self.ask(client, "status").await?;
        let new = status["last_step"] != before.status["last_step"] || before.history.is_null();
        let history = if new { self.ask(client, "history").await? } else { before.history.clone() };
        Ok(Said { status, history, silence: None })
    }
}

/// Shows the node until `q`; one picture as text if `once`, or where there is no terminal.
///
/// # Errors
/// A node that does not answer the first time; a terminal that cannot be used.
pub fn top(node: RemoteNode, once: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = http::builder().timeout(Duration::from_secs(5)).build()?;
    let first = runtime.block_on(node.look(&client, &Said::default()))?;
    if once || !std::io::stdout().is_terminal() {
        return out!("{}", view::text(&first.status, &first.history, 100).trim_end());
    }
    let (sender, said) = bounded(1);
    std::thread::spawn(move || {
        let mut before = Said::default();
        loop {
            match runtime.block_on(node.look(&client, &before)) {
                Ok(said) => before = said,
                Err(error) => before.silence = Some(format!("{error:#}")),
            }
            let Said { status, history, silence } = &before;
            let now = Said { status: status.clone(), history: history.clone(), silence: silence.clone() };
            if sender.send(now).is_err() {
                return;
            }
            std::thread::sleep(PAUSE);
        }
    });
    let terminal = ratatui::try_init_with_options(TerminalOptions { viewport: Viewport::Fullscreen })
        .context("this terminal cannot be drawn on; use --once")?;
    let shown = show(terminal, first, &said);
    ratatui::restore();
    shown
}

fn show(mut terminal: ratatui::DefaultTerminal, first: Said, said: &Receiver<Said>) -> Result<()> {
    let (mut now, mut scroll) = (first, 0u16);
    loop {
        match said.try_recv() {
            Ok(next) => now = next,
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => bail!("nobody asks the node any more; this is a fault of the program"),
        }
        terminal.draw(|frame| view::draw(frame, &now.status, &now.history, now.silence.as_deref(), scroll))?;
        if !event::poll(Duration::from_millis(200))? {
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        if key.kind == KeyEventKind::Release {
            continue;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
            KeyCode::Down | KeyCode::Char('j') => scroll = scroll.saturating_add(1),
            KeyCode::Up | KeyCode::Char('k') => scroll = scroll.saturating_sub(1),
            _ => {}
        }
    }
}
