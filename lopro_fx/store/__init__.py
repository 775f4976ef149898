"""Everything on disk: layers, journals of runs, programs and states; files are replaced whole."""
