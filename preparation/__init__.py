"""Parts of prepare_data.py and tokenizer_train.py: from text to documents to token ids. Nothing here imports torch."""
