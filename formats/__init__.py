"""What stages hand over: bytes on disk, read and written in one place each. Nothing here computes."""
