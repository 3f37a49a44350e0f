"""The host loop around the jitted step: slots, pages, requests in and out."""
