"""The packed weight format; `format.py` is its one page, `oracle.py` the NumPy twin that tests hold it against."""
