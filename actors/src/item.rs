//! What travels on an edge.

/// A body with its tags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<T> {
    /// Identity and place in the run's order.
    pub seq: u64,
    /// Incarnation of the graph that made it; another graph refuses it.
    pub incarnation: u64,
    /// Version of the weights or data it stems from.
    pub version: u64,
    /// What is carried.
    pub body: T,
}
