"""Kernels for the hot updates: each a reference, its backends, and one public function that picks."""
