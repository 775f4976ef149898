"""Loops over columns: rounding with feedback, coordinate descent, and the fit of a group's grid."""
