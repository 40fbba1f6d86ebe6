"""From scores to a subset: tables, policies, agreement."""
