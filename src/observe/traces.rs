//! OpenTelemetry traces: one per prompt group, from its admission to its gradient, with a span for each stage that
//! processed it. Requires the feature `otel`. OpenTelemetry's variable `OTEL_EXPORTER_OTLP_ENDPOINT` names the
//! collector.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use preceptor_actors::{GraphHandle, Span, SpanCursor};

use export::Exports;

/// Maximum number of unfinished groups whose spans are kept.
const MAX_OPEN: usize = 4096;

/// Names of the environment variables that set a collector.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// Sends the traces of successive graphs to a collector.
pub struct Tracer {
    collector: SpanCollector,
    seen: SpanCursor,
    /// Number of lost spans that were logged.
    logged: u64,
    /// The last observed incarnation.
    began: Option<Incarnation>,
    exports: Exports,
}

/// The number of an incarnation of the graph, and the time at which it began.
type Incarnation = (u64, SystemTime);

impl Tracer {
    /// Creates a tracer of the run `run`, or returns `None` if no collector is set.
    ///
    /// # Errors
    /// If the endpoint is not a valid URL.
    pub fn start(run: &str) -> Result<Option<Self>> {
        if !ENDPOINTS.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty())) {
            return Ok(None);
        }
        let tracer = |exports| Self {
            collector: SpanCollector::default(),
            seen: SpanCursor::default(),
            logged: 0,
            began: None,
            exports,
        };
        Ok(Exports::open(run)?.map(tracer))
    }

    /// Reads new spans, and sends the groups that were trained before the previous call. Must be called in a tokio
    /// runtime.
    pub fn read(&mut self, graph: &GraphHandle) {
        let report = graph.report();
        let now = SystemTime::now();
        let began = now.checked_sub(Duration::from_secs_f64(report.uptime_s)).unwrap_or(now);
        let began = (report.incarnation, began);
        let before = *self.began.get_or_insert(began);
        if before.0 != began.0 {
            // Sends the groups that the previous incarnation had trained when it ended.
            self.exports.send(before, self.collector.take(Vec::new()));
            self.collector = SpanCollector::default();
        }
        self.began = Some(began);
        self.exports.send(began, self.collector.take(graph.spans(&mut self.seen)));
        if self.seen.lost() > self.logged {
            let lost = self.seen.lost() - self.logged;
            tracing::warn!("{lost} trace spans were lost: stages recorded more spans between two reads than they keep");
            self.logged = self.seen.lost();
        }
    }

    /// Sends the remaining groups of a graph that has ended.
    pub fn ended(&mut self, graph: &GraphHandle) {
        // The second call sends the groups that the first one found trained.
        self.read(graph);
        self.read(graph);
        (self.collector, self.seen, self.logged, self.began) = Default::default();
    }

    /// Waits a few seconds for exports in progress.
    pub async fn finish(self) {
        self.exports.finish().await;
    }
}

/// Collects the spans of a graph's stages by group.
#[derive(Debug, Default)]
struct SpanCollector {
    open: BTreeMap<u64, Vec<Span>>,
    /// Groups that were found trained by the last call. A stage records its span after it has sent the group to the
    /// next stage, so a span may arrive after those of later stages. Each group therefore waits for one more call.
    trained: BTreeSet<u64>,
}

impl SpanCollector {
    /// Adds new spans. Returns the groups that the previous call found trained, each with its spans in order of time.
    fn take(&mut self, new: Vec<Span>) -> Vec<Vec<Span>> {
        let due = std::mem::take(&mut self.trained);
        for span in new {
            if span.stage == "learn" {
                self.trained.insert(span.seq);
            }
            self.open.entry(span.seq).or_default().push(span);
        }
        let mut done: Vec<Vec<Span>> = due.into_iter().filter_map(|seq| self.open.remove(&seq)).collect();
        for spans in &mut done {
            spans.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
        }
        while self.open.len() > MAX_OPEN {
            self.open.pop_first();
        }
        done
    }
}

#[cfg(not(feature = "otel"))]
mod export {
    use anyhow::Result;
    use preceptor_actors::Span;

    use super::Incarnation;

    /// Uninhabited: this build cannot export traces.
    pub(super) enum Exports {}

    impl Exports {
        pub(super) fn open(_run: &str) -> Result<Option<Self>> {
            crate::status!("note      traces are not sent: this program was built without --features otel");
            Ok(None)
        }

        pub(super) fn send(&mut self, _of: Incarnation, _groups: Vec<Vec<Span>>) {
            match *self {}
        }

        pub(super) async fn finish(self) {
            match self {}
        }
    }
}

#[cfg(feature = "otel")]
mod export {
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use anyhow::{Context, Result};
    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
    use opentelemetry::{InstrumentationScope, KeyValue};
    use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
    use preceptor_actors::Span;
    use tokio::task::JoinSet;

    use super::Incarnation;
    use crate::util::seed;

    /// Time that the end of a run waits for the collector.
    const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

    /// The exporter, and exports in progress.
    pub(super) struct Exports {
        run: u64,
        exporter: Arc<SpanExporter>,
        in_progress: JoinSet<()>,
    }

    impl Exports {
        pub(super) fn open(run: &str) -> Result<Option<Self>> {
            // This client follows no redirects, because OTEL_EXPORTER_OTLP_HEADERS may hold a secret.
            let http = crate::util::http::builder().build().context("cannot set up the HTTP client of traces")?;
            let exporter = SpanExporter::builder().with_http().with_http_client(http);
            let exporter = exporter.with_protocol(Protocol::HttpJson).build();
            let mut exporter = exporter.context("OTEL_EXPORTER_OTLP_ENDPOINT cannot be used")?;
            let resource = Resource::builder().with_service_name("preceptor");
            exporter.set_resource(&resource.with_attribute(KeyValue::new("preceptor.run", run.to_owned())).build());
            Ok(Some(Self { run: seed::text(run), exporter: Arc::new(exporter), in_progress: JoinSet::new() }))
        }

        pub(super) fn send(&mut self, (incarnation, began): Incarnation, groups: Vec<Vec<Span>>) {
            // Removes finished exports.
            while self.in_progress.try_join_next().is_some() {}
            let batch: Vec<SpanData> =
                groups.iter().flat_map(|spans| trace(self.run, incarnation, began, spans)).collect();
            if batch.is_empty() {
                return;
            }
            let exporter = Arc::clone(&self.exporter);
            self.in_progress.spawn(async move {
                if let Err(error) = exporter.export(batch).await {
                    tracing::warn!("the collector did not accept traces: {error}");
                }
            });
        }

        pub(super) async fn finish(mut self) {
            let all = async { while self.in_progress.join_next().await.is_some() {} };
            if tokio::time::timeout(EXPORT_TIMEOUT, all).await.is_err() {
                tracing::warn!("the collector did not accept the last traces within {EXPORT_TIMEOUT:?}");
            }
        }
    }

    /// Converts a group's spans to a trace, with a root span that covers all of them.
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
        let root = span(0, SpanId::INVALID, "group".into(), start, end, version);
        let stages = spans.iter().enumerate();
        let stages = stages.map(|(n, one)| span(n + 1, id(0), one.stage.clone(), one.start_s, one.end_s, one.version));
        std::iter::once(root).chain(stages).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(of: &[(&str, u64, f64)]) -> Vec<Span> {
        let span = |(stage, seq, end_s): &(&str, u64, f64)| Span {
            stage: (*stage).into(),
            seq: *seq,
            version: 0,
            start_s: end_s - 0.5,
            end_s: *end_s,
        };
        of.iter().map(span).collect()
    }

    #[test]
    fn a_trained_group_is_sent_once_with_the_spans_of_all_stages() {
        let mut collector = SpanCollector::default();
        assert!(collector.take(spans(&[("rollout-0", 0, 2.0), ("prompts", 0, 1.0), ("prompts", 1, 2.5)])).is_empty());
        // The span of the label stage arrives after the learner's.
        assert!(collector.take(spans(&[("learn", 0, 4.0)])).is_empty());
        let done = collector.take(spans(&[("label-0", 0, 3.0), ("rollout-0", 1, 4.5)]));
        let stages: Vec<&str> = done[0].iter().map(|span| span.stage.as_str()).collect();
        assert_eq!((done.len(), &stages[..]), (1, &["prompts", "rollout-0", "label-0", "learn"][..]));
        assert!(collector.take(Vec::new()).is_empty(), "it is sent once");
        let mut collector = SpanCollector::default();
        let many: Vec<(&str, u64, f64)> = (0..MAX_OPEN as u64 + 2).map(|seq| ("prompts", seq, 5.0)).collect();
        collector.take(spans(&many));
        assert_eq!((collector.open.len(), collector.open.first_key_value().map(|(seq, _)| *seq)), (MAX_OPEN, Some(2)));
    }
}
