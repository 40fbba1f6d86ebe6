"""Scoring a data set: methods by name, jobs, engines, shards."""
