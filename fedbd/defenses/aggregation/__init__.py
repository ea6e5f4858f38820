"""Rules that turn a cohort into one update."""
