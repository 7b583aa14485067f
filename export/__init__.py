"""Parts of export_model.py: one file per format, and the proof that what was written computes what the model computes."""
