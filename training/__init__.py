"""Parts of train.py: what a run starts from, one optimizer step, validation, the order of the data. The loop itself stands in train.py."""
