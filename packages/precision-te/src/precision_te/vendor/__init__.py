"""Transformer Engine: all that imports it is in this folder, and imports it when it is first needed."""
