//! The live page: one self-contained HTML file.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{Html, IntoResponse};

/// Content security policy: only inline styles and scripts, and requests to this node only.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The assembled page.
static PAGE: LazyLock<String> = LazyLock::new(|| {
    // The order matters: the first script sets strict mode for all, the last one starts the page.
    let scripts = [
        include_str!("page/format.js"),
        include_str!("page/dom.js"),
        include_str!("page/client.js"),
        include_str!("page/theme.js"),
        include_str!("page/trend.js"),
        include_str!("page/header.js"),
        include_str!("page/diagnosis.js"),
        include_str!("page/layout.js"),
        include_str!("page/states.js"),
        include_str!("page/actor.js"),
        include_str!("page/graph.js"),
        include_str!("page/timeline.js"),
        include_str!("page/tables.js"),
        include_str!("page/servers.js"),
        include_str!("page/chart.js"),
        include_str!("page/curves.js"),
        include_str!("page/completion.js"),
        include_str!("page/samples.js"),
        include_str!("page/page.js"),
    ];
    let script = format!("<script>{}</script>", scripts.join("\n"));
    let style = concat!("<style>", include_str!("page/style.css"), "</style>");
    include_str!("page/index.html").replace("<!--style-->", style).replace("<!--script-->", &script)
});

/// Answers with the page.
pub(super) async fn page() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version of the program may serve a different page at the same address.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, Html(PAGE.as_str()))
}
