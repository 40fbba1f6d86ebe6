"""Data-efficient fine-tuning of language models as recommenders: DEALRec, step by step."""
