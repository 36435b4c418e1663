"""What a client sends: its factors per module, PEFT's config and keys, the folder on disk."""
