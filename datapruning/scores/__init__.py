"""Scores of training samples, a file for each family; high means keep, for every one."""
