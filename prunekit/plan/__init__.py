"""From scores or an order to the exact cuts, what they cost, and where the result loads."""
