//! OpenTelemetry traces: one for each prompt group, from its admission to its gradient, with a span for each stage that had
//! it. Built with the feature `otel`; the collector is named by `OTEL_EXPORTER_OTLP_ENDPOINT`, as OpenTelemetry has it.

use std::collections::BTreeMap;

use preceptor_actors::{GraphReport, Span};

/// Groups whose spans are kept while they are under way.
#[cfg(feature = "otel")]
const MOST_OPEN: usize = 4096;

/// The variables that name a collector.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// Whether somebody named a collector.
pub fn is_wanted() -> bool {
    ENDPOINTS.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// Puts the spans of a graph's stages together, group by group.
#[derive(Debug, Default)]
pub struct Gather {
    incarnation: u64,
    /// End of the last span that was taken in.
    last_s: f64,
    open: BTreeMap<u64, Vec<Span>>,
}

impl Gather {
    /// Takes in what is new in a report; gives the groups that are trained, each with its spans.
    pub fn take(&mut self, report: &GraphReport, most_open: usize) -> Vec<Vec<Span>> {
        if report.incarnation != self.incarnation || report.uptime_s < self.last_s {
            *self = Self { incarnation: report.incarnation, ..Self::default() };
        }
        let mut done = Vec::new();
        let before = self.last_s;
        for span in report.timeline.iter().filter(|span| span.end_s > before) {
            self.last_s = self.last_s.max(span.end_s);
            let spans = self.open.entry(span.seq).or_default();
            spans.push(span.clone());
            if span.stage == "learn" {
                done.extend(self.open.remove(&span.seq));
            }
        }
        while self.open.len() > most_open {
            self.open.pop_first();
        }
        done
    }
}

#[cfg(feature = "otel")]
pub use export::Tracer;

#[cfg(feature = "otel")]
mod export {
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use anyhow::{Context, Result};
    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
    use opentelemetry::{InstrumentationScope, KeyValue};
    use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
    use preceptor_actors::{GraphReport, Span};

    use super::{Gather, MOST_OPEN};
    use crate::seed;

    /// Sends traces to a collector.
    pub struct Tracer {
        run: u64,
        gather: Gather,
        exporter: Arc<SpanExporter>,
    }

    impl Tracer {
        /// Of the run called `run`.
        ///
        /// # Errors
        /// An endpoint that is no address.
        pub fn start(run: &str) -> Result<Self> {
            let exporter = SpanExporter::builder().with_http().with_protocol(Protocol::HttpJson).build();
            let mut exporter = exporter.context("OTEL_EXPORTER_OTLP_ENDPOINT cannot be used")?;
            let resource = Resource::builder().with_service_name("preceptor");
            exporter.set_resource(&resource.with_attribute(KeyValue::new("preceptor.run", run.to_owned())).build());
            Ok(Self { run: seed::text(run), gather: Gather::default(), exporter: Arc::new(exporter) })
        }

        /// Sends what is done in a report; within a tokio runtime.
        pub fn see(&mut self, report: &GraphReport) {
            let now = SystemTime::now();
            let began = now.checked_sub(Duration::from_secs_f64(report.uptime_s)).unwrap_or(now);
            let done = self.gather.take(report, MOST_OPEN);
            let batch: Vec<SpanData> =
                done.iter().flat_map(|spans| trace(self.run, report.incarnation, began, spans)).collect();
            if batch.is_empty() {
                return;
            }
            let exporter = Arc::clone(&self.exporter);
            tokio::spawn(async move {
                if let Err(error) = exporter.export(batch).await {
                    tracing::warn!("traces were not taken by the collector: {error}");
                }
            });
        }
    }

    /// A group's spans below one for all of its time.
    fn trace(run: u64, incarnation: u64, began: SystemTime, spans: &[Span]) -> Vec<SpanData> {
        let seq = spans.first().map_or(0, |span| span.seq);
        let key = seed::mix(run ^ seed::mix(incarnation) ^ seed::mix(seq ^ 0x6f74_656c));
        let trace_id = TraceId::from((u128::from(key) << 64) | u128::from(seed::mix(key)));
        let id = |n: usize| SpanId::from(seed::mix(key ^ n as u64).max(1));
        let at = |seconds: f64| began + Duration::from_secs_f64(seconds.max(0.0));
        let span = |n: usize, parent: SpanId, name: String, start: f64, end: f64, version: u64| SpanData {
            span_context: SpanContext::new(trace_id, id(n), TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: parent,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time: at(start),
            end_time: at(end),
            attributes: vec![
                KeyValue::new("preceptor.group", i64::try_from(seq).unwrap_or(i64::MAX)),
                KeyValue::new("preceptor.version", i64::try_from(version).unwrap_or(i64::MAX)),
                KeyValue::new("preceptor.incarnation", i64::try_from(incarnation).unwrap_or(i64::MAX)),
            ],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("preceptor").build(),
        };
        let start = spans.iter().map(|span| span.start_s).fold(f64::MAX, f64::min);
        let end = spans.iter().map(|span| span.end_s).fold(f64::MIN, f64::max);
        let version = spans.iter().map(|span| span.version).max().unwrap_or(0);
        let whole = span(0, SpanId::INVALID, "group".into(), start, end, version);
        let stages = spans.iter().enumerate();
        let stages = stages.map(|(n, one)| span(n + 1, id(0), one.stage.clone(), one.start_s, one.end_s, one.version));
        std::iter::once(whole).chain(stages).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(incarnation: u64, spans: &[(&str, u64, f64)]) -> GraphReport {
        let span = |(stage, seq, end_s): &(&str, u64, f64)| Span {
            stage: (*stage).into(),
            seq: *seq,
            version: 0,
            start_s: end_s - 0.5,
            end_s: *end_s,
        };
        GraphReport {
            incarnation,
            uptime_s: 100.0,
            timeline: spans.iter().map(span).collect(),
            ..GraphReport::default()
        }
    }

    #[test]
    fn a_group_is_told_once_it_is_trained_with_every_stage_that_had_it() {
        let mut gather = Gather::default();
        let begun = [("prompts", 0, 1.0), ("rollout-0", 0, 2.0), ("prompts", 1, 2.5)];
        assert!(gather.take(&report(0, &begun), 10).is_empty());
        // What was seen before comes again, as long as the timeline has it.
        let done = gather.take(&report(0, &[&begun[..], &[("label-0", 0, 3.0), ("learn", 0, 4.0)]].concat()), 10);
        let stages: Vec<&str> = done[0].iter().map(|span| span.stage.as_str()).collect();
        assert_eq!((done.len(), &stages[..]), (1, &["prompts", "rollout-0", "label-0", "learn"][..]));
        // Another incarnation begins anew.
        let done = gather.take(&report(1, &[("learn", 1, 0.7)]), 10);
        assert_eq!(done[0].len(), 1);
        gather.take(&report(1, &[("prompts", 5, 5.0), ("prompts", 6, 5.1), ("prompts", 7, 5.2)]), 2);
        assert_eq!(gather.open.keys().copied().collect::<Vec<_>>(), [6, 7]);
    }
}
