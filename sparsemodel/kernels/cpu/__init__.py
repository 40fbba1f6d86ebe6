"""The native CPU library and its bindings."""
