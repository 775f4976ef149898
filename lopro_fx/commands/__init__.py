"""Commands of the command line, one a file: `add` declares its arguments, `run` does the work."""
