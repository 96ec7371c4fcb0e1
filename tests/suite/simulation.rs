//! Simulated workers that die, lose their connection and are slow, with the rules of the program.

#[allow(dead_code)]
#[path = "../../benches/simulate/fleet.rs"]
mod fleet;

use std::time::Duration;

use fleet::{Lengths, Setting, Violation, simulate};

/// Fifty workers, of which a third die per minute, and two messages for a group of four completions.
fn setting(eta: u64) -> Setting {
    Setting {
        workers: 50,
        eta,
        batch: 16,
        group: 4,
        part: 2,
        steps: 25,
        warm_up: 5,
        step: Duration::from_secs(30),
        lease: Duration::from_secs(20),
        capacity: 1.5,
        lengths: Lengths { median: 100.0, sigma: 1.0, longest: 1000.0 },
        deaths: 0.33,
        cuts: 0.2,
        slow: (0.05, 10.0),
        slowest: None,
        resumed: false,
        transfer: Duration::from_secs(20),
        seed: 3,
        violation: Violation::None,
    }
}

#[test]
fn every_group_is_trained_once_within_the_bound_while_workers_die() {
    let mut repeated = 0;
    for eta in [0, 1, 4] {
        for resumed in [false, true] {
            let outcome = simulate(&Setting { resumed, ..setting(eta) });
            assert_eq!((outcome.groups, outcome.lost, outcome.doubled, outcome.foreign), (400, 0, 0, 0), "{outcome:?}");
            assert!(outcome.oldest <= eta && outcome.deaths > 100 && outcome.refused == 0, "{outcome:?}");
            repeated += outcome.repeated;
        }
    }
    assert!(repeated > 0, "no work had two results");
}

/// The test above would notice a broken rule.
#[test]
fn a_simulation_with_a_broken_rule_loses_groups_or_exceeds_the_bound() {
    let broken = |violation| simulate(&Setting { violation, ..setting(1) });
    let outcome = broken(Violation::EarlyAcknowledgement);
    assert!(outcome.lost > 0, "{outcome:?}");
    let outcome = broken(Violation::AnyVersion);
    assert!(outcome.oldest > 1, "{outcome:?}");
}
