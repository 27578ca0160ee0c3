"""The experiments beyond the main replication, each runnable: python -m experiments.NAME."""
