"""Songs: sources → ``prepare`` → shards of a dataset → ``planner`` → ``loader``."""
