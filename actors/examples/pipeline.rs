//! The runtime with stages that simulate devices: rollout 10 ms ×2, label 6 ms, reward 3 ms, learn 8 ms.
//!
//!     cargo run --release -p preceptor-actors --example pipeline
//!     cargo run --release -p preceptor-actors --example pipeline -- --actors 1000 --simulated --rollout-ms 5000

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use preceptor_actors::report::shares;
use preceptor_actors::scripted::{ScriptedSink, ScriptedSource, ScriptedStage};
use preceptor_actors::{
    Admission, AdmissionGate, Clock, GraphBuilder, GraphOptions, Item, Outcome, StageSpec, spawn_graph,
};

const HELP: &str = "\
The dataflow runtime with scripted stages.

  --items N         items to send (default 600)
  --actors N        rollout actors (default 2)
  --rollout-ms N    time of one rollout (default 10)
  --eta N           staleness bound (default 1)
  --simulated       virtual time: sleeps take no real time
";

const BATCH: u64 = 8;
const LABEL: Duration = Duration::from_millis(6);
const REWARD: Duration = Duration::from_millis(3);
const LEARN: Duration = Duration::from_millis(8);

#[derive(Clone)]
struct Options {
    items: u64,
    actors: u64,
    rollout: Duration,
    eta: u64,
    simulated: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options { items: 600, actors: 2, rollout: Duration::from_millis(10), eta: 1, simulated: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || -> Result<u64, String> {
            let text = words.next().ok_or(format!("{word} must be followed by a number"))?;
            text.parse().map_err(|_| format!("{text} is not a number"))
        };
        match word.as_str() {
            "--items" => options.items = number()?,
            "--actors" => options.actors = number()?,
            "--rollout-ms" => options.rollout = Duration::from_millis(number()?),
            "--eta" => options.eta = number()?,
            "--simulated" => options.simulated = true,
            _ => return Err(HELP.to_owned()),
        }
    }
    Ok(options)
}

/// Time at which each item was learned, and its staleness.
type Log = Arc<Mutex<Vec<(Duration, u64)>>>;

fn wire(builder: &mut GraphBuilder, options: &Options, clock: &Clock, log: &Log) {
    let gate = Arc::new(AdmissionGate::new(Admission { eta: options.eta, batch: BATCH }, 0, 0));
    let (prompts_out, prompts) = builder.edge("prompts", 1);
    let (groups_out, groups) = builder.edge("groups", 2);
    let (labeled_out, labeled) = builder.edge("labeled", 2);
    let (rewarded_out, rewarded) = builder.edge("rewarded", 2);
    let source = ScriptedSource { next: 0, end: options.items, gate: Some(Arc::clone(&gate)) };
    builder.source(StageSpec::new("prompts"), source, prompts_out);
    for i in 0..options.actors {
        let spec = StageSpec::new(format!("rollout-{i}")).role("rollout").stack(128 << 10);
        builder.stage(spec, ScriptedStage::taking(options.rollout), prompts.clone(), groups_out.clone());
    }
    drop((prompts, groups_out));
    builder.stage(StageSpec::new("label"), ScriptedStage::taking(LABEL), groups, labeled_out);
    builder.stage(StageSpec::new("reward"), ScriptedStage::taking(REWARD), labeled, rewarded_out);
    let (log, clock) = (Arc::clone(log), clock.clone());
    let each = move |item: &Item<u64>, version: u64| {
        log.lock().expect("no holder panics").push((clock.now(), version - item.version));
    };
    builder.sink(
        StageSpec::new("learn"),
        ScriptedSink::new(ScriptedStage::taking(LEARN), BATCH, Some(gate), each),
        rewarded,
    );
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = options()?;
    let clock = if options.simulated { Clock::simulated() } else { Clock::real() };
    let log = Log::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let began = Instant::now();
    let (outcome, report) = runtime.block_on(async {
        let (options, clock, log) = (options.clone(), clock.clone(), Arc::clone(&log));
        let graph = spawn_graph(GraphOptions { clock: clock.clone(), ..GraphOptions::default() }, move |builder| {
            wire(builder, &options, &clock, &log);
            Ok(())
        });
        (graph.wait().await, graph.report())
    });
    let took = began.elapsed();
    if outcome != Outcome::Finished {
        return Err(format!("the graph ended with {outcome:?}").into());
    }
    let log = log.lock().map_err(|_| "the log's holder panicked")?;
    // The pipeline fills during the first quarter; the rest is steady.
    let steady = &log[log.len() / 4..];
    let span = steady[steady.len() - 1].0 - steady[0].0;
    let rate = (steady.len() - 1) as f64 / span.as_secs_f64();
    let slowest = (options.rollout / options.actors as u32).max(LEARN).max(LABEL);
    let bound = 1.0 / slowest.as_secs_f64();
    println!("steady      {rate:.1} items/s, {:.1} % of the slowest stage's {bound:.1}", 100.0 * rate / bound);
    let stale: Vec<u64> = log.iter().map(|(_, stale)| *stale).collect();
    let mean = stale.iter().sum::<u64>() as f64 / stale.len() as f64;
    println!(
        "staleness   mean {mean:.2}, at most {}, under a bound of {}",
        stale.iter().max().unwrap_or(&0),
        options.eta
    );
    let shares = shares(&report.stages, &[]);
    if let Some(busiest) = shares.iter().max_by(|a, b| a.busy.total_cmp(&b.busy)) {
        println!("limit       {} works {:.0} % of the time", busiest.role, 100.0 * busiest.busy);
    }
    if options.simulated {
        let each = took.as_secs_f64() * 1e6 / log.len() as f64;
        println!("overhead    {each:.1} µs of real time per item, with {} rollout actors", options.actors);
        return Ok(());
    }
    let rounds = 40u32;
    let began = Instant::now();
    for _ in 0..rounds {
        for stage in [options.rollout, LABEL, REWARD, LEARN] {
            std::thread::sleep(stage);
        }
    }
    let serial = f64::from(rounds) / began.elapsed().as_secs_f64();
    println!("the same stages in sequence do {serial:.1} items/s: the graph does {:.2} times as many", rate / serial);
    Ok(())
}
