"""Networks: pure functions over a parameter pytree. They know nothing of requests, rules or caches."""
