"""The low-rank branch's down-projection."""
