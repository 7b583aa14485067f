"""Parts of generate.py: from a prompt to a text that grows as it is drawn. Knows models and tokenizers, not where they are stored."""
