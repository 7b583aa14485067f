"""Parts of evaluate.py and compare.py: how well a model predicts. Training validates with the same arithmetic."""
