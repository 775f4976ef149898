"""Graph surgery on exported programs, one pass a file; installed as `lopro_fx.passes`. Importing this does nothing."""
