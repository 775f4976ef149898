"""What the command line does, one command a file: `add` declares its arguments, `run` does the work."""
