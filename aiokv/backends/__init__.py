"""Places where values live inside this process: memory and SQLite, behind the protocol `Backend`."""
