"""The three designs of a side network, and what they share."""
