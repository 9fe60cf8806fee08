"""Models, data and training: what runs on the cluster."""
