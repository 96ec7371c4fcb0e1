//! The state of the graph in Prometheus' text format, made at scrape time.

use std::fmt::Write;

use preceptor_actors::{Ack, GraphReport};

/// One family of samples.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: Vec<(String, f64)>,
}

/// Renders stages, edges, weights and memory.
pub fn render(report: Option<&GraphReport>, acks: &[Ack], resident_bytes: Option<u64>) -> String {
    let mut families = Vec::new();
    if let Some(report) = report {
        families.extend(stages(report));
        families.extend(edges(report));
    }
    families.extend(weights(acks));
    if let Some(bytes) = resident_bytes {
        families.push(Family {
            name: "preceptor_process_resident_memory_bytes",
            kind: "gauge",
            help: "Resident memory of the process.",
            samples: vec![(String::new(), bytes as f64)],
        });
    }
    let mut text = String::new();
    for family in families.iter().filter(|family| !family.samples.is_empty()) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {} {}\n# TYPE {} {}", family.name, family.help, family.name, family.kind);
        for (labels, value) in &family.samples {
            let _ = writeln!(text, "{}{labels} {value}", family.name);
        }
    }
    text
}

fn stages(report: &GraphReport) -> Vec<Family> {
    let family = |name, kind, help, value: &dyn Fn(&preceptor_actors::StageReport) -> f64| Family {
        name,
        kind,
        help,
        samples: report
            .stages
            .iter()
            .map(|stage| (format!("{{stage=\"{}\",role=\"{}\"}}", stage.name, stage.role), value(stage)))
            .collect(),
    };
    let roles = preceptor_actors::report::roles(&report.stages);
    let limiting = report.bottleneck.as_ref().map(|bottleneck| bottleneck.role.as_str());
    vec![
        family("preceptor_stage_busy_seconds_total", "counter", "Time a stage spent working.", &|s| s.busy_s),
        family("preceptor_stage_idle_seconds_total", "counter", "Time a stage waited for input.", &|s| s.idle_s),
        family(
            "preceptor_stage_blocked_seconds_total",
            "counter",
            "Time a stage waited for room in its output.",
            &|s| s.blocked_s,
        ),
        family(
            "preceptor_stage_admission_seconds_total",
            "counter",
            "Time a stage waited for the staleness bound to admit work.",
            &|s| s.admission_s,
        ),
        family("preceptor_stage_items_total", "counter", "Items a stage finished.", &|s| {
            s.items_in.max(s.items_out) as f64
        }),
        Family {
            name: "preceptor_bottleneck",
            kind: "gauge",
            help: "1 for the role that limits throughput now.",
            samples: roles
                .iter()
                .map(|role| (format!("{{role=\"{role}\"}}"), if limiting == Some(*role) { 1.0 } else { 0.0 }))
                .collect(),
        },
        Family {
            name: "preceptor_restarts_total",
            kind: "counter",
            help: "Restarts of the whole graph after a failure.",
            samples: vec![(String::new(), f64::from(report.restarts))],
        },
    ]
}

fn edges(report: &GraphReport) -> Vec<Family> {
    let family = |name, kind, help, value: &dyn Fn(&preceptor_actors::EdgeReport) -> f64| Family {
        name,
        kind,
        help,
        samples: report.edges.iter().map(|edge| (format!("{{edge=\"{}\"}}", edge.name), value(edge))).collect(),
    };
    vec![
        family("preceptor_edge_items_total", "counter", "Items that passed an edge.", &|e| e.items as f64),
        family(
            "preceptor_edge_send_blocked_seconds_total",
            "counter",
            "Time senders waited for room on an edge.",
            &|e| e.send_blocked_s,
        ),
        family("preceptor_edge_depth", "gauge", "Items waiting on an edge.", &|e| e.depth as f64),
        family("preceptor_edge_capacity", "gauge", "Most items an edge holds.", &|e| e.capacity as f64),
    ]
}

fn weights(acks: &[Ack]) -> Vec<Family> {
    let family = |name, help, value: &dyn Fn(&Ack) -> f64| Family {
        name,
        kind: "gauge",
        help,
        samples: acks.iter().map(|ack| (format!("{{worker=\"{}\"}}", ack.reader), value(ack))).collect(),
    };
    vec![
        family("preceptor_weight_lag", "Versions that a rollout worker is behind.", &|a| a.lag as f64),
        family("preceptor_weight_fingerprint_ok", "1 when a worker runs the weights that its version names.", &|a| {
            if a.fingerprint_matches { 1.0 } else { 0.0 }
        }),
    ]
}
