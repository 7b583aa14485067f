"""Parts of benchmark.py: one file per stage that is measured. Peers run from their own checkouts; none of their code stands here."""
