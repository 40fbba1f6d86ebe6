"""Masks in training loops of others: any torch loop, transformers' Trainer, Lightning."""
