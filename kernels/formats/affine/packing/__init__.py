"""The packed weight format, defined in `format.py`; tests compare it with a NumPy twin."""
