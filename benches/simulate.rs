//! exploration
#[path = "simulate/fleet.rs"]
mod fleet;
use fleet::*;
use std::time::{Duration, Instant};
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let get = |k: &str, d: f64| a.iter().position(|x| x == k).map_or(d, |i| a[i + 1].parse().unwrap());
    let group = get("group", 32.0) as usize;
    let s = Setting {
        workers: get("workers", 10000.0) as usize,
        eta: get("eta", 4.0) as u64,
        batch: get("batch", 512.0) as u64,
        group,
        part: get("part", 1.0) as usize,
        steps: get("steps", 40.0) as u64,
        warm_up: get("warm", 10.0) as u64,
        step: Duration::from_secs_f64(get("T", 60.0)),
        lease: Duration::from_secs_f64(get("lease", 60.0)),
        capacity: get("cap", 1.25),
        lengths: Lengths { median: get("median", 620.0), sigma: 1.0, longest: get("longest", 4096.0) },
        deaths: get("deaths", 0.05),
        cuts: get("cuts", 0.005),
        slow: (get("slow", 0.05), 10.0),
        slow_wait: get("wait", 1.0) > 0.0,
        transfer: Duration::from_secs_f64(get("transfer", 3.36)),
        seed: 1,
        violation: Violation::None,
    };
    let t = Instant::now();
    let o = simulate(&s);
    println!("token {:.4} s  mean {:.0} tokens", s.token_s(), s.lengths.mean_of_longest(1));
    println!("{o:?}");
    println!("share {:.3} redone {:.3} real {:?} coord {:.1} us/group", o.share, o.redone, t.elapsed(), o.coordinator.as_micros() as f64 / o.groups as f64);
}
