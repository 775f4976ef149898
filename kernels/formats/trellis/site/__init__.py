"""A whole site: prologue, rotation, projection and product."""
