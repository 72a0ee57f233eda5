"""Publishing entries to a Hub and fetching them from one; and a Hub of our own."""
