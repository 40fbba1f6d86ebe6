"""Flower's side: ClientApp, ServerApp, records, engines."""
