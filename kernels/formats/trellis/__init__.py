"""The format "trellis": a row scale and a bit string a column."""
