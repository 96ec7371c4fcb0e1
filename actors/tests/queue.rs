//! The queue with leases against one that looks at all of its messages in each operation.

use std::sync::Arc;
use std::time::Duration;

use preceptor_actors::transport::{Depth, LeaseId, LeasedQueue, QueueLimits};

/// A message: its identifier, how often it was delivered, and the end of its lease.
type Message = (String, u64, Option<Duration>);

#[derive(Default)]
struct Plain(Vec<Message>);

impl Plain {
    fn expire(&mut self, now: Duration) {
        for (_, _, until) in &mut self.0 {
            *until = until.filter(|until| *until > now);
        }
    }

    fn pull(&mut self, most: usize, until: Duration) -> Vec<(String, u64)> {
        let waiting = self.0.iter_mut().filter(|(_, _, until)| until.is_none()).take(most);
        let lease = |(id, deliveries, end): &mut Message| {
            (*deliveries, *end) = (*deliveries + 1, Some(until));
            (id.clone(), *deliveries)
        };
        waiting.map(lease).collect()
    }

    /// Returns the place of a message whose lease is that of this delivery.
    fn leased(&self, (id, delivery): &(String, u64)) -> Option<usize> {
        self.0.iter().position(|(of, deliveries, until)| of == id && deliveries == delivery && until.is_some())
    }
}

#[test]
fn random_operations_have_the_results_of_a_queue_that_looks_at_all_messages() {
    let seconds = Duration::from_secs;
    let limits = |lease| QueueLimits { lease: seconds(lease), messages: 40, bytes: 8 };
    let (mut queue, mut plain) = (LeasedQueue::new("q", limits(10)), Plain::default());
    let (mut state, mut now, mut lease) = (1u64, Duration::ZERO, 10);
    let mut held = Vec::<(LeaseId, (String, u64))>::new();
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for step in 0..20_000 {
        plain.expire(now);
        let one = (!held.is_empty()).then(|| held[draw(held.len() as u64) as usize].clone());
        match (draw(8), one) {
            (0 | 1, _) => {
                let offered = queue.offer(&step.to_string(), Arc::from([0u8]), now);
                assert_eq!(offered.is_ok(), plain.0.len() < 40);
                if offered.is_ok() {
                    plain.0.push((step.to_string(), 0, None));
                }
            }
            (2 | 3, _) => {
                let most = draw(4) as usize;
                let pulled = queue.pull(most, now);
                let pulled = pulled.into_iter().map(|one| (one.lease, (one.id.to_string(), one.deliveries)));
                let (leases, found): (Vec<_>, Vec<_>) = pulled.unzip();
                assert_eq!(found, plain.pull(most, now + seconds(lease)));
                held.extend(leases.into_iter().zip(found));
            }
            (4, Some((one, of))) => {
                let place = plain.leased(&of);
                assert_eq!(queue.acknowledge(one, now).is_ok(), place.is_some());
                place.map(|place| plain.0.remove(place));
                held.retain(|(other, _)| *other != one);
            }
            (5, Some((one, of))) => {
                let place = plain.leased(&of);
                assert_eq!(queue.give_back(one, now).is_ok(), place.is_some());
                if let Some(place) = place {
                    plain.0[place].2 = None;
                }
            }
            (6, Some((one, of))) => {
                let place = plain.leased(&of);
                assert_eq!(queue.extend(one, now).is_ok(), place.is_some());
                if let Some(place) = place {
                    plain.0[place].2 = Some(now + seconds(lease));
                }
            }
            _ if draw(40) == 0 => {
                lease = 1 + draw(20);
                queue.set_limits(limits(lease));
            }
            _ => now += seconds(draw(3)),
        }
        plain.expire(now);
        let leased = plain.0.iter().filter(|(_, _, until)| until.is_some()).count();
        assert_eq!(queue.depth(now), Depth { waiting: plain.0.len() - leased, leased });
        assert_eq!(queue.first_expiry(), plain.0.iter().filter_map(|(_, _, until)| *until).min());
    }
}
