"""Plan → what is sent to a cluster, as plain values: pure functions."""
