"""What stands before a packed site and is computed where its input is loaded: RMS norm, gated activation."""
