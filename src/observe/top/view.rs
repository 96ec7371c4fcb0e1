//! Rendering of a node's state: its bottleneck, actors, edges and training curves.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Gauge, Paragraph, Row, Sparkline, Table, Widget, Wrap};
use serde_json::Value;

/// Metrics with a curve: title, and name in `metrics.jsonl`.
const CURVES: &[(&str, &str)] = &[
    ("score", "score/mean"),
    ("margin", "preference/margin"),
    ("reward", "reward/mean"),
    ("win rate", "win_rate"),
    ("KL", "kl/mean"),
    ("length", "length/mean"),
    ("entropy", "entropy/mean"),
    ("tokens/s", "rate/trained_tokens"),
    ("gradient", "gradient/norm"),
    ("staleness", "staleness/mean"),
];

/// Draws the view. `error` is the error of the last poll, `scroll` the number of actors above the first one shown.
pub(super) fn draw(frame: &mut Frame<'_>, status: &Value, history: &Value, error: Option<&str>, scroll: u16) {
    let area = frame.area();
    render(area, frame.buffer_mut(), status, history, error, scroll);
}

/// Returns the view as text, `width` columns wide.
pub(super) fn text(status: &Value, history: &Value, width: u16) -> String {
    let stages = status["graph"]["stages"].as_array().map_or(0, Vec::len) as u16;
    let area = Rect::new(0, 0, width, 30 + stages + servers_height(status));
    let mut buffer = Buffer::empty(area);
    render(area, &mut buffer, status, history, None, 0);
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned() + "\n";
    let lines: String = (0..area.height).map(line).collect();
    lines.trim_end().to_owned() + "\n"
}

fn render(area: Rect, buffer: &mut Buffer, status: &Value, history: &Value, error: Option<&str>, scroll: u16) {
    let limits = limits(status);
    let actors = actors(status);
    let edges = status["graph"]["edges"].as_array().map_or(0, Vec::len) as u16;
    let rows = actors.len() as u16 + 3;
    let [head, what, middle, below, curves, foot] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(height(&limits, area.width) + 2),
        Constraint::Max(rows.max(edges + 3)),
        Constraint::Max(servers_height(status)),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(area);
    header(head, buffer, status);
    let title = if status["graph"]["stalled"].is_null() { " bottleneck " } else { " no progress " };
    Paragraph::new(limits).wrap(Wrap { trim: true }).block(Block::bordered().title(title)).render(what, buffer);
    let [left, right] = Layout::horizontal([Constraint::Percentage(62), Constraint::Percentage(38)]).areas(middle);
    let widths = [14, 10, 6, 6, 7, 7, 6].map(Constraint::Length);
    let titles = Row::new(["actor", "now", "works", "input", "output", "bound", "items"]).bold();
    let shown = actors.into_iter().skip(scroll.min(rows.saturating_sub(4)) as usize);
    Table::new(shown, widths).header(titles).block(Block::bordered().title(" actors ")).render(left, buffer);
    let widths = [11, 8, 9, 8].map(Constraint::Length);
    let titles = Row::new(["edge", "queue", "oldest", "items"]).bold();
    Table::new(queues(status), widths).header(titles).block(Block::bordered().title(" edges ")).render(right, buffer);
    servers(below, buffer, status);
    sparklines(curves, buffer, history);
    let foot_line = match error {
        Some(text) => Line::from(format!(" {text}; retrying")).reversed(),
        None => match waiting(status) {
            Some(text) => Line::from(format!(" {text}")).reversed(),
            None => Line::from(format!(" {}   q quits, arrows scroll", faults(status))).dim(),
        },
    };
    foot_line.render(foot, buffer);
}

/// Returns the number of lines of `text` when it is wrapped within a border.
fn height(text: &Text<'_>, width: u16) -> u16 {
    let inner = usize::from(width.saturating_sub(2)).max(1);
    text.lines.iter().map(|line| line.width().div_ceil(inner).max(1) as u16).sum()
}

fn header(area: Rect, buffer: &mut Buffer, status: &Value) {
    let [line, bar] = Layout::vertical([Constraint::Length(1), Constraint::Length(1)]).areas(area);
    let plan = &status["plan"];
    let rates = &status["rates"];
    Line::from(vec![
        Span::from(format!(" {} ", word(&status["run"]))).bold(),
        Span::from(format!(
            " {}   {} {}   η {}   {:.0} tokens/s trained, {:.0} generated   {}",
            word(&status["phase"]),
            word(&plan["mode"]),
            word(&plan["algorithm"]),
            plan["eta"],
            figure(&rates["trained_tokens_per_s"]),
            figure(&rates["generated_tokens_per_s"]),
            memory(&status["memory"]),
        )),
    ])
    .render(line, buffer);
    let (step, steps) = (status["last_step"]["step"].as_u64().unwrap_or(0), plan["steps"].as_u64().unwrap_or(0));
    let ratio = (step as f64 / steps.max(1) as f64).clamp(0.0, 1.0);
    let per_step = figure(&status["last_step"]["time/run_seconds"]) / step.max(1) as f64;
    let left =
        if step > 0 { format!(", {} left", time(per_step * steps.saturating_sub(step) as f64)) } else { String::new() };
    Gauge::default().ratio(ratio).label(format!("step {step} of {steps}{left}")).render(bar, buffer);
}

/// Returns the text of the diagnosis with the proposed settings, or of the stall.
fn limits(status: &Value) -> Text<'static> {
    let stalled = &status["graph"]["stalled"];
    if !stalled.is_null() {
        let (stage, seconds) = (word(&stalled["stage"]), figure(&stalled["for_s"]));
        return Text::from(format!("blocked in {stage} for {} ({})", time(seconds), word(&stalled["state"]))).bold();
    }
    let found = &status["diagnosis"];
    if found.is_null() {
        return Text::from("not known yet: the diagnosis needs some seconds of work");
    }
    let mut lines = vec![Line::from(word(&found["headline"])).bold(), Line::from(word(&found["detail"])).dim()];
    if let Some(next) = found["next"].as_str() {
        lines.push(Line::from(format!(
            "without this bottleneck, throughput could be up to {:.1} times as high; then {next} would be the bottleneck",
            figure(&found["gain"])
        )));
    }
    for setting in found["settings"].as_array().into_iter().flatten() {
        let (key, now, attempt) = (word(&setting["key"]), word(&setting["now"]), word(&setting["try"]));
        lines.push(Line::from(vec![
            Span::from(format!("{key} = {now} → {attempt}")).add_modifier(Modifier::BOLD),
            Span::from(format!("   {}", word(&setting["why"]))),
        ]));
    }
    Text::from(lines)
}

fn actors(status: &Value) -> Vec<Row<'static>> {
    let roles = status["roles"].as_array().map_or(&[][..], Vec::as_slice);
    let limiting = status["diagnosis"]["role"].as_str();
    let row = |stage: &Value| {
        let role = &stage["role"];
        let share = roles.iter().find(|share| share["role"] == *role).unwrap_or(&Value::Null);
        let percent = |name: &str| share[name].as_f64().map_or("–".into(), |part| format!("{:.0} %", 100.0 * part));
        let now = match stage["state"].as_str().unwrap_or_default() {
            "input" => "← input",
            "output" => "→ output",
            "admission" => "| bound",
            "busy" => "works",
            other => other,
        };
        let items = stage["items_in"].as_u64().max(stage["items_out"].as_u64()).unwrap_or(0);
        let row = Row::new([
            word(&stage["name"]),
            now.to_owned(),
            percent("busy"),
            percent("idle"),
            percent("blocked"),
            percent("admission"),
            items.to_string(),
        ]);
        if limiting.is_some() && role.as_str() == limiting { row.style(Style::new().bold().reversed()) } else { row }
    };
    status["graph"]["stages"].as_array().into_iter().flatten().map(row).collect()
}

fn queues(status: &Value) -> Vec<Row<'static>> {
    let row = |edge: &Value| {
        let queue = format!("{} of {}", edge["depth"], edge["capacity"]);
        Row::new([word(&edge["name"]), queue, time(figure(&edge["age_s"])), edge["items"].to_string()])
    };
    status["graph"]["edges"].as_array().into_iter().flatten().map(row).collect()
}

/// Returns the height of the table of rollout servers, 0 without servers.
fn servers_height(status: &Value) -> u16 {
    status["servers"].as_array().filter(|list| !list.is_empty()).map_or(0, |list| list.len() as u16 + 3)
}

/// Draws the table of rollout servers. The reason why a server gets no prompts takes the place of its figures.
fn servers(area: Rect, buffer: &mut Buffer, status: &Value) {
    if area.height == 0 {
        return;
    }
    let row = |server: &Value| {
        let optional = |key: &str, words: &dyn Fn(f64) -> String| server[key].as_f64().map_or("–".into(), words);
        let why = word(&server["why"]);
        let ready = server["condition"] == "ready";
        let row = Row::new([
            word(&server["url"]),
            word(&server["condition"]),
            optional("version", &|version| format!("{version:.0}")),
            optional("under_way", &|count| format!("{count:.0}")),
            format!("{:.0}", figure(&server["tokens_per_s"])),
            optional("canary", &|share| format!("{share:.2}")),
            optional("hand_over_s", &time),
            why,
        ]);
        if ready { row } else { row.style(Style::new().bold().reversed()) }
    };
    let rows = status["servers"].as_array().into_iter().flatten().map(row);
    let [url, rest @ ..] = [28, 9, 8, 10, 9, 7, 10].map(Constraint::Length);
    let widths = std::iter::once(url).chain(rest).chain([Constraint::Fill(1)]);
    let workers = status["plan"]["engine"] == "workers";
    let titles = [
        if workers { "worker" } else { "server" },
        "state",
        "version",
        "under way",
        "tokens/s",
        "canary",
        "hand-over",
        "",
    ];
    let block = Block::bordered().title(if workers { " workers " } else { " rollout servers " });
    Widget::render(Table::new(rows, widths).header(Row::new(titles).bold()).block(block), area, buffer);
}

fn sparklines(area: Rect, buffer: &mut Buffer, history: &Value) {
    let columns = history["columns"].as_array().map_or(&[][..], Vec::as_slice);
    let rows = history["rows"].as_array().map_or(&[][..], Vec::as_slice);
    let curve = |(title, name): &(&'static str, &str)| {
        let column = columns.iter().position(|column| column == name)?;
        let curve: Vec<f64> = rows.iter().filter_map(|row| row[column].as_f64()).collect();
        (!curve.is_empty()).then_some((*title, curve))
    };
    let curves: Vec<(&str, Vec<f64>)> = CURVES.iter().filter_map(curve).collect();
    let across = if area.width >= 90 { 4 } else { 2 };
    let high = (area.height / curves.len().div_ceil(across).max(1) as u16).clamp(3, 6);
    for (i, (title, curve)) in curves.iter().enumerate() {
        let (x, y) = ((i % across) as u16, (i / across) as u16);
        let width = area.width / across as u16;
        let place = Rect::new(area.x + x * width, area.y + y * high, width, high).intersection(area);
        if place.height < 3 {
            continue;
        }
        let block = Block::bordered().title(format!(" {title} {} ", short(curve[curve.len() - 1])));
        let curve = squeeze(curve, usize::from(width.saturating_sub(2)));
        let (low, top) = curve.iter().fold((f64::MAX, f64::MIN), |(low, top), y| (low.min(*y), top.max(*y)));
        let range = if top > low { top - low } else { 1.0 };
        let heights = curve.iter().map(|y| (1.0 + 63.0 * (y - low) / range) as u64);
        Sparkline::default().data(heights).max(64).block(block).render(place, buffer);
    }
}

/// Averages neighbouring values so that at most `width` remain.
fn squeeze(curve: &[f64], width: usize) -> Vec<f64> {
    let each = curve.len().div_ceil(width.max(1)).max(1);
    curve.chunks(each).map(|part| part.iter().sum::<f64>() / part.len() as f64).collect()
}

/// Returns a text about the judge that the run waits for, with the cause.
fn waiting(status: &Value) -> Option<String> {
    let away = status["judges_away"].get(0)?;
    let seconds = time(figure(&away["seconds"]));
    Some(format!("waiting for the judge at {}, unavailable for {seconds}: {}", word(&away["url"]), word(&away["why"])))
}

fn faults(status: &Value) -> String {
    let names = [
        ("restarts", "restarts"),
        ("nonfinite_steps", "steps not finite"),
        ("masked_groups", "groups masked"),
        ("disk_errors", "disk errors"),
    ];
    let count = |(key, name): &(&str, &str)| {
        status["faults"][*key].as_u64().filter(|count| *count > 0).map(|count| format!("{count} {name}"))
    };
    let counts: Vec<String> = names.iter().filter_map(count).collect();
    let faults = if counts.is_empty() { "no faults".to_owned() } else { counts.join(", ") };
    match status["checkpoint"]["age_s"].as_f64() {
        Some(age) => format!("{faults}   checkpoint {} ago", time(age)),
        None => format!("{faults}   no checkpoint yet"),
    }
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn figure(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// Returns the memory usage of the process and of its GPUs as text.
fn memory(memory: &Value) -> String {
    let cards = memory["device"].as_array().into_iter().flatten();
    let cards = cards.map(|card| format!("   {} {}", word(&card["device"]), bytes(figure(&card["used_bytes"]))));
    format!("{}{}", bytes(figure(&memory["resident_bytes"])), cards.collect::<String>())
}

fn bytes(bytes: f64) -> String {
    format!("{:.2} GiB", bytes / f64::from(1 << 30))
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        a if a == 0.0 || (0.01..10_000.0).contains(&a) => format!("{value:.3}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_view_shows_rollout_servers_and_why_one_gets_no_prompts() {
        let status = json!({ "servers": [
            { "url": "http://10.0.0.1:8000", "condition": "ready", "why": "", "version": 12, "under_way": 48,
              "tokens_per_s": 3210.4, "canary": 0.98, "hand_over_s": 1.25 },
            { "url": "http://10.0.0.2:8000", "condition": "down", "why": "connection refused", "version": null,
              "under_way": 0, "tokens_per_s": 0.0, "canary": null, "hand_over_s": null },
        ] });
        let shown = text(&status, &json!({}), 130);
        for words in ["rollout servers", "http://10.0.0.1:8000", "3210", "0.98", "1.2 s", "down", "connection refused"]
        {
            assert!(shown.contains(words), "{words} is not in\n{shown}");
        }
        assert!(!text(&json!({}), &json!({}), 130).contains("rollout servers"));
    }

    #[test]
    fn the_view_shows_the_bottleneck_the_gain_and_the_settings() {
        let status = json!({
            "run": "quickstart", "phase": "training",
            "plan": { "mode": "direct", "algorithm": "rloo", "eta": 1, "steps": 20 },
            "last_step": { "step": 5, "time/run_seconds": 10.0 },
            "graph": {
                "stages": [
                    { "name": "rollout-0", "role": "rollout", "state": "output", "items_in": 9, "items_out": 8 },
                    { "name": "label-0", "role": "label", "state": "busy", "items_in": 7, "items_out": 7 },
                ],
                "edges": [{ "name": "groups", "depth": 2, "capacity": 2, "age_s": 3.25, "items": 8 }],
                "stalled": null,
            },
            "roles": [{ "role": "label", "busy": 0.97, "idle": 0.03, "blocked": 0.0, "admission": 0.0 }],
            "diagnosis": {
                "role": "label", "headline": "label is the bottleneck: it works 97 % of the time", "detail": "rollout waits",
                "gain": 2.4, "next": "learn",
                "settings": [{ "key": "labeler.workers", "now": "1", "try": "2", "why": "another one" }],
            },
            "faults": { "restarts": 1 },
            "memory": { "resident_bytes": 1u64 << 30, "device": [{ "device": "cuda:0", "used_bytes": 3u64 << 30 }] },
        });
        let history = json!({ "columns": ["step", "score/mean"], "rows": [[1, 0.5], [2, 0.75]] });
        let shown = text(&status, &history, 120);
        for words in [
            "quickstart",
            "step 5 of 20, 30 s left",
            "label is the bottleneck",
            "2.4 times",
            "learn would be the bottleneck",
            "labeler.workers = 1 → 2",
            "another one",
            "→ output",
            "97 %",
            "2 of 2",
            "3.2 s",
            "score 0.750",
            "1 restarts",
            "1.00 GiB   cuda:0 3.00 GiB",
        ] {
            assert!(shown.contains(words), "{words} is not in\n{shown}");
        }
        assert!(!shown.contains("KL"), "a metric that the run does not have\n{shown}");
        let mut waits = status.clone();
        waits["judges_away"] = json!([{ "url": "http://j/v1", "seconds": 130.0, "why": "refused the key (401)" }]);
        assert!(
            text(&waits, &history, 100)
                .contains("waiting for the judge at http://j/v1, unavailable for 2 min: refused the key")
        );
        let mut stalled = status;
        stalled["graph"]["stalled"] = json!({ "stage": "label-0", "state": "busy", "for_s": 130.0 });
        assert!(text(&stalled, &history, 100).contains("blocked in label-0 for 2 min (busy)"));
    }
}
