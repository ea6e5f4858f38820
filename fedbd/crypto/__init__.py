"""The encrypted sum: grid, CKKS, and the agent that keeps the key away from the server."""
