"""Features of frozen backbones as a table, and classical heads that are fitted to them."""
