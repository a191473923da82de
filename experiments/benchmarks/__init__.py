"""Measurements of speed and memory: their records, and the tables that the README and `docs/` show of them."""
