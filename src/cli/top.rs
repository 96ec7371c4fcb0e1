//! `preceptor top`.

use anyhow::{Context, Result};
use clap::Args;

use crate::observe::top::{RemoteNode, top};

/// Arguments of `preceptor top`.
#[derive(Debug, Args)]
pub struct Top {
    /// Address of the node's HTTP server.
    #[arg(default_value = "http://127.0.0.1:9464", value_name = "URL")]
    url: String,
    /// Environment variable that holds the node's bearer token, if it requires one (its serve.token_env).
    #[arg(long, value_name = "NAME")]
    token_env: Option<String>,
    /// Prints one snapshot as text and exits.
    #[arg(long)]
    once: bool,
}

impl Top {
    /// Shows the node until the user quits, or once.
    ///
    /// # Errors
    /// If the token's environment variable is not set; otherwise see [`top`].
    pub fn run(self) -> Result<()> {
        let token = self.token_env.map(|name| std::env::var(&name).with_context(|| format!("{name} is not set")));
        top(RemoteNode::at(&self.url, token.transpose()?)?, self.once)
    }
}
