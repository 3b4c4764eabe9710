"""TensorBoard event files of scalars: writing them fast, and reading a run's files as one frame.

layout.py holds the format and the names, encode.py writes blocks of scalars, decode.py reads one
file, and series.py joins the files of a run.
"""
