//! `preceptor top`: the live view of a node in a terminal. It polls the same endpoints as the page.

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

/// Pause between two polls of the node.
const PAUSE: Duration = Duration::from_secs(1);

/// Maximum size of a response in bytes. A node's history has some hundred kilobytes.
const MAX_RESPONSE: usize = 8 << 20;

/// The last state received from a node.
#[derive(Default)]
struct NodeState {
    status: Value,
    history: Value,
    /// The error of the last poll, if it failed.
    error: Option<String>,
}

/// The address and token of a remote node.
pub struct RemoteNode {
    url: Url,
    token: Option<String>,
}

impl RemoteNode {
    /// Returns the node at `url`, such as `http://127.0.0.1:9464`; `http://` may be omitted. `token` is its bearer
    /// token.
    ///
    /// # Errors
    /// If the URL is invalid, does not use HTTP, or contains a user name or password.
    pub fn at(url: &str, token: Option<String>) -> Result<Self> {
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let url = Url::parse(&full).with_context(|| format!("{url} is not a URL, such as http://127.0.0.1:9464"))?;
        ensure!(
            matches!(url.scheme(), "http" | "https") && url.has_host(),
            "{} is not the URL of a node, such as http://127.0.0.1:9464",
            http::shown(&url, |_| false)
        );
        ensure!(
            url.username().is_empty() && url.password().is_none(),
            "the URL of {} contains a user name or a password; nodes use bearer tokens: name the environment variable that holds the token with --token-env",
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
            StatusCode::UNAUTHORIZED => {
                bail!("{} requires a bearer token; name its environment variable with --token-env", self.url)
            }
            StatusCode::MISDIRECTED_REQUEST => bail!(
                "{} does not accept that host name; use its IP address, or add the name to its serve.hosts",
                self.url
            ),
            status if status.is_redirection() => {
                let token = self.token.as_deref().unwrap_or_default().to_ascii_lowercase();
                let is_secret = |text: &str| !token.is_empty() && text.to_ascii_lowercase().contains(&token);
                bail!(
                    "{} redirects to {} ({status}); redirects are not followed, so that the bearer token is sent to the given address only; if the new address is right, use it instead",
                    self.url,
                    http::redirect_target(&answer, is_secret)
                )
            }
            status if !status.is_success() => bail!("{} answers {status}; is it a node?", self.url),
            _ => {}
        }
        let bytes = http::body(answer, MAX_RESPONSE)
            .await
            .with_context(|| format!("the response of {} is not a node's", self.url))?;
        serde_json::from_slice(&bytes).with_context(|| format!("the response of {} is not a node's", self.url))
    }

    async fn poll(&self, client: &reqwest::Client, before: &NodeState) -> Result<NodeState> {
        let status = self.ask(client, "status").await?;
        let new = status["last_step"] != before.status["last_step"] || before.history.is_null();
        let history = if new { self.ask(client, "history").await? } else { before.history.clone() };
        Ok(NodeState { status, history, error: None })
    }
}

/// Shows the node until the user presses `q`. With `once`, or if standard output is not a terminal, prints one snapshot
/// as text.
///
/// # Errors
/// If the node does not answer the first request, or the terminal cannot be used.
pub fn top(node: RemoteNode, once: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = http::builder().timeout(Duration::from_secs(5)).build()?;
    let first = runtime.block_on(node.poll(&client, &NodeState::default()))?;
    if once || !std::io::stdout().is_terminal() {
        return out!("{}", view::text(&first.status, &first.history, 100).trim_end());
    }
    let (sender, states) = bounded(1);
    std::thread::spawn(move || {
        let mut before = NodeState::default();
        loop {
            match runtime.block_on(node.poll(&client, &before)) {
                Ok(state) => before = state,
                Err(error) => before.error = Some(format!("{error:#}")),
            }
            let NodeState { status, history, error } = &before;
            let now = NodeState { status: status.clone(), history: history.clone(), error: error.clone() };
            if sender.send(now).is_err() {
                return;
            }
            std::thread::sleep(PAUSE);
        }
    });
    let terminal = ratatui::try_init_with_options(TerminalOptions { viewport: Viewport::Fullscreen })
        .context("this terminal does not support the live view; use --once")?;
    let shown = show(terminal, first, &states);
    ratatui::restore();
    shown
}

fn show(mut terminal: ratatui::DefaultTerminal, first: NodeState, states: &Receiver<NodeState>) -> Result<()> {
    let (mut now, mut scroll) = (first, 0u16);
    loop {
        match states.try_recv() {
            Ok(next) => now = next,
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => bail!("internal error: the polling thread has stopped"),
        }
        terminal.draw(|frame| view::draw(frame, &now.status, &now.history, now.error.as_deref(), scroll))?;
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
