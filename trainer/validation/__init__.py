"""Songs rendered with the current weights, or with those of a finished run."""
