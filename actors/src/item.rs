//! Items that travel on edges.

/// Value with its sequence number, incarnation and version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<T> {
    /// Sequence number: the item's identity and its place in the run's order.
    pub seq: u64,
    /// Incarnation of the graph that created it; other incarnations refuse it.
    pub incarnation: u64,
    /// Version of the weights or data from which it was made.
    pub version: u64,
    /// The value.
    pub body: T,
}
