//! The state of graph and process in Prometheus' text format, sampled at scrape time.

use std::fmt::Write;

use preceptor_actors::{Ack, EdgeReport, GraphReport, RoleShare, StageReport};

use super::catalogue;
use crate::util::device::Memory;
use crate::util::process::Usage;

/// Text of metric families.
#[derive(Default)]
struct Page(String);

impl Page {
    /// Appends one metric family. Without samples it is omitted.
    fn family(&mut self, name: &str, samples: impl IntoIterator<Item = (String, f64)>) {
        let mut samples = samples.into_iter().peekable();
        let (Some(metric), Some(_)) = (catalogue::find(name), samples.peek()) else { return };
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {}\n# TYPE {name} {}", metric.help, metric.kind.name());
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }

    fn single(&mut self, name: &str, value: f64) {
        self.family(name, [(String::new(), value)]);
    }
}

/// Resource usage of the process.
pub struct Process {
    /// CPU time, memory, threads and descriptors. `None` if the system does not report them.
    pub usage: Option<Usage>,
    /// Memory usage of the policy's GPU, if it is on one.
    pub card: Option<Memory>,
}

/// Renders the metrics of stages, edges, weights and the process. `shares` are the time shares of the last minute, and
/// `limiting` is the bottleneck role.
pub fn render(
    report: Option<&GraphReport>,
    shares: &[RoleShare],
    limiting: Option<&str>,
    acks: &[Ack],
    process: Process,
) -> String {
    let mut page = Page::default();
    if let Some(report) = report {
        stages(&mut page, report);
        edges(&mut page, report);
    }
    roles(&mut page, shares, limiting);
    weights(&mut page, acks);
    if let Some(usage) = process.usage {
        page.single("process_cpu_seconds_total", usage.cpu_s);
        page.single("process_resident_memory_bytes", usage.resident_bytes as f64);
        page.single("process_open_fds", usage.open_fds as f64);
        page.single("process_threads", usage.threads as f64);
        page.single("process_start_time_seconds", usage.started_s);
    }
    if let Some(Memory { device, used_bytes, free_bytes }) = process.card {
        for (name, bytes) in
            [("preceptor_device_memory_used_bytes", used_bytes), ("preceptor_device_memory_free_bytes", free_bytes)]
        {
            page.family(name, [(format!("{{device=\"{device}\"}}"), bytes as f64)]);
        }
    }
    page.0
}

fn stages(page: &mut Page, report: &GraphReport) {
    let mut family = |name, value: fn(&StageReport) -> f64| {
        let labels = |stage: &StageReport| format!("{{stage=\"{}\",role=\"{}\"}}", stage.name, stage.role);
        page.family(name, report.stages.iter().map(|stage| (labels(stage), value(stage))));
    };
    family("preceptor_stage_busy_seconds_total", |s| s.busy_s);
    family("preceptor_stage_idle_seconds_total", |s| s.idle_s);
    family("preceptor_stage_blocked_seconds_total", |s| s.blocked_s);
    family("preceptor_stage_admission_seconds_total", |s| s.admission_s);
    family("preceptor_stage_items_total", |s| s.items_in.max(s.items_out) as f64);
    page.single("preceptor_stalled_seconds", report.stalled.as_ref().map_or(0.0, |stalled| stalled.for_s));
    let stalled = report.stalled.iter().map(|stalled| (format!("{{stage=\"{}\"}}", stalled.stage), 1.0));
    page.family("preceptor_stalled", stalled);
    page.single("preceptor_restarts_total", f64::from(report.restarts));
}

fn edges(page: &mut Page, report: &GraphReport) {
    let mut family = |name, value: fn(&EdgeReport) -> f64| {
        page.family(name, report.edges.iter().map(|edge| (format!("{{edge=\"{}\"}}", edge.name), value(edge))));
    };
    family("preceptor_edge_items_total", |e| e.items as f64);
    family("preceptor_edge_send_blocked_seconds_total", |e| e.send_blocked_s);
    family("preceptor_edge_wait_seconds_total", |e| e.waited_s);
    family("preceptor_edge_depth", |e| e.depth as f64);
    family("preceptor_edge_capacity", |e| e.capacity as f64);
    family("preceptor_edge_age_seconds", |e| e.age_s);
}

fn roles(page: &mut Page, shares: &[RoleShare], limiting: Option<&str>) {
    let states = shares.iter().flat_map(|share| {
        let parts =
            [("busy", share.busy), ("input", share.idle), ("output", share.blocked), ("admission", share.admission)];
        parts.map(|(state, value)| (format!("{{role=\"{}\",state=\"{state}\"}}", share.role), value))
    });
    page.family("preceptor_role_share", states);
    let limits = |role: &str| if limiting == Some(role) { 1.0 } else { 0.0 };
    let bottleneck = shares.iter().map(|share| (format!("{{role=\"{}\"}}", share.role), limits(&share.role)));
    page.family("preceptor_bottleneck", bottleneck);
}

fn weights(page: &mut Page, acks: &[Ack]) {
    let mut family = |name, value: fn(&Ack) -> f64| {
        page.family(name, acks.iter().map(|ack| (format!("{{worker=\"{}\"}}", ack.reader), value(ack))));
    };
    family("preceptor_weight_lag", |ack| ack.lag as f64);
    family("preceptor_weight_fingerprint_ok", |ack| f64::from(u8::from(ack.fingerprint_matches)));
}
