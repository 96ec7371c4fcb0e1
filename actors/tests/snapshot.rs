//! The cell that passes the newest weights to its readers.

use std::sync::Arc;

use preceptor_actors::SnapshotCell;

#[test]
fn readers_pull_and_acknowledge() {
    let cell = Arc::new(SnapshotCell::new(0, 10, Arc::new("zero")));
    let (mut a, mut b) = (cell.reader("a"), cell.reader("b"));
    let first = a.refresh().expect("a first snapshot is news");
    a.acknowledge(&first, 10);
    assert!(a.refresh().is_none());
    cell.publish(2, 12, Arc::new("two"));
    cell.publish(1, 11, Arc::new("late"));
    let second = b.refresh().expect("newer");
    assert_eq!((second.version, *second.value), (2, "two"));
    b.acknowledge(&second, 99);
    let acks = cell.acks();
    assert_eq!((acks[0].lag, acks[0].fingerprint_matches), (2, true));
    assert_eq!((acks[1].lag, acks[1].fingerprint_matches), (0, false));
}
