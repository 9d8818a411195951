"""Pages for people, made of what is known of adapters."""
