"""Products of tokens with the weights of the experts that they are routed to."""
