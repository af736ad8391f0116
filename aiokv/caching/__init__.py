"""`kv_cached`: share the results of expensive coroutines through a store."""
