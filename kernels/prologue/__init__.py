"""Prologue of a packed site, computed where its input is loaded: RMS norm, gated activation."""
