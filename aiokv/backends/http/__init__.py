"""The service as a client sees it: one pooled session, credentials exchanged for tokens, retries."""
