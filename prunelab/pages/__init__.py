"""Self-contained HTML pages, charts, units, and what the commands share."""
