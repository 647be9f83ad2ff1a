"""Elastic training on Ray: a run is a function of its configuration, workers only decide how fast."""
