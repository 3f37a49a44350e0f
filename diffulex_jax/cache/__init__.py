"""The paged KV pool on the device and its allocator on the host."""
