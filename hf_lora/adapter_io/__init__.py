"""Where a live model and an adapter's files meet: saving, loading, matching one with the other."""
