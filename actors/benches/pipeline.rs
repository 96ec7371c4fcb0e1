//! Overhead of the runtime itself.
//!
//!     cargo bench -p preceptor-actors                          # with its counters and spans
//!     cargo bench -p preceptor-actors --features unobserved    # without

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use preceptor_actors::scripted::{ScriptedSink, ScriptedSource, ScriptedStage};
use preceptor_actors::{Clock, GraphBuilder, GraphOptions, Outcome, StageSpec, spawn_graph};

/// Wires source → `layers` layers of `workers` stages each → sink; every stage takes `duration`.
fn wire(builder: &mut GraphBuilder, items: u64, layers: usize, workers: usize, duration: Duration) {
    let (out, mut next) = builder.edge("0", 64);
    builder.source(StageSpec::new("source"), ScriptedSource { next: 0, end: items, gate: None }, out);
    for layer in 0..layers {
        let (out, inlet) = builder.edge(&(layer + 1).to_string(), 64);
        for worker in 0..workers {
            let spec = StageSpec::new(format!("{layer}-{worker}")).stack(128 << 10);
            builder.stage(spec, ScriptedStage::taking(duration), next.clone(), out.clone());
        }
        next = inlet;
    }
    let sink = ScriptedSink::new(ScriptedStage::default(), items.max(1), None, |_, _| {});
    builder.sink(StageSpec::new("sink"), sink, next);
}

/// Returns the real time of one run.
fn run(clock: Clock, items: u64, layers: usize, workers: usize, duration: Duration) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let options = GraphOptions { clock, ..GraphOptions::default() };
    runtime.block_on(async move {
        let began = Instant::now();
        let graph = spawn_graph(options, move |builder| {
            wire(builder, items, layers, workers, duration);
            Ok(())
        });
        assert_eq!(graph.wait().await, Outcome::Finished);
        began.elapsed()
    })
}

fn pipeline(criterion: &mut Criterion) {
    const ITEMS: u64 = 10_000;
    let mut group = criterion.benchmark_group("overhead");
    group.sample_size(10);
    group.throughput(Throughput::Elements(ITEMS));
    for (name, layers) in [("one edge", 0), ("three edges", 2)] {
        group.bench_function(name, |b| {
            b.iter_custom(|rounds| (0..rounds).map(|_| run(Clock::real(), ITEMS, layers, 1, Duration::ZERO)).sum());
        });
    }
    // Items whose processing time is short for a computing stage.
    const FEW: u64 = 1000;
    group.throughput(Throughput::Elements(FEW));
    group.bench_function("three edges, items of 200 µs", |b| {
        let short = Duration::from_micros(200);
        b.iter_custom(|rounds| (0..rounds).map(|_| run(Clock::real(), FEW, 2, 1, short)).sum());
    });
    group.throughput(Throughput::Elements(ITEMS));
    group.bench_function("1,000 rollout actors, simulated time", |b| {
        let second = Duration::from_secs(1);
        b.iter_custom(|rounds| (0..rounds).map(|_| run(Clock::simulated(), ITEMS, 1, 1000, second)).sum());
    });
    group.finish();
}

criterion_group!(benches, pipeline);
criterion_main!(benches);
